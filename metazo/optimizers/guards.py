"""Checks of the caller's model and closure: trained tensors must have numbers, and the loss must be one number and repeat."""

from __future__ import annotations

import inspect
import math
import numbers
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from metazo.blocks import LocalShard, NamedTensor
from metazo.errors import UserError
from metazo.noise import PhiloxNoise

NARROW = (torch.bfloat16, torch.float16)
FIRST_STEPS = 20  # number of steps in which equal losses are counted
ROUNDING = 4 * torch.finfo(torch.float32).eps  # relative; sums of the same numbers in two orders differ by less
SHARE = 0.01  # times the spread of the probes' losses: a loss that varies by less does no harm


def as_loss(value: Any) -> float:
    """The loss that a closure returned: a tensor of one entry, or a number. Raises UserError for anything else."""
    number = value.item() if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1 else value
    if isinstance(number, numbers.Real | np.bool_):  # numpy's real numbers are registered as such
        return float(number)
    raise UserError(f"The closure returned {described(value)}; {_remedy(value)}.")


def described(value: Any) -> str:
    """A value in a few words, for a message."""
    if value is None:
        return "None"
    if isinstance(value, Tensor | np.ndarray):
        kind = "a tensor" if isinstance(value, Tensor) else "an array"
        return f"{kind} of shape {tuple(value.shape)} and type {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(str, list(value)[:4])) or '(none)'}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(type(item).__name__ for item in value[:4])})"
    return f"{value!r:.60}, a {type(value).__name__}"


def _remedy(value: Any) -> str:
    if isinstance(value, Mapping) and "loss" in value:
        return "return its entry `loss` alone"
    if isinstance(value, Tensor | np.ndarray) and np.prod(value.shape) > 1:
        return "return one number, such as its mean()"
    return "return the loss as one number: a tensor of one entry, or a float, such as model(**batch).loss"


def check_weights(tensors: Sequence[NamedTensor]) -> None:
    """Raises UserError if trained tensors have no numbers on this device, or have a form that a step cannot change."""
    found = [(tensor.name, reason) for tensor in tensors if (reason := _unfit(tensor.param))]
    if not found:
        _check_apart(tensors)
        return
    name, (what, remedy) = found[0]
    count = sum(reason[0] == what for _, reason in found)
    raise UserError(f"{count} of {len(tensors)} trained tensors {what}, the first is {name}: {remedy}.")


def _check_apart(tensors: Sequence[NamedTensor]) -> None:
    """Raises UserError for two parameters with the same memory, which every probe and every update would move twice."""
    spans = sorted(
        (tensor.param.data_ptr(), tensor.param.numel() * tensor.param.element_size(), tensor.name)
        for tensor in tensors
        if tensor.param.numel() and tensor.param.is_contiguous() and tensor.param.data_ptr()
    )
    for (first, length, one), (second, _, other) in zip(spans, spans[1:]):
        if second < first + length:
            raise UserError(
                f"{one} and {other} are two parameters in the same memory: make them one, or leave one out."
            )


def check_trained(tensors: Sequence[NamedTensor]) -> None:
    """Raises UserError for a tensor that was frozen after the first step, whose probes and updates would go on."""
    frozen = next((tensor.name for tensor in tensors if not tensor.param.requires_grad), None)
    if frozen is not None:
        raise UserError(
            f"{frozen} was frozen after the first step, when an optimizer takes up its tensors: make a new one."
        )


def check_shards(optimizer: Any) -> None:
    """Raises UserError if the optimizer has a part that needs whole tensors, and this process has only shards of some.

    Where the probing is to be chosen, it is in turn.
    """
    shards = [tensor.name for tensor in optimizer.tensors if isinstance(tensor.param, LocalShard)]
    if not shards:
        return
    if optimizer.probing == "auto":
        optimizer.probing = "in-turn"
    compensated = any("compensation" in storage.buffers for storage in optimizer.weights.storage.values())
    copied = any(isinstance(tensor.param, LocalShard) and tensor.param.source is None for tensor in optimizer.tensors)
    parts = [
        (
            not optimizer.shardable,
            f"{optimizer.name} computes with whole tensors",
            "choose another method, such as mezo",
        ),
        (
            optimizer.probing == "together",
            "`probing` together replaces calls of torch functions, and a forward pass uses shards in ways of its own",
            "choose `probing` in-turn",
        ),
        (
            optimizer.scale is not None and copied,
            "`scale` gathers the shards of all processes, and these are copies that know of no others",
            "make the optimizer from local_parameters(model)",
        ),
        (
            compensated,
            f"`precision` {optimizer.precision} replaces weights, and a forward pass uses shards in ways of its own",
            "choose `precision` master",
        ),
        (
            optimizer.exchange.probe_ranks > 1,
            "`probe_ranks` divides the probes, and a forward pass needs the shards of all processes",
            "choose `probe_ranks` 1",
        ),
        (
            not isinstance(optimizer.noise, PhiloxNoise),
            f"`noise` {optimizer.noise.name} has no order by entry",
            "choose gaussian or rademacher",
        ),
    ]
    for true, reason, remedy in parts:
        if true:
            count = len(shards)
            raise UserError(
                f"{reason}, and {count} tensors are sharded over processes, the first is {shards[0]}: {remedy}."
            )


