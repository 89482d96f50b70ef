"""Two processes train together what one trains alone, and go on from one another's checkpoints."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp

PROGRAM = '''
import pathlib
import sys
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from emv3_jax import checkpoint
from emv3_jax.training import loop

port, process, processes, steps, workdir = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4 // int(processes))
if int(processes) > 1:
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(process))


class Line:
    """A linear map, learnt from batches of which every process reads its rows alone."""

    def init(self):
        return {"mlp": {"up": {"kernel": jnp.zeros((8, 16))}}}

    def open(self):
        pass

    def restarts(self):
        return (3,)

    def constants(self):
        return {"fixed": {"kernel": np.ones((8, 16), np.float32)}}

    def batch_size(self, step):
        return 8

    def ids(self, step):
        return []

    def work(self, batch):
        return 0, 0.0

    def batch(self, step, rows=None):
        x = np.random.default_rng(step).normal(size=(8, 8)).astype(np.float32)
        if int(processes) > 1:
            assert len(rows) == 4, rows
        return x if rows is None else x[rows]

    def loss(self, params, constants, batch, key):
        noise = 0.1 * jax.random.normal(key, (8, 16))
        error = batch @ (params["mlp"]["up"]["kernel"] - constants["fixed"]["kernel"]) + noise
        return jnp.mean(jnp.square(error)), {}

    def evaluate(self, params, constants):
        return {"sum": float(np.sum(params["mlp"]["up"]["kernel"]))}, {}

    def export(self, params, constants, folder):
        checkpoint.save_models(folder, {"line": params})


cfg = ml_collections.ConfigDict({
    "steps": int(steps), "seed": 0, "learning_rates": ((12, 0.2),), "warmup_steps": 2, "final_lr_share": 1.0,
    "weight_decay": 0.0, "clip_norm": 1.0, "beta2": 0.99, "ema_decay": 0.9, "minutes": 0.0, "bad_steps": 3,
    "mesh": {"data": 1}, "micro_batches": 1, "batches_ahead": 0, "log_every": 1, "eval_every": 4,
    "checkpoint_every": 5,
})
assert loop.train(Line(), cfg, pathlib.Path(workdir)) == 0
'''


def train(workdir: pathlib.Path, processes: int, steps: int) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(process), str(processes), str(steps), str(workdir)],
            env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in range(processes)
    ]  # fmt: skip
    for process in running:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out


def losses(workdir: pathlib.Path) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_two_processes_train_what_one_trains_and_either_goes_on_from_the_other(tmp_path):
    train(tmp_path / "one", 1, 12)
    train(tmp_path / "two", 2, 12)
    train(tmp_path / "changed", 2, 6)
    train(tmp_path / "changed", 1, 12)  # one process has the four devices that two had
    wanted = losses(tmp_path / "one")
    assert len(wanted) == 12 and wanted[-1] < 0.5 * wanted[0]
    np.testing.assert_allclose(losses(tmp_path / "two"), wanted, rtol=1e-5)
    np.testing.assert_allclose(losses(tmp_path / "changed")[:6], wanted[:6], rtol=1e-5)
    with ocp.CheckpointManager(tmp_path / "changed" / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 12
