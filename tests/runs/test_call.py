"""metazo.finetune with objects: models, rows, losses and optimizers in memory, bit-identical to the same objects by name."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import shutil
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from datasets import ClassLabel, Dataset, DatasetDict
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

import metazo
from metazo.errors import UserError
from metazo.io.tensorfile import weights_hash
from metazo.models.load import load_model
from metazo.optimizers.registry import METHODS
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.folder import RunFolder
from metazo.runs.method import unused
from metazo.runs.replay import replay
from metazo.settings import build
from metazo.step.record import Step
from metazo.step.rules import Rule
from metazo.step.scales import BlockScale
from metazo.steplog.format import encode, line, scan

SIZES = {"train_examples": 32, "dev_examples": 8, "test_examples": 8, "lr": 1e-4, "steps": 6, "eval_every": 3}
SIZES |= {"keep": "last"}  # the best weights of a model that knows nothing may be those before the first step
TASK = metazo.Task(name="words", kind="classification", prompt="{text}. It was {}.", labels=["terrible", "great"])
ROWS = [{"text": f"the {n}th soup was {'warm' if n % 2 else 'cold'}", "label": n % 2} for n in range(40)]
MODEL = ["pico"]


@pytest.fixture(scope="module", autouse=True)
def small(tiny: Callable[[str], Path]) -> None:
    """The language model of these runs is one of two layers."""
    MODEL[0] = str(tiny("llama"))


def in_memory() -> tuple[nn.Module, object]:
    return AutoModelForCausalLM.from_pretrained(MODEL[0], dtype=torch.float32), AutoTokenizer.from_pretrained(MODEL[0])


def weights(model: nn.Module) -> str:
    return weights_hash(model.named_parameters())


def test_by_names_it_is_the_run_of_the_command_line(tmp_path):
    given = {"model": MODEL[0], "task": "pico_sentiment", "optimizer": "lozo", "method": {"rank": 3}}
    summary = run_settings(build(metazo.runs.config.FinetuneConfig, SIZES, given, {"out": tmp_path / "cli"}))
    tuned = metazo.finetune(MODEL[0], "pico_sentiment", "lozo", rank=3, out=tmp_path / "call", **SIZES)
    model = tmp_path / "cli" / "model" / "model.safetensors"
    assert model.read_bytes() == (tmp_path / "call" / "model" / "model.safetensors").read_bytes()
    assert (tmp_path / "cli" / "steps.jsonl").read_bytes() == (tmp_path / "call" / "steps.jsonl").read_bytes()
    assert tuned.summary["test"] == summary["test"]
    assert tuned.steps == scan(tmp_path / "call" / "steps.jsonl").steps and len(tuned.losses) == 6
    assert tuned.evaluations == RunFolder.read_records(tmp_path / "call")


@pytest.mark.parametrize(
    ("name", "options"), [("mezo", {}), ("lozo", {"form": "activations"}), ("fzoo", {"rank": 1}), ("mezo-momentum", {})]
)
def test_what_is_looked_at_changes_no_weight(name, options):
    """Updates wait for the next probe, unless somebody reads the weights."""
    looks = ({"eval_every": 100}, {"eval_every": 1}, {"eval_every": 100, "on_step": lambda step: None})
    runs = [metazo.finetune(MODEL[0], "pico_sentiment", name, **SIZES | options | look) for look in looks]
    assert len({weights(run.model) for run in runs}) == 1 and runs[0].steps == runs[1].steps == runs[2].steps


def test_a_model_in_memory_is_trained_in_place_and_nothing_is_written(tmp_path, monkeypatch):
    """Its weights are in the end the best, those of the evaluation in between."""
    monkeypatch.chdir(tmp_path)
    settings = SIZES | {"keep": "best", "lr": 1e-3, "seed": 5}
    model, tokenizer = in_memory()
    seen, evaluated = [], []
    tuned = metazo.finetune(
        model, "pico_sentiment", tokenizer=tokenizer, on_step=seen.append, on_evaluation=evaluated.append, **settings
    )
    named = metazo.finetune(MODEL[0], "pico_sentiment", out=tmp_path / "run", **settings)
    assert tuned.model is model and weights(model) == weights(named.model) and tuned.tokenizer is tokenizer
    assert named.summary["kept_step"] == 3
    assert tuned.summary["test"] == named.summary["test"]
    assert seen == tuned.steps == named.steps and evaluated == tuned.evaluations
    assert [record["step"] for record in evaluated] == [0, 3, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("kind", ["list", "dataset", "splits"])
def test_rows_in_memory(tmp_path, kind):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(lines)
    files = {"train": str(tmp_path / "rows.jsonl")}
    dataset = Dataset.from_list(ROWS).cast_column("label", ClassLabel(names=["bad", "good"]))
    data = {"list": ROWS, "dataset": dataset, "splits": DatasetDict(train=dataset, test=dataset.select(range(8)))}[kind]
    if kind == "splits":
        (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:8]))
        files["test"] = str(tmp_path / "test.jsonl")
    sizes = {**SIZES, "train_examples": 16}
    tuned = metazo.finetune(MODEL[0], TASK, data=data, **sizes)
    same = metazo.finetune(MODEL[0], TASK.model_copy(update={"files": files}), **sizes)
    assert weights(tuned.model) == weights(same.model) and tuned.summary["test"] == same.summary["test"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 2))


def batches(count: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    inputs = [torch.randn(32, 4, generator=draw) for _ in range(count)]
    return [(x, (x[:, 0] > 0).long()) for x in inputs]


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def test_a_module_with_a_loss_of_its_own():
    model, data = net(), batches()
    tuned = metazo.finetune(model, loss=loss, data=data, dev=data[:2], test=data[2:4], lr=0.05, steps=150, scale="rms")
    assert tuned.model is model and tuned.summary["test"]["loss"] < 0.7 * tuned.summary["before"]["loss"]
    with torch.inference_mode():
        assert tuned.summary["test"]["loss"] == pytest.approx(sum(float(loss(model, b)) for b in data[2:4]) / 2)
    loader = torch.utils.data.DataLoader([(x[0], y[0]) for x, y in batches(16)], batch_size=4)
    assert metazo.finetune(net(), loss=loss, data=loader, lr=1e-3, steps=3).summary["steps"] == 3
    endless = iter(lambda: data[0], None)
    assert metazo.finetune(net(), loss=loss, data=endless, lr=1e-3, steps=3).summary["forwards"] == 6


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        for number in itertools.count():
            assert number < 1000, "the data set is read past the steps"
            yield batches(1)[0]


def test_an_endless_data_set_in_a_loader_is_read_as_far_as_the_steps_go():
    loader = torch.utils.data.DataLoader(Endless(), batch_size=None)
    assert metazo.finetune(net(), loss=loss, data=loader, lr=1e-3, steps=3, accumulate=2).summary["forwards"] == 12
    with pytest.raises(UserError, match="`data` has no length.*give `steps`"):
        metazo.finetune(net(), loss=loss, data=loader, lr=1e-3, forwards=6)


@pytest.mark.parametrize("length", [{"steps": 2}, {"forwards": 4}])
def test_dev_and_test_are_read_to_their_end(length):
    splits = {name: iter(batches(number)) for name, number in (("dev", 7), ("test", 5))}
    tuned = metazo.finetune(net(), loss=loss, data=batches(), lr=1e-3, **splits, **length)
    assert (tuned.summary["dev"]["batches"], tuned.summary["test"]["batches"]) == (7, 5)


def test_a_run_on_a_loss_of_its_own_is_resumed_and_replayed(tmp_path):
    class Stop(Exception):
        pass

    def stop(step):
        if step.step == 6:
            raise Stop

    given = {"loss": loss, "data": batches(), "dev": batches(2), "lr": 1e-2, "snapshot_every": 4, "steps": 10}
    whole = metazo.finetune(net(), out=tmp_path / "whole", **given)
    with pytest.raises(Stop):
        metazo.finetune(net(), out=tmp_path / "cut", on_step=stop, **given)
    assert len(scan(tmp_path / "cut" / "steps.jsonl").steps) == 7
    cut = metazo.finetune(net(), out=tmp_path / "cut", resume=True, **given)
    assert weights(cut.model) == weights(whole.model) and cut.steps == whole.steps
    saved = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    assert saved == (tmp_path / "cut" / "model" / "model.safetensors").read_bytes()
    done = replay(tmp_path / "cut" / "steps.jsonl", net(), tmp_path / "again")
    assert done.identical and weights(done.loaded.model) == weights(whole.model)
    assert saved == (tmp_path / "again" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "summary.json").unlink()  # as if it were not complete
    for change, words in {
        "data": ({"data": batches()[::-1]}, "the batches of `data` changed"),
        "dev": ({"dev": batches()[3:5]}, "the batches of `dev` changed"),
        "loss": ({"loss": lambda *given: 5 * loss(*given)}, "loss of the first batch was '"),
    }.values():
        with pytest.raises(UserError, match=words):
            metazo.finetune(net(), out=tmp_path / "cut", resume=True, **(given | change))
    other = net()
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    with pytest.raises(UserError, match="is not the base model of this log"):
        replay(tmp_path / "cut" / "steps.jsonl", other)


def test_a_module_that_no_file_can_hold_is_trained_if_nothing_is_saved(tmp_path):
    made = net()
    made[0].weight = nn.Parameter(TwoTensor(*(made[0].weight.detach().clone() for _ in "ab")), requires_grad=False)
    given = {"loss": loss, "data": batches(), "dev": batches(2), "lr": 1e-2, "steps": 4}
    with pytest.raises(UserError, match=r"0\.weight is a TwoTensor, .* leave out `out`, or add `keep='none'`"):
        metazo.finetune(made, out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()
    metazo.finetune(made, out=tmp_path / "run", keep="none", **given)
    fresh = net()
    fresh[0].weight = made[0].weight
    with pytest.raises(UserError, match=r"0\.weight is a TwoTensor"):
        replay(tmp_path / "run" / "steps.jsonl", fresh, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_an_offloaded_model_is_refused(tmp_path):
    model, tokenizer = in_memory()
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(
        UserError, match=r"tensors without numbers in memory, such as model\.embed_tokens.* offloads them"
    ):
        metazo.finetune(model, "pico_sentiment", tokenizer=tokenizer, **SIZES)


def test_an_optimizer_in_memory(tmp_path):
    model, tokenizer = in_memory()
    head = [(name, tensor) for name, tensor in model.named_parameters() if "mlp" in name]
    before = copy.deepcopy(model.state_dict())
    optimizer = metazo.LOZO(head, lr=1e-3, rank=2, seed=5)
    tuned = metazo.finetune(
        model, "pico_sentiment", optimizer, tokenizer=tokenizer, out=tmp_path / "run",
        **{name: value for name, value in SIZES.items() if name != "lr"}, schedule="linear",
    )  # fmt: skip
    moved = {name for name, tensor in tuned.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, _ in head} and optimizer.steps == 6
    log = tmp_path / "run" / "steps.jsonl"
    assert scan(log).header["method"] == "memory:lozo" and [step.lr[0] for step in tuned.steps][3] == 0.5e-3
    with pytest.raises(UserError, match="optimizer was an object in memory"):
        replay(log, MODEL[0])
    base, _ = in_memory()
    fresh = metazo.LOZO([(n, p) for n, p in base.named_parameters() if "mlp" in n], lr=1.0, rank=2, seed=5)
    assert replay(log, base, tokenizer=tokenizer, optimizer=fresh).identical


class Signs(Rule):
    """A rule of one's own, which is no dataclass."""

    fused = True

    def __init__(self, factor: float):
        self.factor, self._private = factor, object()

    def begin(self, state, coefficients):
        return self.factor


