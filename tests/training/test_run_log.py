"""What a run writes of itself: where it cannot, one line, and no thread that nobody waits for."""

import contextlib
import json

import numpy as np
import pytest
from test_checkpoints import files_of_at_most

from emv3_jax.errors import UserError
from emv3_jax.training.run_log import RunLog


def test_a_full_disk_is_one_line_whichever_file_meets_it(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    writers = {
        "lines": lambda log: log.line(1, text="x" * 10_000),
        "picture": lambda log: log.picture(1, "noise", noise),
    }
    for name, write in writers.items():
        log = RunLog(tmp_path / name)
        log.scalars(0, {"loss": 2.0})
        with files_of_at_most(4096):
            with pytest.raises(
                UserError, match=f"could not be written to {tmp_path / name}: file too large; make room"
            ):
                write(log)
            with contextlib.suppress(UserError):  # what is left may not be written either
                log.close()
        first = (tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]
        assert json.loads(first)["loss"] == 2.0
