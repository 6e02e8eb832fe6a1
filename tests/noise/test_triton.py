"""The triton kernels without a GPU: their arithmetic in the interpreter, their instructions from the real compiler."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from metazo.kernels.splitfloat import plain_join
from metazo.noise import cpu_split, philox
from tests.noise.test_split import weights

pytest.importorskip("triton", reason="triton is not installed")

# Words above 2^31 in every place: triton's integers are signed, and it compiles again for a wider one.
SEED, TENSOR, PURPOSE = 0xF23456789ABCDEF0, 0xFEDCBA9876543210, 0xFFFF0001
SIZES, STARTS = (77, 4099), (0, 6 * philox.TILE)
DTYPES = ("float32", "float16", "bfloat16")

INTERPRET = f"""
import sys, torch
from metazo.noise import cuda
results = {{}}
for distribution in ("gaussian", "rademacher"):
    for size in {SIZES}:
        for start in {STARTS}:
            for dtype in {DTYPES}:
                base = torch.linspace(-3, 3, size)
                added, placed = base.clone().to(getattr(torch, dtype)), torch.zeros(size + 1, dtype=getattr(torch, dtype))
                noise = ({SEED}, {TENSOR}, {PURPOSE}, start)
                cuda.add_(distribution, added, 0.3, 0.7, *noise)
                cuda.place_(distribution, placed[:size], base, 0.3, *noise)
                results[distribution, size, start, dtype] = added, placed
torch.save(results, sys.argv[1])
"""

MANY = f"""
import sys, torch
from metazo.noise import cuda
sizes, results = (3, 4099, 1, 2048, 9001), {{}}
for distribution in ("gaussian", "rademacher"):
    for dtype in {DTYPES}:
        bases = [torch.linspace(-3, 3, size + 1)[1:] for size in sizes]
        outs = [torch.zeros(size + 2, dtype=getattr(torch, dtype)) for size in sizes]
        inner = [out[1:-1] for out in outs]
        placed = [base.clone().to(getattr(torch, dtype)) for base in bases]
        both = [base.clone().to(getattr(torch, dtype)) for base in bases]
        numbers = [{TENSOR} + k for k in range(5)], inner, bases, [0.1 * k for k in range(5)]
        cuda.place_all_(distribution, list(zip(*numbers)), {SEED}, {PURPOSE})
        added = [(id, out, a, 0.7) for id, out, a in zip(numbers[0], placed, numbers[3])]
        cuda.add_all_(distribution, added, {SEED}, {PURPOSE})
        moves = [(id, out, a, 0.7, 0.3 - a) for id, out, a in zip(numbers[0], both, numbers[3])]
        cuda.add_two_all_(distribution, moves, ({SEED}, {SEED} + 1), {PURPOSE})
        results[distribution, dtype] = outs, placed, both
torch.save(results, sys.argv[1])
"""

SPLIT = f"""
import sys, torch
from metazo.noise import cuda_split
from tests.noise.test_split import weights
results = {{}}
for distribution in ("gaussian", "rademacher"):
    for high in (torch.bfloat16, torch.float16):
        for low in (torch.int16, torch.int8):
            for start in {STARTS}:
                (w, rest), noise = weights(4099, high, low), ({SEED}, {TENSOR}, {PURPOSE}, start)
                out = torch.zeros(4100, dtype=high)
                cuda_split.place_(distribution, out[:-1], w, rest, 0.3, *noise)
                cuda_split.add_(distribution, w, rest, 0.3, 0.7, *noise, {SEED} + 5)
                results[distribution, high, low, start] = out, w, rest
torch.save(results, sys.argv[1])
"""

COMPILE = """
import json, triton
from triton.backends.compiler import GPUTarget
from metazo.noise import cuda, cuda_split
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
    types = {"out": "*bf16", "weights": "*i16", "low": "*i8", "dither": "i32", **integers}
    types |= dict.fromkeys(("alpha", "beta", "scale", "inverse"), "fp32")
    compiled(f"split {gaussian}", cuda_split._split, types, store=gaussian, below=16, dropped=8, **how)
print(json.dumps(found))
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    command, environment = [sys.executable, "-c", code, *arguments], os.environ | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


