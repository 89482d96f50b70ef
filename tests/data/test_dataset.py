"""Reading: what is missing or damaged is told, and which clips are in a batch follows from the step alone."""

import collections
import dataclasses
import json
import sys

import numpy as np
import pytest

from emv3_jax import weight_files
from emv3_jax.data import builder
from emv3_jax.data.dataset import Bucket, Dataset, Plan
from emv3_jax.errors import UserError

IDENTITY = {"preset": "tiny", "vae": "abc"}


@pytest.fixture
def folder(source, no_models, tmp_path, clip):
    """Five clips of 9 frames and three of 5 in two shards, one of another shape."""
    inputs = [[clip(0), clip(1, frames=5)], [clip(2), clip(3, frames=5)], [clip(4), clip(5, height=16, width=48)],
              [clip(6), clip(7), clip(8, frames=5)]]  # fmt: skip
    builder.build(source(inputs), no_models, tmp_path / "data", 2, IDENTITY, say=lambda line: None)
    return tmp_path / "data"


def test_clips_are_found_by_number_and_by_size(folder, tiny, clip):
    data = Dataset(folder, tiny)
    assert len(data) == 9
    assert {size: len(numbers) for size, numbers in data.buckets.items()} == {
        Bucket(5, 32, 32): 3, Bucket(9, 16, 48): 1, Bucket(9, 32, 32): 5,
    }  # fmt: skip
    for size, numbers in data.buckets.items():
        for number, example in zip(numbers, data.examples(numbers), strict=True):
            assert example["id"].decode() == data.id(number)
            assert example["latents"].shape == ((size.frames - 1) // 4 + 1, size.height // 8, size.width // 8, 16)
            assert example["image"].shape == (size.height, size.width, 3)


def test_what_is_not_a_dataset_is_told(folder, tiny, tmp_path):
    again = r"make it with python -m emv3_jax.data.prepare --preset tiny --out "
    with pytest.raises(UserError, match=f"none is not there; {again}"):
        Dataset(tmp_path / "none", tiny)
    with pytest.raises(UserError, match="is of the preset tiny, not of other"):
        Dataset(folder, dataclasses.replace(tiny, name="other"))
    record = json.loads((folder / "dataset.json").read_text())
    for text in ("{", "[]", json.dumps({**record, "format": "old"}), json.dumps({"format": record["format"]})):
        (folder / "dataset.json").write_text(text)
        with pytest.raises(UserError, match=f"data is damaged .*; {again}"):
            Dataset(folder, tiny)
    (folder / "dataset.json").write_text(json.dumps({**record, "clips": record["clips"][:-1]}))
    with pytest.raises(UserError, match="clips are missing"):
        Dataset(folder, tiny)
    (folder / "dataset.json").unlink()
    with pytest.raises(UserError, match="data is not finished"):
        Dataset(folder, tiny)


@pytest.mark.parametrize("name", ["talking-train.array_record-00001-of-00002", "features.json", "dataset_info.json"])
@pytest.mark.parametrize("how", ["missing", "cut", "empty"])
def test_missing_and_damaged_files_are_told(folder, tiny, name, how):
    path = folder / name
    whole = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(whole[: len(whole) // 2] if how == "cut" else b"")
    with pytest.raises(UserError, match="is damaged"):
        Dataset(folder, tiny)


def test_a_damaged_clip_is_told(folder, tiny):
    path = folder / "talking-train.array_record-00000-of-00002"
    data = bytearray(path.read_bytes())
    data[200:600] = bytes(400)
    path.write_bytes(data)
    examples = Dataset(folder, tiny)
    with pytest.raises(UserError, match="is damaged .*: make it anew"):
        for number in range(len(examples)):
            examples.examples([number])


def test_a_missing_package_is_told(folder, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"training data needs the extra data: pip install -e '.\[data\]'"):
        Dataset(folder, tiny)


# Plan

BUCKETS = {
    Bucket(5, 32, 32): np.arange(0, 7),
    Bucket(9, 32, 32): np.arange(7, 30),
    Bucket(13, 16, 48): np.arange(30, 40),
}
STAGES = ((40, ((5, 4),)), (100, ((9, 3), (5, 8), (13, 2))))


def test_batches_follow_from_the_step_alone():
    plan, longer = Plan(BUCKETS, STAGES, 100, 0), Plan(BUCKETS, STAGES, 300, 0)
    for step in (100, 1, 63, 300, 64):
        if step <= 100:
            assert plan.batch(step)[0] == longer.batch(step)[0]
            np.testing.assert_array_equal(plan.batch(step)[1], longer.batch(step)[1])
    np.testing.assert_array_equal(longer.batch(300)[1], longer.batch(300)[1])
    other = Plan(BUCKETS, STAGES, 100, 1)
    assert any(plan.batch(step)[1].tolist() != other.batch(step)[1].tolist() for step in range(1, 20))


def test_a_batch_is_of_one_size_and_long_enough():
    plan = Plan(BUCKETS, STAGES, 200, 0)
    for step in range(1, 201):
        frames, numbers = plan.batch(step)
        (size,) = [size for size, of_size in BUCKETS.items() if set(numbers) & set(of_size)]
        assert size.frames >= frames
        assert len(numbers) == {5: 4 if step <= 40 else 8, 9: 3, 13: 2}[frames]


@pytest.mark.parametrize("size", [1, 4, 7])
def test_every_clip_comes_once_before_one_comes_again(size):
    plan = Plan(BUCKETS, ((600, ((5, size),)),), 600, 0)
    seen = {bucket: [] for bucket in BUCKETS}
    for step in range(1, 601):
        _, numbers = plan.batch(step)
        (bucket,) = [bucket for bucket, of_size in BUCKETS.items() if numbers[0] in of_size]
        seen[bucket] += numbers.tolist()
    orders = set()
    for bucket, clips in BUCKETS.items():
        epochs = [seen[bucket][at : at + len(clips)] for at in range(0, len(seen[bucket]), len(clips))]
        assert len(epochs) > 3
        assert all(sorted(epoch) == clips.tolist() for epoch in epochs[:-1])
        orders |= {tuple(epoch) for epoch in epochs[:3]}
    assert len(orders) == 9  # epochs are in another order each
    counts = collections.Counter(number for numbers in seen.values() for number in numbers)
    assert max(counts.values()) < 1.5 * 600 * size / 40 + 2  # sizes come as often as they have clips


def test_stages_that_the_clips_do_not_allow_are_told():
    with pytest.raises(UserError, match="no clip of the dataset has 17 frames; the longest has 13"):
        Plan(BUCKETS, ((10, ((17, 1),)),), 10, 0)
    with pytest.raises(
        UserError, match="no size of the dataset has 11 clips of 13 frames or more: make batches smaller"
    ):
        Plan(BUCKETS, ((10, ((13, 11),)),), 10, 0)
    Plan(BUCKETS, ((10, ((5, 11),)), (20, ((17, 1),))), 10, 0)  # a stage that is never reached


def test_sizes_with_too_few_clips_for_a_batch_are_passed_over():
    plan = Plan(BUCKETS, ((50, ((5, 11),)),), 50, 0)
    assert all(7 <= number < 30 for step in range(1, 51) for number in plan.batch(step)[1])


def test_clips_that_are_never_trained_on_are_said():
    few = "7 clips of 5 frames of 32 x 32 are never trained on: {} (config key stages)"
    assert Plan(BUCKETS, STAGES, 100, 0).notes() == []
    assert Plan(BUCKETS, ((50, ((5, 11),)),), 50, 0).notes() == [
        few.format("fewer than the 11 of a batch"),
        "10 clips of 13 frames of 16 x 48 are never trained on: fewer than the 11 of a batch (config key stages)",
    ]
    late = ((20, ((13, 2), (9, 3))), (40, ((5, 2),)))  # a later stage takes them, if the run comes to it
    assert Plan(BUCKETS, late, 20, 0).notes() == [few.format("shorter than the 9 frames of a batch")]
    assert Plan(BUCKETS, late, 21, 0).notes() == []


def test_clips_seen_by_other_frozen_models_are_refused(folder, tiny, monkeypatch):
    here = {"text": "a", "image": "b", "speech": "c"}
    asked = []
    monkeypatch.setattr(weight_files, "weight_hashes", lambda *args: asked.append(args) or here)
    dataset = Dataset(folder, tiny)
    dataset.check_weights("w", [])  # of older datasets nothing is known
    dataset.record["weights"] = {"vae": "v", **here}
    dataset.check_weights("w", list(here))
    assert asked == [("tiny", "w", list(here))]
    dataset.record["weights"] |= {"text": "x", "speech": "y"}
    told = "was made with other weights of text and speech than those of w: make it again, or give those weights"
    with pytest.raises(UserError, match=told):
        dataset.check_weights("w", list(here))
