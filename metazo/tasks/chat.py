"""Writes a row's chat with the tokenizer's chat template, up to the place of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from metazo.errors import UserError
from metazo.io.bounded import bounded
from metazo.models.tokenizer import MAX_GROWTH
from metazo.tasks.task import Row, Task

if TYPE_CHECKING:
    from metazo.models.load import LoadedModel

MAX_FRAME = 2**18
"""Characters that a template may write around the turns."""


def check_chat(task: Task, loaded: LoadedModel) -> None:
    """Raises UserError if the model cannot read the chats of the task."""
    if loaded.kind == "masked":
        raise UserError(
            f"task {task.name!r} has `messages`, and {loaded.name} is a masked model, which reads no chat; write a prompt"
        )
    if not getattr(loaded.tokenizer, "chat_template", None):
        raise UserError(
            f"task {task.name!r} has `messages`, and the tokenizer of {loaded.name} has no chat template; write a prompt"
        )


def write(task: Task, tokenizer: Any, rows: Sequence[tuple[str, Row]]) -> list[str]:
    """The chat of each (name, row) without its last assistant turn, followed by the beginning of the answering turn."""
    chats = []
    for where, row in rows:
        turns = row[task.messages]  # type: ignore[index]
        good = isinstance(turns, list) and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in turns
        )
        if not good or not turns:
            raise UserError(f"{where}: {task.messages!r} must be a list of turns with the texts 'role' and 'content'")
        answered = turns[-1]["role"] == "assistant"
        if task.kind == "generation" and not answered:
            raise UserError(
                f"{where}: the last turn of {task.messages!r} is not the assistant's, so the row has no answer"
            )
        chats.append((where, turns[:-1] if answered else turns))
    return render(tokenizer, chats)


def render(tokenizer: Any, chats: Sequence[tuple[str, list[dict[str, str]]]]) -> list[str]:
    """The turns of each named chat as text. Raises UserError if the template refuses them (many want user and assistant in
    turn), or does not end: it is a program, which anybody may have written.
    """

    def written(turns: list[dict[str, str]]) -> str:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        most = MAX_GROWTH * sum(len(turn["content"]) for turn in turns) + MAX_FRAME
        if not isinstance(text, str) or len(text) > most:
            raise UserError(f"it makes more than {most:,} characters of these turns")
        return text

    called = f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"
    return list(bounded(written, [(f"{where}: {called}", turns) for where, turns in chats]))
