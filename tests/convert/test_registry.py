import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util

from convert import engine
from convert.registry import MODELS, config_from, configured, identify, identify_one, read_config
from convert.sources import Spec
from emv3_jax.config import DIT_FLASH, CLIPConfig, VAEConfig, Wav2Vec2Config
from emv3_jax.errors import UserError

MANIFESTS = Path(__file__).parents[1] / "golden" / "manifests"
FORMS = [(model, naming.name, form) for model in MODELS for naming in MODELS[model].namings for form in naming.forms]


def test_every_model_has_a_released_naming_first():
    for model in MODELS.values():
        assert model.namings[0].name == "released"
    with pytest.raises(UserError, match="dit-flash has no diffusers naming: choose released"):
        MODELS["dit-flash"].naming("diffusers")


@pytest.mark.parametrize(("model", "naming", "form"), FORMS)
def test_a_file_of_any_form_is_recognised_and_its_sizes_are_read(tiny_models, tensors_of, model, naming, form):
    header = engine.specs(tensors_of(model, naming, form))
    match = identify_one(header, "file")
    assert match.model.name == model
    assert match.form == form
    if model != "wav2vec2":  # whose released naming is Hugging Face's
        assert match.naming.name == naming
    cfg = read_config(match, header)
    shapes = lambda tree: {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}  # noqa: E731
    assert shapes(match.model.tree(cfg)) == shapes(match.model.tree(match.model.cfg))


@pytest.mark.parametrize(
    ("manifest", "model", "sizes"),
    [
        ("dit_preview_tiny", "dit-preview", {"width": 48, "layers": 2, "ffn": 96, "audio_width": 10}),
        ("umt5_tiny", "umt5", {"vocab": 97, "width": 32, "heads": 4, "layers": 3}),
        ("clip_tiny", "clip", {"image_size": 28, "patch": 14, "width": 32, "layers": 3}),
        ("wav2vec2_tiny", "wav2vec2", {"width": 32, "layers": 3, "conv_width": 16, "positional_groups": 4}),
        ("wan_vae", "vae", {"width": 96, "res_blocks": 2}),
    ],
)
def test_released_files_are_recognised(manifest, model, sizes):
    shapes = json.loads((MANIFESTS / f"{manifest}.json").read_text())
    header = {key: Spec(tuple(shape), np.dtype(np.float32)) for key, shape in shapes.items()}
    match = identify_one(header, manifest)
    assert match.model.name == model and match.known == 1
    cfg = read_config(match, header)
    assert {name: getattr(cfg, name) for name in sizes} == sizes


@pytest.mark.parametrize("manifest", ["dit_preview_tiny", "dit_flash_tiny"])
def test_full_size_tables_know_exactly_the_released_keys(manifest):
    """The manifest of the tiny model, its layers counted up to 30, is the released one (names are the same)."""
    tiny = json.loads((MANIFESTS / f"{manifest}.json").read_text())
    released = {re.sub(r"^blocks\.1\.", f"blocks.{i}.", key) for key in tiny for i in range(1, 30)}
    model = MODELS[manifest.removesuffix("_tiny").replace("_", "-")]
    flat = traverse_util.flatten_dict(model.tree(model.cfg), sep="/")
    problems: list[str] = []
    assert engine.expected_slots(model.naming().table(model.cfg), flat, problems, "").keys() == released
    assert not problems


def test_a_damaged_or_partial_file_is_still_recognised_where_it_can_be(tensors_of):
    header = engine.specs(tensors_of("dit-preview"))
    audio = [key for key in header if "audio" in key]
    del header[audio[0]]
    header["junk"] = Spec((1,), np.dtype(np.float32))
    assert identify_one(header, "file").model.name == "dit-preview"
    with pytest.raises(UserError, match=r"file: cannot tell which model it is \(keys fit .*dit-preview.*say --model"):
        identify_one({key: spec for key, spec in header.items() if "self_attn" in key}, "file")
    with pytest.raises(UserError, match="those of no known model"):
        identify_one({"foo": header["junk"]}, "file")
    assert identify([]) == []


def test_settings():
    assert configured(DIT_FLASH, ["width=48", "audio_windows.tokens=5"]).audio_windows.tokens == 5
    assert configured(Wav2Vec2Config(), ["conv_kernels=3,2"]).conv_kernels == (3, 2)
    assert configured(VAEConfig(), ["res_blocks=1"]) == VAEConfig(res_blocks=1)
    for setting in ("colour=3", "width", "width=x", "width=1,2", "audio_windows=3", "width=-1"):
        with pytest.raises(UserError, match=f"--set {setting}"):
            configured(DIT_FLASH, [setting])
    with pytest.raises(UserError, match="no clip has these sizes"):
        MODELS["clip"].tree(CLIPConfig(width=33, heads=2))


@pytest.mark.parametrize("cfg", [DIT_FLASH, VAEConfig(width=4), Wav2Vec2Config(), MODELS["dit-preview"].cfg])
def test_configs_come_back_from_json(cfg):
    fields = json.loads(json.dumps(dataclasses.asdict(cfg)))
    default = MODELS["dit-flash"].cfg if cfg == DIT_FLASH else type(cfg)()
    assert config_from(default, fields) == cfg
    with pytest.raises(UserError, match="no fields colour"):
        config_from(default, fields | {"colour": 3})
