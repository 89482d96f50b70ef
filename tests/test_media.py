"""Media files: what is read and written comes back, and every unusable file gives one clear line."""

import os
import struct
import sys
import zlib

import av
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from PIL import Image

from emv3_jax.errors import UserError
from emv3_jax.media import (
    VideoWriter,
    atomic_path,
    check_image,
    check_wave,
    check_writable,
    contact_sheet,
    fit_image,
    load_audio,
    load_image,
    read_video,
    to_uint8,
)

RATE = 16000


def gradient(height=40, width=60):
    """uint8 [H, W, 3] that differs in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), 128 + 0 * x], -1).astype(np.uint8)


def tone(seconds=1.0, rate=RATE, hertz=440.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def says(call, *words):
    """Asserts that `call` raises UserError with one line that holds all `words`."""
    with pytest.raises(UserError) as info:
        call()
    message = str(info.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# Images


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".tiff"])
def test_lossless_images_come_back_exactly(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(gradient()).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    image, notes = load_image(path)
    np.testing.assert_array_equal(image, gradient())
    assert image.dtype == np.uint8 and notes == []


def test_jpeg_is_turned_upright_by_its_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to show
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image, _ = load_image(tmp_path / "a.jpg")
    np.testing.assert_allclose(image.astype(int), np.rot90(gradient(), -1).astype(int), atol=12)


def test_transparent_parts_are_laid_over_white_and_noted(tmp_path):
    rgba = np.dstack([gradient(), np.full((40, 60), 255, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "opaque.png")
    rgba[:, :30, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "half.png")
    assert load_image(tmp_path / "opaque.png")[1] == []
    image, notes = load_image(tmp_path / "half.png")
    assert (image[:, :30] == 255).all()
    np.testing.assert_array_equal(image[:, 30:], gradient()[:, 30:])
    assert "white" in notes[0]


def test_modes_become_eight_bit_rgb(tmp_path):
    grey = gradient()[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(gradient()).quantize(256).save(tmp_path / "palette.png")
    Image.fromarray(gradient()).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    for name in ("sixteen", "grey"):
        np.testing.assert_array_equal(load_image(tmp_path / f"{name}.png")[0], np.dstack([grey] * 3))
    for name in ("palette.png", "cmyk.jpg"):
        image = load_image(tmp_path / name)[0]
        assert np.abs(image.astype(int) - gradient()).mean() < 12


def test_first_frame_of_an_animation_is_used_and_noted(tmp_path):
    frames = [Image.fromarray(gradient() // n) for n in (1, 2, 3)]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        image, notes = load_image(tmp_path / name)
        assert np.abs(image.astype(int) - gradient()).mean() < 16
        assert "3 frames" in notes[0]


def test_unusable_images_are_refused_in_one_line(tmp_path):
    good = tmp_path / "good.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(good)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:6000])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("RGB", (1, 1)).save(tmp_path / "pixel.png")
    Image.new("RGB", (15, 400)).save(tmp_path / "thin.png")
    says(lambda: load_image(tmp_path / "missing.png"), "missing.png", "does not exist")
    says(lambda: load_image(tmp_path), "directory")
    says(lambda: load_image(tmp_path / "empty.png"), "empty")
    says(lambda: load_image(tmp_path / "text.png"), "PNG, JPEG or WebP")
    says(lambda: load_image(tmp_path / "cut.png"), "damaged or cut off")
    says(lambda: load_image(tmp_path / "pixel.png"), "1x1", "16")
    says(lambda: load_image(tmp_path / "thin.png"), "15x400")
    says(lambda: load_image(os.devnull), "not a regular file")


@pytest.mark.parametrize("side", [10_100, 60_000])
def test_gigantic_images_are_refused_from_their_header(tmp_path, side):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    says(lambda: load_image(tmp_path / "bomb.png"), "100 megapixels")


def test_arrays_must_be_pictures_of_a_usable_size():
    np.testing.assert_array_equal(check_image(gradient()), gradient())
    says(lambda: check_image(np.zeros((1, 1, 3), np.uint8)), "image is 1x1: both sides must be at least 16 pixels")
    says(lambda: check_image(np.zeros((400, 15, 3), np.uint8)), "15x400")
    huge = np.broadcast_to(np.uint8(0), (10_100, 10_100, 3))
    says(lambda: check_image(huge), "image is 10100x10100, over 100 megapixels")
    for bad in (gradient() / 255.0, gradient()[..., 0], gradient()[..., :2], "RGB"):
        says(lambda bad=bad: check_image(bad), "image must be a path or uint8 [H, W, 3]")


def test_to_uint8_rounds_and_clips():
    np.testing.assert_array_equal(to_uint8(np.array([-3.0, -1.0, 0.0, 0.999, 1.0, 5.0])), [0, 0, 128, 255, 255, 255])
    everything = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(everything.astype(np.float32) / 127.5 - 1.0), everything)
    assert to_uint8(jnp.zeros((2, 3))).dtype == np.uint8


def test_fit_image_keeps_proportions_and_says_what_it_cut():
    same, note = fit_image(gradient(), 40, 60)
    assert note is None and same.shape == (40, 60, 3)
    fitted, note = fit_image(gradient(40, 60), 20, 20)
    assert fitted.shape == (20, 20, 3) and fitted.dtype == np.uint8
    assert "60x40" in note and "20x20" in note and "33% of its width" in note
    # The cut is centred: the middle stays the middle, and the red ramp spans the middle two thirds.
    np.testing.assert_allclose(fitted[10, [0, 19], 0], [255 / 6 + 4, 255 * 5 / 6 - 4], atol=8)
    assert "enlarged" in fit_image(gradient(20, 20), 64, 64)[1]


# Sound


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_sound_formats_come_back_at_the_right_pitch(tmp_path, name, rate):
    stereo = np.stack([tone(1.0, rate), tone(1.0, rate)], -1)
    soundfile.write(tmp_path / name, stereo, rate)
    wave, notes = load_audio(tmp_path / name, RATE)
    assert wave.dtype == np.float32 and wave.ndim == 1 and notes == []
    assert abs(len(wave) - RATE) <= 0.1 * RATE  # mp3 pads
    spectrum = np.abs(np.fft.rfft(wave[:RATE] * np.hanning(len(wave[:RATE]))))
    assert abs(spectrum.argmax() * RATE / len(wave[:RATE]) - 440) < 3
    assert abs(np.abs(wave[2000:-2000]).max() - 0.5) < 0.03


def test_sound_is_mixed_resampled_cut_and_scaled(tmp_path):
    left, right = tone(1.0, 48000), np.zeros(48000, np.float32)
    soundfile.write(tmp_path / "two.wav", np.stack([left, right], -1), 48000)
    wave, _ = load_audio(tmp_path / "two.wav", RATE)
    np.testing.assert_allclose(wave[500:-500], 0.5 * tone()[500:-500], atol=2e-3)
    cut, notes = load_audio(tmp_path / "two.wav", RATE, max_seconds=0.25)
    assert len(cut) == RATE // 4 and "0.25 s" in notes[0]
    soundfile.write(tmp_path / "opposed.wav", np.stack([left, -left], -1), 48000)
    wave, notes = load_audio(tmp_path / "opposed.wav", RATE)
    assert np.abs(wave).max() > 0.4 and "cancel" in notes[0]
    soundfile.write(tmp_path / "loud.wav", 8 * tone(), RATE, subtype="FLOAT")
    wave, notes = load_audio(tmp_path / "loud.wav", RATE)
    assert abs(np.abs(wave).max() - 1) < 1e-5 and "full scale" in notes[0]


def test_silence_is_allowed_and_noted(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), RATE)
    wave, notes = load_audio(tmp_path / "a.wav")
    assert len(wave) == 8000 and not wave.any() and "silent" in notes[0]


def test_unusable_recordings_are_refused_in_one_line(tmp_path):
    bad = tone()
    bad[100] = np.nan
    soundfile.write(tmp_path / "nan.wav", bad, RATE, subtype="FLOAT")
    bad[100] = np.inf
    soundfile.write(tmp_path / "inf.wav", bad, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "slow.wav", tone(rate=100), 100)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("hello " * 100)
    (tmp_path / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "noise.raw").write_bytes(np.random.default_rng(0).bytes(5000))
    Image.fromarray(gradient()).save(tmp_path / "picture.png")
    says(lambda: load_audio(tmp_path / "missing.wav"), "does not exist")
    says(lambda: load_audio(tmp_path), "directory")
    says(lambda: load_audio(tmp_path / "empty.wav"), "empty")
    says(lambda: load_audio(tmp_path / "none.wav"), "0 samples")
    says(lambda: load_audio(tmp_path / "nan.wav"), "NaN")
    says(lambda: load_audio(tmp_path / "inf.wav"), "NaN or infinite")
    says(lambda: load_audio(tmp_path / "slow.wav"), "100 samples a second")
    for name in ("text.wav", "noise.mp3", "noise.raw", "picture.png"):
        says(lambda name=name: load_audio(tmp_path / name), name)


def test_arrays_are_treated_like_files():
    wave, notes = check_wave(tone().astype(np.float64))
    assert wave.dtype == np.float32 and notes == []
    np.testing.assert_array_equal(wave, tone())
    assert check_wave(np.zeros(100, np.float32))[1] == ["the sound is silent"]
    wave, notes = check_wave(np.float64(32767) * tone())
    np.testing.assert_allclose(wave, 2 * tone(), atol=1e-4)
    assert notes == ["the sound exceeds full scale (peak 1.64e+04): it is scaled down"]
    wave, _ = check_wave(np.array([1e300, -1e299]))
    np.testing.assert_allclose(wave, [1.0, -0.1])
    for bad in (np.zeros(0, np.float32), np.zeros((9, 2), np.float32), np.zeros(9, np.int16), np.full(9, np.inf), [1]):
        says(lambda bad=bad: check_wave(bad), "audio must be a path or finite floats [n] at 16 kHz")


# Recordings that end too early


def cut_copy(path, share):
    """The first part of a file, beside it."""
    data = path.read_bytes()
    target = path.with_name(f"cut_{path.name}")
    target.write_bytes(data[: int(share * len(data))])
    return target


def write_with_ffmpeg(path, wave, codec, **options):
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate = 48000
        size = stream.codec_context.frame_size
        resampler = av.AudioResampler(stream.codec_context.format, "mono", 48000, frame_size=size)
        for block in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(block))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Four seconds of noise in every format."""
    folder = tmp_path_factory.mktemp("recordings")
    noise = (0.1 * np.random.default_rng(0).standard_normal(4 * 48000)).astype(np.float32)
    for name in ("a.wav", "a.aiff", "a.au", "a.w64", "a.flac", "a.ogg", "a.mp3"):
        soundfile.write(folder / name, noise, 48000)
    soundfile.write(folder / "b.wav", noise, 48000, format="RF64")
    soundfile.write(folder / "opus.ogg", noise, 48000, subtype="OPUS")
    write_with_ffmpeg(folder / "a.m4a", noise, "aac", movflags="+faststart")
    write_with_ffmpeg(folder / "a.webm", noise, "libopus")
    return folder


