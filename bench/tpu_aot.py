"""Compiles the full-size sampling step for a TPU slice, on any machine: python -m bench.tpu_aot --topology v5e:2x4

    python -m bench.tpu_aot --topology v5e:2x4 v5p:2x2x1 v6e:2x4 --preset preview --latents 29,96,96 --context 4

Needs the libtpu that belongs to the jax that is installed (pip install -e '.[tpu]'), and no TPU. The program is the one
that `sample.py` runs: three guidance branches of one window, text, image and sound prepared. Prints one row a topology:
memory a chip (arguments and temporaries), collectives, seconds to compile, and the floor of a step: FLOPs over the
chips' peak. Nothing is run, so there are no timings.
"""

import argparse
import dataclasses
import os
import re
import sys
import time
from typing import Any

# The program runs on the processor; libtpu only compiles, and must not look for a TPU, nor mind a second process.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_MIN_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
}  # fmt: skip

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from bench.dit_forward import flops
from emv3_jax import steps
from emv3_jax.config import PRESETS, Preset
from emv3_jax.contexts import Shared, Window
from emv3_jax.diffusion.guidance import ModelVelocity
from emv3_jax.models.audio_tokens import audio_encoder
from emv3_jax.models.cdca import KV
from emv3_jax.models.dit import DiT
from emv3_jax.options import SamplingOptions
from emv3_jax.pipeline import expected_params
from emv3_jax.sharding import make_mesh, param_shardings

PEAK = {"v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12}  # bf16 FLOP/s of a chip, as published
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def abstract_inputs(preset: Preset, latents: tuple[int, int, int], windows: int, mesh: jax.sharding.Mesh) -> Any:
    """Velocity, shared keys and values, windows and x, as shapes with their places on the mesh."""
    cfg, (frames, height, width) = preset.dit, latents
    everywhere = NamedSharding(mesh, PartitionSpec())
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype, sharding=everywhere)  # noqa: E731
    like = expected_params(preset)["dit"]
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        like,
        param_shardings(like, mesh),
    )
    encoder = audio_encoder(cfg, parent=None)
    features = 2 * (4 * (frames - 1) + 1) if cfg.audio_windows is None else 4 * (frames - 1) + 1
    piece = encoder.piece(features, 0, frames)
    kv = lambda count, tokens: KV(  # noqa: E731
        *(shape(cfg.layers, count, tokens, cfg.heads, cfg.head_width, dtype=jnp.dtype(cfg.dtype)) for _ in range(2))
    )
    window = Window(
        given=shape(windows, frames, height, width, cfg.mask_channels + cfg.latent_channels),
        audio=shape(windows, *encoder.audio_shape(piece.length)),
        segments=shape(windows, *piece.segments.shape, dtype=jnp.int32),
        prompts=shape(windows, 1, dtype=jnp.int32),
        text_share=shape(windows, 1, frames),
        pictures=shape(windows, dtype=jnp.int32),
        audio_gain=shape(windows, height * width // 4),
    )
    shared = Shared(kv(2, cfg.text_len), kv(1, cfg.image_tokens), negatives=1)
    return ModelVelocity(params, DiT(cfg)), shared, window, shape(windows, frames, height, width, cfg.latent_channels)


def compile_for(topology: str, preset: Preset, args: argparse.Namespace) -> str:
    """One row of the table."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh, windows = (
        make_mesh(devices, data=args.data, context=args.context),
        args.windows or len(devices) // args.context,
    )
    velocity, shared, window, x = abstract_inputs(preset, args.latents, windows, mesh)
    options = SamplingOptions(steps=8, text_scale=4.0, audio_scale=2.9)
    plan = steps.make_steps(options, velocity)
    started = time.monotonic()
    index = jax.ShapeDtypeStruct((), jnp.int32)
    with jax.set_mesh(mesh):
        compiled = steps.window_velocity.trace(velocity, plan, shared, window, x, index, ()).lower().compile()
    took = time.monotonic() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    found = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}
    tokens = args.latents[0] * args.latents[1] * args.latents[2] // 4
    work = 3 * windows * flops(tokens)
    floor = work / (len(devices) * PEAK[topology.partition(":")[0]])
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return (
        f"| {topology} | {len(devices)} | {sizes} | {windows} | {memory.argument_size_in_bytes / 2**30:.2f} | "
        f"{memory.temp_size_in_bytes / 2**30:.2f} | "
        f"{', '.join(f'{count} {name}' for name, count in found.items() if count) or 'none'} | {took:.0f} s | "
        f"{work / 1e15:.2f} P | {floor:.2f} s |"
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--topology", nargs="+", default=["v5e:2x4"])
    parser.add_argument("--preset", choices=("preview", "flash"), default="preview")
    parser.add_argument("--latents", type=lambda text: tuple(map(int, text.split(","))), default=(29, 96, 96))
    parser.add_argument("--windows", type=int, default=0, help="windows of one batch; 0: one for every `context` chips")
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--context", type=int, default=4)
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    preset = dataclasses.replace(preset, dit=dataclasses.replace(preset.dit, dtype="bfloat16"))
    names = ("topology", "chips", "mesh", "windows", "arguments, GiB", "temporaries, GiB", "collectives", "compile",
             "FLOPs", "floor")  # fmt: skip
    print(f"| {' | '.join(names)} |\n" + "| --- " * len(names) + "|")
    for topology in args.topology:
        print(compile_for(topology, preset, args), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
