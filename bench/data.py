"""Whether training waits for its data: python -m bench.data [--clips 16] [--batches 24] [--parts films records]

Prints tables of clips a second:
  puppets   prepare of puppets (preset demo, 61 frames), made in a temporary folder; the loader (batches of 12 clips,
            made when they are asked for, or ahead by some threads); the training step of configs/demo_dit.py
  films     prepare of mp4 files with sound, for the demo too, and of that reading, decoding and fitting alone. They are
            512 x 512 puppets, two clips each; no faces are looked for
  records   the loader for clips as large as those of configs/sft_1b.py (113 frames of 768 x 768), random values written
            by the same writer and just written, so that the disk has no part in it; beside what TPUs ask for at most,
            were a step as quick as its FLOPs over the chips' peak
"""

import argparse
import collections
import itertools
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from bench.full_step import PEAK, FullStep
from configs import demo_dit, sft_1b
from emv3_jax import command_line, media, pipeline
from emv3_jax.conditioning import tokenizer
from emv3_jax.config import DEMO, PREVIEW, Preset
from emv3_jax.data import batches, builder
from emv3_jax.data.dataset import Dataset
from emv3_jax.data.examples import GIVEN_TASKS
from emv3_jax.data.extract import Extractor, RawClip, encoder_hash
from emv3_jax.data.puppets import Puppets
from emv3_jax.data.videos import Films, Rules, find_films
from emv3_jax.errors import UserError
from emv3_jax.puppets import clips
from emv3_jax.training import recipes
from emv3_jax.training import state as train_state

FRAMES, BATCH, STEPS = 61, 12, 12
FILM = 512  # height and width of films
LARGE_BATCH, WORDS = 4, 64  # of the records: clips, words of a caption


def prepare(folder: pathlib.Path, source: builder.Source) -> float:
    """Seconds a clip to make a dataset of a source with the shipped weights, after a clip that compiles."""
    extractor = Extractor(DEMO, dict(pipeline.load_models(DEMO, None, ["vae"])))
    for clip in Puppets("heldout", 1, FRAMES, DEMO.height).clips(0):
        extractor.example(clip)
    identity = {"preset": DEMO.name, "vae": encoder_hash(extractor.params["vae"])}
    started = time.perf_counter()
    record = builder.build(source, extractor, folder, 1, identity, say=lambda line: None)
    assert record
    return (time.perf_counter() - started) / len(record["clips"])


def make_films(folder: pathlib.Path, count: int) -> Films:
    """So many films of puppets, in files."""
    folder.mkdir(parents=True)
    for number in range(count):
        clip = clips.make_clip("train", number, 2 * FRAMES + 3)
        with media.VideoWriter(folder / f"{number}.mp4", FILM, FILM, wave=clip.wave / np.abs(clip.wave).max()) as film:
            film.write(media.to_uint8(np.asarray(clip.render(FILM))))
        (folder / f"{number}.txt").write_text(clip.prompt)
    return Films(find_films(folder, None), Rules((FRAMES,), face="none"), DEMO, tokenizer(DEMO))


def cut(source: Films) -> float:
    """Seconds a clip to read, decode, cut and fit films."""
    started = time.perf_counter()
    found = [clip.id for number in range(len(source)) for clip in source.clips(number) if isinstance(clip, RawClip)]
    return (time.perf_counter() - started) / len(found)


