"""Prompts over time: "0-4s: A puppet nods; 4-9s: A puppet waves." (one prompt without times counts throughout).

Axes: P prompts, T latent frames.
"""

import dataclasses
import re

import numpy as np

from emv3_jax.config import FPS
from emv3_jax.errors import UserError

# What is understood: 4, 4.5, 4,5 (seconds) and 0:04, 1:04.5 (minutes and seconds).
_NUMBER, _CLOCK = r"\d+(?:[.,]\d+)?", r"\d+:[0-5]\d(?:[.,]\d+)?"
_COLON = "[:\uff1a]"
_SPAN = re.compile(rf"\s*({_CLOCK}|{_NUMBER})\s*s?\s*-\s*({_CLOCK}(?:\s*s)?|{_NUMBER}\s*s)\s*{_COLON}\s*")
# What people write for it. Without a colon behind it, or inside a text, only what has a unit or is a clock is meant so.
_UNIT = r"\s*(?:s(?:ec(?:ond)?s?)?|min(?:ute)?s?)"
_PLAIN = rf"{_NUMBER}(?:{_UNIT})?"
_TIME = rf"\d+(?::\d+)*(?:[.,]\d+)?(?:{_UNIT})?"
_CERTAIN = rf"(?:{_NUMBER}{_UNIT}|\d+(?::\d\d)+(?:[.,]\d+)?)"
_DASH = r"\s*[-\u2013\u2014~]\s*"
_TO = rf"(?:{_DASH}|\s*to\s*)"
_MEANT = (
    rf"(?:{_TIME}{_TO}{_CERTAIN}\s*{_COLON}|{_CERTAIN}{_TO}{_TIME}\s*{_COLON}(?!\d)|\[\s*{_TIME}{_TO}{_CERTAIN}\s*\]"
    rf"|[\[(]\s*{_TIME}{_TO}{_TIME}\s*[\])]\s*{_COLON})"
)
_NEARLY = rf"\s*(?:{_MEANT}|{_PLAIN}{_DASH}(?:{_PLAIN}|end)\s*{_COLON})"
_WITHOUT_COLON = rf"\s*\(?{_TIME}{_TO}(?:{_NUMBER}\s*s|\d+(?::\d\d)+)\b"
_INSIDE = re.compile(rf"(?<!\w){_MEANT}")
_SEPARATOR = re.compile(rf"[;\uff1b]|\n(?={_NEARLY}|{_WITHOUT_COLON})")
EXAMPLE = '"0-4s: A puppet nods; 4-9s: A puppet waves."'


@dataclasses.dataclass(frozen=True)
class Span:
    """A prompt from `start` to `end`, in seconds; infinity is the end of the video."""

    start: float
    end: float
    text: str


def parse(prompt: str) -> tuple[Span, ...]:
    """A prompt, or several with their times, in order and without gaps.

    Times are meant where a part (parts end with a semicolon, or with a line if the next one begins with a span) begins
    with a span and a colon, such as "0-4s:" or "0-4:", or in brackets, as in "[0-4s]", or where all of several parts
    begin with a span in s, as in "0-4s A puppet nods; 4-9s A puppet waves". Then every part must be written as in
    EXAMPLE, or with times like "4,5s" or "0:04", and no text may hold another span: "0-4s: A puppet nods, 4-9s: ...".
    Anything else is one prompt: "2-3 people talk.", "1920s-style host; 3-4 times.", "1 to 3: one, two, three."

    Raises:
      UserError: the prompt is empty, or its times cannot be read; says at which character.
    """
    if not prompt.strip():
        raise UserError('the prompt is empty: say what is to be seen, e.g. "A puppet nods and smiles."')
    ends = [found.span() for found in _SEPARATOR.finditer(prompt)]
    borders = zip([0, *(end for _, end in ends)], [*(start for start, _ in ends), len(prompt)], strict=True)
    parts = [(start, prompt[start:end]) for start, end in borders if prompt[start:end].strip()]
    if not _is_timed([part for _, part in parts]):
        return (Span(0.0, np.inf, prompt.strip()),)
    spans: list[Span] = []
    for at, part in parts:
        spans.append(_span(part, at, spans[-1].end if spans else 0.0))
    return tuple(spans)


def _is_timed(parts: list[str]) -> bool:
    return any(re.match(_NEARLY, part) for part in parts) or (
        len(parts) > 1 and all(re.match(_WITHOUT_COLON, part) for part in parts)
    )


def _span(part: str, at: int, expected: float) -> Span:
    """One "START-ENDs: text", which begins at character `at` of the prompt and has to start when the last one ended."""
    found = _SPAN.match(part)
    place = f"prompt, character {at + len(part) - len(part.lstrip()) + 1}"
    if not found:
        raise UserError(f"{place}: times are written like {EXAMPLE}, got {part.strip()[:40]!r}")
    start, end, text = _seconds(found[1]), _seconds(found[2]), part[found.end() :].strip()
    if other := _INSIDE.search(part, found.end()):
        raise UserError(
            f"prompt, character {at + other.start() + 1}: a part must end with a semicolon before the next one begins,"
            f" as in {EXAMPLE}, got {part[other.start() :].strip()[:40]!r}"
        )
    if start != expected:
        raise UserError(f"{place}: this part must start at {expected:g}s, where the one before ends, got {start:g}s")
    if end <= start:
        raise UserError(f"{place}: {start:g}-{end:g}s ends before it starts")
    if not text:
        raise UserError(f"{place}: nothing is said of {start:g}-{end:g}s")
    return Span(start, end, text)


def _seconds(time: str) -> float:
    """Of "4.5", "4,5s" or "1:04.5"."""
    minutes, _, seconds = time.rstrip("s \t\n").replace(",", ".").rpartition(":")
    return round(60 * int(minutes or 0) + float(seconds), 6)  # the same number however it is written


def fit(spans: tuple[Span, ...], seconds: float) -> tuple[tuple[Span, ...], list[str]]:
    """The spans of a video of some length, the last one up to its end, and notes on what was changed."""
    notes = [
        f"the video ends after {seconds:.2f} s: the prompt for {span.start:g}-{span.end:g}s is not used"
        for span in spans
        if span.start >= seconds
    ]
    kept = tuple(span for span in spans if span.start < seconds)
    if kept[-1].end < seconds:
        notes.append(f"the last prompt ends at {kept[-1].end:g}s: it goes on to the end of the video")
    return (*kept[:-1], dataclasses.replace(kept[-1], end=np.inf)), notes


def shares(spans: tuple[Span, ...], latent_frames: int) -> np.ndarray:
    """How much each prompt counts in each latent frame, by the video frames that it stands for: float32 [P, T]."""
    frames = np.arange(-3, 4 * latent_frames - 3).clip(0)  # the first latent frame is one video frame
    seconds = frames.reshape(latent_frames, 4) / FPS
    inside = [(span.start <= seconds) & (seconds < span.end) for span in spans]
    return np.mean(inside, axis=2, dtype=np.float32)


def of_window(share: np.ndarray, start: int, end: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompts that a window of latent frames uses: their numbers int [most], and their shares [most, end - start].

    Where it uses fewer, number 0 follows with shares of 0.
    """
    used = np.flatnonzero(share[:, start:end].any(axis=1))
    numbers, shares_of_window = np.zeros(most, int), np.zeros((most, end - start), np.float32)
    numbers[: len(used)] = used
    shares_of_window[: len(used)] = share[used, start:end]
    return numbers, shares_of_window