class Rising(BlockScale):
    """A scale of one's own, whose representation is that of its base."""

    def __init__(self, top: torch.Tensor):
        super().__init__()
        self.top = top

    def sigma(self, state):
        return self.top.double().expand(len(self.blocks))


GIVEN = {"seed": 5, "rule": Signs(0.5), "scale": Rising(torch.tensor(2.0))}


def made(change: dict) -> tuple[nn.Module, object, object]:
    change, (model, tokenizer) = dict(change), in_memory()
    named = [*model.named_parameters()][:: 2 if change.pop("half", None) else 1]
    return model, tokenizer, metazo.LOZO(named, lr=1e-4, **{"rank": 2, **GIVEN, **change})


def with_optimizer(change: dict, **more) -> metazo.Finetuned:
    model, tokenizer, optimizer = made(change)
    sizes = {name: value for name, value in SIZES.items() if name != "lr"}
    return metazo.finetune(model, "pico_sentiment", optimizer, tokenizer=tokenizer, **sizes, **more)


@pytest.fixture(scope="module")
def begun(tmp_path_factory, small) -> Path:
    """A run with an optimizer in memory that was stopped."""

    def stop(step: Step) -> None:
        if step.step == 3:
            raise KeyError

    out = tmp_path_factory.mktemp("begun") / "run"
    with pytest.raises(KeyError):
        with_optimizer({}, out=out, on_step=stop)
    return out


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seed": 6}, "seed was 5 and is 6 now"),
        ({"rule": "momentum"}, "rule was 'Signs' and is 'Momentum' now"),
        ({"rule": Signs(0.25)}, "rule's factor was 0.5 and is 0.25 now"),
        ({"scale": Rising(torch.tensor(3.0))}, "the scale's top changed"),
        ({"weight_decay": 0.5}, "weight decay was '0.0' and is '0.5' now"),
        ({"rank": 3}, "rank was 2 and is 3 now"),
        ({"half": True}, "the names of the trained tensors changed"),
    ],
)
def test_an_optimizer_in_memory_must_be_the_same_to_go_on_and_to_replay(begun, change, what):
    before = (begun / "steps.jsonl").read_bytes()
    with pytest.raises(UserError, match=what):
        with_optimizer(change, out=begun, resume=True)
    model, tokenizer, optimizer = made(change)
    with pytest.raises(UserError, match=f"`optimizer` is not the one of this log: {what}"):
        replay(begun, model, tokenizer=tokenizer, optimizer=optimizer)
    assert (begun / "steps.jsonl").read_bytes() == before


