"""What the keys of a training config may be: looked at once, all of them, before any work.

A table says of each key a test and, in words, what passes it. Recipes share RUN; each adds a table and a function for
what a table cannot say (`vae`, `dit`).
"""

import itertools
import math
import numbers
import re
from collections.abc import Callable, Sequence
from typing import Any

from emv3_jax.config import DiTConfig, Preset
from emv3_jax.data.examples import TRAINED_TASKS
from emv3_jax.diffusion.phda import PhDAConfig
from emv3_jax.errors import UserError
from emv3_jax.models.dit import REMAT
from emv3_jax.pipeline import DTYPES, SamplingOptions
from emv3_jax.training import state as train_state
from emv3_jax.training.dit_recipe import SFT
from emv3_jax.training.losses import PREFERENCES
from emv3_jax.training.schedule import Stages
from emv3_jax.training.verdicts import ISSUES

Test = tuple[Callable[[Any], bool], str]
CROP_FRAMES = 497  # the longest 4k + 1 that fits into the sentences that crops are cut from (clips.sample_crops)
BETA_OF_ERRORS = 100  # beyond it a preference that takes exp(-beta x error) has no gradient left
EVAL_FRAMES = 13  # the shortest clip that every measure can be taken of


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def whole(low: int, high: int | None = None) -> Test:
    """Whole numbers from `low`, up to `high`."""
    words = f"a whole number of {low} or more" if high is None else f"a whole number from {low} to {high}"
    return lambda value: _is_whole(value) and low <= value and (high is None or value <= high), words


def _number(passes: Callable[[float], bool], words: str) -> Test:
    return lambda v: isinstance(v, numbers.Real) and not isinstance(v, bool) and math.isfinite(v) and passes(v), words


def one_of(*names: str) -> Test:
    """One of some names; "" is said as: or empty."""
    words = "one of " + ", ".join(filter(None, names)) + (", or empty" if "" in names else "")
    return lambda value: value in names, words


def _frames(value: Any) -> bool:
    return _is_whole(value) and value >= 1 and value % 4 == 1


def _pairs(value: Any) -> bool:
    """Whether `value` is ((step, anything), ...) with rising steps."""
    if not isinstance(value, Sequence) or not value:
        return False
    if not all(isinstance(pair, Sequence) and len(pair) == 2 and _is_whole(pair[0]) for pair in value):
        return False
    return all(a < b for a, b in itertools.pairwise([0, *(pair[0] for pair in value)]))


NOT_NEGATIVE = _number(lambda v: v >= 0, "a number of 0 or more")
POSITIVE = _number(lambda v: v > 0, "a number above 0")
SHARE = _number(lambda v: 0 <= v <= 1, "a number from 0 to 1")
DECAY = _number(lambda v: 0 <= v < 1, "a number of 0 or more and below 1")
TEXT: Test = (lambda value: isinstance(value, str), "text")
PATH: Test = (lambda value: isinstance(value, str) and bool(value), "a path")
RATES: Test = (
    lambda value: _pairs(value) and all(POSITIVE[0](peak) for _, peak in value),
    "((up to step, peak above 0), ...) with rising steps",
)

RUN: dict[str, Test] = {
    "seed": whole(0, 2**32 - 1),
    "steps": whole(1),
    "learning_rates": RATES,
    "warmup_steps": whole(0),
    "final_lr_share": SHARE,
    "weight_decay": NOT_NEGATIVE,
    "clip_norm": POSITIVE,
    "beta1": DECAY,
    "beta2": DECAY,
    "ema_decay": DECAY,
    "minutes": NOT_NEGATIVE,
    "bad_steps": whole(1),
    "log_every": whole(1),
    "eval_every": whole(1),
    "checkpoint_every": whole(1),
    "init_from": TEXT,
    "export_dtype": one_of("float32", "float16"),
    "eval_clips": whole(1),
    "motion_gain": NOT_NEGATIVE,
    "micro_batches": whole(0),
    "batches_ahead": whole(0),
    "mesh": (
        lambda value: hasattr(value, "keys") and all(whole(0)[0](size) for size in value.values()),
        "a section of whole numbers of 0 or more",
    ),
}
VAE: dict[str, Test] = {"picture": whole(16), "l2_weight": NOT_NEGATIVE, "kl_weight": NOT_NEGATIVE}
SECTION: Test = (lambda value: hasattr(value, "keys"), "a section")
SWITCH: Test = (lambda value: isinstance(value, bool), "True or False")
TASKS: Test = (
    lambda value: _pairs(value) and all(_is_soup(soup) for _, soup in value),
    f"((up to step, ((task, share above 0), ...)), ...) with rising steps and tasks of {', '.join(TRAINED_TASKS)}",
)
DIT: dict[str, Test] = {
    "data": TEXT,
    "frozen_weights": TEXT,
    "silent_audio": SWITCH,
    "adapters": SECTION,
    "tasks": TASKS,
    "inter_task_ema": SWITCH,
    "phda": SECTION,
    "objective": one_of("sft", *PREFERENCES),
    "beta": POSITIVE,
    "negatives": TEXT,
    "issue": one_of("", *ISSUES),
    "drop_both": SHARE,
    "drop_audio": SHARE,
    "shift": POSITIVE,
    "timesteps": one_of("uniform", "logit_normal"),
    "eval_frames": (lambda value: _frames(value) and value >= EVAL_FRAMES, f"4k + 1 and at least {EVAL_FRAMES}"),
    "sampling": SECTION,
}


