"""Jobs from a command line or a manifest: rows of words become `Job`s, checked as far as that goes without JAX."""

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from emv3_jax import media
from emv3_jax.errors import UserError
from emv3_jax.files import PathLike, check_readable

OPTIONS = ("image", "last_image", "video", "audio", "prompt", "task", "face", "mouth", "seed", "out", "sheet")
COLUMNS = (*OPTIONS, "frames", "fps", "match_colours")  # those without an option are keys of the config
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
    sheet: str | None = None
    match_colours: bool | None = None
    fps: float | None = None
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)


def read(path: PathLike) -> list[dict[str, Any]]:
    """The rows of a .jsonl or .csv file; empty cells of a .csv are left out.

    Raises:
      UserError: the file cannot be read, has no rows, or a row is not one.
    """
    path = check_readable(path, "manifest")
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise UserError(f"manifest {path} must end in .jsonl or .csv")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"manifest {path} is not text in UTF-8") from None
    if path.suffix.lower() == ".jsonl":
        rows = [
            _json_row(line, f"manifest {path}, line {n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()
        ]
    else:
        table = csv.DictReader(text.splitlines(), restkey="", strict=True)
        rows = [_csv_row(row, f"manifest {path}, row {n}") for n, row in enumerate(table, 1)]
    if not rows:
        raise UserError(f"manifest {path} holds no rows")
    return rows


def _json_row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f'{place} must be an object like {{"image": ..., "out": ...}}')
    return row


def _csv_row(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    if "" in row:
        raise UserError(f"{place} has more cells than the first line has names")
    return {name: _cell(value) for name, value in row.items() if value}


def _cell(text: str) -> Any:
    """A number where it reads as one, true or false, or the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def checked_job(row: Mapping[str, Any]) -> Job:
    """The job of a row.

    Raises:
      UserError: values of the wrong kind, or files that are not there.
    """
    if "out" not in row:
        raise UserError("the row has no out: where the video is to be written")
    values = {name: row[name] for name in COLUMNS if row.get(name) is not None}
    for name in ("image", "last_image", "video", "audio", "prompt", "task", "out", "sheet"):
        if name in values and not isinstance(values[name], str):
            raise UserError(f"{_option(name)} must be text, got {values[name]!r}")
    for name, kind in FILES.items():
        if name in values:
            media.check_readable(values[name], kind)
    for name, top in (("seed", 2**32 - 1), ("frames", 10**9)):
        value = values.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= top:
            raise UserError(f"{_option(name)} must be between 0 and {top}, got {value}")
    if not isinstance(values.get("match_colours", False), bool):
        raise UserError(f"match_colours must be true or false, got {values['match_colours']!r}")
    if "face" in values:
        values["face"] = parse_face(values["face"])
    if "mouth" in values:
        values["mouth"] = parse_box(values["mouth"], "mouth")
    sampling = {name: value for name, value in row.items() if name not in COLUMNS and value is not None}
    return Job(**values, sampling=sampling)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_face(value: Any) -> Any:
    """ "y1,y2,x1,x2" -> four numbers; a number counts faces; the path of a .npy file and the words of FACES stay."""
    if value in FACES or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, str) and value.isdigit():
        return int(value)
    if isinstance(value, str) and value.lower().endswith(".npy"):
        media.check_readable(value, "face box")
        return value
    return parse_box(value, "face", f", a .npy file, {', '.join(FACES)} or a number")


def parse_box(value: Any, name: str, otherwise: str = "") -> tuple[float, float, float, float]:
    """ "y1,y2,x1,x2" or a list of them -> four numbers."""
    try:
        y1, y2, x1, x2 = (float(part) for part in (value.split(",") if isinstance(value, str) else value))
    except (ValueError, TypeError):
        raise UserError(f"--{name} must be four numbers y1,y2,x1,x2 in pixels{otherwise}, got {value!r}") from None
    return y1, y2, x1, x2


def check_alone(arguments: Sequence[str]) -> None:
    """Raises UserError for options of a single video beside --manifest: rows say these themselves."""
    names = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    extra = [name for name in names if name.removeprefix("--").replace("-", "_") in COLUMNS]
    if extra:
        raise UserError(f"{extra[0]} and --manifest do not go together: give it in the rows")
    fps = values.get("fps", 0)
    if not isinstance(fps, int | float) or isinstance(fps, bool):
        raise UserError(f"fps must be a number, got {fps!r}")
