"""One update, worked out by hand where that is possible."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import traverse_util

from emv3_jax.errors import UserError
from emv3_jax.training import state as train_state

CFG = {
    "steps": 20, "learning_rates": ((20, 0.1),), "warmup_steps": 2, "final_lr_share": 0.1, "weight_decay": 0.5,
    "clip_norm": 1.0, "beta1": 0.9, "beta2": 0.9,
}  # fmt: skip


def config(**changes) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({**CFG, **changes})


def squares(params, constants, batch, key):
    loss = sum(jnp.sum(jnp.square(leaf - batch)) for leaf in jax.tree.leaves(params))
    return loss, {"draw": jax.random.uniform(key)}


def make_step(*args, **keywords):
    return train_state.make_step(train_state.make_update(*args, **keywords))


def params() -> dict:
    return {"head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2,))}, "body": {"kernel": jnp.full((2, 2), 2.0)}}


def test_the_moving_average_starts_fast_and_then_keeps_its_decay():
    """Plain gradient descent at rate 1/2 on |w - target|^2 lands on the target, so every average is known."""
    step = make_step(squares, optax.sgd(0.5), ema_decay=0.2)
    state = train_state.init_state({"w": jnp.zeros(())}, optax.sgd(0.5))
    average = 0.0
    for i in range(4):
        state, _ = step(state, {}, float(i + 1))
        decay = min(0.2, (1 + i) / (10 + i))
        average = decay * average + (1 - decay) * (i + 1)
        np.testing.assert_allclose(state.params["w"], i + 1, rtol=1e-6)
        np.testing.assert_allclose(state.ema["w"], average, rtol=1e-6)
    assert int(state.step) == 4


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_without_momentum_weights_stop_with_the_gradient(beta1):
    """As a preference does that has nothing left to unlearn."""
    optimizer = train_state.make_optimizer(config(beta1=beta1, weight_decay=0.0, warmup_steps=0))
    _, opt_state = optimizer.update(jax.tree.map(jnp.ones_like, params()), optimizer.init(params()), params())
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params()), opt_state, params())
    assert all(bool(jnp.any(leaf)) == (beta1 > 0) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])  # the last: a finite loss would overflow in the gradient's norm
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(bad):
    optimizer = train_state.make_optimizer(config())
    step = make_step(squares, optimizer, ema_decay=0.9)
    state, _ = step(train_state.init_state(params(), optimizer), {}, 3.0)
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, {}, bad)
    assert metrics["finite"] == 0.0 and int(state.step) == 2
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(before, name))
    state, metrics = step(state, {}, 3.0)
    assert metrics["finite"] == 1.0 and np.any(state.params["head"]["kernel"] != before.params["head"]["kernel"])


def test_frozen_groups_keep_their_values_and_the_others_learn():
    optimizer = train_state.make_optimizer(config(frozen=("body",)))
    step = make_step(squares, optimizer, ema_decay=0.9)
    state = train_state.init_state(params(), optimizer)
    for _ in range(5):
        state, _ = step(state, {}, 3.0)
    np.testing.assert_array_equal(state.params["body"]["kernel"], 2.0)
    np.testing.assert_array_equal(state.ema["body"]["kernel"], 2.0)
    assert np.all(np.asarray(state.params["head"]["bias"]) > 1.1)


def test_a_group_that_is_named_frozen_must_exist():
    optimizer = train_state.make_optimizer(config(frozen=("bdoy",)))
    with pytest.raises(UserError, match="frozen: bdoy is not among body, head"):
        train_state.init_state(params(), optimizer)


@pytest.mark.parametrize(("warmup", "steps"), [(20, 50), (100, 50), (-1, 50), (10, 40), (10, 7)])
def test_a_warm_up_as_long_as_a_stage_is_refused(warmup, steps):
    with pytest.raises(UserError, match="warmup_steps must be less than the steps of each stage .* got"):
        train_state.make_optimizer(config(learning_rates=((30, 0.1), (50, 0.2)), warmup_steps=warmup, steps=steps))


def test_each_stage_of_the_learning_rate_warms_up_to_its_peak_and_falls():
    rate = train_state.make_schedule(config(learning_rates=((10, 0.1), (30, 0.5)), steps=30))
    rates = [float(rate(step)) for step in range(40)]
    np.testing.assert_allclose([rates[0], rates[1], rates[2]], [0.0, 0.05, 0.1], rtol=1e-6)
    np.testing.assert_allclose([rates[10], rates[11], rates[12]], [0.0, 0.25, 0.5], rtol=1e-6)
    assert np.all(np.diff(rates[2:10]) < 0) and np.all(np.diff(rates[12:30]) < 0)
    np.testing.assert_allclose(rates[6], 0.1 * (0.1 + 0.9 / 2), rtol=1e-6)  # half way down
    np.testing.assert_allclose(rates[30:], 0.5 * 0.1, rtol=1e-6)  # and stays there


@pytest.mark.parametrize("steps", [6, 10, 13, 22, 30, 100])
def test_the_last_fall_ends_where_the_run_does(steps):
    """Whatever step the run ends at: the stages before its last one are as they were."""
    stages = ((10, 0.1), (30, 0.5))
    rates = [float(train_state.make_schedule(config(learning_rates=stages, steps=steps))(i)) for i in range(steps + 5)]
    peak, start = (0.1, 0) if steps <= 10 else (0.5, 10)
    np.testing.assert_allclose(rates[start + 2], peak, rtol=1e-6)
    assert all(rate > 0.1 * peak for rate in rates[start + 2 : steps])
    np.testing.assert_allclose(rates[steps:], 0.1 * peak, rtol=1e-6)
    if start:
        whole = train_state.make_schedule(config(learning_rates=stages, steps=30))
        np.testing.assert_allclose(rates[:10], [float(whole(i)) for i in range(10)], rtol=1e-6)


def test_weights_decay_and_biases_do_not():
    optimizer = train_state.make_optimizer(config(warmup_steps=0))
    step = make_step(lambda *args: (0.0 * squares(*args)[0], {}), optimizer, ema_decay=0.9)
    state, _ = step(train_state.init_state(params(), optimizer), {}, 3.0)
    np.testing.assert_allclose(state.params["head"]["kernel"], 1 - 0.1 * 0.5, rtol=1e-5)
    np.testing.assert_array_equal(state.params["head"]["bias"], 1.0)


def test_stacked_layers_decay_as_one_layer_does():
    """Stacking gives a bias two dimensions. Adapters and embeddings decay too."""
    decaying = {
        "blocks/mlp/up/kernel": (3, 2, 4), "blocks/query/down": (3, 2, 1), "blocks/query/up": (3, 1, 2),
        "tokens/embedding": (5, 2), "res/time_kernel": (3, 2, 2), "patch/position_embedding": (4, 2),
    }  # fmt: skip
    staying = {
        "blocks/mlp/up/bias": (3, 4), "blocks/norm/scale": (3, 2), "blocks/modulation": (3, 6, 2),
        "blocks/down/bias": (3, 2), "res/gamma": (3, 2), "blocks/position_bias": (3, 8, 2), "class_embedding": (2,),
    }  # fmt: skip
    ones = traverse_util.unflatten_dict(
        {path: jnp.ones(shape) for path, shape in {**decaying, **staying}.items()}, sep="/"
    )
    for frozen, still in (((), set()), (("tokens",), {"tokens/embedding"})):
        optimizer = train_state.make_optimizer(config(warmup_steps=0, frozen=frozen))
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, ones), optimizer.init(ones), ones)
        updates = traverse_util.flatten_dict(updates, sep="/")
        assert {path for path, update in updates.items() if np.any(update)} == decaying.keys() - still


@pytest.mark.parametrize("frozen", [(), ("body",)])
def test_the_rate_is_of_the_steps_that_counted(frozen):
    optimizer = train_state.make_optimizer(config(frozen=frozen))
    step = make_step(squares, optimizer, ema_decay=0.9)
    state, seen = train_state.init_state(params(), optimizer), []
    for value in (3.0, np.nan, 3.0, 3.0):
        state, metrics = step(state, {}, value)
        seen.append(int(metrics["updates"]))
    assert seen == [0, 1, 1, 2]


def test_every_step_and_every_seed_draws_its_own_numbers():
    def draws(seed):
        optimizer = train_state.make_optimizer(config())
        step = make_step(squares, optimizer, ema_decay=0.9)
        state, drawn = train_state.init_state(params(), optimizer, seed), []
        for _ in range(3):
            state, metrics = step(state, {}, 1.0)
            drawn.append(float(metrics["draw"]))
        return drawn

    first = draws(0)
    assert first == draws(0)
    assert len({*first, *draws(1)}) == 6


def test_master_weights_are_float32():
    optimizer = train_state.make_optimizer(config())
    state = train_state.init_state({"w": np.ones((2, 2), np.float16)}, optimizer)
    assert state.params["w"].dtype == state.ema["w"].dtype == jnp.float32


def mean_loss(params, constants, batch, key):
    """Of samples, as a training loss is; its gradient is an average over them."""
    return jnp.mean(jnp.square(batch["x"] @ params["head"]["kernel"] - batch["y"])), {"mean": jnp.mean(batch["x"])}


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    rng = np.random.default_rng(0)
    batch = {name: jnp.asarray(rng.standard_normal((8, 2)), jnp.float32) for name in ("x", "y")}
    ends = []
    for count in (1, 4, 0):
        step = make_step(mean_loss, optax.sgd(0.1), 0.9, micro_batches=count)
        state, metrics = step(train_state.init_state(params(), optax.sgd(0.1)), {}, batch)
        ends.append((state.params["head"]["kernel"], metrics["loss"], metrics["grad_norm"], metrics["mean"]))
    for end in ends[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ends[0], end)
    step = make_step(mean_loss, optax.sgd(0.1), 0.9, micro_batches=3)
    with pytest.raises(UserError, match="micro_batches: 3 does not divide a batch of 8"):
        step(train_state.init_state(params(), optax.sgd(0.1)), {}, batch)


def test_micro_batches_keep_halves_of_a_batch_together():
    """Batches of true clips and then their negatives (paired DPO): every part holds both of a pair."""

    def loss(params, constants, batch, key):
        first, second = jnp.split(batch["pair"], 2)
        return jnp.sum(params["head"]["kernel"]), {"apart": jnp.sum(jnp.abs(first - second))}

    step = make_step(loss, optax.sgd(0.1), 0.9, micro_batches=2)
    batch = {"pair": jnp.tile(jnp.arange(4.0), 2)}
    assert float(step(train_state.init_state(params(), optax.sgd(0.1)), {}, batch)[1]["apart"]) == 0


def test_weights_go_on_from_the_moving_average_after_a_restart():
    """Plain gradient descent at rate 1/2 lands on the target wherever it starts; a loss of nothing leaves it there."""
    loss = lambda p, c, target, k: (0.0 * jnp.sum(p["w"]), {})  # noqa: E731
    step = make_step(loss, optax.sgd(0.5), ema_decay=0.2, restarts=(1,))
    state = train_state.init_state({"w": jnp.zeros(())}, optax.sgd(0.5))
    state = state.replace(params={"w": jnp.ones(())})
    state, _ = step(state, {}, 0.0)
    assert state.params["w"] == 1.0
    average = float(state.ema["w"])
    state, _ = step(state, {}, 0.0)
    assert 0 < average < 1 and float(state.params["w"]) == pytest.approx(average)


def test_constants_reach_the_loss_and_stay():
    loss = lambda p, c, batch, k: (jnp.mean(jnp.square(p["w"] - c["goal"])), {})  # noqa: E731
    step = make_step(loss, optax.sgd(0.5), ema_decay=0.2)
    goal = {"goal": jnp.full((), 7.0)}
    state, _ = step(train_state.init_state({"w": jnp.zeros(())}, optax.sgd(0.5)), goal, 0.0)
    assert float(state.params["w"]) == 7.0 and float(goal["goal"]) == 7.0


def test_optimizer_and_average_lie_where_their_parameters_do():
    mesh = jax.sharding.AbstractMesh((1, 1, 2, 1, 2), ("data", "branch", "fsdp", "context", "tensor"))
    tree = {"mlp": {"up": {"kernel": jnp.zeros((4, 6)), "bias": jnp.zeros(6)}}}
    state = train_state.init_state(tree, train_state.make_optimizer(config()))
    places = train_state.tree_shardings(state, mesh)
    kernels = [
        place.spec
        for path, place in jax.tree_util.tree_flatten_with_path(places)[0]
        if jax.tree_util.keystr(path).endswith("['kernel']")
    ]
    assert kernels == [jax.sharding.PartitionSpec("fsdp", "tensor")] * 4  # parameters, two moments, average
    assert places.step.spec == jax.sharding.PartitionSpec()
