"""Where a run writes what it sees: TensorBoard events and one JSON object a line."""

import contextlib
import io
import json
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from emv3_jax.config import FPS
from emv3_jax.errors import UserError, differences
from emv3_jax.files import atomic_path, reason

CONFIG = "config.json"


class RunLog:
    """Writes scalars and images of a run into `workdir`: `metrics.jsonl` and TensorBoard event files; `config.json`.

    Args:
      workdir: made if it is not there. None: nothing is written (all processes but the first).
      step: the step that the run goes on from. What an earlier run wrote of later steps is dropped, for those steps are
        taken again: their lines are removed, and TensorBoard is told not to show their points.
    Raises:
      UserError: of every method too: it cannot be written, for the disk is full, say.
    """

    def __init__(self, workdir: pathlib.Path | None, step: int = 0):
        self._workdir, self._resumed = workdir, step > 0
        self._config: dict[str, Any] | None = None  # to be written
        if workdir is None:
            return
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        with self._told():
            (workdir / "tensorboard").mkdir(parents=True, exist_ok=True)
            _drop_later(workdir / "metrics.jsonl", step)
            # The name of an events file holds the second it was opened in; the suffix keeps two runs of one second
            # apart. Not SummaryWriter: its thread dies where the disk is full, and who writes next waits for ever.
            self._board = EventsWriter(str(workdir / "tensorboard" / "events"), f".from{step}")
            self._event(step + 1, session_log=SessionLog(status=SessionLog.START))
            self._lines = open(workdir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._start = time.time()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"what the run sees could not be written to {self._workdir}: {reason(error)}; make room there, then"
                " give the same command again"
            ) from error

    def _event(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._board.write_event(Event(wall_time=time.time(), step=step, **what))
        self._board.flush()

    def settings(self, cfg: Any) -> str:
        """Says what another config a run goes on with than before, or ""; `config.json` holds it from the first line
        on that is told."""
        if self._workdir is None:
            return ""
        self._config = _as_json(cfg)
        return other_settings(self._workdir, cfg) if self._resumed else ""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line, one point a curve. JSON knows no infinity and no NaN: such values are null, and no points."""
        if self._workdir is None:
            return
        values = {name: float(value) for name, value in values.items()}
        self.line(step, **{name: value if math.isfinite(value) else None for name, value in values.items()})
        from tensorboardX.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items() if math.isfinite(value)]
        with self._told():
            self._event(step, summary=Summary(value=points))

    def line(self, step: int, **values: Any) -> None:
        """One line, of whatever JSON can hold."""
        if self._workdir is None:
            return
        line = {"step": step, "seconds": round(time.time() - self._start, 1), **values}
        with self._told():
            if self._config is not None:
                with atomic_path(self._workdir / CONFIG) as temporary:
                    temporary.write_text(json.dumps(self._config, indent=1) + "\n")
                self._config = None
            self._lines.write(json.dumps(line, allow_nan=False) + "\n")
            self._lines.flush()

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture [H, W, 3] uint8, or a video [F, H, W, 3] uint8, which is kept as `samples`/NAME_STEP.mp4 too."""
        if self._workdir is None:
            return
        with self._told():
            if picture.ndim == 3:
                self._show(step, name, [picture], "PNG")
                return
            from emv3_jax.media import VideoWriter

            (self._workdir / "samples").mkdir(exist_ok=True)
            _, height, width, _ = picture.shape
            with VideoWriter(self._workdir / "samples" / f"{name}_{step:07d}.mp4", height, width) as video:
                video.write(picture)
            self._show(step, name, picture[::2], "GIF")  # TensorBoard shows a GIF as it shows a picture

    def _show(self, step: int, name: str, pictures: Sequence[np.ndarray], kind: str) -> None:
        """Pictures one after another, or a single one, as TensorBoard shows them."""
        from tensorboardX.proto.summary_pb2 import Summary

        data = io.BytesIO()
        first, *rest = [Image.fromarray(picture) for picture in pictures]
        moving = {"save_all": True, "append_images": rest, "duration": 2000 // FPS, "loop": 0} if rest else {}
        first.save(data, format=kind, **moving)
        image = Summary.Image(
            encoded_image_string=data.getvalue(), height=first.height, width=first.width, colorspace=3
        )
        self._event(step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def close(self) -> None:
        """Closes the files."""
        if self._workdir is not None:
            with self._told(), contextlib.closing(self._board), contextlib.closing(self._lines):
                pass


def _as_json(cfg: Any) -> dict[str, Any]:
    return json.loads(json.dumps(cfg.to_dict(), default=str))


def other_settings(workdir: pathlib.Path, cfg: Any, unless: Sequence[str] = ()) -> str:
    """What of a run's settings (`config.json`) another config has otherwise, or ""; but for keys of `unless`, for the
    time, which is no matter of what is learnt, and for other stages of a cycle."""
    try:
        before = json.loads((workdir / CONFIG).read_text())
    except (OSError, ValueError):  # a missing or damaged one has nothing to say
        return ""
    if not isinstance(before, dict):
        return ""
    left_out = {"minutes", "cycle", "review", *unless}
    of_run = lambda some: {key: some[key] for key in some if key not in left_out}  # noqa: E731
    return "; ".join(differences(of_run(before), of_run(_as_json(cfg))))


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
