"""Loops over weights on the CPU: compiled by numba, shared by as many threads as torch uses.

numba's own threads are not used: they may spin between two calls, as torch's do, and take cores from the forward pass.
Python's threads sleep between calls, and compiled loops do not hold the interpreter lock.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Sized
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock
from types import ModuleType

import torch
from numba import njit

from metazo.kernels import casts, pieces, vectors
from metazo.kernels.vectors import PREFERENCE


def kernel(function: Callable, *sources: ModuleType) -> Callable:
    """Compile a loop at its first call for a type, and keep it on disk if there is a writable folder.

    Args: sources: the other modules from which the loop takes functions and constants. numba notices changes in the loop's
        own file alone, so the name of its cache has a checksum of these modules and the width of vectors.
    """
    checksum = zlib.crc32(PREFERENCE.encode())
    for source in (casts, pieces, vectors, *sources):
        checksum = zlib.crc32(Path(str(source.__file__)).read_bytes(), checksum)
    function.__qualname__ += f"-{checksum:08x}"
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # numba found no such folder
        return njit(nogil=True, error_model="numpy")(function)


@cache
def _pool(helpers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(helpers, thread_name_prefix="metazo")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has the pool without its threads


def share(run: Callable[..., object], jobs: Iterable[tuple]) -> None:
    """run(*job) for each job, on as many threads as torch uses. The calling thread is one of them, and a slower core takes
    fewer jobs. run: a compiled function, which does not hold the interpreter lock. Raises the exception of a failed job.

    Waking a thread takes as long as adding noise to a small matrix, so pass all jobs that can run together in one call.
    The jobs of an iterator are made while others run.
    """
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
