"""metazo tasks"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Column, Table

from metazo.io.terminal import Console, print_json


def tasks(
    name: Annotated[str | None, typer.Argument(help="Name of a task to show completely.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the tasks, or show one: prompt, label words, metric."""
    from metazo.tasks import TASKS, resolve

    chosen = {name: resolve(name)} if name else TASKS
    if as_json:
        print_json({key: task.model_dump(mode="json") for key, task in chosen.items()})
        return
    if name:
        table = Table("", name, show_lines=True)
        for key, value in chosen[name].model_dump(mode="json").items():
            if value not in (None, "", [], {}):
                table.add_row(key, str(value))
    else:
        table = Table(
            *(Column(name, no_wrap=name in ("task", "kind")) for name in ("task", "family", "kind", "metric", "prompt"))
        )
        for key, task in sorted(
            TASKS.items(), key=lambda item: item[1].family or ""
        ):  # the sort keeps the order within
            prompt = " ".join(task.prompt.split())
            prompt = prompt if len(prompt) <= 90 else f"{prompt[:90]} ..."
            table.add_row(key, task.family or "", task.kind, ", ".join(task.metric), prompt)
    Console().print(table)
