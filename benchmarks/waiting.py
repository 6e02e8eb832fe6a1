"""A MeZO step beside other work on the machine, by how the threads of torch wait for each other.

    python benchmarks/waiting.py        # 20 minutes; nothing else should run

Threads that wait actively (OpenMP's default) use the time that the thread they wait for needs. Each sample is a process of its
own; settings take turns. Cases are pico at (16, 24) and a Llama of 134 million weights at (1, 32) and (8, 64). Writes medians
with quartiles to benchmarks/waiting.json, beside those of other processors, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from metazo.bench.measurements import environment, same_processor
from metazo.bench.models import build, lm_loss
from metazo.bench.timing import spread
from metazo.models.load import load_model
from metazo.optimizers import MeZO

SETTINGS = {
    "active": {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": ""},
    "briefly": {"GOMP_SPINCOUNT": "2000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
CASES = {"pico": ("pico", (16, 24)), "134M (1, 32)": ("134M", (1, 32)), "134M (8, 64)": ("134M", (8, 64))}
BUSY = (0, 3)
"""Number of other processes, of one thread each."""


def sample(case: str, seconds: float) -> float:
    """Seconds per step of this process."""
    size, shape = CASES[case]
    model = load_model("pico").model if size == "pico" else build(size)
    loss = lm_loss(model, shape)  # type: ignore[arg-type]
    optimizer = MeZO(model.named_parameters(), lr=1e-6, seed=0, check_loss=False)
    optimizer.step(loss)
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        optimizer.step(loss)
        steps += 1
    return (time.perf_counter() - began) / steps


def measured(case: str, setting: str, seconds: float) -> float:
    told = {key: value for key, value in (os.environ | SETTINGS[setting]).items() if value}
    words = [sys.executable, __file__, "--case", case, "--seconds", str(seconds)]
    return float(subprocess.run(words, env=told, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--case", choices=CASES, help="measure this case in this process alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/waiting.json"))
    given = parser.parse_args()
    if given.case:
        torch.manual_seed(0)
        print(sample(given.case, given.seconds))
        return
    rows = []
    print(f"| case | other processes | {' | '.join(SETTINGS)} |\n|---|---|{'---|' * len(SETTINGS)}")
    for case in CASES:
        for busy in BUSY:
            busy_ones = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
            try:
                found: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
                for _ in range(given.rounds):
                    for setting, samples in found.items():
                        samples.append(measured(case, setting, given.seconds))
            finally:
                for other in busy_ones:
                    other.kill()
            row = {
                "case": case,
                "others": busy,
                "seconds": {setting: spread(samples) for setting, samples in found.items()},
            }
            rows.append(row)
            cells = [f"{1e3 * value['median']:.0f} ms" for value in row["seconds"].values()]
            print(f"| {case} | {busy} | {' | '.join(cells)} |", flush=True)
    own = {"environment": environment("cpu", "float32", False), "rows": rows}
    before = json.loads(given.out.read_text())["machines"] if given.out.exists() else []
    others = [machine for machine in before if not same_processor(machine["environment"], own["environment"])]
    text = json.dumps({"machines": [*others, own]})
    given.out.write_text(text.replace('{"case"', '\n{"case"') + "\n")


if __name__ == "__main__":
    main()
