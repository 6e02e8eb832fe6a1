"""A learning rate far too high whose losses stay finite: the run reports it, keeps no such weights, and ends with an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import metazo
from metazo.errors import UserError
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.records import GROWN
from metazo.settings import build
from metazo.steplog.format import scan

SMALL: dict[str, Any] = {
    "model": "pico", "task": "pico_sentiment", "steps": 4, "batch_size": 2, "train_examples": 8, "dev_examples": 4,
    "test_examples": 0, "snapshot_every": 0, "eval_every": 2,
}  # fmt: skip


def tune(out: Path, **settings: Any) -> dict[str, Any]:
    return run_settings(build(FinetuneConfig, SMALL, {"out": out, **settings}))


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("lr", [1e3, 1e20])
def test_weights_that_grow_while_the_loss_is_finite(tmp_path: Path, keep: str, lr: float) -> None:
    """pico's norms keep the loss at ln 2 for weights of any size."""
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"norm of the trained weights is .* times that before.* lower `lr`"):
        tune(out, lr=lr, keep=keep)
    assert abs(records(out)[-1]["dev"]["loss"]) < 1
    assert records(out)[-1]["weights_grown"] > lr
    assert not (out / "model").exists() and scan(out / "steps.jsonl").sound()
    assert not (out / "summary.json").exists()


def test_a_loss_far_above_the_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss on dev is .* and was .* before the first step; lower `lr`"):
        tune(tmp_path / "run", optimizer="first-order-adamw", lr=1.0)
    assert "weights_grown" not in records(tmp_path / "run")[-1]


def test_evaluations_of_grown_weights_are_never_the_best(tmp_path: Path) -> None:
    """The rate of LoRA's adapters rises to 1: the first evaluations are good, and one of them is kept with a note."""
    summary = tune(tmp_path / "run", lr=1.0, warmup=40, steps=40, lora=4, merge=True)
    grown = [row["step"] for row in records(tmp_path / "run") if "weights_grown" in row]
    assert grown and 0 < summary["kept_step"] < min(grown)
    assert any("The run diverged: after step 40 the norm" in note for note in summary["notes"])


class Direction(nn.Module):
    """A loss of the direction of its weights alone."""

    def __init__(self, start: float):
        super().__init__()
        self.weights = nn.Parameter(torch.full((8,), start))

    def forward(self, target: torch.Tensor) -> torch.Tensor:
        return 1 - nn.functional.cosine_similarity(self.weights + 1e-9, target, dim=0)


def test_a_module_of_ones_own_may_grow_from_small_weights() -> None:
    """Weights may have any unit; those above 1e6 on average are reported."""
    batches = [torch.arange(1.0, 9.0)] * 4
    loss = lambda module, batch: module(batch)  # noqa: E731
    settings: dict[str, Any] = {"loss": loss, "data": batches, "dev": batches[:1], "steps": 4, "keep": "last"}
    small = Direction(1e-4)
    metazo.finetune(small, optimizer="first-order-sgd", lr=1.0, **settings)
    assert float(small.weights.detach().norm()) > GROWN * 1e-4 * 8**0.5
    with pytest.raises(UserError, match="norm of the trained weights"):
        metazo.finetune(Direction(1.0), optimizer="first-order-sgd", lr=1e20, **settings)
