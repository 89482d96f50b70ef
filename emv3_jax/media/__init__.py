"""Image, audio and video files in and out: everything a user hands over or receives passes here."""

from emv3_jax.files import atomic_path, check_readable, check_writable
from emv3_jax.media.audio import check_wave, load_audio, load_recording, mixed, resample
from emv3_jax.media.colours import matched_to_first
from emv3_jax.media.face_box import load_face_box
from emv3_jax.media.face_detector import choose_face, detect_faces
from emv3_jax.media.image import check_image, cut_and_scale, fit_image, load_image, to_uint8
from emv3_jax.media.sheet import contact_sheet, sheet_frames
from emv3_jax.media.video import VideoSource, VideoWriter, even_size, read_video, shown_at

__all__ = [
    "VideoSource",
    "VideoWriter",
    "atomic_path",
    "check_image",
    "check_readable",
    "check_wave",
    "check_writable",
    "choose_face",
    "contact_sheet",
    "cut_and_scale",
    "detect_faces",
    "even_size",
    "fit_image",
    "load_audio",
    "load_face_box",
    "load_image",
    "load_recording",
    "matched_to_first",
    "mixed",
    "read_video",
    "resample",
    "sheet_frames",
    "shown_at",
    "to_uint8",
]
