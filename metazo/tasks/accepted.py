"""The choices and accepted answers of a row, checked."""

from __future__ import annotations

import math
from string import ascii_uppercase

from metazo.errors import UserError
from metazo.io.plain import shown
from metazo.tasks.task import Row, Task


def choices_of(task: Task, row: Row, where: str) -> tuple[list[str], list[int]]:
    """The choices of a row, and the numbers of the correct ones. Raises UserError for too few or too many choices, and if none
    is correct. ``where`` names the row.
    """
    names = task.choices
    texts = row[names[0]] if len(names) == 1 else [row[name] for name in names]
    _refuse_nan(texts, names[0], where)
    right = row[task.label]
    targets = right if isinstance(right, list) else [right]
    texts = ["" if text is None else str(text) for text in texts] if isinstance(texts, list) else texts
    if not isinstance(texts, list) or sum(bool(text.strip()) for text in texts) < 2:
        raise UserError(
            f"{where}: {names[0]!r} must hold a list of two or more choices that are not blank, found {shown(texts)}"
            if len(names) == 1
            else f"{where}: two or more of the choices {', '.join(names)} must not be blank, found {shown(texts)}"
        )
    if task.letters and len(texts) > len(ascii_uppercase):
        raise UserError(f"{where} has {len(texts)} choices, more than there are letters; leave out `letters`")
    if not targets or not all(isinstance(i, int) and 0 <= i < len(texts) for i in targets):
        raise UserError(f"{where}: {task.label!r} is {right!r}, not the number of a choice from 0 to {len(texts) - 1}")
    targets = [int(i) for i in targets if texts[i].strip()]
    if not targets:
        raise UserError(f"{where}: {task.label!r} is {right!r}, a choice that is blank")
    return texts, targets


def references_of(task: Task, row: Row, where: str) -> list[str]:
    """The accepted answers of a row. Raises UserError if there is none."""
    if task.messages is not None:
        return [row[task.messages][-1]["content"]]
    name, _, inner = task.answer.partition(".")
    value = row[name]
    if inner:
        value = value.get(inner) if isinstance(value, dict) else None
    answers = [value] if isinstance(value, str | int | float) else value
    _refuse_nan(answers, task.answer, where)
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str | int | float) for a in answers):
        raise UserError(f"{where}: {task.answer!r} must hold an answer or a list of them, found {shown(value)}")
    return [str(answer) for answer in answers]


def _refuse_nan(values: object, name: str, where: str) -> None:
    """Raises UserError for a number that is not finite, which would become a text."""
    for value in values if isinstance(values, list) else ():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {name!r} has {value}, which is how some programs write an empty cell")
