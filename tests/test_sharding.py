"""Parameters over several devices: every one has a rule, and the video stays what one device makes."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec as P

from emv3_jax.config import PRESETS
from emv3_jax.pipeline import expected_params
from emv3_jax.sharding import make_mesh, param_shardings, spec_for


def test_rules_by_hand():
    assert spec_for("blocks/mlp/up/kernel", (30, 1536, 8960), 8) == P(None, None, "fsdp")
    assert spec_for("embed/embedding", (256384, 4096), 8) == P("fsdp", None)
    assert spec_for("blocks/mlp/up/bias", (30, 8960), 8) == P()
    assert spec_for("head/kernel", (16, 3), 8) == P()  # 3 does not divide by 8
    with pytest.raises(ValueError, match="0 sharding rules know blocks/surprise"):
        spec_for("blocks/surprise", (8,), 8)


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_of_every_preset_has_a_rule_and_most_values_are_divided(name):
    shapes = expected_params(PRESETS[name])
    mesh = jax.sharding.AbstractMesh((8,), ("fsdp",))
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


EIGHT_DEVICES = """
import jax, numpy as np
from emv3_jax import Request, SamplingOptions, load_pipeline
from emv3_jax.sharding import make_mesh
request = Request(np.full((64, 64, 3), 128, np.uint8), np.zeros(4000, np.float32), "A puppet nods.", frames=5)
one, eight = load_pipeline("demo"), load_pipeline("demo", mesh=make_mesh())
kernel = eight.params["dit"]["blocks"]["mlp"]["up"]["kernel"]
assert len(kernel.addressable_shards) == 8 and kernel.addressable_shards[0].data.shape[-1] * 8 == kernel.shape[-1]
a, b = (pipe.generate(request, SamplingOptions(steps=2)).frames.astype(int) for pipe in (one, eight))
assert a.std() > 1 and abs(a - b).max() <= 1, abs(a - b).max()  # one of 255: sums in another order, then rounding
print("good")
"""


def test_eight_devices_make_the_video_of_one():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", EIGHT_DEVICES], env=env, capture_output=True, text=True)
    assert done.stdout == "good\n", done.stderr


def test_a_mesh_of_all_devices():
    assert make_mesh().shape == {"fsdp": len(jax.devices())}
