"""Progress of a run: a live bar on a terminal; elsewhere one line per tenth of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from metazo.io.terminal import Console


@contextmanager
def progress(console: Console, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    """A context that gives a function to call with the number of steps taken and a text to show."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=done)

        def show(step: int, text: str) -> None:
            bar.update(task, completed=step, description=text)
            if not console.is_terminal and (step % max(1, total // 10) == 0 or step == total):
                console.print(f"step {step}/{total}  {text}", soft_wrap=True)

        yield show
