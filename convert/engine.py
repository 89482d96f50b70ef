"""Strict checkpoint conversion: one table of rules per model (`convert.rules`), run forwards and backwards.

A plan is made from shapes alone (`plan_to_jax`, `plan_to_torch`): every disagreement between file, table and tree is
collected and raised once, as a `ConversionError`, before a tensor is read. The parameters of a plan are then produced
one at a time, stacked ones layer by layer.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from convert.rules import CompiledRule, Table
from convert.sources import Spec
from emv3_jax.errors import UserError


class ConversionError(UserError):
    """A checkpoint, its table and the model's tree disagree; `problems` holds one line per key."""

    def __init__(self, source_name: str, problems: Iterable[str], hint: str = ""):
        self.source_name = source_name
        self.problems = tuple(problems)
        count = len(self.problems)
        super().__init__(
            f"{source_name}: {count} {'key does' if count == 1 else 'keys do'} not fit the model:",
            (*(f"  {line}" for line in self.problems), *([hint] if hint else [])),
        )


def specs(tensors: Mapping[str, Any]) -> dict[str, Spec]:
    """Header of tensors that are in memory."""
    return {key: Spec(tuple(x.shape), np.dtype(x.dtype)) for key, x in tensors.items()}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A torch checkpoint as a plan sees it: `header` says what `read(key)` would return.

    `target_tree` is that of the checkpoint's own model, whose leaves need only a shape.
    """

    name: str
    table: Table
    target_tree: Mapping
    header: Mapping[str, Spec]
    read: Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one torch tensor belongs: a path of the tree, and a layer of it if the parameter is stacked."""

    rule: CompiledRule
    path: str
    layer: int | None
    shape: tuple[int, ...]  # of the torch tensor

    def of(self, block: np.ndarray) -> np.ndarray:
        """The view of one layer's block that this tensor fills, in the parameter's layout."""
        index, parts = self.rule.rule.part
        width = block.shape[-1] // parts if parts > 1 else 0
        return block[..., index * width : (index + 1) * width] if parts > 1 else block


