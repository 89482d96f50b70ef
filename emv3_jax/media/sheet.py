"""A video on one page: evenly spaced frames, and under them the sound, aligned in time."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from emv3_jax.files import PathLike, atomic_path

ROWS, COLUMNS = 2, 8
CELL = 216  # width of a frame on the page, pixels
GAP = 12
MARGIN = 48
LABEL = 34  # height of the time under a frame
STRIP = 92  # height of the sound under a row
HEAD, ROW_GAP = 104, 30
BAR, BAR_STEP = 3, 5

PAPER, INK, FAINT, LINE = "#fbfaf8", "#22252b", "#7d828b", "#dcdad5"
VOICE, ACCENT, MARK = "#3d6fb4", "#e4572e", "#f2b8a6"


def sheet_frames(count: int) -> tuple[int, ...]:
    """Numbers of the frames that a contact sheet of a video of `count` frames shows."""
    rows, columns = _rows_and_columns(count)
    return tuple(min(int((k + 0.5) * count / (rows * columns)), count - 1) for k in range(rows * columns))


def _rows_and_columns(count: int) -> tuple[int, int]:
    rows = ROWS if count > COLUMNS else 1
    return rows, min(COLUMNS, -(-count // rows))


def contact_sheet(
    frames: Mapping[int, np.ndarray],
    count: int,
    wave: np.ndarray | None,
    rate: int,
    fps: float,
    path: PathLike,
    title: str,
) -> Path:
    """Draws a clip as a PNG: rows of evenly spaced frames, the time of each, and the loudness of the sound below it.

    frames: uint8 [H, W, 3] by number, at least those of `sheet_frames`. count: of the video. wave: float [n] in [-1, 1]
    at `rate` Hz, or None for pictures only. A row is a stretch of time; a frame stands above the moment at which it was
    taken, which a mark in the sound shows. Returns the path.
    """
    rows, columns = _rows_and_columns(count)
    shown = sheet_frames(count)
    height, width_of_frame = frames[shown[0]].shape[:2]
    frame_height = round(CELL * height / width_of_frame)
    row_height = frame_height + LABEL + (STRIP if wave is not None else 0)
    width = 2 * MARGIN + columns * CELL + (columns - 1) * GAP
    page = Image.new("RGB", (width, HEAD + rows * row_height + (rows - 1) * ROW_GAP + MARGIN - 8), PAPER)
    seconds = count / fps
    size = f"{width_of_frame}x{height}"
    _draw_head(page, title, f"{seconds:.2f} s   {count} frames   {size}   {fps:g} fps")
    span = rows * columns  # the clip is cut into as many equal stretches; a frame is taken in the middle of each
    heard = wave[: round(seconds * rate)] if wave is not None else np.zeros(0)
    loudest = max(float(np.abs(heard).max(initial=0)), 1e-4)
    for row in range(rows):
        top = HEAD + row * (row_height + ROW_GAP)
        for column in range(columns):
            time = (row * columns + column + 0.5) * seconds / span
            left = MARGIN + column * (CELL + GAP)
            _draw_frame(page, frames[shown[row * columns + column]], left, top, frame_height, f"{time:.2f} s")
        if wave is not None:
            start, end = (n * columns * seconds / span for n in (row, row + 1))
            piece = _stretch(wave, rate, start, end)
            _draw_sound(page, piece / loudest, MARGIN, top + frame_height + LABEL, columns)
    with atomic_path(path) as temporary:
        page.save(temporary, "PNG", optimize=True)
    return Path(path)


def _draw_head(page: Image.Image, title: str, facts: str) -> None:
    draw = ImageDraw.Draw(page)
    small = ImageFont.load_default(17)
    right = page.width - MARGIN
    base = 66
    facts_width = draw.textlength(facts, font=small)
    room = page.width - 2 * MARGIN - facts_width - 30
    if room > 160:
        draw.text((right, base), facts, font=small, fill=FAINT, anchor="rs")
    else:
        room = page.width - 2 * MARGIN
    draw.text((MARGIN, base), _shorten(draw, title, room), font=ImageFont.load_default(27), fill=INK, anchor="ls")


def _shorten(draw: ImageDraw.ImageDraw, text: str, room: float) -> str:
    """As much of `text` as fits into `room` pixels."""
    font = ImageFont.load_default(27)
    text = " ".join(text.split())
    if draw.textlength(text, font=font) <= room:
        return text
    while text and draw.textlength(text + "...", font=font) > room:
        text = text[:-1]
    return text.rstrip() + "..."


def _draw_frame(page: Image.Image, frame: np.ndarray, left: int, top: int, height: int, label: str) -> None:
    picture = Image.fromarray(frame).resize((CELL, height), Image.Resampling.LANCZOS)
    mask = Image.new("L", (4 * CELL, 4 * height), 0)  # drawn large and shrunk: smooth corners
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * CELL - 1, 4 * height - 1), radius=40, fill=255)
    page.paste(picture, (left, top), mask.resize(picture.size, Image.Resampling.LANCZOS))
    draw = ImageDraw.Draw(page)
    draw.text((left + CELL / 2, top + height + 10), label, font=ImageFont.load_default(15), fill=FAINT, anchor="mt")


def _stretch(wave: np.ndarray, rate: int, start: float, end: float) -> np.ndarray:
    """The samples between two times, with silence where the wave has ended."""
    first, last = round(start * rate), round(end * rate)
    piece = wave[first:last]
    return np.pad(piece, (0, last - first - len(piece)))


def _draw_sound(page: Image.Image, wave: np.ndarray, left: int, top: int, columns: int) -> None:
    """Loudness as mirrored bars over the row's whole width, with a mark under the middle of each frame."""
    # A stretch of time is as wide as a frame and one gap, so the strip begins and ends half a gap outside the frames.
    pitch = CELL + GAP
    start, width = left - GAP // 2, columns * pitch
    draw = ImageDraw.Draw(page)
    middle = top + STRIP // 2
    draw.line((start, middle, start + width, middle), fill=LINE, width=1)
    for column in range(columns):
        x = start + column * pitch + pitch // 2
        draw.line((x, top, x, top + STRIP), fill=MARK, width=2)
        draw.polygon([(x - 5, top - 2), (x + 6, top - 2), (x, top + 6)], fill=ACCENT)
    for x in range(start, start + width - BAR, BAR_STEP):
        samples = wave[round((x - start) / width * len(wave)) : round((x + BAR_STEP - start) / width * len(wave))]
        half = round(float(np.abs(samples).max(initial=0)) * (STRIP / 2 - 4))
        if half > 0:
            draw.rounded_rectangle((x, middle - half, x + BAR - 1, middle + half), radius=1, fill=VOICE)
