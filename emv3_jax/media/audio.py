"""Sound in: any common recording becomes a mono float32 wave at the rate the model wants, or one clear line."""

import contextlib
import re
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soundfile
import soxr

from emv3_jax.errors import UserError
from emv3_jax.files import PathLike, check_readable

UNKNOWN_LENGTH = 2**40  # libsndfile gives a number beyond this for a stream whose header has no length
UNKNOWN_BYTES = 2**31 - 2**16  # a program that writes into a pipe announces this or more, for want of knowing
MIN_RATE = 4000  # Hz; below this no speech is left
SLACK = 0.1  # seconds; decoders differ by as much in what they make of a whole file

# In libsndfile's log: how many bytes the header announces, and how many follow. (WAV, AIFF, AU, W64, RF64)
_SHORT_CHUNK = re.compile(r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)


class Sound(NamedTuple):
    """What a decoder gives: samples float32 [n, channels]."""

    samples: np.ndarray
    rate: int
    cut: bool  # more was there than the caller's limit
    start: float = 0.0  # seconds from the file's time 0 to the first sample
    missing: float = 0.0  # seconds that the header announces and the file lacks
    broken: bool = False  # the file does not end as it should; nothing may tell how much is missing


def load_audio(path: PathLike, rate: int = 16000, max_seconds: float | None = None) -> tuple[np.ndarray, list[str]]:
    """The first two that `load_recording` gives."""
    return load_recording(path, rate, max_seconds)[:2]


def load_recording(
    path: PathLike, rate: int = 16000, max_seconds: float | None = None
) -> tuple[np.ndarray, list[str], tuple[np.ndarray, int]]:
    """Reads a recording: float32 [n] in [-1, 1], mono at `rate` Hz; notes that say what was changed or looks odd; and
    the sound as it is to be heard, float32 [n, 1 or 2] in [-1, 1] with its own rate.

    WAV, FLAC, MP3, Ogg, and whatever FFmpeg decodes (M4A, WebM, the sound track of a video). Channels are averaged and
    the rate is converted with soxr. max_seconds: reads no more than that, and says so. A silent recording is allowed
    and noted; so is one that ends before its header says, as far as it can be read (an MP3 without such a header ends
    anywhere). Raises UserError for a file that is not a recording, has no samples, or holds NaN or infinite ones.
    """
    path = check_readable(path, "recording")
    sound = _decode(path, max_seconds)
    samples = sound.samples
    if samples.size == 0:
        raise UserError(f"recording {path} holds no sound (0 samples)")
    if not np.isfinite(samples).all():
        raise UserError(f"recording {path} holds samples that are not numbers (NaN or infinite): export it again")
    if sound.rate < MIN_RATE:
        raise UserError(f"recording {path} has {sound.rate} samples a second: speech needs at least {MIN_RATE}")
    notes = []
    if sound.cut:
        notes.append(f"recording {path} is longer than {max_seconds:g} s: the rest is cut off")
    elif sound.missing > SLACK or sound.broken:
        read = len(samples) / sound.rate
        lost = f"of {read + sound.missing:.2f} s" if sound.missing > SLACK else "of it"
        notes.append(f"recording {path} is cut off or damaged: only the first {read:.2f} s {lost} can be read")
    wave, heard, more = mixed(samples)
    notes += [f"recording {path} {note}" for note in more]
    return resample(wave, sound.rate, rate), notes, (heard, sound.rate)


