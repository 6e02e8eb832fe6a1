"""The runs of a comparison as tasks of ray: on a local cluster that it starts, or on the one that RAY_ADDRESS names.

A task is one run (`metazo.comparisons.cell.run`), with the threads that a process of `Pool` would have. Its result goes back to
the caller, which alone writes the results; a run of a worker that dies is done again from its beginning, on any node. Every
node needs the same installation, and the data and local models under the same paths. Ray exchanges objects by pickle, so
that everybody who can reach the cluster must be trusted.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from metazo.comparisons.cell import Job, failed, work
from metazo.comparisons.pool import STOPPED, THREADS
from metazo.comparisons.results import Result
from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.models.frozen import share_between_runs
from metazo.optimizers.registry import VARIABLE
from metazo.runs.interrupt import Interrupted

RETRIES = 3  # how often a run is done again after its worker has died
PATIENCE = 10.0  # seconds for the head of a cluster to answer
STORE = 100_000_000  # bytes of the object store of a local cluster: jobs and results are small


def _task(job: Job, threads: int, folder: str) -> Result:
    """One run in a worker of ray, which does several one after another."""
    with suppress(OSError):  # settings may name files relative to it
        os.chdir(folder)
    torch.set_num_threads(threads)
    share_between_runs()
    try:
        return work(job)
    except (Interrupted, KeyboardInterrupt):  # the worker was asked to stop: ray does the run again elsewhere
        os._exit(STOPPED)


def ray_module() -> Any:
    """The package. Raises MissingPackage without it."""
    with needs("ray"):
        import ray  # pyright: ignore[reportMissingImports]
    return ray


class RayPool:
    """At most `workers` tasks at a time, each with `cpus` cores (its threads) and `gpus` GPUs; use as a context manager.

    A run whose worker dies is repeated RETRIES times; then it has failed, as in `Pool` the first time. say: called with a
    sentence for the user. Raises UserError if the cluster cannot be reached, and if no run fits on this machine's own.
    """

    def __init__(self, workers: int, cpus: int, gpus: float, say: Callable[[str], None]):
        self.size, self.cpus, self.gpus, self.say = workers, cpus, gpus, say
        self.ray = ray_module()
        self.own = False
        self.jobs: dict[Any, tuple[Job, float]] = {}  # by the reference of the result

    def __enter__(self) -> RayPool:
        self.own = not self.ray.is_initialized()
        with self._reached():
            alone = self.own and self._connect()
            nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= self.cpus and node.get("GPU", 0) >= self.gpus for node in nodes):
            needed = f"no node of the cluster has the {self.cpus} CPUs and {self.gpus:g} GPUs of a run"
            if alone:
                self.__exit__()
                raise UserError(f"`engine` ray: {needed}; lower `cpus_per_run` or `gpus_per_run`.")
            self.say(f"{needed}: the runs wait until one joins it")
        environment = dict.fromkeys(THREADS, str(self.cpus))
        environment |= {VARIABLE: os.environ[VARIABLE]} if VARIABLE in os.environ else {}
        self.task = self.ray.remote(_task).options(
            num_cpus=self.cpus, num_gpus=self.gpus, max_retries=RETRIES, runtime_env={"env_vars": environment}
        )
        return self

    def _connect(self) -> bool:
        """Connect to the cluster that RAY_ADDRESS names, or start one. Returns whether it was started."""
        address = os.environ.get("RAY_ADDRESS") or "local"
        local: dict[str, Any] = {}
        if address == "local":
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else ray reports to its makers
            local = {
                "num_cpus": self.size * self.cpus,
                "include_dashboard": False,
                "object_store_memory": STORE,
                "_system_config": {"task_oom_retries": RETRIES},
            }
        host, _, port = address.rpartition(":")
        if port.isdecimal() and "/" not in host:  # ray would try for many minutes
            socket.create_connection((host, int(port)), timeout=PATIENCE).close()
        self.ray.init(address=address, log_to_driver=False, logging_level="ERROR", **local)
        return bool(local)

    def __exit__(self, *exception: object) -> None:
        """End the tasks that are left, and the local cluster."""
        for reference in self.jobs:
            with suppress(Exception):
                self.ray.cancel(reference, force=True)
        if self.own:
            self.ray.shutdown()

    @property
    def idle(self) -> bool:
        return len(self.jobs) < self.size

    @property
    def running(self) -> list[tuple[Job, float]]:
        """The jobs without a result, and for how many seconds ray has had each."""
        now = time.monotonic()
        return [(job, now - since) for job, since in self.jobs.values()]

    def submit(self, job: Job) -> None:
        with self._reached():
            self.jobs[self.task.remote(job, self.cpus, os.getcwd())] = job, time.monotonic()

    def collect(self, timeout: float) -> list[tuple[Job, Result | None]]:
        """A result that arrives within `timeout` seconds. A job has failed if its worker died too often."""
        with self._reached():
            ready, _ = self.ray.wait(list(self.jobs), timeout=timeout)
        done: list[tuple[Job, Result | None]] = []
        for reference in ready:
            job, _ = self.jobs.pop(reference)
            try:
                result = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                why = " ".join(str(error).split())[:300]
                result = failed(job, f"The task of ray failed ({type(error).__name__}, {RETRIES} retries): {why}")
                shutil.rmtree(job.out, ignore_errors=True)
            done.append((job, result))
        return done

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except (self.ray.exceptions.RayError, OSError, ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())[:300]
            raise UserError(f"`engine` ray: the cluster cannot be used: {why}") from error
