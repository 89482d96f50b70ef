"""Lip sync through the pipeline, on the tiny preset with random weights: the box, the frames, the sound."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from rendering import OPTIONS, PROMPT, RNG, WAVE, difference, video

from emv3_jax import media, render
from emv3_jax.errors import UserError
from emv3_jax.pipeline import RATE, Ready, Request, read_request

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_lip_sync_changes_the_mouth_and_nothing_else(tiny_pipeline, filmed):
    mouth = (40, 72, 24, 60)
    asked = Request(video=filmed, mouth=mouth, prompt=PROMPT, task="lipsync")
    ready = read_request(asked, tiny_pipeline.preset)
    assert ready.frames == 25 and ready.output == (20.0, 20)
    assert any("mouths are made 25 times a second" in note for note in ready.notes)
    at_25 = read_request(dataclasses.replace(asked, fps=25.0), tiny_pipeline.preset)
    assert at_25.output == (25.0, 25) and any("20 frames a second, the result 25" in note for note in at_25.notes)
    source = np.stack(list(media.VideoSource(filmed).frames()))
    made = video(tiny_pipeline, asked)
    assert made.shape == source.shape == (20, 96, 96, 3)
    outside = np.ones((96, 96), bool)
    outside[40:72, 24:60] = False
    np.testing.assert_array_equal(made[:, outside], source[:, outside])
    assert difference(made[:, 48:64, 36:48], source[:, 48:64, 36:48]) > 2
    dubbed = video(tiny_pipeline, dataclasses.replace(asked, audio=WAVE[RATE : RATE + 16000]))
    np.testing.assert_array_equal(dubbed[:, outside], source[:, outside])
    assert difference(made, dubbed) > 2


def test_lip_sync_of_a_part_is_told(tiny, filmed):
    asked = Request(video=filmed, mouth=(40, 72, 24, 60), prompt=PROMPT, task="lipsync")
    told = {frames: read_request(dataclasses.replace(asked, frames=frames), tiny).notes for frames in (None, 13)}
    note = f"video {filmed} lasts 1.00 s: only its first 0.52 s are made (13 frames)"
    assert note in told[13] and not any("only its first" in line for line in told[None])


@pytest.mark.parametrize(
    ("mouth", "message"),
    [
        ((40, 40.3, 24, 60), "the mouth box .* is empty or outside the 96 x 96 image"),
        ((40, 97, 24, 60), "the mouth box .* is empty or outside"),
        ((float("nan"), 50, 24, 60), "the mouth box .* is empty or outside"),
    ],
)
def test_a_mouth_that_cannot_be_is_told_before_any_work(tiny, filmed, mouth, message):
    with pytest.raises(UserError, match=message):
        read_request(Request(video=filmed, mouth=mouth, prompt=PROMPT, task="lipsync"), tiny)


def test_a_mouth_that_is_not_all_seen_is_told(tiny, filmed):
    """A model of narrow pictures sees the middle half of a square video."""
    narrow = dataclasses.replace(tiny, width=16)
    asked = Request(video=filmed, mouth=(40, 72, 24, 72), prompt=PROMPT, task="lipsync")
    assert read_request(asked, narrow).mouth_made == pytest.approx((40 / 3, 24, 0, 16))
    for mouth, words in (
        ((40, 72, 0, 40), r"the mouth box .40, 72, 0, 40. reaches into .* within .0, 96, 24, 72. .y1, y2, x1, x2."),
        ((40, 72, 60, 73), "reaches into the part of the 96 x 96 video that is cut off"),
        ((40, 72, 0, 20), "lies in the part of the 96 x 96 image that is cut off"),
    ):
        with pytest.raises(UserError, match=words):
            read_request(dataclasses.replace(asked, mouth=mouth), narrow)


# The pasted mouth


def dub(tiny, path, mouth, generated, **changes) -> tuple[Ready, np.ndarray]:
    """What was read of a lip-sync request, and its video with pictures [F, 32, 32, 3] in place of the model's."""
    ready = read_request(Request(video=path, mouth=mouth, prompt=PROMPT, task="lipsync", **changes), tiny)
    run = render.Run.__new__(render.Run)  # no models are needed to paste
    run.ready = ready
    return ready, np.concatenate(list(run.dubbed(iter(generated[: ready.frames, None]))))


