"""A training run that is killed again and again, against one that is not: python -m bench.kills [--kills 20]

`train.py` trains the puppets' base model for some steps and is killed (SIGKILL) at random moments, then given the same
command again, until it has died as often as asked; then it is let finish. The losses of all steps must be those of a
run that nothing disturbed, bit for bit, and so must the weights. Every fifth time it is stopped by SIGTERM instead,
which must end it with exit code 0.

    python -m emv3_jax.data.prepare --puppets train --clips 448 --frames 33 --preset demo --out data/puppets33
"""

import argparse
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np


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
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--data", default="data/puppets33")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng, at = np.random.default_rng(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        calm, killed = pathlib.Path(folder) / "calm", pathlib.Path(folder) / "killed"
        started = time.monotonic()
        subprocess.run(command(calm, args.steps, args.data), check=True, stdout=subprocess.DEVNULL)
        print(f"undisturbed: {args.steps} steps in {time.monotonic() - started:.0f} s", flush=True)
        while len(at) < args.kills:
            number = signal.SIGTERM if len(at) % 5 == 4 else signal.SIGKILL
            process = subprocess.Popen(command(killed, args.steps, args.data), stdout=subprocess.DEVNULL)
            before = len(losses(killed))
            while process.poll() is None and len(losses(killed)) <= before:  # it has begun to learn
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 3))
            process.send_signal(number)
            code = process.wait()
            at.append(len(losses(killed)))
            print(f"{len(at)}: {signal.Signals(number).name} after step {at[-1]}, exit code {code}", flush=True)
            if code not in ((0,) if number == signal.SIGTERM else (-number, 0)):
                return 1
        subprocess.run(command(killed, args.steps, args.data), check=True, stdout=subprocess.DEVNULL)
        same = losses(calm) == losses(killed)
        weights = [(run / "weights" / "dit.safetensors").read_bytes() for run in (calm, killed)]
        print(f"losses of {len(losses(calm))} steps: {'the same, bit for bit' if same else 'DIFFERENT'}")
        print(f"weights: {'the same, byte by byte' if weights[0] == weights[1] else 'DIFFERENT'}")
    return 0 if same and weights[0] == weights[1] else 1


if __name__ == "__main__":
    sys.exit(main())
