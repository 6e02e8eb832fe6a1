"""The plan of a meta-training run of block scales: its work, and the memory and disk that it will need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from metazo.blocks import named_tensors, partition
from metazo.meta.config import MetaConfig
from metazo.meta.loop import length, order_of, restarts
from metazo.meta.order import PreparedTask
from metazo.meta.trajectory import disk_use
from metazo.runs.resources import size

UNROLLED_STEP = 4
"""Copies of the weights that each unrolled step keeps: its new weights, its noise, and the weights of L+ and L-. The outer
gradient takes 3 more, and each query leaves one until Python frees it; measured by tests/meta/test_gradient.py."""


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """Figures of a run; those in bytes have it in their name."""

    model: str
    tasks: list[str]
    steps: int
    blocks: int
    weights: int
    forwards: int
    """Forward passes of all meta-steps, and of what is run before them."""
    memory_bytes: int
    disk_bytes: int
    """Peak size of the output folder and a recording."""

    @abstractmethod
    def sentence(self) -> str:
        """The plan in words."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class PathPlan(Plan):
    """The plan of a run along a teacher's path: memory has the teacher's gradients and state, and activations (estimated)."""

    steps_per_epoch: int
    restart_steps: int
    backwards: int
    recorded: tuple[int, int, int] | None
    """Steps of the recording that the run makes first, the examples in them, and those of the tasks."""

    def sentence(self) -> str:
        restart = f", restart every {self.restart_steps}" if self.restart_steps else ""
        if self.recorded:
            steps, used, examples = self.recorded
            restart = f", along a recording of {steps} that repeats, with {used:,} of {examples:,} examples"
        return (
            f"{self.steps} meta-steps on {', '.join(self.tasks)} ({self.steps_per_epoch} an epoch{restart}), "
            f"{self.blocks} blocks of {self.weights:,} weights, {self.forwards:,} forward and {self.backwards:,} "
            f"backward passes; about {size(self.memory_bytes)} of memory, {size(self.disk_bytes)} of disk."
        )


def make_plan(config: MetaConfig, model: nn.Module, tasks: Sequence[PreparedTask]) -> PathPlan:
    """The plan of a run. Activations are estimated for a transformer that keeps about 20 numbers per channel and layer."""
    tensors, order = named_tensors(model), order_of(config, tasks)
    weights = sum(tensor.param.numel() for tensor in tensors)
    item = tensors[0].param.itemsize
    held = weights * item
    total, restart = length(config, order), restarts(config, order)
    recorded = config.record is not None or config.trajectory is not None
    moments = {"sgd": 1, "adamw": 2}[config.teacher]
    if config.objective == "ratio":
        forwards, backwards, extra = 1, 3, 1
    else:
        unrolled = UNROLLED_STEP * config.unroll + 3 + config.queries if config.unroll > 1 else 0
        forwards, backwards, extra = 2 * config.unroll * config.queries, config.queries, unrolled
    teacher = 0 if config.trajectory is not None else 1
    longest = max((len(example) for task in tasks for example in task.prepared.train), default=1)
    copies = 1 + moments * teacher + max(teacher, extra)  # weights, moments, and gradients or what the meta-step holds
    memory = held * copies + _activations(model, config.batch_size, longest) * item
    state = held * (1 + (0 if recorded else moments))
    disk = 3 * state + (0 if recorded else held)  # two snapshots, and one that is being written
    if config.record is not None:
        disk += disk_use(tensors, config.teacher, restart or total, config.record_every)
    passes, path = 0 if recorded else total, None
    if config.record is not None:
        passes = restart or total
        used = {(task, example) for task, rows in map(order.batch, range(passes)) for example in rows}
        path = (passes, len(used), sum(map(len, tasks)))
    return PathPlan(
        model=config.model,
        tasks=[task.name for task in tasks],
        steps=total,
        steps_per_epoch=order.steps_per_epoch,
        restart_steps=restart,
        blocks=len(partition(tensors, config.blocks)),
        weights=weights,
        forwards=total * (forwards + backwards) + passes,
        backwards=total * backwards + passes,
        recorded=path,
        memory_bytes=memory,
        disk_bytes=disk,
    )


def _activations(model: nn.Module, batch: int, longest: int) -> int:
    """Rough number of values kept for a backward pass."""
    config = getattr(model, "config", None)
    if config is None:
        return 0
    text = config.get_text_config()
    width, layers = getattr(text, "hidden_size", 0), getattr(text, "num_hidden_layers", 0)
    heads, vocabulary = getattr(text, "num_attention_heads", 0), getattr(text, "vocab_size", 0)
    return batch * (longest * width * 20 * layers + longest * longest * heads * layers + vocabulary)
