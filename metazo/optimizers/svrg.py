"""MeZO-SVRG (Gautam et al., "Variance-reduced zeroth-order methods for fine-tuning language models", arXiv 2404.08080).

    SPSA_B(theta; z) = (L_B(theta + eps z) - L_B(theta - eps z)) / (2 eps) z
    if step % interval == 0:     gbar = SPSA_all(theta; z'),  theta_0 = theta,  theta <- theta - lr gbar
    else:                        theta <- theta - mini_lr (SPSA_B(theta; z) - SPSA_B(theta_0; z) + gbar)

L_all is the loss over all training examples, L_B over the step's batch. Both SPSA_B have the same z, so their difference
goes to zero as theta goes to theta_0, and with it the variance due to the batch and z; gbar keeps the variance of its one
direction. The mean over batches and directions is the gradient at theta, to O(eps^2).

Annealing (the published schedule, if `epoch_steps` is given): from the fifth epoch on, both rates are divided by `anneal` at
the end of an epoch whose mean loss is above 1.05 times that of the epoch two before, down to 1e-5 and 1e-6.

    optimizer = MeZOSVRG(model.named_parameters(), lr=1e-4, mini_lr=1e-6)
    optimizer.full_closure = lambda: mean loss over the training set    # or a sequence of closures, one per batch
    optimizer.step(lambda: model(**batch).loss)                         # the batch is used except at full steps

Differences from the published code (amazon-science/mezo_svrg):
 1. There theta_0 is a copy of the list of the parameters themselves, and so no snapshot. Here the values are copied.
 2. There the two batch estimates have different seeds, and the second is taken after the first was applied, so that they
    are independent and add variance. Here they share z.
 3. The forward that logs the loss after each step is left out; annealing reads the loss of the step's probes.
 4. gbar is regenerated from its seed instead of kept: one copy of the weights of extra memory, not two.
There is no `compat="official"`, because it would be MeZO with twice the forwards. With block scales, gbar is regenerated
under the present scales. If the loss of a full step is not finite, snapshot and gbar do not change; if there are none yet,
the next step is full as well.

Where not to use: if two passes over all training examples every `interval` steps, or a copy of the weights, cost too much.
gbar's own variance is MeZO's on the full data, so do not expect first-order SVRG's gain.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from metazo.blocks import NamedTensor, chunk_of
from metazo.errors import UserError
from metazo.optimizers.base import State, ZOOptimizer
from metazo.optimizers.groups import Closure, listed
from metazo.optimizers.registry import Case, register
from metazo.optimizers.returned import check_reached
from metazo.step.estimators import ControlVariate, Estimator, TwoPoint
from metazo.step.record import Update
from metazo.step.terms import Term

RISE, FLOOR, MINI_FLOOR = 1.05, 1e-5, 1e-6  # of annealing, as published; the floors are those of lr and mini_lr


def _missing() -> float:
    raise UserError(
        "mezo-svrg needs the loss over all training examples every `interval` steps: set the optimizer's attribute "
        "full_closure to a function that returns it."
    )


_missing.batches = 0  # type: ignore[attr-defined]


@register
class MeZOSVRG(ZOOptimizer):
    """Two-point descent with a control variate at a snapshot.

    Forwards per step: 4; if step % interval is 0, two passes over all training examples. Extra memory: one copy of the
    weights. State: snapshot/<tensor>; svrg/seed and svrg/full, seed and coefficient of gbar; svrg/losses, one per step of
    the last three epochs; svrg/annealed, the factor of both rates.

    Attributes: full_closure, to be set before the first step: the loss over all training examples, as a function or a
    sequence of functions with equal weights. A function of several forwards gives their number as its attribute `batches`.

    Args:
        lr: learning rate of full steps; 1e-3, 1e-4, 1e-5 in the published sweep.
        mini_lr: learning rate of the steps between, of all parameter groups; 1e-5, 1e-6 in the published sweep. Schedulers
            act on both, and a group with lr 0 does not move. A search (metazo compare) chooses lr alone.
        interval: q, steps from one pass over all examples to the next; 2 as published.
        anneal: divisor of both rates when the loss rises; 5 in the published scripts.
        epoch_steps: steps per epoch, for annealing; 0 for none.
        snapshot: dtype of the snapshot: "theta" for that of theta (float32 for narrower weights), or "weights" for that of
            the weights, which for bfloat16 takes half the memory and adds rounding.
    """

    name, paper = "mezo-svrg", "arXiv 2404.08080"
    estimator = ControlVariate()
    wants_full_closure = True
    proportional = (
        False  # the coefficients are of the difference alone, which goes to 0, and gbar is in the step as well
    )
    shardable = True
    contract_case = Case(quadratic=0.015, llama=4e-3, options={"interval": 3})

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-5,
        eps: float = 1e-3,
        *,
        mini_lr: float = 1e-6,
        interval: int = 2,
        anneal: float = 5.0,
        epoch_steps: int = 0,
        snapshot: Literal["theta", "weights"] = "theta",
        **common,
    ):
        if not (math.isfinite(mini_lr) and mini_lr >= 0):
            raise UserError(f"`mini_lr` must be a finite number of at least 0, not {mini_lr}.")
        for key, value, least in (("interval", interval, 1), ("epoch_steps", epoch_steps, 0)):
            if not isinstance(value, int) or value < least:
                raise UserError(f"`{key}` must be a whole number of at least {least}, not {value}.")
        if not (math.isfinite(anneal) and anneal >= 1):
            raise UserError(f"`anneal` must be a finite number of at least 1, not {anneal}.")
        if snapshot not in ("theta", "weights"):
            raise UserError(f"`snapshot` {snapshot!r} is unknown: choose theta or weights.")
        if anneal != 5 and not epoch_steps:
            warnings.warn(f"`anneal` {anneal:g} changes nothing without `epoch_steps`.", stacklevel=2)
        self.mini_lr, self.interval, self.anneal, self.epoch_steps = mini_lr, interval, anneal, epoch_steps
        self.snapshot = snapshot
        self.full_closure: Closure | Sequence[Closure] | None = None
        super().__init__(params, lr, eps, **common)

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        if self.snapshot == "weights" and all(tensor.param.dtype == self.weights.dtype(tensor) for tensor in tensors):
            warnings.warn("`snapshot` weights changes nothing: theta has the dtype of the weights.", stacklevel=2)
        self.weights.snapshot = {tensor.name: self._room(tensor) for tensor in tensors}
        self._keep()
        return {f"snapshot/{name}": value for name, value in self.weights.snapshot.items()} | {
            "svrg/seed": torch.zeros((), dtype=torch.int64),
            "svrg/full": torch.full((), math.nan, dtype=torch.float64),
            "svrg/losses": torch.full((3 * self.epoch_steps,), math.nan, dtype=torch.float64),
            "svrg/annealed": torch.ones((), dtype=torch.float64),
        }

    def _room(self, tensor: NamedTensor) -> Tensor:
        """Memory for the snapshot of a tensor, in the chosen dtype."""
        param = tensor.param
        dtype = param.dtype if self.snapshot == "weights" else self.weights.dtype(tensor)
        return torch.empty(param.shape, dtype=dtype, device=param.device)

    def _keep(self) -> None:
        """Copy theta to the snapshot."""
        for tensor in self.tensors:
            for start, theta in self.weights.read(tensor):
                chunk_of(self.weights.snapshot[tensor.name], start, theta).copy_(theta)

    def is_full(self) -> bool:
        """Whether the next step is a full step, over all training examples."""
        self._prepare()
        return self.steps % self.interval == 0 or bool(self.zo_state["svrg/full"].isnan())

    def estimator_for(self, state: State, step: int) -> Estimator:
        return TwoPoint() if self.is_full() else self.estimator

    def closure_for(self, state: State, step: int, closure):
        """A full step evaluates `full_closure`; without one it raises UserError, unless it is a replay."""
        if not self.is_full():
            return closure
        return _missing if self.full_closure is None else self.full_closure

    def forwards_per_step(self, closures: int = 1) -> float:
        return self.forwards_in(self.interval, closures) / self.interval

    def forwards_in(self, steps: int, closures: int = 1) -> float:
        """The first step is a full one."""
        batches = sum(getattr(part, "batches", 1) for part in listed(self.full_closure))
        full = -(-steps // self.interval)
        return 2 * batches * full + 4 * closures * (steps - full)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        # before any schedule; torch's schedulers use initial_lr in other ways, and fill a tensor lr in place
        added.setdefault("own_lr", float(added["lr"]))

    def learning_rates(self, step: int) -> tuple[float, ...]:
        """A schedule changes the rate of mini steps by the same factor as a group's lr. A group that began at 0 has no such
        factor: its mini steps take `mini_lr` as soon as its lr is above 0.
        """
        rates, floor = super().learning_rates(step), FLOOR
        if not self.is_full():
            before = self.defaults["lr"]  # states of earlier versions have torch's name
            firsts = [float(group.get("own_lr", group.get("initial_lr", before))) for group in self.param_groups]
            rates = tuple(
                rate * (self.mini_lr / first) if first else self.mini_lr * (rate > 0)
                for rate, first in zip(rates, firsts)
            )
            floor = MINI_FLOOR
        annealed = float(self.zo_state["svrg/annealed"])
        return tuple(max(rate * annealed, min(rate, floor)) for rate in rates)

    def update(self, state: State, step: int, seeds: Sequence[int], losses: Sequence[float]) -> Update:
        estimator = self.estimator_for(state, step)
        (c,) = estimator.coefficients(losses, self.eps)
        check_reached([c])
        self._watch(state, step, estimator.loss(losses))
        if not self.is_full():
            gbar = Term(None, int(state["svrg/seed"]), float(state["svrg/full"]))
            return Update([c], [Term(None, seeds[0], c), gbar])
        self.weights.leave()
        self._keep()
        state["svrg/seed"].fill_(seeds[0])
        state["svrg/full"].fill_(c)
        return Update([c])

    def _watch(self, state: State, step: int, loss: float) -> None:
        """Store the loss; at the end of an epoch, anneal if it has risen."""
        recent, count = state["svrg/losses"], self.epoch_steps
        if not count:
            return
        recent.copy_(recent.roll(-1))
        recent[-1] = loss
        if (step + 1) % count == 0 and step + 1 > 4 * count and recent[-count:].mean() > RISE * recent[:count].mean():
            state["svrg/annealed"].div_(self.anneal)
