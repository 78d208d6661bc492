"""Long and tall pictures with small print: lists, menus, tables, banners and rulers.

They are what tiles are for. The longer side has 320 to 960 px and is two to six times the shorter; capitals
are 8 to 20 px high. Cut into up to 6 tiles of 160 px, as seekvl-nano-moe looks at a picture, a capital keeps
at least 8 px. Shrunk until the longer side has 256 px, as seekvl-nano looks at it, at most 7 px are left.

    list     words                    banner   panels of colours with a word each
    menu     words after bullets      ruler    labelled ticks with pointers at some
    table    words with numbers
"""

import math
import random
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw

from seekvl.corpus.lettering import Hand, faces_for
from seekvl.corpus.scene import (
    Bounds,
    Canvas,
    Drawn,
    Entry,
    Layout,
    Rgb,
    Scene,
    distance,
    distinct_colours,
    luma,
    shade,
)
from seekvl.corpus.shapes import shape_mask
from seekvl.corpus.words import draw_word
from seekvl.runtime import SeekVLError

Paint = tuple[str, Rgb]
"""A colour by name and shade."""

SHORTEST, LONGEST = 320, 960
"""Longer side of a strip, in px."""
ASPECTS = (2.0, 6.0)
"""Longer side over shorter side."""
CAPITALS = (8, 20)
"""Height of capital letters, in px."""
TILE, TILES = 160, 6
"""Side in px and greatest number of the tiles through which a capital keeps `CAPITALS[0]`."""
SQUARE, BLURRED = 256, 7.0
"""Shrunk to this longer side, both in px, no capital is higher than that."""
FEWEST, MOST = 3, 10
"""Entries of a strip."""

ACROSS: dict[Layout, tuple[float, float]] = {
    "list": (8.5, 3.0),
    "menu": (11.0, 3.0),
    "table": (14.0, 5.5),
    "banner": (10.0, 3.5),
    "ruler": (8.5, 6.5),
}
"""Least shorter side of a tall and of a long strip, in heights of a capital."""

ALONG: dict[Layout, tuple[float, float]] = {
    "list": (1.8, 8.5),
    "menu": (2.0, 10.5),
    "table": (1.8, 8.5),
    "banner": (2.8, 9.5),
    "ruler": (2.4, 4.8),
}
"""Least length of an entry of a tall and of a long strip, in heights of a capital."""

BULLETS = ("circle", "square", "diamond", "triangle", "star", "heart")
STEPS = (1, 2, 3, 5, 10, 20, 25, 50)
"""From one number of a ruler to the next."""


def draw_strip(
    rng: random.Random, *, held_out: bool = False, layout: Layout | None = None, tall: bool | None = None
) -> Scene:
    """Draw a strip of three to ten entries, of any layout and as often tall as long when None.

    No word or number stands there twice. held_out takes all words from those no training picture shows.
    Raises SeekVLError for another layout.
    """
    if layout is not None and layout not in LAYOUTS:
        raise SeekVLError(f"layout {layout!r} is not known; use one of {', '.join(LAYOUTS)}")
    drawn: Layout = rng.choice(tuple(LAYOUTS)) if layout is None else layout
    tall = rng.random() < 0.5 if tall is None else tall
    strip = Strip(rng, layout=drawn, tall=tall, held_out=held_out)
    entries = LAYOUTS[drawn](rng, strip)
    return Scene(
        image=strip.canvas.grain(rng),
        style="strip",
        background=strip.canvas.background,
        objects=tuple(strip.things),
        layout=drawn,
        entries=tuple(entries),
    )


