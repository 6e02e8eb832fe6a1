"""Watches the losses of an optimizer for what makes a step follow noise instead of the weights."""

from __future__ import annotations

import inspect
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from metazo.blocks import NamedTensor
from metazo.optimizers.guards import as_loss

NARROW = (torch.bfloat16, torch.float16)
FIRST_STEPS = 20  # number of steps in which equal losses are counted
ROUNDING = 4 * torch.finfo(torch.float32).eps  # relative; sums of the same numbers in two orders differ by less
SHARE = 0.01  # times the spread of the probes' losses: a loss that varies by less does no harm


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Restore the global generators of torch, numpy and Python after an evaluation."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        kept = np.random.get_state(), random.getstate()
        try:
            yield
        finally:
            np.random.set_state(kept[0])
            random.setstate(kept[1])


class LossWatch:
    """Watches the losses of an optimizer, and warns once about each of seven faults.

    A loss that differs when it is evaluated twice at the same weights: this needs one more evaluation at the first step,
    which is not counted in `forwards`, and restores the global generators. BatchNorm and spectral_norm in train mode, whose
    statistics change with every probe, and embeddings with max_norm, whose weights do. Closures that change weights. Losses
    of all probes that are exactly equal in most of the first FIRST_STEPS steps, or later in as many steps in a row. Losses
    that are not finite in as many steps in a row. Embeddings that are trained with a row for padding. Probes that are
    evaluated together need a look at the last alone, in the closures' variables: max_norm then shortens copies of the rows,
    and what is random or changes its statistics cannot be vectorised, so that the probes are evaluated in turn.

    Args: repeat: whether to evaluate once more, and to look at the modules.
    """

    def __init__(self, repeat: bool):
        self.repeat = self.looks = self.watches = repeat
        self.gap: float | None = None
        self.ran: list[nn.Module] = []  # the modules that ran, for the names in a warning
        self.narrow: torch.dtype | None = None
        self.steps = self.equal = self.still = self.lost = 0
        self.said = False  # that the losses of the probes are equal
        self.changed: dict[str, None] = {}  # names of tensors that a closure has changed, in this step

    def loss(self, value: Any) -> float:
        """The loss that a closure returned, as a number."""
        if isinstance(value, Tensor) and value.dtype in NARROW:
            self.narrow = value.dtype
        return as_loss(value)

    def evaluated(self, loss: float, again: Callable[[], float], device: torch.device) -> None:
        """Called with the first loss of a step. again: evaluates the same loss at the same weights."""
        if self.repeat:
            self.repeat = False
            with generators_kept(device), modules_seen() as ran:
                self.gap = abs(again() - loss)
            self.ran = outermost(ran.values())

    @contextmanager
    def weights_seen(self, tensors: Sequence[NamedTensor], step: int) -> Iterator[None]:
        """Notes which of these tensors an evaluation changes; in a few steps."""
        if not self.watches or (step > 1 and step % 100) or torch.compiler.is_compiling():
            yield
            return
        counted = [(tensor, tensor.param._version) for tensor in tensors if not tensor.param.is_inference()]
        yield
        self.note_changed(tensor.name for tensor, version in counted if tensor.param._version != version)

    def note_changed(self, names: Iterable[str]) -> None:
        """Called with the names of tensors that a closure has changed."""
        if self.watches:
            self.changed |= dict.fromkeys(names)

    def stepped(
        self, losses: Sequence[float], closures: Sequence[Callable[[], Any]], tensors: Iterable[NamedTensor]
    ) -> None:
        """Called after each step with the losses of its probes. tensors: those that are trained."""
        self.lost = 0 if all(map(math.isfinite, losses)) else self.lost + 1
        if self.lost == FIRST_STEPS:
            warnings.warn(
                f"The loss was not finite in {FIRST_STEPS} steps in a row (now {losses[0]:g}); such a step changes nothing. "
                "Look at the loss at the weights as they are, or lower `lr` or `eps` and begin anew.",
                stacklevel=5,
            )
        spread = max(losses) - min(losses)
        if self.looks:
            models, self.looks, self.ran = [*_models(closures), *self.ran], False, []
            if self.gap is not None:
                self._judge(self.gap, spread, max(map(abs, losses)), models)
            if named_faults(models)[2]:
                self.watches = False  # max_norm is said
            if rows := rows_for_padding(models, tensors):
                warnings.warn(
                    f"For padding (padding_idx) is {', '.join(_first(rows))}, which gets no gradient in a backward pass and is "
                    "moved by these steps: mask padding in the model, as by multiplying the embeddings by (ids != "
                    "padding_idx)[..., None], or, if the weights are float32, set the row back after each step.",
                    stacklevel=5,
                )
        if self.changed and self.watches:
            self.watches = False
            first = next(iter(self.changed))
            warnings.warn(
                f"The closure changes {len(self.changed)} trained tensors in place, such as {first}: it changes them "
                "at a probe, or copies of them, and not the weights that the step moves. Do this between steps, under "
                "torch.no_grad().",
                stacklevel=5,
            )
        alike = spread == 0 and len(losses) > 1
        later = self.steps == FIRST_STEPS and not self.said
        self.still = self.still + 1 if later and alike and losses[0] != 0 else 0  # 0 is where many losses end
        if self.still == FIRST_STEPS:
            self.said = True
            warnings.warn(
                f"In {FIRST_STEPS} steps in a row the losses of all probes were exactly equal, so that the weights do not "
                "move: the loss changes in leaps or has come to its end, or the model has other parameters than the optimizer "
                "now (as after load_state_dict with assign=True).",
                stacklevel=5,
            )
        if self.steps == FIRST_STEPS:
            return
        self.steps += 1
        self.equal += alike
        if self.steps == FIRST_STEPS and self.equal > FIRST_STEPS // 2:
            self.said = True
            cause = (
                "`eps` is too small, the loss changes in leaps (as an accuracy over few examples), or its gradient is meant "
                "and not its value (as in GRPO's and PPO's surrogates; take the reward itself)."
            )
            if self.narrow is not None:
                dtype = str(self.narrow).removeprefix("torch.")
                cause = (
                    f"the loss is computed in {dtype}, which is too coarse. Compute the loss in float32 (logits.float()), or "
                    "raise `eps`."
                )
            warnings.warn(
                f"In {self.equal} of the first {FIRST_STEPS} steps the losses of all probes were exactly equal, so that the "
                f"weights did not move: {cause}",
                stacklevel=5,
            )

    @staticmethod
    def _judge(gap: float, spread: float, size: float, models: Iterable[nn.Module]) -> None:
        random_modules, normed, bounded = named_faults(models)
        if gap > max(ROUNDING * size, SHARE * spread):
            named = f" In train mode are {', '.join(random_modules)}: call model.eval()." if random_modules else ""
            warnings.warn(
                f"The loss differs by {gap:.3g} when it is evaluated twice at the same weights, and the losses of the probes "
                f"by {spread:.3g}: the step follows this noise. Turn off dropout and sampling, and use one batch per "
                f"step.{named}",
                stacklevel=6,
            )
        if normed:
            warnings.warn(
                f"{', '.join(normed)} is in train mode: every probe changes its statistics. Call model.eval().",
                stacklevel=6,
            )
        if bounded:
            warnings.warn(
                f"{', '.join(bounded)} has max_norm, by which every forward pass shortens the rows that it reads, those of a "
                "probe as well: set max_norm to None.",
                stacklevel=6,
            )


