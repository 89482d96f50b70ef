"""Weights of a run's checkpoint, in the form that the run's end has."""

import filecmp

import numpy as np
import pytest
from tiny_runs import arrays_equal

from emv3_jax import checkpoint, command_line
from emv3_jax.training import export, loop, recipes
from emv3_jax.training.dit_recipe import DiTRecipe

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def run(make, tmp_path_factory):
    """A run of four steps, with checkpoints of the second and the fourth."""
    workdir = tmp_path_factory.mktemp("run")
    recipe = make(steps=4, checkpoint_every=2, eval_every=100, ema_decay=0.5, stages=((4, ((9, 2),)),))
    assert loop.train(recipe, recipe.cfg, workdir) == 0
    return workdir


@pytest.fixture(autouse=True)
def tiny_recipes(make, monkeypatch):
    monkeypatch.setattr(recipes, "build", lambda cfg: DiTRecipe(cfg, make().preset))


def exported(run, folder, *words):
    assert command_line.run_main(export.main, [str(run), "--out", str(folder), *words]) == 0
    return checkpoint.load_params(folder / "dit.safetensors")


def test_the_last_checkpoint_becomes_what_the_end_of_the_run_left(run, tmp_path, capsys):
    exported(run, tmp_path)
    assert capsys.readouterr().out == f"weights (moving average) at step 4: {tmp_path}\n"
    files = [path.name for path in (run / "weights").iterdir()]
    assert "trained.json" in files and filecmp.cmpfiles(run / "weights", tmp_path, files, shallow=False)[0] == files


def test_other_steps_and_the_weights_themselves(run, tmp_path):
    found = [
        exported(run, tmp_path / f"{k}", *words)
        for k, words in enumerate((["--step=4"], ["--step=2"], ["--unaveraged"]))
    ]
    assert not any(arrays_equal(a, b) for a, b in ((found[0], found[1]), (found[0], found[2])))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["RUN", "--step=3"], "no such checkpoint in RUN/checkpoints: of steps there are 2, 4"),
        (["RUN/checkpoints"], "RUN/checkpoints/config.json is missing or damaged"),
        (["RUN", "--out=RUN/metrics.jsonl"], "metrics.jsonl, which is a file"),
    ],
)
def test_what_cannot_be_is_one_line(run, tmp_path, capsys, words, told):
    words = [word.replace("RUN", str(run)) for word in words]
    assert command_line.run_main(export.main, ["--out", str(tmp_path / "new"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and told.replace("RUN", str(run)) in line and not (tmp_path / "new").exists()


def test_a_damaged_checkpoint_is_not_exported(make, tmp_path, capsys):
    recipe = make(steps=2, eval_every=100, stages=((2, ((9, 2),)),))
    assert loop.train(recipe, recipe.cfg, tmp_path / "run") == 0
    for data in (tmp_path / "run/checkpoints/2/default").rglob("d/*"):  # which of them holds what is a matter of chance
        content = np.fromfile(data, np.uint8)
        content[::97] ^= 1
        content.tofile(data)
    capsys.readouterr()
    assert command_line.run_main(export.main, [str(tmp_path / "run"), "--out", str(tmp_path / "new")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "damaged" in line and not list((tmp_path / "new").glob("*"))
