"""Loops over weights on the CPU: compiled by numba, shared out among torch's number of threads.

Not by numba's own threads: they may spin between two calls, as torch's do, and take cores from the forward pass. Threads of
Python sleep, and compiled loops hold no lock.
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

from metazo.kernels import casts, vectors
from metazo.kernels.vectors import PREFERENCE

PIECE = 1 << 18  # entries of a tensor that a thread takes at once


def kernel(function: Callable, *sources: ModuleType) -> Callable:
    """Compiled at its first call for a type, and kept on disk if there is a place to write.

    Args: sources: the modules beside its own that the loop takes functions and constants from. numba looks for changes in
        the loop's own file alone, so what it keeps is filed under a checksum of theirs, and under the width of vectors.
    """
    checksum = zlib.crc32(PREFERENCE.encode())
    for source in (casts, vectors, *sources):
        checksum = zlib.crc32(Path(str(source.__file__)).read_bytes(), checksum)
    function.__qualname__ += f"-{checksum:08x}"
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # numba found no such place
        return njit(nogil=True, error_model="numpy")(function)


@cache
def _pool(helpers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(helpers, thread_name_prefix="metazo")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has the pool, and none of its threads


def share(run: Callable[..., object], jobs: Iterable[tuple]) -> None:
    """run(*job) for each, by torch's number of threads: the calling thread is one of them, and a core that something else
    slows down takes fewer. run: compiled, so that it holds no lock. Raises what a run raised.

    To wake a thread takes as long as to add noise to a small matrix: give all that can be done at once in one call. An
    iterator's jobs are made while others run.
    """
    left, lock = iter(jobs), Lock()

    def work() -> None:
        while True:
            with lock:  # a generator is for one thread at a time
                job = next(left, None)
            if job is None:
                return
            run(*job)

    threads = torch.get_num_threads()
    most = min(threads, len(jobs)) if isinstance(jobs, Sized) else threads
    helpers = [_pool(threads - 1).submit(work) for _ in range(most - 1)]
    try:
        work()
    finally:  # no thread is left at work on the weights
        for helper in helpers:
            if not helper.cancel():  # it has begun
                helper.result()
