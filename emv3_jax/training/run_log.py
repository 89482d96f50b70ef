"""Where a run writes what it sees: TensorBoard events and one JSON object a line."""

import json
import pathlib
import time

import numpy as np

from emv3_jax.files import atomic_path


class RunLog:
    """Writes scalars and images of a run into `workdir`: `metrics.jsonl` and TensorBoard event files.

    Args:
      workdir: made if it is not there.
      step: the step that the run goes on from. What an earlier run wrote of later steps is dropped, for those steps are
        taken again: their lines are removed, and TensorBoard is told not to show their points.
    Raises:
      UserError: the lines cannot be written anew.
    """

    def __init__(self, workdir: pathlib.Path, step: int = 0):
        from tensorboardX import SummaryWriter

        workdir.mkdir(parents=True, exist_ok=True)
        _drop_later(workdir / "metrics.jsonl", step)
        # The name of an events file holds the second it was opened in; the suffix keeps two runs of one second apart.
        folder = str(workdir / "tensorboard")
        self._board = SummaryWriter(folder, purge_step=step + 1, filename_suffix=f".from{step}")
        self._lines = open(workdir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._start = time.time()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line, one point a curve."""
        values = {name: float(value) for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, "seconds": round(time.time() - self._start, 1), **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """image [H, W, 3] uint8."""
        self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._board.close()
        self._lines.close()


def _drop_later(path: pathlib.Path, step: int) -> None:
    """Removes the lines of steps after `step`, and a line that was broken off when its run was killed."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _is_of(line, step)]
    if len(kept) < len(lines):
        with atomic_path(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def _is_of(line: str, step: int) -> bool:
    """Whether a line is whole and of a step up to `step`."""
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False
