import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from convert import __main__ as command
from convert import dit, engine, parity, vae
from convert.engine import ConversionError, Ignore, Rule, Table, linear_rules
from emv3_jax.checkpoint import write_safetensors
from emv3_jax.config import VAEConfig
from emv3_jax.errors import UserError

ROOT = Path(__file__).parent / "golden"
TABLE = Table(
    "toy",
    (
        *linear_rules(r"blocks\.(?P<layer>\d+)\.(up|down)", "blocks/{2}"),
        Rule(r"norm\.gamma", "norm/scale", "vector3"),
        Rule(r"(?P<side>encoder|decoder)\.conv\.weight", "{side}/conv/kernel", "conv3d"),
    ),
    (Ignore(r"unused\..*", "nobody reads it"),),
)


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, np.float32)


TREE = {
    "blocks": {
        "up": {"kernel": shape(2, 3, 5), "bias": shape(2, 5)},
        "down": {"kernel": shape(2, 5, 3), "bias": shape(2, 3)},
    },
    "norm": {"scale": shape(4)},
    "encoder": {"conv": {"kernel": shape(3, 1, 2, 4, 6)}},
    "decoder": {"conv": {"kernel": shape(3, 1, 2, 4, 6)}},
}


def toy() -> dict[str, np.ndarray]:
    conv = (6, 4, 3, 1, 2)
    shapes = {"norm.gamma": (4, 1, 1, 1), "encoder.conv.weight": conv, "decoder.conv.weight": conv}
    for i in range(2):
        shapes |= {f"blocks.{i}.up.weight": (5, 3), f"blocks.{i}.up.bias": (5,)}
        shapes |= {f"blocks.{i}.down.weight": (3, 5), f"blocks.{i}.down.bias": (3,)}
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(sizes).astype(np.float32) for key, sizes in shapes.items()}


def problems(tensors, table=TABLE, tree=TREE) -> tuple[str, ...]:
    with pytest.raises(ConversionError) as caught:
        engine.to_jax(table, tensors, tree, "toy.safetensors")
    assert isinstance(caught.value, UserError)
    assert str(caught.value).startswith("toy.safetensors: ")
    return caught.value.problems


def test_tensors_land_where_the_table_says():
    tensors = toy()
    params = engine.to_jax(TABLE, tensors, TREE, "toy")
    np.testing.assert_array_equal(params["blocks"]["up"]["kernel"][1], tensors["blocks.1.up.weight"].T)
    np.testing.assert_array_equal(params["norm"]["scale"], tensors["norm.gamma"][:, 0, 0, 0])
    kernel = params["decoder"]["conv"]["kernel"]
    assert kernel[2, 0, 1, 3, 5] == tensors["decoder.conv.weight"][5, 3, 2, 0, 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip_is_exact_to_the_byte(dtype):
    tensors = {key: value.astype(dtype) for key, value in toy().items()}
    back = engine.to_torch(TABLE, engine.to_jax(TABLE, tensors, TREE, "toy"), TREE)
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert back[key].dtype == dtype and back[key].shape == value.shape
        assert back[key].tobytes() == value.tobytes()


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("linear", (2, 3)), ("conv1d", (2, 3, 4)), ("conv2d", (2, 3, 4, 5)), ("conv3d", (2, 3, 4, 5, 6)),
     ("pointwise2d", (2, 3, 1, 1)), ("pointwise3d", (2, 3, 1, 1, 1)), ("temporal", (2, 3, 4, 1, 1)),
     ("vector2", (2, 1, 1)), ("vector3", (2, 1, 1, 1)), ("unbatch", (1, 2, 3)), ("identity", (2, 3))],
)  # fmt: skip
def test_every_transform_has_an_inverse(name, sizes):
    x = np.arange(np.prod(sizes)).reshape(sizes)
    transform = engine.TRANSFORMS[name]
    np.testing.assert_array_equal(transform.inverse(transform.forward(x)), x)
    assert transform.inverse(transform.forward(x)).shape == sizes


