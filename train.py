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
import threading
from collections.abc import Callable
from typing import Any

from emv3_jax import command_line
from emv3_jax.errors import UserError

PATIENCE = 300  # seconds in which all processes of a run must have started


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
    import jax

    # It would take SIGTERM for itself and do nothing; `training.loop` stops all processes together.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX's own patience ends the program without a word that helps; ours ends before.
    wait_for(lambda: jax.distributed.initialize(*explicit, initialization_timeout=2 * PATIENCE))


def wait_for(join: Callable[[], None]) -> None:
    """join(), which finds the other processes, in a thread of its own: a signal ends the wait for it."""
    failed: list[Exception] = []

    def joined() -> None:
        try:
            join()
        except Exception as error:  # of whatever tells who is who
            failed.append(error)

    thread = threading.Thread(target=joined, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        raise UserError(
            f"the processes did not find one another within {PATIENCE} s: start all of them, and let --coordinator name"
            " a host and port of the first one that the others can reach"
        )
    if failed:
        lines = str(failed[0]).splitlines() or [type(failed[0]).__name__]
        raise UserError(f"the processes did not find one another: {lines[0]}") from failed[0]


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
