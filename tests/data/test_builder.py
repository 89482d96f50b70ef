"""Shards: what is finished stays, what is interrupted leaves nothing, and any number of processes make the same."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from emv3_jax.data import builder
from emv3_jax.data.dataset import Dataset
from emv3_jax.errors import UserError

IDENTITY = {"preset": "tiny", "vae": "abc"}


def build(source, extractor, folder, shards=3, identity=IDENTITY, process=0, processes=1, lines=None):
    say = [].append if lines is None else lines.append
    return builder.build(source, extractor, folder, shards, identity, process, processes, say)


def contents(folder, preset):
    """All clips of a dataset, by name."""
    data = Dataset(folder, preset)
    examples = data.examples(range(len(data)))
    assert [example["id"].decode() for example in examples] == [data.id(k) for k in range(len(data))]
    return {example["id"].decode(): example["latents"] for example in examples}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def whole(source, no_models, tmp_path, tiny):
    """What one undisturbed process makes."""
    build(source(), no_models, tmp_path / "whole")
    return contents(tmp_path / "whole", tiny)


def test_every_clip_is_kept_with_its_name_and_size(source, no_models, whole, tmp_path, clip):
    assert whole.keys() == {f"clip {k}" for k in range(12)}
    for k in range(12):
        assert (whole[f"clip {k}"] == clip(k).video[0, 0, 0, 0]).all()
    record = json.loads((tmp_path / "whole" / "dataset.json").read_text())
    assert record["clips"][0] == ["clip 0", 9, 32, 32] and record["dropped"] == []
    assert record["preset"] == "tiny" and record["vae"] == "abc"


def test_a_finished_dataset_is_not_made_again(source, no_models, tmp_path):
    first, lines = build(source(), no_models, tmp_path), []
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert build(source(), None, tmp_path, lines=lines) == first  # no extractor: nothing is looked at
    assert lines == [f"{tmp_path} is complete already"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_want_of_memory_for_a_clip_is_one_line_and_leaves_no_shard(source, no_models, tmp_path):
    def fail(clip):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 2147483648 bytes.\nand so on")

    extractor = types.SimpleNamespace(preset=no_models.preset, example=fail)
    with pytest.raises(UserError, match=r"too little memory for a clip of 9 x 32 x 32: make shorter ones .*bytes\.$"):
        build(source(), extractor, tmp_path)
    assert names(tmp_path) == ["plan.json"]


def test_an_interrupted_shard_leaves_nothing_and_is_made_again(source, no_models, tmp_path, whole, tiny, clip):
    folder = tmp_path / "out"
    inputs = source().inputs
    stopped = [*inputs[:4], [clip(8), KeyboardInterrupt()], inputs[5]]  # in the middle of shard 1, shard 0 is finished
    with pytest.raises(KeyboardInterrupt):
        build(source(stopped), no_models, folder)
    assert names(folder) == ["plan.json", "shard-00000.array_record", "shard-00000.json"]
    with pytest.raises(UserError, match="is not finished; make it with python -m emv3_jax.data.prepare"):
        Dataset(folder, tiny)
    finished = (folder / "shard-00000.array_record").stat().st_mtime_ns
    lines = []
    build(source(), no_models, folder, lines=lines)
    assert not any(line.startswith("shard 0 ") for line in lines)
    assert (folder / "talking-train.array_record-00000-of-00003").stat().st_mtime_ns == finished
    assert same(contents(folder, tiny), whole)


def test_a_killed_process_leaves_nothing_under_its_name(source, no_models, tmp_path, whole, tiny):
    program = f"""
        import os, signal, sys
        sys.path[:0] = [{str(Path(__file__).parents[2])!r}, {str(Path(__file__).parents[1])!r}]
        import conftest as shared
        sys.modules.pop("conftest")
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import conftest
        class Killed(conftest.Clips):
            def clips(self, number):
                for clip in super().clips(number):
                    yield clip
                    if number == 4:
                        os.kill(os.getpid(), signal.SIGKILL)
        from emv3_jax.data import builder
        inputs = [[conftest.make_clip(2 * k), conftest.make_clip(2 * k + 1)] for k in range(6)]
        from pathlib import Path
        builder.build(Killed(inputs), conftest.NoModels(shared.TINY), Path({str(tmp_path / "out")!r}), 3, {IDENTITY!r})
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    visible = [name for name in names(tmp_path / "out") if not name.startswith(".")]
    assert visible == ["plan.json", "shard-00000.array_record", "shard-00000.json"]
    build(source(), no_models, tmp_path / "out")
    assert same(contents(tmp_path / "out", tiny), whole)
    assert not [name for name in names(tmp_path / "out") if name.startswith(".")]


def test_two_processes_make_what_one_makes(source, no_models, tmp_path, whole, tiny):
    folder, lines = tmp_path / "out", []
    assert build(source(), no_models, folder, process=1, processes=2, lines=lines) is None
    assert lines[-1] == "2 of 3 shards are still being made, or to be made, by other processes"
    record = build(source(), no_models, folder, process=0, processes=2)
    assert [row[0] for row in record["clips"]] == list(whole)
    assert same(contents(folder, tiny), whole)
    assert build(source(), None, folder, process=1, processes=2) == record