class Strip:
    """A strip being drawn: where its entries lie, how its words are written, and what is on it so far.

    Along is the direction of the longer side, across that of the shorter.
    """

    def __init__(self, rng: random.Random, *, layout: Layout, tall: bool, held_out: bool) -> None:
        across, along = ACROSS[layout][not tall], ALONG[layout][not tall]
        longer, self.shorter, capital = _sizes(rng, across=across)
        self.tall, self.held_out = tall, held_out
        size = (self.shorter, longer) if tall else (longer, self.shorter)
        self.canvas = Canvas(rng, *size, calm=True)
        self.pen = ImageDraw.Draw(self.canvas.image)
        self.hand = _hand(rng, capital)
        self.capital = self.hand.capital
        self.margin = max(4, round(0.5 * self.capital))
        self.ink = ink_for(rng, self.canvas.tones)
        room = longer - 2 * self.margin
        least = along * self.capital
        count = rng.randint(FEWEST, max(FEWEST, min(MOST, int(room / least))))
        self.pitch = int(least + (room / count - least) * rng.choice((1.0, rng.random())))
        first = self.margin + rng.randint(0, room - count * self.pitch)
        self.starts = tuple(first + i * self.pitch for i in range(count))
        self.things: list[Drawn] = []

    @property
    def inner(self) -> int:
        """Room across, between the margins, in px."""
        return self.shorter - 2 * self.margin

    def words(self, rng: random.Random, *, room: int) -> list[str]:
        """Draw a word of at least three letters for each entry, none twice and none wider than `room` px."""
        words: list[str] = []
        while len(words) < len(self.starts):
            word = draw_word(rng, held_out=self.held_out)
            if len(word) > 2 and word not in words and self.hand.width(word) <= room:
                words.append(word)
        return words

    def write(
        self, text: str, *, left: int, middle: int, ink: Paint | None = None, spelled: bool = True
    ) -> Drawn:
        """Write a text from its left end, in px, with the middle of its capitals at a height.

        spelled lists its letters among the things, too.
        """
        colour, rgb = ink or self.ink
        base = middle + self.capital // 2
        boxes = self.hand.write(self.pen, text, left=left, base=base, rgb=rgb)
        around = (
            min(box[0] for box in boxes), min(box[1] for box in boxes),
            max(box[2] for box in boxes), max(box[3] for box in boxes),
        )  # fmt: skip
        whole = Drawn(kind="text", name=text, colour=colour, shape=text, size="medium", box=around)
        self.things.append(whole)
        for letter, box in zip(text if spelled else "", boxes if spelled else (), strict=True):
            self.things.append(
                Drawn(kind="letter", name=letter, colour=colour, shape=letter, size="medium", box=box)
            )
        return whole

    def mark(self, mask: Image.Image, x: int, y: int, *, shape: str, paint: Paint) -> Drawn:
        """Draw a bullet or pointer with its middle at x, y in px."""
        colour, rgb = paint
        left, top = x - mask.width // 2, y - mask.height // 2
        self.canvas.image.paste(rgb, (left, top), mask)
        x1, y1, x2, y2 = mask.point(lambda value: 255 * (value > 127)).getbbox() or (0, 0, *mask.size)
        box = (float(left + x1), float(top + y1), float(left + x2), float(top + y2))
        name = f"{colour} {shape}"
        drawn = Drawn(kind="shape", name=name, colour=colour, shape=shape, size="small", box=box)
        self.things.append(drawn)
        return drawn

    def panel(self, box: tuple[int, int, int, int], *, radius: float, paint: Paint) -> Drawn:
        """Draw a panel, which other pictures would call a sign."""
        colour, rgb = paint
        x1, y1, x2, y2 = box
        self.pen.rounded_rectangle((x1, y1, x2 - 1, y2 - 1), radius, fill=rgb)
        edges: Bounds = (float(x1), float(y1), float(x2), float(y2))
        name = f"{colour} panel"
        drawn = Drawn(kind="sign", name=name, colour=colour, shape="", size="medium", box=edges)
        self.things.append(drawn)
        return drawn

    def line(self, along: float, *, start: float, stop: float) -> None:
        """Draw a line across the strip at a place along it, in the ink of its words."""
        ends = (start, along, stop, along) if self.tall else (along, start, along, stop)
        self.pen.line(ends, fill=self.ink[1])

    def paints(self, rng: random.Random) -> list[Paint]:
        """Choose a colour that stands out from the background for each entry; they repeat where they must."""
        palette = self.canvas.clear_colours(rng)
        names = distinct_colours(rng, palette, len(self.starts))
        names += rng.choices(names, k=len(self.starts) - len(names))
        rng.shuffle(names)
        return [(name, palette[name]) for name in names]


