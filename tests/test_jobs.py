"""Manifests: what rows may say, and that one bad row does not stop the others."""

import json
import pathlib

import numpy as np
import pytest
import soundfile
from PIL import Image

import sample
from emv3_jax import checkpoint, command_line, conditioning, config, jobs, manifest
from emv3_jax.errors import UserError

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "demo.py"


@pytest.fixture
def files(tmp_path, tiny, tiny_pipeline, monkeypatch) -> pathlib.Path:
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
        {**good, "out": "h.mp4", "image": "nul\0.png"},
        {**good, "out": "i.mp4", "steps": True},
        {**good, "out": "j.mp4", "fps": 20},
        {**good, "out": "a.mp4", "seed": 3},
    ]
    (files / "jobs.jsonl").write_text("{out\n" + "\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert run("jobs.jsonl") == 1
    captured = capsys.readouterr()
    summary = "13 rows: 2 made, 0 were finished, 11 failed (lines 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)"
    assert summary in captured.out
    errors = captured.err
    for line in (
        "row 1 of 13 (line 1): the row is not JSON: Expecting property name",
        "row 4 of 13 (line 4): image none.png does not exist",
        "row 5 of 13 (line 5): there is no column or sampling option 'stepz': did you mean steps?",
        "row 6 of 13 (line 6): steps must be a whole number, got 1.5",
        "row 7 of 13 (line 7): output f.avi must end in .mp4",
        "row 8 of 13 (line 8): the row has no out",
        "row 9 of 13 (line 9): the prompt is empty",
        "row 10 of 13 (line 10): image 'nul\\x00.png' is no name that a file can have",
        "row 11 of 13 (line 11): steps must be a whole number, got True",
        "row 12 of 13 (line 12): the task i2v takes no fps",
        "row 13 of 13 (line 13): output a.mp4 is also an output of line 2: choose another name",
    ):
        assert line in errors, errors
    assert sorted(path.name for path in files.glob("?.*")) == ["a.json", "a.mp4", "b.json", "b.mp4"]
    assert json.loads((files / "b.json").read_text())["sampling"]["steps"] == 2

    (files / "jobs.jsonl").write_text("\n".join(json.dumps(row) for row in [rows[1], {**good, "seed": 4}]))
    assert run("jobs.jsonl") == 0  # the first is finished, the second has another seed
    assert "2 rows: 1 made, 1 were finished, 0 failed" in capsys.readouterr().out

    (files / "jobs.jsonl").write_text(json.dumps({**good, "match_colours": True}))
    assert run("jobs.jsonl") == 0
    assert "1 rows: 1 made, 0 were finished, 0 failed" in capsys.readouterr().out
    assert json.loads((files / "a.json").read_text())["job"]["match_colours"] is True

    assert run("jobs.jsonl") == 0
    assert "1 rows: 0 made, 1 were finished, 0 failed" in capsys.readouterr().out
    Image.fromarray(np.full((64, 64, 3), 9, np.uint8)).save(files / "good.png")
    assert run("jobs.jsonl") == 0  # another picture under the same name
    assert "1 rows: 1 made, 0 were finished, 0 failed" in capsys.readouterr().out


class Broken:
    """Stands for a `jobs.Renderer` whose first row fails as nobody thought of."""

    def __init__(self):
        self.rendered: list[str] = []

    def finished(self, job):
        return False

    def read(self, job):
        if job.out == "a.mp4":
            raise MemoryError("out of memory\nallocating\n")
        return job, None

    def render(self, job, ready, options):
        self.rendered.append(job.out)


def test_whatever_a_row_raises_the_others_are_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    renderer = Broken()
    rows = [manifest.Row(n, {"out": out}) for n, out in enumerate(("a.mp4", "b.mp4"), 1)]
    assert jobs.render_all(renderer, rows, resume=False) == 1
    captured = capsys.readouterr()
    assert captured.err == "row 1 of 2 (line 1): MemoryError: out of memory\n" and renderer.rendered == ["b.mp4"]
    assert "2 rows: 1 made, 0 were finished, 1 failed (lines 1)" in captured.out


def test_rows_that_do_not_parse_are_among_the_others(tmp_path):
    path = tmp_path / "jobs.csv"
    path.write_text(
        'out,prompt\na.mp4,"A puppet\nnods"\n\nb.mp4,"never closed\nc.mp4,x,y\nd.mp4\ne.mp4,"a" b\nf.mp4,z\n'
    )
    rows = [(row.line, row.values.get("out"), row.problem.partition(":")[0]) for row in manifest.read_rows(path, {})]
    assert rows == [
        (2, "a.mp4", ""),
        (5, None, "is not CSV"),
        (6, None, "has more cells than the first line has names"),
        (7, None, "has fewer cells than the first line has names"),
        (8, None, "is not CSV"),
        (9, "f.mp4", ""),
    ]
    assert manifest.read_rows(path, {})[0].values["prompt"] == "A puppet\nnods"


def test_separators_of_unicode_do_not_end_a_line_of_json(tmp_path):
    path = tmp_path / "jobs.jsonl"
    text = "A puppet\u2028nods\x85"
    path.write_text('{"prompt": "' + text + '"}\r\n{"out": "b.mp4"}\n', encoding="utf-8")
    assert manifest.read(path, {}) == [{"prompt": text}, {"out": "b.mp4"}]


FILM_ROW = {"out": "new.mp4", "task": "lipsync", "video": "film.mp4", "mouth": "0,9,0,9"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**FILM_ROW, "out": "film.mp4"}], "output film.mp4 is also the video that is given"),
        ([{**FILM_ROW, "out": "sub/../link.mp4"}], "output sub/../link.mp4 is also the video that is given"),
        ([{"out": "a.mp4", "sheet": "x.png", "image": "x.png"}], "output x.png is also the image that is given"),
        ([{"out": "a.mp4"}, {"out": "./a.mp4"}], "output a.mp4 is also an output of line 1"),
        ([{"out": "a.mp4"}, {"out": "a.MP4"}], "output a.json is also an output of line 1"),
        ([FILM_ROW, {"out": "film.mp4"}], "output film.mp4 is also the video of line 1"),
        ([{"out": "mine.mp4"}], "mine.json, where the record of mine.mp4 would stand, is another file"),
        ([{"out": "folder.mp4"}], "output folder.json is a directory"),
    ],
)
def test_outputs_that_would_be_a_loss(tmp_path, monkeypatch, rows, message):
    monkeypatch.chdir(tmp_path)
    for name in ("film.mp4", "x.png"):
        (tmp_path / name).write_text("something")
    (tmp_path / "link.mp4").symlink_to("film.mp4")
    (tmp_path / "mine.json").write_text('{"program": "mine"}')
    (tmp_path / "made.json").write_text('{"program": "emv3_jax 0.1.0"}')
    (tmp_path / "sub").mkdir()
    (tmp_path / "folder.json").mkdir()
    rows = [*rows, {"out": "made.mp4"}]
    *_, refused, good = manifest.plan([manifest.Row(n, row) for n, row in enumerate(rows, 1)])
    assert isinstance(refused, UserError) and message in str(refused)
    assert isinstance(good, manifest.Job)  # a record of ours is replaced


