"""Negative prompts that change on the way (PNG, phase-aware negative guidance, paper section 3; SPEC section 5).

The negative branch is given a mixture of the embeddings of several prompts; a table says how much each counts at each
step. Motion negatives matter in the early phase (large t, where motion is decided), detail negatives in the late one.
The released program has a cruder form: one negative embedding that is multiplied by a factor in the first steps. There
the factor piles up and never goes away again; ours is one factor, and only in those steps.

Axes: n sampling steps, M negative prompts, K stages (steps of equal mixture).
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from emv3_jax.diffusion.flow import T_MAX
from emv3_jax.errors import UserError

# (scale, last step that it is meant for, numbers of steps [n]) -> factors of the negative embedding [n].
GROWTHS: dict[str, Callable[[float, int, np.ndarray], np.ndarray]] = {
    "steady": lambda scale, last, i: np.where(i <= last, scale, 1.0),
    "cumulative": lambda scale, last, i: scale ** (1.0 + np.minimum(i, last)),  # SPEC section 4
}


@dataclasses.dataclass(frozen=True)
class Negatives:
    """What guidance by text moves away from.

    prompt: throughout. motion, detail: where given, the first is added to the prompt at t above `bounds`, the second
    below them, and between the two they are mixed linearly; the paper names phases, not numbers. scale, steps, growth
    (`neg_scale`, `neg_steps`, `neg_growth`): at steps 0..steps the embedding is multiplied by scale, and after them by
    1 (steady); or, as released, at each of them by scale once more, and then it keeps the last factor (cumulative).
    """

    prompt: str = ""
    motion: str = ""
    detail: str = ""
    bounds: tuple[float, float] = (T_MAX / 3, T_MAX * 2 / 3)
    scale: float = 1.0
    steps: int = 0
    growth: str = "steady"

    def __post_init__(self):
        low, high = self.bounds
        if not 0 <= low < high <= T_MAX:
            raise UserError(
                f"negative_low and negative_high must satisfy 0 <= low < high <= {T_MAX:g}, got {low:g} and {high:g}"
            )
        if not np.isfinite(self.scale) or self.scale < 0:
            raise UserError(f"neg_scale must be a number of 0 or more, got {self.scale}")
        if self.steps < 0:
            raise UserError(f"neg_steps must be 0 or more, got {self.steps}")
        if self.growth not in GROWTHS:
            raise UserError(f"there is no neg_growth {self.growth!r}: one of {', '.join(GROWTHS)}")

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts to embed: the one of the early phase and the one of the late phase, or one for both."""
        if not self.motion and not self.detail:
            return (self.prompt,)
        return tuple(" ".join(part for part in (self.prompt, phase) if part) for phase in (self.motion, self.detail))

    def table(self, timesteps: np.ndarray) -> np.ndarray:
        """How much each of `prompts` counts at each step: float32 [n, M]."""
        t = np.asarray(timesteps, np.float64)
        early = np.clip((t - self.bounds[0]) / (self.bounds[1] - self.bounds[0]), 0.0, 1.0)
        mixture = np.stack([early, 1.0 - early], axis=1) if len(self.prompts) > 1 else np.ones((len(t), 1))
        factor = GROWTHS[self.growth](self.scale, self.steps, np.arange(len(t)))
        return (mixture * factor[:, None]).astype(np.float32)


def stages(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct mixtures of a table [n, M] in order of first use, [K, M], and which of them each step takes, [n]."""
    found: dict[tuple[float, ...], int] = {}
    which = np.array([found.setdefault(tuple(row), len(found)) for row in table.tolist()])
    return np.array(list(found), np.float32), which
