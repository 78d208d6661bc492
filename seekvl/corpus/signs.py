"""Pictures of a sign, a board or bare text with one word, sometimes with shapes beside it."""

import math
import random

from PIL import Image, ImageDraw

from seekvl.corpus.lettering import FACES, cap_share, font, ink_box
from seekvl.corpus.scene import Bounds, Canvas, Drawn, Rgb, Scene, canvas_size, distance, luma, shade
from seekvl.corpus.shapes import SHAPES, place_shapes
from seekvl.corpus.words import draw_word

LEAST_LETTER = 0.1
"""Least height of a letter as a share of the picture's longer side: 25 px where that is 256."""
FINE = 2
"""Signs are drawn this many times larger and averaged down."""


def draw_sign(rng: random.Random, *, held_out: bool = False, word: str | None = None) -> Scene:
    """Draw a picture with one word in capitals, on a board or bare, and up to two shapes beside it.

    held_out takes the word from those no training picture shows.
    """
    word = word or draw_word(rng, held_out=held_out)
    canvas = Canvas(rng, *canvas_size(rng, least_aspect=1.0 if len(word) > 4 else 0.75), calm=True)
    bare = rng.random() < 0.3
    board, ink = _colours(rng, canvas, bare=bare)
    layers, corners = _sign_layers(rng, canvas, word=word, bare=bare)
    width, height = layers[0].size
    x, y = rng.randint(0, canvas.width - width), rng.randint(0, canvas.height - height)
    owners = []
    if not bare:
        owners.append(canvas.paste(layers[0], x, y, rgb=board[1]))
        if rng.random() < 0.4:
            canvas.paste(layers[1], x, y, rgb=ink[1])
            owners.append(len(canvas.areas) - 1)
    text = canvas.paste(layers[2], x, y, rgb=ink[1])
    text_box = canvas.box(text)
    things = [Drawn(kind="text", name=word, colour=ink[0], shape=word, size="medium", box=text_box)]
    if not bare:
        sign_box = canvas.box(text, *owners)
        things.insert(
            0, Drawn(kind="sign", name="sign", colour=board[0], shape="", size="medium", box=sign_box)
        )
    for letter, (x1, y1, x2, y2) in zip(word, corners, strict=True):
        box = (x + x1, y + y1, x + x2, y + y2)
        things.append(Drawn(kind="letter", name=letter, colour=ink[0], shape=letter, size="medium", box=box))
    beside = rng.choices((0, 1, 2), weights=(5, 3, 2))[0]
    palette = canvas.clear_colours(rng)
    plan = [[rng.choice(tuple(SHAPES)), rng.choice(tuple(palette))] for _ in range(beside)]
    things.extend(place_shapes(rng, canvas, plan=plan, palette=palette, taken=(things[0].box,)))
    return Scene(
        image=canvas.grain(rng), style="sign", background=canvas.background, objects=tuple(things), word=word
    )


def _colours(rng: random.Random, canvas: Canvas, *, bare: bool) -> tuple[tuple[str, Rgb], tuple[str, Rgb]]:
    """Choose board and ink, each by name and shade, so that the word stands out from what it is on."""
    palette = canvas.clear_colours(rng)
    while True:
        board = rng.choice(tuple(palette.items()))
        under = canvas.tones if bare else (board[1],)
        name = rng.choice(("black", "white", *palette)) if not bare else rng.choice(tuple(palette))
        ink = shade(rng, name)
        if all(distance(ink, tone) >= 130 and abs(luma(ink) - luma(tone)) >= 70 for tone in under):
            return board, (name, ink)


def _sign_layers(
    rng: random.Random, canvas: Canvas, *, word: str, bare: bool
) -> tuple[tuple[Image.Image, Image.Image, Image.Image], list[Bounds]]:
    """Draw a turned sign as three masks (board, border, letters), and the box of each letter within them."""
    face = rng.choice(FACES)
    turn = rng.choice((0.0, rng.uniform(-6, 6)))
    spread = rng.uniform(0.04, 0.18)  # of the font's size, between letters
    pad = rng.uniform(0.3, 0.6) if not bare else 0.06
    size = FINE * canvas.longer * rng.uniform(LEAST_LETTER, 0.24) / cap_share(face)
    room_x, room_y = (canvas.width - 4) * FINE, (canvas.height - 4) * FINE
    least = FINE * canvas.longer * LEAST_LETTER / cap_share(face)
    while True:
        letters = font(face, round(size))
        gap = spread * size
        starts, x = [], 0.0
        for letter in word:
            starts.append(x)
            x += letters.getlength(letter) + gap
        inner, tall = x - gap, size * cap_share(face)
        width, height = inner + 2 * pad * size, tall + 2 * pad * size
        cosine, sine = math.cos(math.radians(turn)), abs(math.sin(math.radians(turn)))
        if width * cosine + height * sine <= room_x and width * sine + height * cosine <= room_y:
            break
        size, spread, pad = max(size * 0.9, least), spread * 0.9, pad * 0.9
    plane = (math.ceil(width), math.ceil(height))
    board, border, ink = (Image.new("L", plane) for _ in range(3))
    edge = (0, 0, plane[0] - 1, plane[1] - 1)
    radius = rng.choice((0.0, 0.12, 0.3)) * height
    ImageDraw.Draw(board).rounded_rectangle(edge, radius, fill=255)
    ImageDraw.Draw(border).rounded_rectangle(edge, radius, outline=255, width=max(3, round(0.05 * size)))
    pen = ImageDraw.Draw(ink)
    boxes = []
    for letter, start in zip(word, starts, strict=True):
        at = (pad * size + start, pad * size + tall)
        pen.text(at, letter, font=letters, fill=255, anchor="ls")
        left, top, right, bottom = ink_box(face, round(size), letter)
        boxes.append((at[0] + left, at[1] + top, at[0] + right, at[1] + bottom))
    layers = [_settle(mask, turn) for mask in (board, border, ink)]
    around = (plane[0] / 2, plane[1] / 2)
    moved = (layers[0].width / 2, layers[0].height / 2)
    return (layers[0], layers[1], layers[2]), [_turned(box, turn, around=around, to=moved) for box in boxes]


def _settle(mask: Image.Image, turn: float) -> Image.Image:
    """Turn a mask and bring it to its final size."""
    turned = mask.rotate(turn, Image.Resampling.BICUBIC, expand=True) if turn else mask
    return turned.reduce(FINE)


def _turned(
    box: tuple[float, float, float, float],
    turn: float,
    *,
    around: tuple[float, float],
    to: tuple[float, float],
) -> Bounds:
    """Find the upright box around a box turned about a point (fine px) which then lies at another (px)."""
    cosine, sine = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    xs, ys = [], []
    for x in (box[0] - around[0], box[2] - around[0]):
        for y in (box[1] - around[1], box[3] - around[1]):
            xs.append((x * cosine + y * sine) / FINE + to[0])
            ys.append((y * cosine - x * sine) / FINE + to[1])
    return min(xs), min(ys), max(xs), max(ys)
