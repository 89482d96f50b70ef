"""What tests of renders share: a request of the tiny preset, and its video."""

import dataclasses

import numpy as np

from emv3_jax.pipeline import RATE, Pipeline, Request, SamplingOptions, read_request

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (32, 32, 3), np.uint8)
WAVE = (0.1 * RNG.standard_normal(2 * RATE)).astype(np.float32)
PROMPT = "A puppet nods."
OPTIONS = SamplingOptions(steps=2, text_scale=2.0, overlap=2)


def ask(frames: int, **changes) -> Request:
    return dataclasses.replace(Request(IMAGE, WAVE[: frames * 640], PROMPT, frames=frames), **changes)


def video(pipe: Pipeline, ask_for: Request, options: SamplingOptions = OPTIONS, **more) -> np.ndarray:
    ready = read_request(ask_for, pipe.preset, pipe.words)
    return np.concatenate(list(pipe.stream(ready, options, **more)))


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())
