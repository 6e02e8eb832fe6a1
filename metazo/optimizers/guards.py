"""Checks of the caller's model and closure: trained tensors must have numbers, and the loss must be one number."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from metazo.blocks import Local, LocalShard, NamedTensor, in_training
from metazo.errors import UserError
from metazo.noise import PhiloxNoise
from metazo.step.record import Step

TRAINABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NO_GRADIENT = (
    "No trained tensor gets a gradient from the loss, so that {} would train nothing: remove what cuts the graph (.detach(), "
    "or a layer without a backward pass, such as bitsandbytes' 4-bit layers that have run in eval mode on a CPU), or choose a "
    "method that needs no gradient, such as mezo."
)
DRIFT = 1e-4  # largest relative difference of coefficients from a log's that can be due to rounding on another device


def as_loss(value: Any) -> float:
    """The loss that a closure returned: a tensor of one entry, or a number. Raises UserError for anything else."""
    try:
        number = value.item() if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1 else value
        if isinstance(number, numbers.Real | np.bool_):  # numpy's real numbers are registered as such
            return float(number)
    except OverflowError:  # a whole number beyond all floats
        pass
    except RuntimeError as error:
        if not (isinstance(value, Tensor) and value.is_meta):
            raise
        raise UserError(
            "The closure returned a tensor on the meta device, which has no numbers: compute the loss on another."
        ) from error
    raise UserError(f"The closure returned {described(value)}; {_remedy(value)}.")


@contextmanager
def gradient_refused(function: str, example: str = "") -> Iterator[None]:
    """Raises UserError if a loss that is evaluated without gradients computes one. function: what computes it."""
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise UserError(
            f"{function} computes a gradient, by backward() or torch.autograd, and a loss has none here: let it return the "
            f"loss alone{example}. A loss that contains a derivative takes it by torch.func (grad, jvp)."
        ) from error


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
    held = sorted(
        ((tensor.param.data_ptr(), tensor.name, tensor.param) for tensor in tensors if tensor.param.numel()),
        key=lambda item: item[:2],
    )
    held = [item for item in held if item[0]]
    end, cluster = 0, list[tuple[int, str, Tensor]]()  # parameters whose spans of memory touch each other
    for item in [*held, (sys.maxsize, "", torch.empty(0, device="cpu"))]:
        if item[0] >= end:
            _check_entries(cluster)
            cluster = []
        cluster.append(item)
        end = max(end, item[0] + _span(item[2]))


def _span(param: Tensor) -> int:
    """Bytes from the first to behind the last entry."""
    return (1 + sum((size - 1) * step for size, step in zip(param.shape, param.stride()))) * param.element_size()


def _check_entries(cluster: Sequence[tuple[int, str, Tensor]]) -> None:
    """Raises UserError if two parameters have an entry in common, or one has two entries in the same place. Spans that touch
    are looked at entry by entry, because those of slices may have nothing in common.
    """
    if len(cluster) < 2 and all(param.is_contiguous() for _, _, param in cluster):
        return
    size, first = cluster[0][2].element_size(), cluster[0][0]
    length = max(place + _span(param) for place, _, param in cluster) - first
    owner = torch.zeros(-(-length // size), dtype=torch.int32, device="cpu")
    for number, (place, name, param) in enumerate(cluster, 1):
        own = owner.as_strided(param.shape, param.stride(), (place - first) // size)
        other = int(own.max())
        if other or param.element_size() != size:
            one = cluster[other - 1 if other else 0][1]
            raise UserError(f"{one} and {name} are two parameters in the same memory: make them one, or leave one out.")
        own.fill_(number)
        if int((owner == number).sum()) != param.numel():
            raise UserError(f"{name} has entries that share memory (a view that overlaps itself): pass a copy.")


def check_numbers(**values: float) -> None:
    """Raises UserError for a value that is not a finite number of at least 0."""
    for name, value in values.items():
        try:
            fits = math.isfinite(value) and value >= 0 and not isinstance(value, bool)
        except TypeError:
            fits = False
        if not fits:
            raise UserError(f"`{name}` must be a finite number of at least 0, not {value!r}.")


REACH = 10  # the largest of a billion normal numbers is 6


def check_reach(eps: float, named: Sequence[tuple[str, Tensor]]) -> None:
    """Raises UserError if a probe is beyond the range of a trained tensor's dtype, which would leave weights that are NaN."""
    for name, param in named:
        floating = isinstance(param, Tensor) and param.is_floating_point()  # torch refuses what is no tensor
        if floating and param.requires_grad and REACH * eps > torch.finfo(param.dtype).max:
            dtype = str(param.dtype).removeprefix("torch.")
            raise UserError(
                f"`eps` is {eps:g}, and a probe of that length is beyond the range of {name} ({dtype}): choose a smaller one, "
                "such as 1e-3."
            )


