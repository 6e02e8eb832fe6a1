"""Tokenizers that panic, fail on a text or make it grow without end: one sentence when the model is loaded or used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from metazo.errors import UserError
from metazo.models.embedded import PICO
from metazo.models.load import load_model
from metazo.models.tokenizer import _growth
from metazo.tasks import prepare, resolve

REPLACE = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 50}
COPIES = [{"Sequence": {"id": "A", "type_id": 0}}]
NOTHING = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "xy"}},
            "index out of bounds",
        ),  # a panic
        ({"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 5}}, "may make a text 65 times as long"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}}, "may make a text 65 times as long"),
        ({"post_processor": NOTHING | {"single": COPIES * 10**4}}, "may make a text 65 times as long"),
        ({"post_processor": NOTHING}, "makes no tokens"),
        ({"model": {"type": "WordLevel", "unk_token": "zz", "vocab": {"a": 0}}}, "Missing .UNK. token"),
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]}}, "`unk_id` is missing"),
        ({"added_tokens": [{"id": 2**31, "content": "x"}]}, "token id 2,147,483,648"),
    ],
)
def test_one_sentence(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(PICO, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | change))
    with pytest.raises(UserError, match=words):
        prepare(resolve("pico_topic"), load_model(str(folder)), train=4, dev=2, test=2)


def test_known_normalizers_are_not_refused() -> None:
    """Those of Llama, T5 and XLM-R."""
    llama = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
             {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}  # fmt: skip
    pair = [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}, {"Sequence": {"id": "B"}}] * 2
    template = {"type": "TemplateProcessing", "single": pair[:2], "pair": pair}
    assert _growth({"normalizer": llama, "post_processor": template, "decoder": REPLACE}) == 1
