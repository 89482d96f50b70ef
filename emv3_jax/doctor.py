"""What this machine can run, in words: python -m emv3_jax.doctor [--weights DIR ...]

One line a finding: "ok", "note" (works, but you should know) or "NO" (does not work), and for everything that is not
ok what to do about it. Exit status 1 where any line says NO.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from emv3_jax import command_line
from emv3_jax.errors import UserError

GB = 1e9
PACKAGE, INSTALL = "emv3_jax", "pip install -e . in the folder of this program"
OPTIONAL = {
    "torch": "only needed to convert .pth files: pip install 'emv3_jax[torch]'",
    "dlib-bin": "only needed to find faces in pictures: pip install 'emv3_jax[face]'",
}
ACCELERATORS = {  # what is there when the hardware is -> the extra that JAX needs to use it
    "/dev/nvidia0": ("an NVIDIA GPU", "gpu", "cuda"),
    "/dev/accel0": ("a TPU", "tpu", "tpu"),
}
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
SOUND_FILES = {"WAV": ".wav", "FLAC": ".flac", "OGG": ".ogg", "MP3": ".mp3"}


@dataclasses.dataclass(frozen=True)
class Line:
    """One finding. level: ok, note or NO. advice: what to do, where there is something to do."""

    level: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"  {self.level:5}{self.text}" + (f": {self.advice}" if self.advice else "")


def versions() -> Iterator[Line]:
    """Python and the libraries."""
    yield Line("ok", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    try:
        wanted = [
            re.split(r"[^\w.-]", words)[0] for words in importlib.metadata.requires(PACKAGE) or [] if ";" not in words
        ]
    except importlib.metadata.PackageNotFoundError:
        yield Line("NO", f"{PACKAGE} is not installed", INSTALL)
        return
    found, missing = [], []
    for name in wanted:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    yield Line("ok", ", ".join(found))
    if missing:
        yield Line("NO", f"{', '.join(missing)} not installed", INSTALL)
    for name, advice in OPTIONAL.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield Line("ok", f"{name} {importlib.metadata.version(name)}")
            continue
        yield Line("note", f"{name} is not installed", advice)


def host_memory() -> float:
    """GB of memory that this process may use: the machine's, or its container's."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word "max"
            limits.append(int(pathlib.Path(path).read_text()))
    return min(limits) / GB


def device_memory(device: Any) -> float:
    """GB that programs on a device can use; a CPU's is the machine's."""
    stats = None if device.platform == "cpu" else device.memory_stats()
    return stats["bytes_limit"] / GB if stats else host_memory()


def devices() -> Iterator[Line]:
    """What JAX computes on, and what it leaves unused."""
    import jax

    for device in jax.local_devices():
        yield Line("ok", f"{device.platform} {device.device_kind}, {device_memory(device):.1f} GB")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = shutil.disk_usage(".").free / GB
    yield Line("ok", f"{cores} CPU cores, {host_memory():.1f} GB memory, {free:.0f} GB free on this disk")
    for path, (what, backend, extra) in ACCELERATORS.items():
        if os.path.exists(path) and jax.default_backend() != backend:
            yield Line("NO", f"{what} is here, but JAX does not use it", f"pip install 'emv3_jax[{extra}]'")


def presets() -> Iterator[Line]:
    """Which presets' weights fit into the memory of one device, and in which type."""
    import jax

    from emv3_jax.config import PRESETS
    from emv3_jax.pipeline import expected_params

    memory = min(device_memory(device) for device in jax.local_devices())
    for preset in PRESETS.values():
        models = {
            role: sum(leaf.size for leaf in jax.tree.leaves(tree)) for role, tree in expected_params(preset).items()
        }
        values, largest = sum(models.values()), 2 * max(models.values()) / GB
        sizes = {"float32": 4 * values / GB, "bfloat16": 2 * values / GB}
        what = f"{preset.name}: {values / 1e6:,.0f} million weights"
        fits = [name for name, size in sizes.items() if size < 0.8 * memory]  # the rest is for what is computed
        if fits:
            yield Line("ok", f"{what}, {sizes[fits[0]]:.2g} GB in {fits[0]}, fit here with room to compute")
        elif largest < 0.8 * memory:
            alone = f"one model at a time fits here, the largest with {largest:.1f} GB in bfloat16"
            yield Line("note", f"{what}, {alone}", "leave the config's low_memory on")
        else:
            small = f"{sizes['bfloat16']:.1f} GB in bfloat16 do not fit into {memory:.1f} GB"
            yield Line("note", f"{what}, {small}", "use a machine with more memory")


