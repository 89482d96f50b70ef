"""Long videos, tasks and interruptions through the pipeline, on the tiny preset with random weights."""

import dataclasses
import gc
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rendering import IMAGE, OPTIONS, PROMPT, RNG, WAVE, ask, difference, video

from emv3_jax import conditioning, config, contexts, media, render, request, steps
from emv3_jax.diffusion import long_video
from emv3_jax.diffusion.guidance import CHAIN
from emv3_jax.diffusion.phda import PhDAConfig
from emv3_jax.diffusion.store import claim
from emv3_jax.errors import UserError
from emv3_jax.pipeline import Pipeline, Request, read_request

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sampler": "unipc"},
        {"cache_threshold": 1e9, "cache_start": 1},
        {"cfg_skip_ratio": 0.5},
        {"negative_motion": "A puppet frowns.", "negative_detail": "slow"},
    ],
    ids=lambda change: "-".join(change) or "plain",
)
def test_one_window_is_what_sampling_in_memory_gives(tiny_pipeline, change, tmp_path):
    """Whatever the options: the folder, the windows and their contexts change nothing."""
    options = dataclasses.replace(OPTIONS, steps=3, **change)
    ready = read_request(ask(9), tiny_pipeline.preset)
    prepared, given = tiny_pipeline.prepare(ready)
    latents = tiny_pipeline.sample_latents(prepared, given, tiny_pipeline.noise(0, 9), options)
    again = render.Run(tiny_pipeline, ready, options, tmp_path / "render")
    windows = options.windows(3, 13)
    store = again.follow(again.whole(windows), windows, None)
    np.testing.assert_allclose(store.read_x(0, 3), latents[0], atol=2e-4)
    plain = dataclasses.replace(OPTIONS, steps=3)
    if change:
        other = tiny_pipeline.sample_latents(prepared, given, tiny_pipeline.noise(0, 9), plain)
        assert np.abs(np.asarray(latents - other)).max() > 1e-3


@pytest.mark.parametrize("form", ["cfg", "chained", "released", "none"])
def test_long_videos_have_their_length_and_begin_alike(tiny_pipeline, form):
    options = dataclasses.replace(OPTIONS, long_video=form, window=13)
    told: list = []
    frames = video(tiny_pipeline, ask(37), options, tell=told.append)
    assert frames.shape == (37, 32, 32, 3)
    assert told[-1].startswith("long video:") and form in told[-1]
    assert difference(frames[-1], frames[0]) > 2


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({}, [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]),
        ({"noise": "fresh"}, range(10)),
        ({"long_video": "released"}, range(10)),
        ({"long_video": "none", "noise": "repeated"}, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]),
    ],
    ids=str,
)
def test_a_long_video_begins_with_the_noise_of_its_form(tiny_pipeline, change, numbers, tmp_path, monkeypatch):
    """Windows of 4 latent frames that overlap by 2; what the store holds before the first step."""
    options = dataclasses.replace(OPTIONS, window=13, **change)
    run = render.Run(tiny_pipeline, read_request(ask(37), tiny_pipeline.preset), options, tmp_path / "render")
    monkeypatch.setattr(long_video, "follow", lambda *args: None)
    windows = options.windows(10, 13)
    store = run.follow(run.whole(windows), windows, None)
    noise = np.asarray(tiny_pipeline.noise(0, 37))[0]
    np.testing.assert_array_equal(store.read_x(0, 10), noise[list(numbers)])


@pytest.mark.parametrize(
    ("noise", "numbers"),
    [
        ("", [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]),
        ("repeated", [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2]]),
        ("shuffled", long_video.shuffled_noise(np.arange(12), 4, 0).reshape(3, 4).tolist()),
    ],
)
def test_chunks_begin_with_the_noise_that_is_asked_for(tiny_pipeline, noise, numbers, tmp_path, monkeypatch):
    """Chunks of 4 latent frames, the last of 3."""
    begun: list = []
    monkeypatch.setattr(
        Pipeline,
        "noise_frames",
        lambda self, seed, some, size: (begun.append(list(some)), np.zeros((len(some), 4, 4, 16)))[1],
    )
    monkeypatch.setattr(long_video, "follow", lambda *args: None)
    monkeypatch.setattr(render.Run, "decode", lambda self, store: iter([np.zeros((13, 32, 32, 3), np.uint8)]))
    options = dataclasses.replace(OPTIONS, long_video="chained", window=13, noise=noise)
    run = render.Run(tiny_pipeline, read_request(ask(21), tiny_pipeline.preset), options, tmp_path / "render")
    assert len(list(run.chained([13, 13, 9], None))) == 21
    assert begun == [some[: len(got)] for some, got in zip(numbers, begun, strict=True)]
    assert [len(got) for got in begun] == [4, 4, 3]