def _is_soup(soup: Any) -> bool:
    """Whether it is ((task, share), ...)."""
    if not isinstance(soup, Sequence) or not soup:
        return False
    return all(
        isinstance(pair, Sequence) and len(pair) == 2 and pair[0] in TRAINED_TASKS and POSITIVE[0](pair[1])
        for pair in soup
    )


def run(cfg: Any) -> list[str]:
    """What is wrong with the keys that every recipe has, one line each."""
    wrong = table(cfg, RUN)
    if not wrong:
        try:
            train_state.make_schedule(cfg)
        except UserError as error:
            wrong.append(str(error))
    frozen = cfg.get("frozen", ())
    if isinstance(frozen, str) or not all(isinstance(name, str) for name in frozen):
        wrong.append(f"config key frozen must be names of parameter groups, got {frozen!r}")
    return wrong


def vae(cfg: Any, preset: Preset) -> list[str]:
    """What is wrong with the keys of the VAE's recipe."""
    if wrong := table(cfg, VAE):
        return wrong
    cell = preset.vae.spatial_factor
    if cfg.picture % cell:
        wrong.append(f"config key picture must be a multiple of {cell}, got {cfg.picture}")

    def fits(kind: Sequence[int]) -> bool:
        frames, side, _ = kind
        return _frames(frames) and frames <= CROP_FRAMES and side % cell == 0 and side <= cfg.picture

    words = f"frames of 4k + 1 up to {CROP_FRAMES}, a side that is a multiple of {cell} up to picture, crops"
    return wrong + (stages(cfg, "(frames, side of the crop, crops)", fits, words) or parts(cfg))


def dit(cfg: Any, preset: Preset) -> list[str]:
    """What is wrong with the keys of the DiT's recipe."""
    if wrong := table(cfg, DIT):
        return wrong
    if cfg.drop_both + cfg.drop_audio > 1:
        wrong.append(f"config keys drop_both and drop_audio exceed 1 together: {cfg.drop_both} and {cfg.drop_audio}")
    if cfg.eval_frames > preset.max_frames:
        wrong.append(f"config key eval_frames must be at most {preset.max_frames}, got {cfg.eval_frames}")
    if cfg.silent_audio and not cfg.init_from:
        wrong.append("config key silent_audio starts from base weights: name their folder with init_from")
    if cfg.adapters:
        wrong += [f"{line} (section adapters)" for line in table(cfg.adapters, ADAPTERS)]
        if not cfg.init_from:
            wrong.append("config key adapters trains beside weights: name their folder with init_from")
    if cfg.objective == "sft" and not cfg.data:
        wrong.append("config key data must be the folder of a dataset (python -m emv3_jax.data.prepare)")
    if cfg.objective != "sft":
        needed = [key for key in ("negatives", "init_from") if not cfg[key]]
        wrong += [f"config key {key} is needed for {cfg.objective}" for key in needed]
    if cfg.objective == "ndpo_absolute" and cfg.beta > BETA_OF_ERRORS:
        wrong.append(
            f"config key beta must be at most {BETA_OF_ERRORS} for ndpo_absolute, some 10 say, got {cfg.beta:g}: its"
            " exp(-beta x error) is next to nothing where errors are a few tenths, and teaches nothing"
        )
    wrong += model(preset.dit)
    for section, read in (("sampling", lambda s: SamplingOptions(**s)), ("phda", PhDAConfig.from_config)):
        try:
            read(cfg[section])
        except (ValueError, TypeError) as error:
            wrong.append(f"config key {section}: {error}")
    words = "frames of 4k + 1 of at least 5, and how many clips"
    fits = lambda kind: _frames(kind[0]) and kind[0] >= 5  # noqa: E731
    return wrong + (stages(cfg, "(first frames of a clip, clips)", fits, words) or parts(cfg))


def _pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(value) and bool(re.compile(value))
    except (re.error, OverflowError):
        return False


