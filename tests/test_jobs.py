"""Manifests: what rows may say, and that one bad row does not stop the others."""

import json
import pathlib

import numpy as np
import pytest
import soundfile
from PIL import Image

import sample
from emv3_jax import checkpoint, command_line, config, manifest
from emv3_jax.errors import UserError

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "demo.py"


@pytest.fixture
def files(tmp_path, tiny, tiny_pipeline, monkeypatch) -> pathlib.Path:
    monkeypatch.setattr(command_line, "setup_compile_cache", lambda: None)
    monkeypatch.setitem(config.PRESETS, "tiny", tiny)
    monkeypatch.chdir(tmp_path)
    checkpoint.save_models(tmp_path / "weights", tiny_pipeline.params)
    Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(tmp_path / "good.png")
    soundfile.write(tmp_path / "good.wav", np.zeros(3200), 16000)
    return tmp_path


def run(name: str, *words: str) -> int:
    settings = ["--config.preset=tiny", "--config.weights=weights", "--config.sampling.steps=1", "--config.enlarge=1"]
    return command_line.run_main(sample.main, ["--config", str(CONFIG), "--manifest", name, *settings, *words])


@pytest.mark.usefixtures("quick_compile")
def test_rows_are_made_skipped_and_reported(files, capsys):
    good = {"image": "good.png", "audio": "good.wav", "prompt": "A puppet nods.", "out": "a.mp4"}
    rows = [
        good,
        {**good, "out": "b.mp4", "steps": 2, "audio_scale": 3},
        {**good, "out": "c.mp4", "image": "none.png"},
        {**good, "out": "d.mp4", "stepz": 2},
        {**good, "out": "e.mp4", "steps": 1.5},
        {**good, "out": "f.avi"},
        {key: value for key, value in good.items() if key != "out"},
        {**good, "out": "g.mp4", "prompt": ""},
    ]
    (files / "jobs.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert run("jobs.jsonl") == 1
    captured = capsys.readouterr()
    assert "8 rows: 2 made, 0 were finished, 6 failed (rows 3, 4, 5, 6, 7, 8)" in captured.out
    errors = captured.err
    for line in (
        "row 3 of 8: image none.png does not exist",
        "row 4 of 8: there is no column or sampling option 'stepz': did you mean steps?",
        "row 5 of 8: steps must be a whole number, got 1.5",
        "row 6 of 8: output f.avi must end in .mp4",
        "row 7 of 8: the row has no out",
        "row 8 of 8: the prompt is empty",
    ):
        assert line in errors, errors
    assert sorted(path.name for path in files.glob("?.*")) == ["a.json", "a.mp4", "b.json", "b.mp4"]
    assert json.loads((files / "b.json").read_text())["sampling"]["steps"] == 2

    (files / "jobs.jsonl").write_text("\n".join(json.dumps(row) for row in [good, {**good, "seed": 4}]))
    assert run("jobs.jsonl") == 0  # the first is finished, the second has another seed
    assert "2 rows: 1 made, 1 were finished, 0 failed" in capsys.readouterr().out

    (files / "jobs.jsonl").write_text("\n".join(json.dumps(row) for row in [good, {**good, "match_colours": True}]))
    assert run("jobs.jsonl") == 0
    assert "2 rows: 2 made, 0 were finished, 0 failed" in capsys.readouterr().out
    assert json.loads((files / "a.json").read_text())["job"]["match_colours"] is True


def test_a_csv_has_the_same_columns(tmp_path):
    path = tmp_path / "jobs.csv"
    path.write_text('image,audio,prompt,out,seed,steps,face\na.png,b.wav,"A puppet, nods",c.mp4,3,,"1,2,3,4"\n')
    assert manifest.read(path) == [
        {"image": "a.png", "audio": "b.wav", "prompt": "A puppet, nods", "out": "c.mp4", "seed": 3, "face": "1,2,3,4"}
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "{}", "manifest .*a.txt must end in .jsonl or .csv"),
        ("a.jsonl", "\n", "holds no rows"),
        ("a.csv", "out\n", "holds no rows"),
        ("a.jsonl", '{"out": "a.mp4"}\n{out}', "line 2 is not JSON"),
        ("a.jsonl", "[1]", "line 1 must be an object"),
        ("a.csv", "out\na.mp4,b\n", "row 1 has more cells"),
    ],
)
def test_manifests_that_cannot_be_read(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        manifest.read(tmp_path / name)


def test_options_of_one_video_do_not_go_with_a_manifest(files, capsys):
    (files / "jobs.jsonl").write_text('{"out": "a.mp4"}')
    assert run("jobs.jsonl", "--image=good.png") == 2
    assert "--image and --manifest do not go together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"out": 3}, "--out must be text, got 3"),
        ({"out": "a.mp4", "prompt": 7}, "--prompt must be text, got 7"),
        ({"out": "a.mp4", "seed": "x"}, "--seed must be between 0 and 4294967295, got x"),
        ({"out": "a.mp4", "seed": True}, "--seed must be between"),
        ({"out": "a.mp4", "frames": -1}, "--frames must be between"),
        ({"out": "a.mp4", "match_colours": 1}, "match_colours must be true or false, got 1"),
        ({"out": "a.mp4", "face": [1, 2, 3]}, "--face must be four numbers"),
        ({"out": "a.mp4", "mouth": "1,2,3"}, "--mouth must be four numbers"),
    ],
)
def test_values_of_the_wrong_kind(row, message):
    with pytest.raises(UserError, match=message):
        manifest.checked_job(row)


@pytest.mark.parametrize(
    ("value", "face"),
    [
        ("none", "none"),
        ("largest", "largest"),
        ("2", 2),
        (2, 2),
        ("1,2,3,4", (1, 2, 3, 4)),
        ([1, 2, 3, 4], (1, 2, 3, 4)),
    ],
)
def test_faces_are_said_in_many_ways(value, face):
    assert manifest.parse_face(value) == face
        ({"out": "a.mp4", "fps": "fast"}, "fps must be a number, got 'fast'"),
        ({"out": "a.mp4", "fps": True}, "fps must be a number, got True"),
        ({"out": "a.mp4", "face": True}, "--face must be four numbers"),
