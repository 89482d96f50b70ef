"""The loop, turned by a recipe whose answer is known: it learns, stops, goes on bit for bit, and reports trouble."""

import json
import os
import signal
import struct
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from quadratic import Quadratic, assert_same_run, config, die_at, last_state, lines, stop_at
from tensorboardX.proto import event_pb2

from emv3_jax import checkpoint
from emv3_jax.errors import UserError
from emv3_jax.files import atomic_path
from emv3_jax.training import loop, losses


@pytest.fixture(autouse=True)
def listening_to_ctrl_c():
    """Started in the background of a shell, a process ignores SIGINT; these tests send it to themselves."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


@pytest.mark.parametrize(
    ("when", "number"),
    [("batch", signal.SIGTERM), ("batch", signal.SIGINT), ("step", signal.SIGTERM), ("evaluate", signal.SIGINT)],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path, whole, capsys, monkeypatch, when, number):
    """A batch is broken off and taken again, a step is finished, scores are broken off."""
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    recipe, last = Quadratic(), {"batch": 6, "step": 7, "evaluate": 6}[when]
    if when == "batch":
        recipe.before_batch = stop_at(7, number)
    elif when == "evaluate":
        recipe.evaluate = lambda params, constants: os.kill(os.getpid(), number) or pytest.fail("it was not broken off")
    else:
        make = loop.train_state.make_step
        monkeypatch.setattr(loop.train_state, "make_step", lambda *args: stopping(make(*args), 7, number))
    assert loop.train(recipe, config(), tmp_path) == number
    monkeypatch.undo()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert last_state(tmp_path)[0] == last
    assert capsys.readouterr().out.count(f"stopped by {signal.Signals(number).name}") == 1
    assert loop.train(Quadratic(), config(), tmp_path) == 0
    assert f"resumed from step {last}" in capsys.readouterr().out
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("when", ["step", "evaluate"])
def test_a_signal_at_the_very_end_is_passed_on_and_the_run_is_whole(tmp_path, whole, capsys, monkeypatch, when):
    """There may be more to do after this run: the next stage of a cycle."""
    recipe, evaluate, count = Quadratic(), Quadratic().evaluate, iter(range(1, 100))
    if when == "evaluate":
        recipe.evaluate = lambda *given: evaluate(*given) if next(count) < 2 else os.kill(os.getpid(), signal.SIGTERM)
    else:
        make = loop.train_state.make_step
        monkeypatch.setattr(loop.train_state, "make_step", lambda *args: stopping(make(*args), 12, signal.SIGTERM))
    assert loop.train(recipe, config(), tmp_path) == signal.SIGTERM
    out = capsys.readouterr().out
    assert "stopped by" not in out and "SIGTERM came after the last step" in out
    assert "note: step 12 was not evaluated, for a signal came" in out
    assert_same_run(tmp_path, whole)


def test_a_run_goes_on_without_a_second_state_in_memory(tmp_path, monkeypatch):
    loop.train(Quadratic(), config(steps=6), tmp_path)
    seen, resume = [], loop.checkpoints.Checkpoints.resume
    noting = lambda self, state: seen.extend(jax.tree.leaves(state)) or resume(self, state)  # noqa: E731
    monkeypatch.setattr(loop.checkpoints.Checkpoints, "resume", noting)
    assert loop.train(Quadratic(), config(), tmp_path) == 0
    assert seen and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in seen)


def test_a_run_that_goes_on_with_other_settings_says_so(tmp_path, capsys):
    loop.train(Quadratic(), config(steps=6), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 6
    loop.train(Quadratic(), config(steps=6, minutes=5.0), tmp_path)
    assert "other settings" not in capsys.readouterr().out
    loop.train(Quadratic(), config(steps=8, seed=3, learning_rates=((6, 0.1), (12, 0.1)), warmup_steps=0), tmp_path)
    (line,) = (row for row in capsys.readouterr().out.splitlines() if "other settings than before: " in row)
    told = {"steps 6", "seed 0", "learning_rates [12, 0.2]", "warmup_steps 2"}
    assert {words.partition(" there and ")[0] for words in line.partition("before: ")[2].split("; ")} == told
    assert "seed 0 there and 3 now" in line and "learning_rates [12, 0.2] there and [6, 0.1] now" in line
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 3
    (tmp_path / "config.json").write_text("[]")
    loop.train(Quadratic(), config(steps=9), tmp_path)
    assert "other settings" not in capsys.readouterr().out


def test_a_run_that_took_no_step_leaves_the_config_of_the_last_one(tmp_path):
    loop.train(Quadratic(), config(steps=6), tmp_path)
    stop = Quadratic(before_batch=lambda step: os.kill(os.getpid(), signal.SIGINT))
    assert loop.train(stop, config(steps=8, seed=3), tmp_path) == signal.SIGINT
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0


def test_speeds_are_without_what_is_done_between_steps(tmp_path, monkeypatch):
    """An evaluation of 1000 s lies between the lines of steps 4 and 8."""
    recipe, spent = Quadratic(), []
    clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 1000 * len(spent))
    monkeypatch.setattr(loop, "time", clock)
    recipe.evaluate = lambda params, constants: spent.append(1) or ({}, {})
    loop.train(recipe, config(), tmp_path)
    (rate,) = (row["steps_per_second"] for row in lines(tmp_path) if row["step"] == 8 and "loss" in row)
    assert len(spent) == 2 and rate > 4 / 500


def stopping(step_fn, at: int, number: int):
    """A step function that sends a signal while step `at` is taken."""
    numbers = iter(range(1, 100))

    def step(state, constants, batch):
        if next(numbers) == at:
            os.kill(os.getpid(), number)
        return step_fn(state, constants, batch)

    return step


def test_making_the_data_is_broken_off_at_once_and_what_is_whole_stays(tmp_path, whole, capsys):
    """The first batch may have to make its data for minutes. Nothing was learnt, so nothing is saved."""
    shards = tmp_path / "data"

    def extract(step):
        for i in range(20):
            if not (path := shards / f"{i}.bin").exists():
                with atomic_path(path) as temporary:
                    temporary.write_bytes(bytes(i))
                    if i == 3 and not interrupted:
                        interrupted.append(time.monotonic())
                        os.kill(os.getpid(), signal.SIGINT)
                        time.sleep(60)
                    temporary.write_bytes(bytes(100))

    interrupted: list[float] = []
    run = tmp_path / "run"
    assert loop.train(Quadratic(before_batch=extract), config(), run) == signal.SIGINT
    assert time.monotonic() - interrupted[0] < 30  # a second; a busy machine takes longer
    assert capsys.readouterr().out == "stopped by SIGINT; the same command goes on from here\n"
    assert sorted(path.name for path in shards.iterdir()) == ["0.bin", "1.bin", "2.bin"]
    assert not (run / "weights").exists() and not list((run / "checkpoints").iterdir())
    made = [(shards / f"{i}.bin").stat().st_mtime_ns for i in range(3)]
    assert loop.train(Quadratic(before_batch=extract), config(), run) == 0
    assert [(shards / f"{i}.bin").stat().st_mtime_ns for i in range(3)] == made
    assert_same_run(run, whole)


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert loop.train(Quadratic(before_batch=stop_at(7, signal.SIGINT)), config(), tmp_path) == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert last_state(tmp_path)[0] == 12


def test_the_second_signal_is_not_held_back(tmp_path):
    def impatient(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    recipe = Quadratic(before_batch=impatient)
    recipe.export = lambda params, constants, folder: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        loop.train(recipe, config(), tmp_path)
    assert last_state(tmp_path)[0] == 3


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
    assert [row["step"] for row in lines(tmp_path) if "loss" in row] == [1, 4, 6, 8, 12]  # none is lost; 6: the first


def test_lines_are_told_before_the_checkpoint_that_follows_them(tmp_path, monkeypatch):
    """So a run that is killed after it, and goes on from there, has them."""
    told = {}
    save = ocp.CheckpointManager.save

    def look(self, step, **keywords):
        told[step] = [row["step"] for row in lines(tmp_path) if "loss" in row]
        return save(self, step, **keywords)

    monkeypatch.setattr(ocp.CheckpointManager, "save", look)
    with pytest.raises(UserError, match="not finite 3 times"):
        loop.train(Quadratic(bad=(12, 13, 14)), config(steps=20, learning_rates=((20, 0.2),)), tmp_path)
    assert told == {5: [1, 4], 10: [1, 4, 8]}
    assert [row["step"] for row in lines(tmp_path) if "loss" in row] == [1, 4, 8, 12]


def test_a_step_is_saved_before_it_is_evaluated_and_want_of_memory_is_survived(tmp_path, whole, capsys):
    saved = []

    def evaluate(params, constants):
        saved.append(last_state(tmp_path)[0])
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 2147483648 bytes.")

    recipe = Quadratic()
    recipe.evaluate = evaluate
    assert loop.train(recipe, config(checkpoint_every=6), tmp_path) == 0
    assert saved == [6, 12]
    assert "note: step 6 was not evaluated, for want of memory: RESOURCE_EXHAUSTED" in capsys.readouterr().out
    assert_same_run(tmp_path, whole)
    recipe.evaluate = lambda params, constants: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL: a bug"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        loop.train(recipe, config(), tmp_path / "other")


def test_want_of_memory_in_a_step_is_one_line_that_says_what_saves_it(tmp_path, monkeypatch):
    def fail(*args):
        raise jax.errors.JaxRuntimeError(f"{sign}: Out of memory allocating 2147483648 bytes.\nand so on")

    sign = "RESOURCE_EXHAUSTED"
    monkeypatch.setattr(loop.train_state, "make_step", lambda *args: fail)
    with pytest.raises(UserError, match=r"too little memory .*micro_batches.*model\.remat.*mesh.*2147483648 bytes\.$"):
        loop.train(Quadratic(), config(), tmp_path)
    sign = "INTERNAL"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        loop.train(Quadratic(), config(), tmp_path)


def test_want_of_memory_before_the_first_step_is_one_line_too(tmp_path, monkeypatch):
    def fail(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 2147483648 bytes.\nand so on")

    monkeypatch.setattr(loop.train_state, "init_state", fail)
    with pytest.raises(UserError, match=r"too little memory for the weights .*key mesh\).*2147483648 bytes\.$"):
        loop.train(Quadratic(), config(), tmp_path)


def test_a_run_that_goes_on_has_the_program_that_the_first_one_compiled(tmp_path, monkeypatch):
    """JAX compiles anew for arrays that are tied to a device, as those of a checkpoint are."""
    seen, make = [], loop.train_state.make_step

    def noting(*args):
        step_fn = make(*args)
        return lambda state, *more: (
            seen.append({leaf.committed for leaf in jax.tree.leaves(state)}) or step_fn(state, *more)
        )

    monkeypatch.setattr(loop.train_state, "make_step", noting)
    for last in (1, 2):
        loop.train(Quadratic(before_batch=stop_at(last + 1)), config(eval_every=100), tmp_path)
    assert seen == [{True}, {True}]


def test_a_loss_of_exactly_nothing_is_told(tmp_path, capsys):
    loop.train(Averaged(), config(steps=9, weight_decay=0.0), tmp_path)
    note = "note: the loss was exactly 0 3 times in a row, up to step 3, and taught nothing: a preference has nothing"
    assert capsys.readouterr().out.count(note) == 1


def test_steps_that_are_taken_again_are_logged_once(tmp_path, whole):
    """Steps 8 to 10 are in the log of the run that died, with another loss; the last line was never finished."""

    def die(step):
        if step == 11:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        loop.train(Quadratic(before_batch=die), config(log_every=1, checkpoint_every=7), tmp_path)
    before = lines(tmp_path)
    assert [row["step"] for row in before if "loss" in row] == list(range(1, 11))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "seconds": 0.1, "lo')
    loop.train(Quadratic(), config(log_every=1, checkpoint_every=7), tmp_path)
    after = lines(tmp_path)
    assert [row["step"] for row in after if "loss" in row] == list(range(1, 13))
    assert [row["step"] for row in after if "distance" in row] == [6, 12]
    assert after[:8] == before[:8]
    distances = [[row["distance"] for row in rows if "distance" in row] for rows in (after, lines(whole))]
    assert distances[0] == distances[1]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["config.json", "metrics.jsonl"]
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [1, 8]  # TensorBoard shows no points from there on but those that follow


def events(workdir) -> list:
    """TensorBoard's events, file by file; each is a record of its length, a checksum, itself, a checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def test_a_finished_run_has_nothing_to_do(tmp_path, whole):
    never = Quadratic(before_batch=lambda step: pytest.fail("a step was taken"))
    loop.train(Quadratic(), config(), tmp_path)
    assert loop.train(never, config(), tmp_path) == 0
    assert_same_run(tmp_path, whole)


