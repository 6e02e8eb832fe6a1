"""The width of the vectors in a compiled loop, and prefetching of memory.

LLVM avoids vectors of 512 bits on Intel's server processors (tuning flag prefer-256-bit), because some older ones lower
their clock rate for them. Loops with as much arithmetic as the noise run more than twice as fast with them, so `widest`
requests them in the loop that calls it. Nothing else that numba compiles in the process is affected.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (pyright checks numba intrinsics as the Python functions that they are before compilation)

from __future__ import annotations

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_FEATURES = binding.get_host_cpu_features()
WIDTH = 512 if _FEATURES.get("avx512f") else 256 if _FEATURES.get("avx") else 128
"""Bits of a vector register of this processor; 128 is SSE2's and NEON's."""
PREFERENCE = f'"prefer-vector-width"="{WIDTH}"'


@intrinsic
def widest(typing_context):
    """Let LLVM use the processor's full vector registers in the function that calls this. Costs nothing at run time."""

    def generate(context, builder, signature, arguments):
        set.add(builder.function.attributes, PREFERENCE)  # llvmlite's own `add` knows no attributes with a value
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def prefetch(typing_context, array, index):
    """Fetch the cache line of array[index], to be written. The index may be past the end."""

    def generate(context, builder, signature, arguments):
        data = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [place, number(1), number(3), number(1)])  # for writing, into all caches, data
        return context.get_dummy_value()

    return types.none(array, index), generate
