"""The bench of the training step: what it measures is the step, each policy apart, and want of memory is a row."""

import dataclasses
import json
import subprocess

import jax
import numpy as np
import pytest

from bench import train_step
from bench.data import Large
from bench.full_step import FullStep
from emv3_jax import command_line, config
from emv3_jax.data import examples
from emv3_jax.models import dit

FOUND = {
    "device": "chip", "compile": 60.0, "seconds": 2.0, "tokens": 4000, "model": 6e12, "work": 8e12, "rate": 6e12,
    "peak": 3 * 2**30, "limit": 4 * 2**30,
}  # fmt: skip


@pytest.fixture(params=["frozen", "trained"])
def preset(request, tiny, monkeypatch):
    """The tiny preset by name; of one kind text and image are states, of the other words and pixels."""
    preset = dataclasses.replace(tiny, vocabulary=()) if request.param == "frozen" else tiny
    monkeypatch.setitem(config.PRESETS, "tiny", preset)
    return preset


def test_the_batch_is_like_those_of_training(preset):
    source = Large(preset, (3, 4, 6), 1)
    (clip,) = source.clips(0)
    want = examples.batch([source.example(clip)] * 2, ["i2v", "t2v"], 9, preset)
    shapes = FullStep("tiny").clips((3, 4, 6), 2)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()} == {
        name: (np.shape(leaf), np.asarray(leaf).dtype) for name, leaf in want.items()
    }


@pytest.mark.parametrize("preset", ["frozen"], indirect=True)
def test_a_step_is_measured(preset, quick_compile):
    found = train_step.measured("tiny", (2, 4, 4), "full", clips=2, steps=1)
    assert found["tokens"] == 2 * 2 * 4 and found["seconds"] > 0 and found["rate"] > 0
    assert found["model"] == 6 * dit.forward_flops(preset.dit, 8) and found["work"] == found["model"] * 4 / 3
    assert set(FOUND) == set(found)


def test_what_is_computed_again_counts_as_work():
    def work(remat):
        step = FullStep("preview", remat=remat)
        return step.recipe.work(step.clips((2, 4, 4), 5))[1] / 5

    forward = dit.forward_flops(config.DIT_PREVIEW, 8)
    assert [work(remat) / forward for remat in ("", "full")] == pytest.approx([3, 4])
    assert work("dots") - work("") == pytest.approx(30 * 4 * 8 * 1536 * (8 + 512 + 257))  # scores and sums of values


def test_each_policy_is_a_row_and_want_of_memory_leaves_the_others(monkeypatch, capsys):
    printed = {"full": (0, json.dumps(FOUND)), "dots": (0, json.dumps({"short": "RESOURCE_EXHAUSTED: 9 GiB"}))}
    asked = []

    def run(words, **kwargs):
        asked.append(words[3:])
        code, text = printed.get(words[-1], (-9, ""))
        return subprocess.CompletedProcess(words, code, stdout=f"a note\n{text}\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert command_line.run_main(train_step.main, ["--clips", "2"]) == 0
    assert asked == [["--clips", "2", "--measure", policy] for policy in ("full", "dots", "none")]
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert rows[2] == ["full", "60 s", "2.000", "2,000", "6 T", "3 T", "6 T", "50%", "67%", "3.0 of 4.0 GiB"]
    assert [row[:2] for row in rows[3:5]] == [["dots", "out of memory"], ["none", "out of memory"]]
    assert [row[0] for row in rows[6:]] == [
        "full: chip", "dots: RESOURCE_EXHAUSTED: 9 GiB", "none: the system killed the process"
    ]  # fmt: skip


def test_want_of_memory_is_what_a_policy_answers(monkeypatch, capsys):
    def short(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB\nmore")

    monkeypatch.setattr(train_step, "measured", short)
    assert train_step.main(["--measure", "full"]) == 0
    assert json.loads(capsys.readouterr().out) == {"short": "RESOURCE_EXHAUSTED: 9 GiB"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--latents", "29,60"], "such as 29,60,104"),
        (["--latents", "29,61,104"], "must be even"),
        (["--remat", "some"], "choose from"),
        (["--clips", "0"], "1 or more"),
        (["--presets", "demo"], "--presets"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, words, message):
    assert command_line.run_main(train_step.main, words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_policy_that_fails_otherwise_ends_it(monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda words, **kwargs: subprocess.CompletedProcess(words, 1, stdout=""))
    assert command_line.run_main(train_step.main, ["--remat", "full"]) == 2
    assert "--remat full failed" in capsys.readouterr().err
