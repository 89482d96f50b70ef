"""The training step at full size on one device: python -m bench.train_step --latents 29,60,104 --remat full dots none

    python -m bench.train_step --latents 29,96,96 --clips 4     # 113 frames of 768 x 768, four clips a step
    JAX_PLATFORMS=cpu python -m bench.train_step --preset demo --latents 3,8,8     # does it run at all

The step that train.py takes for configs/sft_1b.py: AdamW, float32 masters, moving average, PhDA, bfloat16 matmuls, the
clips of a batch one after another. Weights and batch are random and made on the device. What the backward pass of a
block finds in memory (--remat) is measured in a process of its own each, so that one that needs too much leaves the
others. Prints one row each: the median of the timed steps; model FLOPs, which are forward and backward without what is
computed again, over time, as a share of the rate of a large matmul in the same process; the same share with what is
computed again; the most memory that was in use at once, of what JAX may use.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from bench.full_step import FullStep, Latents, latents_of
from emv3_jax import command_line
from emv3_jax.config import PRESETS
from emv3_jax.errors import UserError, out_of_memory
from emv3_jax.models import dit
from emv3_jax.training import state as train_state

POLICIES = {**{name: name for name in dit.REMAT}, "none": ""}  # --remat to DiTConfig.remat
WARM_UP, MATMULS = 2, 10
COLUMNS = ("remat", "compile", "s a step", "tokens/s", "model FLOPs a step", "FLOP/s", "matmul rate", "share of it",
           "with what is computed again", "peak memory")  # fmt: skip


def random_like(tree: Any) -> Any:
    """Arrays of some shapes, made on the device: normal numbers of deviation 0.02; ones where they are whole."""

    def leaf(key: jax.Array, like: Any) -> jax.Array:
        if jnp.issubdtype(like.dtype, jnp.integer):
            return jnp.ones(like.shape, like.dtype)
        return 0.02 * jax.random.normal(key, like.shape, like.dtype)

    def make(key: jax.Array) -> Any:
        leaves, kind = jax.tree.flatten(tree)
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(kind, [leaf(one, like) for one, like in zip(keys, leaves, strict=True)])

    return jax.jit(make)(jax.random.key(0))


def matmul_rate() -> float:
    """FLOP/s of a large bfloat16 matmul: of a few rounds of several, the best."""

    @jax.jit
    def several(a: jax.Array, x: jax.Array) -> jax.Array:
        for _ in range(MATMULS):  # not a loop of JAX, which would copy what it carries
            x = a @ x
        return x

    side = 1024 if jax.default_backend() == "cpu" else 8192
    a, b = (random_like(jax.ShapeDtypeStruct((side, side), jnp.bfloat16)) for _ in range(2))
    jax.block_until_ready(several(a, b))
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready(several(a, b))
        seconds.append(time.perf_counter() - started)
    return MATMULS * 2 * side**3 / min(seconds)


def measured(preset: str, latents: Latents, remat: str, clips: int, steps: int) -> dict[str, Any]:
    """What `row` shows of a policy, measured in this process."""
    step, rate = FullStep(preset, remat=remat), matmul_rate()
    shapes = step.clips(latents, clips)
    started = time.perf_counter()
    like = jax.eval_shape(step.state, step.params())
    compiled = train_state.make_step(step.update).lower(like, {}, shapes).compile()
    compile_seconds, seconds = time.perf_counter() - started, []
    state, batch = step.state(random_like(step.params())), random_like(shapes)
    for _ in range(WARM_UP + steps):
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, {}, batch))
        seconds.append(time.perf_counter() - started)
    if not metrics["finite"]:
        raise UserError("the loss of the random batch is not finite, so its time says nothing")
    device = jax.devices()[0]
    memory = device.memory_stats() or {}  # none on a processor
    cfg, (tokens, work) = step.recipe.preset.dit, step.recipe.work(shapes)
    return {
        "device": device.device_kind, "compile": compile_seconds, "seconds": statistics.median(seconds[WARM_UP:]),
        "tokens": tokens, "model": 3 * clips * dit.forward_flops(cfg, tokens // clips), "work": work, "rate": rate,
        "peak": memory.get("peak_bytes_in_use", 0), "limit": memory.get("bytes_limit", 0),
    }  # fmt: skip


def apart(words: list[str], policy: str) -> dict[str, Any]:
    """What a policy gives in a process of its own; `short`: what it said for want of memory."""
    command = [sys.executable, "-m", "bench.train_step", *words, "--measure", policy]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == -signal.SIGKILL:
        return {"short": "the system killed the process"}
    if done.returncode:
        raise UserError(f"--remat {policy} failed: see above")
    return json.loads(done.stdout.splitlines()[-1])


def row(policy: str, found: dict[str, Any]) -> str:
    """One row of the table."""
    if "short" in found:
        cells = [policy, "out of memory", *["" for _ in COLUMNS[2:]]]
        return f"| {' | '.join(cells)} |"
    seconds, gib = found["seconds"], 2**30
    cells = [
        policy,
        f"{found['compile']:.0f} s",
        f"{seconds:.3f}",
        f"{found['tokens'] / seconds:,.0f}",
        f"{found['model'] / 1e12:.3g} T",
        f"{found['model'] / seconds / 1e12:.3g} T",
        f"{found['rate'] / 1e12:.3g} T",
        f"{found['model'] / seconds / found['rate']:.0%}",
        f"{found['work'] / seconds / found['rate']:.0%}",
        f"{found['peak'] / gib:.1f} of {found['limit'] / gib:.1f} GiB" if found["peak"] else "not told",
    ]
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = command_line.Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="preview")
    parser.add_argument("--latents", type=latents_of, default=(29, 60, 104), metavar="FRAMES,ROWS,COLUMNS")
    parser.add_argument("--remat", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--clips", type=int, default=1, help="of a step, taken one after another")
    parser.add_argument("--steps", type=int, default=5, help=f"that are timed, after {WARM_UP} that are not")
    parser.add_argument("--measure", choices=POLICIES, help=argparse.SUPPRESS)  # what a child is asked for
    args = parser.parse_args(arguments)
    if args.clips < 1 or args.steps < 1:
        raise UserError("--clips and --steps must be 1 or more")
    if args.measure:
        try:
            found = measured(args.preset, args.latents, POLICIES[args.measure], args.clips, args.steps)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            found = {"short": str(error).splitlines()[0][:200]}
        print(json.dumps(found))
        return 0
    print(f"| {' | '.join(COLUMNS)} |\n" + "| --- " * len(COLUMNS) + "|", flush=True)
    notes = []
    for policy in args.remat:
        found = apart(arguments, policy)
        print(row(policy, found), flush=True)
        notes.append(f"{policy}: {found['short']}" if "short" in found else f"{policy}: {found['device']}")
    print("\n" + "\n".join(notes))
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
