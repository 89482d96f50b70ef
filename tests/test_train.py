"""train.py as a command: how it ends when it is told to."""

import os
import signal
import threading

import pytest

import train
from emv3_jax import command_line
from emv3_jax.training import cycle, loop, recipes


@pytest.fixture
def command(tmp_path):
    """Runs train.py on a config in this process; SIGTERM is as it was before it."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    config = "configs/puppet_full_cycle.py"
    yield lambda: command_line.run_main(train.main, ["--config", config, "--workdir", str(tmp_path)])
    signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals need the main thread")
@pytest.mark.parametrize("where", [(cycle, "stage_configs"), (recipes, "build"), (loop, "train")], ids=lambda w: w[1])
def test_sigterm_ends_the_run_cleanly_wherever_it_comes(command, monkeypatch, capsys, where):
    """Before the first stage, while it is opened, and around its steps."""

    def told_to_end(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    monkeypatch.setattr(recipes, "build", lambda cfg: recipes.DiTRecipe(cfg, recipes.preset_of(cfg)))
    monkeypatch.setattr(*where, told_to_end)
    assert command() == 0
    out, err = capsys.readouterr()
    assert out.endswith("stopped by SIGTERM; the same command goes on from what is saved\n") and err == ""


def test_what_a_stopped_run_returns(command, monkeypatch):
    for stopped, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130), (0, 0)):
        monkeypatch.setattr(cycle, "train", lambda cfg, workdir, stopped=stopped: stopped)
        assert command() == code
