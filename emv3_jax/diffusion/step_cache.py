"""TeaCache: which sampling steps run the transformer's blocks, and which reuse what the blocks added before.

How much the blocks' answer changes from one step to the next is estimated from the timestep alone, by the relative
change of the six modulation vectors, so the steps are known before the loop starts (SPEC section 4). At a reused step
every guidance branch adds its own residual of the last computed step.

Axes: n sampling steps, D width.
"""

import dataclasses

import numpy as np

from emv3_jax.errors import UserError

# Degree 4, highest first: relative change of the modulation -> expected change of the blocks' answer, Wan 2.1 1.3B.
WAN_1_3B = (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02)
IDENTITY = (1.0, 0.0)


@dataclasses.dataclass(frozen=True)
class StepCache:
    """When to reuse.

    threshold: a step is reused while the expected changes since the last computed one add up to less; 0 computes all.
    start_steps: so many first steps are always computed. polynomial: coefficients, highest degree first.
    """

    threshold: float
    start_steps: int = 5
    polynomial: tuple[float, ...] = WAN_1_3B

    def __post_init__(self):
        if not np.isfinite(self.threshold) or self.threshold < 0:
            raise UserError(f"the threshold of the step cache must be a number of 0 or more, got {self.threshold}")
        if self.start_steps < 1:
            raise UserError(f"the step cache must compute at least the first step, got start_steps {self.start_steps}")

    def computed_steps(self, modulation: np.ndarray) -> np.ndarray:
        """Which steps run the blocks: bool [n], from the modulation vectors of every step [n, 6, D]."""
        changes = np.polyval(np.asarray(self.polynomial), relative_change(modulation))
        computed = np.ones(len(modulation), bool)
        sum_of_changes = 0.0
        for i in range(self.start_steps, len(modulation)):
            sum_of_changes += changes[i - 1]
            computed[i] = sum_of_changes >= self.threshold
            sum_of_changes = 0.0 if computed[i] else sum_of_changes
        return computed


def relative_change(modulation: np.ndarray) -> np.ndarray:
    """mean |a_i+1 - a_i| / mean |a_i| of arrays [n, ...] -> [n - 1]."""
    rows = np.asarray(modulation, np.float64).reshape(len(modulation), -1)
    return np.abs(np.diff(rows, axis=0)).mean(1) / np.abs(rows[:-1]).mean(1)


def describe(computed: np.ndarray) -> str:
    """One line for the log: how many steps are reused, and which."""
    reused = np.flatnonzero(~computed)
    if not len(reused):
        return f"step cache: all {len(computed)} steps are computed"
    return f"step cache: {len(reused)} of {len(computed)} steps are reused: {', '.join(map(str, reused))} (from 0)"
