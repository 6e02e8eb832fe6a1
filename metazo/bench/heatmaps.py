"""Pictures of a partition: the entries of each block by depth and kind, and the norms of a Hessian's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import Literal

import numpy as np

from metazo.bench.hessian import BlockNorms
from metazo.blocks import OUTSIDE, Block, places_of
from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.plots.style import log_axis, short, styled

with needs("report"):
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

LABELS = 45  # of an axis; of more blocks every second, third, ... is named
DECADES = 6  # of the colour scale of a Hessian; smaller values have its darkest colour
EMPTY = "#f2f2f2"


def partition_picture(blocks: Sequence[Block], title: str) -> Figure:
    """A heat map of the blocks' numbers of entries: a row per kind of block, a column per layer."""
    places = places_of([block.name for block in blocks])
    depths = sorted({depth for depth, _ in places})
    inside = {kind for depth, kind in places if depth != OUTSIDE}
    kinds = sorted(dict.fromkeys(kind for _, kind in places), key=lambda kind: kind not in inside)
    values = np.full((len(kinds), len(depths)), np.nan)
    for block, (depth, kind) in zip(blocks, places):
        values[kinds.index(kind), depths.index(depth)] = block.numel
    with styled():
        width = 2.2 + 0.08 * max(map(len, kinds)) + max(2.0, 0.16 * len(depths))
        figure = Figure(figsize=(min(width, 12), 1.6 + 0.2 * len(kinds)), layout="constrained")
        axes = figure.subplots()
        _map(figure, axes, values, np.nanmin(values), "entries", "auto")
        every = max(1, len(depths) // 12)
        shown = [place for place, depth in enumerate(depths) if depth == OUTSIDE or depth % every == 0]
        axes.set_xticks(shown, ["–" if depths[place] == OUTSIDE else str(depths[place]) for place in shown])
        axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
        axes.set(title=title, xlabel="layer (–: none)")
    return figure


def hessian_picture(found: BlockNorms, title: str) -> Figure:
    """Two heat maps of blocks by blocks: their shares of the squared norm, and squares per entry over their mean.

    Raises UserError for a Hessian of zeros.
    """
    if not float(found.norms.sum()) > 0:
        raise UserError("Every second derivative of the loss is 0, so there is nothing to draw; leave `plot` out.")
    norms, counts = found.norms.numpy(), np.array(found.entries, dtype=float)
    shares = norms / norms.sum()
    density = shares / np.outer(counts, counts) * counts.sum() ** 2
    labels = [kind if depth == OUTSIDE else f"{depth} {kind}" for depth, kind in places_of(found.names)]
    every = -(-len(labels) // LABELS)
    side = 1.4 + 0.06 * max(map(len, labels)) + 0.13 * len(labels) / every
    with styled():
        width = 2 * side + 1.6
        lines = wrap(title, int(12.5 * width))  # of letters of 11 points, 12.5 to the inch at least
        figure = Figure(figsize=(width, side + 0.2 + 0.2 * len(lines)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, values, name in (
            (left, shares, "share of the squared norm"),
            (right, density, "squared entry / mean"),
        ):
            _map(figure, axes, values, 10.0**-DECADES * np.nanmax(values), "", "equal")
            axes.set_xticks(range(0, len(labels), every), labels[::every], fontsize=6.5, rotation=90)
            axes.set_title(name)
        left.set_yticks(range(0, len(labels), every), labels[::every], fontsize=6.5)
        figure.suptitle("\n".join(lines), fontsize=11)
        figure.draw_without_rendering()  # with squares, the first layout has too little room for labels and title
    return figure


def _map(
    figure: Figure, axes: Axes, values: np.ndarray, low: float, label: str, aspect: Literal["equal", "auto"]
) -> None:
    """A heat map on a logarithmic scale from `low`, with its colour bar."""
    high = float(np.nanmax(values))
    low, high = (low / 1.05, high * 1.05) if not low < high else (low, high)
    axes.grid(visible=False)
    axes.set_facecolor(EMPTY)
    image = axes.imshow(
        np.maximum(values, low),
        norm=LogNorm(low, high),
        cmap="cividis",
        aspect=aspect,
        interpolation="nearest",
    )
    log_axis(figure.colorbar(image, ax=axes, label=label, pad=0.02).ax, "y", short)