def test_the_voice_reaches_its_own_frames_of_a_long_video(tiny_pipeline):
    """Another sound in the last half second changes the end and leaves the beginning as it is."""
    options = dataclasses.replace(OPTIONS, window=9)
    other = WAVE.copy()
    other[29 * 640 :] = 0.1 * RNG.standard_normal(len(other) - 29 * 640)
    a = video(tiny_pipeline, ask(41), options)
    b = video(tiny_pipeline, ask(41, audio=other[: 41 * 640]), options)
    assert difference(a[33:], b[33:]) > 2
    assert np.abs(a[:17].astype(int) - b[:17]).mean() < 0.1 * np.abs(a[33:].astype(int) - b[33:]).mean()


def test_windows_hear_what_the_whole_video_hears(tiny):
    """A window's segments and features are the rows of the whole video's."""
    from emv3_jax.models.audio_tokens import AudioTokens

    encoder = AudioTokens(tiny.dit, parent=None)
    features = RNG.standard_normal((82, 3)).astype(np.float32)
    padded = np.concatenate([features, np.zeros((1, 3), np.float32)])
    whole = padded[encoder.segments(82, 11)]
    for start, count in ((0, 11), (0, 5), (3, 5), (6, 5)):
        piece = encoder.piece(82, start, count)
        heard = np.concatenate([piece.cut(features), np.zeros((1, 3), np.float32)])[piece.segments]
        np.testing.assert_array_equal(heard, whole[start : start + count])
    short = encoder.piece(81, 0, 11)  # the whole sound, without its last feature: the released rate is above 2
    heard = np.concatenate([short.cut(features[:81]), np.zeros((1, 3), np.float32)])[short.segments]
    np.testing.assert_array_equal(heard, np.concatenate([features[:81], padded[-1:]])[encoder.segments(81, 11)])
    alone = encoder.piece(82, 3, 5, alone=True)
    heard = np.concatenate([alone.cut(features), np.zeros((1, 3), np.float32)])[alone.segments]
    own = np.concatenate([features[24:64], np.zeros((1, 3), np.float32)])
    np.testing.assert_array_equal(heard, own[encoder.segments(40, 5)])


def test_contexts_put_together_are_the_models_own(tiny_pipeline):
    """Keys and values computed once for the video and for each window are those of the whole Conditions."""
    pipe = tiny_pipeline
    prepared, given = pipe.prepare(read_request(ask(9), pipe.preset))
    velocity = pipe.velocity()
    cond = conditioning.encode(pipe.params, pipe.preset, prepared, given)
    want = jax.jit(lambda: velocity.apply("context", cond))()
    states = pipe.states(prepared.ids, prepared.text_mask, prepared.image, prepared.has_image, OPTIONS)
    parts = steps.shared(velocity, *states)
    segments = velocity.model.bind({"params": velocity.params}).audio_tokens.segments(18, 3)
    window = contexts.Window(
        given, prepared.audio, segments[None], np.zeros((1, 1), int), np.ones((1, 1, 3), np.float32),
        np.zeros(1, int), prepared.face_mask,
    )  # fmt: skip
    got = steps.all_contexts(velocity, parts, window, CHAIN, (0,))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[-1], b, atol=1e-5), got, want)


def test_lengths_are_rounded_and_the_surplus_is_cut(tiny_pipeline):
    """Videos of 5 and 9 frames are both made as 13, and are the beginning of one another but for the sound."""
    preset = dataclasses.replace(tiny_pipeline.preset, latent_step=4)
    pipe = Pipeline(preset, tiny_pipeline.params)
    short, long = (video(pipe, ask(n, audio=np.zeros(n * 640, np.float32))) for n in (5, 9))
    assert short.shape[0] == 5 and long.shape[0] == 9
    assert difference(short, long[:5]) <= 2
    last = video(pipe, ask(9, task="flf2v", last_image=255 - IMAGE))
    assert difference(last, video(tiny_pipeline, ask(9, task="flf2v", last_image=255 - IMAGE))) <= 2


