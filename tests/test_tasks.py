"""Masks of the tasks: by eye, and against the released program's mask channels."""

from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from emv3_jax import tasks
from emv3_jax.errors import UserError

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("task", "given"), [("t2v", []), ("i2v", [0]), ("flf2v", [0, 12]), ("continuation", [0, 1, 2, 3, 4])]
)
def test_tasks_that_give_whole_frames(task, given):
    mask = tasks.pixel_mask(task, 13, 4, 6, given_frames=5)
    chex.assert_shape(mask, (13, 4, 6, 1))
    per_frame = mask.reshape(13, -1)
    assert (per_frame.min(axis=1) == per_frame.max(axis=1)).all()
    assert np.flatnonzero(per_frame[:, 0] == 0).tolist() == given


def test_lipsync_generates_the_mouth_alone():
    mouth = tasks.box_mask((2, 4, 1, 3), 6, 8)
    mask = tasks.pixel_mask("lipsync", 5, 6, 8, mouth_mask=mouth)
    assert (mask[..., 0] == mouth).all() and mask.sum() == 5 * 4
    moving = np.stack([np.roll(mouth, i, axis=1) for i in range(5)])
    assert (tasks.pixel_mask("lipsync", 5, 6, 8, mouth_mask=moving)[..., 0] == moving).all()


def test_masks_are_binary():
    soft = np.linspace(0, 1, 48).reshape(6, 8)
    assert set(np.unique(tasks.pixel_mask("lipsync", 5, 6, 8, mouth_mask=soft))) == {0.0, 1.0}


def test_masking_ratio_falls_in_the_order_of_the_table():
    mouth = tasks.box_mask((9, 13, 4, 12), 16, 16)
    ratios = [tasks.pixel_mask(t, 9, 16, 16, mouth).mean() for t in ("t2v", "i2v", "flf2v", "lipsync")]
    assert list(tasks.TASKS)[:4] == ["t2v", "i2v", "flf2v", "lipsync"]
    assert ratios[0] == 1.0 and (np.diff(ratios) < 0).all()


@pytest.mark.parametrize(
    ("task", "frames", "kwargs", "words"),
    [
        ("v2v", 5, {}, "choose one of t2v, i2v, flf2v, lipsync, continuation"),
        ("t2v", 6, {}, "4k \\+ 1 frames"),
        ("lipsync", 5, {}, "mouth box or a mouth mask"),
        ("lipsync", 5, {"mouth_mask": np.ones((3, 3))}, r"\(3, 3\)"),
        ("continuation", 5, {}, "leaves nothing to generate"),
        ("continuation", 5, {"given_frames": 0}, "at least 1"),
        ("flf2v", 1, {}, "leaves nothing to generate"),
    ],
)
def test_bad_requests_say_what_to_do(task, frames, kwargs, words):
    with pytest.raises(UserError, match=words):
        tasks.pixel_mask(task, frames, 4, 6, **kwargs)


def test_bad_box_is_refused():
    with pytest.raises(UserError, match="outside the 6 x 8 image"):
        tasks.box_mask((2, 7, 1, 3), 6, 8)


def test_mask_channels_are_the_released_ones():
    golden = np.load(GOLDEN / "mask_latents.npz")
    pixel = np.moveaxis(golden["pixel_mask"], 1, -1)  # [B, 1, F, H, W] -> [B, F, H, W, 1]
    out = np.moveaxis(golden["out"], 1, -1)  # [B, 4, T, h, w] -> [B, T, h, w, 4]
    np.testing.assert_allclose(tasks.mask_channels(pixel), out, atol=1e-6)
    for row, task in enumerate(("i2v", "flf2v")):
        np.testing.assert_allclose(
            tasks.mask_channels(tasks.pixel_mask(task, 13, 64, 48)[None])[0], out[row], atol=1e-6
        )


def test_mask_channels_read_the_middle_of_each_cell():
    """Linear without anti-aliasing: a latent cell of 8 pixels is the mean of its two middle ones, 3 and 4."""
    pixel = np.ones((1, 1, 8, 16, 1), np.float32)
    pixel[..., 4, 0] = 0.0
    channels = tasks.mask_channels(pixel)
    np.testing.assert_allclose(channels, [[[[[0.5] * 4, [0.0] * 4]]]], atol=1e-6)


def test_continuation_fills_the_channels_frame_by_frame():
    channels = tasks.mask_channels(tasks.pixel_mask("continuation", 9, 8, 8, given_frames=3)[None])
    np.testing.assert_allclose(channels[0, :, 0, 0], [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])


def test_text_to_video_is_conditioned_on_zeros():
    masks = jnp.stack([tasks.pixel_mask("t2v", 5, 16, 16), tasks.pixel_mask("i2v", 5, 16, 16)])
    assert not tasks.mask_channels(masks)[0].any()
    latents = tasks.masked_latents(jnp.ones((2, 2, 2, 2, 16)), masks)
    assert not latents[0].any() and latents[1].all()


def test_masked_video_keeps_given_pixels_only():
    video = np.full((1, 5, 4, 4, 3), -0.5, np.float32)
    masked = tasks.masked_video(video, tasks.pixel_mask("i2v", 5, 4, 4)[None])
    assert (masked[:, 0] == -0.5).all() and not masked[:, 1:].any()
