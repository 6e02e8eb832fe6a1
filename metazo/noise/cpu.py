"""Philox noise on the CPU with numba: generated and added in one pass over the weights, nothing stored.

The numbers are those of philox.py, bit for bit (tests/noise). lanes.py makes them, one chunk at a time.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (pyright checks numba intrinsics as the Python functions that they are before compilation)

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from llvmlite import binding

from metazo.kernels.parallel import JOB_ENTRIES, kernel, share
from metazo.kernels.vectors import widest
from metazo.noise import lanes
from metazo.noise import philox as definition
from metazo.noise.lanes import CHUNK, WORDS, fetch, narrow, numbers, widen

_u64 = np.uint64

_DTYPES = {torch.float32: None, torch.float64: None, torch.bfloat16: torch.uint16}
if binding.get_host_cpu_features().get("f16c", binding.get_default_triple().startswith("aarch64")):
    _DTYPES[torch.float16] = torch.int16  # without the instruction LLVM would call a function that does not exist


def _kernel(function):
    return kernel(function, lanes, definition)


@_kernel
def _add(out, start, alpha, beta, gaussian, purpose, id0, id1, k0, k1):
    """out = beta * out + alpha * z for elements start .. of a tensor, start a multiple of TILE."""
    widest()
    z, words = np.empty(CHUNK, np.float32), np.empty(WORDS, np.uint32)
    for here in range(0, out.size, CHUNK):
        fetch(out, here)
        numbers(z, words, gaussian, (start + here) // CHUNK, purpose, id0, id1, k0, k1)
        for i in range(min(CHUNK, out.size - here)):
            e = _u64(here + i)  # unsigned, because numba checks a signed index for being negative
            out[e] = narrow(beta * widen(out[e]) + alpha * z[i], out[e])


@_kernel
def _add_two(out, start, alpha, beta, again, gaussian, purpose, id0, id1, k0, k1, l0, l1):
    """_add for the seed of k, then out = out + again * z for the seed of l, while the chunk is in the cache."""
    widest()
    z, words, others = np.empty(CHUNK, np.float32), np.empty(WORDS, np.uint32), np.empty(WORDS, np.uint32)
    for here in range(0, out.size, CHUNK):
        fetch(out, here)
        chunk, count = (start + here) // CHUNK, min(CHUNK, out.size - here)
        numbers(z, words, gaussian, chunk, purpose, id0, id1, k0, k1)
        for i in range(count):
            e = _u64(here + i)
            out[e] = narrow(beta * widen(out[e]) + alpha * z[i], out[e])
        numbers(z, others, gaussian, chunk, purpose, id0, id1, l0, l1)
        for i in range(count):
            e = _u64(here + i)
            out[e] = narrow(widen(out[e]) + again * z[i], out[e])


@_kernel
def _place(out, base, start, alpha, gaussian, purpose, id0, id1, k0, k1):
    """out = base + alpha * z, as _add."""
    widest()
    z, words = np.empty(CHUNK, np.float32), np.empty(WORDS, np.uint32)
    for here in range(0, out.size, CHUNK):
        fetch(base, here)
        fetch(out, here)
        numbers(z, words, gaussian, (start + here) // CHUNK, purpose, id0, id1, k0, k1)
        for i in range(min(CHUNK, out.size - here)):
            e = _u64(here + i)
            out[e] = narrow(base[e] + alpha * z[i], out[e])


def supports(*tensors: torch.Tensor) -> bool:
    """Whether the kernels support these tensors: contiguous, in main memory, of a known floating type."""
    return all(t.device.type == "cpu" and t.dtype in _DTYPES and t.is_contiguous() for t in tensors)


def _array(tensor: torch.Tensor) -> np.ndarray:
    bits = _DTYPES[tensor.dtype]
    flat = tensor.detach().view(-1)
    return (flat if bits is None else flat.view(bits)).numpy()


def _counter(seed: int, tensor_id: int, purpose: int) -> tuple[int, ...]:
    low = definition._LOW
    return purpose, tensor_id & low, tensor_id >> 32 & low, seed & low, seed >> 32 & low


@_kernel
def _dot(other, sums, place, start, gaussian, purpose, id0, id1, k0, k1):
    """sums[place] = <z, other>, as 128 partial sums in float64."""
    widest()
    z, words, lanes = np.empty(CHUNK, np.float32), np.empty(WORDS, np.uint32), np.zeros(CHUNK, np.float64)
    for here in range(0, other.size, CHUNK):
        fetch(other, here)
        numbers(z, words, gaussian, (start + here) // CHUNK, purpose, id0, id1, k0, k1)
        for i in range(min(CHUNK, other.size - here)):
            lanes[i] += z[i] * widen(other[_u64(here + i)])
    sums[place] = lanes.sum()


@_kernel
def _squares(size, sums, place, start, gaussian, purpose, id0, id1, k0, k1):
    """sums[place] = |z|^2 of size numbers, summed as _dot."""
    widest()
    z, words, lanes = np.empty(CHUNK, np.float32), np.empty(WORDS, np.uint32), np.zeros(CHUNK, np.float64)
    for here in range(0, size, CHUNK):
        numbers(z, words, gaussian, (start + here) // CHUNK, purpose, id0, id1, k0, k1)
        for i in range(min(CHUNK, size - here)):
            lanes[i] += np.float64(z[i]) * z[i]
    sums[place] = lanes.sum()


def _cut(size: int) -> range:
    """Starts of the chunks of an array that threads take: equally many per thread; a small array is one chunk."""
    threads = torch.get_num_threads()
    if size <= JOB_ENTRIES // 2 or threads == 1:
        return range(0, size, max(size, 1))
    count = threads * -(-size // (threads * JOB_ENTRIES))
    return range(0, size, -(-size // (count * definition.TILE)) * definition.TILE)


def _add_jobs(
    distribution: str, out: torch.Tensor, alpha: float, beta: float, seed: int, tensor_id: int, purpose: int, start: int
) -> list[tuple]:
    number, array, cut = _number(out), _array(out), _cut(out.numel())
    fixed = (number(alpha), number(beta), distribution == "gaussian", *_counter(seed, tensor_id, purpose))
    return [(array[here : here + cut.step], start + here, *fixed) for here in cut]


def add_(
    distribution: str, out: torch.Tensor, alpha: float, beta: float, seed: int, tensor_id: int, purpose: int, start: int
) -> None:
    """out = beta * out + alpha * z[start : start + out.numel()], in place, if supports(out)."""
    share(_add, _add_jobs(distribution, out, alpha, beta, seed, tensor_id, purpose, start))


def add_all_(
    distribution: str, moves: Iterable[tuple[int, torch.Tensor, float, float]], seed: int, purpose: int
) -> None:
    """add_ on whole tensors, given as (tensor id, out, alpha, beta), if supports(out)."""
    parts = (
        _add_jobs(distribution, out, alpha, beta, seed, tensor_id, purpose, 0) for tensor_id, out, alpha, beta in moves
    )
    share(_add, (job for jobs in parts for job in jobs))


def add_two_all_(
    distribution: str,
    moves: Iterable[tuple[int, torch.Tensor, float, float, float]],
    seeds: tuple[int, int],
    purpose: int,
) -> None:
    """out = beta * out + alpha * z(seeds[0]) + again * z(seeds[1]) on whole tensors, in one pass, if supports(out).

    moves: (tensor id, out, alpha, beta, again). The result is bit-identical to add_all_ with the first seed, then with the
    second, because the sum between the two is rounded to out's type.
    """

    def jobs() -> Iterator[tuple]:
        for tensor_id, out, alpha, beta, again in moves:
            number, array, cut = _number(out), _array(out), _cut(out.numel())
            scalars = (number(alpha), number(beta), number(again), distribution == "gaussian")
            fixed = (*scalars, *_counter(seeds[0], tensor_id, purpose), *_counter(seeds[1], tensor_id, purpose)[3:])
            yield from ((array[here : here + cut.step], here, *fixed) for here in cut)

    share(_add_two, jobs())


def place_(
    distribution: str,
    out: torch.Tensor,
    base: torch.Tensor,
    alpha: float,
    seed: int,
    tensor_id: int,
    purpose: int,
    start: int,
) -> None:
    """out = base + alpha * z, rounded once, if supports(out, base)."""
    fixed = (_number(base)(alpha), distribution == "gaussian", *_counter(seed, tensor_id, purpose))
    to, origin, cut = _array(out), _array(base), _cut(out.numel())
    share(
        _place,
        [(to[here : here + cut.step], origin[here : here + cut.step], start + here, *fixed) for here in cut],
    )


def dot(distribution: str, other: torch.Tensor, seed: int, tensor_id: int, purpose: int) -> float:
    """<z, other> over a whole tensor, if supports(other); products in other's type, at least float32."""
    array, cut = _array(other), _cut(other.numel())
    sums = np.zeros(len(cut))
    fixed = (distribution == "gaussian", *_counter(seed, tensor_id, purpose))
    share(_dot, [(array[here : here + cut.step], sums, k, here, *fixed) for k, here in enumerate(cut)])
    return float(sums.sum())


def square(distribution: str, size: int, seed: int, tensor_id: int, purpose: int) -> float:
    """|z|^2 over a tensor of that size; products in float64."""
    cut = _cut(size)
    sums, fixed = np.zeros(len(cut)), (distribution == "gaussian", *_counter(seed, tensor_id, purpose))
    share(_squares, [(min(cut.step, size - here), sums, k, here, *fixed) for k, here in enumerate(cut)])
    return float(sums.sum())


def _number(tensor: torch.Tensor) -> type:
    """The type of the arithmetic."""
    return np.float64 if tensor.dtype == torch.float64 else np.float32
