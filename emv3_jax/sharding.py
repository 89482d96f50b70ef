"""How parameters and computations are spread over devices.

A mesh has the axes
    data     samples of a batch, or windows of a long video
    branch   guidance branches; its size is 1 or their number
    context  tokens of a sequence (`attention.self_attention`)
    fsdp     parameters; gathered where they are used
Parameters follow one table of rules by name, the same for every model: a rule says which dimension is divided along
fsdp. Rules are strict: a parameter that no rule knows is an error, so that a new kind of layer is thought about once.
Models say how activations are divided with `divide`, which does nothing without a mesh (`jax.set_mesh`).
"""

import re
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emv3_jax.errors import UserError

DATA, BRANCH, CONTEXT, FSDP = "data", "branch", "context", "fsdp"
AXES = (DATA, BRANCH, CONTEXT, FSDP)
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


def make_mesh(devices: Any = None, data: int = 1, branch: int = 1, context: int = 1) -> Mesh:
    """All devices (default: of this program): so many along data, branch and context, and the rest along fsdp.

    Raises:
      UserError: the number of devices is not a multiple of the product.
    """
    devices = jax.devices() if devices is None else devices
    wanted = data * branch * context
    if min(data, branch, context) < 1 or len(devices) % wanted:
        raise UserError(
            f"{len(devices)} devices cannot be divided into data {data} x branch {branch} x context {context}"
        )
    sizes = (data, branch, context, len(devices) // wanted)
    return jax.make_mesh(sizes, AXES, (jax.sharding.AxisType.Auto,) * len(AXES), devices=devices)


def axis_size(name: str) -> int:
    """Devices along an axis of the mesh in use (`jax.set_mesh`); 1 without one."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(name, 1)


def present(name: str) -> str | None:
    """The axis, if the mesh in use divides anything along it."""
    return name if axis_size(name) > 1 else None


def divide(x: jax.Array, *axes: str) -> jax.Array:
    """x with its first dimensions divided along axes of the mesh in use, as far as they divide evenly."""
    spec = [present(axis) if x.shape[i] % axis_size(axis) == 0 else None for i, axis in enumerate(axes)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec)) if any(spec) else x


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """A tree of NamedShardings for a parameter tree, whose leaves need only a shape; raises as `spec_for`."""
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    placed = {
        path: NamedSharding(mesh, spec_for(path, tuple(leaf.shape), mesh.shape[FSDP])) for path, leaf in flat.items()
    }
    return traverse_util.unflatten_dict(placed, sep="/")
