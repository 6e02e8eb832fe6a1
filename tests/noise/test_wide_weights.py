"""Sums of weights and noise as explicit vectors, against the definition with torch alone, bit for bit."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from llvmlite import binding
from numba import njit

from metazo.kernels.splitfloat import plain_join, plain_split, split
from metazo.noise import cpu, cpu_split, philox, wide, wide_weights
from metazo.noise.lanes import CHUNK

SEED, OTHER, ID, ROUNDING = 0x7EDCBA9876543210, 5, 0x123456789ABCDEF0, 0x13579BDF2468ACE0
ALPHA, BETA = 0.37, 0.7
CHUNKS = 3
EACH = pytest.mark.parametrize(("width", "converts"), [(256, False), (512, False), pytest.param(
    512, True, marks=pytest.mark.skipif(not wide_weights._CONVERTS, reason="this processor has no conversion to bfloat16")
)])  # fmt: skip
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
NARROW = pytest.mark.parametrize(
    ("dtype", "below"), [(h, w) for h in (torch.bfloat16, torch.float16) for w in (torch.int16, torch.int8)], ids=str
)


@pytest.fixture
def vectors(width, converts, monkeypatch):
    """The sums of wide_weights, compiled here, as functions of (*arrays, here, *others); any processor can run them."""
    monkeypatch.setattr(wide_weights, "WIDE", True)
    monkeypatch.setattr(wide, "WIDTH", width)
    monkeypatch.setattr(wide_weights, "_CONVERTS", converts)
    add, place, place_split, add_split = (
        getattr(wide_weights, name) for name in ("wide_add", "wide_place", "wide_place_split", "wide_add_split")
    )
    # New functions for each form, because an intrinsic writes its instructions when a caller is compiled.
    return {
        "add": njit(lambda out, here, a, b, c, p, i, j, k, m: add(out, here, a, b, c, p, i, j, k, m)),
        "place": njit(lambda out, base, here, a, c, p, i, j, k, m: place(out, base, here, a, c, p, i, j, k, m)),
        "place_split": njit(
            lambda out, high, low, here, a, c, p, i, j, k, m: place_split(out, high, low, here, a, c, p, i, j, k, m)
        ),
        "add_split": njit(
            lambda high, low, here, first, a, b, d, c, p, i, j, k, m: add_split(
                high, low, here, first, a, b, d, c, p, i, j, k, m
            )
        ),
    }


def weights(dtype: torch.dtype, chunks: int = CHUNKS) -> torch.Tensor:
    """Random weights of many magnitudes."""
    size, generator = chunks * CHUNK, torch.Generator().manual_seed(3)
    magnitudes = 10 ** (torch.rand(size, generator=generator) * 6 - 5)
    return (torch.randn(size, generator=generator) * magnitudes).to(dtype)


def halves(dtype: torch.dtype, below: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    theta = weights(torch.float32)
    theta[:3] = torch.tensor([7e4, -1e6, 1e38])  # beyond float16
    high, low = torch.empty(len(theta), dtype=dtype), torch.empty(len(theta), dtype=below)
    split(theta, high, low, 0, 1)
    return high, low


def z(chunk: int, seed: int = SEED, chunks: int = CHUNKS) -> torch.Tensor:
    return philox.gaussian(seed, ID, 2, chunk * CHUNK, (chunk + chunks) * CHUNK)


def counters(chunk: int) -> list[np.uint64]:
    return [np.uint64(value) for value in (chunk, *cpu._counter(SEED, ID, 2))]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.view(bits), b.view(bits)) if a.dtype.is_floating_point else torch.equal(a, b)


FIRST = (1 << 27) - CHUNKS  # the last chunks of the longest tensor


@EACH
@TYPES
def test_noise_is_added_to_weights(vectors, dtype):
    out = weights(dtype)
    expected = (out.float() * BETA + z(FIRST) * ALPHA).to(dtype)
    for chunk in range(CHUNKS):
        here = chunk * CHUNK, np.float32(ALPHA), np.float32(BETA)
        assert vectors["add"](cpu._array(out), *here, *counters(FIRST + chunk))
    assert same(out, expected)


@EACH
@TYPES
def test_a_probe_is_placed(vectors, dtype):
    base, out = weights(torch.float32), torch.empty(CHUNKS * CHUNK, dtype=dtype)
    for chunk in range(CHUNKS):
        here = chunk * CHUNK, np.float32(ALPHA)
        assert vectors["place"](cpu._array(out), base.numpy(), *here, *counters(FIRST + chunk))
    assert same(out, (base + z(FIRST) * ALPHA).to(dtype))


@EACH
@NARROW
def test_a_probe_of_split_weights_is_placed(vectors, dtype, below):
    high, low = halves(dtype, below)
    out = torch.empty_like(high)
    for chunk in range(CHUNKS):
        here = chunk * CHUNK, np.float32(ALPHA)
        assert vectors["place_split"](cpu._array(out), cpu._array(high), low.numpy(), *here, *counters(FIRST + chunk))
    assert same(out, (plain_join(high, low) + z(FIRST) * ALPHA).to(dtype))


@pytest.mark.parametrize(("width", "converts"), [(256, False), (512, False)])
@NARROW
@pytest.mark.parametrize("start", [0, 1 << 31])
def test_noise_is_added_to_split_weights(vectors, dtype, below, start):
    high, low = halves(dtype, below)
    beta = 1.5  # what is infinite in float16 stays so
    expected = high.clone(), low.clone()
    first = start // CHUNK
    plain_split(plain_join(high, low) * beta + z(first) * ALPHA, *expected, start, ROUNDING)
    scalars = np.float32(ALPHA), np.float32(beta), np.int32((ROUNDING ^ ROUNDING >> 32) & 0x7FFFFFFF)
    for chunk in range(CHUNKS):
        element = np.int64(start + chunk * CHUNK).astype(np.int32)
        here = chunk * CHUNK, element, *scalars
        vectors["add_split"](cpu._array(high), low.numpy(), *here, *counters(first + chunk))
    assert same(high, expected[0]) and same(low, expected[1])


SPECIAL = (1e-39, -3e-41, 0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.2e-38)


def special(count: int) -> torch.Tensor:
    w = torch.tensor(SPECIAL).repeat(-(-count // len(SPECIAL)))[:count].to(torch.bfloat16)
    w.view(torch.int16)[w.isnan()] = 0x7F81  # not that which a sum of numbers gives
    return w


def rounded(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the bits are the same; what is no number is 0x7FC0, and has others in torch."""
    number = ~b.isnan()
    return same(a[number], b[number]) and bool((a.view(torch.int16)[~number] == 0x7FC0).all())


