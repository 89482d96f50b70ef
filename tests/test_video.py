"""Films of any origin: frames by their timestamps, colours and proportions as players show them, sound that fits."""

import dataclasses
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from rendering import ask

from emv3_jax import media
from emv3_jax.errors import UserError
from emv3_jax.media import VideoSource, load_recording, read_video, shown_at
from emv3_jax.pipeline import Request, read_request

RATE = 16000
SLOWING = np.concatenate([np.arange(50) / 25, 2 + np.arange(10) / 5])  # 25 frames a second, then 5


def write_film(path, times, colours=None, size=(32, 32), sound=None, first=0.0, **options):
    """A film of plain pictures that come at some times [F] in seconds, by default brighter by 4 each; with samples
    [n, channels] of sound at RATE that begins at `first`."""
    layouts = {1: "mono", 2: "stereo", 6: "5.1"}
    with av.open(str(path), "w") as container:
        codec = {".webm": "libvpx", ".avi": "mpeg4"}.get(path.suffix, "libx264")
        stream = container.add_stream(codec, rate=options.get("rate", 25))
        stream.width, stream.height, stream.pix_fmt = size[1], size[0], "yuv420p"
        stream.codec_context.gop_size = 12
        if path.suffix != ".avi":
            stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.sample_aspect_ratio = options.get("ratio", Fraction(1))
        if sound is not None:
            codec = "libopus" if path.suffix == ".webm" else "aac"
            track = container.add_stream(codec, rate=RATE, layout=layouts[sound.shape[1]])
        for k, time in enumerate(times):
            colour = (4 * k,) * 3 if colours is None else colours
            picture = av.VideoFrame.from_ndarray(np.full((*size, 3), colour, np.uint8), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace=options.get("coded"))
            picture.pts, picture.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
        if sound is not None:
            block = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(sound.T, np.float32), format="fltp", layout=layouts[sound.shape[1]]
            )
            block.sample_rate, block.time_base, block.pts = RATE, Fraction(1, RATE), round(first * RATE)
            container.mux(track.encode(block))
            container.mux(track.encode(None))
    return path


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.avi"])
def test_frames_of_a_variable_rate_come_by_their_timestamps(tmp_path, name):
    source = VideoSource(write_film(tmp_path / name, SLOWING))
    np.testing.assert_allclose(source.times, SLOWING, atol=1e-3)
    assert source.count == 60 and source.fps == 25 and 3.83 < source.seconds < 4.01  # the last may count as long as 5/s
    (note,) = source.notes
    assert note == f"video {tmp_path / name} has a variable frame rate: it is read at 25 frames a second"
    wanted = [*range(50), *np.repeat(range(50, 60), 5)][: len(source.shown(25))]
    assert len(wanted) == round(source.seconds * 25)
    assert list(source.shown(25)) == wanted
    for frames in (source.frames_at(25), read_video(tmp_path / name)[0]):
        np.testing.assert_allclose([frame.mean() / 4 for frame in frames], wanted, atol=1.1)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_a_part_is_what_the_whole_has_there(tmp_path, name):
    """Found by its timestamp where a file can be looked up in, without all that is before it."""
    source = VideoSource(write_film(tmp_path / name, SLOWING))
    whole = list(source.frames_at(30))
    for first, last in ((0, 3), (40, 50), (59, None), (100, 500), (500, 600)):
        part = list(source.frames_at(30, first, last))
        assert len(part) == len(whole[first:last])
        for a, b in zip(part, whole[first:last], strict=True):
            np.testing.assert_array_equal(a, b)
    number, _ = next(source._decoded(55))
    assert number == 0 if name == "a.avi" else 40 < number <= 55


