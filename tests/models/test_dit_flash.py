"""The flash variant: audio windows, biased keys and values, a query that nothing uses."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import dit as dit_table
from convert import engine, parity
from emv3_jax.models.audio_tokens import AudioWindows
from emv3_jax.models.dit import Conditions, DiT

GOLDEN = parity.Golden(Path(__file__).parents[1] / "golden")
CFG = parity.DIT_FLASH_TINY


@pytest.fixture(scope="module")
def params() -> dict:
    return parity.dit_params(GOLDEN, "dit_flash_tiny", CFG)


def test_golden_parity_through_the_converter():
    assert parity.relative_error(*parity.dit_velocity(GOLDEN, "dit_flash_tiny", CFG)) < 1e-5


def test_weights_go_out_as_they_came_in_the_unused_query_too(params):
    back = engine.to_torch(dit_table.FLASH, params, dit_table.target_tree(CFG))
    tensor_for = parity.load_tensor_for(GOLDEN.root / "weights.py")
    assert "blocks.1.cross_attn.q_audio.weight" in back
    for key, tensor in back.items():
        np.testing.assert_array_equal(tensor, tensor_for(key, tensor.shape))


def test_the_unused_query_changes_nothing(params):
    inputs, apply = parity.dit_inputs(GOLDEN, "dit_flash_tiny", CFG), jax.jit(DiT(CFG).apply)
    unused = params["blocks"]["cross_attention"]["unused_audio_query"]
    other = jax.tree.map(np.zeros_like, unused)
    blocks = {**params["blocks"], "cross_attention": {**params["blocks"]["cross_attention"]}}
    blocks["cross_attention"]["unused_audio_query"] = other
    np.testing.assert_array_equal(
        apply({"params": {**params, "blocks": blocks}}, **inputs), apply({"params": params}, **inputs)
    )


def test_each_video_frame_is_heard_by_its_own_latent_frame(params):
    """Neighbours are inside the windows; frame 5, the first of the second group, also lends its front half only."""
    windows, apply = np.random.default_rng(0).standard_normal((1, 9, 5, 3, 8)).astype(np.float32), AudioWindows(CFG)
    variables = {"params": params["audio_tokens"]}
    tokens = np.asarray(apply.apply(variables, windows)).reshape(3, 5, -1)

    def changed(frame: int, place: int) -> list[int]:
        other = windows.copy()
        other[0, frame, place] += 1.0
        moved = np.abs(np.asarray(apply.apply(variables, other)).reshape(3, 5, -1) - tokens).max((1, 2)) > 1e-6
        return np.flatnonzero(moved).tolist()

    assert changed(0, 0) == changed(0, 4) == [0]
    assert [changed(5, place) for place in range(5)] == [[2], [2], [2], [], []]
    assert [changed(6, place) for place in range(5)] == [[], [], [2], [], []]
    assert [changed(8, place) for place in range(5)] == [[], [], [2], [2], [2]]
    assert changed(4, 4) == [1]


def test_sound_of_another_length_is_refused():
    with pytest.raises(ValueError, match="audio of 12 video frames does not fit 4 latent frames"):
        AudioWindows(CFG, parent=None).segments(12, 4)
    cond = Conditions(
        given=np.zeros((1, 4, 8, 6, 20)),
        text=np.zeros((1, 12, 24)),
        image=np.zeros((1, 257, 20)),
        audio=np.zeros((1, 12, 5, 3, 8)),
        face_mask=np.ones((1, 12)),
        audio_scale=np.ones(1),
    )
    with pytest.raises(ValueError, match="audio of 12 video frames does not fit 4 latent frames"):
        jax.eval_shape(DiT(CFG).init, jax.random.key(0), np.zeros((1, 4, 8, 6, 16)), np.zeros(1), cond)
    table = AudioWindows(CFG, parent=None).segments(13, 4)
    np.testing.assert_array_equal(table, np.arange(20).reshape(4, 5))


def test_gradients_reach_everything_that_is_used(params):
    windows = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 5, 3, 8)), jnp.float32)
    apply = lambda p: jnp.sum(jnp.square(AudioWindows(CFG).apply({"params": p}, windows)[..., ::3]))  # noqa: E731
    gradient = jax.grad(apply)(params["audio_tokens"])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
