"""Puppets as a source of clips, so that the small world goes through the same builder and loader as films."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from emv3_jax.data.extract import RawClip
from emv3_jax.media.image import to_uint8
from emv3_jax.puppets import clips, requests


class Puppets:
    """Clips 0 to `count` - 1 of a split (builder.Source); in every other one the voice acts on the face alone."""

    def __init__(self, split: str, count: int, frames: int, size: int):
        self.split, self.count, self.frames, self.size = split, count, frames, size

    def __len__(self) -> int:
        return self.count

    def clips(self, number: int) -> Iterator[RawClip]:
        """The clip of that number."""
        clip = clips.make_clip(self.split, number, self.frames)
        yield RawClip(
            id=f"{self.split}/{number}",
            caption=clip.prompt,
            video=to_uint8(np.asarray(clip.render(self.size))),
            wave=clip.wave / max(np.abs(clip.wave).max(), 1e-6),
            face=None if number % 2 == 0 else requests.face_box(clip, self.size, self.size),
            mouth=requests.mouth_region(clip, self.size, self.size),
        )

    def describe(self) -> dict[str, Any]:
        """What decides the clips."""
        return {"puppets": self.split, "count": self.count, "frames": self.frames, "size": self.size}
