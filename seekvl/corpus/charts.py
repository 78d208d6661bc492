"""Pictures of bar charts: two to five bars, each of another colour and height, on two axes."""

import random

from PIL import Image, ImageDraw

from seekvl.corpus.lettering import FACES, font
from seekvl.corpus.scene import Canvas, Drawn, Rgb, Scene, canvas_size, distinct_colours
from seekvl.corpus.words import LETTERS

LEVELS = 9
"""Bars stand on different ones of so many levels: two never differ by less than a ninth of the chart."""


def draw_chart(rng: random.Random, *, count: int | None = None) -> Scene:
    """Draw a bar chart of `count` bars (2 to 5 when None), half of the time with a letter under each."""
    canvas = Canvas(rng, *canvas_size(rng), calm=True)
    wanted = count or rng.randint(2, 5)
    palette = canvas.clear_colours(rng)
    names = distinct_colours(rng, palette, wanted)
    wanted = len(names)
    levels = rng.sample(range(1, LEVELS + 1), wanted)
    labels = rng.choice(("", "".join(rng.sample(LETTERS, wanted)), LETTERS[:wanted], ""))
    axis: Rgb = (40, 40, 44) if sum(canvas.tones[0]) > 330 else (225, 225, 228)
    side = canvas.longer
    left, right = round(0.08 * side), canvas.width - round(0.04 * side)
    top, base = round(0.06 * side), canvas.height - round((0.16 if labels else 0.07) * side)
    slot = (right - left) / wanted
    bar = round(slot * rng.uniform(0.5, 0.85))
    bars = []
    pen = ImageDraw.Draw(canvas.image)
    letters = font(rng.choice(FACES[:4]), round(0.13 * side))
    for i, (name, level) in enumerate(zip(names, levels, strict=True)):
        height = round((base - top) * level / LEVELS)
        x = round(left + slot * (i + 0.5) - bar / 2)
        owner = canvas.paste(Image.new("L", (bar, height), 255), x, base - height, rgb=palette[name])
        label = labels[i] if labels else ""
        bars.append(
            Drawn(
                kind="bar", name=f"{name} bar", colour=name, shape=label, size="medium", box=canvas.box(owner)
            )
        )
        if label:
            pen.text((x + bar / 2, base + 0.025 * side), label, font=letters, fill=axis, anchor="mt")
    thick = max(2, round(0.01 * side))
    pen.rectangle((left - thick, top - thick, left - 1, base + thick - 1), fill=axis)
    pen.rectangle((left - thick, base, right, base + thick - 1), fill=axis)
    return Scene(image=canvas.grain(rng), style="chart", background=canvas.background, objects=tuple(bars))
