"""Face boxes in files: scaled to the picture at hand, or refused in one line."""

import numpy as np
import pytest

from emv3_jax import media
from emv3_jax.errors import UserError


def test_a_released_face_box_is_scaled_to_the_picture_at_hand(tmp_path):
    np.save(tmp_path / "face.npy", np.array([10, 50, 20, 60, 100, 80]))
    assert media.load_face_box(tmp_path / "face.npy", 100, 80) == (10, 50, 20, 60)
    assert media.load_face_box(tmp_path / "face.npy", 200, 160) == (20, 100, 40, 120)
    with pytest.raises(UserError, match="was made for a picture of 100 x 80, this one is 100 x 100"):
        media.load_face_box(tmp_path / "face.npy", 100, 100)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.arange(5), "must hold six numbers: y1, y2, x1, x2, image height, image width"),
        (np.array(["a"] * 6), "must hold six numbers"),
        (np.array([50, 10, 20, 60, 100, 80]), "is empty or outside its own image: y1 50, y2 10"),
        (np.array([10, 50, 20, np.nan, 100, 80]), "is empty or outside its own image"),
        (np.array([10, 50, 20, 90, 100, 80]), "is empty or outside its own image"),
        (None, "is not a .npy file of numbers, or is damaged"),
    ],
)
def test_face_boxes_that_cannot_be_used(tmp_path, values, message):
    path = tmp_path / "face.npy"
    if values is None:
        path.write_bytes(b"\x93NUMPY and no more")
    else:
        np.save(path, values)
    with pytest.raises(UserError, match=message):
        media.load_face_box(path, 100, 80)


def test_a_face_box_of_objects_runs_no_code(tmp_path):
    np.save(tmp_path / "face.npy", np.array([{}] * 6), allow_pickle=True)
    with pytest.raises(UserError, match="is not a .npy file of numbers"):
        media.load_face_box(tmp_path / "face.npy", 100, 80)
