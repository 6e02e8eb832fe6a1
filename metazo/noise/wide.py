"""The normals of a chunk as explicit vectors, for processors with vector registers of 512 or 256 bits.

LLVM makes vectors of the loops in lanes.py as well, but of one register, and a number passes through about 80 cycles of
instructions of which each needs the one before: the processor sees too few of the next vectors to fill them. Here every
instruction is written for several registers, so that there is always another one to begin. With the 32 registers of AVX-512
these are all 32 blocks of a chunk, then two of their four words. With 16 registers they are 8 blocks, then 16 words, in loops
that are not unrolled, because a processor without AVX-512 may not hold more instructions after they are decoded.
The numbers are those of lanes.py and philox.py, bit for bit (tests/noise).

wide_weights.py adds them to weights.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (pyright checks numba intrinsics as the Python functions that they are before compilation)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from metazo.kernels.vectors import WIDTH
from metazo.noise import philox as definition

_BLOCKS = 32  # of a chunk
AT_ONCE = 2 * definition.LANES  # normals of a word in 16 blocks, which are neighbours
WIDE = WIDTH >= 256  # whether normals are made here
INT, LONG, FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()


class Vector:
    """An LLVM vector with operators; a plain number stands for a vector of it."""

    def __init__(self, builder: ir.IRBuilder, value: Any):
        self.builder, self.value = builder, value

    def number(self, value: float) -> Vector:
        """A vector of this number, as long as this one."""
        kind = self.value.type
        return Vector(self.builder, ir.Constant(kind, [value] * kind.count))

    def _with(self, instruction: str, other: Vector | float) -> Vector:
        other = other if isinstance(other, Vector) else self.number(other)
        return Vector(self.builder, getattr(self.builder, instruction)(self.value, other.value))

    def __add__(self, other: Vector | float) -> Vector:
        return self._with("fadd" if self.value.type.element == FLOAT else "add", other)

    def __sub__(self, other: Vector | float) -> Vector:
        return self._with("fsub" if self.value.type.element == FLOAT else "sub", other)

    def __mul__(self, other: Vector | float) -> Vector:
        return self._with("fmul" if self.value.type.element == FLOAT else "mul", other)

    def __and__(self, other: Vector | float) -> Vector:
        return self._with("and_", other)

    def __or__(self, other: Vector | float) -> Vector:
        return self._with("or_", other)

    def __xor__(self, other: Vector | float) -> Vector:
        return self._with("xor", other)

    def __lshift__(self, count: int) -> Vector:
        return self._with("shl", count)

    def __rshift__(self, count: int) -> Vector:
        return self._with("lshr", count)

    def signed_shift(self, count: int) -> Vector:
        """Shifted to the right; the sign stays."""
        return self._with("ashr", count)

    def to(self, instruction: str, element: ir.Type) -> Vector:
        """Every number converted."""
        kind = ir.VectorType(element, self.value.type.count)
        return Vector(self.builder, getattr(self.builder, instruction)(self.value, kind))

    def root(self) -> Vector:
        kind = self.value.type
        name = f"llvm.sqrt.v{kind.count}f32"
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(kind, [kind]), name)
        return Vector(self.builder, self.builder.call(function, [self.value]))

    def chosen(self, places: Sequence[int], other: Vector | None = None) -> Vector:
        """The numbers at these places, counted through this vector and then the other."""
        mask = ir.Constant(ir.VectorType(INT, len(places)), list(places))
        return Vector(self.builder, self.builder.shuffle_vector(self.value, (other or self).value, mask))

    def and_then(self, other: Vector) -> Vector:
        """The numbers of this vector and of the other, of equal length."""
        return self.chosen(range(2 * self.value.type.count), other)


def everywhere(builder: ir.IRBuilder, value: Any, count: int) -> Vector:
    """A vector of a value that is known at run time."""
    kind = ir.VectorType(value.type, count)
    nothing, first = ir.Constant(kind, ir.Undefined), ir.Constant(INT, 0)
    zeros = ir.Constant(ir.VectorType(INT, count), [0] * count)
    return Vector(builder, builder.shuffle_vector(builder.insert_element(nothing, value, first), nothing, zeros))


def long(value: int) -> ir.Constant:
    return ir.Constant(LONG, value)


def _philox(builder: ir.IRBuilder, first: Any, order: list[int], counter: list[Any], keys: list[Any]) -> list[Vector]:
    """The four words of blocks first + order, in 64-bit lanes, of which only the low halves count, as `philox.philox`.

    counter: the words of the counter after the first, which is the block's number.
    """
    count = len(order)
    c0 = everywhere(builder, first, count) + Vector(builder, ir.Constant(ir.VectorType(LONG, count), order))
    c1, c2, c3 = (everywhere(builder, value, count) for value in counter)
    k0, k1 = keys
    for _ in range(10):
        p0, p1 = (c0 & definition._LOW) * definition._M0, (c2 & definition._LOW) * definition._M1
        c0, c2 = (p1 >> 32) ^ c1 ^ everywhere(builder, k0, count), (p0 >> 32) ^ c3 ^ everywhere(builder, k1, count)
        c1, c3 = p1, p0
        k0, k1 = (builder.add(k, long(w)) for k, w in ((k0, definition._W0), (k1, definition._W1)))
    return [c0, c1, c2, c3]


def _low_halves(word: Vector) -> Vector:
    """The low 32 bits of each number, chosen from pairs of registers: a truncation takes three instructions in place of one."""
    halves = Vector(word.builder, word.builder.bitcast(word.value, ir.VectorType(INT, 2 * _BLOCKS)))
    registers = [halves.chosen(range(k, k + 16)) for k in range(0, 2 * _BLOCKS, 16)]
    even = [a.chosen(range(0, 32, 2), b) for a, b in zip(registers[::2], registers[1::2])]
    return even[0].and_then(even[1])


def _normal_pair(word: Vector) -> tuple[Vector, Vector]:
    """`philox.normal_pair` in the order of its operations."""
    v = (word & 0x3FFFFFFE) | 1
    bits = v.to("sitofp", FLOAT).to("bitcast", INT)
    y = ((bits & 0x7FFFFF) | 0x3F800000).to("bitcast", FLOAT)
    y = y.number(2.0) - y
    radius = (
        (bits.number(definition.TOP_BITS) - bits).to("sitofp", FLOAT) * definition.UNIT
        - y * _polynomial(definition.Q, y)
    ).root()
    a = (v * definition.STRIDE).to("sitofp", FLOAT) * definition.ANGLE
    a2 = a * a
    c, s = _polynomial(definition.C, a2), _polynomial(definition.S, a2) * a
    signs = [(word << shift) & 0x80000000 for shift in (0, 1)]
    first, second = ((radius * side).to("bitcast", INT) ^ sign for side, sign in zip((c - s, c + s), signs))
    return first.to("bitcast", FLOAT), second.to("bitcast", FLOAT)


def _polynomial(coefficients: tuple[float, ...], x: Vector) -> Vector:
    value = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value


def normals_of(builder: ir.IRBuilder, counter: list[Any], keys: list[Any]) -> Iterator[tuple[Any, Vector]]:
    """The 256 normals of a chunk, 32 at a time: (place of the first in the chunk, numbers). What is built for these numbers is
    in a loop if registers have 256 bits. The counter's first word is that of the chunk.
    """
    first = builder.mul(counter[0], long(_BLOCKS))
    return (_unrolled if WIDTH == 512 else _in_loops)(builder, first, counter[1:], keys)


def _unrolled(builder: ir.IRBuilder, first: Any, counter: list[Any], keys: list[Any]) -> Iterator[tuple[Any, Vector]]:
    """`normals_of` for 32 registers of 512 bits."""
    words = [_low_halves(word) for word in _philox(builder, first, list(range(_BLOCKS)), counter, keys)]
    lanes = definition.LANES
    for word in (0, 2):
        pair = _normal_pair(words[word].and_then(words[word + 1]))
        for k in range(4):  # of this word and the next, blocks 0 to 15 and 16 to 31
            one, other = (numbers.chosen(range(lanes * k, lanes * (k + 1))) for numbers in pair)
            yield long(128 * (k % 2) + 32 * (word + k // 2)), one.and_then(other)


_TURN = [0, 1, 4, 5, 2, 3, 6, 7]
"""Blocks of a turn in the lanes of two registers of 256 bits, so that one instruction puts their words in order."""


def _in_loops(builder: ir.IRBuilder, first: Any, counter: list[Any], keys: list[Any]) -> Iterator[tuple[Any, Vector]]:
    """`normals_of` for 16 registers of 256 bits. The words pass through memory."""
    turn, lanes = len(_TURN), definition.LANES
    words = cgutils.alloca_once(builder, ir.ArrayType(INT, 4 * _BLOCKS))
    begin = builder.bitcast(words, INT.as_pointer())
    with cgutils.for_range(builder, long(_BLOCKS // turn)) as loop:
        block = builder.mul(loop.index, long(turn))
        for k, word in enumerate(_philox(builder, builder.add(first, block), _TURN, counter, keys)):
            halves = Vector(builder, builder.bitcast(word.value, ir.VectorType(INT, 2 * turn)))
            low = halves.chosen([2 * _TURN.index(b) for b in range(turn)])
            builder.store(low.value, pointer(builder, begin, builder.add(block, long(_BLOCKS * k)), turn), align=4)
    with cgutils.for_range(builder, long(4 * _BLOCKS // lanes)) as loop:
        address = pointer(builder, begin, builder.mul(loop.index, long(lanes)), lanes)
        one, other = _normal_pair(Vector(builder, builder.load(address, align=4)))
        # two turns for a word, blocks 0 to 15 and 16 to 31
        half, word = builder.and_(loop.index, long(1)), builder.lshr(loop.index, long(1))
        place = builder.add(builder.mul(half, long(128)), builder.mul(word, long(AT_ONCE)))
        yield place, one.and_then(other)


def pointer(builder: ir.IRBuilder, begin: Any, place: Any, count: int = AT_ONCE) -> Any:
    """The address of the numbers, 32 or `count`, from this place on."""
    kind = ir.VectorType(begin.type.pointee, count).as_pointer()
    return builder.bitcast(builder.gep(begin, [place]), kind)


@intrinsic
def wide_normals(typing_context, z, chunk, c1, c2, c3, k0, k1):
    """Write the 256 normals of a chunk to z, float32; chunk, c1 .. k1: uint64, of which all but the chunk are below 2^32."""

    def generate(context, builder, signature, arguments):
        begin = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0]).data
        for place, numbers in normals_of(builder, arguments[1:5], arguments[5:]):
            builder.store(numbers.value, pointer(builder, begin, place), align=4)
        return context.get_dummy_value()

    return types.none(z, *[types.uint64] * 6), generate
