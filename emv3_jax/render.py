"""From a request that was read to its frames: windows of any number, latents in a folder, pixels as they are decoded.

Nothing here grows with the length of the video but the sound and its features: latents and the solver's state are in
files (`diffusion.store`), the model sees a window at a time, and the decoder a latent frame at a time.

Axes: F video frames, T latent frames, A audio features, P prompts, S latent frames of a window.
"""

import dataclasses
import functools
import hashlib
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emv3_jax import conditioning, media, sharding, steps, tasks, timeline
from emv3_jax.audio_preprocessing import FEATURES_PER_FRAME
from emv3_jax.config import FPS, Preset
from emv3_jax.contexts import Shared, Window
from emv3_jax.diffusion import guidance, long_video
from emv3_jax.diffusion.sampler import OnStep
from emv3_jax.diffusion.store import FrameFile, Store, claim
from emv3_jax.errors import UserError
from emv3_jax.files import file_hash
from emv3_jax.models import vae as vae_model
from emv3_jax.models.audio_tokens import audio_encoder
from emv3_jax.options import SamplingOptions
from emv3_jax.request import Box, Ready, given_pixels, scaled

HANDED_ON = 8  # chained form: so many last frames of a chunk are given to the next (SPEC section 4)
MEMORY_SHARE = 0.8  # of a device's free memory that batches of windows may take
FEATHER = 1 / 8  # lip sync: this share of the mouth box fades into the video on every side, inside the box
Tell = Callable[[str], None]
Given = Callable[[int, int], np.ndarray]  # given(first, last) -> [last - first, h, w, 4 + 16]
Noises = Callable[[int, int], np.ndarray]  # noises(first, last) -> numbers of the noises that they begin with


@dataclasses.dataclass(frozen=True)
class Clip:
    """What is followed in one go: a whole video, or a chunk of one in the chained form.

    features: [A, ...] of its sound. share: [P, T], how much each prompt counts. given: of a window. noises: of some of
    its latent frames. number: of the chunk, from 0.
    """

    features: np.ndarray
    share: np.ndarray
    given: Given
    noises: Noises
    number: int = 0

    @property
    def latent_frames(self) -> int:
        return self.share.shape[1]


def stream(
    pipe: Any, ready: Ready, options: SamplingOptions, on_step: OnStep | None, folder: pathlib.Path | None, tell: Tell
) -> Iterator[np.ndarray]:
    """See `Pipeline.stream`, whose arguments these are."""
    check(ready, options, pipe.preset)
    ready = shortened(ready, options, pipe.preset)
    if folder is not None:
        claim(folder, settings_of(pipe, ready, options))
    return _frames(pipe, ready, options, on_step, folder, tell)


def _frames(
    pipe: Any, ready: Ready, options: SamplingOptions, on_step: OnStep | None, folder: pathlib.Path | None, tell: Tell
) -> Iterator[np.ndarray]:
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="emv3_render_") as temporary:
            yield from _frames(pipe, ready, options, on_step, pathlib.Path(temporary), tell)
        return
    run = Run(pipe, ready, options, folder, tell)
    if chunks := chunk_lengths(ready, options, pipe.preset):
        tell(f"long video: {len(chunks)} chunks, form {options.long_video}, noise {options.noise_name}")
        frames = run.chained(chunks, on_step)
    else:
        windows = options.windows(pipe.preset.vae.latent_frames(run.frames), pipe.preset.max_frames)
        if len(windows.starts) > 1:
            tell(f"long video: {len(windows.starts)} windows, form {options.long_video}, noise {options.noise_name}")
        frames = _first(ready.frames, run.decode(run.follow(run.whole(windows), windows, on_step)))
    if ready.match_colours:
        frames = media.matched_to_first(frames)
    yield from frames if ready.video is None else run.dubbed(frames)


def check(ready: Ready, options: SamplingOptions, preset: Preset) -> None:
    """Whether a request and options go together; before any work.

    Raises:
      UserError: windows that cannot overlap so far, or of which one has nothing to make; or a task or a length that the
        chained form, which has no windows, does not take.
    """
    if options.long_video != "chained":
        windows = options.windows(preset.vae.latent_frames(ready.frames), preset.max_frames)
        if min(windows.sizes) == 1 and ready.task in ("i2v", "flf2v"):
            raise UserError(
                "the last window is one given frame, with nothing to make: change overlap, window or frames"
            )
        return
    if ready.frames <= (options.window or preset.max_frames):
        return
    if ready.task not in ("i2v", "t2v"):
        raise UserError(f"the chained form does not know the task {ready.task}: use long_video cfg")
    if 0 < options.window <= HANDED_ON:
        raise UserError(f"the chained form hands on {HANDED_ON} frames: window must be longer, got {options.window}")


