"""All probes of a step in one forward pass, low-rank directions as activations.

    (W + a U V^T) x = W x + a U (V^T x),      for every probe (U, a) at once: + eps and - eps along each query's U

The closure runs once under torch's vmap over the probes, its branches: activations carry them, the weights none, so that W
is read once and never written. Linear, embedding and GPT-2's Conv1D take the short form; any other use of a tensor sees
W + a d, made for that call, once a branch. It pays while activations are small beside weights: they are multiplied by the
number of branches.

Low rank is what makes it pay. Dense noise has no short form: z_k x is as long a product as W x, so K queries of it in one
batch cost K more products than one after the other, and save only reading W.

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
from torch.func import vmap
from torch.nn import functional as F

from metazo.blocks import NamedTensor
from metazo.kernels.outer import add_product_
from metazo.noise import Stream
from metazo.step.directions import Direction
from metazo.step.substitute import Shown

_WIDE = 10_000  # outputs of a matrix from which a product and a sum of their own cost more than calling _Product


class TooLarge(Exception):
    """The batch has more positions than the limit."""


class Branch(NamedTuple):
    """A probe at theta + amount * d(stream)."""

    stream: Stream
    amount: float


class Branches(Shown):
    """Functions see theta + amount * d for the tensors given, where vmap goes over the branches.

    Args: streams: of the queries, one each. query: vmap's number of the branch's query; None where there is one query.
        amount: vmap's number of the branch's amount. positions: raises TooLarge where a batch of more rows
        (batch x length) comes to a matrix.
    """

    def __init__(
        self,
        tensors: Sequence[NamedTensor],
        direction: Direction,
        streams: Sequence[Stream],
        query: Tensor | None,
        amount: Tensor,
        positions: int | None,
    ):
        super().__init__(tensor for tensor in tensors if direction.touches(tensor))
        self.direction, self.streams, self.positions = direction, streams, positions
        self.query, self.amount = query, amount

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
            d = self._own([self.direction.draw(stream, tensor) for stream in self.streams])
            return (theta + self.amount * d).to(theta.dtype)

    def _own(self, each: list[Tensor]) -> Tensor:
        """The branch's own, of a tensor for each query."""
        return each[0] if self.query is None else torch.stack(each).index_select(0, self.query[None])[0]

    def factors(self, weight: Any) -> tuple[Tensor, Tensor] | None:
        """(U, V) of a tensor that moves by amount * U V^T; None for all others."""
        tensor = self.tensors.get(id(weight))
        if tensor is None:
            return None
        found = [self.direction.factors(stream, tensor) for stream in self.streams]
        if found[0] is None:
            return None
        self.met.add(id(weight))
        return self._own([pair[0] for pair in found if pair is not None]), found[0][1]

    def check(self, positions: int) -> None:
        if self.positions is not None and positions > self.positions:
            raise TooLarge

    def added(self, x: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """x W^T + amount * (x first) second^T, rounded to x's type once."""
        if len(second) >= _WIDE and self.query is None:
            return _Product.apply(x, weight, first, second, self.amount)
        out = F.linear(x, weight)
        return (out + (_narrow(x, first) * self.amount) @ second.t()).to(out.dtype)

    def bias(self, bias: Any) -> Any:
        tensor = self.tensors.get(id(bias))
        if tensor is None:
            return bias
        self.met.add(id(bias))
        return self.make(tensor)


def _narrow(x: Tensor, first: Tensor) -> Tensor:
    """x first. Two columns are two to four times faster as two rows."""
    return F.linear(x.to(first.dtype), first.t().contiguous())


def _linear(mode: Branches, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    factors = mode.factors(weight)
    if factors is None:
        return None
    mode.check(input.numel() // input.shape[-1])
    out = mode.added(input, weight, factors[1], factors[0])
    return out if bias is None else out + mode.bias(bias)


def _embedding(mode: Branches, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    factors = mode.factors(weight)
    if factors is None or any(args[1:]) or kwargs.get("max_norm") is not None:  # args[0], padding_idx, is for gradients
        return None
    mode.check(input.numel())
    out = F.embedding(input, weight)
    return (out + (F.embedding(input, factors[0]) * mode.amount) @ factors[1].t()).to(out.dtype)


def _addmm(mode: Branches, bias: Tensor, input: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1):
    factors = mode.factors(weight)
    if factors is None or beta != 1 or alpha != 1:
        return None
    mode.check(len(input))
    return mode.added(input, weight.t(), *factors) + mode.bias(bias)


_SHORT: dict[Any, Callable[..., Tensor | None]] = {F.linear: _linear, F.embedding: _embedding, torch.addmm: _addmm}


class _Product(torch.autograd.Function):
    """x W^T + a (x first) second^T, rounded to x's type once; under vmap for all a in one multiplication by W, to which the
    small product is added in place."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, first: Tensor, second: Tensor, amount: Tensor) -> Tensor:
        return _Product.vmap(None, (None, None, None, None, 0), x, weight, first, second, amount[None])[0][0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        x, weight, first, second, amount = inputs
        x = x[None] if in_dims[0] is None else x.movedim(in_dims[0], 0)  # one for all branches, or one each
        out, low = F.linear(x, weight), _narrow(x, first)
        low = low * amount.view(-1, *[1] * (x.ndim - 1))
        out = out.expand(len(amount), *out.shape[1:]).contiguous()
        if out.dtype == low.dtype:
            add_product_(out.flatten(0, -2), low.flatten(0, -2), second, 1.0, 1.0)
            return out, 0
        return (out + low @ second.t()).to(out.dtype), 0


def losses(
    closure: Callable[[], Tensor | float],
    tensors: Sequence[NamedTensor],
    direction: Direction,
    branches: Sequence[Branch],
    positions: int | None = None,
) -> tuple[list[float], list[NamedTensor]]:
    """The losses of a closure at the branches, from one forward pass; and the tensors it never met.

    Raises RuntimeError where the closure cannot be vectorised, TooLarge where its batch is above `positions`.
    """
    param = tensors[0].param
    unmet: list[NamedTensor] = []
    streams = list(dict.fromkeys(branch.stream for branch in branches))
    several = len(streams) > 1

    def at(amount: Tensor, query: Tensor) -> Tensor:
        with Branches(tensors, direction, streams, query if several else None, amount, positions) as mode:
            loss = closure()
        unmet.extend(mode.unmet())
        if not isinstance(loss, Tensor):
            raise RuntimeError(f"the closure returns {type(loss).__name__}, not a tensor")
        return loss

    dtype = torch.promote_types(param.dtype, torch.float32)
    amounts = torch.tensor([branch.amount for branch in branches], dtype=dtype, device=param.device)
    queries = torch.tensor([streams.index(branch.stream) for branch in branches], device=param.device)
    # attention has no rule for vmap on the CPU: it is called for each branch, as without vmap, and torch would warn
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        found = vmap(at)(amounts, queries)
    return [float(value) for value in found], unmet
