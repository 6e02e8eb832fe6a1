"""Scales that were learned over whole runs against the RMS rule and plain MeZO, on held-out tasks of pico.

    python benchmarks/horizon_pico.py --out benchmarks/horizon_pico.json

The search starts at the RMS rule and has runs on three other tasks. Runs, grid of rates and seeds are those of
benchmarks/rescaled_twins.py. About 3 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rescaled_twins import learned, measured

META, TASKS = ["pico_topic", "pico_span", "pico_entail"], ["pico_sentiment", "pico_cause"]
SEARCH: dict[str, Any] = {"steps": 40, "pairs": 4, "horizon": 24, "spread": 0.3, "lr_sigma": 0.15}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/horizon_pico.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        tuner = learned("pico", META, "rms", Path(name) / "search", SEARCH)
    spent = time.process_time() - began
    print(f"{spent:.0f} CPU seconds of meta-training", flush=True)
    content: dict[str, Any] = {
        "search": SEARCH | {"tasks": META},
        "cpu seconds of meta-training": round(spent, 1),
        "results": {},
        "log sigma over RMS": {b.name: round(r, 3) for b, r in zip(tuner.info.blocks, tuner.pertnn.b2.tolist())},
    }
    for task in TASKS:
        for column in ("rms", "horizon", "mezo"):
            found = measured("pico", task, column, {"horizon": tuner})
            content["results"].setdefault(task, {})[column] = found
            print(task, column, found, flush=True)
            given.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
