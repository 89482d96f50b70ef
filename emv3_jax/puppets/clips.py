"""Clips of the small world: who says what, how it moves, and the pictures that follow; all from (split, index)."""

import dataclasses
import functools

import numpy as np

from emv3_jax.config import FPS, RATE
from emv3_jax.puppets import law, prompts, renderer, voice, world

REST_SHARE = 0.7  # of the clips whose first frame is a portrait at rest, its mouth closed whatever is being said


@dataclasses.dataclass(frozen=True)
class Clip:
    """One talking puppet. `wave` [n] at 16 kHz; `mouth` [F, 2] by the law; `pose` leaves [F]."""

    identity: world.Identity
    motion: str
    expression: str
    camera: str
    prompt: str
    wave: np.ndarray
    mouth: np.ndarray
    pose: world.Pose
    blinks: np.ndarray

    def render(self, size: int = 64, parts: bool = False):
        """The true video [F, size, size, 3] in [-1, 1] (and, with `parts`, what is seen of each part)."""
        return renderer.render_clip(self.identity, self.pose, size, size, parts)

    def with_motion(self, motion: str) -> "Clip":
        """The same clip had its prompt named another motion."""
        pose = world.pose_clip(self.mouth, motion, self.expression, self.camera, self.blinks)
        return dataclasses.replace(self, motion=motion, pose=pose)


def sample_blinks(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Seconds at which the eyes close: the first after 0.4 s, then every 2 to 4 s."""
    moments = [rng.uniform(0.4, 3.0)]
    while moments[-1] < seconds:
        moments.append(moments[-1] + rng.uniform(2.0, 4.0))
    return np.array(moments)


def make_clip(split: str, index: int, frames: int, wave: np.ndarray | None = None) -> Clip:
    """Clip number `index` of a split.

    Args:
      split: one of world.SPLITS.
      index: any number from 0; identity, sentence, voice, motion, expression and camera follow from it.
      frames: 4k+1.
      wave: says this recording (16 kHz) instead of the sentence.
    """
    rng = world.generator(split, "clip", index)
    motion, expression, camera = (
        str(rng.choice(options)) for options in (world.MOTIONS, world.EXPRESSIONS, world.CAMERAS)
    )
    seconds = frames / FPS
    blinks = sample_blinks(rng, seconds)
    prompt = prompts.make_prompt(motion, expression, camera, rng)
    if wave is None:
        skipped = rng.uniform(0.0, 2.0)  # a clip may start anywhere in a sentence
        wave = voice.speak(split, index, voice.sample_voice(split, index), seconds + skipped)
        wave = wave[-round(seconds * RATE) :]
    mouth = law.mouth_law(wave, frames)
    if rng.uniform() < REST_SHARE:
        mouth[0, 0] = 0.0
    pose = world.pose_clip(mouth, motion, expression, camera, blinks)
    identity = world.sample_identity(split, index)
    return Clip(identity, motion, expression, camera, prompt, wave, mouth, pose, blinks)


@functools.lru_cache(maxsize=2)
def _bank(split: str, identities: int, sentences: int) -> tuple[world.Identity, np.ndarray]:
    """Stacked identities, and mouths [sentences, 500, 2] of as many sentences of 20 s."""
    who = world.stack_identities([world.sample_identity(split, i) for i in range(identities)])
    waves = (voice.speak(split, i, voice.sample_voice(split, i), 20.0) for i in range(sentences))
    return who, np.stack([law.mouth_law(wave, 500) for wave in waves])


def sample_crops(rng: np.random.Generator, batch: int, frames: int, size: int, picture: int = 64, split: str = "train",
                 identities: int = 4096, sentences: int = 64) -> np.ndarray:  # fmt: skip
    """Random pieces of random clips, for training the VAE.

    Three in five lie around the mouth, for that is what must survive the codec.

    Returns:
      video [batch, frames, size, size, 3] in [-1, 1].
    """
    who, mouths = _bank(split, identities, sentences)
    pick = rng.integers(identities, size=batch)
    chosen = world.Identity(**{k: getattr(who, k)[pick] for k in world.Identity.__dataclass_fields__})
    poses, grids = [], []
    full = renderer.pixel_grid(picture, picture)
    for _ in range(batch):
        at = rng.integers(mouths.shape[1] - frames)
        mouth = mouths[rng.integers(len(mouths)), at : at + frames]
        motion, expression, camera = (
            str(rng.choice(options)) for options in (world.MOTIONS, world.EXPRESSIONS, world.CAMERAS)
        )
        start = float(rng.choice([0.0, rng.uniform(0.0, 5.0)]))
        blinks = start + np.array([rng.uniform(0, 3)])
        poses.append(world.pose_clip(mouth, motion, expression, camera, blinks, start=start))
        room = picture - size
        if rng.uniform() < 0.6:
            y = renderer.HEAD_Y + renderer.MOUTH_DROP - size / picture / 2
            top, left = np.array([y, 0.5 - size / picture / 2]) * picture + rng.normal(0, 0.16 * size, 2)
        else:
            top, left = rng.uniform(0, room + 1, 2)
        top, left = (int(np.clip(v, 0, room)) for v in (top, left))
        grids.append(full[top : top + size, left : left + size])
    pose = world.Pose(**{k: np.stack([getattr(p, k) for p in poses]) for k in world.Pose.__dataclass_fields__})
    return renderer.render_batch(chosen, pose, np.stack(grids), 1.0 / picture)
