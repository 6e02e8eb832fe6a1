"""Objectives: metrics on a batch against evaluation, generation in one call, functions of the user, refusals."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from statistics import fmean

import pytest
import torch

import metazo
from metazo.errors import UserError
from metazo.models.load import load_model
from metazo.optimizers import METHODS
from metazo.runs.choose import choose
from metazo.runs.config import FinetuneConfig
from metazo.runs.dryrun import dry_run
from metazo.runs.finetune import run_settings
from metazo.runs.replay import replay
from metazo.runs.setup import set_up
from metazo.settings import build
from metazo.tasks import get, prepare
from metazo.tasks.closures import BatchLoss
from metazo.tasks.evaluate import evaluate, generate
from metazo.tasks.objectives import AnswerBatch, Minimised, find
from metazo_cli.main import main

CPU = torch.device("cpu")
SIZES = {
    "steps": 4, "batch_size": 4, "train_examples": 16, "dev_examples": 2, "test_examples": 2, "max_length": 64,
    "eval_every": 2, "snapshot_every": 2, "lr": 1e-3, "eps": 1e-2,
}  # fmt: skip
CODE = """
def length(model, batch):
    return sum(len(text) for text in batch.answers(model)) / len(batch)


def broken(model, batch):
    return batch.nothing


def pair(model, batch):
    return [1.0, 2.0]
