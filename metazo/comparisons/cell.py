"""One run of a comparison, in a worker: fine-tune, read what it wrote, keep the figures, remove the folder."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from metazo.comparisons.key import facts
from metazo.comparisons.results import Result
from metazo.errors import UserError
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.folder import RunFolder
from metazo.runs.header import environment
from metazo.runs.interrupt import Interrupted
from metazo.runs.machine import instructions
from metazo.runs.monitor import Diverged
from metazo.runs.resources import NoSpace, PeakMemory
from metazo.runs.setup import set_up
from metazo.runs.tuned import Part
from metazo.settings import with_role
from metazo.tasks.evaluate import evaluate

NO_SPACE = "no space"
"""Status of a run that a full disk has ended. It says nothing about the run, so such a result is not written."""

OVER = 1.1
"""Part of its budget that a run may take. MeZO-SVRG takes a full step again if the losses of the first were not finite."""


@dataclass
class Job:
    """A worker's task: a run's settings, the facts known about it, and whether it trains at all."""

    config: FinetuneConfig
    info: dict[str, Any]
    trains: bool
    keep: Path | None = None
    """Folder of its tuned model"""

    @property
    def out(self) -> Path:
        """The folder of its run."""
        assert self.config.out is not None
        return self.config.out


_warm = False


def work(job: Job) -> Result:
    """`run`, after steps that are not counted if it is the first job of this process, whatever that is."""
    global _warm
    if not _warm:
        warm_up(job)
        _warm = True
    return run(job)


def run(job: Job) -> Result:
    """Do the job. A failed run is a result too; only Interrupted is raised."""
    out = job.out
    shutil.rmtree(out, ignore_errors=True)
    started, meter, reason, parts = time.monotonic(), PeakMemory(), None, None
    status, until = "failed", None
    try:
        parts = _train(job) if job.trains else _look(job)
    except Interrupted:
        raise
    except Diverged as error:
        status, reason, until = "diverged", f"Diverged: {error.what}", error.taken
    except UserError as error:
        status, reason = status_of(error), str(error)
    except Exception as error:  # a method or a driver may raise anything, and the other runs must continue
        status, reason = status_of(error), f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    taken = meter.bytes()
    result = failed(job, reason, status=status) if parts is None else Result(job.info | _of_worker(), *parts)
    result.run_info |= _of_worker()
    result.train_info |= until or {}  # the last evaluation may be long before, and a search has its whole cost
    result.train_info |= {"peak_memory_bytes": taken, "wall_seconds": round(time.monotonic() - started, 3)}
    if parts is not None and not math.isfinite(result.metrics["dev"].get("loss", 0.0)):
        reason = f"Diverged: the loss on dev is {result.metrics['dev']['loss']} at the end."
        result = failed(job, reason, result, status="diverged")
    if job.keep is not None and result.finished:
        shutil.rmtree(job.keep, ignore_errors=True)
        job.keep.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(out / "model", job.keep)
    shutil.rmtree(out, ignore_errors=True)
    gc.collect()
    return result


def status_of(error: BaseException | None) -> str:
    """NO_SPACE if a disk with too little space is the cause of an error, else failed."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if (
            full or isinstance(error, NoSpace) or os.strerror(errno.ENOSPC) in str(error)
        ):  # libraries in Rust have no errno
            return NO_SPACE
        error = error.__cause__ or error.__context__
    return "failed"


def warm_up(job: Job) -> None:
    """Take two steps that are not timed, so that imports, compiled kernels and the allocator are ready."""
    config = replace(job.config, forwards=None, steps=2, dev_examples=0, test_examples=0, keep="none", eval_every=2)
    try:
        run_settings(config)
    except (UserError, RuntimeError, OSError):
        pass  # the run itself reports it
    finally:
        shutil.rmtree(job.out, ignore_errors=True)


