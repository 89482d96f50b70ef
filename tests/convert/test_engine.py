import jax
import ml_dtypes
import numpy as np
import pytest

from convert import engine
from convert.engine import Checkpoint, ConversionError
from convert.rules import TRANSFORMS, Ignore, Rule, Table, linear_rules
from convert.sources import Spec
from emv3_jax.errors import UserError

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
     ("row", (3,)), ("vector2", (2, 1, 1)), ("vector3", (2, 1, 1, 1)), ("unbatch", (1, 2, 3)), ("identity", (2, 3))],
)  # fmt: skip
def test_every_transform_has_an_inverse(name, sizes):
    x = np.arange(np.prod(sizes)).reshape(sizes)
    transform = TRANSFORMS[name]
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
    assert problems(tensors) == (
        "mis-typed: blocks.1.up.bias is float16, other parts of blocks/up/bias are float32 (see --dtype)",
    )


QKV = Table(
    "qkv",
    tuple(
        Rule(rf"layers\.(?P<layer>\d+)\.{name}\.{kind}", f"layers/qkv/{leaf}", transform, part=(i, 3))
        for i, name in enumerate(("q", "k", "v"))
        for kind, leaf, transform in (("weight", "kernel", "linear"), ("bias", "bias", "identity"))
    ),
)
QKV_TREE = {"layers": {"qkv": {"kernel": shape(2, 4, 15), "bias": shape(2, 15)}}}


def test_three_tensors_share_a_kernel_and_come_back():
    rng = np.random.default_rng(0)
    tensors = {f"layers.{i}.{n}.weight": rng.standard_normal((5, 4)) for i in range(2) for n in "qkv"}
    tensors |= {f"layers.{i}.{n}.bias": rng.standard_normal(5) for i in range(2) for n in "qkv"}
    params = engine.to_jax(QKV, tensors, QKV_TREE, "qkv")
    want = np.concatenate([tensors[f"layers.1.{name}.weight"] for name in "qkv"]).T
    np.testing.assert_array_equal(params["layers"]["qkv"]["kernel"][1], want)
    back = engine.to_torch(QKV, params, QKV_TREE)
    assert back.keys() == tensors.keys()
    assert all(back[key].tobytes() == tensors[key].tobytes() for key in tensors)
    del tensors["layers.0.k.bias"]
    assert problems(tensors, QKV, QKV_TREE) == ("missing: layers.0.k.bias",)


def test_a_parameter_must_have_all_its_parts():
    half = Table("half", tuple(rule for rule in QKV.rules if rule.part[0] != 1))
    assert problems({}, half, QKV_TREE)[0] == (
        "parts 0 of 3, 2 of 3 lead to layers/qkv/kernel, which is not all of it (the table is incomplete)"
    )
    odd = {"layers": {"qkv": {"kernel": shape(2, 4, 14), "bias": shape(2, 15)}}}
    assert "mis-shaped: layers/qkv/kernel (2, 4, 14) cannot come from 'linear'" in problems({}, QKV, odd)
    with pytest.raises(ValueError, match="is not"):
        Table("bad", (Rule("a", "b", part=(3, 3)),))


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


def checkpoint(tensors, name="toy", table=TABLE, tree=TREE) -> Checkpoint:
    """A checkpoint that counts what is read of it."""
    reads: list[str] = []

    def read(key: str) -> np.ndarray:
        reads.append(key)
        return tensors[key]

    out = Checkpoint(name, table, tree, engine.specs(tensors), read)
    object.__setattr__(out, "reads", reads)
    return out


def test_a_plan_reads_nothing_and_then_one_layer_at_a_time():
    source = checkpoint(toy())
    plan = engine.plan_to_jax([source])
    assert source.reads == []
    (leaf,) = [leaf for leaf in plan.leaves if leaf.path == "blocks/up/kernel"]
    blocks = leaf.blocks()
    layer, block = next(blocks)
    assert (layer, block.shape, leaf.block_shape) == (0, (3, 5), (1, 3, 5))
    assert source.reads == ["blocks.0.up.weight"]
    assert block.flags["C_CONTIGUOUS"]