def test_as_many_windows_together_as_memory_allows(tiny_pipeline, tmp_path, monkeypatch):
    """Batches change nothing; what fits is what the compiler says of one window."""
    options = dataclasses.replace(OPTIONS, window=9, overlap=1)
    ready = read_request(ask(41), tiny_pipeline.preset)
    run = render.Run(tiny_pipeline, ready, options, tmp_path / "render")
    windows = options.windows(11, 13)
    clip = run.whole(windows)
    spans = list(zip(windows.starts, windows.ends, strict=True))
    assert len(spans) == 5 and run._windows_together(clip, spans, 1) == 1  # a processor says nothing of its memory

    class Device:
        def memory_stats(self):
            return {"bytes_limit": 10**12, "bytes_in_use": 0}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert run._windows_together(clip, spans, 1) == 5
    monkeypatch.undo()
    one = video(tiny_pipeline, ask(41), options)
    for count, size in ((2, 2), (3, 3), (4, 3)):  # batches of equal size: 5 windows are 3 + 2, whether 3 or 4 fit
        changed = dataclasses.replace(options, windows_together=count)
        again = render.Run(tiny_pipeline, ready, changed, tmp_path / "render")
        assert again._windows_together(clip, spans, 1) == size
        assert difference(one, video(tiny_pipeline, ask(41), changed)) <= 2


def test_prompts_over_time_act_in_their_time(tiny_pipeline):
    one = video(tiny_pipeline, ask(13))
    same = video(tiny_pipeline, ask(13, prompt=f"0-0.2s: {PROMPT}; 0.2-9s: {PROMPT}"))
    other = video(tiny_pipeline, ask(13, prompt=f"0-0.2s: {PROMPT}; 0.2-9s: A puppet frowns."))
    assert difference(one, same) <= 2
    assert difference(one, other) > 2


def test_tasks_give_different_videos(tiny_pipeline):
    videos = {
        "i2v": video(tiny_pipeline, ask(9)),
        "t2v": video(tiny_pipeline, ask(9, task="t2v", image=None)),
        "flf2v": video(tiny_pipeline, ask(9, task="flf2v", last_image=255 - IMAGE)),
    }
    assert all(frames.shape == (9, 32, 32, 3) for frames in videos.values())
    assert difference(videos["i2v"], videos["t2v"]) > 2 and difference(videos["i2v"], videos["flf2v"]) > 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "dance"}, "there is no task 'dance': one of i2v, t2v"),
        ({"image": None}, "the task i2v needs image"),
        ({"audio": None}, "the task i2v needs audio"),
        ({"task": "flf2v"}, "the task flf2v needs last image"),
        ({"last_image": IMAGE}, "the task i2v takes no last image"),
        ({"task": "t2v"}, "the task t2v takes no image"),
        ({"task": "lipsync"}, "the task lipsync takes no image"),
        ({"task": "lipsync", "image": None}, "the task lipsync needs video"),
        ({"task": "t2v", "image": None, "face": (0, 9, 0, 9)}, "the task t2v takes no face box"),
        ({"fps": 25.0}, "the task i2v takes no fps"),
        ({"mouth": (0, 9, 0, 9)}, "the task i2v takes no mouth"),
        (
            {"task": "lipsync", "image": None, "video": "a.mp4", "mouth": (0, 9, 0, 9), "match_colours": True},
            "the task lipsync takes no match_colours",
        ),
    ],
)
def test_a_task_is_given_what_it_needs(tiny, changes, message):
    with pytest.raises(UserError, match=message):
        read_request(ask(5, **changes), tiny)


def test_an_interrupted_render_gives_the_same_video(tiny_pipeline, tmp_path):
    options = dataclasses.replace(OPTIONS, steps=4, window=13, sampler="dpmpp", cache_threshold=1e9, cache_start=2)
    ready = read_request(ask(25), tiny_pipeline.preset)
    whole = video(tiny_pipeline, ask(25), options)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    folder = tmp_path / "render"
    with pytest.raises(KeyboardInterrupt):
        list(tiny_pipeline.stream(ready, options, stop, folder))
    assert folder.is_dir()
    with pytest.raises(UserError, match="render with another sampling shift: remove it, or ask for the same"):
        list(tiny_pipeline.stream(ready, dataclasses.replace(options, shift=4.0), None, folder))
    done: list = []
    again = list(tiny_pipeline.stream(ready, options, lambda i, n: done.append(i), folder))
    assert done == [3, 4] and folder.is_dir()  # whoever takes the frames removes it when they are safe
    np.testing.assert_array_equal(np.concatenate(again), whole)


