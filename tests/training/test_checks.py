"""Configs of impossible values: each is refused in words, all that is wrong is told at once, and good ones pass."""

import json
import pathlib

import ml_collections
import pytest

from configs import full_cycle, sft_1b
from configs import ndpo as ndpo_config
from emv3_jax import command_line
from emv3_jax.data import builder
from emv3_jax.errors import UserError
from emv3_jax.training import checks, cycle, recipes

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def config(name: str, **changes) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({**command_line.load_config(CONFIGS / f"demo_{name}.py").to_dict(), **changes})


def told(name: str, cfg: ml_collections.ConfigDict) -> list[str]:
    return checks.run(cfg) + recipes.CHECKS[name](cfg, recipes.preset_of(cfg))


def problems(name: str, **changes) -> list[str]:
    return told(name, config(name, **changes))


def test_every_recipe_has_its_check():
    assert recipes.CHECKS.keys() == recipes.RECIPES.keys()


TRAINING = [path for path in sorted(CONFIGS.glob("*.py")) if path.stem not in ("__init__", "demo", "preview", "flash")]


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_the_shipped_configs_pass(path):
    cfg = command_line.load_config(path)
    stages = [stage for _, stage in cycle.stage_configs(cfg, pathlib.Path("x"))] if "cycle" in cfg else [cfg]
    for stage in stages:
        preset = recipes.preset_of(stage)
        assert checks.run(stage) + recipes.CHECKS[stage.recipe](stage, preset) == [] and checks.notes(stage) == []


def test_parts_are_those_of_the_batches_that_are_reached():
    stages = ((5, ((5, 8),)), (9, ((5, 6),)))
    for parts in (0, 1, 2):  # 0: as many as the mesh needs
        assert problems("dit", micro_batches=parts, stages=stages) == []
    assert problems("dit", micro_batches=4, stages=stages, steps=5, warmup_steps=1) == []
    pairs = {"objective": "dpo", "init_from": "x", "negatives": "y"}  # of whose 12 samples a quarter is no whole pairs
    (line,) = problems("dit", micro_batches=4, stages=((9, ((5, 6),)),), **pairs)
    assert "does not divide a batch of 6" in line
    (line,) = problems("dit", micro_batches=0, **pairs)
    assert line.startswith("config key micro_batches must be given for dpo")


def test_steps_may_be_given_alone():
    for steps in (101, 10**6):
        assert problems("vae", steps=steps) == problems("dit", steps=steps) == []


