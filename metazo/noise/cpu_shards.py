"""Noise on shards of tensors, on the CPU with numba: as cpu.py, span by span.

A span may begin and end anywhere: the chunks of noise at its two ends are made whole, and their numbers outside are not used.
The two loops are written out: with their common part as a function they take up to a third longer (benchmarks/shards.py).
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (pyright checks numba intrinsics as the Python functions that they are before compilation)

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from torch import Tensor

from metazo.blocks import Spans
from metazo.kernels.compiled import kernel
from metazo.kernels.parallel import share
from metazo.kernels.pieces import pieces
from metazo.kernels.vectors import widest
from metazo.noise import cpu, lanes, philox, wide
from metazo.noise.lanes import CHUNK, WORDS, fetch, narrow, numbers_from, widen

_u64 = np.uint64


def _kernel(function):
    return kernel(function, lanes, wide, philox)


@_kernel
def _add(out, here, there, alpha, beta, gaussian, purpose, id0, id1, k0, k1):
    """out = beta * out + alpha * z: span r begins at here[r] in out and has the elements there[r] .. of the whole tensor."""
    widest()
    z, words = np.empty(CHUNK, np.float32), np.empty(WORDS, np.uint32)
    made = -1  # the chunk of z
    for span in range(there.size):
        done, stop, before = here[span], here[span + 1], there[span] - here[span]
        while done < stop:
            chunk = (before + done) // CHUNK
            first = chunk * CHUNK - before  # the place in out of the chunk's first number, which may be outside
            if chunk != made:
                fresh = done == here[span] or chunk % 8 == 0
                numbers_from(z, words, fresh, gaussian, chunk, purpose, id0, id1, k0, k1)
                made = chunk
            fetch(out, done)
            skip, count = done - first, min(first + CHUNK, stop) - done
            for i in range(count):
                e = _u64(done + i)
                out[e] = narrow(beta * widen(out[e]) + alpha * z[_u64(skip + i)], out[e])
            done += count


@_kernel
def _place(out, base, here, there, alpha, gaussian, purpose, id0, id1, k0, k1):
    """out = base + alpha * z, as _add."""
    widest()
    z, words = np.empty(CHUNK, np.float32), np.empty(WORDS, np.uint32)
    made = -1  # the chunk of z
    for span in range(there.size):
        done, stop, before = here[span], here[span + 1], there[span] - here[span]
        while done < stop:
            chunk = (before + done) // CHUNK
            first = chunk * CHUNK - before
            if chunk != made:
                fresh = done == here[span] or chunk % 8 == 0
                numbers_from(z, words, fresh, gaussian, chunk, purpose, id0, id1, k0, k1)
                made = chunk
            fetch(base, done)
            fetch(out, done)
            skip, count = done - first, min(first + CHUNK, stop) - done
            for i in range(count):
                e = _u64(done + i)
                out[e] = narrow(base[e] + alpha * z[_u64(skip + i)], out[e])
            done += count


def add_all_(
    distribution: str, moves: Iterable[tuple[int, Tensor, float, float, Spans]], seed: int, purpose: int
) -> None:
    """out = beta * out + alpha * z on shards, given as (tensor id, out, alpha, beta, spans of out), if cpu.supports(out)."""

    def jobs() -> Iterator[tuple]:
        for tensor_id, out, alpha, beta, spans in moves:
            array, number = cpu._array(out), cpu._number(out)
            fixed = (number(alpha), number(beta), distribution == "gaussian", *cpu._counter(seed, tensor_id, purpose))
            for first, stop, part in _parts(spans):
                yield array[first:stop], part.here, part.there, *fixed

    share(_add, jobs())


def place_all_(
    distribution: str, places: Iterable[tuple[int, Tensor, Tensor, float, Spans]], seed: int, purpose: int
) -> None:
    """out = base + alpha * z on shards, given as (tensor id, out, base, alpha, spans of out), if cpu.supports(out, base)."""

    def jobs() -> Iterator[tuple]:
        for tensor_id, out, base, alpha, spans in places:
            to, origin = cpu._array(out), cpu._array(base)
            fixed = (cpu._number(base)(alpha), distribution == "gaussian", *cpu._counter(seed, tensor_id, purpose))
            for first, stop, part in _parts(spans):
                yield to[first:stop], origin[first:stop], part.here, part.there, *fixed

    share(_place, jobs())


def _parts(spans: Spans) -> Iterator[tuple[int, int, Spans]]:
    """The parts of a shard that threads take: (first, end, spans)."""
    cut = pieces(size := int(spans.here[-1]))
    for first in cut:
        stop = min(first + cut.step, size)
        yield first, stop, spans.part(first, stop)
