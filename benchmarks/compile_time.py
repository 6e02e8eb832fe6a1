"""How long the loops of noise take to compile, and how fast they are, if a chunk's functions are inlined by LLVM or by numba.

    python benchmarks/compile_time.py        # five minutes on an old processor; nothing else should run

Each sample is a process of its own with an empty cache and one thread. Seconds are of the processor, rates the best of 40
calls on 262,144 weights; the forms take turns. Writes medians to benchmarks/compile_time.json, and prints them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from metazo.bench.measurements import environment

FORMS = ("LLVM", "numba")
ROUNDS, CALLS, WEIGHTS = 3, 40, 1 << 18


def by_numba() -> None:
    """Lets numba inline what metazo/noise/lanes.py leaves to LLVM; called before it is imported."""
    import numba

    njit: Any = numba.njit

    def inlined(*arguments: Any, **options: Any) -> Any:
        if options.pop("forceinline", False):
            options["inline"] = "always"
        return njit(*arguments, **options)

    numba.njit = inlined


def sample() -> dict[str, float]:
    """Seconds until the loops over weights of all types are compiled, and million weights per second of two of them."""
    from metazo.noise import cpu

    torch.set_num_threads(1)
    began = time.process_time()
    rates = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        base = torch.zeros(WEIGHTS, dtype=torch.promote_types(dtype, torch.float32))
        out = base.to(dtype)
        calls: dict[str, Callable[[], Any]] = {
            "add": lambda out=out: cpu.add_("gaussian", out, 1e-3, 1.0, 1, 1, 0, 0),
            "two": lambda out=out: cpu.add_two_all_("gaussian", [(1, out, 1e-3, 1.0, 1e-3)], (1, 2), 0),
            "place": lambda out=out, base=base: cpu.place_("gaussian", out, base, 1e-3, 1, 1, 0, 0),
            "dot": lambda out=out: cpu.dot("gaussian", out, 1, 1, 0),
        }
        for call in calls.values():
            call()
        if dtype == torch.float32:
            rates = {name: calls[name] for name in ("add", "two")}
    cpu.square("gaussian", WEIGHTS, 1, 1, 0)
    found = {"seconds": time.process_time() - began}
    return found | {f"{name}, float32": rate(call) for name, call in rates.items()}


def rate(call: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(CALLS):
        began = time.process_time()
        call()
        best = min(best, time.process_time() - began)
    return WEIGHTS / best / 1e6


def main() -> None:
    if len(sys.argv) > 1:
        if sys.argv[1] == "numba":
            by_numba()
        print(json.dumps(sample()))
        return
    taken: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    for _ in range(ROUNDS):
        for form, samples in taken.items():
            with tempfile.TemporaryDirectory() as cache:
                alone = os.environ | {"NUMBA_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
                text = subprocess.run(
                    [sys.executable, __file__, form], env=alone, check=True, capture_output=True, text=True
                )
            samples.append(json.loads(text.stdout))
    found = {
        form: {key: round(median(s[key] for s in samples), 1) for key in samples[0]} for form, samples in taken.items()
    }
    print(json.dumps(found, indent=1))
    facts = {"environment": environment("cpu", "float32", False), "forms": found}
    Path(__file__).with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
