"""Trains a model: python train.py --config configs/NAME.py --workdir DIR [--config.KEY=VALUE ...]."""

import pathlib
import sys

from emv3_jax import command_line


def main(arguments: list[str]) -> int:
    parser = command_line.make_parser("train.py", __doc__)
    parser.add_argument(
        "--workdir", required=True, help="checkpoints, logs and the trained weights; a run resumes here"
    )
    options, cfg = command_line.parse(parser, arguments)
    command_line.setup_compile_cache()

    from emv3_jax.training import loop, recipes

    stopped = loop.train(recipes.build(cfg), cfg, pathlib.Path(options.workdir))
    return 128 + stopped if stopped else 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
