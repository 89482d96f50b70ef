"""The cycle: clips made for review, what is said of them, and the stages that follow from it."""

import contextlib
import pathlib
import shutil
import signal

import jax
import ml_collections
import numpy as np
import pytest
from tiny_runs import CONFIGS, arrays_equal, plan_of

from emv3_jax import checkpoint, command_line
from emv3_jax.config import PRESETS
from emv3_jax.errors import UserError
from emv3_jax.options import SamplingOptions
from emv3_jax.pipeline import expected_params
from emv3_jax.training import cycle, negatives, recipes, verdicts
from emv3_jax.training.dit_recipe import DiTRecipe

pytestmark = pytest.mark.usefixtures("quick_compile")

# Clips for review


def test_samples_wait_in_the_review_folder(review, capsys):
    rows = verdicts.read_clips(review)
    assert len({row["id"] for row in rows}) == 4 and all(row["clip"].startswith("train/") for row in rows)
    arrays = np.load(review / f"{rows[0]['id']}.npz")
    assert arrays["latents"].shape == arrays[negatives.TRUE].shape == (3, 4, 4, 16)
    assert np.abs(arrays["latents"].astype(np.float32) - arrays[negatives.TRUE]).max() > 0.1


def test_an_interrupted_sampling_goes_on(make, weights, tiny, review, tmp_path):
    recipe = make(stages=((10, ((9, 2),)),))
    pipe = recipe.make_pipeline(checkpoint.load_models(weights, {n: expected_params(tiny)[n] for n in recipe.trained}))
    first = verdicts.read_clips(review)[:2]
    for row in first:
        for suffix in ("npz", "mp4"):
            name = f"{row['id']}.{suffix}"
            (tmp_path / name).write_bytes((review / name).read_bytes())
    with pytest.raises(
        UserError, match=r"holds clips without a plan.json that says what made them: give another --out"
    ):
        negatives.sample(pipe, SamplingOptions(steps=2), recipe.data, tmp_path, 4, 2, plan_of(recipe))
    shutil.copy(review / "plan.json", tmp_path)
    untouched = (tmp_path / f"{first[0]['id']}.npz").stat().st_mtime_ns
    negatives.sample(pipe, SamplingOptions(steps=2), recipe.data, tmp_path, 4, 2, plan_of(recipe))
    assert verdicts.read_clips(tmp_path) == verdicts.read_clips(review)
    assert (tmp_path / f"{first[0]['id']}.npz").stat().st_mtime_ns == untouched
    last = verdicts.read_clips(review)[3]["id"]
    same = lambda: jax.tree.map(  # noqa: E731
        np.testing.assert_array_equal, dict(np.load(tmp_path / f"{last}.npz")), dict(np.load(review / f"{last}.npz"))
    )
    same()
    (tmp_path / f"{last}.npz").write_bytes(b"PK\x03\x04 cut off")
    assert not cycle._sampled(tmp_path, 4)
    negatives.sample(pipe, SamplingOptions(steps=2), recipe.data, tmp_path, 4, 2, plan_of(recipe))
    same()
    assert cycle._sampled(tmp_path, 4) and not cycle._sampled(tmp_path, 5)
    (tmp_path / f"{first[1]['id']}.mp4").unlink()
    assert not cycle._sampled(tmp_path, 4)
    negatives.sample(pipe, SamplingOptions(steps=2), recipe.data, tmp_path, 4, 2, plan_of(recipe))
    assert cycle._sampled(tmp_path, 4)
    assert (tmp_path / f"{first[0]['id']}.npz").stat().st_mtime_ns == untouched  # of the same batch, and whole


