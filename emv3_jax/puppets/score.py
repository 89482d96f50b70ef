"""Scores weights on the small world: python -m emv3_jax.puppets.score [--weights DIR] [--recordings a.wav b.wav ...]

Prints a table and, with --json, writes the numbers. Rows: what the pipeline generates on held-out identities, sentences
and voices; the true videos; the true videos through the VAE and back; recordings spoken by held-out puppets.
"""

import json
import pathlib
import sys

import numpy as np

from emv3_jax import command_line, media
from emv3_jax.errors import UserError
from emv3_jax.pipeline import FPS, RATE, Pipeline, SamplingOptions, load_pipeline
from emv3_jax.puppets import clips, evaluation

COLUMNS = ("sync", "sync_other", "offset", "motion", "identity", "drift", "psnr")


def _by_batches(videos_of, clip_list: list[clips.Clip]) -> list[dict[str, float]]:
    """Scores of videos_of(batch, number of the first) over all clips."""
    rows = []
    for first in range(0, len(clip_list), evaluation.BATCH):
        batch = clip_list[first : first + evaluation.BATCH]
        rows += evaluation.score(videos_of(batch, first), batch)
    return rows


def recording_clips(path: pathlib.Path, frames: int, first_index: int) -> list[clips.Clip]:
    """Held-out puppets that speak a recording, one for each piece of `frames` frames.

    Raises:
      UserError: the recording is shorter than one piece.
    """
    wave, _ = media.load_audio(path, RATE)
    samples = round(frames / FPS * RATE)
    if len(wave) < samples:
        raise UserError(
            f"{path} lasts {len(wave) / RATE:.2f} s, shorter than {frames} frames: give fewer with --frames"
        )
    pieces = [wave[at : at + samples] for at in range(0, len(wave) - samples + 1, samples)]
    return [clips.make_clip("heldout", first_index + i, frames, wave=piece) for i, piece in enumerate(pieces)]


def score_weights(
    pipe: Pipeline, options: SamplingOptions, count: int, frames: int, spoken: dict[str, list[clips.Clip]]
) -> dict[str, list[dict[str, float]]]:
    """Rows of the table: name -> scores of each clip. spoken: clips of recordings, by the name of their row."""
    size = pipe.preset.height
    true = lambda batch, _: np.stack([np.asarray(clip.render(size)) for clip in batch])  # noqa: E731
    made = lambda batch, first: evaluation.generate_batch(pipe, options, batch, seed=first)  # noqa: E731
    held_out = [clips.make_clip("heldout", i, frames) for i in range(count)]
    table = {
        "generated": _by_batches(made, held_out),
        "true video": _by_batches(true, held_out),
        "through the VAE": _by_batches(lambda batch, _: evaluation.through_codec(pipe, true(batch, _)), held_out),
    }
    return table | {name: _by_batches(made, some) for name, some in spoken.items()}


def main(arguments: list[str]) -> int:
    """Parses the command line, scores, prints."""
    parser = command_line.make_parser("emv3_jax.puppets.score", __doc__, config="configs/demo.py")
    parser.add_argument("--clips", type=int, default=64, help="held-out clips (default: 64)")
    parser.add_argument("--frames", type=int, default=81, help="frames of a clip, 4k + 1 (default: 81)")
    parser.add_argument("--recordings", nargs="*", default=[], type=pathlib.Path, help="sound files to speak")
    parser.add_argument("--weights", help="a folder that train.py wrote (default: the shipped weights)")
    parser.add_argument("--json", help="also write the numbers here")
    options, cfg = command_line.parse(parser, arguments)
    if options.clips < 1 or options.frames % 4 != 1 or options.frames < 13:
        raise UserError("--clips must be at least 1, and --frames 4k + 1 and at least 13")
    target = media.check_writable(options.json, (".json",)) if options.json else None
    spoken = {
        path.stem: recording_clips(path, options.frames, 100_000 + 100 * number)
        for number, path in enumerate(options.recordings)
    }
    command_line.setup_compile_cache()
    pipe = load_pipeline(cfg.preset, options.weights or cfg.weights or None)
    sampling = SamplingOptions(**cfg.sampling)
    table = score_weights(pipe, sampling, options.clips, options.frames, spoken)
    means = {name: {"clips": len(rows), **evaluation.means(rows)} for name, rows in table.items()}
    print(f"{'':18}{'clips':>7}" + "".join(f"{name:>12}" for name in COLUMNS))
    for name, row in means.items():
        print(f"{name:18}{row['clips']:7d}" + "".join(f"{row.get(column, np.nan):12.3f}" for column in COLUMNS))
    if target:
        with media.atomic_path(target) as path:
            path.write_text(json.dumps({"means": means, "clips": table}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