def test_a_run_that_was_refused_another_optimizer_goes_on_and_is_replayed_with_its_own(begun, tmp_path):
    out = shutil.copytree(begun, tmp_path / "run")
    with pytest.raises(UserError, match="seed was 5"):
        with_optimizer({"seed": 6}, out=out, resume=True)
    again = with_optimizer({}, out=out, resume=True)
    assert weights(again.model) == weights(with_optimizer({}).model)
    model, tokenizer, optimizer = made({})
    assert replay(out, model, tokenizer=tokenizer, optimizer=optimizer).identical


def test_a_log_of_an_optimizer_in_memory_by_an_earlier_version_goes_on(tmp_path):
    def run(**more) -> metazo.Finetuned:
        model, tokenizer = in_memory()
        sizes = {name: value for name, value in SIZES.items() if name != "lr"}
        optimizer = metazo.MeZO(model.named_parameters(), lr=1e-4, seed=5)
        return metazo.finetune(model, "pico_sentiment", optimizer, tokenizer=tokenizer, **sizes, **more)

    def stop(step: Step) -> None:
        if step.step == 3:
            raise KeyError

    with pytest.raises(KeyError):
        run(out=tmp_path / "run", on_step=stop)
    found = scan(log := tmp_path / "run" / "steps.jsonl")
    data, chain = line({key: value for key, value in found.header.items() if key != "optimizer"}, 0)
    for step in found.steps:
        more, chain = line(encode(step), chain)
        data += more
    log.write_bytes(data)
    assert weights(run(out=tmp_path / "run", resume=True).model) == weights(run().model)
    model, tokenizer = in_memory()
    optimizer = metazo.MeZO(model.named_parameters(), seed=5)
    assert replay(log, model, tokenizer=tokenizer, optimizer=optimizer).identical


