"""The policy for narrow weights follows the free memory, is said, and is kept by a resumed run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from metazo.errors import UserError
from metazo.models.skeleton import skeleton
from metazo.runs import fit_precision as module
from metazo.runs.config import FinetuneConfig
from metazo.runs.dryrun import assumed_loss
from metazo.runs.fit_precision import fit_precision
from metazo.steplog.format import scan

RUN = {
    "batch_size": 4, "steps": 3, "train_examples": 8, "dev_examples": 4, "test_examples": 0, "eval_every": 3, "lr": 1e-4,
    "dtype": "bfloat16", "keep": "last",
}  # fmt: skip


@pytest.fixture(scope="module")
def bare():
    return skeleton("pico", dtype="bfloat16")


# Free bytes per weight beside the 2 of the weights. Activations and the copy of the largest tensor take less than 0.9.
@pytest.mark.parametrize(
    ("free", "taken"), [(6.0, "master"), (4.2, "compensated-16"), (2.4, "compensated-8"), (0.5, "compensated-8")]
)
def test_the_most_exact_policy_that_fits(bare, free: float, taken: str) -> None:
    weights = sum(p.numel() for p in bare.model.parameters())
    config = FinetuneConfig("pico", "pico_sentiment", dtype="bfloat16")
    found, why = fit_precision(config, bare.model, assumed_loss(bare, 1, 4), round(free * weights))
    assert found.precision == taken and why is not None and why.startswith(taken)
    assert ("adapter" in why) == (free == 0.5)


def test_probes_that_are_evaluated_together_have_activations_each(bare) -> None:
    """EGGROLL's 32 probes need 31 forward passes more than the same probes in turn."""
    needed = {
        probing: module._needed(
            FinetuneConfig("pico", "pico_sentiment", optimizer="eggroll", precision="master", probing=probing),
            bare.model,
            10**6,
        )
        for probing in ("together", "in-turn")
    }
    assert needed["together"] - needed["in-turn"] == 31 * 10**6 + 8  # and the choice itself, which is state


def test_nothing_is_chosen_for_wide_weights_or_a_named_policy(bare) -> None:
    named = FinetuneConfig("pico", "pico_sentiment", dtype="bfloat16", precision="master")
    assert fit_precision(named, bare.model, assumed_loss(bare, 1, 4), 0) == (named, None)
    wide = FinetuneConfig("pico", "pico_sentiment")
    model = skeleton("pico").model
    assert fit_precision(wide, model, lambda: None, 0) == (wide, None)


def test_a_compensation_of_wide_weights_is_refused_unless_its_run_has_begun(tmp_path: Path) -> None:
    model = skeleton("pico").model
    config = FinetuneConfig("pico", "pico_sentiment", precision="compensated-8", out=tmp_path, resume=True)
    with pytest.raises(UserError, match="`precision` compensated-8 .* the trained weights are float32"):
        fit_precision(config, model, lambda: None, 0)
    (tmp_path / "steps.jsonl").write_bytes(b"")
    assert fit_precision(config, model, lambda: None, 0) == (config, None)


def test_a_resumed_run_keeps_what_the_log_says(tmp_path: Path, monkeypatch) -> None:
    from metazo import finetune

    monkeypatch.setattr("metazo.runs.setup.free_memory", lambda device: 3_200_000)  # 2 bytes per weight
    run = finetune("pico", "pico_sentiment", out=tmp_path / "run", **RUN)
    header = scan(tmp_path / "run" / "steps.jsonl").header
    assert header["precision"] == header["settings"]["precision"] == "compensated-8"
    (tmp_path / "run" / "summary.json").unlink()
    monkeypatch.setattr("metazo.runs.setup.free_memory", lambda device: 10**12)
    again = finetune("pico", "pico_sentiment", out=tmp_path / "run", resume=True, **RUN)
    assert again.summary["dev"] == run.summary["dev"]
    assert scan(tmp_path / "run" / "steps.jsonl").header["precision"] == "compensated-8"


def test_a_log_from_before_the_choice_keeps_auto(tmp_path: Path, bare, monkeypatch) -> None:
    """Logs of earlier versions say auto, which was a master."""
    old = SimpleNamespace(header={"settings": {"precision": "auto"}})
    (tmp_path / "steps.jsonl").write_bytes(b"")
    monkeypatch.setattr(module, "scan", lambda path: old)
    config = FinetuneConfig("pico", "pico_sentiment", dtype="bfloat16", out=tmp_path, resume=True)
    assert fit_precision(config, bare.model, lambda: None, 0)[0].precision == "auto"


def test_first_order_methods_take_masters_and_runs_that_had_none_are_not_continued(
    tmp_path: Path, bare, monkeypatch
) -> None:
    config = FinetuneConfig("pico", "pico_sentiment", dtype="bfloat16", optimizer="first-order-adamw", out=tmp_path)
    found, why = fit_precision(config, bare.model, lambda: None, 0)
    assert found.precision == "master" and why == "master (float32 master; the weights are its rounding)."
    (tmp_path / "steps.jsonl").write_bytes(b"")
    then = SimpleNamespace(header={"settings": {"precision": "auto"}})
    monkeypatch.setattr(module, "scan", lambda path: then)
    with pytest.raises(UserError, match="earlier version of metazo, in which first-order-adamw had no float32 masters"):
        fit_precision(replace(config, resume=True), bare.model, lambda: None, 0)
    then.header["settings"]["precision"] = "master"
    assert fit_precision(replace(config, resume=True), bare.model, lambda: None, 0)[0].precision == "master"
