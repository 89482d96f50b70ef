"""A training run that is killed again and again, against one that is not: python -m bench.kills [--kills 20]

`train.py` trains the puppets' base model for some steps and is killed (SIGKILL), then given the same command again,
until it has died as often as asked; then it is let finish. The moment is drawn uniformly over what a life is expected
to last: starting, which includes reading the last checkpoint and, until it is once done, compiling, and then the steps
that leave enough of the run for the other kills, with a save every seventh. Only what hit a living process counts; a
run that is done nevertheless is compared, and another one begun. The losses of all steps must be those of a run that
nothing disturbed, bit for bit, and so must the weights, and no checkpoint may have been damaged. Every fifth time it is
stopped by SIGTERM instead, which must end it with exit code 0.

    python -m emv3_jax.data.prepare --puppets train --clips 448 --frames 33 --preset demo --out data/puppets33
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

HALF, DAMAGED = "was only half written", "is damaged and was moved"


def command(workdir: pathlib.Path, steps: int, data: str) -> list[str]:
    """A short run that logs every step and saves every seventh."""
    keys = {
        "data": data, "steps": steps, "stages": f"(({steps}, ((33, 2),)),)", "learning_rates": f"(({steps}, 2e-3),)",
        "tasks": f"(({steps}, (('t2v', 0.3), ('i2v', 0.7))),)", "warmup_steps": 5, "log_every": 1,
        "eval_every": 10 * steps, "checkpoint_every": 7,
    }  # fmt: skip
    words = [f"--config.{key}={value}" for key, value in keys.items()]
    return [sys.executable, "train.py", "--config", "configs/puppet_base.py", "--workdir", str(workdir), *words]


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """Loss by step, as logged."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@dataclasses.dataclass(frozen=True)
class Life:
    """What became of one process: exit code, what it said, and when: its first step (inf: never) and its end."""

    code: int
    said: str
    began: float
    seconds: float

    def doing(self, number: int) -> str:
        """What a signal broke off, "starting" or "learning"; "" where it came too late.

        Raises:
          ValueError: the signal must not end it so.
        """
        doing = "starting" if self.began == float("inf") else "learning"
        if number == signal.SIGKILL and self.code == -number:
            return doing
        if number == signal.SIGTERM and self.code == 0 and "stopped by SIGTERM" in self.said:
            return doing
        if number == signal.SIGTERM and self.code == -number and not self.said:
            return doing  # before Python had come to train.py
        if self.code == 0:
            return ""
        raise ValueError(f"{signal.Signals(number).name}: exit code {self.code}")


def compiled_by(workdir: pathlib.Path) -> pathlib.Path:
    """Where a run keeps the programs that it compiled; no other has them."""
    return workdir.with_suffix(".compiled")


def live(workdir: pathlib.Path, steps: int, data: str, moment: float = float("inf"), number: int = 0) -> Life:
    """Starts the run, or goes on with it, and sends a signal after some seconds."""
    said, started, began = workdir.with_suffix(".txt"), time.monotonic(), float("inf")
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(compiled_by(workdir))}
    with said.open("w") as out:
        process = subprocess.Popen(command(workdir, steps, data), stdout=out, env=environment)
        while (now := time.monotonic() - started) < moment and process.poll() is None:
            if began > now and re.search(r"^step \d+/", said.read_text(), re.MULTILINE):
                began = now
            time.sleep(min(0.05, moment - now))
        if process.poll() is None:
            process.send_signal(number)
        code = process.wait()
    return Life(code, said.read_text(), began, time.monotonic() - started)


def whole(life: Life) -> Life:
    """A life that nothing disturbed; what went wrong with any other is on stderr."""
    if life.code:
        sys.exit(life.code)
    return life


def same(calm: pathlib.Path, killed: pathlib.Path, steps: int) -> bool:
    """Whether two runs have the same losses and weights, which it says."""
    found = {
        f"losses of {steps} steps, bit for bit": len(losses(calm)) == steps and losses(calm) == losses(killed),
        "weights, byte by byte": len({(run / "weights/dit.safetensors").read_bytes() for run in (calm, killed)}) == 1,
    }
    for name, good in found.items():
        print(f"{name}: {'the same' if good else 'DIFFERENT'}", flush=True)
    return all(found.values())


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--data", default="data/puppets33")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng, broken, notes = np.random.default_rng(args.seed), collections.Counter[str](), collections.Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        calm, killed = pathlib.Path(folder) / "calm", pathlib.Path(folder) / "killed"
        cold = whole(live(calm, args.steps, args.data)).began
        shutil.rmtree(calm)
        life = whole(live(calm, args.steps, args.data))  # which has no need to compile
        warm, pace = life.began, (life.seconds - life.began) / args.steps
        print(
            f"undisturbed: {args.steps} steps in {life.seconds:.0f} s, after {warm:.0f} s to start, or"
            f" {cold:.0f} s with compiling",
            flush=True,
        )
        good, kills = True, 0
        while kills < args.kills:
            number = signal.SIGTERM if kills % 5 == 4 else signal.SIGKILL
            start = warm if any(compiled_by(killed).glob("jit_update-*")) else cold
            moment = rng.uniform(0, start + 2 * pace * args.steps / args.kills)
            life = live(killed, args.steps, args.data, moment, number)
            notes.update({line: life.said.count(line) for line in (HALF, DAMAGED)})
            if not (doing := life.doing(number)):  # the machine has less to do than before
                good = same(calm, killed, args.steps) and good
                shutil.rmtree(killed)
                continue
            kills, broken[doing] = kills + 1, broken[doing] + 1
            print(f"{kills}: {signal.Signals(number).name} after {moment:.1f} s, {doing}", flush=True)
        life = whole(live(killed, args.steps, args.data))
        notes.update({line: life.said.count(line) for line in (HALF, DAMAGED)})
        good = same(calm, killed, args.steps) and good
    print(f"{broken['starting']} while starting, {broken['learning']} while learning")
    print(f"checkpoints half written: {notes[HALF]}, damaged: {notes[DAMAGED]}")
    return 0 if good and not notes[DAMAGED] else 1


if __name__ == "__main__":
    sys.exit(main())
