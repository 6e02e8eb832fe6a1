"""Files that strangers publish: tuners, cards, indexes of zoos, pickled tuners, signatures."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st
from torch import nn

from metazo import zoo
from metazo.tuner.file import BlockSpec, Tuner, TunerInfo
from metazo.tuner.markdown import front_matter
from metazo.tuner.networks import PertNN
from metazo.zoo.address import split
from metazo.zoo.index import read_index
from tests.fuzz.kind import Kind, nested, to_json
from tests.fuzz.mutations import CANARY, altered

SHAPES = [("embed.weight", (10, 4)), ("norm.weight", (4,))]
LAUGHS = "{" + ",".join(f'"k{n}":"v"' for n in range(200_000)) + "}"


def tuner(base_model: str = "tiny", **info: Any) -> Tuner:
    blocks = [BlockSpec(name, [(name, shape)]) for name, shape in SHAPES]
    return Tuner(PertNN(len(blocks), hidden=8), TunerInfo(base_model, blocks, **info))


RICH = tuner(
    "org/base", licence="MIT", recipe={"task": ["cb", "rte"], "lr": 0.1}, scores={"cb": {"loss": 0.5, "accuracy": None}}
)
TUNERS = [tuner().to_bytes(), RICH.to_bytes()]

# -- tuners ------------------------------------------------------------------------------------------------------------


def opened(data: bytes) -> dict[str, Any]:
    """A safetensors file as a tree, its metadata opened too."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["metazo"] = json.loads(header["__metadata__"]["metazo"])
    return {"header": header, "payload": list(data[8 + size :])[:40]}


def closed(tree: Any, payload: bytes) -> bytes:
    header = tree.get("header") if isinstance(tree, dict) else tree
    if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict):
        texts = {key: to_json(part).decode("utf-8", "surrogatepass") for key, part in header["__metadata__"].items()}
        header = header | {"__metadata__": texts}
    text = to_json(header)
    return len(text).to_bytes(8, "little") + text + payload


PAYLOAD = TUNERS[0][8 + int.from_bytes(TUNERS[0][:8], "little") :]


def tuner_with(**fields: Any) -> bytes:
    tree = opened(TUNERS[1])
    tree["header"]["__metadata__"]["metazo"].update(fields)
    return closed(tree, PAYLOAD)


def read_tuner(folder: Path) -> None:
    found = Tuner.load(folder / "tuner.safetensors")
    found.fits(SHAPES).sentence()
    outputs = found.pertnn(torch.zeros(found.pertnn.blocks, 5, dtype=found.pertnn.w1.dtype))
    assert outputs.isfinite().all() and len(outputs) == len(found.info.blocks)
    json.dumps(found.info.recipe, allow_nan=False)


def padded(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


# -- cards -------------------------------------------------------------------------------------------------------------

INFO = {"base_model": "org/base", "licence": "MIT", "metazo_version": "0.1.0",
        "recipe": {"task": ["cb", "rte"], "lr": 0.1, "inner": {"steps": 3}}, "scores": {"cb": {"loss": 0.5}}}  # fmt: skip


def read_card(folder: Path) -> None:
    """The card of a tuner that loads: only its own Markdown, for all texts."""
    found = Tuner.load(folder / "tuner.safetensors")
    text = found.card("a/v1", "0" * 64)
    assert "<" not in text and text.replace("\n", "").isprintable()
    for line in text.split("\n## Recipe\n")[1].splitlines():
        assert line in ("", "## Scores", "Not recorded.") or (line.startswith("|") and line.count("|") == 3), line
    about = yaml.safe_load(front_matter(found.info.base_model, found.info.licence).strip("-\n"))
    assert about["base_model"] == found.info.base_model and about["library_name"] == "metazo" and len(about) <= 4


# -- indexes -----------------------------------------------------------------------------------------------------------

ENTRY = {
    "name": "tiny/v1", "base_model": "tiny", "sha256": "0" * 64, "size": len(TUNERS[0]),
    "fingerprint": tuner().info.fingerprint, "blocks": 2, "licence": None, "url": None,
}  # fmt: skip
INDEX = {"format_version": 1, "tuners": [ENTRY, ENTRY | {"name": "a/b/v2", "licence": "MIT"}]}
REMOTE = {"format_version": 1, "tuners": [ENTRY | {"url": "https://example.org/tuner.safetensors"}]}


def index(**fields: Any) -> bytes:
    return to_json({"format_version": 1, "tuners": [ENTRY | fields]})


def read_zoo(folder: Path) -> None:
    for entry in read_index(folder):
        assert (folder / entry.name).resolve().is_relative_to(folder.resolve())
        assert zoo.named(entry.name, folder) is not None
        if entry.url is not None:
            split(entry.url)
            continue
    zoo.find(SHAPES, "tiny", folder)
    for check in zoo.verify(folder):
        assert check.problem is None or check.problem.isprintable()


# -- pickled tuners ----------------------------------------------------------------------------------------------------


class Evil:
    """An attacker's object: it calls a function when it is loaded."""

    def __reduce__(self) -> Any:
        return (open, (CANARY, "w"))


def _saved(content: Any, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, pickle_protocol=protocol)
    return file.getvalue()


def _networks(dtype: torch.dtype = torch.float32) -> dict[str, nn.Sequential]:
    torch.manual_seed(0)
    return {f"w{n}": nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype) for n in range(2)}


