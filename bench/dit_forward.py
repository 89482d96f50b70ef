"""One forward of the 1.7 B preview transformer, beside diffusers' Wan transformer in torch: python -m bench.dit_forward

    python -m bench.dit_forward [--latents 5,32,32] [--rounds 2] [--forwards 2]
    python -m bench.dit_forward --sides jax --latents 21,96,96 --dtype bfloat16     # an accelerator: time per step

Random weights of the released sizes. Each side runs in a process of its own, in turns, so that whatever else the
machine does falls on both. Needs the parity extra for the torch side. diffusers' model has no audio branch; ours has.
Prints seconds, the rate of a matmul of the model's own shape measured in the same process, and the share of it that is
reached.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from emv3_jax.config import DIT_PREVIEW
from emv3_jax.models.dit import forward_flops

LAYERS, WIDTH, FFN, TEXT, IMAGE = 30, 1536, 8960, 512, 257


def timed(work: Callable[[], Any], times: int) -> list[float]:
    """Seconds of each of some runs, after one that is not counted."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def run_jax(latents: tuple[int, int, int], dtype: str, times: int) -> dict[str, Any]:
    """Our side."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from emv3_jax.config import DIT_PREVIEW
    from emv3_jax.models.dit import Conditions, DiT, zero_inputs

    cfg = dataclasses.replace(DIT_PREVIEW, dtype=dtype)
    model, grid = DiT(cfg), (1, *latents)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *zero_inputs(cfg))["params"]
    rng = np.random.default_rng(0)
    noise = lambda *shape: jnp.asarray(0.02 * rng.standard_normal(shape, np.float32))  # noqa: E731
    params = jax.tree.map(lambda leaf: noise(*leaf.shape), shapes)
    cond = Conditions(
        given=noise(*grid, cfg.mask_channels + cfg.latent_channels),
        text=noise(1, cfg.text_len, cfg.text_width),
        image=noise(1, cfg.image_tokens, cfg.image_width),
        audio=noise(1, 2 * (4 * (latents[0] - 1) + 1), cfg.audio_width),
        face_mask=jnp.ones((1, latents[1] * latents[2] // 4)),
        audio_scale=jnp.ones(1),
    )
    x, t = noise(*grid, cfg.latent_channels), jnp.full((1,), 500.0)
    context = jax.jit(lambda p, c: model.apply({"params": p}, c, method="context"))(params, cond)
    step = jax.jit(lambda p, x, t, c: model.apply({"params": p}, x, t, c, method="velocity"))
    seconds = timed(lambda: jax.block_until_ready(step(params, x, t, context)), times)
    a, b = (jnp.ones(shape, dtype) for shape in ((int(np.prod(latents)) // 4, WIDTH), (WIDTH, FFN)))
    multiply = jax.jit(jnp.matmul)
    rate = min(timed(lambda: jax.block_until_ready(multiply(a, b)), 5))
    return {"seconds": seconds, "rate": 2 * a.shape[0] * WIDTH * FFN / rate, "device": jax.devices()[0].device_kind}


def run_torch(latents: tuple[int, int, int], dtype: str, times: int) -> dict[str, Any]:
    """The same sizes in torch."""
    import diffusers
    import torch

    kind = getattr(torch, dtype)
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, in_channels=36, ffn_dim=FFN, num_layers=LAYERS,
            image_dim=1280, added_kv_proj_dim=WIDTH,
        )  # fmt: skip
    model = model.to_empty(device="cpu").eval().to(kind)
    model.rope = type(model.rope)(128, (1, 2, 2), 1024)  # tables, which an empty model does not hold
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x = torch.randn(1, 36, *latents, dtype=kind)
    inputs = {
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, TEXT, 4096, dtype=kind),
        "encoder_hidden_states_image": torch.randn(1, IMAGE, 1280, dtype=kind),
    }
    with torch.inference_mode():
        seconds = timed(lambda: model(x, **inputs), times)
        a, b = (torch.ones(shape, dtype=kind) for shape in ((int(np.prod(latents)) // 4, WIDTH), (WIDTH, FFN)))
        rate = min(timed(lambda: a @ b, 5))
    return {"seconds": seconds, "rate": 2 * a.shape[0] * WIDTH * FFN / rate, "device": "cpu"}


SIDES = {"jax": run_jax, "torch": run_torch}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--latents", default="5,32,32", help="frames, rows, columns (default 5,32,32)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--forwards", type=int, default=2, help="timed in each round, after one that is not")
    parser.add_argument("--sides", nargs="*", default=sorted(SIDES), choices=sorted(SIDES))
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)  # what a child is asked for
    args = parser.parse_args()
    frames, rows, columns = (int(n) for n in args.latents.split(","))
    if args.side:
        print(json.dumps(SIDES[args.side]((frames, rows, columns), args.dtype, args.forwards)))
        return 0
    work = forward_flops(DIT_PREVIEW, frames * rows * columns // 4)
    print(f"{frames * rows * columns // 4} tokens, {work / 1e12:.2f} TFLOP a forward, {args.dtype}\n")
    print("| side | seconds | best | median | matmul rate | share of it |\n| --- | --- | --- | --- | --- | --- |")
    seconds: dict[str, list[float]] = {side: [] for side in args.sides}
    rates = dict.fromkeys(args.sides, 0.0)
    for _ in range(args.rounds):
        for side in args.sides:
            words = [sys.executable, "-m", "bench.dit_forward", "--side", side, "--latents", args.latents]
            words += ["--dtype", args.dtype, "--forwards", str(args.forwards)]
            found = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True).stdout)
            seconds[side] += found["seconds"]
            rates[side] = max(rates[side], found["rate"])
    for side, times in seconds.items():
        shown, best = ", ".join(f"{s:.2f}" for s in times), min(times)
        share = work / best / rates[side]
        print(f"| {side} | {shown} | {best:.2f} | {statistics.median(times):.2f} | {rates[side] / 1e9:,.0f} GFLOP/s "
              f"| {share:.0%} |")  # fmt: skip
    if len(seconds) == 2:
        print(f"\njax / torch: {min(seconds['jax']) / min(seconds['torch']):.2f} (best of each)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