def test_processes_without_a_shard_say_so(source, no_models, tmp_path):
    lines = []
    assert build(source(), no_models, tmp_path, shards=1, process=2, processes=4, lines=lines) is None
    assert lines[0] == "nothing to make here: there are 4 processes and no more shards than 1 (--shards)"
    assert build(source(), no_models, tmp_path, shards=1, process=0, processes=4) is not None


def test_two_processes_may_finish_at_once(source, no_models, tmp_path, whole, tiny, monkeypatch):
    """Both have seen that all shards are there."""
    folder, together, records = tmp_path / "out", threading.Barrier(2), []
    finish = builder._finish
    monkeypatch.setattr(builder, "_finish", lambda *args: None)
    build(source(), no_models, folder)
    plan = json.loads((folder / "plan.json").read_text())
    schema = builder.examples.features(tiny)

    def work():
        together.wait()
        records.append(finish(folder, schema, plan, lambda line: None))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(records) == 2 and records[0] == records[1]
    assert finish(folder, schema, plan, lambda line: None) == records[0]  # a third, late
    assert same(contents(folder, tiny), whole)


def test_a_folder_goes_on_as_it_was_begun(source, no_models, tmp_path):
    build(source(), no_models, tmp_path, process=0, processes=2)
    for change, words in (
        ({"shards": 4}, "shards 3 there and 4 now"),
        ({"identity": {**IDENTITY, "vae": "def"}}, 'vae "abc" there and "def" now'),
    ):
        with pytest.raises(UserError, match=words):
            build(source(), no_models, tmp_path, **change)
    with pytest.raises(UserError, match='source "test" there and "other" now'):
        build(source(name="other"), no_models, tmp_path)
    with pytest.raises(UserError, match=r'source \["b", 2\] there and \["b", 3\] now'):  # the rows that differ
        build(source(name=[["a", 1], ["b", 2]]), no_models, tmp_path / "rows", process=0, processes=2)
        build(source(name=[["a", 1], ["b", 3]]), no_models, tmp_path / "rows")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan.json is damaged .* give another --out"):
        build(source(), no_models, tmp_path)


def test_nothing_kept_leaves_nothing(source, no_models, tmp_path, dropped):
    lines, inputs = [], [[dropped(f"{k}.mp4", "no face", 2.0)] for k in range(5)]
    with pytest.raises(UserError, match="no clip was kept"):
        build(source(inputs), no_models, tmp_path, lines=lines)
    assert lines[-1] == "dropped 5 (10.0 s): no face: 0.mp4, 3.mp4, 1.mp4, ..."
    assert not tmp_path.exists()


def test_shards_without_clips_are_no_part_of_the_dataset(source, no_models, tmp_path, tiny, dropped, clip):
    inputs = [[clip(0)], [dropped("a", "silence", 1.0)], [clip(2)]]
    record = build(source(inputs), no_models, tmp_path)
    assert list(contents(tmp_path, tiny)) == ["clip 0", "clip 2"]
    assert record["dropped"] == [{"name": "a", "why": "silence", "seconds": 1.0}]
    assert len(list(tmp_path.glob("*.array_record*"))) == 2


def test_examples_that_are_not_finite_are_dropped(source, no_models, tmp_path, tiny, clip):
    bad = clip(1, wave=np.full(5760, np.nan, np.float32))
    record = build(source([[clip(0), bad, clip(2)]]), no_models, tmp_path, shards=1)
    assert list(contents(tmp_path, tiny)) == ["clip 0", "clip 2"]
    assert record["dropped"] == [{"name": "clip 1", "why": "not finite: latents", "seconds": 0.36}]
    assert builder.not_finite({"a": np.array([1.0, np.inf], np.float16), "b": np.array([1]), "c": "x"}) == ["a"]


def test_a_lost_shard_is_made_again(source, no_models, tmp_path, whole, tiny):
    folder = tmp_path / "out"
    build(source(), no_models, folder, process=0, processes=2)
    (folder / "shard-00000.array_record").unlink()
    with pytest.raises(UserError, match="shard-00000.array_record is gone: give the command again"):
        build(source(), no_models, folder)
    build(source(), no_models, folder)
    assert same(contents(folder, tiny), whole)


def test_a_damaged_record_is_told(source, no_models, tmp_path):
    build(source(), no_models, tmp_path)
    for text in ("{", "[]", '{"format": "old"}', "{}"):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            build(source(), no_models, tmp_path)


def test_a_full_disk_is_one_error_and_leaves_no_half_shard(source, no_models, tmp_path, whole, tiny):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match="shard-00000.array_record could not be written: .*file too large"):
            build(source(), no_models, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path / "out") == ["plan.json"]
    build(source(), no_models, tmp_path / "out")
    assert same(contents(tmp_path / "out", tiny), whole)


def test_out_must_be_a_folder_that_can_be_written(source, no_models, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(UserError, match="cannot be made"):
            build(source(), no_models, out)
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(UserError, match="locked"):
            build(source(), no_models, tmp_path / "locked")
