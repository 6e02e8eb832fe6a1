"""The style of plots: colours that colour-blind readers can distinguish, each with its own marker and line style."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from metazo.io.extras import needs

with needs("report"):
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter


# Okabe and Ito (2008), without the yellow that is invisible on white; each has its own marker and line style.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
# Text is laid out in matplotlib's own font, the widest of these, and shown in the first font that the reader has.
FONT, SHOWN_FONTS = "DejaVu Sans", "'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
SETTINGS: dict[str, Any] = {
    "font.family": FONT,
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "metazo",  # the same picture has the same bytes
    "text.parse_math": False,  # a dollar in a name is a dollar
}


@contextmanager
def styled() -> Iterator[None]:
    """A context that applies this style. It uses no window system: figures are made without pyplot."""
    with matplotlib.rc_context(SETTINGS):  # type: ignore[arg-type]
        yield


def look(index: int) -> dict[str, Any]:
    """Colour, marker and line style of the index-th line; no two of the first 35 share all three."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": STYLES[index % len(STYLES)],
    }


def log_axis(axes: Axes, which: str, show: Callable[[float], str] = "{:g}".format) -> None:
    """A logarithmic axis with its numbers written out: 0.0003, not a power in mathematical type."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = getattr(axes, f"get_{which}lim")()
    ratio = high / low if low > 0 else 1e9
    locator = LogLocator(subs=(1, 2, 5) if ratio < 12 else (1, 3) if ratio < 500 else (1,))
    within = [tick for tick in locator.tick_values(low, high) if low <= tick <= high] if low > 0 else []
    if ratio < 12 and len(within) < 3:  # a single number says nothing of a scale
        locator = MaxNLocator(5)
    axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axis.set_minor_formatter(NullFormatter())


def cut(axes: Axes, low: float, high: float) -> None:
    """End the vertical axis at `high` if a value is above it; low: the smallest drawn value."""
    if axes.get_ylim()[1] > high > low:
        axes.set_ylim(low - 0.06 * (high - low), high)


def short(value: float) -> str:
    """A number in three significant digits: 850, 1.2k, 3M, 2e-05."""
    value = float(f"{value:.3g}")
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


@contextmanager
def unprintable() -> Iterator[None]:
    """Leave out matplotlib's warning about a character that no font has: it would print the character itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph ", category=UserWarning)
        yield


def svg(figure: Figure) -> str:
    """The figure as SVG; the same figure gives the same text."""
    buffer = io.StringIO()
    with styled(), unprintable():  # not by savefig, which draws a figure with a layout twice
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue().replace(f"'{FONT}'", SHOWN_FONTS)


def data_uri(svg: str) -> str:
    """A picture as the src of an <img>: self-contained, and its text cannot act on the page."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def save(figure: Figure, path: Path) -> None:
    """Write PNG or SVG, by the path's ending, without dates."""
    if path.suffix == ".svg":
        path.write_text(svg(figure), encoding="utf-8")
    else:
        with styled(), unprintable():
            png(figure, path)


def png(figure: Figure, file: Path | BinaryIO, dpi: int = 130) -> None:
    """Write PNG without dates, drawn once as by svg()."""
    figure.set_dpi(dpi)
    FigureCanvasAgg(figure).print_png(file, metadata={"Software": None}, pil_kwargs={"compress_level": 3})
