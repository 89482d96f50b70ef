"""Negative prompts by phase, and the released factor that piles up."""

import numpy as np
import pytest

from emv3_jax.diffusion.negatives import Negatives, stages
from emv3_jax.errors import UserError


def test_one_prompt_is_one_column_of_ones():
    negatives = Negatives("bad")
    assert negatives.prompts == ("bad",)
    np.testing.assert_array_equal(negatives.table(np.array([1000.0, 500, 10])), np.ones((3, 1)))


def test_phases_cross_fade_between_the_bounds():
    negatives = Negatives("bad", motion="stiff", detail="blurred", bounds=(200, 600))
    assert negatives.prompts == ("bad stiff", "bad blurred")
    table = negatives.table(np.array([1000.0, 600, 400, 300, 200, 0]))
    np.testing.assert_allclose(table[:, 0], [1, 1, 0.5, 0.25, 0, 0])
    np.testing.assert_allclose(table.sum(axis=1), 1)


def test_one_phase_alone_leaves_the_other_to_the_common_prompt():
    assert Negatives("bad", motion="stiff").prompts == ("bad stiff", "bad")
    assert Negatives("", detail="blurred").prompts == ("", "blurred")


def test_the_released_factor_piles_up_and_stays():
    """SPEC section 4: 1.5, 2.25, 3.375 and then 3.375 for the rest of the run."""
    table = Negatives("bad", scale=1.5, steps=2, growth="cumulative").table(np.linspace(1000, 100, 5))
    np.testing.assert_allclose(table[:, 0], [1.5, 2.25, 3.375, 3.375, 3.375])


def test_the_factor_is_one_and_ends_with_its_steps():
    table = Negatives("bad", motion="stiff", scale=1.5, steps=2).table(np.linspace(1000, 100, 5))
    np.testing.assert_allclose(table.sum(axis=1), [1.5, 1.5, 1.5, 1, 1])


def test_stages_are_the_distinct_mixtures():
    mixtures, which = stages(np.array([[1, 0], [1, 0], [0.5, 0.5], [0, 1], [0, 1]], np.float32))
    np.testing.assert_array_equal(mixtures, [[1, 0], [0.5, 0.5], [0, 1]])
    assert which.tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bounds": (5, 5)}, "negative_low and negative_high must satisfy 0 <= low < high <= 1000, got 5 and 5"),
        ({"bounds": (0, 2000)}, "negative_low and negative_high must"),
        ({"bounds": (float("nan"), 500)}, "negative_low and negative_high must"),
        ({"scale": -1.0}, "neg_scale must be a number of 0 or more"),
        ({"steps": -1}, "neg_steps must be 0 or more"),
        ({"growth": "fast"}, "there is no neg_growth 'fast': one of steady, cumulative"),
    ],
)
def test_what_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        Negatives(**changes)
