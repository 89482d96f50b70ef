"""The NDPO-SFT cycle (paper, Training Strategy): supervised stages and stages that unlearn one issue each, in turn.

Every stage is an ordinary run in a folder of its own, which starts from the weights of the one before, with a seed of
its own (`seed_of`):

    WORKDIR/1_sft/           checkpoints, logs, weights
    WORKDIR/2_lips/review/   clips of the weights of stage 1, and what was said of them
    WORKDIR/2_lips/          Negative DPO with those weights as the reference
    WORKDIR/3_sft/           ...
    WORKDIR/weights          of the last stage

The same command goes on wherever the cycle stopped. Where people review, it stops after the clips are made and says so.
A stage for whose issue nothing was rejected is passed over; the next one starts from what it would have started from.
"""

import json
import pathlib
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from emv3_jax import weight_files
from emv3_jax.data import builder, examples
from emv3_jax.errors import UserError
from emv3_jax.files import atomic_path
from emv3_jax.options import SamplingOptions
from emv3_jax.training import checkpoints, checks, distributed, loop, negatives, recipes, verdicts
from emv3_jax.training.dit_recipe import SFT, DiTRecipe
from emv3_jax.training.run_log import other_settings

DONE = "done.json"
FOLLOWS, STARTS = ("negatives",), ("init_from", "silent_audio")  # keys that are not a stage's own; not a later one's
REVIEW = {
    "clips": checks.whole(1),
    "batch": checks.whole(1),
    "judge": checks.one_of("person", negatives.METRICS),
    "share": checks.SHARE,
    "task": checks.one_of(*examples.TRAINED_TASKS),
}


def train(cfg: Any, workdir: pathlib.Path) -> int:
    """Runs the stages of `cfg.cycle` that are not done.

    Args:
      cfg: a config of the DiT's recipe with `cycle`: ({"name": ..., changed keys}, ...), and `review`: clips, batch,
        judge ("person" or "metrics"), share (of the clips that measures reject), task. `minutes` are those of all
        stages together.
    Returns:
      As loop.train; 0 too where people are to review first, or the time is over.
    Raises:
      UserError: as the stages' recipes; what can be known before the first stage is told before it.
    """
    started, stages = time.monotonic(), stage_configs(cfg, workdir)
    check(cfg, stages)
    start, weights = (stages[0][1].init_from, stages[0][1].silent_audio), None
    for folder, stage in stages:
        stage.init_from, stage.silent_audio = start
        if not (folder / DONE).exists():
            if cfg.minutes:
                left = cfg.minutes - (time.monotonic() - started) / 60
                if distributed.any_of(left <= 0):
                    return _time_is_over(folder)
                with stage.ignore_type():
                    stage.minutes = min(stage.minutes or left, left)
            if (ended := _run(cfg.review, folder, stage)) is not None:
                return ended
        elif changed := other_settings(folder, stage, FOLLOWS if stage is stages[0][1] else FOLLOWS + STARTS):
            loop.say(
                f"note: stage {folder.name} is done, with other settings than these ({changed}), and stays as it is: to"
                " train it anew, delete its folder and those of later stages, or give another --workdir"
            )
        if json.loads((folder / DONE).read_text())["steps"]:
            weights = folder / "weights"
            start = str(weights), False
    if weights is None:
        loop.say("every stage was passed over, so there are no weights")
        return 0
    if jax.process_index() == 0:
        shutil.copytree(weights, workdir / "weights", copy_function=_copy, dirs_exist_ok=True)
    loop.say(f"weights of the last stage: {workdir / 'weights'}")
    return 0


def _run(review: Any, folder: pathlib.Path, stage: Any) -> int | None:
    """Runs a stage. None: it is done; otherwise what `train` returns."""
    recipe = recipes.build(stage)
    assert isinstance(recipe, DiTRecipe)
    if stage.objective != SFT:
        if not _reviewed(review, stage, recipe):
            return 0
        if not distributed.any_of(bool(negatives.rejected(stage.negatives, stage.issue))):
            what = f"for {stage.issue}" if stage.issue else "at all"
            loop.say(f"stage {folder.name} is passed over: no clip was rejected {what} in {stage.negatives}")
            _write_done(folder, 0)
            return None
    loop.say(f"stage {folder.name}: {stage.objective}, {stage.steps} steps")
    stopped = loop.train(recipe, stage, folder)
    if max(checkpoints.steps_in(folder), default=0) < stage.steps:
        return stopped or _time_is_over(folder)
    _write_done(folder, stage.steps)
    if stopped:  # in the last step, or while it was saved or scored
        loop.say(f"stopped by {signal.Signals(stopped).name}; the same command goes on after stage {folder.name}")
    return stopped or None


def _copy(source: str, target: str) -> None:
    with atomic_path(target) as path:
        shutil.copyfile(source, path)


def _write_done(folder: pathlib.Path, steps: int) -> None:
    """Says that a stage is done; steps: 0 where it was passed over."""
    if jax.process_index() == 0:
        with atomic_path(folder / DONE) as path:
            path.write_text(json.dumps({"steps": steps}) + "\n")
    distributed.wait()


def _time_is_over(folder: pathlib.Path) -> int:
    loop.say(f"the time is over (config key minutes); the same command goes on with stage {folder.name}")
    return 0


