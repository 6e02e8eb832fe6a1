"""What is measured, in which order: suites cut into parts, each written down as soon as it is finished."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from metazo.bench import kernels, memory, meta, results, steps
from metazo.bench.models import Shape
from metazo.errors import UserError

SUITES = ("steps", "kernels", "memory", "meta", "scaling", "threads")
SHAPES: tuple[Shape, ...] = ((1, 32), (8, 64), (16, 128))
MOST_PUBLISHED = 2e8  # weights; beyond, a step of the published loop takes longer than all the rest together

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """quick: small models and one shape, to see that it works; rounds: at least so many per case."""

    quick: bool = False
    device: str = "cpu"
    rounds: int = 5

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device.startswith("cuda") else "float32"


@dataclass(frozen=True)
class Part:
    """A piece of a suite that runs in one go. `run` gets a function to call after every measured case."""

    suite: str
    name: str
    run: Callable[[Callable[[], None]], Rows]


def parts(s: Settings) -> list[Part]:
    """Everything there is to measure with these settings."""
    cuda = s.device.startswith("cuda")
    size = "1M" if s.quick else "134M"
    shapes = SHAPES[:1] if s.quick else SHAPES
    seconds = 0.0 if s.quick else 10.0
    made: list[Part] = []

    def add(suite: str, name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        made.append(Part(suite, name, lambda tick: partial(function, *arguments, **options)(tick=tick)))

    step = partial(steps.measure, rounds=s.rounds, seconds=seconds, dtype=s.dtype, device=s.device)
    for each in ("1M",) if s.quick else ("134M", "1.3B", "8B") if cuda else ("134M",):
        for shape in shapes:
            every = not cuda and shape != SHAPES[-1]
            add("steps", f"{each}-{shown(shape)}", step, each, shape, list(steps.METHODS) if every else own(each))
    cores = os.cpu_count() or 1
    counts = [1] if cuda else sorted({1, min(2, cores), cores})
    for threads in counts:
        entries = 1 << (20 if s.quick else 25)
        add("kernels", f"{threads}-thread", kernels.measure, threads, entries, rounds=s.rounds, device=s.device)
    for shape in shapes[:2]:
        for method in memory.MEASURED[:3] if s.quick else memory.MEASURED:
            name = f"{shown(shape)}-{method}"
            made.append(Part("memory", name, partial(_memory, method, "10M" if s.quick else size, shape, s)))
    for shape in shapes[:2]:
        add("meta", f"{size}-{shown(shape)}", meta.measure, size, shape, rounds=s.rounds, device=s.device)
    if cuda:
        return made
    for each in ("1M",) if s.quick else ("1M", "10M", "134M", "369M", "1B"):
        add("scaling", f"{each}-{shown(SHAPES[0])}", step, each, SHAPES[0], own(each))
    for shape in shapes[:2]:
        for threads in counts:
            add("threads", f"{threads}-{shown(shape)}", step, size, shape, own("1B"), threads=threads)
    return made


def shown(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


def own(size: str) -> list[str]:
    """The methods of the targets, with the published loop where the model is small enough for it."""
    return [name for name in steps.CORE if name != steps.PUBLISHED or steps.parameters(size) < MOST_PUBLISHED]


def _memory(method: str, size: str, shape: Shape, s: Settings, tick: Callable[[], None]) -> Rows:
    row = memory.measure(method, size, shape, s.dtype, s.device)
    tick()
    return [row]


def selected(made: Sequence[Part], wanted: Sequence[str]) -> list[Part]:
    """The parts of these suites, or single ones as SUITE/PART; all where nothing is named. Raises UserError."""
    names = {part.suite for part in made} | {f"{part.suite}/{part.name}" for part in made}
    for name in wanted:
        if name not in names:
            suite = name.split("/")[0]
            near = sorted(f"{part.suite}/{part.name}" for part in made if part.suite == suite)
            raise UserError(f"--suite {name!r} is not measured here: choose {', '.join(near or SUITES)}.")
    return [p for p in made if not wanted or p.suite in wanted or f"{p.suite}/{p.name}" in wanted]


def run(
    chosen: Sequence[Part],
    out: Path,
    settings: Settings,
    *,
    start: Callable[[Part], None] = lambda part: None,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure the parts in order into out/speed.json, keeping other parts that it has. Returns what it then holds.

    start: called ahead of each part; tick: after every measured case. Raises UserError where speed.json holds figures
    of another machine, version or setting.
    """
    path = out / results.NAME
    environment = results.environment(settings.device, settings.dtype, settings.quick)
    result = results.opened(path, environment)
    for part in chosen:
        start(part)
        before = results.load_average()
        rows = part.run(tick)
        when = {"date": results.now(), "threads": torch.get_num_threads(), "load": [before, results.load_average()]}
        result["suites"].setdefault(part.suite, {})[part.name] = {**when, "rows": rows}
        results.write(path, result)
    return result
