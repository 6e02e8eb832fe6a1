"""Files of a run that others may have changed or sent: step logs, settings, metrics, snapshots, signatures."""

from __future__ import annotations

import json
from base64 import b64decode
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from metazo import zoo
from metazo.runs.folder import RunFolder
from metazo.runs.locate import unset_in
from metazo.runs.metrics_file import pack
from metazo.runs.records import _sound
from metazo.step.record import Step
from metazo.steplog.format import encode, line, scan
from metazo.zoo.card import log_card
from metazo.zoo.log import Log
from metazo.zoo.signature import check_signature
from tests.fuzz.kind import Kind, nested, to_json
from tests.fuzz.mutations import altered
from tests.fuzz.zoo_kinds import INDEX

# -- step logs ---------------------------------------------------------------------------------------------------------

HEADER: dict[str, Any] = {
    "metazo_steps": 1, "model": "pico", "weights": "a" * 64, "labels": 2, "task": "mine", "method": "mezo",
    "noise": "philox", "precision": "auto", "settings": {"model": "pico", "lr": 1e-4, "method": {"rank": 2}},
    "environment": {"torch": "2"},
}  # fmt: skip
STEPS = [Step(n, (n * 7919,), (1.5, float("nan")), (0.25,), (1e-4,)) for n in range(6)]
RECORDS: list[dict[str, Any]] = [HEADER, *map(encode, STEPS), {"kept": 5, "weights": "b" * 64}]


def as_log(records: Any) -> bytes:
    """Records as lines with correct checksums, as a forger writes them."""
    parts, chain = [], 0
    for record in records:
        try:
            part, chain = line(record, chain)
        except (ValueError, TypeError, UnicodeEncodeError):  # values that JSON cannot write
            part = to_json(record) + b"\n"
        parts.append(part)
    return b"".join(parts)


def read_log(folder: Path) -> None:
    """All steps of a prefix, numbered from 0; a log that may be published is published and read back."""
    path = folder / "steps.jsonl"
    found = scan(path)
    assert [step.step for step in found.steps] == list(range(len(found.steps))) and found.size <= path.stat().st_size
    if found.damage is None:
        assert found.sound() is found
    log = Log.from_bytes(path.read_bytes(), "the log").published("a/b")
    again = Log.from_bytes(log.data, "the published log")
    assert len(again.steps) == len(found.steps) and again.base_model == "a/b"
    text = log_card(again, "a/v1", "0" * 64, "MIT")
    assert "<" not in text and text.replace("\n", "").isprintable()


# -- the folder of a run -----------------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "model": "pico",
    "task": "cb",
    "lr": 1e-4,
    "train": ["*attn*"],
    "method": {"rank": 2},
    "seed": 0,
}
METRICS: list[dict[str, Any]] = [
    {
        "step": step,
        "forwards": 2 * step,
        "seconds": 1.5,
        "train_loss": None,
        "lr": 1e-4,
        "dev": {"loss": 0.5, "accuracy": 0.7},
    }
    for step in (0, 5, 10)
]


def read_config(folder: Path) -> None:
    found = RunFolder(folder, CONFIG, resume=True).config
    assert {name: found[name] for name in CONFIG} == CONFIG
    unset_in(found)


def read_metrics(folder: Path) -> None:
    for record in RunFolder.read_records(folder):
        if _sound(record):
            float(record["step"] + record["seconds"] + sum(record["dev"].values()))


@cache
def snapshot(step: int = 7) -> bytes:
    with TemporaryDirectory() as folder:
        tensors = {"weights/a": torch.arange(12.0).view(3, 4), "optimizer/step": torch.tensor([step])}
        RunFolder(Path(folder) / "run", {}).save_tensors("t.safetensors", step, tensors)
        return (Path(folder) / "run" / "t.safetensors").read_bytes()


def snapshot_with(tree: dict[str, Any]) -> bytes:
    sound = snapshot()
    size = int.from_bytes(sound[:8], "little")
    text = to_json(tree)
    return len(text).to_bytes(8, "little") + text + sound[8 + size :]


def snapshot_header() -> dict[str, Any]:
    sound = snapshot()
    return json.loads(sound[8 : 8 + int.from_bytes(sound[:8], "little")])


def read_snapshot(folder: Path) -> None:
    """Exactly the bytes that were written, or those before."""
    found = RunFolder(folder, {}, resume=True).load_snapshot(100)
    assert found is not None
    step, tensors = found
    assert step in (3, 7) and tensors["optimizer/step"].tolist() == [step]
    assert torch.equal(tensors["weights/a"], torch.arange(12.0).view(3, 4))


# -- signatures, and the settings of a base model ----------------------------------------------------------------------