def check(cfg: Any, stages: list[tuple[pathlib.Path, Any]]) -> None:
    """Raises UserError if the keys of any stage are not what they must be, all of them in one message."""
    wrong: dict[str, list[str]] = {}
    for folder, stage in stages:
        lines = recipes.problems(stage)
        if wrong_recipe := recipes.without_videos(stage):
            lines.append(wrong_recipe)
        if stage.get("objective", SFT) != SFT and cfg.review.judge == negatives.METRICS:
            lines += _unmeasured(stage)
        for line in lines:
            wrong.setdefault(line, []).append(folder.name)
    if wrong:
        raise UserError("; ".join(f"{line} (in {' and '.join(names)})" for line, names in wrong.items()))


def _unmeasured(stage: Any) -> list[str]:
    """Why measures cannot judge a stage's clips, a line each, as far as it is known before they are made."""
    lines = []
    if stage.get("issue") not in tuple(negatives.JUDGES):
        judges = ", ".join(negatives.JUDGES)
        lines.append(f"config key issue must be one of {judges} where measures judge, got {stage.get('issue')!r}")
    data = stage.get("data")
    if isinstance(data, str) and (pathlib.Path(data) / builder.RECORD).is_file():  # if not, a stage says so
        try:
            negatives.check_puppets(builder.read_record(pathlib.Path(data)))
        except UserError as error:
            lines.append(str(error))
    return lines


def stage_configs(cfg: Any, workdir: pathlib.Path) -> list[tuple[pathlib.Path, Any]]:
    """Folder and config of every stage.

    Raises:
      UserError: `cycle` or `review` is not what it must be.
    """
    if wrong := checks.table(cfg.get("review", {}), REVIEW):
        raise UserError("; ".join(f"{line} (section review)" for line in wrong))
    if not isinstance(cfg.cycle, Sequence) or not cfg.cycle:
        raise UserError(f"config key cycle must be one stage or more, got {cfg.cycle!r}")
    found: list[tuple[pathlib.Path, Any]] = []
    for number, changes in enumerate(cfg.cycle, 1):
        if not isinstance(changes, Mapping | ml_collections.ConfigDict) or "name" not in changes:
            raise UserError(f"config key cycle: stage {number} must be a section with a name, got {changes!r}")
        changes = dict(changes)
        stage = ml_collections.ConfigDict(cfg.to_dict())
        with stage.unlocked(), stage.ignore_type():  # `check` says what types there must be
            folder = workdir / f"{number}_{changes.pop('name')}"
            follows = {"cycle", "review", *FOLLOWS, *(STARTS if found else ())}
            if given := sorted(follows & set(changes)):
                raise UserError(
                    f"config key cycle: stage {number} sets {given[0]!r}, which follows from the stages before or is"
                    " the whole cycle's: leave it out"
                )
            if unknown := sorted(set(changes) - set(stage)):
                raise UserError(f"config key cycle: stage {number} sets {unknown[0]!r}, which is no key of the config")
            if found and checks.whole(0)[0](stage.get("seed")):  # if not, `check` says so
                stage.seed = seed_of(stage.seed, number)
            for key, value in changes.items():
                if isinstance(value, Mapping | ml_collections.ConfigDict):
                    stage.update({key: value})  # a section's other keys stay
                else:
                    stage[key] = value
            if found:
                stage.init_from, stage.silent_audio = str(found[-1][0] / "weights"), False
            if stage.get("objective", SFT) != SFT:
                stage.negatives = str(folder / "review")
        found.append((folder, stage))
    return found


def seed_of(seed: int, number: int) -> int:
    """The seed of a later stage, by the cycle's: with the same one all stages would see the same clips, one after
    another, with the same noise at the same times."""
    return int(np.random.default_rng([seed, number]).integers(2**31))


def _sampled(folder: pathlib.Path, count: int) -> bool:
    """Whether a review folder lists so many clips or more, and all of them are whole. One that somebody else put
    together, without a plan, is taken as it is."""
    if not (folder / verdicts.CLIPS).exists():
        return False
    if not (folder / builder.PLAN).exists():
        return True
    names = [row["id"] for row in verdicts.read_clips(folder, videos=False)]
    return len(names) >= count and all(negatives.is_made(folder, name) for name in names)


def _reviewed(review: Any, stage: Any, recipe: DiTRecipe) -> bool:
    """Whether the stage's negatives are there; makes the clips and, where measures judge, the verdicts."""
    folder = pathlib.Path(stage.negatives)
    options = SamplingOptions(**stage.sampling)
    hashes = weight_files.weight_hashes(recipe.preset.name, stage.init_from, recipe.trained)
    plan = negatives.plan_of(recipe.preset, hashes, options, recipe.data, review.task, stage.seed)
    if (folder / builder.PLAN).exists():
        builder.check_plan(folder, plan)
    if distributed.any_of(not _sampled(folder, min(review.clips, len(recipe.data)))):
        with distributed.together():
            pipe = recipe.make_sampler(stage.init_from)
        negatives.sample(pipe, options, recipe.data, folder, review.clips, review.batch, plan)
    waiting = {row["id"] for row in verdicts.read_clips(folder)} - verdicts.read_verdicts(folder).keys()
    if not distributed.any_of(bool(waiting)):  # a person may be at it just now, so processes may see different things
        return True
    if review.judge == negatives.METRICS:
        with distributed.together():
            if jax.process_index() == 0:
                count = negatives.judge(recipe.make_sampler(stage.init_from), folder, stage.issue, review.share)
                loop.say(f"{count} clips rejected for {stage.issue}: {folder}")
        return True
    loop.say(
        f"{len(waiting)} clips wait to be reviewed: python -m emv3_jax.training.review {folder}; then give this command"
        " again"
    )
    return False
