"""The doctor says what works, what does not, and what to do about it."""

import re

import jax
import numpy as np
import pytest

from emv3_jax import converted, doctor, media
from emv3_jax.weight_files import WEIGHTS


def test_this_machine_can_write_videos_and_read_sound():
    lines = list(doctor.codecs())
    assert [line.level for line in lines] == ["ok"] * 5, [str(line) for line in lines]


def test_a_codec_that_fails_is_named_with_the_reason_and_the_others_are_still_tried(monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("no encoder libx264\nmore")

    monkeypatch.setattr(media, "VideoWriter", broken)
    video, *sounds = doctor.codecs()
    assert str(video).startswith("  NO   video: H.264 and AAC in mp4 (no encoder libx264): pip install")
    assert {line.level for line in sounds} == {"ok"}


def test_missing_packages_say_how_to_install_them(monkeypatch):
    needs = ["jax>=0.10,<0.13", "no_such_package", 'ruff>=0.14; extra == "dev"']
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: needs)
    monkeypatch.setattr(doctor, "OPTIONAL", {"nothing_of_this_name": "only for this test"})
    lines = [str(line) for line in doctor.versions()]
    assert f"  ok   jax {jax.__version__}" in lines
    assert "  NO   no_such_package not installed: pip install -e . in the folder of this program" in lines
    assert "  note nothing_of_this_name is not installed: only for this test" in lines


def test_an_accelerator_that_jax_leaves_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ACCELERATORS", {str(tmp_path): ("a TPU", "tpu", "tpu")})
    assert "  NO   a TPU is here, but JAX does not use it: pip install 'emv3_jax[tpu]'" in map(str, doctor.devices())


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        (80.0, "GB in float32, fit here"),
        (30.0, "GB in bfloat16, fit here"),
        (15.0, "one model at a time fits here"),
        (8.0, "do not fit into 8.0 GB: use"),
    ],
)
def test_presets_by_memory(monkeypatch, memory, said):
    monkeypatch.setattr(doctor, "device_memory", lambda device: memory)
    demo, preview, _ = map(str, doctor.presets())
    assert "demo: 6 million weights" in demo and "float32, fit here" in demo
    assert "preview: 8,220 million weights" in preview and said in preview


def test_weights(monkeypatch, tmp_path, capsys):
    lines = [str(line) for line in doctor.weights([tmp_path])]
    assert lines[0] == "  ok   demo, shipped: complete"
    assert "holds no transformer: put one there with train.py, or with python -m convert to-jax --to" in lines[1]
    (tmp_path / "dit-flash").mkdir()
    lines = [str(line) for line in doctor.weights([tmp_path])][1:]
    assert len(lines) == 6 and all(line.startswith("  NO   flash, ") for line in lines)
    assert sum("umt5: no converted weights at" in line for line in lines) == 1
    assert "holds no conversion.json" in lines[0] and "tokenizer: " in lines[-1]


def test_weights_of_our_own_training(tmp_path):
    lines = [str(line) for line in doctor.weights([WEIGHTS / "demo"])]
    assert len(lines) == 6 and all(line.startswith("  ok ") for line in lines)


def test_a_container_has_less_memory_than_its_machine(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(doctor, "CONTAINER_LIMITS", (str(limit), str(tmp_path / "absent")))
    whole = doctor.host_memory()
    limit.write_text("max\n")
    assert doctor.host_memory() == whole
    limit.write_text("2000000000\n")
    assert doctor.host_memory() == 2.0


def test_a_section_that_fails_does_not_end_the_others(monkeypatch, capsys):
    def broken():
        raise AssertionError("no cuda here\nmore")
        yield

    for name in ("versions", "presets", "codecs"):
        monkeypatch.setattr(doctor, name, lambda: [doctor.Line("ok", "seen")])
    monkeypatch.setattr(doctor, "devices", broken)
    monkeypatch.setattr(doctor, "weights", lambda folders: [])
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "NO   looking at it failed (AssertionError: no cuda here)" in out and out.count("seen") == 3


def test_weights_of_another_model_are_noticed(monkeypatch, tmp_path):
    (tmp_path / "dit-preview").mkdir()
    monkeypatch.setattr(converted, "shapes", lambda path: {"b": np.zeros(5)})
    lines = [str(line) for line in doctor.weights([tmp_path])]
    assert sum(bool(re.search(r"does not fit this model: \d+ differences .missing ", line)) for line in lines) == 5


@pytest.mark.parametrize(("level", "status", "end"), [("ok", 0, "all is well"), ("NO", 1, "see the lines that say NO")])
def test_exit_status(monkeypatch, capsys, level, status, end):
    for name in ("versions", "devices", "presets", "codecs"):
        monkeypatch.setattr(doctor, name, lambda: [doctor.Line("note", "a"), doctor.Line(level, "b", "c")])
    monkeypatch.setattr(doctor, "weights", lambda folders: [])
    assert doctor.main([]) == status
    assert capsys.readouterr().out.splitlines()[-1] == end