BAD = {
    "no steps": ("vae", {"steps": 0}, "steps must be a whole number of 1 or more, got 0"),
    "negative steps": ("vae", {"steps": -5}, "steps must be a whole number of 1 or more, got -5"),
    "steps of text": ("vae", {"steps": "many"}, "steps must be a whole number of 1 or more, got 'many'"),
    "steps that are true": ("vae", {"steps": True}, "steps must be a whole number"),
    "log_every 0": ("vae", {"log_every": 0}, "log_every must be a whole number of 1 or more, got 0"),
    "eval_every 0": ("dit", {"eval_every": 0}, "eval_every must be"),
    "checkpoint_every 0": ("dit", {"checkpoint_every": 0}, "checkpoint_every must be"),
    "bad_steps 0": ("dit", {"bad_steps": 0}, "bad_steps must be"),
    "eval_clips 0": ("vae", {"eval_clips": 0}, "eval_clips must be"),
    "negative seed": ("vae", {"seed": -1}, "seed must be a whole number from 0 to 4294967295, got -1"),
    "negative minutes": ("vae", {"minutes": -1.0}, "minutes must be a number of 0 or more, got -1.0"),
    "endless minutes": ("vae", {"minutes": float("inf")}, "minutes must be"),
    "average that never moves": ("vae", {"ema_decay": 1.0}, "ema_decay must be a number of 0 or more and below 1"),
    "beta2": ("vae", {"beta2": 1.5}, "beta2 must be"),
    "clip_norm": ("vae", {"clip_norm": 0.0}, "clip_norm must be a number above 0, got 0.0"),
    "weight_decay": ("vae", {"weight_decay": -0.1}, "weight_decay must be"),
    "final_lr_share": ("vae", {"final_lr_share": 2.0}, "final_lr_share must be a number from 0 to 1, got 2.0"),
    "type of the weights": ("vae", {"export_dtype": "float8"}, "export_dtype must be one of float32, float16, got 'fl"),
    "rates without steps": ("vae", {"learning_rates": (1e-3,)}, "learning_rates must be ((up to step, peak above 0)"),
    "rates that fall back": ("vae", {"learning_rates": ((9, 1e-3), (5, 1e-3))}, "with rising steps, got ((9, 0.001)"),
    "no rates": ("vae", {"learning_rates": ()}, "learning_rates must be"),
    "rate of nothing": ("vae", {"learning_rates": ((9000, 0.0),)}, "learning_rates must be"),
    "long warm-up": ("vae", {"warmup_steps": 10**6}, "warmup_steps must be less than the steps of each stage"),
    "run within the warm-up": (
        "dit",
        {"steps": 100, "warmup_steps": 100},
        "warmup_steps must be less than the steps of each stage",
    ),
    "frozen text": ("dit", {"frozen": "dit"}, "frozen must be names of parameter groups, got 'dit'"),
    "stages of a number": ("vae", {"stages": 5}, "stages must be ((up to step, ((frames, side of the crop, crops)"),
    "stages of numbers": ("dit", {"stages": (5,)}, "stages must be ((up to step, ((first frames of a clip, clips)"),
    "no stages": ("dit", {"stages": ()}, "stages must be"),
    "stage without kinds": ("dit", {"stages": ((5, ()),)}, "stages must be"),
    "stages of the old form": ("dit", {"stages": ((2000, 61, 12),)}, "stages must be"),
    "falling stages": ("dit", {"stages": ((9, ((5, 2),)), (9, ((5, 2),)))}, "with rising steps"),
    "kind of one number": ("dit", {"stages": ((9, (5, 2)),)}, "(first frames of a clip, clips): frames of"),
    "no clips in a batch": ("dit", {"stages": ((9, ((5, 0),)),)}, "got (5, 0)"),
    "frames of no video": ("dit", {"stages": ((9, ((60, 2),)),)}, "got (60, 2)"),
    "crop beyond the picture": ("vae", {"stages": ((9, ((1, 72, 2),)),)}, "up to picture, crops; got (1, 72, 2)"),
    "crop of no cells": ("vae", {"stages": ((9, ((1, 30, 2),)),)}, "a side that is a multiple of 8"),
    "crop longer than a sentence": ("vae", {"stages": ((9, ((501, 32, 2),)),)}, "4k + 1 up to 497"),
    "picture": ("vae", {"picture": 68}, "picture must be a multiple of 8, got 68"),
    "no data": ("dit", {"data": ""}, "data must be the folder of a dataset"),
    "no tasks": ("dit", {"tasks": ()}, "tasks must be ((up to step, ((task, share above 0), ...)), ...)"),
    "no soup": ("dit", {"tasks": ((9, 1.0),)}, "tasks must be"),
    "another task": ("dit", {"tasks": ((9, (("v2v", 1.0),)),)}, "tasks of t2v, i2v, flf2v, lipsync, got"),
    "task without a share": ("dit", {"tasks": ((9, (("i2v", 0.0),)),)}, "tasks must be"),
    "silent from nothing": ("dit", {"silent_audio": True}, "silent_audio starts from base weights"),
    "adapters of no rank": (
        "dit",
        {"init_from": "x", "adapters": {"rank": 0, "scale": 1.0, "on": "."}},
        "rank must be a whole number of 1 or more, got 0 (section adapters)",
    ),
    "adapters on no pattern": (
        "dit",
        {"init_from": "x", "adapters": {"rank": 1, "scale": 1.0, "on": "blocks/("}},
        "on must be a regular expression, got 'blocks/(' (section adapters)",
    ),
    "width of no heads": ("dit", {"model": {"width": 98, "heads": 3}}, "width must be a multiple of twice model.heads"),
    "odd heads": ("dit", {"model": {"width": 33, "heads": 1}}, "width must be a multiple of twice model.heads, 2, got"),
    "no heads": ("dit", {"model": {"heads": 0}}, "model.heads must be a whole number of 1 or more, got 0"),
    "no layers": ("dit", {"model": {"layers": 0}}, "model.layers must be a whole number of 1 or more, got 0"),
    "no dtype": ("dit", {"model": {"dtype": "float17"}}, "model.dtype must be one of float32, bfloat16, got 'float17'"),
    "endless jitter": ("dit", {"phda": {"jitter": float("inf")}}, "jitter is inf; it must be from 0 to 1000"),
    "jitter below nothing": ("dit", {"phda": {"jitter": -5.0}}, "jitter is -5.0; it must be from 0 to 1000"),
    "adapters of nothing": (
        "dit",
        {"adapters": {"rank": 1, "scale": 1.0, "on": "."}},
        "adapters trains beside weights: name their folder",
    ),
    "objective": ("dit", {"objective": "rlhf"}, "objective must be one of sft, ndpo, ndpo_absolute, dpo, got 'rlhf'"),
    "no negatives": ("dit", {"objective": "ndpo", "init_from": "x"}, "negatives is needed for ndpo"),
    "beta": ("dit", {"beta": 0.0}, "beta must be a number above 0"),
    "beta of no gradient": (
        "dit",
        {"objective": "ndpo_absolute", "beta": 1000.0, "negatives": "x", "init_from": "x"},
        "beta must be at most 100 for ndpo_absolute, some 10 say, got 1000",
    ),
    "boundaries": ("dit", {"phda": {"audio": (700.0, 600.0)}}, "config key phda: PhDA boundaries of audio"),
    "boundaries of the unknown": ("dit", {"phda": {"sound": ()}}, "config key phda: 'sound' is none of text, image"),
    "eval_frames": ("dit", {"eval_frames": 129}, "eval_frames must be at most 125, got 129"),
    "all dropped and more": (
        "dit",
        {"drop_both": 0.7, "drop_audio": 0.7},
        "drop_both and drop_audio exceed 1 together",
    ),
    "timesteps": ("dit", {"timesteps": "normal"}, "timesteps must be one of uniform, logit_normal, got 'normal'"),
    "shift": ("dit", {"shift": 0.0}, "shift must be a number above 0"),
    "sampling": ("dit", {"sampling": {"steps": 0}}, "config key sampling: steps must be at least 1"),
    "sampling of the unknown": ("dit", {"sampling": {"stpes": 1}}, "config key sampling: "),
    "parts that a later batch does not have": (
        "dit",
        {"micro_batches": 4, "stages": ((5, ((5, 12),)), (9000, ((5, 6), (9, 8), (9, 10))))},
        "micro_batches: 4 does not divide a batch of 6 and of 10 (config key stages)",
    ),
    "parts of crops": ("vae", {"micro_batches": 3, "stages": ((9000, ((1, 32, 8),)),)}, "does not divide a batch of 8"),
    "parts below nothing": ("vae", {"micro_batches": -1}, "micro_batches must be a whole number of 0 or more"),
    "issue": ("dit", {"issue": "color"}, "issue must be one of lips, motion, anatomy, identity, colour, background"),
    "frozen weights": ("dit", {"frozen_weights": 5}, "frozen_weights must be text, got 5"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_impossible_value_is_told(case):
    name, changes, message = BAD[case]
    found = problems(name, **changes)
    assert len(found) == 1 and message in found[0] and found[0].startswith("config key")
    with pytest.raises(UserError) as info:
        recipes.build(config(name, **changes))
    assert str(info.value) == found[0]


@pytest.mark.parametrize("name", ["vae", "dit"])
def test_no_key_is_overlooked(name):
    """Every key of a config is told when it is no number, no text and no stages, and when it is not there."""
    for key in set(config(name)) - {"recipe", "preset", "model"}:
        cfg = config(name, **{key: float("nan")})
        assert any(line.startswith(f"config key {key} ") for line in told(name, cfg)), key
        del cfg[key]
        assert any(line.startswith(f"config key {key} ") for line in told(name, cfg)), key


def test_everything_that_is_wrong_is_told_at_once():
    cfg = config("dit", log_every=0, steps=0, stages=((9, ((5, 2), (6, 4))), (19, ((8, 5),))))
    del cfg["beta2"]
    with pytest.raises(UserError) as info:
        recipes.build(cfg)
    message = str(info.value)
    for words in ("log_every must", "steps must", "beta2 is missing", "got (6, 4) and (8, 5)"):
        assert message.count(words) == 1, words


def test_fields_of_the_transformer_are_checked():
    for name in ("widht", "text_width"):  # the second follows from another model
        with pytest.raises(UserError, match=f"config key model: '{name}' is none of "):
            recipes.build(config("dit", model={name: 3}))
    with pytest.raises(UserError, match="config key model.remat must be one of full, dots, or empty, got 'some'"):
        recipes.build(config("dit", model={"remat": "some"}))
    assert recipes.preset_of(config("dit", model={"layers": 3})).dit.layers == 3


@pytest.mark.parametrize(("share", "said"), [(0.6, "not reached"), (10, "its last part goes on")])
def test_a_run_that_does_not_end_with_its_stages_says_so(share, said, capsys):
    end = config("vae").stages[-1][0]
    recipes.build(config("vae", steps=int(share * end)))
    out = capsys.readouterr().out
    assert (
        out.startswith(f"note: the run ends at step {int(share * end)} and config key stages at {end}: ")
        and said in out
    )
    assert out.count("\n") == 1


def test_tasks_that_never_join_are_said():
    def said(steps):
        cfg = command_line.load_config(CONFIGS / "sft_1b.py", {"steps": str(steps)})
        return [note for note in checks.notes(cfg) if "tasks" in note]

    assert said(8000) == [
        "the run ends at step 8000, before the last part of config key tasks: flf2v and lipsync never join"
    ]
    assert said(20_000)[0].endswith("lipsync never join") and said(20_001) == said(40_000) == []
    shares = ((4, (("i2v", 1.0), ("t2v", 1.0))), (9, (("i2v", 1.0),)))
    assert checks.notes(config("dit", steps=4, tasks=shares))[1].endswith("later shares are not reached")


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (1, {"warmup_steps": 50}, "warmup_steps must be less than the steps of each stage"),
        (1, {"issue": "colour"}, "lips, motion, identity, background where measures judge, got 'colour'"),
        (3, {"beta": 0.0}, "beta must be a number above 0"),
        (4, {"stages": ((160, ((33, 0),)),)}, "got (33, 0)"),
        (1, {"steps": "many"}, "config key steps must be a whole number of 1 or more, got 'many'"),
        (0, {"sampling": 5}, "config key sampling must be a section, got 5"),
        (2, {"phda": {"jitter": "much"}}, "config key phda: could not convert string to float: 'much'"),
        (2, {"mesh": {"data": "all"}}, "config key mesh must be a section of whole numbers of 0 or more, got"),
        (2, {"recipe": "vae"}, "config key recipe: 'vae' makes no videos"),
    ],
)
def test_all_stages_of_a_cycle_are_checked_at_its_start(stage, changes, message, tmp_path):
    cfg = command_line.load_config(CONFIGS / "puppet_full_cycle.py")
    with cfg.unlocked():
        cfg.cycle = tuple({**keys, **(changes if k == stage else {})} for k, keys in enumerate(cfg.cycle))
    name = f"{stage + 1}_{cfg.cycle[stage]['name']}"
    with pytest.raises(UserError) as info:
        cycle.train(cfg, tmp_path / "run")
    assert message in str(info.value) and str(info.value).endswith(f"(in {name})")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "wide"}, "config key model must be a section, got 'wide'"),
        ({"preset": ("demo",)}, r"config key preset: \('demo',\) is none of "),
    ],
)
def test_a_model_of_the_wrong_type_is_told(changes, message):
    with pytest.raises(UserError, match=message):
        recipes.preset_of(config("dit", **changes))


