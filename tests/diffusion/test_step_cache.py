"""Which steps TeaCache computes; the golden runs are in test_sampler.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from emv3_jax.diffusion.flow import flow_grid
from emv3_jax.diffusion.guidance import guide, skipped_guidance, stack_branches
from emv3_jax.diffusion.sampler import sample
from emv3_jax.diffusion.solvers import euler
from emv3_jax.diffusion.step_cache import IDENTITY, StepCache, describe, relative_change
from emv3_jax.errors import UserError

# Each row half as large again as the one before: a relative change of 0.5 every step.
GROWING = 1.5 ** np.arange(8)[:, None, None] * np.ones((8, 6, 4))


def test_relative_change_by_hand():
    np.testing.assert_allclose(relative_change(GROWING), np.full(7, 0.5))


@pytest.mark.parametrize(
    ("threshold", "start", "computed"),
    [
        (0.0, 1, [0, 1, 2, 3, 4, 5, 6, 7]),
        (1.0, 1, [0, 2, 4, 6]),  # after two changes of 0.5
        (1.1, 2, [0, 1, 4, 7]),
        (99.0, 3, [0, 1, 2]),
    ],
)
def test_changes_add_up_to_the_threshold(threshold, start, computed):
    steps = StepCache(threshold, start, IDENTITY).computed_steps(GROWING)
    assert np.flatnonzero(steps).tolist() == computed


def test_the_log_names_the_steps():
    assert describe(np.array([True, False, True, False])) == "step cache: 2 of 4 steps are reused: 1, 3 (from 0)"
    assert describe(np.ones(3, bool)) == "step cache: all 3 steps are computed"


@pytest.mark.parametrize("changes", [{"threshold": -1.0}, {"threshold": float("nan")}, {"start_steps": 0}])
def test_what_cannot_be(changes):
    with pytest.raises(UserError):
        StepCache(**{"threshold": 0.1, **changes})


@struct.dataclass
class Counting:
    """A model whose blocks answer with the timestep times the context: v = x + residual."""

    scale: jax.Array

    def __call__(self, x, t, context):
        return self.with_residual(x, t, context)[0]

    def with_residual(self, x, t, context):
        residual = self.scale * context * t[:, None] * jnp.ones_like(x)
        return x + residual, residual

    def again(self, x, t, context, residual):
        return x + residual


@pytest.mark.parametrize("together", [True, False])
def test_every_branch_reuses_its_own_residual(together):
    """Step 1 takes what step 0 computed, each branch its own: v = x + 1000 (2 + 3 (5 - 2)) 0.01."""
    grid = flow_grid(3)
    contexts = stack_branches([jnp.full((1, 1), 2.0), jnp.full((1, 1), 5.0)])
    computed = np.array([True, False, True])
    guided = guide(Counting(jnp.float32(0.01)), contexts, 1.0, 3.0, together, computed=computed)
    x, want = jnp.ones((1, 2)), np.ones((1, 2))
    used = (grid.timesteps[0], grid.timesteps[0], grid.timesteps[2])
    for t, dsigma in zip(used, np.diff(grid.sigmas), strict=True):
        want = want + dsigma * (want + 0.01 * t * (2 + 3 * 3))
    np.testing.assert_allclose(sample(guided, euler(grid), grid, x), want, rtol=1e-4)


def test_the_last_steps_without_guidance():
    assert skipped_guidance(0.0, 10) is None
    assert np.flatnonzero(skipped_guidance(0.25, 10)).tolist() == [8, 9]
    grid = flow_grid(4)
    contexts = stack_branches([jnp.full((1, 1), 2.0), jnp.full((1, 1), 5.0)])
    model = lambda x, t, context: context * jnp.ones_like(x)  # noqa: E731
    guided = guide(model, contexts, 1.0, 3.0, alone=skipped_guidance(0.5, 4))
    x, t = jnp.zeros((1, 1)), jnp.ones(1)
    assert [float(guided(x, t, i)[0, 0]) for i in range(4)] == [11.0, 11.0, 5.0, 5.0]
    end = sample(guided, euler(grid), grid, x)
    np.testing.assert_allclose(end, [[np.diff(grid.sigmas) @ [11, 11, 5, 5]]], rtol=1e-5)
    with pytest.raises(UserError, match="between 0 and 1"):
        skipped_guidance(1.5, 10)


def test_cache_and_steps_without_guidance_together():
    """The last branch goes on with its own residual when it runs alone."""
    grid = flow_grid(3)
    contexts = stack_branches([jnp.full((1, 1), 2.0), jnp.full((1, 1), 5.0)])
    guided = guide(
        Counting(jnp.float32(0.01)), contexts, 1.0, 3.0,
        computed=np.array([True, False, False]), alone=np.array([False, False, True]),
    )  # fmt: skip
    memory = guided.start(jnp.zeros((1, 1)))
    x = jnp.zeros((1, 1))
    got = []
    for i in range(3):
        v, memory = guided.advance(x, jnp.array([float(grid.timesteps[i])]), i, memory)
        got.append(float(v[0, 0]))
    np.testing.assert_allclose(got, [110.0, 110.0, 50.0], rtol=1e-5)
