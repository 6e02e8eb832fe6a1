"""The measurements and their order: suites are divided into parts, and each part is written when it is finished."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from metazo.bench import kernels, measurements, memory, meta, steps
from metazo.bench.models import Shape
from metazo.errors import UserError

SHAPES: tuple[Shape, ...] = ((1, 32), (8, 64), (16, 128))
LARGE = (
    "369M",
    "1B",
    "1.3B",
    "7B",
    "8B",
)  # a step of the published loop would take longer than all other cases together

Rows = list[dict[str, Any]]
Measurement = Callable[..., Rows]
"""Called with tick, a function to be called after every measured case."""


@dataclass(frozen=True)
class Settings:
    """quick: a small model and one shape, as a check; rounds: least number of rounds per median."""

    quick: bool = False
    device: str = "cpu"
    rounds: int = 5

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.cuda else "float32"

    @property
    def size(self) -> str:
        return "1M" if self.quick else "134M"

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return SHAPES[:1] if self.quick else SHAPES

    @property
    def seconds(self) -> float:
        """Time that a measurement takes at least."""
        return 0.0 if self.quick else 10.0

    @property
    def threads(self) -> list[int]:
        """Thread counts to compare; quick: torch's own; on a GPU they do not matter."""
        cores = os.cpu_count() or 1
        return [1] if self.cuda else [torch.get_num_threads()] if self.quick else sorted({1, min(2, cores), cores})


@dataclass(frozen=True)
class Part:
    """A part of a suite that runs without interruption."""

    suite: str
    name: str
    run: Measurement


def _timed(s: Settings, size: str, shape: Shape, methods: Sequence[str], **how: Any) -> Measurement:
    how = {"rounds": s.rounds, "seconds": s.seconds, "dtype": s.dtype, "device": s.device} | how
    return partial(steps.measure, size, shape, methods, **how)


def _core(size: str) -> list[str]:
    return [name for name in steps.CORE if name != steps.PUBLISHED or size not in LARGE]


def _steps(s: Settings) -> dict[str, Measurement]:
    sizes = ("134M", "1.3B", "8B") if s.cuda and not s.quick else (s.size,)
    made = {}
    for size in sizes:
        for shape in s.shapes:
            methods = list(steps.METHODS) if shape == SHAPES[0] and not s.cuda else _core(size)
            made[f"{size}-{shown(shape)}"] = _timed(s, size, shape, methods)
    return made


def _kernels(s: Settings) -> dict[str, Measurement]:
    entries = 1 << (20 if s.quick else 25)
    how = {"rounds": s.rounds, "device": s.device}
    return {plural(threads): partial(kernels.measure, threads, entries, **how) for threads in s.threads}


def _memory(s: Settings) -> dict[str, Measurement]:
    size, methods = ("10M", ["MeZO", memory.FIRST_ORDER]) if s.quick else (s.size, memory.MEASURED)
    made = {
        f"{size}-{shown(shape)}": partial(memory.measure, size, shape, methods, dtype=s.dtype, device=s.device)
        for shape in s.shapes[:2]
    }
    if not s.quick:
        narrow = partial(memory.measure, size, SHAPES[0], list(steps.NARROW), dtype="bfloat16", device=s.device)
        made[f"{size}-{shown(SHAPES[0])}-bfloat16"] = narrow
        if s.cuda:
            whole = partial(memory.measure, "7B", SHAPES[0], list(steps.NARROW), dtype="bfloat16", device=s.device)
            made[f"7B-{shown(SHAPES[0])}-bfloat16"] = whole
    return made


def _meta(s: Settings) -> dict[str, Measurement]:
    how = {"rounds": s.rounds, "seconds": s.seconds, "device": s.device}
    return {f"{s.size}-{shown(shape)}": partial(meta.measure, s.size, shape, **how) for shape in s.shapes[:2]}


def _scaling(s: Settings) -> dict[str, Measurement]:
    sizes = (s.size,) if s.quick else ("1M", "10M", "134M", "369M", "1B")
    return {} if s.cuda else {f"{x}-{shown(SHAPES[0])}": _timed(s, x, SHAPES[0], _core(x)) for x in sizes}


def _threads(s: Settings) -> dict[str, Measurement]:
    methods = [name for name in steps.CORE if name != steps.PUBLISHED]
    return {
        f"{plural(threads)}-{shown(shape)}": _timed(s, s.size, shape, methods, threads=threads)
        for shape in s.shapes[:2]
        for threads in ([] if s.cuda else s.threads)
    }


def _queries(s: Settings) -> dict[str, Measurement]:
    shapes = s.shapes if s.quick else ((1, 32), (2, 64), (8, 64))
    how = {"rounds": s.rounds, "seconds": s.seconds, "dtype": s.dtype, "device": s.device}
    return {f"{s.size}-{shown(shape)}": partial(steps.measure_queries, s.size, shape, **how) for shape in shapes}


def _precision(s: Settings) -> dict[str, Measurement]:
    methods, sizes = list(steps.NARROW), (s.size, "7B") if s.cuda and not s.quick else (s.size,)
    return {
        f"{size}-{shown(x)}-bfloat16": _timed(s, size, x, methods, dtype="bfloat16")
        for size in sizes
        for x in s.shapes[:2]
    }


SUITES = {
    "steps": _steps, "kernels": _kernels, "memory": _memory, "precision": _precision, "meta": _meta, "scaling": _scaling,
    "threads": _threads, "queries": _queries,
}  # fmt: skip


def parts(s: Settings) -> list[Part]:
    """All parts that can be measured with these settings."""
    return [Part(suite, name, run) for suite, make in SUITES.items() for name, run in make(s).items()]


def shown(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


def plural(threads: int) -> str:
    return f"{threads}-thread{'s' * (threads > 1)}"


def selected(made: Sequence[Part], wanted: Sequence[str]) -> list[Part]:
    """The parts of these suites, or single parts as SUITE/PART; all parts if none is named. Raises UserError."""
    names = {part.suite for part in made} | {f"{part.suite}/{part.name}" for part in made}
    for name in wanted:
        if name not in names:
            suite = name.split("/")[0]
            near = sorted(f"{part.suite}/{part.name}" for part in made if part.suite == suite)
            raise UserError(
                f"`suite` {name!r} is not measured here: choose {', '.join(near or (*SUITES, 'feedback'))}."
            )
    return [p for p in made if not wanted or p.suite in wanted or f"{p.suite}/{p.name}" in wanted]


def run(
    chosen: Sequence[Part],
    out: Path,
    settings: Settings,
    *,
    start: Callable[[Part], None] = lambda part: None,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure the parts in order and write them to out/speed.json, which keeps its other parts. Returns its new content.

    start: called before each part; tick: called after every measured case. Raises UserError if speed.json holds figures
    of this processor with other versions.
    """
    path = out / measurements.NAME
    environment = measurements.environment(settings.device, settings.dtype, settings.quick)
    result, here = measurements.opened(path, environment)
    for part in chosen:
        start(part)
        before = measurements.load_average()
        rows = part.run(tick=tick)
        when = {
            "date": measurements.now(),
            "threads": torch.get_num_threads(),
            "load": [before, measurements.load_average()],
        }
        here["suites"].setdefault(part.suite, {})[part.name] = {**when, "rows": rows}
        measurements.write(path, result)
    return result
