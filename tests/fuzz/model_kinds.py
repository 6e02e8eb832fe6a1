"""Model folders of strangers: tokenizers are loaded as in a run and encode the rows of each task."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from metazo.models.embedded import PICO
from metazo.models.load import load_model
from metazo.tasks import prepare
from tests.fuzz.comparison_kinds import documents
from tests.fuzz.kind import Kind, nested, to_json
from tests.fuzz.run_kinds import ROWS, TASK_OF_ROWS, lines

CHARACTERS = 259
"""Tokens of pico that are kept: three special ones and the 256 bytes."""
MERGES = [("t", "h"), ("th", "e"), ("a", "t")]


@cache
def sound() -> dict[str, Any]:
    """pico's tokenizer with three of its merges."""
    content = json.loads((PICO / "tokenizer.json").read_text())
    vocabulary = {token: number for token, number in content["model"]["vocab"].items() if number < CHARACTERS}
    for number, (left, right) in enumerate(MERGES):
        vocabulary[left + right] = CHARACTERS + number
    content["model"] |= {"vocab": vocabulary, "merges": [" ".join(pair) for pair in MERGES]}
    return content


@cache
def around() -> dict[str, bytes]:
    """The rest of the folder: a model of one layer, and rows."""
    config = LlamaConfig(
        vocab_size=CHARACTERS + len(MERGES), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        found = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    other = json.loads((PICO / "tokenizer_config.json").read_text())
    return found | {
        "tokenizer_config.json": to_json(other),
        "mine/train.jsonl": lines(ROWS),
        "mine/validation.jsonl": lines(ROWS),
    }


def read_tokenizer(folder: Path) -> None:
    loaded = load_model(folder)
    for task in TASK_OF_ROWS:
        ready = prepare(task, loaded, data=folder, train=4, dev=2, test=2)
        batch = ready.collate(ready.train)
        assert batch["input_ids"].dtype == torch.int64 and int(batch["input_ids"].max()) < CHARACTERS + len(MERGES)


def with_part(**parts: Any) -> bytes:
    return to_json(sound() | parts)


def with_model(**parts: Any) -> bytes:
    return with_part(model=sound()["model"] | parts)


@cache
def tokenizer_kind() -> Kind:
    template = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
    split = {"type": "Split", "pattern": {"Regex": "(a+)+("}, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 50}
    return Kind(
        "tokenizer.json",
        [to_json(sound())],
        documents([sound(), {key: value for key, value in sound().items() if key != "decoder"}]).map(to_json),
        read_tokenizer,
        lambda: {
            "deep": nested(b"[", b"]", 400_000),
            "list": b"[]",
            "an id of 2^31": with_part(added_tokens=[{"id": 2**31, "content": "x"}]),
            "an id of 10^400": with_model(vocab={"a": 10**400}),
            "grows": with_part(normalizer={"type": "Sequence", "normalizers": [replace] * 5}),
            "copies": with_part(post_processor=template | {"single": [{"Sequence": {"id": "A", "type_id": 0}}] * 10**4}),
            "panics": with_part(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "xy"}),
            "no tokens": with_part(post_processor=template),
            "a broken pattern": with_part(pre_tokenizer=split),
            "merges of nothing": with_model(merges=["zz yy"]),
        },
        around(),
        share=10,
        growth=1024,
    )  # fmt: skip


KINDS = {"tokenizer": tokenizer_kind}