def test_a_type_is_cast_and_makes_mixed_types_one():
    tensors = toy()
    tensors["blocks.1.up.bias"] = tensors["blocks.1.up.bias"].astype(np.float16)
    plan = engine.plan_to_jax([checkpoint(tensors)], dtype=np.dtype(ml_dtypes.bfloat16))
    arrays = {leaf.path: leaf.array() for leaf in plan.leaves}
    assert all(array.dtype == ml_dtypes.bfloat16 for array in arrays.values())
    want = tensors["blocks.1.up.bias"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(arrays["blocks/up/bias"][1], want)


def test_numbers_that_are_not_floating_are_refused():
    tensors = toy() | {"norm.gamma": np.ones((4, 1, 1, 1), np.int8)}
    assert problems(tensors) == ("mis-typed: norm.gamma is int8, the model wants floating numbers",)


def test_a_base_fills_what_is_missing_and_the_plan_says_which():
    base, tuned = toy(), toy()
    tuned = {key: tuned[key] + 1 for key in ("blocks.1.up.weight", "norm.gamma")}
    top, below = checkpoint(tuned, "tuned"), checkpoint(base, "base")
    plan = engine.plan_to_jax([top, below])
    arrays = {leaf.path: leaf.array() for leaf in plan.leaves}
    np.testing.assert_array_equal(arrays["blocks/up/kernel"][0], base["blocks.0.up.weight"].T)
    np.testing.assert_array_equal(arrays["blocks/up/kernel"][1], tuned["blocks.1.up.weight"].T)
    assert sorted(plan.kept(top)) == sorted(tuned) == sorted(plan.replaced["base"])
    assert sorted(plan.kept(below)) == sorted(base.keys() - tuned.keys())


def test_what_is_wrong_in_either_file_is_listed_together():
    base, tuned = toy(), {"norm.gamma": np.zeros((5, 1, 1, 1), np.float32), "typo.weight": np.zeros(1, np.float32)}
    del base["blocks.0.up.bias"]
    base["extra.weight"] = np.zeros(1, np.float32)
    with pytest.raises(ConversionError) as caught:
        engine.plan_to_jax([checkpoint(tuned, "tuned"), checkpoint(base, "base")])
    assert str(caught.value).startswith("tuned over base: 4 keys do not fit the model:")
    assert caught.value.problems == (
        "tuned: unexpected: typo.weight",
        "tuned: mis-shaped: norm.gamma is [5, 1, 1, 1], the model wants [4, 1, 1, 1]",
        "base: unexpected: extra.weight",
        "missing: blocks.0.up.bias",
    )


def test_a_base_may_be_of_a_smaller_model():
    tree = {"blocks": TREE["blocks"]}
    small = Table("small", TABLE.rules[:-2])
    below = checkpoint({key: x for key, x in toy().items() if "blocks" in key}, "base", small, tree)
    tuned = {key: x for key, x in toy().items() if "blocks" not in key}
    plan = engine.plan_to_jax([checkpoint(tuned, "tuned"), below])
    assert len(plan.kept(below)) == 8
    del tuned["norm.gamma"]
    with pytest.raises(ConversionError, match="missing: norm.gamma"):
        engine.plan_to_jax([checkpoint(tuned, "tuned"), below])


def test_one_layer_is_never_made_of_two_files():
    rng = np.random.default_rng(0)
    base = {f"layers.{i}.{n}.weight": rng.standard_normal((5, 4)) for i in range(2) for n in "qkv"}
    base |= {f"layers.{i}.{n}.bias": rng.standard_normal(5) for i in range(2) for n in "qkv"}
    tuned = {"layers.0.q.bias": base["layers.0.q.bias"] + 1}
    tables = dict(table=QKV, tree=QKV_TREE)
    with pytest.raises(ConversionError) as caught:
        engine.plan_to_jax([checkpoint(tuned, "tuned", **tables), checkpoint(base, "base", **tables)])
    assert caught.value.problems == ("missing: layers.0.k.bias", "missing: layers.0.v.bias")


def test_sizes_of_parameters_show_in_a_header():
    header = {"blocks.6.up.weight": Spec((5, 3), np.dtype(np.float32)), "norm.gamma": Spec((9,), np.dtype(np.float32))}
    assert engine.parameter_shapes(TABLE, header) == {"blocks/up/kernel": (7, 3, 5)}
    shapes = {"layers.2.k.weight": Spec((6, 4), np.dtype(np.float32))}
    assert engine.parameter_shapes(QKV, shapes) == {"layers/qkv/kernel": (3, 4, 18)}