def test_a_class_of_ones_own(monkeypatch):
    class Halved(metazo.MeZO):
        name = "halved-mezo"

        def __init__(self, params, lr=1e-6, eps=1e-3, *, share: float = 1.0, **options):
            super().__init__(params, lr * share, eps, **options)

    monkeypatch.setattr("metazo.optimizers.registry.METHODS", METHODS)
    try:
        half = metazo.finetune(MODEL[0], "pico_sentiment", Halved, share=0.5, **SIZES)
    finally:
        METHODS.pop("halved-mezo"), metazo.optimizers.OPTIMIZERS.pop("halved-mezo")
    same = metazo.finetune(MODEL[0], "pico_sentiment", metazo.MeZO, **{**SIZES, "lr": 0.5e-4})
    assert weights(half.model) == weights(same.model)


def test_lora_on_a_model_in_memory():
    pytest.importorskip("peft", reason="peft is not installed")
    model, tokenizer = in_memory()
    tuned = metazo.finetune(model, "pico_sentiment", tokenizer=tokenizer, lora=2, **SIZES)
    assert all("lora_" in name for name, p in tuned.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lora": 2, "rank": 3},
        {"adapter": "prefix", "adapter_rank": 2, "optimizer": "unknown"},
        {"adapter": "ia3", "max_length": 1},
        {"train": ["*q_proj*"], "optimizer": "fzoo", "steps": None, "forwards": 2},
    ],
)
def test_a_refused_run_leaves_the_model_as_it_was_given(wrong):
    model, tokenizer = in_memory()
    model.train()
    next(model.parameters()).requires_grad_(False)

    def state():
        tensors = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        return tensors, {name: module.training for name, module in model.named_modules()}, set(vars(model))

    before = state(), weights(model)
    with pytest.raises(UserError):
        metazo.finetune(model, "pico_sentiment", tokenizer=tokenizer, **SIZES | wrong)
    assert (state(), weights(model)) == before
    ids = {"input_ids": torch.arange(8)[None]}
    assert torch.equal(model.eval()(**ids).logits, in_memory()[0].eval()(**ids).logits)


