"""How parameters are spread over devices: one table of rules by name, the same for every model.

A mesh has the axis "fsdp"; a parameter's rule says which of its dimensions is divided along it. Rules are strict: a
parameter that no rule knows is an error, so that a new kind of layer is thought about once.
"""

import re
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

FSDP = "fsdp"
# Last name of a parameter's path -> the dimension that is divided, counted from the end because layers may be stacked
# in front; None: every device holds all of it.
RULES: tuple[tuple[str, int | None], ...] = (
    (r"kernel|time_kernel|v", -1),  # output channels
    (r"embedding|position_embedding", -2),  # one row a token
    (r"bias|time_bias|scale|gamma|g|modulation|class_embedding|masked_spec_embed|position_bias", None),
)


def spec_for(path: str, shape: tuple[int, ...], devices: int) -> PartitionSpec:
    """The division of one parameter over `devices` along "fsdp".

    What does not divide evenly is held whole by every device: JAX has no uneven shards.

    Raises:
      ValueError: no rule, or more than one, knows the parameter.
    """
    name = path.rsplit("/", 1)[-1]
    found = [dimension for pattern, dimension in RULES if re.fullmatch(pattern, name)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} sharding rules know {path}: there must be one")
    dimension = found[0]
    if dimension is None or shape[dimension] % devices:
        return PartitionSpec()
    spec: list[str | None] = [None] * len(shape)
    spec[dimension] = FSDP
    return PartitionSpec(*spec)


def make_mesh(devices: Any = None) -> Mesh:
    """All devices (default: of this program) along "fsdp"."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (FSDP,), (jax.sharding.AxisType.Auto,), devices=devices)


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """A tree of NamedShardings for a parameter tree, whose leaves need only a shape; raises as `spec_for`."""
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    placed = {
        path: NamedSharding(mesh, spec_for(path, tuple(leaf.shape), mesh.shape[FSDP])) for path, leaf in flat.items()
    }
    return traverse_util.unflatten_dict(placed, sep="/")
