"""LoRA under the loop: only adapters move, under any method; what is saved loads with transformers; a plain refusal."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from metazo.errors import UserError
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import finetune
from metazo.runs.setup import set_up
from metazo.settings import build

SMALL = {
    "model": "pico", "task": "pico_sentiment", "lora": 4, "lr": 1e-3, "steps": 8, "train_examples": 64,
    "dev_examples": 32, "test_examples": 32, "eval_every": 4, "snapshot_every": 0,
}  # fmt: skip


def config(out, **extra) -> FinetuneConfig:
    return build(FinetuneConfig, SMALL, {"out": out, **extra})


@pytest.fixture(autouse=True)
def _peft():
    pytest.importorskip("peft", reason="peft is not installed")


@pytest.mark.parametrize("optimizer", ["mezo", "first-order-adamw"])
def test_only_the_adapters_are_trained_and_saved(tmp_path, optimizer):
    setup = set_up(config(tmp_path / "x", optimizer=optimizer))
    trained = [name for name, p in setup.loaded.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    summary = finetune(config(tmp_path / "run", optimizer=optimizer, keep="best"))
    assert summary["dev"]["loss"] <= summary["before"]["loss"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    moved = [p for name, p in loaded.named_parameters() if "lora_B" in name]
    assert moved and (summary["kept_step"] == 0 or any(bool(p.abs().max() > 0) for p in moved))


def test_the_start_is_the_base_model_and_follows_the_seed(tmp_path):
    runs = {}
    for name, extra in {"base": {"lora": 0}, "a": {}, "b": {}, "c": {"seed": 1}}.items():
        loaded = set_up(config(tmp_path / name, **extra)).loaded
        tokens = torch.arange(1, 9)[None]
        with torch.inference_mode():
            logits = loaded.model(input_ids=tokens).logits
        first = [p for n, p in loaded.model.named_parameters() if "lora_A" in n][:1]
        runs[name] = (logits, first)
    assert torch.equal(runs["base"][0], runs["a"][0])
    assert torch.equal(runs["a"][1][0], runs["b"][1][0]) and not torch.equal(runs["a"][1][0], runs["c"][1][0])


def test_without_peft_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"need peft, .* pip install 'metazo\[peft\]'"):
        set_up(config(tmp_path / "x"))


def test_keep_none_saves_no_model_and_tests_the_last_weights(tmp_path):
    plain = finetune(config(tmp_path / "none", lora=0, keep="none", lr=1e-4))
    last = finetune(config(tmp_path / "last", lora=0, keep="last", lr=1e-4))
    assert not (tmp_path / "none" / "model").exists() and (tmp_path / "last" / "model").is_dir()
    assert plain["test"] == last["test"] and plain["dev"] == last["dev"]


def test_seconds_are_those_of_training_and_scales_are_recorded(tmp_path):
    finetune(config(tmp_path / "run", lora=0, scale="rms", lr=1e-4, keep="none"))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["seconds"] < 0.5 and "sigma" not in records[0]
    assert len(records[-1]["sigma"]) == len(set(records[-1]["sigma"])) > 10


def test_on_a_sentence_encoder_the_adapters_of_the_named_layers_alone(tmp_path, minilm):
    rows = [json.dumps({"sentence": f"row {n}", "label": n % 2}) for n in range(60)]
    (tmp_path / "sst2").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "sst2" / f"{split}.jsonl").write_text("\n".join(rows))
    extra = {"model": str(minilm), "task": "sst2", "data": tmp_path, "head": "prototype", "train": ["*layer.5.*"]}
    setup = set_up(config(tmp_path / "x", keep="none", train_examples=20, dev_examples=8, test_examples=8, **extra))
    trained = [name for name, p in setup.loaded.model.named_parameters() if p.requires_grad]
    assert trained and all("layer.5." in name and "lora_" in name for name in trained)
    with pytest.raises(UserError, match="cannot be saved yet"):
        set_up(config(tmp_path / "x", train_examples=20, dev_examples=8, test_examples=8, **extra))
