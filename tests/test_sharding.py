"""Parameters over several devices: every one has a rule, and the video stays what one device makes."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from bench import meshes
from configs import lora, puppet_lora
from emv3_jax.config import PRESETS
from emv3_jax.errors import UserError
from emv3_jax.pipeline import expected_params
from emv3_jax.sharding import AXES, from_config, make_mesh, param_shardings, spec_for
from emv3_jax.training import adapters
from emv3_jax.training import state as train_state


def test_rules_by_hand():
    sizes = {"fsdp": 8, "tensor": 2}
    assert spec_for("blocks/mlp/up/kernel", (30, 1536, 8960), sizes) == P(None, "fsdp", "tensor")
    assert spec_for("blocks/mlp/down/kernel", (30, 8960, 1536), sizes) == P(None, "tensor", "fsdp")
    assert spec_for("blocks/self_attention/out/kernel", (30, 1536, 1536), {"fsdp": 8}) == P(None, None, "fsdp")
    assert spec_for("patch_embedding/kernel", (1, 2, 2, 36, 1536), sizes) == P(None, None, None, None, "fsdp")
    both = {"fsdp": 4, "context": 2}
    assert spec_for("blocks/mlp/up/kernel", (30, 1536, 8960), both) == P(None, ("fsdp", "context"), None)
    assert spec_for("head/kernel", (16, 12), both) == P(None, "fsdp")  # 12 divides by 4 and not by 8
    assert spec_for("embed/embedding", (256384, 4096), sizes) == P("fsdp", None)
    assert spec_for("blocks/mlp/up/bias", (30, 8960), sizes) == P()
    assert spec_for("head/kernel", (16, 3), sizes) == P()  # 3 does not divide by 8
    with pytest.raises(ValueError, match="no sharding rule knows blocks/surprise"):
        spec_for("blocks/surprise", (8,), sizes)


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_of_every_preset_has_a_rule_and_most_values_are_divided(name):
    shapes = expected_params(PRESETS[name])
    mesh = jax.sharding.AbstractMesh((1, 1, 8, 1, 1), AXES)
    divided = whole = 0
    for role, tree in shapes.items():
        shardings = param_shardings(tree, mesh)
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
            assert sharding.shard_shape(leaf.shape), role
            if sharding.spec == P():
                whole += leaf.size
            else:
                divided += leaf.size
    assert divided > 0.95 * (divided + whole)


@pytest.mark.parametrize(("name", "cfg"), [("preview", lora), ("flash", lora), ("demo", puppet_lora)])
def test_adapters_lie_as_their_kernels_do(name, cfg):
    """Along the channels that come in and those that go out; every one, and what the optimizer keeps of it."""
    shapes, mesh = expected_params(PRESETS[name])["dit"], jax.sharding.AbstractMesh((1, 1, 2, 2, 2), AXES)
    pattern = cfg.get_config().adapters.on
    make = lambda key: train_state.init_state(adapters.init(key, shapes, 4, pattern), optax.adamw(1.0))  # noqa: E731
    places = train_state.tree_shardings(jax.eval_shape(make, jax.random.key(0)), mesh)
    kernels = traverse_util.flatten_dict(param_shardings(shapes, mesh), sep="/")
    leaves = traverse_util.flatten_dict(places.params, sep="/")
    assert len(leaves) >= 12
    for path, place in leaves.items():
        projection, _, which = path.rpartition("/")
        kernel = (*kernels[f"{projection}/kernel"].spec,)
        assert place.spec[1:] == ((kernel[1], None) if which == "down" else (None, kernel[2])), path
    assert jax.tree.leaves(places.ema) == jax.tree.leaves(places.params)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks of a device."""

    id: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0


def test_context_takes_a_part_of_an_axis_of_the_slice():
    """Four of 16 x 16 chips lie side by side along context, though no axis of the slice has four."""
    mesh = make_mesh([Chip(16 * y + x, (x, y, 0)) for y in range(16) for x in range(16)], context=4)
    assert dict(mesh.shape) == {"data": 1, "branch": 1, "fsdp": 64, "context": 4, "tensor": 1}
    coords = np.array([[chip.coords for chip in group] for group in mesh.devices[0, 0, :, :, 0]])
    assert (np.abs(np.diff(coords, axis=1)).sum(-1) == 1).all()