def failed(job: Job, reason: str | None, so_far: Result | None = None, *, status: str = "failed") -> Result:
    """The result of a run that failed or diverged: its records so far, and the reason."""
    curve = so_far.train_info["curve"] if so_far else _curve(RunFolder.read_records(job.out))
    last = curve[-1] if curve else {}
    train: dict[str, Any] = {name: last.get(name) for name in ("step", "forwards", "seconds")}
    train = {"curve": curve, "steps": train.pop("step"), **train}
    train |= {"trained_weights": job.info["trained_weights"], "peak_memory_bytes": None, "sigma": None}
    train |= {"evaluation_seconds": None, "cpu_seconds": None} | (so_far.train_info if so_far else {})
    info = job.info | (so_far.run_info if so_far else {}) | {"status": status, "reason": reason}
    return Result(info, train, {"before": None, "dev": None, "test": None, "majority": None})


def _train(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    began, computed = time.monotonic(), time.process_time()
    summary = run_settings(job.config, part=Part(tested=job.info.get("kind") != "search"))
    wall, computed = time.monotonic() - began, time.process_time() - computed
    if summary["forwards"] > OVER * (job.config.forwards or math.inf):
        raise UserError(
            f"It took {summary['forwards']:,} forward passes, and every run has {job.config.forwards:,}: let the method's "
            "`forwards_per_step` return what its steps take."
        )
    records = RunFolder.read_records(job.out)
    last = records[-1]
    train = {
        "curve": _curve(records),
        "steps": summary["steps"],
        "forwards": summary["forwards"],
        "seconds": last["seconds"],
        "evaluation_seconds": round(wall - last["seconds"], 3),
        "cpu_seconds": round(computed, 3),
        "trained_weights": job.info["trained_weights"],
        "sigma": _sigma(records),
        "notes": summary["notes"],
    }
    metrics = {name: summary[name] for name in ("before", "dev", "test")}
    return train, metrics | {"majority": _majority(metrics)}


def _look(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluate the untrained model on dev and test."""
    began, computed = time.monotonic(), time.process_time()
    setup = set_up(replace(job.config, steps=1, forwards=None))
    model, size = setup.loaded.model, job.config.eval_batch_size
    dev = evaluate(model, setup.rows, "dev", batch_size=size) if setup.rows.dev else {}
    test = evaluate(model, setup.rows, "test", batch_size=size) if setup.rows.test else {}
    point = {"step": 0, "forwards": 0, "seconds": 0.0, "train_loss": None, "lr": None, "dev": dev}
    train: dict[str, Any] = {"curve": [point], "steps": 0, "forwards": 0, "seconds": 0.0}
    train |= {"evaluation_seconds": round(time.monotonic() - began, 3), "trained_weights": 0, "sigma": None}
    train["cpu_seconds"] = round(time.process_time() - computed, 3)
    metrics = {"before": dev, "dev": dev, "test": test}
    return train, metrics | {"majority": _majority(metrics)}


def _majority(metrics: dict[str, dict[str, float]]) -> dict[str, float | None]:
    return {split: metrics[split].get("majority") for split in ("dev", "test")}


def _curve(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "sigma"} for record in records]


def _sigma(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    with_sigma = [record for record in records if "sigma" in record]
    if not with_sigma:
        return None
    blocks = list(with_sigma[0]["sigma"])
    values = [[record["sigma"][block] for block in blocks] for record in with_sigma]
    return {"blocks": blocks, "steps": [record["step"] for record in with_sigma], "values": values}


def _of_worker() -> dict[str, Any]:
    found = environment(torch.device("cpu"))
    of_machine = {"threads", "device", "processor", "processes", *instructions()}
    versions = {name: value for name, value in found.items() if name not in of_machine}
    return {"versions": versions, "machine": facts() | {"threads": found["threads"]} | instructions()}


def configuration(config: FinetuneConfig) -> dict[str, Any]:
    """The settings of a run as JSON, without local folders."""
    plain = json.loads(json.dumps(asdict(config), default=str))
    return {name: value for name, value in plain.items() if name not in with_role(FinetuneConfig, "place")}
