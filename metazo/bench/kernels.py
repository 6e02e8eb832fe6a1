"""Parameters per second of each kernel, compared with the limit of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metazo.bench.timing import interleaved, spread
from metazo.blocks import NamedTensor, tensor_id
from metazo.kernels.outer import add_product_, plain_
from metazo.noise import Move, PhiloxNoise

DTYPES = ("float32", "bfloat16", "float16")


def measure(
    threads: int, count: int, *, rounds: int = 5, device: str = "cpu", tick: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Rows of {case, dtype, rate}, rate in millions of parameters a second, on one tensor of `count` entries."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = []
        for dtype in DTYPES:
            cases = _cases(torch.zeros(count, dtype=getattr(torch, dtype), device=device))
            samples = interleaved(cases, rounds, seconds=3.0, device=device, tick=tick)
            for name, values in samples.items():
                rows.append({"case": name, "dtype": dtype, "rate": spread([count / 1e6 / value for value in values])})
        return rows
    finally:
        torch.set_num_threads(before)


def _cases(weights: Tensor) -> dict[str, Callable[[], object]]:
    """All kernels on the same weights, so that the location in memory affects none of them differently."""
    tensor = NamedTensor("bench", torch.nn.Parameter(weights), tensor_id("bench"))
    out = tensor.param.data
    gaussian, rademacher = (PhiloxNoise(0, kind).stream(1) for kind in ("gaussian", "rademacher"))
    cases: dict[str, Callable[[], object]] = {
        "plain add: w += a": lambda: out.add_(1e-9),
        "Gaussian: w += a z": lambda: gaussian.add_(tensor, out, 1e-9),
        "Gaussian: w = b w + a z": lambda: gaussian.add_(tensor, out, 1e-9, 0.999),
        "Rademacher: w += a z": lambda: rademacher.add_(tensor, out, 1e-9),
    }
    if weights.dtype == torch.float32:
        return cases | {
            "torch's normal_": lambda: torch.empty_like(out).normal_(),
            "published: w = w + a z": lambda: _published(out),
            **_low_rank(out),
            **_many(out),
        }
    master = weights.float()
    return cases | {
        "plain copy: w = master": lambda: out.copy_(master),
        "Gaussian: w = master + a z": lambda: gaussian.place_(tensor, out, master, 1e-9),
        "Rademacher: w = master + a z": lambda: rademacher.place_(tensor, out, master, 1e-9),
    }


def _low_rank(out: Tensor) -> dict[str, Callable[[], object]]:
    """LOZO's update of a matrix with rows of 1,024, rank 2."""
    matrix = out.view(-1, 1024)
    left, right = torch.ones(len(matrix), 2, device=out.device), torch.ones(1024, 2, device=out.device)
    return {
        "rank 2: W += a U V^T": lambda: add_product_(matrix, left, right, 1e-9, 1.0),
        "rank 2 by addmm": lambda: plain_(matrix, left, right, 1e-9, 1.0),
    }


def _many(out: Tensor) -> dict[str, Callable[[], object]]:
    """The same weights as 128 tensors, as in a model, in one call or in one call per tensor."""
    stream = PhiloxNoise(0).stream(1)
    chunks = enumerate(out.view(128, -1))
    tensors = [NamedTensor(f"bench.{k}", torch.nn.Parameter(chunk), tensor_id(f"bench.{k}")) for k, chunk in chunks]
    moves = [Move(tensor, tensor.param.data, 1e-9) for tensor in tensors]

    def one_by_one() -> None:
        for move in moves:
            stream.add_(*move)

    return {
        "Gaussian, 128 tensors at once": lambda: stream.add_all_(moves),
        "Gaussian, 128 tensors in turn": one_by_one,
    }


def _published(out: Tensor) -> Tensor:
    return out + 1 * torch.normal(mean=0.0, std=1.0, size=out.shape, dtype=out.dtype, device=out.device) * 1e-9
