"""Estimates without weights, beside what the same steps take with them."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from metazo.errors import UserError
from metazo.models.load import LoadedModel
from metazo.models.skeleton import skeleton
from metazo.optimizers.registry import method
from metazo.runs.config import FinetuneConfig
from metazo.runs.cost import measure
from metazo.runs.dryrun import assumed_loss, dry_run
from metazo.runs.estimate import PATIENCE, Estimate, Rates, affordable, estimate, look_ahead, step_seconds
from metazo.runs.setup import set_up
from metazo.step.precision import Compensated
from tests.models.test_skeleton import sparse

SMALL = LlamaConfig(
    vocab_size=2000, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, architectures=["LlamaForCausalLM"],
)  # fmt: skip
SHAPE = (4, 32)


def with_weights(bare: LoadedModel) -> LoadedModel:
    torch.manual_seed(0)
    model = type(bare.model)(bare.model.config).to(bare.dtype).eval()  # type: ignore[operator]
    return LoadedModel(model, None, bare.kind, bare.name, bare.dtype, bare.context_length)  # type: ignore[arg-type]


def on_cpu(loaded: LoadedModel, keep: int = 1, shape: tuple[int, int] = SHAPE):
    """The loss of `assumed_loss` over random tokens, left-padded, so that transformers makes the same mask."""
    ids = torch.randint(0, 2000, shape)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def loss():
        out = loaded.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep
        )
        return out.logits.float().logsumexp(-1).mean()

    return loss


WIDE = LlamaConfig(
    vocab_size=200_000, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, architectures=["LlamaForCausalLM"],
)  # fmt: skip
CASES = [
    (SMALL, "mezo", "float32", {}, 0.1), (SMALL, "lozo", "float32", {}, 0.1), (SMALL, "mezo-momentum", "float32", {}, 0.1),
    (SMALL, "mezo", "bfloat16", {"precision": "master"}, 0.1),
    # chunks of a million weights count beside tensors of 13 million
    (WIDE, "mezo", "bfloat16", {"precision": "compensated-16"}, 0.1),
    (WIDE, "mezo", "bfloat16", {"precision": "compensated-8"}, 0.1),
    # kernels of the CPU keep other tensors for the backward pass than those of the meta device
    (SMALL, "first-order-adamw", "float32", {}, 0.25), (SMALL, "first-order-adamw", "bfloat16", {}, 0.25),
    (SMALL, "first-order-sgd", "float32", {}, 0.25),
    (WIDE, "first-order-fused", "bfloat16", {"precision": "compensated-16"}, 0.05),
    (SMALL, "lozo", "float32", {"probing": "together", "queries": 2}, 0.05), (SMALL, "eggroll", "float32", {}, 0.05),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "name", "dtype", "options", "tolerance"), CASES)
def test_memory_is_that_of_a_step(shape: LlamaConfig, name: str, dtype: str, options: dict, tolerance: float) -> None:
    bare = skeleton("small", config=shape, dtype=dtype)
    whole = with_weights(bare)
    options = {"lr": 1e-6, **options}
    estimated = estimate(bare.model, method(name)(bare.model.named_parameters(), **options), assumed_loss(bare, *SHAPE))
    optimizer = method(name)(whole.model.named_parameters(), **options)
    measured = measure(whole.model, optimizer, on_cpu(whole))
    assert estimated.inference == pytest.approx(measured.inference_bytes, rel=0.1)
    assert estimated.peak == pytest.approx(measured.step_bytes, rel=tolerance)
    assert estimated.forward_operations == pytest.approx(measured.forward_flops, rel=0.02)


def test_eager_attention_keeps_the_matrix_of_its_scores() -> None:
    """sdpa does not, and is what other kernels are counted as."""
    shape, found = (4, 256), {}
    for name in ("sdpa", "flex_attention", "eager"):
        bare = skeleton("small", config=copy.deepcopy(SMALL), attn_implementation=name)
        found[name] = estimate(bare.model, method("mezo")(bare.model.named_parameters()), assumed_loss(bare, *shape))
    whole = with_weights(bare)
    assert whole.model.config._attn_implementation == "eager"
    measured = measure(whole.model, method("mezo")(whole.model.named_parameters()), on_cpu(whole, shape=shape))
    assert found["eager"].inference == pytest.approx(measured.inference_bytes, rel=0.02)
    scores = shape[0] * SMALL.num_attention_heads * shape[1] ** 2 * 4
    assert found["eager"].inference > found["sdpa"].inference + scores
    assert found["flex_attention"].inference == found["sdpa"].inference


def test_a_dry_run_edits_one_chunk_of_a_compensated_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of LOMO split every chunk of the weights of a model, and one takes the memory that all take in turn."""
    written, write = [], Compensated.write

    def counted(self: Compensated, start: int, *given: Any) -> None:
        written.append(start)
        write(self, start, *given)

    monkeypatch.setattr(Compensated, "write", counted)
    bare = skeleton("small", config=WIDE, dtype="bfloat16")
    optimizer = method("first-order-fused")(bare.model.named_parameters(), lr=1e-6, precision="compensated-16")
    estimate(bare.model, optimizer, assumed_loss(bare, *SHAPE))
    assert set(written) == {0}
    assert len(written) == 2 * len(list(bare.model.parameters()))


