"""The measures see what is in the pictures: true videos score full marks, and each fault is seen as that fault."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from emv3_jax.puppets import clips, metrics, world

pytestmark = pytest.mark.usefixtures("quick_compile")
SIZE, FRAMES = 64, 29


@functools.cache
def clip_of(index: int) -> clips.Clip:
    return clips.make_clip("heldout", index, FRAMES)


@functools.cache
def true_video(index: int) -> np.ndarray:
    return np.asarray(clip_of(index).render(SIZE))


@pytest.mark.parametrize("index", range(4))
def test_the_true_video_has_full_marks(index):
    scores = metrics.score_clip(true_video(index), clip_of(index), clip_of(index + 1).mouth)
    assert scores["sync"] > 0.97 and scores["offset"] == 0
    laws = metrics.correlation(clip_of(index).mouth[1:, 0], clip_of(index + 1).mouth[1:, 0])
    assert scores["sync_other"] == pytest.approx(laws, abs=0.03)  # what the two recordings have in common
    assert scores["motion"] == 1.0
    assert scores["identity"] < 1.0 and scores["drift"] == 0.0
    assert scores["psnr"] > 90


def test_recordings_have_little_in_common():
    """What the control `sync_other` rests on: over many clips it says nothing."""
    mouths = [clips.make_clip("heldout", index, 81).mouth[1:, 0] for index in range(33)]
    assert abs(np.mean([metrics.correlation(a, b) for a, b in itertools.pairwise(mouths)])) < 0.15


def test_no_control_without_another_recording():
    assert "sync_other" not in metrics.score_clip(true_video(0), clip_of(0))


@pytest.mark.parametrize("shift", [2, -3])
def test_a_video_that_is_late_has_its_delay_as_offset(shift):
    clip = clip_of(0).with_motion("still")  # so that the shift moves nothing but the mouth out of its place
    video = np.roll(np.asarray(clip.render(SIZE)), shift, axis=0)
    value, offset = metrics.sync(metrics.mouth_height(video, clip), clip.mouth[:, 0])
    assert offset == shift and value < 0.9


def test_every_motion_is_seen_as_what_it_is():
    clip = clip_of(1)
    for motion in world.MOTIONS:
        assert metrics.shown_motion(np.asarray(clip.with_motion(motion).render(SIZE)), clip) == motion


def test_a_wrong_motion_is_marked_wrong_but_its_mouth_is_still_found():
    clip = clip_of(0)
    other = clip.with_motion("shake" if clip.motion != "shake" else "sway")
    scores = metrics.score_clip(np.asarray(other.render(SIZE)), clip)
    assert scores["motion"] == 0.0
    assert scores["sync"] > 0.97 and scores["identity"] < 1.0


def test_a_still_picture_has_no_sync():
    clip = clip_of(0).with_motion("still")
    frozen = np.repeat(np.asarray(clip.render(SIZE))[:1], FRAMES, axis=0)
    value, _ = metrics.sync(metrics.mouth_height(frozen, clip), clip.mouth[:, 0])
    assert abs(value) < 0.3


def test_another_puppet_has_an_identity_error():
    clip = clip_of(0)
    other = np.asarray(dataclasses.replace(clip, identity=clip_of(1).identity).render(SIZE))
    assert metrics.identity_error(other, clip) > 10
    tinted = true_video(0) + np.float32(10 / 127.5)
    np.testing.assert_allclose(metrics.identity_error(tinted, clip), 10, atol=1)


def test_drift_is_the_change_of_the_background_over_time():
    fading = true_video(0) + np.linspace(0, 20 / 127.5, FRAMES, dtype=np.float32)[:, None, None, None]
    expected = 20 * (FRAMES - 10) / (FRAMES - 1)  # from the middle of the first ten frames to that of the last ten
    np.testing.assert_allclose(metrics.background_drift(fading, clip_of(0)), expected, rtol=0.02)


def test_what_every_latent_frame_does_is_no_seam():
    """A jump of 5 of 255 where each latent frame begins (1, 5, 9, ...), and of 8 at the seam, frame 13."""
    sizes = np.zeros(FRAMES)
    sizes[1::4] = 5.0
    sizes[13] = 8.0
    signs = np.where(np.cumsum(sizes > 0) % 2, 1.0, -1.0)  # there and back, so that nothing is clipped
    offset = np.cumsum(sizes * signs)[:, None, None, None] / 127.5
    broken = true_video(0) + offset
    clip = clip_of(0)
    assert metrics.seam_error(broken, clip, [13], every=4) == pytest.approx(3.0, abs=1e-3)
    assert metrics.seam_error(broken, clip, [13]) == pytest.approx(8.0 - 6 * 5.0 / 27, abs=1e-3)


def test_seam_error_is_the_jump_at_the_seam():
    broken = true_video(0).copy()
    broken[13:] += 5 / 127.5
    np.testing.assert_allclose(metrics.seam_error(broken, clip_of(0), [13]), 5.0, rtol=1e-3)
    assert metrics.seam_error(true_video(0), clip_of(0), [13]) == pytest.approx(0.0, abs=1e-4)
    assert metrics.seam_error(broken, clip_of(0), []) == 0.0


def test_psnr_of_noise():
    noise = 0.02 * np.random.default_rng(0).standard_normal(true_video(0).shape)
    np.testing.assert_allclose(metrics.psnr(true_video(0) + noise, true_video(0)), 40.0, atol=0.1)


def test_sync_by_hand():
    law = np.array([0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert metrics.sync(0.1 * law + 0.3, law) == (pytest.approx(1.0), 0)
    assert metrics.sync(-law, law)[0] == pytest.approx(-1.0)
    assert metrics.sync(np.zeros(14), law) == (0.0, 0)


def test_the_distance_between_sets_of_videos():
    """None from a set to itself; it grows with a change of colour, and of motion alone."""
    true = [np.asarray(clips.make_clip("heldout", index, 9).render(32)) for index in range(16)]
    assert metrics.frechet_distance(true, true) < 1e-3
    darker = metrics.frechet_distance([0.8 * video - 0.2 for video in true], true)
    still = metrics.frechet_distance([np.repeat(video[:1], 9, axis=0) for video in true], true)
    assert darker > still > 1
