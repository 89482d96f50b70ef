"""The bench of kills: one counts if it hit a living process, whatever that was doing."""

import signal
import sys

import pytest

from bench import kills

NEVER = float("inf")


@pytest.mark.parametrize(
    ("number", "life", "doing"),
    [
        (signal.SIGKILL, kills.Life(-signal.SIGKILL, "", NEVER, 1.0), "starting"),
        (signal.SIGKILL, kills.Life(-signal.SIGKILL, "step 3/9  loss 1\n", 5.0, 9.0), "learning"),
        (signal.SIGKILL, kills.Life(0, "step 9/9  loss 1\n", 5.0, 9.0), ""),
        (signal.SIGTERM, kills.Life(0, "step 3/9  loss 1\nstopped by SIGTERM; the same", 5.0, 9.0), "learning"),
        (signal.SIGTERM, kills.Life(0, "stopped by SIGTERM; the same", NEVER, 2.0), "starting"),
        (signal.SIGTERM, kills.Life(-signal.SIGTERM, "", NEVER, 0.1), "starting"),
        (signal.SIGTERM, kills.Life(0, "step 9/9  loss 1\n", 5.0, 9.0), ""),
    ],
)
def test_what_a_signal_broke_off(number, life, doing):
    assert life.doing(number) == doing


@pytest.mark.parametrize(
    ("number", "life"),
    [
        (signal.SIGKILL, kills.Life(1, "", NEVER, 1.0)),
        (signal.SIGTERM, kills.Life(-signal.SIGTERM, "step 3/9  loss 1\n", 5.0, 9.0)),
        (signal.SIGTERM, kills.Life(143, "step 3/9  loss 1\n", 5.0, 9.0)),
    ],
)
def test_an_end_that_a_signal_must_not_bring(number, life):
    with pytest.raises(ValueError, match="exit code"):
        life.doing(number)


def test_the_moment_counts_from_the_start_of_the_process(tmp_path, monkeypatch):
    for seconds, moment, doing in ((60, 0.2, "starting"), (0, 60, "")):
        words = [sys.executable, "-c", f"import time; time.sleep({seconds})"]
        monkeypatch.setattr(kills, "command", lambda *args, words=words: words)
        life = kills.live(tmp_path / "run", 9, "data", moment, signal.SIGKILL)
        assert life.doing(signal.SIGKILL) == doing and (life.seconds >= moment or not doing)