def ink_for(rng: random.Random, under: Sequence[Rgb]) -> Paint:
    """Choose a colour, by name and shade, in which small print can be read on all of these tones."""
    while True:
        name = rng.choice(("black", "white", "black", "white", "red", "green", "blue", "purple", "yellow"))
        ink = shade(rng, name)
        if all(distance(ink, tone) >= 130 and abs(luma(ink) - luma(tone)) >= 90 for tone in under):
            return name, ink


def kept_in_tiles(longer: int, shorter: int) -> float:
    """Share of its size at which a picture of these sides in px is seen in the best grid of tiles, at most 1.

    >>> kept_in_tiles(960, 160), kept_in_tiles(960, 480), kept_in_tiles(400, 200)
    (1.0, 0.5, 1.0)
    """
    grids = [(m, n) for m in range(1, TILES + 1) for n in range(1, TILES // m + 1)]
    return min(1.0, max(min(m * TILE / longer, n * TILE / shorter) for m, n in grids))


def _sizes(rng: random.Random, *, across: float) -> tuple[int, int, int]:
    """Draw longer side, shorter side and height of a capital, in px; larger capitals are likelier."""
    while True:
        longer = rng.randint(SHORTEST, LONGEST)
        shorter = round(longer / math.exp(rng.uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1]))))
        least = math.ceil(CAPITALS[0] / kept_in_tiles(longer, shorter))
        most = math.floor(min(CAPITALS[1], longer * BLURRED / SQUARE, shorter / across))
        if least <= most:
            return longer, shorter, max(rng.randint(least, most) for _ in range(2))


def _hand(rng: random.Random, capital: int) -> Hand:
    """Choose a face and spacing for capitals of exactly so many px."""
    face, size = rng.choice(tuple(faces_for(capital).items()))
    return Hand(face=face, size=size, gap=max(1, round(rng.uniform(0.03, 0.12) * size)))


def _draw_list(rng: random.Random, strip: Strip) -> list[Entry]:
    """Draw lines of a word each, or a row of words."""
    return _draw_words(rng, strip, bullets=False)


def _draw_menu(rng: random.Random, strip: Strip) -> list[Entry]:
    """Draw the same with a coloured bullet before each word."""
    return _draw_words(rng, strip, bullets=True)


def _draw_words(rng: random.Random, strip: Strip, *, bullets: bool) -> list[Entry]:
    """Draw the words of a list or menu, a tall one aligned left, in the middle or right."""
    shape = rng.choice(BULLETS)
    mask = shape_mask(shape, strip.capital * rng.uniform(1.1, 1.5))
    lead = mask.width + round(0.7 * strip.capital) if bullets else 0
    room = (strip.inner if strip.tall else strip.pitch - strip.capital) - lead
    words = strip.words(rng, room=room)
    widest = max(strip.hand.width(word) for word in words)
    align = rng.choice((0.0, 0.5, 1.0)) if strip.tall and not bullets else 0.0
    edge = strip.margin + rng.randint(0, room - widest) if strip.tall else 0
    row = _row(rng, strip, half=0.75)
    paints = strip.paints(rng) if bullets else []
    if strip.tall:
        _rule(rng, strip)
    entries = []
    for i, (start, word) in enumerate(zip(strip.starts, words, strict=True)):
        left = edge + round(align * (widest - strip.hand.width(word))) if strip.tall else start
        middle = start + strip.pitch // 2 if strip.tall else row
        at = left + mask.width // 2
        mark = strip.mark(mask, at, middle, shape=shape, paint=paints[i]) if bullets else None
        entries.append(Entry(text=strip.write(word, left=left + lead, middle=middle), mark=mark))
    return entries


