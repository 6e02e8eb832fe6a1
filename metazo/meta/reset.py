"""The initial weights of a run, to which every restart resets them, and the schedule of restarts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from metazo.blocks import NamedTensor
from metazo.errors import UserError
from metazo.io.tensorfile import write_tensors


class Start:
    """The initial weights: in a file (one tensor in memory at a time), or in memory if no path is given.

    The tensors hold the initial weights when it is made. A file of an earlier part of the run is written again, because it
    may have changed since.
    """

    def __init__(self, tensors: Sequence[NamedTensor], path: Path | None = None):
        self.tensors, self.path = tensors, path
        self.copies: dict[str, Tensor] = {}
        if path is None:
            self.copies = {tensor.name: tensor.param.detach().clone() for tensor in tensors}
        else:
            write_tensors(path, {tensor.name: tensor.param.detach() for tensor in tensors})

    def restore(self) -> None:
        """Restore the weights."""
        if self.path is not None:
            put(self.tensors, self.path, remedy="continue with `resume=True`, which writes it again")
        for name, copy in self.copies.items():
            next(tensor for tensor in self.tensors if tensor.name == name).param.data.copy_(copy)


@torch.no_grad()
def put(tensors: Sequence[NamedTensor], path: Path, prefix: str = "", *, remedy: str = "record again") -> None:
    """Set the weights to those of a file of the same names, tensor by tensor. Raises UserError if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            for tensor in tensors:
                tensor.param.data.copy_(file.get_tensor(prefix + tensor.name))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}.") from error


def restart_steps(epochs: float, steps_per_epoch: int) -> int:
    """Meta-steps between restarts; 0: never, which only 0 epochs mean."""
    return max(1, round(epochs * steps_per_epoch)) if epochs else 0


def due(step: int, every: int) -> bool:
    """Whether there is a restart before this step. The first step needs none."""
    return every > 0 and step > 0 and step % every == 0
