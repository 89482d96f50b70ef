"""What `sample.py` does for the demo preset: fills in what was not given, and writes the video as it is decoded."""

import itertools
import pathlib
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from emv3_jax import media
from emv3_jax.config import PRESETS, Preset
from emv3_jax.errors import UserError
from emv3_jax.pipeline import FPS, RATE, Ready, Request, SamplingOptions, load_pipeline

SENTENCE = pathlib.Path(__file__).parent / "puppets" / "assets" / "demo_sentence.wav"
PUPPETS_ONLY = "the demo's weights know drawn puppets only: other pictures come out as blots"


def preset(cfg: Any) -> Preset:
    """The preset that a config names.

    Raises:
      UserError: there is none of that name.
    """
    if cfg.preset not in PRESETS:
        raise UserError(f"config key preset: {cfg.preset!r} is none of {', '.join(sorted(PRESETS))}")
    return PRESETS[cfg.preset]


def portrait(index: int, size: int) -> np.ndarray:
    """Held-out puppet number `index` at rest: [size, size, 3] uint8."""
    from emv3_jax.puppets import renderer, world

    if index < 0:
        raise UserError(f"config key puppet must be 0 or more, got {index}")
    pose = world.pose_clip(np.zeros((1, 2)), "still", "calm", "fixed", np.zeros(0))
    video = renderer.render_clip(world.sample_identity("heldout", index), pose, size, size)
    return media.to_uint8(video[0])


def fill(image: str | None, audio: str | None, prompt: str | None, face: Any, seed: int, cfg: Any) -> Request:
    """The request of a command line, with the demo's own puppet, sentence and prompt where it is silent.

    Raises:
      UserError: for config keys out of range.
    """
    if "puppet" not in cfg:
        raise UserError("this config is not for sampling (it has no key puppet): give configs/demo.py")
    if not 1 <= cfg.enlarge <= 60:
        raise UserError(f"config key enlarge must be from 1 to 60, got {cfg.enlarge}")
    return Request(
        image=portrait(cfg.puppet, preset(cfg).height) if image is None else image,
        audio=SENTENCE if audio is None else audio,
        prompt=cfg.prompt if prompt is None else prompt,
        frames=cfg.frames or None,
        seed=seed,
        face=face,
    )


def render(ready: Ready, sampling: SamplingOptions, cfg: Any, out: pathlib.Path, sheet: pathlib.Path | None) -> None:
    """Samples, decodes and writes; says what it does and how long it took."""
    started = time.monotonic()
    if cfg.preset == "demo":
        print(f"note: {PUPPETS_ONLY}")
    pipe = load_pipeline(cfg.preset, cfg.weights or None)
    frames = []
    with tqdm(total=sampling.steps, desc="sampling", unit="step") as bar:
        pieces = pipe.stream(ready, sampling, on_step=lambda done, total: bar.update(done - bar.n))
        first = next(pieces)
    height, width = first.shape[1:3]
    with (
        media.VideoWriter(out, height, width, fps=FPS, wave=ready.wave, rate=RATE, scale=cfg.enlarge) as video,
        tqdm(total=ready.frames, desc="decoding", unit="frame") as bar,
    ):
        for piece in itertools.chain([first], pieces):
            video.write(piece)
            bar.update(len(piece))
            if sheet:
                frames.append(piece)
    if sheet:
        media.contact_sheet(np.concatenate(frames), ready.wave, RATE, FPS, sheet, ready.title)
    made = f"{out} and {sheet}" if sheet else str(out)
    took = time.monotonic() - started
    print(f"wrote {made}: {ready.frames} frames, {ready.frames / FPS:.2f} s of video, in {took:.1f} s")
