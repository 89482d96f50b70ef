"""Checkpoint files in and out: `python -m convert to-jax|to-torch|inspect ...`.

    python -m convert to-jax   --model dit-preview diffusion_pytorch_model.safetensors preview.jax.safetensors
    python -m convert to-torch --model dit-preview preview.jax.safetensors diffusion_pytorch_model.safetensors
    python -m convert inspect  diffusion_pytorch_model.safetensors

The JAX side is a .safetensors file too, whose keys are the parameter paths joined by `/`. Sizes are the released ones;
`--set width=48 --set layers=2` changes them. A file that does not fit the model key by key is refused: exit code 2, one
line that says so, then the keys. Outputs appear whole or not at all.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flax import traverse_util

from convert import dit, vae
from convert.engine import Table, read_safetensors, to_jax, to_torch
from emv3_jax.checkpoint import write_safetensors
from emv3_jax.config import DiTConfig, VAEConfig
from emv3_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Model:
    """What the command line needs to know of a model: its released config, its table and tree for any config."""

    cfg: Any
    table: Callable[[Any], Table]
    target_tree: Callable[[Any], dict]


MODELS = {
    "dit-preview": Model(DiTConfig(), lambda cfg: dit.PREVIEW, dit.target_tree),
    "vae": Model(VAEConfig(), vae.table, vae.target_tree),
}


def configured(cfg: Any, settings: Iterable[str]) -> Any:
    """`cfg` with integer fields replaced as `NAME=VALUE` says; raises UserError for anything else."""
    names = [field.name for field in dataclasses.fields(cfg) if type(getattr(cfg, field.name)) is int]
    for setting in settings:
        match = re.fullmatch(r"(\w+)=(\d+)", setting)
        if match is None or match[1] not in names:
            raise UserError(f"--set {setting}: give NAME=NUMBER with NAME one of {', '.join(names)}")
        cfg = dataclasses.replace(cfg, **{match[1]: int(match[2])})
    return cfg


def convert(args: argparse.Namespace) -> None:
    """to-jax and to-torch."""
    model = MODELS[args.model]
    cfg = configured(model.cfg, args.set)
    table, tree = model.table(cfg), model.target_tree(cfg)
    if args.source.resolve() == args.output.resolve():
        raise UserError(f"{args.output}: input and output are the same file; give another output")
    tensors = read_safetensors(args.source)
    if args.command == "to-jax":
        params = to_jax(table, tensors, tree, str(args.source))
        tensors = traverse_util.flatten_dict(params, sep="/")
    else:
        params = traverse_util.unflatten_dict(tensors, sep="/")
        tensors = to_torch(table, params, tree, str(args.source))
    write_safetensors(args.output, tensors)
    print(f"{args.output}: {len(tensors)} tensors, {sum(x.size for x in tensors.values()):,} values")


def inspect(args: argparse.Namespace) -> None:
    """Every key with type and shape, read from the header alone, and how much of it each model knows."""
    from safetensors import SafetensorError, safe_open

    if not args.source.is_file():
        raise UserError(f"{args.source}: no such file; give the path of a .safetensors file")
    try:
        with safe_open(args.source, framework="numpy") as file:
            keys = file.keys()
            parts = [(key, file.get_slice(key)) for key in keys]
            rows = [(key, part.get_dtype(), part.get_shape()) for key, part in parts]
    except SafetensorError as error:
        raise UserError(f"{args.source}: not a readable .safetensors file ({error}); fetch it again") from error
    for key, dtype, shape in rows:
        print(f"{key}  {dtype}  {shape}")
    print(f"{len(rows)} tensors")
    for name, model in MODELS.items():
        table = model.table(model.cfg)
        known = [*(rule.pattern for rule in table.rules), *(ignore.pattern for ignore in table.ignored)]
        count = sum(any(re.fullmatch(pattern, key) for pattern in known) for key, _, _ in rows)
        if count:
            print(f"{count} of them are keys of {name}")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("to-jax", "PyTorch checkpoint -> JAX"), ("to-torch", "JAX -> PyTorch checkpoint")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--model", choices=sorted(MODELS), required=True)
        command.add_argument("--set", action="append", default=[], metavar="NAME=NUMBER", help="another model size")
        command.add_argument("source", type=Path)
        command.add_argument("output", type=Path)
        command.set_defaults(run=convert)
    command = commands.add_parser("inspect", help="list the tensors of a file")
    command.add_argument("source", type=Path)
    command.set_defaults(run=inspect)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