def test_bad_steps_in_a_row_end_the_run_whatever_is_logged(tmp_path, capsys):
    recipe = Quadratic(bad=(3, 4, 7, 8, 9, 10))
    with pytest.raises(UserError, match="not finite 3 times in a row, up to step 9; .* lower the learning rate"):
        loop.train(recipe, config(steps=40, log_every=50), tmp_path)
    step, state = last_state(tmp_path)
    assert step == 5 and np.isfinite(state["params"]["w"]).all()
    out = capsys.readouterr().out
    assert "step 3 was not finite and changed nothing; its batch: clip 3a, clip 3b" in out and "step 5 was" not in out
    assert not (tmp_path / "weights").exists()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").open()]
    named = {row["step"]: row["not_finite"] for row in rows if "not_finite" in row}
    assert list(named) == [3, 4, 7, 8, 9] and named[3] == ["clip 3a", "clip 3b"]


def test_bad_steps_at_the_very_end_are_noticed_too(tmp_path):
    with pytest.raises(UserError, match="up to step 12"):
        loop.train(Quadratic(bad=(10, 11, 12)), config(log_every=50), tmp_path)


def test_single_bad_steps_are_survived(tmp_path):
    loop.train(Quadratic(bad=(2, 3, 5, 6, 8)), config(), tmp_path)
    step, state = last_state(tmp_path)
    assert step == 12 and np.abs(state["params"]["w"] - 1).max() < 0.5
    rows = [row for row in lines(tmp_path) if "finite" in row]
    assert [row["finite"] for row in rows] == [1, 1, 0, 1]
    assert [row["loss"] is None for row in rows] == [False, False, True, False]  # JSON has no NaN
    rate = loop.train_state.make_schedule(config())
    assert [row["learning_rate"] for row in rows] == [float(rate(updates)) for updates in (0, 1, 3, 6)]


