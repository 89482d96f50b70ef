"""What sampling options cost and what they lose: python -m bench.sampling [--clips 16] [--frames 81]

Held-out puppets in batches of 8, image to video. One row a setting: steps whose blocks are computed, seconds a clip of
sampling alone (the second run of the same program, so without compiling), and the scores of the small world.
"""

import argparse
import dataclasses
import sys
import time

import jax

from emv3_jax import steps
from emv3_jax.options import SamplingOptions
from emv3_jax.pipeline import load_pipeline
from emv3_jax.puppets import clips, evaluation

FIRST_CLIP = 2000  # numbers that no other benchmark uses
BASE = SamplingOptions()
GUIDED = {"text_scale": 2.0}
PNG = {"negative_motion": "A puppet sits still.", "negative_detail": "angry"}
ROWS: dict[str, dict] = {
    "12 steps (the demo)": {},
    "5 steps": {"steps": 5},
    "8 steps": {"steps": 8},
    "15 steps": {"steps": 15},
    "25 steps": {"steps": 25},
    "5 steps, UniPC": {"steps": 5, "sampler": "unipc"},
    "8 steps, UniPC": {"steps": 8, "sampler": "unipc"},
    "12 steps, UniPC": {"sampler": "unipc"},
    "12 steps, DPM++": {"sampler": "dpmpp"},
    "dynamic audio guidance": {"audio_dynamic": True},
    "last half without guidance": {"cfg_skip_ratio": 0.5},
    "text guidance 2": GUIDED,
    "text guidance 2, PNG": {**GUIDED, **PNG},
    "TeaCache 0.1, 25 steps": {"steps": 25, "cache_threshold": 0.1},
    "TeaCache 0.2, 25 steps": {"steps": 25, "cache_threshold": 0.2},
    "TeaCache 0.4, 25 steps": {"steps": 25, "cache_threshold": 0.4},
}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--frames", type=int, default=81)
    args = parser.parse_args()
    pipe = load_pipeline("demo")
    some = [clips.make_clip("heldout", FIRST_CLIP + k, args.frames) for k in range(args.clips)]
    batches = [some[at : at + evaluation.BATCH] for at in range(0, args.clips, evaluation.BATCH)]
    prepared = [evaluation.inputs(pipe, batch, seed=evaluation.BATCH * k) for k, batch in enumerate(batches)]
    print("| setting | computed steps | s a clip | sync | motion right | identity | PSNR |\n" + "| --- " * 7 + "|")
    for name, changes in ROWS.items():
        options = dataclasses.replace(BASE, **changes)
        computed = steps.make_steps(options, pipe.velocity()).computed
        jax.block_until_ready(pipe.sample_latents(*prepared[0], options))  # compiles
        seconds, scores = 0.0, []
        for batch, arguments in zip(batches, prepared, strict=True):
            started = time.perf_counter()
            latents = jax.block_until_ready(pipe.sample_latents(*arguments, options))
            seconds += time.perf_counter() - started
            scores += evaluation.score(evaluation.decode(pipe, latents), batch)
        mean = evaluation.means(scores)
        count = f"{int(computed.sum())} of {options.steps}" if computed is not None else str(options.steps)
        print(
            f"| {name} | {count} | {seconds / args.clips:.2f} | {mean['sync']:.3f} | {100 * mean['motion']:.0f} % | "
            f"{mean['identity']:.2f} | {mean['psnr']:.1f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
