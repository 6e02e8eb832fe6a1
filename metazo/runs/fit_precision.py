"""`precision="auto"`: the most exact policy for weights narrower than float32 whose memory is free.

    master          float32 beside each weight: 6 bytes per bfloat16 weight
    compensated-16  the 16 bits below it: 4 bytes
    compensated-8   8 of them, stochastically rounded: 3 bytes

What must fit is the policy's bytes, the state of the method, a copy of the largest tensor (compensated policies), and the
activations of a forward pass over the longest batch, which is followed once (metazo/runs/estimate.py). If nothing fits,
compensated-8 is taken, and the note says what needs no memory beside inference: adapters, whose own weights are few.
first-order-adamw and first-order-sgd take masters, whatever is free.

The choice is written into the step log, and a resumed run keeps it. Weights of float32 and float64 are perturbed in place, and
nothing is chosen. Where not to use it: if runs on machines of different memory are to be bit-identical; name a policy then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from metazo.errors import UserError
from metazo.optimizers.registry import method
from metazo.runs.config import FinetuneConfig
from metazo.runs.estimate import Followed, scratch_bytes, state_bytes
from metazo.runs.locate import log_to_continue
from metazo.runs.method import build_optimizer
from metazo.runs.resources import size
from metazo.step.precision import DEFAULTS, POLICIES, check_used
from metazo.steplog.format import scan

ORDER = ("master", "compensated-16", "compensated-8")
SHARE = 0.95  # of the free memory


def fit_precision(
    config: FinetuneConfig, model: nn.Module, loss: Callable[[], Any], free: int
) -> tuple[FinetuneConfig, str | None]:
    """The settings with a policy in the place of auto, and a sentence that says which and why; None if nothing was chosen.

    Args: model: with its weights, or on the meta device; loss: of the longest batch; free: bytes beside the weights.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    narrow = [p for p in trained if DEFAULTS.get(p.dtype) == "master"]
    log, cls = log_to_continue(config), method(config.optimizer)
    if "precision" not in cls.common:
        return config, None
    if log is None:
        check_used(config.precision, trained)
    if config.precision != "auto" or not narrow:
        return config, None
    if log is not None:
        began = scan(log).header["settings"]["precision"]
        if began == "auto" and cls.precisions:
            raise UserError(
                f"{log} cannot be continued: it was begun by an earlier version of metazo, in which {config.optimizer} had no "
                "float32 masters of narrower weights; resume it with that version, or start it again."
            )
        return replace(config, precision=began), f"{began}, as when the run began."
    if cls.precisions:
        return replace(config, precision="master"), f"master ({POLICIES['master'].note})."
    with torch.inference_mode(), Followed() as forward:
        loss()
    order = ORDER if all(p.is_contiguous() for p in narrow) else ORDER[:1]  # compensated weights are contiguous
    needed = {name: _needed(replace(config, precision=name), model, forward.most) for name in order}
    fits = [name for name in order if needed[name] <= SHARE * free]
    taken = fits[0] if fits else order[-1]
    amounts = ", ".join(f"{name} {size(needed[name])}" for name in order[: order.index(taken) + 1])
    why = f"{taken} ({POLICIES[taken].note}): beside the weights {amounts}; {size(free)} are free."
    if not fits:
        why += " None of them fits: train adapters (`adapter='lora'`), which need no memory beside inference."
    return replace(config, precision=taken), why


def _needed(config: FinetuneConfig, model: nn.Module, activations: int) -> int:
    """Bytes of a method's state under a policy, of the largest copy that a probe makes, and of the activations of the probes
    that are evaluated at once, without allocating them.
    """
    twin = _Twin(model)
    if method(config.optimizer).needs_model:
        trained = [p for p in twin.parameters() if p.requires_grad]
        return activations + sum(POLICIES[config.precision].bytes * p.numel() for p in trained)
    optimizer = build_optimizer(config, twin)
    together = getattr(optimizer, "probing", "in-turn") == "together"
    at_once = len(optimizer.estimator.probes()) if together else 1
    return at_once * activations + state_bytes(optimizer) + scratch_bytes(optimizer)


class _Twin(nn.Module):
    """The parameters of a model by name, on the meta device."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.named = [
            (name, nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad))
            for name, p in model.named_parameters()
        ]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return iter(self.named)

    def parameters(self, recurse: bool = True) -> Any:
        return (p for _, p in self.named)
