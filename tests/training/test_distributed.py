"""Two processes train together what one trains alone, and go on from one another's checkpoints."""

import argparse
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import orbax.checkpoint as ocp
import pytest

import train as train_program
from emv3_jax.errors import UserError
from emv3_jax.training import distributed

ENV = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
PROGRAM = '''
import argparse
import os
import pathlib
import signal
import sys
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import train
from emv3_jax import checkpoint
from emv3_jax.training import loop

port, process, processes, stop, workdir = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4 // int(processes))
if int(processes) > 1:
    given = {"coordinator": f"localhost:{port}", "processes": int(processes), "process": int(process)}
    train.join_others(argparse.Namespace(**given, distributed=False))


class Line:
    """A linear map, learnt from batches of which every process reads its rows alone."""

    def init(self):
        return {"mlp": {"up": {"kernel": jnp.zeros((8, 512))}}}

    def open(self):
        pass

    def restarts(self):
        return (3,)

    def constants(self):
        return {"fixed": {"kernel": np.ones((8, 512), np.float32)}}

    def batch_size(self, step):
        return 8

    def ids(self, step):
        return []

    def work(self, batch):
        return len(batch), 0.0

    def batch(self, step, rows=None):
        if step == int(stop) and int(process) == int(processes) - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        x = np.random.default_rng(step).normal(size=(8, 8)).astype(np.float32)
        if int(processes) > 1:
            assert len(rows) == 4, rows
        return x if rows is None else x[rows]

    def loss(self, params, constants, batch, key):
        noise = 0.1 * jax.random.normal(key, (8, 512))
        error = batch @ (params["mlp"]["up"]["kernel"] - constants["fixed"]["kernel"]) + noise
        return jnp.mean(jnp.square(error)), {}

    def evaluate(self, params, constants):
        kernel = params["mlp"]["up"]["kernel"]
        assert kernel.devices() == set(jax.local_devices()) and kernel.sharding.spec[-2] is not None
        assert constants["fixed"]["kernel"].devices() == kernel.devices()
        return {"sum": float(jax.jit(jnp.sum)(kernel))}, {}

    def export(self, params, constants, folder):
        checkpoint.save_models(folder, {"line": params})


cfg = ml_collections.ConfigDict({
    "steps": 12, "seed": 0, "learning_rates": ((12, 0.2),), "warmup_steps": 2, "final_lr_share": 1.0,
    "weight_decay": 0.0, "clip_norm": 1.0, "beta1": 0.9, "beta2": 0.99, "ema_decay": 0.9,
    "minutes": 0.0, "bad_steps": 3, "mesh": {"data": 1}, "micro_batches": 1, "batches_ahead": 0, "log_every": 1,
    "eval_every": 4, "checkpoint_every": 5,
})
assert loop.train(Line(), cfg, pathlib.Path(workdir)) == (signal.SIGTERM if int(stop) else 0)
'''


def train(workdir: pathlib.Path, processes: int, stop: int = 0) -> str:
    """What the first process says; stop: the step whose batch the last process is making when a signal stops it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(process), str(processes), str(stop), str(workdir)],
            env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in range(processes)
    ]  # fmt: skip
    said = []
    try:
        for process in running:
            said.append(process.communicate(timeout=240)[0])
            assert process.returncode == 0, said[-1]
    finally:
        for process in running:
            process.kill()  # the other one would wait for this one for minutes
    return said[0]


TOGETHER = """
import argparse
import sys
import time
import train
from emv3_jax.errors import UserError
from emv3_jax.training import distributed

port, process = sys.argv[1], int(sys.argv[2])
train.join_others(
    argparse.Namespace(coordinator=f"localhost:{port}", processes=2, process=process, distributed=False)
)
assert not distributed.jax.config.jax_enable_compilation_cache  # XLA mixes up collectives of what is in it
print(distributed.of_first([7 + process]))
with distributed.together():
    time.sleep(0.5 * process)
try:
    with distributed.together():
        if process == 1:
            raise UserError("the lights went out")
except UserError as error:
    print(error, flush=True)
