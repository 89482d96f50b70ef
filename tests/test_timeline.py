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
    ],
)
def test_numbers_at_the_beginning_are_not_always_times(prompt):
    assert timeline.parse(prompt) == (timeline.Span(0.0, np.inf, prompt),)


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