def test_all_kinds_of_errors_are_listed_together():
    tensors = toy() | {"blocks.2.up.bias": np.zeros(5, np.float32), "extra.weight": np.zeros(1, np.float32)}
    tensors["blocks.01.up.bias"] = tensors["blocks.1.up.bias"]  # a second name for the same layer
    del tensors["norm.gamma"], tensors["blocks.1.down.weight"]
    tensors["encoder.conv.weight"] = np.zeros((6, 4, 3, 3, 3), np.float32)
    assert sorted(problems(tensors)) == [
        "doubled: blocks.01.up.bias and blocks.1.up.bias both become blocks/up/bias",
        "mis-shaped: encoder.conv.weight is [6, 4, 3, 3, 3], the model wants [6, 4, 3, 1, 2]",
        "missing: blocks.1.down.weight",
        "missing: norm.gamma",
        "unexpected: blocks.2.up.bias",
        "unexpected: extra.weight",
    ]


def test_a_key_that_two_rules_want_is_refused():
    table = Table("toy", (*TABLE.rules, Rule(r"norm\.(gamma)", "norm/{1}", "vector3")), TABLE.ignored)
    assert problems(toy(), table) == ("doubled: norm.gamma matches 2 rules of the toy table",)


def test_a_parameter_that_no_rule_or_two_rules_reach_is_refused():
    tree = TREE | {"norm": {"scale": shape(4), "bias": shape(4)}}
    assert problems(toy(), tree=tree) == ("no rule leads to norm/bias (the table is incomplete)",)
    table = Table("toy", (*TABLE.rules, Rule(r"other\.gamma", "norm/scale", "vector3")), TABLE.ignored)
    assert "doubled: 2 rules lead to norm/scale (the table is incomplete)" in problems(toy(), table)


def test_layers_of_different_types_are_refused():
    tensors = toy()
    tensors["blocks.1.up.bias"] = tensors["blocks.1.up.bias"].astype(np.float16)
    assert problems(tensors) == ("mis-typed: blocks.1.up.bias is float16, other layers are float32",)


def test_ignored_keys_may_be_there():
    params = engine.to_jax(TABLE, toy() | {"unused.weight": np.zeros(1)}, TREE, "toy")
    assert "unused.weight" not in engine.to_torch(TABLE, params)


def test_backwards_is_as_strict():
    params = engine.to_jax(TABLE, toy(), TREE, "toy")
    params["norm"] = {"shift": np.zeros(4)}
    params["blocks"]["up"]["bias"] = np.zeros((3, 5))
    with pytest.raises(ConversionError) as caught:
        engine.to_torch(TABLE, params, TREE, "params")
    assert caught.value.problems == (
        "no rule leads to norm/shift (unexpected parameter)",
        "missing: norm/scale",
        "unexpected: norm/shift",
        "mis-shaped: blocks/up/bias is [3, 5], the model wants [2, 5]",
    )


@pytest.mark.parametrize(
    "rule",
    [
        Rule(r"a\.b*", "a/b"),
        Rule(r"a.b", "a/b"),
        Rule(r"a\.(b(c))", "a/{1}/{2}"),
        Rule(r"a\.(b)", "a/b"),
        Rule(r"a", "a", "unknown"),
    ],
)
def test_rules_without_an_inverse_are_refused_when_the_table_is_built(rule):
    with pytest.raises(ValueError):
        Table("bad", (rule,))
    with pytest.raises(ValueError, match="needs a reason"):
        Table("bad", (), (Ignore("x", ""),))


def test_files_appear_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.safetensors"
    write_safetensors(file, {"a": np.arange(6.0).reshape(2, 3).T})
    with pytest.raises(Exception, match="."):
        write_safetensors(file, {"a": np.array(["not a number"])})
    np.testing.assert_array_equal(engine.read_safetensors(file)["a"], np.arange(6.0).reshape(2, 3).T)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="not a readable"):
        engine.read_safetensors(file)
    with pytest.raises(UserError, match="no such file"):
        engine.read_safetensors(tmp_path / "none")


DIT_SIZES = [
    item
    for name in ("width", "layers", "ffn", "time_features", "text_width", "audio_width", "image_width")
    for item in ("--set", f"{name}={getattr(parity.DIT_TINY, name)}")
]


