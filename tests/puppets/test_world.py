"""Who the puppets are: identities follow from seeds, splits never meet, motions are told apart by movement alone."""

import jax
import numpy as np
import pytest

from emv3_jax.puppets import world


def features(identity: world.Identity) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(identity)])


def poses(motion: str, frames: int = 50, camera: str = "fixed", blinks=(), start: float = 0.0) -> world.Pose:
    mouth = np.full((frames, 2), 0.5)
    return world.pose_clip(mouth, motion, "calm", camera, np.array(blinks), start=start)


def test_identities_follow_from_split_and_number():
    np.testing.assert_array_equal(
        features(world.sample_identity("train", 5)), features(world.sample_identity("train", 5))
    )


def test_no_two_identities_are_alike_within_and_across_splits():
    everyone = np.stack([features(world.sample_identity(split, i)) for split in world.SPLITS for i in range(150)])
    distance = np.abs(everyone[:, None] - everyone[None]).max(-1)
    np.fill_diagonal(distance, np.inf)
    assert distance.min() > 0.02


def test_streams_of_kinds_and_splits_are_independent():
    first = [world.generator(s, k, i).uniform() for s in world.SPLITS for k in ("clip", "voice") for i in range(3)]
    assert len(set(first)) == len(first)
    with pytest.raises(ValueError, match="unknown split 'test': one of train, heldout"):
        world.generator("test", "clip", 0)


def test_colours_and_proportions_are_in_range():
    who = world.stack_identities([world.sample_identity("heldout", i) for i in range(200)])
    for name in ("background_top", "background_bottom", "disc_colour", "skin", "hair", "clothes", "iris"):
        colour = getattr(who, name)
        assert colour.shape == (200, 3) and colour.min() >= 0.0 and colour.max() <= 1.0, name
    assert who.head_width.shape == (200,)
    assert set(np.unique(who.bun > 0)) == {True, False}


def test_skin_differs_from_the_colour_that_measures_the_mouth():
    gaps = [np.abs(world.sample_identity("train", i).skin - world.MOUTH_INTERIOR).max() for i in range(300)]
    assert min(gaps) > 0.2


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_every_motion_starts_from_the_same_rest(motion):
    """The first picture must not tell what the prompt asks for."""
    pose, rest = poses(motion), poses("still")
    for name in world.Pose.__dataclass_fields__:
        assert getattr(pose, name).shape == (50,)
        assert getattr(pose, name)[0] == getattr(rest, name)[0], name
    moves = any(np.ptp(getattr(pose, name)) > 0.01 for name in world.Pose.__dataclass_fields__)
    assert moves == (motion != "still")


def test_expressions_hold_still_and_differ():
    seen = set()
    for expression in world.EXPRESSIONS:
        pose = world.pose_clip(np.zeros((9, 2)), "still", expression, "fixed", np.zeros(0))
        values = [getattr(pose, name) for name in ("smile", "brow_raise", "brow_slope", "eye_open")]
        assert all(np.ptp(v) == 0 for v in values)
        seen.add(tuple(float(v[0]) for v in values))
    assert len(seen) == len(world.EXPRESSIONS)


def test_camera_zooms_in_slowly_and_stops():
    zoom = poses("still", frames=250, camera="zoom").zoom
    assert zoom[0] == 1.0 and np.all(np.diff(zoom) >= 0)
    np.testing.assert_allclose(zoom[25], 1.05, rtol=1e-6)
    assert zoom[-1] == np.float32(world.ZOOM_LIMIT)
    assert np.all(poses("still").zoom == 1.0)


def test_eyes_close_at_the_moment_of_a_blink_and_open_again():
    blink = poses("still", blinks=(0.8,)).blink
    assert blink[20] == 1.0 and blink[16] == 0.0 and blink[24] == 0.0
    assert np.all(poses("still").blink == 0.0)


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_a_later_start_is_a_later_piece(motion):
    whole, piece = poses(motion, frames=60, camera="zoom"), poses(motion, frames=20, camera="zoom", start=1.6)
    for name in world.Pose.__dataclass_fields__:
        np.testing.assert_allclose(getattr(piece, name), getattr(whole, name)[40:], atol=1e-6, err_msg=name)