"""


@pytest.fixture(scope="module")
def ready():
    loaded = load_model("pico")
    names = {"classification": "pico_topic", "choice": "pico_cause", "generation": "pico_span"}
    return loaded, {kind: prepare(get(name), loaded, train=8, dev=12, test=0) for kind, name in names.items()}


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(CODE)
    return path


@pytest.mark.parametrize(
    ("kind", "name", "metric"),
    [
        ("classification", "accuracy", "accuracy"),
        ("classification", "f1", "macro_f1"),
        ("classification", "mcc", "mcc"),
        ("choice", "accuracy", "accuracy"),
        ("generation", "f1", "f1"),
        ("generation", "exact-match", "exact_match"),
    ],
)
def test_a_metric_as_objective_is_one_minus_that_of_evaluation(ready, kind: str, name: str, metric: str) -> None:
    """The whole dev split as one batch gives what `evaluate` says of it."""
    loaded, prepared = ready
    prepared, objective = prepared[kind], find(name, kind)
    expected = 1 - evaluate(loaded.model, prepared, "dev", metrics=[metric])[metric]
    value = BatchLoss(loaded.model, Minimised(prepared, objective), prepared.dev, CPU)()
    assert float(value) == pytest.approx(expected, abs=1e-12) and not value.requires_grad


def test_answers_are_generated_in_one_call(ready, monkeypatch) -> None:
    loaded, prepared = ready
    batch, calls = AnswerBatch(prepared["generation"], prepared["generation"].dev), []
    alone = [generate(loaded.model, prepared["generation"], [each])[0] for each in batch.examples]
    own = loaded.model.generate
    monkeypatch.setattr(loaded.model, "generate", lambda **kw: calls.append(len(kw["input_ids"])) or own(**kw))
    assert batch.answers(loaded.model) == alone and calls == [12]
    assert [loaded.tokenizer(text)["input_ids"] for text in batch.prompts] == [each.ids for each in batch.examples]
    assert all(batch.accepted)
    assert batch.loss(loaded.model).item() == pytest.approx(
        evaluate(loaded.model, prepared["generation"], "dev")["loss"], rel=1e-5
    )


def test_a_step_is_the_two_point_estimate_of_the_objective(ready) -> None:
    """The recorded losses are the objective at theta + eps z and theta - eps z, and the coefficient their slope."""
    loaded, prepared = ready
    data = Minimised(prepared["classification"], find("accuracy", "classification"))
    closure = BatchLoss(loaded.model, data, prepared["classification"].dev, CPU)
    optimizer = metazo.MeZO(loaded.model.named_parameters(), lr=0.0, eps=0.05, seed=2)
    optimizer.step(closure)
    step = optimizer.last_step
    assert step is not None and step.coefficients[0] == pytest.approx((step.losses[0] - step.losses[1]) / 0.1, abs=1e-6)
    assert all(12 * loss == pytest.approx(round(12 * loss), abs=1e-6) for loss in step.losses)  # 12 rows


def test_a_function_is_minimised_resumed_and_replayed_bit_for_bit(tmp_path: Path, module: Path) -> None:
    settings = {**SIZES, "objective": f"{module}:length"}

    class Stop(Exception):
        pass

    def stop(step) -> None:
        if step.step == 2:
            raise Stop

    whole = metazo.finetune("pico", "pico_span", out=tmp_path / "whole", **settings)
    assert whole.summary["objective"] == settings["objective"]
    with pytest.raises(Stop):
        metazo.finetune("pico", "pico_span", out=tmp_path / "cut", on_step=stop, **settings)
    again = metazo.finetune("pico", "pico_span", out=tmp_path / "cut", resume=True, **settings)
    assert again.summary["test"] == whole.summary["test"] and "objective" in whole.summary["test"]
    logs = [(tmp_path / name / "steps.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1] and len(json.loads(logs[0].splitlines()[0])["objective"]) == 64
    module.unlink()  # a replay does not need it
    assert replay(tmp_path / "whole" / "steps.jsonl", "pico").identical


def test_a_changed_module_is_refused_on_resuming(tmp_path: Path, module: Path) -> None:
    def stop(step) -> None:
        raise KeyboardInterrupt

    settings = {**SIZES, "objective": f"{module}:length", "out": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        metazo.finetune("pico", "pico_span", on_step=stop, **settings)
    module.write_text(CODE + "\n# another\n")
    with pytest.raises(UserError, match="the file of its `objective` has changed"):
        metazo.finetune("pico", "pico_span", resume=True, **settings)


def test_a_relative_module_is_found_from_another_directory(tmp_path: Path, module: Path, monkeypatch) -> None:
    def stop(step) -> None:
        raise KeyboardInterrupt

    settings = {**SIZES, "objective": "rewards.py:length", "out": tmp_path / "run"}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        metazo.finetune("pico", "pico_span", on_step=stop, **settings)
    (tmp_path / "moved").mkdir()
    monkeypatch.chdir(module.rename(tmp_path / "moved/rewards.py").parent)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    again = settings | {"resume": True, "objective": "../moved/rewards.py:length"}
    with pytest.raises(UserError, match="`objective` was 'rewards.py:length' when"):
        metazo.finetune("pico", "pico_span", **again | {"objective": "../moved/rewards.py:broken"})
    assert dry_run(build(FinetuneConfig, {"model": "pico", "task": "pico_span"}, again))["steps left"] == 3
    assert metazo.finetune("pico", "pico_span", **again).summary["objective"] == "rewards.py:length"


@pytest.mark.parametrize("where", ["absolute", "moved"])
def test_code_that_the_folder_of_a_run_names_is_executed_only_if_the_user_names_it(
    where: str, tmp_path: Path, module: Path, monkeypatch, capsys
) -> None:
    """A stranger's folder brings a file: no dry run and no resumed run imports it, until it is named."""

    def stop(step) -> None:
        raise KeyboardInterrupt

    run, code = tmp_path / "run", tmp_path / "run/evil.py"
    named = f"{code}:length" if where == "absolute" else "run/evil.py:length"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        metazo.finetune("pico", "pico_span", objective=f"{module}:length", out="run", on_step=stop, **SIZES)
    code.write_text(module.read_text() + "open('executed', 'w')\n")
    config = json.loads((run / "config.json").read_text())
    config |= {"objective": named, "out": "run", "started_in": "/nowhere" if where == "moved" else str(tmp_path)}
    (run / "config.json").write_text(json.dumps(config))
    (run / "steps.jsonl").unlink()  # as if the run had been stopped before its first step
    (run / "metrics.jsonl").unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path.parent)
    resume = ["--resume", str(run)]
    for words in (["--dry-run", *resume], resume, [*resume, "--objective", f"{code}:length"]):
        monkeypatch.setattr("sys.argv", ["metazo", "finetune", *words])
        with pytest.raises(SystemExit) as end, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main()
        refused = words == resume
        assert end.value.code == (2 if refused else 0) and Path("executed").exists() == ("--objective" in words)
        said = " ".join(capsys.readouterr().err.split())
        assert ("executes code only if you name it yourself" in said and "add --objective" in said) == refused
    Path("executed").unlink()


