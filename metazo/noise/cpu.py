"""Philox noise on the CPU with numba: generated and added in one pass over the weights, nothing stored.

The numbers are those of philox.py, bit for bit (tests/noise). lanes.py makes them, one chunk at a time.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (pyright checks numba intrinsics as the Python functions that they are before compilation)

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from llvmlite import binding

from metazo.kernels import splitfloat
from metazo.kernels.compiled import kernel
from metazo.kernels.parallel import share
from metazo.kernels.pieces import at, groups, pieces
from metazo.kernels.vectors import widest
from metazo.noise import lanes, wide, wide_weights
from metazo.noise import philox as definition
from metazo.noise.lanes import CHUNK, WORDS, fetch, narrow, numbers, widen
from metazo.noise.wide_weights import whole, wide_add, wide_place

_u64, _ONE = np.uint64, np.float32(1)

_DTYPES = {torch.float32: None, torch.float64: None, torch.bfloat16: torch.uint16}
if binding.get_host_cpu_features().get("f16c", binding.get_default_triple().startswith("aarch64")):
    _DTYPES[torch.float16] = torch.int16  # without the instruction LLVM would call a function that does not exist
_LIKE = {dtype: torch.empty(0, dtype=bits or dtype, device="cpu").numpy() for dtype, bits in _DTYPES.items()}


def _kernel(function):
    return kernel(function, lanes, wide, wide_weights, splitfloat, definition)


@_kernel
def _add_to(out, z, words, start, alpha, beta, gaussian, purpose, id0, id1, k0, k1):
    """out = beta * out + alpha * z for elements start .. of a tensor, start a multiple of TILE."""
    widest()
    for here in range(0, out.size, CHUNK):
        fetch(out, here)
        chunk = (start + here) // CHUNK
        if whole(out, here, gaussian) and wide_add(out, here, alpha, beta, chunk, purpose, id0, id1, k0, k1):
            continue
        numbers(z, words, gaussian, chunk, purpose, id0, id1, k0, k1)
        for i in range(min(CHUNK, out.size - here)):
            e = _u64(here + i)  # unsigned, because numba checks a signed index for being negative
            out[e] = narrow(beta * widen(out[e]) + alpha * z[i], out[e])


@_kernel
def _add_two_to(out, z, words, others, start, alpha, beta, again, gaussian, purpose, id0, id1, k0, k1, l0, l1):
    """_add_to for the seed of k, then out = out + again * z for the seed of l, while the chunk is in the cache."""
    widest()
    for here in range(0, out.size, CHUNK):
        fetch(out, here)
        chunk, count = (start + here) // CHUNK, min(CHUNK, out.size - here)
        vectors = whole(out, here, gaussian)
        if not (vectors and wide_add(out, here, alpha, beta, chunk, purpose, id0, id1, k0, k1)):
            numbers(z, words, gaussian, chunk, purpose, id0, id1, k0, k1)
            for i in range(count):
                e = _u64(here + i)
                out[e] = narrow(beta * widen(out[e]) + alpha * z[i], out[e])
        if not (vectors and wide_add(out, here, again, _ONE, chunk, purpose, id0, id1, l0, l1)):
            numbers(z, others, gaussian, chunk, purpose, id0, id1, l0, l1)
            for i in range(count):
                e = _u64(here + i)
                out[e] = narrow(widen(out[e]) + again * z[i], out[e])


# As functions of their own the loops above take a twentieth less time than written out in those below.
@_kernel
def _add(rows, amounts, like, gaussian, purpose, k0, k1, first, last):
    """_add_to for rows first .. last of the tables that _jobs makes. like: an array of out's type."""
    widest()
    z, words = np.empty(CHUNK, np.float32), np.empty(WORDS, np.uint32)
    for r in range(first, last):
        out, start, id0, id1 = at(rows[r, 0], rows[r, 1], like), rows[r, 2], rows[r, 3], rows[r, 4]
        _add_to(out, z, words, start, amounts[r, 0], amounts[r, 1], gaussian, purpose, id0, id1, k0, k1)


@_kernel
def _add_two(rows, amounts, like, gaussian, purpose, k0, k1, l0, l1, first, last):
    """_add_two_to, as _add."""
    widest()
    z, words, others = np.empty(CHUNK, np.float32), np.empty(WORDS, np.uint32), np.empty(WORDS, np.uint32)
    for r in range(first, last):
        out, start, id0, id1 = at(rows[r, 0], rows[r, 1], like), rows[r, 2], rows[r, 3], rows[r, 4]
        alpha, beta, again = amounts[r, 0], amounts[r, 1], amounts[r, 2]
        _add_two_to(out, z, words, others, start, alpha, beta, again, gaussian, purpose, id0, id1, k0, k1, l0, l1)


@_kernel
def _place(out, base, start, alpha, gaussian, purpose, id0, id1, k0, k1):
    """out = base + alpha * z, as _add."""
    widest()
    z, words = np.empty(CHUNK, np.float32), np.empty(WORDS, np.uint32)
    for here in range(0, out.size, CHUNK):
        fetch(base, here)
        fetch(out, here)
        chunk = (start + here) // CHUNK
        if whole(out, here, gaussian) and wide_place(out, base, here, alpha, chunk, purpose, id0, id1, k0, k1):
            continue
        numbers(z, words, gaussian, chunk, purpose, id0, id1, k0, k1)
        for i in range(min(CHUNK, out.size - here)):
            e = _u64(here + i)
            out[e] = narrow(base[e] + alpha * z[i], out[e])


