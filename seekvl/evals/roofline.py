"""The roofline of a machine with the points a benchmark measured, as a picture.

Across: operations for each byte read. Up: operations a second. The roof is the rate of memory times the
former, up to the rate of products; how far a point hangs below it is what is lost.
"""

from pathlib import Path

from seekvl.evals.ceilings import INT8
from seekvl.evals.speed_report import Figure, Report
from seekvl.runtime import SeekVLError, atomic_file, require

INK, ROOF, POINT = "#333333", "#1f4e79", "#c0392b"
BESIDE, BELOW = 2.0, 3.0
"""A point with another one below it, nearer than these factors across and up, has its label above."""


def draw_roofline(report: Report, path: Path) -> None:
    """Write the roofline of a report as PNG.

    Raises SeekVLError for a path that does not end in .png or whose folder does not exist, and where
    matplotlib is missing.
    """
    check_plot(path)
    require("matplotlib", extra="data")
    from matplotlib.figure import Figure as Canvas

    points = [
        (figure, figure.work.operations / figure.work.read_bytes, figure.work.operations / figure.seconds)
        for figure in report.figures
        if figure.work is not None
    ]
    canvas = Canvas(figsize=(7.6, 4.6), dpi=110, layout="constrained")
    axes = canvas.subplots()
    left, right = min(x for _, x, _ in points) / 4, max(x for _, x, _ in points) * 4
    read, peaks = report.ceilings.read, _peaks(report)
    peak = max(peaks.values())
    left, right = min(left, peak / read / 4), max(right, peak / read * 4)
    for name, rate in peaks.items():
        axes.plot([left, rate / read, right], [left * read, rate, rate], color=ROOF, linewidth=2)
        unit = "GOP/s" if name == INT8 else "GFLOP/s"
        says = f"{name} products, {rate / 1e9:,.0f} {unit}"
        axes.text(right / 1.15, rate * 1.15, says, ha="right", color=ROOF)
    axes.text(left * 1.25, left * read * 6, f"memory read,\n{read / 1e9:.1f} GB/s", color=ROOF)
    for figure, x, y in points:
        axes.plot([x], [y], "o", color=POINT, markersize=6)
        above = any(max(x / a, a / x) < BESIDE and 1 < y / b < BELOW for _, a, b in points)
        axes.annotate(
            _label(figure),
            (x, y),
            xytext=(0, 9) if above else (0, -18),
            textcoords="offset points",
            ha="center",
            color=INK,
            fontsize=9,
        )
    lowest = min([y for _, _, y in points] + [left * read])
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(lowest / 3, peak * 2.5))
    axes.set_xlabel("operations per byte of weights and cache")
    axes.set_ylabel("operations per second")
    axes.set_title(
        f"{report.model}, {report.dtype}, {report.ceilings.threads} threads; {report.machine}", fontsize=9
    )
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    with atomic_file(path) as part:
        canvas.savefig(part, format="png")


def _peaks(report: Report) -> dict[str, float]:
    """Return the rates of the products that a model takes, by their name: of a quantised one two."""
    found = {report.dtype: report.ceilings.operations[report.dtype]}
    whole = report.ceilings.operations.get(INT8)
    return found if report.quantize is None or whole is None else found | {INT8: whole}


def check_plot(path: Path) -> None:
    """Refuse a path that the picture cannot be written to."""
    if path.suffix.lower() != ".png":
        raise SeekVLError(f"the plot is a PNG; give a file that ends in .png, not {path}")
    if not path.absolute().parent.is_dir():
        raise SeekVLError(f"cannot write {path}: the folder {path.absolute().parent} does not exist")


def _label(figure: Figure) -> str:
    """Name a point with its share of the ceiling."""
    assert figure.share is not None
    return f"{figure.name}  {100 * figure.share:.0f} %"
