"""Compiles full-size programs for a TPU slice, on any machine: python -m bench.tpu_aot --topology v5e:2x4

    python -m bench.tpu_aot --topology v5e:2x4 v5p:2x2x1 v6e:2x4 --preset preview --mode sample --latents 29,96,96
    python -m bench.tpu_aot --topology v5e:4x8 --mode train --context 4

Needs the libtpu that belongs to the jax that is installed (pip install -e '.[tpu]'), and no TPU. The programs are those
that are run: a sampling step of `sample.py` (three guidance branches of some windows; text, image and sound prepared),
or the training step of configs/sft_1b.py as it is (AdamW, float32 masters, moving average, all blocks computed again in
the backward pass, as many micro-batches as the mesh asks for), whose batch is enlarged where groups of chips would have
no clip. Prints one row a topology: memory a chip (arguments, temporaries, and both at the moment that takes most),
collectives, seconds to compile, and the floor of a step: FLOPs over the chips' peak. Nothing is run, so there are no
timings.
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
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from configs import sft_1b
from emv3_jax import steps
from emv3_jax.config import PRESETS, Preset
from emv3_jax.contexts import Shared, Window
from emv3_jax.diffusion.guidance import ModelVelocity
from emv3_jax.models.audio_tokens import audio_encoder
from emv3_jax.models.cdca import KV
from emv3_jax.models.dit import DiT, forward_flops, zero_inputs
from emv3_jax.options import SamplingOptions
from emv3_jax.pipeline import expected_params
from emv3_jax.sharding import BATCH, make_mesh, param_shardings
from emv3_jax.training import recipes
from emv3_jax.training import state as train_state
from emv3_jax.training.dit_recipe import DiTRecipe

PEAK = {"v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12}  # bf16 FLOP/s of a chip, as published
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


Latents = tuple[int, int, int]


def everywhere(mesh: jax.sharding.Mesh) -> Any:
    """shape(*sizes, dtype) of an array that every chip holds."""
    place = NamedSharding(mesh, PartitionSpec())
    return lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype, sharding=place)


def placed(tree: Any, places: Any) -> Any:
    """Shapes with their places."""
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, places)


def sampling_step(preset: Preset, latents: Latents, batch: int, mesh: jax.sharding.Mesh) -> tuple[Any, float]:
    """The traced step for a batch of windows, and its FLOPs."""
    cfg, (frames, height, width), shape = preset.dit, latents, everywhere(mesh)
    like = expected_params(preset)["dit"]
    encoder = audio_encoder(cfg, parent=None)
    features = 2 * (4 * (frames - 1) + 1) if cfg.audio_windows is None else 4 * (frames - 1) + 1
    piece = encoder.piece(features, 0, frames)
    kv = lambda count, tokens: KV(  # noqa: E731
        *(shape(cfg.layers, count, tokens, cfg.heads, cfg.head_width, dtype=jnp.dtype(cfg.dtype)) for _ in range(2))
    )
    window = Window(
        given=shape(batch, frames, height, width, cfg.mask_channels + cfg.latent_channels),
        audio=shape(batch, *encoder.audio_shape(piece.length)),
        segments=shape(batch, *piece.segments.shape, dtype=jnp.int32),
        prompts=shape(batch, 1, dtype=jnp.int32),
        text_share=shape(batch, 1, frames),
        pictures=shape(batch, dtype=jnp.int32),
        audio_gain=shape(batch, height * width // 4),
    )
    velocity = ModelVelocity(placed(like, param_shardings(like, mesh)), DiT(cfg))
    plan = steps.make_steps(SamplingOptions(steps=8, text_scale=4.0, audio_scale=2.9), velocity)
    shared = Shared(kv(2, cfg.text_len), kv(1, cfg.image_tokens), negatives=1)
    x, i = shape(batch, frames, height, width, cfg.latent_channels), jax.ShapeDtypeStruct((), jnp.int32)
    with jax.set_mesh(mesh):  # not before: what is computed on the way is computed here
        traced = steps.window_velocity.trace(velocity, plan, shared, window, x, i, ())
    return traced, 3 * batch * forward_flops(cfg, frames * height * width // 4)


def training_step(preset: Preset, latents: Latents, batch: int, mesh: jax.sharding.Mesh) -> tuple[Any, float]:
    """The traced step of configs/sft_1b.py for a batch of clips, and its FLOPs."""
    config = sft_1b.get_config()
    config.preset = preset.name
    preset, (frames, height, width) = recipes.preset_of(config), latents
    recipe, cfg = DiTRecipe(config, preset), preset.dit
    recipe.__dict__["_null_text"] = np.zeros((1, cfg.text_len, cfg.text_width), np.float32)
    optimizer = train_state.make_optimizer(config)
    params = {"dit": expected_params(preset)["dit"]}
    like = jax.eval_shape(lambda tree: train_state.init_state(tree, optimizer), params)
    shardings = train_state.tree_shardings(like, mesh)
    divided = NamedSharding(mesh, PartitionSpec(BATCH))
    one = lambda *rest, dtype=jnp.float32: jax.ShapeDtypeStruct((batch, *rest), dtype, sharding=divided)  # noqa: E731
    cond, grid = jax.eval_shape(lambda: zero_inputs(cfg, frames))[2], (frames, height, width)
    clips = {
        "latents": one(*grid, cfg.latent_channels), "given": one(*grid, cond.given.shape[-1]),
        "task": one(dtype=jnp.int32), "has_image": one(), "audio": one(*cond.audio.shape[1:]),
        "face_mask": one(height * width // 4), "text": one(*cond.text.shape[1:]), "image": one(*cond.image.shape[1:]),
    }  # fmt: skip
    update = train_state.make_update(recipe.loss, optimizer, config.ema_decay, config.micro_batches, recipe.restarts())
    with jax.set_mesh(mesh):
        traced = train_state.make_step(update, shardings).trace(placed(like, shardings), {}, clips)
    return traced, recipe.work(clips)[1]


PROGRAMS = {"sample": sampling_step, "train": training_step}


def compile_for(topology: str, preset: Preset, args: argparse.Namespace) -> str:
    """One row of the table."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(devices, data=args.data, context=args.context, tensor=args.tensor)
    groups = len(devices) // (args.context * args.tensor)
    batch = args.batch or (max(groups, sft_1b.CLIPS) if args.mode == "train" else groups)
    started = time.monotonic()
    traced, work = PROGRAMS[args.mode](preset, args.latents, batch, mesh)
    with jax.set_mesh(mesh):
        compiled = traced.lower().compile()
    took = time.monotonic() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    found = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}
    floor = work / (len(devices) * PEAK[topology.partition(":")[0]])
    cells = (
        topology,
        len(devices),
        " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1),
        batch,
        f"{memory.argument_size_in_bytes / 2**30:.2f}",
        f"{memory.temp_size_in_bytes / 2**30:.2f}",
        f"{memory.peak_memory_in_bytes / 2**30:.2f}",
        ", ".join(f"{count} {name}" for name, count in found.items() if count) or "none",
        f"{took:.0f} s",
        f"{work / 1e15:.2f} P",
        f"{floor:.2f} s",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--topology", nargs="+", default=["v5e:2x4"])
    parser.add_argument("--preset", choices=("preview", "flash"), default="preview")
    parser.add_argument("--latents", type=lambda text: tuple(map(int, text.split(","))), default=(29, 96, 96))
    parser.add_argument("--mode", choices=PROGRAMS, default="sample")
    parser.add_argument(
        "--batch", type=int, default=0, help="0: a window for every context x tensor chips, or the config's clips"
    )
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--context", type=int, default=4)
    parser.add_argument("--tensor", type=int, default=1)
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    preset = dataclasses.replace(preset, dit=dataclasses.replace(preset.dit, dtype="bfloat16"))
    names = ("topology", "chips", "mesh", "batch", "arguments, GiB", "temporaries, GiB", "peak, GiB", "collectives",
             "compile", "FLOPs", "floor")  # fmt: skip
    print(f"| {' | '.join(names)} |\n" + "| --- " * len(names) + "|")
    for topology in args.topology:
        print(compile_for(topology, preset, args), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
