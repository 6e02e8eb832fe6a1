"""Adapters in a run: only they change, under any method; saved adapters load with transformers; refusals are one sentence."""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import metazo
from metazo.errors import UserError
from metazo.io import bounded
from metazo.models.adapters import add_adapters
from metazo.models.assemble import load
from metazo.models.describe import RECORD
from metazo.models.load import load_model
from metazo.models.virtual import with_virtual_tokens
from metazo.models.wanted import Adapter
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.names import check_names
from metazo.runs.replay import replay
from metazo.runs.setup import set_up
from metazo.settings import build
from metazo.steplog.format import scan
from metazo.tasks import prepare, resolve
from metazo.tasks.evaluate import evaluate, generate
from tests.cli.test_cli import metazo as command

SMALL = {
    "task": "pico_sentiment", "lora": 4, "lr": 1e-3, "steps": 8, "train_examples": 64,
    "dev_examples": 8, "test_examples": 8, "batch_size": 4, "eval_every": 4, "snapshot_every": 0,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def base(tiny: Callable[[str], Path]) -> None:
    """The runs are of a model of two layers."""
    SMALL["model"] = str(tiny("llama"))


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
    summary = run_settings(config(tmp_path / "run", optimizer=optimizer, keep="best"))
    assert summary["dev"]["loss"] <= summary["before"]["loss"]
    base = AutoModelForCausalLM.from_pretrained(SMALL["model"])
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "run" / "model"))
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


