"""Feedback fitted as a user does it: from text of several sources, one seed one file, published, found and used."""

from __future__ import annotations

import io
import json
import random
import re
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console

import metazo
from metazo import zoo
from metazo.errors import UserError
from metazo.feedback.passes import Recorder
from metazo.feedback.residual import find_residual
from metazo.feedback.tuner import FeedbackTuner
from metazo.meta import learn_feedback
from metazo.meta.feedback_config import FeedbackConfig
from metazo.models.load import LoadedModel, load_model
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.interrupt import Interrupted
from metazo.tasks import prepare, resolve
from tests import warm

SMALL = {"texts": 16, "batch_size": 4, "rank": 2, "max_length": 24}


def learn(model: Path, out: Path, **changes) -> FeedbackTuner:
    return metazo.meta_train(FeedbackConfig(model=str(model), out=out, **(SMALL | changes)))


def rows_of(folder: Path, seed: int) -> Path:
    """Training rows of cr, with labels drawn at random."""
    drawn = random.Random(seed)
    made = [{"text": f"it is item {n} and it works well", "label": drawn.randrange(2)} for n in range(20)]
    (folder / "cr").mkdir(parents=True)
    (folder / "cr" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_one_seed_gives_one_file_whatever_the_labels(kind: str, tiny, tmp_path: Path) -> None:
    one = learn(tiny(kind), tmp_path / "1", data=rows_of(tmp_path / "a", 0))  # the meta-training tasks in the folder
    assert one.info.recipe["source"] == "cr" and one.info.recipe["texts"] == 16
    two = learn(tiny(kind), tmp_path / "2", data=rows_of(tmp_path / "b", 1), task=["cr"])
    files = [(tmp_path / name / "tuner.safetensors").read_bytes() for name in "12"]
    assert one.maps.trust == two.maps.trust and one.info.fingerprint == two.info.fingerprint
    assert one.info.scores == two.info.scores
    learn(tiny(kind), tmp_path / "3", data=tmp_path / "a")
    assert (tmp_path / "3" / "tuner.safetensors").read_bytes() == files[0]
    other = learn(tiny(kind), tmp_path / "4", data=tmp_path / "a", seed=1)
    assert other.maps.trust != one.maps.trust


def errors(loaded: LoadedModel, loss) -> torch.Tensor:
    """The loss's gradient at the outputs of the last block, (batch, length, width)."""
    delta = Recorder(find_residual(loaded.model), {}, 0).capture([loss]).passes[0].delta
    assert delta is not None
    return delta


@pytest.mark.parametrize("task", [["pico_topic"], ["pico_span"], []])
def test_the_loss_is_at_the_end_of_the_prompt_whatever_words_the_tokenizer_has(task, tmp_path: Path) -> None:
    """pico's tokenizer splits "yes"; the labels of pico_topic are one token each."""
    loaded, config = load_model("pico"), FeedbackConfig("pico", tmp_path / "x", task=task, texts=16, batch_size=4)
    for loss in learn_feedback._losses(config, loaded, torch.device("cpu"), None)[0]:
        carrying = errors(loaded, loss).ne(0).any(-1)
        assert carrying[:, -1].all() and not carrying[:, :-1].any()
    if task == ["pico_topic"]:  # as the task's own loss
        own = prepare(resolve("pico_topic"), loaded, train=4, dev=0, test=0)
        carrying = errors(loaded, lambda: own.loss(loaded.model, own.collate(own.train))).ne(0).any(-1)
        assert carrying[:, -1].all() and not carrying[:, :-1].any()


CHOICE = "kind: choice\nprompt: '{text} so'\nchoices: [one, two, three]\nlabel: right\n"
GENERATION = "kind: generation\nprompt: '{text}'\nanswer: right\n"


@pytest.mark.parametrize("task, right", [(CHOICE, (0, 1)), (GENERATION, ("a cat", "no dogs at all"))])
def test_neither_the_right_choice_nor_the_answer_is_used(task: str, right: tuple, tiny, tmp_path: Path) -> None:
    found = []
    for turn in range(2):
        folder = tmp_path / str(turn)
        folder.mkdir()
        texts = [
            {"text": f"it is item {n}", "one": "it works" if n else "", "two": f"{n} fail", "three": "x"}
            for n in range(16)
        ]
        rows = [row | {"right": right[(n + turn) % 2] if n else right[1]} for n, row in enumerate(texts)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "task.yaml").write_text(f"name: own\n{task}files: {{train: rows.jsonl}}\n")
        found.append(learn(tiny("llama"), folder / "fit", task=[str(folder / "task.yaml")]))
    files = [(tmp_path / str(turn) / "fit" / "tuner.safetensors").read_bytes() for turn in range(2)]
    assert found[0].maps.trust == found[1].maps.trust and files[0] == files[1]
    assert found[0].info.recipe["texts"] == 16


def test_text_of_the_user_and_text_of_metazo(tiny, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("\n".join(f"prompt number {n}" for n in range(20)) + "\n\n")
    mine = learn(tiny("llama"), tmp_path / "1", data=tmp_path / "mine.txt")
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": f"prompt number {n}"}) + "\n" for n in range(20)))
    same = learn(tiny("llama"), tmp_path / "2", data=tmp_path / "mine.jsonl")
    assert mine.maps.trust == same.maps.trust and mine.info.recipe["source"] == "prompts of the user"
    assert learn(tiny("llama"), tmp_path / "3").info.recipe["source"] == "books"
    every = learn(tiny("llama"), tmp_path / "4", data=tmp_path / "mine.txt", positions="all")
    assert every.maps.trust != mine.maps.trust
    names = [name for name in mine.info.scores if name.startswith("cosine of held-out errors with the feedback")]
    assert len(mine.info.scores[names[0]]) == len(mine.maps.down) == len(mine.info.blocks) - 1


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_repeated_prompt_counts_once(ending: str, tiny, tmp_path: Path) -> None:
    """It would be fitted and held out. How many were left out is said, and is in the recipe."""
    for name, repeats in (("once", 1), ("often", 3)):
        prompts = [f"prompt number {n}" for n in range(20)] * repeats
        lines = [json.dumps({"text": prompt}) for prompt in prompts] if ending == "jsonl" else prompts
        (tmp_path / f"{name}.{ending}").write_text("".join(f"{line}\n" for line in lines))
    given = {"model": str(tiny("llama"))} | SMALL
    once = metazo.meta_train(FeedbackConfig(out=tmp_path / "1", data=tmp_path / f"once.{ending}", **given))
    console = Console(file=io.StringIO(), width=200)
    config = FeedbackConfig(out=tmp_path / "2", data=tmp_path / f"often.{ending}", **given)
    often = metazo.meta_train(config, console=console)
    assert often.maps.trust == once.maps.trust and often.info.recipe["texts"] == once.info.recipe["texts"]
    assert often.info.recipe["source"] == "prompts of the user (40 repeated ones left out)"
    assert "on 16 texts of prompts of the user (40 repeated ones left out)." in console.file.getvalue()


GENERATED = ["pico_sentiment", "pico_topic", "pico_entail", "pico_span", "pico_cause", "pico_sentiment", "pico_topic"]


@pytest.mark.parametrize("number, used", [(3, [6, 5, 5]), (7, [3, 3, 2, 2, 2, 2, 2]), (20, [1] * 16)])
def test_texts_are_divided_among_the_tasks(number: int, used: list[int], tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """As evenly as possible, of every length, and tasks without a text are not named."""
    given, tasks = [], (GENERATED * 3)[:number]
    named = [resolve(name).model_copy(update={"name": f"{name}_{place}"}) for place, name in enumerate(tasks)]
    monkeypatch.setattr(learn_feedback, "resolve_tasks", lambda names: named)
    monkeypatch.setattr(
        learn_feedback, "_loss", lambda config, prepared, loaded, examples, device: given.append(examples)
    )
    config = FeedbackConfig(model="tiny", out=Path("unused"), task=tasks, texts=16, batch_size=16)
    monkeypatch.setattr(learn_feedback, "HELD_OUT", 1)
    _, source, count = learn_feedback._losses(config, load_model(tiny("llama")), torch.device("cpu"), None)
    assert [len(examples) for examples in given] == used and count == 16
    assert source == ", ".join(task.name for task in named[: len(used)])
    drawn = learn_feedback._prepared(resolve(tasks[1]), config, None, load_model(tiny("llama")), used[1]).train
    assert given[1] == sorted(drawn, key=len), "none is left out because it is long"


def test_nothing_is_said_of_labels_that_are_not_the_texts_own(tiny) -> None:
    config = FeedbackConfig(model="tiny", out=Path("unused"), task=["pico_topic"])
    prepared = learn_feedback._prepared(resolve("pico_topic"), config, None, load_model(tiny("llama")), 8)
    assert len(prepared.train) == 8 and not any("class" in note for note in prepared.notes)


def test_it_is_published_listed_found_and_used(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("METAZO_ZOO", raising=False)
    learn(tiny("llama"), tmp_path / "fit")
    name = zoo.push(tmp_path / "fit", base="tiny", licence="MIT")
    assert name == "tiny/feedback-v1"
    (found,) = [entry for entry in zoo.entries() if entry.where == "own"]
    assert (found.entry.kind, found.entry.licence) == ("feedback", "MIT")
    card = (found.path.parent / "card.md").read_text()
    assert "--optimizer feedback --tuner tiny/feedback-v1" in card and "identity + rank 2" in card
    assert "cosine of held-out errors with the skip rule" in card
    assert zoo.pull(name).entry.kind == "feedback" and all(check.problem is None for check in zoo.verify())
    common = dict(model=str(tiny("llama")), task="pico_topic", lr=1e-2, steps=2, batch_size=4, train_examples=16)
    common |= dict(dev_examples=0, test_examples=8, keep="none", optimizer="feedback", max_length=64)
    runs = {}
    for how in (name, "tiny", "auto", str(tmp_path / "fit")):
        out = tmp_path / f"run-{len(runs)}"
        runs[how] = run_settings(FinetuneConfig(**common, tuner=how, out=out), Console(quiet=True))["test"]["loss"]
        header = json.loads((out / "steps.jsonl").read_text().splitlines()[0])
        assert len(header["tuner"]) == 64
    assert len(set(runs.values())) == 1
    with pytest.raises(UserError, match="does not fit this model's blocks .*take one that was fitted for this model"):
        run_settings(FinetuneConfig(**common | {"model": str(tiny("opt"))}, tuner=name), Console(quiet=True))
    with pytest.raises(UserError, match="is feedback, which goes with `optimizer='feedback'` alone"):
        run_settings(FinetuneConfig(**common | {"optimizer": "mezo"}, tuner=name), Console(quiet=True))
    with pytest.raises(UserError, match="is a tuner of block scales, which goes with methods that perturb weights"):
        run_settings(FinetuneConfig(**common, tuner="pico/v2"), Console(quiet=True))
    with pytest.raises(UserError, match="needs `tuner` .*`optimizer='skip-feedback'`"):
        run_settings(FinetuneConfig(**common), Console(quiet=True))


def test_bad_settings(tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(UserError, match="`texts` 16 makes fewer than 4 batches of `batch_size` 8"):
        learn(model, tmp_path / "x", texts=16, batch_size=8)
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match="`data` gives 2 texts, fewer than 4 batches of 4"):
        learn(model, tmp_path / "x", data=tmp_path / "few.txt")
    with pytest.raises(UserError, match="neither a file of prompts nor a folder"):
        learn(model, tmp_path / "x", data=tmp_path / "none.txt")
    with pytest.raises(UserError, match="`data` .*few.txt is a file of prompts, which goes without `task`"):
        learn(model, tmp_path / "x", data=tmp_path / "few.txt", task=["pico_topic"])
    with pytest.raises(
        UserError, match="`task` has two tasks of the name 'pico_topic'; rename one of them, or leave it"
    ):
        learn(model, tmp_path / "x", task=["pico_topic", "pico_topic"])
    with pytest.raises(UserError, match="`ridge` 0.5 changes nothing with `rank` 0, which fits no map; leave it out"):
        learn(model, tmp_path / "x", rank=0, ridge=0.5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no text task for meta-training"):
        learn(model, tmp_path / "x", data=tmp_path / "empty")
    with pytest.raises(UserError, match="`out` .* is not an empty folder"):
        learn(model, tmp_path)
    with pytest.raises(UserError, match="`positions` all is next-token loss, which a classifier model does not have"):
        learn(tiny("bert"), tmp_path / "x", positions="all")
    with pytest.raises(UserError, match="`rank` is 4096 and the model"):
        learn(model, tmp_path / "x", rank=4096)
    assert not (tmp_path / "x").exists()


def test_the_tuner_names_the_task_of_a_file_and_not_its_place(tiny, tmp_path: Path) -> None:
    (tmp_path / "secret place").mkdir()
    rows = tmp_path / "secret place" / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"review number {n}", "label": n % 2}) + "\n" for n in range(20)))
    task = tmp_path / "secret place" / "reviews.yaml"
    task.write_text(
        "name: reviews\nkind: classification\nprompt: '{text}'\nlabels: {0: bad, 1: good}\nlabel: label\n"
        f"files: {{train: {rows}}}\n"
    )
    tuner = learn(tiny("llama"), tmp_path / "x", task=[str(task)])
    assert tuner.info.recipe["source"] == "reviews" and "task" not in tuner.info.recipe
    assert "secret" not in tuner.card("x", "0") + json.dumps([tuner.info.recipe, tuner.info.scores])
    assert b"secret" not in (tmp_path / "x" / "tuner.safetensors").read_bytes()


def test_a_file_that_no_reader_takes_is_refused_before_the_fit(tiny, tmp_path: Path, monkeypatch) -> None:
    for module in ("meta.trial", "tuner.envelope"):
        monkeypatch.setattr(f"metazo.{module}.MAX_BYTES", 72_400)
    with monkeypatch.context() as patched:
        patched.setattr("metazo.meta.learn_feedback.fit_jacobian", None)
        with pytest.raises(
            UserError, match="`rank` is 31, which makes a file of up to .* bytes, and a feedback tuner may"
        ) as found:
            learn(tiny("llama"), tmp_path / "x", rank=31)
        odd = tmp_path / "a\u00a0b"
        odd.symlink_to(tiny("llama"))
        with pytest.raises(UserError, match="`model` .* a tuner names its base model in at most 512 that can be shown"):
            learn(odd, tmp_path / "x")
    most = int(re.search("at most ([0-9]+)", str(found.value))[1])
    assert 0 < most < 31 and not (tmp_path / "x").exists()
    learn(tiny("llama"), tmp_path / "x", rank=most)


def test_what_is_no_text_in_utf_8_is_refused_by_line(tiny, tmp_path: Path) -> None:
    for name, content, words in (
        ("latin.txt", "one\ntwo\ncafé\n".encode("latin-1"), r"latin\.txt is not text in UTF-8 \(line 3\)"),
        ("utf16.txt", "one\ntwo\n".encode("utf-16"), r"utf16\.txt is not text in UTF-8 \(line 1\)"),
        ("blank.txt", b"\n \n", r"blank\.txt has no line with text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=words):
            learn(tiny("llama"), tmp_path / "x", data=tmp_path / name)
    assert not (tmp_path / "x").exists()
    (tmp_path / "mark.txt").write_text("\ufeff" + "\n".join(f"prompt number {n}" for n in range(20)))
    (tmp_path / "plain.txt").write_text("\n".join(f"prompt number {n}" for n in range(20)))
    scores = [
        learn(tiny("llama"), tmp_path / name, data=tmp_path / f"{name}.txt").info.scores for name in ("mark", "plain")
    ]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_second_fit_in_the_folder_is_refused_and_an_interrupted_one_leaves_nothing(
    stop: signal.Signals, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []

    def in_the_middle(*args, **kwargs):
        with pytest.raises(UserError, match="is in use by (another )?process"):
            learn(tiny("llama"), tmp_path / "x", seed=1)
        said.append("refused")
        signal.raise_signal(stop)

    with monkeypatch.context() as patched:
        patched.setattr("metazo.meta.learn_feedback.fit_jacobian", in_the_middle)
        with pytest.raises(Interrupted, match=f"^{stop.name} in .*, of which nothing is written; start it again"):
            learn(tiny("llama"), tmp_path / "x")
    assert said == ["refused"] and not (tmp_path / "x").exists()
    learn(tiny("llama"), tmp_path / "x")


KILLED = """
import os, signal, sys
from pathlib import Path
import metazo
from metazo.meta.feedback_config import FeedbackConfig
def hook(event, args):
    if event == "os.rename" and Path(args[1]).name == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
metazo.meta_train(FeedbackConfig(model=sys.argv[1], out=Path(sys.argv[2]), texts=16, batch_size=4, rank=2, max_length=24))
"""


def test_a_fit_that_was_killed_as_it_wrote_a_file_begins_again_in_its_folder(tiny, tmp_path: Path) -> None:
    model, whole = tiny("llama"), tmp_path / "whole"
    recipe = learn(model, whole).info.recipe
    for name in ("config.json", "tuner.safetensors"):
        out = tmp_path / name
        done = warm.run("-c", KILLED, model, out, name)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert [path for path in out.glob(".*.tmp")] and not (out / "tuner.safetensors").exists()
        assert learn(model, out).info.recipe == recipe
        assert (out / "tuner.safetensors").read_bytes() == (whole / "tuner.safetensors").read_bytes()
        assert sorted(path.name for path in out.iterdir()) == ["config.json", "tuner.safetensors"]


def test_files_of_others_and_a_whole_fit_stay(tiny, tmp_path: Path) -> None:
    for name, content in (("config.json", '{"learn": "scale"}'), ("config.json", "no JSON"), ("tuner.safetensors", "")):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / name).write_text(content)
        (folder / ".half.tmp").touch()
        with pytest.raises(UserError, match="is not an empty folder; choose another"):
            learn(tiny("llama"), folder)
        assert sorted(path.name for path in folder.iterdir()) == [".half.tmp", name]
