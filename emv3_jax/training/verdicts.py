"""Clips that wait for a person, and what the person says of them: a folder with two files of JSON lines.

FOLDER/clips.jsonl     {"id": "000012", "video": "000012.mp4", "prompt": "...", "task": "i2v", ...}
FOLDER/verdicts.jsonl  {"id": "000012", "verdict": "reject", "issue": "lips", "time": "2026-01-31T12:00:00+00:00"}

Verdicts are only ever appended: the last line of an id counts, and one whose verdict is null takes it back. A line is
on the disk before add_verdict returns. One that a kill broke off is left out on reading, and the next starts anew.
"""

import codecs
import dataclasses
import datetime
import json
import os
import pathlib
from typing import Any

from emv3_jax.errors import UserError
from emv3_jax.files import PathLike, check_readable, reason

CLIPS, VERDICTS = "clips.jsonl", "verdicts.jsonl"
ISSUES = ("lips", "motion", "anatomy", "identity", "colour", "background", "flicker", "other")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """verdict: "keep" or "reject". issue: what is wrong with a rejected clip, one of ISSUES. by: who says so, where it
    is no person."""

    verdict: str
    issue: str | None = None
    by: str = ""


def read_clips(folder: PathLike, videos: bool = True) -> list[dict[str, Any]]:
    """The rows of clips.jsonl, in their order; keys that are not known here stay in them.

    Raises:
      UserError: the folder, the file or (where they are asked for) a video is not there, a line is damaged, an id
        stands twice, or an id or the name of a video is not a plain file name.
    """
    rows = _rows(pathlib.Path(folder))
    for place, row in rows if videos else ():
        check_readable(pathlib.Path(folder) / row["video"], f"{place}: video")
    return [row for _, row in rows]


def _rows(folder: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    """(where it stands, row) of every clip; videos are not looked for."""
    if not folder.is_dir():
        raise UserError(f"folder {folder} {'is a file' if folder.exists() else 'does not exist'}")
    path = check_readable(folder / CLIPS, "list of clips")
    rows: list[tuple[str, dict[str, Any]]] = []
    places: dict[str, int] = {}
    for number, line in _lines(path):
        place = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise UserError(f"{place} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f'{place} must be an object like {{"id": ..., "video": ...}}')
        for name in ("id", "video"):
            if not _is_plain(row.get(name)):
                raise UserError(f"{place}: {name} must be a plain file name, got {row.get(name)!r}")
        for name in ("prompt", "task"):
            if not isinstance(row.get(name, ""), str):
                raise UserError(f"{place}: {name} must be text, got {row[name]!r}")
        first = places.setdefault(row["id"], number)
        if first != number:
            raise UserError(f"{place}: the id {row['id']} stands in line {first} already")
        rows.append((place, row))
    if not rows:
        raise UserError(f"{path} holds no clips")
    return rows


def _lines(path: pathlib.Path) -> list[tuple[int, bytes]]:
    """(number, line) of every line that is not blank. Only a line feed ends a line: prompts may hold other breaks."""
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _is_plain(name: Any) -> bool:
    """Whether a name names a file in the folder itself, on any system."""
    if not isinstance(name, str) or name.strip(". ") == "":
        return False
    return name.isprintable() and not set(name) & set("/\\:")


def read_verdicts(folder: PathLike) -> dict[str, Verdict]:
    """id -> verdict, the latest last; says in a note which lines are broken off.

    Raises:
      UserError: a whole line says something that is not a verdict, or the file cannot be read.
    """
    verdicts, notes = verdicts_and_notes(folder)
    for note in notes:
        print(f"note: {note}")
    return verdicts


def verdicts_and_notes(folder: PathLike) -> tuple[dict[str, Verdict], list[str]]:
    """As read_verdicts, without printing. Ids that are in clips.jsonl no longer are among them."""
    path = pathlib.Path(folder) / VERDICTS
    try:
        lines = _lines(path)
    except FileNotFoundError:
        return {}, []
    except OSError as error:
        raise UserError(f"verdicts {path} cannot be read: {reason(error)}") from None
    verdicts: dict[str, Verdict] = {}
    notes = []
    for number, line in lines:
        place = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError:  # no beginning of an object is JSON, so that this tells what was broken off
            notes.append(f"{place} is broken off and left out")
            continue
        if not isinstance(row, dict) or not isinstance(row.get("id"), str):
            raise UserError(f'{place} must be an object like {{"id": ..., "verdict": ..., "issue": ...}}')
        _check(row.get("verdict"), row.get("issue"), place)
        verdicts.pop(row["id"], None)  # so that the latest stands last
        if row.get("verdict") is not None:
            verdicts[row["id"]] = Verdict(row["verdict"], row.get("issue"), str(row.get("by", "")))
    return verdicts, notes


def _check(verdict: Any, issue: Any, place: str) -> None:
    if verdict not in ("keep", "reject", None):
        raise UserError(f"{place}: the verdict must be keep, reject or null, got {verdict!r}")
    if verdict == "reject" and issue not in ISSUES:
        raise UserError(f"{place}: a rejected clip needs an issue, one of {', '.join(ISSUES)}, got {issue!r}")
    if verdict != "reject" and issue is not None:
        raise UserError(f"{place}: only a rejected clip has an issue, got {issue!r}")


def add_verdict(folder: PathLike, id: str, verdict: str | None, issue: str | None = None, by: str = "") -> None:
    """Appends a verdict, None takes the last one back; it is on the disk when this returns. by: as of `Verdict`.

    One process and thread at a time.

    Raises:
      UserError: clips.jsonl has no such id, the verdict is none, or the line cannot be written.
    """
    folder = pathlib.Path(folder)
    if not any(row["id"] == id for _, row in _rows(folder)):
        raise UserError(f"there is no clip {id!r} in {folder / CLIPS}")
    _check(verdict, issue, f"clip {id}")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    row = {"id": id, "verdict": verdict, "issue": issue, "time": now, **({"by": by} if by else {})}
    path = folder / VERDICTS
    try:
        _append(path, json.dumps(row).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{path} could not be written: {reason(error)}") from error


def _append(path: pathlib.Path, line: bytes) -> None:
    """Writes a line at the end of a file, on a line of its own, and waits for the disk."""
    with open(path, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if not end and os.name == "posix":  # a new file's name is on the disk when its folder is
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
