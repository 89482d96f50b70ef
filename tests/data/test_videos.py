"""Films: what becomes of a file, a row, a rate, a size, and with which reason something is left out."""

import dataclasses
import json
import sys
import types
from fractions import Fraction

import av
import numpy as np
import pytest

from emv3_jax import media
from emv3_jax.conditioning import tokenizer
from emv3_jax.config import PREVIEW, RATE
from emv3_jax.data import videos
from emv3_jax.data.builder import Dropped
from emv3_jax.data.videos import Film, Films, Rules, find_films
from emv3_jax.errors import UserError
from emv3_jax.puppets.clips import make_clip


def cut(films, preset, frames=(9,), face="none", words=None, **rules):
    """(clips, what was dropped) of films."""
    films = [films] if isinstance(films, Film) else films
    source = Films(films, Rules(frames, face, **rules), preset, words or tokenizer(preset))
    rows = [row for number in range(len(source)) for row in source.clips(number)]
    return [row for row in rows if not isinstance(row, Dropped)], [row for row in rows if isinstance(row, Dropped)]


def of(path, caption="A puppet nods.", **part):
    return Film(str(path), caption, path.name, **part)


def levels(clips):
    """Brightness of every frame."""
    return np.concatenate([clip.video.mean((1, 2, 3)) for clip in clips])


# Where films are found


def test_a_folder_gives_its_films_and_their_captions(tmp_path, film):
    film(tmp_path / "b" / "two.mp4", caption=" Two\nlines. ")
    film(tmp_path / "a.mp4", caption=None)
    (tmp_path / "notes.txt").write_text("no film")
    (tmp_path / "A.MOV").write_bytes((tmp_path / "a.mp4").read_bytes())
    films = find_films(tmp_path, "Of all.")
    assert [(f.name, f.caption) for f in films] == [
        ("A.MOV", "Of all."),
        ("a.mp4", "Of all."),
        ("b/two.mp4", "Two lines."),
    ]
    assert find_films(tmp_path / "b" / "two.mp4", None) == [
        Film(str(tmp_path / "b" / "two.mp4"), "Two lines.", "two.mp4")
    ]


def test_what_holds_no_films_is_told(tmp_path):
    with pytest.raises(UserError, match="holds no videos"):
        find_films(tmp_path, None)
    with pytest.raises(UserError, match="does not exist"):
        find_films(tmp_path / "none", None)
    (tmp_path / "a.xml").write_text("<a/>")
    with pytest.raises(UserError, match="must end in .jsonl or .csv"):
        find_films(tmp_path / "a.xml", None)


def test_names_of_any_bytes_can_be_written(tmp_path, film, tiny):
    odd = tmp_path / "b\udcff\n'\u00e9 #%@{}.mp4"
    film(tmp_path / "plain.mp4").rename(odd)
    (one,) = find_films(tmp_path, "A puppet nods.")
    assert one.name == "b??'\u00e9 #%@{}.mp4"
    assert one.name.encode() and json.dumps(dataclasses.astuple(one))
    clips, dropped = cut(one, tiny)
    assert [clip.id for clip in clips] == [f"{one.name}/0.00", f"{one.name}/0.36"], dropped


