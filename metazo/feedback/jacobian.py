"""Learn the mean Jacobian of the network after each block, without labels: B_l = t_l (I + V_l U_l) with e_l ~ delta B_l.

For inputs of unlabelled text and random cotangents v after the last block, orthogonal to the example's pooled state,

    e_l = v J_L ... J_{l+1}                                 exactly, one block at a time
    B_l = (sum v v^T + ridge n I)^-1 sum v e_l^T            ridge regression over n pairs at positions with a loss
    V_l U_l = best rank r of B_l - I                        (Eckart and Young 1936)
    t_l = sum e_l . w / sum w . w,  w = v (I + V_l U_l)     on the batches held out from the regression

Labels are not used, because the errors of a task with K classes span only K - 1 directions, to which a regression overfits.
v is orthogonal to the state, because a final norm removes the part of delta along it.
Related work: weight mirrors (Akrout et al. 2019, arXiv 1904.05391) and GrAPE (Caillon et al., ICLR 2026) learn transposed
weights or feedback while a network is trained; here the mean Jacobian of a pretrained network is fitted once.

Where not to use: on inputs unlike those of the fit; fit it on unlabelled inputs of the target task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metazo.errors import UserError
from metazo.feedback.chain import exact_errors
from metazo.feedback.passes import Closure, Pass, Recorder
from metazo.feedback.residual import find_residual
from metazo.feedback.surrogates import MeanJacobian

HELD_OUT = 4  # one of this many batches is held out for the trust


def fit_jacobian(
    model: nn.Module,
    closures: Sequence[Closure],
    *,
    rank: int = 16,
    ridge: float = 0.02,
    draws: int = 4,
    orthogonal: bool = True,
    seed: int = 0,
    cosines: dict[int, tuple[float, float]] | None = None,
) -> MeanJacobian:
    """Fit B_l for the output of every block but the last.

    Args:
        model: in evaluation mode.
        closures: at least 4, each the loss of a batch. Only the positions that contribute to the loss matter; labels may be
            arbitrary.
        rank: r; 0 fits the trust alone.
        ridge: in units of the variance of v, which is 1.
        draws: cotangents per example.
        orthogonal: whether v is orthogonal to the mean hidden state over the positions that contribute to the loss.
        seed: of the cotangents.
        cosines: if given, takes by block index the cosine of the exact errors with delta (the skip rule) and with the fitted
            map's, over all held-out pairs; with the loss's own delta in place of v if it differs from position to position, as
            under next-token loss, because what is true of errors that share v need not be true of these.

    Returns: float32 factors (d, r) and (r, d), and the trust, by block index.
    Cost: per batch one forward pass, and per block one run and `draws` backward passes. Memory: six (d, d) matrices in
    float64 per block. Raises UserError for fewer than 4 batches, a rank above the width, or without a ridge too few pairs.
    """
    closures = list(closures)
    if len(closures) < HELD_OUT:
        raise UserError(
            f"Fitting feedback needs at least {HELD_OUT} batches, and {len(closures)} were given; give more."
        )
    residual = find_residual(model)
    if len(residual.blocks) < 2:
        raise UserError("The last block needs no feedback and there is no other; choose a model of at least 2 blocks.")
    recorder = Recorder(residual, {}, 0)
    generator = torch.Generator().manual_seed(seed)
    fits: dict[int, _Fit] = {}
    for number, closure in enumerate(closures):
        for one in recorder.capture([closure]).passes:
            delta = one.delta
            assert delta is not None
            if rank > (width := delta.shape[-1]):
                raise UserError(f"`rank` is {rank} and the model's width is {width}; choose at most that.")
            carrying = delta.ne(0).any(-1)
            pooled = _pooled(residual.blocks, one, carrying) if orthogonal else None
            vectors = [_draw(one, pooled, generator) for _ in range(draws)]
            cotangents = [v[:, None] * carrying[..., None] for v in vectors]
            held_out = number % HELD_OUT == HELD_OUT - 1
            own = [delta] if held_out and cosines is not None and not _parallel(delta) else []
            for index, errors in exact_errors(residual, one, [*cotangents, *own]):
                if index < 0:
                    break
                fit = fits.setdefault(index, _Fit(errors[0].shape[-1]))
                sums = fit.held_out if held_out else fit.fitted
                for v, error in zip(vectors, errors):
                    sums.add(v, error, carrying)
                for error in errors[len(vectors) :]:
                    fit.own.add(delta, error, carrying)
    solved = {index: fit.solve(rank, ridge) for index, fit in sorted(fits.items())}
    if cosines is not None:
        cosines |= {index: fit.cosines(*solved[index][:2]) for index, fit in sorted(fits.items())}
    return MeanJacobian(
        {index: down.float() for index, (down, _, _) in solved.items()},
        {index: up.float() for index, (_, up, _) in solved.items()},
        {index: trust for index, (_, _, trust) in solved.items()},
    )


def stream_width(model: nn.Module, closure: Closure) -> int:
    """Width of the hidden states between blocks, found by one call of the closure."""
    delta = Recorder(find_residual(model), {}, 0).capture([closure]).passes[0].delta
    assert delta is not None
    return delta.shape[-1]


def _parallel(delta: Tensor) -> bool:
    """Whether the positions of an example have nearly the same delta: the square of their sum by its largest value, which is 1
    for equal ones and 1/T for T that are independent, over all examples."""
    delta, carrying = delta.double(), delta.ne(0).any(-1).sum(1)
    return bool(delta.sum(1).square().sum() > 0.5 * (carrying * delta.square().sum((1, 2))).sum())


def _draw(one: Pass, pooled: Tensor | None, generator: torch.Generator) -> Tensor:
    """v (B, d): one draw per example, orthogonal to its pooled state; it serves all positions with a loss."""
    delta = one.delta
    assert delta is not None
    v = torch.randn(len(delta), delta.shape[-1], generator=generator, dtype=torch.float64).to(delta)
    return v if pooled is None else v - (v * pooled).sum(-1, keepdim=True) * pooled


def _pooled(blocks: Sequence[nn.Module], one: Pass, carrying: Tensor) -> Tensor:
    """Unit vectors (B, d) along the sum of the last block's outputs over the positions that contribute to the loss."""
    last = max(one.calls)
    with torch.no_grad():
        state = one.calls[last].run(blocks[last], one.calls[last].hidden)
    return torch.nn.functional.normalize((state * carrying[..., None]).sum(1), dim=-1)