def test_what_the_caller_froze_stays_frozen():
    model, tokenizer = in_memory()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0" in name)
    before = copy.deepcopy(model.state_dict())
    metazo.finetune(model, "pico_sentiment", tokenizer=tokenizer, **SIZES)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all("layers.0" in name for name in moved)


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [
        ("mezo", {}),
        ("mezo", {"precision": "compensated-8", "dtype": "bfloat16"}),
        ("mezo", {"adapter": "lora", "scale": "rms"}),
        ("lozo", {"form": "activations"}),
        ("mezo-svrg", {}),
        ("loren", {}),
        ("curvzo", {}),
        ("skip-feedback", {"lr": 1e-3}),
        ("first-order-adamw", {}),
        ("first-order-fused", {"lr": 1e-3}),
    ],
    ids=lambda given: given if isinstance(given, str) else "-".join(map(str, given.values())) or "default",
)
def test_the_model_of_a_run_is_freed_when_nobody_needs_it(optimizer, changes):
    """At once, without Python's search for cycles: otherwise a second run would hold two models."""
    gc.disable()
    try:
        tuned = metazo.finetune(
            MODEL[0],
            "pico_sentiment",
            optimizer,
            **SIZES | {"steps": 2, "dev_examples": 4, "test_examples": 4} | changes,
        )
        seen = [weakref.ref(tuned.model), *map(weakref.ref, tuned.model.parameters())]
        del tuned
        assert not any(kept() is not None for kept in seen)
    finally:
        gc.enable()


def test_a_complete_run_gives_its_kept_model(tmp_path):
    first = metazo.finetune(MODEL[0], "pico_sentiment", out=tmp_path / "run", **SIZES)
    again = metazo.finetune(MODEL[0], "pico_sentiment", out=tmp_path / "run", resume=True, **SIZES)
    assert again.summary == first.summary and weights(again.model) == weights(first.model)


OF_LOADING = {
    "kind": "causal", "head": "linear", "dtype": "bfloat16", "quantize": "int8", "revision": "main",
    "attn_implementation": "eager", "device_map": "auto",
}  # fmt: skip


@pytest.mark.parametrize("name, value", OF_LOADING.items())
def test_settings_of_loading_do_not_go_with_a_model_in_memory(name, value):
    with pytest.raises(UserError, match=f"`{name}` cannot be combined with a model in memory"):
        metazo.finetune(metazo.load_model("pico"), "pico_sentiment", **{name: value}, **SIZES)


