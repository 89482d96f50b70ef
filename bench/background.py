"""Where the background of a still puppet loses its colours: python -m bench.background [--clips 4]

Pixels that show nothing but the background, of the true video through the VAE alone (encoded and decoded) and of
generated ones, which are longer than two windows, with a noise of its own for every window and with the same for all.
Of 255: how far spans of frames are from the truth, and how far they have moved, beyond the true change, since the first
ten frames; in all, and as the mean colour of the background alone, whose share in the square of that change stands
below.
"""

import argparse
import sys

import jax.numpy as jnp
import numpy as np

from bench.long_video import FIRST_CLIP, generate, still_clip
from emv3_jax.config import DEMO
from emv3_jax.models import vae
from emv3_jax.options import SamplingOptions
from emv3_jax.pipeline import Pipeline, load_pipeline

FRAMES = 253
NOISE = ("fresh", "repeated")
SPANS = ((0, 1), (1, 5), (5, 9), (9, 17), (20, 30), (100, 110), (150, 160), (240, 250))


def through_vae(pipe: Pipeline, video: np.ndarray) -> np.ndarray:
    """A video [F, H, W, 3] encoded and decoded."""
    params = pipe.params["vae"]
    latents = pipe.encode_video(params, video[None])
    pieces = vae.decode_stream(pipe.vae, params, (latents[:, t : t + 1] for t in range(latents.shape[1])))
    return np.asarray(jnp.concatenate([piece[0] for piece in pieces]))


def measure(error: np.ndarray) -> np.ndarray:
    """error [F, P, 3] of P pixels -> [spans, 4]: size, change since frames 0-9, its mean colour, share of that."""

    def size(x: np.ndarray) -> float:
        return float(np.abs(x).mean() * 127.5)

    start = error[:10].mean(0)
    means = [error[first:last].mean(0) for first, last in SPANS]
    changes = [mean - start for mean in means]
    shares = [np.square(change.mean(0)).mean() / np.square(change).mean() for change in changes]
    return np.array([
        (size(mean), size(change), size(change.mean(0)), share)
        for mean, change, share in zip(means, changes, shares, strict=True)
    ])  # fmt: skip


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=4)
    args = parser.parse_args()
    pipe = load_pipeline("demo")
    rows: dict[str, list[np.ndarray]] = {"VAE alone": [], **{f"{noise} noise": [] for noise in NOISE}}
    for k in range(args.clips):
        clip = still_clip(FIRST_CLIP + k, FRAMES)
        true, seen = (np.asarray(x) for x in clip.render(DEMO.height, parts=True))
        background = (seen[..., 0] > 0.99).all(0)
        made = [generate(pipe, clip, SamplingOptions(noise=noise), seed=k, match=False) for noise in NOISE]
        videos = through_vae(pipe, true), *made
        for name, video in zip(rows, videos, strict=True):
            rows[name].append(measure((video - true)[:, background]))
    print("| | frame " + " | ".join(f"{a}-{b - 1}" if b - a > 1 else str(a) for a, b in SPANS) + " |")
    print("| --- " * (len(SPANS) + 1) + "|")
    for name, measured in rows.items():
        what = "error", "change since frames 0-9", "mean colour of that", "its share in the square"
        for label, values in zip(what, np.mean(measured, axis=0).T, strict=True):
            print(f"| {name}, {label} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
