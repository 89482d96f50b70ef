"""The NDPO-SFT cycle (paper, Training Strategy): supervised stages and stages that unlearn one issue each, in turn.

Every stage is an ordinary run in a folder of its own, which starts from the weights of the one before:

    WORKDIR/1_sft/           checkpoints, logs, weights
    WORKDIR/2_lips/review/   clips of the weights of stage 1, and what was said of them
    WORKDIR/2_lips/          Negative DPO with those weights as the reference
    WORKDIR/3_sft/           ...
    WORKDIR/weights          of the last stage

The same command goes on wherever the cycle stopped. Where people review, it stops after the clips are made and says so.
"""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from emv3_jax import pipeline
from emv3_jax.errors import UserError
from emv3_jax.files import atomic_path
from emv3_jax.options import SamplingOptions
from emv3_jax.training import checks, distributed, loop, negatives, recipes, verdicts
from emv3_jax.training.dit_recipe import SFT, DiTRecipe

DONE = "done.json"
REVIEW = {
    "clips": checks.whole(1),
    "batch": checks.whole(1),
    "judge": checks.one_of("person", "metrics"),
    "share": checks.SHARE,
    "task": checks.TEXT,
}


def train(cfg: Any, workdir: pathlib.Path) -> int:
    """Runs the stages of `cfg.cycle` that are not done.

    Args:
      cfg: a config of the DiT's recipe with `cycle`: ({"name": ..., changed keys}, ...), and `review`: clips, batch,
        judge ("person" or "metrics"), share (of the clips that measures reject), task.
    Returns:
      As loop.train; 0 too where people are to review first.
    Raises:
      UserError: as the stages' recipes.
    """
    stages = stage_configs(cfg, workdir)
    for folder, stage in stages:
        if (folder / DONE).exists():
            continue
        recipe = recipes.build(stage)
        assert isinstance(recipe, DiTRecipe)
        if stage.objective != SFT and not _reviewed(cfg.review, stage, recipe):
            return 0
        loop.say(f"stage {folder.name}: {stage.objective}, {stage.steps} steps")
        if stopped := loop.train(recipe, stage, folder):
            return stopped
        if cfg.minutes and not _finished(folder, stage.steps):
            return 0
        if jax.process_index() == 0:
            with atomic_path(folder / DONE) as path:
                path.write_text(json.dumps({"steps": stage.steps}) + "\n")
        distributed.wait()
    weights = workdir / "weights"
    if jax.process_index() == 0:
        shutil.copytree(stages[-1][0] / "weights", weights, dirs_exist_ok=True)
    loop.say(f"weights of the last stage: {weights}")
    return 0


def stage_configs(cfg: Any, workdir: pathlib.Path) -> list[tuple[pathlib.Path, Any]]:
    """Folder and config of every stage.

    Raises:
      UserError: `cycle` or `review` is not what it must be.
    """
    if wrong := checks.table(cfg.get("review", {}), REVIEW):
        raise UserError("; ".join(f"{line} (section review)" for line in wrong))
    found: list[tuple[pathlib.Path, Any]] = []
    for number, changes in enumerate(cfg.cycle, 1):
        if not isinstance(changes, Mapping | ml_collections.ConfigDict) or "name" not in changes:
            raise UserError(f"config key cycle: stage {number} must be a section with a name, got {changes!r}")
        changes = dict(changes)
        stage = ml_collections.ConfigDict(cfg.to_dict())
        with stage.unlocked():
            folder = workdir / f"{number}_{changes.pop('name')}"
            if unknown := sorted(set(changes) - set(stage)):
                raise UserError(f"config key cycle: stage {number} sets {unknown[0]!r}, which is no key of the config")
            stage.update(changes)
            if found:
                stage.init_from, stage.silent_audio = str(found[-1][0] / "weights"), False
            if stage.objective != SFT:
                stage.negatives = str(folder / "review")
        found.append((folder, stage))
    return found


def _finished(folder: pathlib.Path, steps: int) -> bool:
    return (folder / "checkpoints" / str(steps)).exists()


def _reviewed(review: Any, stage: Any, recipe: DiTRecipe) -> bool:
    """Whether the stage's negatives are there; makes the clips and, where measures judge, the verdicts."""
    folder = pathlib.Path(stage.negatives)
    if not (folder / verdicts.CLIPS).exists():
        if jax.process_count() > 1:
            raise UserError(
                f"the next stage unlearns clips that are not made yet: make them in one process (python -m"
                f" emv3_jax.training.negatives --weights {stage.init_from} --out {folder} ...), then go on"
            )
        pipe = recipe.make_pipeline(pipeline.load_models(recipe.preset, stage.init_from, recipe.trained))
        options = SamplingOptions(**stage.sampling)
        negatives.sample(pipe, options, recipe.data, folder, review.clips, review.task, review.batch, stage.seed)
    waiting = {row["id"] for row in verdicts.read_clips(folder)} - verdicts.read_verdicts(folder).keys()
    if not waiting:
        return True
    if review.judge == "metrics":
        pipe = recipe.make_pipeline(pipeline.load_models(recipe.preset, stage.init_from, recipe.trained))
        count = negatives.judge(pipe, folder, stage.issue, review.share)
        loop.say(f"{count} clips rejected for {stage.issue}: {folder}")
        return True
    loop.say(
        f"{len(waiting)} clips wait to be reviewed: python -m emv3_jax.training.review {folder}; then give this command"
        " again"
    )
    return False
