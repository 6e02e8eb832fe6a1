"""evaluate: a run's model on the run's own rows, and no row that a model was trained on."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import metazo
from metazo.errors import UserError
from metazo.models.load import load_model
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.measure import evaluate
from metazo.settings import build
from metazo.steplog.format import line, scan
from metazo.tasks import evaluate as scoring
from metazo.tasks import prepare, resolve

BASE = ["pico"]


@pytest.fixture(scope="module", autouse=True)
def base(tiny) -> None:
    """The runs are of a model of two layers."""
    BASE[0] = str(tiny("llama"))


@pytest.fixture(scope="module")
def coin(tmp_path_factory) -> Path:
    """A task of 300 different texts."""
    folder, flip = tmp_path_factory.mktemp("coin"), random.Random(0)
    rows = [
        {"text": f"note {number} says {flip.randrange(10**6)}", "label": flip.randrange(2)} for number in range(300)
    ]
    (folder / "coin.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "coin.yaml").write_text(
        "name: coin\nkind: classification\nprompt: '{text}. It was {}.'\nlabels: [terrible, great]\n"
        "files: {train: coin.jsonl}\n"
    )
    return folder / "coin.yaml"


def run(task: Path, out: Path, **extra) -> dict:
    settings = {
        "model": BASE[0], "task": str(task), "out": out, "optimizer": "first-order-adamw", "lr": 1e-3, "steps": 4,
        "eval_every": 4, "train_examples": 200, "dev_examples": 40, "test_examples": 40, "keep": "last",
        "max_length": 64, "eval_batch_size": 16, "snapshot_every": 0,
    }  # fmt: skip
    return run_settings(build(FinetuneConfig, settings, extra))


@pytest.fixture(scope="module")
def learned(coin, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("learned") / "run"
    return out, run(coin, out)


def test_a_run_is_scored_on_its_own_rows(learned):
    out, summary = learned
    assert evaluate(out) == evaluate(out / "model") == summary["test"]
    assert evaluate(out, split="dev") == summary["dev"]


def test_a_task_that_has_changed_since_the_run_is_said(coin, tmp_path):
    task, rows, said = tmp_path / "coin.yaml", tmp_path / "coin.jsonl", []
    task.write_text(coin.read_text())
    rows.write_text((coin.parent / "coin.jsonl").read_text())
    run(task, tmp_path / "run", steps=1)
    evaluate(tmp_path / "run", say=said.append)
    assert said == []
    rows.write_text(rows.read_text().replace("note 1", "page 1"))
    evaluate(tmp_path / "run", say=said.append)
    assert said.pop().startswith("The task coin has changed since the run (its rows are others")
    evaluate(tmp_path / "run", examples=9, say=said.append)  # others are asked for
    assert not any("changed" in note for note in said)
    task.write_text(task.read_text().replace("It was", "It is"))
    evaluate(tmp_path / "run", examples=9, say=said.append)
    assert "(prompt was '{text}. It was {}.' and is '{text}. It is {}.' now)" in said[-1]


def test_a_run_is_scored_with_its_own_attention(coin, tmp_path, monkeypatch):
    run(coin, tmp_path / "run", attn_implementation="eager", steps=1)
    seen, real = [], scoring.evaluate
    monkeypatch.setattr(scoring, "evaluate", lambda model, *a, **k: seen.append(model) or real(model, *a, **k))
    evaluate(tmp_path / "run")
    evaluate(tmp_path / "run", attn_implementation="sdpa")
    assert [model.config._attn_implementation for model in seen] == ["eager", "sdpa"]


def ids(examples: list) -> set[tuple[int, ...]]:
    return {tuple(example.ids) for example in examples}


def test_no_sizes_bring_training_rows_into_a_split(learned, coin, tmp_path, monkeypatch):
    """Given sizes and seed override the run's: rows that were trained on are left out, also for runs of adapters."""
    out, _ = learned
    adapters = tmp_path / "lora"
    run(coin, adapters, lora=2)
    trained = ids(prepare(resolve(str(coin)), load_model(BASE[0]), train=200, dev=40, test=40, max_length=64).train)
    assert len(trained) == 200
    scored, real = [], scoring.evaluate

    def spy(model, prepared, split, **options):
        scored.append(ids(getattr(prepared, split)))
        return real(model, replace(prepared, **{split: getattr(prepared, split)[:4]}), split, **options)

    monkeypatch.setattr(scoring, "evaluate", spy)
    for folder in (out, adapters, out / "model"):
        for given in ({"examples": 1000}, {"examples": 1000, "seed": 5}, {"train_examples": 10, "examples": 90}):
            for split in ("dev", "test"):
                evaluate(folder, split=split, **given)
                assert len(scored[-1]) >= 30 and not scored[-1] & trained, (folder, given, split)


