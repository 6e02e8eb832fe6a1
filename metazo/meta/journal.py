"""The display and records of a meta-training run: progress, metrics as JSONL, the plot of sigma."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from metazo.blocks import Block
from metazo.io.extras import needs
from metazo.io.files import whole_file
from metazo.io.plain import finite
from metazo.io.terminal import Console
from metazo.meta.config import MetaConfig
from metazo.meta.horizon_config import HorizonConfig
from metazo.meta.loop import MetaStep
from metazo.meta.ratio import block_type
from metazo.runs.folder import METRICS

PLOT = "sigma.png"
COLLAPSED = 0.5  # fraction of the perturbation in one block
_PLAIN_EVERY = 10.0  # seconds between lines if the output is not a terminal


def say(console: Console | None, text: str) -> None:
    if console is not None:
        console.print(text, soft_wrap=True)


def short_types(names: Sequence[str]) -> list[str]:
    """Short names of block types: of each the last module and parameter, such as `q_proj.weight`, with as many of the modules
    before them as set it apart from the other types.
    """
    parts = [name.split(".") for name in names]

    def short(own: list[str]) -> str:
        ends = (own[-length:] for length in range(2, len(own)))
        alone = (end for end in ends if sum(other[-len(end) :] == end for other in parts) == 1)
        return ".".join(next(alone, own))

    return [short(own) for own in parts]


def by_type(blocks: Sequence[Block], scales: Sequence[float]) -> dict[str, float]:
    """Geometric mean of the scales of each type of block; types in the order of the model."""
    logs: dict[str, list[float]] = {}
    for block, scale in zip(blocks, scales, strict=True):
        logs.setdefault(block_type(block.name), []).append(math.log(max(scale, 1e-30)))
    return {name: math.exp(sum(values) / len(values)) for name, values in logs.items()}


def row_of(step: MetaStep, blocks: Sequence[Block]) -> dict[str, Any]:
    """A line of the metrics; numbers that are not finite are null."""
    top = int(step.shares.argmax())
    return {
        "step": step.step,
        "task": step.task,
        "meta_loss": finite(step.meta_loss),
        "loss": finite(step.loss),
        "teacher_loss": finite(step.teacher_loss),
        "largest_share": float(step.shares[top]),
        "largest_block": blocks[top].name,
        "sigma": {name: round(value, 6) for name, value in by_type(blocks, step.scales.tolist()).items()},
        "skipped": step.skipped,
    }


class Progress:
    """Shows a live panel on a terminal, a line every ten seconds elsewhere, and nothing without a console."""

    def __init__(self, console: Console | None, config: MetaConfig | HorizonConfig, total: int, first: int = 0):
        self.console, self.config, self.total, self.first = console, config, total, first
        self.smooth: float | None = None
        self.began = self.told = time.monotonic()
        self.warned = False
        self.live = Live(console=console, refresh_per_second=4) if console and console.is_terminal else None

    def __enter__(self) -> Progress:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, row: dict[str, Any], skipped: int) -> None:
        """One metrics row."""
        if row["meta_loss"] is not None:
            old = row["meta_loss"] if self.smooth is None else self.smooth
            self.smooth = 0.9 * old + 0.1 * row["meta_loss"]
        if self.console is None:
            return
        if self.live is not None:
            self.live.update(self._panel(row, skipped))
        elif time.monotonic() - self.told > _PLAIN_EVERY or row["step"] + 1 == self.total:
            self.told = time.monotonic()
            self.console.print(self._headline(row, skipped))
        if row["largest_share"] > COLLAPSED and not self.warned:
            self.warned = True
            self.console.print(warning(row, self.config), style="yellow")

    def _headline(self, row: dict[str, Any], skipped: int) -> str:
        done = row["step"] + 1
        left = (time.monotonic() - self.began) / max(done - self.first, 1) * (self.total - done)
        smooth = "-" if self.smooth is None else f"{self.smooth:.4f}"
        parts = [f"meta-step {done}/{self.total}", f"meta-loss {smooth}", f"largest share {row['largest_share']:.0%}"]
        if skipped:
            parts.append(f"{skipped} skipped")
        return ", ".join([*parts, f"{left:.0f} s left"])

    def _panel(self, row: dict[str, Any], skipped: int) -> Group:
        table = Table("block type", "sigma", title=None, box=None, padding=(0, 2))
        for name, value in list(zip(short_types(list(row["sigma"])), row["sigma"].values()))[:16]:
            bar = "#" * max(1, min(30, round(10 + 8 * math.log10(max(value, 1e-6)))))
            table.add_row(name, f"{value:8.3f}  {bar}")
        done = row["step"] + 1
        width = round(40 * done / self.total)
        lines = [Text(f"[{'=' * width}{' ' * (40 - width)}] {self._headline(row, skipped)}")]
        if row["largest_share"] > COLLAPSED:
            lines.append(Text(warning(row, self.config), style="yellow"))
        return Group(*lines, table)


STILL = {"result": "that of the start, which no meta-step moved"}  # in the recipe of a tuner that learned nothing


def still(steps: int, what: str, config: MetaConfig | HorizonConfig) -> str:
    """The note of a run whose `what` is exactly that of the start, with the settings that may be too small."""
    names = ["eps", "spread", "lr_sigma"] if isinstance(config, HorizonConfig) else ["lr_meta"]
    if isinstance(config, MetaConfig) and config.objective == "published":
        names = ["eps", "lr_update", *names]
    listed = [f"`{name}` (now {getattr(config, name):g})" for name in names]
    raised = listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} or {listed[-1]}"
    return (
        f"None of the {steps} meta-steps moved {what}: the meta-gradient was exactly 0, or too small for their numbers. The "
        f"tuner has learned nothing, so do not publish it: raise {raised}, and train again in another `out`."
    )


def warning(row: dict[str, Any], config: MetaConfig | HorizonConfig) -> str:
    """The collapse warning, with those remedies that the run's settings allow."""
    if isinstance(config, HorizonConfig):
        remedy = "Lower `spread`, `lr_sigma` or `bound`"
    else:
        own = "raise `entropy`" if config.objective == "ratio" else "average more `queries`"
        bound = "lower `bound`" if config.parametrisation == "rms_exp" else "use `parametrisation='rms_exp'`"
        remedy = f"Lower `lr_meta`, {own}, or {bound}"
    return (
        f"Collapse: {row['largest_block']} holds {row['largest_share']:.0%} of the perturbation at meta-step "
        f"{row['step'] + 1}. {remedy}."
    )


def plot(folder: Path, normalised: bool) -> Path:
    """Sigma by block type over meta-steps, from the metrics, as PNG. normalised: whether its mean square over
    the weights is 1.
    """
    with needs("report"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        from metazo.plots.style import log_axis, look, png, styled, unprintable

    rows = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    steps, names = [row["step"] for row in rows], list(rows[0]["sigma"])
    path = folder / PLOT
    with styled(), unprintable(), whole_file(path) as file:
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.subplots()
        for index, (name, label) in enumerate(zip(names, short_types(names))):
            sigma = [row["sigma"][name] for row in rows]
            axes.plot(steps, sigma, label=label, markevery=max(len(rows) // 8, 1), **look(index))
        kind = "normalised sigma" if normalised else "sigma, not normalised"
        axes.set(xlabel="meta-step", ylabel=f"{kind} (geometric mean by block type)")
        log_axis(axes, "y")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if normalised:
            axes.axhline(1, color="#666666", linewidth=0.8, zorder=0)
        if len(names) <= 40:
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        png(figure, file, 120)
    return path