@pytest.mark.parametrize("name, value", (OF_LOADING | {"batches": "by-length"}).items())
def test_settings_of_loading_and_of_rows_do_not_go_with_a_loss(name, value):
    with pytest.raises(UserError, match=f"`{name}` cannot be combined with `loss`"):
        metazo.finetune(net(), loss=loss, data=batches(1), steps=1, **{name: value})


def test_the_device_of_a_model_in_memory_may_be_chosen_automatically():
    there = "cuda" if torch.cuda.is_available() else "cpu"
    tuned = metazo.finetune(net(), loss=loss, data=batches(1), steps=1, lr=1e-3, device="auto")
    assert next(tuned.model.parameters()).device.type == there
    with pytest.raises(UserError, match="`device` 'nonsense' cannot be used here"):
        metazo.finetune(net(), loss=loss, data=batches(1), steps=1, lr=1e-3, device="nonsense")


def test_a_device_without_float64_is_refused(monkeypatch):
    """Such as MPS, which is simulated."""
    real = torch.zeros

    def zeros(*size, dtype=None, **settings):
        if dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return real(*size, dtype=dtype, **settings)

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(UserError, match="`device` 'cpu' cannot be used: it has no float64"):
        metazo.finetune(net(), loss=loss, data=batches(1), steps=1, lr=1e-3, device="cpu")


def test_the_command_line_refuses_to_resume_what_it_cannot_name(tmp_path):
    model, tokenizer = in_memory()
    tuned = metazo.finetune(model, "pico_sentiment", tokenizer=tokenizer, out=tmp_path / "run", **SIZES)
    (tmp_path / "run" / "summary.json").unlink()
    found = json.loads((tmp_path / "run" / "config.json").read_text())
    assert found["model"] == "memory:LlamaForCausalLM" and tuned.out == tmp_path / "run"
    del found["started_in"], found["unset"]  # which are no settings
    with pytest.raises(UserError, match=r"`model` of this run was an object in memory .* resume=True"):
        run_settings(build(metazo.runs.config.FinetuneConfig, found, {"out": tmp_path / "run", "resume": True}))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("pico", "pico_sentiment", "mezzo"), "`optimizer` 'mezzo' is unknown"),
        (("pico", "pico_sentiment", torch.optim.AdamW), "not a method of metazo"),
        (("pico",), "`task` is required"),
        ((nn.Linear(2, 2), "pico_sentiment"), "`tokenizer` is missing"),
        ((5, "pico_sentiment"), "`model` is a folder, a Hub id.*, not 5"),
    ],
)
def test_arguments_that_are_wrong(arguments, said):
    with pytest.raises(UserError, match=said):
        metazo.finetune(*arguments, steps=1)


def test_the_name_of_a_tokenizer_is_no_tokenizer():
    with pytest.raises(UserError, match="`tokenizer` is 'pico'; give a tokenizer of transformers"):
        metazo.finetune(in_memory()[0], "pico_sentiment", tokenizer="pico", steps=1)


@pytest.mark.parametrize(
    ("model", "function", "said"),
    [
        (nn.Linear(2, 2), "x", r"`loss` is 'x', and must be a function: \(model, batch\) -> scalar tensor"),
        (
            nn.Linear(2, 2),
            lambda model: 1.0,
            r"`loss` is called as loss\(model, batch\), which it does not take: too many",
        ),
        (nn.LazyLinear(2), lambda model, batch: model(batch).sum(), r"`model` has weights without a shape \(weight\)"),
        (nn.ReLU(), lambda model, batch: model(batch).sum(), "`model` is a ReLU without weights"),
        (nn.Linear(2, 2), lambda model, batch: model(batch).sum() * torch.nan, "in float32; check the model"),
    ],
)
def test_modules_and_losses_that_are_wrong(model, function, said):
    with pytest.raises(UserError, match=said):
        metazo.finetune(model, loss=function, data=[torch.ones(2, 2)], steps=1)


