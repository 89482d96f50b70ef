"""Scores of weights: their controls, their means, and the command that prints them."""

import json
import pathlib

import numpy as np
import pytest
import soundfile

from emv3_jax import checkpoint, command_line, config
from emv3_jax.puppets import clips, evaluation, score

pytestmark = pytest.mark.usefixtures("quick_compile")
CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "demo.py")


def test_means_are_over_the_clips_that_have_a_measure():
    rows = [{"sync": 0.5, "offset": 0.0, "sync_other": 0.1}, {"sync": 0.7, "offset": 5.0}, {"sync": 0.6, "offset": 1.0}]
    assert evaluation.means(rows) == pytest.approx({"sync": 0.6, "offset": 1.0, "sync_other": 0.1})


def test_the_control_is_the_next_clips_voice():
    batch = [clips.make_clip("heldout", i, 13) for i in range(2)]
    videos = np.stack([np.asarray(clip.render(32)) for clip in batch])
    rows = evaluation.score(videos, batch)
    assert [row["motion"] for row in rows] == [1.0, 1.0] and min(row["sync"] for row in rows) > 0.9
    swapped = evaluation.score(videos, batch[:1] * 2)
    assert swapped[0]["sync_other"] == pytest.approx(swapped[0]["sync"], abs=0.05)  # both clips say the same
    assert "sync_other" not in evaluation.score(videos[:1], batch[:1])[0]


@pytest.fixture
def words(tiny, tiny_pipeline, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setitem(config.PRESETS, "tiny", tiny)
    monkeypatch.chdir(tmp_path)
    checkpoint.save_models(tmp_path / "weights", tiny_pipeline.params)
    rng = np.random.default_rng(0)
    soundfile.write("speech.wav", 0.1 * rng.standard_normal(30 * 640), 16000)
    soundfile.write("short.wav", 0.1 * rng.standard_normal(12 * 640), 16000)
    sizes = ["--config.preset=tiny", "--config.sampling.steps=1", "--clips=1", "--frames=13"]
    return [f"--config={CONFIG}", "--weights=weights", *sizes]


def test_the_table_and_the_numbers(words, tmp_path, capsys):
    assert command_line.run_main(score.main, [*words, "--recordings", "speech.wav", "--json=scores.json"]) == 0
    note, head, *lines = capsys.readouterr().out.splitlines()
    assert note == "note: speech.wav: the last 0.16 s fill no piece and are left out"
    assert head.split() == ["clips", *score.COLUMNS]
    assert [line[:17].strip() for line in lines] == ["generated", "true video", "through the VAE", "speech.wav"]
    assert [line[17:24].strip() for line in lines] == ["1", "1", "1", "2"]  # 30 frames of speech are two pieces
    numbers = json.loads((tmp_path / "scores.json").read_text())
    true = numbers["means"]["true video"]
    assert true["sync"] > 0.9 and true["motion"] == 1.0 and true["psnr"] > 90
    assert numbers["means"]["generated"]["psnr"] < 30
    assert len(numbers["clips"]["speech.wav"]) == 2


def test_a_row_a_task(words, tmp_path, capsys):
    more = ["--task", "t2v", "i2v", "flf2v", "lipsync", "i2v", "--json=scores.json", "--recordings", "speech.wav"]
    assert command_line.run_main(score.main, [*words, *more]) == 0
    means = json.loads((tmp_path / "scores.json").read_text())["means"]
    tasks = ["generated, t2v", "generated", "generated, flf2v", "generated, lipsync"]
    spoken = [name.replace("generated", "speech.wav") for name in tasks]
    assert list(means) == [*tasks, "true video", "through the VAE", *spoken]
    assert (
        means["generated, lipsync"]["identity"] != means["generated"]["identity"] != means["generated, t2v"]["identity"]
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--frames=12"], "--frames must be 4k + 1 and at least 13, got 12"),
        (["--frames=9"], "--frames must be 4k + 1 and at least 13, got 9"),
        (["--frames=17"], "--frames must be at most 13, the longest clip of the preset tiny, got 17"),
        (["--clips=0"], "--clips must be at least 1, got 0"),
        (["--first=-1"], "--first must be 0 or more, got -1"),
        (["--task", "i2v", "v2v"], "--task: invalid choice: 'v2v'"),
        (["--config.preset=huge"], "config key preset: 'huge' is none of demo, "),
        (["--config.sampling.steps=0"], "steps must be at least 1"),
        (["--recordings", "none.wav"], "recording none.wav does not exist"),
        (["--recordings", "short.wav"], "short.wav lasts 0.48 s, shorter than 13 frames"),
        (["--json=scores.txt"], "output scores.txt must end in .json"),
        (["--weights=none"], "no weights at none"),
    ],
)
def test_mistakes_are_told_before_anything_is_generated(words, monkeypatch, capsys, more, message):
    monkeypatch.setattr(score, "score_weights", lambda *args: pytest.fail("it started"))
    assert command_line.run_main(score.main, [*words, *more]) == 2
    assert message in capsys.readouterr().err
