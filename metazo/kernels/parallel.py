"""Compiled loops over weights, shared by as many threads as torch uses.

numba's own threads are not used: they may spin between two calls, as torch's do, and take cores from the forward pass.
Python's threads sleep between calls, and compiled loops do not hold the interpreter lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Lock, local

import torch


@cache
def _pool(helpers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(helpers, thread_name_prefix="metazo")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has the pool without its threads


def share(run: Callable[..., object], jobs: Iterable[tuple]) -> None:
    """run(*job) for each job, on as many threads as torch uses. The calling thread is one of them, and a slower core takes
    fewer jobs. run: a compiled function, which does not hold the interpreter lock. Raises the exception of a failed job.

    Waking a thread takes as long as adding noise to a small matrix, so pass all jobs that can run together in one call, or
    make the calls within `together`.
    The jobs of an iterator are made while others run.
    """
    if _waiting.jobs is not None:
        _waiting.jobs += [(run, *job) for job in jobs]
        return
    threads = torch.get_num_threads()
    most = min(threads, len(jobs)) if isinstance(jobs, Sized) else threads
    if most <= 1:
        for job in jobs:
            run(*job)
        return
    left, lock = iter(jobs), Lock()

    def work() -> None:
        while True:
            with lock:  # only one thread may advance a generator at a time
                job = next(left, None)
            if job is None:
                return
            run(*job)

    helpers = [_pool(threads - 1).submit(work) for _ in range(most - 1)]
    try:
        work()
    finally:  # wait until no thread works on the weights
        for helper in helpers:
            if not helper.cancel():  # it has started
                helper.result()


class _Waiting(local):
    jobs: list[tuple] | None = None  # (run, *job)


_waiting = _Waiting()


@contextmanager
def together() -> Iterator[None]:
    """Jobs that this thread gives to `share` in the block are run at its end, all at once.

    Nothing in the block may read what they write. After an exception in the block none of them is run. Blocks are not nested.
    """
    _waiting.jobs = jobs = []
    try:
        yield
    finally:
        _waiting.jobs = None
    share(_call, jobs)


def _call(run: Callable[..., object], *job: object) -> None:
    run(*job)
