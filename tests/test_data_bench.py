"""The bench of training data: films become clips, large records are read as in training."""

import dataclasses

import numpy as np
import pytest

from bench import data
from emv3_jax import command_line, config


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(data, "FRAMES", 9)
    monkeypatch.setattr(data, "FILM", 96)


def test_films_are_talking_clips(small, tmp_path):
    source = data.make_films(tmp_path / "films", 2)
    found = [clip for number in range(2) for clip in source.clips(number)]
    kept = [clip for clip in found if isinstance(clip, data.RawClip)]
    assert [clip.id for clip in kept] == ["0.mp4/0.00", "0.mp4/0.36", "1.mp4/0.00", "1.mp4/0.36"]
    assert all(clip.video.shape == (9, 64, 64, 3) and clip.caption for clip in kept)
    assert data.cut(source) > 0


def test_large_records_are_read_as_in_training(tiny, tmp_path, monkeypatch):
    frozen = dataclasses.replace(tiny, vocabulary=())
    monkeypatch.setitem(config.PRESETS, "tiny", frozen)
    monkeypatch.setattr(data, "WORDS", 3)
    recipe, size = data.large(tmp_path, data.Large(frozen, (3, 4, 6), 4), 2)
    batch = recipe.batch(1)
    assert batch["latents"].shape == (2, 3, 4, 6, 16) and batch["latents"].std() == pytest.approx(1, abs=0.2)
    assert np.abs(batch["text"][:, :3]).min() > 0 == np.abs(batch["text"][:, 3:]).max()
    assert size > 4 * 3 * 4 * 6 * 16 * 2  # latents of the clip and of what three tasks are given of it, float16
    assert data.load(recipe.batch, 3, 2) > 0


@pytest.mark.parametrize("words", [["--clips", "11"], ["--records", "3"], ["--films", "0"], ["--parts", "other"]])
def test_what_is_wrong_is_one_line(capsys, words):
    assert command_line.run_main(data.main, words) == 2
    error = capsys.readouterr().err
    assert words[0] in error and error.count("\n") == 1
