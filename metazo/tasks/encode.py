"""From a row to token ids: the prompt, the label words, the choices or the answer, shortened to fit.

What is too long is cut on the context side: from the front of the task's context column for prompts (what stands next
to the question stays), from its end for a classifier. Prompt wording, question, choices and answer are never cut; a
row whose other parts already fill the context is left out, and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Any

from metazo.errors import UserError
from metazo.tasks.task import Row, Task, columns

if TYPE_CHECKING:
    from metazo.models.load import LoadedModel


@dataclass(slots=True)
class Encoded:
    """One example, ready to be padded."""

    ids: list[int]
    """Prompt with its special tokens; for a masked model or a classifier the whole input."""
    targets: list[int]
    """Right class or right choices, the one to train on first; [0] for generation."""
    options: list[list[int]] = field(default_factory=list)
    """Tokens that may follow ``ids``: label words, choices, or the answer; empty where a head scores the classes."""
    types: list[int] | None = None
    """Segment ids of a text pair, where the model has them."""
    mask_at: int = 0
    """Position of the mask token."""
    references: list[str] = field(default_factory=list)
    """Accepted answers (generation)."""
    shortened: bool = False

    def __len__(self) -> int:
        return len(self.ids) + max((len(option) for option in self.options), default=0)


class Encoder:
    """Encodes rows of one task for one loaded model. Raises UserError where task and model do not go together."""

    def __init__(self, task: Task, loaded: LoadedModel, max_length: int | None = None):
        self.task, self.kind = task, loaded.kind
        self.tokenizer: Any = loaded.tokenizer
        self.limit = max_length or loaded.context_length
        if self.limit > loaded.context_length:
            raise UserError(
                f"max_length {self.limit} is more than the context of {loaded.name} ({loaded.context_length} tokens)"
            )
        if task.kind != "classification" and loaded.kind != "causal":
            raise UserError(
                f"task {task.name!r} is a {task.kind} task and needs a causal language model; "
                f"{loaded.name} was loaded as {loaded.kind}"
            )
        self.room = min(task.max_new_tokens, self.limit // 2)
        """Tokens that a generated answer may have; prompts leave them free."""
        template = task.masked if task.masked is not None and self.kind == "masked" else task.prompt
        before, mark, after = template.partition("{}") if "" in columns(template) else (template, "", "")
        self.joint = before[len(before.rstrip(" ")) :] if mark else "" if before[-1:].isspace() else " "
        self.before, self.after = before.rstrip(" ") if mark else before, after
        self.words: list[list[int]] = []
        self.at_position = self.kind != "causal"
        """The classes are scored by the logits of one position, not by the likelihood of whole words."""
        if self.kind == "classifier":
            head = loaded.model.config.num_labels
            if head != task.num_labels:
                raise UserError(
                    f"the head of {loaded.name} has {head} classes, but task {task.name!r} has {task.num_labels}; "
                    f"load the model with num_labels={task.num_labels}"
                )
        elif self.kind == "masked":
            self._masked_words(loaded.name)
        else:
            self._causal_words()

    def __call__(self, row: Row, where: str) -> Encoded | None:
        """Encode one row; None when it does not fit even with an empty context. ``where`` names the row in errors."""
        if self.task.kind == "classification":
            target = [self.task.label_index(row[self.task.label], where)]
            return self._classified(row, target)
        if self.task.kind == "choice":
            choices, targets = self._choices(row, where)
            return self._continued(row, choices, targets)
        references = self._references(row, where)
        example = self._continued(row, [references[0] + (self.task.stop or "")], [0])
        if example is not None:
            example.references = references
        return example

    # -- the three kinds of input -----------------------------------------------------------------------------------

    def _classified(self, row: Row, target: list[int]) -> Encoded | None:
        if self.kind == "causal":
            room = self.limit - max(len(word) for word in self.words)
            fitted = self._fit(row, lambda r: {"input_ids": self._ids(self._prompt(r))}, room)
            return fitted and Encoded(fitted[0]["input_ids"], target, self.words, shortened=fitted[1])
        if self.kind == "classifier":
            fitted = self._fit(row, self._texts, self.limit, keep="start")
            return fitted and Encoded(
                fitted[0]["input_ids"], target, types=fitted[0].get("token_type_ids"), shortened=fitted[1]
            )
        fitted = self._fit(row, lambda r: {"input_ids": self._ids(self._masked(r))}, self.limit)
        if fitted is None:
            return None
        ids = fitted[0]["input_ids"]
        return Encoded(ids, target, mask_at=ids.index(self.tokenizer.mask_token_id), shortened=fitted[1])

    def _continued(self, row: Row, texts: list[str], targets: list[int]) -> Encoded | None:
        whole = self._prompt(row)
        options = [self._continuation(whole, text) for text in texts]
        longest = max(len(option) for option in options)
        if self.task.kind == "generation":
            longest = max(longest, self.room)
        fitted = self._fit(row, lambda r: {"input_ids": self._ids(self._prompt(r))}, self.limit - longest)
        return fitted and Encoded(fitted[0]["input_ids"], targets, options, shortened=fitted[1])

    def _fit(
        self, row: Row, encode: Callable[[Row], dict[str, Any]], limit: int, keep: str = "end"
    ) -> tuple[dict[str, Any], bool] | None:
        """Cut the context column by characters, in proportion to the excess, until the tokens fit ``limit``."""
        encoded = encode(row)
        if len(encoded["input_ids"]) <= limit:
            return encoded, False
        name = self.task.context or ""
        text = str(row.get(name, ""))
        while text:
            excess = len(encoded["input_ids"]) - limit
            share = excess / max(len(self._plain(text)), 1)
            cut = min(max(ceil(len(text) * share), 1), len(text))
            text = _drop_words(text, cut) if keep == "end" else _drop_words(text[::-1], cut)[::-1]
            encoded = encode({**row, name: text})
            if len(encoded["input_ids"]) <= limit:
                return encoded, True
        return None

    # -- text ---------------------------------------------------------------------------------------------------------

    def _prompt(self, row: Row) -> str:
        return self.before.format(**row)

    def _masked(self, row: Row) -> str:
        mask = str(self.tokenizer.mask_token)
        clean = {name: str(value).replace(mask, "") for name, value in row.items()}
        return self.before.format(**clean) + self.joint + mask + self.after.format(**clean)

    def _texts(self, row: Row) -> dict[str, Any]:
        return dict(self.tokenizer(*(template.format(**row) for template in self.task.classifier), verbose=False))

    def _choices(self, row: Row, where: str) -> tuple[list[str], list[int]]:
        names = self.task.choices
        texts = row[names[0]] if len(names) == 1 else [row[name] for name in names]
        right = row[self.task.label]
        targets = right if isinstance(right, list) else [right]
        if not isinstance(texts, list) or len(texts) < 2:
            raise UserError(f"{where}: {names[0]!r} must hold a list of two or more choices, found {texts!r:.80}")
        if not targets or not all(isinstance(i, int) and 0 <= i < len(texts) for i in targets):
            raise UserError(
                f"{where}: {self.task.label!r} is {right!r}, not the number of a choice from 0 to {len(texts) - 1}"
            )
        return [str(text) for text in texts], [int(i) for i in targets]

    def _references(self, row: Row, where: str) -> list[str]:
        name, _, inner = self.task.answer.partition(".")
        value = row[name]
        if inner:
            value = value.get(inner) if isinstance(value, dict) else None
        answers = [value] if isinstance(value, str | int | float) else value
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str | int | float) for a in answers):
            raise UserError(f"{where}: {self.task.answer!r} must hold an answer or a list of them, found {value!r:.80}")
        return [str(answer) for answer in answers]

    # -- tokens -------------------------------------------------------------------------------------------------------

    def _ids(self, text: str) -> list[int]:
        """Token ids with special tokens; without the end-of-text token that some causal tokenizers append."""
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        if self.kind == "causal" and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        return list(ids)

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _continuation(self, prompt: str, text: str) -> list[int]:
        """Tokens of ``text`` after ``prompt``, tokenised together, so that they are those the model saw in training."""
        start, whole = self._ids(prompt), self._ids(prompt + self.joint + text)
        if whole[: len(start)] == start and len(whole) > len(start):
            ids = whole[len(start) :]
        else:  # the tokenizer merges across the joint
            ids = self._plain(self.joint + text)
        end = self.tokenizer.eos_token_id
        return [*ids, end] if self.task.kind == "generation" and self.task.stop is None and end is not None else ids

    def _causal_words(self) -> None:
        if self.task.kind != "classification":
            return
        probe = self.before.format(**dict.fromkeys(self.task.columns, "x"))
        self.words = [self._continuation(probe, word) for word in self.task.labels.values()]
        firsts = {word[0] for word in self.words}
        self.at_position = all(len(word) == 1 for word in self.words) and len(firsts) == len(self.words)

    def _masked_words(self, name: str) -> None:
        if self.tokenizer.mask_token_id is None:
            raise UserError(f"the tokenizer of {name} has no mask token; a masked model needs one")
        for word in self.task.labels.values():
            for text in (f" {word}", word):
                ids = self._plain(text)
                if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id:
                    self.words.append(ids)
                    break
            else:
                raise UserError(
                    f"label word {word!r} of task {self.task.name!r} is not one token of {name}; "
                    "a masked model fills one token, so choose another word"
                )


def _drop_words(text: str, cut: int) -> str:
    """``text`` without its first ``cut`` characters and without the rest of the word they end in."""
    rest = text[cut:]
    return rest if text[cut - 1].isspace() or " " not in rest else rest.partition(" ")[2]
