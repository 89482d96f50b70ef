"""Colours that stay: the mean and the deviation of every frame's colours, moved to those of a reference frame.

In CIE LAB (sRGB, white D65), channel by channel over all pixels, as the released program's post-processing does (SPEC
section 4). That one rounds to OpenCV's 8-bit LAB on the way, whose steps are 0.4 of L and 1 of a and b; here only the
pixels are rounded. Frames are uint8 [H, W, 3] in RGB; LAB is float32 [H, W, 3], L from 0 to 100.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

FLAT = 0.1  # of LAB: a channel that varies by less than a pixel's rounding has nothing that could be stretched
KNEE = 6 / 29  # below its cube LAB is linear
_LEVELS = np.arange(256) / 255
# sRGB's levels as light, and light as CIE XYZ, relative to white, which is (1, 1, 1).
_LIGHT = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4).astype(np.float32)
_XYZ = np.array(
    [[0.4124564, 0.2126729, 0.0193339], [0.3575761, 0.7151522, 0.1191920], [0.1804375, 0.0721750, 0.9503041]]
)
_XYZ /= _XYZ.sum(axis=0)
# And the (cube) roots of those as LAB, but for the 16 that L has less.
_LAB = np.array([[0.0, 500.0, 0.0], [116.0, -500.0, 200.0], [0.0, 0.0, -200.0]])
_OFFSET = np.array([16, 0, 0], np.float32)
_TO_XYZ, _TO_LAB = _XYZ.astype(np.float32), _LAB.astype(np.float32)
_FROM_XYZ, _FROM_LAB = np.linalg.inv(_XYZ).astype(np.float32), np.linalg.inv(_LAB).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of a frame: mean and deviation [3] of L, a and b."""

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, frame: np.ndarray) -> "Reference":
        """The statistics of a frame."""
        return cls.of_lab(to_lab(frame))

    @classmethod
    def of_lab(cls, lab: np.ndarray) -> "Reference":
        """The statistics of a frame in LAB."""
        return cls(lab.mean(axis=(0, 1), dtype=np.float64), lab.std(axis=(0, 1), dtype=np.float64))


def matched(frame: np.ndarray, reference: Reference) -> np.ndarray:
    """The frame with the reference's statistics, as far as the gamut goes: what lies outside is clipped.

    A channel that is flat is moved and not stretched.
    """
    lab = to_lab(frame)
    own = Reference.of_lab(lab)
    gain = np.where(own.deviation < FLAT, 1.0, reference.deviation / np.maximum(own.deviation, FLAT))
    return to_rgb((gain * (lab - own.mean) + reference.mean).astype(np.float32))


def matched_to_first(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Pieces [k, H, W, 3] of a video, every frame matched to its very first, which stays as it is."""
    reference = None
    for piece in pieces:
        if reference is None:
            reference = Reference.of(piece[0])
            yield piece[:1]
            piece = piece[1:]
        if len(piece):
            yield np.stack([matched(frame, reference) for frame in piece])


def to_lab(frame: np.ndarray) -> np.ndarray:
    """uint8 RGB -> LAB."""
    xyz = _LIGHT[frame] @ _TO_XYZ
    roots = np.where(xyz > KNEE**3, np.cbrt(xyz), xyz / (3 * KNEE**2) + 4 / 29)
    return roots @ _TO_LAB - _OFFSET


def to_rgb(lab: np.ndarray) -> np.ndarray:
    """LAB -> uint8 RGB, clipped to the gamut."""
    roots = (lab + _OFFSET) @ _FROM_LAB
    xyz = np.where(roots > KNEE, roots**3, 3 * KNEE**2 * (roots - 4 / 29))
    light = np.clip(xyz @ _FROM_XYZ, 0, 1)
    levels = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(255 * levels).astype(np.uint8)