"""


def test_where_one_process_fails_all_do():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, "-c", TOGETHER, port]
    running = [subprocess.Popen([*words, number], env=ENV, stdout=subprocess.PIPE, text=True) for number in "01"]
    try:
        said = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0]
    said = [[line for line in lines.splitlines() if not line.startswith("[Gloo]")] for lines in said]
    assert said == [
        ["[7]", "another process could not do its part: see what it says"],
        ["[7]", "note: process 1 waits for the others, and ends then: the lights went out", "the lights went out"],
    ]


def lines(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: pathlib.Path) -> list[float]:
    return [row["loss"] for row in lines(workdir) if "loss" in row]


def test_two_processes_train_what_one_trains_and_either_goes_on_from_the_other(tmp_path):
    """A signal to one of two ends both after the same step; evaluations are of the first one's devices."""
    train(tmp_path / "one", 1)
    train(tmp_path / "two", 2)
    assert "stopped by SIGTERM" in train(tmp_path / "changed", 2, stop=6)
    with ocp.CheckpointManager(tmp_path / "changed" / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 6
    written = (tmp_path / "changed/checkpoints/6/default/ocdbt.process_1/d").iterdir()
    data = max(written, key=lambda path: path.stat().st_size)  # of the second process
    content = bytearray(data.read_bytes())
    content[len(content) * 9 // 16] ^= 4  # well inside an array: it is as long as the others, and there are some eight
    data.write_bytes(content)
    out = train(tmp_path / "changed", 2, stop=7)
    assert "the checkpoint of step 6 is damaged and was moved" in out and "resumed from step 5" in out
    assert "kernel is not what was saved" in out
    out = train(tmp_path / "changed", 1)  # one process has the four devices that two had
    assert "damaged" not in out and "resumed from step 7" in out
    wanted = losses(tmp_path / "one")
    assert len(wanted) == 12 and wanted[-1] < 0.5 * wanted[0]
    np.testing.assert_allclose(losses(tmp_path / "two"), wanted, rtol=1e-5)
    np.testing.assert_allclose(losses(tmp_path / "changed"), wanted, rtol=1e-5)
    with ocp.CheckpointManager(tmp_path / "changed" / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 12
    sums = [[row["sum"] for row in lines(tmp_path / name) if "sum" in row] for name in ("one", "two", "changed")]
    assert len(sums[0]) == 3
    np.testing.assert_allclose(sums[1:], [sums[0]] * 2, rtol=1e-4)
    for row in lines(tmp_path / "two"):
        if "tokens_per_second" in row:
            np.testing.assert_allclose(row["tokens_per_second"], 8 * row["steps_per_second"], rtol=1e-6)


STARTING = """
import argparse, os, signal, sys
from emv3_jax import command_line
import train
def main(arguments):
    train.join_others(argparse.Namespace(coordinator=sys.argv[1], processes=1, process=0, distributed=False))
    os.kill(os.getpid(), signal.SIGTERM)
    signal.sigtimedwait([], 5)
    return 5
sys.exit(command_line.run_main(main))
"""


def test_a_process_of_several_can_be_stopped_while_it_starts():
    """JAX would take SIGTERM for itself, and do nothing."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    done = subprocess.run([sys.executable, "-c", STARTING, place], env=ENV, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM and "terminated" in done.stderr, done


def test_processes_ask_one_another_every_few_seconds(monkeypatch):
    """At 10 seconds a step after every one, at a tenth after as many as fit, and never after more than a line's."""
    now, asked = [0.0], []

    def gather(here):
        asked.append(step)
        return np.stack([here, [0, 0, 0]])

    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gather)
    stopping = distributed.Stopping(7, at_most=50)
    for seconds, start, end, wanted in (
        (10.0, 7, 12, [7, 8, 9, 10, 11]), (0.0999, 12, 50, [12, 13, 33]), (0.001, 50, 150, [53, 76, 126]),
    ):  # fmt: skip
        asked.clear()
        for step in range(start, end):
            assert not stopping.agreed(step, 0, False)
            now[0] += seconds
        assert asked == wanted
    step = 176
    assert not stopping.agreed(175, signal.SIGTERM, False)
    assert stopping.agreed(176, signal.SIGTERM, False) and stopping.signal == signal.SIGTERM


def test_who_waits_for_the_others_can_be_stopped_and_does_not_wait_for_ever(monkeypatch):
    """What joins them is not interrupted by signals, and ends the program when its own time is over."""
    never = threading.Event()
    monkeypatch.setattr(distributed.jax.config, "update", lambda *args: None)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *args, **keywords: never.wait(60))
    with pytest.raises(KeyboardInterrupt):
        timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        distributed.join("localhost:1", 2, 0)
    monkeypatch.setattr(distributed, "PATIENCE", 0.1)
    with pytest.raises(UserError, match=r"did not find one another within 0\.1 s: start all of them"):
        distributed.join("localhost:1", 2, 0)
    never.set()
    monkeypatch.setattr(distributed, "PATIENCE", 60)

    def fail(*args, **keywords):
        raise ValueError("no cluster\nand so on")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match="did not find one another: no cluster$"):
        distributed.join()
    options = argparse.Namespace(coordinator="notaport", processes=2, process=0, distributed=False)
    with pytest.raises(UserError, match="--coordinator must be HOST:PORT, got 'notaport'"):
        train_program.join_others(options)
