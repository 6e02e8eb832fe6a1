"""First-order baselines for comparison: SGD and AdamW by backpropagation, in the same training loop.

A step is one forward and one backward pass, counted as three forward passes (a backward pass costs about two), so that
curves over forward passes are comparable. They need the memory that zeroth-order methods avoid: gradients, moments and
activations.

Weights narrower than float32 have float32 masters, as those of the other methods: the gradients of several closures are
averaged, clipped and added to the master in float32, and the weights are its rounding. There is no loss scaling, which
gradients of float16 weights may need.
"""

from __future__ import annotations

import math
import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from metazo.blocks import NamedTensor, tensor_id
from metazo.errors import UserError
from metazo.io import processes
from metazo.optimizers.base import DECAY_EXEMPT
from metazo.optimizers.groups import Closure, check_rates, listed
from metazo.optimizers.guards import NO_GRADIENT, as_loss, check_graph
from metazo.optimizers.registry import Method, register
from metazo.step.autocast import as_called, own_arithmetic
from metazo.step.precision import Master, check_dtype, check_used, policy, version_of, without_master
from metazo.step.record import Step

FORWARDS_PER_STEP = 3


class FirstOrder(Method):
    """One of torch's optimizers on gradients clipped to norm 1, with the interface that metazo's own loop needs. It is no
    `torch.optim.Optimizer`: it takes no parameter groups and none of torch's schedulers; in a loop of your own use torch's.

    Args: params: named parameters, on their device and in their dtype; lr; weight_decay: under MeZO's name rule; clip: largest
    gradient norm; precision: one of `precisions`, see metazo.step.precision.
    Raises UserError for parameter groups and tensors without names, if nothing is trainable, for another precision, and for a
    replay: a gradient does not follow from a step's record.
    """

    own_rule = "is a first-order method with a rule of its own"
    common = frozenset({"precision"})
    precisions = ("auto", "in-place", "master", "autocast")
    replayable = False
    needs_gradient = True
    kept: tuple[str, ...]
    """What torch's optimizer keeps for each tensor, by its names."""

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        precision: str = "auto",
    ):
        once: dict[int, tuple[str, Tensor]] = {}  # tied weights count once, under their first name
        for key, param in _pairs(self.name, params):
            once.setdefault(id(param), (key, param))
        named = [(key, param) for key, param in once.values() if param.requires_grad]
        if not named:
            raise UserError("No tensor is trainable: every parameter is frozen.")
        check_graph(self.name, named)
        if precision not in self.precisions:
            choice = ", ".join(self.precisions)
            raise UserError(
                f"`precision` {precision!r} is none of {self.name}'s, which has no probes: choose {choice}."
            )
        check_used(precision, [param for _, param in named])
        storages = {key: policy(precision, param.dtype) for key, param in named}
        self.precision, self.named, self.clip = precision, named, clip
        with torch.inference_mode(False):  # they are changed in steps, perhaps outside of it
            self.masters = {
                key: Master(NamedTensor(key, param, tensor_id(key)))  # type: ignore[arg-type]
                for key, param in named
                if storages[key] == "master" and param.dtype != torch.float32
            }
        thetas = {key: master.theta.requires_grad_() for key, master in self.masters.items()}
        self.thetas = {key: thetas.get(key, param) for key, param in named}
        exempt = [theta for key, theta in self.thetas.items() if any(part in key for part in DECAY_EXEMPT)]
        decayed = [theta for key, theta in self.thetas.items() if not any(part in key for part in DECAY_EXEMPT)]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
        self.inner = self.wrapped([group for group in groups if group["params"]], lr)
        self.dtypes = {key: param.dtype for key, param in named}
        self.steps = self.forwards = 0
        self.last_step: Step | None = None
        self.recorder: Callable[[Step], None] | None = None
        self.max_loss = sys.float_info.max

    @abstractmethod
    def wrapped(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        """torch's optimizer over the groups."""

    def forwards_per_step(self, closures: int = 1) -> float:
        return FORWARDS_PER_STEP * closures

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @property
    def notes(self) -> list[str]:
        words = without_master(self.name, self.thetas.values())
        return [words] if words else []

    def trained(self) -> list[Tensor]:
        return [param for _, param in self.named]

    @own_arithmetic()
    def step(self, closure: Closure | Sequence[Closure], *, replay: Step | None = None) -> float:
        """One update; closures are averaged. A loss or gradient that is not finite changes nothing; NaN is returned then.

        Gradients that are there before are dropped. Raises UserError in several processes, for a replay, for a loss without a
        graph, and if no trained tensor gets a gradient.
        """
        if replay is not None:
            raise UserError(f"A step of {self.name} does not follow from its record: it cannot be replayed.")
        if processes.together():
            raise UserError(
                f"{self.name} runs in one process, because processes exchange losses alone: start it without torchrun."
            )
        for key, param in self.named:
            check_dtype(key, self.dtypes[key], param.dtype, "the optimizer was made")
        if self.steps == 0:
            for words in self.notes:
                warnings.warn(words, stacklevel=3)  # the caller of `step`
        check_rates(self.param_groups)
        for master in self.masters.values():
            master.follow()
        self._drop_gradients()
        try:
            return self._step(listed(closure))
        finally:
            self._drop_gradients()

    def _drop_gradients(self) -> None:
        for tensor in (*self.trained(), *self.thetas.values()):
            tensor.grad = None

    def _autocast(self) -> AbstractContextManager:
        kind = self.named[0][1].device.type
        return torch.autocast(kind, torch.bfloat16) if self.precision == "autocast" else nullcontext()

    def _step(self, closures: Sequence[Closure]) -> float:
        total = 0.0
        with torch.enable_grad():
            for evaluate in closures:
                with as_called(), self._autocast():
                    loss: Any = evaluate()
                number = as_loss(loss)
                if not isinstance(loss, Tensor) or not loss.requires_grad:
                    raise UserError(
                        f"{self.name} needs the loss as a tensor with a gradient, and the closure returned the number {number}."
                    )
                loss = loss.reshape(()) / len(closures)
                loss.backward()
                total += float(loss.detach())
                for master in self.masters.values():
                    _pass_gradient(master)
        for theta in self.thetas.values():
            if theta.grad is not None:
                theta.grad = theta.grad.to_dense()  # an embedding's may be sparse
        if all(theta.grad is None for theta in self.thetas.values()):
            raise UserError(NO_GRADIENT.format(self.name))
        self.forwards += FORWARDS_PER_STEP * len(closures)
        length = torch.nn.utils.clip_grad_norm_(self.thetas.values(), self.clip)
        solid = math.isfinite(length)
        finite = math.isfinite(total) and abs(total) <= self.max_loss and solid
        rates = tuple(float(group["lr"]) for group in self.param_groups)
        self.last_step = Step(self.steps, (), (total,), (1.0,) if finite else (), rates)
        if self.recorder is not None:
            self.recorder(self.last_step)
        if finite:
            self.inner.step()
            for master in self.masters.values():
                master.param.copy_(master.theta)
                master.version = version_of(master.param)
        self.steps += 1
        return total if solid or not math.isfinite(total) else math.nan

    def tensors_state(self) -> dict[str, Tensor]:
        counters = [self.steps, self.forwards, self._names]
        state: dict[str, Tensor] = {"counters": torch.tensor(counters, dtype=torch.int64, device="cpu")}
        state |= {f"master/{name}": master.theta.detach() for name, master in self.masters.items()}
        for name, theta in self.thetas.items():
            for key, value in self.inner.state.get(theta, {}).items():
                if value is not None:
                    state[f"{key}/{name}"] = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
        return state

    @property
    def _names(self) -> int:
        """A checksum of the trained tensors' names, of which only those that had a gradient have a state."""
        return crc32("\n".join(key for key, _ in self.named).encode())

    def _fits(self, key: str, value: Tensor) -> bool:
        """Whether an entry of a saved state can be one of this optimizer's."""
        kind, _, name = key.partition("/")
        if kind == "counters":  # those of earlier versions have no checksum
            return len(value) == 2 or (len(value) == 3 and int(value[2]) == self._names)
        if (theta := self.thetas.get(name)) is None or kind not in ("master", *self.kept):
            return False
        return value.ndim == 0 if kind == "step" else (value.shape, value.dtype) == (theta.shape, theta.dtype)

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_tensors_state(self, state: dict[str, Tensor]) -> None:
        """Raises UserError for a state of another method or model, or with float32 masters of other tensors."""
        parts = [key.partition("/")[::2] for key in state]
        saved = {name for kind, name in parts if kind == "master"}
        if saved != self.masters.keys():
            raise UserError(
                f"The state of {self.name} has float32 masters of {len(saved)} tensors, and this optimizer of "
                f"{len(self.masters)}: set `precision` to {'master' if saved else 'in-place'}."
            )
        whole = {f"{kind}/{name}" for other, name in parts if other in self.kept for kind in self.kept} | {"counters"}
        odd = [key for key, value in state.items() if not self._fits(key, value)] + sorted(whole - state.keys())
        if odd:
            raise UserError(
                f"The saved state is not of this optimizer ({self.name}): {odd[0]} differs or is missing. Load it into the "
                "method and model that saved it."
            )
        self.steps, self.forwards = (int(n) for n in state["counters"][:2])
        self.inner.state.clear()
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind == "master":
                self.masters[name].theta.copy_(value)
            elif name:
                theta = self.thetas[name]
                device = value.device if kind == "step" else theta.device  # torch keeps the number of steps on the CPU
                self.inner.state[theta][kind] = value.to(device, copy=True)


def _pass_gradient(master: Master) -> None:
    """Add the gradient of narrow weights to that of their master, in float32."""
    gradient, master.param.grad = master.param.grad, None
    if gradient is not None:
        wide = gradient.to_dense().to(master.theta.dtype)  # an embedding's may be sparse
        master.theta.grad = wide if master.theta.grad is None else master.theta.grad.add_(wide)


def _pairs(name: str, params: Iterable) -> list[tuple[str, Tensor]]:
    """The members of `params`, if all are pairs of a name and a tensor."""
    entries: list[Any] = [params] if isinstance(params, Tensor | torch.nn.Module) else list(params)
    for entry in entries:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], Tensor)):
            found = "parameter groups" if isinstance(entry, dict) else f"a {type(entry).__name__} without a name"
            raise UserError(
                f"`params` of {name} has {found}; it takes pairs of a name and a tensor, as model.named_parameters() gives. "
                "For parameter groups use first-order-fused, or torch's own optimizers."
            )
    return entries


@register
class FirstOrderAdamW(FirstOrder):
    """torch's AdamW, by backpropagation."""

    name, search_rate, moments = "first-order-adamw", 3e-4, 2
    kept = "step", "exp_avg", "exp_avg_sq"

    def wrapped(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=lr)


@register
class FirstOrderSGD(FirstOrder):
    """torch's SGD with momentum 0.9, by backpropagation. Its weight decay is decoupled, as that of AdamW."""

    name, search_rate, moments = "first-order-sgd", 1e-2, 1
    kept = ("momentum_buffer",)

    def wrapped(self, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        return _DecoupledSGD(groups, lr=lr, momentum=0.9)


class _DecoupledSGD(torch.optim.SGD):
    """theta <- (1 - lr decay) theta before a step, for the weights that have a gradient. torch's SGD would add the decay to the
    gradient, and so to the momentum.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        decays = [group["weight_decay"] for group in self.param_groups]
        try:
            for group, decay in zip(self.param_groups, decays):
                group["weight_decay"] = 0.0
                for param in group["params"] if decay else ():
                    if param.grad is not None:
                        param.mul_(1 - group["lr"] * decay)
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays):
                group["weight_decay"] = decay
