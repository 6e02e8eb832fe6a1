"""From a row to token ids: the prompt, the label words, the choices or the answer, shortened to fit.

An input that is too long loses words of one column, the task's ``context`` or else the longest one of the row: the first
words of a prompt's column, so that the text next to the answer is kept, and the last words of a classifier's. Prompt
wording, choices and answer are never shortened; a row whose other columns already fill the context is left out, and
counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from metazo.errors import UserError
from metazo.models.tokenizer import end_token, marks
from metazo.tasks.accepted import choices_of, references_of
from metazo.tasks.chat import check_chat, render, write
from metazo.tasks.seq2seq import Decoder
from metazo.tasks.task import Row, Task, columns, halves
from metazo.tasks.words import check_words, drop_words, filled_words, spoken_words

if TYPE_CHECKING:
    from metazo.models.load import LoadedModel

_CHAT = "chat_as_written"
"""Name of the column that holds the written chat of a row."""


@dataclass(slots=True)
class Encoded:
    """One example, ready to be padded."""

    ids: list[int]
    """Prompt with its special tokens; for a masked model or a classifier the whole input."""
    targets: list[int]
    """Correct class or correct choices, with the one to train on first; [0] for generation."""
    options: list[list[int]] = field(default_factory=list)
    """Tokens that may follow ``ids``: label words, choices (no token for a blank choice), or the answer; empty if a head
    scores the classes."""
    types: list[int] | None = None
    """Segment ids of a text pair, if the model has them."""
    mask_at: int = 0
    """Position of the mask token."""
    references: list[str] = field(default_factory=list)
    """Accepted answers (generation)."""
    shortened: bool = False

    def __len__(self) -> int:
        return len(self.ids) + max((len(option) for option in self.options), default=0)


class Encoder:
    """Encodes rows of one task for one loaded model. Raises UserError if the model cannot do the task."""

    def __init__(self, task: Task, loaded: LoadedModel, max_length: int | None = None):
        self.tokenizer: Any = loaded.tokenizer
        self.task, self.kind = task, loaded.kind
        self.stop = None if task.stop == self.tokenizer.eos_token else task.stop
        self.limit = max_length or loaded.context_length
        if self.limit > loaded.context_length:
            raise UserError(
                f"max_length {self.limit} is more than the context of {loaded.name} ({loaded.context_length} tokens)"
            )
        self.answers = loaded.kind in ("causal", "seq2seq")
        """Whether the model continues a prompt with an answer of any length."""
        if task.kind != "classification" and not self.answers:
            raise UserError(
                f"task {task.name!r} is a {task.kind} task and needs a causal or sequence-to-sequence language model; "
                f"{loaded.name} was loaded as {loaded.kind}"
            )
        self.decoder = (
            Decoder(task, loaded.model, self.tokenizer, loaded.name, self.limit) if self.kind == "seq2seq" else None
        )
        self.start = self.decoder.start if self.decoder else []
        self.end = marks(self.tokenizer)[1]
        """What the tokenizer puts after a text."""
        self.room = self.decoder.room if self.decoder else min(task.max_new_tokens, self.limit // 2)
        """Most tokens of a generated answer; the prompts of a causal model leave room for them."""
        self.chat = task.messages is not None
        template = task.masked if task.masked is not None and self.kind == "masked" else task.prompt
        if self.chat:
            check_chat(task, loaded)
            template = f"{{{_CHAT}}}{{}}"
        before, self.after, mark = halves(template)
        self.columns = [name for name in columns(template) if name]
        self.left_out = ""  # from the texts of a classifier that finds a text's end by this token
        if self.kind == "classifier":
            self.left_out = end_token(self.tokenizer, loaded.name) if loaded.model.config.is_encoder_decoder else ""
            self.templates = (f"{{{_CHAT}}}",) if self.chat else task.inputs()
            self.columns = [name for text in self.templates for name in columns(text) if name]
        if self.answers and columns(self.after):
            raise UserError(
                f"the prompt of task {task.name!r} has {{{columns(self.after)[0]}}} after {{}}, and a {self.kind} model reads "
                "only what is before its answer; move {} to the end of the prompt"
            )
        self.before = before.rstrip(" ")
        self.joint = before[len(self.before) :] or ("" if mark or before[-1:].isspace() else " ")
        self.words: list[list[int]] = []
        self.cut: Counter[str] = Counter()
        """How often each column was shortened."""
        self.alike = 0
        """Number of rows that have two choices with the same tokens."""
        self.name, self.rows = loaded.name, _embedding_rows(loaded)
        self.at_position = not self.answers
        """The classes are scored by the logits of one position, not by the likelihood of whole words."""
        if self.kind == "classifier":
            head = loaded.model.config.num_labels
            if head != task.num_labels:
                raise UserError(
                    f"the head of {loaded.name} has {head} classes, but task {task.name!r} has {task.num_labels}; "
                    f"load the model with num_labels={task.num_labels}"
                )
        elif self.kind == "masked":
            self.words = filled_words(task, self.tokenizer, loaded.name)
        else:
            self._answer_words()
        check_words(task, self.tokenizer, self.words, loaded.name)

    def __call__(self, row: Row, where: str) -> Encoded | None:
        """Encode one row; None if it does not fit even with an empty context. ``where`` names the row in errors."""
        return self.all([(where, row)])[0]

    def all(self, rows: Sequence[tuple[str, Row]]) -> list[Encoded | None]:
        """Encode rows, each with its name."""
        chats = write(self.task, self.tokenizer, rows) if self.chat else [""] * len(rows)
        return [self._one({**row, _CHAT: chat}, where) for (where, row), chat in zip(rows, chats, strict=True)]

    def _one(self, row: Row, where: str) -> Encoded | None:
        example = self._encoded(row, where)
        if example is not None:
            example.ids = example.ids or [self._start(where)]
            largest = max(max(ids, default=0) for ids in (example.ids, *example.options))
            if largest >= self.rows:
                raise UserError(
                    f"{where} has the token {largest}, but the model has embeddings for {self.rows} tokens and the tokenizer "
                    f"of {self.name} knows {len(self.tokenizer)}; use the tokenizer that the model was trained with"
                )
        return example

    def _encoded(self, row: Row, where: str) -> Encoded | None:
        if self.task.kind == "classification":
            return self._classified(row, [self.task.label_index(row[self.task.label], where)])
        if self.task.kind == "choice":
            choices, targets = choices_of(self.task, row, where)
            if self.task.letters:
                listed = "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, choices))
                row = {**row, "choices": listed}
                choices = [letter if text.strip() else "" for letter, text in zip(ascii_uppercase, choices)]
            example = self._continued(row, choices, targets)
            if example is not None:
                tokens = [tuple(option) for option in example.options if option]
                self.alike += len(set(tokens)) < len(tokens)
            return example
        # the answers of some files end in an end of text, which is put after them here, and which no generated answer has
        end = self.tokenizer.eos_token or ""
        references = [answer.removesuffix(end) for answer in references_of(self.task, row, where)]
        stop = "" if self.decoder else self.stop or ""
        example = self._continued(row, [references[0] + stop], [0])
        if example is not None:
            if not example.options[0]:
                raise UserError(f"{where}: {self.task.answer!r} is empty, and without an end-of-text token or `stop` "
                                "nothing is left to train on")  # fmt: skip
            example.references = references
        return example

    def _start(self, where: str) -> int:
        """First token of an input that would be empty: begin of text, else end of text, as GPT-2 was trained."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.cls_token_id):
            if token is not None:
                return token
        raise UserError(
            f"{where}: no text precedes the answer, and the tokenizer has no token for the beginning of a text"
        )

    # -- the three kinds of input -----------------------------------------------------------------------------------

    def _classified(self, row: Row, target: list[int]) -> Encoded | None:
        if self.answers:
            return self._answered(row, target, self.words, max(len(word) for word in self.words))
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
        start = [] if self.decoder else self._ids(whole)
        options = [self._continuation(whole, start, text) for text in texts]
        longest = max(self.room if self.task.kind == "generation" else 0, *(len(option) for option in options))
        return self._answered(row, targets, options, longest)

    def _answered(self, row: Row, targets: list[int], options: list[list[int]], longest: int) -> Encoded | None:
        """A prompt and the answers to it. longest: tokens to leave room for, in the context of the prompt or of the decoder."""
        room = self.limit - longest
        if self.decoder:
            if len(self.decoder.start) - 1 + longest > self.limit:
                return None
            room = self.limit
        fitted = self._fit(row, lambda r: {"input_ids": self._ids(self._prompt(r))}, room)
        return fitted and Encoded(fitted[0]["input_ids"], targets, options, shortened=fitted[1])

    def _fit(
        self, row: Row, encode: Callable[[Row], dict[str, Any]], limit: int, keep: str = "end"
    ) -> tuple[dict[str, Any], bool] | None:
        """Cut the context column by characters, in proportion to the excess, until the tokens fit ``limit``."""
        encoded = encode(row)
        if len(encoded["input_ids"]) <= limit:
            return encoded, False
        # Of choices with letters the listing may not be cut: a letter would stay that names nothing.
        columns = [name for name in self.columns if not (self.task.letters and name == "choices")]
        name = (
            "" if self.chat else self.task.context or max(columns, key=lambda column: len(str(row[column])), default="")
        )
        text = str(row.get(name, ""))
        while text:
            excess = len(encoded["input_ids"]) - limit
            share = excess / max(len(self._plain(text)), 1)
            cut = min(max(ceil(len(text) * share), 1), len(text))
            text = drop_words(text, cut) if keep == "end" else drop_words(text[::-1], cut)[::-1]
            encoded = encode({**row, name: text})
            if len(encoded["input_ids"]) <= limit:
                self.cut[name] += 1
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
        if self.left_out:
            row = {n: v.replace(self.left_out, "") if isinstance(v, str) else v for n, v in row.items()}
        texts = (template.format(**row) for template in self.templates)
        return dict(self.tokenizer(*texts, **self._own, verbose=False))

    # -- tokens -------------------------------------------------------------------------------------------------------

    def _ids(self, text: str) -> list[int]:
        """Token ids with special tokens; for a causal model without those that its tokenizer puts after a text."""
        ids = list(self.tokenizer(text, **self._own, verbose=False)["input_ids"])
        ended = 0 < len(self.end) < len(ids) and ids[-len(self.end) :] == self.end
        return ids[: -len(self.end)] if self.kind == "causal" and not self.chat and ended else ids

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _continuation(self, prompt: str, start: list[int], text: str) -> list[int]:
        """Tokens of ``text`` after ``prompt``, tokenised together, so that they are the tokens the model saw in training.

        start: tokens of the prompt alone. A blank choice has none, even if the tokenizer makes one of the space before it. A
        decoder of its own reads no prompt.
        """
        if self.decoder:
            return self.decoder.tokens(text)
        end = self.tokenizer.eos_token_id
        ends = [end] if self.task.kind == "generation" and self.stop is None and end is not None else []
        if not text or (self.task.kind == "choice" and not text.strip()):
            return ends
        whole = self._ids(prompt + self.joint + text)
        if whole[: len(start)] == start and len(whole) > len(start):
            ids = whole[len(start) :]
        else:  # the tokenizer merges characters across the boundary
            ids = self._plain(self.joint + text)
        return ids + ends

    def _answer_words(self) -> None:
        if self.task.kind != "classification":
            return
        example = render(self.tokenizer, [("a chat", [{"role": "user", "content": "x"}])])[0] if self.chat else "x"
        probe = self.before.format(**dict.fromkeys(self.columns, example))
        start = [] if self.decoder else self._ids(probe)
        words = spoken_words(self.task, "" if self.decoder else self.joint)
        self.words = [self._continuation(probe, start, word) for word in words]
        for word, ids in zip(self.task.labels.values(), self.words, strict=True):
            if not ids:
                raise UserError(f"label word {word!r} of task {self.task.name!r} makes no tokens with this tokenizer")
        self.at_position = len({word[0] for word in self.words if len(word) == 1}) == len(self.words)

    @property
    def _own(self) -> dict[str, bool]:
        """Whether special tokens are added: a chat template writes them itself."""
        return {"add_special_tokens": False} if self.chat else {}


def _embedding_rows(loaded: LoadedModel) -> int:
    inner: Any = getattr(loaded.model, "encoder", loaded.model) if loaded.kind == "classifier" else loaded.model
    embeddings: Any = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    return embeddings.weight.shape[0] if hasattr(embeddings, "weight") else 2**62
