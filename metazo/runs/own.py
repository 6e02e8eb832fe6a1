"""The user's own loss instead of a task: any module, any batches, any scalar loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from metazo.errors import UserError
from metazo.io.processes import gathered, rank, world
from metazo.io.tensorfile import write_tensors
from metazo.optimizers.guards import as_loss, gradient_refused

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class OwnBatch:
    """A batch of the caller; the loop treats it as one example."""

    content: Any

    def __len__(self) -> int:
        return 1

    def to(self, device: torch.device | str) -> OwnBatch:
        """The same batch with its tensors on the device, in mappings, lists, tuples and dataclasses as well."""
        return OwnBatch(_moved(self.content, device))


def _moved(value: Any, device: torch.device | str) -> Any:
    move: Any = getattr(value, "to", None)
    if isinstance(value, Mapping) and not isinstance(value, dict) and callable(move):  # a BatchEncoding, a TensorDict
        return move(device)
    return _with_tensors(value, lambda tensor: tensor.to(device))


def _with_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A copy of nested mappings, lists, tuples and dataclasses, of their own types, with `change` of each tensor."""
    return _Copier(change).of(value)


class _Copier:
    """Copies nested containers; one that contains itself, as a tree whose members know their parent, does so in the copy."""

    def __init__(self, change: Callable[[Tensor], Any]):
        self.change = change
        # (original, copy) of containers by the id of the original, which lives as long as its id is here
        self.made: dict[int, tuple[Any, Any]] = {}

    def of(self, value: Any) -> Any:
        if id(value) in self.made:
            return self.made[id(value)][1]
        if isinstance(value, MutableMapping) or (is_dataclass(value) and not isinstance(value, type)):
            return self._filled(value, isinstance(value, Mapping))
        if isinstance(value, Mapping):
            return {key: self.of(item) for key, item in value.items()}
        if isinstance(value, PackedSequence):  # whose batch_sizes stay on the CPU
            order = (None if each is None else self.change(each) for each in value[2:])
            return PackedSequence(self.change(value.data), value.batch_sizes, *order)
        if isinstance(value, list | tuple):
            items = [self.of(item) for item in value]
            try:
                return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
            except TypeError:  # a constructor with other arguments
                return value
        return self.change(value) if isinstance(value, Tensor) else value

    def _filled(self, value: Any, mapping: bool) -> Any:
        try:
            copied: Any = copy(value)
        except Exception:  # some dicts whose entries are attributes
            copied = dict(value) if mapping else value
        if mapping and not isinstance(value, dict) and not hasattr(type(value), "__copy__"):
            inner = getattr(copied, "__dict__", {})  # the entries of a mapping around a dict, which both share so far
            inner.update((name, copy(item)) for name, item in list(inner.items()) if isinstance(item, dict | list))
        self.made[id(value)] = value, copied
        parts: Any = () if mapping else fields(value)  # pyright: ignore[reportArgumentType]
        names = [each.name for each in parts if hasattr(value, each.name)]
        for key, item in list(value.items()) if mapping else [(name, getattr(value, name)) for name in names]:
            if (new := self.of(item)) is not item:
                copied.__setitem__(key, new) if mapping else object.__setattr__(copied, key, new)
        return copied


@dataclass(frozen=True)
class _Named:
    """The attributes of a task that the loop needs."""

    name: str = "memory:loss"
    kind: str = "own"
    metric: tuple[str, ...] = ()


@dataclass
class OwnLoss:
    """Batches and a loss, with the methods of `metazo.tasks.Prepared` that the loop uses.

    function: (model, batch) -> scalar tensor, a mean over the batch. train, dev, test: one entry per batch.
    """

    function: Loss
    train: list[OwnBatch]
    dev: list[OwnBatch] = field(default_factory=list)
    test: list[OwnBatch] = field(default_factory=list)
    task: _Named = _Named()
    notes: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    changes: bool = False
    """Whether the function was seen to change tensors of its batch."""

    def collate(self, examples: Sequence[OwnBatch]) -> OwnBatch:
        (batch,) = examples
        return batch

    def loss(self, model: nn.Module, batch: OwnBatch) -> Tensor:
        """The loss of a batch, of whose dicts and lists the function gets new ones, because it may take their entries out."""
        tensors: list[Tensor] = []

        def seen(tensor: Tensor) -> Tensor:
            if not tensor.is_inference():  # these do not count their changes
                tensors.append(tensor)
            return tensor

        content = _with_tensors(batch.content, seen)
        before = [tensor._version for tensor in tensors]
        with gradient_refused("`loss`"):
            value = self.function(model, content)
        if not self.changes and before != [tensor._version for tensor in tensors]:
            self.changes = True
            warnings.warn(
                "`loss` changes tensors of its batch in place, so that later evaluations of the batch, on dev and test as well,"
                " get what it left: let it change copies, unless a second change makes no difference.",
                stacklevel=2,
            )
        return value

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, split: str, device: torch.device) -> dict[str, float]:
        """ "loss", the mean over the batches of a split, and "batches", their number. The processes of a run divide them."""
        batches: list[OwnBatch] = getattr(self, split)
        own = [as_loss(self.loss(model, batch.to(device))) for batch in batches[rank() :: world()]]
        each = gathered(own)
        losses = [each[index % len(each)][index // len(each)] for index in range(len(batches))]
        return {"loss": sum(losses) / len(losses), "batches": float(len(losses))}


def training_batches(batches: Iterable[Any] | None, most: int | None) -> list[OwnBatch]:
    """The training batches: all of a sequence or DataLoader, the first `most` of an iterable without a length, which may be
    endless. Raises UserError as `own_batches` does, and for an iterable without a length if `most` is None.
    """
    if _has_length(batches) or not isinstance(batches, Iterable):
        return own_batches("data", batches)
    if most is None:
        raise UserError("`data` has no length, so the number of its batches must be known: give `steps`.")
    return own_batches("data", islice(batches, most))


def own_batches(name: str, batches: Iterable[Any] | None) -> list[OwnBatch]:
    """All batches of a split. Raises UserError for an object that is not an iterable of batches, or is empty."""
    if batches is None:
        return []
    if isinstance(batches, str | bytes | Mapping) or not isinstance(batches, Iterable):
        raise UserError(
            f"`{name}` is a {type(batches).__name__}; with `loss` it must be a list or DataLoader of batches."
        )
    found = [OwnBatch(item) for item in batches]
    if not found:
        raise UserError(f"`{name}` has no batches; give at least one.")
    return found


def _has_length(batches: Any) -> bool:
    """Whether `len` works; a DataLoader over an iterable data set has the method, which raises TypeError."""
    try:
        len(batches)
    except TypeError:
        return False
    return True


class StateFile:
    """Saves a module that has no save_pretrained: model.safetensors, its state by name."""

    def __init__(self, model: nn.Module):
        self.model = model

    def save_pretrained(self, folder: Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_tensors(Path(folder) / "model.safetensors", self.model.state_dict(), {"format": "pt"})
