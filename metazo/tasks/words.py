"""The label words of a classification task as tokens: one token each for a masked model, and all of them different."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metazo.errors import UserError
from metazo.tasks.task import Task


def spoken_words(task: Task, joint: str) -> list[str]:
    """The label words after a prompt and the spaces ``joint``, without those that they begin with, as in other harnesses."""
    return [word.lstrip(" ") if joint else word for word in task.labels.values()]


def filled_words(task: Task, tokenizer: Any, name: str) -> list[list[int]]:
    """The one token of each label word in the place of a mask. Raises UserError for a word of several or unknown tokens."""
    if tokenizer.mask_token_id is None:
        raise UserError(f"the tokenizer of {name} has no mask token; a masked model needs one")
    words = []
    for word in task.labels.values():
        for text in (f" {word}", word):
            ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
                words.append(ids)
                break
        else:
            raise UserError(
                f"label word {word!r} of task {task.name!r} is not one token of {name}; "
                "a masked model fills one token, so choose another word"
            )
    return words


def check_words(task: Task, tokenizer: Any, words: Sequence[list[int]], name: str) -> None:
    """Refuse label words that are the same tokens or unknown, because their scores would be equal. words: [] if a head
    scores the classes."""
    seen: dict[tuple[int, ...], str] = {}
    for word, ids in zip(task.labels.values(), words):
        if tokenizer.unk_token_id in ids and tokenizer.unk_token_id is not None:
            raise UserError(
                f"label word {word!r} of task {task.name!r} has a token that {name} does not know; choose another word"
            )
        if tuple(ids) in seen:
            raise UserError(
                f"label words {seen[tuple(ids)]!r} and {word!r} of task {task.name!r} are the same tokens for {name}; "
                "choose words that differ"
            )
        seen[tuple(ids)] = word


def beginnings(task: Task, words: Sequence[list[int]]) -> list[tuple[str, str]]:
    """Pairs of label words of which the first begins the second, as tokens: their likelihoods are not comparable."""
    named = list(zip(task.labels.values(), words))
    return [(a, b) for a, one in named for b, other in named if len(one) < len(other) and other[: len(one)] == one]


def drop_words(text: str, cut: int) -> str:
    """``text`` without its first ``cut`` characters and without the rest of the word they end in."""
    rest = text[cut:]
    return rest if text[cut - 1].isspace() or " " not in rest else rest.partition(" ")[2]
