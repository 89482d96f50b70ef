"""Whether training waits for its data: python -m bench.data [--clips 16] [--batches 24]

Makes a dataset of puppets (preset demo, 61 frames) in a temporary folder and prints a table: clips a second of prepare,
of the loader (batches of 12 clips, made when they are asked for, or ahead by some threads), and of the training step of
configs/demo_dit.py on such a batch.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections

from configs import demo_dit
from emv3_jax import command_line, pipeline
from emv3_jax.config import DEMO
from emv3_jax.data import batches, builder
from emv3_jax.data.extract import Extractor, encoder_hash
from emv3_jax.data.puppets import Puppets
from emv3_jax.training import recipes
from emv3_jax.training import state as train_state

FRAMES, BATCH, STEPS = 61, 12, 12


def prepare(folder: pathlib.Path, count: int) -> float:
    """Seconds to make a dataset of puppets with the shipped weights, after a clip that compiles."""
    extractor = Extractor(DEMO, dict(pipeline.load_models(DEMO, None, ["vae"])))
    source = Puppets("train", count, FRAMES, DEMO.height)
    for clip in Puppets("heldout", 1, FRAMES, DEMO.height).clips(0):
        extractor.example(clip)
    identity = {"preset": DEMO.name, "vae": encoder_hash(extractor.params["vae"])}
    started = time.perf_counter()
    builder.build(source, extractor, folder, 1, identity, say=lambda line: None)
    return time.perf_counter() - started


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
    """Seconds to make so many batches, after the first."""
    some = batches.ahead(make, 1, count + 1, threads)
    next(some)
    started = time.perf_counter()
    for _ in some:
        pass
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


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--batches", type=int, default=24)
    options = parser.parse_args()
    command_line.setup_compile_cache()
    print(f"{jax.default_backend()}, clips of {FRAMES} frames, batches of {BATCH}\n")
    print("| what | clips a second | seconds a batch |\n| --- | --- | --- |")

    def row(what: str, seconds: float) -> None:
        print(f"| {what} | {BATCH / seconds:.1f} | {seconds:.3f} |", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "puppets"
        row("prepare", prepare(folder, options.clips) / options.clips * BATCH)
        cfg = config(folder, 10_000)
        recipe = recipes.build(cfg)
        for threads in (0, 2, 4):
            row(f"load, {threads} threads", load(recipe.batch, options.batches, threads) / options.batches)
        for threads in (0, 2):
            seconds, waited = train(recipe, cfg, batches.ahead(recipe.batch, 1, 2 * STEPS, threads))
            row(f"training step, {threads} threads; waits {1000 * waited:.1f} ms for its batch", seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
