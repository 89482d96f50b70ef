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
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from bench.full_step import PEAK, FullStep, Latents, latents_of
from configs import sft_1b
from emv3_jax import command_line, steps
from emv3_jax.config import PRESETS, Preset
from emv3_jax.contexts import Shared, Window
from emv3_jax.diffusion.guidance import ModelVelocity
from emv3_jax.errors import UserError
from emv3_jax.models.audio_tokens import audio_encoder
from emv3_jax.models.cdca import KV
from emv3_jax.models.dit import DiT, forward_flops
from emv3_jax.options import SamplingOptions
from emv3_jax.pipeline import expected_params
from emv3_jax.sharding import BATCH, make_mesh, param_shardings
from emv3_jax.training import state as train_state

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


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
    step = FullStep(preset.name)
    like = jax.eval_shape(step.state, step.params())
    shardings = train_state.tree_shardings(like, mesh)
    shapes, divided = step.clips(latents, batch), NamedSharding(mesh, PartitionSpec(BATCH))
    clips = placed(shapes, dict.fromkeys(shapes, divided))
    with jax.set_mesh(mesh):
        traced = train_state.make_step(step.update, shardings).trace(placed(like, shardings), {}, clips)
    return traced, step.recipe.work(clips)[1]


PROGRAMS = {"sample": sampling_step, "train": training_step}


def topology_of(text: str) -> str:
    """--topology KIND:AxB or KIND:AxBxC, for argparse."""
    if not re.fullmatch(rf"({'|'.join(PEAK)}):\d+(x\d+){{1,2}}", text):
        raise argparse.ArgumentTypeError(f"must be {', '.join(PEAK)} and its size, such as v5e:2x4, got {text!r}")
    return text


def compile_for(topology: str, preset: Preset, args: argparse.Namespace) -> str:
    """One row of the table."""
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # of libtpu, whatever it raises
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--topology {topology} cannot be had ({why}): it takes libtpu (pip install -e '.[tpu]') and a name such as"
            " v5e:2x4 or v5p:2x2x1"
        ) from error
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


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = command_line.Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--topology", nargs="+", type=topology_of, default=["v5e:2x4"])
    parser.add_argument("--preset", choices=("preview", "flash"), default="preview")
    parser.add_argument("--latents", type=latents_of, default=(29, 96, 96))
    parser.add_argument("--mode", choices=PROGRAMS, default="sample")
    parser.add_argument(
        "--batch", type=int, default=0, help="0: a window for every context x tensor chips, or the config's clips"
    )
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--context", type=int, default=4)
    parser.add_argument("--tensor", type=int, default=1)
    args = parser.parse_args(arguments)
    if min(args.data, args.context, args.tensor) < 1 or args.batch < 0:
        raise UserError("--data, --context and --tensor must be 1 or more, --batch 0 or more")
    preset = PRESETS[args.preset]
    preset = dataclasses.replace(preset, dit=dataclasses.replace(preset.dit, dtype="bfloat16"))
    names = ("topology", "chips", "mesh", "batch", "arguments, GiB", "temporaries, GiB", "peak, GiB", "collectives",
             "compile", "FLOPs", "floor")  # fmt: skip
    print(f"| {' | '.join(names)} |\n" + "| --- " * len(names) + "|")
    for topology in args.topology:
        print(compile_for(topology, preset, args), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