def test_command_line_there_and_back(tmp_path, capsys):
    source, middle, back = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors"))
    shapes = json.loads((ROOT / "manifests/dit_preview_tiny.json").read_text())
    tensor_for = parity.load_tensor_for(ROOT / "weights.py")
    tensors = {key: tensor_for(key, sizes) for key, sizes in shapes.items()}
    write_safetensors(source, tensors)
    model = ["--model", "dit-preview", *DIT_SIZES]
    assert command.main(["to-jax", *model, str(source), str(middle)]) == 0
    assert engine.read_safetensors(middle)["blocks/mlp/up/kernel"].shape == (2, 48, 96)
    assert command.main(["to-torch", *model, str(middle), str(back)]) == 0
    restored = engine.read_safetensors(back)
    assert restored.keys() == tensors.keys()
    assert all(restored[key].tobytes() == tensors[key].tobytes() for key in tensors)
    capsys.readouterr()
    assert command.main(["inspect", str(source)]) == 0
    printed = capsys.readouterr().out
    assert "blocks.0.ffn.0.weight  F32  [96, 48]" in printed
    assert f"{len(tensors)} of them are keys of dit-preview" in printed


def test_command_line_converts_a_vae_of_another_size(tmp_path):
    cfg = VAEConfig(width=4, res_blocks=1)
    shapes = traverse_util.flatten_dict(vae.target_tree(cfg), sep="/")
    rng = np.random.default_rng(0)
    params = {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    source, torch_file, back = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors"))
    write_safetensors(source, params)
    model = ["--model", "vae", "--set", "width=4", "--set", "res_blocks=1"]
    assert command.main(["to-torch", *model, str(source), str(torch_file)]) == 0
    assert engine.read_safetensors(torch_file)["decoder.upsamples.2.resample.1.weight"].shape == (8, 16, 3, 3)
    assert command.main(["to-jax", *model, str(torch_file), str(back)]) == 0
    restored = engine.read_safetensors(back)
    assert restored.keys() == params.keys()
    assert all(np.array_equal(restored[path], params[path]) for path in params)


def test_command_line_errors_exit_2_with_one_clear_line(tmp_path, capsys):
    source, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_safetensors(source, {"foo": np.zeros(1)})
    cases = [
        (["to-jax", "--model", "dit-preview", str(source), str(output)], "keys do not fit the model:"),
        (["to-torch", "--model", "vae", str(source), str(output)], "keys do not fit the model:"),
        (["to-jax", "--model", "vae", "--set", "colour=3", str(source), str(output)], "--set colour=3: give NAME=N"),
        (["to-jax", "--model", "vae", str(source), str(source)], "give another output"),
        (["inspect", str(tmp_path / "none")], "no such file"),
    ]
    for arguments, message in cases:
        assert command.main(arguments) == 2
        assert message in capsys.readouterr().err.splitlines()[0]
    assert not output.exists()


def test_full_size_table_knows_exactly_the_released_keys():
    """The manifest of the tiny model, its layers counted up to 30, is the released one (names are the same)."""
    tiny = json.loads((ROOT / "manifests/dit_preview_tiny.json").read_text())
    released = {key.replace("blocks.1.", f"blocks.{i}.") for key in tiny for i in range(1, 30)}
    slots = engine.expected_slots(dit.PREVIEW, _flat(dit.target_tree(command.MODELS["dit-preview"].cfg)), [], "")
    assert slots.keys() == released


def _flat(tree: dict) -> dict:
    return {"/".join(str(part.key) for part in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def test_parity_table(capsys, tmp_path):
    """Present cases print PASS or FAIL, absent ones say so, and a wrong weight seed is noticed."""
    cases = tuple(case for case in parity.CASES if case.name in ("umt5_tiny", "schedulers.flow5_x", "mask_latents"))
    missing = parity.Case("gone", "gone", 1.0, parity.umt5_tiny)
    assert parity.run(parity.Golden(ROOT), (*cases, missing))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(row[0], row[2]) for row in rows[:3]] == [(case.name, "PASS") for case in cases]
    assert rows[3][:2] == ["gone", "skipped:"]
    assert not parity.run(parity.Golden(ROOT, seed=1), cases[:1])
    assert "FAIL" in capsys.readouterr().out
    assert parity.main([str(tmp_path / "none")]) == 2
    assert parity.main([str(tmp_path)]) == 2
    assert "holds none of the golden files" in capsys.readouterr().err