TOLD = ["a.wav", "b.wav", "a.aiff", "a.au", "a.w64", "a.flac", "a.mp3", "a.m4a", "a.webm"]  # the header has the length


@pytest.mark.parametrize("name", [*TOLD, "a.ogg", "opus.ogg"])
def test_a_truncated_recording_says_how_much_is_missing(recordings, name):
    assert load_audio(recordings / name)[1] == []
    path = cut_copy(recordings / name, 0.6)
    wave, (note,) = load_audio(path)
    assert 1.0 < len(wave) / RATE < 2.8
    read = f"{len(wave) / RATE:.2f} s"
    assert note.startswith(f"recording {path} is cut off or damaged: only the first {read} of ")
    if name in TOLD:
        whole = float(note.removesuffix(" s can be read").split()[-1])
        assert whole == pytest.approx(4.0, abs=0.05)
    # Of no interest to who wants less than is there.
    assert load_audio(path, max_seconds=0.5)[1] == [f"recording {path} is longer than 0.5 s: the rest is cut off"]


def test_a_truncated_recording_of_which_nothing_is_left(recordings):
    for name in (*TOLD, "a.ogg"):
        path = cut_copy(recordings / name, 20 / (recordings / name).stat().st_size)
        says(lambda path=path: load_audio(path), f"recording {path} ")