def test_a_csv_has_the_same_columns(tmp_path):
    path = tmp_path / "jobs.csv"
    path.write_text('image,audio,prompt,out,seed,steps,face\na.png,b.wav,"A puppet, nods",c.mp4,3,,"1,2,3,4"\n')
    assert manifest.read(path, manifest.column_kinds({"steps": 12})) == [
        {"image": "a.png", "audio": "b.wav", "prompt": "A puppet, nods", "out": "c.mp4", "seed": 3, "face": "1,2,3,4"}
    ]


@pytest.mark.parametrize(
    ("column", "cell", "value"),
    [
        ("prompt", "null", "null"),
        ("prompt", "123", "123"),
        ("prompt", "true", "true"),
        ("prompt", '"""A puppet nods."""', '"A puppet nods."'),
        ("out", "1e3", "1e3"),
        ("negative_prompt", "7", "7"),
        ("unknown", "7", "7"),
        ("face", "2", "2"),
        ("seed", "7", 7),
        ("seed", "1e3", 1000.0),
        ("seed", "x", "x"),
        ("steps", "1.5", 1.5),
        ("steps", "null", "null"),
        ("fps", "29.97", 29.97),
        ("shift", "3", 3),
        ("match_colours", "TRUE", True),
        ("match_colours", "1", "1"),
        ("branches_together", "false", False),
    ],
)
def test_a_cell_is_what_its_column_is(tmp_path, column, cell, value):
    (tmp_path / "jobs.csv").write_text(f"{column}\n{cell}\n")
    sampling = command_line.load_config(CONFIG).sampling
    (row,) = manifest.read(tmp_path / "jobs.csv", manifest.column_kinds(sampling))
    assert row == {column: value} and type(row[column]) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "{}", "manifest .*a.txt must end in .jsonl or .csv"),
        ("a.jsonl", "\n", "holds no rows"),
        ("a.csv", "out\n", "holds no rows"),
        ("a.jsonl", '{"out": "a.mp4"}\n{out}', "line 2 is not JSON"),
        ("a.jsonl", "[1]", "line 1 must be an object"),
        ("a.jsonl", '{"out": "a.mp4", "image": "a.png", "out": "b.mp4"}', "line 1 says 'out' twice"),
        ("a.csv", "out\na.mp4,b\n", "line 2 has more cells"),
        ("a.csv", "out,prompt\na.mp4\n", "line 2 has fewer cells than the first line has names"),
        ("a.csv", "image,out,image\na,b,c\n", "a.csv: two columns are named 'image': rename one, or remove it"),
        ("a.csv", 'out,"x\na.mp4\n', "the line with the names is not CSV"),
    ],
)
def test_manifests_that_cannot_be_read(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        manifest.read(tmp_path / name, {})


def test_options_of_one_video_do_not_go_with_a_manifest(files, capsys):
    (files / "jobs.jsonl").write_text('{"out": "a.mp4"}')
    assert run("jobs.jsonl", "--image=good.png") == 2
    assert "--image and --manifest do not go together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"out": 3}, "--out must be text, got 3"),
        ({"out": "a.mp4", "prompt": 7}, "--prompt must be text, got 7"),
        ({"out": ""}, "--out must name a file, got ''"),
        ({"out": "."}, "--out must name a file, got '.'"),
        ({"out": "/"}, "--out must name a file, got '/'"),
        ({"out": "a.mp4", "sheet": ""}, "--sheet must name a file, got ''"),
        ({"out": "a.mp4", "seed": "7"}, "--seed must be a whole number, got '7'"),
        ({"out": "a.mp4", "seed": 1e3}, "--seed must be a whole number, got 1000.0"),
        ({"out": "a.mp4", "seed": True}, "--seed must be a whole number, got True"),
        ({"out": "a.mp4", "seed": 2**32}, "--seed must be between 0 and 4294967295, got 4294967296"),
        ({"out": "a.mp4", "frames": -1}, "--frames must be between"),
        ({"out": "a.mp4", "fps": "fast"}, "fps must be a number, got 'fast'"),
        ({"out": "a.mp4", "fps": True}, "fps must be a number, got True"),
        ({"out": "a.mp4", "face": True}, "--face must be four numbers"),
        ({"out": "a.mp4", "face": "\u00b2"}, "--face must be four numbers .*, got '\u00b2'"),
        ({"out": "a.mp4", "match_colours": 1}, "match_colours must be true or false, got 1"),
        ({"out": "a.mp4", "face": [1, 2, 3]}, "--face must be four numbers"),
        ({"out": "a.mp4", "mouth": "1,2,3"}, "--mouth must be four numbers"),
    ],
)
def test_values_of_the_wrong_kind(row, message):
    with pytest.raises(UserError, match=message):
        manifest.checked_job(row)


