"""Faces in a picture, found by dlib's detector (histograms of gradients), whose model is inside its package."""

import numpy as np
from PIL import Image

from emv3_jax.errors import UserError
from emv3_jax.media.face_box import Box

LONGEST_SIDE = 1024  # larger pictures are shrunk first; faces of a fifteenth of that are still found


def detect_faces(image: np.ndarray) -> list[Box]:
    """Boxes (y1, y2, x1, x2) in pixels of uint8 [H, W, 3], from left to right, inside the picture.

    The detector knows faces that look into the camera, and photographs: of drawings it finds some.

    Raises:
      UserError: the detector is not installed.
    """
    try:
        import dlib
    except ImportError:
        raise UserError(
            "finding faces needs the extra face: pip install -e '.[face]', or give a box (--face y1,y2,x1,x2), or let "
            "the voice act everywhere (--face none)"
        ) from None
    height, width = image.shape[:2]
    scale = min(1.0, LONGEST_SIDE / max(height, width))
    small = Image.fromarray(image).resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    found = dlib.get_frontal_face_detector()(np.asarray(small), 1)
    boxes = [
        (
            max(0.0, face.top() / scale), min(float(height), face.bottom() / scale),
            max(0.0, face.left() / scale), min(float(width), face.right() / scale),
        )
        for face in found
    ]  # fmt: skip
    return sorted(boxes, key=lambda box: box[2])


def choose_face(boxes: list[Box], choice: str | int) -> Box:
    """One of the faces: "detect" wants there to be one, "largest" takes the largest, a number counts from the left.

    Raises:
      UserError: no face, several where one was wanted, or fewer than the number.
    """
    otherwise = "give a box (--face y1,y2,x1,x2), or let the voice act everywhere (--face none)"
    if not boxes:
        raise UserError(f"no face was found in the picture: {otherwise}")
    listed = ", ".join(f"{k}: {','.join(f'{side:.0f}' for side in box)}" for k, box in enumerate(boxes, start=1))
    if choice == "largest":
        return max(boxes, key=lambda box: (box[1] - box[0]) * (box[3] - box[2]))
    if choice == "detect":
        if len(boxes) > 1:
            raise UserError(f"{len(boxes)} faces were found ({listed}): choose with --face 1, 2, ... or --face largest")
        return boxes[0]
    if not isinstance(choice, int) or not 1 <= choice <= len(boxes):
        raise UserError(f"--face {choice}: {len(boxes)} were found, from left to right ({listed})")
    return boxes[choice - 1]