@dataclasses.dataclass(frozen=True)
class Piece:
    """One torch tensor on its way to its slot."""

    checkpoint: Checkpoint
    key: str
    slot: Slot

    def read(self) -> np.ndarray:
        """The tensor in the parameter's layout (a view where possible)."""
        return self.slot.rule.transform.forward(self.checkpoint.read(self.key))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of the model and where its values come from; nothing is read until asked for."""

    path: str
    spec: Spec
    layers: Mapping[int | None, tuple[Piece, ...]]  # None: not stacked

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Shape of what one block fills: a layer, with its axis, or all."""
        return self.spec.shape if None in self.layers else (1, *self.spec.shape[1:])

    def blocks(self) -> Iterator[tuple[int | None, np.ndarray]]:
        """Layer by layer: (index on axis 0, values), or once (None, values) where the parameter is not stacked."""
        for layer, pieces in self.layers.items():
            if len(pieces) == 1:
                yield layer, np.asarray(pieces[0].read(), self.spec.dtype, order="C")
                continue
            block = np.empty(self.spec.shape if layer is None else self.spec.shape[1:], self.spec.dtype)
            for piece in pieces:
                piece.slot.of(block)[...] = piece.read()
            yield layer, block

    def array(self) -> np.ndarray:
        """The whole parameter."""
        out = np.empty(self.spec.shape, self.spec.dtype)
        for layer, block in self.blocks():
            out[... if layer is None else layer] = block
        return out


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion that is known to fit. `ignored`, `replaced`: keys of the checkpoints that are not used, by name."""

    leaves: tuple[Leaf, ...]
    ignored: Mapping[str, tuple[str, ...]]
    replaced: Mapping[str, tuple[str, ...]]

    def kept(self, checkpoint: Checkpoint) -> list[str]:
        """Keys whose values come from `checkpoint`."""
        pieces = (piece for leaf in self.leaves for layer in leaf.layers.values() for piece in layer)
        return [piece.key for piece in pieces if piece.checkpoint is checkpoint]


def plan_to_jax(
    checkpoints: Sequence[Checkpoint], target_tree: Mapping | None = None, dtype: np.dtype | None = None
) -> Plan:
    """Finds the torch tensors of every parameter, from headers alone.

    Args:
      checkpoints: laid over one another, the topmost first. A layer of a parameter comes whole from the first that has
        any of it. All but the first may lack what those above them have.
      target_tree: the parameters that are wanted; by default those of the first checkpoint's model.
      dtype: of all parameters; None keeps what the checkpoints have.
    Raises:
      ConversionError: lists every missing, unexpected, mis-shaped, mis-typed and doubled key together.
    """
    top = checkpoints[0]
    flat = traverse_util.flatten_dict(top.target_tree if target_tree is None else target_tree, sep="/")
    problems: list[str] = []
    ignored: dict[str, tuple[str, ...]] = {}
    replaced: dict[str, tuple[str, ...]] = {}
    chosen: dict[str, dict[int | None, tuple[Piece, ...]]] = {path: {} for path in flat}
    missing: dict[tuple[str, int | None], list[str]] = {}
    for checkpoint in checkpoints:
        found, ignored[checkpoint.name] = _match(checkpoint, problems, prefix=len(checkpoints) > 1)
        spare: list[str] = []
        for (path, layer), pieces in found.items():
            present = [piece for piece in pieces if piece.key in checkpoint.header]
            absent = [piece.key for piece in pieces if piece.key not in checkpoint.header]
            if path not in chosen or layer in chosen[path]:
                spare += [piece.key for piece in present]
            elif present and not absent:
                chosen[path][layer] = pieces
                missing.pop((path, layer), None)
            elif present or checkpoint is top:
                missing[path, layer] = absent
                if present:  # a layer is not made of two files
                    chosen[path][layer] = ()
        replaced[checkpoint.name] = tuple(spare)
    problems += [f"missing: {key}" for keys in missing.values() for key in keys]
    leaves = []
    for path, leaf in flat.items():
        used = [piece for layer in chosen[path].values() for piece in layer]
        if used:
            first = used[0].checkpoint.header[used[0].key].dtype
            problems += _mistyped(used, first, mixed=dtype is not None)
            spec = Spec(tuple(leaf.shape), first).cast(dtype)
            leaves.append(Leaf(path, spec, dict(sorted(chosen[path].items(), key=lambda item: item[0] or 0))))
    if problems:
        raise ConversionError(" over ".join(checkpoint.name for checkpoint in checkpoints), problems)
    return Plan(tuple(leaves), ignored, replaced)


def _match(
    checkpoint: Checkpoint, problems: list[str], prefix: bool
) -> tuple[dict[tuple[str, int | None], tuple[Piece, ...]], tuple[str, ...]]:
    """Pieces of each layer of each parameter that the checkpoint's own model has, and the keys that are ignored."""
    own: list[str] = []
    slots = expected_slots(
        checkpoint.table,
        traverse_util.flatten_dict(checkpoint.target_tree, sep="/"),
        own,
        "the table is incomplete",
    )
    ignored = _check_keys(checkpoint.table, checkpoint.header, slots, own)
    pieces: dict[tuple[str, int | None], tuple[Piece, ...]] = {}
    for key, slot in slots.items():
        place = slot.path, slot.layer
        pieces[place] = (*pieces.get(place, ()), Piece(checkpoint, key, slot))
        if key in checkpoint.header and checkpoint.header[key].shape != slot.shape:
            shape = list(checkpoint.header[key].shape)
            own.append(f"mis-shaped: {key} is {shape}, the model wants {list(slot.shape)}")
    problems += [f"{checkpoint.name}: {line}" if prefix else line for line in own]
    return pieces, ignored


def _mistyped(pieces: list[Piece], first: np.dtype, mixed: bool) -> Iterator[str]:
    """Tensors that are no floating numbers, or of another type than the rest of their parameter unless `mixed`."""
    for piece in pieces:
        dtype = piece.checkpoint.header[piece.key].dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            yield f"mis-typed: {piece.key} is {dtype}, the model wants floating numbers"
        elif dtype != first and not mixed:
            yield f"mis-typed: {piece.key} is {dtype}, other parts of {piece.slot.path} are {first} (see --dtype)"


def expected_slots(table: Table, flat: Mapping[str, Any], problems: list[str], absent: str) -> dict[str, Slot]:
    """Runs the table backwards over the tree: torch key -> slot. `absent` explains a path that no rule leads to."""
    slots: dict[str, Slot] = {}
    for path, leaf in flat.items():
        found = [(rule, key) for rule in table.compiled if (key := rule.backwards(path)) is not None]
        if wrong := _incomplete([rule for rule, _ in found], path):
            problems.append(f"{wrong} ({absent})")
            continue
        for rule, key in found:
            for layer in range(leaf.shape[0]) if rule.stacked else [None]:
                try:
                    shape = rule.source_shape(tuple(leaf.shape))
                except ValueError:
                    problems.append(f"mis-shaped: {path} {tuple(leaf.shape)} cannot come from {rule.rule.transform!r}")
                    break
                slots[key(layer)] = Slot(rule, path, layer, shape)
    return slots


