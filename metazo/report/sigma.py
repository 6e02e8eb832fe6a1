"""Pictures of a tuner's scales: the scale of each block, by depth and kind of block, over the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from metazo.blocks import OUTSIDE, places_of
from metazo.io.extras import needs
from metazo.plots.style import log_axis, short, styled

from .figures import clipped

with needs("report"):
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

TIMES = 4


@dataclass(frozen=True)
class Scales:
    """Scales by step, kind of block and depth, as multiples of their geometric mean at the step; NaN: no such block."""

    kinds: list[str]
    depths: list[int]
    steps: list[int]
    values: np.ndarray


def read(sigma: dict[str, Any]) -> Scales:
    """Read a run's `blocks`, `steps` and `values`. Raises ValueError if they are damaged."""
    try:
        values = np.array(sigma["values"], dtype=float)
        steps = [int(step) for step in sigma["steps"]]
        places = places_of([str(block) for block in sigma["blocks"]])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"sigma cannot be read: {error}") from error
    if values.ndim != 2 or values.shape != (len(steps), len(places)) or not values.size:
        raise ValueError(f"sigma has the shape {values.shape}, not {len(steps)} steps by {len(places)} blocks")
    values = np.where(np.isfinite(values) & (values > 0), values, np.nan)
    if np.isnan(values).all(axis=1).any():
        raise ValueError("sigma has a step without a positive value")
    values = values / np.exp(np.nanmean(np.log(values), axis=1, keepdims=True))
    depths = sorted({depth for depth, _ in places})
    inside = {kind for depth, kind in places if depth != OUTSIDE}
    kinds = sorted(dict.fromkeys(kind for _, kind in places), key=lambda kind: kind not in inside)
    cube = np.full((len(steps), len(kinds), len(depths)), np.nan)
    for block, (depth, kind) in enumerate(places):
        cube[:, kinds.index(kind), depths.index(depth)] = values[:, block]
    return Scales(kinds, depths, steps, cube)


def picture(scales: Scales) -> Figure:
    """TIMES heat maps with one colour scale."""
    kinds, depths, steps, cube = scales.kinds, scales.depths, scales.steps, scales.values
    times = sorted(set(np.linspace(0, len(steps) - 1, min(TIMES, len(steps))).round().astype(int).tolist()))
    low, high = np.nanmin(cube[times]), np.nanmax(cube[times])
    low, high = (low / 1.05, high * 1.05) if not low < high else (low, high)
    norm = LogNorm(low, high)
    with styled():
        width = 1.6 + 0.11 * max(map(len, kinds)) + max(1.3, 0.16 * len(depths)) * len(times)
        figure = Figure(figsize=(min(width, 11), 1.3 + 0.2 * len(kinds)), layout="constrained")
        panels = figure.subplots(1, len(times), squeeze=False, sharey=True)[0]
        images = []
        for axes, time in zip(panels, times):
            axes.grid(visible=False)
            axes.set_facecolor("#f2f2f2")
            images.append(axes.imshow(cube[time], norm=norm, cmap="cividis", aspect="auto", interpolation="nearest"))
            every = max(1, len(depths) // 6)
            shown = [i for i, depth in enumerate(depths) if depth == OUTSIDE or depth % every == 0]
            axes.set_xticks(shown, ["–" if depths[i] == OUTSIDE else str(depths[i]) for i in shown])
            axes.set_yticks(range(len(kinds)), [clipped(kind) for kind in kinds], fontsize=8)
            axes.set(title=f"step {steps[time]:,}", xlabel="layer (–: none)")
        bar = figure.colorbar(images[0], ax=list(panels), label="σ / mean σ", pad=0.02)
        if high / low < 1e4:
            log_axis(bar.ax, "y", short)
    return figure
