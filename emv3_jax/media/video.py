"""Video files: H.264 with AAC sound written frame by frame, and any video read back."""

import array
import contextlib
from collections.abc import Iterator
from fractions import Fraction
from types import TracebackType
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from PIL import Image

from emv3_jax.errors import UserError
from emv3_jax.files import PathLike, atomic_path, check_readable
from emv3_jax.media.audio import SLACK, Sound, decode_sound, mixed, open_media, resample

# Rates that AAC knows; sound at any other is converted to the last of them.
LAYOUTS = {1: "mono", 2: "stereo"}
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
INDEXED = ("mov,", "matroska")  # kinds of files in which a picture can be looked up exactly
UNTAGGED = 2  # FFmpeg's number for colours of which a file does not say how they are coded
HD_HEIGHT, HD_WIDTH = 720, 1280  # from either on, players take untagged colours for BT.709, below for BT.601
ROUNDING = 2e-3  # seconds; WebM and FLV round the times of frames to milliseconds
MAX_FPS = 120  # frames that come in bursts count as no faster
TIE = 1e-6  # seconds; what comes out of a division as nearly the same moment is the same


class VideoWriter:
    """Writes an mp4 that every browser plays: H.264 (yuv420p, BT.709, even sides, index in front) and AAC.

        with VideoWriter("out/talk.mp4", height=64, width=64, wave=wave, scale=4) as writer:
            for chunk in chunks:  # uint8 [F, H, W, 3] or one frame [H, W, 3]
                writer.write(chunk)

    Frames are encoded as they come, so memory does not grow with length. The file appears under its name when the
    block ends; if the block raises, nothing is left behind. Sound is cut or padded with silence to the frames' length.
    """

    def __init__(
        self,
        path: PathLike,
        height: int,
        width: int,
        *,
        fps: float = 25,
        wave: np.ndarray | None = None,
        rate: int = 16000,
        scale: float = 1,
        crf: int = 16,
        comment: str = "",
    ) -> None:
        """Describes the file; it is opened by `with`.

        height, width: of the frames that will be written. wave: float [n] or [n, 1 or 2] in [-1, 1] at `rate` Hz, or
        None for a silent file. scale: enlarges the picture smoothly (Lanczos), for frames too small to look at. crf: 0
        is lossless, 51 is worst. comment: kept in the file's metadata.
        """
        self.path = path
        self.height, self.width = height, width
        self.fps = Fraction(fps).limit_denominator(1001)
        self.count = 0  # frames written so far
        # An enlarged picture is resized to the size of the file, another is padded by its edge.
        self._size, self._resized = even_size(height * scale, width * scale), scale != 1
        self._wave = wave[:, None] if wave is not None and wave.ndim == 1 else wave
        self._rate = rate
        self._crf = crf
        self._comment = comment

    def __enter__(self) -> "VideoWriter":
        self._session = self._open()
        self._session.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._session.__exit__(kind, error, trace)

    def write(self, frames: np.ndarray) -> None:
        """Encodes uint8 frames [F, H, W, 3] or [H, W, 3], and the sound that belongs to them."""
        frames = frames[None] if frames.ndim == 3 else frames
        if frames.dtype != np.uint8 or frames.shape[1:] != (self.height, self.width, 3):
            raise ValueError(
                f"frames must be uint8 [F, {self.height}, {self.width}, 3], not {frames.dtype} {frames.shape}"
            )
        for frame in frames:
            self._write_frame(frame)

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        with (
            atomic_path(self.path) as temporary,
            av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container,
        ):
            self._container = container
            if self._comment:
                container.metadata["comment"] = self._comment
            self._picture = self._add_picture()
            self._sound = self._add_sound(self._wave) if self._wave is not None else None
            yield
            if self.count == 0:
                raise ValueError("no frame was written")
            self._container.mux(self._picture.encode(None))
            if self._sound is not None:
                self._container.mux(self._sound.encode(None))

    def _add_picture(self) -> av.VideoStream:
        options = {"crf": str(self._crf), "preset": "medium"}
        stream = self._container.add_stream("libx264", rate=self.fps, options=options)
        (stream.height, stream.width), stream.pix_fmt = self._size, "yuv420p"
        stream.codec_context.gop_size = round(2 * self.fps)  # a key frame every two seconds, to jump about quickly
        stream.codec_context.color_range = ColorRange.MPEG
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        return stream

    def _add_sound(self, wave: np.ndarray) -> av.AudioStream:
        if self._rate not in AAC_RATES:
            self._wave, self._rate = resample(wave, self._rate, AAC_RATES[-1]), AAC_RATES[-1]
        channels = wave.shape[1]
        stream = self._container.add_stream("aac", rate=self._rate, layout=LAYOUTS[channels])
        stream.codec_context.bit_rate = channels * (128_000 if self._rate > 24000 else 64_000)
        return stream

    def _write_frame(self, frame: np.ndarray) -> None:
        if self._resized:
            frame = np.asarray(Image.fromarray(frame).resize(self._size[::-1], Image.Resampling.LANCZOS))
        elif self.height % 2 or self.width % 2:
            frame = np.pad(frame, ((0, self.height % 2), (0, self.width % 2), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        picture.pts, picture.time_base = self.count, 1 / self.fps
        self._container.mux(self._picture.encode(picture))
        if self._sound is not None and self._wave is not None:
            self._write_sound(self._sound, self._wave)
        self.count += 1

    def _write_sound(self, stream: av.AudioStream, wave: np.ndarray) -> None:
        """Encodes the stretch of the wave that belongs to the current frame; silence where it has ended."""
        start, end = (round(n * self._rate / self.fps) for n in (self.count, self.count + 1))
        samples = np.zeros((wave.shape[1], end - start), np.float32)
        piece = np.clip(wave[start:end], -1.0, 1.0)
        samples[:, : len(piece)] = piece.T
        block = av.AudioFrame.from_ndarray(samples, format="fltp", layout=LAYOUTS[wave.shape[1]])
        block.sample_rate, block.pts, block.time_base = self._rate, start, Fraction(1, self._rate)
        self._container.mux(stream.encode(block))


class VideoSource:
    """A video that is read as often as need be, a frame at a time, in the time of its timestamps.

    Time 0 is the first frame's. height, width: of the upright pictures, with square pixels. fps: frames a second; where
    they come at no steady rate, the one at which most of them come. count: frames. times: float64 [count], seconds.
    seconds: until the last frame ends. notes: what is unusual about it, one sentence each.

    Raises:
      UserError: for a file that is not a video or is damaged.
    """

    def __init__(self, path: PathLike):
        self.path = check_readable(path, "video")
        first, last = None, 0.0
        times, stamps = array.array("d"), array.array("q")
        with self._open() as (container, stream):
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            ratio = stream.sample_aspect_ratio or Fraction(1)
            self._seeks = container.format.name.startswith(INDEXED)
            for frame in container.decode(stream):  # all of it: what is damaged is told now, and not after hours
                first = first or frame
                if frame.pts is not None:
                    stamps.append(frame.pts)
                expected = times[-1] + 1 / rate if times else 0.0  # some AVI files do not tell all times
                times.append(expected if frame.time is None else frame.time)
                last = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
        if first is None:
            raise UserError(f"video {path} holds no pictures")
        self.count, self._start, self._stamps = len(times), times[0], np.asarray(stamps)
        self._seeks &= len(stamps) == len(times) and bool((np.diff(self._stamps) > 0).all())
        self.times, self._usual, self.fps, steady = _rhythm(np.asarray(times) - times[0], rate)
        self.seconds = float(self.times[-1]) + (last if last > 1.5 * self._usual else self._usual)
        self._size = _square(first.height, first.width, ratio)
        self.height, self.width = self._upright(first).shape[:2]
        self.notes = []
        if not steady:
            self.notes.append(f"video {path} has a variable frame rate: it is read at {self.fps:g} frames a second")
        if self._size != (first.height, first.width):
            size = f"{self.width}x{self.height}"
            self.notes.append(f"video {path} has pixels that are not square: it is read as {size}, as players show it")

    def frames(self) -> Iterator[np.ndarray]:
        """Upright uint8 [H, W, 3], one after another, however long each is shown."""
        for _, frame in self._decoded(0):
            yield self._upright(frame)

    def shown(self, fps: float) -> np.ndarray:
        """The number of the frame that is shown at every moment k / fps while the video lasts (`shown_at`): int [K]."""
        return shown_at(self.times, self._usual, self.seconds, fps)

    def frames_at(self, fps: float, first: int = 0, last: int | None = None) -> Iterator[np.ndarray]:
        """The frames `shown(fps)[first:last]`; all as they are at the video's own rate, if that is steady."""
        wanted = self.shown(fps)[first:last]
        done = 0
        for number, frame in self._decoded(int(wanted[0])) if len(wanted) else ():
            if number < wanted[done]:
                continue
            picture = self._upright(frame)
            while done < len(wanted) and wanted[done] <= number:
                yield picture
                done += 1
            if done == len(wanted):
                return
        if done < len(wanted):
            raise UserError(f"video {self.path} has changed while it was read: start again")

    def track(self) -> Sound | None:
        """The sound in [-1, 1] from the first frame to the end of the last, or None; cut: it went on after that."""
        with self._open() as (container, _):
            # The two tracks need not start together.
            starts = [float((s.start_time or 0) * (s.time_base or 0)) for s in container.streams.audio]
            lead = max(0.0, self._start - min(starts, default=0.0))
            sound = decode_sound(container, self.seconds + lead + 1)
        if sound is not None and sound.broken:
            raise UserError(f"the sound of video {self.path} is cut off or damaged: save or download it again")
        if sound is not None and not np.isfinite(sound.samples).all():
            raise UserError(f"the sound of video {self.path} holds samples that are not numbers: export it again")
        return None if sound is None else _aligned(sound, self._start, self.seconds)

    def _decoded(self, first: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """The frames from number `first`, or from one before it, to the end, with their numbers."""
        if first and self._seeks:
            with self._open() as (container, stream):
                with contextlib.suppress(av.FFmpegError):
                    container.seek(int(self._stamps[first]), stream=stream)
                numbered = ((int(np.searchsorted(self._stamps, f.pts or 0)), f) for f in container.decode(stream))
                head = next(numbered, None)
                # An index may be missing, or lead too far (it has the order in which frames are stored): all are read.
                if head is not None and head[0] <= first and self._stamps[head[0]] == head[1].pts:
                    yield head
                    yield from numbered
                    return
        with self._open() as (container, stream):
            yield from enumerate(container.decode(stream))

    def _upright(self, frame: av.VideoFrame) -> np.ndarray:
        """RGB as a player shows it: phones store the turn beside the picture, and some cameras oblong pixels."""
        changes: dict[str, Any] = {}
        if frame.colorspace == UNTAGGED and (frame.height >= HD_HEIGHT or frame.width >= HD_WIDTH):
            changes |= {"src_colorspace": Colorspace.ITU709}
        if (frame.height, frame.width) != self._size:
            changes |= {"height": self._size[0], "width": self._size[1], "interpolation": Interpolation.LANCZOS}
        return np.rot90(frame.to_ndarray(format="rgb24", **changes), k=frame.rotation // 90 % 4)

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
        try:
            with open_media(self.path) as container:
                stream = next((s for s in container.streams.video if s.codec_context is not None), None)
                if stream is None:
                    raise UserError(f"video {self.path} holds no pictures")
                yield container, stream
        except av.FFmpegError:
            raise UserError(f"video {self.path} is not a video or is damaged: give an MP4, WebM or MOV file") from None


def shown_at(times: np.ndarray, usual: float, seconds: float, fps: float) -> np.ndarray:
    """Which of a video's frames are shown at the moments k / fps, as long as it lasts to the nearest 1 / fps: int [K].

    The one nearest in time, and between two the later; but in a gap longer than usual the one before it is held.
    times: float [F], seconds, rising from 0. usual: seconds between two frames. seconds: until the last frame ends.
    """
    begins = times - np.minimum(np.diff(times, prepend=times[0] - usual), usual) / 2
    moments = np.arange(max(1, int(seconds * fps + 0.5 + TIE))) / fps
    return np.maximum(np.searchsorted(begins, moments + TIE, side="right") - 1, 0)


def even_size(height: float, width: float) -> tuple[int, int]:
    """The size in which `VideoWriter` writes a picture: H.264 in yuv420p has even sides only."""
    return _even(height), _even(width)


def read_video(
    path: PathLike, rate: int = 16000, max_seconds: float | None = None
) -> tuple[np.ndarray, float, np.ndarray | None]:
    """A whole video: frames uint8 [F, H, W, 3], frames a second, and sound float32 [n] mono at `rate` or None.

    Frames come at the video's own rate, or at its usual one if it has no steady one. The sound starts with the
    first frame and ends no later than the last. max_seconds: gives no more than that.
    Raises UserError as `VideoSource`.
    """
    source = VideoSource(path)
    limit = None if max_seconds is None else round(max_seconds * source.fps)
    frames, track = np.stack(list(source.frames_at(source.fps, 0, limit))), source.track()
    if track is None:
        return frames, source.fps, None
    wave = resample(mixed(track.samples)[0], track.rate, rate)
    return frames, source.fps, wave[: round(len(frames) / source.fps * rate)]


def _aligned(sound: Sound, start: float, seconds: float) -> Sound:
    """The sound that begins with the picture, at `start` seconds of the file, and ends no later than it; cut: it went
    on, by more than encoders add."""
    lead = round((sound.start - start) * sound.rate)  # samples by which the sound starts after the picture
    samples = np.pad(sound.samples, ((lead, 0), (0, 0))) if lead > 0 else sound.samples[-lead:]
    last = round(seconds * sound.rate)
    cut = len(samples) - last > SLACK * sound.rate
    return sound._replace(samples=np.clip(samples[:last], -1.0, 1.0), cut=cut, start=0.0)


def _rhythm(times: np.ndarray, told: float) -> tuple[np.ndarray, float, float, bool]:
    """The times [count] of frames, the usual seconds between two, frames a second, and whether that rate is steady.

    times: in the file, from 0. told: frames a second in its header, which is the mean or a guess.
    """
    times = np.maximum.accumulate(times)
    mean = (len(times) - 1) / times[-1] if times[-1] else told
    for rate in (told, mean):  # some headers are wrong
        even = np.arange(len(times)) / rate
        if np.abs(times - even).max() < ROUNDING or not times[-1]:
            return even, 1 / rate, rate, True
    gaps = np.diff(times)
    middle = np.median(gaps)
    near = np.abs(gaps - middle) <= middle / 2
    usual = max(float(gaps[near].mean()), 1 / MAX_FPS)
    return times, usual, told if abs(told * usual - 1) < 0.01 else round(1 / usual, 3), bool(near.all())


def _square(height: int, width: int, ratio: Fraction) -> tuple[int, int]:
    """Height and width of a picture whose pixels are `ratio` times as wide as high, made square: no line is lost."""
    if abs(ratio - 1) < 0.01:  # what an encoder's rounding leaves of square ones
        return height, width
    return round(height * max(1.0, float(1 / ratio))), round(width * max(1.0, float(ratio)))


def _even(side: float) -> int:
    """The nearest even number, upwards for odd ones: no line of the picture is lost."""
    return max(2, 2 * int(np.ceil(side / 2 - 1e-6)))
