"""Trains a model: python train.py --config configs/NAME.py --workdir DIR [--config.KEY=VALUE ...]."""

import pathlib
import signal
import sys

from emv3_jax import command_line


def main(arguments: list[str]) -> int:
    parser = command_line.make_parser("train.py", __doc__)
    parser.add_argument(
        "--workdir", required=True, help="checkpoints, logs and the trained weights; a run resumes here"
    )
    options, cfg = command_line.parse(parser, arguments)
    command_line.setup_compile_cache()

    from emv3_jax.training import cycle, loop, recipes

    workdir = pathlib.Path(options.workdir)
    stopped = cycle.train(cfg, workdir) if "cycle" in cfg else loop.train(recipes.build(cfg), cfg, workdir)
    return 128 + stopped if stopped == signal.SIGINT else 0  # SIGTERM is how a machine is taken back: all is saved


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
