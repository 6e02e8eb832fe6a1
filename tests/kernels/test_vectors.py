"""Full vector registers in metazo's own loops, no effect on other compiled functions or on the cache on disk."""

from __future__ import annotations

import numpy as np
import pytest
from llvmlite import binding
from numba import njit

from metazo.kernels import vectors
from metazo.kernels.compiled import kernel
from metazo.kernels.vectors import PREFERENCE, WIDTH, prefetch, widest


def test_width_is_that_of_the_registers():
    features = binding.get_host_cpu_features()
    assert (512 if features.get("avx512f") else 256 if features.get("avx") else 128) == WIDTH


def doubled(x):
    for i in range(x.size):
        x[i] = x[i] + x[i]


def doubled_wide(x):
    widest()
    for i in range(x.size):
        x[i] = x[i] + x[i]


def compiled(function) -> tuple[str, str]:
    """LLVM's code and the machine code of a function that was called on float32."""
    x = np.arange(100, dtype=np.float32)
    function(x)
    assert np.array_equal(x, 2 * np.arange(100))
    (code,), (machine,) = function.inspect_llvm().values(), function.inspect_asm().values()
    return code, machine


def test_only_a_function_that_asks_has_the_preference():
    wide, plain = compiled(njit(doubled_wide)), compiled(njit(doubled))
    assert PREFERENCE in wide[0] and PREFERENCE not in plain[0]
    if WIDTH == 512:
        assert "zmm" in wide[1]


def test_every_kernel_asks():
    from metazo.kernels import outer, splitfloat
    from metazo.noise import cpu, cpu_split

    found = [
        value
        for module in (outer, splitfloat, cpu, cpu_split)
        for value in vars(module).values()
        if "nogil" in getattr(value, "targetoptions", {}) and value.__module__ == module.__name__
    ]
    assert len(found) >= 10
    for function in found:
        assert "widest" in function.py_func.__code__.co_names, function


def test_noise_is_made_in_full_registers():
    """Loops that are compiled apart from the kernel (lanes.py) have its vectors, and a call for each number has none."""
    if binding.get_default_triple().split("-")[0] != "x86_64":
        pytest.skip("the names of registers and instructions are those of x86-64")
    from metazo.noise import cpu
    from metazo.noise.lanes import CHUNK, WORDS

    # not from the cache, where machine code has no listing
    loop = njit(nogil=True, error_model="numpy")(cpu._add_to.py_func)
    z, words = np.zeros(CHUNK, np.float32), np.zeros(WORDS, np.uint32)
    loop(np.zeros(512, np.float32), z, words, 0, np.float32(1), np.float32(1), True, 0, 1, 2, 3, 4)
    (machine,) = loop.inspect_asm().values()
    full = {512: "zmm", 256: "ymm", 128: "xmm"}[WIDTH]
    lines = [line for line in machine.splitlines() if full in line]
    assert sum("pmuludq" in line for line in lines) >= 20  # two for each of ten rounds of Philox
    assert any("sqrtps" in line for line in lines)  # of Box-Muller


def test_code_of_another_width_or_of_other_sources_is_kept_under_another_name(monkeypatch, tmp_path):
    def name() -> str:
        def loop(x):
            return x

        return kernel(loop, *sources).py_func.__qualname__

    sources: list = []
    first, again = name(), name()
    assert first == again
    monkeypatch.setattr("metazo.kernels.compiled.PREFERENCE", '"prefer-vector-width"="64"')
    assert name() != first
    monkeypatch.undo()
    sources.append(type(vectors)("other"))
    sources[0].__file__ = str(tmp_path / "other.py")
    (tmp_path / "other.py").write_text("a = 1")
    with_source = name()
    assert with_source != first
    (tmp_path / "other.py").write_text("a = 2")
    assert name() not in (first, with_source)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_prefetching_past_the_end_changes_nothing(dtype):
    @njit
    def fetched(x):
        for i in range(x.size):
            prefetch(x, i + (1 << 40))
            x[i] += dtype(1)

    x = np.zeros(5, dtype)
    fetched(x)
    assert x.tolist() == [1] * 5
    (machine,) = fetched.inspect_asm().values()
    assert binding.get_default_triple().split("-")[0] != "x86_64" or "prefetch" in machine
