"""HiZOO-L, ours: HiZOO with the curvature of a matrix kept as a row and a column.

HiZOO's paper (arXiv 2402.15173) names a HiZOO-L whose Hessian takes under a tenth of MeZO's memory; the public code
does not include it. This is our interpretation, after Adafactor (Shazeer and Stern 2018): for a matrix (m x n) keep the
means of HiZOO's H over columns and over rows, R and C, both 1 at first.

    H_ij = R_i C_j / mean(R)                     d, c, k and theta as in HiZOO (hizoo.py)
    E_ij = k H_ij z_ij^2
    R_i <- (1 - a) R_i + a mean_j E_ij           C_j <- (1 - a) C_j + a mean_i E_ij

mean(R) = mean(C) at all times. One step from a rank-one H gives R and C exactly as the means of HiZOO's next H; for a
matrix with one row or one column, H itself is HiZOO's. The variance of a mean over n weights is n times smaller than that
of H, so R and C are learned with less noise. Tensors of one dimension keep all of H; a tensor with more than two is the
matrix (size(0), rest). There is no published code, hence no `compat`.

Where not to use: if curvature follows neither rows nor columns, or with Rademacher noise (see hizoo.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metazo.blocks import NamedTensor, chunk_of, sides_of
from metazo.noise import Stream
from metazo.optimizers.base import State
from metazo.optimizers.hizoo import CurvatureScaled, ones
from metazo.optimizers.registry import Case, register
from metazo.step.directions import drawn
from metazo.step.lowrank import cut


@register
class HiZOOL(CurvatureScaled):
    """HiZOO with a factored curvature estimate (ours).

    Forwards per step: 3. Extra memory: a number per row and column of each matrix, one per weight of other tensors. State:
    R/<tensor>, (m,), and C/<tensor>, (n,); H/<tensor> for tensors of one dimension. Args: as HiZOO.
    """

    name = "hizoo-l"
    shardable = True
    contract_case = Case(stiff=3e-3, llama=4e-3, along="sign", options={"smoothing": 1e-3})

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        state = {}
        for tensor in tensors:
            if tensor.param.ndim > 1:
                rows, columns = sides_of(tensor.param)
                state[f"R/{tensor.name}"] = ones(tensor, (rows,))
                state[f"C/{tensor.name}"] = ones(tensor, (columns,))
            else:
                state[f"H/{tensor.name}"] = ones(tensor, tensor.param.shape)
        return state

    def inverse_root(self, tensor: NamedTensor, start: int = 0, count: int | None = None) -> Tensor:
        if f"H/{tensor.name}" in self.zo_state:
            return super().inverse_root(tensor, start, count)
        rows, columns = self.zo_state[f"R/{tensor.name}"], self.zo_state[f"C/{tensor.name}"]
        scaled = (rows / rows.mean()).rsqrt_()
        left, right = cut(tensor, scaled, columns.rsqrt())
        if count is None:
            return torch.outer(left, right).view(tensor.param.shape)
        first = start // len(right)
        return torch.outer(left[first : first + count // len(right)], right).view(-1)

    def absorb(self, tensor: NamedTensor, stream: Stream, second: float) -> None:
        a, scale = self.smoothing, abs(second) / (2 * self.eps**2)
        whole = self.zo_state.get(f"H/{tensor.name}")
        if whole is not None:
            for start, z in drawn(stream, tensor):
                chunk_of(whole, start, z).mul_(z.square_().mul_(a * scale).add_(1 - a))
            return
        rows, columns = self.zo_state[f"R/{tensor.name}"], self.zo_state[f"C/{tensor.name}"]
        scale = scale / float(rows.mean())
        by_row, by_column = torch.empty_like(rows), torch.zeros_like(columns)
        for start, z in drawn(stream, tensor.entire):  # of a shard too: R and C are means over whole rows and columns
            square = z.square_().view(-1, len(columns))
            place = slice(start // len(columns), start // len(columns) + len(square))
            torch.mv(square, columns, out=by_row[place])
            by_column.addmv_(square.t(), rows[place])
        rows.mul_(by_row.div_(len(columns)).mul_(a * scale).add_(1 - a))
        columns.mul_(by_column.div_(len(rows)).mul_(a * scale).add_(1 - a))
