"""Read the pickle of a published `.pth` as plain data, without executing anything.

A pickle is a program. This module interprets the 38 opcodes that a dictionary of `nn.Sequential` needs; the calls of
such a file (rebuild a tensor, make a Linear) are recognised by name and answered with the records below. No name is
ever imported, no callable ever called, no attribute ever set, and every other opcode and name is refused.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_OPCODES = 1_000_000
"""Most opcodes: a published file uses 550 per network, so this allows 1,800 networks."""


class Refused(ValueError):
    """The pickle is damaged, or asks for something that a tuner does not need; the message says what and where."""


@dataclass(frozen=True)
class Global:
    """A name in the pickle, written `module name`; it is never looked up."""

    name: str


@dataclass
class Module:
    """An object of a network class: its class name and the dictionary that would have become its `__dict__`."""

    kind: str
    state: dict[Any, Any]


@dataclass(frozen=True)
class StorageRef:
    """Numbers in another entry of the archive: their torch type, the entry's key, and their count."""

    dtype: str
    key: str
    elements: int


@dataclass(frozen=True)
class TensorRef:
    """A strided view of a storage; nothing about it has been checked yet."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


_MODULES = {
    "torch.nn.modules.container Sequential": "Sequential",
    "torch.nn.modules.linear Linear": "Linear",
    "torch.nn.modules.activation Tanh": "Tanh",
}
_STORAGES = {
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch DoubleStorage": "float64",
}
_CALLS = {
    "collections OrderedDict",
    "__builtin__ set",
    "builtins set",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_LITERALS |= {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read(data: bytes) -> Any:
    """The pickle's content as dicts, lists, tuples, numbers, text and the records above. Raises Refused."""
    machine = _Machine()
    last = None
    try:
        for count, last in enumerate(_opcodes(data)):
            opcode, argument, _ = last
            if count >= MAX_OPCODES:
                raise Refused(f"has more than {MAX_OPCODES:,} opcodes")
            if opcode.name == "STOP":
                return machine.pop()
            machine.run(opcode.name, argument)
    except ValueError as error:
        if last is None:
            raise Refused("is empty or damaged at its start") from error
        where = f"opcode {last[0].name} at byte {last[2]}"
        raise Refused(f"{error} ({where})" if isinstance(error, Refused) else f"is damaged after {where}") from error
    raise Refused("ends without STOP")


def _opcodes(data: bytes) -> Iterator[tuple[Any, Any, int | None]]:
    """pickletools.genops without its warnings about odd escapes in text; those opcodes are refused anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from pickletools.genops(data)


class _Machine:
    """The pickle machine: a stack, marks on it, and a memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Refused("takes from an empty stack")
        return self.stack.pop()

    def pop_last(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise Refused("takes from an empty stack")
        members = tuple(self.stack[-count:])
        del self.stack[-count:]
        return members

    def pop_mark(self) -> list[Any]:
        """Pop everything above the last mark, and the mark."""
        if not self.marks:
            raise Refused("goes back to a mark that was never set")
        start = self.marks.pop()
        members = self.stack[start:]
        del self.stack[start:]
        return members

    def top(self, kind: type) -> Any:
        value = self.pop()
        self.stack.append(value)
        if type(value) is not kind:
            raise Refused(f"treats a {type(value).__name__} as a {kind.__name__}")
        return value

    def run(self, name: str, argument: Any) -> None:
        """Execute one opcode."""
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            self.stack.append(self.pop_last(_TUPLES[name]))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            value = self.pop()
            self.stack.append(value)
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = value
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                raise Refused(f"recalls entry {argument}, which it never stored")
            self.stack.append(self.memo[argument])
        elif name not in ("PROTO", "FRAME"):
            self.structure(name, argument)

    def structure(self, name: str, argument: Any) -> None:
        """Opcodes that combine values on the stack."""
        match name:
            case "MARK":
                self.marks.append(len(self.stack))
            case "TUPLE":
                self.stack.append(tuple(self.pop_mark()))
            case "APPEND":
                value = self.pop()
                self.top(list).append(value)
            case "APPENDS":
                members = self.pop_mark()
                self.top(list).extend(members)
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.pop_mark())
            case "GLOBAL":
                self.stack.append(_known(argument))
            case "STACK_GLOBAL":
                attribute, module = self.pop(), self.pop()
                if type(attribute) is not str or type(module) is not str:
                    raise Refused("builds a name from something other than text")
                self.stack.append(_known(f"{module} {attribute}"))
            case "REDUCE" | "NEWOBJ":
                arguments, function = self.pop(), self.pop()
                if type(function) is not Global or type(arguments) is not tuple:
                    raise Refused(f"calls a {type(function).__name__}")
                self.stack.append(_call(function.name, arguments, made=name == "NEWOBJ"))
            case "BUILD":
                state = self.pop()
                if type(state) is not dict:
                    raise Refused(f"sets the state of an object to a {type(state).__name__}")
                self.top(Module).state = state
            case "BINPERSID":
                self.stack.append(_storage(self.pop()))
            case "INST":
                raise Refused(f"asks for {_shown(argument)}, which a tuner does not need; nothing was executed")
            case _:
                raise Refused(f"uses opcode {name}, which a tuner does not need; nothing was executed")

    def set_items(self, members: list[Any]) -> None:
        if len(members) % 2 or not all(type(key) in (str, int) for key in members[::2]):
            raise Refused("sets dictionary entries without a plain key")
        self.top(dict).update(zip(members[::2], members[1::2], strict=True))


def _known(name: str) -> Global:
    if name not in _MODULES and name not in _STORAGES and name not in _CALLS:
        raise Refused(f"asks for {_shown(name)}, which a tuner does not need; nothing was executed")
    return Global(name)


def _call(name: str, arguments: tuple[Any, ...], made: bool) -> Any:
    """The record that represents a call (`made`: an object made without a call); nothing is called."""
    if made and name in _MODULES and not arguments:
        return Module(_MODULES[name], {})
    if not made:
        match name.split(" ")[1], arguments:
            case "_rebuild_parameter", (TensorRef() as tensor, _, _):
                return tensor
            case "_rebuild_tensor_v2", (StorageRef() as storage, offset, tuple(shape), tuple(stride), _, _):
                if all(type(number) is int and 0 <= number < 2**40 for number in (offset, *shape, *stride)):
                    return TensorRef(storage, offset, shape, stride)
            case "OrderedDict", ():
                return {}
            case "set", (list(members),):
                return members
    raise Refused(f"calls {_shown(name)} with arguments that a tuner does not use; nothing was executed")


def _storage(reference: Any) -> StorageRef:
    """The persistent id of torch.save: ("storage", type, key, device, elements)."""
    match reference:
        case ("storage", Global(kind), str(key), _, int(elements)) if kind in _STORAGES:
            return StorageRef(_STORAGES[kind], key, elements)
    raise Refused("refers to outside data in a way that torch.save does not")


def _shown(name: str) -> str:
    return ascii(name.replace(" ", "."))[1:-1][:100]
