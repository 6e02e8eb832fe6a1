"""The description of a task: fields, prompt, label words, metric and the source of its rows.

A task is data, not a class of its own: the same encoder, scorer and loader serve all of them. Prompts are Python format
strings over the row's columns; ``{}`` marks the place of the model's answer (the end if it is left out):

    "{sentence} It was {}."          labels {0: terrible, 1: great}

A causal model reads the text before ``{}`` and continues it, a sequence-to-sequence model gives it to its encoder, and a masked
model gets its mask token there.
"""

from __future__ import annotations

from collections.abc import Callable
from string import Formatter
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from metazo.errors import UserError
from metazo.io.plain import shown

Row = dict[str, Any]
MAX_LABELS = 1000
"""Most labels of one task; each label is a forward pass of its own if label words have several tokens."""
Metric = Literal["accuracy", "macro_f1", "mcc", "f1", "exact_match", "exact_number"]
METRICS_OF: dict[str, tuple[Metric, ...]] = {
    "classification": ("accuracy", "macro_f1", "mcc"),
    "choice": ("accuracy",),
    "generation": ("f1", "exact_match", "exact_number"),
}


class Task(BaseModel):
    """One task, immutable. Its fields, except the last two, are the keys of a task in YAML. Raises UserError for wrong ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Name on the command line, and of the folder under `data`."""
    kind: Literal["classification", "choice", "generation"]
    """classification: one of ``labels``; choice: the likeliest of the row's own texts; generation: free text."""
    prompt: str = ""
    """Text with {column} placeholders, and ``{}`` at the place of the answer."""
    messages: str | None = None
    """Column with a chat, a list of {"role", "content"}, in place of a prompt: the tokenizer's chat template writes it. A
    generation task takes its last assistant turn as the answer; other kinds leave such a turn out."""
    masked: str | None = None
    """Another prompt for masked models; ``prompt`` when absent."""
    classifier: tuple[str, ...] = ()
    """One or two templates given to a sequence classifier; the prompt's one or two columns when absent. A prompt with more
    columns needs it for a classifier."""
    labels: dict[Any, str] = {}
    """Value in the label column -> label word. A list of words gives the labels 0, 1, 2, ..."""
    label: str = "label"
    """Column with the label (classification) or the number of the right choice, from 0 (choice)."""
    phrase: str = "{}"
    """The sentence that a label word makes for a head of label phrases (``head="phrases"``); ``{}`` is the word."""
    family: str | None = None
    """Tasks about similar texts share a family; they belong on one side of a split of tasks."""
    choices: tuple[str, ...] = ()
    """Columns that hold the choices; one column alone holds a list of them."""
    letters: bool = False
    """Choices are shown as "A. ..." lines at the prompt's {choices}, and the answer is the letter."""
    answer: str = "answer"
    """Column with the answer or a list of accepted answers (generation); "answers.text" reaches inside a column."""
    context: str | None = None
    """Column that is shortened if the input is too long; by default the longest column of the prompt in the row."""
    metric: tuple[Metric, ...] = ()
    """Metrics, with the main one first; by default accuracy or F1."""
    stop: str | None = None
    """Text that ends a generated answer; by default the model's end-of-text token, which a sequence-to-sequence model always
    ends with. That token as a text is the default, too."""
    max_new_tokens: int = Field(default=50, ge=1)
    """Upper limit on a generated answer, in tokens."""
    hub: str | None = None
    """Data set id on the Hugging Face Hub."""
    config: str | None = None
    """Configuration of that data set."""
    revision: str | None = None
    """Branch, tag or commit of that data set."""
    train_split: str = "train"
    """Split that train and dev rows are drawn from."""
    test_split: str = "validation"
    """Split that test rows are drawn from; it may be the train split."""
    dev_split: str | None = None
    """Split that dev rows are drawn from; the train split when absent."""
    files: dict[Literal["train", "validation", "test"], str] = {}
    """Files of the task itself (JSONL, JSON, CSV, TSV, Parquet), relative to the YAML file. With "test", dev rows come from
    "validation"; without it, test rows do; a split without a file of its own takes rows of the train file."""
    dev_rows: int | None = Field(default=None, ge=1)
    """The papers' own dev size, if it is smaller than the usual one (CB, COPA: 100); a size that the user sets is kept."""
    unlabelled: tuple[Any, ...] = ()
    """Label values that mean "no label" (-1, null, ""), or answers of a generation task; such rows are left out (SNLI: -1)."""
    adapt: Callable[[Row], Row] | None = Field(default=None, exclude=True)
    """Python only: turns a row into one that has the columns named above."""
    generate: Callable[[str, int, int], list[Row]] | None = Field(default=None, exclude=True)
    """Python only: (split, number, seed) -> rows, for tasks made by a grammar."""

    @field_validator("labels", mode="before")
    @classmethod
    def _number_labels(cls, value: Any) -> Any:
        return dict(enumerate(value)) if isinstance(value, list | tuple) else value

    @field_validator("metric", "classifier", "choices", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        for template in (self.prompt, self.masked or "", *self.classifier, self.phrase):
            if columns(template).count("") > 1:
                raise ValueError(f"the prompt {template!r} has more than one {{}}")
        if columns(self.phrase) != [""]:
            raise ValueError(f"the phrase {self.phrase!r} must hold {{}}, the place of the label word, and no column")
        self._check_answers()
        if not self.metric:
            object.__setattr__(self, "metric", METRICS_OF[self.kind][:1])
        for metric in self.metric:
            if metric not in METRICS_OF[self.kind]:
                raise ValueError(f"metric {metric} is not one of {', '.join(METRICS_OF[self.kind])} ({self.kind})")
        if self.messages is not None:
            if self.prompt or self.masked or self.classifier or self.context:
                raise ValueError(
                    "messages takes the place of prompt, masked, classifier and context; give one or the other"
                )
            return self
        if not self.classifier and self.kind == "classification":
            object.__setattr__(self, "classifier", tuple(f"{{{name}}}" for name in self.columns[:2]))
        if len(self.classifier) > 2:
            raise ValueError("classifier takes one or two templates")
        if not self.columns:
            raise ValueError(f"the prompt {self.prompt!r} names no {{column}}")
        if self.kind != "generation" and self.label in self.read():
            raise ValueError(f"a prompt reads {{{self.label}}}, which holds the answer: the model would be told it")
        for texts in filter(None, ((self.prompt,), (self.masked,) if self.masked else (), self.classifier)):
            if self.context and self.context not in [name for text in texts for name in columns(text)]:
                raise ValueError(f"context is {self.context!r}, which is not a column of {' '.join(texts)!r}")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _refused(cls, value: Any, handler: Callable[[Any], Task]) -> Task:
        try:
            return handler(value)
        except ValidationError as error:
            raise UserError(_first(error)) from error

    def _check_answers(self) -> None:
        """Labels, choices and letters. Raises ValueError."""
        if self.kind == "classification":
            words = list(self.labels.values())
            if len(self.labels) < 2:
                raise ValueError("a classification task needs labels: at least two values with their label words")
            if len(self.labels) > MAX_LABELS:
                raise ValueError(f"{len(self.labels):,} labels were given; at most {MAX_LABELS:,} are compared")
            if len(set(words)) < len(words):
                raise ValueError("two labels share one label word")
            if not all(word.strip() for word in words):
                raise ValueError("a label word is empty")
        if self.kind == "choice" and not self.choices:
            raise ValueError("a choice task needs choices: the columns that hold them")
        if self.letters and (self.kind != "choice" or "choices" not in columns(self.prompt)):
            raise ValueError("letters is for choice tasks whose prompt has the place {choices}")

    @property
    def columns(self) -> list[str]:
        """Columns that the prompt reads, in order, each once."""
        return [name for name in dict.fromkeys(columns(self.prompt)) if name]

    @property
    def num_labels(self) -> int | None:
        """Classes of a classification task; None for the other kinds."""
        return len(self.labels) if self.kind == "classification" else None

    def inputs(self) -> tuple[str, ...]:
        """The templates of a sequence classifier. Raises UserError if the prompt has columns that it would not read."""
        if len(self.columns) > 2 and "classifier" not in self.model_fields_set:
            raise UserError(
                f"the prompt of task {self.name!r} has {len(self.columns)} columns, and a classifier reads two unless they are "
                "named: name all of them in `classifier`, in one or two templates"
            )
        return self.classifier

    def read(self) -> set[str]:
        """Columns that the prompt and the other templates read."""
        templates = (self.prompt, self.masked or "", *self.classifier)
        listed = {"choices"} if self.letters else set()
        return {name for template in templates for name in columns(template) if name} - listed

    def required(self) -> set[str]:
        """Every column that a row must have (after ``adapt``), whatever the model's kind."""
        own = {"classification": (self.label,), "choice": (self.label, *self.choices)}
        answer = () if self.messages else (self.answer.partition(".")[0],)
        return self.read() | {*own.get(self.kind, answer)} | ({self.messages} if self.messages else set())

    def label_index(self, value: Any, where: str) -> int:
        """Class number of a label value. Raises UserError naming ``where`` for a value outside the set."""
        for index, known in enumerate(self.labels):
            if same_value(value, known):
                return index
        known = ", ".join(repr(label) for label in [*self.labels][:20]) + (", ..." if len(self.labels) > 20 else "")
        hint = "; list it under `unlabelled` to leave such rows out" if value in (-1, "") else ""
        raise UserError(
            f"{where}: {self.label!r} is {shown(value)}, which is none of the labels of task {self.name!r} ({known}){hint}"
        )


def _first(error: ValidationError) -> str:
    """What pydantic found first, as a sentence."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = ", ".join(name for name in Task.model_fields if name not in ("adapt", "generate"))
        return f"unknown key {key!r}; the keys are {known}"
    if first["type"] == "string_type" and isinstance(first["input"], bool | int | float | None):
        kind = "boolean" if isinstance(first["input"], bool) else "null" if first["input"] is None else "number"
        value = "" if first["input"] is None else f" {first['input']!r}"
        return f"{key} is the {kind}{value}; put it in quotes" if value else f"{key} is null; write a text"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key!r}: {message}" if key else message


def same_value(value: Any, known: Any) -> bool:
    """Whether a label in a row is that label value: "1" is not 1."""
    return bool(value == known) and isinstance(value, str) == isinstance(known, str)


def halves(template: str) -> tuple[str, str, bool]:
    """The format strings before and after ``{}``, and whether it is there; ``{{`` and ``}}`` are braces."""
    parts, mark = ["", ""], 0
    for literal, name, _, _ in Formatter().parse(template):
        parts[mark] += literal.replace("{", "{{").replace("}", "}}")
        if name:
            parts[mark] += f"{{{name}}}"
        elif name == "":
            mark = 1
    return parts[0], parts[1], bool(mark)


def columns(template: str) -> list[str]:
    """Names of the {places} of a format string, in order; "" for ``{}``. Raises ValueError for anything fancier."""
    names = []
    for _, name, form, conversion in Formatter().parse(template):
        if name is None:
            continue
        if form or conversion or (name and not name.isidentifier()):
            raise ValueError(f"the prompt {template!r} has the place {{{name}}}; write only {{column}} or {{}}")
        names.append(name)
    return names