@pytest.mark.parametrize("kind", ["lora", "prefix"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_start_does_not_depend_on_the_default_dtype(kind, dtype):
    """Under which a replay in another process did not find the weights with which the run began."""
    starts = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            loaded = load_model(SMALL["model"])
            names = add_adapters(loaded, Adapter(kind, rank=4), seed=3)
        finally:
            torch.set_default_dtype(torch.float32)
        starts.append({name: p for name, p in loaded.model.named_parameters() if name in names})
    assert starts[0].keys() == starts[1].keys() and starts[0]
    assert all(p.dtype == torch.float32 and torch.equal(p, starts[1][name]) for name, p in starts[0].items())


def test_without_peft_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"need peft, .* pip install 'metazo\[peft\]'"):
        set_up(config(tmp_path / "x"))


def test_keep_none_saves_no_model_and_tests_the_last_weights(tmp_path):
    plain = run_settings(config(tmp_path / "none", lora=0, keep="none", lr=1e-4))
    last = run_settings(config(tmp_path / "last", lora=0, keep="last", lr=1e-4))
    assert not (tmp_path / "none" / "model").exists() and (tmp_path / "last" / "model").is_dir()
    assert plain["test"] == last["test"] and plain["dev"] == last["dev"]


def test_seconds_are_those_of_training_and_scales_are_recorded(tmp_path):
    run_settings(config(tmp_path / "run", lora=0, scale="rms", lr=1e-4, keep="none"))
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
    with pytest.raises(UserError, match="merged into its weights"):
        set_up(config(tmp_path / "x", train_examples=20, dev_examples=8, test_examples=8, **extra))


PARTS = {"whole": {}, "train": {"train": ["*layers.0*"]}, "freeze": {"freeze": ["*layers.0*", "*lora_A*"]}}


@pytest.mark.parametrize("extra", PARTS.values(), ids=PARTS)
def test_a_replay_trains_the_tensors_that_the_run_trained(tmp_path, extra):
    run_settings(config(tmp_path / "run", keep="last", **extra))
    done = replay(tmp_path / "run" / "steps.jsonl", SMALL["model"], tmp_path / "again")
    assert done.identical
    trained = {name for name, p in done.loaded.model.named_parameters() if p.requires_grad}
    setup = set_up(config(tmp_path / "x", **extra))
    assert trained == {name for name, p in setup.loaded.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A LoRA run on pico and its summary."""
    out = tmp_path_factory.mktemp("lora") / "run"
    return out, run_settings(config(out, keep="last", lr=1e-2))


def copied(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a file that is written again: those of load_file lie in it."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def on_test(model: str, merge: bool = False) -> dict[str, float]:
    loaded = load(model, merge=merge)
    rows = {split: SMALL[f"{split}_examples"] for split in ("train", "dev", "test")}
    return evaluate(loaded.model, prepare(resolve("pico_sentiment"), loaded, **rows), "test")


def test_the_folder_of_a_lora_run_is_a_model(adapters, tmp_path):
    out, summary = adapters
    assert on_test(str(out)) == on_test(str(out / "model")) == summary["test"] != on_test(SMALL["model"])
    assert on_test(str(out), merge=True)["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-4)
    again = run_settings(config(tmp_path / "on", model=str(out), lora=0, lr=1e-4, steps=2))
    assert again["before"]["loss"] == pytest.approx(summary["dev"]["loss"], rel=1e-4)
    assert (tmp_path / "on" / "model" / "config.json").is_file(), "a plain model, the adapters merged"


def test_merged_saving(adapters, tmp_path):
    _, summary = adapters
    again = run_settings(config(tmp_path / "run", keep="last", lr=1e-2, merge=True))
    assert again["test"]["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    assert on_test(str(tmp_path / "run"))["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-4)
    shown = command("replay", str(tmp_path / "run"), "--base", SMALL["model"], "--out", str(tmp_path / "apart")).stdout
    assert "the adapters, not merged into their base, are in" in shown
    done = replay(tmp_path / "run" / "steps.jsonl", SMALL["model"], tmp_path / "again", merge=True)
    same = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "run" / "model", tmp_path / "again")]
    assert done.identical and same[0] == same[1]


def test_adapters_without_their_base_or_of_another_kind(adapters, tmp_path):
    out, _ = adapters
    for change, said in (
        ({"base_model_name_or_path": str(tmp_path / "gone")}, r"their base model cannot be loaded: .*gone"),
        ({"peft_type": "POLY"}, "metazo loads lora, dora, ia3, prefix and prompt"),
        ({"peft_type": ["LORA"]}, "metazo loads lora, dora, ia3, prefix and prompt"),
        ({"r": 3}, "do not fit"),
    ):
        folder = tmp_path / "changed"
        shutil.copytree(out / "model", folder, dirs_exist_ok=True)
        settings = json.loads((out / "model" / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(UserError, match=said):
            load(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target_modules": "("}, r"adapter_config.json: target_modules .* fails \(missing \)"),
        ({"target_modules": [5]}, "has target_modules .5., and it must be a regular expression or a list of names"),
        ({"exclude_modules": "("}, r"exclude_modules .* fails \(missing \)"),
        ({"exclude_modules": "(([a-z_]+)+[.]?)+!"}, "exclude_modules .* takes more than 1 s"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern .* fails \(missing \)"),
        ({"rank_pattern": {"(([a-z_0-9]+)+[.]?)+!": 3}}, "rank_pattern .* takes more than 1 s"),
        ({"rank_pattern": 5}, "has rank_pattern 5, and it must be ranks of at most"),
        ({"r": 10**9}, "has r 1000000000, and it must be a whole number of at most 131,072"),
        ({"init_lora_weights": 5}, "has init_lora_weights 5, and it must be true, false or a name"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config .* must be null"),
        ({"layer_replication": [[0, 10**4]]}, "layer_replication .* of at most 2,000 layers"),
        ({"trainable_token_indices": [10**9]}, "do not fit"),
        ({"arrow_config": {"a": 1}}, "do not fit"),
    ],
)
def test_settings_of_adapters_from_a_stranger_are_one_sentence(adapters, change, said, tmp_path, monkeypatch):
    monkeypatch.setattr(bounded, "SECONDS", 1)
    folder = shutil.copytree(adapters[0] / "model", tmp_path / "m")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said):
        load(folder)


def test_an_ordinary_regular_expression_names_targets(adapters, tmp_path):
    """With repetitions that end."""
    folder = shutil.copytree(adapters[0] / "model", tmp_path / "m")
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    before = load(adapters[0] / "model").model.state_dict()
    names = "|".join(settings["target_modules"])
    path.write_text(json.dumps(settings | {"target_modules": rf".*\.({names})$", "rank_pattern": {".*none": 3}}))
    after = load(folder).model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_file_of_adapters_that_is_damaged_or_of_other_tensors_is_named(adapters, tuned, tmp_path):
    kind, virtual, _ = tuned
    for out, key in ((adapters[0], "q_proj.lora_A"), (virtual, "prompt_embeddings" if kind[0] == "p" else "layers.1.")):
        folder = tmp_path / out.name
        shutil.copytree(out / "model", folder, dirs_exist_ok=True)
        file = folder / "adapter_model.safetensors"
        whole, tensors = file.read_bytes(), copied(file)
        for damaged in (b"", whole[:5], whole[:100], whole[:-10]):
            file.write_bytes(damaged)
            with pytest.raises(
                UserError, match=r"adapter_model\.safetensors is damaged \(.*\); copy the adapters again"
            ):
                load(folder)
        less = {name: tensor for name, tensor in tensors.items() if key not in name}
        save_file(less, file)
        first = next(name for name in tensors if name not in less)
        with pytest.raises(UserError, match=r"adapter_model\.safetensors has no tensor '.*" + re.escape(key)):
            load(folder)
        with pytest.raises(UserError, match="has no tensor"):
            run_settings(config(tmp_path / "on", model=str(folder), lora=0, adapter="continue"))
        save_file(tensors | {"base_model.model.model.layers.9.lora_A.weight": tensors[first].clone()}, file)
        with pytest.raises(UserError, match="does not fit .*, which has no tensor 'base_model.model.model.layers.9"):
            load(folder)
        save_file(tensors, file)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(folder)


def test_a_trained_head_that_is_lacking_is_named(tmp_path):
    run_settings(config(tmp_path / "run", kind="classifier", keep="last", steps=1))
    file = tmp_path / "run/model/adapter_model.safetensors"
    assert load(tmp_path / "run").model.config.num_labels == 2, "adapters with a head are a classifier"
    save_file({name: tensor for name, tensor in copied(file).items() if "score" not in name}, file)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors has no tensor '.*score.weight'"):
        load(tmp_path / "run")


def test_an_evaluation_notes_a_loss_that_is_not_finite_and_no_new_head(tmp_path):
    run_settings(config(tmp_path / "run", kind="classifier", keep="last", steps=1))

    def notes(model) -> str:
        said: list[str] = []
        metazo.evaluate(model, say=said.append)
        return "\n".join(said)

    assert "new head" not in notes(tmp_path / "run"), "the trained head is in the file"
    assert "not finite" not in notes(tmp_path / "run")
    file = tmp_path / "run/model/adapter_model.safetensors"
    tensors = copied(file)
    next(iter(tensors.values())).fill_(torch.nan)
    save_file(tensors, file)
    said = r"The loss is not finite \(nan\), so the weights of .*model are damaged or too large for float32 \(1 of"
    assert re.search(said, notes(tmp_path / "run"))


@pytest.mark.filterwarnings("error:Could not find", "error:Model with", "error:Model has")
def test_warnings_of_peft_that_are_no_use_are_not_shown(adapters, tmp_path):
    extra = {"keep": "last", "steps": 1, "dev_examples": 8, "test_examples": 8}
    run_settings(config(tmp_path / "on", model=str(adapters[0]), lora=0, adapter="continue", **extra))
    run_settings(config(tmp_path / "tied", adapter_targets=["embed_tokens"], **extra))


def test_adapters_on_a_tied_matrix_are_not_merged(tmp_path):
    """The other layer that uses the matrix would get the sum: another model than the one that was trained."""
    said = "cannot be merged, because its matrix is also base_model.model.lm_head.weight"
    with pytest.raises(UserError, match=said):
        run_settings(config(tmp_path / "run", model="pico", adapter_targets=["embed_tokens"], merge=True))
    assert not (tmp_path / "run" / "config.json").exists()
    run_settings(config(tmp_path / "on", model="pico", adapter_targets=["embed_tokens"], keep="last", steps=1))
    with pytest.raises(UserError, match=said):
        run_settings(config(tmp_path / "new", model=str(tmp_path / "on"), lora=0))
    run_settings(config(tmp_path / "more", model=str(tmp_path / "on"), lora=0, adapter="continue", steps=1))


def test_adapters_that_were_loaded_for_use_are_not_continued(adapters):
    with pytest.raises(UserError, match=r"were loaded for use: load them with metazo.load_model\(..., train=True\)"):
        metazo.finetune(metazo.load_model(adapters[0]), "pico_sentiment", adapter="continue", steps=1)
    loaded = metazo.load_model(adapters[0], train=True)
    metazo.finetune(loaded, "pico_sentiment", adapter="continue", steps=1, dev_examples=4, test_examples=4)


def test_adapters_that_are_moved_keep_the_record_of_their_rows(adapters, tmp_path):
    """So that evaluation leaves out rows that were trained on, wherever the folder is."""
    out, _ = adapters
    shutil.copytree(out / "model", tmp_path / "moved")
    record = load(tmp_path / "moved").model.config.metazo
    assert record == scan(out / "steps.jsonl").header["trained"] | {} and record["task"] == "pico_sentiment"
    again = replay(out / "steps.jsonl", SMALL["model"], tmp_path / "again")
    assert again.identical and load(tmp_path / "again").model.config.metazo == record
    (tmp_path / "moved" / RECORD).write_text('{"labels": 3}')
    with pytest.raises(UserError, match="not written by metazo"):
        load(tmp_path / "moved")


def test_adapters_that_are_continued_keep_the_records_of_all_their_trainings(adapters, tmp_path):
    """So that rows of the first training are left out, also if the folder is moved or made again from the log."""
    first, extra = adapters[0] / "model", {"keep": "last", "steps": 1, "dev_examples": 8, "test_examples": 8}
    run_settings(config(tmp_path / "on", model=str(first), lora=0, adapter="continue", train_examples=9, **extra))
    replay(tmp_path / "on/steps.jsonl", str(first), tmp_path / "again")
    shutil.copytree(tmp_path / "on/model", tmp_path / "moved")
    for folder in ("on/model", "moved", "again"):
        found = load(tmp_path / folder).model.config.metazo
        assert found["train"] == 9 and found["earlier"] == [load(first).model.config.metazo], folder


def test_labels_of_moved_adapters_are_matched_by_name(tmp_path):
    """A classifier's classes have the names of the labels, so that a task that lists them the other way scores the same."""
    rows = [{"text": f"it was {word} {n}", "label": word} for n in range(20) for word in ("good", "bad")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = "kind: classification\nprompt: '{text} {}'\nfiles: {train: rows.jsonl}\nlabels: "
    for name, labels in (("one", "{bad: bad, good: good}"), ("two", "{good: good, bad: bad}")):
        (tmp_path / f"{name}.yaml").write_text(task + labels + "\n")
    sizes = {"train_examples": 16, "dev_examples": 8, "test_examples": 16, "kind": "classifier"}
    run_settings(config(tmp_path / "run", task=str(tmp_path / "one.yaml"), keep="last", lr=1e-4, **sizes))
    moved = (tmp_path / "run/model").rename(tmp_path / "moved")
    found = [
        metazo.evaluate(moved, tmp_path / f"{name}.yaml", kind="classifier")["accuracy"] for name in ("one", "two")
    ]
    assert found[0] == found[1]


def test_adapters_name_no_folder_of_this_machine(tmp_path):
    out = tmp_path / "run"
    run_settings(config(out, model="pico", keep="last", steps=1))
    assert json.loads((out / "model/adapter_config.json").read_text())["base_model_name_or_path"] == "pico"
    for path in (out / "model").iterdir():
        assert str(Path(metazo.__file__).parent).encode() not in path.read_bytes()


def test_new_adapters_on_adapters_are_saved_merged_or_not_at_all(adapters, tmp_path, monkeypatch):
    """peft would put them on the adapters' folder as their base, which transformers reads as another model."""
    out, _ = adapters
    extra = {"model": str(out), "keep": "last", "lr": 1e-2, "steps": 3}
    with pytest.raises(UserError, match="has adapters, and new ones on it could not name their base model: continue"):
        run_settings(config(tmp_path / "on", **extra))
    assert not (tmp_path / "on").exists()
    with pytest.raises(UserError, match="has adapters in memory; train them by `adapter='continue'`"):
        metazo.finetune(load(out), "pico_sentiment", lora=4, lr=1e-3, steps=1)
    summary = run_settings(config(tmp_path / "merged", merge=True, **extra))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "model", dtype=torch.float32).eval()
    ours, ids = load(tmp_path / "merged"), torch.arange(5, 25)[None]
    assert torch.equal(theirs(ids).logits, ours.model(ids).logits)
    assert on_test(str(tmp_path / "merged"))["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-5)
    with pytest.raises(UserError, match="could not name their base model"):
        replay(tmp_path / "merged/steps.jsonl", str(out), tmp_path / "again")
    assert replay(tmp_path / "merged/steps.jsonl", str(out), tmp_path / "again", merge=True).identical

    monkeypatch.setattr("metazo.runs.preconditions.check_named", lambda *given: None)  # as earlier versions saved them
    summary = run_settings(config(tmp_path / "on", **extra))
    assert on_test(str(tmp_path / "on"))["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-5)


def test_the_test_of_a_run_is_of_the_merged_model(tmp_path):
    """In bfloat16 the sums are rounded, and the figures would be of another model than the one that is saved."""
    extra = {"dtype": "bfloat16", "merge": True, "keep": "last", "lr": 3e-3}
    summary = run_settings(config(tmp_path / "run", optimizer="first-order-adamw", test_examples=32, **extra))
    loaded = load(tmp_path / "run", dtype="bfloat16")
    rows = {split: SMALL[f"{split}_examples"] for split in ("train", "dev")}
    found = evaluate(loaded.model, prepare(resolve("pico_sentiment"), loaded, test=32, **rows), "test")
    assert found == summary["test"]


def test_merged_adapters_of_a_sentence_encoder(tmp_path, minilm):
    rows = [json.dumps({"sentence": f"row {n}", "label": n % 2}) for n in range(60)]
    (tmp_path / "sst2").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "sst2" / f"{split}.jsonl").write_text("\n".join(rows))
    extra = {"model": str(minilm), "task": "sst2", "data": tmp_path, "head": "linear", "train": ["*layer.5.*", "head*"]}
    sizes = {"train_examples": 20, "dev_examples": 8, "test_examples": 8}
    summary = run_settings(config(tmp_path / "run", merge=True, keep="last", steps=4, **sizes, **extra))
    loaded = load(tmp_path / "run", num_labels=2)
    assert not any("lora_" in name for name, _ in loaded.model.named_parameters())
    prepared = prepare(resolve("sst2"), loaded, data=tmp_path, train=20, dev=8, test=8)
    assert evaluate(loaded.model, prepared, "test")["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-4)


KINDS = {"dora": "lora_magnitude_vector", "ia3": "ia3_l", "prefix": "prompt_encoder", "prompt": "prompt_encoder"}


@pytest.fixture(scope="module", params=KINDS)
def tuned(request, tmp_path_factory):
    """A run with each kind of adapter but plain LoRA: the kind, its folder and its summary."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    rank = {} if request.param == "ia3" else {"adapter_rank": 3}
    extra = {"lora": 0, "adapter": request.param, "keep": "last", "steps": 4, "lr": 1e-2, **rank}
    return request.param, out, run_settings(config(out, **extra))


def test_every_kind_trains_its_tensors_alone_saves_and_loads(tuned, tmp_path):
    kind, out, summary = tuned
    base = {name: p.clone() for name, p in AutoModelForCausalLM.from_pretrained(SMALL["model"]).named_parameters()}
    loaded = load(out)
    names = dict(loaded.model.named_parameters())
    assert any(KINDS[kind] in name for name in names)
    wrapped = "base_model." if kind in ("prefix", "prompt") else "base_model.model."
    inner = {name.removeprefix(wrapped).replace("base_layer.", ""): p for name, p in names.items()}
    assert base and all(torch.equal(base[name], inner[name]) for name in base), (
        "the base model is untouched bit for bit"
    )
    assert on_test(str(out)) == summary["test"] != on_test(SMALL["model"])
    again = replay(out / "steps.jsonl", SMALL["model"], tmp_path / "again")
    assert again.identical and on_test(str(tmp_path / "again")) == summary["test"]


def test_every_kind_is_continued_and_merged_if_it_can_be(tuned, tmp_path):
    """With adapter continue the run begins at the function that the adapters have, and writes the same tensors again."""
    kind, out, summary = tuned
    extra = {"lora": 0, "model": str(out), "keep": "last", "steps": 2}
    check_names(
        config(tmp_path / "on", adapter="continue", **extra | {"model": str(out / "model")})
    )  # the command line's
    on = run_settings(config(tmp_path / "on", adapter="continue", **extra))
    assert on["before"] == summary["dev"]
    assert on_test(str(tmp_path / "on")) == on["test"], "the adapters that were continued are applied once"
    again = tmp_path / "again"
    assert replay(tmp_path / "on" / "steps.jsonl", str(out), again).identical and on_test(str(again)) == on["test"]
    trained = {name for name, p in set_up(config(tmp_path / "x", adapter="continue", **extra)).loaded.model.named_parameters()
               if p.requires_grad}  # fmt: skip
    assert trained and all(KINDS[kind] in name or "lora_" in name for name in trained)
    if kind in ("prefix", "prompt"):
        with pytest.raises(UserError, match="cannot be merged into the weights; continue them"):
            load(out, merge=True)
    else:
        assert on_test(str(out), merge=True)["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-4)


def test_a_prefix_that_was_saved_projected_is_continued_without_the_projection(tmp_path):
    """peft saves the projected tokens and not the network that made them; they are what is trained on."""
    base = AutoModelForCausalLM.from_pretrained(SMALL["model"], dtype=torch.float32)
    torch.manual_seed(0)
    made = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True))
    made.save_pretrained(tmp_path / "made")
    load_model(SMALL["model"]).tokenizer.save_pretrained(tmp_path / "made")
    ids = torch.arange(5, 12)[None]
    with torch.inference_mode():
        wanted = made.eval()(ids).logits
        assert torch.allclose(load(tmp_path / "made").model(ids).logits, wanted, atol=1e-5)
    extra = {"lora": 0, "model": str(tmp_path / "made"), "keep": "last", "steps": 2, "lr": 1e-2}
    on = run_settings(config(tmp_path / "on", adapter="continue", **extra))
    assert on["before"] != on["dev"] and on_test(str(tmp_path / "on")) == on["test"]
    assert replay(tmp_path / "on" / "steps.jsonl", str(tmp_path / "made")).identical


def test_adapters_that_could_not_be_loaded_again_are_refused_before_they_are_trained(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(SMALL["model"], dtype=torch.float32)
    made = get_peft_model(base, PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UserError, match="adapters of the kind P_TUNING, which metazo trains and cannot load again"):
        tokenizer = load_model(SMALL["model"]).tokenizer
        metazo.finetune(made, "pico_topic", tokenizer=tokenizer, steps=1, lr=1e-3, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_changes_nothing_after_virtual_tokens(tiny, kind, name):
    """peft's own call counts the positions of a padded row from the padding on; an unpadded row is that call's."""
    loaded = load(tiny(name))
    add_adapters(loaded, Adapter(kind, 3), seed=4)
    torch.manual_seed(0)
    for key, parameter in loaded.model.named_parameters():
        if "prompt_encoder" in key:
            parameter.data.normal_(0, 0.5)
    prepared = prepare(resolve("pico_span"), loaded, train=4, dev=6, test=0)
    with torch.inference_mode():
        alone = torch.stack([prepared.loss(loaded.model, prepared.collate([each])) for each in prepared.dev])
        together = prepared.loss(loaded.model, prepared.collate(prepared.dev))
        assert len({len(each) for each in prepared.dev}) > 1
        assert float(together) == pytest.approx(float(alone.mean()), abs=2e-5)
        row = prepared.collate(prepared.dev[:1])
        theirs = loaded.model(input_ids=row["input_ids"], attention_mask=row["attention_mask"]).logits[:, -1]
        ours = with_virtual_tokens(
            loaded.model, {key: row[key] for key in ("input_ids", "attention_mask", "position_ids")}
        )
        assert torch.allclose(theirs, ours.logits[:, -1], atol=2e-5)
        greedy = []
        for each in prepared.dev:
            ids = list(each.ids)
            for _ in range(prepared.room):
                tokens = torch.tensor([ids])
                inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
                inputs["position_ids"] = torch.arange(len(ids))[None]
                token = int(with_virtual_tokens(loaded.model, inputs).logits[0, -1].argmax())
                if token == loaded.tokenizer.eos_token_id:
                    break
                ids.append(token)
            text = loaded.tokenizer.decode(ids[len(each.ids) :], skip_special_tokens=True)
            greedy.append(text.partition(".")[0].strip())
        assert generate(loaded.model, prepared, prepared.dev) == greedy


def test_settings_of_adapters_that_do_not_go_together(tmp_path, tiny):
    for extra, said in (
        ({"adapter": "dora"}, "`lora` is short for `adapter='lora'` with its rank, so `adapter` cannot"),
        ({"lora": 0, "adapter": "ia3", "adapter_rank": 2}, "`adapter_rank` is of adapters lora, .*, and `adapter` is ia3"),
        ({"lora": 0, "adapter_alpha": 2.0}, "and `adapter` is not given"),
        ({"lora": 0, "adapter": "prompt", "merge": True}, "`adapter` prompt is virtual tokens"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            config(tmp_path / "x", **extra)
    for extra, said in (
        (
            {"adapter": "prompt", "model": str(tiny("roberta"))},
            "need a causal model, and .* is a masked model; take lora",
        ),
        (
            {"adapter": "dora", "adapter_targets": ["nothing"]},
            "`adapter_targets` nothing: no layer of pico has this name; its layers are .*q_proj, k_proj",
        ),
        (
            {"adapter": "lora", "adapter_targets": ["q_proj", "not_there"]},
            "`adapter_targets` not_there: no layer of pico",
        ),
        (
            {"adapter": "prefix", "adapter_rank": 300},
            "`adapter_rank` is 300 tokens, which leave no room for an input: the context of pico has 256",
        ),
        ({"adapter": "prompt", "adapter_rank": 256}, "`adapter_rank` is 256 tokens"),
        ({"adapter": "continue"}, "needs a folder of adapters as the model, and pico is none"),
    ):
        with pytest.raises(UserError, match=said):
            set_up(config(tmp_path / "x", **{"model": "pico", "lora": 0, **extra}))


def test_targets_and_alpha_reach_peft(tmp_path):
    extra = {"lora": 0, "adapter": "lora", "adapter_rank": 2, "adapter_alpha": 6.0, "adapter_targets": ["q_proj"]}
    model = set_up(config(tmp_path / "x", **extra)).loaded.model
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".q_proj." in name for name in trained)
    assert {layer.scaling["default"] for layer in model.modules() if hasattr(layer, "lora_A")} == {3.0}


def test_the_card_says_what_was_done(tuned):
    kind, out, summary = tuned
    card, base = (out / "model" / "README.md").read_text(), Path(SMALL["model"]).name
    assert f"weights of {kind} adapters" in card and f"| base model | {base} |" in card
    assert "library_name: peft" in card and str(out) not in card
    assert f"| test, tuned | {summary['test']['loss']:.4g} |" in card


@pytest.mark.parametrize("name", ["bart", "distilbert", "roberta"])
def test_a_new_head_of_any_name_is_trained_and_saved(name: str, tiny, tmp_path: Path) -> None:
    """peft knows heads named classifier and score; BART's classification_head and DistilBERT's pre_classifier it leaves out."""
    if name == "distilbert":
        import transformers as hf

        base = tmp_path / "base"
        tokenizer = hf.AutoTokenizer.from_pretrained(tiny("roberta"))
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 256}
        torch.manual_seed(0)
        hf.DistilBertForMaskedLM(hf.DistilBertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(base)
        tokenizer.save_pretrained(base)
    else:
        base = tiny(name)
    settings = {"train_examples": 16, "dev_examples": 4, "test_examples": 8, "batch_size": 4, "steps": 3, "seed": 3}
    settings |= {"kind": "classifier", "adapter": "lora", "lr": 1e-2, "out": tmp_path / "run"}
    tuned = metazo.finetune(str(base), "pico_sentiment", "first-order-adamw", **settings)
    trained = {name for name, parameter in tuned.model.named_parameters() if parameter.requires_grad}
    heads = {"bart": ["classification_head"], "distilbert": ["pre_classifier", "classifier"], "roberta": ["classifier"]}
    assert all(any(f".{head}." in each for each in trained) for head in heads[name])
    ids = torch.tensor([[0, 7, 9, 8, 2]])
    with torch.inference_mode():
        wanted = tuned.model(input_ids=ids).logits
        for seed in (0, 9):  # of the head that the file's replaces
            assert metazo.load_model(tmp_path / "run", seed=seed).model(input_ids=ids).logits.equal(wanted)


@pytest.mark.parametrize("targets", [[], ["query", "dense"]], ids=["theirs", "pooler"])
def test_a_pooler_that_the_checkpoint_lacks_is_saved_with_the_adapters(
    targets: list[str], tiny, tmp_path: Path
) -> None:
    """It is drawn from the seed and stays fixed, so that the adapters and the head are of no use on another."""
    more = {"train_examples": 16, "dev_examples": 4, "test_examples": 8, "batch_size": 4, "steps": 3, "lr": 1e-2}
    first = {"kind": "classifier", "adapter": "lora", "adapter_targets": targets, "seed": 3, "out": tmp_path / "run"}
    tuned = metazo.finetune(str(tiny("bert_mlm")), "pico_sentiment", "mezo", **more, **first)
    ids = torch.tensor([[0, 7, 9, 8, 2]])
    with torch.inference_mode():
        wanted = tuned.model(input_ids=ids).logits
        for seed in (0, 9):
            assert metazo.load_model(tmp_path / "run", seed=seed).model(input_ids=ids).logits.equal(wanted)
        plain = AutoModelForSequenceClassification.from_pretrained(tiny("bert_mlm"), num_labels=2)
        assert PeftModel.from_pretrained(plain, tmp_path / "run/model").eval()(input_ids=ids).logits.equal(wanted)
    more |= {"adapter": "continue", "seed": 5, "steps": 2, "lr": 1e-9, "out": tmp_path / "on"}
    on = metazo.finetune(str(tmp_path / "run"), "pico_sentiment", **more)
    pooler = "base_model.model.bert.pooler.dense." + ("base_layer." if targets else "") + "weight"
    saved = [load_file(tmp_path / run / "model/adapter_model.safetensors") for run in ("run", "on")]
    assert saved[0][pooler].equal(saved[1][pooler]) and pooler not in {
        name for name, parameter in on.model.named_parameters() if parameter.requires_grad
    }
    assert replay(tmp_path / "run/steps.jsonl", str(tiny("bert_mlm")), tmp_path / "again").identical
    assert load_file(tmp_path / "again/adapter_model.safetensors")[pooler].equal(saved[0][pooler])


def test_adapters_with_a_head_of_other_classes_are_refused(tmp_path: Path) -> None:
    run_settings(config(tmp_path / "run", kind="classifier", keep="last", steps=1))
    with pytest.raises(UserError, match="a head of 2 classes, and 3 are wanted; take a task of 2 classes"):
        load(tmp_path / "run", num_labels=3)


def test_new_adapters_on_a_run_name_its_model_as_peft_reads_it(tmp_path: Path) -> None:
    run_settings(config(tmp_path / "run", lora=0, lr=1e-6, keep="last", steps=1))
    run_settings(config(tmp_path / "on", model=str(tmp_path / "run"), keep="last", steps=1))
    named = json.loads((tmp_path / "on/model/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "run/model")
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "on/model")
    assert load(tmp_path / "on").name == str(tmp_path / "on/model")


def changed(folder: Path) -> None:
    """Another base model of the same shape in a folder."""
    file = folder / "model.safetensors"
    tensors = copied(file)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, file, {"format": "pt"})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base model and a LoRA run on it that names it by a relative path, the working directory."""
    folder = tmp_path / "project"
    shutil.copytree(SMALL["model"], folder / "models/base")
    monkeypatch.chdir(folder)
    run_settings(config("runs/a", model="models/base", keep="last", steps=2))
    return folder


def test_the_base_is_looked_for_beside_the_adapters_first(project, tmp_path, monkeypatch):
    wanted = on_test("runs/a")
    shutil.copytree(project / "models", tmp_path / "other/models")
    changed(tmp_path / "other/models/base")
    monkeypatch.chdir(tmp_path / "other")
    assert on_test(str(project / "runs/a")) == wanted
    run_settings(config("runs/on", model=str(project / "runs/a"), lora=0, adapter="continue", keep="last", steps=1))
    assert load("runs/on", train=True).adapted == (str(project / "models/base"), None)
    monkeypatch.chdir(project)
    assert load("runs/a", train=True).adapted == ("models/base", None), "a project can be moved"


def test_the_base_is_not_the_run_itself(tmp_path, monkeypatch):
    shutil.copytree(SMALL["model"], tmp_path / "base")
    monkeypatch.chdir(tmp_path / "base")
    run_settings(config("runs/a", model=".", keep="last", steps=1))
    assert load("runs/a", train=True).adapted == (".", None)
    monkeypatch.chdir(tmp_path)
    assert load("base/runs/a", train=True).adapted == (str(tmp_path / "base"), None)


def test_another_base_is_refused(project, tmp_path):
    record = project / "runs/a/model" / RECORD
    assert "base_weights" not in load("runs/a").model.config.metazo
    run_settings(config("runs/on", model="runs/a", lora=0, adapter="continue", keep="last", steps=1))
    assert json.loads((project / "runs/on/model" / RECORD).read_text())["base_weights"]["loaded_as"] == "causal float32"
    replay("runs/a/steps.jsonl", "models/base", tmp_path / "again")
    assert (tmp_path / "again" / RECORD).read_bytes() == record.read_bytes()
    weights = load_file("models/base/model.safetensors")
    AutoModelForCausalLM.from_pretrained("models/base", dtype=torch.float32).save_pretrained(
        "models/base", max_shard_size="20KB"
    )
    load("runs/a")  # the same weights in other files
    (project / "models/base/model.safetensors.index.json").unlink()
    for shard in Path("models/base").glob("model-*"):
        shard.unlink()
    save_file(weights, "models/base/model.safetensors", {"format": "pt"})
    changed(project / "models/base")
    for refused in ("runs/a", "runs/on/model"):
        with pytest.raises(
            UserError, match="another base model than models/base: .*called 'models/base' there.*; name the folder"
        ):
            load(refused)
    load("runs/a", dtype="bfloat16")  # other values, of which nothing is known
    known = json.loads(record.read_text())
    del known["base_weights"]
    record.write_text(json.dumps(known))
    load("runs/a")  # as an earlier version wrote it


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_lora_without_targets_is_put_on_models_with_experts(name: str, tiny, tmp_path: Path) -> None:
    """peft finds no layers of its own for Mixtral, and would wrap the routers of Llama 4, whose output is no tensor."""
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(tiny("llama"))
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    }
    sizes |= {"intermediate_size": 32, "vocab_size": len(tokenizer), "pad_token_id": None}
    if name == "mixtral":
        model = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes))
    else:
        own = hf.Llama4TextConfig(**sizes, head_dim=8, intermediate_size_mlp=32, interleave_moe_layer_step=1)
        model = hf.Llama4ForCausalLM(own)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = {"train_examples": 16, "dev_examples": 4, "test_examples": 8, "batch_size": 4, "steps": 3, "lr": 1e-2}
    tuned = metazo.finetune(
        str(tmp_path / "base"), "pico_sentiment", lora=4, keep="last", out=tmp_path / "run", **settings
    )
    trained = [name for name, parameter in tuned.model.named_parameters() if parameter.requires_grad]
    assert any("q_proj" in each for each in trained) and not any("router" in each for each in trained)
    assert metazo.evaluate(tmp_path / "run")["loss"] == tuned.summary["test"]["loss"]
