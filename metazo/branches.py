"""All probes of a step in one forward pass, low-rank directions as activations.

    (W + a U V^T) x = W x + a U (V^T x),      a = + eps and - eps at once

The closure runs once under torch's vmap over the multiples a: activations carry both probes, the weights none, so that W is
read once and never written. Linear, embedding and GPT-2's Conv1D take the short form; any other use of a tensor sees
W + a d, made for that call, twice. It pays while activations are small beside weights (batch x length below about 100 on
two CPU cores): they are doubled.

A closure that cannot be vectorised (it reads a number out of a tensor, writes into one that it did not make, draws random
numbers) raises RuntimeError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from metazo.blocks import NamedTensor
from metazo.directions import Direction
from metazo.lowrank import add_product_
from metazo.noise import Stream
from metazo.scratch import reads_numbers

_WIDE = 10_000  # outputs of a matrix from which a product and a sum of their own cost more than calling _Product


class TooLarge(Exception):
    """The batch has more positions than the limit."""


class Branches(TorchFunctionMode):
    """Functions see theta + amount * d for the tensors given; amount may be a number of vmap's.

    Args: positions: raises TooLarge where a batch of more rows (batch x length) comes to a matrix.
    """

    def __init__(
        self,
        tensors: Sequence[NamedTensor],
        direction: Direction,
        stream: Stream,
        amount: Tensor,
        positions: int | None,
    ):
        super().__init__()
        self.tensors = {id(tensor.param): tensor for tensor in tensors if direction.touches(tensor)}
        self.direction, self.stream, self.amount, self.positions = direction, stream, amount, positions
        self.met: set[int] = set()

    def unmet(self) -> list[NamedTensor]:
        """The tensors that no function was seen to use."""
        return [tensor for key, tensor in self.tensors.items() if key not in self.met]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        short = _SHORT.get(func)
        if short is not None:
            result = short(self, *args, **kwargs)
            if result is not None:
                return result
        if (not self._mentioned(args) and not self._mentioned(kwargs.values())) or not reads_numbers(func):
            return func(*args, **kwargs)
        return func(*self._moved(args), **self._moved(kwargs))

    def _mentioned(self, values: Iterable[Any]) -> bool:
        """Whether a tensor that moves may be among the values: asked for every function, and the answer is mostly no."""
        return any(id(value) in self.tensors or isinstance(value, list | tuple | dict) for value in values)

    def factors(self, weight: Any) -> tuple[Tensor, Tensor] | None:
        """(U, V) of a tensor that moves by amount * U V^T; None for all others."""
        tensor = self.tensors.get(id(weight))
        factors = None if tensor is None else self.direction.factors(self.stream, tensor)
        if factors is not None:
            self.met.add(id(weight))
        return factors

    def check(self, positions: int) -> None:
        if self.positions is not None and positions > self.positions:
            raise TooLarge

    def added(self, x: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """x W^T + amount * (x first) second^T, rounded to x's type once."""
        if len(second) >= _WIDE:
            return _Product.apply(x, weight, first, second, self.amount)
        out = F.linear(x, weight)
        return (out + (_narrow(x, first) * self.amount) @ second.t()).to(out.dtype)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            tensor = self.tensors.get(id(value))
            if tensor is None:
                return value
            self.met.add(id(value))
            d = self.direction.draw(self.stream, tensor)
            return (value.detach() + self.amount * d).to(value.dtype)
        if isinstance(value, dict):
            return {key: self._moved(item) for key, item in value.items()}
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return type(value)(self._moved(item) for item in value)
        return value


def _narrow(x: Tensor, first: Tensor) -> Tensor:
    """x first. Two columns are two to four times faster as two rows."""
    return F.linear(x.to(first.dtype), first.t().contiguous())


def _linear(mode: Branches, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    factors = mode.factors(weight)
    if factors is None:
        return None
    mode.check(input.numel() // input.shape[-1])
    out = mode.added(input, weight, factors[1], factors[0])
    return out if bias is None else out + mode._moved(bias)


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
    return mode.added(input, weight.t(), *factors) + mode._moved(bias)


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


class _Attention(torch.autograd.Function):
    """scaled_dot_product_attention with a rule for vmap: branches are batches. Torch has none for the CPU, and would loop."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        def folded(x: Tensor, place: int | None) -> Tensor:
            branches = x.expand(info.batch_size, *x.shape) if place is None else x.movedim(place, 0)
            return branches.flatten(0, 1)

        query, key, value = (folded(x, place) for x, place in zip(inputs[:3], in_dims))
        mask, options = inputs[3:]
        if mask is not None and (in_dims[3] is not None or (mask.ndim == 4 and len(mask) > 1)):
            mask = folded(mask, in_dims[3])
        out = F.scaled_dot_product_attention(query, key, value, mask, **options)
        return out.unflatten(0, (info.batch_size, -1)), 0


def _attention(
    mode: Branches, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
):
    return _Attention.apply(query, key, value, attn_mask, options) if query.ndim == 4 else None


_SHORT: dict[Any, Callable[..., Tensor | None]] = {F.linear: _linear, F.embedding: _embedding, torch.addmm: _addmm}
_SHORT[F.scaled_dot_product_attention] = _attention


def losses(
    closure: Callable[[], Tensor | float],
    tensors: Sequence[NamedTensor],
    direction: Direction,
    stream: Stream,
    amounts: Sequence[float],
    positions: int | None = None,
) -> tuple[list[float], list[NamedTensor]]:
    """The losses of a closure at theta + amount * d for each amount, from one forward pass; and the tensors it never met.

    Raises RuntimeError where the closure cannot be vectorised, TooLarge where its batch is above `positions`.
    """
    param = tensors[0].param
    unmet: list[NamedTensor] = []

    def at(amount: Tensor) -> Tensor:
        with Branches(tensors, direction, stream, amount, positions) as mode:
            loss = closure()
        unmet.extend(mode.unmet())
        if not isinstance(loss, Tensor):
            raise RuntimeError(f"the closure returns {type(loss).__name__}, not a tensor")
        return loss

    dtype = torch.promote_types(param.dtype, torch.float32)
    found = vmap(at)(torch.tensor(amounts, dtype=dtype, device=param.device))
    return [float(value) for value in found], unmet
