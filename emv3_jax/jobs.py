"""What `sample.py` does: reads a job, renders it, and writes the video, its contact sheet and its record.

A job is a row of settings, from the command line or from a manifest. The record, a JSON file beside the video, says how
it was made; the same, but for times and memory, stands in the video's metadata. Latents of a render lie in a folder
beside the video, from which --resume goes on, until the video and its record are in place.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from emv3_jax import config, demo, manifest, media, render, sharding
from emv3_jax.command_line import did_you_mean
from emv3_jax.config import RATE, Preset
from emv3_jax.diffusion.store import PROGRESS
from emv3_jax.errors import UserError, out_of_memory
from emv3_jax.layers import temporal_frequencies
from emv3_jax.manifest import COLUMNS, Job
from emv3_jax.options import SamplingOptions
from emv3_jax.pipeline import Pipeline, load_pipeline, negative_notes, with_dtype
from emv3_jax.progress import Bar, Clock, peak_memory
from emv3_jax.request import Ready, Request, read_request
from emv3_jax.weight_files import weight_hashes

NO_MATTER = ("sampling", "mesh", "low_memory")  # config keys that a record has elsewhere, or that change no video
NO_MEMORY = (
    "the device has too little memory: try --config.low_memory=true, --config.sampling.branches_together=false,"
    " --config.sampling.windows_together=1, or a smaller picture"
)
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Mode:
    """What a mode changes: the preset, and the sampling options that the config leaves open."""

    preset: Callable[[Preset], Preset]
    sampling: dict[str, str]


MODES = {
    "default": Mode(lambda preset: preset, {}),
    "released": Mode(config.released, {"long_video": "chained", "neg_growth": "cumulative"}),
}


def preset_of(cfg: Any) -> Preset:
    """The preset that a config names, in its mode and dtype.

    Raises:
      UserError: the config is not for sampling, or names what does not exist.
    """
    if "mode" not in cfg:
        raise UserError("this config is not for sampling (it has no key mode): give configs/demo.py")
    if cfg.mode not in MODES:
        raise UserError(f"config key mode: {cfg.mode!r} is none of {', '.join(MODES)}")
    if not 1 <= cfg.enlarge <= 60:
        raise UserError(f"config key enlarge must be from 1 to 60, got {cfg.enlarge}")
    preset = with_dtype(MODES[cfg.mode].preset(demo.preset(cfg)), cfg.dtype or None)
    most = temporal_frequencies(preset.dit.head_width)
    if not 0 <= cfg.riflex <= most:
        raise UserError(f"config key riflex must be from 0 to {most}, the temporal frequencies, got {cfg.riflex}")
    return dataclasses.replace(preset, dit=dataclasses.replace(preset.dit, riflex=cfg.riflex))


def with_face(job: Job, cfg: Any) -> Job:
    """The job with the config's face where it is silent; t2v has no picture to find one in.

    Raises:
      UserError: the config's face is none of what --face takes.
    """
    if job.face is not None or job.task == "t2v":
        return job
    return dataclasses.replace(job, face=manifest.parse_face(cfg.face, "config key face"))


def request_of(job: Job, cfg: Any) -> Request:
    """The request of a job, with the config's own picture, sentence, prompt and face where the job is silent.

    Raises:
      UserError: the config has none.
    """
    job = with_face(job, cfg)
    own_picture = job.task in ("i2v", "flf2v") and job.image is None and cfg.puppet >= 0
    own_sound = job.task != "lipsync" and job.audio is None and cfg.puppet >= 0
    return Request(
        image=demo.portrait(cfg.puppet, demo.preset(cfg).height) if own_picture else job.image,
        audio=demo.SENTENCE if own_sound else job.audio,
        prompt=cfg.prompt if job.prompt is None else job.prompt,
        frames=job.frames or cfg.frames or None,
        seed=job.seed,
        face=None if job.face == "none" else job.face,
        task=job.task,
        last_image=job.last_image,
        video=job.video,
        mouth=job.mouth,
        fps=(cfg.fps if job.fps is None else job.fps) or None,
        match_colours=cfg.match_colours if job.match_colours is None else job.match_colours,
    )


def options_of(job: Job, cfg: Any) -> SamplingOptions:
    """The config's sampling section with the job's own values.

    Raises:
      UserError: a key that the section does not have, or a value that it cannot have.
    """
    unknown = [name for name in job.sampling if name not in cfg.sampling]
    if unknown:
        advice = did_you_mean(unknown[0], [*COLUMNS, *cfg.sampling])
        raise UserError(f"there is no column or sampling option {unknown[0]!r}{advice}")
    for name, value in job.sampling.items():
        kinds = (int, float) if isinstance(cfg.sampling[name], float) else (type(cfg.sampling[name]),)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(f"{name} must be {KINDS[kinds[-1]]}, got {value!r}")
    values = {**cfg.sampling, **job.sampling}
    left_open = {name: value for name, value in MODES[cfg.mode].sampling.items() if not values.get(name)}
    return SamplingOptions(**{**values, **left_open})


def render_folder(out: pathlib.Path) -> pathlib.Path:
    """Where the latents of an unfinished render lie."""
    return out.with_name(out.name + ".render")


def check_resume(out: pathlib.Path, resume: bool) -> None:
    """Raises UserError where an unfinished render would be lost without a word."""
    if render_folder(out).exists() and not resume:
        raise UserError(
            f"{render_folder(out)} holds an unfinished render of {out.name}: add --resume to go on, or remove it"
        )


class Renderer:
    """Renders jobs of one config; the weights are read when the first job needs them."""

    def __init__(self, cfg: Any, preset: Preset, words: Any):
        self.cfg, self.preset, self.words = cfg, preset, words
        self.mesh = sharding.from_config(cfg.mesh)
        self._pipe: Pipeline | None = None
        self._hashes: dict[str, str] = {}

    @property
    def pipe(self) -> Pipeline:
        if self._pipe is None:
            weights = self.cfg.weights or None
            self._pipe = load_pipeline(
                self.preset.name,
                weights,
                preset=self.preset,
                low_memory=self.cfg.low_memory,
                words=self.words,
                mesh=self.mesh,
            )
        return self._pipe

    def read(self, job: Job) -> tuple[Ready, SamplingOptions]:
        """Reads a job's files, checks its settings, and prints what was changed."""
        options = options_of(job, self.cfg)
        notes = negative_notes(options, self.words)
        ready = read_request(request_of(job, self.cfg), self.preset, self.words)
        render.check(ready, options, self.preset)
        ready = render.shortened(ready, options, self.preset)
        for note in (*ready.notes, *notes, *([demo.PUPPETS_ONLY] if self.preset.name == "demo" else [])):
            print(f"note: {note}")
        return ready, options

    def finished(self, job: Job) -> bool:
        """Whether a job's files are there and were made of the same files with the same settings and weights."""
        if not all(path.is_file() for path in manifest.output_files(job)):
            return False
        record, wanted = manifest.read_record(job), json.loads(json.dumps(self._settings(job)))
        return {name: record.get(name) for name in wanted} == wanted

    def _settings(self, job: Job) -> dict[str, Any]:
        """What a video depends on."""
        job = with_face(job, self.cfg)  # its file is an input
        if not self._hashes:
            self._hashes = weight_hashes(self.preset.name, self.cfg.weights or None)
        return {
            "config": {name: value for name, value in self.cfg.to_dict().items() if name not in NO_MATTER},
            "dtype": self.preset.dit.dtype,
            "weights": self._hashes,
            "job": dataclasses.asdict(job),
            "inputs": {kind: _file_hash(path) for kind, path in manifest.input_files(job).items()},
            "sampling": dataclasses.asdict(options_of(job, self.cfg)),
        }

    def render(self, job: Job, ready: Ready, options: SamplingOptions) -> None:
        """Makes the job's files; says what it does and how long it took.

        Raises:
          UserError: the device has too little memory, at whatever stage; or see `Pipeline.stream`.
        """
        clock = Clock()
        try:
            self._make(job, ready, options, clock)
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise UserError(NO_MEMORY) from error
        made = f"{job.out} and {job.sheet}" if job.sheet else job.out
        fps, count = ready.output
        print(f"wrote {made}: {count} frames, {count / fps:.2f} s of video, in {clock.total:.1f} s")
        print("  " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in clock.laps.items()))
        print("  peak memory " + ", ".join(f"{name} {size:.2f} GB" for name, size in peak_memory().items()))

    def _make(self, job: Job, ready: Ready, options: SamplingOptions, clock: "Clock") -> None:
        folder, pipe = render_folder(pathlib.Path(job.out)), self.pipe
        clock.lap("weights read")
        record = self._record(job, ready)
        # The chained form samples between the pictures, so the first bar stays until the end.
        with Bar("sampling", "step", options.steps) as bar:

            def on_step(done: int, total: int) -> None:
                clock.step()
                bar.show(done, total)

            pieces = pipe.stream(ready, options, on_step, folder, tell=lambda line: tqdm.write(f"note: {line}"))
            with _claimed(folder):
                first = next(pieces)
                clock.lap("first frame")
                self._write_video(job, ready, itertools.chain([first], pieces), first.shape[1:3], clock, record)
                record |= {"seconds": clock.laps, "peak_memory_gb": peak_memory()}
                with media.atomic_path(manifest.record_path(job)) as path:
                    path.write_text(_json(record, indent=1) + "\n", encoding="utf-8")

    def _write_video(
        self, job: Job, ready: Ready, pieces: Iterator[np.ndarray], size: tuple[int, ...], clock: "Clock",
        record: dict[str, Any],
    ) -> None:  # fmt: skip
        """Writes pieces [k, H, W, 3] as they come, and the contact sheet, of which only its own frames are kept."""
        assert ready.track is not None
        (fps, count), (sound, rate) = ready.output, ready.track
        shown: dict[int, np.ndarray] = {}
        wanted = set(media.sheet_frames(count))
        with media.VideoWriter(
            job.out, size[0], size[1], fps=fps, wave=sound, rate=rate, scale=1 if ready.video else self.cfg.enlarge,
            comment=_json(record),
        ) as video, Bar("decoding", "frame", count) as bar:  # fmt: skip
            for piece in pieces:
                shown |= {video.count + k: frame for k, frame in enumerate(piece) if video.count + k in wanted}
                video.write(piece)
                bar.show(video.count, count, len(piece))
                clock.lap("decoding and writing")
            # A kill in between may leave a video without a record, but never one beside the record of another.
            manifest.record_path(job).unlink(missing_ok=True)
        clock.lap("decoding and writing")
        if job.sheet:
            media.contact_sheet(shown, count, ready.wave, RATE, fps, job.sheet, ready.title)
            clock.lap("sheet")

    def _record(self, job: Job, ready: Ready) -> dict[str, Any]:
        """How a video is made, as plain JSON."""
        return {
            "program": f"emv3_jax {importlib.metadata.version('emv3_jax')}",
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            **self._settings(job),
            "frames": ready.frames,
            "size": list(ready.size),
            "face": ready.face,
            "notes": list(ready.notes),
        }