def test_the_second_step_and_micro_batches_take_more() -> None:
    """AdamW's moments lie beside the activations from the second step on, and gradients beside those of later micro-batches."""
    bare = skeleton("small", config=SMALL)
    loss, peaks = assumed_loss(bare, *SHAPE), []
    for accumulate in (1, 4):
        optimizer = method("first-order-adamw")(bare.model.named_parameters(), lr=1e-6)
        found = estimate(bare.model, optimizer, loss, accumulate)
        assert found.step_operations == pytest.approx(3 * found.forward_operations, rel=0.1)
        peaks.append(found.peak)
    weights, activations = found.weights, found.inference - found.weights
    assert 4 * weights + activations < peaks[0] < peaks[1]


@pytest.mark.parametrize("keep", [1, 8])
@pytest.mark.parametrize("name", ["skip-feedback", "answer-column"])
def test_memory_of_a_structured_estimate_is_that_of_a_step(name: str, keep: int) -> None:
    """A graph of one block: of its last position alone if the loss reads no other."""
    bare = skeleton("small", config=SMALL)
    whole = with_weights(bare)
    steps = [
        (found.model, method(name)(found.model.named_parameters(), lr=1e-6, model=found.model))  # type: ignore[call-arg]
        for found in (bare, whole)
    ]
    loss = assumed_loss(bare, *SHAPE, keep)
    look_ahead(steps[0][1], loss, at_last=keep == 1)
    steps[1][1].measure_cost(on_cpu(whole, keep))
    for _, optimizer in steps:  # the first step's look for other ways than the stream is no part of the others
        optimizer.bypassed = False
    estimated, measured = estimate(*steps[0], loss), measure(*steps[1], on_cpu(whole, keep))
    costs = [optimizer.forwards_per_step() for _, optimizer in steps]
    assert costs[0] == pytest.approx(costs[1], rel=0.02) and (costs[1] == 4) == (keep == 8)
    assert not estimated.notes and estimated.inference == pytest.approx(measured.inference_bytes, rel=0.05)
    more = measured.step_bytes - measured.inference_bytes
    assert estimated.peak - estimated.inference == pytest.approx(more, rel=0.1)


def test_a_step_that_cannot_be_followed_has_a_least_peak(monkeypatch) -> None:
    def fails(self, *arguments):
        raise NotImplementedError("no numbers")

    monkeypatch.setattr("metazo.optimizers.structured.Structured.look", fails)
    found = dry_run(FinetuneConfig(**PICO, optimizer="skip-feedback"))
    assert "peak of a step at least" in found["memory"] and "(no numbers)" in found["notes"][-1]


def test_time_is_the_larger_of_computing_and_reading() -> None:
    class Two:
        replayable, param_groups = True, [{"params": [torch.nn.Parameter(torch.zeros(10))]}]

        def forwards_per_step(self) -> float:
            return 2

    figures = Estimate(weights=40, state=0, inference=0, peak=0, forward_operations=50, step_operations=100)
    assert step_seconds(figures, Two(), Rates(operations=10, bytes=80, noise=10)) == 10 + 3
    assert step_seconds(figures, Two(), Rates(operations=1000, bytes=8, noise=10)) == 10 + 3
    once = step_seconds(figures, Two(), Rates(operations=10, bytes=80, noise=10), accumulate=8)
    assert once == 8 * 10 + 3, "the noise is added once for all micro-batches"


SEVENTY = LlamaConfig(
    vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, max_position_embeddings=131072, architectures=["LlamaForCausalLM"],
)  # fmt: skip


def test_the_plan_of_svrg_has_the_steps_and_forwards_of_the_run() -> None:
    """Two passes over four batches in every other step: as in tests/runs/test_schedule.py."""
    sizes = {"train_examples": 32, "batch_size": 8, "dev_examples": 4, "test_examples": 4, "max_length": 40}
    found = dry_run(FinetuneConfig("pico", "pico_sentiment", optimizer="mezo-svrg", forwards=21, **sizes))
    assert found["steps"].startswith("3, 20 forward passes")