def test_batches_made_ahead_are_the_same_and_so_is_the_run(tmp_path, whole):
    loop.train(Quadratic(), config(batches_ahead=3), tmp_path)
    assert_same_run(tmp_path, whole)
    died = tmp_path / "died"
    with pytest.raises(RuntimeError, match="lights"):
        loop.train(Quadratic(before_batch=die_at(9)), config(batches_ahead=3), died)
    loop.train(Quadratic(), config(batches_ahead=3), died)
    assert_same_run(died, whole)


class Averaged(Quadratic):
    """Its metrics are means of one sample each, 1 for the first step, 2 for the second, ...; some have none."""

    def batch(self, step, rows=None):
        return np.full((2, self.width), float(step))

    def loss(self, params, constants, batch, key):
        seen, zero = losses.Mean(batch[0, 0], jnp.ones(())), losses.Mean(jnp.zeros(()), jnp.zeros(()))
        return jnp.mean(jnp.square(params["w"])), {"seen": seen, "never": zero}


def test_means_are_of_all_steps_since_the_last_line(tmp_path):
    loop.train(Averaged(), config(), tmp_path)
    seen = {row["step"]: row for row in lines(tmp_path) if "loss" in row}
    assert {step: row["seen"] for step, row in seen.items()} == {1: 1.0, 4: 3.0, 8: 6.5, 12: 10.5}
    assert not any("never" in row for row in seen.values())
    assert seen[8]["tokens_per_second"] == pytest.approx(10 * seen[8]["steps_per_second"])