def test_a_cycle_is_one_stage_or_more():
    cfg = command_line.load_config(CONFIGS / "puppet_full_cycle.py")
    for value in ((), 3):
        with cfg.unlocked(), cfg.ignore_type():
            cfg.cycle = value
        with pytest.raises(UserError, match="config key cycle must be one stage or more, got "):
            cycle.stage_configs(cfg, pathlib.Path("x"))


def test_measures_of_puppets_judge_no_films(tmp_path):
    """Known as soon as there is a dataset."""
    cfg = command_line.load_config(CONFIGS / "puppet_full_cycle.py", {"data": str(tmp_path)})
    cycle.check(cfg, cycle.stage_configs(cfg, tmp_path))
    record = {"format": builder.FORMAT, "preset": "demo", "clips": [["train/1", 33, 64, 64], ["a.mp4/0", 33, 64, 64]]}
    (tmp_path / builder.RECORD).write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"'a.mp4/0' is no puppet, so no measure .* \(in 2_lips and 4_identity\)"):
        cycle.check(cfg, cycle.stage_configs(cfg, tmp_path))


def test_stages_that_unlearn_are_as_ndpo_py_says():
    """But for what a cycle says itself: where they start and where their clips are."""
    sft, ndpo = sft_1b.get_config().to_dict(), ndpo_config.get_config().to_dict()
    wanted = {key: value for key, value in ndpo.items() if value != sft[key]}
    for key in ("init_from", "silent_audio", "negatives"):
        del wanted[key]
    for stage in full_cycle.get_config().cycle:
        if stage.get("objective"):
            assert {key: stage.get(key) for key in wanted} == wanted


@pytest.mark.parametrize("name", ["demo_dit", "puppet_full_cycle", "sft_1b"])
def test_remat_can_be_set_from_the_command_line(name):
    cfg = command_line.load_config(CONFIGS / f"{name}.py", {"model.remat": "dots"})
    assert recipes.preset_of(cfg).dit.remat == "dots"


def test_what_is_wrong_in_every_stage_is_told_once():
    cfg = command_line.load_config(CONFIGS / "puppet_full_cycle.py", {"clip_norm": "0.0", "review.judge": "person"})
    with pytest.raises(UserError) as info:
        cycle.check(cfg, cycle.stage_configs(cfg, pathlib.Path("x")))
    assert str(info.value).count("clip_norm") == 1 and "(in 1_sft and 2_lips and 3_sft" in str(info.value)