class _Moments:
    """Sums over rows of v v^T, v e^T and |e|^2, in float64: all that a linear map of v to e is fitted and judged by."""

    def __init__(self, width: int):
        self.vv, self.ve = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
        self.ee, self.count = 0.0, 0

    def add(self, v: Tensor, errors: Tensor, carrying: Tensor) -> None:
        """Args: v (B, T, d), or (B, d), one per example; errors (B, T, d), each paired with its v if `carrying` (B, T)."""
        if v.ndim == errors.ndim:
            v, summed, times = (
                v[carrying].double().cpu(),
                errors[carrying].double().cpu(),
                torch.ones(int(carrying.sum())),
            )
        else:
            v, summed, times = (
                v.double().cpu(),
                (errors * carrying[..., None]).sum(1).double().cpu(),
                carrying.sum(1).cpu(),
            )
        self.vv += (v * times[:, None]).t() @ v
        self.ve += v.t() @ summed
        self.ee += float(errors[carrying].double().square().sum())
        self.count += int(times.sum())

    def trust(self, matrix: Tensor) -> float:
        """Of the regression of e on w = v M: sum e . w / sum w . w."""
        return float((matrix * self.ve).sum() / (matrix * (self.vv @ matrix)).sum())

    def cosine(self, matrix: Tensor) -> float:
        """Between all e and all v M."""
        return float((matrix * self.ve).sum() / ((matrix * (self.vv @ matrix)).sum() * self.ee).sqrt())


@dataclass
class _Fit:
    """A block's regression of the rows e on the rows v, and the pairs that are held out."""

    width: int

    def __post_init__(self) -> None:
        self.fitted, self.held_out, self.own = (_Moments(self.width) for _ in range(3))

    def solve(self, rank: int, ridge: float) -> tuple[Tensor, Tensor, float]:
        """(V, U, t): B_l as the identity plus V U of that rank, and the trust t on the pairs that are held out."""
        eye, sums = torch.eye(self.width, dtype=torch.float64), self.fitted
        if rank and not ridge and (found := int(torch.linalg.matrix_rank(sums.vv, hermitian=True))) < self.width:
            raise UserError(
                f"`ridge` is 0 and the cotangents span {found} of the {self.width} dimensions of the hidden states, too few "
                "for the maps; choose a `ridge` above 0, or more texts or `draws`."
            )
        u, s, vt = torch.linalg.svd(torch.linalg.solve(sums.vv + ridge * sums.count * eye, sums.ve) - eye)
        down, up = u[:, :rank] * s[:rank], vt[:rank]
        return down, up, self.held_out.trust(eye + down @ up)

    def cosines(self, down: Tensor, up: Tensor) -> tuple[float, float]:
        """Of the held-out errors with v, and with v (I + V U); of the loss's own, if there are any."""
        eye, sums = torch.eye(self.width, dtype=torch.float64), self.own if self.own.count else self.held_out
        return sums.cosine(eye), sums.cosine(eye + down @ up)