def _draw_table(rng: random.Random, strip: Strip) -> list[Entry]:
    """Draw lines of a word and a number flush right, or columns of a word above a number."""
    digits = rng.randint(2, 3)
    numbers = [str(number) for number in rng.sample(range(10 ** (digits - 1), 10**digits), len(strip.starts))]
    _rule(rng, strip)
    return (_draw_lines if strip.tall else _draw_columns)(rng, strip, numbers)


def _draw_lines(rng: random.Random, strip: Strip, numbers: Sequence[str]) -> list[Entry]:
    """Draw a table of lines, three in ten with dots that lead from word to number."""
    wide = max(strip.hand.width(number) for number in numbers)
    apart = 2 * strip.capital
    room = strip.inner - wide - apart
    words = strip.words(rng, room=room)
    widest = max(strip.hand.width(word) for word in words)
    spare = rng.randint(0, room - widest)
    edge = strip.margin + rng.randint(0, room - widest - spare)
    right = edge + widest + spare + apart + wide
    dotted = rng.random() < 0.3
    entries = []
    for start, word, number in zip(strip.starts, words, numbers, strict=True):
        middle, left = start + strip.pitch // 2, right - strip.hand.width(number)
        text = strip.write(word, left=edge, middle=middle)
        entries.append(Entry(text=text, number=strip.write(number, left=left, middle=middle, spelled=False)))
        if dotted:
            _dots(strip, edge + strip.hand.width(word), left, middle)
    return entries


