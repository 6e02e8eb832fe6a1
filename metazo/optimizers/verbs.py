"""The verbs and hooks of a method, with their defaults: plain two-point descent. base.py says when each is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from metazo.blocks import LocalShard, NamedTensor
from metazo.noise import Noise
from metazo.optimizers import probing as probings
from metazo.optimizers.groups import Closure
from metazo.optimizers.guards import gradient_refused
from metazo.optimizers.loss_watch import LossWatch
from metazo.optimizers.registry import Method
from metazo.step.directions import Direction, Isotropic
from metazo.step.estimators import Estimator, TwoPoint
from metazo.step.record import Update
from metazo.step.rules import SGD, Rule, State
from metazo.step.terms import Term

# MeZO's name rule: these are exempt from weight decay. RoBERTa's LayerNorm.weight and Llama's norm.weight are decayed
# under it, as they are in the published code.
DECAY_EXEMPT = ("bias", "layer_norm", "layernorm")


class Verbs(Method):
    """The methods that a method file overrides; the three verbs come first."""

    low_rank = False
    """Whether the method's directions have factors on matrices, so that probes can be evaluated together."""
    shardable = False
    """Whether a process may have a shard of a tensor: every entry of state and update depends on that entry alone, or on
    factors of a matrix, which every process makes whole. A subclass that computes with whole tensors sets it to False."""
    default_probing = "in-turn"
    proportional = True
    """Whether a step is a multiple of its coefficients, so that a rule may divide it by them."""
    deferrable = False
    """Whether `propose` and `update` neither read nor change the weights, so that an update may wait for the next probe."""
    tensors: Sequence[NamedTensor]
    estimator: Estimator = TwoPoint()
    default_rule: Rule = SGD()

    eps: float
    noise: Noise
    loss_watch: LossWatch
    probing: str
    param_groups: list[dict[str, Any]]
    zo_state: State
    _prepare: Callable[[], None]

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        return {}

    def propose(self, state: State, step: int, seeds: Sequence[int]) -> Direction:
        return Isotropic()

    def update(self, state: State, step: int, seeds: Sequence[int], losses: Sequence[float]) -> Update:
        return Update(self.estimator_for(state, step).coefficients(losses, self.eps))

    # -- hooks ------------------------------------------------------------------------------------------------------

    def estimator_for(self, state: State, step: int) -> Estimator:
        return self.estimator

    def closure_for(self, state: State, step: int, closure: Any) -> Any:
        return closure

    def draw_seeds(self, step: int, queries: int) -> list[int]:
        return [self.noise.seed(step, query) for query in range(queries)]

    def displacements(self, estimator: Estimator, direction: Direction, seeds: Sequence[int]) -> probings.Probes:
        """The displacement of each of the estimator's probes; empty for theta itself.

        direction: the proposed one, under the block scales if there are any. Other directions are put under them afterwards.
        """
        return [
            () if probe.query is None else (Term(direction, seeds[probe.query], probe.multiple * self.eps),)
            for probe in estimator.probes()
        ]

    def evaluation(self) -> AbstractContextManager:
        # fully_shard over one process cannot gather its weights under inference mode
        sharded = any(isinstance(tensor.param, LocalShard) for tensor in self.tensors)
        return torch.no_grad() if sharded else torch.inference_mode()

    def evaluate(self, closures: Sequence[Closure]) -> float:
        """The mean loss of the closures at the present weights, within `evaluation`; not for probes that are together."""
        with gradient_refused("The closure", ", `step(lambda: model(**batch).loss)`"):
            return sum(self.loss_watch.loss(evaluate()) for evaluate in closures) / len(closures)

    def decays(self, tensor: NamedTensor) -> bool:
        """Whether weight decay acts on a tensor: MeZO's name rule, unless a method or the tensor's group has its own."""
        own = self.param_groups[tensor.group].get("own_decay", False)
        return own or not any(part in tensor.name for part in DECAY_EXEMPT)

    def forwards_per_step(self, closures: int = 1) -> float:
        """Mean number of closure evaluations per step, if each probe evaluates `closures`.

        It is that of the probes of `estimator_for` over the first 100 steps, as the state is before them; override it if the
        probes depend on the state, or if `evaluate` calls a closure more than once.
        """
        if type(self).estimator_for is Verbs.estimator_for:
            return len(self.estimator.probes()) * closures
        self._prepare()
        return sum(len(self.estimator_for(self.zo_state, step).probes()) for step in range(100)) * closures / 100

    def learning_rates(self, step: int) -> tuple[float, ...]:
        """The learning rate of each parameter group at this step."""
        return tuple(float(group["lr"]) for group in self.param_groups)

    @classmethod
    def resolve(cls, options, model, closure) -> dict[str, Any]:
        """As Method.resolve; it settles `probing` by evaluating the closure once. A sharded model is not evaluated: its probes
        are in turn, unless `probing` together was asked for, which the optimizer then refuses.
        """
        options = super().resolve(options, model, closure)
        if cls.low_rank and (options.get("probing") or cls.default_probing) != "in-turn":
            optimizer = cls(model.named_parameters(), **options)
            if any(hasattr(param, "placements") for param in model.parameters()):
                options["probing"] = "together" if options.get("probing") == "together" else "in-turn"
            elif optimizer.probing != "in-turn":
                options["probing"] = probings.settle(optimizer, closure)
        return options
