"""Where a run writes what it sees: TensorBoard events and one JSON object a line."""

import io
import json
import math
import pathlib
import time
from typing import Any

import numpy as np
from PIL import Image

from emv3_jax.config import FPS
from emv3_jax.files import atomic_path


class RunLog:
    """Writes scalars and images of a run into `workdir`: `metrics.jsonl` and TensorBoard event files.

    Args:
      workdir: made if it is not there. None: nothing is written (all processes but the first).
      step: the step that the run goes on from. What an earlier run wrote of later steps is dropped, for those steps are
        taken again: their lines are removed, and TensorBoard is told not to show their points.
    Raises:
      UserError: the lines cannot be written anew.
    """

    def __init__(self, workdir: pathlib.Path | None, step: int = 0):
        self._workdir = workdir
        if workdir is None:
            return
        from tensorboardX import SummaryWriter

        workdir.mkdir(parents=True, exist_ok=True)
        _drop_later(workdir / "metrics.jsonl", step)
        # The name of an events file holds the second it was opened in; the suffix keeps two runs of one second apart.
        folder = str(workdir / "tensorboard")
        self._board = SummaryWriter(folder, purge_step=step + 1, filename_suffix=f".from{step}")
        self._lines = open(workdir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._start = time.time()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line, one point a curve. JSON knows no infinity and no NaN: such values are null, and no points."""
        if self._workdir is None:
            return
        values = {name: float(value) for name, value in values.items()}
        self.line(step, **{name: value if math.isfinite(value) else None for name, value in values.items()})
        for name, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, step)

    def line(self, step: int, **values: Any) -> None:
        """One line, of whatever JSON can hold."""
        if self._workdir is None:
            return
        line = {"step": step, "seconds": round(time.time() - self._start, 1), **values}
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        self._lines.flush()

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture [H, W, 3] uint8, or a video [F, H, W, 3] uint8, which is kept as `samples`/NAME_STEP.mp4 too."""
        if self._workdir is None:
            return
        if picture.ndim == 3:
            self._board.add_image(name, picture, step, dataformats="HWC")
            return
        from emv3_jax.media import VideoWriter

        (self._workdir / "samples").mkdir(exist_ok=True)
        _, height, width, _ = picture.shape
        with VideoWriter(self._workdir / "samples" / f"{name}_{step:07d}.mp4", height, width) as video:
            video.write(picture)
        from tensorboardX.proto.summary_pb2 import Summary

        moving = io.BytesIO()  # TensorBoard shows a GIF as it shows a picture
        first, *rest = [Image.fromarray(frame) for frame in picture[::2]]
        first.save(moving, format="GIF", save_all=True, append_images=rest, duration=2000 // FPS, loop=0)
        image = Summary.Image(encoded_image_string=moving.getvalue(), height=height, width=width, colorspace=3)
        self._board.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self) -> None:
        """Closes the files."""
        if self._workdir is not None:
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
