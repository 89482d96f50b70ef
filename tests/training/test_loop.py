"""The loop, turned by a recipe whose answer is known: it learns, stops, goes on bit for bit, and reports trouble."""

import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import pytest

from emv3_jax import checkpoint
from emv3_jax.errors import UserError
from emv3_jax.training import loop


class Quadratic:
    """|w - target|^2, with a target that every batch and every random key shifts a little."""

    def __init__(self, width: int = 3, bad: tuple = (), before_batch=lambda step: None):
        self.width, self.bad, self.before_batch = width, bad, before_batch

    def init(self):
        return {"w": jnp.zeros((2, self.width))}

    def batch(self, step):
        self.before_batch(step)
        noise = np.random.default_rng(step).normal(size=(2, self.width))
        return np.full_like(noise, np.nan) if step in self.bad else 1.0 + 0.1 * noise

    def loss(self, params, batch, key):
        target = batch + 0.1 * jax.random.normal(key, batch.shape)
        return jnp.mean(jnp.square(params["w"] - target)), {"mean": jnp.mean(params["w"])}

    def evaluate(self, params):
        return {"distance": float(jnp.max(jnp.abs(params["w"] - 1)))}, {"grey": np.zeros((8, 8, 3), np.uint8)}

    def export(self, params, folder):
        checkpoint.save_models(folder, {"quadratic": params})


def config(**changes) -> ml_collections.ConfigDict:
    values = {
        "steps": 12, "seed": 0, "learning_rates": ((12, 0.2),), "warmup_steps": 2, "final_lr_share": 0.1,
        "weight_decay": 0.0, "clip_norm": 1.0, "beta2": 0.99, "ema_decay": 0.9, "minutes": 0.0, "bad_steps": 3,
        "log_every": 4, "eval_every": 6, "checkpoint_every": 5,
    }  # fmt: skip
    return ml_collections.ConfigDict({**values, **changes})


def stop_at(step: int, number: int = signal.SIGTERM):
    return lambda now: os.kill(os.getpid(), number) if now == step else None


def last_state(workdir) -> tuple[int, dict]:
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(workdir / "checkpoints", item_handlers=handler) as checkpoints:
        step = checkpoints.latest_step()
        return step, checkpoints.restore(step, args=ocp.args.StandardRestore())


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    assert loop.train(Quadratic(), config(), workdir) == 0
    return workdir


def assert_same_run(workdir, whole):
    (step, state), (wanted_step, wanted) = last_state(workdir), last_state(whole)
    assert step == wanted_step
    jax.tree.map(np.testing.assert_array_equal, state, wanted)
    weights = [checkpoint.load_params(folder / "weights/quadratic.safetensors") for folder in (workdir, whole)]
    jax.tree.map(np.testing.assert_array_equal, *weights)


def test_it_learns_and_writes_what_it_saw(whole):
    rows = lines(whole)
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert list(losses) == [1, 4, 8, 12]  # the first step, every fourth, and the last is not forgotten
    assert losses[12] < 0.1 * losses[1]
    assert [row["step"] for row in rows if "distance" in row] == [6, 12]
    assert all(row["steps_per_second"] > 0 for row in rows if row["step"] in (4, 8))
    assert list((whole / "tensorboard").iterdir())


def test_the_exported_weights_are_the_moving_average(whole):
    _, state = last_state(whole)
    exported = checkpoint.load_params(whole / "weights/quadratic.safetensors")
    np.testing.assert_array_equal(exported["w"], state["ema"]["w"])
    assert np.abs(state["ema"]["w"] - state["params"]["w"]).max() > 1e-3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path, whole, capsys, number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert loop.train(Quadratic(before_batch=stop_at(7, number)), config(), tmp_path) == number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert last_state(tmp_path)[0] == 7
    assert f"stopped by {signal.Signals(number).name}" in capsys.readouterr().out
    assert loop.train(Quadratic(), config(), tmp_path) == 0
    assert "resumed from step 7" in capsys.readouterr().out
    assert_same_run(tmp_path, whole)


