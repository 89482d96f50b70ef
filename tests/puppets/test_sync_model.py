"""The puppets' sync model: no offset for true clips, the right one for moved sound, no confidence for another voice."""

import numpy as np
import pytest

from emv3_jax.config import FPS, RATE
from emv3_jax.media import to_uint8
from emv3_jax.puppets import clips, requests, sync_model

FRAMES, SPARE = 61, 4


@pytest.fixture(scope="module")
def puppet():
    """A clip whose sound goes on for some frames either way: (clip, video, face box)."""
    clip = clips.make_clip("heldout", 0, FRAMES + 2 * SPARE + 2)
    return clip, to_uint8(np.asarray(clip.render(64))), requests.face_box(clip, 64, 64)


@pytest.mark.parametrize("boxed", [True, False])
@pytest.mark.parametrize("late", [0, SPARE, -SPARE])
def test_offsets_are_found_with_their_sign(puppet, late, boxed):
    clip, video, face = puppet
    shown = video[SPARE : SPARE + FRAMES]
    first = (SPARE + late) * RATE // FPS  # where the sound is ahead, the picture is late
    wave = clip.wave[first : first + FRAMES * RATE // FPS]
    offset, confidence = sync_model.offset(shown, wave, face if boxed else None)
    assert offset == late
    assert confidence > 0.9  # 0.96 when this was written


def test_another_voice_is_not_confident(puppet):
    _, video, face = puppet
    own = [sync_model.offset(video, puppet[0].wave, face)[1]]
    others = [sync_model.offset(video, clips.make_clip("heldout", k, len(video)).wave, face)[1] for k in range(1, 5)]
    assert max(others) < 0.7 < own[0] - 0.2


def test_a_mouth_that_does_not_move_has_no_confidence(puppet):
    clip, video, face = puppet
    assert sync_model.offset(np.repeat(video[:1], 25, axis=0), clip.wave, face)[1] == pytest.approx(0.0, abs=1e-3)
    assert sync_model.offset(video, np.zeros_like(clip.wave), face)[1] == pytest.approx(0.0, abs=1e-3)
