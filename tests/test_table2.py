"""The bench of Table 2: what a run keeps is of its seeds and its scale."""

import json
from unittest import mock

import numpy as np
import pytest

from bench import table2
from configs import puppet_base, puppet_sft
from emv3_jax import command_line


def bench(tmp_path, seeds=3, scale=1.0):
    made = object.__new__(table2.Bench)  # without its dataset
    made.out, made.seeds, made.scale, made.base = tmp_path, seeds, scale, puppet_base.get_config()
    return made


def test_a_dataset_that_is_not_there_is_told_in_a_line(tmp_path, capsys):
    words = ["--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "out"), "--rows"]
    assert command_line.run_main(table2.main, [*words, "full"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the dataset {tmp_path}/nothing is not there; make it with python -m emv3_jax.data.")
    assert command_line.run_main(table2.main, words) == 0 and "| row |" in capsys.readouterr().out


def test_a_quick_look_leaves_the_configs_as_they_are(tmp_path):
    quick, cfg = bench(tmp_path, scale=0.1), puppet_sft.get_config()
    before = cfg.to_dict()
    short = quick.shortened(cfg)
    assert cfg.to_dict() == before and quick.shortened(cfg) == short
    assert short.steps == 48 and [until for until, _ in short.tasks] == [16, 32, 48]
    assert bench(tmp_path).shortened(cfg) is cfg


def test_names_say_seeds_and_scale_unless_they_are_the_tables():
    assert table2.run_name("full", 3, 1.0) == "full"
    others = {table2.run_name("full", *run) for run in ((2, 1.0), (3, 0.1), (3, 0.05))}
    assert others == {"full_2seeds_x1", "full_3seeds_x0.1", "full_3seeds_x0.05"}


def test_rows_of_other_runs_are_not_taken(tmp_path, monkeypatch):
    """A quick look and the table in one folder."""
    trained = []
    monkeypatch.setattr(table2.Bench, "train", lambda self, cfg: trained.append(self.scale) or ({}, "weights"))
    monkeypatch.setattr(table2.Bench, "recipe", lambda self, cfg, seed: mock.Mock())
    scores = {name: 1.0 for name in table2.MEASURES}
    monkeypatch.setattr(table2.Bench, "score", lambda self, *args: {k: v * self.scale for k, v in scores.items()})
    for scale in (0.5, 1.0, 0.5):
        (row,) = bench(tmp_path, 1 if scale < 1 else 3, scale).measure("full")[:1]
        assert row["sync"] == scale
    assert trained == [0.5, 1.0] and len(json.loads((tmp_path / "full.json").read_text())["seeds"]) == 3
    data = puppet_base.get_config().data
    assert "| everything | 1.000 ± 0.000 |" in table2.table(tmp_path, data)
    assert "| everything | 0.500 ± 0.000 |" in table2.table(tmp_path, data, 1, 0.5)


@pytest.mark.parametrize("change", ["data", "scoring", "form"])
def test_rows_of_other_settings_are_not_taken(tmp_path, capsys, monkeypatch, change):
    data, rows = "data/a", [dict.fromkeys(table2.MEASURES, 1.0)] * 3
    kept = {"settings": table2.settings_of("full", data), "seeds": rows}
    (tmp_path / "full.json").write_text(json.dumps(kept))
    assert "| everything | 1.000" in table2.table(tmp_path, data) and not capsys.readouterr().out
    if change == "scoring":
        monkeypatch.setitem(table2.WINDOWS, "steps", 9)
    elif change == "form":
        (tmp_path / "full.json").write_text(json.dumps(rows))
    assert "everything" not in table2.table(tmp_path, "data/b" if change == "data" else data)
    assert "full.json is of other settings than there are now, and is not used" in capsys.readouterr().out


def test_stages_of_other_runs_are_not_taken(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(
        table2.Bench, "stage", lambda self, name, *rest: names.append(name) or {"dit": {"x": np.zeros((self.seeds, 1))}}
    )
    cfg = table2.ROWS["sft_only"].config.get_config()
    for seeds, scale in ((3, 1.0), (3, 0.5), (2, 1.0)):
        bench(tmp_path, seeds, scale).train(cfg)
    bases = [name for name in names if name.startswith("base_")]
    assert len(bases) == 3 and len(set(names)) == len(names)
    assert bases[0] == f"base_{table2.digest(puppet_base.get_config())}"  # as it was before other runs had names