def test_several_processes_share_the_batches_that_are_missing(make, review, tmp_path, monkeypatch):
    recipe, made = make(), {}
    names = [row["id"] for row in verdicts.read_clips(review)]
    for name in ("plan.json", f"{names[0]}.npz", f"{names[0]}.mp4"):
        shutil.copy(review / name, tmp_path)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(negatives.distributed, "together", contextlib.nullcontext)
    monkeypatch.setattr(negatives.distributed, "of_first", list)

    def note(pipe, options, data, folder, part, *rest):
        made.setdefault(jax.process_index(), []).extend(f"{number:06d}" for number in part)

    monkeypatch.setattr(negatives, "_make", note)
    for process in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda which=process: which)
        negatives.sample(None, SamplingOptions(steps=2), recipe.data, tmp_path, 4, 1, plan_of(recipe))
        assert (tmp_path / "clips.jsonl").exists() == (process == 0)
    assert sorted(made[0] + made[1]) == sorted(names[1:]) and len(made[0]) == 2
    assert verdicts.read_clips(tmp_path, videos=False) == verdicts.read_clips(review)


def test_a_folder_that_cannot_be_is_told(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"lies under .*file, which is a file"):
        negatives.sample(None, SamplingOptions(), make().data, tmp_path / "file" / "review", 4, 2, plan_of(make()))


def test_want_of_memory_for_a_batch_is_one_line(make, review, tmp_path, monkeypatch):
    def fail(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 2147483648 bytes.\nand so on")

    recipe = make()
    monkeypatch.setattr(negatives, "generate", fail)
    with pytest.raises(UserError, match=r"too little memory for a batch of 2 clips: make fewer at once .*bytes\.$"):
        negatives.sample(None, SamplingOptions(steps=2), recipe.data, tmp_path, 4, 2, plan_of(recipe))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"weights": "b"}, 'weights of dit "a" there and "b" now'),
        ({"seed": 1}, "seed 0 there and 1 now"),
        ({"task": "t2v"}, 'task "i2v" there and "t2v" now'),
        ({"steps": 3}, "sampling.steps 2 there and 3 now"),
    ],
)
def test_clips_of_another_plan_are_refused(make, review, change, told):
    recipe = make()
    with pytest.raises(
        UserError, match=rf"is being made of something else \({told}\): give another --out, or delete it"
    ):
        negatives.sample(None, SamplingOptions(), recipe.data, review, 4, 2, plan_of(recipe, **change))


