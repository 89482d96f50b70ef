"""Names of files: whatever the system takes is taken, and what it cannot take is refused in one line."""

import re

import numpy as np
import pytest
import soundfile

from emv3_jax.errors import UserError
from emv3_jax.files import check_readable, check_writable
from emv3_jax.media import load_audio


def test_a_recording_may_have_a_name_that_is_not_utf8(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(1600, 0.1), 16000)
    strange = (tmp_path / "a.wav").rename(tmp_path / "caf\udce9.wav")
    assert len(load_audio(strange)[0]) == 1600


@pytest.mark.parametrize("name", ["nul\0.mp4", "half\ud800.mp4"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(UserError, match=re.escape(f"output {name!r} is no name that a file can have")):
        check_writable(name)
    with pytest.raises(UserError, match=re.escape(f"video {name!r} is no name that a file can have")):
        check_readable(name, "video")
