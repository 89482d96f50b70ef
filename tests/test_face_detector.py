"""Choosing among faces, and finding the one in a drawing of a face."""

import sys

import numpy as np
import pytest

from emv3_jax import media
from emv3_jax.config import PREVIEW
from emv3_jax.errors import UserError
from emv3_jax.media import face_detector
from emv3_jax.request import Request, read_request

SMALL, LARGE = (10.0, 20.0, 5.0, 15.0), (10.0, 50.0, 60.0, 100.0)


def test_faces_are_chosen():
    assert media.choose_face([SMALL], "detect") == SMALL
    assert media.choose_face([SMALL, LARGE], "largest") == LARGE
    assert media.choose_face([SMALL, LARGE], 1) == SMALL


@pytest.mark.parametrize(
    ("boxes", "choice", "message"),
    [
        ([], "detect", "no face was found in the picture: give a box .* or let the voice act everywhere"),
        ([], "largest", "no face was found"),
        ([SMALL, LARGE], "detect", r"2 faces were found \(1: 10,20,5,15, 2: 10,50,60,100\): choose with --face 1, 2"),
        ([SMALL], 2, "--face 2: 1 were found"),
        ([SMALL], 0, "--face 0: 1 were found"),
    ],
)
def test_no_face_is_taken_silently(boxes, choice, message):
    with pytest.raises(UserError, match=message):
        media.choose_face(boxes, choice)


def test_a_picture_without_faces_has_none():
    pytest.importorskip("dlib")
    assert media.detect_faces(np.full((120, 1500, 3), 128, np.uint8)) == []


def test_without_the_extra_there_is_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(UserError, match="finding faces needs the extra face"):
        media.detect_faces(np.zeros((64, 64, 3), np.uint8))


class AnyWords:
    def encode(self, prompts):
        return np.zeros((len(prompts), 512), int), np.ones((len(prompts), 512), int)

    def notes(self, prompt):
        return []


def test_the_face_that_is_found_is_told_and_scaled(monkeypatch):
    monkeypatch.setattr(face_detector, "detect_faces", lambda image: [SMALL, LARGE])
    monkeypatch.setattr(media, "detect_faces", lambda image: [SMALL, LARGE])
    asked = Request(np.zeros((128, 128, 3), np.uint8), np.ones(3200, np.float32) * 0.1, "Talks.", face="largest")
    ready = read_request(asked, PREVIEW, AnyWords())
    assert ready.face == LARGE
    assert "the voice acts on the face at 10,50,60,100 (y1,y2,x1,x2)" in ready.notes
