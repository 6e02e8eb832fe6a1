"""The triton kernels without a GPU: their arithmetic in the interpreter, their instructions from the real compiler."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from metazo.kernels.outer import add_product_
from metazo.kernels.splitfloat import plain_join
from metazo.noise import philox
from tests.noise.interpreted import DTYPES, MATRICES, PLACES, PURPOSE, SEED, TENSOR, matrix, piece, shards
from tests.noise.test_split import plain_add_, weights

pytest.importorskip("triton", reason="triton is not installed")

COMPILE = """
import json, triton
from triton.backends.compiler import GPUTarget
from metazo.noise import cuda, cuda_shards, cuda_split
integers = dict.fromkeys(("size", "first", "purpose", "id0", "id1", "k0", "k1"), "i32")
found = {}
def compiled(name, kernel, types, **constants):
    types = types | dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(kernel, types, constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    found[name] = made.asm["ptx"]
for gaussian, out in ((True, "fp32"), (True, "bf16"), (False, "fp16")):
    how = {"gaussian": gaussian, "blocks": 256 if gaussian else 16}
    types = {"out": "*" + out, "base": "*fp32", "alpha": "fp32", "beta": "fp32", **integers}
    compiled(f"one {gaussian} {out}", cuda._one, types, **how)
    types = {"table": "*i64", "ends": "*i64", "like": "*" + out, "base_like": "*fp32"}
    compiled(f"many {gaussian} {out}", cuda._many, types, two=True, aligned=True, **how)
    types = {"table": "*i64", "ends": "*i64", "like": "*" + out, "base_like": "*fp32"}
    compiled(f"shards {gaussian} {out}", cuda_shards._shards, types, gaussian=gaussian, blocks=32 if gaussian else 16)
    types = {"out": "*bf16", "weights": "*i16", "low": "*i8", "dither": "i32", **integers}
    types |= dict.fromkeys(("alpha", "beta", "scale", "inverse"), "fp32")
    compiled(f"split {gaussian}", cuda_split._split, types, store=gaussian, below=16, dropped=8, **how)
print(json.dumps(found))
"""


def run(*command: str, **environment: str) -> str:
    command, environment = (sys.executable, *command), os.environ | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


def narrowed(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to dtype as the interpreter does it: to bfloat16 towards zero."""
    if dtype != torch.bfloat16:
        return values.to(dtype)
    return (values.view(torch.int32) & -65536).view(torch.float32).to(dtype)


def noise(kind: str, size: int, start: int = 0, more: int = 0, tensor: int = TENSOR) -> torch.Tensor:
    return philox.DISTRIBUTIONS[kind](SEED + more, tensor, PURPOSE, start, start + size)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the kernels write in the interpreter."""
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    run("-m", "tests.noise.interpreted", str(path), TRITON_INTERPRET="1")
    return torch.load(path, weights_only=True)


def test_interpreted_kernels_agree_to_the_last_bit(results):
    found = results["noise_on_one_tensor"]
    assert len(found) == 2 * len(PLACES) * len(DTYPES)
    for (kind, size, start, dtype), (added, placed) in found.items():
        z, base = noise(kind, size, start), torch.linspace(-3, 3, size)
        assert torch.equal(added, narrowed(base.to(dtype).float() * 0.7 + z * 0.3, dtype)), (kind, size, start, dtype)
        assert torch.equal(placed[:size], narrowed(base + z * 0.3, dtype)), (kind, size, start, dtype)
        assert placed[size] == 0  # nothing is written beyond the end


def test_all_tensors_in_one_launch(results):
    """Placed, added, and with two seeds; nothing is written on either side of a tensor that is part of another."""
    found = results["noise_on_all_tensors"]
    assert len(found) == len(DTYPES) + 1
    for (kind, dtype), lists in found.items():
        for k, (out, added, both) in enumerate(zip(*lists, strict=True)):
            size, alpha = len(added), 0.1 * k
            first, second = (noise(kind, size, more=more, tensor=TENSOR + k) for more in (0, 1))
            base = torch.linspace(-3, 3, size + 1)[1:]
            once = narrowed(base.to(dtype).float() * 0.7 + first * alpha, dtype)
            assert torch.equal(added, once), (kind, size, dtype)
            assert torch.equal(both, narrowed(once.float() + second * (0.3 - alpha), dtype)), (kind, size, dtype)
            assert torch.equal(out[1:-1], narrowed(base + first * alpha, dtype)) and out[0] == out[-1] == 0


def test_noise_on_shards(results):
    """As a slice of the whole tensor's; nothing is written on either side of a shard that is part of another."""
    found = results["noise_on_shards"]
    assert len(found) == len(DTYPES) + 1
    for (kind, dtype), outs in found.items():
        for k, ((shape, places), out) in enumerate(zip(shards(), outs, strict=True)):
            z = piece(noise(kind, shape.numel(), tensor=TENSOR + k).view(shape), places).view(-1) * (0.1 * (k + 1))
            base = piece(torch.linspace(-3, 3, shape.numel()).view(shape), places).view(-1)
            moved = base + z if dtype == torch.float16 else base.to(dtype).float() * 0.7 + z
            assert torch.equal(out[1:-1], narrowed(moved, dtype)) and out[0] == out[-1] == 0, (kind, k, dtype)


def test_noise_on_split_weights(results):
    found = results["noise_on_split_weights"]
    assert len(found) == 8
    for (kind, high, low, start), (out, w, rest) in found.items():
        wide, other = weights(2051, high, low)
        moved = plain_join(wide, other) + noise(kind, 2051, start) * 0.3
        assert torch.equal(out[:-1].view(torch.int16), narrowed(moved, high).view(torch.int16)) and out[-1] == 0
        plain_add_(kind, wide, other, 0.3, 1.7, SEED, TENSOR, PURPOSE, start, SEED + 5)
        assert torch.equal(w.view(torch.int16), wide.view(torch.int16)) and torch.equal(rest, other)


def test_products_of_factors_are_those_of_the_compiled_loop(results):
    assert len(results["products"]) == 8
    for (rank, dtype), outs in results["products"].items():
        for (rows, columns), out in zip(MATRICES, outs, strict=True):
            base, left, right = matrix(rows, columns, rank)
            add_product_(base, left, right, 0.3, 0.7)
            assert torch.equal(out[1:-1].view(base.shape), base.to(dtype)) and out[0] == out[-1] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="triton brings its assembler for Linux only")
def test_compiled_kernels_fuse_nothing_and_round_to_nearest():
    """The instructions for a GPU (sm_90); compiling them needs no GPU."""
    found = json.loads(run("-c", COMPILE, TRITON_INTERPRET="0"))
    # triton 3.3 flushes subnormal arguments of roots to 0; those of the noise are 0 or at least 2^-24
    found = {kind: code.replace("sqrt.rn.ftz.f32", "sqrt.rn.f32") for kind, code in found.items()}
    for kind, code in found.items():
        assert not re.search(r"\bfma\.|ftz|approx", code), kind
        assert set(re.findall(r"\b(?:add|sub|mul)\.\S*f32", code)) <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32"}, kind
    for kernel in ("one", "many", "shards"):
        assert "sqrt.rn.f32" in found[f"{kernel} True fp32"] and "cvt.rn.bf16.f32" in found[f"{kernel} True bf16"]
        assert "cvt.rn.f16.f32" in found[f"{kernel} False fp16"]
    assert "cvt.rn.bf16.f32" in found["split False"]


def test_kernels_leave_other_tensors_to_the_plain_form():
    from metazo.noise import cuda

    assert not cuda.supports(torch.zeros(3))