SIGNED = to_json(INDEX)
PUBLIC = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3"
SIGNATURE = (  # minisign's own documented example: of the content "test"
    b"untrusted comment: signature from minisign secret key\n"
    b"RWQf6LRCGA9i59SLOFxz6NxvASXDJeRtuZykwQepbDEGt87ig1BNpWaVWuNrm73YiIiJbq71Wi+dP9eKL8OC351vwIasSSbXxwA=\n"
    b"trusted comment: timestamp:1555779966\tfile:test\n"
    b"QtKMXWyYcwdpZAlPF7tE2ENJkRd1ujvKjlj1m9RtHTBnZPa5WKU5uWRs5GoP5M/VqE81QFuMKI5k/SfNQUaOAA==\n"
)


def read_signature(folder: Path) -> None:
    check_signature(b"test", folder / "index.json", PUBLIC)
    given = (folder / "index.json.minisig").read_bytes().splitlines()
    sound = SIGNATURE.splitlines()  # the first line is a comment that nothing covers
    assert given[2] == sound[2]
    assert [b64decode(given[n]) for n in (1, 3)] == [b64decode(sound[n]) for n in (1, 3)]  # its last bits mean nothing


MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40, "tie_word_embeddings": True, "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "torch_dtype": "float32", "pad_token_id": None,
}  # fmt: skip


def read_model(folder: Path) -> None:
    shapes = zoo.model_shapes(folder)
    assert all(name and all(type(n) is int for n in shape) for name, shape in shapes)


KINDS: dict[str, Kind] = {
    "log": Kind(
        "steps.jsonl",
        [as_log(RECORDS), as_log(RECORDS[:-1])],
        altered([RECORDS, RECORDS[:3]]).map(as_log),
        read_log,
        lambda: {
            "deep": b'{"metazo_steps":1,"a":' + nested(b"[", b"]", 100_000) + b"}\n",
            "one long line": b'{"metazo_steps":1,"a":"' + b"x" * 20_000_000,
            "huge integer": as_log([HEADER]) + b'{"step":' + b"9" * 100_000 + b',"crc":1}\n',
            "deep and sealed": as_log([HEADER | {"settings": json.loads("[" * 300 + "]" * 300)}, *RECORDS[1:]]),
            "another version": as_log([HEADER | {"metazo_steps": 2}]),
            "no steps": as_log([HEADER]),
            "huge seed": as_log([HEADER, RECORDS[1] | {"seeds": [2**64]}, RECORDS[2]]),
            "steps left out": as_log([HEADER, RECORDS[1], RECORDS[3], RECORDS[4]]),
            "many numbers": as_log([HEADER, RECORDS[1] | {"losses": [1] * 400_000}, RECORDS[2]]),
        },
    ),
    "config": Kind(
        "config.json",
        [to_json(CONFIG), json.dumps(CONFIG, indent=2).encode()],
        altered([CONFIG]).map(to_json),
        read_config,
        lambda: {"deep": nested(b"[", b"]", 400_000), "list": b"[]", "large": b'{"a":"' + b"x" * 9_000_000 + b'"}',
         "huge integer": to_json(CONFIG).replace(b'"seed": 0', b'"seed": ' + b"9" * 50_000)},
    ),
    "metrics": Kind(
        "metrics.jsonl",
        [pack(METRICS)[0], b"".join(to_json(record) + b"\n" for record in METRICS)],
        altered([METRICS]).map(lambda records: b"".join(to_json(record) + b"\n" for record in records)),
        read_metrics,
    ),
    "snapshot": Kind(
        "snapshot-00000007.safetensors",
        [snapshot()],
        altered([snapshot_header()]).map(snapshot_with),
        read_snapshot,
        dict,
        {"config.json": b"{}", "snapshot-00000003.safetensors": snapshot(3)},
    ),
    "signature": Kind(
        "index.json.minisig",
        [SIGNATURE],
        altered([SIGNATURE.decode().splitlines()]).map(
            lambda lines: "\n".join(map(str, lines)).encode("utf-8", "surrogatepass")
        ),
        read_signature,
        lambda: {"empty": b"", "large": SIGNATURE * 10_000, "lines": b"\n" * 8000},
        {"index.json": SIGNED},
    ),
    "model": Kind(
        "config.json",
        [to_json(MODEL)],
        altered([MODEL]).map(to_json),
        read_model,
        lambda: {
            "code of its own": to_json(MODEL | {"model_type": "x", "auto_map": {"AutoConfig": "x.C"}}),
            "many layers": to_json(MODEL | {"num_hidden_layers": 10**7}),
            "wide": to_json(MODEL | {"hidden_size": 10**18}),
            "deep": nested(b"[", b"]", 400_000),
            "another class": to_json(MODEL | {"architectures": ["Trainer"], "model_type": "x"}),
        },
    ),
}  # fmt: skip