def codecs() -> Iterator[Line]:
    """Writes and reads back a video with sound, and sound files of every kind."""
    from emv3_jax import media
    from emv3_jax.config import FPS, RATE

    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "test.mp4"
        yield _tried("video: H.264 and AAC in mp4", lambda: _video(path, wave[: RATE // 5], FPS, RATE))
        for kind, suffix in SOUND_FILES.items():
            sound = pathlib.Path(folder) / f"test{suffix}"
            yield _tried(f"sound: {kind}", functools.partial(_sound, sound, wave, RATE, media))


def _video(path: pathlib.Path, wave: np.ndarray, fps: int, rate: int) -> None:
    from emv3_jax import media

    frames = np.zeros((5, 64, 64, 3), np.uint8)
    with media.VideoWriter(path, 64, 64, fps=fps, wave=wave, rate=rate) as video:
        video.write(frames)
    if len(media.read_video(path)[0]) != len(frames):
        raise OSError("a video of 5 frames came back with another number of them")


def _sound(path: pathlib.Path, wave: np.ndarray, rate: int, media: Any) -> None:
    import soundfile

    soundfile.write(path, wave, rate)
    back, _ = media.load_audio(path, rate)
    if abs(len(back) - len(wave)) > rate // 10 or not np.isfinite(back).all():
        raise OSError(f"{len(wave)} samples came back as {len(back)}")


def _tried(what: str, work: Callable[[], None]) -> Line:
    """A line on something that was tried."""
    try:
        work()
    except Exception as error:  # whatever is wrong, the other checks go on
        reason = str(error).strip().split("\n")[0][:150] or type(error).__name__
        return Line("NO", f"{what} ({reason})", "pip install --force-reinstall av soundfile")
    return Line("ok", what)


def weights(folders: list[pathlib.Path]) -> Iterator[Line]:
    """The shipped weights, and for each folder of converted ones which models are complete."""
    from emv3_jax import checkpoint, conditioning, converted
    from emv3_jax.config import DEMO, PRESETS
    from emv3_jax.pipeline import expected_params
    from emv3_jax.weight_files import TOKENIZER, WEIGHTS, locate

    yield _checked("demo, shipped", lambda: checkpoint.load_models(WEIGHTS / "demo", expected_params(DEMO)))
    for folder in folders:
        places = {preset: locate(folder, "dit", preset) for preset in PRESETS.values()}
        # Files are of our own training, which is of the demo so far; converted weights are folders.
        found = [p for p, place in places.items() if place.is_file() == (p is DEMO) and place.exists()]
        if not found:
            advice = "put one there with train.py, or with python -m convert to-jax --to"
            yield Line("NO", f"{folder} holds no transformer", advice)
        for preset in found:
            for role, like in expected_params(preset).items():
                path = locate(folder, role, preset)
                look = checkpoint.load_params if path.suffix == ".safetensors" else converted.check_converted
                yield _checked(f"{preset.name}, {path}", functools.partial(look, path, like))
            tokenizer = functools.partial(conditioning.tokenizer, preset, folder / TOKENIZER)
            yield _checked(f"{preset.name}, {TOKENIZER}", tokenizer)


def _checked(what: str, look: Callable[[], Any]) -> Line:
    """A line on weights; what is wrong with them says itself what to do."""
    try:
        look()
    except UserError as error:
        example = f" ({error.details[0]}, ...)" if error.details else ""
        return Line("NO", f"{what}: {error.message}{example}")
    return Line("ok", f"{what}: complete")


def main(arguments: list[str]) -> int:
    """Parses the command line, looks, prints."""
    parser = command_line.Parser(prog="python -m emv3_jax.doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", nargs="*", default=[], type=pathlib.Path, help="folders of converted weights")
    options = parser.parse_args(arguments)
    sections = {
        "Versions": versions,
        "Devices": devices,
        "Presets": presets,
        "Codecs": codecs,
        "Weights": lambda: weights(options.weights),
    }
    good = True
    for title, look in sections.items():
        print(title)
        try:
            for line in look():
                print(line, flush=True)
                good &= line.level != "NO"
        except Exception as error:  # this is the program that must not die of what it looks for
            reason = next(iter(str(error).splitlines()), "")[:150]
            print(Line("NO", f"looking at it failed ({type(error).__name__}: {reason})", INSTALL))
            good = False
    print("all is well" if good else "see the lines that say NO")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
