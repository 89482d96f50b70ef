"""Turns the crank: batches in, steps, log lines, checkpoints, and on from where the last run stopped."""

import collections
import contextlib
import dataclasses
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from emv3_jax import sharding
from emv3_jax.data import batches
from emv3_jax.errors import UserError, out_of_memory, short_of_memory
from emv3_jax.files import check_writable
from emv3_jax.training import checkpoints, distributed
from emv3_jax.training import state as train_state
from emv3_jax.training.distributed import say
from emv3_jax.training.losses import Mean
from emv3_jax.training.run_log import RunLog
from emv3_jax.training.state import TrainState


class Recipe(Protocol):
    """What is trained: everything that a run does not share with every other run."""

    def open(self) -> None:
        """Opens what batches are made of, before anything is written; UserError where that cannot be."""

    def restarts(self) -> Sequence[int]:
        """Steps after which the weights go on from their moving average."""

    def init(self) -> Any:
        """The parameters at step 0."""

    def constants(self) -> Any:
        """Parameters that the loss needs and that do not change."""

    def loss(self, params: Any, constants: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Loss and metrics of a batch; pure."""

    def batch_size(self, step: int) -> int:
        """Samples of a step's batch."""

    def batch(self, step: int, rows: np.ndarray | None = None) -> Any:
        """The batch of a step, or some rows of it: a function of the step alone, so that a resumed run sees what it
        would have seen."""

    def ids(self, step: int) -> list[str]:
        """What the samples of a step's batch are called."""

    def work(self, batch: Any) -> tuple[int, float]:
        """Tokens of a batch and FLOPs of a step on it; 0 where they are not known."""

    def evaluate(self, params: Any, constants: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Scores on held-out data, and pictures [H, W, 3] or videos [F, H, W, 3] uint8. Of several processes one calls
        it; what it is given lies on all the devices that may be used."""

    def export(self, params: Any, constants: Any, folder: pathlib.Path) -> None:
        """Writes the weights in the form that the package ships."""


def train(recipe: Recipe, cfg: Any, workdir: pathlib.Path) -> int:
    """Trains until cfg.steps, resuming from the newest checkpoint in `workdir`.

    Several processes (`jax.distributed`) run it side by side, each on the rows of a batch that its devices hold; the
    first one speaks and writes.

    Args:
      recipe: what is trained.
      cfg: optimizer settings (state.make_optimizer) and steps, seed, ema_decay, log_every, eval_every,
        checkpoint_every, mesh (sharding.from_config), micro_batches, batches_ahead (made before they are needed),
        minutes (stop after so long, 0: never), bad_steps (stop after so many non-finite steps); of values that
        checks.run has nothing against.
      workdir: checkpoints, config.json, metrics.jsonl, TensorBoard events and the exported `weights/`.
    Returns:
      The signal (SIGTERM, SIGINT) that came, or 0; the last step that was taken is saved. A run that was stopped before
      its first step leaves everything as it was.
    Raises:
      UserError: when the loss stays non-finite, a step needs more memory than a device has, `workdir` or the
        checkpoints in it cannot be used, or what belongs there cannot be written.
    """
    recipe.open()
    workdir = workdir.resolve()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be used: {error.strerror}; name a folder") from error
    check_writable(workdir / "metrics.jsonl")
    optimizer = train_state.make_optimizer(cfg)
    mesh = sharding.from_config(cfg.mesh)
    with short_of_memory("the weights and the optimizer's state", "divide them over more devices (config key mesh)"):
        state, shardings = _start(recipe, optimizer, cfg.seed, mesh)
        constants = _divided(recipe.constants, mesh)
    update = train_state.make_update(recipe.loss, optimizer, cfg.ema_decay, cfg.micro_batches, recipe.restarts())
    with checkpoints.opened(workdir) as kept:
        if kept.steps():  # only how it is laid out matters then; kept, it would be a second state beside the saved one
            state = train_state.layout_of(state)
        state = kept.resume(state)
        first = int(state.step)
        for line in distributed.undivided(map(recipe.batch_size, range(first + 1, cfg.steps + 1)), mesh):
            say(line)
        log = RunLog(workdir if jax.process_index() == 0 else None, first)
        run = _Run(recipe, cfg, constants, train_state.make_step(update, shardings), kept, log, mesh)
        try:
            if changed := log.settings(cfg):
                say(f"note: the run goes on with other settings than before: {changed}")
            state, stopped = run.crank(state)
        finally:
            log.close()
    if stopped and int(state.step) == first and first < cfg.steps:
        return stopped
    average, fixed = distributed.to_host(state.ema), distributed.to_host(constants)
    if jax.process_index() == 0:
        recipe.export(average, fixed, workdir / "weights")
    say(f"weights (moving average) at step {int(state.step)}: {workdir / 'weights'}")
    return stopped


def _start(recipe: Recipe, optimizer: Any, seed: int, mesh: jax.sharding.Mesh | None) -> tuple[TrainState, Any]:
    """The state at step 0 where it belongs, and its shardings; None on one device."""
    params = _divided(recipe.init, mesh)
    if mesh is None:
        state = train_state.init_state(params, optimizer, seed)
        # Tied to its device as one from a checkpoint is: a run that goes on need not compile its step again.
        return jax.device_put(state, state.key.sharding), None
    make = lambda some: train_state.init_state(some, optimizer, seed)  # noqa: E731
    shardings = train_state.tree_shardings(jax.eval_shape(make, params), mesh)
    return jax.jit(make, out_shardings=shardings)(params), shardings


def _divided(make: Callable[[], Any], mesh: jax.sharding.Mesh | None) -> Any:
    """The parameters that `make` makes; for a mesh they are made in the host's memory and then divided, so that no
    device ever holds more than its part."""
    if mesh is None:
        return make()
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError("weights are put together on the CPU: let JAX_PLATFORMS name cpu too, as in tpu,cpu") from error
    with jax.default_device(host):
        made = jax.device_get(make())
    return jax.device_put(made, train_state.tree_shardings(made, mesh))


@dataclasses.dataclass
class _Run:
    """The loop of `train` and what it needs."""

    recipe: Recipe
    cfg: Any
    constants: Any
    step_fn: Any
    checkpoints: checkpoints.Checkpoints
    log: RunLog
    mesh: jax.sharding.Mesh | None

    def crank(self, state: TrainState) -> tuple[TrainState, int]:
        """The last state, in a checkpoint if a step was taken, and the signal that ended the loop, or 0."""
        report = _Report(self.cfg, self.log)
        remedy = (
            "take batches in more parts (config key micro_batches), keep less for the backward pass (model.remat, of a"
            " transformer), or divide the work over more devices (mesh)"
        )
        with short_of_memory("a training step", remedy):
            try:
                return self._turn(state, report)
            finally:
                report.flush()

    def _turn(self, state: TrainState, report: "_Report") -> tuple[TrainState, int]:
        """`crank`, which tells what is left to be told however this ends."""
        cfg, recipe, first, started = self.cfg, self.recipe, int(state.step), time.monotonic()
        step = first  # the last one that was taken; state.step would have to be waited for
        watch, stopping = _Watch(cfg.bad_steps, recipe, self.log), distributed.Stopping(first, cfg.log_every)
        waiting, metrics = self._batches(first + 1), None
        with _Signals() as signals:
            while True:
                out_of_time = bool(cfg.minutes) and time.monotonic() - started > 60 * cfg.minutes
                done = step >= cfg.steps or stopping.agreed(step, next(iter(signals.received), 0), out_of_time, metrics)
                if step > first and (done or step % cfg.checkpoint_every == 0):
                    watch.look()  # saving waits for the steps anyway
                    if self.checkpoints.latest() != step:
                        report.flush()  # a run that goes on from here would not tell it
                        with report.pause():
                            self.checkpoints.save(step, state)
                if step > first and step % cfg.eval_every == 0 and not stopping.signal:
                    watch.look()
                    with report.pause():
                        self._evaluate(step, state, signals)
                if done:
                    break
                # One of many processes goes on until all stop, for its steps need the others.
                batch = next(waiting) if jax.process_count() > 1 else signals.break_off(next, waiting)
                if batch is None:
                    continue
                with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
                    state, metrics = self.step_fn(state, self.constants, self._placed(batch, step + 1))
                step += 1
                watch.add(step, metrics)
                report.add(step, metrics, self._work(batch, step))
                if step % cfg.log_every == 0 or step in (first + 1, cfg.steps):
                    report.tell_previous()
                report.tell_if_known()
        self.checkpoints.wait()
        report.flush()
        stopped = distributed.largest(next(iter(signals.received), 0))
        if stopped:
            name = signal.Signals(stopped).name
            going_on = f"stopped by {name}; the same command goes on from here"
            say(going_on if step < cfg.steps else f"{name} came after the last step")
        return state, stopped

    def _rows(self, step: int) -> np.ndarray | None:
        """The rows of a step's batch that this process's devices hold; None: all."""
        return None if self.mesh is None else distributed.rows_here(self.recipe.batch_size(step), self.mesh)

    def _batches(self, first: int) -> Iterator[Any]:
        make = lambda step: self.recipe.batch(step, self._rows(step))  # noqa: E731
        return batches.ahead(make, first, self.cfg.steps, self.cfg.batches_ahead)

    def _placed(self, batch: Any, step: int) -> Any:
        if self.mesh is None:
            return batch
        return distributed.place_batch(batch, self.mesh, self.recipe.batch_size(step), self._rows(step))

    def _work(self, batch: Any, step: int) -> tuple[int, float]:
        """What the whole batch asks of all processes, of which `batch` is the rows that are here."""
        (tokens, flops), rows = self.recipe.work(batch), self._rows(step)
        share = 1.0 if rows is None else len(rows) / self.recipe.batch_size(step)
        return round(tokens / share), flops / share

    def _evaluate(self, step: int, state: TrainState, signals: "_Signals") -> None:
        """Scores the moving average where it lies; of several processes the first does so alone, on its own devices."""
        self.checkpoints.wait()  # whatever comes of this, the step is safe
        average, kept = state.ema, self.constants
        if jax.process_count() > 1:
            average, kept = distributed.to_host(average), distributed.to_host(kept)
            if jax.process_index():
                return

        def scored() -> tuple[dict[str, float], dict[str, np.ndarray]]:
            given = average, kept
            if jax.process_count() > 1 and (mesh := distributed.local_mesh()):
                given = jax.device_put(given, train_state.tree_shardings(given, mesh))
            return self.recipe.evaluate(*given)

        try:
            seen = signals.break_off(scored)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            say(f"note: step {step} was not evaluated, for want of memory: {str(error).splitlines()[0][:200]}")
            return
        if not seen:
            say(f"note: step {step} was not evaluated, for a signal came")
            return
        scores, pictures = seen
        self.log.scalars(step, scores)
        for name, picture in pictures.items():
            self.log.picture(step, name, picture)
        if scores:
            say(f"step {step}  held-out: " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))


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
                if (before := signal.getsignal(number)) != signal.SIG_IGN:  # as nohup and a script's background have it
                    self._before[number] = before  # first: the signal may come at once
                    signal.signal(number, self._note)
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
    """Notices every step whose loss was not finite, or that taught nothing, two steps late, so that the machine never
    waits for the loop."""

    def __init__(self, limit: int, recipe: Recipe, log: RunLog):
        self.limit, self.recipe, self.log, self.in_a_row, self.zeros = limit, recipe, log, 0, 0
        self.unread: collections.deque[tuple[int, jax.Array, jax.Array]] = collections.deque()

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes note of a step, and looks at the one before the last."""
        self.unread.append((step, metrics["finite"], metrics["loss"]))
        self.look(leave=2)

    def look(self, leave: int = 0) -> None:
        """Raises UserError if `limit` steps in a row were not finite. leave: that many of the newest unread."""
        while len(self.unread) > leave:
            step, finite, loss = self.unread.popleft()
            self.zeros = 0 if float(loss) else self.zeros + 1
            if self.zeros == self.limit:
                say(
                    f"note: the loss was exactly 0 {self.limit} times in a row, up to step {step}, and taught nothing:"
                    " a preference has nothing left to unlearn, or its config key beta is too high"
                )
            if finite:
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            ids = self.recipe.ids(step)
            say(f"step {step} was not finite and changed nothing; its batch: {', '.join(ids)}")
            self.log.line(step, not_finite=ids)
            if self.in_a_row >= self.limit:
                raise UserError(
                    f"the loss or its gradient was not finite {self.in_a_row} times in a row, up to step {step}; the"
                    " weights were left as they were before: lower the learning rate, or look at the data of that step"
                )


# bf16 FLOP/s of a device, as published; what is not here has no share of a peak.
PEAKS = {
    "NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12, "TPU v4": 275e12, "TPU v5 lite": 197e12,
    "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12,
}  # fmt: skip


def peak_flops() -> float:
    """Of all devices together; 0 where it is not known."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAKS.items() if kind.startswith(name)), 0.0) * jax.device_count()


class _Report:
    """Says how the run goes. A line is told when its numbers are known or the next one is due, so that nothing waits
    for them.

    Means are over all samples since the last line, everything else is of the line's step.
    """

    def __init__(self, cfg: Any, log: RunLog):
        self.steps, self.log, self.peak = cfg.steps, log, peak_flops()
        self.rate = train_state.make_schedule(cfg)
        self.noted: tuple[int, float] | None = None  # the last step that was to be told, and when
        self.pending: tuple[int, dict[str, float], dict[str, Any]] | None = None
        self.means: dict[str, Mean] = {}
        self.latest: tuple[int, dict[str, Any]] = (0, {})
        self.tokens, self.flops = 0, 0.0

    def add(self, step: int, metrics: dict[str, Any], work: tuple[int, float]) -> None:
        """Notes a step's metrics, and what it had to do."""
        for name, value in metrics.items():
            if isinstance(value, Mean):
                self.means[name] = self.means[name] + value if name in self.means else value
        self.latest = step, metrics
        self.tokens, self.flops = self.tokens + work[0], self.flops + work[1]

    def tell_previous(self) -> None:
        """The step noted last is to be told next; tells the one before."""
        self.flush()
        now = time.monotonic()
        step, metrics = self.latest
        speeds = {}
        if self.noted:
            seconds = max(now - self.noted[1], 1e-9)
            speeds["steps_per_second"] = (step - self.noted[0]) / seconds
            if self.tokens:
                speeds["tokens_per_second"] = self.tokens / seconds
            if self.flops and self.peak:
                speeds["share_of_peak"] = self.flops / seconds / self.peak
        self.noted, self.pending = (step, now), (step, speeds, {**metrics, **self.means})
        self.means, self.tokens, self.flops = {}, 0, 0.0

    def tell_if_known(self) -> None:
        """Tells what was noted, if that need not be waited for: steps may take minutes each."""
        if self.pending and all(leaf.is_ready() for leaf in jax.tree.leaves(self.pending[2])):
            self.flush()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is done inside is no part of a step: speeds are without its time."""
        started = time.monotonic()
        yield
        if self.noted:
            self.noted = self.noted[0], self.noted[1] + time.monotonic() - started

    def flush(self) -> None:
        """Tells what was noted and not told."""
        if self.pending is None:
            return
        (step, speeds, metrics), self.pending = self.pending, None
        values = {}
        for name, value in metrics.items():
            if not isinstance(value, Mean):
                values[name] = float(value)
            elif float(value.count):
                values[name] = float(value.total) / float(value.count)
        rate = float(self.rate(int(values.pop("updates"))))  # a step that was not finite did not count
        self.log.scalars(step, {**values, "learning_rate": rate, **speeds})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if name != "finite")
        pace = speeds.get("steps_per_second", 0.0)
        speed = f"{pace:.2f} steps/s  {(self.steps - step) / pace / 60:.0f} min left  " if pace else ""
        say(f"step {step}/{self.steps}  {speed}{shown}")
