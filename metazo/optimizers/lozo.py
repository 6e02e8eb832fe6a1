"""LOZO and LOZO-M (Chen et al., "Enhancing zeroth-order fine-tuning for language models with low-rank structures", arXiv
2410.07698).

The gradient of a matrix W (m x n) is close to low rank, so the probe is low rank as well: U new at each step, V kept
for `interval` steps, in which the iterates move in one subspace.

    U ~ N(0, I), m x r;   V ~ N(0, I), n x r, drawn again where step % interval == 0
    c = (L(W + eps U V^T) - L(W - eps U V^T)) / (2 eps)
    W <- W - lr (c U V^T + weight_decay W)                    tensors of one dimension: c z, as MeZO

With n queries, each with a U of its own beside the one V, c U V^T is averaged over them.

LOZO-M adds momentum kept as a factor, N in R^(m x r), and projected onto the new V where V changes:

    N <- beta N + (1 - beta) c U            (N = c U at the first step)
    N <- N (V_old^T V) / n  ahead of that, where V is drawn again: the least-squares fit of N' V^T to N V_old^T, with
                            V^T V replaced by its mean n I
    W <- W - lr (N V^T + weight_decay W)                      tensors of one dimension: m <- beta m + (1 - beta) c z

Scale: E[c U V^T] = r grad (to O(eps^2)), and |U V^T|^2 is r times |z|^2 in the mean. The paper divides the estimate by
r; its code and this file leave that to the learning rate: for matrices lr here is as r lr in MeZO (E[c z] = grad holds
for the rest), so divide it by r when r grows.

Differences from the published code (optsuite/LOZO); `compat="official"` brings back the numbered ones:
 1. Where V is drawn again, the update starts the step's stream over without drawing V, so it goes along U and z that
    were never probed: every `interval`-th step, the first included, is noise; with interval=1 nothing is learned.
 2. LOZO-M with interval=1 never keeps V_old: the momentum of matrices starts anew each step.
 3. No check of the rank, and every tensor of two dimensions is a matrix. Here a rank above the smaller side of a matrix
    is refused, and a matrix of one row or column takes dense noise: it is a vector.
With noise that has no order (Philox), 1 is an update along noise of another seed. Otherwise: V and N are float32 at
least, whatever the weights; a tensor of more than two dimensions (convolution) is the matrix (size(0), rest), and does
not crash; weights narrower than float32 are not perturbed in place.

Two forms of the probe (`form`): "weights" adds eps U V^T to the weights, two passes over them a query; "activations" runs
all probes of a step in one forward pass as W x + a U (V^T x) and leaves the weights alone (metazo/step/batched.py), which pays
on a small batch. The losses are the same but for rounding; the update and the record are the same.

Where not to use: on tensors whose gradient is not low rank, such as an embedding of which a batch touches many rows, or
prefixes and LoRA factors, whose small side is near the rank already. Rademacher noise works as well: the same means.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from metazo.blocks import NamedTensor
from metazo.errors import UserError
from metazo.noise import RIGHT, Stream
from metazo.optimizers.base import State, ZOOptimizer
from metazo.optimizers.groups import Closure, listed, mean_over_processes
from metazo.step.batched import Branch, TooLarge
from metazo.step.batched import losses as losses_at
from metazo.step.directions import Direction, Isotropic
from metazo.step.estimators import TwoPoint, mean
from metazo.step.lowrank import Held, LowRank
from metazo.step.record import Step, Update
from metazo.step.substitute import used_unseen

UNDECIDED, WEIGHTS, ACTIVATIONS = 0, 1, 2  # the form that a run took, as state
ROWS = 512  # probes x batch x length up to which "auto" takes activations (docs/speed.md)


class LOZO(ZOOptimizer):
    """Descent along low-rank noise.

    Forwards a step: 2 queries. Extra memory: rank numbers a column of each matrix. State: V/<tensor>, (n, rank); form.

    Args:
        rank: r, columns of U and V; 2 in the published code, 1 to 4 in its tables; at most a matrix's smaller side.
        interval: steps between draws of V; 50 in the published code, 50 or 100 in its tables.
        queries: directions averaged in a step (n-SPSA), all in one forward pass as activations; the paper has one.
        form: "weights", "activations" (2 queries times the activations; falls back to weights, with a warning, for a
            closure that torch cannot vectorise), or "auto": activations where probes x batch x length of the first step
            is at most 512. A replay without closures takes "auto" for weights: in float32, name the form that the run
            took to end on the same bits, as the log of `metazo finetune` does.
        compat: "paper", or "official" for the published code with its faults.
    """

    name = "lozo"

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        rank: int = 2,
        interval: int = 50,
        queries: int = 1,
        form: Literal["weights", "activations", "auto"] = "weights",
        compat: Literal["paper", "official"] = "paper",
        **common,
    ):
        for key, value in (("rank", rank), ("interval", interval)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{key} must be a whole number of at least 1, not {value}.")
        if compat not in ("paper", "official"):
            raise UserError(f"compat {compat!r} is unknown: choose paper or official.")
        if form not in ("weights", "activations", "auto"):
            raise UserError(f"form {form!r} is unknown: choose weights, activations or auto.")
        self.estimator = TwoPoint(queries)
        if queries > 1 and compat == "official":
            raise UserError(f"queries {queries} is unknown to the published code: choose 1, or compat paper.")
        self.form, self.first_seed = form, None  # seed of the step's first query: V comes from it
        self.rank, self.interval, self.official = rank, interval, compat == "official"
        self.energy = float(rank)
        super().__init__(params, lr, eps, **common)
        if queries > 1 and self.noise.ordered:
            raise UserError(
                f"queries {queries} draw one V and as many U, and {self.noise.name} has one order: choose 1."
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name, param in zip(group["param_names"], group["params"]):
            if param.requires_grad and self._is_matrix(param) and not self.official:
                side = min(_sides(param))
                if self.rank > side:
                    raise UserError(
                        f"rank {self.rank} is above the smaller side of {name} ({side}): choose at most that."
                    )

    def _is_matrix(self, param: Tensor) -> bool:
        return param.ndim > 1 and (self.official or min(_sides(param)) > 1)

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        matrices = [tensor for tensor in tensors if self._is_matrix(tensor.param)]
        state = {f"V/{tensor.name}": _zeros(tensor, (_sides(tensor.param)[1], self.rank)) for tensor in matrices}
        if self.form != "weights" and not self.noise.ordered:
            state["form"] = torch.tensor(UNDECIDED)
        return state

    def propose(self, state: State, step: int) -> LowRank:
        return LowRank(Isotropic(), folder(state, "V"), self._renew if step % self.interval == 0 else None)

    def _renew(self, stream: Stream, tensor: NamedTensor) -> None:
        """Draw V, ahead of U: the same numbers each time that the direction of the step's first query is drawn."""
        if self.first_seed not in (None, stream.seed):
            return
        right = self.zo_state[f"V/{tensor.name}"]
        right.copy_(stream.draw(tensor, tuple(right.shape), RIGHT, right.dtype))

    def _along(self, state: State, step: int, seed: int) -> tuple[LowRank, int]:
        """Direction and seed of the estimate: those of the probe, unless official where V is new (fault 1)."""
        if not self.official or step % self.interval:
            return self.propose(state, step), seed
        return LowRank(Isotropic(), folder(state, "V")), seed if self.noise.ordered else self.noise.seed(step, 1)

    def _probe(self, direction: Direction, seeds: Sequence[int], closure, replay: Step | None) -> list[float]:
        self.first_seed = seeds[0]
        form, closures = self.zo_state.get("form"), listed(closure)
        if form is None or form == WEIGHTS or (replay and form == UNDECIDED and self.form == "auto"):
            return super()._probe(direction, seeds, closure, replay)
        try:
            losses = list(replay.losses) if replay else self._together(direction, seeds, closures)
        except Exception as error:
            if form != UNDECIDED:
                raise
            form.fill_(WEIGHTS)
            if not isinstance(error, TooLarge):
                reason = str(error).split("\n")[0]
                warnings.warn(
                    f"{self.name} moves the weights: form {self.form} cannot be had here ({reason})", stacklevel=4
                )
            return super()._probe(direction, seeds, closure, replay)
        form.fill_(ACTIVATIONS)
        self.forwards += len(losses) * sum(getattr(evaluate, "batches", 1) for evaluate in closures)
        return losses

    def _together(self, direction: Direction, seeds: Sequence[int], closures: Sequence[Closure]) -> list[float]:
        """The mean losses at all probes. Raises where the closures cannot give them, or hide tensors that they use."""
        streams, probes = [self.noise.stream(seed) for seed in seeds], self.estimator.probes()
        branches = [Branch(streams[probe.query or 0], probe.multiple * self.eps) for probe in probes]
        limit = ROWS // len(probes) if self.form == "auto" and self.zo_state["form"] == UNDECIDED else None

        def evaluate() -> tuple[list[float], list[NamedTensor]]:
            with torch.inference_mode(), self.weights.evaluating():
                found = [losses_at(closure, self.tensors, direction, branches, limit) for closure in closures]
            return [mean(values) for values in zip(*(losses for losses, _ in found))], found[0][1]

        losses, unmet = evaluate()
        if self.zo_state["form"] == UNDECIDED and used_unseen(unmet, lambda: evaluate()[0][0], losses[0]):
            raise RuntimeError(f"{unmet[0].name} is used where torch functions do not show it")
        return [mean_over_processes(loss) for loss in losses]

    def settled(self, closure: Closure) -> str:
        """The form that "auto" takes for this closure, found out by evaluating it once; no weights are moved."""
        self._prepare()
        if "form" not in self.zo_state:
            return "weights"
        seeds = [self.noise.seed(0, query) for query in range(self.estimator.queries)]
        self.first_seed = seeds[0]
        try:
            self._together(self.propose(self.zo_state, 0), seeds, [closure])
        except Exception:
            return "weights"
        return "activations"

    def update(self, state: State, step: int, seeds: Sequence[int], losses: Sequence[float]) -> Update:
        coefficients = self.estimator.coefficients(losses, self.eps)
        if not self.official:
            return Update(coefficients)
        direction, seed = self._along(state, step, seeds[0])
        return Update(coefficients, direction, [(seed, coefficients[0])])


