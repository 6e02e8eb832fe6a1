"""Sums of weights and the normals of wide.py, 32 at a time without a buffer between: a chunk of 256 elements per call.

They are those of the loops in cpu.py and cpu_split.py, bit for bit (tests/noise), and take up to a sixth less time: what
is stored in the buffer need not be loaded again, and the types of the weights are known where the instructions are written.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (pyright checks numba intrinsics as the Python functions that they are before compilation)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from llvmlite import binding, ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from metazo.kernels.splitfloat import HALF_TOP, LAYOUTS, MULTIPLIERS
from metazo.kernels.vectors import WIDTH
from metazo.noise.wide import AT_ONCE, FLOAT, INT, WIDE, Vector, everywhere, normals_of, pointer

_SHORT, _HALF = ir.IntType(16), ir.HalfType()
STORED = {types.float32: torch.float32, types.uint16: torch.bfloat16, types.int16: torch.float16}
"""The types of weights by those of the arrays that hold them."""
_FOR_OTHERS = any(getattr(config, name, None) for name in ("CPU_NAME", "CPU_FEATURES"))
_CONVERTS = (
    WIDTH == 512
    and not _FOR_OTHERS
    and binding.get_host_cpu_features().get("avx512bf16", False)
    and binding.llvm_version_info >= (16,)
)
"""Whether the processor's own conversion to bfloat16 is used: not if numba was told to compile for another processor, and not
with LLVM 14 and 15 (numba before 0.62), whose instruction has another type."""
_CHUNK = 256
_FLOATS, _NOISE = [types.float32] * 2, [types.uint64] * 6


class _Array:
    """The elements of a numba array from one index on."""

    def __init__(self, context: Any, builder: ir.IRBuilder, kind: types.Array, array: Any, here: Any):
        self.builder = builder
        self.kind: Any = kind.dtype
        self.begin = builder.gep(cgutils.create_struct_proxy(kind)(context, builder, array).data, [here])

    def raw(self, place: Any) -> Vector:
        """The 32 numbers from this place on, as they are stored."""
        address = pointer(self.builder, self.begin, place)
        return Vector(self.builder, self.builder.load(address, align=self.kind.bitwidth // 8))

    def store(self, place: Any, numbers: Vector) -> None:
        self.builder.store(numbers.value, pointer(self.builder, self.begin, place), align=self.kind.bitwidth // 8)

    def widened(self, place: Any) -> Vector:
        """32 weights as float32."""
        stored = self.raw(place)
        if self.kind == types.float32:
            return stored
        if self.kind == types.int16:
            return stored.to("bitcast", _HALF).to("fpext", FLOAT)
        return (stored.to("zext", INT) << 16).to("bitcast", FLOAT)

    def store_narrowed(self, place: Any, numbers: Vector) -> None:
        """Store float32 numbers as weights, rounded to nearest even."""
        if self.kind == types.float32:
            self.store(place, numbers)
        elif self.kind == types.int16:
            self.store(place, numbers.to("fptrunc", _HALF).to("bitcast", _SHORT))
        else:
            bits = numbers.to("bitcast", INT)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            number = self.builder.fcmp_ordered("ord", numbers.value, numbers.value)
            kept = Vector(self.builder, self.builder.select(number, rounded.value, rounded.number(0x7FC0).value))
            self.store(place, kept.to("trunc", _SHORT))

    def fill(self, sums: Iterator[tuple[Any, Vector]]) -> Any:
        """Store the float32 numbers of a chunk as weights, rounded to nearest even. Returns: whether they are stored.

        A processor that converts to bfloat16 makes 0 of numbers below 2^-126, and another NaN of a NaN. Then none is stored.
        """
        if self.kind != types.uint16 or not _CONVERTS:
            for place, numbers in sums:
                self.store_narrowed(place, numbers)
            return ir.Constant(ir.IntType(1), 1)
        special, kept = ir.Constant(_SHORT, 0), []
        for place, numbers in sums:
            kept.append((place, _converted(numbers)))
            special = self.builder.or_(special, _special(numbers))
        right = self.builder.icmp_unsigned("==", special, ir.Constant(_SHORT, 0))
        with self.builder.if_then(right, likely=True):
            for place, narrowed in kept:
                self.store(place, narrowed)
        return right


class _BFloat(ir.Type):
    """bfloat16, which llvmlite has no name for."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self))

    def __hash__(self) -> int:
        return hash(type(self))


