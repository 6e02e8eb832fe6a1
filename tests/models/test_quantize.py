"""Quantised bases: int8 and nf4 with adapters on a CPU, saved quantised folders, refusals in one sentence."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchao", reason="torchao is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from bitsandbytes.functional import dequantize_4bit
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import metazo
from metazo.errors import UserError
from metazo.models.assemble import load
from metazo.models.embedded import PICO
from metazo.models.load import load_model
from metazo.models.parts import hash_of
from metazo.models.quantize import bytes_of, quantised, quantization, remember_stored
from metazo.models.skeleton import skeleton
from metazo.runs.config import FinetuneConfig
from metazo.runs.dryrun import dry_run
from metazo.runs.finetune import run_settings, tune
from metazo.runs.replay import replay
from metazo.runs.setup import set_up
from metazo.settings import build

SMALL = {
    "model": "pico", "task": "pico_sentiment", "lora": 4, "lr": 1e-3, "steps": 4, "train_examples": 32, "keep": "last",
    "dev_examples": 16, "test_examples": 16, "eval_every": 4, "snapshot_every": 0,
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")


def config(out: Path, **extra) -> FinetuneConfig:
    return build(FinetuneConfig, SMALL, {"out": out, **extra})


@pytest.fixture(scope="module")
def wide(tiny, tmp_path_factory) -> Path:
    """A Llama whose layers have inputs of a multiple of 64, with the tokenizer of the tiny one."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = load_model(tiny("llama")).tokenizer
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tiny, tmp_path_factory) -> Path:
    """A GPT-2 of the same width, whose layers are Conv1D instead of linear."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = load_model(tiny("gpt2")).tokenizer
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def int8_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("int8") / "run"
    return out, run_settings(config(out, quantize="int8"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "kind"), [("micro", "int8"), ("micro", "nf4"), ("gpt2", "nf4")])
def test_a_skeleton_has_the_bytes_of_the_loaded_model(name, kind, dtype, gpt2) -> None:
    model = gpt2 if name == "gpt2" else name
    real, plan = (load(model, quantize=kind, dtype=dtype).model for load in (load_model, skeleton))
    found = {name: bytes_of(parameter) for name, parameter in real.named_parameters()}
    assert found == {name: bytes_of(parameter) for name, parameter in plan.named_parameters()}
    assert sum(found.values()) < sum(p.numel() * p.element_size() for p in plan.parameters())


def test_a_model_that_is_hardly_quantised_says_so(gpt2, wide, tmp_path: Path) -> None:
    """As its skeleton (test_skeleton.py): torchao takes none of a GPT-2, and none of the fused experts of a Mixtral."""
    with pytest.raises(UserError, match="finds no linear layer"):
        load_model(gpt2, quantize="int8")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = load_model(wide).tokenizer
    config = MixtralConfig(vocab_size=len(tokenizer), num_local_experts=8, num_key_value_heads=2, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    notes = load_model(tmp_path, quantize="int8").notes
    assert notes == skeleton(tmp_path, quantize="int8").notes and "leaves 92% of the weights as they are" in notes[0]
    assert load_model(wide, quantize="int8").notes == []


def test_int8_is_weight_only_with_one_scale_per_output() -> None:
    """Against the definition: scale max |w| / 127.5 per row or near it, so every weight is off by at most about half of it."""
    plain, loaded = load_model("pico").model, load_model("pico", quantize="int8")
    names = quantised(loaded.model)
    assert len(names) == 7 * 4 and all(name.endswith("proj.weight") for name in names)
    for name in names[:3]:
        weight, held = plain.get_parameter(name).detach(), loaded.model.get_parameter(name)
        scale = weight.abs().amax(1, keepdim=True) / 127
        assert ((held.dequantize() - weight).abs() <= 0.51 * scale).all()
        assert bytes_of(held) == weight.numel() + 5 * len(weight)  # a float32 scale and an int8 zero point


@pytest.mark.parametrize("optimizer", ["mezo", "lozo", "first-order-adamw"])
def test_adapters_are_trained_in_float32_and_the_base_is_untouched(tmp_path: Path, optimizer: str) -> None:
    setup = set_up(config(tmp_path / "x", quantize="int8", optimizer=optimizer))
    trained = [p for p in setup.loaded.model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    before = {
        n: p.dequantize() for n, p in setup.loaded.model.named_parameters() if n.endswith("q_proj.base_layer.weight")
    }
    run_settings(config(tmp_path / "run", quantize="int8", optimizer=optimizer))
    again = load(tmp_path / "run").model
    assert before and all(torch.equal(again.get_parameter(name).dequantize(), value) for name, value in before.items())
    assert any(float(p.abs().max()) > 0 for name, p in again.named_parameters() if "lora_B" in name)


def test_a_run_is_evaluated_replayed_and_continued_on_the_same_quantised_base(int8_run, tmp_path: Path) -> None:
    out, summary = int8_run
    assert metazo.evaluate(out) == summary["test"]
    assert (
        quantised(load(out / "model").model)
        and json.loads((out / "model/metazo.json").read_text())["quantize"] == "int8"
    )
    again = replay(out / "steps.jsonl", "pico", tmp_path / "again")
    assert again.identical and metazo.evaluate(tmp_path / "again", "pico_sentiment", **_sizes()) == summary["test"]
    on = run_settings(config(tmp_path / "on", model=str(out), lora=0, adapter="continue"))
    assert on["before"] == summary["dev"]
    assert json.loads((tmp_path / "on/model/metazo.json").read_text())["quantize"] == "int8"
    for folder in (out, tmp_path / "on"):
        card = (folder / "model/README.md").read_text()
        assert "| base quantised to | int8 |" in card and "peft, on a base that is quantised to int8:" in card
    with pytest.raises(UserError, match=r"a base that was quantised \(int8\), into which they cannot be merged"):
        load(out, merge=True)
    other = config(tmp_path / "other", model=str(out), lora=0, adapter="continue", quantize="nf4")
    with pytest.raises(UserError, match="belong to a base that was quantised to int8; leave it out"):
        run_settings(other)


def test_a_record_of_an_unknown_quantisation_is_refused(int8_run, tmp_path: Path) -> None:
    shutil.copytree(int8_run[0] / "model", tmp_path / "model")
    path = tmp_path / "model/metazo.json"
    for value in ("int3", 8, ["int8"]):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantize": value}))
        with pytest.raises(
            UserError, match=r"metazo\.json has quantize .*, and this version of metazo quantises to int8"
        ):
            load(tmp_path / "model")


def _sizes() -> dict[str, int]:
    return {"train_examples": 32, "examples": 16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nf4_end_to_end(wide: Path, tmp_path: Path, dtype: str) -> None:
    settings = {"model": str(wide), "quantize": "nf4", "dtype": dtype}
    summary = run_settings(config(tmp_path / "run", **settings))
    assert metazo.evaluate(tmp_path / "run") == summary["test"]
    whole = sum(p.numel() for p in load_model(wide).model.parameters())
    setup = set_up(config(tmp_path / "again", **settings))
    assert setup.plan(setup.config)["trained weights"] == f"{setup.trained:,} of {whole + setup.trained:,}"
    assert replay(tmp_path / "run" / "steps.jsonl", str(wide)).identical


def stopped(out: Path, **extra) -> None:
    """A run that ends after its second step."""

    def stop(step) -> None:
        if step.step == 1:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        tune(config(out, **extra), on_step=stop, plot=False)


def test_nf4_on_a_cpu_computes_in_the_dtype_of_the_run(wide: Path) -> None:
    """In eval mode, before and after: bitsandbytes would take a kernel in bfloat16 without a gradient."""
    model = load_model(wide, quantize="nf4").model
    plain, ids = load_model(wide).model, torch.arange(3, 20)[None]
    with torch.no_grad():
        for name in quantised(model):
            held = model.get_parameter(name)
            plain.get_parameter(name).copy_(dequantize_4bit(held.data, held.quant_state))
        for _ in range(2):
            torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "optimizer", ["first-order-adamw", "first-order-fused", "skip-feedback", "answer-column", "mezo"]
)
def test_every_adapter_on_nf4_is_trained(wide: Path, tmp_path: Path, optimizer: str) -> None:
    extra = {
        "model": str(wide),
        "quantize": "nf4",
        "lora": 0,
        "adapter": "lora",
        "adapter_rank": 2,
        "optimizer": optimizer,
    }
    run_settings(config(tmp_path / "run", lr=1e-2, **extra))
    adapters = {n: p for n, p in load(tmp_path / "run").model.named_parameters() if "lora_B" in n}
    assert len(adapters) > 2 and all(p.any() for p in adapters.values())


def test_nf4_under_dora_is_hashed_as_it_is_on_disk(wide: Path, tmp_path: Path) -> None:
    """peft replaces the weights under DoRA, and bitsandbytes their form at the first forward pass."""
    plain = load_model(wide, quantize="nf4")
    plain.model.save_pretrained(tmp_path / "q")
    plain.tokenizer.save_pretrained(tmp_path / "q")
    dora = {"lora": 0, "adapter": "dora", "adapter_rank": 2}
    for name, extra in (
        ("fresh", {"model": str(wide), "quantize": "nf4", **dora}),
        ("saved", {"model": str(tmp_path / "q"), **dora}),
        ("on", {"model": str(tmp_path / "fresh"), "lora": 0, "adapter": "continue"}),
    ):
        model = set_up(config(tmp_path / "x", **extra)).loaded.model
        states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
        assert len(states) == 14 and all(hasattr(state, "stored_sha256") for state in states)
        before = hash_of(model)
        with torch.inference_mode():
            model(torch.arange(3, 20)[None])
        assert before == hash_of(model) == hash_of(copy.deepcopy(model))
        stopped(tmp_path / name, **extra)
        assert run_settings(config(tmp_path / name, resume=True, **extra))["steps"] == 4
        assert replay(tmp_path / name / "steps.jsonl", extra["model"]).identical


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_quantised_model_in_memory_is_saved_with_its_quantisation(
    wide: Path, tmp_path: Path, kind: str, whole: bool
) -> None:
    settings = {name: value for name, value in SMALL.items() if name not in ("model", "task")} | {"lr": 1e-2}
    named = run_settings(config(tmp_path / "named", model=str(wide), quantize=kind, lr=1e-2))
    loaded = load_model(wide, quantize=kind)
    given = (loaded, None) if whole else (loaded.model, loaded.tokenizer)
    tuned = metazo.finetune(given[0], "pico_sentiment", tokenizer=given[1], out=tmp_path / "run", **settings)
    assert tuned.summary["test"] == named["test"] == metazo.evaluate(tmp_path / "run")
    records = [json.loads((tmp_path / name / "model/metazo.json").read_text()) for name in ("named", "run")]
    assert records[0] == records[1] and records[0]["quantize"] == kind
    assert quantised(load(tmp_path / "run").model)
    again = (load_model(wide, quantize=kind), None) if whole else (load_model(wide, quantize=kind).model, given[1])
    assert replay(tmp_path / "run/steps.jsonl", again[0], tmp_path / "again", tokenizer=again[1]).identical
    assert json.loads((tmp_path / "again/metazo.json").read_text())["quantize"] == kind


def test_a_model_in_memory_that_cannot_be_quantised_again_is_refused(wide: Path, tmp_path: Path) -> None:
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = LlamaForCausalLM.from_pretrained(wide, quantization_config=how, dtype=torch.float32)
    given = {"tokenizer": load_model(wide).tokenizer, "lora": 2, "steps": 1, "lr": 1e-3, "train_examples": 32}
    later = load_model(wide).model
    quantize_(later, Int8WeightOnlyConfig())  # torchao's own function, which leaves no record
    for unlike in (model, later):
        with pytest.raises(UserError, match="`model` was quantised in a way that metazo does not repeat"):
            metazo.finetune(unlike, "pico_sentiment", out=tmp_path / "run", **given)
        assert not (tmp_path / "run").exists()
    model = model.requires_grad_(False)
    model.model.norm.requires_grad_(True)  # saved whole, with its configuration, and not as adapters
    metazo.finetune(
        model, "pico_sentiment", out=tmp_path / "run", **given | {"lora": 0}, dev_examples=8, test_examples=8
    )
    assert quantised(load(tmp_path / "run").model)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_saved_quantised_folder_is_a_model(wide: Path, tmp_path: Path, kind: str) -> None:
    loaded = load_model(wide, quantize=kind)
    loaded.model.save_pretrained(tmp_path / "q")
    loaded.tokenizer.save_pretrained(tmp_path / "q")
    again = load_model(tmp_path / "q")
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, again.model(ids).logits)
    summary = run_settings(config(tmp_path / "run", model=str(tmp_path / "q")))
    assert metazo.evaluate(tmp_path / "run") == summary["test"]
    for extra, said in (
        ({"lora": 0}, r"is quantised, and \d+ of its tensors, such as .*, cannot be trained; train adapters"),
        ({"merge": True}, "`merge`: .* is quantised"),
        ({"quantize": "int8"}, "is quantised already; leave it out"),
    ):
        with pytest.raises(UserError, match=said):
            set_up(config(tmp_path / "x", model=str(tmp_path / "q"), **extra))


@pytest.mark.parametrize("how", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}])
def test_the_hash_of_a_quantised_base_has_its_scales(wide: Path, tmp_path: Path, how: dict[str, bool]) -> None:
    """Twice the weights have the same whole numbers, and twice the scales."""
    doubled = load_model(wide).model
    for name, parameter in doubled.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data *= 2
    doubled.save_pretrained(tmp_path / "doubled")
    hashes, tokenizer = [], load_model(wide).tokenizer
    for name, source in (("plain", wide), ("twice", tmp_path / "doubled")):
        model = LlamaForCausalLM.from_pretrained(
            source, quantization_config=BitsAndBytesConfig(**how), dtype=torch.float32
        )
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        again = load_model(tmp_path / name).model
        before = hash_of(again)
        with torch.inference_mode():
            again(torch.arange(3, 20)[None])
        assert before == hash_of(again)
        remember_stored(again.model.layers[0].mlp.down_proj)  # nothing changes for what is known
        assert before == hash_of(again)
        hashes.append(before)
    assert hashes[0] != hashes[1]
    run_settings(config(tmp_path / "run", model=str(tmp_path / "plain")))
    assert replay(tmp_path / "run/steps.jsonl", str(tmp_path / "plain")).identical
    with pytest.raises(UserError, match="is not the base model of this log"):
        replay(tmp_path / "run/steps.jsonl", str(tmp_path / "twice"))


@pytest.fixture(scope="module", params=["8bit", "nf4"])
def narrow(request, wide: Path, tmp_path_factory) -> Path:
    """A checkpoint that bitsandbytes quantised in bfloat16, with the weights of `wide`."""
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    how = BitsAndBytesConfig(**four if request.param == "nf4" else {"load_in_8bit": True})
    folder = tmp_path_factory.mktemp(request.param)
    LlamaForCausalLM.from_pretrained(wide, quantization_config=how, dtype=torch.bfloat16).save_pretrained(folder)
    load_model(wide).tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_bitsandbytes_checkpoint_has_the_dtype_that_was_asked_for(narrow: Path, wide: Path, dtype: str) -> None:
    """transformers would leave bfloat16. The outputs are those of the dequantised weights in this dtype."""
    wanted, loaded = getattr(torch, dtype), load_model(narrow, dtype=dtype)
    whole = {name: p for name, p in loaded.model.named_parameters() if name not in quantised(loaded.model)}
    assert len(whole) == 7 and {p.dtype for p in whole.values()} == {wanted} and loaded.dtype == wanted
    assert loaded.cast == (None if dtype == "bfloat16" else "bfloat16")
    plain, ids = load_model(wide, dtype=dtype).model, torch.arange(3, 20)[None]
    for name, parameter in loaded.model.named_parameters():
        value = parameter
        if state := getattr(parameter, "quant_state", None):
            module = loaded.model.get_submodule(name.removesuffix(".weight"))
            assert module.compute_dtype == state.dtype == wanted
            value = dequantize_4bit(parameter.data, state)
        elif parameter.dtype == torch.int8:
            value = parameter.data * parameter.SCB[:, None] / 127
        plain.get_parameter(name).data.copy_(value)
    with torch.inference_mode():
        found, expected = (model(ids).logits for model in (loaded.model, plain))
    assert found.dtype == wanted
    exact = dtype == "float32" and "nf4" in narrow.name
    torch.testing.assert_close(found, expected, rtol=1e-4 if exact else 0.05, atol=1e-5 if exact else 0.05)
    assert "nf4" not in narrow.name or loaded.model.config.quantization_config.bnb_4bit_compute_dtype == wanted
    with pytest.raises(UserError, match="quantised by bitsandbytes, which computes in .* and `dtype` is float64"):
        load_model(narrow, dtype="float64")


def test_a_run_on_a_bitsandbytes_checkpoint_in_the_dtype_it_was_saved_in(narrow: Path, tmp_path: Path, monkeypatch):
    """As earlier versions made it whatever `dtype` said: its log is refused by name, and replays on the model in that dtype."""
    log, base = tmp_path / "old/steps.jsonl", {"model": str(narrow)}
    with monkeypatch.context() as patched:
        patched.setattr("metazo.models.load.give_dtype", lambda *_: None)
        stopped(tmp_path / "stopped", **base)
        run_settings(config(tmp_path / "old", **base))
    with pytest.raises(UserError, match="was begun by an earlier version of metazo, which left .* in bfloat16"):
        run_settings(config(tmp_path / "stopped", resume=True, **base))
    with pytest.raises(
        UserError, match=r"was made by an earlier version .* load_model\(..., dtype='bfloat16'\) gives it"
    ):
        replay(log, str(narrow))
    assert replay(log, load_model(narrow, dtype="bfloat16")).identical
    stopped(tmp_path / "new", **base)
    run_settings(config(tmp_path / "new", resume=True, **base))
    assert replay(tmp_path / "new/steps.jsonl", str(narrow)).identical
    assert metazo.evaluate(tmp_path / "new") != metazo.evaluate(tmp_path / "new", dtype="bfloat16")


def test_an_8_bit_layer_that_has_run_has_the_hash_of_one_that_has_not(wide: Path) -> None:
    how = BitsAndBytesConfig(load_in_8bit=True)
    fresh, used = (
        LlamaForCausalLM.from_pretrained(wide, quantization_config=how, dtype=torch.float32) for _ in range(2)
    )
    with torch.inference_mode():
        used(torch.arange(3, 20)[None])
    for model in (fresh, used):
        remember_stored(model)
    assert hash_of(fresh) == hash_of(used)


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_a_replay_does_not_merge_into_whole_numbers(wide: Path, tmp_path: Path, adapter: str) -> None:
    settings = {"model": str(wide), "quantize": "int8", "lora": 0, "adapter": adapter}
    run_settings(config(tmp_path / "run", **settings))
    log = tmp_path / "run/steps.jsonl"
    said = "`merge` would round the sum of `quantize` int8 weights and adapters to whole numbers; leave it out"
    with pytest.raises(UserError, match=said):
        run_settings(config(tmp_path / "x", merge=True, **settings))
    with pytest.raises(UserError, match=said):
        replay(log, str(wide), tmp_path / "merged", merge=True)
    with pytest.raises(UserError, match=said):
        replay(log, load_model(wide, quantize="int8"), tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()
    own = load(tmp_path / "run")
    own.model.requires_grad_(False)
    next(p for n, p in own.model.named_parameters() if "default" in n).requires_grad_(True)
    with pytest.raises(UserError, match="`merge`: .* is quantised"):  # adapters of the caller's own
        metazo.finetune(own, "pico_sentiment", merge=True, lr=1e-3, steps=1, train_examples=32)


@pytest.fixture(scope="module")
def classifier(wide: Path, tmp_path_factory) -> Path:
    """A BERT classifier, whose head has a bias: transformers quantises such a head by itself."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = load_model(wide).tokenizer
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_head_of_a_classifier_is_trained_in_full_precision(classifier: Path, tmp_path: Path, kind: str) -> None:
    real, plan = (load(classifier, quantize=kind).model for load in (load_model, skeleton))
    assert {n: bytes_of(p) for n, p in real.named_parameters()} == {n: bytes_of(p) for n, p in plan.named_parameters()}
    assert quantised(real) and not any("classifier" in name for name in quantised(real))
    settings = {"model": str(classifier), "quantize": kind, "lr": 1e-2}
    run_settings(config(tmp_path / "whole", **settings))
    stopped(tmp_path / "run", **settings)
    summary = run_settings(config(tmp_path / "run", resume=True, **settings))
    assert summary["test"] == metazo.evaluate(tmp_path / "run") == metazo.evaluate(tmp_path / "whole")
    head = load(tmp_path / "run", num_labels=2).model.get_base_model().classifier.weight
    assert head.dtype == torch.float32 and not torch.equal(head, real.classifier.weight)
    assert replay(tmp_path / "run/steps.jsonl", str(classifier)).identical


