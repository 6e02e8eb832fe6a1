"""The one contract: a zeroth-order method as a torch optimizer over named parameters.

    optimizer = metazo.optimizers.MeZO(model.named_parameters(), lr=1e-6, eps=1e-3)
    loss = optimizer.step(lambda: model(**batch).loss)          # runs forward only

The base owns seeds, probing, the update in place, block scales, the reduction of losses over processes and the step record;
saving.py is how its state is stored. A method file holds the paper's mathematics in three verbs:

    init(tensors) -> State                       all state as tensors by name, which keep their shapes and dtypes
    propose(state, step, seeds) -> Direction     the direction to probe; drawing it later writes no state
    update(state, step, seeds, losses) -> Update coefficients, and the terms of the update if they are not c_k d_k

and, if it needs them, in these hooks (verbs.py has all of them with their defaults, which give plain two-point descent):

    estimator_for(state, step)                   the probes of this step (default: the attribute `estimator`)
    closure_for(state, step, closure)            the loss of this step (default: the given closure)
    displacements(estimator, direction, seeds)   each probe as a sum of terms (default: multiple * eps * d(seed));
                                                 directions of one's own are put under the block scales
    evaluation(), evaluate(closures)             the context around evaluations (default: inference mode), and the mean loss:
                                                 override them for gradients, or for hooks during one evaluation at theta;
                                                 `evaluate` is not called for probes that are evaluated together
    learning_rates(step), decays(tensor)         rates of the parameter groups, and what weight decay acts on
    resolve(options, model, closure)             hyperparameters that depend on model and data, set before the first step

A method that needs the modules as well as their weights sets `needs_model` and takes `model`. A method whose update does not
follow from the losses (a gradient, feedback from forward hooks) derives from `Recomputed` (recomputed.py), whose verbs are
`look` and `descend`: it is not `replayable`, and a resumed run computes its steps again.
"""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch

from metazo.blocks import check_names, trained
from metazo.errors import UserError
from metazo.io import processes
from metazo.noise import Noise, PhiloxNoise
from metazo.optimizers import probing as probings
from metazo.optimizers import ranks
from metazo.optimizers.groups import (
    Closure,
    check_group,
    check_members,
    check_rates,
    listed,
    named_groups,
    named_members,
)
from metazo.optimizers.guards import (
    check_coefficients,
    check_graph,
    check_moved,
    check_numbers,
    check_reach,
    check_record,
    check_shards,
    check_trained,
    check_weights,
)
from metazo.optimizers.loss_watch import LossWatch
from metazo.optimizers.returned import (
    check_form,
    check_reached,
    check_whole,
    checked_update,
    joined,
    put_back,
    versions,
)
from metazo.optimizers.saving import Saving
from metazo.optimizers.verbs import DECAY_EXEMPT, State, Verbs
from metazo.step.autocast import own_arithmetic
from metazo.step.estimators import Estimator, balanced
from metazo.step.precision import check_used, drift
from metazo.step.record import Step, Update
from metazo.step.rules import Rule, check_rule, named_rule
from metazo.step.scales import BlockScale, RMSScale
from metazo.step.terms import Along, Term
from metazo.step.weights import Weights

__all__ = ["DECAY_EXEMPT", "State", "Step", "Update", "ZOOptimizer"]


