"""Weights in and out: `python -m convert to-jax|to-torch|inspect ...`.

    python -m convert to-jax --from DIR --variant preview --to OUT        all released folders under DIR
    python -m convert to-jax FILE --to OUT                                one checkpoint: OUT/<model>
    python -m convert to-jax tuned.safetensors --base wan.safetensors --model dit-preview --to OUT
    python -m convert to-torch OUT --to DIR                               every model in OUT: DIR/<model>.safetensors
    python -m convert to-torch OUT/vae --to vae.safetensors
    python -m convert to-torch WORKDIR/weights --to DIR                   what train.py exported, with released keys
    python -m convert to-torch WORKDIR/checkpoints --to DIR               the newest checkpoint's moving average
    python -m convert to-torch WORKDIR/checkpoints/STEP --unaveraged --to DIR
    python -m convert to-torch WORKDIR/weights/adapters --to DIR          a LoRA file: DIR/dit-lora.safetensors
    python -m convert inspect FILE                                        exit code 1 where it does not fit

Checkpoints may be .safetensors, sets of them with an index, or PyTorch pickles (which need torch). Converted weights
are Orbax folders, or one .safetensors file where OUT ends so. Which model training made is told by the paths and shapes
of its parameters. A file that does not fit its model key by key is refused before anything is written: exit code 2, one
line that says so, then the keys. Outputs appear whole or not at all.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from convert import jobs, lora, released
from convert.jobs import DTYPES, ToJax
from convert.lora import ADAPTERS
from convert.parameters import Parameters, open_parameters
from convert.registry import MODELS, NAMINGS
from convert.report import describe
from convert.writers import check_space, claim
from emv3_jax.command_line import Parser, run_main
from emv3_jax.converted import hide_abandoned
from emv3_jax.errors import UserError
from emv3_jax.files import reason

TO_TORCH = """WHAT is one of

  OUT, OUT/vae, OUT/vae.safetensors    of to-jax: all models in the folder, or one
  WORKDIR/weights, or a file in it     of train.py: the weights at the end of a run, adapters merged
  WORKDIR/checkpoints, or STEP in it   of train.py: the moving average of the weights; with --unaveraged the weights
  WORKDIR/weights/adapters             of train.py: a LoRA file, dit-lora.safetensors, in the names that ComfyUI reads