@pytest.mark.parametrize("optimizer", ["mezo", "first-order-sgd"])
def test_a_loss_that_calls_backward_is_refused(optimizer):
    def backward(model, batch):
        (value := loss(model, batch)).backward()
        return value

    with pytest.raises(UserError, match=r"`loss` computes a gradient, by backward\(\).*return the loss alone\."):
        metazo.finetune(net(), loss=backward, data=batches(1), optimizer=optimizer, lr=1e-3, steps=1)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"out": 5}, "`out` is a folder's name or path, not 5"),
        ({"race": 5}, "A race needs a list of .* not 5"),
        ({"race": [1e-4, "x"]}, r"A race needs a list of .* not \[0.0001, 'x'\]"),
        ({"race": [1e-4, 1e-3], "race_steps": 1.5}, "`race_steps` is 1.5 .*choose 1 or more"),
        ({"on_step": 5}, "`on_step` is 5, and must be a function of one record"),
        ({"on_evaluation": "x"}, "`on_evaluation` is 'x', and must be a function of one record"),
        ({"console": 5}, "`console` is 5, and must be a rich.console.Console"),
    ],
)
def test_named_arguments_that_are_wrong(tmp_path, named, said):
    with pytest.raises(UserError, match=said):
        metazo.finetune("pico", "pico_sentiment", steps=1, **{"out": tmp_path / "run"} | named)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data": batches(1), "learning_rate": 1}, "`learning_rate` is not a hyperparameter of mezo"),
        ({}, "`data` is missing"),
        ({"data": []}, "`data` has no batches"),
        ({"data": iter([1])}, "`data` has no length.*give `steps`"),
        ({"data": batches(1), "batch_size": 4}, "`batch_size` cannot be combined with `loss`"),
        ({"data": batches(1), "lora": 4}, "`lora` cannot be combined with `loss`"),
        ({"data": batches(1), "resume": True}, "needs the folder of the run"),
        (
            {"data": batches(1), "optimizer": metazo.MeZO(net().named_parameters())},
            "has tensors that are not the model's",
        ),
        (
            {"data": batches(1), "optimizer": metazo.MeZO(net().named_parameters()), "eps": 1.0},
            "`eps` cannot be combined with",
        ),
    ],
)
def test_settings_that_are_wrong(settings, said):
    with pytest.raises(UserError, match=said):
        metazo.finetune(net(), loss=loss, **settings)


def test_rows_that_are_wrong():
    loaded = load_model("pico")
    for data, said in (
        ({"trian": ROWS}, "split 'trian'"),
        ({"test": ROWS}, "no train split"),
        ([], "no train rows"),
        ([*ROWS[:3], {"text": "x"}], "row 4.*'label'"),
        (["x"], "row 1.*JSON object"),
        (iter(ROWS), "train rows of the type"),
    ):
        with pytest.raises(UserError, match=said):
            metazo.finetune(loaded, TASK, data=data, **SIZES)


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"optimizer": "first-order-adamw", "eps": 0.1}, "`eps` changes nothing with `optimizer` first-order-adamw."),
        (
            {"optimizer": "first-order-sgd", "noise": "rademacher"},
            "`noise` changes nothing with `optimizer` first-order-sgd.",
        ),
        ({"statistics_every": 7}, "`statistics_every` changes nothing without `scale` or `tuner`."),
        ({"merge": True}, "`merge` changes nothing without adapters."),
        pytest.param(
            {"device_map": "auto"},
            "`device_map` changes nothing without a GPU.",
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="without a GPU"),
        ),
        ({"statistics_every": 7, "scale": "rms", "eps": 0.1}, None),
        ({"lora": 2, "merge": True}, None),
    ],
)
def test_settings_that_change_nothing_are_named(settings, words):
    assert unused(FinetuneConfig("pico", "pico_sentiment", **settings)) == ([words] if words else [])


def test_a_revision_of_a_folder_changes_nothing(tmp_path):
    said = [f"`revision` changes nothing for the folder {tmp_path}."]
    assert unused(FinetuneConfig(str(tmp_path), "pico_sentiment", revision="v2")) == said
    assert not unused(FinetuneConfig("owner/name", "pico_sentiment", revision="v2"))


