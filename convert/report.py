"""What a file of weights is, told from its header: `python -m convert inspect`."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from convert import engine
from convert.engine import Checkpoint, ConversionError
from convert.jobs import differences, groups
from convert.parameters import METADATA, ConvertedFile, ConvertedFolder, converted_models, open_converted
from convert.registry import GUESSED, MODELS, SURE, config_from, identify, read_config
from convert.sources import Source, Spec, open_source, sha256
from emv3_jax.converted import AGAIN, RECORD
from emv3_jax.errors import UserError


def describe(path: Path, keys: bool = False) -> tuple[list[str], bool]:
    """Says what a torch checkpoint is, or weights that `to-jax` wrote, or each model in a folder of those.

    keys: list every tensor too.
    Returns:
      Lines of text, and whether it is a known model (or several) that fits, with all bytes as they were written.
    Raises:
      UserError: it cannot be read at all.
    """
    if not (path / RECORD).is_file() and path.is_dir() and (models := converted_models(path)):
        described = [_described(model, keys) for model in models]
        return [line for lines, _ in described for line in lines], all(fits for _, fits in described)
    if (path / RECORD).is_file():
        source: Source = open_converted(path)
    else:
        source = open_source(path)
        if path.suffix == ".safetensors" and METADATA in getattr(source, "metadata", {}):
            source = open_converted(path)
    lines = [str(path)]
    if keys:
        lines += [f"  {key}  {spec.dtype}  {list(spec.shape)}" for key, spec in source.header.items()]
    lines += [_row("holds", _amount(source.header))]
    more, fits = _converted(source) if isinstance(source, ConvertedFolder | ConvertedFile) else _torch(source)
    return lines + more, fits


def _described(path: Path, keys: bool) -> tuple[list[str], bool]:
    """One of several models; that it cannot be read at all is said in its place, and the others follow."""
    try:
        return describe(path, keys)
    except UserError as error:
        return [str(path), _row("damaged", error.message), *map(_more, error.details)], False


def _row(name: str, text: str) -> str:
    return f"  {name:9s}  {text}"


def _more(text: str) -> str:
    return _row("", text)


def _amount(header: Mapping[str, Spec]) -> str:
    types = Counter(str(spec.dtype) for spec in header.values())
    dtypes = ", ".join(f"{dtype} ({count})" for dtype, count in types.items()) if len(types) > 1 else "".join(types)
    values, size = sum(spec.size for spec in header.values()), sum(spec.nbytes for spec in header.values())
    return f"{len(header):,} tensors, {values:,} values, {dtypes}, {size / 1e9:.3g} GB"


def _torch(source: Source) -> tuple[list[str], bool]:
    """Model, sizes and what does not fit, of a torch checkpoint."""
    matches = identify(source.header)
    if not matches:
        return [_row("model", f"none of {', '.join(MODELS)}: no key is known")], False
    match = matches[0]
    if min(match.rank) < SURE:
        lines = [_row("model", "not certain; the share of keys that each model knows, and of its rules filled:")]
        lines += [_more(f"{m.model.name}: {m.known:.0%}, {m.filled:.0%}") for m in matches if m.known > 0.01]
        return lines, False
    form = f", {match.form}" if match.form else ""
    lines = [_row("model", f"{match.model.name}: {match.model.title}"), _row("naming", match.naming.name + form)]
    cfg = read_config(match, source.header)
    other = [size for size in differences(cfg, match.model.cfg) if not size.startswith(GUESSED)]
    lines.append(_row("sizes", f"not the released ones: {' '.join(other)}" if other else "as released"))
    table = match.table(cfg)
    source = match.naming.prepare(source)
    checkpoint = Checkpoint(str(source.path), table, match.model.tree(cfg), source.header, source.read)
    try:
        plan = engine.plan_to_jax([checkpoint])
    except ConversionError as error:
        return lines + _problems(error), False
    for ignore in table.ignored:
        if keys := [key for key in plan.ignored[checkpoint.name] if re.fullmatch(ignore.pattern, key)]:
            lines.append(_row("left out", f"{groups(keys)}: {ignore.reason}"))
    return [*lines, _row("fits", "yes" if not other else "yes, with these sizes")], True


def _converted(source: ConvertedFolder | ConvertedFile) -> tuple[list[str], bool]:
    """The record of converted weights, whether their files are as they were written, and whether they fit the model."""
    if (record := source.record) is None or record.model not in MODELS:
        return [_row("model", "parameters of an unknown model")], False
    model = MODELS[record.model]
    cfg = config_from(model.cfg, record.config)
    lines = [
        _row("model", f"{model.name}: {model.title}, converted"),
        _row("sizes", " ".join(differences(cfg, model.cfg)) or "as released"),
        *(_row("from", f"{f['file']}, {f['bytes']:,} bytes, SHA-256 {f['sha256']}") for f in record.sources),
    ]
    changed = [name for name, file in record.files.items() if sha256(source.path / name) != file["sha256"]]
    if changed:
        lines.append(_row("damaged", f"changed since they were written: {', '.join(changed)}; {AGAIN}"))
    try:
        engine.plan_to_torch(model.naming().table(cfg), source.header, model.tree(cfg), str(source.path))
    except ConversionError as error:
        return lines + _problems(error), False
    return [*lines, _row("fits", "yes")], not changed


def _problems(error: ConversionError) -> list[str]:
    return [_row("fits", f"no: {len(error.problems)} problems"), *map(_more, error.problems)]
