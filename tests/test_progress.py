"""Times of stages, lines where there is no terminal, and memory."""

import io
import resource
import sys
import types

import pytest

from emv3_jax import progress


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time, which goes on only when a test says so."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_sampling_between_the_pictures_is_not_decoding(now):
    """The chained form: three steps and two pieces, twice; before each first step conditions are made."""
    clock = progress.Clock()
    for stage, seconds in [
        ("weights", 5), ("", 31), ("", 1), ("", 1), ("first frame", 2), ("decoding", 3), ("decoding", 3),
        ("", 11), ("", 1), ("", 1), ("decoding", 3), ("decoding", 3), ("sheet", 7),
    ]:  # fmt: skip
        now[0] += seconds
        clock.lap(stage) if stage else clock.step()
    assert list(clock.laps.items()) == [
        ("weights", 5), ("conditions and warm-up", 40), ("sampling", 6), ("first frame", 2), ("decoding", 12),
        ("sheet", 7),
    ]  # fmt: skip
    assert clock.total == sum(clock.laps.values())


def test_a_finished_render_has_no_sampling(now):
    clock = progress.Clock()
    now[0] += 2
    clock.lap("first frame")
    assert clock.laps == {"first frame": 2}


def test_lines_where_there_is_no_terminal(now, capsys):
    """A resumed render: the first four steps take no time."""
    with progress.Bar("sampling", "step", 12) as bar:
        for done in range(5, 13):
            now[0] += 12
            bar.show(done, 12)
    assert capsys.readouterr().err == ("sampling: 7 of 12 steps, 01:00 left\nsampling: 10 of 12 steps, 00:24 left\n")
    with progress.Bar("sampling", "step", 3) as bar:
        now[0] += 100  # a compiler
        bar.show(1, 3)
    assert capsys.readouterr().err == "sampling: 1 of 3 steps\n"


def test_a_bar_on_a_terminal_begins_with_what_was_done(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.Bar("sampling", "step", 3) as bar:
        bar.show(11, 12)
        assert (bar._bar.initial, bar._bar.n, bar._bar.total) == (10, 11, 12)
    assert "11/12" in terminal.getvalue() and terminal.getvalue().count("\n") == 1


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_memory_is_in_gb_on_every_system(monkeypatch, platform, unit):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: types.SimpleNamespace(ru_maxrss=3 * 2**30 // unit))
    assert progress.peak_memory()["process"] == 3
