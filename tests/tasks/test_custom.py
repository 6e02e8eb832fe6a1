"""A task from YAML: the documented example works, words stay words, and every mistake is reported."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import metazo
from metazo.errors import UserError
from metazo.models.load import load_model
from metazo.tasks import data, from_yaml, prepare, resolve

MINIMAL = 'name: mine\nkind: classification\nprompt: "{text}?"\nlabels: {0: No, 1: Yes}\n'


def save(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_the_examples_of_the_page_load_and_run(tmp_path, tiny):
    page = Path(__file__).parents[2].joinpath("docs", "own-task.md").read_text()
    own, hub = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "reviews").mkdir()
    for name in ("train", "dev"):
        rows = [{"text": f"{name} {i}", "sentiment": ("negative", "positive")[i % 2]} for i in range(12)]
        (tmp_path / "reviews" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "reviews.yaml").write_text(own)
    task = resolve(str(tmp_path / "reviews.yaml"))
    for model in ("gpt2", "roberta", "bert"):
        loaded = load_model(tiny(model))
        ready = prepare(task, loaded, train=8, dev=4, test=6)
        assert [len(ready.train), len(ready.dev), len(ready.test)] == [8, 4, 6]
        assert ready.loss(loaded.model, ready.collate(ready.train)).isfinite()
    assert from_yaml(save(tmp_path, hub)).num_labels == 4


def test_yes_and_no_are_words_and_true_is_a_label(tmp_path):
    assert from_yaml(save(tmp_path, MINIMAL)).labels == {0: "No", 1: "Yes"}
    flags = from_yaml(save(tmp_path, MINIMAL.replace("{0: No, 1: Yes}", "{false: No, true: Yes}")))
    assert [flags.label_index(value, "") for value in (False, True)] == [0, 1]


def test_files_without_validation_give_test_rows_of_the_train_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"t{i}", "label": i % 2}) for i in range(20)))
    task = from_yaml(save(tmp_path, MINIMAL + "files: {train: rows.jsonl}\n"))
    splits = data.draw(task, None, train=8, dev=4, test=4, seed=0).rows
    assert len({row["text"] for rows in splits.values() for _, row in rows}) == 16


def test_the_name_defaults_to_the_file_name(tmp_path):
    assert from_yaml(save(tmp_path, MINIMAL.replace("name: mine\n", ""))).name == "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + "lables: [a]\n", "unknown key 'lables'; the keys are name, kind, prompt"),
        (MINIMAL + "adapt: os.system\n", "unknown key 'adapt'"),
        (
            MINIMAL.replace("classification", "regression"),
            "'kind': Input should be 'classification', 'choice' or 'generation'",
        ),
        (MINIMAL.replace("labels: {0: No, 1: Yes}", "labels: {0: No}"), "at least two values"),
        (MINIMAL.replace("labels: {0: No, 1: Yes}", "labels: {0: No, 1: No}"), "two labels share one label word"),
        (MINIMAL.replace("{text}?", "{text[0]}"), r"write only \{column\} or \{\}"),
        (MINIMAL.replace("{text}?", "{text} {} {}"), r"more than one \{\}"),
        (MINIMAL.replace("{text}?", "{text"), "'}'"),
        (MINIMAL + "context: title\n", "context is 'title', which is not a column of"),
        (MINIMAL.replace("{text}?", "text?"), r"names no \{column\}"),
        (MINIMAL.replace("{text}?", "{text} {label}?"), r"reads \{label\}, which holds the answer"),
        (MINIMAL + "metric: f1\n", "metric f1 is not one of accuracy, macro_f1, mcc"),
        (MINIMAL + "stop: '\\n'\n", r"stop is the text \\n, a backslash and a letter; write it in double quotes"),
        (MINIMAL + "files: {validation: x.jsonl}\n", "files must name the train file"),
        (MINIMAL + "files: {dev: x.jsonl}\n", "files.dev"),
        ("kind: choice\nprompt: x\n", "a choice task needs choices"),
        ("- a\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("a: [\n", "is not valid YAML"),
        ("1: a\n", "which is not a name"),
    ],
)
def test_mistakes_are_one_clear_sentence(tmp_path, text, words):
    with pytest.raises(UserError, match=words) as raised:
        from_yaml(save(tmp_path, text))
    assert "mine.yaml" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "x"}, "^'kind': Input should be 'classification', 'choice' or 'generation'$"),
        ({}, "^'kind': Field required$"),
        ({"kind": "choice", "prompt": "{text}"}, "^a choice task needs choices: the columns that hold them$"),
        ({"kind": "choice", "promt": "x"}, "^unknown key 'promt'; the keys are name, kind, prompt"),
    ],
)
def test_mistakes_in_python_are_the_same_sentences(tmp_path, fields, words):
    with pytest.raises(UserError, match=words) as refused:
        metazo.Task(name="m", **fields)
    path = tmp_path / "m.yaml"
    path.write_text(json.dumps({"name": "m", **fields}))
    with pytest.raises(UserError) as read:
        from_yaml(path)
    assert str(read.value) == f"task file {path}: {refused.value}"


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="is not a file"):
        resolve(tmp_path / "absent.yaml")
