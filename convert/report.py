"""What a file of weights is, told from its header: `python -m convert inspect`."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from convert import engine
from convert.engine import Checkpoint, ConversionError
from convert.jobs import ConvertedFile, ConvertedFolder, differences, groups, open_converted
from convert.registry import GUESSED, MODELS, SURE, Match, config_from, identify, read_config
from convert.sources import Source, Spec, open_source
from emv3_jax.converted import RECORD


def describe(path: Path, keys: bool = False) -> list[str]:
    """Lines about a torch checkpoint, or weights that `to-jax` wrote; with `keys`, every tensor too.

    Raises UserError if the file cannot be read at all.
    """
    if (path / RECORD).is_file():
        source: Source = open_converted(path)
    else:
        source = open_source(path)
        if path.suffix == ".safetensors" and "emv3_jax" in getattr(source, "metadata", {}):
            source = open_converted(path)
    lines = [str(path)]
    if keys:
        lines += [f"  {key}  {spec.dtype}  {list(spec.shape)}" for key, spec in source.header.items()]
    lines += [_row("holds", _amount(source.header))]
    if isinstance(source, ConvertedFolder | ConvertedFile):
        return [*lines, *_converted(source)]
    matches = identify(source.header)
    if not matches:
        return [*lines, _row("model", f"none of {', '.join(MODELS)}: no key is known")]
    best = matches[0]
    if min(best.rank) < SURE:
        lines.append(_row("model", "not certain; the share of keys that each model knows, and of its rules filled:"))
        lines += [f"             {m.model.name}: {m.known:.0%}, {m.filled:.0%}" for m in matches if m.known > 0.01]
        return lines
    return [*lines, *_torch(source, best)]


def _row(name: str, text: str) -> str:
    return f"  {name:9s}  {text}"


def _amount(header: Mapping[str, Spec]) -> str:
    types = Counter(str(spec.dtype) for spec in header.values())
    dtypes = ", ".join(f"{dtype} ({count})" for dtype, count in types.items()) if len(types) > 1 else "".join(types)
    values, size = sum(spec.size for spec in header.values()), sum(spec.nbytes for spec in header.values())
    return f"{len(header):,} tensors, {values:,} values, {dtypes}, {size / 1e9:.3g} GB"


def _torch(source: Source, match: Match) -> Iterator[str]:
    """Model, sizes and what does not fit, of a torch checkpoint."""
    form = f", {match.form}" if match.form else ""
    yield _row("model", f"{match.model.name}: {match.model.title}")
    yield _row("naming", match.naming.name + form)
    cfg = read_config(match, source.header)
    other = [size for size in differences(cfg, match.model.cfg) if not size.startswith(GUESSED)]
    yield _row("sizes", f"not the released ones: {' '.join(other)}" if other else "as released")
    table = match.table(cfg)
    source = match.naming.prepare(source)
    checkpoint = Checkpoint(str(source.path), table, match.model.tree(cfg), source.header, source.read)
    try:
        plan = engine.plan_to_jax([checkpoint])
    except ConversionError as error:
        yield _row("fits", f"no: {len(error.problems)} problems")
        yield from (f"             {problem}" for problem in error.problems)
        return
    for ignore in table.ignored:
        if keys := [key for key in plan.ignored[checkpoint.name] if re.fullmatch(ignore.pattern, key)]:
            yield _row("left out", f"{groups(keys)}: {ignore.reason}")
    yield _row("fits", "yes" if not other else "yes, with these sizes")


def _converted(source: ConvertedFolder | ConvertedFile) -> Iterator[str]:
    """The record of converted weights, and whether they still fit the model."""
    if (record := source.record) is None or record.model not in MODELS:
        yield _row("model", "parameters of an unknown model")
        return
    model = MODELS[record.model]
    cfg = config_from(model.cfg, record.config)
    yield _row("model", f"{model.name}: {model.title}, converted")
    yield _row("sizes", " ".join(differences(cfg, model.cfg)) or "as released")
    for file in record.sources:
        yield _row("from", f"{file['file']}, {file['bytes']:,} bytes, SHA-256 {file['sha256']}")
    try:
        engine.plan_to_torch(model.naming().table(cfg), source.header, model.tree(cfg), str(source.path))
    except ConversionError as error:
        yield _row("fits", f"no: {len(error.problems)} problems")
        yield from (f"             {problem}" for problem in error.problems)
    else:
        yield _row("fits", "yes")
