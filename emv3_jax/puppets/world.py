"""Who the puppets are and how they move: identities, motions, expressions, cameras, and the pose they give at a time.

Lengths are in picture heights, colours in [0, 1] (sRGB), angles in radians, times in seconds. Everything is a pure
function of its arguments; an identity follows from (split, index), so that training and held-out puppets never meet.
"""

import zlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import struct

SPLITS = ("train", "heldout")
MOTIONS = ("still", "nod", "shake", "sway", "wave")
EXPRESSIONS = ("calm", "happy", "sad", "angry", "surprised")
CAMERAS = ("fixed", "zoom")

MOUTH_INTERIOR = np.array([0.30, 0.03, 0.10], np.float32)  # the same in every puppet, and used for nothing else


def generator(split: str, kind: str, index: int) -> np.random.Generator:
    """The random stream of one thing of one split: no two share a stream.

    Raises:
      ValueError: for a split that is not in SPLITS.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    return np.random.default_rng([zlib.crc32(f"{split}/{kind}".encode()), index])


@struct.dataclass
class Identity:
    """What stays the same in a clip. Colours [3]; proportions are scalars."""

    background_top: jnp.ndarray
    background_bottom: jnp.ndarray
    disc_colour: jnp.ndarray
    disc_centre: jnp.ndarray  # [2]
    skin: jnp.ndarray
    hair: jnp.ndarray
    clothes: jnp.ndarray
    iris: jnp.ndarray
    head_width: jnp.ndarray  # half axes of the head
    head_height: jnp.ndarray
    eye_gap: jnp.ndarray  # from the middle of the face to an eye
    eye_size: jnp.ndarray
    hair_back: jnp.ndarray  # how far the hair behind the head reaches past it
    hair_length: jnp.ndarray  # how far it hangs down
    fringe: jnp.ndarray  # lower edge of the hair on the forehead
    parting: jnp.ndarray  # its slope
    bun: jnp.ndarray  # 0 none .. 1 a full bun on top
    shoulder: jnp.ndarray  # half width of the torso


@struct.dataclass
class Pose:
    """What changes from frame to frame; each leaf is a scalar, or [F] for a clip."""

    mouth_height: jnp.ndarray  # 0 closed .. 1 wide open (the law)
    mouth_width: jnp.ndarray  # 0 narrow .. 1 wide (the law)
    head_x: jnp.ndarray
    head_y: jnp.ndarray
    turn: jnp.ndarray  # the face's features against the head, sideways
    tilt: jnp.ndarray  # the features against the head, downwards
    body_x: jnp.ndarray
    hand_raise: jnp.ndarray  # 0 down .. 1 up
    hand_swing: jnp.ndarray  # angle of the raised hand
    blink: jnp.ndarray  # 0 open .. 1 closed
    zoom: jnp.ndarray  # 1 and up
    smile: jnp.ndarray  # -1 .. 1, corners of the mouth
    brow_raise: jnp.ndarray
    brow_slope: jnp.ndarray  # positive: inner ends down
    eye_open: jnp.ndarray  # 1 is normal


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """[3] sRGB of a hue, saturation and value in [0, 1]."""
    k = (np.array([5.0, 3.0, 1.0]) + 6.0 * hue) % 6.0
    return (value - value * saturation * np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0)).astype(np.float32)


SKINS = ((0.06, 0.22, 0.98), (0.07, 0.34, 0.93), (0.07, 0.45, 0.82), (0.06, 0.52, 0.66), (0.12, 0.30, 0.95),
         (0.30, 0.30, 0.85), (0.55, 0.28, 0.90), (0.78, 0.22, 0.92), (0.95, 0.22, 0.97))  # fmt: skip
HAIRS = ((0.08, 0.65, 0.30), (0.07, 0.70, 0.48), (0.12, 0.60, 0.85), (0.05, 0.75, 0.75), (0.60, 0.10, 0.22),
         (0.58, 0.55, 0.65), (0.83, 0.45, 0.62), (0.40, 0.50, 0.50), (0.10, 0.06, 0.88))  # fmt: skip


def sample_identity(split: str, index: int) -> Identity:
    """The identity number `index` of a split; continuous colours and proportions, so that no two are alike."""
    rng = generator(split, "identity", index)

    def near(table: tuple) -> np.ndarray:
        hue, saturation, value = table[rng.integers(len(table))]
        hue = (hue + rng.uniform(-0.02, 0.02)) % 1.0
        return _hsv(hue, saturation + rng.uniform(-0.06, 0.06), np.clip(value + rng.uniform(-0.05, 0.05), 0.15, 1.0))

    hue = rng.uniform()
    f = lambda low, high: np.float32(rng.uniform(low, high))  # noqa: E731
    return Identity(
        background_top=_hsv(hue, rng.uniform(0.10, 0.45), rng.uniform(0.70, 0.97)),
        background_bottom=_hsv((hue + rng.uniform(-0.1, 0.1)) % 1.0, rng.uniform(0.2, 0.5), rng.uniform(0.55, 0.85)),
        disc_colour=_hsv((hue + rng.uniform(-0.15, 0.15)) % 1.0, rng.uniform(0.1, 0.5), rng.uniform(0.75, 1.0)),
        disc_centre=np.array([rng.uniform(-0.42, 0.42), rng.uniform(0.08, 0.45)], np.float32),
        skin=near(SKINS),
        hair=near(HAIRS),
        clothes=_hsv(rng.uniform(0.08, 0.92), rng.uniform(0.45, 0.85), rng.uniform(0.45, 0.95)),
        iris=_hsv(rng.uniform(0.08, 0.62), 0.6, rng.uniform(0.3, 0.6)),
        head_width=f(0.225, 0.275),
        head_height=f(0.275, 0.315),
        eye_gap=f(0.088, 0.108),
        eye_size=f(0.046, 0.058),
        hair_back=f(0.015, 0.06),
        hair_length=f(0.0, 0.22),
        fringe=f(-0.20, -0.13),
        parting=f(-0.35, 0.35),
        bun=np.float32(rng.uniform() < 0.35) * f(0.7, 1.0),
        shoulder=f(0.27, 0.34),
    )


def _wave(t: np.ndarray, hertz: float) -> np.ndarray:
    """Swings from rest at t = 0, eased in over a third of a second."""
    return np.sin(2 * np.pi * hertz * t) * np.clip(t / 0.33, 0.0, 1.0)


# Each motion as a function of time in seconds to the pose values it sets; all start from rest.
MOTION_LAWS: dict[str, Callable[[np.ndarray], dict[str, np.ndarray]]] = {
    "still": lambda t: {},
    "nod": lambda t: {"head_y": 0.022 * (1 - np.cos(2 * np.pi * 1.0 * t)), "tilt": 0.026 * _wave(t, 1.0)},
    "shake": lambda t: {"turn": 0.055 * _wave(t, 1.0), "head_x": 0.012 * _wave(t, 1.0)},
    "sway": lambda t: {"body_x": 0.075 * _wave(t, 0.5), "head_x": 0.02 * _wave(t, 0.5)},
    "wave": lambda t: {
        "hand_raise": np.clip(t / 0.5, 0.0, 1.0) ** 2 * (3 - 2 * np.clip(t / 0.5, 0.0, 1.0)),
        "hand_swing": 0.42 * _wave(np.maximum(t - 0.4, 0.0), 1.5),
    },
}
EXPRESSION_POSES: dict[str, dict[str, float]] = {
    "calm": {},
    "happy": {"smile": 1.0, "brow_raise": 0.012, "eye_open": 0.88},
    "sad": {"smile": -1.0, "brow_slope": -0.42, "brow_raise": 0.006, "eye_open": 0.82},
    "angry": {"smile": -0.5, "brow_slope": 0.50, "brow_raise": -0.014, "eye_open": 0.78},
    "surprised": {"brow_raise": 0.040, "eye_open": 1.28},
}
ZOOM_PER_SECOND = 0.05
ZOOM_LIMIT = 1.35


def pose_clip(mouth: np.ndarray, motion: str, expression: str, camera: str, blinks: np.ndarray, fps: float = 25.0,
              start: float = 0.0) -> Pose:  # fmt: skip
    """The pose of every frame of a clip.

    Args:
      mouth: [F, 2] mouth height and width in [0, 1], by the law.
      motion, expression, camera: one each of MOTIONS, EXPRESSIONS, CAMERAS.
      blinks: [K] seconds at which the eyes close; a blink takes 0.24 s.
      fps: frames per second.
      start: seconds on the motion's clock at frame 0.
    Returns:
      A Pose with leaves [F].
    """
    frames = len(mouth)
    t = start + np.arange(frames, dtype=np.float64) / fps
    values = {name: np.zeros(frames) for name in Pose.__dataclass_fields__}
    values["eye_open"] += 1.0
    values["mouth_height"], values["mouth_width"] = mouth[:, 0], mouth[:, 1]
    values["zoom"] = np.minimum(1.0 + ZOOM_PER_SECOND * t, ZOOM_LIMIT) if camera == "zoom" else np.ones(frames)
    for name, value in MOTION_LAWS[motion](t).items():
        values[name] = value
    for name, number in EXPRESSION_POSES[expression].items():
        values[name] = np.full(frames, number)
    for moment in blinks:
        values["blink"] = np.maximum(values["blink"], np.clip(1.0 - np.abs(t - moment) / 0.12, 0.0, 1.0))
    return Pose(**{name: value.astype(np.float32) for name, value in values.items()})


def stack_identities(identities: list[Identity]) -> Identity:
    """One Identity with a leading batch axis on every leaf."""
    return Identity(
        **{name: np.stack([getattr(i, name) for i in identities]) for name in Identity.__dataclass_fields__}
    )