@pytest.mark.parametrize("form", ["cfg", "chained"])
def test_matched_colours_are_those_of_the_first_frame_and_nothing_else_changes(tiny_pipeline, form, monkeypatch):
    options = dataclasses.replace(OPTIONS, long_video=form, window=13)
    made = tiny_pipeline.generate(ask(25, match_colours=True), options).frames

    def never(pieces):
        raise AssertionError("off by default")

    monkeypatch.setattr(media, "matched_to_first", never)
    plain = tiny_pipeline.generate(ask(25), options).frames
    monkeypatch.undo()
    np.testing.assert_array_equal(made[0], plain[0])
    np.testing.assert_array_equal(made, np.concatenate(list(media.matched_to_first([plain]))))
    assert difference(made, plain) > 2


def test_an_interrupted_render_has_the_same_matched_colours(tiny_pipeline, tmp_path):
    """Latents know nothing of it: a render that began without may go on with matched colours."""
    options = dataclasses.replace(OPTIONS, window=13)
    whole = video(tiny_pipeline, ask(25, match_colours=True), options)

    def never(done: int, total: int) -> None:
        raise AssertionError("all steps were done")

    for began_with in (True, False):
        begun = tiny_pipeline.stream(
            read_request(ask(25, match_colours=began_with), tiny_pipeline.preset), options, None, tmp_path / "render"
        )
        next(begun), next(begun)  # broken off while frames are decoded
        begun.close()
        assert (tmp_path / "render").is_dir()
        again = video(tiny_pipeline, ask(25, match_colours=True), options, folder=tmp_path / "render", on_step=never)
        np.testing.assert_array_equal(again, whole)


def test_what_changes_the_result_is_in_the_settings_and_what_only_memory_does_is_not(tiny_pipeline, filmed, tmp_path):
    pipe, tiny = tiny_pipeline, tiny_pipeline.preset
    ready = read_request(ask(9), tiny)
    settings = render.settings_of(pipe, ready, OPTIONS)
    other_text = jax.tree.map(lambda x: x + 1, pipe.params["text"])
    dit = dataclasses.replace(tiny.dit, riflex=2)
    changes = {
        "text": Pipeline(tiny, {**pipe.params, "text": other_text}),
        "riflex": Pipeline(dataclasses.replace(tiny, dit=dit), pipe.params),
        "face_floored": Pipeline(dataclasses.replace(tiny, face_floored=True), pipe.params),
        "phda": Pipeline(tiny, pipe.params, PhDAConfig(image=None)),
    }
    for name, changed in changes.items():
        claim(tmp_path / name, settings)
        with pytest.raises(UserError, match=f"a render with another .*{name}.*: remove it"):
            claim(tmp_path / name, render.settings_of(changed, ready, OPTIONS))
    less = dataclasses.replace(OPTIONS, windows_together=1, branches_together=False)
    remat = Pipeline(dataclasses.replace(tiny, dit=dataclasses.replace(tiny.dit, remat="dots")), pipe.params)
    assert render.settings_of(remat, ready, less) == settings
    moved = tmp_path / "moved.mp4"
    moved.write_bytes(Path(filmed).read_bytes())
    asked = Request(video=filmed, mouth=(40, 72, 24, 60), prompt=PROMPT, task="lipsync")
    settings = render.settings_of(pipe, read_request(asked, tiny), OPTIONS)
    ready = read_request(dataclasses.replace(asked, video=moved), tiny)
    assert render.settings_of(pipe, ready, OPTIONS) == settings
    moved.write_bytes(Path(filmed).read_bytes() + b"\0")
    assert render.settings_of(pipe, ready, OPTIONS) != settings


