"""What training carries from step to step, and the one update that changes it."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from emv3_jax import sharding
from emv3_jax.errors import UserError
from emv3_jax.training.losses import Mean

Params = Any
# Last names of the parameters that weight decay pulls towards 0: those that multiply activations, and tables of rows.
# By name and not by the number of dimensions, for stacked layers add one: their biases and gains have two.
DECAYED = re.compile(r"(.*/)?(kernel|time_kernel|v|embedding|position_embedding|down|up)")
STEP_STREAM = 2**31  # sets the keys of steps apart from those that initialise parameters
# loss(params, constants, batch, key) -> loss and metrics; constants are parameters that do not change.
LossFn = Callable[[Params, Any, Any, jax.Array], tuple[jax.Array, dict[str, Any]]]


@struct.dataclass
class TrainState:
    """Float32 master weights, optimizer state, moving average of the weights, the number of steps taken (it says which
    batch comes next), and the data of the run's random key."""

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params
    key: jax.Array


def make_schedule(cfg: Any) -> optax.Schedule:
    """Learning rate by step: each stage of cfg.learning_rates, (up to step, peak), warms up and falls as a cosine.

    The last fall ends where the run does, whatever the stages say: the stage in which step cfg.steps lies, or the last
    one, is cut or stretched to end there, and later ones are not reached. So --config.steps alone makes a run shorter
    or longer. (A run that is resumed with more steps than before goes on higher than it stopped: its stage is longer
    now, and it is no longer at its end. To go on with a warm-up, give learning_rates another stage.)

    Args:
      cfg: steps, learning_rates, warmup_steps (of each stage), final_lr_share (of a stage's peak, at its end).
    Raises:
      UserError: a stage is no longer than the warm-up.
    """
    starts = [0, *(until for until, _ in cfg.learning_rates[:-1])]
    reached = [(start, peak) for start, (_, peak) in zip(starts, cfg.learning_rates, strict=True) if start < cfg.steps]
    ends = [*(start for start, _ in reached[1:]), cfg.steps]
    shortest = min(end - start for (start, _), end in zip(reached, ends, strict=True))
    if not 0 <= cfg.warmup_steps < shortest:
        raise UserError(
            f"config key warmup_steps must be less than the steps of each stage of learning_rates, got"
            f" {cfg.warmup_steps} where the shortest, up to the end of the run, has {shortest}"
        )
    stages = [
        optax.warmup_cosine_decay_schedule(0.0, peak, cfg.warmup_steps, end - start, peak * cfg.final_lr_share)
        for (start, peak), end in zip(reached, ends, strict=True)
    ]
    return optax.join_schedules(stages, ends[:-1])


def make_optimizer(cfg: Any) -> optax.GradientTransformation:
    """AdamW with clipped gradients; kernels, embeddings and adapters decay, and nothing else.

    Args:
      cfg: what `make_schedule` reads, weight_decay, clip_norm, beta1, beta2; optionally `frozen`: names of top-level
        parameter groups that keep their values.
    Raises:
      UserError: the warm-up is too long, or (when it meets the parameters) a frozen group does not exist.
    """

    def decayed(params: Params) -> Any:
        def is_decayed(path: tuple, leaf: Any) -> bool:
            return bool(DECAYED.fullmatch(jax.tree_util.keystr(path, simple=True, separator="/")))

        return jax.tree_util.tree_map_with_path(is_decayed, params)

    adamw = optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.adamw(make_schedule(cfg), cfg.beta1, cfg.beta2, weight_decay=cfg.weight_decay, mask=decayed),
    )
    frozen = tuple(cfg.get("frozen", ()))
    if not frozen:
        return adamw

    def label(params: Params) -> dict[str, str]:
        if unknown := set(frozen) - set(params):
            raise UserError(f"config key frozen: {', '.join(sorted(unknown))} is not among {', '.join(params)}")
        return {name: "frozen" if name in frozen else "trained" for name in params}

    return optax.multi_transform({"trained": adamw, "frozen": optax.set_to_zero()}, label)


