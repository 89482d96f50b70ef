"""Turns the crank: batches in, steps, log lines, checkpoints, and on from where the last run stopped."""

import itertools
import pathlib
import signal
import time
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp

from emv3_jax.errors import UserError
from emv3_jax.training import state as train_state
from emv3_jax.training.run_log import RunLog


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

    def export(self, params: Any, path: pathlib.Path) -> None:
        """Writes the weights in the form that the package ships."""


def _progress(step: int, steps: int, rate: float, metrics: dict[str, float]) -> str:
    left = (steps - step) / max(rate, 1e-9)
    shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "finite")
    return f"step {step}/{steps}  {rate:.2f} steps/s  {left / 60:.0f} min left  {shown}"


def train(recipe: Recipe, cfg: Any, workdir: pathlib.Path) -> None:
    """Trains until cfg.steps, resuming from the newest checkpoint in `workdir`.

    Args:
      recipe: what is trained.
      cfg: optimizer settings (state.make_optimizer) and steps, seed, ema_decay, log_every, eval_every,
        checkpoint_every, minutes (stop after so long, 0: never), bad_steps (stop after so many non-finite steps).
      workdir: checkpoints, metrics.jsonl, TensorBoard events and the exported `weights.safetensors`.
    Raises:
      UserError: when the loss stays non-finite.
    """
    optimizer = train_state.make_optimizer(cfg)
    state = train_state.init_state(recipe.init(), optimizer)
    workdir = workdir.resolve()
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    with ocp.CheckpointManager(workdir / "checkpoints", options=options) as checkpoints:
        if (newest := checkpoints.latest_step()) is not None:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = checkpoints.restore(newest, args=ocp.args.StandardRestore(abstract))
            print(f"resumed from step {newest} in {workdir}", flush=True)
        step_fn = train_state.make_step(recipe.loss, optimizer, cfg.ema_decay, cfg.seed)
        log = RunLog(workdir)
        try:
            state = _crank(recipe, cfg, state, step_fn, checkpoints, log)
        finally:
            log.close()
    recipe.export(jax.device_get(state.ema), workdir / "weights.safetensors")
    print(f"weights (moving average) at step {int(state.step)}: {workdir / 'weights.safetensors'}", flush=True)


def _crank(recipe, cfg, state, step_fn, checkpoints, log):
    """The loop of `train`; returns the last state, which is always in a checkpoint."""
    stop = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: stop.append(number))
    started = marked = time.monotonic()
    first = int(state.step)
    bad, pending = 0, None
    for step in itertools.count(first + 1):
        done = step > cfg.steps or stop or (cfg.minutes and time.monotonic() - started > 60 * cfg.minutes)
        if done or (step - 1 > first and (step - 1) % cfg.checkpoint_every == 0):
            if checkpoints.latest_step() != step - 1:
                checkpoints.save(step - 1, args=ocp.args.StandardSave(state))
        if done:
            break
        state, metrics = step_fn(state, recipe.batch(step))
        if step % cfg.log_every == 0 or step == first + 1:
            if pending is not None:  # the numbers of an earlier step: reading them does not wait for this one
                values = {name: float(value) for name, value in pending[1].items()}
                bad = 0 if values["finite"] else bad + 1
                if bad >= cfg.bad_steps:
                    raise UserError(f"the loss was not finite {bad} times in a row (step {pending[0]}): lower the learning rate")
                now = time.monotonic()
                rate = cfg.log_every / (now - marked)
                log.scalars(pending[0], {**values, "steps_per_second": rate})
                print(_progress(step, cfg.steps, rate, values), flush=True)
            marked, pending = time.monotonic(), (step, metrics)
        if step % cfg.eval_every == 0:
            scores, pictures = recipe.evaluate(state.ema)
            log.scalars(step, scores)
            for name, picture in pictures.items():
                log.image(step, name, picture)
            print(f"step {step}  held-out: " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()), flush=True)
    checkpoints.wait_until_finished()
    return state
