"""What explicit vectors gain: noise made by them (metazo/noise/wide.py), and added without a buffer (wide_weights.py).

The same passes over 1,048,576 weights in three processes, by turns on one core: by vectors; by vectors through a buffer; and
by the loops of which LLVM makes vectors (lanes.py), through a buffer. Nanoseconds per weight, the least of eight passes, and
the ratios of the first to the others, round by round. It says nothing on a processor without registers of 256 bits.

python benchmarks/sums_by_vectors.py --out benchmarks/sums_by_vectors.json      # two minutes
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import torch

from metazo.bench.measurements import environment, same_processor

WEIGHTS, ROUNDS, REPEATS = 1 << 20, 31, 8
COUNTER = 7, 3, 1  # seed, tensor, purpose


def passes() -> dict[str, Callable[[], None]]:
    """The passes by name; the kernels are imported here, in the process that runs them."""
    from metazo.noise import cpu, cpu_split

    base = torch.randn(WEIGHTS)
    found: dict[str, Callable[[], None]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name, w = str(dtype).removeprefix("torch."), base.to(dtype)
        out = torch.empty_like(w)
        found[f"w += a z, {name}"] = lambda w=w: cpu.add_("gaussian", w, 1e-3, 1.0, *COUNTER, 0)
        if dtype == torch.float32:
            continue
        found[f"w = master + a z, {name}"] = lambda out=out: cpu.place_("gaussian", out, base, 1e-3, *COUNTER, 0)
        for bits in (torch.int16, torch.int8):
            low, kind = torch.zeros(WEIGHTS, dtype=bits), f"{name}, compensated-{torch.iinfo(bits).bits}"
            found[f"probe = w + a z, {kind}"] = lambda out=out, w=w, low=low: cpu_split.place_(
                "gaussian", out, w, low, 1e-3, *COUNTER, 0
            )
            found[f"w += a z, {kind}"] = lambda w=w, low=low: cpu_split.add_(
                "gaussian", w, low, 1e-3, 1.0, *COUNTER, 0, 5
            )
    return found


FORMS = {"by vectors": (True, True), "through a buffer": (True, False), "by loops": (False, False)}
"""Whether noise is made by explicit vectors, and whether it is added by them."""


def serve(asked: Connection, form: str, core: int) -> None:
    """Answer the name of a pass with the nanoseconds per weight that it takes."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    from metazo.noise import lanes, wide_weights

    made, added = FORMS[form]
    lanes.WIDE, wide_weights.WIDE = lanes.WIDE and made, wide_weights.WIDE and added
    known = passes()
    while (name := asked.recv()) is not None:
        taken = []
        for _ in range(REPEATS):
            begun = perf_counter()
            known[name]()
            taken.append(perf_counter() - begun)
        asked.send(1e9 * min(taken) / WEIGHTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    context, asked = multiprocessing.get_context("spawn"), {}
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    forms = list(FORMS)
    with tempfile.TemporaryDirectory() as caches:
        for form in forms:  # each with compiled loops of its own
            os.environ["NUMBA_CACHE_DIR"] = str(Path(caches, form))
            asked[form], answer = context.Pipe()
            context.Process(target=serve, args=(answer, form, core), daemon=True).start()
        rows = {}
        for name in passes():
            taken: dict[str, list[float]] = {form: [] for form in forms}
            for number in range(ROUNDS + 1):
                for form in forms if number % 2 else forms[::-1]:
                    asked[form].send(name)
                    nanoseconds = asked[form].recv()
                    if number:  # the first round compiles
                        taken[form].append(nanoseconds)
            rows[name] = {f"{form}, ns": round(median(taken[form]), 3) for form in forms}
            for other in forms[1:]:
                ratios = [one / two for one, two in zip(taken[forms[0]], taken[other])]
                rows[name][f"ratio to {other} (quartiles)"] = [round(value, 3) for value in quantiles(ratios, n=4)]
            print(name, rows[name], flush=True)
        for pipe in asked.values():
            pipe.send(None)
    here = {"environment": environment("cpu", "float32", False), "rows": rows}
    before = json.loads(out.read_text())["machines"] if out.exists() else []
    others = [each for each in before if not same_processor(each["environment"], here["environment"])]
    found = {"threads": 1, "rounds": ROUNDS, "repeats": REPEATS, "machines": [*others, here]}
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