class ZOOptimizer(Verbs, Saving):
    """Base of every method.

    Args:
        params: `model.named_parameters()`, or parameter groups as dicts with "params" (named) and their own "lr" and
            "weight_decay". Unnamed tensors are named by position. Tied weights count once. Those that are frozen at the
            first step are left out; freezing one later raises UserError, and unfreezing one has no effect.
        lr: learning rate. With D trainable weights the estimate is about sqrt(D) times as long as the gradient, so a good
            learning rate is two to four orders of magnitude below that of first-order training.
        eps: length of the probe in units of the direction.
        weight_decay: theta <- (1 - lr weight_decay) theta - ..., for names without bias, layer_norm, layernorm. The
            weight_decay that a parameter group is made with acts on all of its tensors.
        seed: of the run; every step's noise follows from it.
        noise: "gaussian", "rademacher", or a noise source, which has a seed of its own.
        scale: block scales: None, "rms", or a BlockScale (a tuner's).
        rule: how the estimate changes the weights: a Rule of metazo.step.rules or its name ("adam"); None takes the method's
            own.
        precision: how theta is stored while it is probed; see metazo.step.precision.
        probing: "in-turn", or for low-rank directions "together" or "auto"; None takes the method's own. See
            metazo.optimizers.probing.
        check_every: steps between comparisons of seed, settings and weights over the processes of torch.distributed, the
            first step included; 0 for none. Each costs one pass over the weights. It must be the same on all processes.
        probe_ranks: number of the processes of torch.distributed that divide the probes of a step; each closure is then the
            loss of share `rank // probe_ranks` of the examples. 1: every process evaluates every probe. See
            metazo.optimizers.ranks.
        check_loss: whether the first step evaluates its first probe twice, to warn about a loss that differs at the same
            weights. The extra evaluation changes neither the counters nor the global generators.

    Attributes: last_step, the Step record of the step just taken; forwards, closure evaluations so far; recorder,
    called with each Step before the weights change (they are at a probe then); exchange, what the processes exchange
    in a step (metazo.optimizers.ranks.Exchange); max_loss, above which a loss counts as not finite; defer (False):
    whether the update of a step may wait until the next step applies it together with its first probe. This saves a pass
    over the weights and changes no bit, but you must call `settle` before you read the weights between steps, before you
    change them (the update that waits would be added to weights that were loaded, or lost if they have masters), and before
    you copy or pickle the optimizer, which raises UserError otherwise.

    Raises UserError for hyperparameters out of range. Weights of bfloat16 and float16 have float32 masters, or bits below them:
    change them between steps under torch.no_grad() (or by load_state_dict), because what is written to `param.data` is not
    noticed, and is undone by the next step if there are masters.
    A graph that you made before a step cannot be differentiated after it, as with torch's own optimizers.
    Do not use it with dropout or with a loss that is random in another
    way: the evaluations of a step must differ by the probe alone. Unlike torch's optimizers, which get no gradient of it, a
    zeroth-order step also moves the row of an nn.Embedding with padding_idx: mask padding in your model.
    """

    name = "base"
    common = frozenset(
        ["eps", "seed", "noise", "scale", "rule", "precision", "probing", "check_loss", "check_every", "probe_ranks"]
    )

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        seed: int = 0,
        noise: str | Noise = "gaussian",
        scale: str | BlockScale | None = None,
        rule: str | Rule | None = None,
        precision: str = "auto",
        probing: str | None = None,
        check_loss: bool = True,
        check_every: int = 100,
        probe_ranks: int = 1,
    ):
        check_numbers(lr=lr, eps=eps, weight_decay=weight_decay)
        if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed < 2**64:
            raise UserError(f"`seed` must be a whole number of 0 to 2^64 - 1, not {seed!r}.")
        if eps == 0:
            raise UserError("`eps` must be above 0; at 0 the losses of the two probes would not differ.")
        if scale is not None and not isinstance(scale, BlockScale) and scale != "rms":
            raise UserError(f"`scale` {scale!r} is unknown: choose rms, or pass a tuner.")
        self.eps, self.precision = eps, precision
        self.probing = probings.check(probing or self.default_probing, self.low_rank, self.name)
        if not isinstance(noise, str) and seed not in (0, getattr(noise, "run_seed", 0)):
            raise UserError(f"`seed` {seed} would change nothing beside a noise source: give it the seed instead.")
        self.noise: Noise = PhiloxNoise(int(seed), noise) if isinstance(noise, str) else noise
        if not hasattr(self.noise, "stream"):
            raise UserError(f"`noise` {noise!r} is unknown: choose gaussian or rademacher, or pass a noise source.")
        self.scale = RMSScale() if scale == "rms" else copy.copy(scale)  # it is bound to the tensors of one optimizer
        if rule is not None and self.own_rule:
            raise UserError(f"`rule` cannot be set for {self.name}, which {self.own_rule}.")
        self.rule = named_rule(rule) if isinstance(rule, str) else self.default_rule if rule is None else rule
        check_rule(self.rule)
        if self.rule.divides and (balanced(self.estimator) or not self.proportional):
            why = "which is 0" if self.proportional else "and they do not set the length of a step"
            raise UserError(
                f"`rule` meazo divides a step by the sum of its coefficients, {why} for {self.name}: choose another."
            )
        self.steps = self.forwards = 0
        self.last_step: Step | None = None
        self.recorder: Callable[[Step], None] | None = None
        self.max_loss = sys.float_info.max
        self._ready = False
        self.unseen = probings.Unseen()
        self._unrecorded: tuple[Step, list[Term] | None, Estimator] | None = None
        self.checks_weights = True  # at the first step
        if not isinstance(check_every, int) or isinstance(check_every, bool) or check_every < 0:
            raise UserError(f"`check_every` must be a whole number of at least 0, not {check_every}.")
        self.check_every, self._compared = check_every, False
        self.exchange = ranks.Exchange(probe_ranks)
        self.loss_watch = LossWatch(check_loss and self.replayable)
        self.zo_state: State = {}
        self._of_scale: tuple[str, ...] = ()
        super().__init__(named_groups(params), {"lr": lr, "weight_decay": weight_decay})

    def rounding(self) -> str | None:
        """What rounding does to the weights, if they are narrow and `precision` is in-place, in words."""
        return drift(self.precision, self.trained())

    @property
    def notes(self) -> list[str]:
        return [words] if (words := self.rounding()) else []

    # -- the step -------------------------------------------------------------------------------------------------

    @own_arithmetic()
    def step(  # type: ignore[override]
        self, closure: Closure | Sequence[Closure] | None = None, *, replay: Step | None = None
    ) -> float:
        """Take one step.

        Args:
            closure: evaluates the loss at the present weights; called once per probe, under inference mode. A sequence of
                closures is averaged under one seed, which replaces gradient accumulation. `torch.autocast` around `step`
                acts on closures alone.
            replay: a recorded step, taken again from its recorded losses; a closure given as well is counted in
                `forwards` and not called. Of several processes all must replay it if there are block scales.

        Returns: the loss at theta if the method evaluates it, else the mean over its probes. If a loss is not finite, the
        weights are put back, the step is recorded without coefficients, and the loss returned is not finite either; of a step
        that `max_loss` refuses it is the loss. After an exception in the recorder the next call records and takes the same step
        again, without evaluating it, and the state cannot be saved before. An exception in the closure, in `update` or in the
        rule's `begin` puts the weights back too, and the step may be taken again, unless `update` or `begin` had changed the
        state: a saved one must then be loaded. Masters and compensated weights are put back bit for bit; weights in place
        keep the rounding of adding and removing the probe, in float32 up to 6e-8 (2^-24) of the larger of weight and probe.
        Raises UserError for a replay of a method whose steps do not follow from their records, for a closure that returns no
        number, for losses so large that their squares overflow, for weights without numbers on this device, for shards
        that were moved, and if processes differ in seed, settings or weights.
        """
        if replay is not None and not self.replayable:
            raise UserError(f"A step of {self.name} does not follow from its record: it cannot be replayed.")
        self._prepare(stepping=True)
        check_whole(self)
        if self._unrecorded is not None:
            if replay is not None:
                raise UserError(
                    "The last step is not recorded yet, because the recorder failed: call step() without `replay`."
                )
            return self._finish(self._unrecorded)
        self.weights.follow()
        check_rates(self.param_groups, self.eps)
        state, step = self.zo_state, self.steps
        if replay is None and step == 0:
            check_used(self.precision, [tensor.param for tensor in self.tensors])
            if words := self.rounding():
                warnings.warn(words, stacklevel=4)  # the caller of `step`
        if step < 2 or step % 100 == 0:  # torch may move shards in the first forward pass
            check_moved(self.tensors)
        if replay is None and processes.together():
            if not self._compared:
                ranks.check_exchange(self)
            if self.check_every and (not self._compared or step % self.check_every == 0):
                ranks.check_ranks(self)
            self._compared = True
        estimator, closures = self.estimator_for(state, step), listed(self.closure_for(state, step, closure))
        probes = len(estimator.probes())
        self.exchange.check(probes)
        if replay is not None:
            check_record(self, replay, estimator.queries, probes)
        drawn = self.draw_seeds(step, estimator.queries)  # of a recorded step too, after which some noises go on
        seeds = list(replay.seeds) if replay else drawn
        with put_back(state, self._of_scale):
            direction = self.propose(state, step, seeds)
            along = Along(direction, self.scale and self.scale.scales(state, step, self.weights.whole))
            for seed in seeds:
                self.noise.expect(seed, (draw for tensor in self.tensors for draw in along.probed.draws(tensor)))
            losses = self._probe(estimator, along, seeds, closures, replay)
            before = versions(state)
            try:
                if replay is None:
                    self.loss_watch.stepped(losses, closures, self.tensors)
                learning_rates = replay.lr if replay else self.learning_rates(step)
                finite = all(math.isfinite(loss) and abs(loss) <= self.max_loss for loss in losses)
                update = Update(())
                if finite:
                    update = checked_update(
                        self.name, losses, estimator.queries, self.update(state, step, seeds, losses)
                    )
                if replay is not None:
                    check_coefficients(replay, update.coefficients)
                sigma = tuple(state["scale/sigma"].tolist()) if self.scale is not None else ()
                self.last_step = Step(
                    step, tuple(seeds), tuple(losses), tuple(update.coefficients), learning_rates, sigma
                )
                terms = along.estimate(seeds, update.coefficients, update.terms) if finite else None
                if terms is not None:
                    terms = self._ordered(self._begun(terms, self.last_step.coefficients))
                if step == 0:
                    check_form(state, self._form)
            except BaseException as error:  # a warning that is an error, a rate that is no number
                self._torn = versions(state) != before  # before a snapshot is exchanged again
                self.weights.leave()
                if not isinstance(error, OverflowError):
                    raise
                raise UserError(
                    f"The losses of step {step} are {min(losses):.3g} to {max(losses):.3g}, too far apart for the squares that "
                    f"{self.name} takes of them: divide the loss, or set the optimizer's `max_loss`, above which a step is "
                    "skipped."
                ) from error
        return self._finish((self.last_step, terms, estimator), replay)

    def _finish(self, taken: tuple[Step, list[Term] | None, Estimator], replay: Step | None = None) -> float:
        """Record a step, and move the weights along its terms, if its losses are finite. Its state is new already, so if the
        recorder fails, the next call of `step` goes on from here.
        """
        (record, terms, estimator), self._unrecorded = taken, taken
        self._record(record, replay)
        self._unrecorded = None
        if terms is None:
            self.weights.leave()
        else:
            self._apply(terms, record.lr)
            self.weights.changed()
            if self.scale is not None:
                self.scale.observe(self.zo_state, *estimator.plus_minus(record.losses))
        self.steps += 1
        return estimator.loss(record.losses) if all(map(math.isfinite, record.losses)) else sum(record.losses)

    def _probe(
        self,
        estimator: Estimator,
        along: Along,
        seeds: Sequence[int],
        closures: Sequence[Closure],
        replay: Step | None,
    ) -> list[float]:
        """The losses of the step's probes, which are evaluated unless the step is a replay.

        Weights in place keep the rounding of every move, so every process makes all of them, whether it owns the probe or
        not; of other weights all processes make the last, because an update depends on the probe that it removes.
        """
        probes = [tuple(map(along.scaled, terms)) for terms in self.displacements(estimator, along.probed, seeds)]
        given = replay.losses if replay else None

        def in_turn() -> list[float]:
            losses: list[float] = []
            for index, (terms, probe) in enumerate(zip(probes, estimator.probes())):
                own = self.exchange.owns(index)
                if own or given is not None or self.weights.in_place or index == len(probes) - 1:
                    self.weights.visit(terms, probe.snapshot)
                losses.append(given[index] if given is not None else probings.evaluated(self, closures) if own else 0.0)
                self.forwards += sum(getattr(evaluate, "batches", 1) for evaluate in closures)
            return losses

        try:
            together = "probing" in self.zo_state
            losses = probings.losses_together(self, probes, closures, in_turn, given) if together else in_turn()
            return self.exchange.combined(losses) if given is None else losses
        except BaseException:
            self.weights.leave()
            raise

    def _record(self, record: Step, replay: Step | None) -> None:
        """Write the record before the weights change; if writing fails (a full disk), the weights do not change."""
        if self.recorder is None or replay is not None:
            return
        try:
            self.recorder(record)
        except BaseException:
            self.weights.leave()
            raise

    def _begun(self, terms: list[Term], coefficients: Sequence[float]) -> list[Term]:
        """The terms times the factor of the rule; before the record, so that no step is recorded whose rule fails."""
        factor = self.rule.begin(self.zo_state, coefficients)
        return [Term(term.direction, term.seed, factor * term.amount) for term in terms] if factor != 1.0 else terms

    def _ordered(self, terms: list[Term]) -> list[Term]:
        """The terms in the order in which they are applied now, which is kept if the recorder fails and the probe is removed.
        Raises OverflowError for an estimate beyond float32.
        """
        check_reached(term.amount for term in terms)
        return self.weights.ordered(terms) if self.rule.fused else terms

    def _apply(self, terms: list[Term], learning_rates: Sequence[float]) -> None:
        decays = {
            tensor.name: learning_rates[tensor.group] * float(self.param_groups[tensor.group]["weight_decay"])
            for tensor in self.tensors
            if self.decays(tensor)
        }
        self.weights.defer = self.defer and self.deferrable
        if self.rule.fused:
            factors = {name: 1 - decay for name, decay in decays.items() if decay}
            self.weights.apply(terms, lambda tensor: learning_rates[tensor.group], factors)
            return
        self.weights.leave()
        gradient, rounding = self.weights.gradient(terms), terms[0].seed if terms else 0
        for tensor in self.tensors:
            lr, decay = learning_rates[tensor.group], decays.get(tensor.name, 0.0)
            for start, theta in self.weights.edit(tensor, rounding):
                add = partial(gradient.add_, tensor, start)
                self.rule.apply(tensor, start, theta, add, lr, decay, self.zo_state)

    @own_arithmetic()
    def settle(self) -> None:
        """Apply the update that waits for the next step, if there is one (see `defer`)."""
        if self._ready:
            self.weights.settle()

    # -- preparation ----------------------------------------------------------------------------------------------

    def _prepare(self, stepping: bool = False) -> None:
        """At the first step: by then the model is on its device and in its dtype.

        stepping: whether to refuse tensors without numbers (`checks_weights`); the size of the state is known without them.
        """
        if not self._ready or (stepping and self.steps == 0 and self._unrecorded is None):
            found = [
                tensor
                for index, group in enumerate(self.param_groups)
                for tensor in trained(zip(group["param_names"], group["params"]), index)
            ]
            # a state that was saved or loaded before the first step (accelerate does both) is of what was trained then
            self._ready = self._ready and [tensor.name for tensor in found] == [each.name for each in self.tensors]
            if not self._ready:
                self.tensors = found
                check_names(self.tensors)
        if stepping and self.checks_weights:
            check_weights(self.tensors)
            self.checks_weights = False
        if self._ready:
            if stepping:
                check_trained(self.tensors)
                check_members(self.param_groups, self._members, self.common)
            return
        # later steps change what is made here, and the caller's torch.set_default_device is no place for it
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            self.weights = Weights(self.tensors, self.noise, self.precision)
            check_shards(self)
            if self.needs_gradient:
                check_graph(self.name, ((tensor.name, tensor.param) for tensor in self.tensors))
            if self.scale is not None:
                self.scale.bind(self.tensors)
            parts = {self.name: self.init(self.tensors), "the rule": self.rule.init(self.tensors)}
            if self.scale is not None:
                parts["the scale"] = self.scale.init()
            self.zo_state, self._of_scale = joined(parts), tuple(parts.get("the scale", ()))
            if self.probing != "in-turn":
                self.zo_state["probing"] = torch.tensor(probings.UNDECIDED)
            self._form = {name: value.to("meta") for name, value in self.zo_state.items()}
        self._members = [list(group["params"]) for group in self.param_groups]
        self._ready = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if getattr(self, "_ready", False):
            raise UserError("Parameter groups must be added before the first step.")
        check_group(param_group)
        before = sum(len(group["params"]) for group in self.param_groups)
        param_group["params"] = named_members(param_group["params"], before)
        check_numbers(**{name: param_group[name] for name in ("lr", "weight_decay") if name in param_group})
        check_reach(self.eps, param_group["params"])
        param_group.setdefault("own_decay", "weight_decay" in param_group)  # in the group, with which it is saved
        super().add_param_group(param_group)
