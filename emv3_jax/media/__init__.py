"""Image, audio and video files in and out: everything a user hands over or receives passes here."""

from emv3_jax.files import atomic_path, check_writable
from emv3_jax.media.audio import load_audio
from emv3_jax.media.image import fit_image, load_image
from emv3_jax.media.sheet import contact_sheet
from emv3_jax.media.video import VideoWriter, read_video

__all__ = [
    "VideoWriter",
    "atomic_path",
    "check_writable",
    "contact_sheet",
    "fit_image",
    "load_audio",
    "load_image",
    "read_video",
]
