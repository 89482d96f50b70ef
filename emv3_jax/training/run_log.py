"""Where a run writes what it sees: TensorBoard events and one JSON object a line."""

import json
import pathlib
import time

import numpy as np


class RunLog:
    """Writes scalars and images of a run into `workdir`: `metrics.jsonl` and TensorBoard event files."""

    def __init__(self, workdir: pathlib.Path):
        from tensorboardX import SummaryWriter

        workdir.mkdir(parents=True, exist_ok=True)
        self._board = SummaryWriter(str(workdir / "tensorboard"))
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
