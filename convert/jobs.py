"""Conversions as jobs: planned and checked from headers first, then run; what stands behind `python -m convert`."""

import contextlib
import dataclasses
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from convert import engine
from convert.engine import Checkpoint, ConversionError, Plan, TorchTensor
from convert.parameters import METADATA, Parameters, open_converted
from convert.registry import (
    GUESSED,
    MODELS,
    Match,
    Model,
    config_from,
    configured,
    identify,
    identify_one,
    identify_parameters,
    known_sizes,
    read_config,
)
from convert.sources import Source, Spec, open_source, sha256
from convert.writers import BATCH_BYTES, OnBytes, SafetensorsWriter, check_space, staged, write_orbax
from emv3_jax.converted import Record
from emv3_jax.errors import UserError

DTYPES = ("float32", "bfloat16")


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[OnBytes]:
    """A bar of bytes on a terminal; silent elsewhere."""
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        yield bar.update


def groups(keys: Iterable[str]) -> str:
    """A short account of many keys: `blocks.*.self_attn (240), head (3)`."""
    counts = Counter(".".join("*" if part.isdigit() else part for part in key.split(".")[:-1][:3]) for key in keys)
    return ", ".join(f"{group or '(top)'} ({count})" for group, count in counts.items())


def rounding(types: Iterable[tuple[np.dtype, np.dtype]]) -> list[str]:
    """Lines that say so where values of one type are written as another that does not hold all of them."""
    rounded = {(str(old), str(new)) for old, new in set(types) if jnp.promote_types(old, new) != new}
    return [
        f"values are rounded from {', '.join(sorted(old for old, to in rounded if to == new))} to {new}"
        for new in sorted({new for _, new in rounded})
    ]