def test_a_head_that_was_saved_quantised_is_refused(classifier: Path, tmp_path: Path) -> None:
    how = quantization("int8", torch.float32, "cpu")
    model = BertForSequenceClassification.from_pretrained(classifier, quantization_config=how, dtype=torch.float32)
    model.save_pretrained(tmp_path / "q")
    load_model(classifier).tokenizer.save_pretrained(tmp_path / "q")
    with pytest.raises(UserError, match="the head of .* is quantised \\(classifier"):
        run_settings(config(tmp_path / "run", model=str(tmp_path / "q")))
    assert not (tmp_path / "run").exists()


def test_what_a_cpu_cannot_do_is_one_sentence(tmp_path: Path, tiny, wide: Path) -> None:
    for kind in ("int8", "nf4"):
        wanted = config(tmp_path / "x", quantize=kind, dtype="float64")
        for run in (
            run_settings,
            dry_run,
            lambda config: load_model("micro", quantize=config.quantize, dtype="float64"),
        ):
            with pytest.raises(UserError, match=f"`quantize` {kind} computes in float32, .* and `dtype` is float64"):
                run(wanted)
    with pytest.raises(UserError, match="`quantize='int4'` needs a CUDA device"):
        set_up(config(tmp_path / "x", quantize="int4"))
    with pytest.raises(UserError, match="`quantize='int4'` computes in bfloat16, and `dtype` is float32"):
        quantization("int4", torch.float32, "cuda")
    with pytest.raises(UserError, match="`adapter` ia3 computes in float32 on 4-bit weights, and .* in bfloat16"):
        set_up(config(tmp_path / "x", model=str(wide), quantize="nf4", lora=0, adapter="ia3", dtype="bfloat16"))
    with pytest.raises(UserError, match="multiple of 64, and model.layers.0.self_attn.q_proj has"):
        set_up(config(tmp_path / "x", quantize="nf4"))
    with pytest.raises(UserError, match="add `head='checkpoint'`"):
        load_model(tiny("bert"), kind="classifier", head="linear", num_labels=2, quantize="int8")


def test_the_plan_counts_the_bytes_of_whole_numbers(tmp_path: Path) -> None:
    whole, small = (set_up(config(tmp_path / "x", quantize=kind)) for kind in (None, "int8"))
    sizes = [sum(map(bytes_of, setup.loaded.model.parameters())) for setup in (whole, small)]
    linear = sum(p.numel() for n, p in load_model(PICO).model.named_parameters() if n.endswith("proj.weight"))
    assert 3 * linear * 0.9 < sizes[0] - sizes[1] < 3 * linear
