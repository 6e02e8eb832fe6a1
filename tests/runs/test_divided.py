"""Runs whose model is divided over processes, as torchrun starts them: they are the runs of one process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from metazo.errors import UserError
from metazo.io.processes import LostRank, joined
from metazo.models.checks import not_finite
from metazo.models.load import load_model
from metazo.runs.config import FinetuneConfig
from metazo.runs.evaluations import _all_finite, _norm, _trained, norm_of
from metazo.runs.finetune import run_settings, tune
from metazo.runs.interrupt import Interrupted
from metazo.runs.replay import replay
from metazo.settings import build
from metazo.steplog.format import scan
from tests import warm
from tests.runs.test_several import _main, _stopped_at

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
    pytest.skip("models in parts need transformers 5.23", allow_module_level=True)

COUNT = 4
SETTINGS: dict[str, Any] = {
    "task": "pico_sentiment", "steps": 3, "batch_size": 6, "train_examples": 8, "dev_examples": 5,
    "test_examples": 2, "eval_batch_size": 8, "eval_every": 3, "lr": 1e-4, "rank_timeout": 250.0,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "both": {"tensor_parallel": 2, "fsdp": 2, "steps": 4, "eval_every": 2},
    "sharded": {"fsdp": 4, "optimizer": "lozo", "method": {"interval": 2}, "scale": "rms"},
    "svrg": {"fsdp": 4, "optimizer": "mezo-svrg", "method": {"interval": 2}, "batch_size": 4},
    "bfloat16": {"tensor_parallel": 2, "fsdp": 2, "dtype": "bfloat16"},
    "eggroll": {"fsdp": 4, "optimizer": "eggroll", "method": {"population": 4}},
    "fzoo": {"fsdp": 4, "optimizer": "fzoo", "method": {"rank": 1, "queries": 2}, "lr": 1e-8},
}
"""Settings by the name of the run; those of one process are the same without the division."""
LOSSES = 2e-5  # the order of the sums within matrix products differs; in bfloat16 the logits do
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "product": (
        {"tensor_parallel": 2},
        "there are 4 processes: start torchrun with 2, or choose numbers whose product",
    ),
    "adapter": ({"fsdp": 4, "adapter": "lora"}, "`adapter` cannot be used together with `fsdp`"),
    "method": (
        {"fsdp": 4, "optimizer": "loren", "method": {"compat": "official"}},
        "loren computes with whole tensors",
    ),
    "together": (
        {"fsdp": 4, "optimizer": "eggroll", "probing": "together"},
        "`probing` together replaces calls of torch functions",
    ),
    "heads": ({"model": "pico", "tensor_parallel": 4}, "`tensor_parallel` is 4 and pico has num_attention_heads 5"),
}


def _config(out: Path, base: Path, /, **settings: Any) -> FinetuneConfig:
    return build(FinetuneConfig, {**SETTINGS, "model": str(base), **settings, "out": out})


def _waiting() -> set[float]:
    """Seconds that the groups of processes wait."""
    from torch.distributed.distributed_c10d import _world

    backends = [group._get_backend(torch.device("cpu")) for group in _world.pg_map]
    return {backend.options._timeout.total_seconds() for backend in backends}


def _looked_at(rank: int, model: Path) -> tuple[float, float, list[bool], list[str]]:
    """The norm of the weights of a divided model from its parts, that from whole tensors, whether all are finite before and
    after the part of one process holds NaN, which other processes have too, and what is said of it then."""
    with joined(250, tensors=True):
        found = load_model(model, tensor_parallel=2, fsdp=2).model
        norms = _norm(found), norm_of(_trained(found))
        finite = [_all_finite(found)]
        if rank == 2:
            with torch.no_grad():
                found.model.layers[1].input_layernorm.weight.to_local().fill_(torch.nan)
        return *norms, [*finite, _all_finite(found)], not_finite(found)


def _process(rank: int, folder: Path, model: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    said: dict[str, Any] = {}
    for name, settings in RUNS.items():
        os.environ["MASTER_PORT"] = str(ports.pop())
        tune(
            _config(folder / name, model, **settings),
            on_evaluation=lambda _: said.update(waiting=_waiting()),
            plot=False,
        )
    os.environ["MASTER_PORT"] = str(ports.pop())
    with pytest.raises(Interrupted):
        tune(
            _config(folder / "stopped", model, **RUNS["both"]),
            on_step=_stopped_at(2, signal.SIGTERM) if rank == 1 else None,
        )
    os.environ["MASTER_PORT"] = str(ports.pop())
    said["resumed"] = _main(["finetune", "--resume", str(folder / "stopped")])
    for name, (settings, _) in REFUSED.items():
        os.environ["MASTER_PORT"] = str(ports.pop())
        try:
            tune(_config(folder / name, model, **settings), plot=False)
        except UserError as error:
            said[name] = str(error)
    os.environ["MASTER_PORT"] = str(ports.pop())
    said["looked at"] = _looked_at(rank, model)
    torch.save(said, folder / f"{rank}.pt")
    os.environ["MASTER_PORT"] = str(ports.pop())
    try:
        tune(
            _config(folder / "killed", model, **RUNS["both"]),
            on_step=_stopped_at(2, signal.SIGKILL) if rank == 3 else None,
        )
    except LostRank as error:
        torch.save(said | {"killed": str(error)}, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Path:
    return tiny("llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("divided")
    with warm.meetings(18) as ports:
        warm.ranks(_process, folder, model, ports, count=COUNT, killed=3)
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(COUNT)]


@pytest.mark.parametrize("name", RUNS)
def test_a_divided_run_is_the_run_of_one_process(folder, model, tmp_path, name):
    one = {key: value for key, value in RUNS[name].items() if key not in ("tensor_parallel", "fsdp")}
    run_settings(_config(tmp_path / "one", model, **one))
    logs = [scan(out / "steps.jsonl") for out in (folder / name, tmp_path / "one")]
    assert logs[0].header["weights"] == logs[1].header["weights"]
    assert logs[0].header["architecture"] == logs[1].header["architecture"]
    for ours, theirs in zip(logs[0].steps, logs[1].steps, strict=True):
        assert ours.seeds == theirs.seeds
        assert ours.losses == pytest.approx(theirs.losses, abs=0.06 if name == "bfloat16" else LOSSES)
    weights = [load_file(out / "model" / "model.safetensors") for out in (folder / name, tmp_path / "one")]
    assert weights[0].keys() == weights[1].keys()
    for key, value in (
        weights[0].items() if name != "bfloat16" else ()
    ):  # whose differences of losses are those of rounding
        torch.testing.assert_close(value, weights[1][key], rtol=0, atol=1e-5)
    saved = [json.loads((out / "model" / "config.json").read_text()) for out in (folder / name, tmp_path / "one")]
    assert saved[0] == saved[1]


@pytest.mark.parametrize("name", RUNS)
def test_one_process_replays_the_log_of_a_divided_run_bit_for_bit(folder, model, tmp_path, name):
    replay(folder / name / "steps.jsonl", str(model), tmp_path / "again")
    saved, again = (load_file(out / "model.safetensors") for out in (folder / name / "model", tmp_path / "again"))
    assert all(value.equal(again[key]) for key, value in saved.items())


def test_every_exchange_of_a_divided_run_waits_as_long_as_the_run_says(said):
    assert all(each["waiting"] == {SETTINGS["rank_timeout"]} for each in said)


def test_a_divided_model_is_looked_at_in_its_parts(said):
    for norm, whole, finite, notes in (each["looked at"] for each in said):
        assert norm == pytest.approx(whole, rel=1e-6) and finite == [True, False]
        assert [note.split(" hold")[0] for note in notes] == [
            "1 of 21 tensors of the model"
        ] and "input_layernorm" in notes[0]
    assert len({each["looked at"][0] for each in said}) == 1


def test_a_divided_run_that_was_stopped_goes_on_bit_for_bit(folder, said):
    code, told = said[0]["resumed"]
    assert code == 0 and "Resuming after step 3" in told
    assert scan(folder / "stopped" / "steps.jsonl").steps == scan(folder / "both" / "steps.jsonl").steps
    saved, whole = (load_file(folder / name / "model" / "model.safetensors") for name in ("stopped", "both"))
    assert all(value.equal(whole[key]) for key, value in saved.items())


def test_a_dead_process_ends_a_divided_run_with_one_sentence(folder, said):
    for each in said[:3]:
        assert each["killed"].startswith("Another process of this run has ended") and "--resume" in each["killed"]
    assert len(scan(folder / "killed" / "steps.jsonl").steps) >= 1


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_divided_run_cannot_have_is_refused_on_all_processes(folder, said, name):
    assert all(REFUSED[name][1] in each[name] for each in said), [each[name] for each in said]
    assert not (folder / name / "config.json").exists()


def test_one_process_cannot_divide_a_model(model, tmp_path):
    with pytest.raises(UserError, match="there is one process: start torchrun with 2"):
        run_settings(_config(tmp_path / "run", model, tensor_parallel=2))
