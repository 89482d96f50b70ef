"""From a photo, a recording and a prompt to full-size Conditions: python -m bench.front_half ../shared/media

MEDIA holds photo_02.jpg, photo_02_face.npy, photo_02_prompt.txt and speech_20.wav. Files, tokens, sizes, masks,
resampling and alignment are real and so are the models' widths; their weights are random (umT5's in bfloat16, as
released), so features mean nothing, and umT5 has 2 of its 24 layers, to fit a small machine. The tokenizer is a small
stand-in. One model at a time is in memory. Prints one row a stage, for preview and flash, and checks that the
transformer takes what comes out.
"""

import argparse
import dataclasses
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from bench.conversion import tokenizer
from emv3_jax import conditioning
from emv3_jax.config import FLASH, PREVIEW, Preset
from emv3_jax.media import fit_image, load_image
from emv3_jax.models import clip
from emv3_jax.models.dit import Conditions, DiT
from emv3_jax.pipeline import Pipeline, Request, expected_params, fitted_size, read_request
from emv3_jax.tokenizers import UMT5Tokenizer

PHOTO, FACE, PROMPT, SPEECH = "photo_02.jpg", "photo_02_face.npy", "photo_02_prompt.txt", "speech_20.wav"
BLOCK = 1_000_003  # values that are drawn; larger arrays repeat them


def random_weights(shapes: Any, dtype: Any = np.float32) -> Any:
    """A tree of the wanted shapes, small enough everywhere that features stay finite."""
    noise = np.random.default_rng(0).standard_normal(BLOCK, np.float32)

    def leaf(path: tuple, like: jax.ShapeDtypeStruct) -> jax.Array:
        width = max(int(np.prod(like.shape[-2:-1])), 64)
        gain = path[-1].key in ("scale", "gamma", "g")
        block = (1 + 0.1 * noise if gain else noise / np.sqrt(width)).astype(dtype)
        out = np.empty(like.size, dtype)
        for start in range(0, like.size, BLOCK):
            out[start : start + BLOCK] = block[: like.size - start]
        return jnp.asarray(out.reshape(like.shape))

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def timed(stage: str, work: Callable[[], Any]) -> Any:
    """Runs a stage and prints its row; peaks are of the whole run so far."""
    start = time.perf_counter()
    out = jax.block_until_ready(work())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"| {stage} | {time.perf_counter() - start:.1f} s | {peak:.1f} GB |", flush=True)
    return out


def encode(words: UMT5Tokenizer, media: pathlib.Path) -> tuple[jax.Array, jax.Array]:
    """States of the prompt [1, 512, 4096] and of the picture [1, 257, 1280], which are the same for both presets."""
    preset = dataclasses.replace(PREVIEW, text=dataclasses.replace(PREVIEW.text, layers=2))
    shapes = expected_params(preset)
    ids, mask = words.encode([(media / PROMPT).read_text()])
    params = {"text": random_weights(shapes["text"], ml_dtypes.bfloat16)}
    text = timed(
        "umT5, 2 layers", lambda: jax.jit(conditioning.encode_text, static_argnums=1)(params, preset, ids, mask)
    )
    del params
    params = random_weights(shapes["image"])
    picture, _ = load_image(media / PHOTO)
    picture, _ = fit_image(picture, *fitted_size(*picture.shape[:2], PREVIEW))
    pixels = clip.preprocess(jnp.asarray(picture[None], jnp.float32) / 127.5 - 1, PREVIEW.image.image_size)
    image = timed("CLIP", lambda: jax.jit(clip.CLIPVision(PREVIEW.image).apply)({"params": params}, pixels))
    return text, image


def run(preset: Preset, media: pathlib.Path, frames: int, words: UMT5Tokenizer, text: Any, image: Any) -> None:
    """One preset, from files to Conditions."""
    request = Request(
        image=media / PHOTO, audio=media / SPEECH, prompt=(media / PROMPT).read_text(), frames=frames, face=media / FACE
    )  # fmt: skip
    shapes = expected_params(preset)
    ready = timed(f"{preset.name}: files read, resized, resampled", lambda: read_request(request, preset, words))
    parts = {role: random_weights(shapes[role]) for role in ("speech", "vae")}
    pipe = Pipeline(preset, {**parts, "dit": {}}, words=words)
    prepared, given = timed(f"{preset.name}: speech encoder and VAE", lambda: pipe.prepare(ready))
    cond = Conditions(
        given=given,
        text=text,
        image=image,
        audio=prepared.audio,
        face_mask=prepared.face_mask,
        audio_scale=np.ones(1, np.float32),
    )
    dit = DiT(preset.dit)
    jax.eval_shape(lambda p, c: dit.apply({"params": p}, c, method="context"), shapes["dit"], cond)
    for note in ready.notes:
        print(f"note: {note}")
    for name, value in vars(cond).items():
        x = np.asarray(value, np.float32)
        assert np.isfinite(x).all(), name
        print(f"  {name:12s} {list(x.shape)} {value.dtype}, mean {x.mean():.3f}, deviation {x.std():.3f}", flush=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("media", type=pathlib.Path)
    parser.add_argument("--frames", type=int, default=5, help="4k + 1 up to 113; the VAE takes most of the time")
    args = parser.parse_args()
    print("| stage | time | peak memory |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer(pathlib.Path(folder))
        words = UMT5Tokenizer(folder, PREVIEW.dit.text_len)
        text, image = encode(words, args.media)
        for preset in (PREVIEW, FLASH):
            run(preset, args.media, args.frames, words, text, image)
    return 0


if __name__ == "__main__":
    sys.exit(main())