def test_a_wav_of_unannounced_length_is_whole(recordings, tmp_path):
    """Programs that write into a pipe cannot go back to say how long it became."""
    data = bytearray((recordings / "a.wav").read_bytes())
    at = data.index(b"data") + 4
    for size in (0xFFFFFFFF, 0x7FFFFFFF):
        data[4:8] = data[at : at + 4] = struct.pack("<I", size)
        (tmp_path / "a.wav").write_bytes(data)
        wave, notes = load_audio(tmp_path / "a.wav")
        assert len(wave) == 4 * RATE and notes == []


def test_an_mp3_without_a_header_is_read_whole(tmp_path):
    """Its bitrate varies: what the size of the first frame says of the length is wrong."""
    wave = np.concatenate([0.1 * np.random.default_rng(0).standard_normal(RATE), np.zeros(5 * RATE)])
    options = {"subtype": "MPEG_LAYER_III", "bitrate_mode": "VARIABLE", "compression_level": 0.3}
    soundfile.write(tmp_path / "a.mp3", wave, RATE, **options)
    data = (tmp_path / "a.mp3").read_bytes()
    frames = data[data.index(b"\xff", data.index(b"Xing")) :]
    titles = b"ID3\x04\0\0" + bytes([0, 0, 0x27, 0x10]) + bytes(5008)  # 39 * 128 + 16
    for name, content in {"bare": frames, "titled": titles + frames}.items():
        (tmp_path / f"{name}.mp3").write_bytes(content)
        back, notes = load_audio(tmp_path / f"{name}.mp3")
        assert abs(len(back) / RATE - 6) < 0.3 and notes == []
    (tmp_path / "long_titles.mp3").write_bytes(titles + data[: len(data) // 2])
    assert "of 6.00 s can be read" in load_audio(tmp_path / "long_titles.mp3")[1][0]


# Video


def clip(frames=13, height=64, width=48):
    """A white square that moves over a red and blue field: uint8 [F, H, W, 3]."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[:, :, : width // 2], video[:, :, width // 2 :] = (200, 40, 30), (20, 30, 210)
    for i in range(frames):
        video[i, 8:24, 2 * i : 2 * i + 16] = 255
    return video


def clicks(seconds):
    wave = np.zeros(round(seconds * RATE), np.float32)
    for start in range(2000, len(wave) - 400, 4000):
        wave[start : start + 400] = 0.7 * np.sin(np.arange(400) * 0.5)
    return wave


def test_video_and_sound_come_back(tmp_path):
    path = tmp_path / "deep" / "er" / "a.mp4"
    frames, wave = clip(26), clicks(26 / 25)
    with VideoWriter(path, 64, 48, wave=wave) as writer:
        writer.write(frames[0])
        writer.write(frames[1:9])
        writer.write(frames[9:])
    back, fps, sound = read_video(path, RATE)
    assert fps == 25 and back.shape == frames.shape and len(sound) == len(wave)
    assert np.abs(back.astype(int) - frames).mean() < 4
    np.testing.assert_allclose(back[5, 50, [5, 40]].astype(int), frames[5, 50, [5, 40]].astype(int), atol=6)  # colours
    assert np.corrcoef(sound, wave)[0, 1] > 0.98  # in time, to the sample
    with av.open(str(path)) as container:
        picture, audio = container.streams
        assert (picture.codec_context.name, picture.pix_fmt, audio.codec_context.name) == ("h264", "yuv420p", "aac")
        assert container.duration == pytest.approx(26 / 25 * 1e6, abs=1e5)
    content = path.read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat")  # starts to play before it is all there
    assert os.listdir(path.parent) == ["a.mp4"]


@pytest.mark.parametrize(("scale", "shape"), [(1, (34, 22)), (4, (132, 84))])
def test_odd_and_enlarged_sizes_are_even_in_the_file(tmp_path, scale, shape):
    with VideoWriter(tmp_path / "a.mp4", 33, 21, scale=scale) as writer:
        writer.write(clip(5, 33, 21))
    back, _, sound = read_video(tmp_path / "a.mp4")
    assert back.shape == (5, *shape, 3) and sound is None


@pytest.mark.parametrize("length", [0, 3000, 50_000])
def test_sound_is_cut_or_padded_to_the_frames(tmp_path, length):
    with VideoWriter(tmp_path / "a.mp4", 64, 48, wave=np.ones(length, np.float32) * 0.1, rate=RATE) as writer:
        writer.write(clip(13))
    assert len(read_video(tmp_path / "a.mp4", RATE)[2]) == round(13 / 25 * RATE)


def test_unusual_rates_and_limits(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 64, 48, fps=30000 / 1001, wave=tone(1, 9000), rate=9000) as writer:
        writer.write(clip(15))
    frames, fps, sound = read_video(tmp_path / "a.mp4", RATE, max_seconds=0.2)
    assert fps == pytest.approx(29.97, abs=0.01) and len(frames) == 6 and len(sound) == round(6 / fps * RATE)


def test_same_input_gives_the_same_file(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        with VideoWriter(tmp_path / name, 64, 48, wave=clicks(0.5)) as writer:
            writer.write(clip())
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_half_written_after_an_exception(tmp_path, error):
    path = tmp_path / "a.mp4"
    path.write_text("yesterday's")
    with pytest.raises(error), VideoWriter(path, 64, 48, wave=clicks(1)) as writer:
        writer.write(clip())
        raise error
    assert os.listdir(tmp_path) == ["a.mp4"] and path.read_text() == "yesterday's"


def test_wrong_frames_and_no_frames_leave_nothing(tmp_path):
    for frames in (clip().astype(np.float32), clip(5, 64, 64)):
        with pytest.raises(ValueError, match="frames must be"), VideoWriter(tmp_path / "a.mp4", 64, 48) as writer:
            writer.write(frames)
    with pytest.raises(ValueError, match="no frame"), VideoWriter(tmp_path / "a.mp4", 64, 48):
        pass
    assert os.listdir(tmp_path) == []


def test_unusable_videos_are_refused_in_one_line(tmp_path):
    with VideoWriter(tmp_path / "good.mp4", 64, 48) as writer:
        writer.write(clip())
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:500])
    (tmp_path / "text.mp4").write_text("hello " * 100)
    soundfile.write(tmp_path / "sound.wav", tone(), RATE)
    says(lambda: read_video(tmp_path / "missing.mp4"), "does not exist")
    for name in ("cut.mp4", "text.mp4", "sound.wav"):
        says(lambda name=name: read_video(tmp_path / name), name)
    says(lambda: load_audio(tmp_path / "good.mp4"), "no sound track")


# Contact sheet and output paths


@pytest.mark.parametrize("frames", [1, 9, 40])
@pytest.mark.parametrize("wave", [None, np.zeros(0, np.float32), tone(2)], ids=["none", "empty", "tone"])
def test_contact_sheet_of_any_length(tmp_path, frames, wave):
    path = contact_sheet(
        dict(enumerate(clip(frames))), frames, wave, RATE, 25, tmp_path / "a.png", "A prompt\nof two lines " * 9
    )
    with Image.open(path) as page:
        assert page.format == "PNG" and page.width >= 300
        assert len(page.getcolors(1 << 24)) > 50
    assert os.listdir(tmp_path) == ["a.png"]


def test_outputs_that_cannot_be_written_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    assert check_writable(tmp_path / "new" / "a.mp4", [".mp4"]) == tmp_path / "new" / "a.mp4"
    assert (tmp_path / "new").is_dir() and not os.listdir(tmp_path / "new")
    says(lambda: check_writable(tmp_path / "new", [".mp4"]), "is a directory")
    says(lambda: check_writable(tmp_path / "a.avi", [".mp4", ".webm"]), "must end in .mp4 or .webm")
    says(lambda: check_writable(tmp_path / "file" / "a.mp4"), "which is a file")
    says(lambda: check_writable(tmp_path / "file" / "b" / "a.mp4"), "which is a file")
    says(lambda: check_writable(tmp_path / ("a" * 300 + ".mp4")), "cannot be written")
    says(lambda: check_writable(os.devnull), "not a regular file")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_outputs_without_permission_are_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    says(lambda: check_writable(tmp_path / "locked" / "a.mp4"), "permission denied")
    (tmp_path / "old.mp4").touch(mode=0o400)
    says(lambda: check_writable(tmp_path / "old.mp4"), "read-only")


def test_atomic_path_renames_at_the_end_and_keeps_ordinary_permissions(tmp_path):
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a.txt").exists()
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "a.txt").read_text() == "new"
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    says(lambda: _fail_inside(tmp_path / "b.txt"), "could not be written", "no space")
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "ordinary"]


def _fail_inside(path):
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")


def test_shipped_sentences_are_speech_at_the_rate_of_the_models():
    folder = os.path.join(os.path.dirname(sys.modules["emv3_jax"].__file__), "puppets", "assets")
    names = [name for name in os.listdir(folder) if not name.endswith(".txt")]
    assert "demo_sentence.wav" in names
    for name in names:
        assert soundfile.info(os.path.join(folder, name)).samplerate == RATE
        wave, notes = load_audio(os.path.join(folder, name))
        assert notes == [] and 2 < len(wave) / RATE < 6 and len(wave) % 640 == 0 and (len(wave) // 640) % 4 == 1


def test_flac_whose_header_has_no_length_is_read_whole(tmp_path):
    path = tmp_path / "streamed.flac"
    soundfile.write(path, 0.1 * np.sin(np.arange(16000) * 0.1), 16000)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # STREAMINFO: the last 36 bits before the checksum count the samples; 0 is "unknown"
    data[22:26] = bytes(4)
    path.write_bytes(data)
    wave, _ = load_audio(path)
    assert abs(len(wave) - 16000) < 10
