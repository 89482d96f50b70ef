"""Turns the crank: batches in, steps, log lines, checkpoints, and on from where the last run stopped."""

import collections
import contextlib
import pathlib
import shutil
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp

from emv3_jax import sharding
from emv3_jax.errors import UserError
from emv3_jax.files import check_writable
from emv3_jax.training import state as train_state
from emv3_jax.training.run_log import RunLog
from emv3_jax.training.state import TrainState


class Recipe(Protocol):
    """What is trained: everything that a run does not share with every other run."""

    def init(self) -> Any:
        """The parameters at step 0."""

    def loss(self, params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss and metrics of a batch; pure."""

    def batch(self, step: int) -> Any:
        """The batch of a step: a function of the step alone, so that a resumed run sees what it would have seen."""

    def evaluate(self, params: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Scores on held-out data, and pictures [H, W, 3] uint8."""

    def export(self, params: Any, folder: pathlib.Path) -> None:
        """Writes the weights in the form that the package ships."""


def train(recipe: Recipe, cfg: Any, workdir: pathlib.Path) -> int:
    """Trains until cfg.steps, resuming from the newest checkpoint in `workdir`.

    Args:
      recipe: what is trained.
      cfg: optimizer settings (state.make_optimizer) and steps, seed, ema_decay, log_every, eval_every,
        checkpoint_every, mesh (sharding.from_config), micro_batches, minutes (stop after so long, 0: never), bad_steps
        (stop after so many non-finite steps); of values that checks.run has nothing against.
      workdir: checkpoints, metrics.jsonl, TensorBoard events and the exported `weights/`.
    Returns:
      The signal (SIGTERM, SIGINT) that stopped the run before its time, or 0. A stopped run has saved its last step.
      A run that was stopped before its first step leaves everything as it was.
    Raises:
      UserError: when the loss stays non-finite, or `workdir` or the checkpoints in it cannot be used.
    """
    workdir = workdir.resolve()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be used: {error.strerror}; name a folder") from error
    check_writable(workdir / "metrics.jsonl")
    optimizer = train_state.make_optimizer(cfg)
    mesh = sharding.from_config(cfg.mesh)
    state = train_state.init_state(recipe.init(), optimizer)
    shardings = None if mesh is None else train_state.state_shardings(state, mesh)
    state = state if shardings is None else jax.device_put(state, shardings)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(workdir / "checkpoints", options=options, item_handlers=handler) as checkpoints:
        state = _resume(checkpoints, state, workdir)
        step_fn = train_state.make_step(recipe.loss, optimizer, cfg.ema_decay, cfg.seed, cfg.micro_batches, shardings)
        first = int(state.step)
        log = RunLog(workdir, first)
        try:
            with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
                state, stopped = _crank(recipe, cfg, state, step_fn, checkpoints, log, mesh)
        finally:
            log.close()
    if stopped and int(state.step) == first:
        return stopped
    recipe.export(jax.device_get(state.ema), workdir / "weights")
    print(f"weights (moving average) at step {int(state.step)}: {workdir / 'weights'}", flush=True)
    return stopped


def _resume(checkpoints: ocp.CheckpointManager, state: TrainState, workdir: pathlib.Path) -> TrainState:
    """The newest checkpoint that can be read, or `state` if there is none at all; damaged ones are moved aside."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    damaged: dict[int, Exception] = {}
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            differences = _differences(checkpoints.item_metadata(step), state)
            restored = None if differences else checkpoints.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # Orbax passes on whatever its readers raise
            damaged[step] = error
            continue
        if restored is None:
            more = f"; {len(differences) - 3} more" if len(differences) > 3 else ""
            raise UserError(
                f"the checkpoint of step {step} in {workdir} is of another model or optimizer"
                f" ({'; '.join(differences[:3])}{more}): go on with the config that made it, or give another --workdir"
            )
        for bad in damaged:
            aside = workdir / f"damaged_checkpoint_{bad}"
            shutil.rmtree(aside, ignore_errors=True)
            (workdir / "checkpoints" / str(bad)).rename(aside)
            print(f"the checkpoint of step {bad} is damaged and was moved to {aside}", flush=True)
        checkpoints.reload()
        print(f"resumed from step {step} in {workdir}", flush=True)
        return restored
    if damaged:
        newest = damaged[max(damaged)]
        raise UserError(
            f"no checkpoint in {workdir / 'checkpoints'} can be read ({type(newest).__name__}: {str(newest)[:100]}):"
            " delete that folder to start from nothing, or give another --workdir"
        )
    return state


def _differences(saved: Any, state: Any) -> list[str]:
    """What a checkpoint's tree of shapes has that `state` has not, and the other way round; the parameters first."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}

    there, here = shapes(saved), shapes(state)
    names = sorted(there.keys() | here.keys(), key=lambda name: (not name.startswith("params/"), name))
    what = lambda shape: "missing" if shape is None else str(shape)  # noqa: E731
    return [
        f"{name} is {what(there.get(name))} there and {what(here.get(name))} here"
        for name in names
        if there.get(name) != here.get(name)
    ]


def _crank(recipe, cfg, state, step_fn, checkpoints, log, mesh) -> tuple[TrainState, int]:
    """The loop of `train`: the last state, in a checkpoint if a step was taken, and the signal that ended it, or 0."""
    first, started = int(state.step), time.monotonic()
    step = first  # the last one that was taken; state.step would have to be waited for
    report, watch = _Report(cfg.steps, log), _Watch(cfg.bad_steps)
    with _Signals() as signals:
        while True:
            out_of_time = cfg.minutes and time.monotonic() - started > 60 * cfg.minutes
            done = step >= cfg.steps or signals.received or out_of_time
            if step > first and (done or step % cfg.checkpoint_every == 0):
                watch.look()  # saving waits for the steps anyway
                if checkpoints.latest_step() != step:
                    checkpoints.save(step, args=ocp.args.StandardSave(state))
            if done:
                break
            batch = signals.break_off(recipe.batch, step + 1)
            if signals.received:
                continue
            state, metrics = step_fn(state, train_state.place_batch(batch, mesh))
            step += 1
            watch.add(step, metrics["finite"])
            if step % cfg.log_every == 0 or step == first + 1:
                report.add(step, metrics)
            if step % cfg.eval_every == 0 and (seen := signals.break_off(recipe.evaluate, jax.device_get(state.ema))):
                scores, pictures = seen
                log.scalars(step, scores)
                for name, picture in pictures.items():
                    log.image(step, name, picture)
                print(f"step {step}  held-out: " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()), flush=True)
    checkpoints.wait_until_finished()
    report.flush()
    stopped = signals.received[0] if signals.received and step < cfg.steps else 0
    if stopped:
        print(f"stopped by {signal.Signals(stopped).name}; the same command goes on from here", flush=True)
    return state, stopped


