"""Directions: what a step moves along.

A direction turns the noise of one seed into a vector d over all tensors, tensor by tensor and in order (noise in the
published order depends on it). Directions wrap each other: `Scaled(LowRank(...))` is LOZO under a learned block scale.
Each has two verbs: `add_`, fused and without temporaries where the direction allows, and `draw`, its plain twin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from metazo.blocks import NamedTensor
from metazo.noise import LEFT, Stream


class Direction(Protocol):
    def touches(self, tensor: NamedTensor) -> bool:
        """False where d is zero on the tensor and draws no noise for it."""
        ...

    def add_(self, stream: Stream, tensor: NamedTensor, out: Tensor, alpha: float, beta: float = 1.0) -> None:
        """out = beta * out + alpha * d, in place; out has the tensor's shape."""
        ...

    def draw(self, stream: Stream, tensor: NamedTensor, dtype=None) -> Tensor:
        """d on this tensor, in its shape and in dtype (default: the tensor's, at least float32)."""
        ...


class Isotropic:
    """d = z, the noise itself."""

    def touches(self, tensor: NamedTensor) -> bool:
        return True

    def add_(self, stream: Stream, tensor: NamedTensor, out: Tensor, alpha: float, beta: float = 1.0) -> None:
        stream.add_(tensor, out, alpha, beta)

    def draw(self, stream: Stream, tensor: NamedTensor, dtype=None) -> Tensor:
        return stream.draw(tensor, dtype=dtype)


class Scaled:
    """d = s_b d', one positive number a tensor: block scales, at no cost beyond the scalar."""

    def __init__(self, inner: Direction, scales: Mapping[str, float]):
        self.inner, self.scales = inner, scales

    def touches(self, tensor: NamedTensor) -> bool:
        return self.inner.touches(tensor)

    def add_(self, stream: Stream, tensor: NamedTensor, out: Tensor, alpha: float, beta: float = 1.0) -> None:
        self.inner.add_(stream, tensor, out, alpha * self.scales[tensor.name], beta)

    def draw(self, stream: Stream, tensor: NamedTensor, dtype=None) -> Tensor:
        return self.inner.draw(stream, tensor, dtype).mul_(self.scales[tensor.name])


class Diagonal:
    """d = D * d', elementwise; `factor(tensor)` gives D in the tensor's shape (HiZOO: H^-1/2)."""

    def __init__(self, inner: Direction, factor):
        self.inner, self.factor = inner, factor

    def touches(self, tensor: NamedTensor) -> bool:
        return self.inner.touches(tensor)

    def add_(self, stream: Stream, tensor: NamedTensor, out: Tensor, alpha: float, beta: float = 1.0) -> None:
        out.mul_(beta).add_(self.draw(stream, tensor, dtype=out.dtype), alpha=alpha)

    def draw(self, stream: Stream, tensor: NamedTensor, dtype=None) -> Tensor:
        return self.inner.draw(stream, tensor, dtype).mul_(self.factor(tensor))


def add_product_(out: Tensor, left: Tensor, right: Tensor, alpha: float, beta: float) -> None:
    """out = beta * out + alpha * left right^T, in place; out of more than two dimensions is a matrix of its rows."""
    rows = out.flatten(1)
    rows.addmm_(left.to(out.dtype), right.to(out.dtype).t(), beta=beta, alpha=alpha)
    if rows.data_ptr() != out.data_ptr():  # not contiguous: the rows are a copy
        out.copy_(rows.view(out.shape))


class LowRank:
    """d = U V^T on matrices, U drawn fresh, V given; the inner direction on everything else.

    Args: inner; right: V by tensor name, (n, r), for the tensors to treat so; before: called with (stream, tensor)
        ahead of U, for noise in the published order, where V's numbers come first on the same stream.
    """

    def __init__(self, inner: Direction, right: Mapping[str, Tensor], before=None):
        self.inner, self.right, self.before = inner, right, before

    def touches(self, tensor: NamedTensor) -> bool:
        return tensor.name in self.right or self.inner.touches(tensor)

    def left(self, stream: Stream, tensor: NamedTensor, dtype=None) -> Tensor:
        """U of the tensor. Returns: (m, r)."""
        if self.before is not None:
            self.before(stream, tensor)
        shape = (tensor.param.shape[0], self.right[tensor.name].shape[1])
        return stream.draw(tensor, shape, purpose=LEFT, dtype=dtype)

    def add_(self, stream: Stream, tensor: NamedTensor, out: Tensor, alpha: float, beta: float = 1.0) -> None:
        right = self.right.get(tensor.name)
        if right is None:
            self.inner.add_(stream, tensor, out, alpha, beta)
        else:
            add_product_(out, self.left(stream, tensor, out.dtype), right, alpha, beta)

    def draw(self, stream: Stream, tensor: NamedTensor, dtype=None) -> Tensor:
        right = self.right.get(tensor.name)
        if right is None:
            return self.inner.draw(stream, tensor, dtype)
        left = self.left(stream, tensor, dtype)
        return (left @ right.to(left.dtype).t()).view(tensor.param.shape)