def _draw_columns(rng: random.Random, strip: Strip, numbers: Sequence[str]) -> list[Entry]:
    """Draw a table of columns, a word above its number in each."""
    row, apart = _row(rng, strip, half=2.0), round(0.9 * strip.capital)
    entries = []
    words = strip.words(rng, room=strip.pitch - strip.capital)
    for start, word, number in zip(strip.starts, words, numbers, strict=True):
        above, under = (start + (strip.pitch - strip.hand.width(text)) // 2 for text in (word, number))
        text = strip.write(word, left=above, middle=row - apart)
        entries.append(
            Entry(text=text, number=strip.write(number, left=under, middle=row + apart, spelled=False))
        )
    return entries


def _draw_banner(rng: random.Random, strip: Strip) -> list[Entry]:
    """Draw panels one after the other, each with a word in its middle."""
    gap = rng.randint(3, max(3, round(0.5 * strip.capital)))
    wide = strip.inner if strip.tall else strip.pitch - gap
    words = strip.words(rng, room=wide - strip.capital)
    least = max(map(strip.hand.width, words)) + strip.capital if strip.tall else round(2.2 * strip.capital)
    depth = rng.randint(min(least, strip.inner), strip.inner)
    edge = strip.margin + rng.randint(0, strip.inner - depth)
    radius = rng.choice((0.0, 0.3, 0.6)) * strip.capital
    entries = []
    for start, word, paint in zip(strip.starts, words, strip.paints(rng), strict=True):
        near, far = start + gap // 2, start + strip.pitch - (gap - gap // 2)
        box = (edge, near, edge + depth, far) if strip.tall else (near, edge, far, edge + depth)
        mark = strip.panel(box, radius=radius, paint=paint)
        left = (box[0] + box[2] - strip.hand.width(word)) // 2
        text = strip.write(word, left=left, middle=(box[1] + box[3]) // 2, ink=ink_for(rng, (paint[1],)))
        entries.append(Entry(text=text, mark=mark))
    return entries


def _draw_ruler(rng: random.Random, strip: Strip) -> list[Entry]:
    """Draw a scale of equal steps, and one to three pointers of different colours on its other side.

    across: margin, pointers, axis, ticks, numbers
    """
    c, numbers = strip.capital, _scale(rng, strip)
    mask = shape_mask("triangle", 1.4 * c, turn=90 if strip.tall else 180)
    deep = mask.width if strip.tall else mask.height
    wide = max(strip.hand.width(number) for number in numbers) if strip.tall else c
    spare = strip.inner - deep - 2 - 2 * c - wide
    axis = strip.margin + deep + 2 + rng.randint(0, spare)
    tick = axis + round(0.9 * c)
    centres = [start + strip.pitch // 2 for start in strip.starts]
    _draw_axis(rng, strip, centres, axis=axis, tick=tick)
    pointed = rng.sample(range(len(numbers)), rng.randint(1, 3))
    paints = dict(zip(pointed, strip.paints(rng), strict=False))  # one for each entry, more than needed
    entries = []
    for i, (centre, number) in enumerate(zip(centres, numbers, strict=True)):
        mark = None
        if i in paints:
            x, y = (axis - 2 - deep // 2, centre) if strip.tall else (centre, axis - 2 - deep // 2)
            mark = strip.mark(mask, x, y, shape="triangle", paint=paints[i])
        left = tick + round(0.5 * c) if strip.tall else centre - strip.hand.width(number) // 2
        middle = centre if strip.tall else tick + c
        entries.append(Entry(text=strip.write(number, left=left, middle=middle, spelled=False), mark=mark))
    return entries


def _scale(rng: random.Random, strip: Strip) -> list[str]:
    """Choose the numbers of a ruler, at most 999; half of the tall ones rise."""
    step, count = rng.choice(STEPS), len(strip.starts)
    lowest = step * rng.randint(0, (999 - step * (count - 1)) // step if rng.random() < 0.3 else 9)
    numbers = [str(lowest + step * i) for i in range(count)]
    return numbers[::-1] if strip.tall and rng.random() < 0.5 else numbers


def _draw_axis(rng: random.Random, strip: Strip, centres: Sequence[int], *, axis: int, tick: int) -> None:
    """Draw the axis, a tick from it to `tick` at each number, and none to four short ones in between."""
    ends = (axis - 1, centres[0], axis, centres[-1])
    strip.pen.rectangle(ends if strip.tall else (ends[1], ends[0], ends[3], ends[2]), fill=strip.ink[1])
    parts = rng.choice((1, 2, 4, 5))
    for i in range(parts * (len(centres) - 1) + 1):
        place = centres[0] + i * strip.pitch // parts
        strip.line(place, start=axis, stop=(axis + tick) // 2 if i % parts else tick)


def _row(rng: random.Random, strip: Strip, *, half: float) -> int:
    """Choose the middle of a row of words in a long strip, which needs so many capitals on either side."""
    near = strip.margin + round(half * strip.capital)
    return rng.randint(near, strip.shorter - near)


def _rule(rng: random.Random, strip: Strip) -> None:
    """Draw lines between the entries, in two strips of five."""
    if rng.random() < 0.4:
        for start in strip.starts[1:]:
            strip.line(start, start=strip.margin, stop=strip.shorter - strip.margin)


def _dots(strip: Strip, left: int, right: int, middle: int) -> None:
    """Lead from a word to its number with dots, clear of both."""
    side = max(1, strip.capital // 8)
    clear, step = round(0.5 * strip.capital), round(0.6 * strip.capital)
    base = middle + strip.capital // 2
    for x in range(left + clear, right - clear - side, step):
        strip.pen.rectangle((x, base - side, x + side - 1, base - 1), fill=strip.ink[1])


LAYOUTS: dict[Layout, Callable[[random.Random, Strip], list[Entry]]] = {
    "list": _draw_list,
    "menu": _draw_menu,
    "table": _draw_table,
    "banner": _draw_banner,
    "ruler": _draw_ruler,
}
"""Who draws each layout."""
