from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageDraw

from seekvl.corpus.lettering import FACES, Hand, faces_for, font


@pytest.mark.parametrize("face", FACES)
def test_every_face_has_its_own_letters(face):
    shapes = {bytes(font(face, 30).getmask(letter)) for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    assert len(shapes) == 26


@pytest.mark.parametrize("capital", [8, 11, 20])
def test_capitals_have_exactly_the_height_asked_for(capital):
    faces = faces_for(capital)
    assert len(faces) >= 6
    for face, size in faces.items():
        sheet = Image.new("L", (60, 60))
        ImageDraw.Draw(sheet).text((20, 40), "H", font=font(face, size), fill=255, anchor="ls")
        _, top, _, bottom = sheet.getbbox()
        assert (bottom - top, bottom) == (capital, 40)


@pytest.mark.parametrize("face", FACES)
def test_boxes_hold_all_ink_and_nothing_else(face):
    hand = Hand(face=face, size=17, gap=3)
    for text in ("QUAJ", "1470"):
        sheet = Image.new("RGB", (160, 60))
        boxes = hand.write(ImageDraw.Draw(sheet), text, left=20, base=40, rgb=(255, 255, 255))
        ink = np.asarray(sheet)[..., 0] > 0
        for x1, y1, x2, y2 in boxes:
            inside = ink[y1:y2, x1:x2]
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()  # noqa: PT018
            ink[y1:y2, x1:x2] = False
        assert not ink.any()
        assert abs(boxes[-1][2] - boxes[0][0] - hand.width(text)) <= 6  # but for the blank sides of letters
        assert all(a[2] <= b[0] for a, b in pairwise(boxes))
