"""Matching colours: LAB is LAB, the statistics come back, and what is right already stays."""

import numpy as np
import pytest

from emv3_jax.media import colours, matched_to_first

RNG = np.random.default_rng(0)


def picture(seed: int = 0) -> np.ndarray:
    """uint8 [48, 40, 3] well inside the gamut."""
    rng = np.random.default_rng(seed)
    return rng.integers(90, 150, (6, 5, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)


def shifted(frame: np.ndarray) -> np.ndarray:
    """A frame whose colours have drifted: another mean and another contrast in every channel."""
    return np.clip(np.round((frame - 120.0) * [1.5, 0.8, 1.2] + [128.0, 110.0, 125.0]), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((128, 128, 128), (53.585, 0, 0)),
        ((255, 0, 0), (53.241, 80.092, 67.203)),
        ((0, 255, 0), (87.735, -86.183, 83.179)),
        ((0, 0, 255), (32.297, 79.188, -107.860)),
        ((3, 2, 1), (0.587, 0.122, 0.471)),  # the straight part near black: L is 903.3 Y
    ],
)
def test_lab_of_known_colours(rgb, lab):
    np.testing.assert_allclose(colours.to_lab(np.array([[rgb]], np.uint8))[0, 0], lab, atol=0.02)


def test_every_colour_comes_back():
    levels = np.array([*range(0, 256, 7), 1, 2, 3, 10, 11, 255], np.uint8)
    frame = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(len(levels), -1, 3)
    np.testing.assert_array_equal(colours.to_rgb(colours.to_lab(frame)), frame)


def test_statistics_come_back():
    frame = picture()
    reference, moved = colours.Reference.of(frame), colours.Reference.of(shifted(frame))
    assert np.abs(moved.mean - reference.mean).max() > 3 and np.abs(moved.deviation - reference.deviation).max() > 1
    again = colours.Reference.of(colours.matched(shifted(frame), reference))
    np.testing.assert_allclose(again.mean, reference.mean, atol=0.1)
    np.testing.assert_allclose(again.deviation, reference.deviation, atol=0.1)


def test_a_second_time_changes_nothing_more_than_rounding():
    reference = colours.Reference.of(picture())
    once = colours.matched(shifted(picture(1)), reference)
    twice = colours.matched(once, reference)
    assert np.abs(once.astype(int) - twice).max() <= 1
    assert np.abs(colours.matched(picture(), reference).astype(int) - picture()).max() == 0


def test_what_leaves_the_gamut_is_clipped():
    bright = colours.Reference(np.array([95.0, 0, 0]), np.array([30.0, 5, 5]))
    made = colours.matched(picture(), bright)
    assert made.dtype == np.uint8 and made.max() == 255
    assert colours.to_lab(made)[..., 0].mean() > 70  # clipped, not wrapped around


@pytest.mark.parametrize("value", [(0, 0, 0), (120, 120, 120), (200, 60, 30)])
def test_a_flat_frame_is_moved_and_not_divided_by_nothing(value):
    flat, reference = np.full((8, 8, 3), value, np.uint8), colours.Reference.of(picture())
    with np.errstate(all="raise"):
        made = colours.matched(flat, reference)
        same = colours.matched(picture(), colours.Reference.of(flat))
    assert np.ptp(made, axis=(0, 1)).max() == 0
    np.testing.assert_allclose(colours.to_lab(made)[0, 0], reference.mean, atol=0.6)
    assert np.abs(same.astype(int) - value).max() <= 1


def test_the_first_frame_of_a_video_stays_and_the_others_follow_it():
    first = RNG.integers(0, 256, (16, 16, 3), np.uint8)  # beyond what matching could bring back
    video = np.stack([first, *(shifted(picture(k))[:16, :16] for k in range(6))])
    pieces = [video[:1], video[1:5], video[5:]]
    made = np.concatenate(list(matched_to_first(iter(pieces))))
    np.testing.assert_array_equal(made[0], first)
    assert made.shape == video.shape and made.dtype == np.uint8
    reference = colours.Reference.of(first)
    for frame, source in zip(made[1:], video[1:], strict=True):
        np.testing.assert_array_equal(frame, colours.matched(source, reference))
    np.testing.assert_array_equal(np.concatenate(list(matched_to_first([video]))), made)  # however it is cut
    assert list(matched_to_first([])) == []


def test_frames_are_taken_as_they_are_needed():
    taken = []

    def frames():
        for k in range(100):
            taken.append(k)
            yield picture(k)[None]

    made = matched_to_first(frames())
    next(made), next(made)
    assert len(taken) <= 2
