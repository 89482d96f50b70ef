"""Face boxes as the released program keeps them: a .npy file of six numbers (SPEC section 3)."""

import numpy as np

from emv3_jax.errors import UserError
from emv3_jax.files import PathLike, check_readable

Box = tuple[float, float, float, float]
PROPORTIONS = 0.01  # by which those of the box's picture and of the picture at hand may differ


def load_face_box(path: PathLike, height: int, width: int) -> Box:
    """The box (y1, y2, x1, x2) in pixels of a height x width image.

    The file holds y1, y2, x1, x2 and the height and width of the image that they were found in; the box is scaled to
    the image at hand, if that has the same proportions.

    Raises:
      UserError: not such a file, or made for a picture of other proportions.
    """
    path = check_readable(path, "face box")
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError):
        raise UserError(f"face box {path} is not a .npy file of numbers, or is damaged") from None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf" or values.size != 6:
        raise UserError(f"face box {path} must hold six numbers: y1, y2, x1, x2, image height, image width")
    y1, y2, x1, x2, rows, columns = (float(value) for value in values.reshape(-1))
    if not np.isfinite(values).all() or not (0 <= y1 < y2 <= rows and 0 <= x1 < x2 <= columns):
        raise UserError(
            f"face box {path} is empty or outside its own image: y1 {y1:g}, y2 {y2:g}, x1 {x1:g}, x2 {x2:g} of "
            f"{rows:g} x {columns:g}"
        )
    if abs(rows * width / (columns * height) - 1) > PROPORTIONS:
        raise UserError(
            f"face box {path} was made for a picture of {rows:g} x {columns:g}, this one is {height} x {width}"
        )
    return y1 * height / rows, y2 * height / rows, x1 * width / columns, x2 * width / columns