def mixed(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Samples [n, channels] of any size as a model hears them, float32 [n]; as they are to be heard, [n, 1 or 2]; both
    in [-1, 1]; and what was done or is odd, to be said after the sound's name. More than two channels become one."""
    mono, note = _to_mono(samples)
    wave, level = _to_full_scale(mono)
    heard = samples if samples.shape[1] <= 2 else mono[:, None]
    if samples.shape[1] > 2 and not note:
        note = f"has {samples.shape[1]} channels: they are averaged to one"
    heard = heard / max(1.0, float(np.abs(heard).max(initial=0.0)))
    return wave, heard, [text for text in (note, level) if text]


def check_wave(wave: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """What `load_audio` is for sound that is given as an array: float32 [n] in [-1, 1], and notes.

    wave: floats [n] at 16 kHz, of any size. Silence is noted; what exceeds [-1, 1] is scaled down, and noted. Raises
    UserError for anything else.
    """
    wave = np.asarray(wave)
    if wave.dtype.kind != "f" or wave.ndim != 1 or not wave.size or not np.isfinite(wave).all():
        raise UserError(f"audio must be a path or finite floats [n] at 16 kHz, got {wave.dtype} {wave.shape}")
    wave, note = _to_full_scale(wave)
    return wave, [f"the sound {note}"] if note else []


def resample(wave: np.ndarray, source_rate: float, rate: float) -> np.ndarray:
    """float32 [n] at source_rate -> float32 [about n * rate / source_rate], in [-1, 1]."""
    if source_rate == rate:
        return np.ascontiguousarray(wave, np.float32)
    return np.clip(soxr.resample(wave.astype(np.float32), source_rate, rate, quality="VHQ"), -1.0, 1.0)


def _to_mono(samples: np.ndarray) -> tuple[np.ndarray, str | None]:
    """[n, channels] -> [n]: the average, unless the channels cancel each other out."""
    mono = samples.mean(axis=1, dtype=np.float32)
    if samples.shape[1] > 1 and np.abs(mono).max(initial=0.0) < 0.02 * np.abs(samples).max(initial=0.0):
        loudest = int(np.square(samples).sum(axis=0).argmax())
        return samples[:, loudest], f"has channels that cancel each other out: channel {loudest + 1} alone is used"
    return mono, None


def _to_full_scale(wave: np.ndarray) -> tuple[np.ndarray, str | None]:
    """[n] -> float32 [n] in [-1, 1], and what is odd about its level."""
    peak = float(np.abs(wave).max(initial=0.0))
    if peak > 1.0:
        return (wave / peak).astype(np.float32), f"exceeds full scale (peak {peak:.3g}): it is scaled down"
    return wave.astype(np.float32), "is silent" if peak < 1e-4 else None  # -80 dB


def _decode(path: Path, max_seconds: float | None) -> Sound:
    # What libsndfile cannot read FFmpeg may know. (TypeError: a name in .raw, which says nothing of what is inside.)
    # MP3 always goes there: without a header libsndfile guesses the length, and leaves out what lies beyond.
    # It is given an open file, for it takes no name that is not UTF-8.
    with (
        contextlib.suppress(soundfile.LibsndfileError, TypeError),
        path.open("rb") as raw,
        soundfile.SoundFile(raw) as file,
    ):
        if file.format != "MP3" and file.frames < UNKNOWN_LENGTH:
            return _read(file, path, max_seconds)
    try:
        with open_media(path) as container:
            sound = decode_sound(container, max_seconds)
    except av.FFmpegError:
        raise UserError(f"recording {path} cannot be read as sound: give a WAV, FLAC, MP3 or Ogg file") from None
    if sound is None:
        raise UserError(f"recording {path} has no sound track")
    return sound


def _read(file: soundfile.SoundFile, path: Path, max_seconds: float | None) -> Sound:
    """What libsndfile reads of an open file."""
    limit = file.frames if max_seconds is None else min(file.frames, int(max_seconds * file.samplerate))
    blocks, count = [np.zeros((0, file.channels), np.float32)], 0
    while len(block := file.read(min(limit - count, 2**16), dtype="float32", always_2d=True)):
        blocks.append(block)  # not all at once: what the header says may not be there
        count += len(block)
    announced = file.frames
    for found in _SHORT_CHUNK.finditer(file.extra_info):
        told, there = int(found[1]), int(found[2])
        if 0 < there < told < UNKNOWN_BYTES:
            announced = max(announced, round(file.frames * told / there))
    cut = count == limit < file.frames
    missing = 0.0 if cut else (announced - count) / file.samplerate
    return Sound(np.concatenate(blocks), file.samplerate, cut, missing=missing, broken=not _ends(file, path))


def _ends(file: soundfile.SoundFile, path: Path) -> bool:
    """Whether the last page of an Ogg file is whole and marked as the last; no other format has such a mark."""
    if file.format != "OGG":
        return True
    with path.open("rb") as raw:
        raw.seek(max(0, path.stat().st_size - 2**17))  # two pages of the largest size
        tail = raw.read()
    at = tail.rfind(b"OggS")
    if at < 0 or len(tail) < at + 27:
        return False
    sizes = tail[at + 27 : at + 27 + tail[at + 26]]
    return bool(tail[at + 5] & 4) and len(tail) >= at + 27 + tail[at + 26] + sum(sizes)


def open_media(path: Path) -> av.container.InputContainer:
    """Opens a file with FFmpeg, whatever alphabet its titles are written in."""
    return av.open(str(path), metadata_errors="replace")


def decode_sound(container: av.container.InputContainer, max_seconds: float | None = None) -> Sound | None:
    """The first sound track that FFmpeg can decode in an open file, or None.

    Where decoding fails after a while, what came before is returned as `broken`; where it fails at once, the error of
    FFmpeg is raised.
    """
    stream = next((s for s in container.streams.audio if s.codec_context is not None), None)
    if stream is None:
        return None
    rate, channels = stream.rate, stream.channels
    limit = None if max_seconds is None else int(max_seconds * rate)
    resampler = av.AudioResampler(format="flt", layout=stream.layout, rate=rate)
    blocks: list[np.ndarray] = []
    count, broken = 0, False
    start: float | None = None
    try:
        for frame in container.decode(stream):
            start = frame.time if start is None else start
            for block in resampler.resample(frame):
                blocks.append(block.to_ndarray().reshape(-1, channels))
                count += len(blocks[-1])
            if limit is not None and count > limit:
                break
    except av.FFmpegError:
        if not blocks:
            raise
        broken = True
    samples = np.concatenate(blocks) if blocks else np.zeros((0, channels), np.float32)
    cut = limit is not None and count > limit
    missing = 0.0 if cut else max(0.0, _announced(container, stream) - count / rate)
    return Sound(samples[:limit], rate, cut, start or 0.0, missing, broken)


def _announced(container: av.container.InputContainer, stream: av.AudioStream) -> float:
    """Seconds of sound that a file's header promises; 0 where it does not, or FFmpeg only guesses."""
    kind = container.format.name
    told = kind.startswith("mov,") or kind == "flac" or (kind == "mp3" and _has_length(Path(container.name)))
    if told and stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if kind.startswith("matroska") and len(container.streams) == 1:  # it has one length for all tracks
        return (container.duration or 0) / av.time_base
    return 0.0


def _has_length(path: Path) -> bool:
    """Whether the first frame of an MP3 file, after its titles, holds a count of the frames."""
    with path.open("rb") as raw:
        head = raw.read(10)
        size = 0
        if head[:3] == b"ID3" and len(head) == 10:
            for byte in head[6:]:
                size = size << 7 | byte & 127
            size += 10
        raw.seek(size)
        first = raw.read(4096)
    return any(mark in first for mark in (b"Xing", b"Info", b"VBRI"))