def test_a_number_of_examples_that_equals_the_default_is_given(learned):
    out, _ = learned
    assert evaluate(out, examples=1000)["examples"] == evaluate(out, examples=999)["examples"] > 40


def test_a_run_whose_sizes_did_not_fit_is_scored_on_its_own_rows(coin, tmp_path):
    summary = run(coin, tmp_path / "run", train_examples=1000, dev_examples=500, test_examples=1000)
    assert summary["test"]["examples"] == 120
    assert evaluate(tmp_path / "run") == summary["test"]
    assert evaluate(tmp_path / "run", split="dev") == summary["dev"]


def test_a_few_shot_run_is_scored_on_a_task_of_another_kind(coin, tmp_path):
    run(coin, tmp_path / "run", k_per_class=2)
    assert evaluate(tmp_path / "run", "pico_cause", examples=8)["examples"] == 8


def test_other_settings_win_and_notes_are_said(learned, coin, tmp_path):
    out, _ = learned
    assert evaluate(out, examples=10)["examples"] == 10
    assert evaluate(out, "pico_sentiment", examples=10)["examples"] == 10
    copy, said = tmp_path / "copy", []
    shutil.copytree(out, copy)
    shutil.copytree(coin.parent, tmp_path / "data")
    rows = tmp_path / "data" / "coin.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[200:]))
    evaluate(copy, str(tmp_path / "data" / "coin.yaml"), say=said.append)
    assert any("of 200 rows that the model was trained on are not there now" in note for note in said)
    old = scan(copy / "steps.jsonl").header
    del old["trained"], old["split"]
    (copy / "steps.jsonl").write_bytes(line(old, 0)[0])
    evaluate(copy, say=said.append)
    assert "split rows in another way" in said[-1]


def test_a_loaded_model_and_a_task_object(learned):
    loaded, task = load_model("pico"), resolve("pico_sentiment")
    assert evaluate(loaded, task, examples=12) == evaluate("pico", "pico_sentiment", examples=12)


def test_rows_and_a_model_in_memory(coin):
    rows = [json.loads(text) for text in (coin.parent / "coin.jsonl").read_text().splitlines()]
    loaded = load_model("pico")
    there = evaluate(loaded.model, coin, data=rows, tokenizer=loaded.tokenizer, examples=20)
    assert there == evaluate("pico", coin, examples=20)


NOT_READ = {
    "objective": "accuracy", "lora": 4, "adapter": "lora", "optimizer": "hizoo", "steps": 5, "train": ["*"], "merge": True,
    "device_map": "auto", "tensor_parallel": 2, "batches": "by-length", "no_setting": 1,
}  # fmt: skip


@pytest.mark.parametrize("name, value", NOT_READ.items())
def test_settings_that_an_evaluation_does_not_read_are_refused(name, value):
    with pytest.raises(UserError, match=f"`{name}` changes nothing in an evaluation, which reads kind, .*leave it out"):
        evaluate("pico", "pico_sentiment", examples=4, **{name: value})


@pytest.mark.parametrize(
    "name, value", [("dtype", "bfloat16"), ("attn_implementation", "eager"), ("revision", "main"), ("device", "cpu")]
)
def test_settings_of_loading_are_refused_for_a_model_in_memory(name, value):
    with pytest.raises(UserError, match=f"`{name}` cannot be combined with a model in memory"):
        evaluate(load_model("pico"), "pico_sentiment", examples=4, **{name: value})


