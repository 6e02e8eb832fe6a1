"""The generated pico suite as tasks: rows come from the grammar, never from a folder or the Hub."""

from __future__ import annotations

from functools import partial
from typing import Any

from metazo.pico import grammar
from metazo.tasks.task import Row, Task


def _rows(name: str, split: str, number: int, seed: int) -> list[Row]:
    return grammar.examples(name, split, number, seed)


def _task(name: str) -> Task:
    prompt = grammar.PROMPTS[name]
    own: dict[str, Any] = {}
    if prompt.kind == "classification":
        own["labels"] = [word.strip() for word in prompt.words or ()]
    elif prompt.kind == "choice":
        own["choices"] = ("choice1", "choice2")
    else:
        own |= {"stop": ".", "metric": ("f1", "exact_match"), "max_new_tokens": 12}
    return Task(
        name=name,
        kind=prompt.kind,  # type: ignore[arg-type]
        prompt=prompt.template,
        generate=partial(_rows, name),
        **own,
    )


TASKS = tuple(_task(name) for name in grammar.TASKS)