PTHS = [_saved(_networks()), _saved(_networks(torch.float16), 4)]


def _rezipped(pickled: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(PTHS[0])) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
    return target.getvalue()


def _opcodes(data: bytes) -> list[bytes]:
    places = [place for _, _, place in pickletools.genops(data)]
    return [data[start:end] for start, end in zip(places, [*places[1:], len(data)])]  # type: ignore[misc]


with zipfile.ZipFile(io.BytesIO(PTHS[0])) as _archive:
    GOOD_OPCODES = _opcodes(next(_archive.read(name) for name in _archive.namelist() if name.endswith("data.pkl")))
ODD_OPCODES = [
    b"cposix\nsystem\n", b"cbuiltins\neval\n", b"\x8c\x02os\x8c\x06system\x93", b"R", b"\x81", b"\x92", b"b", b"o", b"(", b"0",
    b"1", b"2", b"t", b"a", b"e", b"s", b"u", b"}", b"]", b")", b"N", b"Q", b"q\0", b"h\0", b"r\xff\xff\xff\xff", b"\x94",
    b"X\x02\0\0\0\xed\xa0", b"J\xff\xff\xff\x7f", b"\x8a\xff" + b"\xff" * 255, b"G\x7f\xf8" + bytes(6), b"\x85", b"\x86",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n", b"X\x01\0\0\0\n",
    b"i__main__\nEvil\n", b"P/etc/passwd\n", b"\x82\x01", b"K\0", b"X\x08\0\0\0../../up", b"\x8f", b"\x91", b"\x90", b".",
]  # fmt: skip


@st.composite
def programs(draw: st.DrawFn) -> bytes:
    """The pickle of a valid file with some opcodes inserted, removed or exchanged."""
    opcodes = list(GOOD_OPCODES)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(opcodes) - 1))
        new = draw(st.lists(st.sampled_from(ODD_OPCODES + GOOD_OPCODES), max_size=3))
        opcodes[at : at + draw(st.integers(0, 2))] = new
    pickled = b"".join(opcodes)
    return _rezipped(pickled) if draw(st.integers(0, 9)) else pickled


def read_pth(folder: Path) -> None:
    found = zoo.import_pth(folder / "t.pth", "base")
    assert Tuner.from_bytes(found.to_bytes(), "t").info == found.info


def _zip_bomb() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("a/data.pkl", bytes(400 * 2**20))
    return target.getvalue()


KINDS: dict[str, Kind] = {
    "tuner": Kind(
        "tuner.safetensors",
        TUNERS,
        altered([opened(data) for data in TUNERS]).map(lambda tree: closed(tree, PAYLOAD)),
        read_tuner,
        lambda: {
            "header bomb": struct.pack("<Q", 2**63) + b"{" * 100,
            "header of 4 MB": padded(b"[" * 4_000_000),
            "many keys": padded(LAUGHS.encode()),
            "deep metadata": tuner_with(recipe=json.loads("[" * 400 + "]" * 400)),
            "huge shape": closed({"header": {"w1": {"dtype": "F32", "shape": [2**39, 8, 5], "data_offsets": [0, 4]}}}, b""),
            "huge integer": tuner_with(bound=10**4000),
            "surrogate": tuner_with(base_model="\ud800"),
            "line break in a name": tuner_with(base_model="a\nb"),
        },
    ),
    "card": Kind(
        "tuner.safetensors",
        TUNERS,
        altered([INFO]).map(lambda fields: tuner_with(**{k: v for k, v in fields.items() if k in INFO})),
        read_card,
    ),
    "index": Kind(
        "index.json",
        [to_json(INDEX), json.dumps(INDEX, indent=1).encode(), to_json(REMOTE)],
        altered([INDEX, REMOTE]).map(to_json),
        read_zoo,
        lambda: {
            "deep": nested(b"[", b"]", 500_000),
            "climbing": index(name="../../x"),
            "absolute": index(name="/etc/x"),
            "device": index(name="tiny/NUL.v1"),
            "line break": index(name="tiny/v1\n"),
            "NUL": index(name="tiny/v1\0"),
            "surrogate": index(base_model="\ud800"),
            "huge integer": b'{"format_version":1,"tuners":' + b"9" * 100_000 + b"}",
            "size": index(size=10**30),
            "many entries": to_json({"format_version": 1, "tuners": [0] * 1_000_000}),
            "repeated key": to_json(INDEX).replace(b'"size"', b'"size": 1, "size"'),
        },
        {"tiny/v1/tuner.safetensors": TUNERS[0]},
    ),
    "pth": Kind(
        "t.pth",
        PTHS,
        programs(),
        read_pth,
        lambda: {
            "a call": _rezipped(pickle.dumps({"w": Evil()}, 2)),
            "a bare call": pickle.dumps({"w": Evil()}, 4),
            "zip bomb": _zip_bomb(),
            "opcodes": _rezipped(b"\x80\x02" + b"]" * 16_000_000 + b"."),
            "nested": _rezipped(b"\x80\x02" + b")" + b"\x85" * 400_000 + b"."),  # hash() of 200,000 ends Python 3.11
            "doubling": _rezipped(b"\x80\x02)" + b"q\0h\0\x86" * 100_000 + b"."),
        },
    ),
}  # fmt: skip
