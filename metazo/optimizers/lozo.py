"""LOZO and LOZO-M (Chen et al., "Enhancing zeroth-order fine-tuning for language models with low-rank structures", arXiv
2410.07698).

The gradient of a matrix W (m x n) is close to low rank, so the probe is low rank as well: U is drawn at each step, and V is
kept for `interval` steps, in which the iterates move in one subspace.

    U ~ N(0, I), m x r;   V ~ N(0, I), n x r, drawn again if step % interval == 0
    c = (L(W + eps U V^T) - L(W - eps U V^T)) / (2 eps)
    W <- W - lr (c U V^T + weight_decay W)                    tensors of one dimension: c z, as MeZO

With n queries, each with its own U and all with the same V, c U V^T is averaged over them.

LOZO-M adds momentum, stored as a factor N in R^(m x r) and projected onto the new V whenever V changes:

    N <- beta N + (1 - beta) c U            (N = c U at the first step)
    N <- N (V_old^T V) / n  before that, if V is drawn again: the least-squares fit of N' V^T to N V_old^T, with
                            V^T V replaced by its mean n I
    W <- W - lr (N V^T + weight_decay W)                      tensors of one dimension: m <- beta m + (1 - beta) c z

Scale: E[c U V^T] = r grad (to O(eps^2)), and |U V^T|^2 is r times |z|^2 on average. The paper divides the estimate by r; its
code and this file do not. For matrices, lr therefore has the effect of r lr in MeZO, so reduce lr in proportion if r grows;
for all other tensors E[c z] = grad as in MeZO.

Differences from the published code (optsuite/LOZO); `compat="official"` (official/lozo.py) brings back the numbered ones:
 1. If V is drawn again, the update restarts the step's stream without drawing V, so it moves along U and z that were
    never probed: every `interval`-th step, the first included, is noise, and with interval=1 nothing is learned.
 2. LOZO-M with interval=1 never keeps V_old: the momentum of matrices starts again at each step.
 3. No check of the rank, and every tensor of two dimensions is a matrix. Here a rank above the smaller side of a matrix
    is refused, and a matrix of one row or column gets dense noise, because it is a vector.
V and N are at least float32 for all types of weights; a tensor of more than two dimensions (a convolution) is the matrix
(size(0), rest) instead of an error; weights narrower than float32 are not perturbed in place.

The probe can be applied to the weights or to the activations: form="activations" evaluates all probes together
(probing="together"), with the same losses except for rounding, and the same update and record.

Where not to use: on tensors whose gradient is not low rank, such as an embedding of which a batch touches many rows, or on
prefixes and LoRA factors, whose smaller side is close to the rank already. Rademacher noise gives the same means.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from metazo.blocks import NamedTensor, sides_of
from metazo.errors import UserError
from metazo.noise import RIGHT, Draw
from metazo.optimizers.base import State, ZOOptimizer
from metazo.optimizers.registry import Case, register
from metazo.step.directions import Isotropic
from metazo.step.estimators import TwoPoint
from metazo.step.lowrank import Held, LowRank
from metazo.step.record import Update
from metazo.step.terms import Term

FORMS = {"weights": "in-turn", "activations": "together", "auto": "auto"}
"""LOZO's names for how its probes are evaluated."""


