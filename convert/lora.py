"""Adapters (LoRA) that training wrote -> a LoRA file for the released transformer.

Every adapted layer becomes three tensors, named after the released key of its weight:

    diffusion_model.blocks.0.self_attn.q.lora_A.weight   [r, in]   `down`, transposed
    diffusion_model.blocks.0.self_attn.q.lora_B.weight   [out, r]  `up`, transposed
    diffusion_model.blocks.0.self_attn.q.alpha           float32   scale·r

so that the adapted weight is W + alpha/r·B·A. ComfyUI reads these names for any transformer whose released keys it
holds under `diffusion_model.` (comfy/lora.py, comfy/weight_adapter/lora.py). diffusers reads them for Wan
(`_convert_non_diffusers_wan_lora_to_diffusers`) in self-attention, attention to text and picture, and feed-forward; it
refuses a file with other projections, such as those of sound, which its Wan has not.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from convert.engine import ConversionError
from convert.jobs import rounding
from convert.parameters import Parameters
from convert.registry import MODELS, configured, identify_parameters, known_sizes
from convert.rules import Table
from convert.sources import Spec
from emv3_jax.config import DiTConfig
from emv3_jax.errors import UserError

PREFIX, WEIGHT = "diffusion_model.", ".weight"
SCALE, ADAPTERS = "scale", "adapters"  # as training.dit_recipe.DiTRecipe.export names what it writes
PARTS = {"down": ".lora_A.weight", "up": ".lora_B.weight"}


def is_adapters(source: Parameters) -> bool:
    """Whether a file is one of adapters."""
    return SCALE in source.header and any(path.startswith(f"{ADAPTERS}/") for path in source.header)


@dataclasses.dataclass(frozen=True)
class LoraTensor:
    """One tensor of the file. path: of the parameter that it is, or of what says the rank of an alpha; layer: of it."""

    key: str
    spec: Spec
    path: str
    layer: int | None
    rank: int = 0  # of an alpha


@dataclasses.dataclass(frozen=True)
class ToLora:
    """Adapters on their way out. layout: the tensors in the order in which they are written, the widest types first."""

    source: Parameters
    layout: tuple[LoraTensor, ...]

    @property
    def name(self) -> str:
        """Of the file, without its ending."""
        return f"{self.source.path.stem}-lora"

    @property
    def header(self) -> dict[str, Spec]:
        """Shape and type of every tensor, in the order in which they are written."""
        return {tensor.key: tensor.spec for tensor in self.layout}

    def tensors(self) -> Iterator[np.ndarray]:
        """Values in the order of the header; one parameter is in memory at a time."""
        scale, path, leaf = float(self.source.read(SCALE)), "", np.zeros(0)
        for tensor in self.layout:
            if tensor.rank:
                yield np.asarray(scale * tensor.rank, tensor.spec.dtype)
                continue
            if tensor.path != path:
                path, leaf = tensor.path, self.source.read(tensor.path)
            block = leaf if tensor.layer is None else leaf[tensor.layer]
            yield np.asarray(block.T, tensor.spec.dtype, order="C")

    def notes(self) -> list[str]:
        """Rounding."""
        return rounding(
            (self.source.header[tensor.path].dtype, tensor.spec.dtype) for tensor in self.layout if not tensor.rank
        )


def plan_lora(
    source: Parameters, model: str | None = None, settings: Sequence[str] = (), dtype: str | None = None
) -> ToLora:
    """Plans a LoRA file.

    Args:
      source: adapters as training wrote them (`is_adapters`).
      model: whose adapters they are; None: of any model that has all of the projections, in these shapes. Which one it
        is makes no difference where they share the names.
      settings: NAME=NUMBER, for other sizes than the released ones and those of presets.
      dtype: of the matrices; None keeps what the file has.
    Raises:
      UserError: projections that no model has, of other shapes, or that torch does not hold as a linear weight
        (ConversionError, which lists them all), or models that disagree about names.
    """
    problems = [
        f"unexpected: {path}" for path in source.header if path != SCALE and not path.startswith(f"{ADAPTERS}/")
    ]
    problems += [f"mis-shaped: {SCALE} is no single number"] * (source.header[SCALE].size != 1)
    pairs = _pairs(source.header, problems)
    if problems:
        raise ConversionError(str(source.path), problems)
    transformers = [name for name, one in MODELS.items() if isinstance(one.cfg, DiTConfig)]
    if model not in (None, *transformers):
        raise UserError(f"{source.path} holds adapters, and {model} has none: --model {', '.join(transformers)}")
    found = identify_parameters([f"{path}/kernel" for path in pairs], transformers) if model is None else []
    known = [MODELS[model]] if model else [match.model for match in found if match.known == 1]
    if not known:
        raise UserError(f"{source.path}: no transformer ({', '.join(transformers)}) has all of {', '.join(pairs)}")
    wanted = None if dtype is None else np.dtype(dtype)
    plans: dict[tuple[LoraTensor, ...], str] = {}
    refused: list[ConversionError] = []
    for one in known:
        for cfg in (configured(one.cfg, settings),) if settings else known_sizes(one):
            tree = traverse_util.flatten_dict(one.tree(cfg), sep="/")
            try:
                plans.setdefault(_layout(pairs, one.naming().table(cfg), tree, str(source.path), wanted), one.name)
                break
            except ConversionError as error:
                refused.append(error)
    if not plans:
        raise refused[0]
    if len(plans) > 1:
        raise UserError(f"{source.path} may be of {' or '.join(plans.values())}: say --model")
    return ToLora(source, next(iter(plans)))


def _pairs(header: Mapping[str, Spec], problems: list[str]) -> dict[str, dict[str, Spec]]:
    """Path of a projection -> its two matrices."""
    pairs: dict[str, dict[str, Spec]] = {}
    for path, spec in header.items():
        if not path.startswith(f"{ADAPTERS}/"):
            continue
        projection, _, part = path.removeprefix(f"{ADAPTERS}/").rpartition("/")
        if part not in PARTS:
            problems.append(f"unexpected: {path}")
        elif not jnp.issubdtype(spec.dtype, jnp.floating):
            problems.append(f"mis-typed: {path} is {spec.dtype}, adapters are floating numbers")
        pairs.setdefault(projection, {})[part] = spec
    for projection, pair in pairs.items():
        problems += [f"missing: {ADAPTERS}/{projection}/{part}" for part in PARTS if part not in pair]
    return dict(sorted(pairs.items()))


def _layout(
    pairs: Mapping[str, Mapping[str, Spec]], table: Table, tree: Mapping, name: str, dtype: np.dtype | None
) -> tuple[LoraTensor, ...]:
    """The tensors of adapters, which the rules of a table name; raises ConversionError where they do not fit a tree."""
    tensors: list[LoraTensor] = []
    problems: list[str] = []
    for projection, pair in pairs.items():
        kernel = f"{projection}/kernel"
        rules = [(rule, key) for rule in table.compiled if (key := rule.backwards(kernel)) is not None]
        if kernel not in tree or not rules:
            problems.append(f"unexpected: the model has no {kernel}")
            continue
        rule, key = rules[0]
        if len(rules) > 1 or rule.rule.transform != "linear" or not key(0).endswith(WEIGHT):
            problems.append(f"not linear: {kernel} is {rule.rule.transform} in torch, a LoRA file holds linear layers")
            continue
        *stack, rows, columns = tree[kernel].shape
        rank = pair["up"].shape[-2] if len(pair["up"].shape) > 1 else 0
        for part, shape in (("down", (*stack, rows, rank)), ("up", (*stack, rank, columns))):
            if pair[part].shape != shape or not rank:
                text = f"[{', '.join(map(str, (*stack, rows, 'r') if part == 'down' else (*stack, 'r', columns)))}]"
                problems.append(
                    f"mis-shaped: {ADAPTERS}/{projection}/{part} is {list(pair[part].shape)}, the model wants {text}"
                )
        for layer in range(stack[0]) if rule.stacked else [None]:
            start = PREFIX + key(layer).removesuffix(WEIGHT)
            alpha = Spec((), np.dtype(np.float32))
            tensors.append(LoraTensor(f"{start}.alpha", alpha, SCALE, None, rank))
            for part, ending in PARTS.items():
                spec = pair[part].cast(dtype)
                spec = Spec(spec.shape[:-3:-1], spec.dtype)
                tensors.append(LoraTensor(start + ending, spec, f"{ADAPTERS}/{projection}/{part}", layer))
    if problems:
        raise ConversionError(name, problems)
    return tuple(sorted(tensors, key=lambda tensor: (-tensor.spec.dtype.itemsize, tensor.rank > 0, tensor.path)))