def test_what_was_encoded_for_another_mouth_is_refused(tiny_pipeline, filmed, tmp_path):
    """The given latents of a render that was killed before its first step."""
    asked = Request(video=filmed, mouth=(40, 72, 24, 60), prompt=PROMPT, task="lipsync")
    ready = read_request(asked, tiny_pipeline.preset)
    claim(tmp_path / "render", render.settings_of(tiny_pipeline, ready, OPTIONS))
    render.Run(tiny_pipeline, ready, OPTIONS, tmp_path / "render").whole(OPTIONS.windows(7, 13))
    assert (tmp_path / "render" / "given.f32").exists() and not list(tmp_path.glob("render/chunk_*"))
    with pytest.raises(UserError, match="render with another mouth box: remove it"):
        video(tiny_pipeline, dataclasses.replace(asked, mouth=(8, 40, 24, 60)), folder=tmp_path / "render")


def test_a_mesh_takes_a_window_a_shard(tiny_pipeline, tmp_path, monkeypatch):
    """Also where a device says nothing of its memory."""
    options = dataclasses.replace(OPTIONS, window=9, overlap=1)
    run = render.Run(tiny_pipeline, read_request(ask(41), tiny_pipeline.preset), options, tmp_path / "render")
    monkeypatch.setattr(run, "_data_shards", lambda: 2)
    windows = options.windows(11, 13)
    spans = list(zip(windows.starts, windows.ends, strict=True))
    assert run._windows_together(run.whole(windows), spans, 1) == 2


