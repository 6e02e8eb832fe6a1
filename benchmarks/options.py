"""The time of a forward pass over a training batch whose options share their prompt, against a row for each option.

Tasks whose options have several tokens, with a causal model; one thread; every round times each form of each task once.

python benchmarks/options.py --model MODEL --data DATA --out benchmarks/options.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from metazo.bench.measurements import environment
from metazo.models.load import LoadedModel, load_model
from metazo.tasks import Prepared, prepare, resolve
from metazo.tasks.options import arranged
from metazo.tasks.prepared import Batch

TASKS = ("copa", "ag_news", "snips", "clinc150", "banking77")
BATCH, LENGTH = 16, 128
FORMS = ("one row per prompt", "one row per option")


def batch_of(task: str, loaded: LoadedModel, data: Path) -> tuple[Prepared, Batch]:
    folder = data / "text" if (data / "text" / task).is_dir() else data
    ready = prepare(resolve(task), loaded, data=folder, train=BATCH, dev=0, test=0, max_length=LENGTH)
    return ready, ready.collate(ready.train, every_option=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal model that `metazo.tasks.options` knows")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of <task>/<split>.jsonl, some in a folder text"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(given.model)
    kind = loaded.model.config.model_type
    cases = {name: batch_of(name, loaded, given.data) for name in TASKS}
    taken: dict[str, dict[str, list[float]]] = {name: {form: [] for form in FORMS} for name in TASKS}
    tokens: dict[str, dict[str, int]] = {name: {} for name in TASKS}
    with torch.inference_mode():
        for number in range(given.rounds + 1):
            for name, (ready, batch) in cases.items():
                for form in FORMS:
                    config: Any = loaded.model.config
                    config.model_type = kind if form == FORMS[0] else "unknown"
                    started = time.perf_counter()
                    ready.scores(loaded.model, batch)
                    if number:
                        taken[name][form].append(time.perf_counter() - started)
                    tokens[name][form] = arranged(loaded.model, batch).inputs["input_ids"].numel()
    rows = {}
    for name, times in taken.items():
        ratio = statistics.median(other / own for own, other in zip(times[FORMS[0]], times[FORMS[1]], strict=True))
        seconds = {form: round(statistics.median(times[form]), 4) for form in FORMS}
        options = len(cases[name][1]["answer"]) / BATCH
        rows[name] = {"options": options, "tokens": tokens[name], "seconds": seconds, "ratio": round(ratio, 2)}
        print(
            f"{name}: {options:g} options, {seconds[FORMS[1]]:.3f} s and {seconds[FORMS[0]]:.3f} s, ratio {ratio:.2f}"
        )
    if given.out:
        result = {"environment": environment("cpu", "float32", False), "batch": BATCH, "tasks": rows}
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
