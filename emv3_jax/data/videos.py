"""Talking films as a source of clips: 25 frames a second, cut into pieces, fitted to a preset, and looked through.

A file is read a frame at a time; no more than one clip's frames are in memory.
"""

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emv3_jax import manifest, media
from emv3_jax.config import FPS, RATE, Preset
from emv3_jax.data.builder import Dropped
from emv3_jax.data.extract import RawClip
from emv3_jax.errors import UserError
from emv3_jax.files import PathLike
from emv3_jax.media.face_box import Box
from emv3_jax.request import fitted_size

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv")
QUIET = 1e-3  # of full scale: a clip without a louder sample says nothing
# sync(video [F, H, W, 3] uint8, wave [n] at 16 kHz, face box or None) -> (frames the picture is late, confidence)
SyncModel = Callable[[np.ndarray, np.ndarray, Box | None], tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Film:
    """A file and its words. start, end: seconds of it that count; None: from its beginning, to its end."""

    path: str
    caption: str
    name: str
    start: float | None = None
    end: float | None = None


@dataclasses.dataclass(frozen=True)
class Rules:
    """How films become clips, and which are left out.

    frames: lengths of clips, 4k + 1; a film is cut into as many of the longest as it has, and its rest into the next.
    face: "one" leaves out clips in which no face or several are found, "largest" takes the largest, "none" wants none.
    subtitle_band: share of the height that is cut off at the bottom.
    sync_model: MODULE:FUNCTION of a SyncModel, or nothing. max_offset, min_confidence: what it must say of a clip.
    """

    frames: tuple[int, ...]
    face: str = "one"
    subtitle_band: float = 0.0
    sync_model: str = ""
    max_offset: float = 3.0
    min_confidence: float = 0.0

    def __post_init__(self):
        wrong = [n for n in self.frames if n < 5 or n % 4 != 1]
        if wrong or not self.frames:
            raise UserError(f"--frames must be 4k + 1 and at least 5, got {', '.join(map(str, wrong)) or 'none'}")
        if not 0 <= self.subtitle_band < 0.5:
            raise UserError(f"--subtitle-band must be from 0 to below 0.5, got {self.subtitle_band}")


def find_films(path: PathLike, caption: str | None) -> list[Film]:
    """The films of a folder (with NAME.txt beside NAME.mp4 as its caption) or of a manifest (.jsonl or .csv with the
    columns video, caption, and perhaps start and end in seconds; paths are relative to the manifest).

    Args:
      caption: of films that have none.
    Raises:
      UserError: no films there, a manifest that cannot be read, or two films of one name.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise UserError(f"--videos {path} holds no videos ({', '.join(SUFFIXES)})")
        return [Film(str(p), _sidecar(p) or caption or "", str(p.relative_to(path))) for p in files]
    if not path.exists():
        raise UserError(f"--videos {path} does not exist: give a folder of videos, or a manifest (.jsonl or .csv)")
    films = []
    for number, row in enumerate(manifest.read(path), 1):
        unknown = sorted(set(row) - {"video", "caption", "start", "end"})
        if "video" not in row or unknown:
            what = f"has unknown {unknown[0]!r}" if unknown else "names no video"
            raise UserError(f"manifest {path}, row {number} {what}: columns are video, caption, start, end")
        start, end = (_seconds(row.get(key), f"manifest {path}, row {number}: {key}") for key in ("start", "end"))
        part = "" if start is None and end is None else f"@{start or 0:g}-{'' if end is None else format(end, 'g')}"
        file = path.parent / str(row["video"])
        films.append(Film(str(file), str(row.get("caption") or caption or ""), f"{row['video']}{part}", start, end))
    names = [film.name for film in films]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"manifest {path} names {doubled[0]} twice")
    return films


def _sidecar(path: Path) -> str:
    text = path.with_suffix(".txt")
    return " ".join(text.read_text(encoding="utf-8", errors="replace").split()) if text.is_file() else ""


def _seconds(value: Any, what: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0:
        raise UserError(f"{what} must be seconds, got {value!r}")
    return float(value)


def load_sync_model(name: str) -> SyncModel | None:
    """The function that MODULE:FUNCTION names; None for nothing.

    Raises:
      UserError: there is none.
    """
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--sync-model {name!r} is not MODULE:FUNCTION that can be imported ({error})") from error


class Films:
    """Films as a source of clips (builder.Source). words: the tokenizer, which says whether a caption can be used."""

    def __init__(self, films: Sequence[Film], rules: Rules, preset: Preset, words: Any):
        self.films, self.rules, self.preset, self.words = films, rules, preset, words
        self.sync = load_sync_model(rules.sync_model)
        longest = max(rules.frames)
        if longest > preset.max_frames:
            raise UserError(f"--frames must be at most {preset.max_frames} for the preset {preset.name}, got {longest}")

    def __len__(self) -> int:
        return len(self.films)

    def describe(self) -> dict[str, Any]:
        """What decides the clips."""
        return {"films": [dataclasses.astuple(film) for film in self.films], "rules": dataclasses.asdict(self.rules)}

    def clips(self, number: int) -> Iterator[RawClip | Dropped]:
        """The clips of a film in their order, and what was dropped of it; a file that cannot be read is dropped."""
        film = self.films[number]
        if not film.caption:
            yield Dropped(film.name, "no caption: put NAME.txt beside it, or give --caption")
            return
        try:
            self.words.encode([film.caption])
            yield from self._cut(film)
        except UserError as error:
            yield Dropped(film.name, str(error).replace(film.path, film.name))

    def _cut(self, film: Film) -> Iterator[RawClip | Dropped]:
        source = media.VideoSource(film.path)
        first = round((film.start or 0.0) * FPS)
        last = round(min(source.seconds, film.end if film.end is not None else np.inf) * FPS)
        shortest = min(self.rules.frames)
        if last - first < shortest:
            why = f"shorter than {shortest} frames at {FPS} a second"
            yield Dropped(film.name, why, max(last - first, 0) / FPS)
            return
        track = source.track()
        if track is None:
            yield Dropped(film.name, "no sound track", (last - first) / FPS)
            return
        wave = media.resample(track[0].mean(axis=1), track[1], RATE)
        height = round(source.height * (1 - self.rules.subtitle_band))
        size = fitted_size(height, source.width, self.preset)
        frames = itertools.islice(source.frames_at(FPS), first, last)
        at, left = first, last - first
        while fitting := [n for n in self.rules.frames if n <= left]:
            count = max(fitting)
            video = np.stack(
                [media.fit_image(frame[:height], *size)[0] for frame in itertools.islice(frames, count)]
                or [np.zeros(0)]
            )
            if len(video) < count:
                break  # a file whose frames end before its length says so
            sound = wave[round(at / FPS * RATE) : round((at + count) / FPS * RATE)]
            yield self._looked_through(film, f"{film.name}/{at / FPS:.2f}", video, sound)
            at, left = at + count, left - count
        if left:
            yield Dropped(f"{film.name}/{at / FPS:.2f}", "the rest of a film, shorter than a clip", left / FPS)

    def _looked_through(self, film: Film, name: str, video: np.ndarray, wave: np.ndarray) -> RawClip | Dropped:
        """The clip, or why it is dropped."""
        seconds = len(video) / FPS
        if len(wave) < len(video) / FPS * RATE * 0.98:
            return Dropped(name, "the sound ends before the picture", seconds)
        if np.abs(wave).max() < QUIET:
            return Dropped(name, "silence", seconds)
        face = None
        if self.rules.face != "none":
            boxes = [media.detect_faces(video[at]) for at in (0, len(video) // 2, len(video) - 1)]
            if not all(boxes):
                return Dropped(name, "no face", seconds)
            if self.rules.face == "one" and max(map(len, boxes)) > 1:
                return Dropped(name, "several faces", seconds)
            face = _around([media.choose_face(some, "largest") for some in boxes])
        if self.sync:
            offset, confidence = self.sync(video, wave, face)
            if confidence < self.rules.min_confidence:
                return Dropped(name, "the sync model is not confident", seconds)
            if abs(offset) > self.rules.max_offset:
                return Dropped(name, "sound and picture are apart", seconds)
        return RawClip(name, film.caption, video, wave, face, mouth_of(face, *video.shape[1:3]))


def _around(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds some (y1, y2, x1, x2)."""
    y1, y2, x1, x2 = zip(*boxes, strict=True)
    return min(y1), max(y2), min(x1), max(x2)


def mouth_of(face: Box | None, height: int, width: int) -> np.ndarray:
    """[H, W] 1 where a mouth moves: the lower half of the face's box and a tenth below it; without a box, the middle
    third of the lower half of the picture."""
    y1, y2, x1, x2 = face or (0.2 * height, 0.9 * height, width / 3, 2 * width / 3)
    mask = np.zeros((height, width), np.float32)
    top, bottom = round((y1 + y2) / 2), round(y2 + 0.1 * (y2 - y1))
    mask[max(top, 0) : min(bottom, height), max(round(x1), 0) : min(round(x2), width)] = 1.0
    return mask
