"""A run whose answer is known, for the tests of what a run does."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from emv3_jax import checkpoint


class Quadratic:
    """|w - target|^2, with a target that every batch and every random key shifts a little."""

    def __init__(self, width: int = 3, bad: tuple = (), before_batch=lambda step: None):
        self.width, self.bad, self.before_batch = width, bad, before_batch

    def init(self):
        return {"w": jnp.zeros((2, self.width))}

    def open(self):
        pass

    def restarts(self):
        return ()

    def constants(self):
        return {}

    def batch_size(self, step):
        return 2

    def ids(self, step):
        return [f"clip {step}a", f"clip {step}b"]

    def work(self, batch):
        return 10, 1e3

    def batch(self, step, rows=None):
        self.before_batch(step)
        noise = np.random.default_rng(step).normal(size=(2, self.width))
        return np.full_like(noise, np.nan) if step in self.bad else 1.0 + 0.1 * noise

    def loss(self, params, constants, batch, key):
        target = batch + 0.1 * jax.random.normal(key, batch.shape)
        return jnp.mean(jnp.square(params["w"] - target)), {"mean": jnp.mean(params["w"])}

    def evaluate(self, params, constants):
        moving = np.zeros((5, 8, 8, 3), np.uint8)
        return {"distance": float(jnp.max(jnp.abs(params["w"] - 1)))}, {"grey": moving[0], "film": moving}

    def export(self, params, constants, folder):
        checkpoint.save_models(folder, {"quadratic": params})


def config(**changes) -> ml_collections.ConfigDict:
    values = {
        "steps": 12, "seed": 0, "learning_rates": ((12, 0.2),), "warmup_steps": 2, "final_lr_share": 0.1,
        "weight_decay": 0.0, "clip_norm": 1.0, "beta1": 0.9, "beta2": 0.99, "ema_decay": 0.9,
        "minutes": 0.0, "bad_steps": 3, "mesh": {"data": 1}, "micro_batches": 1, "batches_ahead": 0,
        "log_every": 4, "eval_every": 6, "checkpoint_every": 5,
    }  # fmt: skip
    return ml_collections.ConfigDict({**values, **changes})


def stop_at(step: int, number: int = signal.SIGTERM):
    return lambda now: os.kill(os.getpid(), number) if now == step else None


def die_at(last):
    def die(step):
        if step == last:
            raise RuntimeError("the lights went out")

    return die


def last_state(workdir) -> tuple[int, dict]:
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(workdir / "checkpoints", item_handlers=handler) as checkpoints:
        step = checkpoints.latest_step()
        return step, checkpoints.restore(step, args=ocp.args.StandardRestore())


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(workdir, whole):
    (step, state), (wanted_step, wanted) = last_state(workdir), last_state(whole)
    assert step == wanted_step
    jax.tree.map(np.testing.assert_array_equal, state, wanted)
    weights = [checkpoint.load_params(folder / "weights/quadratic.safetensors") for folder in (workdir, whole)]
    jax.tree.map(np.testing.assert_array_equal, *weights)
