"""Compile metazo's loops for ARM on another processor, and run them in an emulator: the bits, and what NEON makes of the loops.

    make arm                                               # the tests of noise and kernels, with every loop emulated
    python -m pytest -p tests.arm tests/noise              # any tests
    python -m tests.arm --out benchmarks/arm.json          # instructions per weight of the main loops

numba is told that the processor is an ARM: Neoverse N1 (NEON), or what METAZO_ARM names: apple-m1 (NEON), neoverse-v1 (SVE of
256 bits). A compiled loop that is called runs in unicorn, which sees the memory of this process; what a loop calls outside of
numba, its allocator, runs natively. Needs unicorn and capstone, which are no dependencies of metazo. Where not to use: to
measure time, and for processors with SVE2 (neoverse-v2), which unicorn does not know.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any

import llvmlite.binding as llvm
from llvmlite.binding.targets import FeatureMap

CPU = os.environ.get("METAZO_ARM", "neoverse-n1")
_TRIPLE = "aarch64-unknown-linux-gnu"

llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
if "numba" in sys.modules:
    sys.exit(
        "numba asks for the processor when it is imported, and it has been: start Python anew with tests.arm first."
    )
llvm.get_process_triple = llvm.get_default_triple = lambda: _TRIPLE
llvm.get_host_cpu_name = lambda: CPU
llvm.get_host_cpu_features = lambda: FeatureMap(neon=True)

import capstone  # noqa: E402
import numba  # noqa: E402
import numpy as np  # noqa: E402
import unicorn  # noqa: E402
from numba import types  # noqa: E402
from numba.core.caching import NullCache  # noqa: E402
from numba.core.dispatcher import Dispatcher  # noqa: E402
from unicorn import arm64_const as arm  # noqa: E402

PAGE, PART = 1 << 12, 1 << 21
_WORDS = [getattr(arm, f"UC_ARM64_REG_X{number}") for number in range(8)]
_FLOATS = [getattr(arm, f"UC_ARM64_REG_D{number}") for number in range(8)]

# Registers as (CRn, CRm, op0, op1, op2, value), by which NEON and SVE are switched on, with vectors of 128 or 256 bits.
_CPACR, _CPTR = (1, 0, 3, 0, 2, 3 << 16 | 3 << 20), (1, 1, 3, 6, 2, 1 << 8)
_LENGTHS = [(1, 2, 3, level, 0, 1 if CPU == "neoverse-v1" else 0) for level in (6, 4, 0)]


class Processor:
    """An ARM that sees the memory of this process, part by part as it asks for it."""

    def __init__(self) -> None:
        self.machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self.machine.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
        for register in (_CPACR, _CPTR, *_LENGTHS):
            self.machine.reg_write(arm.UC_ARM64_REG_CP_REG, register)
        self.machine.hook_add(unicorn.UC_HOOK_MEM_READ_UNMAPPED | unicorn.UC_HOOK_MEM_WRITE_UNMAPPED, self._show)
        self.machine.hook_add(unicorn.UC_HOOK_MEM_FETCH_UNMAPPED, self._fetch)
        self.stack = np.zeros(1 << 20, np.uint8)
        self.seen: set[int] = set()
        self.outside: int | None = None
        self.counts: Counter[int] = Counter()
        self.lock = RLock()

    def count(self) -> None:
        """From now on, count in `counts` how often the instruction at each address runs."""

        def ran(machine: Any, address: int, size: int, data: Any) -> None:
            self.counts[address] += 1

        self.machine.hook_add(unicorn.UC_HOOK_CODE, ran)

    def call(self, function: int, words: list[int], floats: list[int], rest: list[int]) -> int:
        """Call a function by its address. Arguments: those in registers, as bits, and those on the stack."""
        stop = self.stack.ctypes.data & -PAGE  # an address at which nothing runs
        top = (self.stack.ctypes.data + self.stack.nbytes - PAGE) & -16
        ctypes.memmove(top, np.array(rest, np.uint64).ctypes.data, 8 * len(rest))
        for registers, values in ((_WORDS, words), (_FLOATS, floats)):
            for register, value in zip(registers, values):
                self.machine.reg_write(register, value)
        self.machine.reg_write(arm.UC_ARM64_REG_SP, top)
        self.machine.reg_write(arm.UC_ARM64_REG_LR, stop)
        begin = function
        while True:
            self.outside = None
            try:
                self.machine.emu_start(begin, stop)
            except unicorn.UcError:
                if self.outside is None:
                    raise
            if self.outside is None:
                return self.machine.reg_read(arm.UC_ARM64_REG_W0)
            given = [self.machine.reg_read(register) for register in _WORDS]
            native = ctypes.CFUNCTYPE(ctypes.c_uint64, *[ctypes.c_uint64] * 8)(self.outside)
            self.machine.reg_write(_WORDS[0], native(*given))
            begin = self.machine.reg_read(arm.UC_ARM64_REG_LR)

    def _show(self, machine: Any, access: int, address: int, size: int, value: int, data: Any) -> bool:
        """Map what is there: a large part at once, but for page by page beside the libraries, whose code it must not run."""
        for page in range(address & -PAGE, address + size, PAGE):
            part = page & -PART
            beside = any(first < part + PART and part < end for first, end in _libraries())
            place, length = (page, PAGE) if beside else (part, PART)
            if place not in self.seen:
                self.seen.add(place)
                machine.mem_map_ptr(place, length, unicorn.UC_PROT_ALL, place)
        return True

    def _fetch(self, machine: Any, access: int, address: int, size: int, value: int, data: Any) -> bool:
        if any(first <= address < end for first, end in _libraries()):
            self.outside = address
            return False
        return self._show(machine, access, address, size, value, data)


@cache
def _libraries() -> list[tuple[int, int]]:
    """Addresses of this processor's own machine code: what is executable and comes from a file. All of it that a loop calls is
    there before the first one runs.
    """
    found = re.findall(r"^(\w+)-(\w+) ..x.*?(?= /)", Path("/proc/self/maps").read_text(), re.M)
    return [(int(first, 16), int(end, 16)) for first, end in found]


@cache
def processor() -> Processor:
    return Processor()


def _emulated(dispatcher: Any, *arguments: Any) -> Any:
    """A call of a compiled function, in the emulator. Returns: a number, an array of one dimension, or None."""
    signature = tuple(dispatcher.typeof_pyval(argument) for argument in arguments)
    if signature not in dispatcher.overloads:
        dispatcher._cache = NullCache()
        dispatcher.compile(signature)
    compiled = dispatcher.overloads[signature]
    result, error = np.zeros(8, np.uint64), np.zeros(1, np.uint64)
    words, floats, rest = (
        [result.ctypes.data, error.ctypes.data],
        [],
        [],
    )  # in registers, eight of each at most; on the stack
    for argument, kind in zip(arguments, signature):
        if isinstance(kind, types.Array):
            given = [0, 0, argument.size, argument.itemsize, argument.ctypes.data, *argument.shape, *argument.strides]
        elif isinstance(kind, types.Float):
            given = [int.from_bytes(np.array(argument, str(kind)).tobytes(), sys.byteorder)]
        elif isinstance(kind, types.Integer | types.Boolean):
            given = [int(argument) & (1 << 64) - 1]
        else:
            raise TypeError(
                f"{dispatcher.__name__} has an argument of the type {kind}, which cannot be given to the emulator"
            )
        registers = floats if isinstance(kind, types.Float) else words
        free = 8 - len(registers)
        registers += given[:free]
        rest += given[free:]
    with processor().lock:
        address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
        if status := processor().call(address, words, floats, rest):
            raise RuntimeError(f"{dispatcher.__name__} ended with status {status}")
    kind = compiled.signature.return_type
    if kind == types.none:
        return None
    if isinstance(kind, types.Array):
        _, _, size, width, place = result[:5].tolist()
        return np.frombuffer(ctypes.string_at(place, size * width), str(kind.dtype))
    return result[:1].view(str(kind))[0]


Dispatcher.__call__ = _emulated


def _case(kind: str, dtype: Any) -> Any:
    """A call of one of the main loops on a matrix of 64 rows."""
    import torch

    from metazo.kernels.outer import add_product_
    from metazo.noise import cpu, cpu_split

    weights = torch.zeros(WEIGHTS, dtype=dtype)
    if kind == "rank 2":
        left, right = torch.ones(64, 2), torch.ones(WEIGHTS // 64, 2)
        return lambda: add_product_(weights.view(64, -1), left, right, 0.1, 1.0)
    noise, _, what = kind.partition(", ")
    if what == "two seeds":
        return lambda: cpu.add_two_all_(noise, [(7, weights, 0.1, 1.0, 0.2)], (5, 6), 0)
    if what:
        low = torch.zeros(WEIGHTS, dtype=getattr(torch, what))
        return lambda: cpu_split.add_(noise, weights, low, 0.1, 1.0, 5, 7, 0, 0, 6)
    return lambda: cpu.add_(noise, weights, 0.1, 1.0, 5, 7, 0, 0)


WEIGHTS = 65_536
CASES = [
    *((noise, dtype) for noise in ("gaussian", "rademacher") for dtype in ("float32", "bfloat16", "float16")),
    ("gaussian, two seeds", "float32"),
    ("gaussian, int16", "bfloat16"),
    ("gaussian, int8", "bfloat16"),
    ("rank 2", "float32"),
]


def measured(kind: str, dtype: str) -> dict[str, float]:
    """Instructions per weight: all, those that calculate on vectors, and those that calculate with one number."""
    import torch

    run, counts = _case(kind, getattr(torch, dtype)), processor().counts
    run()  # compiles
    counts.clear()
    run()
    names: Counter[str] = Counter()
    reader = capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM)
    for address, times in counts.items():
        instruction = next(reader.disasm(ctypes.string_at(address, 4), address))
        names[_group(instruction.mnemonic, instruction.op_str)] += times
    found = {"all": counts.total(), **dict(names.most_common())}
    return {name: round(times / WEIGHTS, 2) for name, times in found.items()}


def _group(name: str, registers: str) -> str:
    if name in ("fmla", "fmls", "fmadd", "fmsub", "fnmadd", "fnmsub"):
        return "fused"
    if name.startswith(("ld", "st", "prf")):
        return "memory"
    if re.search(r"\bv\d+\.|\bz\d+\.", registers):
        return "vector"
    return "branch" if name.startswith(("b", "cb", "tb", "ret")) else "scalar"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="JSON file, in which this processor's figures replace its earlier ones"
    )
    given = parser.parse_args()
    processor().count()
    found = {f"{kind}, {dtype}": measured(kind, dtype) for kind, dtype in CASES}
    for name, numbers in found.items():
        print(f"{name:32}", numbers)
    if given.out:
        versions = {"numba": numba.__version__, "llvm": ".".join(map(str, llvm.llvm_version_info))}
        before = json.loads(given.out.read_text()) if given.out.exists() else {}
        every = before.get("instructions per weight", {}) | {CPU: found}
        given.out.write_text(json.dumps({**versions, "instructions per weight": every}, indent=1) + "\n")


def pytest_report_header() -> str:
    return f"compiled loops run on an emulated {CPU}"


if __name__ == "__main__":
    main()
