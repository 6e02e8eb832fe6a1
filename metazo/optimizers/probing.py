"""How the probes of a step are evaluated: in turn, or together in one batched forward pass (metazo/step/batched.py).

"in-turn" moves the weights for each probe and needs no extra memory. "together" applies low-rank directions to the
activations, of which there is one copy per probe, and does not move the weights; it is faster on small batches. "auto"
chooses "together" if probes x batch x length of the first step is at most ROWS. All processes evaluate in turn if one of
them has to. Losses, update and record are the same except for rounding, and
for models that take another way if a parameter might be replaced (docs/how-it-works.md).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metazo.blocks import NamedTensor
from metazo.errors import UserError
from metazo.io import processes
from metazo.optimizers.groups import Closure
from metazo.optimizers.loss_watch import generators_kept
from metazo.step.batched import Branch, TooLarge
from metazo.step.batched import losses as losses_at
from metazo.step.buffers import buffers_kept
from metazo.step.estimators import mean
from metazo.step.substitute import used_unseen
from metazo.step.terms import Term

PROBINGS = ("in-turn", "together", "auto")
UNDECIDED, IN_TURN, TOGETHER = 0, 1, 2  # the choice of a run, stored as state
ROWS = 512  # probes x batch x length up to which "auto" evaluates together (docs/speed.md)

Probes = Sequence[tuple[Term, ...]]
"""The displacement of each probe: a sum of terms."""


def check(probing: str, low_rank: bool, name: str) -> str:
    """The probing of a method: "auto" is "in-turn" for dense directions. Raises UserError if the two do not go together."""
    if probing not in PROBINGS:
        raise UserError(f"`probing` {probing!r} is unknown: choose {', '.join(PROBINGS)}.")
    if probing == "together" and not low_rank:
        raise UserError(f"`probing` together needs low-rank directions, and {name} has dense noise: choose in-turn.")
    return probing if low_rank else "in-turn"


class Unseen:
    """Looks for trained tensors that closures use where no torch function shows it, while there are some that no evaluation
    of the optimizer was seen to use.

    It looks at the first evaluation, at that of a step in which the closures use other tensors than before (up to WAYS such
    sets), and at every EVERY-th step, each time by an evaluation that is not counted. Copies of an optimizer have other
    tensors of the same names.
    """

    WAYS = 20
    EVERY = 101  # odd, so that closures that take turns all have theirs

    def __init__(self) -> None:
        self.left: set[str] | None = None  # no evaluation was seen to use these; None before the first
        self.ways: set[frozenset[str]] = set()
        self.step = -1

    def hidden(
        self, optimizer: Any, unmet: Sequence[NamedTensor], again: Callable[[], float], loss: float
    ) -> list[NamedTensor]:
        """The tensors of `unmet`, those that an evaluation was not seen to use, that it uses nevertheless; or none of them.

        again: evaluates the same loss at the same weights.
        """
        if self.left == set():
            return []
        way = frozenset(tensor.name for tensor in unmet)
        self.left = set(way) if self.left is None else self.left & way
        new = way not in self.ways and len(self.ways) < self.WAYS
        if self.step == optimizer.steps or (not new and optimizer.steps % self.EVERY):
            return []
        looked_at = [tensor for tensor in unmet if tensor.name in self.left]
        with generators_kept(optimizer.tensors[0].param.device), warnings.catch_warnings(), buffers_kept():
            warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks")
            if used_unseen(looked_at, again, loss):
                return looked_at  # and look again: probes in turn take this step again
        self.step = optimizer.steps
        self.ways |= {way} if new else set()
        return []


def evaluated(optimizer: Any, closures: Sequence[Closure]) -> float:
    """The mean loss at the probe that is applied, under the checks of the first evaluations."""
    if not closures:
        raise UserError("step() needs a closure that returns the loss: step(lambda: model(**batch).loss).")
    watch = optimizer.loss_watch
    weights, tensors, step = optimizer.weights, optimizer.tensors, optimizer.steps
    weights.settle()  # which changes them
    with watch.weights_seen(tensors, step), optimizer.evaluation(), weights.evaluating() as scratch:
        loss = optimizer.evaluate(closures)
    watch.note_changed(scratch.changed if scratch is not None else [])
    hidden: list[NamedTensor] = []
    if scratch is not None and math.isfinite(loss):
        hidden = optimizer.unseen.hidden(optimizer, scratch.unmet(), lambda: _again(optimizer, closures), loss)
    if hidden:
        names = ", ".join(tensor.name for tensor in hidden[:3])
        raise UserError(
            f"`precision` {optimizer.precision} replaces weights in calls of torch functions, and the model uses "
            f"{len(hidden)} tensors outside of such calls (in compiled, scripted or foreign code, or offloaded), such as "
            f"{names}: choose master."
        )
    watch.evaluated(loss, lambda: _again(optimizer, closures), optimizer.tensors[0].param.device)
    return loss


def _again(optimizer: Any, closures: Sequence[Closure]) -> float:
    """The loss once more, for a check. A closure that notes what it computes may have an `again`, which notes nothing."""
    with optimizer.evaluation(), optimizer.weights.evaluating():
        return optimizer.evaluate([getattr(closure, "again", closure) for closure in closures])


def losses_together(
    optimizer: Any, probes: Probes, closures: Sequence[Closure], in_turn: Callable[[], list[float]], given
) -> list[float]:
    """The losses of all probes from one forward pass, or from `in_turn`; the first call settles which of them a run uses.

    given: the losses of a replayed step, or None. Raises UserError for a loss that is no number, and if a closure after the
    first cannot be vectorised.
    """
    form: Tensor = optimizer.zo_state["probing"]
    if form == IN_TURN or (given is not None and form == UNDECIDED and optimizer.probing == "auto"):
        return in_turn()
    if given is None and not closures:
        return in_turn()  # it says what is missing
    losses: list[float] = list(given or ())
    error = None
    if given is None:
        try:
            losses = _own_losses(optimizer, probes, closures)
        except Exception as raised:
            error = raised
        choice = None if form != UNDECIDED else _agreed(error)
        if error is not None and (choice is None or isinstance(error, UserError)):
            _check_alone(optimizer, closures, error)
            raise error
        if choice == IN_TURN:
            form.fill_(IN_TURN)
            _say(optimizer, error, 7)
            return in_turn()
    form.fill_(TOGETHER)
    optimizer.forwards += len(losses) * sum(getattr(evaluate, "batches", 1) for evaluate in closures)
    return losses


def _agreed(error: Exception | None) -> int:
    """The choice of all processes: in turn if one of them has failed. One that cannot go on says so too, before it ends."""
    return IN_TURN if any(processes.total([float(error is not None)])) else TOGETHER


def _check_alone(optimizer: Any, closures: Sequence[Closure], error: Exception) -> None:
    """Raises UserError if closures that failed together can be evaluated alone, and otherwise the error that this gives.

    Other errors than torch's are the closure's own, and a lack of memory has its own advice.
    """
    if isinstance(error, RuntimeError) and "memory" not in str(error):
        _again(optimizer, closures)
        raise UserError(
            f"{optimizer.name} evaluates its probes together since the first step, and this closure cannot be vectorised "
            f'({_reason(error)}): make the optimizer with `probing="in-turn"`.'
        ) from error


def _reason(error: Exception) -> str:
    return str(error).split("\n")[0].split(". ")[0].rstrip(" .")  # vmap goes on with advice for its own callers


def _say(optimizer: Any, error: Exception | None, level: int) -> None:
    """Warn about the reason for evaluating in turn, unless it is another process's, or a batch that is too large for "auto"."""
    if error is not None and not isinstance(error, TooLarge):
        warnings.warn(
            f"{optimizer.name} falls back to evaluating its probes in turn: the closure cannot be vectorised "
            f"({_reason(error)}).",
            stacklevel=level,
        )


