"""The command line as a user meets it: real processes, exit codes, one sentence per mistake, no incomplete files."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from metazo import zoo
from metazo.errors import UserError
from metazo.feedback.surrogates import MeanJacobian
from metazo.feedback.tuner import FeedbackTuner, describe
from metazo.io.terminal import Console
from metazo.models.identity import BASE, block_weights
from metazo.models.load import load_model
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.tuner_choice import auto_tuner, tuner_of
from metazo.tuner.file import Tuner, TunerInfo
from metazo.tuner.match import BlockSpec
from metazo.tuner.networks import PertNN
from metazo_cli.main import main
from tests import warm

TINY = ("--train-examples=32", "--dev-examples=16", "--test-examples=16", "--steps=2", "--lr=1e-4")


def metazo(*arguments: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = warm.run("metazo", *arguments)
    assert "Traceback" not in done.stderr, done.stderr
    assert not ok or done.returncode == 0, done.stderr
    return done


def refused(*arguments: str) -> str:
    """The one sentence of a call that must end with 2; it runs in this process to save time."""
    errors, before = io.StringIO(), sys.argv
    sys.argv = ["metazo", *arguments]
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as end:
        assert end.code == 2, errors.getvalue()
    else:
        raise AssertionError("it was not refused")
    finally:
        sys.argv = before
    message = " ".join(errors.getvalue().split())
    assert "Traceback" not in message
    return message


def test_a_tuner_that_has_learned_nothing_is_not_offered_for_publishing(tmp_path: Path) -> None:
    how = ("--task=pico_topic", "--objective=published", "--steps=2", "--batch-size=4", "--train-examples=16")
    said = [
        metazo("meta-train", "--model=pico", *how, f"--eps={eps}", f"--out={tmp_path / eps}").stdout
        for eps in ("1e-300", "1e-3")
    ]
    assert "None of the 2 meta-steps moved the networks" in said[0] and "raise --eps (now 1e-300)" in said[0]
    assert ["Publish it" in each for each in said] == [False, True]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A zoo with a tuner for pico, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("meta")
    metazo(
        *("meta-train", "--model=pico", "--task=pico_topic", "--steps=6", "--batch-size=4", "--train-examples=32"),
        f"--out={folder / 'run'}",
    )
    metazo("zoo", "push", str(folder / "run" / "tuner.safetensors"), "--to", str(folder / "zoo"), "--name", "pico")
    return folder / "zoo"


def finetune(out: Path, *extra: str) -> tuple[str, ...]:
    return ("finetune", "--model=pico", "--task=pico_sentiment", f"--out={out}", *TINY, *extra)


def test_auto_takes_the_last_version_of_a_tuner(published, tmp_path):
    mine = tmp_path / "zoo"
    shutil.copytree(published, mine)
    tuner = Tuner.load(next(mine.rglob("*.safetensors")))
    weights = {name: value + 1 for name, value in tuner.pertnn.state_dict().items()}
    tuner.pertnn.load_state_dict(weights)
    (tmp_path / "tuner.safetensors").write_bytes(tuner.to_bytes())
    metazo("zoo", "push", str(tmp_path / "tuner.safetensors"), "--to", str(mine), "--name", "pico")
    model = load_model("pico").model
    config = FinetuneConfig(model="pico", task="pico_topic", tuner="auto", zoo=mine, out=tmp_path / "run")
    found = tuner_of(config, model, zoo.load)
    assert all(torch.equal(weights[name], value) for name, value in found.pertnn.state_dict().items())


def pushed_feedback(model, base: str, zoo_folder: Path, trust: float) -> str:
    """Feedback for the model, all of whose maps have this trust; returns its name."""
    info, width = describe(model, base), model.config.hidden_size
    below = range(len(info.blocks) - 1)
    maps = [{k: torch.ones(*shape) for k in below} for shape in ((width, 1), (1, width))]
    return zoo.push(FeedbackTuner(MeanJacobian(*maps, dict.fromkeys(below, trust)), info), zoo_folder)


def test_auto_takes_the_last_feedback_of_the_first_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("METAZO_ZOO", raising=False)
    model = load_model("pico").model
    for base, folder, trust in (("pico", "zoo", 0.1), ("pico", "zoo", 0.2), ("a/stranger", "hf/metazo/cache", 0.9)):
        pushed_feedback(model, base, tmp_path / folder, trust)
    config = FinetuneConfig("pico", "pico_topic", out=tmp_path / "run", tuner="auto", optimizer="feedback")
    for folder, trust in ((tmp_path / "zoo", 0.2), (None, 0.9)):
        assert tuner_of(replace(config, zoo=folder), model, zoo.load_feedback).maps.trust[0] == pytest.approx(trust)


def test_auto_says_that_a_tuner_is_matched_by_names_alone(tmp_path):
    model = load_model("pico").model
    blocks = [BlockSpec(name, [(name, None)]) for name, _ in model.named_parameters()]
    name = zoo.push(Tuner(PertNN(len(blocks)), TunerInfo("other", blocks)), tmp_path / "zoo")
    card = (tmp_path / "zoo" / name / "card.md").read_text(encoding="utf-8")
    assert "every model with the same tensor names." in card and "names and shapes" not in card
    config = FinetuneConfig("pico", "pico_topic", out=tmp_path / "run", tuner="auto", zoo=tmp_path / "zoo")
    with pytest.warns(UserWarning, match="takes a tuner whose file has no shapes: .* may be for one of another size"):
        auto_tuner(config, model)


@pytest.mark.parametrize("optimizer", ["zo-finetuner", "feedback"])
def test_auto_takes_the_tuner_of_this_very_model(published, tmp_path, optimizer):
    model, folder = load_model("pico").model, tmp_path / "zoo"
    tuner = Tuner.load(next(published.rglob("tuner.safetensors")))
    for base in ("stranger", "pico", "another"):
        zoo.push(replace(tuner, info=replace(tuner.info, base_model=base, recipe={})), folder)
        pushed_feedback(model, base, folder, 0.1)
    config = FinetuneConfig("pico", "pico_topic", out=tmp_path / "run", tuner="auto", zoo=folder, optimizer=optimizer)
    assert auto_tuner(config, model).entry.base_model == "pico"
    given = replace(config, model="memory:LlamaForCausalLM")
    assert auto_tuner(given, load_model("pico").model).entry.base_model == "pico"
    with pytest.warns(UserWarning, match="takes stranger/.*v1, and pico/.*v1, another/.*v1 fit as well"):
        assert auto_tuner(replace(config, model=str(tmp_path)), model).entry.base_model == "stranger"


@pytest.mark.parametrize("optimizer", ["zo-finetuner", "feedback"])
def test_auto_tells_models_of_one_name_apart_by_their_weights(published, tmp_path, optimizer):
    """Two models of one architecture that both lie in a folder called `checkpoint-500`."""
    tuner, models = Tuner.load(next(published.rglob("tuner.safetensors"))), []
    assert tuner.info.recipe[BASE] == block_weights(load_model("pico").model)
    for place in range(3):
        models.append(load_model("pico").model)
        models[-1].model.layers[0].mlp.up_proj.weight.data += place
    for place in (1, 0):
        recipe = {BASE: block_weights(models[place])}
        feedback = zoo.load_feedback(
            pushed_feedback(models[place], "pico", tmp_path / "made", place), tmp_path / "made"
        )
        for item in (tuner, feedback):
            zoo.push(
                replace(item, info=replace(item.info, base_model="checkpoint-500", recipe=recipe)), tmp_path / "zoo"
            )
    model = str(tmp_path / "checkpoint-500")
    config = FinetuneConfig(
        model, "pico_topic", out=tmp_path / "run", tuner="auto", zoo=tmp_path / "zoo", optimizer=optimizer
    )
    for place, version in ((0, "v2"), (1, "v1")):
        assert auto_tuner(config, models[place]).entry.name.endswith(version)
        adapted = get_peft_model(models[place], LoraConfig(target_modules=["q_proj"]))
        if optimizer == "feedback":  # of which adapters of the blocks have their own names
            assert auto_tuner(config, adapted).entry.name.endswith(version)
        adapted.unload()
    with pytest.warns(UserWarning, match="takes checkpoint-500/.*v1, and checkpoint-500/.*v2 fit as well"):
        auto_tuner(config, models[2])
    models[0].bfloat16()  # in which nothing can be compared, and both have the name
    with pytest.warns(UserWarning, match="takes checkpoint-500/.*v2, and checkpoint-500/.*v1 fit as well"):
        assert auto_tuner(config, models[0]).entry.name.endswith("v2")


def test_auto_takes_a_tuner_without_a_hash_for_one_of_the_same_base(published, tmp_path):
    """An earlier version of metazo wrote the first of two versions, and no hash."""
    tuner, model = Tuner.load(next(published.rglob("tuner.safetensors"))), load_model("pico").model
    for recipe in ({}, tuner.info.recipe):
        zoo.push(replace(tuner, info=replace(tuner.info, recipe=recipe)), tmp_path / "zoo")
    config = FinetuneConfig("derived", "pico_topic", out=tmp_path / "run", tuner="auto", zoo=tmp_path / "zoo")
    model.model.layers[0].mlp.up_proj.weight.data += 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert auto_tuner(config, model).entry.name == "pico/v2"


def test_auto_takes_a_tuner_of_a_part_if_that_is_allowed(published, tmp_path):
    """As below another vocabulary: only the embeddings, which are tied, have no network."""
    model = load_model("pico").model
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    config = FinetuneConfig("pico", "pico_topic", out=tmp_path / "run", tuner="auto", zoo=published)
    with pytest.raises(UserError, match="no tuner for all .*; pico/v1 has networks for some .* `allow_partial=True`"):
        auto_tuner(config, model)
    found = auto_tuner(replace(config, allow_partial=True), model)
    assert (found.entry.name, found.folder, found.why) == ("pico/v1", published, "part")


def test_the_last_version_is_the_one_of_the_highest_number(published, tmp_path):
    tuner, folder = Tuner.load(next(published.rglob("tuner.safetensors"))), tmp_path / "zoo"
    for version in ("v9", "v10", "v2"):
        zoo.push(tuner, folder, version=version)
    config = FinetuneConfig("pico", "pico_topic", out=tmp_path / "run", tuner="auto", zoo=folder)
    assert auto_tuner(config, load_model("pico").model).entry.name == "pico/v10"
    assert zoo.named("pico", folder).entry.name == "pico/v10"
    zoo.push(tuner, folder, version="draft")
    assert zoo.named("pico", folder).entry.name == "pico/draft"  # published last, and not numbered as the others


def test_auto_takes_a_match_by_names_in_the_zoo_that_is_named(published, tmp_path):
    tuner = Tuner.load(next(published.rglob("tuner.safetensors")))
    unknown = [BlockSpec(block.name, [(name, None) for name, _ in block.tensors]) for block in tuner.info.blocks]
    zoo.push(replace(tuner, info=replace(tuner.info, blocks=unknown)), tmp_path / "zoo")
    config = FinetuneConfig("pico", "pico_topic", out=tmp_path / "run", tuner="auto", zoo=tmp_path / "zoo")
    assert auto_tuner(config, load_model("pico").model).folder == tmp_path / "zoo"  # the bundled one matches by shapes


@pytest.mark.parametrize(("optimizer", "load"), [("feedback", zoo.load_feedback), ("zo-finetuner", zoo.load)])
def test_auto_checks_the_file_as_if_it_were_named(published, optimizer, load, tmp_path):
    shutil.copytree(published, tmp_path / "zoo")
    model, name = load_model("pico").model, "pico/v1"
    if optimizer == "feedback":
        name = pushed_feedback(model, "pico", tmp_path / "zoo", 0.5)
    path = tmp_path / "zoo" / name / "tuner.safetensors"
    found = zoo.read(path)
    replace(found, info=replace(found.info, recipe={"changed": 1})).save(path)
    for tuner in ("auto", name):
        config = FinetuneConfig(
            "pico", "pico_topic", out=tmp_path / "run", tuner=tuner, zoo=tmp_path / "zoo", optimizer=optimizer
        )
        with pytest.raises(UserError, match="and the zoo index says .* it is refused"):
            tuner_of(config, model, load)


def test_auto_says_what_it_took(published, tmp_path):
    console = Console(file=io.StringIO(), width=400)
    settings = {"train_examples": 4, "dev_examples": 2, "test_examples": 0, "steps": 1, "lr": 1e-4, "batch_size": 2}
    config = FinetuneConfig("pico", "pico_topic", out=tmp_path / "run", tuner="auto", zoo=published, **settings)
    run_settings(config, console)
    assert f"tuner: pico/v1 in {published}" in console.file.getvalue()


def test_meta_train_push_finetune_evaluate(published, tmp_path):
    done = metazo(*finetune(tmp_path / "run", "--tuner=auto", f"--zoo={published}", "--json"))
    summary = json.loads(done.stdout)
    assert summary["forwards"] == 4 and summary["tuner"] == "auto"
    shown = metazo(
        "evaluate", f"--model={tmp_path / 'run' / 'model'}", "--task=pico_sentiment", "--examples=16", "--json"
    )
    assert json.loads(shown.stdout)["pico_sentiment"]["examples"] == 16
    own = metazo("evaluate", str(tmp_path / "run"), "--json")
    assert json.loads(own.stdout) == {"pico_sentiment": summary["test"]}
    again = ("replay", str(tmp_path / "run"), "--base=pico", f"--out={tmp_path / 'again'}")
    assert "give its location as --tuner, or its zoo as --zoo." in " ".join(metazo(*again, ok=False).stderr.split())
    assert metazo(*again, f"--zoo={published}").returncode == 0
    listed = json.loads(metazo("zoo", "list", "--zoo", str(published), "--json").stdout)
    assert any(entry["base_model"] == "pico" for entry in listed)
    assert metazo("zoo", "verify", "--zoo", str(published)).returncode == 0


@pytest.mark.parametrize(("metric", "there"), [("accuracy", True), ("mcc", False)])
def test_the_accuracy_of_the_commonest_answer_is_beside_accuracy_alone(metric, there, tmp_path):
    rows = [{"text": f"a story {i}", "label": int(i % 4 == 0)} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"kind": "classification", "prompt": "{text} It was {}", "labels": ["bad", "good"], "metric": metric}
    (tmp_path / "own.yaml").write_text(json.dumps(own | {"files": {"train": "rows.jsonl"}}))
    shown = metazo("evaluate", "--model=pico", f"--task={tmp_path / 'own.yaml'}", "--examples=4").stdout
    assert metric in shown and ("majority" in shown) == there


def test_dry_run_writes_nothing(tmp_path):
    plan = json.loads(metazo(*finetune(tmp_path / "run", "--dry-run", "--json")).stdout)
    assert plan["bytes on disk"] > 6e6 and not (tmp_path / "run").exists()


def test_a_flag_wins_over_the_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: pico\ntask: pico_topic\nlr: 1.0e-3\noptimizer: lozo\nmethod: {rank: 1}\n")
    arguments = finetune(tmp_path / "run", "--config", str(recipe), "--rank=3")
    metazo(*arguments)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["task"], config["lr"], config["method"]) == ("pico_sentiment", 1e-4, {"rank": 3})


@pytest.mark.parametrize("length", [("steps", 4), ("forwards", 8), ("epochs", 0.5)])
def test_a_length_as_a_flag_wins_over_another_kind_of_length_in_the_recipe(tmp_path, length):
    from metazo.runs.config import FinetuneConfig
    from metazo_cli.options import settings

    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: pico\ntask: pico_topic\nsteps: 40\n")
    found = settings(FinetuneConfig, recipe, {length[0]: length[1]})
    lengths = {name: getattr(found, name) for name in ("steps", "forwards", "epochs")}
    assert {name: value for name, value in lengths.items() if value is not None} == {length[0]: length[1]}
    with pytest.raises(UserError, match="`steps` and `epochs` set the length of the run; give one of them"):
        settings(FinetuneConfig, recipe, {"steps": 4, "epochs": 0.5})


def test_help_names_every_method_and_its_hyperparameters():
    from metazo.optimizers import OPTIMIZERS

    text = " ".join(metazo("finetune", "--help").stdout.replace("│", " ").split())
    assert all(name in text for name in OPTIMIZERS) and "--rank" in text


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--task=pico_sentimant",), "did you mean pico_sentiment"),
        (("--model=no/such-model",), "no/such-model"),
        (("--optimizer=adamw",), "--optimizer 'adamw' is unknown"),
        (("--rank=2",), "--rank is not a hyperparameter of mezo; it belongs to eggroll, fzoo, lozo"),
        (("--optimizer=lozo", "--rank=0"), "rank must be"),
        (("--optimizer=lozo-m", "--rule=adam"), "use --optimizer lozo with --rule"),
        (("--optimizer=loren", "--queries=1"), "queries must be at least 2"),
        (("--optimizer=curvzo", "--budget=1.5"), "must be in (0, 1], not 1.5"),
        (("--optimizer=lozo", "--rank=4096"), "rank is 4096 and the smaller side of"),
        (("--eps=0",), "eps must be above 0"),
        (("--lr=nan",), "lr must be a finite number"),
        (("--batch-size=0",), "--batch-size must be at least 1"),
        (("--train=*nothing*",), "names no tensor"),
        (("--freeze=*",), "leave no tensor"),
        (("--device=cuda:9",), "--device 'cuda:9' cannot be used"),
        (("--device=meta",), "--device 'meta' cannot be used"),
        (("--optimizer=zo-finetuner",), "needs --tuner"),
        (("--tuner=random:x",), "followed by a whole number"),
        (("--tuner=random:-1",), "'random:-1': random: is followed by a whole number, its seed, from 0 to 2**64 - 1"),
        (("--tuner=random:99999999999999999999999",), "followed by a whole number"),
        (("--config=/no/such.yaml",), "is not a file"),
        (("--schedule=step",), "--schedule is 'step'"),
        (("--data=/no/such/folder", "--task=sst2"), "/no/such/folder"),
    ],
)
def test_bad_flags(tmp_path, extra, words):
    assert words in refused(*finetune(tmp_path / "run"), *extra)
    assert not (tmp_path / "run").exists()


def test_a_tuner_for_another_model(published, shared, tmp_path):
    model = shared / "models" / "stories260k"
    if not model.is_dir():
        pytest.skip("no shared models")
    arguments = (f"--model={model}", "--task=pico_sentiment", f"--out={tmp_path / 'run'}", *TINY, f"--zoo={published}")
    message = refused("finetune", *arguments, "--tuner=pico")
    assert message.count("in the model and") == 3 or "is not in the model" in message
    assert "--allow-partial" in message or "take a tuner made for this model" in message
    assert not (tmp_path / "run").exists()


def test_a_truncated_tuner(published, tmp_path):
    whole = next(published.rglob("tuner.safetensors")).read_bytes()
    (tmp_path / "tuner.safetensors").write_bytes(whole[:-100])
    assert "is not a tuner" in refused(*finetune(tmp_path / "run", f"--tuner={tmp_path / 'tuner.safetensors'}"))


class Hostile:
    def __reduce__(self):
        import os

        return os.system, ("touch hostile-was-here",)


def test_a_hostile_pth_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model.w": Hostile()}, tmp_path / "tuner.pth")
    message = refused("zoo", "import", str(tmp_path / "tuner.pth"), "--base-model=x", f"--out={tmp_path / 'o'}")
    assert "system" in message and not (tmp_path / "hostile-was-here").exists() and not (tmp_path / "o").exists()


def test_bad_data(tmp_path):
    """An empty file, a missing column, and a label outside the set are named with file and row."""
    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    rows = [{"sentence": f"a film number {i}", "label": i % 2} for i in range(40)]

    def with_train(lines: list) -> str:
        (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
        return refused(*finetune(tmp_path / "run", "--task=sst2", f"--data={tmp_path / 'data'}"))

    assert "empty" in with_train([]) or "no rows" in with_train([])
    assert "sentence" in with_train([{"text": "x", "label": 0}] * 40)
    assert "7" in with_train([*rows, {"sentence": "x", "label": 7}])
    assert not (tmp_path / "run").exists()


def test_demo(tmp_path):
    small = ["--model=pico", "--forwards=8", "--texts=64", "--examples=8"]
    done = metazo("demo", "--out", str(tmp_path / "demo"), *small, "--json")
    shown = json.loads(done.stdout)
    methods = [run["optimizer"] for run in shown["runs"].values()]
    assert shown["model"] == "pico"
    assert methods == ["mezo", "mezo", "feedback", "skip-feedback", "first-order-adamw"]
    assert {run["forwards"] for run in shown["runs"].values()} == {6, 8}  # of steps that take 3 and 2
    assert (tmp_path / "demo" / "demo.png").is_file() and (tmp_path / "demo" / "zoo" / "index.json").is_file()
    assert "not empty" in refused("demo", "--out", str(tmp_path / "demo"))
    for wrong, words in (
        ("--model=nonsense", "--model 'nonsense' is unknown"),
        ("--seed=-1", "--seed must be at least 0"),
    ):
        assert words in refused("demo", "--out", str(tmp_path / "demo"), *small, wrong, "--overwrite")
        assert (tmp_path / "demo" / "demo.png").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("x")
    assert "is a file; name a folder" in refused("demo", "--out", str(tmp_path / "mine" / "x"))
    assert "left alone" in refused("demo", "--out", str(tmp_path / "mine"), "--overwrite")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("columns: mezo", "r.yaml: columns is 'mezo': Input should be a valid list."),
        ("columns: [mezo]\nseeds: -2", "r.yaml: seeds must be at least 1, not -2."),
        ("seedz: 3", "r.yaml: seedz is not a setting; the settings are model, tasks"),
        (
            "columns: [mezo]\nconfig: {batch_sizes: 4}",
            "config: 'batch_sizes' is not a setting of a run (did you mean",
        ),
    ],
)
def test_a_setting_of_a_recipe_is_called_by_its_name_there(tmp_path, content, sentence):
    (tmp_path / "r.yaml").write_text(f"tasks: [pico_topic]\nbudget: 4\n{content}\n")
    said = refused("compare", str(tmp_path / "r.yaml"), "--model=pico", "--out", str(tmp_path / "out"))
    assert sentence in " ".join(said.split())


def test_a_number_or_a_word_is_a_flag(tmp_path):
    arguments = ("compare", "--model=pico", "--tasks=pico_topic", "--budget=4", "--optimizers=lozo", "--dry-run")
    said = refused(*arguments, "--time-budget=reference")
    assert "--reference is 'mezo', which is no column, and --time-budget takes its time" in " ".join(said.split())
    said = refused(*arguments, "--time-budget=soon")
    assert "--time-budget is a number of seconds above 0, or the word reference, not 'soon'." in " ".join(said.split())


def test_an_entry_of_a_list_has_the_flags_name(tmp_path):
    said = refused("finetune", "--model=pico", "--task=pico_topic", "--track=nosuch", "--out", str(tmp_path / "out"))
    assert "--track is 'nosuch': Input should be 'tensorboard'" in " ".join(said.split())


def test_a_plan_names_flags(tmp_path):
    (tmp_path / "grid.yaml").write_text(
        "{model: pico, tasks: [pico_topic], columns: [{name: mezo, lrs: [1e-3]}], budget: 8, config: {batch_size: 4}}"
    )
    told = metazo("compare", str(tmp_path / "grid.yaml"), "--dry-run", "--out", str(tmp_path / "out")).stdout
    assert "--workers" in told and "`workers`" not in told


def test_env_tasks_recipes_version():
    found = json.loads(metazo("env", "--json").stdout)
    assert found["torch"].startswith("2.") and found["kernels' vectors"] in ("128 bits", "256 bits", "512 bits")
    assert {"sst2", "squad", "pico_cause"} <= set(json.loads(metazo("tasks", "--json").stdout))
    assert all(f" {name} " in metazo("tasks").stdout for name in ("tweet_sentiment", "stackoverflow_sentiment"))
    assert "pico-mezo-rms" in metazo("recipes").stdout and "lr:" in metazo("recipes", "pico-mezo-rms").stdout
    assert metazo("--version").stdout.startswith("metazo ")