def _halves(numbers: Vector) -> list[Any]:
    return [numbers.chosen(range(first, first + 16)).value for first in (0, 16)]


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [value.type for value in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _special(numbers: Vector) -> Any:
    """A short that is not 0 if one of the numbers is below 2^-126 and not 0, or no number."""
    builder, flags, found = numbers.builder, ir.VectorType(ir.IntType(1), 16), []
    for half in _halves(numbers):
        kinds = ir.Constant(INT, 0x80 | 0x20 | 0x01)  # signalling NaN, denormal, quiet NaN
        flagged = _call(builder, "llvm.x86.avx512.fpclass.ps.512", flags, half, kinds)
        found.append(builder.bitcast(flagged, _SHORT))
    return builder.or_(*found)


def _converted(numbers: Vector) -> Vector:
    """32 float32 numbers as bfloat16."""
    first, second = _halves(numbers)
    name, kind = "llvm.x86.avx512bf16.cvtne2ps2bf16.512", ir.VectorType(_BFloat(), 32)
    narrowed = Vector(numbers.builder, _call(numbers.builder, name, kind, second, first))
    return narrowed.to("bitcast", _SHORT)


def _joined(high: _Array, low: _Array, place: Any) -> Vector:
    """`splitfloat.join` of 32 weights."""
    layout = LAYOUTS[STORED[high.kind]]
    wide = high.raw(place).to("sext", INT)
    wide = ((wide & 0x7FFF) << layout.below) | (wide & 0x80000000)
    return (wide + (low.raw(place).to("sext", INT) << _dropped(high, low))).to("bitcast", FLOAT) * layout.scale


def _dropped(high: _Array, low: _Array) -> int:
    return LAYOUTS[STORED[high.kind]].below - low.kind.bitwidth if low.kind == types.int8 else 0


def _part(theta: Vector, high: _Array, low: _Array, place: Any, first: Any, seed: Any) -> None:
    """`splitfloat.split` of 32 weights into the two arrays. first: the element at place 0, int32; seed: int32."""
    builder, layout, dropped = theta.builder, LAYOUTS[STORED[high.kind]], _dropped(high, low)
    bits = (theta * (1 / layout.scale)).to("bitcast", INT)
    if dropped:
        order = Vector(builder, ir.Constant(ir.VectorType(INT, AT_ONCE), list(range(AT_ONCE))))
        x = everywhere(builder, first, AT_ONCE) + (everywhere(builder, builder.trunc(place, INT), AT_ONCE) + order)
        x = x ^ everywhere(builder, seed, AT_ONCE)
        for multiplier in MULTIPLIERS:
            x = (x ^ x.signed_shift(16)) * (multiplier & 0xFFFFFFFF)
        bits = (bits + ((x ^ x.signed_shift(15)) & ((1 << dropped) - 1))) & (-1 << dropped & 0xFFFFFFFF)
    magnitude = bits & 0x7FFFFFFF
    if layout.below == 13:
        top = magnitude.number(HALF_TOP)
        beyond = builder.icmp_signed(">", magnitude.value, top.value)
        magnitude = Vector(builder, builder.select(beyond, top.value, magnitude.value))
    upper = (magnitude + (1 << layout.below - 1)) >> layout.below
    rest = (magnitude - (upper << layout.below)).signed_shift(dropped)
    high.store(place, (upper | ((bits >> 16) & 0x8000)).to("trunc", _SHORT))
    low.store(place, rest.to("trunc", ir.IntType(low.kind.bitwidth)))


def _scalars(builder: ir.IRBuilder, *values: Any) -> list[Vector]:
    return [everywhere(builder, value, AT_ONCE) for value in values]


def _supported(*weights: types.Array) -> bool:
    return WIDE and all(array.dtype in STORED for array in weights)


_NOT_DONE = ir.Constant(ir.IntType(1), 0)


@njit(inline="always")
def whole(array, here, gaussian):
    """Whether a sum of normals with the chunk that begins at array[here] can be made by the functions below."""
    return gaussian and array.size - here >= _CHUNK


# The functions below return whether they did it. They do nothing if the processor has no registers of 256 bits, there are no
# vectors for the type of the weights, or a number is one that the processor would round in another way.
@intrinsic
def wide_add(typing_context, out, here, alpha, beta, chunk, c1, c2, c3, k0, k1):
    """out = beta * out + alpha * z for the 256 elements of a chunk, which begins at out[here]."""

    def generate(context, builder, signature, arguments):
        if not _supported(out):
            return _NOT_DONE
        weights = _Array(context, builder, out, *arguments[:2])
        alpha, beta = _scalars(builder, *arguments[2:4])
        normals = normals_of(builder, arguments[4:8], arguments[8:])
        return weights.fill((place, beta * weights.widened(place) + alpha * numbers) for place, numbers in normals)

    return types.boolean(out, types.int64, *_FLOATS, *_NOISE), generate


@intrinsic
def wide_place(typing_context, out, base, here, alpha, chunk, c1, c2, c3, k0, k1):
    """out = base + alpha * z, as `wide_add`; base: float32."""

    def generate(context, builder, signature, arguments):
        if not _supported(out) or base.dtype != types.float32:
            return _NOT_DONE
        to, origin = (_Array(context, builder, signature.args[k], arguments[k], arguments[2]) for k in (0, 1))
        (alpha,) = _scalars(builder, arguments[3])
        normals = normals_of(builder, arguments[4:8], arguments[8:])
        return to.fill((place, origin.raw(place) + alpha * numbers) for place, numbers in normals)

    return types.boolean(out, base, types.int64, types.float32, *_NOISE), generate


@intrinsic
def wide_place_split(typing_context, out, high, low, here, alpha, chunk, c1, c2, c3, k0, k1):
    """out = join(high, low) + alpha * z, as `wide_add`."""

    def generate(context, builder, signature, arguments):
        if not _supported(out, high):
            return _NOT_DONE
        to, upper, lower = (_Array(context, builder, signature.args[k], arguments[k], arguments[3]) for k in range(3))
        (alpha,) = _scalars(builder, arguments[4])
        normals = normals_of(builder, arguments[5:9], arguments[9:])
        return to.fill((place, _joined(upper, lower, place) + alpha * numbers) for place, numbers in normals)

    return types.boolean(out, high, low, types.int64, types.float32, *_NOISE), generate


@intrinsic
def wide_add_split(typing_context, high, low, here, first, alpha, beta, dither, chunk, c1, c2, c3, k0, k1):
    """high, low = split(beta * join(high, low) + alpha * z), as `wide_add`. first: the element at `here` in its tensor."""

    def generate(context, builder, signature, arguments):
        if not _supported(high):
            return _NOT_DONE
        upper, lower = (_Array(context, builder, signature.args[k], arguments[k], arguments[2]) for k in (0, 1))
        alpha, beta = _scalars(builder, *arguments[4:6])
        for place, numbers in normals_of(builder, arguments[7:11], arguments[11:]):
            theta = beta * _joined(upper, lower, place) + alpha * numbers
            _part(theta, upper, lower, place, arguments[3], arguments[6])
        return ir.Constant(ir.IntType(1), 1)

    return types.boolean(high, low, types.int64, types.int32, *_FLOATS, types.int32, *_NOISE), generate
