"""Times a step of each method against two forward passes of the same closure, interleaved in one process."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metazo.bench.models import Shape, build, lm_loss
from metazo.bench.published import PublishedLoop
from metazo.bench.timing import interleaved, ratios, spread
from metazo.blocks import named_tensors, partition
from metazo.optimizers import OPTIMIZERS
from metazo.tuner.networks import PertNN
from metazo.tuner.scale import TunerScale

LR = 1e-7
FORWARDS, PASSES, PUBLISHED = "two forwards", "three plain passes", "published loop"
APART = ("7B", "8B")  # sizes at which the buffers of several methods do not fit beside each other
DOUBLE = "one forward of twice the batch"


def _ours(name: str, **extra: Any) -> Callable[[nn.Module], Any]:
    return lambda model: OPTIMIZERS[name](model.named_parameters(), lr=LR, check_loss=False, **extra)


def _zo_finetuner(model: nn.Module):
    """MeZO with a tuner of untrained networks, which costs the same as a trained one."""
    names = [block.name for block in partition(named_tensors(model))]
    scale = TunerScale(pertnn=PertNN(len(names)), networks=names)
    return OPTIMIZERS["zo-finetuner"](model.named_parameters(), lr=LR, scale=scale, check_loss=False)


METHODS: dict[str, Callable[[nn.Module], Any]] = {
    PUBLISHED: lambda model: PublishedLoop(model.named_parameters(), lr=LR),
    "MeZO": _ours("mezo"),
    "MeZO, Rademacher": _ours("mezo", noise="rademacher"),
    "LOZO, weights": _ours("lozo", form="weights"),
    "LOZO, activations": _ours("lozo", form="activations"),
    "ZO Fine-tuner": _zo_finetuner,
    "CurvZO": _ours("curvzo"),
    "MeZO-Adam": _ours("mezo-adam"),
    "LOZO-M": _ours("lozo-m"),
}
CORE = list(METHODS)[:5]
"""Methods that have targets."""
NARROW = {name: _ours("mezo", precision=name) for name in ("in-place", "master", "compensated-16", "compensated-8")}
"""MeZO under the policies for weights narrower than float32."""
OWN = {PUBLISHED, *NARROW}
"""Methods that take their steps on a copy of the model."""


def make(method: str, model: nn.Module) -> Any:
    """The optimizer of a key of METHODS or NARROW."""
    return (METHODS | NARROW)[method](model)


def measure(
    size: str,
    shape: Shape,
    methods: Sequence[str] = CORE,
    *,
    rounds: int = 5,
    seconds: float = 10.0,
    threads: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    tick: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Rows of {case, seconds, ratio}; ratio is the time over that of two forward passes, round by round.

    Methods are interleaved with each other, or each with the forward passes alone if the size is in APART. The published loop
    puts new tensors in place of the weights, which would part the waiting updates of the other methods from their next
    probes, so that it takes its steps on a copy of the model. So does each policy for narrow weights: masters, and bits kept
    below the weights, would begin anew after the steps of the others. The second of two steps in a row is timed then.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        model = build(size, dtype, device)
        loss = lm_loss(model, shape)
        floor: dict[str, Callable[[], object]] = {FORWARDS: lambda: _forwards(loss), PASSES: lambda: _passes(model)}
        if "LOZO, activations" in methods:  # the limit set by memory, with a third of the passes
            twice = lm_loss(model, (2 * shape[0], shape[1]))
            floor[DOUBLE] = lambda: _forward(twice)

        def case(name: str) -> Callable[[], object]:
            if name not in OWN or size in APART:
                return _stepping(make(name, model), loss)
            own = copy.deepcopy(model)
            return _stepping(make(name, own), lm_loss(own, shape))

        rows: dict[str, dict[str, Any]] = {}
        for group in [[name] for name in methods] if size in APART else [methods]:
            cases = floor | {name: case(name) for name in group}
            in_a_row = size not in APART and not NARROW.keys().isdisjoint(group)
            samples = interleaved(cases, rounds, seconds=seconds, device=device, twice=in_a_row, tick=tick)
            for name in cases:
                row = {"case": name, "seconds": spread(samples[name]), "ratio": spread(ratios(samples, name, FORWARDS))}
                rows.setdefault(name, row)
            if {PUBLISHED, "MeZO"} <= set(group):
                over = f"{PUBLISHED} / MeZO"
                rows[over] = {"case": over, "ratio": spread(ratios(samples, PUBLISHED, "MeZO"))}
            del cases
            gc.collect()  # an optimizer and its buffers refer to each other
    finally:
        torch.set_num_threads(before)
    return list(rows.values())


def measure_queries(
    size: str,
    shape: Shape,
    queries: Sequence[int] = (1, 2, 4),
    *,
    rounds: int = 5,
    seconds: float = 10.0,
    dtype: str = "float32",
    device: str = "cpu",
    tick: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """LOZO with several queries, and FZOO, one after the other and in one pass: rows of {case, seconds, ratio}.

    ratio: the time over that of the step's forward passes (2 per query of LOZO, 9 for FZOO), round by round.
    """
    model = build(size, dtype, device)
    loss = lm_loss(model, shape)
    cases: dict[str, Callable[[], object]] = {FORWARDS: lambda: _forwards(loss)}
    passes: dict[str, float] = {FORWARDS: 1}  # in pairs of forward passes
    for count in queries:
        for form, way in (("weights", "one after the other"), ("activations", "in one pass")):
            name = f"{count} {'query' if count == 1 else 'queries'}, {way}"
            cases[name], passes[name] = _stepping(_ours("lozo", form=form, queries=count)(model), loss), count
    members = {"dense signs, in turn": {}, "signs of rank 1, in turn": {"rank": 1, "probing": "in-turn"}}
    for way, options in (members | {"signs of rank 1, in one pass": {"rank": 1, "probing": "together"}}).items():
        cases[f"FZOO, {way}"], passes[f"FZOO, {way}"] = _stepping(_ours("fzoo", **options)(model), loss), 4.5
    samples = interleaved(cases, rounds, seconds=seconds, device=device, tick=tick)
    return [
        {
            "case": name,
            "seconds": spread(samples[name]),
            "ratio": spread([ratio / count for ratio in ratios(samples, name, FORWARDS)]),
        }
        for name, count in passes.items()
    ]


def _stepping(optimizer: Any, loss: Callable[[], Tensor]) -> Callable[[], object]:
    """A step as a run takes it, in which the update may wait for the next probe."""
    optimizer.defer = True
    return lambda: optimizer.step(loss)


@torch.inference_mode()
def _forward(loss: Callable[[], Tensor]) -> float:
    return float(loss())


@torch.inference_mode()
def _forwards(loss: Callable[[], Tensor]) -> float:
    return float(loss()) + float(loss())


@torch.no_grad()
def _passes(model: nn.Module) -> None:
    """Read and write every weight three times and do nothing else: what memory alone takes of a step in place, or three
    halves of it if the update waits for the next probe.
    """
    for _ in range(3):
        for parameter in model.parameters():
            parameter.data.mul_(1.0)
