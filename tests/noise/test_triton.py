"""The triton kernels without a GPU: their arithmetic in the interpreter, their instructions from the real compiler."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from metazo.noise import philox

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

COMPILE = """
import json, triton
from triton.backends.compiler import GPUTarget
from metazo.noise import cuda
integers = dict.fromkeys(("size", "first", "purpose", "id0", "id1", "k0", "k1"), "i32")
found = {}
for gaussian, out in ((True, "fp32"), (True, "bf16"), (False, "fp16")):
    types = {"out": "*" + out, "base": "*fp32", "alpha": "fp32", "beta": "fp32", **integers}
    types |= {"gaussian": "constexpr", "blocks": "constexpr"}
    source = triton.compiler.ASTSource(cuda._kernel, types, {"gaussian": gaussian, "blocks": 256 if gaussian else 16})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    found[f"{gaussian} {out}"] = made.asm["ptx"]
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


@pytest.mark.skipif(sys.platform != "linux", reason="triton brings its assembler for Linux only")
def test_compiled_kernels_fuse_nothing_and_round_to_nearest():
    """The instructions for a GPU (sm_90); compiling them needs no GPU."""
    found = json.loads(run(COMPILE, TRITON_INTERPRET="0"))
    for kind, code in found.items():
        assert not re.search(r"\bfma\.|ftz|approx", code), kind
        assert set(re.findall(r"\b(?:add|sub|mul)\.\S*f32", code)) <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32"}, kind
    assert "sqrt.rn.f32" in found["True fp32"] and "cvt.rn.bf16.f32" in found["True bf16"]
    assert "cvt.rn.f16.f32" in found["False fp16"]


def test_kernels_leave_other_tensors_to_the_plain_form():
    from metazo.noise import cuda

    assert not cuda.supports(torch.zeros(3))
