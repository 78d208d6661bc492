"""Draws the example pictures, from seeds and a word that no training has used: python examples/draw.py."""

import random
from pathlib import Path

from seekvl.corpus.charts import draw_chart
from seekvl.corpus.shapes import draw_shapes
from seekvl.corpus.signs import draw_sign

HERE = Path(__file__).parent


def main() -> None:
    """Write shapes.png, sign.png and chart.png beside this file."""
    draw_shapes(random.Random(103), count=5).image.save(HERE / "shapes.png")
    draw_sign(random.Random(105), held_out=True).image.save(HERE / "sign.png")
    draw_chart(random.Random(105)).image.save(HERE / "chart.png")


if __name__ == "__main__":
    main()
