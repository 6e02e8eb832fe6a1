"""A demonstration on the embedded model: meta-train a tuner, publish it, fine-tune other tasks with it and with MeZO."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metazo import zoo
from metazo.errors import UserError
from metazo.io.files import write_whole
from metazo.io.lock import NAME as LOCK
from metazo.io.lock import FolderLock
from metazo.io.terminal import Console
from metazo.meta.config import MetaConfig
from metazo.meta.train import meta_train
from metazo.plots.curves import plot_curves
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.folder import RunFolder
from metazo.runs.resources import refuse_ranks

MARKER = "demo.json"
META_TASK = "pico_span"
BOUND = 0.5  # bound on the exponent of sigma: on pico the default, log 3, allows too large a distance from the RMS rule
TASKS = ("pico_sentiment", "pico_topic")
# One learning rate a method, for both tasks, a step below divergence on another seed (benchmarks/learning_rates.json).
LEARNING_RATES = {"mezo": 3e-4, "mezo, RMS scale": 2.1e-4, "tuner": 1.5e-4}


@dataclass
class Demo:
    """The results and files of the demo."""

    runs: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Summary by task and method."""
    written: dict[str, Path] = field(default_factory=dict)
    """Paths of the written files, by description."""


def run_demo(out: Path, console: Console, *, forwards: int = 1000, meta_steps: int = 200, seed: int = 0) -> Demo:
    """Run the main job into `out`. Raises UserError if the folder holds something or is in use."""
    refuse_ranks("demo")
    FolderLock(out).check()
    if out.exists() and any(path.name != LOCK for path in out.iterdir()):
        raise UserError(
            f"`out` {out} is not empty; choose another folder, or replace a former demo with `overwrite=True`."
        )
    with FolderLock(out):
        return _run(out, console, forwards, meta_steps, seed)


def _run(out: Path, console: Console, forwards: int, meta_steps: int, seed: int) -> Demo:
    write_whole(out / MARKER, json.dumps({"forwards": forwards, "meta_steps": meta_steps, "seed": seed}).encode())
    demo = Demo()
    console.rule(f"1  meta-train a tuner for pico on {META_TASK}")
    meta_train(MetaConfig("pico", [META_TASK], out / "meta", steps=meta_steps, bound=BOUND, seed=seed), console=console)
    console.rule("2  publish it into a zoo of one's own")
    name = zoo.push(out / "meta" / "tuner.safetensors", out / "zoo", base="pico")
    console.print(f"{name} is in {out / 'zoo'}")
    settings = {"mezo": {}, "mezo, RMS scale": {"scale": "rms"}, "tuner": {"tuner": name, "zoo": out / "zoo"}}
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for number, task in enumerate(TASKS, start=3):
        console.rule(f"{number}  fine-tune on {task}, {forwards:,} forward passes each")
        demo.runs[task], curves[task] = {}, {}
        for method, extra in settings.items():
            folder = out / task / method.replace(", ", "-").replace(" ", "-")
            console.print(method, style="bold")
            config = FinetuneConfig(
                model="pico", task=task, out=folder, lr=LEARNING_RATES[method], forwards=forwards, seed=seed,
                dev_examples=200, test_examples=500, snapshot_every=0, **extra,
            )  # fmt: skip
            demo.runs[task][method] = run_settings(config, console)
            records = RunFolder.read_records(folder)
            curves[task][method] = [(record["forwards"], record["dev"]["loss"]) for record in records]
            demo.written[f"{task}, {method}"] = folder
    plot = out / "demo.png"
    title = f"pico: a tuner meta-trained on {META_TASK}, used on two other tasks"
    plot_curves(curves, plot, x="forward passes over a batch of 16", y="loss on dev (nats)", title=title)
    demo.written = {"plot": plot, "tuner": out / "meta", "zoo": out / "zoo"} | demo.written
    return demo


def clear(out: Path) -> None:
    """Remove a former demo; nothing else. Raises UserError for a folder that is not one."""
    FolderLock(out).check()
    if out.exists():
        if not (out / MARKER).is_file():
            raise UserError(f"`overwrite=True`: {out} holds no former demo (no {MARKER}), so it is left alone.")
        shutil.rmtree(out)
