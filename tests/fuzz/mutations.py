"""Hostile bytes and hostile values, which replace parts of a file before metazo reads it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from hypothesis import strategies as st

CANARY = "canary"
"""Name of the file that all planted code tries to make."""

TOKENS: list[bytes] = [
    b"\0", b"\xff" * 8, b"\xff\xfe\0\0", b"\r\n", b"\n", b'"', b"'", b"{", b"}", b"[" * 300, b"]", b":", b"- ", b"\t",
    b"\\ud800", "\ud800".encode("utf-8", "surrogatepass"), b"\\u0000", "\u202e".encode(), b"\x1b[2J", b"\xef\xbb\xbf",
    b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"9" * 20, b"9" * 5000, b"1e-400", b"true", b"null", b"~",
    b"../../x", b"/etc/passwd", b"/dev/zero", b"C:\\x", b"NUL", b".", b"",
    b"!!python/object/apply:os.system ['touch " + CANARY.encode() + b"']",
    b"!!python/name:os.system", b"&a [*a]", b"*a", b"<<: *a", b"? ", b"!!binary ", b"2024-13-45", b"1:2:3",
    b"{{ cycler.__init__.__globals__.os.system('touch " + CANARY.encode() + b"') }}",
    b"{x.__class__.__mro__}", b"%s%n", b"$(touch " + CANARY.encode() + b")",
    b"cposix\nsystem\n(S'touch " + CANARY.encode() + b"'\ntR.",
]  # fmt: skip


def _place(random: Random, content: bytearray) -> int:
    """A random position; half of the time near the beginning, where headers are."""
    end = len(content) if random.random() < 0.5 else min(len(content), 400)
    return random.randint(0, end)


def _flip(random: Random, content: bytearray, other: bytes) -> None:
    if content:
        content[_place(random, content) % len(content)] ^= 1 << random.randrange(8)


def _overwrite(random: Random, content: bytearray, other: bytes) -> None:
    at = _place(random, content)
    content[at : at + random.choice((1, 2, 4, 8))] = random.randbytes(random.choice((1, 2, 4, 8)))


def _insert(random: Random, content: bytearray, other: bytes) -> None:
    at = _place(random, content)
    content[at:at] = random.choice(TOKENS)


def _replace(random: Random, content: bytearray, other: bytes) -> None:
    at = _place(random, content)
    content[at : at + random.randint(1, 12)] = random.choice(TOKENS)


def _delete(random: Random, content: bytearray, other: bytes) -> None:
    at = _place(random, content)
    del content[at : at + random.choice((1, 2, 8, 64, 512))]


def _truncate(random: Random, content: bytearray, other: bytes) -> None:
    del content[_place(random, content) :]


def _splice(random: Random, content: bytearray, other: bytes) -> None:
    """A part of another file of the kind, or of this one, at a random position."""
    source = other if random.random() < 0.5 else bytes(content)
    start, at = random.randint(0, len(source)), _place(random, content)
    content[at : at + random.choice((0, 0, 16, 128))] = source[start : start + random.randint(1, 256)]


def _repeat(random: Random, content: bytearray, other: bytes) -> None:
    at = _place(random, content)
    content[at:at] = bytes(content[at : at + random.choice((1, 4, 32, 256))]) * random.choice((1, 2, 50))


MUTATIONS: list[Callable[[Random, bytearray, bytes], None]] = [
    _flip, _overwrite, _insert, _replace, _delete, _truncate, _splice, _repeat,
]  # fmt: skip


def mutated(number: int, seeds: list[bytes]) -> bytes:
    """Case `number`: one of the seeds after one to six mutations. The same number gives the same bytes."""
    random = Random(number)
    content = bytearray(random.choice(seeds))
    for _ in range(random.choice((1, 1, 2, 3, 6))):
        random.choice(MUTATIONS)(random, content, random.choice(seeds))
    return bytes(content)


_TEXTS = [token.decode("utf-8", "surrogateescape") for token in TOKENS if len(token) < 400]
_KEYS = st.sampled_from(_TEXTS) | st.text(max_size=4)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, -(2**63), 2**64, 10**30, 1e308, 5e-324, -0.0])
    | st.floats()
    | st.sampled_from(_TEXTS)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=8,
)
"""Values of wrong types or sizes, for JSON and YAML."""


NUMBERS: list[Any] = [
    0, -1, 10**9, 2**31, 2**63, 2**64, 10**18, 10**70, 10**400, 10**4000, 1e9, 1e38, 1e308, -1e308, 5e-324, 1e-45,
    float("nan"), float("inf"), float("-inf"), True, None, "1e9", "²", "9" * 5000, "nan", [10**9], {"1": 1},
]  # fmt: skip
"""A hostile value to replace a number."""


@st.composite
def numbered(draw: st.DrawFn, trees: list[Any]) -> Any:
    """One of the trees with one to three of its numbers replaced by hostile ones."""
    tree = _copy(draw(st.sampled_from(trees)))
    places = list(_numbers(tree))
    for content, key in draw(st.lists(st.sampled_from(places), min_size=1, max_size=3)):
        content[key] = draw(st.sampled_from(NUMBERS))
    return tree


def _numbers(content: Any) -> Any:
    """The positions of the numbers in a tree: (list or dict, index or key)."""
    for key in list(content) if isinstance(content, dict) else range(len(content)):
        if isinstance(content[key], dict | list):
            yield from _numbers(content[key])
        elif isinstance(content[key], int | float):
            yield content, key


@st.composite
def altered(draw: st.DrawFn, trees: list[Any]) -> Any:
    """One of the trees of dicts and lists with one to three places changed: replaced, removed, renamed or doubled."""
    tree = _copy(draw(st.sampled_from(trees)))
    for _ in range(draw(st.integers(1, 3))):
        _alter(draw, tree)
    return tree


def _alter(draw: st.DrawFn, content: Any) -> None:
    while content:
        key = draw(st.sampled_from(list(content) if isinstance(content, dict) else range(len(content))))
        inner = content[key]
        if isinstance(inner, dict | list) and inner and draw(st.integers(0, 3)):
            content = inner
            continue
        match draw(st.sampled_from(("replace", "replace", "remove", "rename", "double"))):
            case "remove":
                del content[key]
            case "rename" if isinstance(content, dict):
                content[draw(_KEYS)] = content.pop(key)
            case "double" if isinstance(content, list):
                content.insert(draw(st.integers(0, len(content))), inner)
            case _:
                content[key] = draw(VALUES)
        return


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(part) for key, part in value.items()}
    return [_copy(part) for part in value] if isinstance(value, list | tuple) else value