def test_rows_of_a_manifest(tmp_path):
    rows = [
        {"video": "a.mp4", "caption": "One."},
        {"video": "sub/b.mp4", "start": 1.5, "end": 3},
        {"video": "sub/b.mp4", "start": 3},
        {"video": "sub/b.mp4", "end": 0.5},
    ]
    path = tmp_path / "films.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert find_films(path, "All.") == [
        Film(str(tmp_path / "a.mp4"), "One.", "a.mp4"),
        Film(str(tmp_path / "sub/b.mp4"), "All.", "sub/b.mp4@1.5-3", 1.5, 3.0),
        Film(str(tmp_path / "sub/b.mp4"), "All.", "sub/b.mp4@3-", 3.0, None),
        Film(str(tmp_path / "sub/b.mp4"), "All.", "sub/b.mp4@0-0.5", None, 0.5),
    ]
    (tmp_path / "films.csv").write_text('video,caption,start,end\na.mp4,"One, two.",,\n7,1e3,1,2.5\n')
    assert find_films(tmp_path / "films.csv", None) == [
        Film(str(tmp_path / "a.mp4"), "One, two.", "a.mp4"), Film(str(tmp_path / "7"), "1e3", "7@1-2.5", 1.0, 2.5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"caption": "x"}, "row 2 names no video"),
        ({"video": None}, "row 2 names no video"),
        ({"video": ""}, "row 2 names no video"),
        ({"video": "b.mp4", "speaker": 1}, "row 2 has unknown 'speaker': columns are video, caption, start, end"),
        ({"video": "b.mp4", "start": "soon"}, "row 2: start must be seconds, got 'soon'"),
        ({"video": "b.mp4", "end": -1}, "row 2: end must be seconds, got -1"),
        ({"video": "b.mp4", "end": True}, "row 2: end must be seconds"),
        ({"video": "b.mp4", "start": float("nan")}, "row 2: start must be seconds, got nan"),
        ({"video": "b.mp4", "end": float("inf")}, "row 2: end must be seconds, got inf"),
        ({"video": "b.mp4", "start": 3, "end": 3}, "row 2: end must be after start, got 3 and 3"),
        ({"video": "a.mp4"}, "names a.mp4 twice"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, words):
    (tmp_path / "films.jsonl").write_text(json.dumps({"video": "a.mp4"}) + "\n" + json.dumps(row))
    with pytest.raises(UserError) as error:
        find_films(tmp_path / "films.jsonl", None)
    assert words in str(error.value)


def test_a_manifest_of_many_rows_is_read_in_no_time(tmp_path):
    (tmp_path / "films.jsonl").write_text("".join(json.dumps({"video": f"{k}.mp4"}) + "\n" for k in range(20_000)))
    assert len(find_films(tmp_path / "films.jsonl", "All.")) == 20_000


# Cutting


