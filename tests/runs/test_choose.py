"""optimizer="auto": every branch, what a run records of it, and the bytes of a backward pass beside those of a real one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import metazo
from metazo.errors import UserError
from metazo.models.load import load_model
from metazo.runs import choose, dryrun
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.tasks import get, prepare
from metazo.tasks.closures import BatchLoss

PLENTY, LITTLE = 10**12, 10**6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pico():
    loaded = load_model("pico")
    prepared = prepare(get("pico_topic"), loaded, train=8, dev=0, test=0, max_length=64)
    return loaded.model, BatchLoss(loaded.model, prepared, prepared.train, CPU)


def settings(**changes) -> FinetuneConfig:
    return FinetuneConfig(**{"model": "pico", "task": "pico_topic", "optimizer": "auto"} | changes)


def chosen(model: nn.Module, loss, free: int, **changes) -> tuple[FinetuneConfig, str]:
    return choose.choose(settings(**changes), model, loss, CPU, free)


def test_what_a_backward_pass_keeps_is_counted_without_keeping_it(pico) -> None:
    model, loss = pico
    kept: dict[int, torch.Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is used twice
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss()
    real = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    differentiable, counted = choose.saved_bytes(loss, model)
    assert value.requires_grad and differentiable
    assert real <= counted <= 3 * real


def test_plenty_of_memory_gives_first_order(pico) -> None:
    config, why = chosen(*pico, PLENTY)
    assert (config.optimizer, config.lr, config.schedule) == ("first-order-adamw", 3e-4, "constant")
    assert why.startswith("auto takes first-order-adamw, learning rate 0.0003: first-order training takes ")


def test_too_little_memory_gives_the_answer_column(pico) -> None:
    config, why = chosen(*pico, LITTLE)
    assert (config.optimizer, config.lr, config.schedule) == ("answer-column", 3e-3, "linear")
    assert "and 1.0 MB are free; it keeps one block's graph at a time." in why
    rate = chosen(*pico, LITTLE, lr=0.02)[0]
    assert (rate.lr, rate.schedule) == (0.02, "constant")  # who names a rate keeps the schedule as well


def test_the_border_is_that_of_the_sentence(pico) -> None:
    model, loss = pico
    _, kept = choose.saved_bytes(loss, model)
    needed = kept + 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    assert chosen(model, loss, int(needed / choose.SHARE) + 8)[0].optimizer == "first-order-adamw"
    assert chosen(model, loss, int(needed / choose.SHARE) - 8)[0].optimizer == "answer-column"


def test_narrow_weights_take_masters_and_adapters_beside_them_do_not() -> None:
    loaded = load_model("pico", dtype="bfloat16")
    prepared = prepare(get("pico_topic"), loaded, train=8, dev=0, test=0, max_length=64)
    loss = BatchLoss(loaded.model, prepared, prepared.train, CPU)
    _, kept = choose.saved_bytes(loss, loaded.model)
    for held in (
        16,
        8,
    ):  # of a weight, a gradient and two moments in float32 beside its master; of an adapter three of these
        needed = kept + held * sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
        if held == 8:
            loaded.model.requires_grad_(False)
            adapter = nn.Parameter(torch.zeros(()))  # in float32, as peft makes them
            loaded.model.register_parameter("adapter", adapter)
            needed = choose.saved_bytes(scaled := lambda: loss() * adapter.exp(), loaded.model)[1] + 12
        given = loaded.model, loss if held == 16 else scaled
        assert chosen(*given, int(needed / choose.SHARE) + 8, dtype="bfloat16")[0].optimizer == "first-order-adamw"
        assert chosen(*given, int(needed / choose.SHARE) - 8, dtype="bfloat16")[0].optimizer != "first-order-adamw"


@pytest.mark.parametrize(
    ("dtype", "precision", "wanted"),
    [
        ("float32", "autocast", "first-order-adamw"),
        ("float32", "in-place", "first-order-adamw"),
        ("bfloat16", "in-place", "answer-column"),
        ("bfloat16", "compensated-16", "answer-column"),
        ("bfloat16", "master", "first-order-adamw"),
    ],
)
def test_a_precision_that_first_order_training_has_not_leads_on(dtype: str, precision: str, wanted: str) -> None:
    loaded = load_model("pico", dtype=dtype)
    prepared = prepare(get("pico_topic"), loaded, train=8, dev=0, test=0, max_length=64)
    loss = BatchLoss(loaded.model, prepared, prepared.train, CPU)
    config, why = chosen(loaded.model, loss, PLENTY, dtype=dtype, precision=precision)
    assert config.optimizer == wanted and (f"`precision` {precision} " in why) == (wanted == "answer-column")
    metazo.finetune("pico", "pico_topic", optimizer="auto", dtype=dtype, precision=precision, steps=1, keep="last",
                    batch_size=4, train_examples=4, dev_examples=0, test_examples=0, max_length=64)  # fmt: skip


def test_a_loss_without_a_gradient_is_probed(pico) -> None:
    model, loss = pico
    config, why = chosen(model, lambda: float(loss().detach()), PLENTY)
    assert (config.optimizer, config.scale) == ("mezo", "rms") and "the loss has no gradient" in why
    assert config.lr == pytest.approx(500 / sum(p.numel() for p in model.parameters()), rel=0.5)
    assert chosen(model, lambda: loss().detach(), PLENTY)[0].optimizer == "mezo"
    config, _ = chosen(model, lambda: float(loss().detach()), PLENTY, lora=4)
    assert (config.optimizer, config.scale) == ("mezo", "none"), "half of LoRA's factors are zeros"


def test_a_model_without_blocks_is_probed_if_first_order_does_not_fit() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    loss = lambda: net(torch.ones(2, 4)).square().mean()  # noqa: E731
    assert chosen(net, loss, PLENTY)[0].optimizer == "first-order-adamw"
    config, why = chosen(net, loss, 100)
    assert config.optimizer == "mezo" and "feedback cannot be had (Sequential" in why


def test_a_head_alone_is_cheap_by_first_order(tiny) -> None:
    loaded = load_model(tiny("bert"), kind="classifier", num_labels=3)
    model = loaded.model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    ids = torch.randint(5, 100, (8, 30))

    def loss() -> torch.Tensor:
        return model(input_ids=ids).logits.square().mean()

    needed = choose.saved_bytes(loss, model)[1]
    assert chosen(model, loss, 4 * needed + 20_000)[0].optimizer == "first-order-adamw"
    model.requires_grad_(True)
    assert chosen(model, loss, 4 * needed + 20_000)[0].optimizer == "answer-column"


COMMON = {
    "steps": 4, "batch_size": 4, "train_examples": 16, "dev_examples": 8, "test_examples": 8, "max_length": 64,
    "eval_every": 2, "snapshot_every": 2,
}  # fmt: skip


def header(out: Path) -> dict:
    return json.loads((out / "steps.jsonl").read_text().splitlines()[0])


def test_a_run_records_what_was_taken_as_if_it_had_been_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(choose, "free_memory", lambda device: LITTLE)
    shown = io.StringIO()
    run_settings(settings(**COMMON, out=tmp_path / "auto"), Console(file=shown))
    assert "auto takes answer-column" in " ".join(shown.getvalue().split())
    taken = {"optimizer": "answer-column", "lr": 3e-3, "schedule": "linear"}
    named = settings(**COMMON, **taken, out=tmp_path / "named")
    run_settings(named, Console(quiet=True))
    assert header(tmp_path / "auto") == header(tmp_path / "named")
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("auto", "named"))
    assert one["test"] == two["test"] and one["optimizer"] == "answer-column"


def test_a_run_goes_on_with_what_it_began_with(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(choose, "free_memory", lambda device: LITTLE)
    stop = {"count": 0}

    def on_step(step) -> None:
        stop["count"] += 1
        if stop["count"] == 3:
            raise KeyboardInterrupt

    how = {**COMMON, "optimizer": "auto", "out": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        metazo.finetune("pico", "pico_topic", on_step=on_step, **how)
    monkeypatch.setattr(choose, "free_memory", lambda device: PLENTY)  # first-order would fit by now
    again = metazo.finetune("pico", "pico_topic", resume=True, **how)
    assert again.summary["optimizer"] == "answer-column" and again.summary["steps"] == 4


def test_settings_of_a_method_need_a_method() -> None:
    for changes in ({"tuner": "auto"}, {"scale": "rms"}, {"rule": "adam"}, {"method": {"rank": 2}}):
        with pytest.raises(UserError, match="`optimizer` is auto, which chooses the method, so `\\w+` cannot be set"):
            choose.check_open(settings(**changes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dry_run_chooses_as_the_run_does_if_first_order_does_not_fit(dtype: str, monkeypatch) -> None:
    """Without numbers: the positions with an error are not known."""
    given = settings(**COMMON, dtype=dtype, out=Path("nowhere"))
    for module in (choose, dryrun):
        monkeypatch.setattr(module, "free_memory", lambda device: 8_000_000)
    found = dryrun.dry_run(given)
    assert "auto takes answer-column" in found["optimizer"] and not any("not known" in note for note in found["notes"])
