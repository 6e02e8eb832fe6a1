"""What a run minimises in place of its task's loss: a metric, or a function (model, batch) -> number, by forward passes only.

    accuracy, f1, exact-match, ...    1 - the metric on the batch, whose answers are predicted or generated in one call
    module.py:function                whatever the function returns; a reward is returned with a minus sign

The batch is an `AnswerBatch`. A function must return the same number for the same weights and batch: no sampling.

Where not to use: with methods that need a gradient; they are refused. A metric of a small batch changes in steps, is often
equal at both probes, and the weights then do not move: take larger batches, a longer probe or more queries.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metazo.errors import UserError
from metazo.io.files import expanded, read_capped
from metazo.io.modules import import_from, place
from metazo.models.parts import forward_only
from metazo.optimizers.guards import as_loss
from metazo.tasks.encode import Encoded
from metazo.tasks.evaluate import batches, generate, highest
from metazo.tasks.metrics import METRICS
from metazo.tasks.prepared import Batch, Prepared
from metazo.tasks.task import METRICS_OF

MAX_CODE_BYTES = 2**22
"""A file of code that a dry run looks at."""


class AnswerBatch:
    """A batch of B rows as an objective gets it.

    Attributes: prompts: B texts; accepted: for each row the list of accepted answers, which are class numbers, numbers of
    choices, or texts.
    """

    def __init__(self, prepared: Prepared, examples: Sequence[Encoded], device: torch.device | str = "cpu"):
        self.prepared, self.examples, self.device = prepared, list(examples), device

    def __len__(self) -> int:
        return len(self.examples)

    def to(self, device: torch.device | str) -> AnswerBatch:
        """The same batch, whose tensors will be on the device."""
        return AnswerBatch(self.prepared, self.examples, device)

    @cached_property
    def prompts(self) -> list[str]:
        tokenizer = self.prepared.tokenizer
        return [str(tokenizer.decode(example.ids, skip_special_tokens=True)) for example in self.examples]

    @property
    def accepted(self) -> list[list[Any]]:
        generation = self.prepared.task.kind == "generation"
        return [list(example.references if generation else example.targets) for example in self.examples]

    @cached_property
    def tensors(self) -> Batch:
        """The padded rows, on the device (`Prepared.collate` with every option)."""
        return self.prepared.collate(self.examples, every_option=True).to(self.device)

    def answers(self, model: nn.Module) -> list[Any]:
        """The model's answer to each row: a class, the number of a choice, or a text, generated greedily for all rows
        together. A row whose scores are not finite has the class -1.
        """
        if self.prepared.task.kind == "generation":
            return generate(model, self.prepared, self.examples, self.device)
        return highest(self.prepared.scores(model, self.tensors))

    def loss(self, model: nn.Module) -> Tensor:
        """The task's own loss on the batch, a float32 scalar."""
        return self.prepared.loss(model, self.prepared.collate(self.examples).to(self.device))


Function = Callable[[nn.Module, AnswerBatch], Any]


class ObjectiveFailed(UserError):
    """The function of an objective failed, or did not return one number."""


@dataclass(frozen=True)
class Objective:
    """An objective by name, its function, and what it is made of.

    metric: name of the metric, if it is one. source: sha256 of the function's file, which a resumed run compares; None for
    metrics, and for a function that is in no file.
    """

    name: str
    function: Function
    metric: str | None = None
    source: str | None = None

    def __call__(self, model: nn.Module, batch: AnswerBatch) -> float:
        """The value on a batch. Raises ObjectiveFailed if the function fails or does not return one number."""
        try:
            with torch.no_grad():
                return as_loss(self.function(model, batch))
        except UserError as error:
            text = str(error).replace("The closure returned", f"`objective` {self.name} returned")
            raise ObjectiveFailed(text) from error
        except Exception as error:
            raise ObjectiveFailed(
                f"`objective` {self.name} failed{place(error)}: {type(error).__name__}: {error}."
            ) from error

    def over(self, model: nn.Module, prepared: Prepared, split: str, found: dict[str, float], batch_size: int) -> float:
        """The value over a split: 1 - its metric, which `found` has; or a function's mean over batches of rows of similar
        length, weighted by their rows.
        """
        if self.metric is not None:
            return 1.0 - found[self.metric]
        examples = getattr(prepared, split)
        device, total = next(model.parameters()).device, 0.0
        with forward_only(model):
            for places in batches(examples, batch_size, prepared):
                total += len(places) * self(model, AnswerBatch(prepared, [examples[place] for place in places], device))
        return total / len(examples)


