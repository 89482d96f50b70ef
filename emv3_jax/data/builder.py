"""Clips into a TFDS dataset: shards that any number of processes and hosts make side by side, one after another.

A folder holds
    shard-00003.array_record, shard-00003.json    a finished shard: its examples, and what they are and what was dropped
    plan.json                                     what the folder is being made of; another plan is refused
and, when all shards are there, they become
    talking-train.array_record-00003-of-00016, features.json, dataset_info.json     a TFDS dataset
    dataset.json                                  sizes and identifiers of all clips, and what was dropped and why
A shard appears when it is complete, so a run that was interrupted goes on with the shards that are not there yet.
"""

import collections
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from emv3_jax.data import examples
from emv3_jax.data.extract import Extractor, RawClip
from emv3_jax.errors import UserError
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
    _check_plan(folder, plan)
    if (folder / RECORD).is_file():
        say(f"{folder} is complete already")
        return json.loads((folder / RECORD).read_text())
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
    if missing and not (folder / RECORD).is_file():
        say(f"{len(missing)} shards are still being made, or to be made, by other processes")
        return None
    return _finish(folder, schema, plan, say)


def _part(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.array_record"


def _check_plan(folder: Path, plan: dict[str, Any]) -> None:
    path = folder / PLAN
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(plan, indent=1) + "\n")
        return
    try:
        there = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}): delete {folder} and begin anew, or give another --out"
        ) from error
    here = json.loads(json.dumps(plan))
    different = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if different:
        what = "; ".join(f"{key} {_short(there.get(key))} there and {_short(here.get(key))} now" for key in different)
        raise UserError(f"{folder} is being made of something else ({what}): give another --out, or delete it")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."


def _write_shard(
    source: Source, extractor: Extractor, schema: Any, folder: Path, shard: int, inputs: Sequence[int]
) -> dict[str, Any]:
    from array_record.python.array_record_module import ArrayRecordWriter

    report: dict[str, Any] = {"clips": [], "dropped": []}
    with atomic_path(_part(folder, shard)) as temporary:
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        try:
            for number in inputs:
                for clip in source.clips(number):
                    if isinstance(clip, Dropped):
                        report["dropped"].append(dataclasses.asdict(clip))
                        continue
                    example = extractor.example(clip)
                    if bad := not_finite(example):
                        why = f"not finite: {', '.join(bad)}"
                        report["dropped"].append(dataclasses.asdict(Dropped(clip.id, why, len(clip.video) / 25)))
                        continue
                    writer.write(schema.serialize_example(example))
                    report["clips"].append([clip.id, *clip.video.shape[:3]])
        finally:
            writer.close()
    with atomic_path(_part(folder, shard).with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(report))
    return report


def not_finite(example: dict[str, Any]) -> list[str]:
    """Names of the arrays of an example that hold NaN or infinity (as float16, above 65504)."""
    arrays = {name: value for name, value in example.items() if isinstance(value, np.ndarray)}
    return [name for name, value in arrays.items() if value.dtype.kind == "f" and not np.isfinite(value).all()]


def _finish(folder: Path, schema: Any, plan: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Shards become a TFDS dataset; whatever was done of it before an interruption is done no more."""
    import tensorflow_datasets as tfds

    reports = [json.loads(_part(folder, k).with_suffix(".json").read_text()) for k in range(plan["shards"])]
    full = [k for k, report in enumerate(reports) if report["clips"]]
    dropped = [row for report in reports for row in report["dropped"]]
    for line in summary(dropped):
        say(line)
    if not full:
        raise UserError(f"no clip was kept, so {folder} holds no dataset: see why above")
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=examples.DATASET, split="train", filetype_suffix="array_record"
    )
    for rank, k in enumerate(full):
        if _part(folder, k).exists():
            _part(folder, k).rename(folder / template.relative_filepath(shard_index=rank, num_shards=len(full)))
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[len(reports[k]["clips"]) for k in full],
        num_bytes=sum(path.stat().st_size for path in folder.glob("*.array_record-*")),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=schema, split_infos=[split], filename_template=template, check_data=False
    )
    record = {**plan, "clips": [clip for k in full for clip in reports[k]["clips"]], "dropped": dropped}
    with atomic_path(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(record) + "\n")
    for k in range(plan["shards"]):
        _part(folder, k).unlink(missing_ok=True)  # of shards without clips
        _part(folder, k).with_suffix(".json").unlink(missing_ok=True)
    return record


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