def renderer(**settings: str) -> jobs.Renderer:
    """Of the demo, with other values; reads jobs without weights."""
    cfg = command_line.load_config(CONFIG, settings)
    return jobs.Renderer(cfg, jobs.preset_of(cfg), conditioning.tokenizer(config.DEMO))


def test_negative_prompts_that_are_not_used_are_told(capsys):
    job = manifest.Job("a.mp4", sampling={"negative_motion": "A puppet waves its hand."})
    renderer().read(job)
    assert "note: negative_motion is not used: text_scale is 1; give --config.sampling.text" in capsys.readouterr().out
    renderer(**{"sampling.text_scale": "2", "sampling.negative_prompt": "Bad fingers."}).read(job)
    out = capsys.readouterr().out
    assert "not used" not in out and "note: the demo does not know the words bad, fingers; it knows" in out


def test_the_config_takes_what_the_option_face_takes():
    job = manifest.Job("a.mp4")
    ready, _ = renderer(face="10,20,10,20").read(job)
    assert ready.face == (10, 20, 10, 20)
    cfg = command_line.load_config(CONFIG, {"face": "2"})
    assert jobs.request_of(job, cfg).face == 2
    for face, message in (("1,2", "config key face must be four numbers"), ("x.npy", "face box x.npy does not exist")):
        with pytest.raises(UserError, match=message):
            renderer(face=face).read(job)
    assert jobs.request_of(manifest.Job("a.mp4", face="none"), cfg).face is None


def test_another_face_box_under_the_same_name_is_another_video(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "weight_hashes", lambda *names: {"dit": "0"})
    job, face = manifest.Job(str(tmp_path / "a.mp4")), str(tmp_path / "face.npy")
    np.save(face, [10, 20, 10, 20, 64, 64])
    made = renderer(face=face)
    record = {"program": "emv3_jax 0", **made._settings(job)}
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert made.finished(job)
    np.save(face, [10, 30, 10, 20, 64, 64])
    assert not made.finished(job)


def test_the_mode_decides_what_the_config_leaves_open():
    found = {}
    for mode in jobs.MODES:
        options = jobs.options_of(manifest.Job("a.mp4"), command_line.load_config(CONFIG, {"mode": mode}))
        found[mode] = options.long_video, options.neg_growth
    assert found == {"default": ("cfg", "steady"), "released": ("chained", "cumulative")}
    cfg = command_line.load_config(CONFIG, {"mode": "released", "sampling.neg_growth": "steady"})
    assert jobs.options_of(manifest.Job("a.mp4"), cfg).neg_growth == "steady"


def test_the_phases_of_the_negative_prompts_can_be_set():
    cfg = command_line.load_config(CONFIG, {"sampling.negative_high": "600"})
    options = jobs.options_of(manifest.Job("a.mp4", sampling={"negative_low": 200}), cfg)
    assert options.negatives.bounds == (200, 600)


@pytest.mark.parametrize(
    ("value", "face"),
    [
        ("none", "none"),
        ("largest", "largest"),
        ("2", 2),
        (2, 2),
        ("1,2,3,4", (1, 2, 3, 4)),
        ([1, 2, 3, 4], (1, 2, 3, 4)),
        ("[1, 2, 3, 4]", (1, 2, 3, 4)),
    ],
)
def test_faces_are_said_in_many_ways(value, face):
    assert manifest.parse_face(value) == face
