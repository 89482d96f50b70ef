"""Clips into a TFDS dataset: shards that any number of processes and hosts make side by side, one after another.

A folder holds
    shard-00003.array_record, shard-00003.json    a finished shard: its examples, and what they are and what was dropped
    plan.json                                     what the folder is being made of; another plan is refused
and, when all shards are there, their examples become
    talking-train.array_record-00003-of-00016, features.json, dataset_info.json     a TFDS dataset
    dataset.json                                  sizes and identifiers of all clips, and what was dropped and why
A shard appears when it is complete, so a run that was interrupted goes on with the shards that are not there yet. Every
step of the end may be done twice, or by two processes at once: they write the same.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from emv3_jax.config import FPS
from emv3_jax.data import examples, extra
from emv3_jax.data.extract import Extractor, RawClip
from emv3_jax.errors import UserError, differences, short_of_memory
from emv3_jax.files import atomic_path, reason

FORMAT = "emv3_jax dataset 1"
RECORD = "dataset.json"
PLAN = "plan.json"


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A clip or a whole file that was left out, and why."""

    name: str
    why: str
    seconds: float = 0.0


class Source(Protocol):
    """Where clips come from: inputs that are numbered, each of which gives some clips."""

    def __len__(self) -> int:
        """How many inputs there are."""

    def clips(self, number: int) -> Iterator[RawClip | Dropped]:
        """The clips of an input, and what was dropped of it."""

    def describe(self) -> dict[str, Any]:
        """What decides the clips, for the plan."""


def build(
    source: Source,
    extractor: Extractor,
    folder: Path,
    shards: int,
    identity: dict[str, Any],
    process: int = 0,
    processes: int = 1,
    say: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """Makes this process's shards, and the dataset if they were the last.

    Args:
      source: input k goes into shard k % shards.
      folder: made if it is not there.
      identity: what the examples were made with (preset, hash of the VAE); kept, and compared with on going on.
      process, processes: this one makes shards k with k % processes = process.
    Returns:
      The record of the finished dataset; None while other processes' shards are not there yet.
    Raises:
      UserError: the folder cannot be written, or is being made of something else, or nothing was left to keep.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made ({reason(error)}): give another") from error
    plan = {"format": FORMAT, "shards": shards, **identity, **source.describe()}
    check_plan(folder, plan)
    if (folder / RECORD).is_file():
        say(f"{folder} is complete already")
        return read_record(folder)
    if process >= shards:
        say(f"nothing to make here: there are {processes} processes and no more shards than {shards} (--shards)")
    mine = [k for k in range(process, shards, processes) if not _part(folder, k).with_suffix(".json").exists()]
    schema, started, made = examples.features(extractor.preset), time.monotonic(), 0
    for done, k in enumerate(mine):
        report = _write_shard(source, extractor, schema, folder, k, range(k, len(source), shards))
        made += len(report["clips"])
        rate = made / (time.monotonic() - started)
        left = (time.monotonic() - started) / (done + 1) * (len(mine) - done - 1)
        say(
            f"shard {k} ({done + 1} of {len(mine)} to make here): {len(report['clips'])} clips,"
            f" {len(report['dropped'])} dropped; {rate:.2f} clips/s, {left / 60:.0f} min left"
        )
    missing = [k for k in range(shards) if not _part(folder, k).with_suffix(".json").exists()]
    if missing:
        say(f"{len(missing)} of {shards} shards are still being made, or to be made, by other processes")
        return None
    return _finish(folder, schema, plan, say)


def read_record(folder: Path) -> dict[str, Any]:
    """What `build` returned when it had finished the dataset of a folder.

    Raises:
      UserError: it is not finished, not there, or damaged.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text())
        if record["format"] == FORMAT and record["preset"] and record["clips"]:
            return record
        raise ValueError(f"{RECORD} is of another format")
    except FileNotFoundError:
        state = "is not finished" if (folder / PLAN).exists() else "is not there"
        raise UserError(f"the dataset {folder} {state}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the dataset {folder} is damaged ({RECORD}: {error}): delete it") from error


def _part(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.array_record"


def read_plan(folder: Path) -> dict[str, Any]:
    """What a folder is being made of.

    Raises:
      UserError: it does not say so, or what it says is damaged.
    """
    path = folder / PLAN
    try:
        plan = json.loads(path.read_text())
        if isinstance(plan, dict):
            return plan
        raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error})") from error


