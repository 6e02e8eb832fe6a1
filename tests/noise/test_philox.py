"""The noise: known answers, backends bit for bit, independence, distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from metazo.blocks import NamedTensor, tensor_id
from metazo.errors import UserError
from metazo.noise import PhiloxNoise, cpu, philox


def tensor(*shape: int, name: str = "w", dtype=torch.float32) -> NamedTensor:
    return NamedTensor(name, torch.nn.Parameter(torch.zeros(*shape, dtype=dtype)), tensor_id(name))


# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    words = philox.philox(tuple(torch.tensor(c) for c in counter), key)
    assert tuple(int(w) for w in words) == answer


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("size", [1, 3, 127, 128, 131, 4096, (1 << 19) + 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backends_agree_to_the_last_bit(distribution, size, dtype):
    w = tensor(size, dtype=dtype)
    start = torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for beta in (1.0, 0.7):
        outs = []
        for backend in ("auto", "torch"):
            out = start.clone()
            PhiloxNoise(5, distribution, backend).stream(123456789012345).add_(w, out, 0.3, beta)
            outs.append(out)
        assert torch.equal(*outs)
        assert not torch.equal(outs[0], start)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_does_not_depend_on_chunks_or_threads(distribution):
    whole = philox.DISTRIBUTIONS[distribution](9, 7, 0, 0, 1000)
    pieces = [philox.DISTRIBUTIONS[distribution](9, 7, 0, a, b) for a, b in ((0, 3), (3, 130), (130, 641), (641, 1000))]
    assert torch.equal(whole, torch.cat(pieces))
    w, before = tensor(700_001), torch.get_num_threads()
    draws = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            draws.append(PhiloxNoise(0, distribution).stream(4).draw(w))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*draws)


def test_numba_backend_is_in_use():
    assert cpu is not None and cpu.supports(torch.zeros(3))


def test_narrow_and_strided_tensors_round_once():
    w = tensor(50, 30, dtype=torch.bfloat16)
    z = PhiloxNoise(0).stream(1).draw(w)
    assert z.dtype == torch.float32
    out = torch.full((50, 30), 0.25, dtype=torch.bfloat16)
    PhiloxNoise(0).stream(1).add_(w, out, 0.1)
    assert torch.equal(out, (0.25 + z * 0.1).to(torch.bfloat16))
    strided = torch.zeros(30, 50).t()
    PhiloxNoise(0).stream(1).add_(w, strided, 1.0)
    assert torch.equal(strided, z)


def test_moments_and_tails():
    z = philox.gaussian(2, 3, 0, 0, 1 << 22).double().numpy()
    n = z.size
    assert abs(z.mean()) < 4 / n**0.5
    assert abs((z**2).mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    for limit in (1.0, 2.0, 3.0, 4.0):
        expected = 2 * stats.norm.sf(limit)
        assert abs((abs(z) > limit).mean() - expected) < 4 * (expected / n) ** 0.5
    assert stats.kstest(z[: 1 << 18], "norm").pvalue > 1e-3


def test_box_muller_against_float64():
    words = philox.words(1, 2, 0, 0, 200_000).view(-1)
    first, second = philox.normal_pair(words)
    v = (words >> 1 & 0x1FFFFFFF) * 2 + 1
    radius = torch.sqrt(-2 * torch.log(v.float().double() / 2**30))
    fraction = (v * philox.STRIDE % 2**32).double() / 2**32
    angle = (torch.where(fraction >= 0.5, fraction - 1, fraction) + 0.5) * torch.pi / 2
    signs = [1 - 2 * (words >> bit & 1).double() for bit in (31, 30)]
    common = radius > 0.01
    for z, direction, sign in zip((first, second), (torch.cos(angle), torch.sin(angle)), signs):
        torch.testing.assert_close(z.double(), radius * direction * sign, rtol=0, atol=1e-3)
        torch.testing.assert_close(z.double()[common], (radius * direction * sign)[common], rtol=0, atol=2e-4)


def test_signs_are_balanced_signs():
    z = philox.rademacher(2, 3, 0, 0, 1 << 20)
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert abs(z.mean()) < 4 / (1 << 10)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_streams_are_uncorrelated(distribution):
    sample, n = philox.DISTRIBUTIONS[distribution], 1 << 18
    base = sample(10, 20, 0, 0, n)
    others = {
        "neighbouring seed": sample(11, 20, 0, 0, n),
        "neighbouring tensor": sample(10, 21, 0, 0, n),
        "other purpose": sample(10, 20, 1, 0, n),
        "high seed bits": sample(10 + (1 << 32), 20, 0, 0, n),
        "high id bits": sample(10, 20 + (1 << 32), 0, 0, n),
        "lag 1": torch.roll(base, 1),
        "lag 2": torch.roll(base, 2),
    }
    for name, other in others.items():
        correlation = float((base * other).mean())
        assert abs(correlation) < 4.5 / n**0.5, name
    squares = base**2 - 1
    if distribution == "gaussian":
        assert abs(float((squares * (torch.roll(base, 1) ** 2 - 1)).mean())) < 4.5 * 2 / n**0.5


def test_seeds_of_steps_and_queries_differ():
    noise = PhiloxNoise(3)
    seeds = {noise.seed(step, query) for step in range(200) for query in range(8)}
    assert len(seeds) == 1600 and all(0 <= seed < 2**63 for seed in seeds)
    assert noise.seed(7, 1) == PhiloxNoise(3).seed(7, 1) != PhiloxNoise(4).seed(7, 1)


def test_uniforms():
    u = np.concatenate([PhiloxNoise(1).uniform(step, 7) for step in range(3000)])
    assert stats.kstest(u, "uniform").pvalue > 1e-3 and u.min() >= 0 and u.max() < 1


def test_unknown_distribution_is_named():
    with pytest.raises(UserError, match="cauchy"):
        PhiloxNoise(0, "cauchy")
