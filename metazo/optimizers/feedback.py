"""Feedback: the error after the last block, multiplied by a mean Jacobian that is learned once for the base model.

    delta = dL/dx_L                              exact
    e_l = t_l (delta + (delta V_l) U_l)          B_l = t_l (I + V_l U_l), rank r and a trust per block
    g_l = (d f_l / d theta_l)^T e_l              exact within block l

B_l is fitted without labels from random cotangents (`metazo meta-train --learn feedback`) and kept as a tuner of the base
model: 2 r d + 1 numbers per block. A block without an entry gets skip feedback. Source: learned feedback
as in weight mirrors (Akrout et al. 2019, arXiv 1904.05391). Difference: the matrix is the identity plus low rank, for a
network that is already trained, and is fitted once before fine-tuning.

Where not to use: without inputs like those of the task for the fit. docs/feedback.md compares it with skip feedback.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from metazo.blocks import NamedTensor
from metazo.errors import UserError
from metazo.feedback.surrogates import MeanJacobian, Surrogate
from metazo.feedback.tuner import FeedbackTuner
from metazo.optimizers.base import State
from metazo.optimizers.registry import register
from metazo.optimizers.structured import Structured


@register
class Feedback(Structured):
    """Every block gets the error delta B_l. Arguments, cost and limits: see `Structured`.

    Args: tuner: of this base model (metazo.feedback.tuner.FeedbackTuner), the path of its file, or bare maps.
    Raises UserError for a tuner of a model with other blocks.
    """

    name = "feedback"
    paper = "ours"
    needs_tuner = True
    common = frozenset({"seed", "precision", "tuner"})  # a literal, which outline.py can read

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        *,
        tuner: str | Path | FeedbackTuner | MeanJacobian | None = None,
        **rest,
    ):
        if tuner is None:
            raise UserError(
                "feedback needs `tuner`: fit one with metazo meta-train --learn feedback, or use skip-feedback."
            )
        found = FeedbackTuner.load(tuner) if isinstance(tuner, str | Path) else tuner
        if isinstance(found, FeedbackTuner):
            found.check_fit(rest["model"])
        self.jacobian = found.maps if isinstance(found, FeedbackTuner) else found
        super().__init__(params, lr, **rest)

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        """The matrices are part of the state, so that a resumed run uses those that it started with."""
        device, given = tensors[0].param.device, self.jacobian
        down = {index: value.to(device, copy=True) for index, value in given.down.items()}
        up = {index: value.to(device, copy=True) for index, value in given.up.items()}
        trust = {
            index: torch.tensor(float(value), dtype=torch.float64, device="cpu") for index, value in given.trust.items()
        }
        self.jacobian = MeanJacobian(down, up, trust)  # type: ignore[arg-type]
        kinds = {"down": down, "up": up, "trust": trust}
        maps = {f"jacobian/{kind}/{index}": value for kind, found in kinds.items() for index, value in found.items()}
        return super().init(tensors) | maps

    def surrogate(self) -> Surrogate:
        return self.jacobian