@pytest.mark.parametrize("rate", [24, 25, 30, 50])
def test_milliseconds_of_a_steady_rate_are_no_variable_one(tmp_path, rate):
    source = VideoSource(write_film(tmp_path / "a.mkv", np.arange(20) / rate, rate=rate))
    assert source.notes == [] and source.count == 20 and source.fps == rate
    assert list(source.shown(rate)) == list(range(20))
    assert list(source.shown(2 * rate)) == [(k + 1) // 2 for k in range(39)] + [19]
    wrong = VideoSource(write_film(tmp_path / "b.mkv", np.arange(20) / rate, rate=60))
    assert wrong.notes == [] and wrong.fps == pytest.approx(rate, rel=2e-3)


@pytest.mark.parametrize(("fps", "rate"), [(25, 24), (24, 25), (25, 60), (50, 25), (60, 25), (30, 10), (23.976, 25)])
def test_the_frame_shown_is_the_nearest_and_of_two_the_later(fps, rate):
    shown = shown_at(np.arange(48) / rate, 1 / rate, 48 / rate, fps)
    assert len(shown) == round(48 / rate * fps)
    np.testing.assert_array_equal(shown, [min(int(k * rate / fps + 0.5), 47) for k in range(len(shown))])


def test_a_gap_is_held_and_not_cut_in_half():
    times = np.array([0.0, 0.04, 0.08, 1.08, 1.12])
    assert list(shown_at(times, 0.04, 1.16, 25)) == [0, 1] + [2] * 25 + [3, 4]


def test_sound_keeps_its_place_beside_a_late_picture(tmp_path):
    """The film begins with its first picture, half a second after the sound, and with the sound of that moment."""
    loud = np.zeros((3 * RATE, 1), np.float32)
    loud[RATE : RATE + 800] = 0.5 * np.sin(np.arange(800) * 0.5)[:, None]
    path = write_film(tmp_path / "a.mkv", 0.5 + np.arange(50) / 25, sound=loud)
    samples, rate = VideoSource(path).track()[:2]
    assert rate == RATE and abs(int(np.abs(samples[:, 0]).argmax()) / RATE - 0.525) < 0.05
    late = write_film(tmp_path / "b.mkv", np.arange(50) / 25, sound=loud[: 2 * RATE], first=0.4)
    samples = VideoSource(late).track().samples
    assert abs(int(np.abs(samples[:, 0]).argmax()) / RATE - 1.425) < 0.05 and not samples[: RATE // 4].any()


def test_sound_far_before_the_picture_is_not_the_films_length(tmp_path):
    sound = np.repeat(np.linspace(0, 0.5, 5 * RATE, dtype=np.float32)[:, None], 1, axis=1)
    path = write_film(tmp_path / "a.mkv", 3 + np.arange(50) / 25, sound=sound)
    samples, rate = VideoSource(path).track()[:2]
    assert len(samples) / rate == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize(
    ("height", "coded"), [(720, "itu709"), (480, "itu601")], ids=["high definition", "standard definition"]
)
def test_untagged_colours_are_read_as_players_read_them(tmp_path, height, coded):
    path = write_film(tmp_path / "a.mp4", [0.0, 0.04], (200, 60, 40), (height, 64), coded=coded)
    frame = next(VideoSource(path).frames())
    np.testing.assert_allclose(frame[height // 2, 32].astype(int), (200, 60, 40), atol=3)


@pytest.mark.parametrize(
    ("ratio", "width", "height"), [((4, 3), 85, 64), ((8, 9), 64, 72), ((1, 1), 64, 64), ((2024, 2025), 64, 64)]
)
def test_pixels_that_are_not_square_are_made_square(tmp_path, ratio, width, height):
    source = VideoSource(write_film(tmp_path / "a.mp4", np.arange(3) / 25, size=(64, 64), ratio=Fraction(*ratio)))
    assert (source.width, source.height) == (width, height)
    assert all(frame.shape == (height, width, 3) for frame in source.frames_at(30))
    said = [f"pixels that are not square: it is read as {width}x{height}, as players show it"]
    assert [note.split(" has ")[1] for note in source.notes] == (said if (width, height) != (64, 64) else [])


def tones(*gains):
    """Half a second of one tone in some channels."""
    return 0.4 * np.outer(np.sin(np.arange(RATE // 2) * 0.2), gains)


def test_surround_sound_is_averaged_and_noted(tmp_path, tiny):
    soundfile.write(tmp_path / "a.wav", tones(0, 0, 1, 0, 0, 0), RATE)
    wave, notes, (heard, _) = load_recording(tmp_path / "a.wav")
    assert notes == [f"recording {tmp_path / 'a.wav'} has 6 channels: they are averaged to one"]
    assert heard.shape == (RATE // 2, 1)
    np.testing.assert_allclose(wave, tones(1)[:, 0] / 6, atol=1e-3)
    asked = Request(mouth=(0, 32, 0, 32), prompt="A puppet nods.", task="lipsync")
    times = np.arange(12) / 25
    for gains, channels, said in (
        ((0, 0, 1, 0, 0, 0), 1, "has 6 channels: they are averaged to one"),
        ((1, -1), 2, "has channels that cancel each other out: channel 1 alone is used"),
    ):
        path = write_film(tmp_path / f"{channels}.mp4", times, sound=tones(*gains))
        ready = read_request(dataclasses.replace(asked, video=path), tiny)
        assert f"the sound of video {path} {said}" in ready.notes
        assert ready.track[0].shape[1] == channels and np.abs(ready.wave).max() > 0.04


def test_what_lip_sync_changes_of_the_film_itself_is_told(tmp_path, tiny):
    """Sides that are odd, and sound after the last picture."""
    sound = np.repeat(np.linspace(0, 0.5, 5 * RATE, dtype=np.float32)[:, None], 1, axis=1)
    times = np.arange(25) / 25
    asked = Request(mouth=(0, 32, 16, 48), prompt="A puppet nods.", task="lipsync")
    said = {}
    for name, seconds, ratio in (("long", 5.0, 1), ("odd", 1.05, Fraction(4, 3))):
        film = write_film(
            tmp_path / f"{name}.mp4", times, size=(64, 64), sound=sound[: int(seconds * RATE)], ratio=ratio
        )
        said[name] = read_request(dataclasses.replace(asked, video=film), tiny).notes
    long, odd = (f"video {tmp_path / name}.mp4" for name in said)
    cut = "goes on after its last picture: the rest is cut off"
    even = "is 85x64, the result 86x64: H.264 has even sides only, so an edge is repeated"
    assert f"the sound of {long} {cut}" in said["long"] and f"{odd} {even}" in said["odd"]
    assert not any("85x64" in note for note in said["long"]) and not any(cut in note for note in said["odd"])


# Video files


def test_a_video_is_read_frame_by_frame(filmed):
    source = media.VideoSource(filmed)
    assert (source.height, source.width, source.fps, source.count, source.seconds) == (96, 96, 20.0, 20, 1.0)
    assert len(list(source.frames())) == 20
    at_25 = list(source.frames_at(25))
    assert len(at_25) == 25
    frames = list(source.frames())
    for k, frame in enumerate(at_25):
        np.testing.assert_array_equal(frame, frames[min(round(k * 20 / 25), 19)])
    track = source.track()
    assert track is not None and track.rate == RATE and track.samples.shape == (RATE, 1) and not track.cut


def test_the_sound_of_the_video_is_the_sound_that_was_given(tmp_path, tiny):
    """In its own rate and channels, though the model hears 16 kHz mono."""
    left, right = np.sin(np.arange(44100) / 20), np.sin(np.arange(44100) / 50)
    soundfile.write(tmp_path / "a.wav", 0.3 * np.stack([left, right], axis=1), 44100)
    ready = read_request(ask(21, audio=tmp_path / "a.wav"), tiny)
    samples, rate = ready.track
    assert samples.shape == (44100, 2) and rate == 44100 and ready.wave.shape == (21 * 640,)
    with media.VideoWriter(tmp_path / "a.mp4", 16, 16, wave=samples, rate=rate) as writer:
        writer.write(np.zeros((21, 16, 16, 3), np.uint8))
    again, rate = media.VideoSource(tmp_path / "a.mp4").track()[:2]
    assert rate == 44100 and again.shape[1] == 2
    for channel, wave in enumerate((left, right)):
        assert np.corrcoef(again[5000:30000, channel], wave[5000:30000])[0, 1] > 0.95


def test_the_record_stands_in_the_video(tmp_path):
    with media.VideoWriter(tmp_path / "a.mp4", 16, 16, comment='{"seed": 3}') as writer:
        writer.write(np.zeros((2, 16, 16, 3), np.uint8))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["comment"] == '{"seed": 3}'


@pytest.mark.parametrize("content", [b"", b"these are words"])
def test_what_is_not_a_video(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(UserError, match=r"video .*a.mp4 is (empty|not a video)"):
        media.VideoSource(tmp_path / "a.mp4")
