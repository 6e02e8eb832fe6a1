"""The compiled form on the CPU against the plain one: every type, shape, chunk and number of threads, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from metazo.blocks import NamedTensor, tensor_id
from metazo.noise import DENSE, TILE, Move, PhiloxNoise, Place, TorchOrderNoise, add_two_all_, backends, cpu

DISTRIBUTIONS = ("gaussian", "rademacher")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SEED = 0x7EDCBA9876543210
each_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def tensor(*shape: int, name: str = "w", dtype=torch.float32) -> NamedTensor:
    return NamedTensor(name, torch.nn.Parameter(torch.zeros(*shape, dtype=dtype)), tensor_id(name))


def random(size: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)).to(dtype)


def streams(distribution: str):
    return [PhiloxNoise(5, distribution, backend).stream(SEED) for backend in ("auto", "torch")]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_numba_is_in_use():
    assert backends()["cpu"] == "numba"
    assert all(cpu.supports(torch.zeros(3, dtype=dtype)) for dtype in DTYPES)


@each_distribution
@each_dtype
@pytest.mark.parametrize("size", [0, 1, 3, 127, 128, 131, TILE - 1, TILE, 5003])
@pytest.mark.parametrize("start", [0, TILE, 37 * TILE])
def test_add_agrees_to_the_last_bit(distribution, dtype, size, start):
    w = tensor(size, dtype=dtype)
    for alpha, beta in ((0.3, 1.0), (-1e-3, 0.7), (1.0, 0.0)):
        compiled, plain = random(size, dtype), random(size, dtype)
        for stream, out in zip(streams(distribution), (compiled, plain)):
            stream.add_(w, out, alpha, beta, 2, start)
        assert torch.equal(compiled, plain)
        assert size < 100 or not torch.equal(plain, random(size, dtype))


@each_distribution
@each_dtype
@pytest.mark.parametrize("size", [0, 1, 129, TILE + 5])
@pytest.mark.parametrize("start", [0, 5 * TILE])
def test_place_agrees_and_rounds_once(distribution, dtype, size, start):
    w, base = tensor(size, dtype=dtype), random(size)
    compiled, plain = torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)
    for stream, out in zip(streams(distribution), (compiled, plain)):
        stream.place_(w, out, base, 0.3, 1, start)
    z = streams(distribution)[0].draw(w, purpose=1, start=start)
    assert torch.equal(compiled, plain)
    assert torch.equal(compiled, (base + 0.3 * z.float()).to(dtype))
    assert torch.equal(base, random(size))


@each_distribution
def test_pieces_are_parts_of_the_whole(distribution):
    w = tensor(9, TILE)
    stream = streams(distribution)[0]
    whole = stream.draw(w).view(-1)
    for start, count in ((0, 5), (TILE, TILE), (3 * TILE, 2 * TILE + 77), (8 * TILE, TILE)):
        assert torch.equal(stream.draw(w, start=start, count=count), whole[start : start + count])
    with pytest.raises(ValueError, match=f"multiple of {TILE}"):
        stream.draw(w, start=128, count=4)


@each_distribution
@each_dtype
def test_does_not_depend_on_threads(distribution, dtype, threads):
    size = 700_001
    w, base, results = tensor(size, dtype=dtype), random(size), []
    for count in (1, 2, 3):
        threads(count)
        stream, added, placed = streams(distribution)[0], random(size, dtype), torch.empty(size, dtype=dtype)
        stream.add_(w, added, 0.1, 0.9)
        stream.place_(w, placed, base, 0.1)
        results.append((added, placed))
    for added, placed in results[1:]:
        assert torch.equal(added, results[0][0]) and torch.equal(placed, results[0][1])


@each_dtype
def test_what_is_not_finite_stays_so(dtype):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 3e38], dtype=torch.float32)
    for stream in streams("gaussian"):
        out = special.to(dtype)
        stream.add_(tensor(6), out, 0.0)
        assert torch.equal(out.isnan(), special.to(dtype).isnan()) and torch.equal(out[1:], special.to(dtype)[1:])
        placed = torch.empty(6, dtype=dtype)
        stream.place_(tensor(6), placed, special, 0.0)
        assert placed[0].isnan() and torch.equal(placed[1:], special.to(dtype)[1:])


@pytest.mark.filterwarnings("error")
def test_an_amount_beyond_float32_is_infinite_without_a_word():
    """As in a run that diverges, which has a message of its own."""
    w = tensor(131)
    for stream in streams("rademacher"):
        out = random(131)
        stream.add_(w, out, 1e39)
        assert out.isinf().all() and torch.equal(out.sign(), stream.draw(w).sign())


def test_narrow_rounding_is_to_nearest_even():
    base = torch.arange(1 << 16, dtype=torch.int32).mul(65537).view(torch.float32)  # all exponents, many ties
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.empty(base.shape, dtype=dtype)
        streams("gaussian")[0].place_(tensor(1 << 16), out, base, 0.0)
        wanted = base.to(dtype)
        assert torch.equal(out.isnan(), wanted.isnan())
        assert torch.equal(out[~wanted.isnan()], wanted[~wanted.isnan()])


def test_strided_and_shaped_tensors():
    w = tensor(50, 30)
    for stream in streams("gaussian"):
        z = stream.draw(w)
        strided, base = torch.zeros(30, 50).t(), torch.ones(30, 50).t()
        stream.add_(w, strided, 1.0)
        assert torch.equal(strided, z)
        stream.place_(w, strided, base, 0.5)
        assert torch.equal(strided, 1 + 0.5 * z)
        assert torch.equal(stream.draw(w, (30, 50)).view(-1), z.view(-1))


def test_draws_are_wide_unless_told():
    stream = streams("gaussian")[0]
    assert stream.draw(tensor(3, dtype=torch.bfloat16)).dtype == torch.float32
    assert stream.draw(tensor(3, dtype=torch.float64)).dtype == torch.float64
    assert stream.draw(tensor(3), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_noise_in_order_is_kept_so_that_chunks_and_repeats_are_the_same_numbers():
    noise, w, v = TorchOrderNoise(0), tensor(TILE * 2), tensor(5, name="v")
    stream = noise.stream(1)
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(t.param.shape, generator=generator) for t in (w, v))
    noise.expect(1, [(w, None, DENSE), (v, None, DENSE)])
    assert torch.equal(noise.stream(1).draw(v), second) and torch.equal(stream.draw(w), first)
    assert torch.equal(stream.draw(w, start=TILE, count=7), first[TILE : TILE + 7])
    out = torch.zeros(TILE)
    stream.add_(w, out, 2.0, start=TILE)
    assert torch.equal(out, 2 * first[TILE:])
    assert noise.stream(1).draw(w).zero_() is not None and torch.equal(stream.draw(w), first)
    assert stream.square(w) == pytest.approx(float(first.double().square().sum()))
    assert stream.dot(v, second) == pytest.approx(float(second.double().square().sum()))
    noise.forget(1)
    assert torch.equal(noise.stream(1).draw(v), torch.randn(5, generator=torch.Generator().manual_seed(1)))


def test_noise_in_order_places_what_it_adds():
    w = tensor(40, 3)
    added, placed = torch.ones(40, 3), torch.empty(40, 3)
    TorchOrderNoise(0).stream(1).add_(w, added, 0.25)
    TorchOrderNoise(0).stream(1).place_(w, placed, torch.ones(40, 3), 0.25)
    assert torch.equal(added, placed)


DRAW = """
import torch
from metazo.blocks import NamedTensor
from metazo.noise import PhiloxNoise, backends
w = NamedTensor("w", torch.nn.Parameter(torch.zeros(300)), 5)
print(backends()["cpu"])
print(PhiloxNoise(0).stream(3).draw(w).double().sum().item().hex())
"""


def drawn(setup: str = "", end: str = "", **environment: str) -> str:
    """Make the noise in a separate process; its numbers are compared with those of this process."""
    command, environment = [sys.executable, "-c", setup + DRAW + end], os.environ | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    how, total = done.stdout.splitlines()
    w = NamedTensor("w", torch.nn.Parameter(torch.zeros(300)), 5)
    assert total == PhiloxNoise(0).stream(3).draw(w).double().sum().item().hex()
    return how


def test_without_numba_the_numbers_are_the_same_and_the_reason_is_told():
    how = drawn('import sys; sys.modules["numba"] = None')
    assert how.startswith("plain torch") and "numba" in how


def test_a_user_without_a_home_folder_gets_no_cache_in_the_working_directory(tmp_path, monkeypatch):
    """As in a container that is started with a user id of its own (docker run --user 12345)."""
    for name in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    setup = "import os, pwd; pwd.getpwuid = {}.__getitem__"
    end = "assert 'HOME' not in os.environ"
    assert drawn(setup, end, NUMBA_CACHE_LOCATOR_CLASSES="UserWideCacheLocator") == "numba"
    assert not any(tmp_path.iterdir())


def test_works_where_no_cache_can_be_written():
    environment = {"NUMBA_CACHE_DIR": "/dev/null/cache", "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    assert drawn(**environment) == "numba"


@each_distribution
@each_dtype
def test_many_tensors_at_once_are_as_one_by_one(distribution, dtype, threads):
    tensors = [tensor(size, name=f"w{size}", dtype=dtype) for size in (3, TILE, 150_001, 300_000)]
    for count in (1, 3):
        threads(count)
        for stream in streams(distribution):
            outs = [[random(w.param.numel(), dtype) for w in tensors] for _ in range(2)]
            for w, out in zip(tensors, outs[0]):
                stream.add_(w, out, 0.3, 0.7, 1)
            stream.add_all_([Move(w, out, 0.3, 0.7) for w, out in zip(tensors, outs[1])], 1)
            assert all(torch.equal(a, b) for a, b in zip(*outs))


@each_distribution
@each_dtype
def test_many_tensors_are_placed_at_once_as_one_by_one(distribution, dtype, threads):
    tensors = [tensor(size, name=f"w{size}", dtype=dtype) for size in (0, 3, TILE, 150_001, 300_000)]
    bases = [random(w.param.numel()) for w in tensors]
    bases[1] = bases[1].double()  # which no kernel takes
    for count in (1, 3):
        threads(count)
        for stream in streams(distribution):
            outs = [[torch.full(w.param.shape, 7.0, dtype=dtype) for w in tensors] for _ in range(2)]
            for k, (w, out, base) in enumerate(zip(tensors, outs[0], bases)):
                stream.place_(w, out, base, 0.3 + k)
            stream.place_all_(
                [Place(w, out, base, 0.3 + k) for k, (w, out, base) in enumerate(zip(tensors, outs[1], bases))]
            )
            assert all(torch.equal(a, b) for a, b in zip(*outs))


@each_distribution
@each_dtype
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_two_seeds_in_one_pass_are_as_one_after_the_other(distribution, dtype, backend, threads):
    tensors = [tensor(size, name=f"w{size}", dtype=dtype) for size in (3, 300, TILE + 1, 300_000)]
    noise = PhiloxNoise(5, distribution, backend)
    for count in (1, 3):
        threads(count)
        outs = [[random(w.param.numel(), dtype) for w in tensors] for _ in range(2)]
        moves = [[Move(w, out, 0.3 + k, 0.7) for k, (w, out) in enumerate(zip(tensors, each))] for each in outs]
        again = [-0.2 - k for k in range(len(tensors))]
        noise.stream(SEED).add_all_(moves[0])
        noise.stream(9).add_all_([Move(m.tensor, m.out, amount) for m, amount in zip(moves[0], again)])
        add_two_all_(noise.stream(SEED), noise.stream(9), moves[1], again)
        assert all(torch.equal(a, b) for a, b in zip(*outs))
        assert not torch.equal(outs[0][3], random(300_000, dtype))


def test_two_seeds_on_tensors_that_no_kernel_supports():
    strided, plain = torch.zeros(30, 50).t(), torch.zeros(50, 30)
    w, noise = tensor(50, 30), PhiloxNoise(5)
    add_two_all_(noise.stream(1), noise.stream(2), [Move(w, strided, 1.0), Move(w, plain, 1.0)], [0.5, 0.5])
    assert torch.equal(strided, noise.stream(1).draw(w) + 0.5 * noise.stream(2).draw(w))
    assert torch.equal(plain, strided)


def test_a_forked_child_has_threads_of_its_own(threads):
    threads(2)
    w, out, again = tensor(300_000), torch.zeros(300_000), torch.zeros(300_000)
    stream = PhiloxNoise(5).stream(SEED)
    stream.add_(w, out, 1.0)
    child = os.fork()
    if not child:  # no function of torch here, because its threads do not survive a fork
        signal.alarm(20)
        stream.add_(w, again, 1.0)
        os._exit(0 if np.array_equal(again.numpy(), out.numpy()) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@each_distribution
@each_dtype
@pytest.mark.parametrize("size", [0, 1, 127, 5003, 300_000])
def test_dot_and_square_are_those_of_what_is_drawn(distribution, dtype, size, threads):
    w, other = tensor(size, dtype=dtype), random(size, dtype)
    found = []
    for count in (1, 3):
        threads(count)
        for stream in streams(distribution):
            wanted = torch.dot(stream.draw(w).double(), other.double()).item()
            found.append(stream.dot(w, other))
            scale = (stream.draw(w).double() * other.double()).norm().item()
            assert abs(found[-1] - wanted) <= 1e-6 * scale
            assert stream.square(w) == pytest.approx(stream.draw(w).double().square().sum().item(), rel=1e-12)
    assert found[2] == pytest.approx(found[0], rel=1e-6, abs=1e-9)


def test_no_noise_is_calculated_for_tensors_without_numbers(monkeypatch):
    """A dry run follows steps on the meta device; EGGROLL's draws took minutes for a model of 7B."""
    monkeypatch.setattr("metazo.noise.philox.words", None)
    meta = NamedTensor("w", torch.nn.Parameter(torch.zeros(3, 1000, device="meta")), tensor_id("w"))
    for backend in ("auto", "torch"):
        stream = PhiloxNoise(5, "gaussian", backend).stream(SEED)
        assert stream.draw(meta).is_meta
        stream.add_all_([Move(meta, meta.param.data, 1.0)])
        stream.place_(meta, meta.param.data, meta.param.data, 1.0)