def supports(*tensors: torch.Tensor) -> bool:
    """Whether the kernels support these tensors: contiguous, in main memory, of a known floating type."""
    for tensor in tensors:  # not `all`: a step asks for every tensor in every pass
        if tensor.dtype not in _DTYPES or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return False
    return True


def _array(tensor: torch.Tensor) -> np.ndarray:
    bits = _DTYPES[tensor.dtype]
    flat = tensor.detach().view(-1)
    return (flat if bits is None else flat.view(bits)).numpy()


def _words(seed: int) -> tuple[int, int]:
    return seed & definition._LOW, seed >> 32 & definition._LOW


def _counter(seed: int, tensor_id: int, purpose: int) -> tuple[int, ...]:
    return purpose, *_words(tensor_id), *_words(seed)


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


def _jobs(moves: Sequence[tuple], *fixed: object, start: int = 0) -> list[tuple]:
    """The arguments of calls of _add and _add_two, of which each takes pieces of several tensors.

    moves: (tensor id, out, *amounts). A row of the tables is a piece: (address, size, the first element's place in the whole
    tensor, the id in two words), and its amounts.
    """
    kinds: dict[torch.dtype, tuple[list[tuple], list[tuple]]] = {}
    for tensor_id, out, *amounts in moves:
        rows, numbers = kinds.setdefault(out.dtype, ([], []))
        address, width, size, cut = out.data_ptr(), out.element_size(), out.numel(), pieces(out.numel())
        ids = _words(tensor_id)
        for here in cut:
            rows.append((address + width * here, min(cut.step, size - here), start + here, *ids))
            numbers.append(amounts)
    jobs = []
    for dtype, (rows, numbers) in kinds.items():
        with np.errstate(over="ignore"):  # in a run that diverges amounts exceed float32, and are infinite
            table = np.array(rows, np.int64), np.array(numbers, np.float64 if dtype == torch.float64 else np.float32)
        jobs += [(*table, _LIKE[dtype], *fixed, first, last) for first, last in groups([size for _, size, *_ in rows])]
    return jobs


def add_(
    distribution: str, out: torch.Tensor, alpha: float, beta: float, seed: int, tensor_id: int, purpose: int, start: int
) -> None:
    """out = beta * out + alpha * z[start : start + out.numel()], in place, if supports(out)."""
    fixed = distribution == "gaussian", purpose, *_words(seed)
    share(_add, _jobs([(tensor_id, out, alpha, beta)], *fixed, start=start))


def add_all_(
    distribution: str, moves: Sequence[tuple[int, torch.Tensor, float, float]], seed: int, purpose: int
) -> None:
    """add_ on whole tensors, given as (tensor id, out, alpha, beta), if supports(out)."""
    share(_add, _jobs(moves, distribution == "gaussian", purpose, *_words(seed)))


def add_two_all_(
    distribution: str,
    moves: Sequence[tuple[int, torch.Tensor, float, float, float]],
    seeds: tuple[int, int],
    purpose: int,
) -> None:
    """out = beta * out + alpha * z(seeds[0]) + again * z(seeds[1]) on whole tensors, in one pass, if supports(out).

    moves: (tensor id, out, alpha, beta, again). The result is bit-identical to add_all_ with the first seed, then with the
    second, because the sum between the two is rounded to out's type.
    """
    share(_add_two, _jobs(moves, distribution == "gaussian", purpose, *_words(seeds[0]), *_words(seeds[1])))


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
    share(_place, _placings(out, base, alpha, distribution, seed, tensor_id, purpose, start))


def place_all_(
    distribution: str, places: Sequence[tuple[int, torch.Tensor, torch.Tensor, float]], seed: int, purpose: int
) -> None:
    """place_ on whole tensors, given as (tensor id, out, base, alpha)."""
    jobs = [
        _placings(out, base, alpha, distribution, seed, tensor_id, purpose) for tensor_id, out, base, alpha in places
    ]
    share(_place, [job for pieces_of_one in jobs for job in pieces_of_one])


def _placings(
    out: torch.Tensor,
    base: torch.Tensor,
    alpha: float,
    distribution: str,
    seed: int,
    tensor_id: int,
    purpose: int,
    start: int = 0,
) -> list[tuple]:
    """The arguments of calls of _place."""
    fixed = (_number(base)(alpha), distribution == "gaussian", *_counter(seed, tensor_id, purpose))
    to, origin, cut = _array(out), _array(base), pieces(out.numel())
    return [(to[here : here + cut.step], origin[here : here + cut.step], start + here, *fixed) for here in cut]


def dot(distribution: str, other: torch.Tensor, seed: int, tensor_id: int, purpose: int) -> float:
    """<z, other> over a whole tensor, if supports(other); products in other's type, at least float32."""
    array, cut = _array(other), pieces(other.numel())
    sums = np.zeros(len(cut))
    fixed = (distribution == "gaussian", *_counter(seed, tensor_id, purpose))
    share(_dot, [(array[here : here + cut.step], sums, k, here, *fixed) for k, here in enumerate(cut)])
    return float(sums.sum())


def square(distribution: str, size: int, seed: int, tensor_id: int, purpose: int) -> float:
    """|z|^2 over a tensor of that size; products in float64."""
    cut = pieces(size)
    sums, fixed = np.zeros(len(cut)), (distribution == "gaussian", *_counter(seed, tensor_id, purpose))
    share(_squares, [(min(cut.step, size - here), sums, k, here, *fixed) for k, here in enumerate(cut)])
    return float(sums.sum())


def _number(tensor: torch.Tensor) -> type:
    """The type of the arithmetic."""
    return np.float64 if tensor.dtype == torch.float64 else np.float32
