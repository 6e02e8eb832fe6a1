"""metazo blocks"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from metazo.errors import UserError
from metazo.io.terminal import print_json
from metazo.runs.config import FinetuneConfig

from . import options
from .messages import Terminal

MODEL = ("kind", "head", "dtype", "train", "freeze", "lora", "revision", "attn_implementation")
LOSS = ("task", "data", "batch_size", "max_length", "device", "seed")
"""Settings of a run that decide the partition, and those that decide the loss."""


def blocks(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model, folder of a run, pico or micro.")],
    by: Annotated[
        str, typer.Option(help="tensor, one block each, or layer: the tensors of a numbered layer.")
    ] = "tensor",
    hessian: Annotated[
        bool, typer.Option("--hessian", help="Measure how block-diagonal the Hessian of the loss on --task is.")
    ] = False,
    draws: Annotated[
        int, typer.Option(help="Random vectors per block, if the model is too large for an exact Hessian.", min=2)
    ] = 16,
    plot: Annotated[
        Path | None, typer.Option(help="PNG or SVG file for a picture of the blocks or the Hessian.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **values: Any,
) -> None:
    """Show the blocks of a model's weights, each of which has one scale. No weights are loaded without --hessian.

    metazo blocks pico --plot blocks.png

    metazo blocks pico --hessian --task pico_sentiment --plot hessian.png
    """
    if plot is not None:
        options.check_plot(plot)
    if hessian and values["task"] is None:
        raise UserError("--hessian is that of a loss, so it needs `task`.")
    settings = options.settings(FinetuneConfig, None, {"model": model, **values, "task": values["task"] or "sst2"})
    console = Terminal(stderr=as_json)
    cut, found = _measured(settings, by, draws, console) if hessian else (_bare(settings, by, values["task"]), None)
    if as_json:
        print_json(_record(settings, by, cut, found))
    else:
        _show(console, settings, cut, found)
    if plot is not None:
        from metazo.bench.heatmaps import hessian_picture, partition_picture
        from metazo.plots.style import save

        title = f"{model}: {len(cut)} blocks by {by}"
        save(hessian_picture(found, _sentence(found)) if found else partition_picture(cut, title), plot)


def _bare(config: FinetuneConfig, by: str, task: str | None) -> list[Any]:
    """The blocks of the model on the meta device."""
    import torch

    from metazo.blocks import named_tensors, partition
    from metazo.models.assemble import assemble, base_of
    from metazo.models.skeleton import skeleton
    from metazo.tasks import resolve

    labels = resolve(task).num_labels if task else None
    folder, revision = base_of(config.model, config.revision)
    loaded = skeleton(
        folder, kind=config.kind, dtype=config.dtype, num_labels=labels, head=config.head, revision=revision
    )  # fmt: skip
    loaded, _ = assemble(config, labels=labels, device=torch.device("meta"), given=loaded)
    return partition(named_tensors(loaded.model), by)


def _measured(config: FinetuneConfig, by: str, draws: int, console: Terminal) -> tuple[list[Any], Any]:
    """The blocks of the model, and the norms of the blocks of its Hessian on a batch of training examples."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from metazo.bench.hessian import block_norms, products
    from metazo.blocks import named_tensors, partition
    from metazo.runs.setup import set_up
    from metazo.tasks.closures import BatchLoss

    needed = {"train_examples": config.batch_size, "dev_examples": 0, "test_examples": 0, "keep": "last"}
    run = set_up(replace(config, **needed))
    for note in run.rows.notes:
        console.say("note:", note)
    cut = partition(named_tensors(run.loaded.model), by)
    loss = BatchLoss(run.loaded.model, run.rows, run.rows.train, run.device)
    columns = (TextColumn("Hessian-vector products"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("products", total=products(cut, draws))
        return cut, block_norms(loss, cut, draws=draws, seed=config.seed, tick=lambda: progress.advance(task))


def _sentence(found: Any) -> str:
    error = "" if found.exact else f" ± {100 * found.share_error:.1f}"
    even = f"{100 * found.even:.1f} % if all entries were alike"
    return f"{100 * found.share:.1f}{error} % of the Hessian's squared norm is within the blocks; {even}"


def _record(config: FinetuneConfig, by: str, cut: list[Any], found: Any) -> dict[str, Any]:
    whole = sum(block.numel for block in cut)
    record: dict[str, Any] = {
        "model": config.model, "by": by, "entries": whole,
        "blocks": [{"name": block.name, "entries": block.numel, "share": block.numel / whole,
                    "tensors": [tensor.name for tensor in block.tensors]} for block in cut],
    }  # fmt: skip
    if found is not None:
        record["hessian"] = {
            "task": config.task, "batch size": config.batch_size, "dtype": config.dtype, "exact": found.exact,
            "draws": None if found.exact else len(found.samples), "share": found.share, "error": found.share_error,
            "even": found.even, "norms": found.norms.tolist(), "errors": found.errors.tolist(),
        }  # fmt: skip
    return record


def _show(console: Terminal, config: FinetuneConfig, cut: list[Any], found: Any) -> None:
    whole = sum(block.numel for block in cut)
    table = Table(title=f"{config.model}: {len(cut)} blocks")
    table.add_column("block", overflow="fold")
    for head in ("tensors", "entries", "share", *(() if found is None else ("norm²", "of its rows"))):
        table.add_column(head, justify="right")
    for index, block in enumerate(cut):
        cells = [f"{len(block.tensors)}", f"{block.numel:,}", _percent(block.numel / whole)]
        if found is not None:
            cells += [
                _percent(float(part)) for part in (found.norms[index, index] / found.norms.sum(), found.own[index])
            ]
        table.add_row(block.name, *cells)
    table.add_section()
    total = [_percent(found.share), ""] if found is not None else []
    table.add_row("all", f"{sum(len(block.tensors) for block in cut)}", f"{whole:,}", "100 %", *total)
    console.print(table)
    if found is not None:
        how = "exact" if found.exact else f"estimated from {len(found.samples)} random vectors per block"
        console.print(
            f"{_sentence(found)} ({how}; {config.task}, one batch of {config.batch_size}). norm²: the block's share of the "
            "squared norm; of its rows: the part of the squared norm of the block's rows that is within the block.",
            soft_wrap=True,
        )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.1f} %"


_task = options.parameter(
    "task", str, "Task, by name or as a YAML file: its loss with --hessian, else its number of classes for a new head"
)
command = options.with_flags(
    blocks,
    [_task, *(flag for flag in options.flags(FinetuneConfig, skip=("task",)) if flag.name in (*MODEL, *LOSS))],
)
