"""Talking films as a source of clips: 25 frames a second, cut into pieces, fitted to a preset, and looked through.

A file is read a frame at a time; no more than two clips' frames are in memory, and a film's sound.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emv3_jax import manifest, media
from emv3_jax.config import FPS, RATE, Preset
from emv3_jax.data.builder import Dropped
from emv3_jax.data.extract import RawClip
from emv3_jax.errors import UserError
from emv3_jax.files import PathLike, reason
from emv3_jax.media.face_box import Box
from emv3_jax.request import fit_box, fitted_size

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv")
COLUMNS = {"video": str, "caption": str, "start": float, "end": float}  # of a manifest
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
        if not self.max_offset >= 0:
            raise UserError(f"--max-offset must be 0 or more, got {self.max_offset}")
        if math.isnan(self.min_confidence):
            raise UserError("--min-confidence must be a number")


def find_films(path: PathLike, caption: str | None) -> list[Film]:
    """One film, or those of a folder (with NAME.txt beside NAME.mp4 as its caption) or of a manifest (.jsonl or .csv
    with the columns video, caption, and perhaps start and end in seconds; paths are relative to the manifest).

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
        return [Film(str(p), _sidecar(p) or caption or "", printable(str(p.relative_to(path)))) for p in files]
    if not path.exists():
        raise UserError(
            f"--videos {path} does not exist: give a folder of videos, one video, or a manifest (.jsonl or .csv)"
        )
    if path.suffix.lower() in SUFFIXES:
        return [Film(str(path), _sidecar(path) or caption or "", printable(path.name))]
    films = []
    for number, row in enumerate(manifest.read(path, COLUMNS), 1):
        place = f"manifest {path}, row {number}"
        unknown = sorted(set(row) - set(COLUMNS))
        if row.get("video") in (None, "") or unknown:
            what = f"has unknown {unknown[0]!r}" if unknown else "names no video"
            raise UserError(f"{place} {what}: columns are {', '.join(COLUMNS)}")
        start, end = (_seconds(row.get(key), f"{place}: {key}") for key in ("start", "end"))
        if end is not None and end <= (start or 0.0):
            raise UserError(f"{place}: end must be after start, got {start or 0:g} and {end:g}")
        part = "" if start is None and end is None else f"@{start or 0:.10g}-{'' if end is None else f'{end:.10g}'}"
        file, name = path.parent / str(row["video"]), printable(f"{row['video']}{part}")
        films.append(Film(str(file), str(row.get("caption") or caption or ""), name, start, end))
    counts = collections.Counter(film.name for film in films)
    if doubled := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"manifest {path} names {doubled[0]} twice")
    return films


def printable(name: str) -> str:
    """A file's name as text that can be written: bytes that are not UTF-8, and line ends, become question marks."""
    return "".join(c if c.isprintable() else "?" for c in name)


def _sidecar(path: Path) -> str:
    text = path.with_suffix(".txt")
    try:
        return " ".join(text.read_text(encoding="utf-8-sig", errors="replace").split()) if text.is_file() else ""
    except OSError as error:
        raise UserError(f"caption {text} cannot be read: {reason(error)}") from error