def init_state(params: Params, optimizer: optax.GradientTransformation, seed: int = 0) -> TrainState:
    """Step 0."""
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    key = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), STEP_STREAM))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.tree.map(jnp.copy, params), key)


def layout_of(state: Any) -> Any:
    """Shapes, types and places of a state's arrays, without what is in them."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def tree_shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Where each part of a state, or of parameters, lies on a mesh: optimizer and average are divided as parameters."""

    def place(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = PartitionSpec() if not leaf.shape or name == "key" else sharding.spec_for(name, leaf.shape, mesh.shape)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


def parts_of(batch: Any, count: int) -> Any:
    """A batch [B, ...] in parts [count, B/count, ...], each of every count-th sample: what lies on a group of devices
    stays there, and the two halves of a batch of pairs (paired DPO) are halves of every part."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf.reshape(-1, count, *leaf.shape[1:]), 1, 0), batch)


def make_update(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    micro_batches: int = 1,
    restarts: Sequence[int] = (),
) -> Callable[[TrainState, Params, Any], tuple[TrainState, dict[str, Any]]]:
    """The pure update (state, constants, batch) -> (state, metrics).

    What is drawn follows from the state's key and step, so a resumed run draws what an uninterrupted one would have
    drawn. The moving average starts fast: its decay is min(ema_decay, (1 + step) / (10 + step)). A step whose loss or
    gradient is not finite changes nothing but the step number; its metrics say `finite` = 0, and its means are of
    nothing. `updates` is how many steps before have changed the weights, by which the optimizer knows its rate.

    Args:
      micro_batches: the batch is taken in so many equal parts, one after another, in the memory of one; their gradients
        are averaged. Each part has random keys of its own. 0: as many parts as leave one sample at a time to every
        group of devices.
      restarts: steps after which the weights go on from the moving average (inter-task EMA, paper, Soup of Tasks).
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def gradients(params: Params, constants: Params, batch: Any, key: jax.Array) -> tuple[Any, Params]:
        if micro_batches == 1:
            return gradient(params, constants, batch, key)
        sizes = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
        count = micro_batches or min(sizes) // sharding.batch_groups(min(sizes))
        if any(size % count for size in sizes):
            raise UserError(f"config key micro_batches: {count} does not divide a batch of {max(sizes)}")
        parts = parts_of(batch, count)
        one = lambda number, part: gradient(params, constants, part, jax.random.fold_in(key, number))  # noqa: E731
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, 0, jax.tree.map(lambda leaf: leaf[0], parts)))

        def add(total: Any, part: tuple[jax.Array, Any]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, one(*part)), None

        total, _ = jax.lax.scan(add, zeros, (jnp.arange(count), parts))
        return jax.tree.map(lambda leaf: leaf / count, total)

    def update(state: TrainState, constants: Params, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        before = state.params
        if restarts:
            restart = jnp.isin(state.step, jnp.asarray(restarts))
            before = jax.lax.cond(restart, lambda: state.ema, lambda: state.params)
        counts = optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")  # none of plain gradient descent
        updates_before = counts[0][1] if counts else state.step
        (loss, metrics), grads = gradients(before, constants, batch, key)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, before)
        params = optax.apply_updates(before, updates)
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, state.ema, params)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)  # noqa: E731
        state = TrainState(
            state.step + 1, keep(params, before), keep(opt_state, state.opt_state), keep(ema, state.ema), state.key
        )
        metrics = {name: value.where(finite) if isinstance(value, Mean) else value for name, value in metrics.items()}
        report = {"loss": loss, "grad_norm": norm, "finite": finite.astype(jnp.float32), "updates": updates_before}
        return state, {**report, **metrics}

    return update


def make_step(
    update: Callable[[TrainState, Params, Any], tuple[TrainState, dict[str, Any]]], shardings: TrainState | None = None
):
    """An update compiled; the old state's memory is reused. shardings: of the state, which the new one keeps."""
    return jax.jit(update, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))