@pytest.mark.parametrize(
    ("change", "frames", "message"),
    [
        ({"window": 9, "overlap": 8, "long_video": "cfg"}, 13, "windows of 3 latent frames cannot overlap by 8"),
        ({"window": 9, "overlap": 8, "long_video": "chained"}, 13, ""),  # which has no overlap
        ({"window": 5, "long_video": "chained"}, 13, "hands on 8 frames: window must be longer, got 5"),
        ({"window": 5, "overlap": 0, "long_video": "released"}, 9, "the last window is one given frame"),
        ({"window": 5, "overlap": 0, "long_video": "released"}, 13, ""),
        ({"window": 5, "overlap": 0, "long_video": "none"}, 9, ""),
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_length_are_told_before_any_work(tiny, change, frames, message):
    ready, options = read_request(ask(frames), tiny), dataclasses.replace(OPTIONS, **change)
    if not message:
        render.check(ready, options, tiny)
        return
    with pytest.raises(UserError, match=message):
        render.check(ready, options, tiny)


def test_a_window_of_one_frame_that_is_not_given_is_made(tiny):
    options = dataclasses.replace(OPTIONS, window=5, overlap=0, long_video="released")
    render.check(read_request(ask(9, task="t2v", image=None), tiny), options, tiny)


def test_pictures_that_are_not_finite_are_no_black_video(tiny_pipeline, monkeypatch):
    run = render.Run.__new__(render.Run)
    run.pipe = tiny_pipeline
    monkeypatch.setattr(render.vae_model, "decode_stream", lambda *args: [jnp.full((1, 1, 32, 32, 3), jnp.nan)])

    class Latents:
        total = 0

    with pytest.raises(UserError, match="decoding gave numbers that are not finite: start again with smaller"):
        list(run.decode(Latents()))


@pytest.mark.parametrize(
    ("frames", "window", "whole", "chunks", "made"),
    [
        (113, 0, False, [], 113),
        (117, 0, True, [113, 113], 117),
        (117, 0, False, [113, 9], 114),
        (218, 0, False, [113, 113], 218),  # the length that is left when 221 were asked for
        (221, 0, False, [113, 113, 9], 219),
        (17, 13, False, [13, 9], 14),
    ],
)
def test_the_last_chunk_is_shortened_as_released(tiny, frames, window, whole, chunks, made):
    preset = dataclasses.replace(tiny, max_frames=113, whole_chunks=whole)
    options = dataclasses.replace(OPTIONS, long_video="chained", window=window)
    ready = dataclasses.replace(read_request(ask(5), tiny), frames=frames)
    assert render.chunk_lengths(ready, options, preset) == chunks
    ready = render.shortened(ready, options, preset)
    assert ready.frames == made and ("ends after" in "".join(ready.notes)) == (made < frames)
    assert render.shortened(ready, options, preset) is ready
    assert render.chunk_lengths(ready, options, preset) == chunks


def test_a_chained_video_of_the_released_mode(tiny_pipeline):
    pipe = Pipeline(config.released(tiny_pipeline.preset), tiny_pipeline.params)
    options = dataclasses.replace(OPTIONS, steps=1, long_video="chained", window=13)
    made = pipe.generate(ask(17), options)
    assert made.frames.shape[0] == 14 and any("the video ends after 14 of 17 frames" in note for note in made.notes)
    whole = tiny_pipeline.generate(ask(17), options).frames
    assert difference(made.frames[:5], whole[:5]) <= 2


def test_a_released_video_ends_with_its_sound(tiny):
    ready = read_request(ask(13, audio=WAVE[: 10 * 640]), config.released(tiny))
    assert ready.frames == 9 and "the sound lasts 0.40 s: 9 frames are made of the 13 asked for" in ready.notes
    ready = read_request(ask(13, audio=WAVE[: 10 * 640]), tiny)
    assert ready.frames == 13 and any("silence was added" in note for note in ready.notes)


def test_a_released_face_box_is_not_cut_at_the_edge(tiny):
    """Pictures of 47 x 70 become 32 x 64: the released box is scaled by 0.789 and floored, whatever it reaches."""
    preset = config.released(dataclasses.replace(tiny, keep_proportions=True, height=64, width=64))
    picture = RNG.integers(0, 256, (70, 47, 3), np.uint8)
    ready = read_request(ask(5, image=picture, face=(25, 70, 0, 47)), preset)
    np.testing.assert_allclose(ready.face, np.array([25, 70, 0, 47]) * np.sqrt(64 * 32 / (70 * 47)))
    tokens = conditioning.face_tokens(ready.face, *ready.size, preset.face_floored).reshape(4, 2)
    assert tokens.tolist() == [[0, 0], [1, 1], [1, 1], [0, 0]]
    square = np.zeros((64, 64, 3), np.uint8)
    ready = read_request(ask(5, image=square, face=(16, 64, 0, 64)), preset)
    tokens = conditioning.face_tokens(ready.face, *ready.size, preset.face_floored).reshape(4, 4)
    assert tokens.sum(1).tolist() == [0, 4, 4, 4]


def test_released_mode_stretches_and_floors(tiny):
    preset = config.released(dataclasses.replace(tiny, keep_proportions=True, height=64, width=64))
    picture = RNG.integers(0, 256, (70, 47, 3), np.uint8)
    ready = read_request(ask(5, image=picture, face=(0, 40, 0, 40)), preset)
    assert ready.size == (64, 32) and any("stretched to 32x64" in note for note in ready.notes)
    y1, y2, x1, x2 = ready.face
    np.testing.assert_allclose([y2, x2], 40 * np.sqrt(64 * 32 / (70 * 47)), rtol=1e-6)  # one factor for both sides
    assert conditioning.face_tokens((0, 40, 0, 20), 64, 32, floored=True).reshape(4, 2).sum(0).tolist() == [2, 0]
    assert conditioning.face_tokens((0, 40, 0, 20), 64, 32).reshape(4, 2).sum(0).tolist() == [3, 3]
    assert request.fit_box((0, 70, 0, 47), 70, 47, 64, 32, "stretch") == (0, 64, 0, 32)
    assert conditioning.face_tokens((0, 64, 0, 32), 64, 32, floored=True).all()  # the released program cuts nothing


def test_with_little_memory_models_are_read_when_they_are_used(tiny_pipeline):
    """The same video, in as few readings as can be, and never two models at a time."""
    from emv3_jax.weight_files import LoadedWhenUsed

    read: list[str] = []
    alive: list[weakref.ref] = []

    def load(role: str):
        gc.collect()
        assert not any(leaf() is not None for leaf in alive), f"{read[-1]} is still in memory, {role} is read"
        read.append(role)
        tree = jax.tree.map(jnp.copy, tiny_pipeline.params[role])
        alive[:] = map(weakref.ref, jax.tree.leaves(tree))
        return tree

    params = LoadedWhenUsed({role: lambda role=role: load(role) for role in tiny_pipeline.params})
    pipe = Pipeline(tiny_pipeline.preset, params)
    np.testing.assert_array_equal(video(pipe, ask(5)), video(tiny_pipeline, ask(5)))
    assert read == ["text", "image", "vae", "dit", "vae"]
    del read[:]
    options = dataclasses.replace(OPTIONS, long_video="chained", window=13)
    np.testing.assert_array_equal(video(pipe, ask(17), options), video(tiny_pipeline, ask(17), options))
    assert read == ["text", "image", *["vae", "dit", "vae"] * 2]
