"""`metazo bench --suite feedback`: cosine of each surrogate's estimate with the true gradient, by depth and site, at the start
of training and along it; as figures (feedback.json) and as a picture (feedback.png).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metazo.feedback.alignment import EVERY, alignments
from metazo.feedback.jacobian import fit_jacobian
from metazo.feedback.surrogates import Column, Skip, Surrogate
from metazo.io.extras import needs
from metazo.io.files import write_whole
from metazo.models.load import load_model
from metazo.optimizers.answer_column import AnswerColumn
from metazo.plots.style import look, save, styled
from metazo.tasks import get, prepare

JSON, PICTURE = "feedback.json", "feedback.png"
TASKS, STEPS, QUICK = ("pico_topic", "pico_cause"), (0, 10, 40), (0, 2)
BATCH, FIT, TEST, RANK, LENGTH, RATE = 16, 12, 3, 16, 64, 1e-2


def measure(task: str, marks: Sequence[int], tick: Callable[[], None], *, batch: int = BATCH) -> list[dict[str, Any]]:
    """Rows {task, step, surrogate, block, site, cosine, ratio} of pico, means over TEST batches that no step trains on.

    marks: numbers of steps of answer-column at which cosines are taken. The mean Jacobian is fitted once, at the start.
    block None: all blocks; site: a tensor's name within its block, or "all".
    """
    loaded = load_model("pico")
    model: Any = loaded.model.eval()
    prepared = prepare(get(task), loaded, train=batch * max(FIT, *marks), dev=batch * TEST, test=0, max_length=LENGTH)
    train = [_loss(prepared, model, batch) for batch in prepared.batches(prepared.train, batch)]
    dev = [_loss(prepared, model, batch) for batch in prepared.batches(prepared.dev, batch)]
    surrogates: dict[str, Surrogate] = {
        "skip": Skip(),
        f"feedback, rank {RANK}": fit_jacobian(model, train[:FIT], rank=RANK),
        "column": Column(),
    }
    tick()
    optimizer = AnswerColumn(model.named_parameters(), RATE, model=model)
    rows: list[dict[str, Any]] = []
    for mark in marks:
        while optimizer.steps < mark:
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - optimizer.steps / marks[-1])
            optimizer.step(train[optimizer.steps])
        for name, surrogate in surrogates.items():
            rows += _rows({"task": task, "step": mark, "surrogate": name}, model, dev, surrogate)
            tick()
    return rows


def _loss(prepared: Any, model: Any, batch: Any) -> Callable[[], Any]:
    return lambda: prepared.loss(model, batch)


def _rows(key: dict[str, Any], model: Any, losses: Sequence[Callable], surrogate: Surrogate) -> list[dict[str, Any]]:
    found: dict[tuple[int | None, str], list[tuple[float, float]]] = {}
    for loss in losses:
        for row in alignments(model, [loss], surrogate):
            found.setdefault((row.block, row.site), []).append((row.cosine, row.ratio))
    return [
        key | {"block": block, "site": site} | {
            name: round(sum(values) / len(values), 4) for name, values in zip(("cosine", "ratio"), zip(*pairs))
        }
        for (block, site), pairs in found.items()
    ]  # fmt: skip


def run(out: Path, *, quick: bool = False, tick: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """Measure and write feedback.json and feedback.png into `out`. quick: one task and two steps, as a check."""
    rows: list[dict[str, Any]] = []
    for task in TASKS[:1] if quick else TASKS:
        rows += measure(task, QUICK if quick else STEPS, tick, batch=4 if quick else BATCH)
    settings = {"model": "pico", "batch": 4 if quick else BATCH, "fit batches": FIT, "test batches": TEST, "rate": RATE}
    text = json.dumps({"settings": settings, "rows": rows}).replace('{"task"', '\n{"task"')
    write_whole(out / JSON, (text + "\n").encode())
    draw(rows, out / PICTURE)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """(task, step, surrogate, cosine over all blocks, cosines of the blocks from the last one down)."""
    found = []
    for row in rows:
        if row["block"] is None and row["site"] == EVERY:
            mine = [r for r in rows if _key(r) == _key(row) and r["site"] == EVERY and r["block"] is not None]
            mine.sort(key=lambda r: -r["block"])
            blocks = ", ".join(f"{r['cosine']:.2f}" for r in mine)
            found.append((row["task"], str(row["step"]), row["surrogate"], f"{row['cosine']:.2f}", blocks))
    return found


def _key(row: dict[str, Any]) -> tuple:
    return row["task"], row["step"], row["surrogate"]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A row per task: cosine by depth per step, a line per surrogate; then the skip rule at the start, by site and depth."""
    with needs("report"):
        from matplotlib.figure import Figure

    tasks, steps = ([*dict.fromkeys(row[name] for row in rows)] for name in ("task", "step"))
    with styled():
        figure = Figure(figsize=(3.1 * len(steps) + 4.6, 3.3 * len(tasks)), layout="constrained")
        ratios = [1.0] * len(steps) + [1.2]
        grid = figure.subplots(len(tasks), len(steps) + 1, squeeze=False, width_ratios=ratios)
        for axes, task in zip(grid, tasks):
            for axis, step in zip(axes, steps):
                _depth(axis, [r for r in rows if r["task"] == task and r["step"] == step and r["site"] == EVERY])
                axis.set(title=f"{task}, step {step}", xlabel="block, from the first to the last", ylim=(0, 1.05))
            axes[0].set_ylabel("cosine with the true gradient")
            axes[0].legend(loc="lower right")
            _sites(axes[-1], [r for r in rows if r["task"] == task and r["step"] == 0 and r["surrogate"] == "skip"])
    save(figure, path)


def _depth(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    for index, name in enumerate(dict.fromkeys(row["surrogate"] for row in rows)):
        points = sorted((r["block"], r["cosine"]) for r in rows if r["surrogate"] == name and r["block"] is not None)
        axis.plot(*zip(*points), label=name, **look(index))
        axis.set_xticks([block for block, _ in points])


def _sites(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    rows = [row for row in rows if row["site"] != EVERY and row["block"] is not None]
    sites, blocks = sorted({r["site"] for r in rows}), sorted({r["block"] for r in rows})
    values = [[next(r["cosine"] for r in rows if (r["site"], r["block"]) == (s, b)) for b in blocks] for s in sites]
    axis.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            axis.text(
                x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value > 0.6 else "black"
            )
    axis.set(title="skip rule by tensor, step 0", xlabel="block")
    axis.set_xticks(range(len(blocks)), blocks)
    axis.set_yticks(range(len(sites)), [site.removesuffix(".weight") for site in sites], fontsize=7)
    axis.grid(False)