class LOZOM(LOZO):
    """LOZO with momentum in the factored form.

    Forwards a step: 2. Extra memory: rank numbers a row and a column of each matrix, one a weight of other tensors.
    State: V/<tensor>, (n, rank); N/<tensor>, (m, rank); m/<tensor> as the tensor; updates, a count.

    Args:
        momentum: beta in [0, 1); 0.9 in the published scripts.
    """

    name = "lozo-m"

    def __init__(self, params: Iterable, lr: float = 1e-6, eps: float = 1e-3, *, momentum: float = 0.9, **common):
        if not 0 <= momentum < 1:
            raise UserError(f"momentum must lie in [0, 1), not {momentum}.")
        self.momentum = momentum
        super().__init__(params, lr, eps, **common)

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        state = super().init(tensors)
        for tensor in tensors:
            if f"V/{tensor.name}" in state:
                state[f"N/{tensor.name}"] = _zeros(tensor, (tensor.param.shape[0], self.rank))
            else:
                state[f"m/{tensor.name}"] = _zeros(tensor, tuple(tensor.param.shape))
        return state | {"updates": torch.zeros((), dtype=torch.int64)}

    def _renew(self, stream: Stream, tensor: NamedTensor) -> None:
        """Draw V; where it is not yet the present one, project the momentum onto it."""
        if self.first_seed not in (None, stream.seed):
            return
        right, momentum = self.zo_state[f"V/{tensor.name}"], self.zo_state[f"N/{tensor.name}"]
        fresh = stream.draw(tensor, tuple(right.shape), RIGHT, right.dtype)
        if not torch.equal(right, fresh):
            momentum.copy_(momentum @ (right.t() @ fresh) / len(right))
            right.copy_(fresh)

    def update(self, state: State, step: int, seeds: Sequence[int], losses: Sequence[float]) -> Update:
        coefficients = self.estimator.coefficients(losses, self.eps)
        direction, seed = self._along(state, step, seeds[0])
        streams = [self.noise.stream(s) for s in (seed, *seeds[1:])]
        first = not state["updates"]
        for tensor in self.tensors:
            matrix = f"V/{tensor.name}" in state
            anew = first or (matrix and self.official and self.interval == 1)  # fault 2
            kept, share = (0.0, 1.0) if anew else (self.momentum, 1 - self.momentum)
            if matrix:
                buffer = state[f"N/{tensor.name}"]
                lefts = [
                    direction.left(stream, tensor, buffer.dtype) for stream in streams
                ]  # N is projected ahead of U
                buffer.mul_(kept)
                for left, c in zip(lefts, coefficients):
                    buffer.add_(left, alpha=share * c)
            else:
                buffer = state[f"m/{tensor.name}"].mul_(kept)
                for stream, c in zip(streams, coefficients):
                    direction.inner.add_(stream, tensor, buffer, share * c)
        state["updates"] += 1
        return Update(coefficients, Held(folder(state, "N"), direction.right, folder(state, "m")), [(seed, 1.0)])


def folder(state: State, name: str) -> State:
    """The state tensors `name/<tensor>`, by tensor."""
    return {key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(f"{name}/")}


def _sides(param: Tensor) -> tuple[int, int]:
    return param.shape[0], math.prod(param.shape[1:])


def _zeros(tensor: NamedTensor, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.promote_types(tensor.param.dtype, torch.float32), device=tensor.param.device)
