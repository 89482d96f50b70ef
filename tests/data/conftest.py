"""Clips, sources of them, films in files, and an extractor without models, for tests of training data."""

from pathlib import Path

import numpy as np
import pytest

from emv3_jax.config import FPS, RATE
from emv3_jax.data.builder import Dropped
from emv3_jax.data.examples import GIVEN_TASKS
from emv3_jax.data.extract import RawClip
from emv3_jax.media import VideoWriter


def make_clip(number: int, frames: int = 9, height: int = 32, width: int = 32, **changes) -> RawClip:
    rng = np.random.default_rng(number)
    mouth = np.zeros((height, width), np.float32)
    mouth[height // 2 : height - 8, 8 : width - 8] = 1.0
    values = {
        "id": f"clip {number}",
        "caption": "A puppet nods.",
        "video": rng.integers(0, 255, (frames, height, width, 3), np.uint8),
        "wave": rng.uniform(-0.5, 0.5, frames * RATE // FPS).astype(np.float32),
        "face": None,
        "mouth": mouth,
    }
    return RawClip(**{**values, **changes})


class Clips:
    """A source of given clips, a list for each input; an exception in their place is raised."""

    def __init__(self, inputs, name="test"):
        self.inputs, self.name = inputs, name

    def __len__(self):
        return len(self.inputs)

    def clips(self, number):
        for clip in self.inputs[number]:
            if isinstance(clip, BaseException):
                raise clip
            yield clip

    def describe(self):
        return {"source": self.name}


class NoModels:
    """An extractor whose latents say which clip they are of."""

    def __init__(self, preset):
        self.preset = preset

    def example(self, clip):
        frames, height, width, _ = clip.video.shape
        grid = ((frames - 1) // 4 + 1, height // 8, width // 8)
        value = float(clip.video[0, 0, 0, 0]) if np.isfinite(clip.wave).all() else np.nan
        return {
            "id": clip.id,
            "caption": clip.caption,
            "latents": np.full((*grid, 16), value, np.float16),
            **{f"masked_{task}": np.zeros((*grid, 16), np.float16) for task in GIVEN_TASKS},
            "mouth": np.zeros((*grid, 4), np.float16),
            "face_box": np.zeros(4, np.float32),
            "face_mask": np.ones(height * width // 256, np.uint8),
            "image": clip.video[0],
            "audio": np.zeros((2 * frames, self.preset.dit.audio_width), np.float16),
            "wave": np.zeros(frames * RATE // FPS, np.int16),
        }


@pytest.fixture
def no_models(tiny):
    return NoModels(tiny)


@pytest.fixture(scope="session")
def clip():
    """Makes a clip by number."""
    return make_clip


@pytest.fixture(scope="session")
def source():
    """Makes a source: of so many inputs of two clips each, or of given ones."""

    def make(inputs=6, **kwargs):
        if isinstance(inputs, int):
            inputs = [[make_clip(2 * k), make_clip(2 * k + 1)] for k in range(inputs)]
        return Clips(inputs, **kwargs)

    return make


@pytest.fixture(scope="session")
def dropped():
    return Dropped


def tone(seconds: float) -> np.ndarray:
    return (0.5 * np.sin(np.arange(round(seconds * RATE)) * 0.2)).astype(np.float32)


def make_film(path, frames=25, fps=25.0, height=48, width=48, wave="tone", caption="A puppet nods.", video=None):
    """An mp4 whose pictures brighten by equal steps from black to white, with a tone; NAME.txt beside it."""
    seconds = frames / fps
    wave = tone(seconds) if isinstance(wave, str) else wave
    if video is None:
        levels = np.linspace(0, 255, frames).astype(np.uint8)
        video = np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, *video.shape[1:3], fps=fps, wave=wave) as writer:
        writer.write(video)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


@pytest.fixture(scope="session")
def film():
    """Writes a film."""
    return make_film