def test_a_dry_run_looks_at_the_code_and_does_not_execute_it(tmp_path: Path) -> None:
    path, sizes = tmp_path / "own.py", {"steps": 2, "train_examples": 8, "dev_examples": 4, "test_examples": 4}
    path.write_text("def plain(m, b):\n    return 0.0\n\n\nother = plain\nraise SystemExit('executed')\n")
    for name in ("plain", "other"):
        assert "memory" in dry_run(FinetuneConfig("pico", "pico_topic", objective=f"{path}:{name}", **sizes))
    with pytest.raises(UserError, match=r"own\.py has no function 'missing'; its functions are plain\."):
        dry_run(FinetuneConfig("pico", "pico_topic", objective=f"{path}:missing", **sizes))
    path.write_text("def plain(:")
    with pytest.raises(UserError, match=r"own\.py is no Python \(invalid syntax"):
        dry_run(FinetuneConfig("pico", "pico_topic", objective=f"{path}:plain", **sizes))
    with pytest.raises(UserError, match="`objective` 'gone.py:f': the file gone.py is not a file"):
        dry_run(FinetuneConfig("pico", "pico_topic", objective="gone.py:f", **sizes))


@pytest.mark.parametrize("optimizer", [name for name, cls in METHODS.items() if cls.needs_gradient])
def test_methods_that_need_a_gradient_refuse(optimizer: str) -> None:
    with pytest.raises(UserError, match=f"`optimizer` {optimizer} needs the gradient of the loss, and `objective` acc"):
        set_up(FinetuneConfig("pico", "pico_topic", optimizer=optimizer, objective="accuracy", **SIZES))


def test_the_methods_that_need_a_gradient_are_those_that_are_not_replayable() -> None:
    assert {name for name, cls in METHODS.items() if cls.needs_gradient} >= {
        "first-order-adamw",
        "answer-column",
        "feedback",
    }
    assert all(cls.needs_gradient != cls.replayable for cls in METHODS.values())


def test_auto_probes(ready) -> None:
    loaded, prepared = ready
    data = Minimised(prepared["classification"], find("accuracy", "classification"))
    config = FinetuneConfig("pico", "pico_topic", optimizer="auto", objective="accuracy")
    taken, why = choose(config, loaded.model, BatchLoss(loaded.model, data, data.train[:2], CPU), CPU, 10**12)
    assert (taken.optimizer, taken.scale) == ("mezo", "rms") and "the loss has no gradient" in why


def test_the_best_weights_are_those_of_the_objective(monkeypatch) -> None:
    """On dev, the record with the lowest objective is kept, whatever the loss says."""

    def closeness(model, batch: AnswerBatch) -> float:
        return -fmean(len(text) for text in batch.answers(model))

    settings = {**SIZES, "lr": 0.03, "eps": 0.1, "steps": 6, "eval_every": 1, "dev_examples": 6, "scale": "rms"}
    tuned = metazo.finetune("pico", "pico_span", objective=closeness, **settings)
    lowest = min(record["dev"]["objective"] for record in tuned.evaluations)
    assert tuned.summary["dev"]["objective"] == lowest and len({r["dev"]["objective"] for r in tuned.evaluations}) > 1
    assert tuned.summary["objective"] == "memory:closeness"


