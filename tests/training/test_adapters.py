"""Adapters: new ones change nothing, merged ones are kernel + scale·down·up, and what they learn is theirs alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from emv3_jax.errors import UserError
from emv3_jax.training import adapters

SHAPES = {
    "blocks/attention/query/kernel": (3, 4, 5),  # of three layers
    "blocks/attention/query/bias": (3, 5),
    "blocks/attention/out/kernel": (3, 5, 4),
    "head/kernel": (4, 2),
    "head/norm/scale": (4,),
}
BOTH = r"blocks/.*/query|head"


def tree(flat):
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def flat(nested):
    return traverse_util.flatten_dict(nested, sep="/")


def random(shapes, seed):
    rng = np.random.default_rng(seed)
    return tree({path: jnp.asarray(rng.standard_normal(shape), jnp.float32) for path, shape in shapes.items()})


@pytest.fixture
def params():
    return random(SHAPES, 0)


@pytest.fixture
def trained(params):
    """Adapters of rank 2 whose `up` is no longer zero."""
    made = adapters.init(jax.random.key(0), params, 2, BOTH)
    return random({path: leaf.shape for path, leaf in flat(made).items()}, 1)


def test_each_chosen_kernel_gets_a_pair_and_each_layer_its_own(params):
    made = flat(adapters.init(jax.random.key(0), params, 2, BOTH))
    assert {path: leaf.shape for path, leaf in made.items()} == {
        "blocks/attention/query/down": (3, 4, 2),
        "blocks/attention/query/up": (3, 2, 5),
        "head/down": (4, 2),
        "head/up": (2, 2),
    }
    down = made["blocks/attention/query/down"]
    assert len(np.unique(down)) == down.size and 0.2 < float(jnp.std(down)) < 1.0  # about 4**-0.5
    shapes_alone = flat(adapters.init(jax.random.key(0), jax.eval_shape(lambda: params), 2, BOTH))
    assert all(np.array_equal(made[path], shapes_alone[path]) for path in made)


def test_new_adapters_change_nothing(params):
    made = adapters.init(jax.random.key(0), params, 2, BOTH)
    merged = adapters.merged(params, made, 0.7)
    assert jax.tree.all(jax.tree.map(np.array_equal, merged, params))


def test_merged_is_the_kernel_and_scale_down_up_of_each_layer(params, trained):
    before, after, made = flat(params), flat(adapters.merged(params, trained, 0.7)), flat(trained)
    for layer in range(3):
        change = made["blocks/attention/query/down"][layer] @ made["blocks/attention/query/up"][layer]
        want = before["blocks/attention/query/kernel"][layer] + 0.7 * change
        np.testing.assert_allclose(after["blocks/attention/query/kernel"][layer], want, rtol=1e-6, atol=1e-6)
    want = before["head/kernel"] + 0.7 * made["head/down"] @ made["head/up"]
    np.testing.assert_allclose(after["head/kernel"], want, rtol=1e-6, atol=1e-6)
    for path in SHAPES.keys() - {"blocks/attention/query/kernel", "head/kernel"}:
        np.testing.assert_array_equal(after[path], before[path])


def test_small_changes_of_bfloat16_kernels_are_kept(params, trained):
    """Much smaller ones than bfloat16 could tell apart; what has no adapter stays as it is."""
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    before, after, made = flat(narrow), flat(adapters.merged(narrow, trained, 1e-4)), flat(trained)
    change = np.asarray(after["head/kernel"], np.float64) - np.asarray(before["head/kernel"], np.float64)
    np.testing.assert_allclose(change, 1e-4 * made["head/down"] @ made["head/up"], rtol=0.01, atol=1e-6)
    wide = {path for path, leaf in after.items() if leaf.dtype == jnp.float32}
    assert wide == {"blocks/attention/query/kernel", "head/kernel"}


def test_a_pattern_that_matches_nothing_is_refused_with_what_there_is(params):
    for pattern in ("blocks/query", "query", "head/norm", "blocks/attention/query/kernel"):
        with pytest.raises(UserError, match="config key adapters.on: .* matches no projection; there are "
                                            "blocks/attention/out, blocks/attention/query, head$"):  # fmt: skip
            adapters.init(jax.random.key(0), params, 2, pattern)


def test_gradients_reach_up_at_once_and_down_after_it(params, trained):
    x = jnp.ones((2, 4))

    def loss(some):
        merged = adapters.merged(params, some, 0.7)
        return jnp.sum((x @ merged["blocks"]["attention"]["query"]["kernel"].sum(0)) ** 2) + jnp.sum(
            (x @ merged["head"]["kernel"]) ** 2
        )

    first = flat(jax.grad(loss)(adapters.init(jax.random.key(0), params, 2, BOTH)))
    later = flat(jax.grad(loss)(trained))
    for path in first:
        assert bool(jnp.any(first[path] != 0)) == path.endswith("/up"), path  # `up` is zero, so `down` waits
        assert bool(jnp.all(jnp.any(later[path] != 0, axis=(-2, -1)))), path
