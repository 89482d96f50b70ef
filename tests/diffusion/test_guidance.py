"""Guidance algebra with a fake model whose answer can be worked out by eye."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from emv3_jax.diffusion import guidance
from emv3_jax.diffusion.guidance import branches, combine, dynamic_scale, guide, stack_branches

U, D, C = 1.0, 10.0, 100.0  # what the three branches say


def fake_velocity(x, t, context):
    """Answers with the context's number, whatever x and t are, plus a trace of both."""
    return context["answer"] + 0.0 * x + 0.001 * t[:, None]


def contexts(*answers):
    return stack_branches([{"answer": jnp.full((2, 1), a), "unused": None} for a in answers])


@pytest.fixture
def x():
    return jnp.zeros((2, 3))


@pytest.fixture
def t():
    return jnp.array([0.0, 1000.0])


def test_combine_three_branches():
    v = combine(jnp.array([[U], [D], [C]]), text_scale=4.0, audio_scale=2.9)
    np.testing.assert_allclose(v, [1 + 4 * 9 + 2.9 * 90])


def test_combine_two_branches_is_the_flash_form():
    np.testing.assert_allclose(combine(jnp.array([[D], [C]]), audio_scale=3.0), [10 + 3 * 90])


def test_combine_one_branch_is_that_branch():
    np.testing.assert_array_equal(combine(jnp.array([[C]]), 4.0, 2.9), [C])


@pytest.mark.parametrize("rows", [0, 4])
def test_combine_refuses_other_numbers_of_branches(rows):
    with pytest.raises(ValueError, match="1 to 3"):
        combine(jnp.zeros((rows, 1)))


def test_scale_one_means_no_guidance():
    three = jnp.array([[U], [D], [C]])
    np.testing.assert_allclose(combine(three, 1.0, 1.0), [C])
    np.testing.assert_allclose(combine(three, 1.0, 2.5), combine(three[1:], 1.0, 2.5))


@pytest.mark.parametrize(
    ("text_scale", "audio_scale", "names"),
    [(4.0, 2.9, "udc"), (4.0, 1.0, "udc"), (1.0, 2.9, "dc"), (1.0, 1.0, "c"), (np.array([1.0, 2.0]), 1.0, "udc")],
)
def test_scales_say_which_branches_run(text_scale, audio_scale, names):
    assert "".join(branch.name for branch in branches(text_scale, audio_scale)) == names


def test_branches_know_one_condition_more_each():
    assert [(b.prompt, b.audio) for b in guidance.CHAIN] == [(False, False), (True, False), (True, True)]


@pytest.mark.parametrize("together", [True, False])
def test_guide_three_branches(x, t, together):
    velocity = guide(fake_velocity, contexts(U, D, C), 4.0, 2.9, together=together)
    expected = 1 + 4 * 9 + 2.9 * 90 + np.array([[0.0], [1.0]])
    np.testing.assert_allclose(velocity(x, t, 0), np.broadcast_to(expected, (2, 3)), rtol=1e-6)


@pytest.mark.parametrize("together", [True, False])
def test_branches_together_equal_branches_in_turn(t, together):
    def bent(x, t, context):
        return jnp.tanh(x @ context["w"]) * t[:, None]

    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (2, 3))
    ws = [{"w": jax.random.normal(k, (3, 3))} for k in keys[1:]]
    u, d, c = (bent(x, t, w) for w in ws)
    guided = guide(bent, stack_branches(ws), 3.0, 1.8, together=together)
    np.testing.assert_allclose(guided(x, t, 0), u + 3.0 * (d - u) + 1.8 * (c - d), rtol=2e-5, atol=1e-3)


@pytest.mark.parametrize(("scales", "runs"), [((1.0, 1.0), [C]), ((1.0, 3.0), [D, C]), ((4.0, 2.9), [U, D, C])])
def test_only_the_needed_branches_are_computed(x, t, scales, runs):
    ran = []

    def probe(x, t, context):
        jax.debug.callback(lambda answer: ran.append(float(answer)), context["answer"][0, 0], ordered=True)
        return fake_velocity(x, t, context)

    guide(probe, contexts(*runs), *scales, together=False)(x, t, 0)
    jax.effects_barrier()
    assert ran == runs


def test_scale_tables_are_read_by_step(x, t):
    velocity = guide(fake_velocity, contexts(D, C), 1.0, np.array([2.0, 3.0]))
    np.testing.assert_allclose(velocity(x, t, 0)[0], 10 + 2 * 90)
    np.testing.assert_allclose(jax.jit(lambda velocity, i: velocity(x, t, i))(velocity, 1)[0], 10 + 3 * 90)


def test_too_short_a_table_is_loud(x, t):
    assert jnp.isnan(guide(fake_velocity, contexts(D, C), 1.0, np.array([2.0, 3.0]))(x, t, 2)).all()


def test_wrong_number_of_contexts_names_the_branches():
    with pytest.raises(ValueError, match="branches d c"):
        guide(fake_velocity, contexts(U, D, C), 1.0, 3.0)


def test_dynamic_scale_starts_whole_and_falls_to_half():
    table = dynamic_scale(4.0, 100)
    assert table.shape == (100,)
    np.testing.assert_allclose([table[0], table[-1]], [4.0, 2.0], atol=1e-6)
    assert (np.diff(table) <= 0).all()
    # Step 1 of 2: (1/2)^5 = 1/32, 4 (1/2 + (1 - cos(pi/32)) / 4) = 2.004815...
    np.testing.assert_allclose(dynamic_scale(4.0, 2)[1], 2.0 + (1 - np.cos(np.pi / 32)), rtol=1e-6)


class _Tiny(nn.Module):
    @nn.compact
    def velocity(self, x, t, context, modality_weights=None):
        gain = self.param("gain", nn.initializers.constant(2.0), ())
        weight = 1.0 if modality_weights is None else modality_weights[:, 2:]
        return gain * weight * context + 0.0 * x + 0.0 * t[:, None]


def test_model_velocity_applies_parameters_and_weights(x, t):
    model = _Tiny()
    context = jnp.full((2, 1), 3.0)
    params = model.init(jax.random.key(0), x, t, context, method="velocity")["params"]
    plain = guidance.ModelVelocity(params, model)
    np.testing.assert_allclose(plain(x, t, context), 6.0)
    phased = guidance.ModelVelocity(params, model, weights=lambda t: jnp.stack([t, t, t / 1000], axis=-1))
    np.testing.assert_allclose(phased(x, t, context)[:, 0], [0.0, 6.0])
    assert jax.tree.leaves(plain)[0] == 2.0  # parameters are leaves, so a jitted sampler takes them as arguments
