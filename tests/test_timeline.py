"""Prompts over time: what is written, which frames it counts in, and mistakes by their place."""

import numpy as np
import pytest

from emv3_jax import timeline
from emv3_jax.errors import UserError


def test_one_prompt_counts_throughout():
    (span,) = timeline.parse(" A puppet nods; it smiles: 3-4 times. ")
    assert span == timeline.Span(0.0, np.inf, "A puppet nods; it smiles: 3-4 times.")
    np.testing.assert_array_equal(timeline.shares((span,), 4), np.ones((1, 4)))


@pytest.mark.parametrize(
    "prompt",
    [
        "2-3 people talk.",
        "1920s-style host talks",
        "3-year-old child: it smiles",
        "1920-1930s host; it nods",
        "A host; 2-3 people: all nod",
        "0-60s timer runs",
        "A puppet counts 1 to 3: one, two, three",
        "1 to 3: one, two, three",
        "A puppet shakes its head for 3-4s: calmly",
        "At 1:30 a host talks; 3:30-4:15 pm: he sleeps",
        "(1920-1930s) host",
        "A host talks.\n2-3 people: all nod",
        "16:9-4:3 picture of a host",
        "[1-3] of the puppets nod",
    ],
)
def test_numbers_at_the_beginning_are_not_always_times(prompt):
    assert timeline.parse(prompt) == (timeline.Span(0.0, np.inf, prompt),)


@pytest.mark.parametrize(
    ("prompt", "times"),
    [
        ("0-4,5s: A; 4,5-9s: B", (4.5, 9)),
        ("0:00-0:04: A; 0:04-0:09: B", (4, 9)),
        ("0-4s:A;0:04 - 1:09,5s : B", (4, 69.5)),
        ("0-1:04.1: A; 64.1-65s: B", (64.1, 65)),
        ("0-4s: A\n4-9s: B", (4, 9)),
        ("\n0-4s: A;\r\n\r\n4-9s: B\n", (4, 9)),
        ("0-4s\uff1aA\uff1b4-9s\uff1aB", (4, 9)),
    ],
)
def test_times_may_be_written_in_several_ways(prompt, times):
    spans = timeline.parse(prompt)
    assert [(span.start, span.end) for span in spans] == [(0, times[0]), times]
    assert [span.text for span in spans] == ["A", "B"]


def test_a_line_may_end_inside_a_text():
    assert [span.text for span in timeline.parse("0-4s: A puppet\nnods; 4-9s: B")] == ["A puppet\nnods", "B"]


def test_a_long_gap_is_searched_quickly():
    with pytest.raises(UserError):
        timeline.parse("0-4s: " + ("4" + " " * 3000) * 3 + "\n" * 3000 + "[4-9s]")


def test_prompts_follow_each_other():
    spans = timeline.parse("0-2s: A puppet nods.;2s - 4.5s:A puppet waves: fast. ;")
    assert [(s.start, s.end, s.text) for s in spans] == [(0, 2, "A puppet nods."), (2, 4.5, "A puppet waves: fast.")]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ("0-2: nods", "prompt, character 1: times are written like"),
        ("0-2s: nods; then waves", "prompt, character 13: times are written like"),
        ("0-2s: nods; 3-4s: waves", "prompt, character 13: this part must start at 2s, .* got 3s"),
        ("1-2s: nods", "prompt, character 1: this part must start at 0s"),
        ("0-0s: nods", "prompt, character 1: 0-0s ends before it starts"),
        ("0-2s: nods; 2-1s: waves", "prompt, character 13: 2-1s ends before it starts"),
        ("0-2s: ; 2-3s: waves", "prompt, character 1: nothing is said of 0-2s"),
        ("A puppet nods; 3-4: waves", "prompt, character 1: times are written like"),
        ("0-2 sec: nods", "prompt, character 1: times are written like"),
        ("0\u20132s: nods", "prompt, character 1: times are written like"),
        ("0-2s: nods; 2s-end: waves", "prompt, character 13: times are written like"),
        ("0-2s nods; 2-4s waves", "prompt, character 1: times are written like"),
        ("0-2s nods\n2-4s waves", "prompt, character 1: times are written like"),
        ("0s to 2s: nods; 2s to 4s: waves", "prompt, character 1: times are written like"),
        ("0s to 2s nods; 2s to 4s waves", "prompt, character 1: times are written like"),
        ("0 to 2 seconds: nods", "prompt, character 1: times are written like"),
        ("0-2 min: nods", "prompt, character 1: times are written like"),
        ("0-2s: nods\n2-4: waves", "prompt, character 12: times are written like"),
        ("[0-2s] nods; [2-4s] waves", "prompt, character 1: times are written like"),
        ("[0-2s] nods", "prompt, character 1: times are written like"),
        ("(0-2s): nods", "prompt, character 1: times are written like"),
        ("(0-2s) nods; (2-4s) waves", "prompt, character 1: times are written like"),
        ("0:00:00-0:00:02: nods", "prompt, character 1: times are written like"),
        ("0:00-4: nods", "prompt, character 1: times are written like"),
        ("0-4:2 puppets nod", "prompt, character 1: times are written like"),
        ("0:00-0:75: nods", "prompt, character 1: times are written like"),
        ("0-2s: nods, 2-4s: waves", "prompt, character 13: a part must end with a semicolon .*, got '2-4s: waves'"),
        ("0-2s: nods 2s to 4s: waves", "prompt, character 12: a part must end with a semicolon"),
        ("0-2s: nods; 2-4s: waves [4-9s] smiles", "prompt, character 25: a part must end with a semicolon"),
        ("0-2s: 2-4s: waves", "prompt, character 7: a part must end with a semicolon"),
    ],
)
def test_mistakes_name_their_place(prompt, message):
    with pytest.raises(UserError, match=message):
        timeline.parse(prompt)


def test_spans_are_fitted_to_the_video():
    spans = timeline.parse("0-2s: a; 2-4s: b; 4-6s: c")
    fitted, notes = timeline.fit(spans, 3.0)
    assert [(s.text, s.end) for s in fitted] == [("a", 2), ("b", np.inf)]
    assert notes == ["the video ends after 3.00 s: the prompt for 4-6s is not used"]
    fitted, notes = timeline.fit(spans, 8.0)
    assert fitted[-1].end == np.inf and notes == ["the last prompt ends at 6s: it goes on to the end of the video"]


def test_shares_count_the_video_frames_of_a_latent_frame():
    """Latent frame 1 is video frames 1 to 4; the second prompt begins with frame 3."""
    spans = timeline.parse("0-0.12s: a; 0.12-9s: b")
    np.testing.assert_allclose(timeline.shares(spans, 3), [[1, 0.5, 0], [0, 0.5, 1]])


def test_a_window_takes_the_prompts_it_needs():
    share = np.array([[1, 1, 0, 0], [0, 0, 0.5, 0], [0, 0, 0.5, 1]], np.float32)
    numbers, shares = timeline.of_window(share, 0, 2, 2)
    assert numbers.tolist() == [0, 0] and shares.tolist() == [[1, 1], [0, 0]]
    numbers, shares = timeline.of_window(share, 2, 4, 2)
    assert numbers.tolist() == [1, 2] and shares.tolist() == [[0.5, 0], [0.5, 1]]