def test_measures_leave_what_a_person_said(review, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(review, tmp_path / "review")
    ids = [row["id"] for row in verdicts.read_clips(folder)]
    verdicts.add_verdict(folder, ids[2], None)
    verdicts.add_verdict(folder, ids[3], None)
    monkeypatch.setattr(negatives.evaluation, "decode", lambda pipe, latents: [np.zeros((9, 32, 32, 3))])
    said = iter([0.1, 0.9, 0.9, 0.1])
    monkeypatch.setattr(negatives.metrics, "score_clip", lambda video, clip: {"sync": next(said)})
    for rejected in (2, 3):  # a second time, what measures said is said anew
        assert negatives.judge(None, folder, "lips", 0.5) == 1
        note = f"note: a person has judged 2 clips of {folder}, which the measures leave as they are\n"
        assert capsys.readouterr().out == note
        now = verdicts.read_verdicts(folder)
        assert [now[id].issue for id in ids[:2]] == ["lips", "motion"] and {now[id].by for id in ids[:2]} == {""}
        assert [id for id in ids[2:] if now[id].verdict == "reject"] == [ids[rejected]]
    for id in ids:
        verdicts.add_verdict(folder, id, "keep")
    assert negatives.judge(None, folder, "lips", 0.5) == 0 and not negatives.rejected(folder, "")


@pytest.mark.parametrize("what", [b"", b"PK\x03\x04 cut off", None])
def test_damaged_arrays_are_told(review, tmp_path, what):
    folder = shutil.copytree(review, tmp_path / "review")
    path = folder / f"{verdicts.read_clips(folder)[0]['id']}.npz"
    if what is None:  # a byte of the arrays, with the directory of the file as it was
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        what = bytes(data)
    path.write_bytes(what)
    with pytest.raises(UserError, match="is missing or damaged .*: sample the clips again"):
        negatives.Negatives.read(str(folder), "lips")


def test_only_what_was_rejected_for_the_issue_is_unlearnt(review, make):
    assert len(negatives.Negatives.read(str(review), "").rows) == 2
    (name,) = set(negatives.Negatives.read(str(review), "lips").ids(0, 1, 4))
    assert name == verdicts.read_clips(review)[0]["id"]
    with pytest.raises(UserError, match="nothing in .* was rejected for colour: review it"):
        negatives.Negatives.read(str(review), "colour")


class Films:
    """In place of a dataset: two clips of a film."""

    record = {"clips": [["a.mp4/0", 33, 64, 64], ["a.mp4/33", 33, 64, 64]]}  # noqa: RUF012


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--config", "configs/demo_vae.py", "--out", "OUT/new"], "'vae' makes no videos that could be reviewed"),
        (["--config", "configs/demo.py", "--out", "OUT/new"], "has no key recipe, so it is not for training"),
        (["--config", "configs/puppet_sft.py", "--out", "OUT/file"], "lies under OUT/file, which is a file"),
        (["--config", "configs/puppet_sft.py", "--out", "OUT/new", "--judge", "metrics"], "'a.mp4/0' is no puppet"),
    ],
)
def test_what_cannot_be_made_or_judged_is_told_before_models_are_read(words, told, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(DiTRecipe, "data", Films)
    monkeypatch.setattr(negatives.pipeline, "load_models", lambda *args: pytest.fail("models are read"))
    monkeypatch.chdir(CONFIGS.parent)
    words = [word.replace("OUT", str(tmp_path)) for word in words]
    assert command_line.run_main(negatives.main, [*words, "--weights", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told.replace("OUT", str(tmp_path)) in line and line.startswith("error: ")
    assert not any((tmp_path / "new").glob("*"))


# Stages


@pytest.fixture
def cycle_config(make, monkeypatch) -> ml_collections.ConfigDict:
    """SFT, Negative DPO for lips, SFT, of a few steps each; a person reviews."""
    monkeypatch.setattr(recipes, "build", lambda stage: DiTRecipe(stage, make().preset))
    monkeypatch.setitem(PRESETS, "tiny", make().preset)
    unlearn = {"name": "lips", "objective": "ndpo", "issue": "lips", "steps": 2, "stages": ((2, ((9, 2),)),)}
    return ml_collections.ConfigDict({
        **make().cfg, "steps": 3, "eval_every": 100, "learning_rates": ((3, 1e-3),), "stages": ((3, ((9, 2),)),),
        "cycle": ({"name": "sft"}, {**unlearn, "learning_rates": ((2, 1e-3),)}, {"name": "sft"}),
        "review": {"clips": 4, "batch": 2, "judge": "person", "share": 0.5, "task": "i2v"},
    })  # fmt: skip


def test_the_cycle_goes_on_from_stage_to_stage(cycle_config, tmp_path, capsys):
    """SFT, clips judged by the measures, Negative DPO, SFT; stages that are done are not done again."""
    cfg = cycle_config
    assert cycle.train(cfg, tmp_path) == 0
    out = capsys.readouterr().out
    assert f"4 clips wait to be reviewed: python -m emv3_jax.training.review {tmp_path}/2_lips/review" in out
    assert not (tmp_path / "weights").exists()
    cfg.review.judge = "metrics"
    assert cycle.train(cfg, tmp_path) == 0
    out = capsys.readouterr().out
    assert "stage 1_sft" not in out and "2 clips rejected for lips" in out and "stage 3_sft: sft, 3 steps" in out
    ends = [checkpoint.load_params(tmp_path / n / "weights" / "dit.safetensors") for n in ("1_sft", "2_lips", "3_sft")]
    assert not arrays_equal(ends[0], ends[1]) and not arrays_equal(ends[1], ends[2])
    assert arrays_equal(checkpoint.load_params(tmp_path / "weights" / "dit.safetensors"), ends[2])
    assert cycle.train(cfg, tmp_path) == 0 and "stage" not in capsys.readouterr().out.replace("the last stage", "")
    cfg.ema_decay = 0.5
    assert cycle.train(cfg, tmp_path) == 0
    said = capsys.readouterr().out.splitlines()[:-1]
    assert len(said) == 3 and said[2].startswith(
        "note: stage 3_sft is done, with other settings than these (ema_decay "
    )


class FakeRuns:
    """Stands in for the runs of a cycle's stages: notes where each starts and how long it may take, writes weights."""

    def __init__(self, monkeypatch):
        self.seen, self.silent, self.takes, self.now = [], [], 0.0, 0.0
        monkeypatch.setattr(cycle.loop, "train", self.train)
        monkeypatch.setattr(cycle.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(cycle, "_reviewed", lambda review, stage, recipe: True)

    def train(self, recipe, stage, folder) -> int:
        self.seen.append((folder.name, pathlib.Path(stage.init_from).parent.name, stage.minutes))
        self.silent.append(stage.silent_audio)
        done = not stage.minutes or self.takes <= 60 * stage.minutes
        self.now += self.takes if done else 60 * stage.minutes
        (folder / "weights").mkdir(parents=True, exist_ok=True)
        (folder / "weights" / "which").write_text(folder.name)
        (folder / "checkpoints" / str(stage.steps if done else 1)).mkdir(parents=True)
        return 0


def test_every_stage_has_a_seed_of_its_own(cycle_config, tmp_path):
    """With one seed all stages would see the same clips with the same noise."""
    cycle_config.seed = 5
    seeds = [stage.seed for _, stage in cycle.stage_configs(cycle_config, tmp_path)]
    assert seeds[0] == 5 and len(set(seeds)) == 3
    assert seeds == [stage.seed for _, stage in cycle.stage_configs(cycle_config, tmp_path / "other")]
    cycle_config.cycle = (*cycle_config.cycle[:2], {**cycle_config.cycle[2], "seed": 8})
    assert [stage.seed for _, stage in cycle.stage_configs(cycle_config, tmp_path)] == [*seeds[:2], 8]


def test_a_signal_at_the_end_of_a_stage_ends_the_cycle_there(cycle_config, tmp_path, capsys, monkeypatch):
    runs = FakeRuns(monkeypatch)
    monkeypatch.setattr(negatives, "rejected", lambda folder, issue: [1])
    monkeypatch.setattr(cycle.loop, "train", lambda *args: runs.train(*args) or signal.SIGTERM)
    assert cycle.train(cycle_config, tmp_path) == signal.SIGTERM
    said = "stopped by SIGTERM; the same command goes on after stage 1_sft\n"
    assert capsys.readouterr().out.endswith(said) and not (tmp_path / "weights").exists()
    monkeypatch.setattr(cycle.loop, "train", runs.train)
    assert cycle.train(cycle_config, tmp_path) == 0
    assert [name for name, _, _ in runs.seen] == ["1_sft", "2_lips", "3_sft"]


def test_a_stage_without_negatives_is_passed_over(cycle_config, tmp_path, capsys, monkeypatch):
    runs = FakeRuns(monkeypatch)
    monkeypatch.setattr(negatives, "rejected", lambda folder, issue: [])
    for _ in range(2):  # and stays so
        assert cycle.train(cycle_config, tmp_path) == 0
    out = capsys.readouterr().out
    assert out.count(f"stage 2_lips is passed over: no clip was rejected for lips in {tmp_path}/2_lips/review") == 1
    assert [(name, start) for name, start, _ in runs.seen] == [("1_sft", ""), ("3_sft", "1_sft")]
    assert (tmp_path / "weights" / "which").read_text() == "3_sft"


@pytest.mark.parametrize("silent", [True, False])
def test_after_a_first_stage_that_is_passed_over_the_next_starts_where_it_would_have(
    cycle_config, tmp_path, monkeypatch, silent
):
    runs, cfg = FakeRuns(monkeypatch), cycle_config
    cfg.cycle, cfg.init_from, cfg.silent_audio = cfg.cycle[1:] + cfg.cycle[2:], "base/weights", silent
    monkeypatch.setattr(negatives, "rejected", lambda folder, issue: [])
    assert cycle.train(cfg, tmp_path) == 0
    assert [(name, start) for name, start, _ in runs.seen] == [("2_sft", "base"), ("3_sft", "2_sft")]
    assert runs.silent == [silent, False]


@pytest.fixture
def in_review(cycle_config, review, weights, tmp_path, monkeypatch):
    """A cycle that begins with unlearning, whose clips are made and of which one is not judged; this is the second of
    two processes."""
    cfg = cycle_config
    cfg.cycle, cfg.init_from = cfg.cycle[1:], str(weights)
    folder = shutil.copytree(review, tmp_path / "1_lips" / "review")
    (folder / "plan.json").unlink()
    verdicts.add_verdict(folder, verdicts.read_clips(folder)[3]["id"], None)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(cycle.loop, "train", lambda recipe, stage, folder: 15)
    return cfg, folder


def test_of_several_processes_one_judges(in_review, tmp_path, monkeypatch):
    cfg, folder = in_review
    cfg.review.judge = "metrics"
    monkeypatch.setattr(negatives, "judge", lambda *args: pytest.fail("the second process judges"))
    last, waited = verdicts.read_clips(folder)[3]["id"], []

    @contextlib.contextmanager
    def together():
        yield
        verdicts.add_verdict(folder, last, "reject", "lips", by="metrics")  # as the first process does
        waited.append(True)

    monkeypatch.setattr(cycle.distributed, "together", together)
    assert cycle.train(cfg, tmp_path) == 15 and waited == [True]


def test_several_processes_wait_for_a_person_together(in_review, tmp_path, monkeypatch):
    """Here everything is judged by now, and another process saw that one clip was not; or what was rejected."""
    cfg, folder = in_review
    asked, others = [], iter([False, True, False, False, True])
    monkeypatch.setattr(cycle.distributed, "any_of", lambda here: asked.append(here) or here or next(others))
    verdicts.add_verdict(folder, verdicts.read_clips(folder)[3]["id"], "keep")
    assert cycle.train(cfg, tmp_path) == 0 and asked == 2 * [False]
    verdicts.add_verdict(folder, verdicts.read_clips(folder)[0]["id"], "keep")
    assert cycle.train(cfg, tmp_path) == 15 and asked == 5 * [False]


def test_the_minutes_are_those_of_the_whole_cycle(cycle_config, tmp_path, capsys, monkeypatch):
    runs = FakeRuns(monkeypatch)
    monkeypatch.setattr(negatives, "rejected", lambda folder, issue: [1])
    cycle_config.minutes, runs.takes = 5.0, 120.0
    assert cycle.train(cycle_config, tmp_path) == 0
    assert [(name, minutes) for name, _, minutes in runs.seen] == [("1_sft", 5.0), ("2_lips", 3.0), ("3_sft", 1.0)]
    said = "the time is over (config key minutes); the same command goes on with stage 3_sft\n"
    assert capsys.readouterr().out.endswith(said) and not (tmp_path / "weights").exists()
    runs.takes = 30.0
    assert cycle.train(cycle_config, tmp_path) == 0
    assert [name for name, _, _ in runs.seen[3:]] == ["3_sft"] and (tmp_path / "weights").exists()


def test_a_cycle_of_unknown_keys_is_refused(make, tmp_path):
    review = {"clips": 4, "batch": 2, "judge": "person", "share": 0.5, "task": "i2v"}
    cfg = ml_collections.ConfigDict({**make().cfg, "cycle": ({"name": "sft", "stpes": 3},), "review": review})
    with pytest.raises(UserError, match="cycle: stage 1 sets 'stpes', which is no key of the config"):
        cycle.train(cfg, tmp_path)
    for stage, key in ((1, "negatives"), (2, "init_from"), (2, "silent_audio")):
        stages = [{"name": "sft"}, {"name": "more"}]
        stages[stage - 1][key] = make().cfg[key]
        cfg = ml_collections.ConfigDict({**make().cfg, "cycle": tuple(stages), "review": review})
        with pytest.raises(UserError, match=f"cycle: stage {stage} sets '{key}', which follows from the stages before"):
            cycle.train(cfg, tmp_path)
    cfg = ml_collections.ConfigDict({**make().cfg, "cycle": ({"name": "sft"},), "review": {**review, "judge": "dice"}})
    with pytest.raises(UserError, match=r"judge must be one of person, metrics, got 'dice' \(section review\)"):
        cycle.train(cfg, tmp_path)