def parameter_shapes(table: Table, header: Mapping[str, Spec]) -> dict[str, tuple[int, ...]]:
    """Shapes that the parameters would have if the file were right: what sizes a model of this file has."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, spec in header.items():
        for rule in table.compiled:
            if (place := rule.forwards(key)) is None:
                continue
            path, layer = place
            try:
                shape = rule.transform.forward(np.broadcast_to(np.float32(0), spec.shape)).shape
            except ValueError:
                continue  # of another rank: it will be reported as mis-shaped
            if rule.rule.part[1] > 1 and shape:
                shape = (*shape[:-1], shape[-1] * rule.rule.part[1])
            if layer is not None:
                shape = (max(layer + 1, shapes.get(path, (0,))[0]), *shape)
            shapes[path] = shape
    return shapes


def _incomplete(rules: list[CompiledRule], path: str) -> str:
    """What is wrong with the rules that lead to one path: they must be all of its parts, once each; "" if they are."""
    if not rules:
        return f"no rule leads to {path}"
    parts = sorted(rule.rule.part for rule in rules)
    count = parts[0][1]
    if len({rule.stacked for rule in rules}) == 1 and parts == [(i, count) for i in range(count)]:
        return ""
    if len(set(parts)) < len(parts):
        return f"doubled: {len(parts)} rules lead to {path}"
    return f"parts {', '.join(f'{i} of {n}' for i, n in parts)} lead to {path}, which is not all of it"


def _check_keys(table: Table, keys: Iterable[str], slots: Mapping[str, Slot], problems: list[str]) -> tuple[str, ...]:
    """Finds keys that nobody wants, that two rules want, or that share a place; returns the ignored ones."""
    ignored: list[str] = []
    taken: dict[tuple[str, int | None, int], str] = {}
    for key in keys:
        places = [(*place, rule.rule.part[0]) for rule in table.compiled if (place := rule.forwards(key)) is not None]
        excuses = sum(re.fullmatch(ignore.pattern, key) is not None for ignore in table.ignored)
        if len(places) + excuses > 1:
            problems.append(f"doubled: {key} matches {len(places) + excuses} rules of the {table.name} table")
        elif excuses:
            ignored.append(key)
        elif places and places[0] in taken:
            problems.append(f"doubled: {key} and {taken[places[0]]} both become {places[0][0]}")
        elif places and key in slots:
            taken[places[0]] = key
        else:
            problems.append(f"unexpected: {key}")
    return tuple(ignored)


def to_jax(table: Table, tensors: Mapping[str, np.ndarray], target_tree: Mapping, source_name: str) -> dict:
    """Torch tensors -> nested parameter tree, bit for bit (dtypes are kept).

    `target_tree` is the model's own params tree; its leaves need only a shape (`jax.eval_shape` of init).
    `source_name` names the file in errors. Raises ConversionError, see `plan_to_jax`.
    """
    checkpoint = Checkpoint(source_name, table, target_tree, specs(tensors), tensors.__getitem__)
    leaves = plan_to_jax([checkpoint]).leaves
    return traverse_util.unflatten_dict({leaf.path: leaf.array() for leaf in leaves}, sep="/")


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """One torch tensor and the place in the model's parameters where its values stand."""

    key: str
    slot: Slot
    spec: Spec

    def of(self, leaf: np.ndarray) -> np.ndarray:
        """Its values, given those of the whole parameter."""
        block = self.slot.of(leaf if self.slot.layer is None else leaf[self.slot.layer])
        return np.asarray(self.slot.rule.transform.inverse(block), self.spec.dtype, order="C")


def plan_to_torch(
    table: Table,
    header: Mapping[str, Spec],
    target_tree: Mapping | None = None,
    source_name: str = "params",
    dtype: np.dtype | None = None,
) -> dict[str, list[TorchTensor]]:
    """The torch tensors that every parameter becomes: path -> tensors. The exact inverse of `plan_to_jax`.

    With a `target_tree`, the parameters must also be exactly those of the model. `dtype`: of all tensors; None keeps
    what the parameters have. Raises ConversionError.
    """
    problems: list[str] = []
    slots = expected_slots(table, header, problems, "unexpected parameter")
    if target_tree is not None:
        wanted = traverse_util.flatten_dict(target_tree, sep="/")
        problems += [f"missing: {path}" for path in wanted if path not in header]
        problems += [f"unexpected: {path}" for path in header if path not in wanted]
        problems += [
            f"mis-shaped: {path} is {list(header[path].shape)}, the model wants {list(leaf.shape)}"
            for path, leaf in wanted.items()
            if path in header and header[path].shape != tuple(leaf.shape)
        ]
    if problems:
        raise ConversionError(source_name, problems)
    out: dict[str, list[TorchTensor]] = {path: [] for path in header}
    for key, slot in slots.items():
        out[slot.path].append(TorchTensor(key, slot, Spec(slot.shape, header[slot.path].dtype).cast(dtype)))
    return out


def to_torch(
    table: Table, params: Mapping, target_tree: Mapping | None = None, source_name: str = "params"
) -> dict[str, np.ndarray]:
    """Nested parameter tree -> torch tensors, the exact inverse of `to_jax`; see `plan_to_torch`."""
    flat = {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}
    plan = plan_to_torch(table, specs(flat), target_tree, source_name)
    return {tensor.key: tensor.of(flat[path]) for path, tensors in plan.items() for tensor in tensors}
