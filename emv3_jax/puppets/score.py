"""Scores weights on the small world: python -m emv3_jax.puppets.score [--weights DIR] [--recordings a.wav b.wav ...]

Prints a table and, with --json, writes the numbers. Rows: what the pipeline generates on held-out identities, sentences
and voices; the true videos; the true videos through the VAE and back; recordings spoken by held-out puppets.

The task is i2v unless --task says otherwise; `--task t2v i2v` makes two rows, "generated, t2v" and "generated". (For
t2v the identity says nothing: no picture was given.)
"""

import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterable

import numpy as np

from emv3_jax import command_line, demo, media
from emv3_jax.config import Preset
from emv3_jax.errors import UserError
from emv3_jax.pipeline import FPS, RATE, Pipeline, SamplingOptions, load_pipeline
from emv3_jax.puppets import clips, evaluation

TASKS = ("t2v", "i2v", "flf2v", "lipsync")  # those that the demo is trained on
COLUMNS = ("sync", "sync_other", "offset", "motion", "identity", "drift", "psnr")
Make = Callable[[list[clips.Clip], int], np.ndarray]


def recording_clips(path: pathlib.Path, frames: int, first_index: int) -> list[clips.Clip]:
    """Held-out puppets that speak a recording, one for each piece of `frames` frames.

    Raises:
      UserError: the recording is shorter than one piece.
    """
    wave, notes = media.load_audio(path, RATE)
    samples = round(frames / FPS * RATE)
    if len(wave) < samples:
        raise UserError(
            f"{path} lasts {len(wave) / RATE:.2f} s, shorter than {frames} frames: give fewer with --frames"
        )
    rest = len(wave) % samples / RATE
    for note in [*notes, *([f"{path}: the last {rest:.2f} s fill no piece and are left out"] if rest else [])]:
        print(f"note: {note}")
    pieces = [wave[at : at + samples] for at in range(0, len(wave) - samples + 1, samples)]
    return [clips.make_clip("heldout", first_index + i, frames, wave=piece) for i, piece in enumerate(pieces)]


def score_weights(
    pipe: Pipeline,
    options: SamplingOptions,
    count: int,
    frames: int,
    spoken: dict[str, list[clips.Clip]],
    tasks: Iterable[str] = ("i2v",),
    first_clip: int = 0,
) -> dict[str, list[dict[str, float]]]:
    """Rows of the table: name -> scores of each clip.

    Args:
      count, frames: held-out clips; first_clip: the number of the first.
      spoken: clips of recordings, by the name of their row.
      tasks: what is generated, a row each; rows of other tasks than i2v have the task in their name.
    """
    size = pipe.preset.height
    held_out = [clips.make_clip("heldout", first_clip + i, frames) for i in range(count)]

    def true(batch: list[clips.Clip], first: int) -> np.ndarray:
        return np.stack([np.asarray(clip.render(size)) for clip in batch])

    def made(batch: list[clips.Clip], first: int, task: str) -> np.ndarray:
        return evaluation.generate_batch(pipe, options, batch, task, seed=first)

    def decoded(batch: list[clips.Clip], first: int) -> np.ndarray:
        return evaluation.through_codec(pipe, true(batch, first))

    def generated(name: str, some: list[clips.Clip]) -> dict[str, tuple[Make, list[clips.Clip]]]:
        named = {task: name if task == "i2v" else f"{name}, {task}" for task in tasks}
        return {row: (functools.partial(made, task=task), some) for task, row in named.items()}

    rows: dict[str, tuple[Make, list[clips.Clip]]] = generated("generated", held_out)
    rows |= {"true video": (true, held_out), "through the VAE": (decoded, held_out)}
    for name, some in spoken.items():
        rows |= generated(name, some)
    return {name: evaluation.in_batches(make, some)[0] for name, (make, some) in rows.items()}


def check_frames(frames: int, preset: Preset) -> None:
    """Raises UserError for a number of frames that cannot be scored, or that the preset cannot generate."""
    if frames % 4 != 1 or frames < 13:
        raise UserError(f"--frames must be 4k + 1 and at least 13, got {frames}")
    if frames > preset.max_frames:
        raise UserError(
            f"--frames must be at most {preset.max_frames}, the longest clip of the preset {preset.name}, got {frames}"
        )


def main(arguments: list[str]) -> int:
    """Parses the command line, scores, prints."""
    parser = command_line.make_parser("emv3_jax.puppets.score", __doc__, config="configs/demo.py")
    parser.add_argument("--clips", type=int, default=64, help="held-out clips (default: 64)")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them (default: 0)")
    parser.add_argument("--frames", type=int, default=81, help="frames of a clip, 4k + 1 (default: 81)")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["i2v"], help="what to generate (default: i2v)")
    parser.add_argument("--recordings", nargs="*", default=[], type=pathlib.Path, help="sound files to speak")
    parser.add_argument("--weights", help="a folder that train.py wrote (default: the shipped weights)")
    parser.add_argument("--json", help="also write the numbers here")
    options, cfg = command_line.parse(parser, arguments)
    if options.clips < 1:
        raise UserError(f"--clips must be at least 1, got {options.clips}")
    if options.first < 0:
        raise UserError(f"--first must be 0 or more, got {options.first}")
    target = media.check_writable(options.json, (".json",)) if options.json else None
    if "sampling" not in cfg or "preset" not in cfg or "weights" not in cfg:
        raise UserError("this config is not for sampling: give configs/demo.py")
    check_frames(options.frames, demo.preset(cfg))
    sampling = SamplingOptions(**cfg.sampling)
    if len(set(options.recordings)) < len(options.recordings):
        raise UserError("--recordings names a file twice")
    spoken = {
        str(path): recording_clips(path, options.frames, 100_000 + 100 * number)
        for number, path in enumerate(options.recordings)
    }
    command_line.setup_compile_cache()
    pipe = load_pipeline(cfg.preset, options.weights or cfg.weights or None)
    tasks = dict.fromkeys(options.task)
    table = score_weights(pipe, sampling, options.clips, options.frames, spoken, tasks, options.first)
    means = {name: {"clips": len(rows), **evaluation.means(rows)} for name, rows in table.items()}
    wide = max(len(name) for name in means) + 2
    print(f"{'':{wide}}{'clips':>7}" + "".join(f"{name:>12}" for name in COLUMNS))
    for name, row in means.items():
        print(f"{name:{wide}}{row['clips']:7d}" + "".join(f"{row.get(column, np.nan):12.3f}" for column in COLUMNS))
    if target:
        with media.atomic_path(target) as path:
            path.write_text(json.dumps({"means": means, "clips": table}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