@pytest.mark.parametrize(
    ("rate", "frames", "fps", "count"),
    [(10, 10, 30, 30), (5, 5, 25, 25), (25, 50, 60, 120), (30, 32, 10, 11), (25, 25, 50, 50), (24, 24, None, 24)],
)
def test_every_rate_gives_the_frames_that_were_promised(tiny, tmp_path, rate, frames, fps, count):
    """And mouths keep an even pace: none is shown longer than its time."""
    with media.VideoWriter(tmp_path / "a.mp4", 32, 32, fps=rate, wave=WAVE) as writer:
        writer.write(np.zeros((frames, 32, 32, 3), np.uint8))
    generated = np.broadcast_to(np.arange(100, dtype=np.uint8)[:, None, None, None], (100, 32, 32, 3))
    ready, made = dub(tiny, tmp_path / "a.mp4", (0, 32, 0, 32), generated, fps=fps)
    assert ready.output == (fps or rate, count) and len(made) == count
    shown = made[:, 16, 16, 0].astype(int)
    np.testing.assert_array_equal(shown, np.minimum(np.arange(count) * 25 / (fps or rate) + 0.5, ready.frames - 1) // 1)
    assert np.bincount(shown)[:-1].max() <= np.ceil((fps or rate) / 25)


def test_fewer_frames_than_the_video_has(tiny, filmed):
    generated = np.zeros((9, 32, 32, 3), np.uint8)
    ready, made = dub(tiny, filmed, (40, 72, 24, 60), generated, frames=9)
    assert ready.output == (20.0, 7) and len(made) == 7  # 0.36 s


def test_a_mouth_at_the_edge_is_pasted_whole(tiny, tmp_path):
    """Where video and model have one size, its pixels are the generated ones: nothing is stretched."""
    with media.VideoWriter(tmp_path / "a.mp4", 32, 32, wave=WAVE) as writer:
        writer.write(np.zeros((5, 32, 32, 3), np.uint8))
    generated = RNG.integers(0, 256, (5, 32, 32, 3), np.uint8)
    ready, made = dub(tiny, tmp_path / "a.mp4", (8, 32, 16, 32), generated)
    assert ready.mouth_made == (8, 32, 16, 32) and render._whole_pixels(ready.mouth_made) == (8, 32, 16, 32)
    np.testing.assert_array_equal(made[:, 12:28, 19:29], generated[:, 12:28, 19:29])  # inside of the soft edge


def test_a_film_of_its_own_sound_needs_no_note(tiny, tmp_path):
    """The last generated frames lie past its end; what comes out does not."""
    with media.VideoWriter(tmp_path / "a.mp4", 32, 32, wave=WAVE[: 15 * 640]) as writer:
        writer.write(np.zeros((15, 32, 32, 3), np.uint8))
    asked = Request(video=tmp_path / "a.mp4", mouth=(0, 32, 0, 32), prompt=PROMPT, task="lipsync")
    ready = read_request(asked, tiny)
    assert ready.frames == 17 and ready.notes == ()
    for audio, note in ((WAVE[:4000], "silence was added up to 0.60 s"), (WAVE, "the video ends after 0.60 s")):
        (said,) = read_request(dataclasses.replace(asked, audio=audio), tiny).notes
        assert said.endswith(note)


def test_a_damaged_video_is_told_before_any_work(tiny, filmed, tmp_path):
    content = bytearray(Path(filmed).read_bytes())
    middle = len(content) // 2
    content[middle - 600 : middle + 600] = bytes(1200)
    (tmp_path / "bad.mp4").write_bytes(content)
    with pytest.raises(UserError, match="bad.mp4 is (not a video or is|cut off or) damaged"):
        read_request(Request(video=tmp_path / "bad.mp4", mouth=(40, 72, 24, 60), prompt=PROMPT, task="lipsync"), tiny)


def test_lip_sync_of_a_long_video(tiny_pipeline, filmed):
    asked = Request(video=filmed, mouth=(40, 72, 24, 60), prompt=PROMPT, task="lipsync")
    options = dataclasses.replace(OPTIONS, window=13, overlap=1)
    assert video(tiny_pipeline, asked, options).shape == (20, 96, 96, 3)
    assert video(tiny_pipeline, dataclasses.replace(asked, fps=25.0), options).shape == (25, 96, 96, 3)
    with pytest.raises(UserError, match="chained form does not know the task lipsync"):
        video(tiny_pipeline, asked, dataclasses.replace(options, long_video="chained"))