def check_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Writes down what a folder is being made of, and refuses to go on with it otherwise.

    Raises:
      UserError: it is being made of something else, or the plan there is damaged.
    """
    if not (folder / PLAN).exists():
        with atomic_path(folder / PLAN) as temporary:
            temporary.write_text(json.dumps(plan, indent=1) + "\n")
        return
    try:
        there = read_plan(folder)
    except UserError as error:
        raise UserError(f"{error}: delete {folder} and begin anew, or give another --out") from error
    here = json.loads(json.dumps(plan))
    if different := differences(there, here):
        what = "; ".join(different)
        raise UserError(f"{folder} is being made of something else ({what}): give another --out, or delete it")


def _write_shard(
    source: Source, extractor: Extractor, schema: Any, folder: Path, shard: int, inputs: Sequence[int]
) -> dict[str, Any]:
    report: dict[str, Any] = {"clips": [], "dropped": []}
    with atomic_path(_part(folder, shard)) as temporary, _records(temporary) as write:
        for number in inputs:
            for clip in source.clips(number):
                if isinstance(clip, Dropped):
                    report["dropped"].append(dataclasses.asdict(clip))
                    continue
                size = " x ".join(map(str, clip.video.shape[:3]))
                with short_of_memory(f"a clip of {size}", "make shorter ones (--frames)"):
                    example = extractor.example(clip)
                if bad := not_finite(example):
                    why = f"not finite: {', '.join(bad)}"
                    report["dropped"].append(dataclasses.asdict(Dropped(clip.id, why, len(clip.video) / FPS)))
                    continue
                write(schema.serialize_example(example))
                report["clips"].append([clip.id, *clip.video.shape[:3]])
    with atomic_path(_part(folder, shard).with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(report))
    return report


@contextlib.contextmanager
def _records(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A function that writes records into a file. Raises OSError where they cannot be (array_record: RuntimeError)."""
    writer = extra.load("array_record.python.array_record_module").ArrayRecordWriter(str(path), "group_size:1")

    def checked(call: Callable[..., None], *args: bytes) -> None:
        try:
            call(*args)
        except RuntimeError as error:
            raise OSError(str(error)) from error

    try:
        yield functools.partial(checked, writer.write)
    finally:
        checked(writer.close)


def not_finite(example: dict[str, Any]) -> list[str]:
    """Names of the arrays of an example that hold NaN or infinity (as float16, above 65504)."""
    arrays = {name: value for name, value in example.items() if isinstance(value, np.ndarray)}
    return [name for name, value in arrays.items() if value.dtype.kind == "f" and not np.isfinite(value).all()]


def _finish(folder: Path, schema: Any, plan: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Shards become a TFDS dataset. They have other names then, so this goes on where it was interrupted."""
    tfds = extra.load("tensorflow_datasets")
    reports = [json.loads(_part(folder, k).with_suffix(".json").read_text()) for k in range(plan["shards"])]
    full = [k for k, report in enumerate(reports) if report["clips"]]
    dropped = [row for report in reports for row in report["dropped"]]
    for line in summary(dropped):
        say(line)
    if not full:
        _remove_shards(folder, plan["shards"], reports=True)
        (folder / PLAN).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other things are in it
            folder.rmdir()
        raise UserError(f"no clip was kept, so there is no dataset in {folder}: see why above")
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=examples.DATASET, split="train", filetype_suffix="array_record"
    )
    for rank, k in enumerate(full):
        path = folder / template.relative_filepath(shard_index=rank, num_shards=len(full))
        try:
            _part(folder, k).replace(path)
        except FileNotFoundError:  # done before, or by another process
            if not path.exists():
                _part(folder, k).with_suffix(".json").unlink(missing_ok=True)
                raise UserError(f"{_part(folder, k)} is gone: give the command again to make it anew") from None
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[len(reports[k]["clips"]) for k in full],
        num_bytes=sum(path.stat().st_size for path in folder.glob("*.array_record-*")),
        filename_template=template,
    )
    with tempfile.TemporaryDirectory(dir=folder, prefix=".metadata-") as metadata:
        (Path(metadata) / path.name).touch()  # TFDS looks for data there
        tfds.folder_dataset.write_metadata(
            data_dir=metadata, features=schema, split_infos=[split], filename_template=template, check_data=False
        )
        for path in Path(metadata).glob("*.json"):
            path.replace(folder / path.name)
    record = {**plan, "clips": [clip for k in full for clip in reports[k]["clips"]], "dropped": dropped}
    with atomic_path(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(record) + "\n")
    _remove_shards(folder, plan["shards"], reports=False)
    return record


def _remove_shards(folder: Path, shards: int, reports: bool) -> None:
    """Shards without clips, and what a killed run has left of others. Reports stay with a dataset: another process may
    be about to ask them what there is to make."""
    for k in range(shards):
        _part(folder, k).unlink(missing_ok=True)
        if reports:
            _part(folder, k).with_suffix(".json").unlink(missing_ok=True)
    for left in folder.glob(".shard-*"):  # atomic_path's
        left.unlink(missing_ok=True)


def summary(dropped: Sequence[dict[str, Any]]) -> list[str]:
    """Lines that say what was dropped: a line a reason, with some of the names."""
    reasons: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in dropped:
        reasons[row["why"]].append(row)
    lines = []
    for why, rows in sorted(reasons.items(), key=lambda item: -len(item[1])):
        names = ", ".join(row["name"] for row in rows[:3]) + (", ..." if len(rows) > 3 else "")
        lines.append(f"dropped {len(rows)} ({sum(row['seconds'] for row in rows):.1f} s): {why}: {names}")
    return lines
