"""Base of the methods whose step is computed from a batch, not from losses: it cannot be replayed, but computed again.

    theta_b <- (1 - lr wd) theta_b - lr max(|theta_b|, floor sqrt(n_b)) g_b / |g_b|        normalise=True, n_b entries
    theta_b <- (1 - lr wd) theta_b - lr g_b                                                normalise=False

per tensor b. The normalised step is LARS (You, Gitman and Ginsburg 2017, arXiv 1708.03888) with decoupled weight decay.
Differences from LARS: the norm of a tensor has a floor (as in Adafactor, Shazeer and Stern 2018, section 8), so that
tensors that start at zero (biases, LoRA's B) learn.

A method evaluates its closures (`look`), and then updates tensors (`descend`), each as soon as its estimate is there.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from metazo.blocks import NamedTensor
from metazo.errors import UserError
from metazo.io import processes
from metazo.optimizers.base import State, ZOOptimizer
from metazo.optimizers.groups import Closure, check_rates, listed
from metazo.step.autocast import own_arithmetic
from metazo.step.precision import check_used, without_master
from metazo.step.record import Step

REPLAY = "A step of {} cannot be replayed from its record: it is recomputed, which needs the model and the batches."
NO_CLOSURE = "{}.step() needs a closure that returns the loss as a tensor: step(lambda: model(**batch).loss)."
FLOOR = 1e-3  # lower bound on the root mean square of a tensor in a normalised step
SOLVED = 1e24  # size of theta over that of an estimate, from which on the estimate is left out of a normalised step


class Recomputed(ZOOptimizer):
    """Attribute vanished: the number of tensor updates left out because their estimate was not finite."""

    replayable = False
    needs_gradient = True
    common = frozenset({"seed", "precision"})

    @abstractmethod
    def look(self, closures: Sequence[Closure]) -> tuple[float, Any]:
        """Evaluate the closures. Returns: the mean loss, and what `descend` needs, or None if it cannot be used."""

    @abstractmethod
    def descend(self, found: Any, rates: Sequence[float]) -> None:
        """Update the weights. rates: the learning rate of each parameter group."""

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        return {"vanished": torch.zeros((), dtype=torch.int64)}

    def forwards_per_step(self, closures: int = 1) -> float:
        """`look` evaluates each closure once; override it if a step costs more."""
        return closures

    def rounding(self) -> str | None:  # there are no probes that would let weights drift
        return without_master(self.name, self.trained()) if self.precision == "in-place" else None

    @property
    def vanished(self) -> int:
        return int(self.zo_state["vanished"]) if self.steps else 0

    @property
    def notes(self) -> list[str]:
        left_out = f"{self.vanished} updates of single tensors were left out: their estimate was not finite."
        return [*super().notes, left_out] if self.vanished else super().notes

    @own_arithmetic()
    def step(  # type: ignore[override]
        self, closure: Closure | Sequence[Closure] | None = None, *, replay: Step | None = None
    ) -> float:
        """Take one step; see ZOOptimizer.step. A recorded step is recomputed from its closure, under its learning rates.

        Raises UserError for a replay without a closure, or if the loss is not the recorded one; and in several processes.
        """
        self._prepare(stepping=True)
        closures = listed(closure)
        if not closures:
            raise UserError((REPLAY if replay else NO_CLOSURE).format(self.name))
        if processes.together():
            raise UserError(
                f"{self.name} runs in one process, because processes exchange losses alone: start it without torchrun."
            )
        self.weights.follow()
        if self.steps == 0 and replay is None:
            check_used(self.precision, [tensor.param for tensor in self.tensors])
            if words := self.rounding():
                warnings.warn(words, stacklevel=4)  # the caller of `step`
        check_rates(self.param_groups)
        with self.weights.evaluating():
            loss, found = self.look(closures)
        cost = self.forwards_per_step(len(closures))
        self.forwards += round((self.steps + 1) * cost) - round(self.steps * cost)  # whole numbers that add up
        if replay and replay.losses != (loss,):
            raise UserError(f"Step {self.steps} was recorded with loss {replay.losses[0]} and gives {loss} now.")
        fits = math.isfinite(loss) and abs(loss) <= self.max_loss
        usable = found is not None and fits
        rates = replay.lr if replay else self.learning_rates(self.steps)
        self.last_step = Step(self.steps, (), (loss,), (1.0,) if usable else (), rates)
        self._record(self.last_step, replay)
        if usable:
            self.descend(found, rates)
            self.weights.changed()
        self.steps += 1
        self.counted()
        return loss if usable or not fits else math.nan

    def counted(self) -> None:
        """Called when a step is taken and counted: a warning there may be an error."""

    def factor(self, tensor: NamedTensor, square: float, normalise: bool) -> float:
        """The factor of an estimate g in the update of its tensor, before the learning rate; 0 if it is left out.

        square: |g|^2, which is counted as vanished if it is not finite. A normalised step keeps the tensor where g is so short
        that numbers of float32 do not hold its direction: the examples are solved.
        """
        if not math.isfinite(square):
            self.zo_state["vanished"] += 1
            return 0.0
        if not normalise:
            return 1.0
        if not square:
            return 0.0
        size = sum(float(torch.linalg.vector_norm(theta)) ** 2 for _, theta in self.weights.read(tensor))
        factor = math.sqrt(max(size, FLOOR**2 * tensor.param.numel()) / square)
        return factor if factor < SOLVED else 0.0

    def decay_factors(self, tensors: Sequence[NamedTensor], rates: Sequence[float]) -> dict[str, float]:
        """1 - lr wd by name, of the tensors that weight decay acts on."""
        return {
            tensor.name: 1 - rates[tensor.group] * float(self.param_groups[tensor.group]["weight_decay"])
            for tensor in tensors
            if self.decays(tensor)
        }