ADAPTERS: dict[str, Test] = {"rank": whole(1), "scale": POSITIVE, "on": (_pattern, "a regular expression")}
# The transformer's fields that a config may set; what it does not name follows from the preset's other models.
MODEL: dict[str, Test] = {
    **dict.fromkeys(("width", "heads", "layers", "ffn"), whole(1)),
    "time_features": (lambda value: _is_whole(value) and value > 0 and value % 2 == 0, "an even number above 0"),
    "rope_theta": POSITIVE,
    "riflex": whole(0),
    "remat": one_of("", *REMAT),
    "dtype": one_of(*DTYPES),
}


def model(cfg: DiTConfig) -> list[str]:
    """What is wrong with a transformer's fields, one line each."""
    names = {f"model.{name}": name for name in MODEL}
    tests = {key: MODEL[name] for key, name in names.items()}
    if wrong := table({key: getattr(cfg, name) for key, name in names.items()}, tests):
        return wrong
    if cfg.width % (2 * cfg.heads):
        return [f"config key model.width must be a multiple of twice model.heads, {2 * cfg.heads}, got {cfg.width}"]
    return []


def table(cfg: Any, tests: dict[str, Test]) -> list[str]:
    """One line for every key of `tests` that `cfg` lacks or that fails its test."""
    missing = [f"config key {key} is missing" for key in tests if key not in cfg]
    failed = [key for key, (passes, _) in tests.items() if key in cfg and not passes(cfg[key])]
    return missing + [f"config key {key} must be {tests[key][1]}, got {cfg[key]!r}" for key in failed]


def stages(cfg: Any, kind_is: str, fits: Callable[[Sequence[int]], bool], words: str) -> list[str]:
    """What is wrong with `cfg.stages`, ((up to step, (kind, ...)), ...).

    Args:
      kind_is: the numbers that make a kind, in words: "(frames, clips)".
      fits: whether the numbers of a kind, all of them 1 or more, can be used.
      words: what they have to be for that.
    """
    value, size = cfg.get("stages"), kind_is.count(",") + 1
    if not _pairs(value) or not all(isinstance(kinds, Sequence) and kinds for _, kinds in value):
        return [f"config key stages must be ((up to step, ({kind_is}, ...)), ...) with rising steps, got {value!r}"]

    def bad(kind: Any) -> bool:
        numbers_only = isinstance(kind, Sequence) and len(kind) == size and all(map(whole(1)[0], kind))
        return not numbers_only or not fits(kind)

    wrong = dict.fromkeys(str(kind) for _, kinds in value for kind in kinds if bad(kind))
    return [f"config key stages: a kind of batch is {kind_is}: {words}; got {' and '.join(wrong)}"] if wrong else []


def parts(cfg: Any) -> list[str]:
    """What is wrong with `micro_batches` for any batch of `cfg.stages` that the run comes to; 0 fits itself to them.

    Of pairs too it divides the clips, so that no pair is torn apart; which 0 would do.
    """
    count = cfg.get("micro_batches")
    if not count and cfg.get("objective") == "dpo":
        return ["config key micro_batches must be given for dpo: 0 takes samples one at a time, and tears pairs apart"]
    if not (whole(1)[0](count) and whole(1)[0](cfg.get("steps"))):
        return []
    sizes = {kind[-1] for kinds in _reached(cfg.stages, cfg.steps) for kind in kinds}
    odd = sorted(size for size in sizes if size % count)
    words = f"config key micro_batches: {count} does not divide a batch of {' and of '.join(map(str, odd))}"
    return [f"{words} (config key stages)"] if odd else []


def _reached(stages: Stages, steps: int) -> list[Any]:
    """What ((last step, what), ...) says of the steps of a run."""
    begins = [0, *(until for until, _ in stages)]
    return [what for begin, (_, what) in zip(begins, stages, strict=False) if begin < steps]


def notes(cfg: Any) -> list[str]:
    """What it means that `steps` is not where `stages` ends, and that it ends before all of `tasks`, a line each."""
    found, end = [], cfg.stages[-1][0]
    if cfg.steps != end:
        what = "what comes later in it is not reached" if cfg.steps < end else "its last part goes on"
        found.append(
            f"the run ends at step {cfg.steps} and config key stages at {end}: {what}; the learning rate falls to its"
            f" end at step {cfg.steps}"
        )
    soups = cfg.get("tasks", ()) if cfg.get("objective") == SFT else ()  # negatives know their tasks
    reached = _reached(soups, cfg.steps)
    if len(reached) < len(soups):
        trained = {name for soup in reached for name, _ in soup}
        never = list(dict.fromkeys(name for _, soup in soups for name, _ in soup if name not in trained))
        what = f"{' and '.join(never)} never join" if never else "later shares are not reached"
        found.append(f"the run ends at step {cfg.steps}, before the last part of config key tasks: {what}")
    return found
