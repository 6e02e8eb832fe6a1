"""Replay: base model and step log alone give the tuned model, bit for bit, for every method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import metazo
from metazo import zoo
from metazo.blocks import named_tensors, partition
from metazo.errors import UserError
from metazo.models.load import load_model
from metazo.optimizers import OPTIMIZERS
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.replay import replay
from metazo.settings import build
from metazo.steplog.format import header, line, scan
from metazo.tuner.file import BlockSpec, Tuner, TunerInfo
from metazo.tuner.networks import PertNN

SMALL = {
    "model": "pico", "task": "pico_sentiment", "lr": 1e-4, "steps": 5, "batch_size": 2, "train_examples": 8,
    "dev_examples": 4, "test_examples": 0, "snapshot_every": 0, "eval_every": 2,
}  # fmt: skip
OWN = {
    "mezo": {"dtype": "bfloat16", "train": ["*mlp*"], "keep": "best"},
    "mezo-momentum": {"scale": "rms", "weight_decay": 0.1},
    "mezo-svrg": {"method": {"interval": 2}},
    "lozo": {"rule": "adam", "method": {"interval": 2}},
    "hizoo": {"dtype": "float16"},
    "curvzo": {"accumulate": 2, "schedule": "linear"},
    "zo-finetuner": {"tuner": "random:1"},
}


def tuned(out: Path, **settings) -> Path:
    run_settings(build(FinetuneConfig, SMALL, {"out": out, **settings}))
    return out


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tuned(tmp_path_factory.mktemp("run") / "mezo", optimizer="mezo", keep="last", steps=8)


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_every_method_is_rebuilt_to_the_bit(tiny, tmp_path, method):
    model = str(tiny("llama"))
    out = tuned(tmp_path / "run", **{"model": model, "optimizer": method, "keep": "last"} | OWN.get(method, {}))
    done = replay(out / "steps.jsonl", model, tmp_path / "again")
    assert done.identical and weights(tmp_path / "again") == weights(out / "model")
    assert done.steps == (4 if method == "mezo" else 5)  # its best weights are those of an evaluation before the end


def test_no_forward_pass(run, tmp_path, monkeypatch):
    def forward(*args, **kwargs):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(type(load_model("pico").model), "forward", forward)
    assert replay(run / "steps.jsonl", "pico", None).identical


def test_paths_are_text_too_and_a_folder_of_a_run_is_its_log(run, tmp_path):
    done = metazo.replay(str(run), "pico", out=str(tmp_path / "again"))
    assert done.identical and weights(tmp_path / "again") == weights(run / "model")


@pytest.mark.parametrize(
    "named, said",
    [
        ({"log": 5}, "`log` is a file's name or path, not 5"),
        ({"base": 5}, "`base` is a folder, a Hub id, pico, or the model in memory, not 5"),
        ({"out": 5}, "`out` is a folder's name or path, not 5"),
        ({"to": "3"}, "`to` is '3' and the log has 8 steps; give 0 to 8"),
    ],
)
def test_arguments_of_other_types_are_one_sentence(run, named, said):
    with pytest.raises(UserError, match=said):
        metazo.replay(**{"log": run, "base": "pico"} | named)


def test_any_earlier_point(run, tmp_path):
    early = tuned(tmp_path / "early", optimizer="mezo", keep="last", steps=3)
    done = replay(run / "steps.jsonl", "pico", tmp_path / "again", to=3)
    assert done.steps == 3 and done.identical is None
    assert weights(tmp_path / "again") == weights(early / "model")
    base = replay(run / "steps.jsonl", "pico", to=0).loaded.model
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), load_model("pico").model.parameters()))
    with pytest.raises(UserError, match="the log has 8 steps"):
        replay(run / "steps.jsonl", "pico", to=9)


def test_skipped_steps_are_skipped_again(tmp_path):
    out = tuned(tmp_path / "run", optimizer="mezo", steps=12, max_loss=0.5, max_bad_steps=12)
    steps = scan(out / "steps.jsonl").steps
    skipped = [step for step in steps if not step.coefficients]
    assert skipped and len(skipped) < len(steps) and all(max(step.losses) > 0.5 for step in skipped)
    assert replay(out / "steps.jsonl", "pico").identical


def test_another_base_model_is_refused(run, tiny, tmp_path):
    with pytest.raises(UserError, match="is not the base model of this log"):
        replay(run / "steps.jsonl", str(tiny("llama")), tmp_path / "again")
    loaded = load_model("pico")
    with torch.no_grad():
        next(loaded.model.parameters())[0, 0] += 1e-3
    loaded.model.save_pretrained(tmp_path / "near")
    loaded.tokenizer.save_pretrained(tmp_path / "near")
    with pytest.raises(UserError, match="is not the base model of this log"):
        replay(run / "steps.jsonl", str(tmp_path / "near"), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_base_with_another_tokenizer_is_refused(run, tmp_path):
    loaded, base = load_model("pico"), tmp_path / "base"
    loaded.model.save_pretrained(base)
    loaded.tokenizer.save_pretrained(base)
    assert replay(run / "steps.jsonl", str(base)).identical, "the same in another folder"
    file = base / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="its tokenizer has other tokens or splits text in another way"):
        replay(run / "steps.jsonl", str(base), tmp_path / "again")


def test_the_tuner_is_found_by_its_hash_and_another_refused(tmp_path):
    out = tuned(tmp_path / "run", optimizer="mezo", tuner="pico")
    assert replay(out / "steps.jsonl", "pico").identical
    with pytest.raises(UserError, match="random:2 is not the tuner of this log"):
        replay(out / "steps.jsonl", "pico", tuner="random:2")


def test_the_tuner_is_found_by_the_use_of_its_networks_too(tiny, tmp_path):
    blocks = [BlockSpec.of(block) for block in partition(named_tensors(load_model(tiny("llama")).model))]
    networks, kept = PertNN(len(blocks), hidden=2, seed=3), tmp_path / "zoo"
    uses = [{"bound": bound, "features": "log", "parametrisation": "rms_exp"} for bound in (3.0, 1.0)]
    for use in uses:
        zoo.push(Tuner(networks, TunerInfo("base", blocks, **use)), kept)
    zoo.push(Tuner(PertNN(1), TunerInfo("other/model", [BlockSpec("a", [("a", None)])])), kept)
    damaged = kept / "other/model/v1/tuner.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    index = json.loads((kept / "index.json").read_text())
    index["tuners"].insert(0, index["tuners"].pop())
    (kept / "index.json").write_text(json.dumps(index))
    out = tuned(tmp_path / "run", optimizer="mezo", tuner=str(kept / "base/v2"), model=str(tiny("llama")))
    assert replay(out / "steps.jsonl", str(tiny("llama")), zoo_folder=kept).identical
    with pytest.raises(UserError, match="although its networks are the same: bound was 1.0 and is 3.0 now"):
        replay(out / "steps.jsonl", str(tiny("llama")), tuner=str(kept / "base/v1"))


def test_first_order_is_refused(tmp_path):
    out = tuned(tmp_path / "run", optimizer="first-order-sgd", steps=2, eval_every=1)
    with pytest.raises(UserError, match="the methods whose steps follow from their record"):
        replay(out / "steps.jsonl", "pico")


def rewritten(run: Path, path: Path, change) -> Path:
    """The log with its header and records changed by `change`, and correct checksums."""
    chain, data = 0, b""
    for text in (run / "steps.jsonl").read_text().splitlines():
        record = change({key: value for key, value in json.loads(text).items() if key != "crc"})
        row, chain = line(record, chain)
        data += row
    path.write_bytes(data)
    return path


def test_a_log_whose_settings_were_changed_is_refused(run, tmp_path):
    def eps(record):
        return record | ({"settings": record["settings"] | {"eps": 2e-3}} if "settings" in record else {})

    with pytest.raises(UserError, match="cannot be reproduced"):
        replay(rewritten(run, tmp_path / "log", eps), "pico")

    def more(record):
        return record | ({"settings": record["settings"] | {"shell": "rm"}} if "settings" in record else {})

    with pytest.raises(UserError, match="shell.* is not a setting"):
        replay(rewritten(run, tmp_path / "log", more), "pico")

    def bare(record):
        return {"metazo_steps": 1} if "settings" in record else record

    with pytest.raises(UserError, match="its header has no"):
        replay(rewritten(run, tmp_path / "log", bare), "pico")


def test_a_torn_log_is_replayed_and_a_damaged_one_is_not(run, tmp_path):
    data = (run / "steps.jsonl").read_bytes()
    (tmp_path / "torn").write_bytes(data[: data.rindex(b'{"kept"') + 9])
    assert replay(tmp_path / "torn", "pico").steps == 8
    (tmp_path / "damaged").write_bytes(data.replace(b'{"step":3', b'{"step":4'))
    with pytest.raises(UserError, match="line 5 is bad"):
        replay(tmp_path / "damaged", "pico")


def test_the_header_names_what_the_steps_belong_to(run):
    found = header(run / "steps.jsonl")
    assert found["method"] == "mezo" and found["noise"].startswith("philox4x32-10/") and len(found["weights"]) == 64
    assert found["settings"]["lr"] == 1e-4 and "data" not in found["settings"] and found["environment"]["torch"]
