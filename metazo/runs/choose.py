"""`optimizer="auto"`: the method that the committed figures favour for this objective, head, memory and model.

The rules, in this order; docs/choose.md has them in words, with the figures they rest on:

    the loss has no gradient (or no graph)        mezo, scale rms (adapters: no scale)
    first-order training fits                     first-order-adamw
    the model is one residual stream              answer-column, which keeps one block's graph at a time
    anything else                                 mezo, scale rms

First-order training fits if a gradient and two moments of each trained weight, with a float32 master if it is narrower, and
what a backward pass over the longest batch keeps, take at most `SHARE` of the free memory. It is not taken if `precision` is
one that it has not (compensated), or in place on narrow weights, which would lose its updates. What a backward pass keeps is
counted without keeping it: hooks on saved tensors add up their bytes and drop them.

Where not to use it: for a method that is to be compared, or for a learning rate near the best: it takes the one that a
search would start from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metazo.errors import UserError
from metazo.feedback.local import LocalGradient
from metazo.feedback.residual import find_residual
from metazo.feedback.surrogates import Column
from metazo.optimizers.first_order import FirstOrderAdamW
from metazo.optimizers.loss_watch import NARROW
from metazo.optimizers.registry import method
from metazo.runs.config import FinetuneConfig
from metazo.runs.resources import free_memory, size

SHARE = 0.8  # of the free memory that first-order training may take
LEFT_OPEN = {"tuner": None, "scale": "none", "rule": "method", "noise": "method", "probing": "method"}
"""Settings that belong to a method, with the values that leave them open."""

Loss = Callable[[], Any]


def check_open(config: FinetuneConfig) -> None:
    """Raises UserError for a setting that belongs to one method, if the method is left open."""
    given = [name for name, open_value in LEFT_OPEN.items() if getattr(config, name) != open_value]
    given += list(config.method)
    if given:
        raise UserError(f"`optimizer` is auto, which chooses the method, so `{given[0]}` cannot be set; name a method.")


def choose(
    config: FinetuneConfig, model: nn.Module, loss: Loss, device: torch.device, free: int | None = None
) -> tuple[FinetuneConfig, str]:
    """The settings with a method in the place of auto, and a sentence that says what was taken and why.

    Args: loss: of the longest batch; free: bytes of free memory, by default what the device has.
    Without a learning rate of the user's, the one that a search for this method starts from is taken, and for answer-column,
    whose steps do not shrink by themselves, a schedule that falls to 0.
    """
    check_open(config)
    taken, why = _rule(config, model, loss, free_memory(device) if free is None else free)
    cls = method(taken["optimizer"])
    if config.lr is None:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        taken["lr"] = float(f"{cls.expected_rate(trained):.1g}")
        if taken["optimizer"] == "answer-column" and config.schedule == "constant":
            taken["schedule"] = "linear"
    words = {"optimizer": "", "scale": "scale ", "lr": "learning rate ", "schedule": "schedule "}
    shown = ", ".join(
        f"{words[key]}{value:g}" if key == "lr" else f"{words[key]}{value}" for key, value in taken.items()
    )
    return replace(config, **taken), f"auto takes {shown}: {why}."


def _rule(config: FinetuneConfig, model: nn.Module, loss: Loss, free: int) -> tuple[dict[str, Any], str]:
    mezo = {"optimizer": "mezo"} | ({"scale": "rms"} if config.adapters is None else {})  # LoRA begins with zeros
    differentiable, kept = saved_bytes(loss, model)
    if not differentiable:
        return mezo, "the loss has no gradient, so it is probed"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    needed = kept + sum(parameter.numel() * _held(parameter.dtype) for parameter in trained)
    amounts = f"first-order training takes {size(needed)} beside the weights and {size(free)} are free"
    loses = config.precision == "in-place" and any(parameter.dtype in NARROW for parameter in trained)
    if loses or config.precision not in FirstOrderAdamW.precisions:
        how = "loses small updates" if loses else "is not to be had"
        amounts = f"first-order training with `precision` {config.precision} {how}"
    elif needed <= SHARE * free:
        return {"optimizer": "first-order-adamw"}, f"{amounts}, and first-order training was best at equal cost"
    if (problem := _no_feedback(model, loss)) is None:
        return {"optimizer": "answer-column"}, f"{amounts}; it keeps one block's graph at a time"
    return mezo, f"{amounts}, and feedback cannot be had ({problem})"


def _held(dtype: torch.dtype) -> int:
    """Bytes of a weight's gradient and moments, and of its master if it has one."""
    return 4 * 4 if dtype in NARROW else 3 * dtype.itemsize


def saved_bytes(loss: Loss, model: nn.Module) -> tuple[bool, int]:
    """(whether the loss has a gradient, the most bytes that its backward pass would keep beside the model's own tensors).

    Costs one forward pass and its memory. An upper bound: a tensor that several operations keep is counted for each of them.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    total = 0

    def count(tensor: Tensor) -> None:
        nonlocal total
        if tensor.untyped_storage()._cdata not in own:
            total += tensor.numel() * tensor.element_size()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, _no_backward):
        value = loss()
    return isinstance(value, Tensor) and value.requires_grad, total


def _no_backward(_: Any) -> Tensor:
    raise AssertionError("No tensor was kept for a backward pass.")


def _no_feedback(model: nn.Module, loss: Loss) -> str | None:
    """Why feedback methods cannot be used here, in a few words; None if they can."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        LocalGradient(find_residual(model), names, Column()).capture([loss])
    except UserError as error:
        return str(error).rstrip(".").split(": ")[0].split("; ")[0]
    return None
