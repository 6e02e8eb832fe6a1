"""Worker processes that do one run after another. A process that dies is replaced.

Workers are forked from a server process that has imported torch and transformers once, and has used neither: it has no
threads that a fork would lose, and no CUDA context.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from metazo.comparisons.cell import Job, failed, work
from metazo.comparisons.results import Result
from metazo.io import forked
from metazo.models.frozen import share_between_runs
from metazo.runs.interrupt import Interrupted

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
STOPPED = 128 + signal.SIGTERM  # exit code of a worker that was asked to stop
GRACE = 5.0  # seconds that a worker has to stop when asked


def _work(connection: Connection, threads: int, environment: dict[str, str]) -> None:
    """The loop of a worker: it receives jobs and sends results until the other end closes or its process is gone.

    environment: of the process that starts it; the server's is that of the first start.
    """
    gc.freeze()  # a collection would touch, and so copy, every object that the server has imported
    os.environ.clear()
    os.environ.update(environment)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, forked.STOPPING)
    torch.set_num_threads(
        threads
    )  # before a thread uses torch: if two ask at once for a new pool after a fork, one may fail
    share_between_runs()
    try:
        while True:
            connection.send(work(connection.recv()))
    except (Interrupted, KeyboardInterrupt):  # asked to stop in the middle of a job
        os._exit(STOPPED)
    except (EOFError, OSError):  # the other end is gone
        pass


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    job: Job | None = None
    since: float = field(default_factory=time.monotonic)


class Pool:
    """`workers` processes with `threads` each, started when there is work; use as a context manager. script: whether they run
    the main module of this process first.

    A process that dies affects no other: its job becomes a failed result, and the next job gets a new process. A job
    whose process was asked to stop (SIGTERM, SIGINT or SIGHUP, also while it starts) has no result.
    """

    def __init__(self, workers: int, threads: int, script: bool = False):
        self.size, self.threads, self.script = workers, threads, script
        self.workers: list[_Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        """Ask all workers to stop, and kill those that do not."""
        for worker in self.workers:
            worker.connection.close()
            if worker.job is not None:
                worker.process.terminate()
        until = time.monotonic() + GRACE
        for worker in self.workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    @property
    def idle(self) -> bool:
        return sum(worker.job is not None for worker in self.workers) < self.size

    @property
    def running(self) -> list[tuple[Job, float]]:
        """The running jobs, and for how many seconds each has run."""
        now = time.monotonic()
        return [(worker.job, now - worker.since) for worker in self.workers if worker.job is not None]

    def submit(self, job: Job) -> None:
        self.workers = [worker for worker in self.workers if worker.job is not None or worker.process.is_alive()]
        free = next((worker for worker in self.workers if worker.job is None), None) or self._start()
        try:
            free.connection.send(job)
        except OSError:  # it has just been ended
            self.workers.remove(free)
            free = self._start()
            free.connection.send(job)
        free.job, free.since = job, time.monotonic()

    def _start(self) -> _Worker:
        context = forked.context(__name__, environment=dict.fromkeys(THREADS, str(self.threads)))
        ours, theirs = context.Pipe()
        environment = os.environ | dict.fromkeys(THREADS, str(self.threads))
        process = context.Process(target=_work, args=(theirs, self.threads, environment), daemon=True)
        forked.start(process, self.script)
        theirs.close()
        self.workers.append(_Worker(process, ours))
        return self.workers[-1]

    def collect(self, timeout: float) -> list[tuple[Job, Result | None]]:
        """Results that arrive within `timeout` seconds; a job whose process died has failed.

        The result is None if the process was asked to stop, so that the job is unfinished.
        """
        busy = [worker for worker in self.workers if worker.job is not None]
        done: list[tuple[Job, Result | None]] = []
        ready = set(wait([w.connection for w in busy] + [w.process.sentinel for w in busy], timeout))
        for worker in busy:
            if not ready & {worker.connection, worker.process.sentinel}:
                continue
            job = worker.job
            assert job is not None
            try:
                result = worker.connection.recv()
                worker.job = None
            except (EOFError, OSError):
                worker.process.join()
                self.workers.remove(worker)
                code = worker.process.exitcode
                asked = code == STOPPED or code in [-number for number in forked.STOPPING]  # its job is not at fault
                result = None if asked else failed(job, _how(code))
                shutil.rmtree(job.out, ignore_errors=True)
            done.append((job, result))
        return done


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        why = " (the system does that if memory has run out)" if name == "SIGKILL" else ""
        return f"The worker process was ended by {name}{why}."
    return f"The worker process ended with exit code {code}."