def _seconds(value: Any, what: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
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
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the user's own module raises
        raise UserError(f"--sync-model {name!r} is not MODULE:FUNCTION that can be imported ({error})") from error
    if not callable(found):
        raise UserError(f"--sync-model {name!r} is not a function")
    return found


class Films:
    """Films as a source of clips (builder.Source). words: the tokenizer, which says whether a caption can be used."""

    def __init__(self, films: Sequence[Film], rules: Rules, preset: Preset, words: Any):
        self.films, self.rules, self.preset, self.words = films, rules, preset, words
        self.sync = load_sync_model(rules.sync_model)
        self._footage: _Footage | None = None
        longest = max(rules.frames)
        if longest > preset.max_frames:
            raise UserError(f"--frames must be at most {preset.max_frames} for the preset {preset.name}, got {longest}")
        if rules.face != "none":
            try:  # now, and not as the reason why every film is dropped
                media.detect_faces(np.zeros((64, 64, 3), np.uint8))
            except UserError as error:
                raise UserError(
                    f"--face {rules.face} needs the extra face: pip install -e '.[face]', or give --face none"
                ) from error

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
        except UserError:
            yield Dropped(film.name, f"a caption of more than {self.preset.dit.text_len - 1} words or pieces of words")
            return
        try:
            yield from self._cut(film)
        except UserError as error:
            yield Dropped(
                film.name, str(error).replace(f"video {film.path}", "the film")
            )  # the same for all such files

    def _cut(self, film: Film) -> Iterator[RawClip | Dropped]:
        footage = self._footage_of(film.path)
        source = footage.source
        first = round((film.start or 0.0) * FPS)
        last = _length(source) if film.end is None else min(round(film.end * FPS), _length(source))
        shortest = min(self.rules.frames)
        if last - first < shortest:
            why = f"shorter than {shortest} frames at {FPS} a second"
            yield Dropped(film.name, why, max(last - first, 0) / FPS)
            return
        wave = footage.wave
        if wave is None:
            yield Dropped(film.name, "no sound track", (last - first) / FPS)
            return
        height = round(source.height * (1 - self.rules.subtitle_band))
        size = fitted_size(height, source.width, self.preset)
        frames = source.frames_at(FPS, first, last)
        at, left = first, last - first
        while fitting := [n for n in self.rules.frames if n <= left]:
            count = max(fitting)
            video, whole = np.empty((count, *size, 3), np.uint8), []
            for k, frame in enumerate(itertools.islice(frames, count)):
                video[k] = media.fit_image(frame[:height], *size)[0]
                if k in (0, count // 2, count - 1):
                    whole.append(frame[:height])
            sound = wave[round(at / FPS * RATE) : round((at + count) / FPS * RATE)]
            yield self._looked_through(film, f"{film.name}/{at / FPS:.2f}", video, sound, whole)
            at, left = at + count, left - count
        if left:
            yield Dropped(f"{film.name}/{at / FPS:.2f}", "the rest of a film, shorter than a clip", left / FPS)

    def _footage_of(self, path: str) -> "_Footage":
        """A film that was opened; the last one is kept, for rows of a manifest often take parts of the same."""
        if self._footage is None or self._footage.path != path:
            self._footage = None  # its sound makes room
            self._footage = _Footage(path)
        return self._footage

    def _looked_through(
        self, film: Film, name: str, video: np.ndarray, wave: np.ndarray, whole: Sequence[np.ndarray]
    ) -> RawClip | Dropped:
        """The clip, or why it is dropped. whole: some of its frames in the film's own size, to find faces in."""
        seconds = len(video) / FPS
        if len(wave) < len(video) / FPS * RATE * 0.98:
            return Dropped(name, "the sound ends before the picture", seconds)
        if np.abs(wave).max() < QUIET:
            return Dropped(name, "silence", seconds)
        wave = np.pad(wave, (0, max(0, round(seconds * RATE) - len(wave))))
        face = None
        if self.rules.face != "none":
            boxes = [_faces(frame, *video.shape[1:3]) for frame in whole]
            if not all(boxes):
                return Dropped(name, "no face", seconds)
            if self.rules.face == "one" and max(map(len, boxes)) > 1:
                return Dropped(name, "several faces", seconds)
            face = _around([media.choose_face(some, "largest") for some in boxes])
        if sync := self.sync:
            offset, confidence = _asked("the sync model", lambda: tuple(map(float, sync(video, wave, face))))
            if not confidence >= self.rules.min_confidence:
                return Dropped(name, "the sync model is not confident", seconds)
            if not abs(offset) <= self.rules.max_offset:
                return Dropped(name, "sound and picture are apart", seconds)
        return RawClip(name, film.caption, video, wave, face, mouth_of(face, *video.shape[1:3]))


class _Footage:
    """A film that was looked through once, and its sound when it is asked for."""

    def __init__(self, path: PathLike):
        self.path, self.source = path, media.VideoSource(path)

    @functools.cached_property
    def wave(self) -> np.ndarray | None:
        """[n] at RATE; None: it has no sound track. Channels that cancel each other out give way to one of them."""
        track = self.source.track()
        return None if track is None else media.resample(media.mixed(track.samples)[0], track.rate, RATE)


def _length(source: media.VideoSource) -> int:
    """How many pictures `source.frames_at(FPS)` gives."""
    return len(source.shown(FPS))


def _asked(what: str, ask: Callable[[], Any]) -> Any:
    """What somebody else's code says of a clip. Raises UserError, which drops the film, for whatever it raises."""
    try:
        return ask()
    except UserError:
        raise
    except Exception as error:  # not ours: it may raise anything
        reason = next(iter(str(error).splitlines()), "")[:150]
        raise UserError(f"{what} failed ({type(error).__name__}{': ' * bool(reason)}{reason})") from error


def _faces(frame: np.ndarray, height: int, width: int) -> list[Box]:
    """The faces of a film's frame that are seen in a height x width clip, in its pixels."""
    boxes = []
    for box in _asked("the face detector", lambda: media.detect_faces(frame)):
        with contextlib.suppress(UserError):  # it lies in what is cut off
            boxes.append(fit_box(box, frame.shape[0], frame.shape[1], height, width))
    return boxes


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