@pytest.mark.parametrize("optimizer", ["lozo", "mezo-svrg", "eggroll"])
def test_methods_that_would_batch_their_probes_generate_in_turn(optimizer: str) -> None:
    """LOZO's and EGGROLL's vectorised pass cannot hold a generation, and falls back; SVRG needs the mean over all rows."""
    method = {"population": 4} if optimizer == "eggroll" else {}
    settings = {
        **SIZES,
        "steps": 2,
        "snapshot_every": 0,
        "eval_every": 2,
        "probing": "auto" if not method else "method",
    }
    if optimizer == "mezo-svrg":
        settings["probing"] = "method"
    tuned = metazo.finetune("pico", "pico_span", optimizer, objective="f1", **settings, **method)
    assert all(0 <= loss <= 1 for step in tuned.steps for loss in step.losses)


def test_wrong_objectives_are_one_sentence(module: Path) -> None:
    for name, said in (
        ("exact-match", "is no metric of a classification task; choose accuracy, macro-f1, mcc, or name a function"),
        ("nothing.py:f", r"nothing\.py cannot be imported: FileNotFoundError"),
        (f"{module}:missing", "has no function 'missing'; its functions are length, broken, pair"),
        (f"{module}:broken", r"failed in line 7 of rewards\.py: AttributeError"),
        (f"{module}:pair", "`objective` .*:pair returned a list of 2"),
    ):
        with pytest.raises(UserError, match=said):
            run_settings(FinetuneConfig("pico", "pico_topic", objective=name, **SIZES))
    with pytest.raises(UserError, match="`objective` cannot be combined with `loss`"):
        metazo.finetune(torch.nn.Linear(1, 1), loss=lambda m, b: 0.0, data=[1], objective="accuracy")
    with pytest.raises(UserError, match="`objective` memory:nan is nan before the first step"):
        metazo.finetune("pico", "pico_topic", objective=_nan, **SIZES)


def _nan(model, batch) -> float:
    return float("nan")


_nan.__name__ = "nan"


@pytest.mark.filterwarnings("ignore")
def test_a_function_that_fails_in_mid_run_leaves_the_steps_and_says_how_to_continue(tmp_path: Path) -> None:
    path, settings = tmp_path / "late.py", {**SIZES, "max_bad_steps": 1}
    for name, value, words in (
        (
            "fails",
            "1 / 0",
            "late.py: ZeroDivisionError: division by zero. The steps before are in the log: continue with",
        ),
        (
            "nan",
            "float('nan')",
            "every module of the model gives finite values, so it comes from the loss, or the objective",
        ),
    ):
        path.write_text(
            f"calls = []\ndef {name}(model, batch):\n    print('seen')\n    calls.append(1)\n"
            f"    return {value} if len(calls) > 30 else 1.0 + len(calls) % 2\n"
        )
        with pytest.raises(UserError, match=words):
            metazo.finetune(
                "pico", "pico_span", objective=f"{path}:{name}", out=tmp_path / name, **settings | {"steps": 40}
            )
        assert len((tmp_path / name / "steps.jsonl").read_text().splitlines()) > 2


def test_what_a_function_prints_is_not_in_the_json(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "loud.py").write_text("def loud(model, batch):\n    print('HEARD')\n    return len(batch) + 0.0\n")
    flags = [part for key, value in SIZES.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    words = ["--model", "pico", "--task", "pico_span", "--objective", f"{tmp_path}/loud.py:loud", "--json", *flags]
    monkeypatch.setattr("sys.argv", ["metazo", "finetune", *words, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
    said = capsys.readouterr()
    assert end.value.code in (0, None) and json.loads(said.out)["steps"] == 4 and "HEARD" in said.err