def test_a_film_is_cut_into_clips_with_their_sound(tmp_path, film, tiny):
    ramp = np.repeat(np.linspace(0.1, 0.7, 25), RATE // 25).astype(np.float32)
    ramp *= np.sign(np.sin(np.arange(len(ramp)) * 2 * np.pi / 16))  # louder with every frame
    clips, dropped = cut(of(film(tmp_path / "a.mp4", wave=ramp)), tiny)
    assert [clip.id for clip in clips] == ["a.mp4/0.00", "a.mp4/0.36"]
    assert dropped == [Dropped("a.mp4/0.72", "the rest of a film, shorter than a clip", 7 / 25)]
    for k, clip in enumerate(clips):
        assert clip.video.shape == (9, 32, 32, 3) and clip.video.dtype == np.uint8
        assert clip.caption == "A puppet nods." and clip.face is None
        assert len(clip.wave) == 9 * RATE // 25
        middle = np.abs(clip.wave).reshape(9, -1).mean(1)[1:-1]
        np.testing.assert_allclose(middle, np.linspace(0.1, 0.7, 25)[9 * k + 1 : 9 * k + 8], atol=0.06)
    np.testing.assert_allclose(levels(clips), np.linspace(0, 255, 25)[:18], atol=3)


@pytest.mark.parametrize(("fps", "frames"), [(30.0, 30), (12.5, 26), (12.5, 25), (50.0, 50), (25.0, 25), (23.976, 24)])
def test_any_rate_gives_25_frames_a_second(tmp_path, film, tiny, fps, frames):
    clips, dropped = cut(of(film(tmp_path / "a.mp4", frames=frames, fps=fps)), tiny)
    assert len(clips) == round(25 * frames / fps) // 9, dropped
    seen = levels(clips)
    wanted = np.arange(len(seen)) / 25 * fps / (frames - 1) * 255
    np.testing.assert_allclose(seen, wanted, atol=3 + 0.51 * 255 / (frames - 1) * max(1, fps / 25))


@pytest.mark.parametrize(("fps", "frames"), [(30.0, 11), (12.5, 5), (12.5, 6), (60.0, 23), (24.0, 9)])
def test_the_last_moment_of_a_film_counts_as_it_is_shown(tmp_path, film, tiny, fps, frames):
    """However the rates divide, what a film is said to have is what its frames give."""
    path = film(tmp_path / "a.mp4", frames=frames, fps=fps)
    source = media.VideoSource(path)
    assert videos._length(source) == len(list(source.frames_at(25)))
    clips, dropped = cut(of(path), tiny, frames=(5,))
    assert sum(len(clip.video) for clip in clips) + sum(round(row.seconds * 25) for row in dropped) == videos._length(
        source
    )


def test_the_longest_lengths_come_first(tmp_path, film, tiny):
    clips, dropped = cut(of(film(tmp_path / "a.mp4", frames=34)), tiny, frames=(5, 13))
    assert [len(clip.video) for clip in clips] == [13, 13, 5]
    assert [clip.id for clip in clips] == ["a.mp4/0.00", "a.mp4/0.52", "a.mp4/1.04"]
    assert [row.seconds for row in dropped] == [3 / 25]


def test_a_row_takes_its_part_of_a_film(tmp_path, film, tiny):
    path = film(tmp_path / "a.mp4", frames=50)
    clips, dropped = cut(of(path, start=0.4, end=1.2), tiny)
    np.testing.assert_allclose(levels(clips), np.linspace(0, 255, 50)[10:28], atol=3)
    assert dropped[0].seconds == pytest.approx(2 / 25)
    assert len(cut(of(path, start=1.6), tiny)[0]) == 1  # to its end
    assert len(cut(of(path, end=99.0), tiny)[0]) == 5
    assert cut(of(path, start=9.0), tiny)[1] == [Dropped("a.mp4", "shorter than 9 frames at 25 a second", 0.0)]


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(360, 640, (96, 160)), (640, 360, (160, 96)), (400, 400, (128, 128)), (64, 64, (64, 64)), (100, 64, (96, 64))],
)
def test_films_keep_their_proportions_where_the_preset_does(tmp_path, film, height, width, size):
    small = dataclasses.replace(PREVIEW, height=128, width=128)
    path = film(tmp_path / "a.mp4", frames=5, height=height, width=width)
    words = types.SimpleNamespace(encode=lambda texts: None)
    (clip,), _ = cut(of(path), small, frames=(5,), words=words)
    assert clip.video.shape[1:3] == clip.mouth.shape == size


def test_a_subtitle_band_is_cut_off(tmp_path, film, tiny):
    video = np.zeros((9, 40, 32, 3), np.uint8)
    video[:, 32:] = 255
    path = film(tmp_path / "a.mp4", video=video)
    assert cut(of(path), tiny)[0][0].video[:, -4:].mean() > 60
    assert cut(of(path), tiny, subtitle_band=0.2)[0][0].video.max() < 40


def test_a_film_that_slows_down_stays_with_its_sound(tmp_path, tiny):
    """25 frames a second, and then 5: each is shown until the next one comes."""
    path, times = tmp_path / "a.mkv", [*range(0, 400, 40), *range(400, 1600, 200)]
    loudness = np.repeat(np.linspace(0.1, 0.7, 40), RATE // 25)  # rises as the pictures brighten
    wave = (loudness * np.sign(np.sin(np.arange(len(loudness)) * 2 * np.pi / 16))).astype(np.float32)
    with av.open(str(path), "w") as container:
        picture, sound = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=RATE, layout="mono")
        picture.width = picture.height = 32
        picture.codec_context.time_base = Fraction(1, 1000)
        for time in times:  # as bright as it is late
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), time // 8, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        block = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        block.sample_rate, block.pts = RATE, 0
        container.mux(sound.encode(block))
        container.mux(sound.encode(None))
    clips, dropped = cut(of(path), tiny)
    assert len(clips) == 4 and not dropped
    np.testing.assert_allclose(8 * levels(clips), [*times[:10], *np.repeat(times[10:], 5)][:36], atol=24)
    heard = np.concatenate([np.abs(clip.wave).reshape(9, -1).mean(1) for clip in clips])
    np.testing.assert_allclose(heard[1:-1], np.linspace(0.1, 0.7, 40)[1:35], atol=0.06)


