"""Makes training data of films or puppets: python -m emv3_jax.data.prepare --videos DIR --weights DIR --out DIR

    python -m emv3_jax.data.prepare --videos films --preset preview --weights weights --out data/films
    python -m emv3_jax.data.prepare --puppets train --clips 832 --preset demo --out data/puppets

Films are cut into clips of 25 frames a second, cropped and scaled to the preset's area in few sizes, and seen by the
frozen models: latents of the clip and of what each task is given of it, sound features, states of text and image. The
captions stand in NAME.txt beside NAME.mp4, or in a manifest (.jsonl or .csv: video, caption, start, end). What is left
out is said, with the reason. A run that was interrupted goes on when the same command is given again; --process 0/4 to
3/4 share the work between four machines that see the same folder.
"""

import argparse
import pathlib
import sys

import numpy as np

from emv3_jax import command_line, weight_files
from emv3_jax.config import PRESETS, Preset
from emv3_jax.data import builder, examples
from emv3_jax.data.extract import Extractor, encoder_hash
from emv3_jax.data.puppets import Puppets
from emv3_jax.data.videos import Films, Rules, find_films
from emv3_jax.errors import UserError
from emv3_jax.files import atomic_path
from emv3_jax.puppets.world import SPLITS


def make_parser() -> command_line.Parser:
    """The options."""
    parser = command_line.Parser(
        prog="emv3_jax.data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--videos", metavar="DIR|FILE", help="a folder of films, a film, or a manifest (.jsonl or .csv)")
    what.add_argument("--puppets", choices=SPLITS, help="the small world instead of films")
    parser.add_argument("--out", required=True, metavar="DIR", type=pathlib.Path, help="the dataset")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="preview", help="(default: preview)")
    parser.add_argument("--weights", metavar="DIR", help="of the frozen models (default: the shipped weights)")
    parser.add_argument("--frames", type=int, nargs="+", help="lengths of clips (default: the preset's longest)")
    parser.add_argument("--shards", type=int, help="(default: one for every 64 clips or 16 films)")
    parser.add_argument("--process", default="0/1", metavar="I/N", help="its share of the shards (default: 0/1)")
    parser.add_argument("--clips", type=int, default=64, help="puppets: how many (default: 64)")
    parser.add_argument("--caption", help="films: the caption of those that have none")
    parser.add_argument(
        "--face", choices=("one", "largest", "none"), default="one", help="films: which to take (default: one, or drop)"
    )
    parser.add_argument("--subtitle-band", type=float, default=0.0, help="films: share cut off at the bottom")
    parser.add_argument(
        "--sync-model", default="", metavar="MODULE:FUNCTION",
        help="films: function(video, wave, face) -> (frames the picture is late, confidence)",
    )  # fmt: skip
    parser.add_argument("--max-offset", type=float, default=3.0, help="films: frames that it may be late or early")
    parser.add_argument("--min-confidence", type=float, default=0.0, help="films: of the sync model, at least")
    return parser


def main(arguments: list[str]) -> int:
    """Parses the command line, makes the shards, says what was dropped."""
    options = make_parser().parse_args(arguments)
    preset = PRESETS[options.preset]
    process, processes = _share(options.process)
    frames = tuple(options.frames or (preset.max_frames,))
    if options.clips < 1 or (options.shards is not None and options.shards < 1):
        raise UserError("--clips and --shards must be 1 or more")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is a file: name a folder")
    rules = Rules(
        frames, options.face, options.subtitle_band, options.sync_model, options.max_offset, options.min_confidence
    )

    examples.features(preset)  # says if TFDS is missing

    from emv3_jax import pipeline  # the models: not before the options are known to be good

    source: builder.Source
    words = weight_files.load_tokenizer(preset, options.weights)
    if options.puppets:
        if not preset.vocabulary:
            raise UserError(f"--puppets needs a preset with their words, such as demo, not {preset.name}")
        if len(frames) > 1:
            raise UserError("--puppets makes clips of one length: give one number with --frames")
        if frames[0] > preset.max_frames:
            raise UserError(f"--frames must be at most {preset.max_frames} for the preset {preset.name}")
        source = Puppets(options.puppets, options.clips, frames[0], preset.height)
    else:
        source = Films(find_films(options.videos, options.caption), rules, preset, words)
    command_line.setup_compile_cache()
    roles = _frozen(preset)
    extractor = Extractor(preset, dict(pipeline.load_models(preset, options.weights, roles)), words)
    shards = options.shards or -(-len(source) // (64 if options.puppets else 16))
    identity = {
        "preset": preset.name,
        "vae": encoder_hash(extractor.params["vae"]),
        "weights": weight_files.weight_hashes(preset.name, options.weights, roles),
    }
    record = builder.build(source, extractor, options.out, shards, identity, process, processes, say=_say)
    if record and not examples.encoders_trained(preset):
        with atomic_path(options.out / examples.NULL_TEXT) as path, open(path, "wb") as file:
            np.save(file, extractor.text(""))
    if record:
        _say(f"{options.out}: {len(record['clips'])} clips")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _share(text: str) -> tuple[int, int]:
    process, _, processes = text.partition("/")
    if not (process.isdecimal() and processes.isdecimal() and int(process) < int(processes)):
        raise UserError(f"--process must be I/N with I from 0 to N - 1, such as 0/4, got {text!r}")
    return int(process), int(processes)


def _frozen(preset: Preset) -> list[str]:
    """The roles of the frozen models that training examples of a preset are seen by."""
    more = [] if examples.encoders_trained(preset) else ["text", "image"]
    return ["vae", *(["speech"] if preset.speech else []), *more]


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
