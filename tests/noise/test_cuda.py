"""The triton kernels on a GPU: bit-identical to the definition (philox.py) on the CPU."""

from __future__ import annotations

import pytest
import torch

from metazo.blocks import LocalShard, NamedTensor, tensor_id
from metazo.kernels.outer import add_products_, place_products_
from metazo.noise import Move, PhiloxNoise, Place, add_two_all_, philox
from tests.noise.interpreted import DTYPES, PURPOSE, SEED, TENSOR, piece, shards
from tests.noise.test_split import plain_add_, plain_place_, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
KINDS = tuple(philox.DISTRIBUTIONS)
MIXED = ((5, torch.float32), (4099, torch.bfloat16), (70_001, torch.bfloat16), (9, torch.float16))


def named(values: torch.Tensor, name: str = "w") -> NamedTensor:
    return NamedTensor(name, torch.nn.Parameter(values), tensor_id(name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", [0, 6 * philox.TILE])
@pytest.mark.parametrize("size", [1, 77, 2048, 4099, 100_003])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_agree_with_the_definition_to_the_last_bit(kind, size, start, dtype):
    from metazo.noise import cuda

    base, type = torch.linspace(-3, 3, size), dtype
    added = torch.full((size + 1,), 7.0, dtype=type, device="cuda")
    added[:size] = base
    placed = torch.full((size + 1,), 7.0, dtype=type, device="cuda")
    cuda.add_(kind, added[:size], 0.3, 0.7, SEED, TENSOR, PURPOSE, start)
    cuda.place_(kind, placed[:size], base.cuda(), 0.3, SEED, TENSOR, PURPOSE, start)
    z = philox.DISTRIBUTIONS[kind](SEED, TENSOR, PURPOSE, start, start + size)
    assert torch.equal(added[:size].cpu(), (base.to(type).float() * 0.7 + z * 0.3).to(type))
    assert torch.equal(placed[:size].cpu(), (base + z * 0.3).to(type))
    assert added[size] == placed[size] == 7  # nothing is written beyond the end


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_shards_get_the_noise_of_their_places(kind, dtype):
    stream, moves, wanted = PhiloxNoise(0, kind).stream(9), [], []
    for k, (shape, places) in enumerate(shards()):
        whole = named(torch.ones(shape, dtype=dtype), f"w{k}")
        shard = NamedTensor(
            whole.name, LocalShard(piece(whole.param.data, places).cuda(), True, places, shape), whole.id
        )
        wanted.append(piece(stream.draw(whole), places))
        assert torch.equal(stream.draw(shard).cpu(), wanted[-1])
        moves.append(Move(shard, shard.param.data, 0.3, 0.7))
    stream.add_all_(moves)
    wide = torch.promote_types(dtype, torch.float32)
    for move, z in zip(moves, wanted, strict=True):
        assert torch.equal(move.out.cpu(), (torch.ones_like(z) * 0.7 + z.to(wide) * 0.3).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_more_than_2_to_the_31_entries(kind):
    size = (1 << 31) + 3 * philox.TILE + 5
    w = named(torch.zeros(size, dtype=torch.bfloat16, device="cuda"))
    PhiloxNoise(0, kind).stream(5).add_(w, w.param.data, 1.0)
    for first in (0, 1 << 30, (1 << 31) - philox.TILE, size // philox.TILE * philox.TILE - philox.TILE):
        stop = min(first + 3 * philox.TILE, size)
        z = philox.DISTRIBUTIONS[kind](5, w.id, 0, first, stop)
        assert torch.equal(w.param.data[first:stop].cpu(), z.bfloat16()), first


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_makes_the_numbers_of_the_cpu(kind, dtype):
    """Whole tensors, parts of one, tensors that are not contiguous, several in one call, and sums without storing z."""
    stream, values = (
        PhiloxNoise(0, kind).stream(9),
        torch.linspace(-1, 1, 60 * 77).view(60, 77).to(dtype),
    )
    there, here = named(values.cuda()), named(values.clone())
    assert torch.equal(stream.draw(there).cpu(), stream.draw(here))
    for tensor in (there, here):
        stream.add_(tensor, tensor.param.data, 0.25, 0.5)
    assert torch.equal(there.param.cpu(), here.param)
    apart, near = named(values.cuda().t()), named(values.clone().t())
    for tensor in (apart, near):
        stream.add_(tensor, tensor.param.data, 0.25, 0.5)
    assert torch.equal(apart.param.cpu(), near.param)
    shard, whole = named(values.flatten()[100:].cuda()), stream.draw(here).flatten()
    shard.param.start = 100  # type: ignore[attr-defined]
    assert torch.equal(stream.draw(shard).cpu(), whole[100:])
    assert stream.dot(there, there.param.data) == pytest.approx(stream.dot(here, here.param.data), rel=1e-9)
    assert stream.square(there) == pytest.approx(stream.square(here), rel=1e-9)


@pytest.mark.parametrize("low", [torch.int16, torch.int8], ids=str)
@pytest.mark.parametrize("high", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("start", [0, 6 * philox.TILE])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_on_split_weights(kind, start, high, low):
    from metazo.noise import cuda_split

    here = weights(100_003, high, low)
    there, noise = tuple(part.cuda() for part in here), (SEED, TENSOR, PURPOSE, start)
    outs = torch.zeros(100_003, dtype=high), torch.zeros(100_003, dtype=high, device="cuda")
    plain_place_(kind, outs[0], *here, 0.3, *noise)
    cuda_split.place_(kind, outs[1], *there, 0.3, *noise)
    assert torch.equal(outs[0].view(torch.int16), outs[1].cpu().view(torch.int16))
    plain_add_(kind, *here, 0.3, 1.7, *noise, SEED + 5)
    cuda_split.add_(kind, *there, 0.3, 1.7, *noise, SEED + 5)
    assert all(torch.equal(a.view(b.dtype), b) for a, b in zip((part.cpu() for part in there), here))


@pytest.mark.parametrize("kind", KINDS)
def test_placed_in_one_call(kind):
    stream, results = PhiloxNoise(0, kind).stream(3), {}
    for device in ("cpu", "cuda"):
        tensors = [named(torch.zeros(size, dtype=type).to(device), f"w{size}") for size, type in MIXED]
        bases = [torch.linspace(-1, 1, size).to(device) for size, _ in MIXED]
        stream.place_all_([Place(t, t.param.data, base, 0.1 * k) for k, (t, base) in enumerate(zip(tensors, bases))])
        results[device] = [tensor.param.data.cpu() for tensor in tensors]
    assert all(torch.equal(a, b) for a, b in zip(results["cpu"], results["cuda"]))


@pytest.mark.parametrize("rank", [1, 2, 5, 64])
def test_products_of_factors(rank):
    """In place and rounded to bfloat16, as on the CPU to the last bit."""
    results = {}
    for device in ("cpu", "cuda"):
        generator, products, placed = torch.Generator().manual_seed(rank), [], []
        for m, n in ((1, 1), (700, 300), (33, 4097)):
            base, left, right = (torch.randn(shape, generator=generator) for shape in ((m, n), (m, rank), (n, rank)))
            base, left, right = base.to(device), left.to(device), right.to(device)
            out = torch.zeros_like(base, dtype=torch.bfloat16)
            if place_products_([(out, base, left, right, 0.3)]) == [False]:
                moved = base.clone()
                add_products_([(moved, left, right, 0.3, 1.0)])
                out.copy_(moved)
            placed.append(out.cpu())
            products.append((base, left, right, -0.2, 0.7))
        add_products_(products)
        results[device] = [*placed, *(product[0].cpu() for product in products)]
    assert all(torch.equal(a, b) for a, b in zip(results["cpu"], results["cuda"]))


@pytest.mark.parametrize("kind", KINDS)
def test_two_seeds_in_one_call(kind):
    first, second = (PhiloxNoise(0, kind).stream(seed) for seed in (1, 2))
    sizes, results = (5, 4099, 70_001), {}
    for device in ("cpu", "cuda"):
        tensors = [named(torch.linspace(-1, 1, size).to(device), f"w{size}") for size in sizes]
        moves = [Move(tensor, tensor.param.data, 0.3, 0.9) for tensor in tensors]
        add_two_all_(first, second, moves, [0.1, 0.2, 0.3])
        results[device] = [tensor.param.data.cpu() for tensor in tensors]
    assert all(torch.equal(a, b) for a, b in zip(results["cpu"], results["cuda"]))
