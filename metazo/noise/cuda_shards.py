"""Noise on shards of tensors, on CUDA with triton: as cuda.py, with one launch for all shards of the same types.

The twin of cpu_shards.py, bit for bit. A program has one tile of one span; its numbers outside the span are not used.
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportOptionalSubscript=false
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# (pyright checks triton kernels as the Python functions that they are before compilation)

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from metazo.blocks import Spans
from metazo.kernels.launches import as_float, ends, find, int64, on_device, table
from metazo.noise import cuda
from metazo.noise.cuda import normal_pair, normal_places, sign_places, sign_rows, words

_FEWEST = 32  # Philox blocks per program, 256 normals, for short spans


@triton.jit
def _blend(out, base, place, first, stop, z, alpha, beta):
    inside = (place >= first) & (place < stop)
    value = beta * tl.load(base + place, inside).to(tl.float32) + alpha * z
    tl.store(out + place, value.to(out.dtype.element_ty), inside)


@triton.jit
def _shards(table, ends, like, base_like, gaussian: tl.constexpr, blocks: tl.constexpr):
    """All shards of a table (see _launch). like, base_like: tensors of the types of out and base."""
    program = tl.program_id(0).to(tl.int64)
    count, purpose, seed = tl.load(table), tl.load(table + 1), tl.load(table + 2)
    k, begin = find(ends, count, program)
    row = table + (k + 1) * 8
    out = tl.load(row).to(tl.pointer_type(like.dtype.element_ty))
    base = tl.load(row + 1).to(tl.pointer_type(base_like.dtype.element_ty))
    here = tl.load(row + 2).to(tl.pointer_type(tl.int64))
    there = tl.load(row + 3).to(tl.pointer_type(tl.int64))
    tiles, id = tl.load(row + 4), tl.load(row + 5)
    alpha, beta = as_float(tl.load(row + 6)), as_float(tl.load(row + 7))
    span = (program - begin) // tiles
    first, stop = tl.load(here + span), tl.load(here + span + 1)
    before = tl.load(there + span) - first
    entries = blocks * (8 if gaussian else 128)
    tile = (before + first) // entries + (program - begin) % tiles
    start = tile * entries - before  # the place in out of the tile's first number
    block = tl.arange(0, blocks)
    w0, w1, w2, w3 = words(block + tile * blocks, purpose, id, id >> 32, seed, seed >> 32)
    if gaussian:
        place = start + normal_places(block)
        for i in tl.static_range(4):
            word = w0 if i == 0 else w1 if i == 1 else w2 if i == 2 else w3
            z0, z1 = normal_pair(word)
            _blend(out, base, place + 32 * i, first, stop, z0, alpha, beta)
            _blend(out, base, place + 32 * i + 16, first, stop, z1, alpha, beta)
    else:
        place = start + sign_places(block)
        for i in tl.static_range(4):
            word = w0 if i == 0 else w1 if i == 1 else w2 if i == 2 else w3
            _blend(out, base, place + 16 * i, first, stop, sign_rows(word, blocks), alpha, beta)


Row = tuple[int, Tensor, Tensor, float, float, Spans]
"""(tensor id, out, base, alpha, beta, spans of out)"""


def add_all_(
    distribution: str, moves: Iterable[tuple[int, Tensor, float, float, Spans]], seed: int, purpose: int
) -> None:
    """out = beta * out + alpha * z on shards, given as (tensor id, out, alpha, beta, spans of out), if cuda.supports(out)."""
    _launch(distribution, [(id, out, out, alpha, beta, spans) for id, out, alpha, beta, spans in moves], seed, purpose)


def place_all_(
    distribution: str, places: Iterable[tuple[int, Tensor, Tensor, float, Spans]], seed: int, purpose: int
) -> None:
    """out = base + alpha * z on shards, given as (tensor id, out, base, alpha, spans of out), if cuda.supports(out, base)."""
    _launch(distribution, [(id, out, base, alpha, 1.0, spans) for id, out, base, alpha, spans in places], seed, purpose)


def _launch(distribution: str, rows: Sequence[Row], seed: int, purpose: int) -> None:
    """One launch for all shards of the same types and about the same length of spans, from a table of int64 on the device.

    Row 0: number of shards, purpose, seed. A row per shard: addresses of out, base and the two tables of its spans, programs
    per span, id, and the bits of alpha and beta.
    """
    gaussian, most, _ = cuda.cut(distribution)
    alike = defaultdict(list)
    for row in rows:
        if row[1].numel():
            alike[row[1].device, row[1].dtype, row[2].dtype, _blocks(row[5], most) if gaussian else most].append(row)
    for (device, _, _, blocks), group in alike.items():
        kept = [_on(spans, device) for *_, spans in group]  # until the launch
        tiles = [_tiles(spans, blocks * (8 if gaussian else 128)) for *_, spans in group]
        integers = [
            (out.data_ptr(), base.data_ptr(), *(part.data_ptr() for part in spans), count, int64(id))
            for (id, out, base, *_), spans, count in zip(group, kept, tiles)
        ]
        programs = tuple(count * len(row[5].there) for count, row in zip(tiles, group))
        with torch.cuda.device_of(group[0][1]):
            _shards[(sum(programs),)](
                table([len(group), purpose, int64(seed)], integers, [row[3:5] for row in group], device),
                ends(programs, device), *group[0][1:3], gaussian=gaussian, blocks=blocks, enable_fp_fusion=False,
            )  # fmt: skip


def _blocks(spans: Spans, most: int) -> int:
    """Philox blocks of normals per program: a power of two that fits the longest span, within limits."""
    longest = int(np.diff(spans.here).max())
    return min(max(triton.next_power_of_2(-(-longest // 8)), _FEWEST), most)


def _tiles(spans: Spans, entries: int) -> int:
    """The most tiles of so many entries of the whole tensor that a span touches."""
    return int(((spans.there + np.diff(spans.here) - 1) // entries - spans.there // entries).max()) + 1


def _on(spans: Spans, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tables of spans on a device, kept from one launch to the next."""
    if device not in spans.kept:
        spans.kept[device] = on_device(spans.here, device), on_device(spans.there, device)
    return spans.kept[device]
