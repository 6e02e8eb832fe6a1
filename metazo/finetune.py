"""Fine-tune a model on a task: the loop, readable top to bottom."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import metazo
from metazo.adapters import load_adapters
from metazo.config import FinetuneConfig
from metazo.errors import UserError
from metazo.evaluate import evaluate
from metazo.losses import BatchLoss
from metazo.optimizers import ZOOptimizer
from metazo.optimizers.first_order import FirstOrder
from metazo.plan import Setup, set_up
from metazo.report import plot_run
from metazo.run import Interrupted, RunFolder, batch_indices, interruptible, peak_memory, require_space
from metazo.steplog import StepLog

# Settings that say where and how often, not what: a run may be resumed with others.
INCIDENTAL = ("out", "resume", "snapshot_every", "eval_batch_size", "device", "zoo", "data")
# Learning rate over the run, as a share of --lr, by the share of the run that is done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}
LOSSES_IN_A_ROW = 10  # steps in a row whose loss is not finite, before the run gives up


def finetune(config: FinetuneConfig, console: Console | None = None) -> dict[str, Any]:
    """Run, or go on with, the fine-tuning that `config` describes; see FinetuneConfig.

    Returns the summary that is also written to summary.json. Raises UserError for bad input before anything is
    written, and Interrupted, with the run saved, where it was asked to stop.
    """
    console = console or Console(quiet=True)
    setup = set_up(config)
    plan = setup.plan(config)
    require_space(config.out, plan["bytes on disk"], "The run")
    settings = {key: value for key, value in asdict(config).items() if key not in INCIDENTAL}
    if not config.resume:
        _first_loss(setup, config)
    folder = RunFolder(config.out, settings, config.resume)
    for name in ("trained weights", "effective learning rate", "steps", "memory", "disk"):
        console.print(f"[dim]{name}:[/] {plan[name]}", highlight=False)
    for note in setup.prepared.notes:
        console.print(f"[dim]note:[/] {note}", highlight=False)
    run = _Run(config, setup, folder, console)
    try:
        with interruptible() as caught:
            run.catch_up()
            run.go_on(caught)
            return run.finish()
    finally:
        run.log.close()


def _first_loss(setup: Setup, config: FinetuneConfig) -> None:
    """A loss that is not finite before the first step is bad input, and nothing is to be written for it."""
    prepared, model = setup.prepared, setup.loaded.model
    places = batch_indices(0, config.batch_size, len(prepared.train), config.seed)
    with torch.inference_mode():
        batch = prepared.collate([prepared.train[place] for place in places]).to(setup.device)
        loss = float(prepared.loss(model, batch))
    if not math.isfinite(loss):
        raise UserError(
            f"The loss of {config.model} on {config.task} is {loss} before the first step in --dtype {config.dtype}; "
            "try --dtype float32 (or bfloat16 instead of float16), and check the model."
        )


class _Run:
    """The state of the loop."""

    def __init__(self, config: FinetuneConfig, setup: Setup, folder: RunFolder, console: Console):
        self.config, self.setup, self.folder, self.console = config, setup, folder, console
        self.model: nn.Module = setup.loaded.model
        self.optimizer, self.prepared = setup.optimizer, setup.prepared
        self.eval_every = config.eval_every or max(1, setup.steps // 10)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        header = {"method": config.optimizer, "eps": config.eps, "seed": config.seed, "metazo": metazo.__version__}
        self.log = StepLog(folder.path / "steps.jsonl", header)
        self.records = folder.records()
        self.started = time.monotonic() - (self.records[-1]["seconds"] if self.records else 0.0)
        self.evaluating = 0.0  # seconds of evaluation in this process
        self.losses: list[float] = []
        self.failures = 0

    # -- coming back to where the log ends -----------------------------------------------------------------------

    def catch_up(self) -> None:
        """Snapshot, then replay of the log: no forward pass but those of an evaluation that was lost."""
        steps = self.log.steps
        snapshot = self.folder.load_snapshot(len(steps)) if self.config.resume else None
        done = 0
        if snapshot is not None:
            done, tensors = snapshot
            self._load(tensors)
        if isinstance(self.optimizer, FirstOrder):
            self.log.cut(done)  # a gradient cannot be replayed: what came after the snapshot is done again
            steps = steps[:done]
            self.records = [record for record in self.records if record["step"] <= done]
            self.folder.keep_records(self.records)
        known = {record["step"] for record in self.records}
        self.losses = [_mean(step.losses) for step in steps[done - done % self.eval_every : done]]
        if done == 0 and 0 not in known:
            self._evaluate(0)
        for record in steps[done:]:
            assert isinstance(self.optimizer, ZOOptimizer)
            self.losses.append(self.optimizer.step(self._closures(record.step), replay=record))
            if (record.step + 1) % self.eval_every == 0:
                if record.step + 1 in known:
                    self.losses = []
                else:
                    self._evaluate(record.step + 1)

    def _load(self, tensors: dict[str, Tensor]) -> None:
        weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
        for name, parameter in self.model.named_parameters():
            if name in weights:
                parameter.data.copy_(weights[name])
        state = {k.removeprefix("optimizer/"): v for k, v in tensors.items() if k.startswith("optimizer/")}
        self.optimizer.load_tensors_state(state)

    def _snapshot(self, step: int) -> None:
        weights = {f"weights/{name}": p for name, p in self.model.named_parameters() if p.requires_grad}
        state = {f"optimizer/{name}": tensor for name, tensor in self.optimizer.tensors_state().items()}
        self.folder.save_snapshot(step, weights | state)

    # -- going on ------------------------------------------------------------------------------------------------

    def go_on(self, caught: list[str]) -> None:
        optimizer, total = self.optimizer, self.setup.steps
        if isinstance(optimizer, ZOOptimizer):
            optimizer.recorder = self.log.append
        with _progress(self.console, total, optimizer.steps) as progress:
            for step in range(optimizer.steps, total):
                for group, rate in zip(optimizer.param_groups, self.rates):
                    group["lr"] = rate * SCHEDULES[self.config.schedule](step / total)
                loss = optimizer.step(self._closures(step))
                if isinstance(optimizer, FirstOrder) and optimizer.last_step is not None:
                    self.log.append(optimizer.last_step)
                self._watch(step, loss)
                if (step + 1) % self.eval_every == 0 or step + 1 == total:
                    self._evaluate(step + 1)
                if self.config.snapshot_every and (step + 1) % self.config.snapshot_every == 0:
                    self._snapshot(step + 1)
                progress(step + 1, f"loss {loss:.4f}  lr {optimizer.param_groups[0]['lr']:.2g}  {self._latest()}")
                if caught and step + 1 < total:
                    self._snapshot(step + 1)
                    raise Interrupted(
                        f"Stopped by {caught[0]} after step {step + 1} of {total}; go on with the same command "
                        "and --resume."
                    )

    def _closures(self, step: int) -> list[BatchLoss]:
        """The losses of the step's batches."""
        config, train = self.config, self.prepared.train
        parts = range(step * config.accumulate, (step + 1) * config.accumulate)
        places = [batch_indices(part, config.batch_size, len(train), config.seed) for part in parts]
        return [BatchLoss(self.model, self.prepared, [train[i] for i in batch], self.setup.device) for batch in places]

    def _watch(self, step: int, loss: float) -> None:
        """Keep the loss; give up where it has not been finite for LOSSES_IN_A_ROW steps."""
        if math.isfinite(loss):
            self.losses.append(loss)
            self.failures = 0
            return
        self.failures += 1
        if self.failures == LOSSES_IN_A_ROW:
            raise UserError(
                f"The loss has not been finite for {LOSSES_IN_A_ROW} steps up to step {step + 1}; the weights are "
                "those before them. Try a smaller --lr or --eps, or --dtype float32."
            )

    def _evaluate(self, step: int) -> None:
        """Record the mean training loss since the last evaluation and the metrics on dev; keep the model if best."""
        config, paused = self.config, time.monotonic()
        dev = self._scores("dev") if config.dev_examples else {}
        record = {
            "step": step,
            "forwards": self.optimizer.forwards,
            "seconds": round(paused - self.started - self.evaluating, 3),  # of training alone
            "train_loss": _mean(self.losses) if self.losses else None,
            "lr": self.optimizer.param_groups[0]["lr"],
            "dev": dev,
            **self._sigma(),
        }
        self.losses = []
        if config.keep == "best" and self._merit(record) > max(map(self._merit, self.records), default=(-math.inf,)):
            self._save_model()
        self.records.append(record)
        self.folder.record(**record)
        self.evaluating += time.monotonic() - paused

    def _sigma(self) -> dict[str, Any]:
        """The block scales of the step before, by block, where there are any."""
        optimizer = self.optimizer
        if not isinstance(optimizer, ZOOptimizer) or optimizer.scale is None or not optimizer.steps:
            return {}
        names = (block.name for block in optimizer.scale.blocks)
        return {"sigma": dict(zip(names, optimizer.zo_state["scale/sigma"].tolist()))}

    def _merit(self, record: dict[str, Any]) -> tuple[float, ...]:
        metric = self.prepared.task.metric[0] if self.prepared.task.metric else None
        loss = record["dev"].get("loss", math.inf)
        return (record["dev"].get(metric, 0.0), -loss) if metric else (-loss,)

    def _latest(self) -> str:
        dev = self.records[-1]["dev"] if self.records else {}
        names = ("loss", *self.prepared.task.metric)
        return "dev " + "  ".join(f"{name} {dev[name]:.3f}" for name in names if name in dev)

    def _scores(self, split: Literal["dev", "test"]) -> dict[str, float]:
        return evaluate(self.model, self.prepared, split, batch_size=self.config.eval_batch_size)

    def _save_model(self) -> None:
        target = self.folder.path / "model"
        self.setup.loaded.model.save_pretrained(target)
        self.setup.loaded.tokenizer.save_pretrained(target)

    # -- the end -------------------------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        config, path = self.config, self.folder.path
        if config.keep == "last":
            self._save_model()
        elif config.keep == "best":
            self._load_best(path / "model")
        test = self._scores("test") if config.test_examples else {}
        best = max(self.records, key=self._merit)
        summary = {
            "task": config.task,
            "optimizer": config.optimizer,
            "tuner": config.tuner,
            "lr": self.rates[0],
            "steps": self.optimizer.steps,
            "forwards": self.optimizer.forwards,
            "seconds": round(time.monotonic() - self.started, 1),
            "peak_memory_bytes": peak_memory(),
            "before": self.records[0]["dev"],
            "dev": best["dev"] if config.keep == "best" else self.records[-1]["dev"],
            "kept_step": best["step"] if config.keep == "best" else self.optimizer.steps,
            "test": test,
            "notes": self.prepared.notes,
        }
        (path / "summary.json").write_text(json.dumps(summary, indent=2))
        title = f"{config.task}, {config.optimizer}"
        plot_run(self.folder.records(), path / "curve.png", title, self.prepared.task.metric)
        return summary

    def _load_best(self, folder: Path) -> None:
        if self.config.lora:
            load_adapters(self.model, folder)
            return
        kept = type(self.model).from_pretrained(folder, dtype=self.setup.loaded.dtype)  # type: ignore[attr-defined]
        self.model.load_state_dict(kept.state_dict())


def _mean(values) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


@contextmanager
def _progress(console: Console, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    """A live bar on a terminal; a line every tenth of the run elsewhere."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=done)

        def show(step: int, text: str) -> None:
            bar.update(task, completed=step, description=text)
            if not console.is_terminal and (step % max(1, total // 10) == 0 or step == total):
                console.print(f"step {step}/{total}  {text}", highlight=False)

        yield show
