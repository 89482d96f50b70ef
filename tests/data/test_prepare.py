"""python -m emv3_jax.data.prepare: from films or puppets to batches, and one line for whatever is wrong."""

import dataclasses
import sys

import numpy as np
import pytest

from emv3_jax import checkpoint, command_line, config, media, pipeline, weight_files
from emv3_jax.conditioning import tokenizer
from emv3_jax.data import batches, examples, prepare
from emv3_jax.data.dataset import Dataset, Plan
from emv3_jax.data.extract import Extractor, encoder_hash
from emv3_jax.data.videos import Films, Rules, find_films
from emv3_jax.puppets import clips

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def run(tmp_path, tiny, tiny_pipeline, monkeypatch, capsys):
    """Runs prepare on the tiny preset in an empty folder: (exit status, lines on stdout, lines on stderr)."""
    monkeypatch.setitem(config.PRESETS, "tiny", tiny)
    monkeypatch.chdir(tmp_path)
    checkpoint.save_models(tmp_path / "weights", {"vae": tiny_pipeline.params["vae"]})

    def run(*words):
        common = ["--preset", "tiny", "--weights", "weights", "--out", "out"]
        code = command_line.run_main(prepare.main, [*common, *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return run


def test_films_become_batches(run, tmp_path, film, tiny, tiny_pipeline):
    film(tmp_path / "films" / "a.mp4", frames=32)
    film(tmp_path / "films" / "sub" / "b.mp4", frames=15, fps=30.0, caption="A puppet.")
    film(tmp_path / "films" / "mute.mp4", wave=None)
    (tmp_path / "films" / "text.mp4").write_text("nothing")
    (tmp_path / "films" / "text.txt").write_text("A puppet.")
    code, out, err = run("--videos", "films", "--frames", 9, 5, "--face", "none", "--shards", 2)
    assert (code, err) == (0, [])
    assert out[-1] == "out: 5 clips"
    for line in (
        "dropped 1 (1.0 s): no sound track: mute.mp4",
        "dropped 1 (0.0 s): the film is not a video or is damaged: give an MP4, WebM or MOV file: text.mp4",
        "dropped 1 (0.2 s): the rest of a film, shorter than a clip: sub/b.mp4/0.36",
    ):
        assert line in out
    data = Dataset("out", tiny)
    assert data.record["vae"] == encoder_hash(tiny_pipeline.params["vae"])
    assert sorted(map(data.id, range(5))) == ["a.mp4/0.00", "a.mp4/0.36", "a.mp4/0.72", "a.mp4/1.08", "sub/b.mp4/0.00"]

    source = Films(find_films("films", None), Rules((9, 5), "none"), tiny, tokenizer(tiny))
    raw = {clip.id: clip for k in (0, 2) for clip in source.clips(k) if hasattr(clip, "id")}
    by_hand = Extractor(tiny, {"vae": tiny_pipeline.params["vae"]})
    for number in (0, 4):
        made, read = by_hand.example(raw[data.id(number)]), data.examples([number])[0]
        assert examples.text_of(read["caption"]) == made["caption"]
        for name in ("latents", "masked_i2v", "mouth", "audio", "wave", "image"):
            np.testing.assert_array_equal(read[name], made[name])

    plan = Plan(data.buckets, ((4, ((9, 2),)),), 4, 0)

    def make(step):
        frames, numbers = plan.batch(step)
        return examples.batch(data.examples(numbers), ["i2v", "lipsync"], frames, tiny)

    plain = [make(step) for step in range(1, 5)]
    for one, other in zip(plain, batches.ahead(make, 1, 4, 3), strict=True):
        assert one["latents"].shape == (2, 3, 4, 4, 16)
        assert all(np.array_equal(one[name], other[name]) for name in one)

    code, out, _ = run("--videos", "films", "--frames", 9, 5, "--face", "none", "--shards", 2)
    assert code == 0 and out[0] == "out is complete already"


def test_puppets_go_the_same_way(run, tiny):
    """In two shares."""
    words = ["--puppets", "heldout", "--clips", 3, "--frames", 9, "--shards", 2, "--process"]
    assert run(*words, "0/2")[0] == 0
    code, out, _ = run(*words, "1/2")
    assert code == 0 and out[-1] == "out: 3 clips"
    data = Dataset("out", tiny)
    for number in range(3):
        (example,) = data.examples([number])
        clip = clips.make_clip("heldout", int(data.id(number).removeprefix("heldout/")), 9)
        assert examples.text_of(example["caption"]) == clip.prompt
        np.testing.assert_array_equal(example["image"], media.to_uint8(np.asarray(clip.render(32)))[0])
        assert example["latents"].shape == (3, 4, 4, 16)


def test_states_of_the_empty_prompt_lie_beside_where_text_is_frozen(
    run, tmp_path, film, tiny, tiny_pipeline, monkeypatch
):
    """A preset without a vocabulary of its own; the words of another."""
    frozen = dataclasses.replace(tiny, vocabulary=())
    monkeypatch.setitem(config.PRESETS, "tiny", frozen)
    monkeypatch.setattr(weight_files, "load_tokenizer", lambda name, weights: tokenizer(tiny))
    monkeypatch.setattr(
        pipeline, "load_models", lambda preset, weights, roles: {r: tiny_pipeline.params[r] for r in roles}
    )
    monkeypatch.setattr(weight_files, "weight_hashes", lambda name, weights, roles: dict.fromkeys(roles, "0"))
    film(tmp_path / "a.mp4", frames=9)
    code, out, err = run("--videos", "a.mp4", "--frames", 9, "--face", "none")
    assert (code, err) == (0, [])
    states = np.load(tmp_path / "out" / examples.NULL_TEXT)
    assert states.shape == (1, 64) and np.abs(states).max() > 0.1
    (example,) = Dataset("out", frozen).examples([0])
    assert example["text"].shape == (5, 64) and example["image_states"].shape == (17, 64)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--videos", "none"], "--videos none does not exist"),
        (["--videos", "empty"], "--videos empty holds no videos"),
        (["--videos", "rows.jsonl"], "manifest rows.jsonl, row 1 names no video"),
        (["--videos", "films", "--puppets", "train"], "not allowed with"),
        (["--videos", "films", "--frames", "8"], "--frames must be 4k + 1"),
        (["--videos", "films", "--frames", "17"], "--frames must be at most 13"),
        (["--puppets", "train", "--frames", "17"], "--frames must be at most 13"),
        (["--puppets", "train", "--frames", "5", "9"], "--puppets makes clips of one length"),
        (["--puppets", "train", "--clips", "0"], "--clips and --shards must be 1 or more"),
        (["--puppets", "train", "--shards", "0"], "--clips and --shards must be 1 or more"),
        (["--videos", "films", "--process", "2/2"], "--process must be I/N"),
        (["--videos", "films", "--process", "one"], "--process must be I/N"),
        (["--videos", "films", "--subtitle-band", "0.7"], "--subtitle-band must be"),
        (["--videos", "films", "--face", "none", "--sync-model", "no:thing"], "--sync-model 'no:thing'"),
        (["--videos", "films", "--weights", "nowhere"], "nowhere"),
        (["--videos", "films", "--face", "none"], "no clip was kept"),
        (["--videos", "films", "--out", "file"], "--out file is a file: name a folder"),
        (["--videos", "films", "--out", "file/under", "--face", "none"], "cannot be made"),
        ([], "one of the arguments --videos --puppets is required"),
        (["--video", "films"], "--video"),
    ],
)
def test_what_is_wrong_is_one_line(run, tmp_path, words, message):
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "text.mp4").write_text("nothing")
    (tmp_path / "films" / "text.txt").write_text("A puppet.")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "rows.jsonl").write_text('{"caption": "A puppet."}')
    before = sorted(path.name for path in tmp_path.rglob("*"))
    code, _, err = run(*words)
    assert code == 2 and len(err) == 1
    assert err[0].startswith("error: ") and message in err[0]
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_missing_package_is_told_first(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    code, _, err = run("--puppets", "train")
    assert code == 2 and err[0].startswith("error: training data needs the extra data: pip install -e '.[data]'")