def check_moved(tensors: Sequence[NamedTensor]) -> None:
    """Raises UserError if a sharded parameter has moved to other memory, so that changes of its shard would not reach it."""
    for tensor in tensors:
        source = getattr(tensor.param, "source", None)
        if source is not None and source.to_local().data_ptr() != tensor.param.data_ptr():
            raise UserError(
                f"{tensor.name} has moved to other memory since local_parameters(model) was called: call it when the model is "
                "loaded, on its device and in its dtype, and make the optimizer from what it returns."
            )


def _unfit(param: Tensor) -> tuple[str, str] | None:
    """The fault of a parameter and its remedy, as two parts of a sentence."""
    kinds = {kind.__name__ for kind in type(param).__mro__}
    if is_lazy(param):
        return "have no shape yet (lazy modules)", "run the model once before the first step"
    if "DTensor" in kinds or "FlatParameter" in kinds or getattr(param, "_fsdp_flattened", False):
        return (
            "are sharded over processes (DTensor or FSDP)",
            "after fully_shard (FSDP2) or tensor parallelism pass metazo.integrations.local_parameters(model) to the "
            "optimizer, or give every process the whole model, whose losses are averaged without a wrapper",
        )
    if param.device.type == "meta":
        return (
            "are offloaded or were never loaded (device meta)",
            "pass metazo.integrations.local_parameters(model) to the optimizer if accelerate offloads them, load the model "
            "without `device_map`, or freeze them with requires_grad_(False)",
        )
    if is_traceable_wrapper_subclass(param):
        return (
            f"are of the tensor subclass {type(param).__name__}, such as quantised weights",
            "freeze them and train others, such as LoRA's, or load the model in bfloat16",
        )
    if param.is_complex() or param.layout != torch.strided:
        kind = str(param.dtype if param.is_complex() else param.layout).removeprefix("torch.")
        return f"are of the kind {kind}", "only dense tensors of real numbers can be trained; freeze the others"
    if any(step == 0 and size > 1 for step, size in zip(param.stride(), param.shape)):
        return "have entries that share memory (expanded tensors)", "pass a copy, such as weight.clone()"
    return None


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
    """Watches the losses of an optimizer, and warns once about each of four faults.

    A loss that differs when it is evaluated twice at the same weights: this needs one more evaluation at the first step,
    which is not counted in `forwards`, and restores the global generators. BatchNorm in train mode, whose running statistics
    change with every probe. Losses of all probes that are exactly equal in most of the first FIRST_STEPS steps. Losses that
    are not finite in as many steps in a row.

    Args: repeat: whether to evaluate once more.
    """

    def __init__(self, repeat: bool):
        self.repeat = repeat
        self.gap: float | None = None
        self.narrow: torch.dtype | None = None
        self.steps = self.equal = self.lost = 0

    def loss(self, value: Any) -> float:
        """The loss that a closure returned, as a number."""
        if isinstance(value, Tensor) and value.dtype in NARROW:
            self.narrow = value.dtype
        return as_loss(value)

    def evaluated(self, loss: float, again: Callable[[], float], device: torch.device) -> None:
        """Called with the first loss of a step. again: evaluates the same loss at the same weights."""
        if self.repeat:
            self.repeat = False
            with generators_kept(device):
                self.gap = abs(again() - loss)

    def stepped(self, losses: Sequence[float], closures: Sequence[Callable[[], Any]]) -> None:
        """Called after each step with the losses of its probes."""
        self.lost = 0 if all(map(math.isfinite, losses)) else self.lost + 1
        if self.lost == FIRST_STEPS:
            warnings.warn(
                f"The loss was not finite in {FIRST_STEPS} steps in a row (now {losses[0]:g}); such a step changes nothing. "
                "Look at the loss at the weights as they are, or lower `lr` or `eps` and begin anew.",
                stacklevel=5,
            )
        spread = max(losses) - min(losses)
        if self.gap is not None:
            self._judge(self.gap, spread, max(map(abs, losses)), closures)
            self.gap = None
        if self.steps == FIRST_STEPS:
            return
        self.steps += 1
        self.equal += spread == 0 and len(losses) > 1
        if self.steps == FIRST_STEPS and self.equal > FIRST_STEPS // 2:
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
    def _judge(gap: float, spread: float, size: float, closures: Sequence[Callable[[], Any]]) -> None:
        random_modules, normed = seen_modules(closures)
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
                f"{', '.join(normed)} is in train mode: every probe changes its running statistics. Call model.eval().",
                stacklevel=6,
            )


def seen_modules(closures: Sequence[Callable[[], Any]]) -> tuple[list[str], list[str]]:
    """Names of dropout and of BatchNorm modules in train mode among the closures and the variables of the closures."""
    dropout: list[str] = []
    normed: list[str] = []
    for model in {id(model): model for closure in closures for model in _models(closure)}.values():
        for name, module in model.named_modules():
            shown = f"{name or 'the model'} ({type(module).__name__})"
            if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                dropout.append(shown)
            if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                normed.append(shown)
    return _first(dropout), _first(normed)


def _first(names: list[str]) -> list[str]:
    return [*names[:3], f"{len(names) - 3} more"] if len(names) > 3 else names


def _models(closure: Callable[[], Any]) -> Iterator[nn.Module]:
    function = getattr(closure, "func", closure)
    candidates = [closure, getattr(function, "__self__", None), *getattr(closure, "args", ())]
    if inspect.isfunction(function) or inspect.ismethod(function):
        found = inspect.getclosurevars(function)
        candidates += [*found.nonlocals.values(), *found.globals.values()]
    yield from (value for value in candidates if isinstance(value, nn.Module))