def truncated(values: torch.Tensor) -> torch.Tensor:
    """To bfloat16 towards zero, as the interpreter does it."""
    return (values.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


def test_interpreted_kernels_agree_to_the_last_bit(tmp_path):
    run(INTERPRET, str(tmp_path / "results.pt"), TRITON_INTERPRET="1")
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert len(results) == 2 * len(SIZES) * len(STARTS) * len(DTYPES)
    for (distribution, size, start, dtype), (added, placed) in results.items():
        z = philox.DISTRIBUTIONS[distribution](SEED, TENSOR, PURPOSE, start, start + size)
        base = torch.linspace(-3, 3, size)
        rounded = truncated if dtype == "bfloat16" else (lambda values, type=added.dtype: values.to(type))
        stored = base.to(added.dtype).float()
        assert torch.equal(added, rounded(stored * 0.7 + z * 0.3)), (distribution, size, start, dtype)
        assert torch.equal(placed[:size], rounded(base + z * 0.3)), (distribution, size, start, dtype)
        assert placed[size] == 0  # nothing is written beyond the end


def test_all_tensors_in_one_launch(tmp_path):
    """Placed, added, and with two seeds; nothing is written on either side of a tensor that is part of another."""
    run(MANY, str(tmp_path / "results.pt"), TRITON_INTERPRET="1")
    for (distribution, dtype), lists in torch.load(tmp_path / "results.pt", weights_only=True).items():
        for k, (out, added, both) in enumerate(zip(*lists, strict=True)):
            size, alpha = len(added), 0.1 * k
            first, second = (
                philox.DISTRIBUTIONS[distribution](SEED + more, TENSOR + k, PURPOSE, 0, size) for more in (0, 1)
            )
            base = torch.linspace(-3, 3, size + 1)[1:]
            rounded = truncated if dtype == "bfloat16" else (lambda values, type=out.dtype: values.to(type))
            once = rounded(base.to(out.dtype).float() * 0.7 + first * alpha)
            assert torch.equal(added, once), (distribution, size, dtype)
            assert torch.equal(both, rounded(once.float() + second * (0.3 - alpha))), (distribution, size, dtype)
            assert torch.equal(out[1:-1], rounded(base + first * alpha)) and out[0] == out[-1] == 0


def test_noise_on_split_weights(tmp_path):
    run(SPLIT, str(tmp_path / "results.pt"), TRITON_INTERPRET="1")
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert len(results) == 16
    for (distribution, high, low, start), (out, w, rest) in results.items():
        (wide, other), noise = weights(4099, high, low), (SEED, TENSOR, PURPOSE, start)
        z = philox.DISTRIBUTIONS[distribution](*noise, start + 4099)
        moved = plain_join(wide, other) + z * 0.3
        rounded = truncated(moved) if high == torch.bfloat16 else moved.to(high)
        assert torch.equal(out[:-1].view(torch.int16), rounded.view(torch.int16)) and out[-1] == 0
        cpu_split.plain_add_(distribution, wide, other, 0.3, 0.7, *noise, SEED + 5)
        assert torch.equal(w.view(torch.int16), wide.view(torch.int16)) and torch.equal(rest, other)


@pytest.mark.skipif(sys.platform != "linux", reason="triton brings its assembler for Linux only")
def test_compiled_kernels_fuse_nothing_and_round_to_nearest():
    """The instructions for a GPU (sm_90); compiling them needs no GPU."""
    found = json.loads(run(COMPILE, TRITON_INTERPRET="0"))
    for kind, code in found.items():
        assert not re.search(r"\bfma\.|ftz|approx", code), kind
        assert set(re.findall(r"\b(?:add|sub|mul)\.\S*f32", code)) <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32"}, kind
    for kernel in ("one", "many"):
        assert "sqrt.rn.f32" in found[f"{kernel} True fp32"] and "cvt.rn.bf16.f32" in found[f"{kernel} True bf16"]
        assert "cvt.rn.f16.f32" in found[f"{kernel} False fp16"]
    assert "cvt.rn.bf16.f32" in found["split False"]


def test_kernels_leave_other_tensors_to_the_plain_form():
    from metazo.noise import cuda

    assert not cuda.supports(torch.zeros(3))
