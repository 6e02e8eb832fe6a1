"""How block-diagonal the Hessian of a loss is: the squared Frobenius norm of each of its blocks.

    M_ij = ||H_ij||_F^2            H_ij: second derivatives by the entries of block i and those of block j
    exact      M_ij = sum over the entries k of block j of ||(H e_k)_i||^2          one product H v per entry
    estimated  M_ij = E ||(H v_j)_i||^2, v_j random signs on block j, 0 elsewhere   one product H v per block and draw

    E ||(H v_j)_i||^2 = E v_j^T H_ij^T H_ij v_j = tr(H_ij^T H_ij), because E v_j v_j^T = I
    share within the blocks = sum_i M_ii / sum_ij M_ij, and sum_i n_i^2 / N^2 if every entry of H were of the same size

Products are taken by differentiating twice. The estimate of M_ij and that of M_ji are of the same number, so their mean is
taken. Sources: Hutchinson 1990 (the trace of H^T H from random signs); Pearlmutter 1994 (products). The assumption that H is
block diagonal is that of Theorem 3.1 of ZO Fine-tuner (arXiv 2510.00419), which gives each block of weights one scale.

Where not to use it: at weights and on a batch that do not stand for a training run, because H is that of one point and one
batch; with weights narrower than float32; with attention kernels that have no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metazo.blocks import Block
from metazo.errors import UserError

EXACT = 5000
"""Most entries for which a product per entry is taken."""
DRAWS = 16


@dataclass(frozen=True)
class BlockNorms:
    """Squared norms of the blocks of a Hessian.

    names, entries: of the n blocks. samples: (draws, n, n) float64, symmetric estimates; (1, n, n) if they are exact.
    """

    names: list[str]
    entries: list[int]
    samples: Tensor
    exact: bool

    @property
    def norms(self) -> Tensor:
        """M (n, n) float64; unbiased if it is estimated."""
        return self.samples.mean(0)

    @property
    def errors(self) -> Tensor:
        """Standard errors (n, n) of M; 0 if it is exact."""
        return torch.zeros_like(self.samples[0]) if self.exact else self.samples.std(0) / len(self.samples) ** 0.5

    @property
    def share(self) -> float:
        """The share of the squared norm within the diagonal blocks, 0 to 1; NaN for a Hessian of zeros.

        A ratio of unbiased estimates, so that its own bias falls as 1 / draws.
        """
        return float(self.norms.trace() / self.norms.sum())

    @property
    def share_error(self) -> float:
        """Its standard error, of the first order in the errors of the two sums (delta method)."""
        if self.exact:
            return 0.0
        whole = self.samples.sum((1, 2))
        rest = self.samples.diagonal(dim1=1, dim2=2).sum(1) - self.share * whole
        return float(rest.std() / len(rest) ** 0.5 / whole.mean())

    @property
    def even(self) -> float:
        """The share if every entry of the Hessian were of the same size: sum_i n_i^2 / N^2."""
        return sum(count**2 for count in self.entries) / sum(self.entries) ** 2

    @property
    def own(self) -> Tensor:
        """Of each block (n,), the share of its rows' squared norm that is within the block: M_ii / sum_j M_ij."""
        return self.norms.diagonal() / self.norms.sum(1)


def block_norms(
    loss: Callable[[], Tensor],
    blocks: Sequence[Block],
    *,
    draws: int = DRAWS,
    limit: int = EXACT,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> BlockNorms:
    """The squared norms of the blocks of a loss's Hessian: exact up to `limit` entries, else estimated.

    Args: loss: returns a scalar with a graph, the same one at each call; it is called once. draws: random vectors per block, at
    least 2. seed: of the random signs. tick: called after each product, of which there are `products(blocks, draws, limit)`.
    A product costs about two backward passes, and the graph of the gradient is kept in memory.
    Raises UserError for weights narrower than float32, a loss without a graph, and one that cannot be differentiated twice
    or whose second derivatives are not finite.
    """
    if draws < 2:
        raise UserError(f"`draws` is {draws}; at least 2 are needed for a standard error.")
    for tensor in (tensor for block in blocks for tensor in block.tensors):
        if tensor.param.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"{tensor.name} is {tensor.param.dtype}, in which second derivatives are lost; use `dtype` float32 or float64."
            )
    entries = [block.numel for block in blocks]
    exact = sum(entries) <= limit
    product = _products(loss, blocks)
    if exact:
        samples = torch.zeros(1, len(blocks), len(blocks), dtype=torch.float64)
        for column, count in enumerate(entries):
            for entry in range(count):
                unit = torch.zeros(count, dtype=torch.float64)
                unit[entry] = 1
                samples[0, :, column] += product(column, unit)
                tick()
    else:
        samples = torch.zeros(draws, len(blocks), len(blocks), dtype=torch.float64)
        random = torch.Generator().manual_seed(seed)
        for draw in range(draws):
            for column, count in enumerate(entries):
                signs = torch.randint(0, 2, (count,), generator=random, dtype=torch.int8).mul_(2).sub_(1)
                samples[draw, :, column] = product(column, signs)
                tick()
        samples = (samples + samples.mT) / 2
    if not bool(samples.isfinite().all()):
        raise UserError(
            "Second derivatives of the loss are not finite at these weights; use `dtype` float64 or other weights."
        )
    return BlockNorms([block.name for block in blocks], entries, samples, exact)


def products(blocks: Sequence[Block], draws: int = DRAWS, limit: int = EXACT) -> int:
    """The number of Hessian-vector products that `block_norms` takes."""
    entries = sum(block.numel for block in blocks)
    return entries if entries <= limit else draws * len(blocks)


def _products(loss: Callable[[], Tensor], blocks: Sequence[Block]) -> Callable[[int, Tensor], Tensor]:
    """A function of (j, v): ||(H v)_i||^2 for every block i, (n,) float64, where v is 0 outside block j."""
    members = [[tensor.param for tensor in block.tensors] for block in blocks]
    params: list[Any] = [param for group in members for param in group]
    owner = torch.tensor([index for index, group in enumerate(members) for _ in group])
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
        value = loss()
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise UserError("The loss has no gradient, so it has no Hessian; take a task's loss instead of a metric.")
        with _twice():
            first = torch.autograd.grad(value, params, create_graph=True, materialize_grads=True)
    gradients = dict(zip(map(id, params), first))

    def product(column: int, vector: Tensor) -> Tensor:
        parts = vector.split([param.numel() for param in members[column]])
        outputs, weights = [], []
        for param, part in zip(members[column], parts):
            if gradients[id(param)].requires_grad:  # otherwise the gradient is a constant
                outputs.append(gradients[id(param)])
                weights.append(part.to(param.device, param.dtype).view_as(param))
        squares = torch.zeros(len(members), dtype=torch.float64)
        if outputs:
            with _twice():
                found = torch.autograd.grad(outputs, params, weights, retain_graph=True, materialize_grads=True)
            each = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) ** 2 for part in found])
            squares.index_add_(0, owner, each.cpu())
        return squares

    return product


@contextmanager
def _twice() -> Iterator[None]:
    """Turn torch's refusal to differentiate an operation twice into a sentence."""
    try:
        yield
    except RuntimeError as error:
        if "derivative" not in str(error) or "not implemented" not in str(error):
            raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"The loss cannot be differentiated twice ({reason}); use `attn_implementation` eager."
        ) from error