@pytest.mark.parametrize("named", ["lozo", [1]])
def test_a_method_that_is_no_mapping_is_refused(named):
    with pytest.raises(
        UserError, match="`method` holds hyperparameters by name, not .*: name the method as `optimizer`"
    ):
        metazo.finetune("pico", "pico_sentiment", lr=1e-3, steps=1, method=named)


def test_batches_keep_their_type_and_losses_are_numbers():
    def run(loss, **extra):
        data = [BatchEncoding({"x": torch.ones(2, 3), "y": torch.zeros(2, dtype=torch.long)})] * 2
        return metazo.finetune(nn.Linear(3, 2), loss=loss, data=data, lr=1e-3, steps=2, **extra)

    assert run(lambda model, batch: nn.functional.cross_entropy(model(batch.x), batch.y)).summary["steps"] == 2
    for wrong in (lambda model, batch: None, lambda model, batch: model(batch.x)):
        with pytest.raises(UserError, match="The closure returned"):
            run(wrong)


@pytest.mark.parametrize("optimizer", ["mezo", "first-order-sgd"])
@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_a_loss_may_take_entries_out_of_its_batch(optimizer, kind):
    def entries(model, batch):
        labels = batch.pop("y")
        return cross_entropy(model(**batch), labels)

    class Net(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    data = [kind({"x": x, "y": y}) for x, y in batches(2)]
    found = metazo.finetune(Net(4, 2), loss=entries, data=data, dev=data, optimizer=optimizer, lr=1e-3, steps=5)
    assert found.summary["steps"] == 5 and all("y" in batch for batch in data)


class Named(dict):
    """A dict whose entries are attributes, as transformers' ModelOutput."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


@dataclass(frozen=True)
class Pair:
    x: torch.Tensor
    y: torch.Tensor


@pytest.mark.parametrize("kind", [tuple, dict, Named, BatchEncoding, Pair])
def test_a_loss_that_changes_its_batch_in_place_is_warned_of_once(kind):
    def parts(batch):
        assert type(batch) is kind
        if kind in (tuple, Pair):
            return batch if kind is tuple else (batch.x, batch.y)
        return (batch.x["it"], batch.y) if kind is Named else (batch["x"]["it"], batch.pop("y"))

    def scaled(model, batch):
        x, y = parts(batch)
        return cross_entropy(model(x.div_(2)), y)

    def plain(model, batch):
        x, y = parts(batch)
        return cross_entropy(model(x), y)

    def data():
        wrap: Callable = {tuple: lambda x, y: (x, y), Pair: Pair}.get(kind, lambda x, y: kind({"x": {"it": x}, "y": y}))
        return [wrap(x, y) for x, y in batches(2)]

    with pytest.warns(UserWarning, match="`loss` changes tensors of its batch in place") as found:
        metazo.finetune(net(), loss=scaled, data=data(), optimizer="first-order-sgd", lr=1e-3, steps=3)
    assert sum("in place" in str(each.message) for each in found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metazo.finetune(net(), loss=plain, data=data(), optimizer="first-order-sgd", lr=1e-3, steps=3)


@pytest.mark.parametrize("optimizer", ["mezo", "lozo", "first-order-fused"])
def test_narrow_weights_that_are_not_contiguous_have_masters(optimizer):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).to(torch.bfloat16)
    model = model.to(memory_format=torch.channels_last)

    def loss(network, batch):
        return cross_entropy(network(batch[0]).float(), batch[1])

    data = [(torch.randn(5, 3, 4, 4, dtype=torch.bfloat16), torch.randint(2, (5,)))]
    found = metazo.finetune(model, loss=loss, data=data, optimizer=optimizer, lr=1e-3, steps=2)
    assert found.summary["steps"] == 2


def test_an_optimizer_that_has_taken_steps_is_refused():
    model = torch.nn.Linear(4, 2)
    optimizer = metazo.MeZO(model.named_parameters(), lr=0.1)

    def loss(network, batch):
        return network(batch).square().mean()

    settings = {"optimizer": optimizer, "loss": loss, "data": [torch.ones(3, 4)], "steps": 3}
    assert len(metazo.finetune(model, **settings).steps) == 3
    with pytest.raises(UserError, match="`optimizer` has taken 3 steps already"):
        metazo.finetune(model, **settings)
