"""Low-rank adapters (LoRA): what is trained is a product of two thin matrices beside each chosen kernel.

An adapter of a kernel [..., D, E] is {"down" [..., D, r], "up" [..., r, E]}; the adapted kernel is
kernel + scale·down·up. `up` starts at zero, so a new adapter changes nothing. Kernels of stacked layers have one each.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from emv3_jax.errors import UserError


def init(key: jax.Array, params: Any, rank: int, pattern: str) -> dict[str, Any]:
    """Adapters of the kernels whose path without /kernel matches `pattern` ("blocks/.*/(query|key|value)").

    Raises:
      UserError: it matches none.
    """
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    chosen = {path: leaf for path, leaf in flat.items() if _is_chosen(path, pattern)}
    if not chosen:
        kernels = sorted({path.removesuffix("/kernel") for path in flat if path.endswith("/kernel")})
        raise UserError(f"config key adapters.on: {pattern!r} matches no projection; there are {', '.join(kernels)}")
    made = {}
    for number, (path, kernel) in enumerate(sorted(chosen.items())):
        *stack, rows, columns = kernel.shape
        noise = jax.random.normal(jax.random.fold_in(key, number), (*stack, rows, rank)) / rows**0.5
        made[path.removesuffix("/kernel")] = {"down": noise, "up": jnp.zeros((*stack, rank, columns))}
    return traverse_util.unflatten_dict(made, sep="/")


def _is_chosen(path: str, pattern: str) -> bool:
    return path.endswith("/kernel") and re.fullmatch(pattern, path.removesuffix("/kernel")) is not None


def merged(params: Any, adapters: Any, scale: float) -> Any:
    """Parameters with scale·down·up added to every kernel that has an adapter; the others as they are.

    Merged kernels are float32, whatever they were: in bfloat16 a change of less than 0.2 % would be lost.
    """
    flat = dict(traverse_util.flatten_dict(dict(params), sep="/"))
    for path, pair in pairs(adapters).items():
        kernel = flat[f"{path}/kernel"]
        change = jnp.einsum("...Dr,...rE->...DE", pair["down"], pair["up"])
        flat[f"{path}/kernel"] = kernel.astype(jnp.float32) + scale * change
    return traverse_util.unflatten_dict(flat, sep="/")


def pairs(adapters: Any) -> dict[str, Mapping[str, jax.Array]]:
    """Path of a projection -> its adapter."""
    flat = traverse_util.flatten_dict(dict(adapters), sep="/")
    paths = sorted({path.rpartition("/")[0] for path in flat})
    return {path: {name: flat[f"{path}/{name}"] for name in ("down", "up")} for path in paths}