class _Stopped(KeyboardInterrupt):
    """A signal came in the middle of work that can be broken off."""


class _Signals:
    """SIGTERM and Ctrl-C inside `with`: noted in `received`, to be acted upon between steps; the next one does what it
    always did. Work under `break_off`, which may take minutes, ends at once."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._before: dict[int, Any] = {}
        self._may_break = False

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():  # no other may say what signals do
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and the background of a script have it
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.received.append(number)
        signal.signal(number, self._before[number])
        if self._may_break:
            self._may_break = False
            raise _Stopped

    def break_off(self, work: Callable[..., Any], *args: Any) -> Any:
        """work(*args), which changes nothing that a run goes on from; None if a signal came before it was done."""
        try:
            self._may_break = True
            try:
                return None if self.received else work(*args)
            finally:
                self._may_break = False
        except _Stopped:
            return None


class _Watch:
    """Notices every step whose loss was not finite, two steps late, so that the machine never waits for the loop."""

    def __init__(self, limit: int):
        self.limit, self.in_a_row = limit, 0
        self.unread: collections.deque[tuple[int, jax.Array]] = collections.deque()

    def add(self, step: int, finite: jax.Array) -> None:
        """Takes note of a step, and looks at the one before the last."""
        self.unread.append((step, finite))
        self.look(leave=2)

    def look(self, leave: int = 0) -> None:
        """Raises UserError if `limit` steps in a row were not finite. leave: that many of the newest unread."""
        while len(self.unread) > leave:
            step, finite = self.unread.popleft()
            self.in_a_row = 0 if finite else self.in_a_row + 1
            if self.in_a_row >= self.limit:
                raise UserError(
                    f"the loss or its gradient was not finite {self.in_a_row} times in a row, up to step {step}; the"
                    " weights were left as they were before: lower the learning rate, or look at the data of that step"
                )


class _Report:
    """Says how the run goes. A line is told when the next one is due, so that nothing waits for its numbers."""

    def __init__(self, steps: int, log: RunLog):
        self.steps, self.log = steps, log
        self.told: tuple[int, float] | None = None  # the last step that was noted, and when
        self.pending: tuple[int, float, dict[str, jax.Array]] | None = None

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Notes a step's metrics, and tells the one noted before."""
        self.flush()
        now = time.monotonic()
        rate = (step - self.told[0]) / max(now - self.told[1], 1e-9) if self.told else 0.0
        self.told, self.pending = (step, now), (step, rate, metrics)

    def flush(self) -> None:
        """Tells what was noted and not told."""
        if self.pending is None:
            return
        (step, rate, metrics), self.pending = self.pending, None
        values = {name: float(value) for name, value in metrics.items()}
        self.log.scalars(step, {**values, "steps_per_second": rate} if rate else values)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if name != "finite")
        speed = f"{rate:.2f} steps/s  {(self.steps - step) / rate / 60:.0f} min left  " if rate else ""
        print(f"step {step}/{self.steps}  {speed}{shown}", flush=True)
