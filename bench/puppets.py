"""How fast the small world is drawn and spoken, on one core: python -m bench.puppets

Prints a table; each row is the best of several runs, after one that compiles.
"""

import os
import time
from collections.abc import Callable

if hasattr(os, "sched_setaffinity"):  # before JAX counts the cores
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import numpy as np

from emv3_jax.puppets import clips, law, metrics, renderer, voice, world

FRAMES, SECONDS = 125, 20.0


def best(work: Callable[[], object], runs: int = 5) -> float:
    """Seconds of the fastest of `runs` calls, after one that does not count."""
    jax.block_until_ready(work())
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - start)
    return min(times)


def rows() -> list[tuple[str, float, str]]:
    """What was measured, how many a second, and of what."""
    clip = clips.make_clip("train", 0, FRAMES)
    speaker = voice.sample_voice("train", 0)
    wave = voice.speak("train", 0, speaker, SECONDS)
    grids = np.stack([renderer.pixel_grid(64, 64)[20:52, 16:48]] * 8)
    who = world.stack_identities([world.sample_identity("train", i) for i in range(8)])
    pose = jax.tree.map(lambda leaf: np.stack([leaf[:21]] * 8), clip.pose)
    video = np.asarray(clip.render(64))
    return [
        ("renderer, 64 x 64, clip of 125", FRAMES / best(lambda: clip.render(64)), "frames"),
        ("renderer with parts, 64 x 64", FRAMES / best(lambda: clip.render(64, parts=True)[1]), "frames"),
        ("renderer, 8 crops of 32 x 32", 168 / best(lambda: renderer.render_batch(who, pose, grids, 1 / 64)), "frames"),
        ("voice", SECONDS / best(lambda: voice.speak("train", 0, speaker, SECONDS)), "seconds of sound"),
        ("law", SECONDS / best(lambda: law.mouth_law(wave, round(SECONDS * 25))), "seconds of sound"),
        ("a whole clip but its pictures", 1 / best(lambda: clips.make_clip("train", 0, FRAMES)), "clips"),
        ("all metrics of a clip of 125", 1 / best(lambda: metrics.score_clip(video, clip), runs=2), "clips"),
    ]


def main() -> None:
    """Measures and prints."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{jax.default_backend()}, {cores} core")
    for name, rate, unit in rows():
        print(f"{name:34}{rate:10.1f} {unit} a second")


if __name__ == "__main__":
    main()
