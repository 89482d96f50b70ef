"""Trains a model: python train.py --config configs/NAME.py --workdir DIR [--config.KEY=VALUE ...].

On several hosts the same command runs on each, with the same --workdir on a disk that all of them see, and
--distributed, where the cluster tells JAX who is who (TPU pods, SLURM), or --coordinator HOST:PORT --processes N
--process I.
"""

import argparse
import pathlib
import re
import signal
import sys
from typing import Any

from emv3_jax import command_line
from emv3_jax.errors import UserError


def main(arguments: list[str]) -> int:
    parser = command_line.make_parser("train.py", __doc__)
    parser.add_argument(
        "--workdir", required=True, help="checkpoints, logs and the trained weights; a run resumes here"
    )
    parser.add_argument("--distributed", action="store_true", help="this is one of several processes of a cluster")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process, where no cluster tells")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process", type=int, help="which one this is, from 0")
    options, cfg = command_line.parse(parser, arguments)
    try:
        stopped = train(options, cfg)
    except command_line.Terminated:  # while it started, waited or wrote: nothing that was saved is lost by it
        print("stopped by SIGTERM; the same command goes on from what is saved", flush=True)
        return 0
    return 128 + stopped if stopped == signal.SIGINT else 0  # SIGTERM is how a machine is taken back: all is saved


def train(options: argparse.Namespace, cfg: Any) -> int:
    """What the config asks for; returns as loop.train."""
    command_line.setup_compile_cache()
    join_others(options)

    from emv3_jax.training import cycle, loop, recipes

    workdir = pathlib.Path(options.workdir)
    return cycle.train(cfg, workdir) if "cycle" in cfg else loop.train(recipes.build(cfg), cfg, workdir)


def join_others(options: argparse.Namespace) -> None:
    explicit = (options.coordinator, options.processes, options.process)
    if any(value is not None for value in explicit):
        if any(value is None for value in explicit) or not 0 <= options.process < options.processes:
            raise UserError("--coordinator, --processes N and --process I (from 0 to N - 1) belong together")
        if not re.fullmatch(r"\S+:\d{1,5}", options.coordinator):
            raise UserError(f"--coordinator must be HOST:PORT, got {options.coordinator!r}")
    elif not options.distributed:
        return
    from emv3_jax.training import distributed

    distributed.join(*explicit)


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
