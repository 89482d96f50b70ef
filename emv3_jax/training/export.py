"""Writes the weights of a run's checkpoint as a run's end does: python -m emv3_jax.training.export RUN --out DIR

RUN is the --workdir of train.py, or the folder of a cycle's stage; its config.json says what is in it. It may train on
meanwhile, or have been killed; this works on the CPU, and leaves the run its accelerator. DIR can be used like
RUN/weights: by sample.py, to make clips for review, as a config's init_from, and by `convert to-torch`.
"""

import json
import pathlib
import sys

import jax
import ml_collections

from emv3_jax import command_line
from emv3_jax.errors import UserError
from emv3_jax.files import check_writable
from emv3_jax.training import checkpoints
from emv3_jax.training.run_log import CONFIG


def config_of(run: pathlib.Path) -> ml_collections.ConfigDict:
    """The config of a run.

    Raises:
      UserError: it is not there, or damaged.
    """
    path = run / CONFIG
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        return ml_collections.ConfigDict(found)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is missing or damaged ({error}): give a folder that train.py works in, of a cycle that of a stage"
            " (RUN/1_sft)"
        ) from error


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = command_line.Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=pathlib.Path, help="the folder of a run")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the folder of the weights")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument("--unaveraged", action="store_true", help="the weights themselves, not their moving average")
    options = parser.parse_args(arguments)

    from emv3_jax.training import recipes

    jax.config.update("jax_platforms", "cpu")
    cfg = config_of(options.run)
    steps = checkpoints.steps_in(options.run)
    if not steps or options.step not in (None, *steps):
        there = ", ".join(map(str, sorted(steps))) or "none"
        raise UserError(f"there is no such checkpoint in {options.run / 'checkpoints'}: of steps there are {there}")
    step = max(steps) if options.step is None else options.step
    recipe = recipes.build(cfg)
    check_writable(options.out / CONFIG)
    command_line.setup_compile_cache()
    field = checkpoints.RAW if options.unaveraged else checkpoints.AVERAGE
    params = checkpoints.read_field(options.run / "checkpoints" / str(step), field)
    recipe.export(params, recipe.base(), options.out)
    what = "weights" if options.unaveraged else "weights (moving average)"
    print(f"{what} at step {step}: {options.out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