def test_settings_without_effect_are_said_and_a_folder_of_a_run_may_be_gone(tmp_path):
    said: list[str] = []
    evaluate("pico", "pico_sentiment", examples=4, revision="v2", data=tmp_path, say=said.append)
    assert said == [
        "`revision` changes nothing for the embedded model pico.",
        f"pico_sentiment: its rows are generated, and none are read from {tmp_path}",
    ]
    (tmp_path / "data").mkdir()
    settings = {
        "model": "pico",
        "task": "pico_sentiment",
        "data": tmp_path / "data",
        "out": tmp_path / "run",
        "steps": 1,
    }
    settings |= {"dev_examples": 4, "test_examples": 4, "train_examples": 4}
    summary = run_settings(build(FinetuneConfig, settings))
    (tmp_path / "data").rmdir()
    assert evaluate(tmp_path / "run") == summary["test"]
    (tmp_path / "run" / "summary.json").unlink()
    assert run_settings(build(FinetuneConfig, settings, {"resume": True}))["test"] == summary["test"]
    with pytest.raises(UserError, match="nope does not exist; task 'pico_sentiment' generates its rows"):
        evaluate(tmp_path / "run", data=tmp_path / "nope")


@pytest.mark.parametrize("call", [evaluate, metazo.finetune])
def test_a_tokenizer_beside_a_model_that_has_its_own_is_refused(call):
    loaded = load_model("pico")
    for model in ("pico", loaded):
        with pytest.raises(UserError, match="`tokenizer` needs a transformers model in memory; any other has its own"):
            call(model, "pico_sentiment", tokenizer=loaded.tokenizer)


def test_no_examples_are_refused_by_name():
    with pytest.raises(UserError, match="`examples` must be at least 1, not 0"):
        evaluate("pico", "pico_sentiment", examples=0)
    with pytest.raises(UserError, match="The dev split of task 'pico_sentiment' has no rows here: .* `examples`"):
        evaluate("pico", "pico_sentiment", split="dev", dev_examples=0)


def test_the_size_of_the_split_may_be_given_as_a_setting():
    assert evaluate("pico", "pico_sentiment", test_examples=6)["examples"] == 6


def test_what_cannot_be_evaluated(tmp_path, coin):
    out, gradient = tmp_path / "none", tmp_path / "gradient"
    run(coin, out, keep="none", steps=1, optimizer="mezo")
    again = f"metazo replay .*steps.jsonl --base {BASE[0]} --out FOLDER makes it again"
    with pytest.raises(UserError, match=f"was run with --keep none, so it has no model; {again}"):
        evaluate(out)
    run(coin, gradient, keep="none", steps=1)
    with pytest.raises(UserError, match="the steps of first-order-adamw cannot be replayed, so repeat the run"):
        evaluate(gradient)
    config = out / "config.json"
    config.write_text(config.read_text().replace('"keep": "none"', '"keep": "last"'))
    with pytest.raises(UserError, match=f"has ended and its folder model is gone; {again}"):
        evaluate(out)
    (out / "summary.json").unlink()
    with pytest.raises(
        UserError, match="has not ended, or it diverged.*--resume .*none continues it, or says that .*$"
    ):
        evaluate(out)
    with pytest.raises(UserError, match="`split` 'train'"):
        evaluate("pico", "pico_sentiment", split="train")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="pico is not the folder of a run, whose task could be taken"):
        evaluate("pico")
    with pytest.raises(
        UserError, match="`tokenizer` is missing: give the one with which the model in memory was trained"
    ):
        evaluate(load_model("pico").model, "pico_sentiment")
    with pytest.raises(UserError, match="`model` is a name, .*not None"):
        evaluate(None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="`task` is a name, .*not 5"):
        evaluate("pico", 5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"`task` is a name, .*not \['pico_sentiment', 'pico_topic'\]"):
        evaluate("pico", ["pico_sentiment", "pico_topic"])  # type: ignore[arg-type]


@pytest.mark.parametrize("head", ["prototype", "phrases"])
def test_a_head_that_is_made_from_the_task_is_evaluated_untrained(tmp_path: Path, minilm: Path, head: str) -> None:
    words = {0: ("awful", "boring", "terrible", "bad"), 1: ("great", "wonderful", "lovely", "good")}
    rows = [{"text": f"a {words[n % 2][n % 4]} film number {n}", "label": n % 2} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = "kind: classification\nprompt: '{text}. It was {}.'\nlabels: [terrible, great]\nfiles: {train: rows.jsonl}\n"
    (tmp_path / "own.yaml").write_text(task)
    found = evaluate(minilm, tmp_path / "own.yaml", kind="classifier", head=head, train_examples=20, examples=20)
    assert found["accuracy"] > 0.8 and found["examples"] == 20
    with pytest.raises(UserError, match="no trained head"):
        evaluate(minilm, tmp_path / "own.yaml", kind="classifier")
