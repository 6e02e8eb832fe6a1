"""Numbers that a stream is about to draw, made for many small tensors in one call.

A draw takes a tenth of a millisecond, whatever its size; methods that draw their direction tensor by tensor, as HiZOO and
LOREN do, take several for each tensor in every step. The numbers are the same either way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import dropwhile

import torch
from torch import Tensor

from metazo.blocks import NamedTensor
from metazo.noise.protocol import DENSE, Move
from metazo.noise.reference import Draw

AddAll = Callable[[Sequence[Move], int], None]
ENTRIES = 1 << 18
"""Numbers of a group, at most: a temporary that a step makes. A tensor with more is drawn alone."""
ALIGN_BYTES = 64
"""Bytes at a multiple of which torch's own memory begins; the order of the sums in a product can depend on that."""


class Ahead:
    """Args: draws: in the order in which they will be asked for, about."""

    def __init__(self, draws: Iterable[Draw]):
        self.coming = {(tensor.id, purpose): (tensor, shape) for tensor, shape, purpose in draws}
        self.made: dict[tuple[int, int], Tensor] = {}

    def take(self, tensor: NamedTensor, purpose: int, dtype: torch.dtype, add_all_: AddAll) -> Tensor | None:
        """All numbers of a tensor, (entries,), each time once; None if they were not announced, or would be alone.

        add_all_: that of the stream, which is not kept, so that the two do not hold each other.
        """
        key = tensor.id, purpose
        if key not in self.made and key in self.coming:
            self._make(key, dtype, add_all_)
        found = self.made.pop(key, None)
        return found if found is not None and found.dtype == dtype else None

    def _make(self, first: tuple[int, int], dtype: torch.dtype, add_all_: AddAll) -> None:
        """The group that begins with this draw; what is left of the group before is given up."""
        device, width = self.coming[first][0].param.device, ALIGN_BYTES // dtype.itemsize
        group: dict[tuple[int, int], slice] = {}
        end = 0
        for key in dropwhile(lambda key: key != first, self.coming):
            tensor, shape = self.coming[key]
            size = math.prod(tensor.param.shape if shape is None else shape)
            divided = key[1] == DENSE and tensor.spans is not None
            if divided or tensor.param.device != device or end + size > ENTRIES:
                break
            group[key] = slice(end, end + size)
            end += -(-size // width) * width
        if len(group) < 2:
            self.made = {}
            return
        memory = torch.zeros(end, dtype=dtype, device=device)
        self.made = {key: memory[place] for key, place in group.items()}
        for purpose in {purpose for _, purpose in group}:
            add_all_([Move(self.coming[k][0], self.made[k], 1.0) for k in group if k[1] == purpose], purpose)
        for key in group:
            del self.coming[key]
