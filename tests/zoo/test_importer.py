"""Importing pickled tuners: exact against torch, and a hostile file has no effect."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from metazo.errors import UserError
from metazo.tuner.file import Tuner
from metazo.zoo import import_pth
from metazo.zoo.torchfile import read_networks

SAFE = [nn.Sequential, nn.Linear, nn.Tanh, set]


def networks(count: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, nn.Sequential]:
    torch.manual_seed(0)
    return {
        f"model.layers.{i}.weight": nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1)).to(dtype)
        for i in range(count)
    }


def saved(content: Any, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, pickle_protocol=protocol)
    return file.getvalue()


def rezipped(data: bytes, change: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The archive with entries (named without their folder) replaced, or removed if None."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = change.get(name.split("/", 1)[1], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target.getvalue()


def archive(pickled: bytes, **entries: bytes) -> bytes:
    return rezipped(saved({}), {"data.pkl": pickled, **entries})


def good_archive() -> tuple[bytes, bytes]:
    """A valid file with one network, and its pickle."""
    data = saved(networks(1))
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return data, next(file.read(name) for name in file.namelist() if name.endswith("data.pkl"))


GOOD = good_archive()


def refusal(data: bytes, path: Path) -> str:
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        import_pth(path, "base")
    message = str(error.value)
    assert str(path) in message and "\n" not in message and message.isprintable()
    return message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("protocol", [2, 4])
def test_equals_what_torch_loads(dtype: torch.dtype, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "t.pth"
    path.write_bytes(saved(networks(dtype=dtype), protocol))
    check_equal(import_pth(path, "base"), networks(dtype=dtype) if protocol == 4 else torch_loads(path))


def torch_loads(path: Path) -> dict[str, nn.Sequential]:
    """By torch's own reader, which knows protocol 2 only."""
    with torch.serialization.safe_globals(SAFE):
        return torch.load(path, map_location="cpu", weights_only=True)


def check_equal(tuner: Tuner, wanted: dict[str, nn.Sequential]) -> None:
    """The weights are exactly the wanted ones, and the output equals theirs in float64."""
    assert [block.name for block in tuner.info.blocks] == list(wanted)
    for index, network in enumerate(wanted.values()):
        for name, parameter in zip(("w1", "b1", "w2", "b2"), network.parameters(), strict=True):
            found = getattr(tuner.pertnn, name)[index].detach()
            assert torch.equal(found, parameter.detach().to(found.dtype).reshape(found.shape))
    inputs = torch.randn(len(wanted), 5, dtype=torch.float64)
    outputs = torch.cat([net.double()(row) for net, row in zip(wanted.values(), inputs, strict=True)])
    torch.testing.assert_close(tuner.pertnn.double()(inputs), outputs, rtol=1e-12, atol=1e-12)


def test_published_tuner(shared: Path, tmp_path: Path) -> None:
    path = shared / "official_tuners" / "llama1B_finetuner.pth"
    if not path.is_file():
        pytest.skip("the published tuner is not in the shared material")
    tuner = import_pth(path, "meta-llama/Llama-3.2-1B")
    tuner.save(tmp_path / "t.safetensors")
    assert len(Tuner.load(tmp_path / "t.safetensors").info.blocks) == 146
    check_equal(tuner, torch_loads(path))


def test_base_model_gives_shapes_and_is_checked(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=40,
        tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "model")
    shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    assert len(shapes) == 2 * 9 + 2  # the tied head is not a separate block
    path = tmp_path / "t.pth"
    nets = list(networks(len(shapes)).values())
    path.write_bytes(saved(dict(zip(shapes, nets, strict=True))))
    tuner = import_pth(path, "llama", tmp_path / "model")
    assert tuner.fits(shapes.items()).ok and tuner.info.fingerprint is not None
    assert import_pth(path, "llama").info.fingerprint is None
    path.write_bytes(saved(networks(2)))
    with pytest.raises(UserError, match=r"model\.layers\.0\.weight is not in the model"):
        import_pth(path, "llama", tmp_path / "model")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        import_pth(path, "llama", tmp_path)


