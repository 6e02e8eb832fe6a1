"""Writes a row's chat with the tokenizer's chat template, up to the place of the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.tasks.task import Row, Task

if TYPE_CHECKING:
    from metazo.models.load import LoadedModel


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


def write(task: Task, tokenizer: Any, row: Row, where: str) -> str:
    """The chat of a row without its last assistant turn, followed by the beginning of the answering turn."""
    turns = row[task.messages]  # type: ignore[index]
    good = isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    )
    if not good or not turns:
        raise UserError(f"{where}: {task.messages!r} must be a list of turns with the texts 'role' and 'content'")
    answered = turns[-1]["role"] == "assistant"
    if task.kind == "generation" and not answered:
        raise UserError(f"{where}: the last turn of {task.messages!r} is not the assistant's, so the row has no answer")
    return render(tokenizer, turns[:-1] if answered else turns, where)


def render(tokenizer: Any, turns: list[dict[str, str]], where: str) -> str:
    """The turns as text. Raises UserError if the template refuses them (many want user and assistant in turn)."""
    with needs("llm"):
        from jinja2 import TemplateError  # chat templates are written in it
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{where}: the chat template does not take these turns ({error})") from error