def best_match(header: Mapping[str, Spec], model: str, naming: str | None = None) -> Match:
    """The naming and form of a known model that fits a file best, even if it fits badly."""
    if found := identify(header, [model], naming):
        return found[0]
    family = MODELS[model].naming(naming)
    return Match(MODELS[model], family, next(iter(family.forms)), MODELS[model].cfg, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class ToJax:
    """One model on its way in; everything is known to fit. `checkpoints`: the topmost first."""

    match: Match
    cfg: Any
    sources: tuple[Source, ...]
    checkpoints: tuple[Checkpoint, ...]
    plan: Plan

    @property
    def header(self) -> dict[str, Spec]:
        """Shape and type of every parameter."""
        return {leaf.path: leaf.spec for leaf in self.plan.leaves}

    def notes(self) -> list[str]:
        """What a user should know: tensors left out, what stays of the base, rounding."""
        lines = []
        top, *below = self.checkpoints
        for checkpoint in self.checkpoints:
            whose = "" if checkpoint is top else f"of the base {checkpoint.name} "
            for ignore in checkpoint.table.ignored:
                keys = [key for key in self.plan.ignored[checkpoint.name] if re.fullmatch(ignore.pattern, key)]
                if keys:
                    lines.append(f"{len(keys)} tensors {whose}left out: {groups(keys)} ({ignore.reason})")
        for base in below:
            kept, replaced = self.plan.kept(base), self.plan.replaced[base.name]
            lines.append(f"{len(kept)} tensors stay from the base {base.name}: {groups(kept) or 'none'}")
            lines.append(f"{len(replaced)} of its tensors are replaced: {groups(replaced) or 'none'}")
        return lines + rounding(
            (piece.checkpoint.header[piece.key].dtype, leaf.spec.dtype)
            for leaf in self.plan.leaves
            for layer in leaf.layers.values()
            for piece in layer
        )

    def record(self) -> Record:
        """The record, without the files that are not written yet. Reads every source once, for its SHA-256."""
        files = list(dict.fromkeys(path for source in self.sources for path in source.files))
        sources = tuple(
            {"file": path.name, **described} for path, described in zip(files, _described(files), strict=True)
        )
        dtypes = sorted({str(spec.dtype) for spec in self.header.values()})
        values = sum(spec.size for spec in self.header.values())
        config = json.loads(json.dumps(dataclasses.asdict(self.cfg)))  # tuples become lists, as when read again
        return Record(
            model=self.match.model.name, config=config, naming=self.match.naming.name, form=self.match.form,
            dtype=", ".join(dtypes), sources=sources, values=values, files={},
        )  # fmt: skip


def plan_to_jax(
    path: Path,
    model: str | None = None,
    settings: Sequence[str] = (),
    dtype: str | None = None,
    base: Path | None = None,
) -> ToJax:
    """Plans the conversion of a torch checkpoint.

    Args:
      path: a file, or a folder that holds one checkpoint.
      model: name in the registry; None: told by the keys.
      settings: NAME=NUMBER, for other sizes than the released ones.
      dtype: of all parameters; None keeps the file's.
      base: a checkpoint to take the tensors from that `path` lacks.
    Raises:
      UserError: a file cannot be used, or does not fit (ConversionError, which lists all that is wrong with it).
    """
    source = open_source(path)
    match = best_match(source.header, model) if model else identify_one(source.header, str(path))
    source = match.naming.prepare(source)
    cfg = configured(match.model.cfg, settings)
    sources, checkpoints = [source], [_checkpoint(source, match, cfg)]
    if base is not None:
        under = open_source(base)
        candidates = identify(under.header, (match.model.name, *match.model.bases))
        below = candidates[0] if candidates else match
        under = below.naming.prepare(under)
        sources.append(under)
        checkpoints.append(_checkpoint(under, below, cfg))
    try:
        plan = engine.plan_to_jax(checkpoints, dtype=None if dtype is None else np.dtype(dtype))
    except ConversionError as error:
        raise ConversionError(error.source_name, error.problems, _hint(error, match, source, base)) from None
    return ToJax(match, cfg, tuple(sources), tuple(checkpoints), plan)


def _checkpoint(source: Source, match: Match, cfg: Any) -> Checkpoint:
    return Checkpoint(str(source.path), match.table(cfg), match.model.tree(cfg), source.header, source.read)


def _sizes_hint(cfg: Any, model: Model) -> str:
    sizes = " ".join(f"--set {size}" for size in differences(cfg, model.cfg) if not size.startswith(GUESSED))
    return f"The file has other sizes; if that is meant: {sizes}" if sizes else ""


def _hint(error: ConversionError, match: Match, source: Source, base: Path | None) -> str:
    """What the user may have meant, where the disagreement looks like it."""
    kinds = {problem.split(":")[0] for problem in error.problems}
    if kinds == {"missing"} and base is None:
        return "If it is a fine-tune that holds only some of the tensors, lay it over the others with --base FILE."
    if match.known == 1 and "mis-shaped" in kinds:
        return _sizes_hint(read_config(match, source.header), match.model)
    return ""


def differences(cfg: Any, other: Any, prefix: str = "") -> list[str]:
    """NAME=VALUE of every field of `cfg` that is not as in `other`, as --set takes it."""
    lines = []
    for field in dataclasses.fields(cfg):
        value, was = getattr(cfg, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(value):
            lines += differences(value, was, f"{field.name}.")
        elif value != was:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            lines.append(f"{prefix}{field.name}={text}")
    return lines


def _described(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Bytes and sha256 of files, all of which are read."""
    sizes = [path.stat().st_size for path in files]
    with progress("SHA-256", sum(sizes)) as on_bytes:
        return [{"bytes": size, "sha256": sha256(path, on_bytes)} for path, size in zip(files, sizes, strict=True)]


def run_to_jax(job: ToJax, final: Path, overwrite: bool = False) -> bool:
    """Writes converted weights: an Orbax folder, or one file where `final` ends in .safetensors.

    The folder of `final` must be claimed. Returns False if `final` holds the same conversion of the same files already.
    Raises UserError; then `final` is as it was.
    """
    record = job.record()
    if final.exists() and not overwrite:
        with contextlib.suppress(UserError):  # anything else stands there, or something incomplete
            there = open_converted(final).record
            if there and dataclasses.replace(there, files={}) == record:
                return False
        raise UserError(f"{final} exists and holds something else: give --overwrite, or another output")
    total = sum(spec.nbytes for spec in job.header.values())
    check_space(final.parent, total)
    with staged(final) as partial, progress(job.match.model.name, total) as on_bytes:
        if final.suffix == ".safetensors":
            leaves = sorted(job.plan.leaves, key=lambda leaf: -leaf.spec.dtype.itemsize)
            header = {leaf.path: leaf.spec for leaf in leaves}
            metadata = {METADATA: json.dumps(dataclasses.asdict(record))}
            with SafetensorsWriter(partial, header, metadata) as writer:
                for leaf in leaves:
                    for _, block in leaf.blocks():
                        writer.write(block)
                        on_bytes(block.nbytes)
        else:
            write_orbax(partial, job.plan.leaves, on_bytes)
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            written = dict(zip((str(path.relative_to(partial)) for path in files), _described(files), strict=True))
            dataclasses.replace(record, files=written).write(partial)
    return True


@dataclasses.dataclass(frozen=True)
class ToTorch:
    """One model on its way out.

    original, extra: tensors that the model does not hold, as they are written, and the file they are copied from.
    left_out: why the released file has more keys, where it has.
    """

    model: Model
    source: Source
    plan: Mapping[str, list[TorchTensor]]
    original: Source | None
    extra: Mapping[str, Spec]
    left_out: tuple[str, ...]

    @property
    def name(self) -> str:
        """That of the model."""
        return self.model.name

    @property
    def header(self) -> dict[str, Spec]:
        """Shape and type of every tensor, the widest types first, in the order in which they are written."""
        specs: dict[str, Spec] = {}
        for parameters, extra in self._by_width():
            specs |= {tensor.key: tensor.spec for path in parameters for tensor in self.plan[path]}
            specs |= {key: self.extra[key] for key in extra}
        return specs

    def tensors(self) -> Iterator[np.ndarray]:
        """Values in the order of the header; some small parameters or one large one are in memory at a time."""
        for parameters, extra in self._by_width():
            batch: list[str] = []
            size = 0
            for path in parameters:
                nbytes = self.source.header[path].nbytes
                if batch and size + nbytes > BATCH_BYTES:
                    yield from self._values(batch)
                    batch, size = [], 0
                batch.append(path)
                size += nbytes
            yield from self._values(batch)
            if self.original is not None:
                yield from (np.asarray(self.original.read(key), self.extra[key].dtype, order="C") for key in extra)

    def notes(self) -> list[str]:
        """What a user should know: tensors that are not written, rounding."""
        lines = [
            f"not written, as the model does not hold it: {reason} (--base FILE copies it)"
            for reason in dict.fromkeys(self.left_out)
        ]
        types = [(self.source.header[path].dtype, tensors[0].spec.dtype) for path, tensors in self.plan.items()]
        if self.original is not None:
            types += [(self.original.header[key].dtype, spec.dtype) for key, spec in self.extra.items()]
        return lines + rounding(types)

    def _values(self, paths: list[str]) -> Iterator[np.ndarray]:
        leaves = self.source.read_many(paths) if paths else {}
        for path in paths:
            leaf = leaves.pop(path)
            yield from (tensor.of(leaf) for tensor in self.plan[path])

    def _by_width(self) -> list[tuple[list[str], list[str]]]:
        """(parameters, extra tensors) of each width of a value, the widest first."""
        parameters = {path: tensors[0].spec.dtype.itemsize for path, tensors in self.plan.items()}
        extra = {key: spec.dtype.itemsize for key, spec in self.extra.items()}
        return [
            ([path for path, size in parameters.items() if size == width],
             [key for key, size in extra.items() if size == width])
            for width in sorted({*parameters.values(), *extra.values()}, reverse=True)
        ]  # fmt: skip


def plan_to_torch(
    source: Parameters,
    model: str | None = None,
    settings: Sequence[str] = (),
    naming: str = "released",
    dtype: str | None = None,
    original: Path | None = None,
) -> ToTorch:
    """Plans the way back to torch tensors.

    Args:
      source: one model's parameters, with a record or, of training, without.
      model, settings: only for sources without a record; None: told by their paths, and the sizes are the released
        ones, or those of a preset.
      naming: of the torch keys.
      dtype: of all tensors of floating numbers; None keeps that of the parameters, and of what is copied.
      original: a file of the same model and naming, for the tensors that the model here does not hold.
    Raises:
      UserError: see `plan_to_jax`.
    """
    known, cfg = _known_model(source, model, settings)
    family = known.naming(naming)
    wanted = None if dtype is None else np.dtype(dtype)
    tree, path, record = known.tree(cfg), str(source.path), source.record
    if original is None:
        table = family.table(cfg, record.form if record and record.naming == naming else None)
        plan = engine.plan_to_torch(table, source.header, tree, path, wanted)
        return ToTorch(known, source, plan, None, {}, tuple(ignore.reason for ignore in table.ignored))
    under = open_source(original)
    match = best_match(under.header, known.name, naming)  # its form, which need not be that of the sources
    under = family.prepare(under)
    plan = engine.plan_to_torch(match.table(cfg), source.header, tree, path, wanted)
    checked = engine.plan_to_jax([_checkpoint(under, match, cfg)])
    extra = {key: under.header[key] for keys in checked.ignored.values() for key in keys}
    extra = {
        key: spec.cast(wanted) if jnp.issubdtype(spec.dtype, jnp.floating) else spec for key, spec in extra.items()
    }
    return ToTorch(known, source, plan, under, extra, ())


def _known_model(source: Parameters, name: str | None, settings: Sequence[str]) -> tuple[Model, Any]:
    """The model and config of parameters: what their record says, or else what their paths and shapes do."""
    if (record := source.record) is not None:
        if name not in (None, record.model):
            raise UserError(f"{source.path} holds {record.model}, not {name}")
        if record.model not in MODELS:
            raise UserError(f"{source.path} holds {record.model}, which this program does not know")
        return MODELS[record.model], configured(config_from(MODELS[record.model].cfg, record.config), settings)
    if name is None:
        name = identify_one(source.header, str(source.path), identify_parameters).model.name
    model = MODELS[name]
    sizes = (configured(model.cfg, settings),) if settings else known_sizes(model)
    refused: list[ConversionError] = []
    for cfg in sizes:
        problems = [
            f"mis-typed: {path} is {spec.dtype}, the model wants floating numbers"
            for path, spec in source.header.items()
            if not jnp.issubdtype(spec.dtype, jnp.floating)
        ]
        try:
            engine.plan_to_torch(model.naming().table(cfg), source.header, model.tree(cfg), str(source.path))
        except ConversionError as error:
            problems += error.problems
        if not problems:
            return model, cfg
        refused.append(ConversionError(str(source.path), problems))
    first = refused[0]
    hint = _sizes_hint(_shown_sizes(model, source), model) if any("mis-shaped" in p for p in first.problems) else ""
    raise ConversionError(first.source_name, first.problems, hint)


def _shown_sizes(model: Model, source: Parameters) -> Any:
    """The released config with every size that shows in the shapes of parameters."""
    match = max(identify_parameters(source.header, [model.name]), key=lambda match: match.rank, default=None)
    cfg = match.cfg if match else model.cfg
    ranks = {path: len(leaf.shape) for path, leaf in traverse_util.flatten_dict(model.tree(cfg), sep="/").items()}
    shapes = {path: spec.shape for path, spec in source.header.items() if ranks.get(path) == len(spec.shape)}
    return dataclasses.replace(cfg, **model.read_sizes(shapes, cfg))


class TorchFile(Protocol):
    """What a .safetensors file of torch tensors is written from: a ToTorch, or adapters (`convert.lora`)."""

    @property
    def name(self) -> str:
        """Of the file, without its ending."""

    @property
    def header(self) -> Mapping[str, Spec]:
        """Shape and type of every tensor, in the order in which they are written."""

    def tensors(self) -> Iterator[np.ndarray]:
        """Values in the order of the header."""

    def notes(self) -> list[str]:
        """What a user should know."""


def run_to_torch(job: TorchFile, final: Path, overwrite: bool = False) -> None:
    """Writes a .safetensors file as PyTorch programs read it. The folder of `final` must be claimed."""
    if final.exists() and not overwrite:
        raise UserError(f"{final} exists: give --overwrite, or another output")
    header = job.header
    total = sum(spec.nbytes for spec in header.values())
    check_space(final.parent, total)
    with (
        staged(final) as partial,
        progress(job.name, total) as on_bytes,
        SafetensorsWriter(partial, header, {"format": "pt"}) as writer,  # without it, transformers refuses the file
    ):
        for values in job.tensors():
            writer.write(values)
            on_bytes(values.nbytes)


def copy_folder(source: Path, final: Path, overwrite: bool = False) -> bool:
    """Copies a small folder whole or not at all; False if the same is there. The folder of `final` must be claimed."""
    if final.exists() and not overwrite:
        if _contents(source) == _contents(final):
            return False
        raise UserError(f"{final} exists and holds something else: give --overwrite, or another output")
    with staged(final) as partial:
        shutil.copytree(source, partial)
    return True


def _contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*") if path.is_file()}
