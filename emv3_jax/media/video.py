"""Video files: H.264 with AAC sound written frame by frame, and any video read back."""

import contextlib
import itertools
from collections.abc import Iterator
from fractions import Fraction
from types import TracebackType

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from emv3_jax.errors import UserError
from emv3_jax.files import PathLike, atomic_path, check_readable
from emv3_jax.media.audio import Sound, at_most_stereo, decode_sound, open_media, resample

# Rates that AAC knows; sound at any other is converted to the last of them.
LAYOUTS = {1: "mono", 2: "stereo"}
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


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
        # H.264 in yuv420p has even sides only. An enlarged picture is resized to them, another is padded by its edge.
        self._resized = (_even(width * scale), _even(height * scale)) if scale != 1 else None
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
        width, height = self._resized or (_even(self.width), _even(self.height))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
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
            frame = np.asarray(Image.fromarray(frame).resize(self._resized, Image.Resampling.LANCZOS))
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
    """A video that is read as often as need be, a frame at a time.

    height, width: of the upright pictures. fps: frames a second. count: frames. seconds: count / fps.

    Raises:
      UserError: for a file that is not a video or is damaged.
    """

    def __init__(self, path: PathLike):
        self.path = check_readable(path, "video")
        first, self.count = None, 0
        with self._open() as (container, stream):
            self.fps = float(stream.average_rate or stream.guessed_rate or 25)
            for frame in container.decode(stream):  # all of it: what is damaged is told now, and not after hours
                first = first or frame
                self.count += 1
        if first is None:
            raise UserError(f"video {path} holds no pictures")
        self._start = first.time or 0.0
        self.height, self.width = _upright(first).shape[:2]
        self.seconds = self.count / self.fps

    def frames(self) -> Iterator[np.ndarray]:
        """Upright uint8 [H, W, 3], one after another."""
        with self._open() as (container, stream):
            for frame in container.decode(stream):
                yield _upright(frame)

    def frames_at(self, fps: float) -> Iterator[np.ndarray]:
        """The nearest frame to every moment k / fps, as long as the video lasts; all as they are at its own rate."""
        wanted = 0
        for n, frame in enumerate(self.frames()):
            while self.nearest(wanted, fps) == n:
                yield frame
                wanted += 1

    def nearest(self, moment: int, fps: float) -> int:
        """The frame that is shown at a moment of `fps` a second; between two, the later."""
        return int(moment * self.fps / fps + 0.5)  # round() would take halves to even numbers, and stutter

    def track(self) -> tuple[np.ndarray, int] | None:
        """The sound, float32 [n, 1 or 2] in [-1, 1] from the first frame to the last, and its rate; None if silent."""
        with self._open() as (container, _):
            sound = decode_sound(container, self.seconds + 1)  # the two tracks need not start together
        if sound is not None and sound.broken:
            raise UserError(f"the sound of video {self.path} is cut off or damaged: save or download it again")
        return None if sound is None else (_aligned(sound, self._start, self.seconds), sound.rate)

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


def read_video(
    path: PathLike, rate: int = 16000, max_seconds: float | None = None
) -> tuple[np.ndarray, float, np.ndarray | None]:
    """A whole video: frames uint8 [F, H, W, 3] upright, frames a second, and sound float32 [n] mono at `rate` or None.

    The sound starts with the first frame and ends no later than the last. max_seconds: gives no more than that.
    Raises UserError as `VideoSource`.
    """
    source = VideoSource(path)
    limit = None if max_seconds is None else round(max_seconds * source.fps)
    frames, track = np.stack(list(itertools.islice(source.frames(), limit))), source.track()
    if track is None:
        return frames, source.fps, None
    wave = resample(track[0].mean(axis=1), track[1], rate)
    return frames, source.fps, wave[: round(len(frames) / source.fps * rate)]


def _aligned(sound: Sound, start: float, seconds: float) -> np.ndarray:
    """Samples [n, 1 or 2] that begin with the picture, at `start` seconds of the file, and end no later than it."""
    samples = at_most_stereo(sound.samples)
    lead = round((sound.start - start) * sound.rate)  # samples by which the sound starts after the picture
    samples = np.pad(samples, ((lead, 0), (0, 0))) if lead > 0 else samples[-lead:]
    return np.clip(samples[: round(seconds * sound.rate)], -1.0, 1.0)


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """RGB as a player shows it: phones store the turn beside the picture."""
    return np.rot90(frame.to_ndarray(format="rgb24"), k=frame.rotation // 90 % 4)


def _even(side: float) -> int:
    """The nearest even number, upwards for odd ones: no line of the picture is lost."""
    return max(2, 2 * int(np.ceil(side / 2 - 1e-6)))
