"""The folder of a run of several processes: rank 0 alone reads and writes it, and tells the others what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import Tensor

from metazo.errors import UserError
from metazo.io.processes import (
    LostRank,
    Tensors,
    from_first,
    gathered,
    lost,
    of_all,
    rank,
    require_same,
    require_same_values,
    tensors_from_first,
    together,
)
from metazo.io.tensorfile import weights_hash
from metazo.models.parts import divided
from metazo.runs.config import INCIDENTAL, FinetuneConfig
from metazo.runs.folder import RunFolder
from metazo.runs.inputs import data_hash, inputs
from metazo.runs.locate import PATHS
from metazo.runs.unwritten import MemoryFolder
from metazo.steplog.format import STEPS
from metazo.tasks import Prepared
from metazo.tasks.objectives import ObjectiveFailed

if TYPE_CHECKING:
    from metazo.runs.setup import Setup


class SharedFolder:
    """A RunFolder on rank 0, with its methods on every rank.

    Reading sends one message to every process. Writing sends none: if rank 0 fails to write, it ends, and the other
    processes find out in their next exchange. If the model is divided over the processes, each keeps its part of the best
    weights in main memory; after a kill they are made again from the log.

    Args: path; make: gives the RunFolder, on rank 0 alone; say: called with each sentence for the user; parts: whether the
    model is divided.
    Raises UserError on every rank if `make` does on rank 0.
    """

    def __init__(self, path: Path, make: Callable[[], RunFolder], say: Callable[[str], None], parts: bool = False):
        self.path, self.say = path, say
        self.parts = MemoryFolder(say) if parts else None
        self.own: RunFolder | MemoryFolder = MemoryFolder(say)
        from_first(lambda: self._make(make))

    def _make(self, make: Callable[[], RunFolder]) -> None:
        self.own = make()

    def __enter__(self) -> SharedFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.own.__exit__(*exception)

    def summary(self) -> dict[str, Any] | None:
        return from_first(self.own.summary)

    def used(self) -> int:
        return from_first(self.own.used)

    def begin(self) -> None:
        from_first(self.own.begin)

    def records(self) -> list[dict[str, Any]]:
        return from_first(self.own.records)

    def load_tensors(self, name: str) -> Tensors | None:
        if self.parts is not None:
            return self.parts.load_tensors(name)
        return tensors_from_first(lambda: self.own.load_tensors(name))

    def step_of(self, name: str) -> int | None:
        if self.parts is not None:
            return self.parts.step_of(name)
        return from_first(lambda: self.own.step_of(name))

    def remove(self, *patterns: str) -> None:
        self.own.remove(*patterns)

    def load_snapshot(self, at_most: int) -> Tensors | None:
        return tensors_from_first(lambda: self.own.load_snapshot(at_most))

    def keep_records(self, records: list[dict[str, Any]]) -> None:
        self.own.keep_records(records)

    def record(self, **values: Any) -> None:
        self.own.record(**values)

    def save_tensors(self, name: str, step: int, tensors: Mapping[str, Tensor]) -> None:
        if self.parts is not None:
            self.parts.save_tensors(name, step, {key: tensor.detach().cpu() for key, tensor in tensors.items()})
        elif rank() == 0:
            self.own.save_tensors(name, step, tensors)

    def save_snapshot(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        self.own.save_snapshot(step, tensors)

    def save_model(self, *parts: Any) -> None:
        if self.parts is not None and rank():  # rank 0 gathers the weights
            with TemporaryDirectory() as nothing:
                parts[0].save_pretrained(nothing)
        self.own.save_model(*parts)

    def complete(self, summary: dict[str, Any]) -> None:
        self.own.complete(summary)


OWN = {*PATHS, "out", "device", "rank_timeout", "track", "push", "flush_every", "fsync_every"}
"""Settings that each process may have for itself: paths (`require_same_setup` and the optimizer compare what they hold), what
belongs to a machine, and what rank 0 alone writes and sends."""


def require_same_run(config: FinetuneConfig) -> None:
    """Raises UserError on every process if they were not started with the same settings."""
    if together():
        settings = {f"`{name}`": value for name, value in asdict(config).items() if name not in OWN}
        require_same_values(settings, "give all processes of this run the same settings")
        if len({*gathered(config.out is None)}) > 1:
            raise of_all(
                UserError("Some processes of this run have an `out` and others have none: give it to all or none.")
            )


def require_same_setup(setup: Setup) -> None:
    """Raises UserError on every process if their objective, task or model is not the same. The first step compares the trained
    weights; the frozen ones are hashed here, unless the model is divided (0.2 seconds for 1e8 float32 weights on 2 cores).
    """
    if not together():
        return
    model, objective, what = setup.loaded.model, setup.objective, {}
    found = None if objective is None else objective.name
    if objective is not None and objective.source is not None:  # a file, which may lie elsewhere on each machine
        found = f"{objective.name.rpartition(':')[2]} of a file with sha256 {objective.source[:16]}"
    what["`objective`"] = found
    if isinstance(setup.prepared, Prepared):
        described = inputs(setup.prepared, model)
        what |= {f"The task's `{name}`": value for name, value in described["definition"].items()}
        what |= {f"The model's `{name}`": value for name, value in described["architecture"].items()}
    require_same_values(what, "give all processes of this run the same")
    if isinstance(setup.prepared, Prepared):
        require_same("rows of the task", data_hash(setup.prepared))
    if not divided(model):
        frozen = ((name, weights) for name, weights in model.named_parameters() if not weights.requires_grad)
        require_same("frozen weights of the model", weights_hash(frozen))


def written(folder: RunFolder | SharedFolder | MemoryFolder) -> RunFolder | None:
    """The folder into which this process writes, if it writes into one."""
    own = folder.own if isinstance(folder, SharedFolder) else folder
    return own if isinstance(own, RunFolder) else None


def run_folder(config: FinetuneConfig, say: Callable[[str], None]) -> RunFolder | SharedFolder | MemoryFolder:
    """The folder of a run. Raises UserError if it cannot be used, or to resume a run that has none."""
    if (out := config.out) is None:
        if config.resume:
            raise UserError("`resume=True` needs the folder of the run: give it as `out`.")
        return MemoryFolder(say)

    def make() -> RunFolder:
        return RunFolder(out, asdict(config), config.resume, incidental=INCIDENTAL, say=say)

    return SharedFolder(out, make, say, config.tensor_parallel * config.fsdp > 1) if together() else make()


@contextmanager
def losses_explained(config: FinetuneConfig) -> Iterator[None]:
    """Adds to the report of a lost process, or of a function of the user's that failed, how the run can continue."""
    try:
        yield
    except ObjectiveFailed as failed:
        if config.out is None or not (config.out / STEPS).exists():
            raise
        raise UserError(
            f"{failed} The steps before are in the log: continue with `resume=True`, or, if the function must change, rebuild "
            "the weights with metazo replay and start a new run from them."
        ) from failed
    except RuntimeError as error:
        exchange = any(
            word in str(error).lower() for word in ("gloo", "nccl", "connection", "timed out")
        )  # in a forward pass
        if config.tensor_parallel * config.fsdp == 1 or not exchange:
            raise
        raise _with_advice(lost(error), config) from error
    except LostRank as error:
        raise _with_advice(error, config) from error


def _with_advice(error: LostRank, config: FinetuneConfig) -> LostRank:
    """The report of a lost process, with how the run can continue."""
    advice = "look at its message"
    if config.out is not None:
        advice += f", and continue with metazo finetune --resume {quote(str(config.out))}, with any number of processes"
    told = LostRank(f"{error} The steps so far are in the log: {advice}.")
    told.shared = True
    return told