"""


def to_jax(args: argparse.Namespace) -> None:
    """One checkpoint, or all parts of a variant."""
    if (args.root is None) == (args.source is None):
        raise UserError("give one checkpoint, or --from DIR with --variant, not both")
    if args.root is not None:
        convert_released(args)
        return
    check_output(args)
    job = jobs.plan_to_jax(args.source, args.model, args.set, args.dtype, args.base)
    out = output(args, job.match.model.name)
    with claim(out.parent):
        _convert(job, out, args.overwrite)


def convert_released(args: argparse.Namespace) -> None:
    """All parts of a variant; nothing is written before all of them are known to fit."""
    if args.variant is None:
        raise UserError("--from needs --variant preview or --variant flash")
    if args.model or args.set:
        raise UserError("--model and --set are for single files")
    out = args.to
    if out is None or out.suffix == ".safetensors":
        raise UserError("--from needs --to FOLDER")
    found = released.find(args.root, args.variant)
    for name, path in found.parts.items():
        print(f"found     {name}: {path}")
    for line in found.missing:
        print(f"missing   {line}")
    for line in found.unused:
        print(f"not used  {line}")
    if found.missing:
        raise UserError(f"{args.root} lacks {len(found.missing)} parts: {'; '.join(found.missing)}")
    planned: list[ToJax] = []
    refused: list[UserError] = []
    for name, path in found.parts.items():
        if name != released.TOKENIZER:
            try:
                base = args.base if name.startswith("dit-") else None
                planned.append(jobs.plan_to_jax(path, name, (), args.dtype, base))
            except UserError as error:
                refused.append(error)
    if len(refused) == 1:
        raise refused[0]
    if refused:
        lines = [line for error in refused for line in (error.message, *error.details)]
        raise UserError(f"{len(refused)} parts of {args.root} cannot be used:", lines)
    outs = {job.match.model.name: out / job.match.model.name for job in planned}
    with claim(out):
        new = [job for job in planned if not outs[job.match.model.name].exists()]
        check_space(out, sum(spec.nbytes for job in new for spec in job.header.values()))
        for job in planned:
            _convert(job, outs[job.match.model.name], args.overwrite)
        tokenizer = out / released.TOKENIZER
        copied = jobs.copy_folder(found.parts[released.TOKENIZER], tokenizer, args.overwrite)
        print(f"{tokenizer}: {'copied' if copied else 'unchanged'}")


def _convert(job: ToJax, out: Path, overwrite: bool) -> None:
    for note in job.notes():
        print(f"{job.match.model.name}: {note}")
    written = jobs.run_to_jax(job, out, overwrite)
    header = job.header
    dtypes = ", ".join(sorted({str(spec.dtype) for spec in header.values()}))
    line = f"{len(header)} tensors, {sum(spec.size for spec in header.values()):,} values, {dtypes}"
    print(f"{out}: {line if written else 'unchanged, it was made from the same files'}", flush=True)


def to_torch(args: argparse.Namespace) -> None:
    """One model, every model in a folder, or adapters."""
    check_output(args)
    sources = open_parameters(args.source, args.unaveraged)
    if len(sources) > 1 and (args.model or args.set or args.base):
        inside = ", ".join(dict.fromkeys(str(source.path) for source in sources))
        raise UserError(f"--model, --set and --base are for one model: give one of {inside}")
    planned = [_planned(source, args) for source in sources]
    outs = [output(args, f"{job.name}.safetensors") for job in planned]
    if len(set(outs)) < len(outs):
        if args.to is not None and args.to.suffix == ".safetensors":
            raise UserError(f"{outs[0]} cannot hold {len(outs)} models: give a folder")
        twice = next(job.name for job, out in zip(planned, outs, strict=True) if outs.count(out) > 1)
        raise UserError(f"{args.source} holds {twice} twice: give the file or folder of one")
    with claim(outs[0].parent):
        for job, out in zip(planned, outs, strict=True):
            for note in job.notes():
                print(f"{job.name}: {note}")
            jobs.run_to_torch(job, out, args.overwrite)
            print(f"{out}: {len(job.header)} tensors", flush=True)
    if (args.source / ADAPTERS).is_dir():
        print(f"the adapters are merged into these weights; to have them alone, give {args.source / ADAPTERS}")


def _planned(source: Parameters, args: argparse.Namespace) -> jobs.TorchFile:
    if not lora.is_adapters(source):
        return jobs.plan_to_torch(source, args.model, args.set, args.naming, args.dtype, args.base)
    if args.base is not None or args.naming != "released":
        raise UserError(f"{source.path} holds adapters, whose names are released ones: leave out --naming and --base")
    return lora.plan_lora(source, args.model, args.set, args.dtype)


def check_output(args: argparse.Namespace) -> None:
    """Raises UserError unless one output was given that is not the input."""
    if (args.to is None) == (args.output is None):
        raise UserError("say where to write, once: --to OUT")
    out = args.to or args.output
    if args.source.resolve() == out.resolve():
        raise UserError(f"{out}: input and output are the same; give another output")


def output(args: argparse.Namespace, name: str) -> Path:
    """Where one model goes: `name` in the folder that was given, or the .safetensors file that was given."""
    out = args.to or args.output
    return out if out.suffix == ".safetensors" else out / name


def inspect(args: argparse.Namespace) -> int:
    """Prints what a file is; returns 1 where it is no model that this program knows, or does not fit it."""
    lines, fits = describe(args.source, args.keys)
    print("\n".join(lines))
    return 0 if fits else 1


def parser() -> Parser:
    """The command line's grammar."""
    top = Parser(prog="python -m convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    inward = commands.add_parser("to-jax", help="PyTorch checkpoints -> JAX")
    inward.add_argument(
        "source", type=Path, nargs="?", metavar="FILE", help="one checkpoint, or a folder that holds one"
    )
    inward.add_argument("--from", dest="root", type=Path, metavar="DIR", help="folder that holds the released folders")
    inward.add_argument("--variant", choices=("preview", "flash"), help="which transformer to take from --from")
    inward.add_argument("--base", type=Path, metavar="FILE", help="checkpoint that fills what the transformer lacks")
    inward.set_defaults(run=to_jax)
    outward = commands.add_parser(
        "to-torch",
        help="JAX -> PyTorch checkpoints (.safetensors)",
        description=TO_TORCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    outward.add_argument("source", type=Path, metavar="WHAT", help="what to-jax or train.py wrote")
    outward.add_argument("--naming", choices=NAMINGS, default="released", help="of the keys (default released)")
    outward.add_argument(
        "--base", type=Path, metavar="FILE", help="original checkpoint, to copy what the model does not hold"
    )
    outward.add_argument(
        "--unaveraged", action="store_true", help="of a training checkpoint its weights, not their moving average"
    )
    outward.set_defaults(run=to_torch)
    for command in (inward, outward):
        command.add_argument("output", type=Path, nargs="?", metavar="OUT", help="the same as --to OUT")
        command.add_argument("--to", type=Path, metavar="OUT", help="folder, or a file that ends in .safetensors")
        command.add_argument("--model", choices=sorted(MODELS), help="default: told by the keys or paths")
        command.add_argument("--set", action="append", default=[], metavar="NAME=NUMBER", help="another model size")
        command.add_argument("--dtype", choices=DTYPES, help="of what is written (default: as it is)")
        command.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    command = commands.add_parser("inspect", help="say what a file is, and what would not fit")
    command.add_argument("source", type=Path, metavar="FILE")
    command.add_argument("--keys", action="store_true", help="list every tensor")
    command.set_defaults(run=inspect)
    return top


def main(arguments: Sequence[str]) -> int | None:
    """One command; returns the exit code, None for 0. Raises UserError."""
    args = parser().parse_args(arguments)
    try:
        return args.run(args)
    except OSError as error:  # of a folder that cannot be entered, a link that leads to itself, and the like
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{where}{reason(error)}") from error


if __name__ == "__main__":
    hide_abandoned()
    jax.config.update("jax_platforms", "cpu")  # shapes and files only: leave accelerators to whoever computes
    sys.exit(run_main(main))
