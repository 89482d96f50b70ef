"""Jobs from a command line or a manifest: rows of words become `Job`s, checked as far as that goes without JAX."""

import collections
import contextlib
import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from emv3_jax import media
from emv3_jax.errors import UserError
from emv3_jax.files import PathLike, check_readable

# Kinds of the columns, by which the cells of a .csv are read; a face and a mouth are parsed later.
KINDS = {
    "image": str, "last_image": str, "video": str, "audio": str, "prompt": str, "task": str, "face": str, "mouth": str,
    "seed": int, "out": str, "sheet": str, "frames": int, "fps": float, "match_colours": bool,
}  # fmt: skip
COLUMNS = tuple(KINDS)
OPTIONS = tuple(name for name in COLUMNS if name not in ("frames", "fps", "match_colours"))  # those are config keys
FILES = {"image": "image", "last_image": "last image", "video": "video", "audio": "recording"}
FACES = ("none", "detect", "largest")


@dataclasses.dataclass(frozen=True)
class Job:
    """One video. None: the config's own, or nothing. sampling: keys of the config's section of that name."""

    out: str
    image: str | None = None
    last_image: str | None = None
    video: str | None = None
    audio: str | None = None
    prompt: str | None = None
    task: str = "i2v"
    face: Any = None
    mouth: tuple[float, float, float, float] | None = None
    seed: int = 0
    frames: int = 0
    fps: float | None = None
    sheet: str | None = None
    match_colours: bool | None = None
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a manifest. line: where it begins in the file, from 1. problem: the end of a sentence, why the row
    cannot be read; it then has no values."""

    line: int
    values: dict[str, Any]
    problem: str = ""


def column_kinds(sampling: Mapping[str, Any]) -> dict[str, type]:
    """Of all columns of a manifest, those of a config's section sampling among them."""
    return {name: type(value) for name, value in sampling.items()} | KINDS


def read(path: PathLike, kinds: Mapping[str, type]) -> list[dict[str, Any]]:
    """The rows of a .jsonl or .csv file; empty cells of a .csv are left out.

    kinds: of the columns of a .csv; cells of others are text.
    Raises:
      UserError: the file cannot be read, has no rows, or a row is not one.
    """
    rows = read_rows(path, kinds)
    for row in rows:
        if row.problem:
            raise UserError(f"manifest {path}, line {row.line} {row.problem}")
    return [row.values for row in rows]


