"""Casts between numbers and their bits, and 32-bit shifts, for loops that numba compiles."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (pyright checks numba intrinsics as the Python functions that they are before compilation)

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


def _cast(source, target, convert):
    """A conversion as an LLVM instruction, or a chain of them."""

    @intrinsic
    def cast(typing_context, value):
        return target(source), lambda context, builder, signature, arguments: convert(builder, arguments[0])

    return cast


_float, _half, _int32, _int16 = ir.FloatType(), ir.HalfType(), ir.IntType(32), ir.IntType(16)
as_float = _cast(types.uint32, types.float32, lambda builder, bits: builder.bitcast(bits, _float))
as_bits = _cast(types.float32, types.uint32, lambda builder, value: builder.bitcast(value, _int32))
from_half = _cast(types.int16, types.float32, lambda builder, x: builder.fpext(builder.bitcast(x, _half), _float))
to_half = _cast(types.float32, types.int16, lambda builder, x: builder.bitcast(builder.fptrunc(x, _half), _int16))


def _shift(instruction: str):
    """Shift an int32 by an int32 below 32. numba's shifts widen both to 64 bits, and LLVM then uses half of each vector."""

    @intrinsic
    def shift(typing_context, value, count):
        return types.int32(types.int32, types.int32), lambda context, builder, signature, arguments: getattr(
            builder, instruction
        )(*arguments)

    return shift


shift_left, shift_right = _shift("shl"), _shift("ashr")  # a shift to the right keeps the sign
