"""The small grammar of prompts: motion, expression, camera. Text decides these, audio the mouth, image the identity.

Its words are `config.PUPPET_WORDS`, which the demo's tokenizer is made of.
"""

import numpy as np

from emv3_jax.puppets.world import CAMERAS, EXPRESSIONS, MOTIONS

MOTION_WORDS = {
    "still": ("sits still", "keeps still", "does not move"),
    "nod": ("nods", "nods its head", "is nodding"),
    "shake": ("shakes its head", "is shaking its head", "turns its head from side to side"),
    "sway": ("sways", "is swaying", "sways from side to side"),
    "wave": ("waves its hand", "waves", "is waving its hand"),
}
EXPRESSION_WORDS = {
    "calm": ("looks calm", "is calm"),
    "happy": ("looks happy", "smiles", "is happy"),
    "sad": ("looks sad", "is sad"),
    "angry": ("looks angry", "frowns", "is angry"),
    "surprised": ("looks surprised", "is surprised"),
}
CAMERA_WORDS = {
    "fixed": ("the camera is still", "the camera does not move"),
    "zoom": ("the camera zooms in slowly", "slow zoom", "the camera slowly zooms in"),
}
SUBJECTS = ("a puppet", "the puppet")


def make_prompt(motion: str, expression: str, camera: str, rng: np.random.Generator) -> str:
    """A sentence that says motion, expression and camera, in words chosen by rng."""
    pick = lambda options: options[rng.integers(len(options))]  # noqa: E731
    first, second = pick(MOTION_WORDS[motion]), pick(EXPRESSION_WORDS[expression])
    if rng.uniform() < 0.5:
        first, second = second, first
    sentence = f"{pick(SUBJECTS)} {first} and {second}, {pick(CAMERA_WORDS[camera])}."
    return sentence[0].upper() + sentence[1:]


assert set(MOTION_WORDS) == set(MOTIONS) and set(EXPRESSION_WORDS) == set(EXPRESSIONS)
assert set(CAMERA_WORDS) == set(CAMERAS)
