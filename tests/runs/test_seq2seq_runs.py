"""T5 and BART in a run: training, resuming, replay, precision, LoRA, a dry run, methods that read structure, comparisons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from rich.console import Console
from safetensors.torch import load_file

import metazo
from metazo.blocks import named_tensors, partition
from metazo.comparisons.cell import run as run_cell
from metazo.comparisons.examine import examine
from metazo.comparisons.grid import Grid, Run
from metazo.comparisons.store import Store
from metazo.errors import UserError
from metazo.models.assemble import load
from metazo.models.load import load_model
from metazo.optimizers import LOZO, MeZO
from metazo.runs.config import FinetuneConfig
from metazo.runs.cost import measure
from metazo.runs.dryrun import dry_run
from metazo.runs.finetune import run_settings
from metazo.runs.measure import evaluate
from metazo.runs.replay import replay
from metazo.runs.setup import set_up
from metazo.settings import build
from metazo.steplog.writer import StepLog
from metazo.tasks import get, prepare
from metazo.tasks.closures import BatchLoss

NAMES = ("t5", "bart")
SMALL = {
    "task": "pico_sentiment", "lr": 1e-3, "steps": 8, "train_examples": 16, "dev_examples": 8, "test_examples": 8,
    "batch_size": 4, "eval_every": 4, "snapshot_every": 3, "max_length": 64, "scale": "rms",
}  # fmt: skip


def config(out: Path, model: Path, **extra) -> FinetuneConfig:
    return build(FinetuneConfig, SMALL, {"out": out, "model": str(model), **extra})


def run(out: Path, model: Path, **extra) -> dict:
    return run_settings(config(out, model, **extra), Console(quiet=True))


@pytest.mark.parametrize("name", NAMES)
def test_mezo_lowers_the_loss_of_a_real_task(tiny, shared, tmp_path, name):
    settings = {"task": "squad", "data": shared / "data", "steps": 30, "batch_size": 8, "train_examples": 32,
                "max_length": 96, "eval_every": 30}  # fmt: skip
    summary = run(tmp_path / "run", tiny(name), **settings)
    assert summary["dev"]["loss"] < summary["before"]["loss"] - 0.1
    assert set(summary["dev"]) >= {"f1", "exact_match"}


class Death(BaseException):
    """Ends a run as a kill does."""


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("t5", {"optimizer": "lozo", "task": "pico_cause"}),
        (
            "bart",
            {
                "optimizer": "mezo",
                "dtype": "bfloat16",
                "task": "pico_span",
                "max_length": 128,
                "dev_examples": 3,
                "test_examples": 2,
            },
        ),
        ("t5", {"optimizer": "hizoo", "dtype": "bfloat16", "precision": "master"}),
    ],
)
def test_a_run_that_was_killed_ends_as_one_that_was_not_and_its_log_replays(
    tiny, tmp_path, monkeypatch, name, settings
):
    run(tmp_path / "whole", tiny(name), **settings)
    append = StepLog.append

    def dies(log: StepLog, step) -> None:
        if step.step == 6:
            raise Death
        append(log, step)

    with monkeypatch.context() as patched:
        patched.setattr(StepLog, "append", dies)
        with pytest.raises(Death):
            run(tmp_path / "cut", tiny(name), **settings)
    run(tmp_path / "cut", tiny(name), **settings, resume=True)
    whole, cut = ((tmp_path / out / "model" / "model.safetensors").read_bytes() for out in ("whole", "cut"))
    assert whole == cut and (tmp_path / "whole" / "model" / "model.safetensors").stat().st_size > 0
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    replay(tmp_path / "whole" / "steps.jsonl", base=str(tiny(name)), out=tmp_path / "again", to=summary["steps"])
    kept = summary["kept_step"]
    replay(tmp_path / "whole" / "steps.jsonl", base=str(tiny(name)), out=tmp_path / "kept", to=kept)
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("whole/model", "kept"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    before = load_file(tiny(name) / "model.safetensors")
    last = load_file(tmp_path / "again" / "model.safetensors")
    assert any(not torch.equal(before[key].to(last[key].dtype), last[key]) for key in last)


@pytest.mark.parametrize("name", NAMES)
def test_the_tuned_model_is_one_of_transformers_and_scores_the_same(tiny, tmp_path, name):
    summary = run(tmp_path / "run", tiny(name), keep="last", task="pico_span", max_length=128)
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "model")
    assert type(model) is type(load_model(tiny(name)).model)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    tokens = model.generate(**tokenizer("the cat sat", return_tensors="pt"), max_new_tokens=3)
    assert tokens[0, 0] == model.config.decoder_start_token_id
    found = evaluate(str(tmp_path / "run"), None)
    assert found["loss"] == pytest.approx(summary["test"]["loss"], abs=1e-6) and found["f1"] == summary["test"]["f1"]


@pytest.mark.parametrize("name", NAMES)
def test_lora_is_on_both_stacks_and_saved_as_adapters_and_merged(tiny, tmp_path, name):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    run(tmp_path / "run", tiny(name), lora=4, keep="last")
    assert not (tmp_path / "run" / "model" / "model.safetensors").exists()
    saved = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert all(any(f"{side}." in key for key in saved) for side in ("encoder", "decoder"))
    assert all("_proj.lora" in key if name == "bart" else (".q.lora" in key or ".v.lora" in key) for key in saved)
    base = hf.AutoModelForSeq2SeqLM.from_pretrained(tiny(name))
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "run" / "model")).eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 2]]), "decoder_input_ids": torch.tensor([[2, 9]])}
    merged = load(tmp_path / "run", merge=True)
    plain = load_model(tiny(name)).model
    assert merged.kind == "seq2seq" and type(merged.model) is type(base)
    torch.testing.assert_close(merged.model(**inputs).logits, theirs(**inputs).logits, atol=1e-4, rtol=1e-4)
    assert not torch.equal(plain(**inputs).logits, theirs(**inputs).logits)


def test_virtual_tokens_and_feedback_are_refused_with_what_to_use(tiny, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    with pytest.raises(UserError, match="which need a causal model, and .* is a seq2seq model; take lora, dora or ia3"):
        set_up(config(tmp_path / "a", tiny("t5"), adapter="prefix"))
    for optimizer in ("skip-feedback", "answer-column"):
        for name in NAMES:
            words = f"is a {name} model, an encoder-decoder, and feedback .* such as mezo, or first-order-fused"
            with pytest.raises(UserError, match=words):
                set_up(config(tmp_path / "b", tiny(name), optimizer=optimizer, scale="none"))


@pytest.mark.parametrize("task", ["pico_sentiment", "pico_cause", "pico_span"])
@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_counts_the_activations_of_both_stacks(tiny, tmp_path, name, task):
    settings = config(tmp_path / "run", tiny(name), task=task, max_length=128)
    found = dry_run(settings)
    setup = set_up(settings)
    longest = sorted(setup.rows.train, key=len)[-settings.batch_size :]
    loss = BatchLoss(setup.loaded.model, setup.rows, longest, torch.device("cpu"))
    taken = measure(setup.loaded.model, setup.optimizer, loss)
    assert found["bytes"]["weights"] == sum(
        t.numel() * t.element_size() for t in (*setup.loaded.model.parameters(), *setup.loaded.model.buffers())
    )
    assert "seq2seq" in found["model"] and not (tmp_path / "run").exists()
    weights, inference, peak = (found["bytes"][key] for key in ("weights", "inference", "peak"))
    # log-softmax on a CPU copies the logits, which are the largest tensors of a model as small as this
    assert inference - weights == pytest.approx(taken.inference_bytes - weights, rel=0.3)
    assert peak - weights == pytest.approx(taken.step_bytes - weights, rel=0.3)


@pytest.mark.parametrize("name", NAMES)
def test_layers_of_both_stacks_are_blocks_of_their_own(tiny, name):
    tensors = named_tensors(load_model(tiny(name)).model)
    blocks = partition(tensors, "layer")
    path = (
        ("encoder.block.{}", "decoder.block.{}")
        if name == "t5"
        else ("model.encoder.layers.{}", "model.decoder.layers.{}")
    )
    layers = [block.name for block in blocks if len(block.tensors) > 1]
    assert layers == [side.format(number) for side in path for number in range(2)]
    assert sum(len(block.tensors) for block in blocks) == len(tensors)
    assert len({tensor.id for tensor in tensors}) == len(tensors)


@pytest.fixture(scope="module", params=NAMES)
def exact(request, tiny):
    """A model in float64, and the loss of a batch whose label words are several tokens."""
    loaded = load_model(tiny(request.param), dtype="float64")
    prepared = prepare(get("pico_cause"), loaded, train=6, dev=0, test=0, max_length=64)
    return loaded.model, BatchLoss(loaded.model, prepared, prepared.train, torch.device("cpu"))


def test_a_probe_measures_the_slope_that_autograd_gives(exact):
    model, loss = exact
    named = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = MeZO(model.named_parameters(), lr=1e-300, eps=1e-4, seed=3)
    optimizer.step(loss)
    up, down = optimizer.last_step.losses[:2]
    seed = optimizer.last_step.seeds[0]
    model.zero_grad()
    loss().backward()
    slope = 0.0
    stream = optimizer.noise.stream(seed)
    for tensor in named_tensors(model):
        direction = torch.zeros_like(tensor.param)
        stream.add_(tensor, direction, 1.0)
        slope += float((direction * tensor.param.grad).sum())
    assert (up - down) / 2e-4 == pytest.approx(slope, rel=1e-2)
    assert all(torch.allclose(named[n], p, atol=1e-9) for n, p in model.named_parameters())


def test_probes_as_activations_have_the_losses_of_the_weight_form(exact):
    model, loss = exact
    found = []
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for form in ("weights", "activations"):
        model.load_state_dict(state)
        optimizer = LOZO(model.named_parameters(), lr=1e-4, eps=1e-2, interval=2, form=form)
        for _ in range(3):
            optimizer.step(loss)
        found.append(torch.tensor(optimizer.last_step.losses))
    model.load_state_dict(state)
    assert found[0][0] != found[0][1]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_a_model_in_memory_is_trained_and_forward_passes_alone_minimise_a_metric(tiny):
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(tiny("bart"))
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny("bart"))
    before = model.lm_head.weight.clone()
    sizes = {"train_examples": 8, "dev_examples": 4, "test_examples": 4, "max_length": 96, "batch_size": 4, "steps": 2}
    tuned = metazo.finetune(model, "pico_span", tokenizer=tokenizer, lr=1e-3, scale="rms", keep="last", **sizes)
    assert tuned.model is model and not torch.equal(model.lm_head.weight, before)
    scored = metazo.finetune(model, "pico_span", tokenizer=tokenizer, lr=1e-3, objective="exact-match", **sizes)
    assert scored.summary["before"]["objective"] == 1 - scored.summary["before"]["exact_match"]


@pytest.mark.parametrize("optimizer", ["first-order-fused", "auto", "fzoo", "eggroll", "mezo-svrg", "dominant-layer"])
def test_methods_that_need_no_residual_stream_run(tiny, tmp_path, optimizer):
    own = {"scale": "none", "lr": None} if optimizer == "auto" else {"scale": "none"}
    summary = run(tmp_path / "run", tiny("t5"), optimizer=optimizer, steps=2, eval_every=2, keep="none", **own)
    assert torch.tensor([summary["dev"]["loss"], summary["test"]["loss"]]).isfinite().all()


def test_a_comparison_examines_and_runs_it(tiny, tmp_path):
    own = {key: SMALL[key] for key in ("train_examples", "dev_examples", "test_examples", "batch_size", "max_length")}
    grid = Grid(
        model=str(tiny("t5")), tasks=["pico_sentiment"], columns=["zero-shot", "mezo"], budget=8, seeds=1, lrs=[1e-3],
        out=tmp_path / "grid", config=own,
    )  # fmt: skip
    facts = examine(grid)
    store = Store(grid, facts, False, tmp_path / "running")
    for column in grid.resolved:
        result = run_cell(store.job(Run("pico_sentiment", column, "seed", 0, 1e-3 if column.trains else None, 8)))
        assert result.finished and result.metrics["test"]["loss"] > 0


def test_what_the_library_does_not_save_is_not_trained(tiny, tmp_path, monkeypatch):
    """Marian's positions, which transformers leaves out of its files and loads as weights to be trained."""
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny("bart"))
    bart = hf.AutoConfig.from_pretrained(tiny("bart")).to_dict()
    own = {key: value for key, value in bart.items() if key in hf.MarianConfig().to_dict() and "type" not in key}
    hf.MarianMTModel(hf.MarianConfig(**own)).save_pretrained(tmp_path / "marian")
    tokenizer.save_pretrained(tmp_path / "marian")
    summary = run(tmp_path / "run", tmp_path / "marian", keep="last")
    assert evaluate(tmp_path / "run")["loss"] == summary["test"]["loss"]
    trained = {
        name for name, p in load(tmp_path / "marian", train=True).model.named_parameters() if "positions" in name
    }
    assert len(trained) == 2 and not trained & set(load_file(tmp_path / "run/model/model.safetensors"))
    with pytest.raises(UserError, match="leave no tensor to train .*transformers does not save these"):
        run(tmp_path / "none", tmp_path / "marian", train=["*embed_positions*"])
    with monkeypatch.context() as patched:  # as an earlier version, which trained them, wrote a log
        patched.setattr("metazo.runs.header.unsaved", lambda model: set())
        run(tmp_path / "old", tmp_path / "marian")
    with pytest.raises(UserError, match="trained weights of .*marian that transformers does not save: replay"):
        replay(tmp_path / "old/steps.jsonl", str(tmp_path / "marian"), out=tmp_path / "again")
    (tmp_path / "old/summary.json").unlink()
    log = tmp_path / "old/steps.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="begun by an earlier version of metazo, which trained weights of this model"):
        run(tmp_path / "old", tmp_path / "marian", resume=True)
