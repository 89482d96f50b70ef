"""Strict checkpoint conversion: one table of rules per model, run forwards and backwards.

A `Table` holds `Rule(pattern, target, transform)` lines. `pattern` is a regular expression that must match a whole
torch key; it is made of literals (`\\.` for a dot) and plain capture groups without nesting, so that it can also be
filled in backwards. `target` is the path in the Flax tree; `{1}`, `{2}`, ... or `{name}` stand for the pattern's
groups. A group called `layer` is not in the target: it is the index on axis 0 of a stacked (scanned) parameter.

    Rule(r"blocks\\.(?P<layer>\\d+)\\.ffn\\.0\\.weight", "blocks/ffn/up/kernel", "linear")
    Rule(r"(encoder|decoder)\\.head\\.0\\.gamma", "{1}/head/norm/scale", "vector3")

Every disagreement between file, table and tree is collected and raised once, as a `ConversionError`.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from emv3_jax.errors import UserError

LAYER = "layer"  # name of the group that counts layers


class ConversionError(UserError):
    """A checkpoint, its table and the model's tree disagree; `problems` holds one line per key."""

    def __init__(self, source_name: str, problems: Iterable[str]):
        self.source_name = source_name
        self.problems = tuple(problems)
        count = len(self.problems)
        lines = "".join(f"\n  {line}" for line in self.problems)
        super().__init__(f"{source_name}: {count} {'key does' if count == 1 else 'keys do'} not fit the model:{lines}")


@dataclasses.dataclass(frozen=True)
class Transform:
    """How one tensor changes its layout; `inverse` undoes `forward` bit by bit."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


def _permute(*axes: int) -> Transform:
    back = tuple(int(i) for i in np.argsort(axes))
    return Transform(lambda x: x.transpose(axes), lambda x: x.transpose(back))


def _drop(rank: int, ones: tuple[int, ...], then: Transform | None = None) -> Transform:
    """Drops the unit axes `ones` of a tensor of `rank` axes, then permutes."""

    def forward(x: np.ndarray) -> np.ndarray:
        if x.ndim != rank:
            raise ValueError(f"rank {x.ndim} is not {rank}")
        x = np.squeeze(x, axis=ones)
        return then.forward(x) if then else x

    def inverse(x: np.ndarray) -> np.ndarray:
        return np.expand_dims(then.inverse(x) if then else x, axis=ones)

    return Transform(forward, inverse)


TRANSFORMS: dict[str, Transform] = {
    "identity": Transform(lambda x: x, lambda x: x),
    "linear": _permute(1, 0),  # [O, I] -> [I, O]
    "conv1d": _permute(2, 1, 0),  # OIK -> KIO
    "conv2d": _permute(2, 3, 1, 0),  # OIHW -> HWIO
    "conv3d": _permute(2, 3, 4, 1, 0),  # OIDHW -> DHWIO
    "pointwise2d": _drop(4, (2, 3), _permute(1, 0)),  # [O, I, 1, 1] -> [I, O]
    "pointwise3d": _drop(5, (2, 3, 4), _permute(1, 0)),  # [O, I, 1, 1, 1] -> [I, O]
    "temporal": _drop(5, (3, 4), _permute(2, 1, 0)),  # [O, I, K, 1, 1] -> [K, I, O]
    "vector2": _drop(3, (1, 2)),  # [C, 1, 1] -> [C]
    "vector3": _drop(4, (1, 2, 3)),  # [C, 1, 1, 1] -> [C]
    "unbatch": _drop(3, (0,)),  # [1, A, B] -> [A, B]
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table: torch keys that fully match `pattern` become `target` by way of `transform`."""

    pattern: str
    target: str
    transform: str = "identity"


@dataclasses.dataclass(frozen=True)
class Ignore:
    """Torch keys that are left out on purpose, and why."""

    pattern: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Table:
    """All rules of one model. A malformed rule raises ValueError when the table is built."""

    name: str
    rules: tuple[Rule, ...]
    ignored: tuple[Ignore, ...] = ()

    def __post_init__(self):
        for rule in self.rules:
            if rule.transform not in TRANSFORMS:
                raise ValueError(f"table {self.name}: unknown transform {rule.transform!r}")
            _Compiled(rule)
        if any(not ignore.reason for ignore in self.ignored):
            raise ValueError(f"table {self.name}: an ignored key needs a reason")


