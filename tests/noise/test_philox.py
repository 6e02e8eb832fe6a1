"""The definition of the noise: known answers, the mapping against float64, addressing, seeds, uniforms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numba import njit
from scipy import stats

from metazo.errors import UserError
from metazo.noise import TILE, PhiloxNoise, lanes, philox, wide

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

# Words and the bits of their two normals: smallest, largest, signs, a common one.
PAIRS = {
    0x00000000: (0x3FF3E509, 0x40C5271A),
    0x80000000: (0xBFF3E509, 0x40C5271A),
    0x00000002: (0x409D4D47, 0x4079BEB0),
    0x40000002: (0x409D4D47, 0xC079BEB0),
    0x12345678: (0x3F3E9001, 0x3FB336FA),
    0x3FFFFFFF: (0x3A32428F, 0x395C85D2),
    0xFFFFFFFF: (0xBA32428F, 0xB95C85D2),
}

# (seed, tensor, purpose): elements and the bits of their normals; then the first signs from the first of them on.
STREAMS = {
    (0, 0, 0): (
        {0: 0x3E03B03C, 1: 0xBEACA70D, 15: 0xBDCE2B0D, 16: 0xBF812364, 17: 0xBEB29A8C, 39: 0x3F7A71FF},
        "+-+--+--+----++--+++-+-+-+-++-+---+-------+-++---+++-+++-+----++",
    ),
    (0x123456789ABCDEF0, 0xFEDCBA9876543210, 1): (
        {2048: 0x3E9EC6BE, 2049: 0xBFBC4D67, 2063: 0xBE901067, 2064: 0xBDC19B76, 2065: 0xBFFDA461, 2087: 0xBEF9C4E4},
        "---+-+--++---++---++--+-+-++-+--+-++----+---+-+----+-+-++-+++-++",
    ),
}


def bits(values: torch.Tensor) -> list[int]:
    return [int(value) & 0xFFFFFFFF for value in values.view(torch.int32)]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers_of_philox(counter, key, answer):
    assert tuple(int(w) for w in philox.philox(tuple(torch.tensor(c) for c in counter), key)) == answer
    assert philox.philox(counter, key) == answer  # with Python integers


def test_known_answers_of_the_mapping():
    first, second = philox.normal_pair(torch.tensor(list(PAIRS)))
    assert list(zip(bits(first), bits(second))) == list(PAIRS.values())


@pytest.mark.parametrize("stream", STREAMS)
def test_known_answers_of_streams(stream):
    normals, signs = STREAMS[stream]
    start = min(normals)
    z = philox.gaussian(*stream, start, start + 64)
    assert {element: bits(z[element - start].view(1))[0] for element in normals} == normals
    assert "".join("+" if z > 0 else "-" for z in philox.rademacher(*stream, start, start + 64)) == signs


@njit(error_model="numpy")
def moments_of_pairs():
    """Moments 2, 4, 6, 8 and the difference of variances over 2^26 values, evenly spaced, of the 29 bits."""
    m2 = m4 = m6 = m8 = difference = 0.0
    for value in range(4, 1 << 29, 8):
        first, second = lanes._normal_pair(np.uint32(2 * value))
        a, b = np.float64(first) ** 2, np.float64(second) ** 2
        m2, m4, m6, m8 = m2 + a + b, m4 + a * a + b * b, m6 + a**3 + b**3, m8 + a**4 + b**4
        difference += a - b
    return np.array([m2, m4, m6, m8, difference]) / (1 << 27)


def test_moments_over_the_words():
    """The sample is not random, so the bounds are tight. Signs are separate bits, so odd moments vanish."""
    moments = moments_of_pairs()
    assert abs(moments[0] - 1) < 2e-7
    assert abs(moments[1] - 3) < 2e-5
    assert abs(moments[2] - 15) < 1e-3
    assert abs(moments[3] - 105) < 4e-2
    assert abs(moments[4]) < 2e-6  # both numbers of a pair have the same variance


def test_extreme_words_give_finite_numbers():
    words = torch.cat([torch.arange(1 << 12), torch.arange(2**30 - (1 << 16), 2**30)])
    pairs = torch.stack(philox.normal_pair(words)).double()
    assert pairs.isfinite().all() and float(pairs.square().sum(0).sqrt().max()) < 6.45


def test_box_muller_against_float64():
    words = philox.words(1, 2, 0, 0, 200_000).view(-1)
    first, second = philox.normal_pair(words)
    v = (words >> 1 & 0x1FFFFFFF) * 2 + 1
    radius = torch.sqrt(-2 * torch.log(v.float().double() / 2**30))
    fraction = (v * philox.STRIDE % 2**32).double() / 2**32
    angle = (torch.where(fraction >= 0.5, fraction - 1, fraction) + 0.5) * torch.pi / 2
    signs = [1 - 2 * (words >> bit & 1).double() for bit in (31, 30)]
    for z, direction, sign in zip((first, second), (torch.cos(angle), torch.sin(angle)), signs):
        wanted = radius * direction * sign
        for limit, error in ((0.0, 7.5e-4), (0.1, 2e-5), (1.0, 3.5e-6)):  # the error of the squared radius is 3e-6
            there = radius >= limit
            torch.testing.assert_close(z.double()[there], wanted[there], rtol=0, atol=error)


def test_radius_and_angle_fill_the_square_evenly():
    """Nearest neighbours on the lattice of 2^29 points are almost as far apart as is possible for that many points."""
    size = 1 << 29
    long, short = (size, 0), (philox.STRIDE // 4 % size, 1)
    while True:  # Gauss's reduction
        if math.hypot(*short) > math.hypot(*long):
            long, short = short, long
        times = round((long[0] * short[0] + long[1] * short[1]) / (short[0] ** 2 + short[1] ** 2))
        if times == 0:
            break
        long = (long[0] - times * short[0], long[1] - times * short[1])
    assert philox.STRIDE % 8 == 4
    assert math.hypot(*short) > 0.9 * math.sqrt(size * 2 / math.sqrt(3))


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_does_not_depend_on_chunks(distribution):
    sample = philox.DISTRIBUTIONS[distribution]
    cuts = (0, 3, 130, 641, TILE + 5, 3 * TILE, 3 * TILE + 1, 7000)
    pieces = [sample(9, 7, 0, a, b) for a, b in zip(cuts, cuts[1:])]
    assert torch.equal(sample(9, 7, 0, 0, 7000), torch.cat(pieces))


def test_signs_are_signs():
    assert set(philox.rademacher(2, 3, 0, 0, 1 << 14).unique().tolist()) == {-1.0, 1.0}


def test_a_tensor_beyond_the_counter_is_refused():
    with pytest.raises(OverflowError, match="2\\^35"):
        philox.gaussian(0, 0, 0, 2**35, 2**35 + 1)


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


def test_the_name_tells_distribution_and_version():
    assert PhiloxNoise(0).name == "philox4x32-10/gaussian/2"
    assert PhiloxNoise(0, "rademacher").name == "philox4x32-10/rademacher/2"


@pytest.mark.parametrize("width", [128, 256, 512])
def test_the_loops_and_the_explicit_vectors_make_the_numbers_of_the_definition(width, monkeypatch):
    """A processor takes one of the three forms; all can be compiled for every processor."""
    monkeypatch.setattr(lanes, "WIDE", width > 128)
    monkeypatch.setattr(wide, "WIDTH", width)
    normals = njit(error_model="numpy")(lanes.normals.py_func)
    z, words = np.empty(lanes.CHUNK, np.float32), np.empty(lanes.WORDS, np.uint32)
    for chunk, purpose, tensor, seed in ((0, 0, 0, 0), (1, 3, 7, 9), ((1 << 27) - 1, 15, (1 << 64) - 1, (1 << 64) - 1)):
        places = purpose, tensor & 0xFFFFFFFF, tensor >> 32, seed & 0xFFFFFFFF, seed >> 32
        normals(z, words, chunk, *map(np.uint64, places))
        first = chunk * lanes.CHUNK
        expected = philox.gaussian(seed, tensor, purpose, first, first + lanes.CHUNK)
        assert np.array_equal(z.view(np.uint32), expected.numpy().view(np.uint32)), (chunk, seed)


def test_a_device_without_float64_is_refused(monkeypatch):
    """Such as MPS, which is simulated."""

    def double(tensor):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    monkeypatch.setattr(torch.Tensor, "double", double)
    with pytest.raises(UserError, match="needs float64, which devices of the kind cpu do not have: move the model"):
        philox.gaussian(0, 1, 0, 0, 4)
