"""What is asked for, and how it is read, checked and fitted to a preset before any model runs."""

import dataclasses
import math
import os
from typing import Any

import numpy as np

from emv3_jax import conditioning, tasks, timeline
from emv3_jax.config import FPS, RATE, Preset
from emv3_jax.errors import UserError

Box = tuple[float, float, float, float]  # y1, y2, x1, x2 in pixels
DETECT = "detect"
MAKES = ("i2v", "t2v", "flf2v", "lipsync")  # tasks that a user can ask for


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    image: [H, W, 3] uint8, or a path; not for t2v and lipsync. audio: [n] at 16 kHz, or a path; lipsync: default the
    video's own sound. prompt: not empty; or several with their times (`timeline`). frames: 4k + 1; None: as many as the
    audio lasts (lipsync: as the video). face: where the voice may act, as (y1, y2, x1, x2) in pixels of the image, or a
    path to a .npy file (`media.load_face_box`); "detect", "largest" or a number: a face that is found
    (`media.choose_face`); None: everywhere. Noise follows from the seed. task: one of MAKES.
    last_image: flf2v, as image. video: lipsync, a path, of which only the box `mouth` (pixels of the video) changes.
    fps: lipsync, frames a second of the result; None: those of the video. match_colours: not for lipsync, every frame's
    colours are moved to those of the first (`media.colours`), after all sampling.
    """

    image: Any = None
    audio: Any = None
    prompt: str = ""
    frames: int | None = None
    seed: int = 0
    face: Box | str | os.PathLike | int | None = None
    task: str = "i2v"
    last_image: Any = None
    video: str | os.PathLike | None = None
    mouth: Box | None = None
    fps: float | None = None
    match_colours: bool = False


@dataclasses.dataclass(frozen=True)
class Ready:
    """A request that was read and checked: arrays of the preset's sizes, and what was done to make them fit."""

    task: str
    image: np.ndarray  # [H, W, 3] uint8, what the image encoder sees; grey for t2v
    wave: np.ndarray  # [n] at 16 kHz, as long as the video
    heard: np.ndarray  # [n] at 16 kHz, what the audio encoder is given: for a speech encoder the whole recording
    prompts: tuple[timeline.Span, ...]
    frames: int
    seed: int
    face: Box | None
    notes: tuple[str, ...]
    last_image: np.ndarray | None = None  # [H, W, 3] uint8
    track: tuple[np.ndarray, int] | None = None  # the sound as it was given, [n, 1 or 2], and its rate
    video: Any = None  # media.VideoSource whose pixels outside `mouth` are kept
    mouth: tuple[int, int, int, int] | None = None  # the box that changes, in pixels of the video
    mouth_made: Box | None = None  # and in those of the generated pictures
    fps: float = FPS  # of the result
    match_colours: bool = False  # of all frames to the first

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the generated pictures."""
        return self.image.shape[0], self.image.shape[1]

    @property
    def mouths(self) -> np.ndarray:
        """Lip sync: the number of the generated picture whose mouth each frame of the result takes, int [F].

        Frame n shows the video at n / fps; there are as many as both the video and the generated pictures last.
        """
        from emv3_jax import media

        seconds = min(self.frames / FPS, self.video.seconds)
        return media.shown_at(np.arange(self.frames) / FPS, 1 / FPS, seconds, self.fps)

    @property
    def output(self) -> tuple[float, int]:
        """Frames a second of the video that comes out, and how many: lip sync keeps those of its own video."""
        return (FPS, self.frames) if self.video is None else (self.fps, len(self.mouths))

    @property
    def title(self) -> str:
        """The prompts in one line."""
        return "; ".join(span.text for span in self.prompts)


def frames_for(seconds: float) -> int:
    """The largest 4k + 1 frames that the sound fills, at least 5."""
    whole = int(seconds * FPS + 1e-6)  # 1.16 s are 29 frames, though 1.16 * 25 comes out below 29
    return max((whole - 1) // 4 * 4 + 1, 5)


def fitted_size(height: int, width: int, preset: Preset) -> tuple[int, int]:
    """Height and width of a preset's video of a height x width picture (SPEC section 3, output size).

    Either the preset's own; or the picture's proportions in at most the preset's area, both sides floored to multiples
    of 16, as released; or, with a `side_step`, the multiples of it that lose least of the picture and of the area.
    """
    if not preset.keep_proportions:
        return preset.height, preset.width
    area = min(preset.height * preset.width, height * width)
    if preset.side_step and min(height, width) >= preset.side_step:
        return _rounded_size(height / width, area, preset.side_step)
    # The largest multiple of 16 whose square is at most area·h/w, in whole numbers: nothing is lost to rounding.
    fitted_height, fitted_width = (
        16 * math.isqrt(area * a // (256 * b)) for a, b in ((height, width), (width, height))
    )  # fmt: skip
    return max(16, fitted_height), max(16, fitted_width)


def _rounded_size(proportion: float, area: int, step: int) -> tuple[int, int]:
    """Height and width in multiples of `step` and at most `area`: few sizes, so that few are compiled."""

    def kept(size: tuple[int, int]) -> float:
        """How much of the picture is seen, times how much of the area is used."""
        ratio = size[0] / size[1] / proportion
        return min(ratio, 1 / ratio) * size[0] * size[1] / area

    heights = range(step, area // step + 1, step)
    return max(((h, w) for h in heights if (w := area // h // step * step)), key=kept)


def fit_box(
    box: Box, height: int, width: int, to_height: int, to_width: int, fit: str = "crop", what: str = "face box"
) -> Box:
    """A box (y1, y2, x1, x2), y2 and x2 not included, of a height x width image, after `media.fit_image` to another
    size; of a box that is cut, the part that is seen.

    Raises:
      UserError: the box is empty, or lies outside the image or in what is cut off.
    """
    y1, y2, x1, x2 = _checked_box(box, height, width, what)
    (down, top), (across, left) = _moves(height, width, to_height, to_width, fit)
    y1, y2 = (float(np.clip(y * down - top, 0, to_height)) for y in (y1, y2))
    x1, x2 = (float(np.clip(x * across - left, 0, to_width)) for x in (x1, x2))
    if y1 == y2 or x1 == x2:
        raise UserError(f"the {what} {box} lies in the part of the {height} x {width} image that is cut off")
    return y1, y2, x1, x2


def _moves(height: int, width: int, to_height: int, to_width: int, fit: str) -> tuple[tuple[float, float], ...]:
    """Down and across: by how much `media.fit_image` scales, and how many pixels it then cuts off on either side."""
    down, across = to_height / height, to_width / width
    if fit == "crop":
        down = across = max(down, across)
    return (down, (height * down - to_height) / 2), (across, (width * across - to_width) / 2)


def _fitted_mouth(
    mouth: Box, size: tuple[int, int], to: tuple[int, int], fit: str
) -> tuple[tuple[int, int, int, int], Box]:
    """The mouth's box in whole pixels of a video of some height and width, and in those of the generated pictures.

    Raises:
      UserError: the box is empty, or not all of it is seen in the generated pictures.
    """
    y1, y2, x1, x2 = (round(side) for side in _checked_box(mouth, *size, "mouth box"))
    box = y1, y2, x1, x2
    fitted = fit_box(box, *size, *to, fit, "mouth box")
    seen = [
        side
        for (scale, cut), length in zip(_moves(*size, *to, fit), to, strict=True)
        for side in (math.ceil(cut / scale - 1e-6), math.floor((cut + length) / scale + 1e-6))
    ]
    if y1 < seen[0] or y2 > seen[1] or x1 < seen[2] or x2 > seen[3]:
        raise UserError(
            f"the mouth box {box} reaches into the part of the {size[0]} x {size[1]} video that is cut off: it must"
            f" lie within {tuple(seen)} (y1, y2, x1, x2)"
        )
    return box, fitted


def read_request(request: Request, preset: Preset, words: Any = None) -> Ready:
    """Reads the files of a request and fits them to a preset; needs no model.

    Args:
      words: the tokenizer (`load_tokenizer`); default: the preset's own, where it has a vocabulary.
    Raises:
      UserError: an empty prompt, too many words, or a file that cannot be used.
    """
    notes: list[str] = []
    _check_task(request)
    spans = timeline.parse(request.prompt)
    words = words or conditioning.tokenizer(preset)
    for text in dict.fromkeys(span.text for span in spans):
        words.encode([text])
        notes += words.notes(text)
    video = None
    if request.task == "lipsync":
        video, image, more = _read_video(request)
        notes += more
    elif request.task == "t2v":
        image = np.full((preset.height, preset.width, 3), 128, np.uint8)
    else:
        image = _read_image(request.image, notes)
    whole = image
    image = _fitted(whole, fitted_size(whole.shape[0], whole.shape[1], preset), preset, notes)
    face = _fitted_face(request.face, whole, image.shape[:2], preset, notes)
    mouth = mouth_made = None
    if request.mouth is not None:
        mouth, mouth_made = _fitted_mouth(request.mouth, whole.shape[:2], image.shape[:2], preset.fit)
    last = None
    if request.task == "flf2v":
        last = _fitted(_read_image(request.last_image, notes), image.shape[:2], preset, notes)
    wave, track, frames = _read_sound(request, preset, video, notes)
    spans, more = timeline.fit(spans, frames / FPS)
    notes += more
    samples = round(frames / FPS * RATE)
    whole, wave = wave, np.pad(wave[:samples], (0, max(0, samples - len(wave)))).astype(np.float32)
    heard = whole if preset.speech else wave
    return Ready(
        task=request.task,
        image=image,
        wave=wave,
        heard=heard,
        prompts=spans,
        frames=frames,
        seed=request.seed,
        face=face,
        notes=tuple(notes),
        last_image=last,
        track=track,
        video=video,
        mouth=mouth,
        mouth_made=mouth_made,
        fps=request.fps or (video.fps if video is not None else FPS),
        match_colours=request.match_colours,
    )


def _check_task(request: Request) -> None:
    """Whether a task is given what it needs, and nothing that it would not use."""
    if request.task not in MAKES:
        raise UserError(f"there is no task {request.task!r}: one of {', '.join(MAKES)}")
    needs = {
        "i2v": ("image", "audio"), "t2v": ("audio",), "flf2v": ("image", "last_image", "audio"),
        "lipsync": ("video", "mouth"),
    }[request.task]  # fmt: skip
    for name in ("image", "last_image", "video", "mouth", "audio"):
        given = getattr(request, name) is not None
        if not given and name in needs:
            raise UserError(f"the task {request.task} needs {name.replace('_', ' ')}")
        if given and name not in (*needs, "audio"):
            raise UserError(f"the task {request.task} takes no {name.replace('_', ' ')}")
    if request.fps is not None and not 1 <= request.fps <= 120:
        raise UserError(f"fps must be from 1 to 120, got {request.fps:g}")
    if request.task != "lipsync" and request.fps is not None:
        raise UserError(f"the task {request.task} takes no fps: its videos have {FPS} frames a second")
    if request.task == "t2v" and request.face is not None:
        raise UserError("the task t2v takes no face box: there is no picture to find it in")
    if request.task == "lipsync" and request.match_colours:
        raise UserError("the task lipsync takes no match_colours: the mouth has the colours of its own video")


def _read_image(image: Any, notes: list[str]) -> np.ndarray:
    from emv3_jax import media

    if not isinstance(image, str | os.PathLike):
        return media.check_image(image)
    image, more = media.load_image(image)
    notes += more
    return image


def _read_video(request: Request) -> tuple[Any, np.ndarray, list[str]]:
    """The video of lip sync, and its first frame."""
    from emv3_jax import media

    assert request.video is not None and request.mouth is not None
    video = media.VideoSource(request.video)
    notes = list(video.notes)
    if request.fps and request.fps != video.fps:
        notes.append(f"video {request.video} has {video.fps:g} frames a second, the result {request.fps:g}")
    if (request.fps or video.fps) != FPS:
        notes.append(f"mouths are made {FPS} times a second: every frame of the result takes the nearest")
    height, width = media.even_size(video.height, video.width)
    if (height, width) != (video.height, video.width):
        notes.append(
            f"video {request.video} is {video.width}x{video.height}, the result {width}x{height}: H.264 has"
            " even sides only, so an edge is repeated"
        )
    return video, next(video.frames()), notes


def _fitted(image: np.ndarray, size: tuple[int, int], preset: Preset, notes: list[str]) -> np.ndarray:
    from emv3_jax import media

    image, note = media.fit_image(image, *size, preset.fit)
    notes += [note] if note else []
    return image


def _fitted_face(face: Any, image: np.ndarray, size: tuple[int, int], preset: Preset, notes: list[str]) -> Box | None:
    from emv3_jax import media

    source = image.shape[:2]
    if face is None:
        return None
    if preset.dit.audio_windows is not None:
        if face != DETECT:
            notes.append(f"the face box is not used: the {preset.name} model has no face mask")
        return None
    if isinstance(face, int) or face in (DETECT, "largest"):
        face = media.choose_face(media.detect_faces(image), face)
        notes.append(f"the voice acts on the face at {','.join(f'{side:.0f}' for side in face)} (y1,y2,x1,x2)")
    elif isinstance(face, str | os.PathLike):
        face = media.load_face_box(face, *source)
    if preset.face_floored:
        return _released_box(face, source, size)
    return fit_box(face, source[0], source[1], size[0], size[1], preset.fit)


def _released_box(box: Box, source: tuple[int, int], size: tuple[int, int]) -> Box:
    """A box of an image after it was stretched to another size, as the released program has it: both sides are scaled
    by the root of the ratio of the areas, and it may reach past the picture. Raises UserError as `fit_box`."""
    ratio = math.sqrt(size[0] * size[1] / source[0] / source[1])
    y1, y2, x1, x2 = (float(side) * ratio for side in _checked_box(box, *source, "face box"))
    return y1, y2, x1, x2


def _read_sound(
    request: Request, preset: Preset, video: Any, notes: list[str]
) -> tuple[np.ndarray, tuple[np.ndarray, int], int]:
    """The whole recording at 16 kHz and as it was given, and how many frames are made of it."""
    from emv3_jax import media

    slack = 0  # samples
    if request.audio is None:
        slack = round(0.01 * RATE)  # a film's own tracks do not end at the same moment
        own = video.track()
        if own is None or not len(own.samples):
            raise UserError(f"video {video.path} has no sound: say what is to be spoken with a recording")
        if own.cut:
            notes.append(f"the sound of video {video.path} goes on after its last picture: the rest is cut off")
        wave, heard, more = media.mixed(own.samples)
        wave, track = media.resample(wave, own.rate, RATE), (heard, own.rate)
        more = [f"the sound of video {video.path} {note}" for note in more]
    elif isinstance(request.audio, str | os.PathLike):
        wave, more, track = media.load_recording(request.audio, RATE)
    else:
        wave, more = media.check_wave(request.audio)
        track = wave[:, None], RATE
    notes += more
    frames = request.frames or (frames_for(len(wave) / RATE) if video is None else _frames_of(video))
    if frames % 4 != 1 or frames < 5:
        raise UserError(f"frames must be 4k + 1 and at least 5, got {frames}")
    if video is not None and frames < _frames_of(video):
        made = f"{frames / FPS:.2f} s are made ({frames} frames)"
        notes.append(f"video {video.path} lasts {video.seconds:.2f} s: only its first {made}")
    if video is not None and frames > _frames_of(video):
        raise UserError(f"video {video.path} lasts {video.seconds:.2f} s: {frames} frames are more than it has")
    longest = frames_for(len(wave) / RATE)
    if frames > longest and video is None and not preset.fill_silence:
        notes.append(f"the sound lasts {len(wave) / RATE:.2f} s: {longest} frames are made of the {frames} asked for")
        frames = longest
    notes += conditioning.audio_notes(preset, wave)
    # What comes out ends with the video, though the last generated pictures may lie past its end.
    seconds = frames / FPS if video is None else min(frames / FPS, video.seconds)
    spare = len(wave) - round(seconds * RATE)
    count = f" ({frames} frames)" if video is None else ""
    if spare > slack:
        notes.append(f"the sound lasts {len(wave) / RATE:.2f} s; the video ends after {seconds:.2f} s{count}")
    elif spare < -slack:
        notes.append(f"the sound lasts {len(wave) / RATE:.2f} s; silence was added up to {seconds:.2f} s")
    return wave, track, frames


def _frames_of(video: Any) -> int:
    """4k + 1 frames at 25 a second that cover a video; the last of them may lie past its end."""
    return max(5, math.ceil((video.seconds * FPS - 1 - 1e-6) / 4) * 4 + 1)


def _checked_box(box: Box, height: int, width: int, what: str) -> Box:
    y1, y2, x1, x2 = box
    if not (0 <= y1 < y2 <= height and 0 <= x1 < x2 <= width):
        raise UserError(f"the {what} {box} (y1, y2, x1, x2) is empty or outside the {height} x {width} image")
    return y1, y2, x1, x2


def given_pixels(ready: Ready, frames: int, last: bool) -> tuple[np.ndarray, np.ndarray]:
    """Video [F, H, W, 3] in [-1, 1] and mask [F, H, W, 1] of what a window of a picture's task is given (SPEC 3).

    last: whether the window ends the video (flf2v).
    """
    task = ready.task if last or ready.task != "flf2v" else "i2v"
    video = np.zeros((frames, *ready.image.shape), np.float32)
    video[0] = scaled(ready.image)
    if task == "flf2v" and ready.last_image is not None:
        video[-1] = scaled(ready.last_image)
    return video, tasks.pixel_mask(task, frames, *ready.size)


def scaled(pixels: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1.0