def test_rows_of_one_film_open_it_once(tmp_path, film, tiny, monkeypatch):
    path, other = film(tmp_path / "a.mp4", frames=50), film(tmp_path / "b.mp4")
    opened, sounds = [], []
    source, track = media.VideoSource, media.VideoSource.track
    monkeypatch.setattr(media, "VideoSource", lambda name: opened.append(name) or source(name))
    monkeypatch.setattr(source, "track", lambda self: sounds.append(self.path) or track(self))
    rows = [of(path, start=k / 5, end=k / 5 + 0.36) for k in (4, 0, 2)]
    clips, dropped = cut([*rows, of(other), rows[0]], tiny)
    assert opened == [str(path), str(other), str(path)] and len(sounds) == 3
    np.testing.assert_allclose(
        levels(clips[:3]), np.concatenate([np.linspace(0, 255, 50)[5 * k : 5 * k + 9] for k in (4, 0, 2)]), atol=3
    )


# What is left out


def test_bad_files_are_dropped_with_the_reason(tmp_path, film, tiny):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").touch()
    whole = film(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    film(tmp_path / "quiet.mp4", wave=np.zeros(RATE, np.float32))
    film(tmp_path / "mute.mp4", wave=None)
    film(tmp_path / "short.mp4", frames=8)
    expected = {
        "text.mp4": "the film is not a video or is damaged: give an MP4, WebM or MOV file",
        "empty.mp4": "the film is empty (0 bytes)",
        "cut.mp4": "the sound of the film is cut off or damaged: save or download it again",
        "none.mp4": "the film does not exist",
        "mute.mp4": "no sound track",
        "short.mp4": "shorter than 9 frames at 25 a second",
    }
    for name, why in expected.items():
        clips, dropped = cut(of(tmp_path / name), tiny)
        assert clips == [] and [(row.name, row.why) for row in dropped] == [(name, why)]
    assert cut(of(tmp_path / "short.mp4"), tiny)[1][0].seconds == 8 / 25
    clips, dropped = cut(of(tmp_path / "quiet.mp4"), tiny)
    assert not clips and [row.why for row in dropped][:2] == ["silence", "silence"]


def test_sound_that_ends_before_the_picture_drops_what_it_lacks(tmp_path, film, tiny, monkeypatch):
    path = film(tmp_path / "a.mp4", frames=27)
    track = media.VideoSource.track

    def sound_of(samples):
        return lambda self: (sound := track(self))._replace(samples=sound.samples[:samples])

    monkeypatch.setattr(media.VideoSource, "track", sound_of(RATE // 2))
    clips, dropped = cut(of(path), tiny)
    assert [clip.id for clip in clips] == ["a.mp4/0.00"]
    assert [(row.name, row.why) for row in dropped] == [
        ("a.mp4/0.36", "the sound ends before the picture"), ("a.mp4/0.72", "the sound ends before the picture"),
    ]  # fmt: skip
    monkeypatch.setattr(media.VideoSource, "track", sound_of(18 * RATE // 25 - 50))
    clips, _ = cut(of(path), tiny)  # a few samples are no matter
    assert [len(clip.wave) for clip in clips] == [9 * RATE // 25] * 2


def test_captions_must_be_there_and_be_readable(tmp_path, film, tiny):
    path = film(tmp_path / "a.mp4")
    assert cut(of(path, caption=""), tiny)[1] == [
        Dropped("a.mp4", "no caption: put NAME.txt beside it, or give --caption")
    ]
    long = " ".join(["nods"] * 24)
    assert cut(of(path, caption=long), tiny)[1] == [
        Dropped("a.mp4", "a caption of more than 23 words or pieces of words")
    ]
    assert len(cut(of(path, caption=long[:-5]), tiny)[0]) == 2


def boxes(*found):
    """A detector that finds so many faces, call by call, and then the last number of them."""
    counts = list(found)

    def detect(image):
        if not image.any() and image.shape == (64, 64, 3):
            return []  # asked whether it is installed
        count = counts.pop(0) if len(counts) > 1 else counts[0]
        return [(4.0 + 2 * k, 20.0 + 4 * k, 6.0, 22.0 + k) for k in range(count)]

    return detect


def test_clips_without_one_face_are_dropped(tmp_path, film, tiny, monkeypatch):
    path = film(tmp_path / "a.mp4", frames=9, height=32, width=32)
    for choice, found, why in (
        ("one", (1, 0, 1), "no face"), ("largest", (0,), "no face"), ("one", (1, 2, 1), "several faces"),
    ):  # fmt: skip
        monkeypatch.setattr(media, "detect_faces", boxes(*found))
        assert cut(of(path), tiny, face=choice)[1] == [Dropped("a.mp4/0.00", why, 9 / 25)]
    monkeypatch.setattr(media, "detect_faces", boxes(1))
    (clip,), _ = cut(of(path), tiny, face="one")
    assert clip.face == (4.0, 20.0, 6.0, 22.0)
    monkeypatch.setattr(media, "detect_faces", boxes(1, 2, 1))
    (clip,), _ = cut(of(path), tiny, face="largest")
    assert clip.face == (4.0, 24.0, 6.0, 23.0)  # holds the faces of all the frames that were looked at
    rows, columns = np.nonzero(clip.mouth)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (14, 25, 6, 22)


def test_faces_are_found_in_the_films_own_size(tmp_path, film, tiny, monkeypatch):
    """Small clips show them too small; what is cut off does not count."""
    sizes = []

    def detect(image):
        sizes.append(image.shape)
        return [(20.0, 60.0, 100.0, 140.0), (20.0, 60.0, 0.0, 40.0)] if image.any() else []

    video = np.full((9, 100, 256, 3), 200, np.uint8)
    path = film(tmp_path / "a.mp4", video=video)
    monkeypatch.setattr(media, "detect_faces", detect)
    (clip,), _ = cut(of(path), tiny, face="one", subtitle_band=0.2)
    assert sizes[1:] == [(80, 256, 3)] * 3
    np.testing.assert_allclose(clip.face, (8.0, 24.0, 4.8, 20.8))  # 80 pixels become 32, 88 on either side are cut


def test_a_missing_detector_is_an_error_and_no_reason_to_drop_all(tmp_path, film, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "dlib", None)
    path = film(tmp_path / "a.mp4")
    with pytest.raises(
        UserError, match=r"--face one needs the extra face: pip install -e '.\[face\]', or give --face none"
    ):
        cut(of(path), tiny, face="one")
    assert len(cut(of(path), tiny, face="none")[0]) == 2


def test_the_sync_model_is_asked(tmp_path, film, tiny, monkeypatch):
    asked = []
    module = types.ModuleType("my_sync")
    answers = [(0.0, 0.9), (5.0, 0.9), (-5.0, 0.9), (3.0, 0.5), (0.0, 0.4), (float("nan"), 0.9), (0.0, float("nan"))]

    def offset(video, wave, face):
        asked.append((video.shape, video.dtype, wave.shape, face))
        return answers[len(asked) - 1]

    module.offset, module.number = offset, 3
    monkeypatch.setitem(sys.modules, "my_sync", module)
    path = film(tmp_path / "a.mp4", frames=63)
    clips, dropped = cut(of(path), tiny, sync_model="my_sync:offset", max_offset=3.0, min_confidence=0.5)
    assert asked == [((9, 32, 32, 3), np.uint8, (9 * RATE // 25,), None)] * 7
    assert [clip.id for clip in clips] == ["a.mp4/0.00", "a.mp4/1.08"]
    apart, unsure = "sound and picture are apart", "the sync model is not confident"
    assert [row.why for row in dropped] == [apart, apart, unsure, apart, unsure]
    for name, words in (
        ("my_sync:number", "is not a function"), ("my_sync:none", "cannot|can be imported"),
        ("no_such_module:f", "No module named"), ("my_sync", "MODULE:FUNCTION"), (":f", "MODULE:FUNCTION"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            cut(of(path), tiny, sync_model=name)


@pytest.mark.parametrize("answer", [RuntimeError("no\nmemory"), None, ("late", 1.0)])
def test_a_film_at_which_the_sync_model_fails_is_dropped(tmp_path, film, tiny, monkeypatch, answer):
    """And the films after it are looked at."""
    module = types.ModuleType("my_sync")

    def offset(video, wave, face):
        if len(asked) == 1:
            asked.append(1)
            if isinstance(answer, Exception):
                raise answer
            return answer
        asked.append(0)
        return 0.0, 1.0

    asked, module.offset = [], offset
    monkeypatch.setitem(sys.modules, "my_sync", module)
    films = [of(film(tmp_path / name, frames=18)) for name in ("a.mp4", "b.mp4")]
    clips, dropped = cut(films, tiny, sync_model="my_sync:offset")
    assert [clip.id for clip in clips] == ["a.mp4/0.00", "b.mp4/0.00", "b.mp4/0.36"]
    (row,) = dropped
    assert row.name == "a.mp4" and row.why.startswith("the sync model failed (") and "\n" not in row.why


def test_a_film_at_which_the_face_detector_fails_is_dropped(tmp_path, film, tiny, monkeypatch):
    def detect(frame):
        if frame.any():
            raise RuntimeError("cuda")
        return []

    monkeypatch.setattr(media, "detect_faces", detect)
    path = film(tmp_path / "a.mp4", video=np.full((9, 48, 48, 3), 200, np.uint8))
    clips, dropped = cut(of(path), tiny, face="one")
    assert clips == [] and [row.why for row in dropped] == ["the face detector failed (RuntimeError: cuda)"]


def test_puppets_whose_voice_is_moved_are_found_out(tmp_path, film, tiny):
    clip = make_clip("heldout", 0, 69)
    video = media.to_uint8(np.asarray(clip.render(64)))[:61]
    rules = {"frames": (61,), "sync_model": "emv3_jax.puppets.sync_model:offset", "max_offset": 2.0}
    for name, first, why in (("true.mp4", 0, []), ("moved.mp4", 4, ["sound and picture are apart"])):
        wave = clip.wave[first * RATE // 25 :][: 61 * RATE // 25]
        path = film(tmp_path / name, video=video, wave=wave / np.abs(wave).max())
        kept, dropped = cut(of(path), dataclasses.replace(tiny, height=64, width=64, max_frames=61), **rules)
        assert len(kept) == 1 - len(why) and [row.why for row in dropped] == why


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"frames": (10,)}, "--frames must be 4k . 1 and at least 5, got 10"),
        ({"frames": (1,)}, "at least 5, got 1"),
        ({"frames": (17,)}, "--frames must be at most 13 for the preset tiny, got 17"),
        ({"subtitle_band": 0.5}, "--subtitle-band must be from 0 to below 0.5"),
        ({"subtitle_band": float("nan")}, "--subtitle-band"),
        ({"max_offset": -1.0}, "--max-offset must be 0 or more"),
        ({"max_offset": float("nan")}, "--max-offset"),
        ({"min_confidence": float("nan")}, "--min-confidence"),
    ],
)
def test_impossible_rules_are_refused(tiny, rules, words):
    with pytest.raises(UserError, match=words):
        cut([], tiny, **rules)


@pytest.mark.parametrize("face", [None, (-5.0, 20.0, 10.0, 40.0), (28.0, 32.0, 0.0, 32.0)])
def test_the_mouth_is_inside_the_picture(face):
    mask = videos.mouth_of(face, 32, 32)
    assert mask.shape == (32, 32) and 0 < mask.sum() < 0.6 * mask.size
