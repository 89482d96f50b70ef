"""Pictures in: any common file becomes uint8 [H, W, 3] in RGB, upright, or one clear line saying why not."""

import contextlib
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from emv3_jax.errors import UserError
from emv3_jax.files import PathLike, check_readable

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MIN_SIDE = 16
FITS = ("crop", "stretch")
MAX_PIXELS = 100_000_000

# What Pillow raises for damaged files, besides OSError.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


def load_image(path: PathLike) -> tuple[np.ndarray, list[str]]:
    """Reads a picture: uint8 [H, W, 3], and notes that say what was done to it besides decoding.

    EXIF orientation is applied, transparent parts are laid over white, 16-bit, grey, palette and CMYK pictures become
    8-bit RGB, and of an animation the first frame is taken. Raises UserError for anything that is not a picture of at
    least 16x16 and at most 100 million pixels; the size is read from the header, before any pixel is decoded.
    """
    path = check_readable(path, "image")
    notes: list[str] = []
    with _opened(path) as image:
        _check_size(f"image {path}", *image.size)
        try:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # MPO is a JPEG with previews of itself
                notes.append(f"image {path} has {frames} frames: the first is used")
            image.load()
            rgb, transparent = _to_rgb(ImageOps.exif_transpose(image))
        except _DAMAGE:
            raise UserError(f"image {path} is damaged or cut off: save or download it again") from None
    if transparent:
        notes.append(f"image {path} has transparent parts: they are laid over white")
    return np.asarray(rgb), notes


def check_image(image: np.ndarray) -> np.ndarray:
    """What `load_image` is for a picture that is given as an array: uint8 [H, W, 3] of a usable size, or UserError."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"image must be a path or uint8 [H, W, 3], got {image.dtype} {image.shape}")
    _check_size("image", image.shape[1], image.shape[0])
    return image


def to_uint8(video: Any) -> np.ndarray:
    """Pixels of models as pixels of files: floats in [-1, 1], of any shape, NumPy's or JAX's -> 0..255, clipped."""
    return np.clip(np.round((np.asarray(video, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def fit_image(image: np.ndarray, height: int, width: int, fit: str = "crop") -> tuple[np.ndarray, str | None]:
    """Scales uint8 [H, W, 3] to [height, width, 3] with a Lanczos filter.

    fit: "crop" keeps the proportions: the picture is scaled to cover the target, and what sticks out is cut equally
    from both ends. "stretch" changes the proportions and cuts nothing. Returns the picture and a sentence on what was
    done, or None if it already had the size.
    """
    source_height, source_width = image.shape[:2]
    if (source_height, source_width) == (height, width):
        return image, None
    if fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit!r}")
    if fit == "stretch":
        stretched = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
        return np.asarray(stretched), f"image {source_width}x{source_height} is stretched to {width}x{height}"
    scale = max(height / source_height, width / source_width)
    left, top = (source_width - width / scale) / 2, (source_height - height / scale) / 2
    box = (left, top, source_width - left, source_height - top)
    fitted = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS, box=box)
    lost = {"width": round(200 * left / source_width), "height": round(200 * top / source_height)}
    cuts = [f"{percent}% of its {side} is cut off" for side, percent in lost.items() if percent]
    note = f"image {source_width}x{source_height} is {'enlarged' if scale > 1 else 'scaled'} to {width}x{height}"
    return np.asarray(fitted), "; ".join([note, *cuts])


def cut_and_scale(image: np.ndarray, box: tuple[float, float, float, float], height: int, width: int) -> np.ndarray:
    """The part y1, y2, x1, x2 (fractions of pixels too) of uint8 [H, W, 3], as [height, width, 3]."""
    y1, y2, x1, x2 = box
    part = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS, box=(x1, y1, x2, y2))
    return np.asarray(part)


def _check_size(what: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(f"{what} is {width}x{height}, over {MAX_PIXELS // 10**6} megapixels: scale it down")
    if min(width, height) < MIN_SIDE:
        raise UserError(f"{what} is {width}x{height}: both sides must be at least {MIN_SIDE} pixels")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture with its header read. Pillow's own size warnings are silenced: our limit is checked instead."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise UserError(f"image {path} is over {MAX_PIXELS // 10**6} megapixels: scale it down") from None
    except _DAMAGE:
        raise UserError(f"image {path} cannot be read as a picture: give a PNG, JPEG or WebP file") from None
    with image:
        yield image


def _to_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """8-bit RGB, and whether anything was transparent."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255 instead of scaling
        values = np.asarray(image).astype(np.float32)
        full_scale = 65535.0 if values.max(initial=0) > 255 or image.mode != "I" else 255.0
        image = Image.fromarray(np.clip(values * (255.0 / full_scale) + 0.5, 0, 255).astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        image = Image.fromarray((np.clip(values / max(values.max(initial=0), 1.0), 0, 1) * 255 + 0.5).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB"), False
    rgba = image.convert("RGBA")
    if np.asarray(rgba.getchannel("A")).min() == 255:
        return rgba.convert("RGB"), False
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"), True