def read_rows(path: PathLike, kinds: Mapping[str, type]) -> list[Row]:
    """As `read`, but a row that is not one is among the others.

    Raises:
      UserError: the file cannot be read, or has no rows.
    """
    path = check_readable(path, "manifest")
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise UserError(f"manifest {path} must end in .jsonl or .csv")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"manifest {path} is not text in UTF-8") from None
    # Only "\n" ends a line (and what was read as one): JSON may hold other separators of Unicode inside its strings.
    lines = list(io.StringIO(text))
    if path.suffix.lower() == ".jsonl":
        rows = [_json_row(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    else:
        rows = _csv_rows(lines, kinds, f"manifest {path}")
    if not rows:
        raise UserError(f"manifest {path} holds no rows")
    return rows


def _json_row(number: int, line: str) -> Row:
    doubled: list[str] = []

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        doubled.extend(_doubled(name for name, _ in pairs))
        return dict(pairs)

    try:
        values = json.loads(line, object_pairs_hook=object_of)
    except (ValueError, RecursionError) as error:
        return Row(number, {}, f"is not JSON: {error}")
    if not isinstance(values, dict):
        return Row(number, {}, 'must be an object like {"image": ..., "out": ...}')
    if doubled:
        return Row(number, {}, f"says {doubled[0]!r} twice")
    return Row(number, values)


def _doubled(names: Iterable[str]) -> list[str]:
    return [name for name, count in collections.Counter(names).items() if count > 1]


def _csv_rows(lines: list[str], kinds: Mapping[str, type], place: str) -> list[Row]:
    table = _csv_table(lines)
    _, names, problem = next(table, (0, [], ""))
    if problem:
        raise UserError(f"{place}: the line with the names {problem}")
    if doubled := _doubled(name for name in names if name):
        raise UserError(f"{place}: two columns are named {doubled[0]!r}: rename one, or remove it")
    return [
        Row(line, {}, problem) if problem else _csv_row(line, names, cells, kinds) for line, cells, problem in table
    ]


def _csv_table(lines: list[str]) -> Iterator[tuple[int, list[str], str]]:
    """Number of the first line, cells, and problem of every row. After a row that cannot be read, such as one whose
    quote is never closed, reading goes on with the line after its first."""
    start = 0
    while start < len(lines):
        table, first = csv.reader(lines[start:], strict=True), start
        try:
            for cells in table:
                if cells:
                    yield first + 1, cells, ""
                first = start + table.line_num
            return
        except csv.Error as error:
            yield first + 1, [], f"is not CSV: {error}"
            start = first + 1


def _csv_row(line: int, names: list[str], cells: list[str], kinds: Mapping[str, type]) -> Row:
    if len(cells) != len(names):
        amount = "more" if len(cells) > len(names) else "fewer"
        return Row(line, {}, f"has {amount} cells than the first line has names")
    columns = zip(names, cells, strict=True)
    return Row(line, {name: _cell(text, kinds.get(name, str)) for name, text in columns if text})


def _cell(text: str, kind: type) -> Any:
    """A number or a switch where the column is one and the text reads so, or else the text as it stands."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.strip().lower(), text)
    for number in (int, float) if kind in (int, float) else ():
        with contextlib.suppress(ValueError):
            return number(text)
    return text


def checked_job(row: Mapping[str, Any]) -> Job:
    """The job of a row.

    Raises:
      UserError: values of the wrong kind, or files that are not there.
    """
    if "out" not in row:
        raise UserError("the row has no out: where the video is to be written")
    values = {name: row[name] for name in COLUMNS if row.get(name) is not None}
    for name in (name for name, kind in KINDS.items() if kind is str and name not in ("face", "mouth")):
        if name in values and not isinstance(values[name], str):
            raise UserError(f"{_option(name)} must be text, got {values[name]!r}")
    for name in ("out", "sheet"):
        if name in values and not Path(values[name]).name:
            raise UserError(f"{_option(name)} must name a file, got {values[name]!r}")
    for name, kind in FILES.items():
        if name in values:
            media.check_readable(values[name], kind)
    for name, top in (("seed", 2**32 - 1), ("frames", 10**9)):
        value = values.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{_option(name)} must be a whole number, got {value!r}")
        if not 0 <= value <= top:
            raise UserError(f"{_option(name)} must be between 0 and {top}, got {value}")
    fps = values.get("fps", 0)
    if not isinstance(fps, int | float) or isinstance(fps, bool):
        raise UserError(f"fps must be a number, got {fps!r}")
    if not isinstance(values.get("match_colours", False), bool):
        raise UserError(f"match_colours must be true or false, got {values['match_colours']!r}")
    if "face" in values:
        values["face"] = parse_face(values["face"])
    if "mouth" in values:
        values["mouth"] = parse_box(values["mouth"], _option("mouth"))
    sampling = {name: value for name, value in row.items() if name not in COLUMNS and value is not None}
    return Job(**values, sampling=sampling)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_face(value: Any, name: str = "--face") -> Any:
    """ "y1,y2,x1,x2" -> four numbers; a number counts faces; the path of a .npy file and the words of FACES stay.
    name: where the value stands."""
    if value in FACES or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        return int(value)
    if isinstance(value, str) and value.lower().endswith(".npy"):
        media.check_readable(value, "face box")
        return value
    return parse_box(value, name, f", a .npy file, {', '.join(FACES)} or a number")


def parse_box(value: Any, name: str, otherwise: str = "") -> tuple[float, float, float, float]:
    """ "y1,y2,x1,x2", perhaps in brackets, or a list of them -> four numbers. name: where the value stands."""
    try:
        y1, y2, x1, x2 = map(float, value.strip(" []()").split(",") if isinstance(value, str) else value)
    except (ValueError, TypeError):
        raise UserError(f"{name} must be four numbers y1,y2,x1,x2 in pixels{otherwise}, got {value!r}") from None
    return y1, y2, x1, x2


def plan(rows: Sequence[Row]) -> list[Job | Exception]:
    """The job of every row, or what is wrong with it; no two rows write one file, and none writes what any reads."""
    planned = [_job_or_error(row) for row in rows]
    taken: dict[Path, str] = {}
    for row, job in zip(rows, planned, strict=True):
        if isinstance(job, Job):
            taken |= {Path(path).resolve(): f"the {kind} of line {row.line}" for kind, path in input_files(job).items()}
    for k, (row, job) in enumerate(zip(rows, planned, strict=True)):
        if isinstance(job, Job):
            try:
                check_outputs(job, taken)
                taken |= {path.resolve(): f"an output of line {row.line}" for path in output_files(job)}
            except Exception as error:  # whatever it is, the other rows can be made
                planned[k] = error
    return planned


def _job_or_error(row: Row) -> Job | Exception:
    try:
        if row.problem:
            raise UserError(f"the row {row.problem}")
        return checked_job(row.values)
    except Exception as error:  # whatever it is, the other rows can be made
        return error


def input_files(job: Job) -> dict[str, str]:
    """The files that a job reads, by what they are to the user."""
    files = {kind: path for name, kind in FILES.items() if (path := getattr(job, name)) is not None}
    return files | ({"face box": job.face} if isinstance(job.face, str) and job.face not in FACES else {})


def output_files(job: Job) -> list[Path]:
    """The files that a job writes: the video, its record, and perhaps a contact sheet."""
    return [Path(job.out), record_path(job), *([Path(job.sheet)] if job.sheet else [])]


def record_path(job: Job) -> Path:
    """The JSON file beside a video that says how it was made."""
    return Path(job.out).with_suffix(".json")


def read_record(job: Job) -> dict[str, Any]:
    """What the record beside a job's video says; empty if there is none, or the file is none of ours."""
    try:
        record = json.loads(record_path(job).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    ours = isinstance(record, dict) and str(record.get("program", "")).startswith("emv3_jax ")
    return record if ours else {}


def check_outputs(job: Job, taken: Mapping[Path, str]) -> None:
    """Whether a job's files can be written without a loss; before any work.

    Args:
      taken: files that other jobs read or write, by resolved path, and what they are.
    Raises:
      UserError: an output that cannot be written, that is also read or written elsewhere, or that would replace a JSON
        file that is no record of ours.
    """
    own = {Path(path).resolve(): f"the {kind} that is given" for kind, path in input_files(job).items()}
    for path, suffix in zip(output_files(job), (".mp4", ".json", ".png"), strict=False):
        if also := {**taken, **own}.get(path.resolve()):
            raise UserError(f"output {path} is also {also}: choose another name")
        media.check_writable(path, (suffix,))
    record = record_path(job)
    if record.exists() and not read_record(job):
        raise UserError(f"{record}, where the record of {job.out} would stand, is another file: choose another name")


def check_alone(arguments: Sequence[str]) -> None:
    """Raises UserError for options of a single video beside --manifest: rows say these themselves."""
    names = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    extra = [name for name in names if name.removeprefix("--").replace("-", "_") in COLUMNS]
    if extra:
        raise UserError(f"{extra[0]} and --manifest do not go together: give it in the rows")
