"""The console: labels and texts on one line, notes that several runs share, nothing that a terminal would obey."""

from __future__ import annotations

import io

import pytest
import rich.console
from rich.table import Column, Table

from metazo.io.terminal import Console


def shown(*calls: tuple[str, object, bool]) -> str:
    console = Console(file=io.StringIO(), width=20)
    for label, text, once in calls:
        console.say(label, text, once=once)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_note_is_shown_once_if_asked_and_every_time_otherwise() -> None:
    assert shown(("note:", "a", True), ("note:", "a", True)) == "note: a\n"
    assert shown(("note:", "a", False), ("note:", "a", True)) == "note: a\n"
    assert shown(("note:", "a", True), ("note:", "b", True), ("memory:", "a", True)) == "note: a\nnote: b\nmemory: a\n"
    assert shown(("steps:", 3, False), ("steps:", 3, False)) == "steps: 3\n" * 2


def test_consoles_do_not_share_what_they_have_shown() -> None:
    assert shown(("note:", "a", True)) == shown(("note:", "a", True)) == "note: a\n"


def test_a_text_is_one_line_however_long_and_no_command_to_the_terminal() -> None:
    assert shown(("note:", "word " * 20, False)).count("\n") == 1
    assert "\x1b" not in shown(("note:", "\x1b[31mred", False))


def test_a_console_of_rich_becomes_one_of_metazo() -> None:
    target = io.StringIO()
    Console.of(rich.console.Console(file=target)).say("note:", "[bold]", once=True)
    assert target.getvalue() == "note: [bold]\n"


@pytest.mark.parametrize(("width", "broken"), [(20, True), (32, False)])
def test_a_narrow_table_breaks_its_cells_and_cuts_nothing_off(width: int, broken: bool) -> None:
    """A number without its exponent would be another one. Columns that are to be whole are if there is room."""
    console = Console(file=io.StringIO(), width=width)
    table = Table(Column("loss", no_wrap=True), "accuracy")
    table.add_row("1.23456e-07", "0.987654321")
    console.print(table)
    lines = [line.split("│")[1:3] for line in console.file.getvalue().splitlines() if line.startswith("│")]  # type: ignore
    assert ["".join(line[column].strip() for line in lines) for column in range(2)] == ["1.23456e-07", "0.987654321"]
    assert (len(lines) > 1) == broken
