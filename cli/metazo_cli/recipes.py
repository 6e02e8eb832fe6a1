"""metazo recipes"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.syntax import Syntax
from rich.table import Table

from metazo.io.terminal import Console, print_line


def recipes(name: Annotated[str | None, typer.Argument(help="Name of the recipe to print.")] = None) -> None:
    """List the recipes of metazo, or print one (metazo recipes NAME > mine.yaml)."""
    from metazo import recipes as library

    console = Console()
    if name:
        text = library.text(name)
        if console.is_terminal:
            console.print(Syntax(text, "yaml", background_color="default"), soft_wrap=True)
        else:
            print_line(text.rstrip("\n"))
        return
    table = Table("recipe", "description")
    for known in library.names():
        table.add_row(known, library.text(known).splitlines()[0].lstrip("# "))
    console.print(table)
