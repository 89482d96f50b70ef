"""Losses on every mesh of eight devices against one: python -m bench.meshes [--steps 20] [--meshes N] [--processes 2]

Eight devices are made of this machine's processor. The demo's transformer is trained on random latents by the step that
`train.py` runs; every mesh (data, fsdp, context, tensor) whose sizes multiply to 8 must give the losses of one device.
Prints one row a mesh: the largest relative difference of a loss over all steps. Each mesh is run by a process of its
own, or with --processes by as many, which have the eight devices between them (`jax.distributed`). Eight heads divide
over every context, as Ulysses does it; with --heads 6 a context of 4 or 8 works by ring attention.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emv3_jax.config import DEMO, DiTConfig
from emv3_jax.diffusion import flow
from emv3_jax.models.dit import Conditions, DiT, zero_inputs
from emv3_jax.sharding import make_mesh
from emv3_jax.training import distributed, losses
from emv3_jax.training import state as train_state

# Eight heads, so that heads can be divided too; two layers, to compile quickly.
HEADS = 8
CFG = dataclasses.replace(DEMO.dit, width=16 * HEADS, heads=HEADS, layers=2, ffn=96)
BATCH, LATENTS = 8, (5, 8, 8)
DEVICES = 8
# XLA's pool has as many threads as devices or cores, and a collective holds one for every device: two that do not wait
# for each other can take half of the pool each and never end, until XLA ends the program. So room for several at once.
THREADS = 4 * DEVICES


def batch_of(step: int) -> dict[str, Any]:
    """Random latents and conditions, a function of the step."""
    rng = np.random.default_rng(step)
    noise = lambda *shape: rng.standard_normal((BATCH, *shape), np.float32)  # noqa: E731
    cond = Conditions(
        given=noise(*LATENTS, CFG.mask_channels + CFG.latent_channels),
        text=noise(CFG.text_len, CFG.text_width),
        image=noise(CFG.image_tokens, CFG.image_width),
        audio=noise(2 * (4 * (LATENTS[0] - 1) + 1), CFG.audio_width),
        face_mask=np.ones((BATCH, LATENTS[1] * LATENTS[2] // 4), np.float32),
        audio_scale=np.ones(BATCH, np.float32),
    )
    return {"x0": noise(*LATENTS, CFG.latent_channels), "cond": cond}


def loss(
    params: Any, constants: Any, batch: dict[str, Any], key: jax.Array, cfg: DiTConfig = CFG
) -> tuple[jax.Array, dict]:
    """Flow matching."""
    times, noises = jax.random.split(key)
    x0 = batch["x0"]
    t, noise = flow.sample_timesteps(times, x0.shape[0]), jax.random.normal(noises, x0.shape)
    velocity = DiT(cfg).apply({"params": params}, flow.add_noise(x0, noise, t), t, batch["cond"])
    return jnp.mean(losses.velocity_errors(jnp.asarray(velocity), x0, noise)), {}


def run(steps: int, mesh: jax.sharding.Mesh | None, heads: int = HEADS) -> np.ndarray:
    """The losses of so many steps."""
    optimizer, cfg = optax.adamw(1e-3), dataclasses.replace(CFG, width=16 * heads, heads=heads)
    params = jax.jit(lambda key: DiT(cfg).init(key, *zero_inputs(cfg))["params"])(jax.random.key(0))
    state = jax.device_get(train_state.init_state(jax.device_get(params), optimizer))
    shardings = None if mesh is None else train_state.tree_shardings(state, mesh)
    state = state if shardings is None else jax.device_put(state, shardings)
    step = train_state.make_step(train_state.make_update(functools.partial(loss, cfg=cfg), optimizer, 0.99), shardings)
    found = []
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for number in range(steps):
            batch = batch_of(number)
            if mesh is not None:
                here = distributed.rows_here(BATCH, mesh)
                some = jax.tree.map(lambda leaf, rows=here: leaf if rows is None else leaf[rows], batch)
                batch = distributed.place_batch(some, mesh, BATCH, here)
            state, metrics = step(state, {}, batch)
            found.append(float(metrics["loss"]))
    return np.array(found)


def shapes() -> list[dict[str, int]]:
    """Sizes of data, context and tensor whose product divides 8; fsdp takes the rest."""
    sizes = itertools.product((1, 2, 4, 8), repeat=3)
    return [{"data": d, "context": c, "tensor": t} for d, c, t in sizes if DEVICES % (d * c * t) == 0]


def devices_of_cpu(count: int) -> dict[str, str]:
    """Environment of a program that is to see so many devices, made of this machine's processor."""
    flags = f"--xla_force_host_platform_device_count={count}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": str(THREADS)}


def apart(steps: int, sizes: dict[str, int], processes: int, heads: int) -> np.ndarray:
    """The losses on a mesh whose eight devices belong to as many new processes, which must all see the same.

    Args:
      sizes: as of `shapes`; none: the losses of one device.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    words = [sys.executable, "-m", "bench.meshes", "--steps", str(steps), "--coordinator", place]
    words += ["--sizes", json.dumps(sizes), "--processes", str(processes), "--heads", str(heads)]
    env = os.environ | devices_of_cpu(DEVICES // processes)
    running = [
        subprocess.Popen([*words, "--process", str(process)], env=env, stdout=subprocess.PIPE, text=True)
        for process in range(processes)
    ]
    printed = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{sizes} over {processes} processes failed: see above")
    found = [np.array(json.loads(some.splitlines()[-1])) for some in printed]
    assert all(np.array_equal(found[0], other) for other in found), "the processes disagree"
    return found[0]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--meshes", type=int, default=100, help="at most so many, evenly chosen")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--process", type=int, help="of several: which one this is")
    parser.add_argument("--coordinator", help="of several: where they meet")
    parser.add_argument("--sizes", type=json.loads, help="of several: of the mesh")
    args = parser.parse_args()
    if args.process is not None:
        if args.processes > 1:
            jax.distributed.initialize(args.coordinator, args.processes, args.process)
        print(json.dumps(run(args.steps, make_mesh(**args.sizes) if args.sizes else None, args.heads).tolist()))
        return 0
    want = apart(args.steps, {}, 1, args.heads)
    print(f"loss on one device: {want[0]:.6f} at first, {want[-1]:.6f} after {args.steps} steps\n")
    print("| processes | data | fsdp | context | tensor | largest relative difference |\n" + "| --- " * 6 + "|")
    worst, every = 0.0, shapes()
    for sizes in every[:: -(-len(every) // args.meshes)]:
        error = float(np.abs(apart(args.steps, sizes, args.processes, args.heads) / want - 1).max())
        worst = max(worst, error)
        data, context, tensor = sizes.values()
        fsdp = DEVICES // (data * context * tensor)
        print(f"| {args.processes} | {data} | {fsdp} | {context} | {tensor} | {error:.1e} |", flush=True)
    print(f"\nworst {worst:.1e}: {'good' if worst < 1e-5 else 'MORE than 1e-5'}")
    return 0 if worst < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