def linear_rules(source: str, target: str, bias: bool = True) -> tuple[Rule, ...]:
    """Rules of an `nn.Linear`: kernel, and bias unless it has none."""
    kernel = Rule(source + r"\.weight", target + "/kernel", "linear")
    return (kernel, Rule(source + r"\.bias", target + "/bias")) if bias else (kernel,)


def norm_rules(source: str, target: str, bias: bool = True) -> tuple[Rule, ...]:
    """Rules of a LayerNorm, or of an RMS norm with `bias=False`."""
    scale = Rule(source + r"\.weight", target + "/scale")
    return (scale, Rule(source + r"\.bias", target + "/bias")) if bias else (scale,)


def conv_rules(source: str, target: str, transform: str) -> tuple[Rule, ...]:
    """Rules of a convolution with bias; `transform` names the layout (conv2d, conv3d, temporal, pointwise2d, ...)."""
    return (Rule(source + r"\.weight", target + "/kernel", transform), Rule(source + r"\.bias", target + "/bias"))


class _Compiled:
    """A rule made ready to run both ways."""

    _GROUP = re.compile(r"\((?:\?P<(?P<name>\w+)>)?(?P<body>[^()]*)\)")

    def __init__(self, rule: Rule):
        self.rule = rule
        self.source = re.compile(rule.pattern)
        self.stacked = LAYER in self.source.groupindex
        self.transform = TRANSFORMS[rule.transform]
        groups = [(m["name"] or str(i + 1), m["body"]) for i, m in enumerate(self._GROUP.finditer(rule.pattern))]
        self._names = [name for name, _ in groups]
        literals = self._GROUP.sub("\0", rule.pattern).split("\0")
        if len(groups) != self.source.groups or any(
            re.search(r"[.\\()\[\]{}*+?|^$]", s.replace(r"\.", "")) for s in literals
        ):
            raise ValueError(f"pattern {rule.pattern!r} is more than literals and plain groups, so it has no inverse")
        self._literals = [part.replace(r"\.", ".") for part in literals]
        bodies = {name: body for name, body in groups}
        holes = re.findall(r"{(\w+)}", rule.target)
        numbered = {str(i + 1): name for i, name in enumerate(self._names)}
        self._holes = [numbered.get(hole, hole) for hole in holes]
        if sorted(self._holes) != sorted(name for name in self._names if name != LAYER):
            raise ValueError(f"target {rule.target!r} must use every group of {rule.pattern!r} once, except {LAYER}")
        pieces = re.split(r"{\w+}", rule.target)
        regex = re.escape(pieces[0])
        for hole, piece in zip(self._holes, pieces[1:], strict=True):
            regex += f"({bodies[hole]})" + re.escape(piece)
        self.target = re.compile(regex)

    def forwards(self, key: str) -> tuple[str, int | None] | None:
        """Torch key -> (path, layer or None), or None where the rule does not match."""
        match = self.source.fullmatch(key)
        if match is None:
            return None
        path = self.rule.target.format("", *match.groups(), **match.groupdict())
        return path, int(match[LAYER]) if self.stacked else None

    def backwards(self, path: str) -> Callable[[int | None], str] | None:
        """Path -> function from layer (or None) to the torch key, or None where the rule does not match."""
        match = self.target.fullmatch(path)
        if match is None:
            return None
        values = dict(zip(self._holes, match.groups(), strict=True))

        def key(layer: int | None) -> str:
            filled = [str(layer) if name == LAYER else values[name] for name in self._names]
            return self._literals[0] + "".join(v + part for v, part in zip(filled, self._literals[1:], strict=True))

        return key

    def source_shape(self, target_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape that the torch tensor of one layer must have."""
        shape = target_shape[1:] if self.stacked else target_shape
        return self.transform.inverse(np.broadcast_to(np.float32(0), shape)).shape


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one torch tensor belongs: a path of the tree, and a layer of it if the parameter is stacked."""

    rule: _Compiled
    path: str
    layer: int | None
    shape: tuple[int, ...]


def expected_slots(table: Table, flat: Mapping[str, Any], problems: list[str], absent: str) -> dict[str, Slot]:
    """Runs the table backwards over the tree: torch key -> slot."""
    compiled = [_Compiled(rule) for rule in table.rules]
    slots: dict[str, Slot] = {}
    for path, leaf in flat.items():
        found = [(rule, key) for rule in compiled if (key := rule.backwards(path)) is not None]
        if len(found) != 1:
            word = "no rule leads to" if not found else f"doubled: {len(found)} rules lead to"
            problems.append(f"{word} {path} ({absent})")
            continue
        rule, key = found[0]
        for layer in range(leaf.shape[0]) if rule.stacked else [None]:
            try:
                shape = rule.source_shape(tuple(leaf.shape))
            except ValueError:
                problems.append(f"mis-shaped: {path} {tuple(leaf.shape)} cannot come from {rule.rule.transform!r}")
                break
            slots[key(layer)] = Slot(rule, path, layer, shape)
    return slots


def _check_keys(table: Table, tensors: Mapping[str, Any], slots: Mapping[str, Slot], problems: list[str]) -> None:
    """Finds keys that nobody wants, that two rules want, or that share a place."""
    compiled = [_Compiled(rule) for rule in table.rules]
    ignored = [re.compile(ignore.pattern) for ignore in table.ignored]
    taken: dict[tuple[str, int | None], str] = {}
    for key in tensors:
        places = [place for rule in compiled if (place := rule.forwards(key)) is not None]
        matches = len(places) + sum(pattern.fullmatch(key) is not None for pattern in ignored)
        if matches > 1:
            problems.append(f"doubled: {key} matches {matches} rules of the {table.name} table")
        elif places and places[0] in taken:
            problems.append(f"doubled: {key} and {taken[places[0]]} both become {places[0][0]}")
        elif places and key in slots:
            taken[places[0]] = key
        elif not matches or places:
            problems.append(f"unexpected: {key}")


def to_jax(table: Table, tensors: Mapping[str, np.ndarray], target_tree: Mapping, source_name: str) -> dict:
    """Torch tensors -> nested parameter tree, bit for bit (dtypes are kept).

    `tensors` may be any mapping, read one tensor at a time. `target_tree` is the model's own params tree; its leaves
    need only a shape (`jax.eval_shape` of init). `source_name` names the file in errors.

    Raises ConversionError, listing every missing, unexpected, mis-shaped and doubled key together.
    """
    flat = traverse_util.flatten_dict(target_tree, sep="/")
    problems: list[str] = []
    slots = expected_slots(table, flat, problems, "the table is incomplete")
    problems += [f"missing: {key}" for key in slots if key not in tensors]
    _check_keys(table, tensors, slots, problems)
    out: dict[str, np.ndarray] = {}
    for key, slot in slots.items():
        if key not in tensors:
            continue
        tensor = np.asarray(tensors[key])
        if tensor.shape != slot.shape:
            problems.append(f"mis-shaped: {key} is {list(tensor.shape)}, the model wants {list(slot.shape)}")
            continue
        tensor = slot.rule.transform.forward(tensor)
        if slot.layer is None:
            out[slot.path] = np.asarray(tensor, order="C")
            continue
        stack = out.setdefault(slot.path, np.empty(flat[slot.path].shape, tensor.dtype))
        if stack.dtype != tensor.dtype:
            problems.append(f"mis-typed: {key} is {tensor.dtype}, other layers are {stack.dtype}")
        stack[slot.layer] = tensor
    if problems:
        raise ConversionError(source_name, problems)
    return traverse_util.unflatten_dict(out, sep="/")


def to_torch(
    table: Table, params: Mapping, target_tree: Mapping | None = None, source_name: str = "params"
) -> dict[str, np.ndarray]:
    """Nested parameter tree -> torch tensors, the exact inverse of `to_jax`.

    With a `target_tree`, the parameters must also be exactly those of the model. Raises ConversionError.
    """
    flat = {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}
    problems: list[str] = []
    slots = expected_slots(table, flat, problems, "unexpected parameter")
    if target_tree is not None:
        wanted = traverse_util.flatten_dict(target_tree, sep="/")
        problems += [f"missing: {path}" for path in wanted if path not in flat]
        problems += [f"unexpected: {path}" for path in flat if path not in wanted]
        problems += [
            f"mis-shaped: {path} is {list(flat[path].shape)}, the model wants {list(leaf.shape)}"
            for path, leaf in wanted.items()
            if path in flat and flat[path].shape != tuple(leaf.shape)
        ]
    if problems:
        raise ConversionError(source_name, problems)
    return {
        key: np.asarray(
            slot.rule.transform.inverse(flat[slot.path] if slot.layer is None else flat[slot.path][slot.layer]),
            order="C",
        )
        for key, slot in slots.items()
    }


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a .safetensors file into numpy arrays; raises UserError if there is none or it is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give the path of a .safetensors file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable .safetensors file ({error}); fetch or save it again") from error