@pytest.mark.parametrize("finite", [False, True], ids=["not finite", "below 2^-126"])
@pytest.mark.parametrize("size", [CHUNK, 3 * CHUNK + 5])
def test_what_a_processor_converts_in_another_way_is_rounded_as_defined(size, finite):
    w = special(size)
    w[CHUNK // 2 :] = 0.5  # and chunks without
    if finite:
        w[~w.isfinite()] = 2e-40
    alpha, zs = 1e-39, [philox.gaussian(seed, ID, 2, 0, size) for seed in (SEED, OTHER)]
    added, low = w.clone(), torch.zeros(size, dtype=torch.int16)
    cpu.add_("gaussian", added, alpha, 1.0, SEED, ID, 2, 0)
    once = (w.float() + zs[0] * alpha).to(torch.bfloat16)
    assert rounded(added, once)
    two = w.clone()
    cpu.add_two_all_("gaussian", [(ID, two, alpha, 1.0, alpha)], (SEED, OTHER), 2)
    assert rounded(two, (once.float() + zs[1] * alpha).to(torch.bfloat16))
    turned = w.clone()  # special after the second sum alone
    cpu.add_two_all_("gaussian", [(ID, turned, 0.25, 1.0, -0.25)], (SEED, SEED), 2)
    between = (w.float() + zs[0] * 0.25).to(torch.bfloat16)
    assert rounded(turned, (between.float() - zs[0] * 0.25).to(torch.bfloat16))
    for place, origin in ((cpu.place_, (w.float(),)), (cpu_split.place_, (w, low))):
        out = torch.full_like(w, 7.0)
        place("gaussian", out, *origin, alpha, SEED, ID, 2, 0)
        assert rounded(out, once)


@pytest.mark.skipif(not wide_weights._CONVERTS, reason="this processor has no conversion to bfloat16")
def test_old_compilers_whose_instruction_has_another_type_are_not_asked_for_it(monkeypatch):
    """numba 0.60 and 0.61, with LLVM 14 and 15, refuse a function that has it."""
    spec = importlib.util.find_spec(wide_weights.__name__)
    for version, converts in (((14, 0, 6), False), ((15, 0, 7), False), ((20, 1, 8), True)):
        monkeypatch.setattr(binding, "llvm_version_info", version)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert bool(module._CONVERTS) is converts
