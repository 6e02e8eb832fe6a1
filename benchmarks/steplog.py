"""What the step log costs: bytes and microseconds a step, hashing, and replay against the run it repeats.

Times are of the processor (one thread), so that other work on the machine does not count; of syncs, on the clock.

python benchmarks/steplog.py --out benchmarks/steplog.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metazo.io.tensorfile import weights_hash
from metazo.optimizers import OPTIMIZERS, ZOOptimizer
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.replay import replay
from metazo.runs.setup import set_up
from metazo.settings import build
from metazo.step.record import Step
from metazo.steplog.format import encode, line
from metazo.steplog.writer import StepLog
from metazo.tuner.networks import PertNN
from metazo.tuner.scale import TunerScale

RUN = 20_000  # steps that sizes are stated for
TIMED = ("mezo", "fzoo", "zo-finetuner", "lozo-m")
COUNT = 50  # records measured a method


def records(name: str, count: int = COUNT) -> list[Step]:
    """Steps of a method with float32 losses, numbered as at the end of a long run."""
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    extra: dict[str, Any] = {"scale": TunerScale(pertnn=PertNN(4, seed=0))} if OPTIMIZERS[name].needs_tuner else {}
    optimizer = OPTIMIZERS[name](model.named_parameters(), lr=1.23e-5, check_loss=False, **extra)

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(model(x), y)

    if optimizer.wants_full_closure:
        optimizer.full_closure = loss  # type: ignore[attr-defined]
    found: list[Step] = []
    optimizer.recorder = found.append
    for _ in range(count):
        optimizer.step(loss)
    return [Step(RUN // 2 + s.step, s.seeds, s.losses, s.coefficients, s.lr) for s in found]


def sizes() -> dict[str, dict[str, float]]:
    found = {}
    for name in OPTIMIZERS:
        data = b"".join(line(encode(step), step.seeds[0] % 2**32)[0] for step in records(name))
        found[name] = {
            "bytes a step": len(data) / COUNT,
            f"MB for {RUN:,} steps": round(len(data) / COUNT * RUN / 1e6, 2),
        }
    return found


def append_microseconds(folder: Path, fsync_every: int, count: int) -> float:
    """The median of `count` appends, in which a sync counts in full."""
    log = StepLog(folder / f"log{fsync_every}", {"weights": "x"}, fsync_every=fsync_every)
    clock = time.perf_counter if fsync_every else time.process_time
    took = []
    for i in range(count):
        step = Step(i, (7_000_000_000_000_000_000,), (0.1 + i / 3, 0.7), (1 / 3,), (1e-6,))
        began = clock()
        log.append(step)
        took.append(clock() - began)
    log.close()
    return statistics.median(took) * 1e6


def hash_speed() -> float:
    """GB a second and core."""
    tensors = [(f"layer{i}", torch.randn(4_000_000)) for i in range(16)]
    began = time.process_time()
    weights_hash(tensors)
    return 16 * 16e6 / (time.process_time() - began) / 1e9


def speeds(method: str, folder: Path, steps: int = 20) -> dict[str, float]:
    """Milliseconds a step with forward passes (batch 16) and in a replay, pico."""
    settings = {
        "model": "pico", "task": "pico_sentiment", "out": folder / method, "optimizer": method, "lr": 1e-5, "steps": steps,
        "train_examples": 64, "dev_examples": 0, "test_examples": 0, "keep": "last",
    }  # fmt: skip
    config = build(FinetuneConfig, settings, {"tuner": "random:1" if method == "zo-finetuner" else None})
    setup = set_up(config)
    optimizer, prepared, model = setup.optimizer, setup.rows, setup.loaded.model
    assert isinstance(optimizer, ZOOptimizer)
    batch = prepared.collate(prepared.train[:16])
    run = [time.process_time()]
    for _ in range(steps):
        optimizer.step(lambda: prepared.loss(model, batch))
        run.append(time.process_time())
    run_settings(config)
    again: list[float] = []
    done = replay(folder / method / "steps.jsonl", "pico", tick=lambda step, total: again.append(time.process_time()))
    assert done.identical and done.steps == steps
    live, replayed = (statistics.median(b - a for a, b in pairwise(times)) * 1e3 for times in (run, again))
    return {"run": live, "replay": replayed, "times as fast": live / replayed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name)
        found = {
            "machine": {"processor": platform.machine(), "torch": torch.__version__, "threads": 1},
            "sizes": sizes(),
            "append, microseconds": {
                "handed to the operating system": append_microseconds(folder, 0, 5000),
                "and synced to the disk": append_microseconds(folder, 1, 300),
            },
            "hash, GB a second and core": hash_speed(),
            "pico, batch 16, milliseconds a step": {method: speeds(method, folder) for method in TIMED},
        }
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
