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

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from metazo.errors import UserError
from metazo.feedback.chain import exact_errors
from metazo.feedback.passes import Closure, Pass, Recorder
from metazo.feedback.residual import find_residual
from metazo.feedback.surrogates import MeanJacobian
from metazo.io.files import is_file
from metazo.io.tensorfile import read_tensors, write_tensors

HELD_OUT = 4  # one of this many batches is held out for the trust
KIND = "feedback-1"


def fit_jacobian(
    model: nn.Module,
    closures: Sequence[Closure],
    *,
    rank: int = 16,
    ridge: float = 0.02,
    draws: int = 4,
    orthogonal: bool = True,
    seed: int = 0,
    lowest: int = 0,
) -> MeanJacobian:
    """Fit B_l for the output of every block from `lowest` to the last but one.

    Args:
        model: in evaluation mode.
        closures: at least 4, each the loss of a batch. Only the positions that contribute to the loss matter; labels may be
            arbitrary.
        rank: r; 0 fits the trust alone.
        ridge: in units of the variance of v, which is 1.
        draws: cotangents per example.
        orthogonal: whether v is orthogonal to the mean hidden state over the positions that contribute to the loss.
        seed: of the cotangents.

    Returns: float32 factors (d, r) and (r, d), and the trust, by block index.
    Cost: per batch one forward pass, and per block one run and `draws` backward passes. Memory: two (d, d) matrices in
    float64 per block. Raises UserError for fewer than 4 batches or a rank above the width.
    """
    closures = list(closures)
    if len(closures) < HELD_OUT:
        raise UserError(
            f"Fitting feedback needs at least {HELD_OUT} batches, and {len(closures)} were given; give more."
        )
    residual = find_residual(model)
    recorder = Recorder(residual, {}, lowest)
    generator = torch.Generator().manual_seed(seed)
    fits: dict[int, _Fit] = {}
    for number, closure in enumerate(closures):
        for one in recorder.capture([closure]).passes:
            cotangents = [_cotangent(residual.blocks, one, orthogonal, generator) for _ in range(draws)]
            carrying = one.delta.ne(0).any(-1)  # type: ignore[union-attr]
            for index, errors in exact_errors(residual, one, cotangents):
                if index < lowest:
                    break
                pairs = [(v[carrying].double().cpu(), e[carrying].double().cpu()) for v, e in zip(cotangents, errors)]
                fits.setdefault(index, _Fit(pairs[0][0].shape[1])).add(
                    pairs, held_out=number % HELD_OUT == HELD_OUT - 1
                )
    if not fits:
        raise UserError("The last block needs no feedback and there is no other; choose an earlier `lowest` block.")
    if rank > next(iter(fits.values())).width:
        raise UserError(
            f"`rank` is {rank} and the model's width is {next(iter(fits.values())).width}; choose at most that."
        )
    solved = {index: fit.solve(rank, ridge) for index, fit in sorted(fits.items())}
    return MeanJacobian(
        {index: down.float() for index, (down, _, _) in solved.items()},
        {index: up.float() for index, (_, up, _) in solved.items()},
        {index: trust for index, (_, _, trust) in solved.items()},
    )


def _cotangent(blocks: Sequence[nn.Module], one: Pass, orthogonal: bool, generator: torch.Generator) -> Tensor:
    """v (B, T, d): one draw per example, used at its positions that contribute to the loss; zero at all others."""
    delta = one.delta
    assert delta is not None
    carrying = delta.ne(0).any(-1, keepdim=True)
    v = torch.randn(len(delta), 1, delta.shape[-1], generator=generator, dtype=torch.float64).to(delta)
    if orthogonal:
        last = max(one.calls)
        with torch.no_grad():
            state = one.calls[last].run(blocks[last], one.calls[last].hidden)
        pooled = torch.nn.functional.normalize((state * carrying).sum(1, keepdim=True), dim=-1)
        v = v - (v * pooled).sum(-1, keepdim=True) * pooled
    return v * carrying


@dataclass
class _Fit:
    """Sums of a regression of the rows e on the rows v, and the pairs that are held out."""

    width: int
    count: int = 0
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self):
        self.vv, self.ve = (torch.zeros(self.width, self.width, dtype=torch.float64) for _ in range(2))

    def add(self, pairs: Sequence[tuple[Tensor, Tensor]], held_out: bool) -> None:
        if held_out:
            self.kept += pairs
            return
        for v, e in pairs:
            self.vv += v.t() @ v
            self.ve += v.t() @ e
            self.count += len(v)

    def solve(self, rank: int, ridge: float) -> tuple[Tensor, Tensor, float]:
        """(V, U, t): B_l as the identity plus V U of that rank, and the trust t on the pairs that are held out."""
        eye = torch.eye(self.width, dtype=torch.float64)
        u, s, vt = torch.linalg.svd(torch.linalg.solve(self.vv + ridge * self.count * eye, self.ve) - eye)
        down, up = u[:, :rank] * s[:rank], vt[:rank]
        dot = square = 0.0
        for v, e in self.kept:
            mapped = v + (v @ down) @ up
            dot += float((e * mapped).sum())
            square += float(mapped.square().sum())
        return down, up, dot / square


# -- files ------------------------------------------------------------------------------------------------------------


def save_jacobian(path: str | Path, fitted: MeanJacobian, base_model: str = "") -> None:
    """Write as safetensors, completely or not at all: down.<block>, up.<block> and `trust` (in the order of the blocks)."""
    tensors = {f"down.{index}": value.contiguous() for index, value in fitted.down.items()}
    tensors |= {f"up.{index}": value.contiguous() for index, value in fitted.up.items()}
    tensors["trust"] = torch.tensor([fitted.trust[index] for index in fitted.down], dtype=torch.float64)
    described = {"kind": KIND, "blocks": list(fitted.down), "base_model": base_model}
    write_tensors(Path(path), tensors, {"metazo": json.dumps(described)})


def load_jacobian(path: str | Path) -> MeanJacobian:
    """Read what `save_jacobian` wrote. Raises UserError for any other file."""
    path = Path(path)
    if not is_file(path):
        raise UserError(f"Feedback {path} is not a file; check the path, or fit one with fit_jacobian.")
    try:
        tensors, metadata = read_tensors(path)
        described = json.loads(metadata.get("metazo", "{}"))
        if described.get("kind") != KIND:
            raise ValueError(f"its kind is {described.get('kind')!r}, not {KIND!r}")
        blocks = described["blocks"]
        fitted = MeanJacobian(
            {int(index): tensors[f"down.{index}"] for index in blocks},
            {int(index): tensors[f"up.{index}"] for index in blocks},
            dict(zip(map(int, blocks), tensors["trust"].tolist(), strict=True)),
        )
        for index in fitted.down:
            if fitted.down[index].shape != fitted.up[index].t().shape:
                raise ValueError(f"the factors of block {index} do not fit each other")
        if not all(value.isfinite().all() for value in tensors.values()):
            raise ValueError("it has NaN or infinite values")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a usable file of feedback matrices: {error}. Fit one with fit_jacobian."
        ) from error
    return fitted
