"""Explains in a sentence why a loss is not finite, why memory ran out, or that a model cannot compute in a dtype."""

from __future__ import annotations

import copy
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metazo.errors import UserError
from metazo.io.processes import world
from metazo.models.parts import divided, forward_only, whole
from metazo.runs.config import FinetuneConfig
from metazo.steplog.inspect import mean


def diagnose(
    model: nn.Module, closures: Sequence[Callable[[], Any]], dtype: torch.dtype, max_loss: float = math.inf
) -> str:
    """A sentence that says why the loss is not finite. It costs a forward pass, and one module's pass in float32.

    It distinguishes weights out of the dtype's range; a probe that is too long; an overflow of a narrow dtype (a module's
    output is finite in float32 on the same input); and divergence.
    """
    limit, name = torch.finfo(dtype).max, str(dtype).removeprefix("torch.")
    narrow = dtype.itemsize < 4
    for key, parameter in whole(model):
        largest = float(parameter.detach().abs().max()) if parameter.numel() else 0.0
        if not largest < limit:
            cure = "use `dtype` bfloat16 or float32." if dtype == torch.float16 else "the run has diverged; lower `lr`."
            return f"{key} holds {largest:.3g}, out of the range of {name} (to {limit:.3g}): {cure}"
    found: list[tuple[str, nn.Module, Any, Any]] = []
    hooks = [
        module.register_forward_hook(_Finder(key, found), with_kwargs=True)
        for key, module in model.named_modules(remove_duplicate=True)
    ]
    try:
        with forward_only(model):
            loss = mean([float(closure()) for closure in closures])
    finally:
        for hook in hooks:
            hook.remove()
    of = " on the examples of this process" if world() > 1 else ""
    if not found and not math.isfinite(loss):
        return "every module of the model gives finite values, so it comes from the loss, or the objective, itself."
    if not found and loss > max_loss:
        return (
            f"without a probe the loss{of} is {loss:.4g}, above `max_loss` ({max_loss:g}): raise it if they are "
            "right, or lower `lr` if the loss has grown."
        )
    if not found:
        return (
            f"without the probe the loss{of} is {loss:.4g}, so the probe is too long: lower `eps`, and `lr` if the "
            "loss has grown."
        )
    where, module, args, kwargs = found[0]
    if narrow and not divided(model) and _finite(output := _output(module, args, kwargs)):
        largest = max(float(value.abs().max()) for value in _floats(output))
        return (
            f"overflow of {name}: {where} gives up to {largest:.3g}, and the largest {name} is {limit:.3g}. "
            "float32 can represent it, so the run has not diverged. Use `dtype` bfloat16 or float32."
        )
    return f"{where} gives values that are not finite from finite ones: the run has diverged; lower `lr`."


@torch.inference_mode()
def _output(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """What the module gives in float32."""
    return _wide(module)(*_wide(args), **_wide(kwargs))


class _Finder:
    """A forward hook that notes modules whose inputs are finite and whose outputs are not; inner modules come first."""

    def __init__(self, name: str, found: list):
        self.name, self.found = name or "the model", found

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self.found and not _finite(output) and _finite([args, kwargs], masks=True):
            self.found.append((self.name, module, args, kwargs))


def _floats(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, dict):
        yield from (tensor for item in value.values() for tensor in _floats(item))
    elif isinstance(value, list | tuple):
        yield from (tensor for item in value for tensor in _floats(item))


def _finite(value: Any, masks: bool = False) -> bool:
    """Whether all values are finite; `masks` allows the -inf that attention masks hold."""
    return all(bool((tensor.isfinite() | (tensor == -math.inf if masks else False)).all()) for tensor in _floats(value))


def _wide(value: Any) -> Any:
    """Converts modules, and tensors in nested lists, tuples and mappings, to float32."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).float()
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _wide(item) for key, item in value.items()}
    return type(value)(_wide(item) for item in value) if type(value) in (list, tuple) else value


@contextmanager
def memory_explained(config: FinetuneConfig) -> Iterator[None]:
    """Turn a failed allocation into a UserError that names the settings to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        kinds = (MemoryError, torch.OutOfMemoryError)
        if not isinstance(error, kinds) and "out of memory" not in text and "can't allocate memory" not in text:
            raise
        length = config.max_length or "the model's context"
        raise UserError(
            f"Out of memory: lower `batch_size` (now {config.batch_size}; more `accumulate` keeps the examples per step), "
            f"`max_length` (now {length}) or `eval_batch_size` (now {config.eval_batch_size}), or take `dtype` bfloat16 "
            f"(now {config.dtype}), in another `out`; or free memory and continue with `resume=True`: the step log is intact."
        ) from error


@contextmanager
def dtype_explained(config: FinetuneConfig) -> Iterator[None]:
    """Turn the failure of a model's own code at narrow numbers, as of DeBERTa's, into a UserError that names the dtype. A
    failure of code of the caller's, such as a loss or a hook, is raised as it is.
    """
    try:
        yield
    except RuntimeError as error:
        places = [set(Path(frame.filename).parts) for frame in traceback.extract_tb(error.__traceback__)]
        while places and not {"metazo", "runs"} <= places.pop(0):  # who called
            pass
        own = any({"transformers", "models"} <= place for place in places)
        own = own and all(place & {"metazo", "torch", "transformers"} for place in places)
        if config.dtype == "float32" or not own or "dtype" not in str(error):
            raise
        raise UserError(
            f"{config.model} cannot compute in `dtype` {config.dtype} (its code in transformers: "
            f"{str(error).splitlines()[0]:.100}); choose float32."
        ) from error