def _own_losses(optimizer: Any, probes: Probes, closures: Sequence[Closure]) -> list[float]:
    """The losses of the probes that this process owns, from one forward pass, and 0 for all others."""
    own = [index for index in range(len(probes)) if optimizer.exchange.owns(index)]
    found = dict(zip(own, _one_pass(optimizer, [probes[index] for index in own], closures)))
    return [found.get(index, 0.0) for index in range(len(probes))]


def _one_pass(optimizer: Any, probes: Probes, closures: Sequence[Closure]) -> list[float]:
    """The mean losses at all probes. Raises if the closures cannot be vectorised, or hide tensors that they use, and UserError
    for a loss that is no number.
    """
    undecided = optimizer.zo_state["probing"] == UNDECIDED
    limit = ROWS // len(optimizer.estimator.probes()) if optimizer.probing == "auto" and undecided else None
    branches = [Branch([(optimizer.noise.stream(t.seed), t.along, t.amount) for t in terms]) for terms in probes]

    def evaluate() -> tuple[list[float], list[NamedTensor]]:
        with optimizer.evaluation(), optimizer.weights.evaluating():
            found = [losses_at(closure, optimizer.tensors, branches, limit) for closure in closures]
        numbers = [[optimizer.loss_watch.loss(value) for value in values] for values, _ in found]
        seen_by_none = set.intersection(*({tensor.name for tensor in unmet} for _, unmet in found))
        return [mean(values) for values in zip(*numbers)], [t for t in optimizer.tensors if t.name in seen_by_none]

    losses, unmet = evaluate()
    if hidden := optimizer.unseen.hidden(optimizer, unmet, lambda: evaluate()[0][0], losses[0]):
        raise RuntimeError(f"{hidden[0].name} is used where torch functions do not show it")
    return losses


@torch.no_grad()
def first_pass(optimizer: Any, closure: Closure) -> None:
    """Evaluate the probes of a first step together, and move no weights. Raises as `_one_pass`."""
    optimizer._prepare()
    seeds = [optimizer.noise.seed(0, query) for query in range(optimizer.estimator.queries)]
    direction = optimizer.propose(optimizer.zo_state, 0, seeds)
    _one_pass(optimizer, optimizer.displacements(optimizer.estimator, direction, seeds), [closure])


def settle(optimizer: Any, closure: Closure) -> str:
    """The probing that all processes settle on for this closure, found by evaluating it once; no weights are moved."""
    error = None
    try:
        first_pass(optimizer, closure)
    except Exception as raised:
        error = raised
    _say(optimizer, error, 4)
    return "in-turn" if _agreed(error) == IN_TURN else "together"
