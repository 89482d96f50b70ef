"""The pictures: a pure function of identity, pose and pixel coordinates."""

import dataclasses

import jax
import numpy as np
import pytest

from emv3_jax.puppets import renderer, world

pytestmark = pytest.mark.usefixtures("quick_compile")
SIZE = 32
WHO = world.sample_identity("train", 3)


def pose_of(mouth_height, motion="wave", camera="zoom", mouth_width=0.5) -> world.Pose:
    mouth = np.stack(np.broadcast_arrays(np.asarray(mouth_height, float), mouth_width), -1)
    return world.pose_clip(mouth, motion, "happy", camera, np.zeros(0), start=1.0)


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Four frames of a waving puppet, and what is seen of each part."""
    video, seen = renderer.render_clip(WHO, pose_of(np.linspace(0, 1, 4)), SIZE, SIZE, parts=True)
    return np.asarray(video), np.asarray(seen)


def test_shape_and_range(drawn):
    video, seen = drawn
    assert video.shape == (4, SIZE, SIZE, 3) and video.dtype == np.float32
    assert seen.shape == (4, SIZE, SIZE, len(renderer.PARTS))
    assert np.abs(video).max() <= 1.0 and video.std() > 0.2


def test_parts_cover_every_pixel_exactly_once(drawn):
    _, seen = drawn
    assert seen.min() >= 0.0 and seen.max() <= 1.0 + 1e-6
    np.testing.assert_allclose(seen.sum(-1), 1.0, atol=1e-5)
    assert np.all(seen.sum((0, 1, 2)) > 0)


def test_a_crop_of_the_grid_is_a_crop_of_the_picture(drawn):
    video, _ = drawn
    crop = renderer.pixel_grid(SIZE, SIZE)[10:26, 5:21]
    piece = renderer.render(WHO, pose_of(np.linspace(0, 1, 4)), crop, 1.0 / SIZE)
    np.testing.assert_allclose(piece, video[:, 10:26, 5:21], atol=1e-5)


def test_a_batch_is_its_clips(drawn):
    video, _ = drawn
    who = world.stack_identities([world.sample_identity("train", 8), WHO])
    pose = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), pose_of(np.linspace(0, 1, 4)))
    grid = np.stack([renderer.pixel_grid(SIZE, SIZE)] * 2)
    batch = renderer.render_batch(who, pose, grid, 1.0 / SIZE)
    np.testing.assert_allclose(batch[1], video, atol=1e-5)
    assert np.abs(batch[0] - video).max() > 0.2


def test_mouth_grows_with_its_height_and_its_width():
    pose = pose_of([0.0, 0.5, 1.0, 1.0], motion="still", camera="fixed", mouth_width=[0.2, 0.2, 0.2, 1.0])
    _, seen = renderer.render_clip(WHO, pose, SIZE, SIZE, parts=True)
    area = np.asarray(seen)[..., renderer.PARTS.index("mouth")].sum((1, 2))
    assert np.all(np.diff(area) > 3.0), area


def test_zoom_enlarges_and_keeps_the_middle_of_the_face():
    still = pose_of(np.zeros(4), motion="still", camera="fixed")
    zoomed = dataclasses.replace(still, zoom=np.array([1.0, 1.1, 1.2, 1.3], np.float32))
    _, seen = renderer.render_clip(WHO, zoomed, SIZE, SIZE, parts=True)
    assert np.all(np.diff(np.asarray(seen)[..., 0].sum((1, 2))) < -20), "less background"
    middle = np.asarray(seen)[:, round(renderer.HEAD_Y * SIZE), SIZE // 2 - 1 : SIZE // 2 + 1]
    np.testing.assert_allclose(middle, middle[:1].repeat(4, 0), atol=0.02)


def test_edges_are_smooth_at_every_size():
    """A picture twice as large, averaged, is nearly the small one: nothing depends on where pixels fall."""
    pose = pose_of([0.6], motion="still", camera="fixed")
    (small, seen), (large, seen_large) = (
        map(np.asarray, renderer.render_clip(WHO, pose, size, size, parts=True)) for size in (SIZE, 2 * SIZE)
    )
    mixed, mixed_large = (np.mean(((s > 0.01) & (s < 0.99)).any(-1)) for s in (seen, seen_large))
    assert mixed_large < 0.65 * mixed, "an edge is one pixel wide at any size"
    assert np.abs(small - large.reshape(1, SIZE, 2, SIZE, 2, 3).mean((2, 4))).mean() < 0.02


def test_pixel_grid_is_centred_and_counts_in_picture_heights():
    grid = renderer.pixel_grid(4, 6)
    np.testing.assert_allclose(grid[0, :, 0], (np.arange(6) - 2.5) / 4)
    np.testing.assert_allclose(grid[:, 0, 1], (np.arange(4) + 0.5) / 4)