def test_the_last_steps_are_told_too(tmp_path):
    loop.train(Quadratic(), config(log_every=8), tmp_path)
    assert [row["step"] for row in lines(tmp_path) if "loss" in row] == [1, 8, 12]


def test_a_line_is_told_as_soon_as_its_numbers_are_known(tmp_path):
    """Steps may take minutes each, so that the next line is an hour away."""
    seen = []
    loop.train(Quadratic(before_batch=lambda step: seen.append(len(lines(tmp_path)))), config(log_every=50), tmp_path)
    assert seen[0] == 0 and seen[3] == 1


def test_films_are_kept_and_shown(whole):
    assert [path.name for path in sorted((whole / "samples").iterdir())] == ["film_0000006.mp4", "film_0000012.mp4"]
    images = [v.image for e in events(whole) for v in e.summary.value if v.tag == "film"]
    assert [image.encoded_image_string[:6] for image in images] == [b"GIF89a"] * 2


def test_a_task_that_joins_starts_from_the_moving_average(tmp_path):
    """At a rate of 0 after the join the weights stay where they were put."""
    cfg, joined = config(steps=5, learning_rates=((5, 0.2),), final_lr_share=0.0), Quadratic()
    joined.restarts = lambda: (4,)
    loop.train(Quadratic(), cfg, tmp_path / "not")
    loop.train(joined, cfg, tmp_path / "joined")
    (_, joined), (_, plain) = last_state(tmp_path / "joined"), last_state(tmp_path / "not")
    assert np.abs(joined["params"]["w"] - plain["params"]["w"]).max() > 1e-3
    assert np.abs(joined["params"]["w"]).max() < np.abs(plain["params"]["w"]).max()  # the average lags behind


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="--workdir .*/run cannot be used"):
        loop.train(Quadratic(), config(), tmp_path / "run")
