"""Scales that were learned over whole runs against the RMS rule and plain MeZO, on held-out tasks of pico.

    python benchmarks/horizon_pico.py --out benchmarks/horizon_pico.json

The search starts at the RMS rule and has runs on three other tasks. Runs, grid of rates and seeds are those of
benchmarks/rescaled_twins.py. About 3 minutes of one core.
"""

from __future__ import annotations

import json
from typing import Any

from rescaled_twins import measured, output, searched

META, TASKS = ["pico_topic", "pico_span", "pico_entail"], ["pico_sentiment", "pico_cause"]
SEARCH: dict[str, Any] = {"steps": 40, "pairs": 4, "horizon": 24, "spread": 0.3, "lr_sigma": 0.15}


def main() -> None:
    out = output(__file__, __doc__)
    tuner, content = searched("pico", META, "rms", SEARCH)
    content["results"] = {task: {} for task in TASKS}
    for task in TASKS:
        for column in ("rms", "horizon", "mezo"):
            found = measured("pico", task, column, tuner if column == "horizon" else None)
            content["results"][task][column] = found
            print(task, column, found, flush=True)
            out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