class Evil:
    """An attacker's object: it calls a function when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (open, (str(self.canary), "w"))


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("bare", [True, False])
def test_a_call_is_named_and_not_made(protocol: int, bare: bool, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pickled = pickle.dumps({"w": Evil(canary)}, protocol)
    message = refusal(pickled if bare else archive(pickled), tmp_path / "t.pth")
    assert "io.open" in message or "opcode" in message
    if protocol >= 2:
        assert "io.open" in message and "nothing was executed" in message
    assert not canary.exists()
    pickle.loads(pickled)["w"].close()  # the file is hostile indeed
    assert canary.exists()


S = b"cposix\nsystem\n"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "reduce": (b"\x80\x02" + S + b"X\x04\x00\x00\x00true\x85R.", "asks for posix.system"),
    "stack global": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "asks for os.system"),
    "inst": (b"(S'true'\nios\nsystem\n.", "opcode STRING"),
    "inst without arguments": (b"(iposix\nsystem\n.", "asks for posix.system"),
    "obj": (b"\x80\x02(" + b"}" + b"o.", "opcode OBJ"),
    "newobj_ex": (b"\x80\x04})}\x92.", "opcode NEWOBJ_EX"),
    "extension": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "persistent text": (b"\x80\x02Pfile:///etc/passwd\n.", "opcode PERSID"),
    "persistent other": (b"\x80\x02X\x01\x00\x00\x00aQ.", "refers to outside data"),
    "builtin eval": (b"\x80\x02cbuiltins\neval\n.", "asks for builtins.eval"),
    "dotted attribute": (b"\x80\x04\x8c\x05torch\x8c\x14FloatStorage.__new__\x93.", "asks for"),
    "set state": (b"\x80\x02}X\x0c\x00\x00\x00__setstate__" + b"K\x01b.", "state of an object"),
    "build on a class": (b"\x80\x02ctorch.nn.modules.linear\nLinear\n}b.", "treats a Global as a Module"),
    "call on Linear": (b"\x80\x02ctorch.nn.modules.linear\nLinear\n(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ftR.", "calls"),
    "make an OrderedDict": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "calls collections.OrderedDict"),
    "empty stack": (b"\x80\x020.", "opcode POP"),
    "underflow": (b"\x80\x02R.", "empty stack"),
    "mark": (b"\x80\x02t.", "never set"),
    "below a mark": (b"\x80\x02}(R.", "empty stack"),
    "memo": (b"\x80\x02j\xff\xff\xff\xff.", "never stored"),
    "huge memo index": (b"\x80\x02}r\xff\xff\xff\xff.", "dictionary of networks"),
    "huge long": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "opcode"),
    "huge text": (b"\x80\x04\x8d" + b"\xff" * 8 + b".", "damaged"),
    "long": (b"\x80\x02L" + b"9" * 50_000 + b"L\n.", "damaged"),
    "odd escape": (b"S'\\q'\n.", "opcode|damaged"),
    "tuple key": (b"\x80\x02})K\x01s.", "plain key"),
    "deep": (b"\x80\x02" + b")" + b"\x85" * 300_000 + b".", "dictionary of networks"),
    "deep lists": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "dictionary of networks"),
    "tuple of nothing": (b"\x80\x02N\x86.", "takes from an empty stack"),
    "tuple from below a mark": (b"\x80\x02N(\x85.", "takes from an empty stack"),
    "many opcodes": (b"\x80\x02" + b"N" * 1_100_000 + b".", "more than 1,000,000 opcodes"),
    "laughs": (b"\x80\x02" + b")" + b"q\x00h\x00\x86" * 3000 + b"X\x01\x00\x00\x00ab.", "state of an object"),
    "no stop": (b"\x80\x02}", "damaged"),
    "no pickle": (b"\xff\xfe\xfd", "damaged"),
    "a list": (b"\x80\x02].", "dictionary of networks"),
    "recursive": (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "not Linear, Tanh, Linear"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickle_is_refused(name: str, tmp_path: Path) -> None:
    pickled, words = HOSTILE[name]
    message = refusal(archive(pickled), tmp_path / "t.pth")
    assert any(word in message for word in words.split("|")), message


def test_shapes_and_storages_are_checked_against_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "t.pth"
    good, pickled = GOOD
    size, stride = b"K@K\x05\x86", b"K\x05K\x01\x86"  # (64, 5) and (5, 1)
    assert pickled.count(size) == 1
    huge = b"J\xff\xff\xff\x7fK\x05\x86"
    assert "beyond" in refusal(rezipped(good, {"data.pkl": pickled.replace(size, huge)}), path)
    at = pickled.index(size)
    flat = pickled[:at] + pickled[at:].replace(stride, b"K\x00K\x00\x86", 1).replace(size, huge, 1)
    assert "beyond" in refusal(rezipped(good, {"data.pkl": flat}), path)  # an empty tensor needs no bytes
    assert "'data/0' is missing" in refusal(rezipped(good, {"data/0": None}), path)
    assert "not of the size" in refusal(rezipped(good, {"data/0": b"\0" * 4}), path)
    assert "byte order" in refusal(rezipped(good, {"byteorder": b"middle"}), path)
    nan = struct.pack("<f", float("nan")) * 320
    assert "NaN" in refusal(rezipped(good, {"data/0": nan}), path)
    assert "compressed" in refusal(rezipped(good, {"data/0": b"\0" * 1280}, zipfile.ZIP_DEFLATED), path)


def test_big_endian_and_shared_storages_are_read(tmp_path: Path) -> None:
    flat = torch.arange(449.0) / 449
    net = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1))
    parts = [flat[64:384].view(5, 64).t(), flat[:64], flat[384:448].view(1, 64), flat[448:]]
    for layer, weight, bias in ((net[0], parts[0], parts[1]), (net[2], parts[2], parts[3])):
        assert isinstance(layer, nn.Linear)
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    data = saved({"w": net})
    path = tmp_path / "t.pth"
    path.write_bytes(data)
    check_equal(import_pth(path, "base"), torch_loads(path))
    swapped = flat.numpy().astype(">f4").tobytes()
    path.write_bytes(rezipped(data, {"byteorder": b"big", "data/0": swapped}))
    assert torch.equal(read_networks(path)[0]["w"][0], parts[0])


def test_other_networks_and_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.pth"
    assert "does not hold a dictionary" in refusal(saved([]), path)
    assert "ReLU" in refusal(saved({"w": nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 1))}), path)
    assert "not of the form" in refusal(
        saved({"w": nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 2))}), path
    )
    assert "lacks its 2" in refusal(saved({"w": nn.Sequential(nn.Linear(5, 64), nn.Tanh())}), path)
    no_bias = nn.Sequential(nn.Linear(5, 64, bias=False), nn.Tanh(), nn.Linear(64, 1))
    assert "lacks a weight or a bias" in refusal(saved({"w": no_bias}), path)
    uneven = networks(1) | {"v": nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 1))}
    assert "'v' is not of the form" in refusal(saved(uneven), path)
    assert "damaged or cut short" in refusal(saved(networks())[:5000], path)
    assert "not a zip archive" in refusal(pickle.dumps({}, 2), path)
    with pytest.raises(UserError, match="is not a file"):
        import_pth(tmp_path / "none.pth", "base")