@contextmanager
def modules_seen() -> Iterator[dict[int, nn.Module]]:
    """The modules that run while this is open, by id. Within a compiled model none is seen."""
    ran: dict[int, nn.Module] = {}

    def see(module: nn.Module, args: Any) -> None:
        ran.setdefault(id(module), module)

    handle = register_module_forward_pre_hook(see)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks")
            yield ran
    finally:
        handle.remove()


def outermost(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those that are not part of another of them."""
    modules = list(modules)
    parts = {id(part) for module in modules for part in module.modules() if part is not module}
    return [module for module in modules if id(module) not in parts]


def named_faults(models: Iterable[nn.Module]) -> tuple[list[str], list[str], list[str]]:
    """Names of modules: in train mode those of dropout and those whose forward pass changes their statistics (BatchNorm and
    others; the vectors of spectral_norm), and embeddings with max_norm. Each is named by the first of the models that has it.
    """
    dropout: list[str] = []
    normed: list[str] = []
    bounded: list[str] = []
    seen: set[int] = set()
    for model in models:
        for name, module in model.named_modules():
            if id(module) in seen:
                continue
            seen.add(id(module))
            shown = f"{name or 'the model'} ({type(module).__name__})"
            if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                dropout.append(shown)
            if module.training and any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()):
                normed.append(f"spectral_norm of {shown}")
            if module.training and (isinstance(module, _SpectralNorm) or getattr(module, "track_running_stats", False)):
                normed.append(shown)
            if getattr(module, "max_norm", None) is not None and isinstance(module, nn.Embedding | nn.EmbeddingBag):
                bounded.append(shown)
    return _first(dropout), _first(normed), _first(bounded)


def rows_for_padding(models: Sequence[nn.Module], tensors: Iterable[NamedTensor]) -> list[str]:
    """The rows of trained embeddings that are for padding, by name. Models of transformers mask padding and are left out."""
    masked = {
        id(part)
        for model in models
        for module in model.modules()
        if any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__)  # without an import of transformers
        for part in module.modules()
    }
    rows = {
        id(module._parameters.get("weight")): module.padding_idx
        for model in models
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and id(module) not in masked
    }
    return [f"row {rows[id(t.param)]} of {t.name}" for t in tensors if id(t.param) in rows]


def _first(names: list[str]) -> list[str]:
    return [*names[:3], f"{len(names) - 3} more"] if len(names) > 3 else names


def _models(closures: Iterable[Callable[[], Any]]) -> Iterator[nn.Module]:
    """The modules among closures and their variables, whose names a user knows."""
    for closure in closures:
        yield from _models_of(closure)


def _models_of(closure: Callable[[], Any]) -> Iterator[nn.Module]:
    function = getattr(closure, "func", closure)
    candidates = [closure, getattr(function, "__self__", None), *getattr(closure, "args", ())]
    if inspect.isfunction(function) or inspect.ismethod(function):
        code = inspect.unwrap(getattr(function, "__func__", function))
        for cell in getattr(code, "__closure__", None) or ():
            with suppress(ValueError):  # a variable that has no value yet
                candidates.append(cell.cell_contents)
        names = getattr(getattr(code, "__code__", None), "co_names", ())
        candidates += [code.__globals__[name] for name in names if name in code.__globals__]
    yield from (value for value in candidates if isinstance(value, nn.Module))