class Large:
    """Clips that no model has seen, and random values in place of what one would see (builder.Source, Extractor)."""

    def __init__(self, preset: Preset, latents: tuple[int, int, int], count: int):
        self.preset, self.latents, self.count = preset, latents, count
        self.heard = FullStep(preset.name).clips(latents, 1)["audio"].shape[1:]

    def __len__(self) -> int:
        return self.count

    def describe(self) -> dict[str, Any]:
        """What decides the clips."""
        return {"random": self.count, "latents": self.latents}

    def clips(self, number: int) -> Iterator[RawClip]:
        """The clip of that number, black."""
        (frames, *sides), scale = self.latents, self.preset.vae.spatial_factor
        shape = (self.preset.vae.video_frames(frames), *(scale * side for side in sides), 3)
        video = np.broadcast_to(np.uint8(0), shape)
        yield RawClip(f"random/{number}", "A caption.", video, np.zeros(0, np.float32), None, np.zeros(0))

    def example(self, clip: RawClip) -> dict[str, Any]:
        """What `examples.features` names, as large as of a real clip."""
        cfg, rng, frames = self.preset.dit, np.random.default_rng(), len(clip.video)
        noise = lambda *shape, dtype=np.float16: np.asarray(rng.standard_normal(shape, np.float32), dtype)  # noqa: E731
        latents = lambda: noise(*self.latents, cfg.latent_channels)  # noqa: E731
        return {
            "id": clip.id,
            "caption": clip.caption,
            "latents": latents(),
            **{f"masked_{task}": latents() for task in GIVEN_TASKS},
            "mouth": np.ones((*self.latents, cfg.mask_channels), np.float16),
            "face_box": np.zeros(4, np.float32),
            "face_mask": np.ones(math.prod(self.latents[1:]) // 4, np.uint8),
            "image": rng.integers(0, 256, clip.video.shape[1:], np.uint8),
            "audio": noise(*self.heard),
            "wave": rng.integers(-9999, 9999, frames * 640, np.int16),
            "text": noise(min(WORDS, cfg.text_len), cfg.text_width, dtype=np.float32),
            "image_states": noise(cfg.image_tokens, cfg.image_width, dtype=np.float32),
        }


def large(folder: pathlib.Path, source: Large, size: int) -> tuple[Any, int]:
    """The recipe of configs/sft_1b.py with batches of so many of these clips, and the bytes of a clip's record."""
    identity = {"preset": source.preset.name, "vae": ""}
    builder.build(source, source, folder, 1, identity, say=lambda line: None)
    step = FullStep(source.preset.name)
    step.recipe.cfg.stages = ((sft_1b.STEPS, ((source.preset.vae.video_frames(source.latents[0]), size),)),)
    step.recipe.__dict__["data"] = Dataset(folder, source.preset)  # of which it would ask by which VAE they were seen
    return step.recipe, sum(path.stat().st_size for path in folder.glob("*.array_record*")) // len(source)


def config(folder: pathlib.Path, steps: int) -> ml_collections.ConfigDict:
    """The demo's experiment on that dataset and the shipped weights, with batches of one kind."""
    cfg = demo_dit.get_config()
    with cfg.unlocked():
        cfg.update(
            {
                "data": str(folder), "frozen_weights": "", "stages": ((steps, ((FRAMES, BATCH),)),), "steps": steps,
                "learning_rates": ((steps, 1e-4),), "warmup_steps": 1,
                "tasks": ((steps, cfg.tasks[0][1]),),
            }
        )  # fmt: skip
    return cfg


def load(make: Callable[[int], Any], count: int, threads: int) -> float:
    """Seconds to make so many batches, after some, with as many under way at the end as at the beginning."""
    some = batches.ahead(make, 1, count + 1 + 3 * threads, threads)
    collections.deque(itertools.islice(some, 1 + threads), 0)
    started = time.perf_counter()
    collections.deque(itertools.islice(some, count), 0)
    return time.perf_counter() - started


def train(recipe: Any, cfg: Any, some: Iterator[Any]) -> tuple[float, float]:
    """Seconds a step, after one that compiles, and of them the seconds of waiting for the batch."""
    optimizer = train_state.make_optimizer(cfg)
    state, constants = train_state.init_state(recipe.init(), optimizer), recipe.constants()
    step = train_state.make_step(train_state.make_update(recipe.loss, optimizer, cfg.ema_decay))
    state, _ = jax.block_until_ready(step(state, constants, next(some)))
    started, waited = time.perf_counter(), 0.0
    for _ in range(STEPS):
        asked = time.perf_counter()
        batch = next(some)
        waited += time.perf_counter() - asked
        state, _ = jax.block_until_ready(step(state, constants, batch))
    return (time.perf_counter() - started) / STEPS, waited / STEPS


def puppet_rows(folder: pathlib.Path, options: argparse.Namespace) -> None:
    """Prints the table of puppets."""
    row = small_table()
    row("prepare", BATCH * prepare(folder, Puppets("train", options.clips, FRAMES, DEMO.height)))
    cfg = config(folder, 10_000)
    recipe = recipes.build(cfg)
    for threads in (0, 2, 4):
        row(f"load, {threads} threads", load(recipe.batch, options.batches, threads) / options.batches)
    for threads in (0, 2):
        seconds, waited = train(recipe, cfg, batches.ahead(recipe.batch, 1, 2 * STEPS, threads))
        row(f"training step, {threads} threads; waits {1000 * waited:.1f} ms for its batch", seconds)


def film_rows(folder: pathlib.Path, options: argparse.Namespace) -> None:
    """Prints the table of films."""
    source, row = make_films(folder / "films", options.films), small_table()
    row("films: read, decode, cut, fit", BATCH * cut(source))
    row("films: prepare", BATCH * prepare(folder / "data", source))


def small_table() -> Callable[[str, float], None]:
    """Begins a table of batches of BATCH clips, and gives what adds a row of some seconds a batch."""
    print(f"\n{jax.default_backend()}, clips of {FRAMES} frames, batches of {BATCH}\n")
    print("| what | clips a second | seconds a batch |\n| --- | --- | --- |")
    return lambda what, seconds: print(f"| {what} | {BATCH / seconds:.1f} | {seconds:.3f} |", flush=True)


def record_rows(folder: pathlib.Path, options: argparse.Namespace) -> None:
    """Prints the table of large records."""
    vae = PREVIEW.vae
    height, width = (side // vae.spatial_factor for side in (PREVIEW.height, PREVIEW.width))
    latents = (vae.latent_frames(PREVIEW.max_frames), height, width)
    recipe, size = large(folder, Large(PREVIEW, latents, options.records), LARGE_BATCH)
    print(f"\nrecords of {size / 1e6:.1f} MB, latents {latents}, batches of {LARGE_BATCH} clips\n")
    print("| what | clips a second | GB/s of records |\n| --- | --- | --- |")
    cfg = sft_1b.get_config()
    for threads in (0, 2, cfg.batches_ahead):
        rate = LARGE_BATCH * options.batches / load(recipe.batch, options.batches, threads)
        print(f"| load, {threads} threads | {rate:.1f} | {rate * size / 1e9:.2f} |", flush=True)
    context, flops = cfg.mesh.context, recipe.work(FullStep(PREVIEW.name).clips(latents, 1))[1]
    print(f"\n| {context} chips that share a clip take at most | clips a second | GB/s |\n| --- | --- | --- |")
    for kind, peak in PEAK.items():
        rate = context * peak / flops
        print(f"| {kind} | {rate:.2f} | {rate * size / 1e9:.3f} |")


PARTS = {"puppets": puppet_rows, "films": film_rows, "records": record_rows}


def main(arguments: list[str]) -> int:
    """Measures and prints."""
    parser = command_line.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--clips", type=int, default=16, help="puppets")
    parser.add_argument("--films", type=int, default=8)
    parser.add_argument("--records", type=int, default=16)
    parser.add_argument("--batches", type=int, default=24, help="that are loaded, after some that are not counted")
    options = parser.parse_args(arguments)
    if min(options.films, options.batches) < 1:
        raise UserError("--films and --batches must be 1 or more")
    if options.clips < BATCH or options.records < LARGE_BATCH:
        raise UserError(f"a batch must be filled: --clips from {BATCH}, --records from {LARGE_BATCH} on")
    command_line.setup_compile_cache()
    for part in options.parts:
        with tempfile.TemporaryDirectory() as temporary:
            PARTS[part](pathlib.Path(temporary) / part, options)
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