def test_a_plan_for_70_billion_weights_takes_seconds_and_no_memory(tmp_path: Path) -> None:
    SEVENTY.save_pretrained(tmp_path)
    names = {name: tuple(p.shape) for name, p in skeleton("x", config=SEVENTY).model.named_parameters()}
    sparse(tmp_path / "model-1.safetensors", names)
    index = {"weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = FinetuneConfig(str(tmp_path), "sst2", dtype="bfloat16", precision="compensated-8", max_length=128)
    started = time.process_time()
    found = dry_run(config)
    assert time.process_time() - started < 5
    weights = 70_553_706_496
    assert found["trained weights"] == f"{weights:,} of {weights:,}"
    assert found["bytes"]["weights"] == pytest.approx(2 * weights, rel=1e-6)
    assert 3 * weights < found["bytes"]["peak"] < 3.1 * weights
    assert any("The run does not fit" in note for note in found["notes"])
    assert any("rows were not read (there is no tokenizer)" in note for note in found["notes"])
    assert any(f"{weights:,} numbers (BF16) in 1 files" in note for note in found["notes"])
    assert found["time"].startswith("estimated at least ")


def test_the_measured_product_is_as_large_as_patience_allows() -> None:
    assert affordable(2048, 4096, PATIENCE) == (2048, 4096)
    rows, width = affordable(2048, 4096, 80.0)  # bfloat16 on a processor without instructions for it
    assert 0.9 < (rows * width * width) / (2048 * 4096 * 4096) / (PATIENCE / 80.0) <= 1
    assert affordable(512, 1024, 1e9) == (64, 64)


def test_a_plan_of_a_divided_model_says_what_each_process_takes() -> None:
    sizes = {"train_examples": 8, "dev_examples": 4, "test_examples": 4}
    whole = dry_run(FinetuneConfig("micro", "pico_sentiment", **sizes))
    found = dry_run(FinetuneConfig("micro", "pico_sentiment", tensor_parallel=2, fsdp=2, **sizes))
    assert found["bytes"] == whole["bytes"] | {"free": found["bytes"]["free"]}
    each = next(note for note in found["notes"] if note.startswith("Of 4 processes each takes about"))
    share = whole["bytes"]["peak"] - 0.75 * whole["bytes"]["weights"]
    assert float(each.split("about ")[1].split(" MB")[0]) == pytest.approx(share / 1e6, abs=0.1)


def test_a_plan_of_adapters_that_exist_is_refused_with_what_to_name() -> None:
    with pytest.raises(UserError, match="`adapter` continue has no dry run.*name their kind"):
        dry_run(FinetuneConfig("pico", "pico_sentiment", adapter="continue"))


@pytest.mark.parametrize(
    "settings", [{"optimizer": "auto"}, {"lora": 2}, {"optimizer": "skip-feedback"}, {"scale": "rms"}]
)
def test_a_plan_of_every_kind(settings: dict) -> None:
    found = dry_run(
        FinetuneConfig("pico", "pico_sentiment", train_examples=64, dev_examples=8, test_examples=8, **settings)
    )
    assert found["bytes"]["peak"] >= found["bytes"]["inference"] > 6_272_640
    assert found["task"].startswith("pico_sentiment: 64 train, 8 dev, 8 test")
    assert ("pico/v" in found["tuners"]) == ("lora" not in settings)


PICO = {"model": "pico", "task": "pico_sentiment", "train_examples": 64, "dev_examples": 8, "test_examples": 8}
REFUSED: list[tuple[dict, str]] = [
    ({"objective": "nosuch"}, "`objective` 'nosuch' is no metric of a classification task"),
    ({"objective": "accuracy", "optimizer": "first-order-sgd"}, "needs the gradient of the loss"),
    ({"track": ["mlflow"], "out": Path("new")}, "`track` mlflow needs the package mlflow"),
    ({"push": "bad//name", "out": Path("new")}, "bad//name"),
    ({"quantize": "int8"}, "train adapters in full precision"),
    ({"quantize": "int8", "lora": 2, "merge": True}, "`merge` would round"),
    ({"max_length": 5000}, "5000 is more than the context"),
    ({"train": ["nosuch"]}, "nosuch"),
    ({"head": "prototype"}, "head 'prototype' is for classifiers"),
    ({"attn_implementation": "nonsense"}, 'attn_implementation="nonsense"` is not supported'),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_a_plan_and_a_run_refuse_the_same_settings(settings: dict, words: str, monkeypatch) -> None:
    monkeypatch.setattr("metazo.runs.track.find_spec", lambda name: None)
    for refuses in (dry_run, set_up):
        with pytest.raises(UserError, match=words):
            refuses(FinetuneConfig(**PICO, **settings))


@pytest.mark.parametrize(("objective", "name"), [("accuracy", "mezo"), (None, "first-order-adamw")])
def test_a_plan_chooses_the_method_that_a_run_chooses(objective: str | None, name: str) -> None:
    config = FinetuneConfig(**PICO, optimizer="auto", objective=objective)
    assert dry_run(config)["optimizer"].startswith(f"auto takes {name}")
    assert set_up(config).config.optimizer == name


def test_a_plan_says_what_it_does_not_count(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    config = FinetuneConfig(**PICO, objective="accuracy", device_map="auto", out=Path("new"))
    notes = " ".join(dry_run(config)["notes"])
    for words in (
        "what `objective` accuracy adds",
        "of one process that does the work of all 4",
        "`device_map` auto",
        "are free;",
    ):
        assert words in notes