class Held:
    """d is given, not drawn: left right^T where a tensor has such a pair, a whole tensor elsewhere (LOZO-M)."""

    def __init__(self, left: Mapping[str, Tensor], right: Mapping[str, Tensor], whole: Mapping[str, Tensor]):
        self.left, self.right, self.whole = left, right, whole

    def touches(self, tensor: NamedTensor) -> bool:
        return True

    def add_(self, stream: Stream, tensor: NamedTensor, out: Tensor, alpha: float, beta: float = 1.0) -> None:
        left = self.left.get(tensor.name)
        if left is None:
            out.mul_(beta).add_(self.whole[tensor.name], alpha=alpha)
        else:
            add_product_(out, left, self.right[tensor.name], alpha, beta)

    def draw(self, stream: Stream, tensor: NamedTensor, dtype=None) -> Tensor:
        like = self.whole.get(tensor.name, self.left.get(tensor.name))
        out = tensor.param.new_zeros(tensor.param.shape, dtype=dtype or like.dtype)  # type: ignore[union-attr]
        self.add_(stream, tensor, out, 1.0)
        return out


class Reflected:
    """d = B d', with B the reflected root of rho (rho I + a a^T)^-1 on every run of len(a) entries of a tensor (LOREN).

        B u = u - (1 + sqrt(rho / (rho + s))) a (a.u) / s,    s = |a|^2        so that B B^T = rho (rho I + a a^T)^-1

    B leaves what is orthogonal to a as it is, and turns a into -sqrt(rho / (rho + s)) a.

    Args: inner; vector: gives a of a tensor, its length a divisor of the tensor's entries (a row's: one B a row);
        damping: rho > 0.
    """

    def __init__(self, inner: Direction, vector: Callable[[NamedTensor], Tensor], damping: float):
        self.inner, self.vector, self.damping = inner, vector, damping

    def touches(self, tensor: NamedTensor) -> bool:
        return self.inner.touches(tensor)

    def add_(self, stream: Stream, tensor: NamedTensor, out: Tensor, alpha: float, beta: float = 1.0) -> None:
        out.mul_(beta).add_(self.draw(stream, tensor, dtype=out.dtype), alpha=alpha)

    def draw(self, stream: Stream, tensor: NamedTensor, dtype=None) -> Tensor:
        noise = self.inner.draw(stream, tensor, dtype)
        a = self.vector(tensor).to(noise.dtype)
        square = float(a @ a)
        if square > 0:
            rows = noise.view(-1, len(a))
            factor = (1 + math.sqrt(self.damping / (self.damping + square))) / square
            rows.addr_(rows @ a, a, alpha=-factor)
        return noise


class Sparse:
    """d = d' on the selected tensors, zero elsewhere, where no noise is drawn either."""

    def __init__(self, inner: Direction, selected):
        self.inner, self.selected = inner, frozenset(selected)

    def touches(self, tensor: NamedTensor) -> bool:
        return tensor.name in self.selected and self.inner.touches(tensor)

    def add_(self, stream: Stream, tensor: NamedTensor, out: Tensor, alpha: float, beta: float = 1.0) -> None:
        if self.touches(tensor):
            self.inner.add_(stream, tensor, out, alpha, beta)
        elif beta != 1.0:
            out.mul_(beta)

    def draw(self, stream: Stream, tensor: NamedTensor, dtype=None) -> Tensor:
        if self.touches(tensor):
            return self.inner.draw(stream, tensor, dtype)
        return tensor.param.new_zeros(tensor.param.shape, dtype=dtype)
