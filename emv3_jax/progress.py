"""How far a render is, how long its stages took, and how much memory it needed."""

import resource
import sys
import time

import jax
import numpy as np
from tqdm import tqdm

PLAIN_EVERY = 30.0  # seconds between two lines where there is no terminal
WARM_UP, SAMPLING = "conditions and warm-up", "sampling"


class Bar:
    """A progress bar with the time left; where stderr is no terminal, a line every PLAIN_EVERY seconds.

    with Bar("sampling", "step", steps) as bar:
        ...
        bar.show(done, steps)
    """

    def __init__(self, what: str, unit: str, total: int):
        self._what, self._unit = what, unit
        self._bar = tqdm(total=total, desc=what, unit=unit, disable=None)
        self._first: tuple[int, float] | None = None
        self._told = time.monotonic()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def show(self, done: int, total: int, new: int = 1) -> None:
        """So much is done, `new` of it since the last call; what was done before the first call took no time."""
        now = time.monotonic()
        if self._first is None:
            self._first = done, now
            self._bar.initial = self._bar.n = self._bar.last_print_n = done - new
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if self._bar.disable and now - self._told >= PLAIN_EVERY:
            self._told = now
            print(self._line(done, total, now), file=sys.stderr, flush=True)

    def _line(self, done: int, total: int, now: float) -> str:
        """The time left goes by what followed the first call, which may have waited for a compiler."""
        assert self._first is not None
        line, before = f"{self._what}: {done} of {total} {self._unit}s", done - self._first[0]
        if not before:
            return line
        return f"{line}, {tqdm.format_interval((total - done) * (now - self._first[1]) / before)} left"


class Clock:
    """Seconds of the stages of a render, by name. What the first step after another stage takes more than steps
    usually do is not sampling: it stands apart, as conditions and warm-up."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self._laps: dict[str, float] = {}
        self._first_steps: list[float] = []
        self._next_steps: list[float] = []
        self._stepping = False

    @property
    def total(self) -> float:
        return time.monotonic() - self._started

    @property
    def laps(self) -> dict[str, float]:
        """Seconds so far, in the order in which stages began."""
        usual = float(np.median(self._next_steps)) if self._next_steps else 0.0
        apart = [max(0.0, seconds - usual) for seconds in self._first_steps]
        steps = {WARM_UP: sum(apart), SAMPLING: sum(self._first_steps) + sum(self._next_steps) - sum(apart)}
        return {name: round(steps.get(name, seconds), 3) for name, seconds in self._laps.items()}

    def lap(self, name: str) -> None:
        """Ends a stretch of a stage."""
        now = time.monotonic()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last, self._stepping = now, False

    def step(self) -> None:
        """A sampling step ended."""
        now = time.monotonic()
        (self._next_steps if self._stepping else self._first_steps).append(now - self._last)
        self._laps = {**self._laps, WARM_UP: 0.0, SAMPLING: 0.0}  # their places; `laps` knows the seconds
        self._last, self._stepping = now, True


def peak_memory() -> dict[str, float]:
    """Most memory in use so far, in GB: of the process, and of the first accelerator."""
    peak = {"process": round(_peak_bytes() / 2**30, 3)}
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        peak["device"] = round(stats["peak_bytes_in_use"] / 2**30, 3)
    return peak


def _peak_bytes() -> int:
    """macOS counts bytes where Linux counts kilobytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