EIGHT_DEVICES = """
import jax, numpy as np
jax.config.update("jax_disable_most_optimizations", True)  # compiled once and run on next to nothing
from conftest import TINY, random_params
from emv3_jax import Request, SamplingOptions
from emv3_jax.pipeline import Pipeline, expected_params
from emv3_jax.sharding import make_mesh, param_shardings
request = Request(np.full((32, 32, 3), 128, np.uint8), np.zeros(4000, np.float32), "A puppet nods.", frames=13)
options = SamplingOptions(steps=2, window=9, overlap=1, windows_together=2)
params = random_params(expected_params(TINY))
want = Pipeline(TINY, params).generate(request, options).frames.astype(int)
assert want.std() > 1
for axes in ({"data": 2, "branch": 2, "context": 2}, {"context": 2, "tensor": 2}):  # fsdp takes the rest: 1 and 2
    mesh = make_mesh(**axes)
    spread = {role: jax.device_put(tree, param_shardings(tree, mesh)) for role, tree in params.items()}
    pipe = Pipeline(TINY, spread, mesh=mesh)
    kernel = pipe.params["dit"]["blocks"]["mlp"]["up"]["kernel"]
    parts, columns = mesh.shape["fsdp"] * mesh.shape["context"], mesh.shape["tensor"]
    assert len(kernel.addressable_shards) == 8
    assert np.multiply(kernel.addressable_shards[0].data.shape[-2:], (parts, columns)).tolist() == [*kernel.shape[-2:]]
    got = pipe.generate(request, options).frames.astype(int)
    assert abs(want - got).max() <= 1, (axes, abs(want - got).max())  # of 255: sums in another order, then rounding
print("good")
"""


def on_eight_devices(code: str) -> subprocess.CompletedProcess:
    env = os.environ | meshes.devices_of_cpu(8)
    env["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parents[1]), str(Path(__file__).parent)))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_eight_devices_make_the_video_of_one():
    assert on_eight_devices(EIGHT_DEVICES).stdout == "good\n"


def test_a_mesh_of_all_devices():
    sizes = {"data": 1, "branch": 1, "fsdp": len(jax.devices()), "context": 1, "tensor": 1}
    assert make_mesh().shape == sizes
    with pytest.raises(UserError, match="devices cannot be divided into data 3"):
        make_mesh(data=3)
    with pytest.raises(UserError, match="config key mesh: 'fsdp' is none of data, branch, context, tensor"):
        from_config({"data": 1, "fsdp": 2})


ATTENTION = """
import jax, jax.numpy as jnp, numpy as np
from emv3_jax import attention
from emv3_jax.sharding import make_mesh
rng = np.random.default_rng(0)
# Heads that divide by the devices (Ulysses) and that do not (ring); lengths that divide, and that are padded.
for heads, length, context in ((4, 32, 4), (3, 32, 4), (8, 30, 8), (3, 29, 8)):
    q, k, v = (jnp.asarray(rng.standard_normal((2, length, heads, 8)), jnp.float32) for _ in range(3))
    loss = lambda f, q: (f(q, k, v) ** 2).sum()
    want = attention.plain_attention(q, k, v), jax.grad(lambda q: loss(attention.plain_attention, q))(q)
    tensor = 2 if heads % 2 == 0 and context == 4 else 1
    with jax.set_mesh(make_mesh(context=context, tensor=tensor)):
        gradient = jax.jit(jax.grad(lambda q: loss(attention.self_attention, q)))
        got = jax.jit(attention.self_attention)(q, k, v), gradient(q)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, atol=5e-6)
print("good")
"""


def test_attention_of_a_divided_sequence_is_that_of_the_whole():
    assert on_eight_devices(ATTENTION).stdout == "good\n"


TRAINING = """
import jax, numpy as np
jax.config.update("jax_disable_most_optimizations", True)  # compiled once and run on next to nothing
from bench import meshes
from emv3_jax.sharding import make_mesh
want = meshes.run(4, None)
np.testing.assert_allclose(meshes.run(4, make_mesh(context=2, tensor=2)), want, rtol=1e-5)  # and fsdp 2

import jax.numpy as jnp, optax
from emv3_jax.training import adapters, state
rng = np.random.default_rng(0)
base = {"mlp": {"up": {"kernel": rng.standard_normal((8, 16))}, "down": {"kernel": rng.standard_normal((16, 8))}}}
def loss(params, constants, batch, key):
    mlp = adapters.merged(constants, params, 1.0)["mlp"]
    return jnp.mean(jnp.square(jnp.tanh(batch @ mlp["up"]["kernel"]) @ mlp["down"]["kernel"] - batch)), {}
def adapted(mesh):
    found = state.init_state(adapters.init(jax.random.key(0), base, 4, "mlp/(up|down)"), optax.adamw(0.1))
    places = None if mesh is None else state.tree_shardings(found, mesh)
    found = found if mesh is None else jax.device_put(found, places)
    step = state.make_step(state.make_update(loss, optax.adamw(0.1), 0.9), places)
    for number in range(2):
        found, _ = step(found, base, rng_of(number).standard_normal((8, 8)).astype(np.float32))
    return found
rng_of = np.random.default_rng
mesh = make_mesh(tensor=2)
got, want = adapted(mesh), adapted(None)
assert len({shard.device for shard in got.params["mlp"]["up"]["down"].addressable_shards}) == 8
assert got.params["mlp"]["up"]["down"].addressable_shards[0].data.shape == (2, 4)
assert np.abs(want.params["mlp"]["down"]["up"]).max() > 0.05
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got.params, want.params)
print("good")
"""


def test_training_on_eight_devices_has_the_losses_of_one():
    """All meshes, and more steps, are in bench.meshes."""
    assert on_eight_devices(TRAINING).stdout == "good\n"
