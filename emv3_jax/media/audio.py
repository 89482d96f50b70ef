"""Sound in: any common recording becomes a mono float32 wave at the rate the model wants, or one clear line."""

import contextlib
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soundfile
import soxr

from emv3_jax.errors import UserError
from emv3_jax.files import PathLike, check_readable

UNKNOWN_LENGTH = 2**40  # libsndfile gives a number beyond this for a stream whose header has no length
MIN_RATE = 4000  # Hz; below this no speech is left


class Sound(NamedTuple):
    """What a decoder gives: samples float32 [n, channels]."""

    samples: np.ndarray
    rate: int
    cut: bool  # more was there than the caller's limit
    start: float = 0.0  # seconds from the file's time 0 to the first sample


def load_audio(path: PathLike, rate: int = 16000, max_seconds: float | None = None) -> tuple[np.ndarray, list[str]]:
    """Reads a recording: float32 [n] in [-1, 1], mono at `rate` Hz, and notes that say what was changed or looks odd.

    WAV, FLAC, MP3, Ogg, and whatever FFmpeg decodes (M4A, WebM, the sound track of a video). Channels are averaged and
    the rate is converted with soxr. max_seconds: reads no more than that, and says so. A silent recording is allowed
    and noted. Raises UserError for a file that is not a recording, has no samples, or holds NaN or infinite ones.
    """
    path = check_readable(path, "recording")
    samples, source_rate, cut, _ = _decode(path, max_seconds)
    if samples.size == 0:
        raise UserError(f"recording {path} holds no sound (0 samples)")
    if not np.isfinite(samples).all():
        raise UserError(f"recording {path} holds samples that are not numbers (NaN or infinite): export it again")
    if source_rate < MIN_RATE:
        raise UserError(f"recording {path} has {source_rate} samples a second: speech needs at least {MIN_RATE}")
    notes = [f"recording {path} is longer than {max_seconds:g} s: the rest is cut off"] if cut else []
    wave, note = _to_mono(samples)
    if note:
        notes.append(f"recording {path} {note}")
    peak = float(np.abs(wave).max())
    if peak > 1.0:
        wave = wave / peak
        notes.append(f"recording {path} exceeds full scale (peak {peak:.3g}): it is scaled down")
    elif peak < 1e-4:  # -80 dB
        notes.append(f"recording {path} is silent")
    return resample(wave, source_rate, rate), notes


def resample(wave: np.ndarray, source_rate: float, rate: float) -> np.ndarray:
    """float32 [n] at source_rate -> float32 [about n * rate / source_rate], in [-1, 1]."""
    if source_rate == rate:
        return np.ascontiguousarray(wave, np.float32)
    return np.clip(soxr.resample(wave.astype(np.float32), source_rate, rate, quality="VHQ"), -1.0, 1.0)


def _to_mono(samples: np.ndarray) -> tuple[np.ndarray, str | None]:
    """[n, channels] -> [n]: the average, unless the channels cancel each other out."""
    mono = samples.mean(axis=1, dtype=np.float32)
    if samples.shape[1] > 1 and np.abs(mono).max() < 0.02 * np.abs(samples).max():
        loudest = int(np.square(samples).sum(axis=0).argmax())
        return samples[:, loudest], f"has channels that cancel each other out: channel {loudest + 1} alone is used"
    return mono, None


def _decode(path: Path, max_seconds: float | None) -> Sound:
    # What libsndfile cannot read FFmpeg may know. (TypeError: a name in .raw, which says nothing of what is inside.)
    with contextlib.suppress(soundfile.LibsndfileError, TypeError), soundfile.SoundFile(path) as file:
        if file.frames < UNKNOWN_LENGTH:
            limit = file.frames if max_seconds is None else min(file.frames, int(max_seconds * file.samplerate))
            return Sound(file.read(limit, dtype="float32", always_2d=True), file.samplerate, limit < file.frames)
    try:
        with open_media(path) as container:
            sound = decode_sound(container, max_seconds)
    except av.FFmpegError:
        raise UserError(f"recording {path} cannot be read as sound: give a WAV, FLAC, MP3 or Ogg file") from None
    if sound is None:
        raise UserError(f"recording {path} has no sound track")
    return sound


def open_media(path: Path) -> av.container.InputContainer:
    """Opens a file with FFmpeg, whatever alphabet its titles are written in."""
    return av.open(str(path), metadata_errors="replace")


def decode_sound(container: av.container.InputContainer, max_seconds: float | None = None) -> Sound | None:
    """The first sound track that FFmpeg can decode in an open file, or None."""
    stream = next((s for s in container.streams.audio if s.codec_context is not None), None)
    if stream is None:
        return None
    rate, channels = stream.rate, stream.channels
    limit = None if max_seconds is None else int(max_seconds * rate)
    resampler = av.AudioResampler(format="flt", layout=stream.layout, rate=rate)
    blocks: list[np.ndarray] = []
    count = 0
    start: float | None = None
    for frame in container.decode(stream):
        start = frame.time if start is None else start
        for block in resampler.resample(frame):
            blocks.append(block.to_ndarray().reshape(-1, channels))
            count += len(blocks[-1])
        if limit is not None and count > limit:
            break
    samples = np.concatenate(blocks) if blocks else np.zeros((0, channels), np.float32)
    return Sound(samples[:limit], rate, limit is not None and count > limit, start or 0.0)