def test_time_runs_out_again_and_again(tmp_path, whole):
    slow = Quadratic(before_batch=lambda step: time.sleep(0.1))
    ends = []
    while not ends or ends[-1] < 12:
        assert loop.train(slow, config(minutes=0.5 / 60), tmp_path) == 0
        ends.append(last_state(tmp_path)[0])
        assert len(ends) <= 12
    assert len(ends) > 1
    assert_same_run(tmp_path, whole)


def test_a_run_that_died_goes_on_from_its_newest_checkpoint(tmp_path, whole):
    def die(step):
        if step == 9:
            raise RuntimeError("the lights went out")

    with pytest.raises(RuntimeError, match="lights"):
        loop.train(Quadratic(before_batch=die), config(), tmp_path)
    assert last_state(tmp_path)[0] == 5
    loop.train(Quadratic(), config(), tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_finished_run_has_nothing_to_do(tmp_path, whole):
    never = Quadratic(before_batch=lambda step: pytest.fail("a step was taken"))
    loop.train(Quadratic(), config(), tmp_path)
    assert loop.train(never, config(), tmp_path) == 0
    assert_same_run(tmp_path, whole)


def test_bad_steps_in_a_row_end_the_run_whatever_is_logged(tmp_path):
    recipe = Quadratic(bad=(3, 4, 7, 8, 9, 10))
    with pytest.raises(UserError, match="not finite 3 times in a row, up to step 9; .* lower the learning rate"):
        loop.train(recipe, config(steps=40, log_every=50), tmp_path)
    step, state = last_state(tmp_path)
    assert step == 5 and np.isfinite(state["params"]["w"]).all()
    assert not (tmp_path / "weights").exists()


def test_bad_steps_at_the_very_end_are_noticed_too(tmp_path):
    with pytest.raises(UserError, match="up to step 12"):
        loop.train(Quadratic(bad=(10, 11, 12)), config(log_every=50), tmp_path)


def test_single_bad_steps_are_survived(tmp_path):
    loop.train(Quadratic(bad=(2, 3, 5, 6, 8)), config(), tmp_path)
    step, state = last_state(tmp_path)
    assert step == 12 and np.abs(state["params"]["w"] - 1).max() < 0.5
    assert [row["finite"] for row in lines(tmp_path) if "finite" in row] == [1, 1, 0, 1]


def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_is_used(tmp_path, whole, capsys):
    loop.train(Quadratic(before_batch=stop_at(7)), config(), tmp_path)
    newest = tmp_path / "checkpoints" / "7"
    for path in newest.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    capsys.readouterr()
    loop.train(Quadratic(before_batch=stop_at(7)), config(), tmp_path)  # whose place the new step 7 can take
    out = capsys.readouterr().out
    assert "checkpoint of step 7 is damaged and was moved to" in out and "resumed from step 5" in out
    assert (tmp_path / "damaged_checkpoint_7").is_dir() and last_state(tmp_path)[0] == 7
    loop.train(Quadratic(), config(), tmp_path)
    assert_same_run(tmp_path, whole)


def test_only_damaged_checkpoints_are_an_error_that_names_them(tmp_path):
    loop.train(Quadratic(), config(steps=3), tmp_path)
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(UserError, match=f"no checkpoint in {tmp_path}/checkpoints can be read .* delete that folder"):
        loop.train(Quadratic(), config(), tmp_path)


@pytest.mark.parametrize(("recipe", "changes"), [(Quadratic(width=4), {}), (Quadratic(), {"frozen": ("w",)})])
def test_a_checkpoint_of_another_model_or_optimizer_is_refused(tmp_path, recipe, changes):
    loop.train(Quadratic(), config(steps=3), tmp_path)
    with pytest.raises(UserError, match="checkpoint of step 3 .* is of another model or optimizer"):
        loop.train(recipe, config(**changes), tmp_path)
    assert last_state(tmp_path)[0] == 3


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="--workdir .*/run cannot be used"):
        loop.train(Quadratic(), config(), tmp_path / "run")