@dataclass(frozen=True)
class Minimised:
    """A task's rows, with an objective as the loss (a `metazo.tasks.closures.Data`)."""

    prepared: Prepared
    objective: Objective

    @property
    def train(self) -> Sequence[Encoded]:
        return self.prepared.train

    def collate(self, examples: Sequence[Encoded]) -> AnswerBatch:
        return AnswerBatch(self.prepared, examples)

    def loss(self, model: nn.Module, batch: AnswerBatch) -> Tensor:
        """The objective on the batch: a float64 scalar without a gradient."""
        return torch.tensor(self.objective(model, batch), dtype=torch.float64)


def find(name: str | Function, kind: str) -> Objective:
    """The objective of a name (of a metric, or module:function), or of a function in memory, for a kind of task.

    Raises UserError for a metric that the kind of task does not have, and for a function that cannot be imported.
    """
    if not isinstance(name, str):
        return Objective(getattr(name, "__name__", type(name).__name__), name)
    module, mark, attribute = name.rpartition(":")
    if mark:
        return _imported(name, module, attribute)
    metric = name.replace("-", "_")
    if metric == "f1" and kind == "classification":
        metric = "macro_f1"
    if metric not in METRICS_OF[kind]:
        known = ", ".join(each.replace("_", "-") for each in METRICS_OF[kind])
        raise UserError(
            f"`objective` {name!r} is no metric of a {kind} task; choose {known}, or name a function as module.py:function."
        )

    def value(model: nn.Module, batch: AnswerBatch) -> float:
        return 1.0 - METRICS[metric](batch.answers(model), batch.accepted)

    return Objective(name, value, metric)


def look(name: str) -> None:
    """Raises UserError for a module:function whose file does not define it; nothing is executed, and a module without a path
    is not looked for."""
    module, _, attribute = name.rpartition(":")
    path = expanded(module)
    if path.suffix != ".py":
        return
    code = read_capped(path, MAX_CODE_BYTES, f"`objective` {name!r}: the file")
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"`objective` {name!r}: {module} is no Python ({error}).") from error
    names = {_name_of(part) for part in ast.walk(tree)}
    if not names & {attribute, "*"}:
        defined = ", ".join(part.name for part in tree.body if isinstance(part, ast.FunctionDef)) or "none"
        raise UserError(f"`objective` {name!r}: {module} has no function {attribute!r}; its functions are {defined}.")


def _name_of(part: ast.AST) -> str | None:
    """The name that a part of a module defines, assigns or imports."""
    return getattr(part, "asname", None) or getattr(part, "name", None) or getattr(part, "id", None)


def _imported(name: str, module: str, attribute: str) -> Objective:
    try:
        there = import_from(module)
    except Exception as error:  # the module's own code may raise anything
        raise UserError(
            f"`objective` {name!r}: {module} cannot be imported: {type(error).__name__}: {error}."
        ) from error
    function = getattr(there, attribute, None)
    if not callable(function):
        defined = ", ".join(key for key, value in vars(there).items() if inspect.isfunction(value)) or "none"
        raise UserError(f"`objective` {name!r}: {module} has no function {attribute!r}; its functions are {defined}.")
    path = there.__file__
    return Objective(name, function, source=sha256(Path(path).read_bytes()).hexdigest() if path else None)
