"""Clips follow from split and number; their sound, mouth, pose and prompt belong together."""

import dataclasses

import jax
import numpy as np
import pytest

from emv3_jax.puppets import clips, law, voice, world

pytestmark = pytest.mark.usefixtures("quick_compile")


def leaves(clip: clips.Clip) -> list:
    parts = [getattr(clip, field.name) for field in dataclasses.fields(clip)]
    return [np.asarray(leaf) for part in parts for leaf in jax.tree.leaves(part)]


def test_the_same_number_gives_the_same_clip():
    for a, b in zip(leaves(clips.make_clip("train", 4, 21)), leaves(clips.make_clip("train", 4, 21)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("frames", [5, 21])
def test_lengths(frames):
    clip = clips.make_clip("train", 4, frames)
    assert clip.wave.shape == (frames * 640,) and clip.mouth.shape == (frames, 2)
    assert all(leaf.shape == (frames,) for leaf in jax.tree.leaves(clip.pose))


def test_the_splits_share_nothing():
    train, heldout = (clips.make_clip(split, 4, 21) for split in world.SPLITS)
    assert np.abs(train.wave - heldout.wave).max() > 0.1
    assert np.abs(train.identity.clothes - heldout.identity.clothes).max() > 0.01


def test_the_mouth_obeys_the_law_save_in_a_portrait_at_rest():
    rested = 0
    for index in range(20):
        clip = clips.make_clip("heldout", index, 21)
        true = law.mouth_law(clip.wave, 21)
        np.testing.assert_array_equal(clip.mouth[1:], true[1:])
        rested += clip.mouth[0, 0] == 0 < true[0, 0]
        np.testing.assert_array_equal(clip.pose.mouth_height, clip.mouth[:, 0])
    assert 0 < rested < 20


def test_a_given_recording_is_what_is_said_and_changes_nothing_else():
    wave = voice.speak("heldout", 9, voice.sample_voice("heldout", 9), 0.84)
    own, spoken = clips.make_clip("train", 4, 21), clips.make_clip("train", 4, 21, wave=wave)
    np.testing.assert_array_equal(spoken.wave, wave)
    np.testing.assert_array_equal(spoken.mouth[1:], law.mouth_law(wave, 21)[1:])
    assert (spoken.prompt, spoken.motion) == (own.prompt, own.motion)
    np.testing.assert_array_equal(spoken.identity.skin, own.identity.skin)


def test_every_motion_expression_and_camera_occurs():
    some = [clips.make_clip("train", i, 5) for i in range(60)]
    for name, options in (("motion", world.MOTIONS), ("expression", world.EXPRESSIONS), ("camera", world.CAMERAS)):
        assert {getattr(clip, name) for clip in some} == set(options)


def test_with_motion_changes_the_motion_alone():
    clip = clips.make_clip("train", 4, 21)
    for motion in world.MOTIONS:
        other = clip.with_motion(motion)
        assert other.motion == motion
        np.testing.assert_array_equal(other.pose.mouth_height, clip.pose.mouth_height)
        np.testing.assert_array_equal(other.pose.blink, clip.pose.blink)
        if motion == clip.motion:
            jax.tree.map(np.testing.assert_array_equal, other.pose, clip.pose)


def test_crops_for_training_follow_from_the_generator():
    sample = lambda seed: np.asarray(  # noqa: E731
        clips.sample_crops(np.random.default_rng(seed), 3, 5, 16, picture=32, identities=4, sentences=1)
    )
    first = sample(0)
    assert first.shape == (3, 5, 16, 16, 3) and np.abs(first).max() <= 1.0
    np.testing.assert_array_equal(first, sample(0))
    assert np.abs(first - sample(1)).max() > 0.1
    assert np.abs(first[0] - first[1]).max() > 0.1
