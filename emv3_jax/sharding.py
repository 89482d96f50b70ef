"""How parameters and computations are spread over devices.

A mesh has the axes
    data     samples of a batch, or windows of a long video
    branch   guidance branches; its size is 1 or their number
    fsdp     samples too
    context  tokens of a sequence (`attention.self_attention`)
    tensor   heads, and the channels inside a layer
Parameters, optimizer and moving average are divided along fsdp and context together, and gathered where they are used.
They follow one table of rules by name, the same for every model and for what an optimizer keeps of them: a rule says
which dimension is divided along those two and which along tensor. Rules are strict: a parameter that no rule knows is
an error, so that a new kind of layer is thought about once. Models say how activations are divided with `divide`, which
does nothing without a mesh (`jax.set_mesh`).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emv3_jax.errors import UserError

DATA, BRANCH, FSDP, CONTEXT, TENSOR = "data", "branch", "fsdp", "context", "tensor"
AXES = (DATA, BRANCH, FSDP, CONTEXT, TENSOR)
BATCH = (DATA, FSDP)  # both divide samples
PARAMETERS = (FSDP, CONTEXT)  # both divide parameters
Axis = str | tuple[str, ...] | None

# Last names of a parameter's path -> the dimensions divided along PARAMETERS and along tensor, counted from the end
# because layers may be stacked in front; None: not divided. The first rule that knows a parameter counts.
INWARD = "query|key|value|q|k|v|up|gate|fc1"  # projections to heads and inner channels
OUTWARD = "out|o|down|fc2|proj_out"  # back to the residual stream: the inner channels come in
RULES: tuple[tuple[str, int | None, int | None], ...] = (
    (rf"({OUTWARD})/kernel", -1, -2),
    (rf"({INWARD})/kernel", -2, -1),
    (r"kernel|time_kernel|v", -1, None),  # output channels
    (r"embedding|position_embedding", -2, None),  # one row a token
    # Adapters of kernels [.., D, E]: down [.., D, rank] and up [.., rank, E] lie as the kernel does along D and E.
    (rf"({OUTWARD})/down", None, -2),
    (rf"({OUTWARD})/up", -1, None),
    (rf"({INWARD})/down", -2, None),
    (rf"({INWARD})/up", None, -1),
    (r"down", None, None),
    (r"up", -1, None),
    (r"bias|time_bias|scale|gamma|g|modulation|class_embedding|masked_spec_embed|position_bias", None, None),
)


def spec_for(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """The division of one parameter over a mesh whose axes have some sizes.

    What does not divide evenly along PARAMETERS is divided along fsdp alone, or else held whole by every device, since
    JAX has no uneven shards.

    Raises:
      ValueError: no rule knows the parameter.
    """
    rule = next((rule for rule in RULES if re.fullmatch(rf"(.*/)?({rule[0]})", path)), None)
    if rule is None:
        raise ValueError(f"no sharding rule knows {path}: there must be one")
    spec: list[Axis] = [None] * len(shape)
    for choices, dimension in zip(((PARAMETERS, (FSDP,)), ((TENSOR,),)), rule[1:], strict=True):
        if dimension is None or -dimension > len(shape):
            continue
        for axes in choices:
            some = tuple(axis for axis in axes if sizes.get(axis, 1) > 1)
            if some and shape[dimension] % math.prod(sizes[axis] for axis in some) == 0:
                spec[dimension] = some[0] if len(some) == 1 else some
                break
    return PartitionSpec(*spec) if any(spec) else PartitionSpec()


def make_mesh(devices: Any = None, data: int = 1, branch: int = 1, context: int = 1, tensor: int = 1) -> Mesh:
    """All devices (default: of this program): so many along data, branch, context and tensor, and the rest along fsdp.

    Raises:
      UserError: the number of devices is not a multiple of the product.
    """
    devices = jax.devices() if devices is None else devices
    wanted = data * branch * context * tensor
    if min(data, branch, context, tensor) < 1 or len(devices) % wanted:
        raise UserError(
            f"{len(devices)} devices cannot be divided into data {data} x branch {branch} x context {context} x tensor "
            f"{tensor}"
        )
    sizes = (data, branch, len(devices) // wanted, context, tensor)
    # An axis of the mesh may take a part of an axis of the machine: four along context of a slice of 16 x 16.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def from_config(section: Mapping[str, int]) -> Mesh | None:
    """The mesh of a config's section {axis: size}; 0 takes all devices that the others leave. None on one device.

    Raises:
      UserError: as `make_mesh`; an axis that there is not.
    """
    settable = [axis for axis in AXES if axis != FSDP]
    unknown = sorted(set(section) - set(settable))
    if unknown:
        raise UserError(
            f"config key mesh: {unknown[0]!r} is none of {', '.join(settable)} (and {FSDP} takes what they leave)"
        )
    count, given = jax.device_count(), dict(section)
    if count == 1 and max(given.values(), default=1) <= 1:
        return None
    others = math.prod(max(size, 1) for size in given.values())
    try:
        return make_mesh(**{axis: size or max(1, count // others) for axis, size in given.items()})
    except UserError as error:
        raise UserError(f"config key mesh: {error}; give sizes that divide them, --config.mesh.context=1 say") from None


def axis_size(name: str) -> int:
    """Devices along an axis of the mesh in use (`jax.set_mesh`); 1 without one."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(name, 1)


def present(name: str) -> str | None:
    """The axis, if the mesh in use divides anything along it."""
    return name if axis_size(name) > 1 else None


def batch_axes(size: int) -> Axis:
    """The axes along which a batch of some size is divided over the mesh in use: BATCH, its first, or none."""
    for axes in (BATCH, BATCH[:1], BATCH[1:]):
        some = tuple(axis for axis in axes if axis_size(axis) > 1)
        if some and size % math.prod(axis_size(axis) for axis in some) == 0:
            return some
    return None


def batch_groups(size: int) -> int:
    """Groups of devices that a batch of some size is divided over; the devices of one work on the same samples."""
    axes = batch_axes(size) or ()
    return math.prod(axis_size(axis) for axis in ((axes,) if isinstance(axes, str) else axes))


def divide(x: jax.Array, *axes: Axis) -> jax.Array:
    """x with its first dimensions divided along axes of the mesh in use, as far as they divide evenly."""

    def fitting(axis: Axis, size: int) -> Axis:
        if axis == BATCH:
            return batch_axes(size)
        return present(axis) if isinstance(axis, str) and size % axis_size(axis) == 0 else None

    spec = [fitting(axis, x.shape[i]) for i, axis in enumerate(axes)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec)) if any(spec) else x


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """A tree of NamedShardings for a parameter tree, whose leaves need only a shape; raises as `spec_for`."""
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    placed = {path: NamedSharding(mesh, spec_for(path, tuple(leaf.shape), mesh.shape)) for path, leaf in flat.items()}
    return traverse_util.unflatten_dict(placed, sep="/")
