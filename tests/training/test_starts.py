"""A transformer that starts from one which hears nothing: its velocity is that one's wherever text and image count as
they do there, and its ears can learn."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from configs import sft_1b
from convert import __main__ as command
from convert import dit as dit_table
from convert import engine, parity
from emv3_jax.diffusion.phda import PhDAConfig
from emv3_jax.errors import UserError
from emv3_jax.models.dit import DiT
from emv3_jax.training import starts

pytestmark = pytest.mark.usefixtures("quick_compile")
GOLDEN = parity.Golden(Path(__file__).parents[1] / "golden")
VARIANTS = {"preview": parity.DIT_TINY, "flash": parity.DIT_FLASH_TINY}
FIELDS = ("width", "heads", "layers", "ffn", "time_features", "text_width", "text_len", "image_width")
SIZES = [f"--set={field}={getattr(parity.DIT_TINY, field)}" for field in FIELDS]


class Case:
    """A tiny variant with random weights and inputs; `velocity` is compiled once."""

    def __init__(self, name, make_params):
        self.cfg = VARIANTS[name]
        self.tree = dit_table.target_tree(self.cfg)
        self.params, self.fresh = make_params(self.tree), make_params(self.tree, seed=1)
        inputs = parity.dit_inputs(GOLDEN, f"dit_{name}_tiny", self.cfg)
        self.x, self.t, self.cond = inputs["x"], inputs["t"], inputs["cond"]
        model = DiT(self.cfg)
        self._apply = jax.jit(lambda params, cond, modal: model.apply({"params": params}, self.x, self.t, cond, modal))

    def velocity(self, params, modal=None, **changes):
        """modal: weights of text, image and audio, [B, 3]."""
        modal = np.ones((len(self.x), 3), np.float32) if modal is None else modal
        return np.asarray(self._apply(params, self.cond.replace(**changes), modal))

    def unheard(self, params):
        """The velocity of text and picture alone."""
        return self.velocity(params, audio_scale=np.zeros_like(self.cond.audio_scale))


@pytest.fixture(scope="module", params=list(VARIANTS))
def case(request, make_params):
    return Case(request.param, make_params)


@pytest.fixture(scope="module")
def base(case, tmp_path_factory):
    """A folder of converted weights: dit-base, the part of `case.params` that does not hear."""
    flat = traverse_util.flatten_dict(case.params, sep="/")
    deaf = {path: leaf for path, leaf in flat.items() if not starts.is_audio(path)}
    folder = tmp_path_factory.mktemp("base")
    tensors = engine.to_torch(dit_table.BASE, traverse_util.unflatten_dict(deaf, sep="/"))
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / "base.safetensors")
    command.main(["to-jax", str(folder / "base.safetensors"), *SIZES, "--to", str(folder / "weights")])
    return folder / "weights"


def test_audio_is_what_the_base_model_has_not(case):
    for path in traverse_util.flatten_dict(case.tree, sep="/"):
        in_base = any(rule.target.fullmatch(path) for rule in dit_table.BASE.compiled)
        assert starts.is_audio(path) != in_base, path


def test_a_silent_branch_adds_nothing_whatever_is_heard(case):
    silent = starts.silent(case.params)
    want = case.unheard(case.params)
    assert np.abs(case.velocity(case.params) - want).max() > 1e-3  # sound matters to the weights as they were
    np.testing.assert_array_equal(case.velocity(silent), want)
    np.testing.assert_array_equal(case.velocity(silent, audio=3 - 5 * case.cond.audio), want)


def test_on_a_base_the_first_velocity_is_the_base_models(case, base):
    started = starts.on_base(case.fresh, base)
    np.testing.assert_array_equal(case.velocity(started), case.unheard(case.params))
    flat, fresh, whole = (
        traverse_util.flatten_dict(some, sep="/") for some in (started, case.fresh, starts.silent(case.params))
    )
    for path in flat:
        source = fresh if starts.is_audio(path) and not path.startswith("cross_kv/audio/value") else whole
        np.testing.assert_array_equal(flat[path], source[path], err_msg=path)


def test_under_phda_the_first_velocity_is_the_base_models_where_text_and_image_count_whole(case, base):
    """With the phases of sft_1b.py: nothing is heard at any t, but late the image counts half."""
    phda = PhDAConfig.from_config(sft_1b.get_config().phda)
    started, base_model = starts.on_base(case.fresh, base), case.unheard(case.params)
    for t, whole in ((1000.0, True), (334.0, True), (166.0, False)):
        modal = np.asarray(phda(jnp.full(len(case.x), t)))
        velocity = case.velocity(started, modal)
        np.testing.assert_array_equal(case.velocity(started, modal, audio=3 - 5 * case.cond.audio), velocity)
        assert np.array_equal(velocity, base_model) == whole, t
        late = np.asarray([[1.0, 1.0 if whole else 0.5, 0.0]] * len(case.x), np.float32)
        np.testing.assert_array_equal(velocity, case.velocity(case.params, late))


def test_the_silent_branch_gets_a_gradient_in_every_layer(case):
    silent = starts.silent(case.params)
    model = DiT(case.cfg)

    @jax.jit
    def loss(value):
        audio = {**silent["cross_kv"]["audio"], "value": value}
        params = {**silent, "cross_kv": {**silent["cross_kv"], "audio": audio}}
        return jnp.sum(model.apply({"params": params}, case.x, case.t, case.cond) ** 2)

    for leaf in jax.tree.leaves(jax.grad(loss)(silent["cross_kv"]["audio"]["value"])):
        assert np.isfinite(leaf).all()
        assert (np.abs(leaf).reshape(case.cfg.layers, -1).max(1) > 0).all()


def test_a_base_that_is_missing_or_of_another_size_is_refused(case, base, make_params, tmp_path):
    with pytest.raises(UserError, match=f"no base weights at {tmp_path}/dit-base: convert them"):
        starts.on_base(case.fresh, tmp_path)
    narrow = {**case.fresh, "head": jax.tree.map(lambda leaf: leaf[..., :-1], case.fresh["head"])}
    with pytest.raises(UserError, match="does not fit this model"):
        starts.on_base(narrow, base)