def check_trained(tensors: Sequence[NamedTensor]) -> None:
    """Raises UserError for a tensor that was frozen after the first step, whose probes and updates would go on."""
    frozen = next((tensor.name for tensor in tensors if not in_training(tensor.param)), None)
    if frozen is not None:
        raise UserError(
            f"{frozen} was frozen after the first step, for which an optimizer takes up its tensors: make a new one."
        )


def check_graph(method: str, named: Iterable[tuple[str, Tensor]]) -> None:
    """Raises UserError for parameters of `local_parameters` whose numbers are those of a model's parameter: a gradient does not
    reach them, because the forward pass uses the model's own.
    """
    apart = [name for name, param in named if isinstance(param, Local)]
    if apart:
        raise UserError(
            f"{method} needs gradients of the model's own parameters, and {len(apart)} of them are offloaded or sharded, the "
            f"first is {apart[0]}: load the model whole on one device, or choose a method that needs no gradient, such as mezo."
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


def check_record(optimizer: Any, record: Step, queries: int, probes: int) -> None:
    """Raises UserError for a record that cannot be of the optimizer's next step."""
    if record.step != optimizer.steps:
        raise UserError(
            f"Step {record.step} of the log cannot be replayed as step {optimizer.steps}: replay all, in order."
        )
    if len(record.seeds) != queries or len(record.losses) != probes:
        raise UserError(
            f"Step {record.step} of the log has {len(record.seeds)} seeds and {len(record.losses)} losses, and a step of "
            f"{optimizer.name} takes {queries} and {probes}: it cannot be replayed."
        )
    if len(record.lr) != len(optimizer.param_groups):
        raise UserError(
            f"Step {record.step} of the log cannot be replayed: it is of another number of parameter groups."
        )


def check_coefficients(record: Step, found: Sequence[float]) -> None:
    """Raises UserError if coefficients differ from the record's by more than the rounding of another device."""
    near = all(math.isfinite(a) and abs(a - b) <= DRIFT * abs(a) for a, b in zip(record.coefficients, found))
    if len(record.coefficients) != len(found) or not near:
        raise UserError(
            f"Step {record.step} of the log cannot be reproduced: its coefficients are {list(record.coefficients)[:3]}, and "
            f"{list(found)[:3]} in the replay; the log was made by another method, setting or version than this one."
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
            "if accelerate offloads them, pass metazo.integrations.local_parameters(model) to the optimizer, and add adapters "
            "before the model is offloaded, because they have no numbers otherwise; or load the model without `device_map`, or "
            "freeze them with requires_grad_(False)",
        )
    if is_traceable_wrapper_subclass(param):
        return (
            f"are of the tensor subclass {type(param).__name__}, such as quantised weights",
            "freeze them and train others, such as LoRA's, or load the model in bfloat16",
        )
    if param.is_complex() or param.layout != torch.strided:
        kind = str(param.dtype if param.is_complex() else param.layout).removeprefix("torch.")
        return f"are of the kind {kind}", "only dense tensors of real numbers can be trained; freeze the others"
    if param.dtype not in TRAINABLE:
        kind = str(param.dtype).removeprefix("torch.")
        return f"are {kind}", "probes are lost in so few bits; train them in bfloat16 or float32, or freeze them"
    if any(step == 0 and size > 1 for step, size in zip(param.stride(), param.shape)):
        return "have entries that share memory (expanded tensors)", "pass a copy, such as weight.clone()"
    return None