@register
class LOZO(ZOOptimizer):
    """Descent along low-rank noise.

    Forwards per step: 2 queries. Extra memory: rank numbers per column of each matrix. State: V/<tensor>, (n, rank).

    Args:
        rank: r, columns of U and V; 2 in the published code, 1 to 4 in its tables; at most a matrix's smaller side.
        interval: steps between draws of V; 50 in the published code, 50 or 100 in its tables.
        queries: directions averaged per step (n-SPSA), all in one forward pass with form="activations"; the paper has one.
        form: "weights", "activations" (activations take 2 queries times the memory; falls back to weights, with a warning,
            for a closure that torch cannot vectorise), or "auto": activations if probes x batch x length of the first step
            is at most 512. A replay without closures reads "auto" as "weights": for a bit-identical result in float32, name
            the form of the run, which the log of `metazo finetune` has.
        compat: "paper", or "official" for the published code with its faults.
    """

    name, paper = "lozo", "arXiv 2410.07698"
    deferrable = True
    low_rank = shardable = True
    contract_case = Case(quadratic=0.02, stiff=4e-4, llama=1e-3, options={"interval": 5})

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
                raise UserError(f"`{key}` must be a whole number of at least 1, not {value}.")
        if form not in list(FORMS):  # a value that cannot be a key, too
            raise UserError(f"`form` {form!r} is unknown: choose weights, activations or auto.")
        self.estimator = TwoPoint(queries)
        self.rank, self.interval, self.energy = rank, interval, float(rank)
        if common.get("probing") is None:
            common["probing"] = FORMS[form]
        elif form != "weights" and common["probing"] != FORMS[form]:
            warnings.warn(f"`form` {form} changes nothing: `probing` {common['probing']} decides.", stacklevel=2)
        super().__init__(params, lr, eps, **common)

    @classmethod
    def resolve(cls, options, model, closure) -> dict[str, Any]:
        """As in the base class, with the settled probing under the name `form`."""
        if options.get("probing") is not None or FORMS.get(options.get("form", "weights")) == "in-turn":
            return super().resolve(options, model, closure)
        found = super().resolve({**options, "probing": FORMS[options["form"]]}, model, closure)["probing"]
        return {**options, "form": next(form for form, probing in FORMS.items() if probing == found)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name, param in zip(group["param_names"], group["params"]):
            if param.requires_grad and self.is_matrix(param):
                self.check_rank(name, min(sides_of(param)))

    def check_rank(self, name: str, side: int) -> None:
        if self.rank > side:
            raise UserError(
                f"`rank` is {self.rank} and the smaller side of {name} is {side}: choose a rank of at most {side}."
            )

    def is_matrix(self, param: Tensor) -> bool:
        return param.ndim > 1 and min(sides_of(param)) > 1

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        matrices = [tensor for tensor in tensors if self.is_matrix(tensor.param)]
        return {f"V/{tensor.name}": zeros(tensor, (sides_of(tensor.param)[1], self.rank)) for tensor in matrices}

    def propose(self, state: State, step: int, seeds: Sequence[int]) -> LowRank:
        """Draw V again every `interval` steps, from the stream of the step's first seed."""
        direction = LowRank(Isotropic(), folder(state, "V"))
        if step % self.interval == 0:
            stream = self.noise.stream(seeds[0])
            self.noise.expect(seeds[0], self._draws(direction))
            for tensor in self.tensors:
                if (right := direction.right.get(tensor.name)) is not None:
                    self.renew(state, tensor, stream.draw(tensor, tuple(right.shape), RIGHT, right.dtype))
        return direction

    def _draws(self, direction: LowRank) -> Iterator[Draw]:
        """The published order: V before U, tensor by tensor."""
        for tensor in self.tensors:
            if (right := direction.right.get(tensor.name)) is not None:
                yield tensor, tuple(right.shape), RIGHT
            yield from direction.draws(tensor)

    def renew(self, state: State, tensor: NamedTensor, right: Tensor) -> None:
        """Store a new V. The same V may be given twice, if the step is repeated after an exception."""
        state[f"V/{tensor.name}"].copy_(right)


@register
class LOZOM(LOZO):
    """LOZO with momentum in the factored form.

    Forwards per step: 2 queries. Extra memory: rank numbers per row and column of each matrix, one per weight of other
    tensors. State: V/<tensor>, (n, rank); N/<tensor>, (m, rank); m/<tensor> as the tensor; updates, a count.

    Args:
        momentum: beta in [0, 1); 0.9 in the published scripts.
    """

    name = "lozo-m"
    own_rule = "keeps its momentum as a factor; use `optimizer='lozo'` with `rule`"
    contract_case = Case(quadratic=0.02, stiff=4e-4, llama=3e-3, options={"interval": 5})

    def __init__(self, params: Iterable, lr: float = 1e-6, eps: float = 1e-3, *, momentum: float = 0.9, **common):
        if not 0 <= momentum < 1:
            raise UserError(f"`momentum` must be in [0, 1), not {momentum}.")
        self.momentum = momentum
        super().__init__(params, lr, eps, **common)

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        state = super().init(tensors)
        for tensor in tensors:
            if f"V/{tensor.name}" in state:
                state[f"N/{tensor.name}"] = zeros(tensor, (sides_of(tensor.param)[0], self.rank))
            else:
                state[f"m/{tensor.name}"] = zeros(tensor, tuple(tensor.param.shape))
        return state | {"updates": torch.zeros((), dtype=torch.int64)}

    def renew(self, state: State, tensor: NamedTensor, right: Tensor) -> None:
        """Project the momentum onto a new V, once."""
        present, momentum = state[f"V/{tensor.name}"], state[f"N/{tensor.name}"]
        if not torch.equal(present, right):
            momentum.copy_(momentum @ (present.t() @ right) / len(right))
            present.copy_(right)

    def starts_anew(self, state: State, matrix: bool) -> bool:
        """Whether the momentum of a tensor is the estimate alone."""
        return not state["updates"]

    def update(self, state: State, step: int, seeds: Sequence[int], losses: Sequence[float]) -> Update:
        coefficients = self.estimator.coefficients(losses, self.eps)
        direction = LowRank(Isotropic(), folder(state, "V"))
        streams = [self.noise.stream(seed) for seed in seeds]
        for tensor in self.tensors:
            matrix = tensor.name in direction.right
            kept, share = (0.0, 1.0) if self.starts_anew(state, matrix) else (self.momentum, 1 - self.momentum)
            buffer = state[f"{'N' if matrix else 'm'}/{tensor.name}"].mul_(kept)
            for stream, c in zip(streams, coefficients):
                if matrix:
                    buffer.add_(direction.left(stream, tensor, buffer.dtype), alpha=share * c)
                else:
                    direction.inner.add_(stream, tensor, buffer, share * c)
        state["updates"] += 1
        momentum = Held(folder(state, "N"), direction.right, folder(state, "m"))
        return Update(coefficients, [Term(momentum, seeds[0], 1.0)])


def folder(state: State, name: str) -> State:
    """The state tensors `name/<tensor>`, by tensor."""
    return {key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(f"{name}/")}


def zeros(tensor: NamedTensor, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.promote_types(tensor.param.dtype, torch.float32), device=tensor.param.device)