def render_all(renderer: Renderer, rows: list[manifest.Row], resume: bool) -> int:
    """Renders the rows of a manifest: finished ones are skipped, bad ones reported. Returns 1 if any failed, or 0.

    Whatever a row raises, even what nobody thought of, is its own failure and not that of the rows after it.
    """
    done, skipped, failed = 0, 0, []
    for number, (row, job) in enumerate(zip(rows, manifest.plan(rows), strict=True), start=1):
        name = f"row {number} of {len(rows)} (line {row.line})"
        try:
            if isinstance(job, Exception):
                raise job
            if renderer.finished(job):
                print(f"{name}: {job.out} is finished", flush=True)
                skipped += 1
                continue
            check_resume(pathlib.Path(job.out), resume)
            print(f"{name}: {job.out}", flush=True)
            ready, options = renderer.read(job)
            renderer.render(job, ready, options)
            done += 1
        except Exception as error:
            failed.append(row.line)
            print(f"{name}: {_reason(error)}", file=sys.stderr, flush=True)
    summary = f"{len(rows)} rows: {done} made, {skipped} were finished, {len(failed)} failed"
    print(summary + (f" (lines {', '.join(map(str, failed))})" if failed else ""))
    return 1 if failed else 0


def _reason(error: Exception) -> str:
    """A user's mistake in its own words; of anything else the type and the first line."""
    if isinstance(error, UserError):
        return "\n".join((" ".join(error.message.split()), *error.details))
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _file_hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(record: dict[str, Any], indent: int | None = None) -> str:
    """JSON that can be written: bytes of a file's name that are not UTF-8 are escaped, and read again as they were."""
    return json.dumps(record, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8")


@contextlib.contextmanager
def _claimed(folder: pathlib.Path) -> Iterator[None]:
    """Around the work on a folder that is this render's own (`store.claim`), which goes when all is written."""
    try:
        yield
    except BaseException:
        _keep_or_remove(folder)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _keep_or_remove(folder: pathlib.Path) -> None:
    """After an interruption: latents of finished steps stay, a folder without any goes."""
    try:
        progress = [json.loads(path.read_text())["done"] for path in folder.glob(f"chunk_*/{PROGRESS}")]
    except (OSError, ValueError, KeyError, TypeError):
        return  # damaged: the store has said so, and what remains of it is the user's
    if any(progress):
        print(f"note: the finished steps are kept in {folder}: go on with --resume", file=sys.stderr)
    else:
        shutil.rmtree(folder, ignore_errors=True)
