"""Evaluate all probes of a step in one forward pass, with low-rank directions applied to the activations.

    (W + a U V^T) x = W x + a U (V^T x),      for every probe (U, V, a) at once: + eps and - eps along each direction

The closure runs once under torch's vmap over the probes, which are called branches here. Activations have one copy per
branch and the weights do not, so that W is read once and never written. Linear, embedding and GPT-2's Conv1D use this short
form; any other use of a tensor gets W + a d, made for that call, once per branch. Batching saves time as long as activations
are small compared with weights, because activations are multiplied by the number of branches. A branch may be a sum of
vectors; each adds its own short product.

Batching needs low rank. Dense noise has no short form: z_k x costs as much as W x, so K queries of dense noise in one
batch cost K more products than K queries in turn, and save only the reading of W.

A closure that cannot be vectorised (it reads a number out of a tensor, writes into one that it did not make, draws random
numbers) raises RuntimeError.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass
from torch._C._functorch import (
    get_unwrapped,
    is_functorch_wrapped_tensor,
    maybe_current_level,
    maybe_get_bdim,
    maybe_get_level,
)
from torch.func import vmap
from torch.nn import functional as F

from metazo.blocks import NamedTensor
from metazo.noise import Stream
from metazo.step.directions import Direction
from metazo.step.substitute import Shown


class TooLarge(Exception):
    """The batch has more positions than the limit."""


class Branch(NamedTuple):
    """A probe at theta + the sum of amount * d(stream) over these (stream, direction, amount)."""

    terms: Sequence[tuple[Stream, Direction, float]]


class Branches(Shown):
    """Torch functions get theta + the branch's displacement instead of the given tensors, while vmap maps over branches.

    Args: vectors: every (stream, direction) that occurs in a branch. query: indices of the branch's vectors, (terms,),
        mapped by vmap; None if there is one vector. amount: the amounts, (terms,), mapped by vmap. positions: a matrix that
        is given a batch of more rows (batch x length) raises TooLarge.
    """

    def __init__(
        self,
        tensors: Sequence[NamedTensor],
        vectors: Sequence[tuple[Stream, Direction]],
        query: Tensor | None,
        amount: Tensor,
        positions: int | None,
    ):
        super().__init__(t for t in tensors if any(direction.touches(t) for _, direction in vectors))
        for stream, direction in vectors:
            stream.prepare(draw for tensor in tensors for draw in direction.draws(tensor))
        self.vectors, self.positions = vectors, positions
        self.query, self.amounts = query, amount.unbind()  # once: under vmap it takes as long as a small product

    def use(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        short = _SHORT.get(func)
        if short is not None:
            with DisableTorchFunctionSubclass():
                result = short(self, *args, **kwargs)
            if result is not None:
                return result
        return super().use(func, args, kwargs)

    def make(self, tensor: NamedTensor) -> Tensor:
        with DisableTorchFunctionSubclass():
            theta = tensor.param.detach()
            each = [direction.draw(stream, tensor) for stream, direction in self.vectors]
            moved = theta
            for slot, amount in enumerate(self.amounts):
                moved = moved + amount * self._own(each, slot)
            return moved.to(theta.dtype)

    def _own(self, each: Sequence[Tensor], slot: int) -> Tensor:
        """From one tensor per vector, the one that this term of the branch uses."""
        return each[0] if self.query is None else torch.stack([*each]).index_select(0, self.query[slot, None])[0]

    def factors(self, weight: Any) -> list[tuple[Tensor, Tensor]] | None:
        """(U, V) for each of the branch's terms, on a tensor that moves by the sum of amount * U V^T; else None."""
        tensor = self.tensors.get(id(weight))
        if tensor is None:
            return None
        pairs = [pair for stream, d in self.vectors if (pair := d.factors(stream, tensor)) is not None]
        if len(pairs) < len(self.vectors):
            return None
        self.met.add(id(weight))
        widest = max(left.shape[1] for left, _ in pairs)
        lefts, rights = zip(*(pair if pair[0].shape[1] == widest else _padded(*pair, widest) for pair in pairs))
        shared = all(right is rights[0] for right in rights)
        return [
            (self._own(lefts, slot), rights[0] if shared else self._own(rights, slot))
            for slot in range(len(self.amounts))
        ]

    def check(self, positions: int) -> None:
        if self.positions is not None and positions > self.positions:
            raise TooLarge

    def added(self, x: Tensor, weight: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """x W^T + the sum of amount * (x first) second^T over (first, second), rounded to x's type once."""
        out = added = F.linear(x, weight)
        for (first, second), amount in zip(pairs, self.amounts):
            low = _narrow(x, first) * amount
            if not _add_in_place(added, low, second):
                added = added + low @ second.t()
        return added.to(out.dtype)

    def bias(self, bias: Any) -> Any:
        tensor = self.tensors.get(id(bias))
        if tensor is None:
            return bias
        self.met.add(id(bias))
        return self.make(tensor)


def _padded(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the same product, with columns of zeros added so that factors of several ranks can be stacked."""
    more = (0, rank - left.shape[1])
    return F.pad(left, more), F.pad(right, more)


def _narrow(x: Tensor, first: Tensor) -> Tensor:
    """The product x first. With two columns it is two to four times faster if they are stored as two rows."""
    return F.linear(x.to(first.dtype), first.t().contiguous())


def _linear(mode: Branches, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    factors = None if id(input) in mode.tensors else mode.factors(weight)
    if factors is None:
        return None
    mode.check(input.numel() // input.shape[-1])
    out = mode.added(input, weight, [(right, left) for left, right in factors])
    return out if bias is None else out + mode.bias(bias)


def _embedding(mode: Branches, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    factors = mode.factors(weight)
    if (
        factors is None or any(args[1:]) or kwargs.get("max_norm") is not None
    ):  # args[0] is padding_idx, for gradients only
        return None
    mode.check(input.numel())
    out = added = F.embedding(input, weight)
    for (left, right), amount in zip(factors, mode.amounts):
        added = added + (F.embedding(input, left) * amount) @ right.t()
    return added.to(out.dtype)


def _addmm(mode: Branches, bias: Tensor, input: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1):
    factors = None if id(input) in mode.tensors else mode.factors(weight)
    if factors is None or beta != 1 or alpha != 1:
        return None
    mode.check(len(input))
    return mode.added(input, weight.t(), factors) + mode.bias(bias)


_SHORT: dict[Any, Callable[..., Tensor | None]] = {F.linear: _linear, F.embedding: _embedding, torch.addmm: _addmm}


def _add_in_place(out: Tensor, low: Tensor, second: Tensor) -> bool:
    """out += low second^T in one product, which reads and writes `out` once; vmap would make the product and then a sum.

    Returns: whether it was done. It is not if `out` has no number of its own for each branch, or another type.
    """
    if out.dtype != low.dtype or torch.compiler.is_compiling():
        return False
    opened = [found for tensor in (out, low, second) if (found := _opened(tensor)) is not None]
    if len(opened) < 3:
        return False
    (whole, by_branch), (left, low_by_branch), (right, right_by_branch) = opened
    if not (by_branch and low_by_branch and whole.is_contiguous()):
        return False
    if right_by_branch:
        rows = len(whole), -1
        whole.view(*rows, whole.shape[-1]).baddbmm_(left.reshape(*rows, left.shape[-1]), right.mT)
    else:
        whole.view(-1, whole.shape[-1]).addmm_(left.reshape(-1, left.shape[-1]), right.t())
    return True


def _opened(tensor: Tensor) -> tuple[Tensor, bool] | None:
    """What vmap's tensor holds, and whether its first dimension are the branches; None within another transform."""
    level = maybe_get_level(tensor)
    if level == -1:
        return tensor, False
    value = get_unwrapped(tensor)
    if level != maybe_current_level() or is_functorch_wrapped_tensor(value):
        return None
    dim = maybe_get_bdim(tensor)
    return None if dim == -1 else (value.movedim(dim, 0), True)


def losses(
    closure: Callable[[], Tensor | float],
    tensors: Sequence[NamedTensor],
    branches: Sequence[Branch],
    positions: int | None = None,
) -> tuple[list[Tensor], list[NamedTensor]]:
    """The losses of a closure at the branches, from one forward pass, and the tensors that the closure was not seen to use.

    Raises RuntimeError if the closure cannot be vectorised, TooLarge if its batch is above `positions`.
    """
    param = tensors[0].param
    unmet: list[NamedTensor] = []
    vectors = list({(s.seed, d): (s, d) for branch in branches for s, d, _ in branch.terms}.values())
    number = {(stream.seed, direction): index for index, (stream, direction) in enumerate(vectors)}
    slots = max(len(branch.terms) for branch in branches)

    def padded(values: list[Any]) -> list[Any]:
        return values + [0] * (slots - len(values))

    def at(amount: Tensor, query: Tensor) -> Tensor:
        with Branches(tensors, vectors, query if len(vectors) > 1 else None, amount, positions) as mode:
            loss = closure()
        unmet.extend(mode.unmet())
        if not isinstance(loss, Tensor):
            raise RuntimeError(f"the closure returns {type(loss).__name__}, not a tensor")
        return loss

    dtype = torch.promote_types(param.dtype, torch.float32)
    amounts = torch.tensor(
        [padded([a for *_, a in branch.terms]) for branch in branches], dtype=dtype, device=param.device
    )
    queries = torch.tensor(
        [padded([number[s.seed, d] for s, d, _ in branch.terms]) for branch in branches], device=param.device
    )
    # attention has no vmap rule on the CPU: torch calls it once per branch, as without vmap, and would warn about it
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        values = vmap(at)(amounts, queries)
    return list(values), unmet