def chunk_lengths(ready: Ready, options: SamplingOptions, preset: Preset) -> list[int]:
    """Video frames of each chunk of the chained form, of which neighbours share HANDED_ON; none for other videos.

    All are as long as a window, or, without `whole_chunks`, the last has only the 4k + 1 frames that are left for it.
    """
    length = options.window or preset.max_frames
    if options.long_video != "chained" or ready.frames <= length:
        return []
    before = -(-(ready.frames - length) // (length - HANDED_ON))
    left = preset.vae.video_frames(preset.vae.latent_frames(ready.frames - before * (length - HANDED_ON)))
    return [length] * before + [length if preset.whole_chunks else left]


def shortened(ready: Ready, options: SamplingOptions, preset: Preset) -> Ready:
    """A request with as many frames as its chunks make (`chunk_lengths`), and a note where those are fewer."""
    chunks = chunk_lengths(ready, options, preset)
    made = sum(chunks) - HANDED_ON * (len(chunks) - 1)
    if not chunks or made >= ready.frames:
        return ready
    note = f"the last chunk has 4k + 1 frames, as released: the video ends after {made} of {ready.frames} frames"
    return dataclasses.replace(ready, frames=made, notes=(*ready.notes, note))


class Run:
    """One render: what is embedded once, and the stages that follow.

    With little memory (`LoadedWhenUsed`) one model makes room for the next: the transformer is asked for when
    the first step needs it, after what is given was encoded, and let go of before pictures are decoded.
    """

    def __init__(
        self, pipe: Any, ready: Ready, options: SamplingOptions, folder: pathlib.Path,
        tell: Tell = lambda line: None,
    ):  # fmt: skip
        self.pipe, self.ready, self.options, self.folder, self._tell = pipe, ready, options, folder, tell
        preset, self.vae = pipe.preset, pipe.preset.vae
        ids, mask = pipe.words.encode([span.text for span in ready.prompts])
        has_image = np.array([ready.task != "t2v"], np.float32)
        self._states = pipe.states(ids, mask, scaled(ready.image)[None], has_image, options)
        self.frames = self._rounded_frames()
        self.features = conditioning.audio_features(preset, ready.heard, self.frames, pipe.params)
        self.gain = conditioning.face_tokens(ready.face, *ready.size, preset.face_floored)
        self.audio = audio_encoder(preset.dit, parent=None)
        self._velocity: guidance.ModelVelocity | None = None

    @property
    def velocity(self) -> guidance.ModelVelocity:
        """The transformer with its weights, kept until pictures are decoded."""
        self._velocity = self._velocity or self.pipe.velocity()
        return self._velocity

    @functools.cached_property
    def shared(self) -> Shared:
        return steps.shared(self.velocity, *self._states)

    @functools.cached_property
    def steps(self) -> steps.Steps:
        made = steps.make_steps(self.options, self.velocity)
        for line in steps.describe(made):
            self._tell(line)
        return made

    def _rounded_frames(self) -> int:
        """Frames that are made: some more than asked for, so that few lengths are compiled for one window."""
        count, step = self.vae.latent_frames(self.ready.frames), self.pipe.preset.latent_step
        longest = self.vae.latent_frames(self.options.window or self.pipe.preset.max_frames)
        rounded = min(-(-count // step) * step, longest)
        ends_open = self.ready.task in ("i2v", "t2v")
        return self.vae.video_frames(rounded) if ends_open and count <= longest else self.ready.frames

    def whole(self, windows: long_video.Windows) -> Clip:
        """The whole video as one clip, with what its windows are given."""
        given = self._given_by_pictures(windows) if self.ready.video is None else self._given_by_video()
        shares = timeline.shares(self.ready.prompts, windows.total)
        return Clip(self.features, shares, given, self._noises(windows))

    def _noises(self, windows: long_video.Windows, before: int = 0) -> Noises:
        """before: latent frames that earlier chunks, as long as these windows, began with."""
        return lambda a, b: self.options.noises(before + np.arange(a, b), windows, self.ready.seed)

    def follow(self, clip: Clip, windows: long_video.Windows, on_step: OnStep | None) -> Store:
        """Follows a clip's velocity to the end, from where its folder stands."""
        pipe, solver, form = self.pipe, self.options.solver, self.options.long_form
        shape = pipe.frame_shape(self.ready.size)

        def start(first: int, last: int) -> tuple[np.ndarray, Any]:
            x = pipe.noise_frames(self.ready.seed, clip.noises(first, last), self.ready.size)
            return np.asarray(x), solver.init(x)

        state = jax.eval_shape(solver.init, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
        store = Store(self.folder / f"chunk_{clip.number}", shape, state, start, clip.latent_frames)
        spans = list(zip(windows.starts, windows.ends, strict=True))
        prompts = max(int(clip.share[:, a:b].any(axis=1).sum()) for a, b in spans)

        def predict(members: tuple[int, ...], x: np.ndarray, i: int, memory: Any) -> tuple[jax.Array, Any]:
            window = self._window(clip, [spans[k] for k in members], prompts)
            arguments = self.velocity, self.steps, self.shared, window, x
            with pipe.on_mesh():
                memory = steps.no_memory(*arguments) if memory is None else memory
                v, memory = steps.window_velocity(*arguments, np.int32(i), memory)
            computed = self.steps.computed
            return v, memory if computed is not None and computed[i] else None

        group = self._windows_together(clip, spans, prompts)
        long_video.follow(predict, solver, self.options.grid, windows, store, form.blend, group, on_step)
        return store

    def _windows_together(self, clip: Clip, spans: list[tuple[int, int]], prompts: int) -> int:
        """How many windows are one batch: as asked, or as many as the device has memory for, in batches of one size."""
        most = self.options.windows_together or self._fitting(clip, spans, prompts)
        batches = -(-len(spans) // min(most, len(spans)))
        return -(-len(spans) // batches)

    def _fitting(self, clip: Clip, spans: list[tuple[int, int]], prompts: int) -> int:
        """What the compiler says of one window's memory, against what the device has left. A device that says nothing
        of its memory, as a processor, takes one."""
        stats = jax.local_devices()[0].memory_stats()
        if len(spans) == 1 or not stats:
            return self._data_shards()
        window = self._window(clip, spans[:1], prompts)
        x = np.zeros((1, spans[0][1] - spans[0][0], *self.pipe.frame_shape(self.ready.size)), np.float32)
        arguments = self.velocity, self.steps, self.shared, window, x
        with self.pipe.on_mesh():
            memory = steps.no_memory(*arguments)
            compiled = steps.window_velocity.lower(*arguments, np.int32(0), memory).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        needed = max(1, analysis.temp_size_in_bytes)
        left = MEMORY_SHARE * (stats["bytes_limit"] - stats["bytes_in_use"])
        return max(1, int(left / needed)) * self._data_shards()

    def _data_shards(self) -> int:
        return 1 if self.pipe.mesh is None else self.pipe.mesh.shape[sharding.DATA]

    def _window(self, clip: Clip, spans: list[tuple[int, int]], prompts: int) -> Window:
        """A batch of windows of one size, of at most so many prompts each."""
        alone = self.options.long_form.alone
        pieces = [self.audio.piece(len(clip.features), a, b - a, alone) for a, b in spans]
        texts = [timeline.of_window(clip.share, a, b, prompts) for a, b in spans]
        return Window(
            given=np.stack([clip.given(a, b) for a, b in spans]),
            audio=np.stack([piece.cut(clip.features) for piece in pieces]),
            segments=np.stack([piece.segments for piece in pieces]),
            prompts=np.stack([numbers for numbers, _ in texts]),
            text_share=np.stack([share for _, share in texts]),
            pictures=np.zeros(len(spans), int),
            audio_gain=np.broadcast_to(self.gain, (len(spans), len(self.gain))),
        )

    def decode(self, store: Store) -> Iterator[np.ndarray]:
        """The pixels of finished latents: [1 or 4, H, W, 3] uint8 at a time."""
        self._velocity = None
        latents = (jnp.asarray(store.read_x(k, k + 1)[None]) for k in range(store.total))
        for piece in vae_model.decode_stream(self.pipe.vae, self.pipe.params["vae"], latents):
            yield media.to_uint8(long_video.finite(np.asarray(piece[0]), "decoding"))

    def chained(self, chunks: list[int], on_step: OnStep | None) -> Iterator[np.ndarray]:
        """The released default for long videos: chunks (`chunk_lengths`) of one window, each of which is given the last
        frames of the one before; the frames that two chunks share are cross-faded (SPEC section 4)."""
        count = len(chunks)
        tail: list[np.ndarray] = []
        left = self.ready.frames
        for number, length in enumerate(chunks):
            clip = self._chunk(number, number * (chunks[0] - HANDED_ON), length, tail)
            tell = _part_of(on_step, number, count)
            pieces = self.decode(self.follow(clip, long_video.Windows((0,), (clip.latent_frames,)), tell))
            held: list[np.ndarray] = []
            for j, frame in enumerate(frame for piece in pieces for frame in piece):
                if j < len(tail):
                    frame = _mixed(tail[j], frame, j / (HANDED_ON - 1))
                if number < count - 1 and j >= length - HANDED_ON:
                    held.append(frame)
                elif left:
                    yield frame[None]
                    left -= 1
            tail = held

    def _chunk(self, number: int, first: int, length: int, tail: list[np.ndarray]) -> Clip:
        """Chunk `number` of the chained form, from frame `first` on, given the last frames of the one before."""
        preset = self.pipe.preset
        rate = FEATURES_PER_FRAME if preset.dit.audio_windows is None else 1
        features = self.features[rate * first : rate * (first + length)]
        if preset.fill_silence:
            features = np.pad(features, ((0, rate * length - len(features)), *((0, 0),) * (features.ndim - 1)))
        spans = [
            dataclasses.replace(s, start=s.start - first / FPS, end=s.end - first / FPS) for s in self.ready.prompts
        ]
        video, mask = given_pixels(self.ready, length, last=False)
        if tail:
            video[: len(tail)] = scaled(np.stack(tail))
            mask = tasks.pixel_mask("continuation", length, *self.ready.size, given_frames=len(tail))
        given = np.asarray(self.pipe.given_latents(video[None], mask[None]))[0]
        # A chunk that is shorter, the last one, has the noises of the beginning of a whole one.
        whole = self.vae.latent_frames(self.options.window or preset.max_frames)
        noises = self._noises(long_video.Windows((0,), (whole,)), before=number * whole)
        shares = timeline.shares(tuple(spans), self.vae.latent_frames(length))
        return Clip(features, shares, lambda a, b: given[a:b], noises, number)

    def _given_by_pictures(self, windows: long_video.Windows) -> Given:
        """Every window is given the first frame, as in the released loop, and the last one also the last (flf2v)."""

        def kind(first: int, last: int) -> tuple[int, bool]:
            return last - first, last == windows.total and self.ready.task == "flf2v"

        made: dict[tuple[int, bool], np.ndarray] = {}
        for count, ends in {kind(*window) for window in zip(windows.starts, windows.ends, strict=True)}:
            video, mask = given_pixels(self.ready, self.vae.video_frames(count), ends)
            made[count, ends] = np.asarray(self.pipe.given_latents(video[None], mask[None]))[0]
        return lambda first, last: made[kind(first, last)]

    def _given_by_video(self) -> Given:
        """Everything but the mouth is given; encoded once, into a file."""
        pipe, ready = self.pipe, self.ready
        height, width = pipe.frame_shape(ready.size)[:2]
        channels = pipe.preset.dit.mask_channels + pipe.preset.vae.latent_channels
        file = FrameFile(self.folder / "given.f32", (height, width, channels))
        if not file.path.exists():
            mouth = tasks.box_mask(_whole_pixels(ready.mouth_made), *ready.size)[None, None, ..., None]
            mask = tasks.mask_channels(mouth)[0, 0]
            groups = _in_groups(self._video_frames(), pipe.preset.vae.temporal_factor)
            masked = (tasks.masked_video(scaled(group)[None], mouth) for group in groups)
            self.folder.mkdir(parents=True, exist_ok=True)
            with media.atomic_path(file.path) as temporary:
                part = FrameFile(temporary, file.shape)
                for k, latent in enumerate(vae_model.encode_stream(pipe.vae, pipe.params["vae"], masked)):
                    part.write(k, np.concatenate([mask, np.asarray(latent[0, 0])], axis=-1)[None])
        return file.read

    def _video_frames(self) -> Iterator[np.ndarray]:
        """As many frames of the given video as are made, 25 a second, at the model's size; the last is repeated."""
        frame, count = None, 0
        for frame in self.ready.video.frames_at(FPS, 0, self.ready.frames):
            frame = media.fit_image(frame, *self.ready.size, self.pipe.preset.fit)[0]
            yield frame
            count += 1
        assert frame is not None
        for _ in range(self.ready.frames - count):
            yield frame

    def dubbed(self, generated: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The given video with the generated mouth in its box: every frame of it that the generated ones reach.

        Outside the box the pixels are those of the video; inside they fade over from its edge.
        """
        ready, video = self.ready, self.ready.video
        assert ready.mouth is not None and ready.mouth_made is not None
        y1, y2, x1, x2 = ready.mouth
        weight = _feathered(y2 - y1, x2 - x1)[..., None]
        made = (frame for piece in generated for frame in piece)
        number, picture = -1, None
        mouths = ready.mouths
        for wanted, frame in zip(mouths, video.frames_at(ready.fps, 0, len(mouths)), strict=True):
            while number < wanted:
                picture, number = next(made), number + 1
            mouth = media.cut_and_scale(picture, ready.mouth_made, y2 - y1, x2 - x1)
            frame = frame.copy()
            frame[y1:y2, x1:x2] = np.round(_blend(frame[y1:y2, x1:x2], mouth, weight)).astype(np.uint8)
            yield frame[None]
        for _ in made:  # so that the render counts as finished
            pass


def settings_of(pipe: Any, ready: Ready, options: SamplingOptions) -> dict[str, Any]:
    """What a render's latents depend on, to tell whether a folder belongs to it; not what only memory or speed do."""
    preset, sampling = dataclasses.asdict(pipe.preset), dataclasses.asdict(options)
    for section, name in (preset["dit"], "remat"), (sampling, "windows_together"), (sampling, "branches_together"):
        del section[name]
    texts = [*(span.text for span in ready.prompts), *options.negatives.prompts]
    tokens = np.concatenate(pipe.words.encode(texts), axis=1)
    arrays = {"image": ready.image, "last image": ready.last_image, "sound": ready.heard, "tokens": tokens}
    return {
        **{name: _digest(array) for name, array in arrays.items() if array is not None},
        "task": ready.task,
        "prompt": [[span.start, str(span.end), span.text] for span in ready.prompts],
        "seed": ready.seed,
        "frames": ready.frames,
        "size": ready.size,
        "face box": ready.face,
        "mouth box": ready.mouth,
        "video": file_hash(ready.video.path) if ready.video is not None else None,
        "preset": preset,
        "phda": None if pipe.phda is None else dataclasses.asdict(pipe.phda),
        "weights": pipe.marks,
        "sampling": sampling,
    }


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def _part_of(on_step: OnStep | None, number: int, count: int) -> OnStep | None:
    """on_step for one of `count` runs, counted through."""
    return on_step and (lambda done, steps: on_step(number * steps + done, count * steps))


def _first(count: int, pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """So many frames of pieces [k, H, W, 3], whatever follows them; all pieces are taken."""
    for piece in pieces:
        if count > 0:
            yield piece[:count]
        count -= len(piece)


def _in_groups(frames: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The first frame alone, then `size` at a time: [1 or size, H, W, 3]."""
    yield next(frames)[None]
    while group := list(itertools.islice(frames, size)):
        yield np.stack(group)


def _whole_pixels(box: Box) -> tuple[int, int, int, int]:
    """The pixels that a box touches, but for what rounding has added to its sides."""
    y1, y2, x1, x2 = box
    return int(y1 + 1e-6), int(np.ceil(y2 - 1e-6)), int(x1 + 1e-6), int(np.ceil(x2 - 1e-6))


def _blend(a: np.ndarray, b: np.ndarray, weight: Any) -> np.ndarray:
    return (1.0 - weight) * a + weight * b


def _mixed(a: np.ndarray, b: np.ndarray, weight: float) -> np.ndarray:
    return np.round(_blend(a.astype(np.float32), b.astype(np.float32), weight)).astype(np.uint8)


def _feathered(height: int, width: int) -> np.ndarray:
    """[height, width]: 1 inside, falling towards the edges."""
    ramps = [
        np.clip((0.5 + np.minimum(np.arange(n), np.arange(n)[::-1])) / max(FEATHER * n, 0.5), 0, 1)
        for n in (height, width)
    ]
    return np.outer(*ramps)
