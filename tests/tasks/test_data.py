"""Rows and splits: sizes, disjointness, determinism, every source, and one clear sentence for bad data."""

from __future__ import annotations

import csv
import datetime
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import metazo
from metazo.errors import UserError
from metazo.io.plain import is_plain
from metazo.models.load import load_model
from metazo.tasks import data, get, trainings
from metazo.tasks.rows import in_memory, load
from metazo.tasks.splits import prepare
from metazo.tasks.task import Task

TASK = Task(name="toy", kind="classification", prompt="{text} It was", labels={0: "terrible", 1: "great"})


def write(folder, task="toy", **splits):
    (folder / task).mkdir(exist_ok=True)
    for split, rows in splits.items():
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / task / f"{split}.jsonl").write_text(text)
    return folder


def rows(number, start=0):
    return [{"text": f"text {i}", "label": i % 2} for i in range(start, start + number)]


def draw(folder, task=TASK, **sizes):
    drawn = data.draw(task, folder, **({"train": 10, "dev": 5, "test": 8, "seed": 0} | sizes))
    return drawn.rows, drawn.notes


def texts(splits):
    return {split: [row["text"] for _, row in chosen] for split, chosen in splits.items()}


def test_splits_are_disjoint_and_test_comes_from_validation(tmp_path):
    write(tmp_path, train=rows(100), validation=rows(50, 100))
    splits, notes = draw(tmp_path)
    found = texts(splits)
    assert [len(found[s]) for s in ("train", "dev", "test")] == [10, 5, 8]
    assert len({*found["train"], *found["dev"], *found["test"]}) == 23
    assert all(int(text.split()[1]) >= 100 for text in found["test"])
    assert notes == []


def test_the_seed_decides_everything(tmp_path):
    write(tmp_path, train=rows(100), validation=rows(50, 100))
    first, again, other = (texts(draw(tmp_path, seed=seed)[0]) for seed in (3, 3, 4))
    assert first == again
    assert all(first[split] != other[split] for split in first)


def test_more_dev_rows_leave_the_train_rows_as_they_are(tmp_path):
    write(tmp_path, train=rows(100), validation=rows(50, 100))
    assert texts(draw(tmp_path, dev=20)[0])["train"] == texts(draw(tmp_path)[0])["train"]


def test_too_few_rows_are_shared_out_in_proportion_and_said(tmp_path):
    write(tmp_path, train=rows(30), validation=rows(7, 100))
    splits, notes = draw(tmp_path, train=100, dev=50, test=100)
    assert [len(splits[s]) for s in ("train", "dev", "test")] == [20, 10, 7]
    assert notes[0] == "toy: 30 rows give 20 train and 10 dev rows instead of 100 and 50"
    assert "test has 7 rows instead of 100" in notes[1]


def test_the_papers_dev_size_is_kept(tmp_path):
    task = TASK.model_copy(update={"dev_rows": 10})
    write(tmp_path, train=rows(30), validation=rows(7, 100))
    splits, notes = draw(tmp_path, task, train=100, dev=50)
    assert [len(splits[s]) for s in ("train", "dev")] == [20, 10]
    assert len(notes) == 2


def test_test_rows_from_the_train_split_are_disjoint(tmp_path):
    task = TASK.model_copy(update={"test_split": "train"})
    write(tmp_path, train=rows(40))
    found = texts(draw(tmp_path, task)[0])
    assert len({*found["train"], *found["dev"], *found["test"]}) == 23
    small, _ = draw(tmp_path, task, train=100, dev=50, test=50)
    assert [len(small[s]) for s in ("train", "dev", "test")] == [20, 10, 10]


def test_a_split_with_a_longer_hub_name_is_found_as_validation(tmp_path):
    row = {"premise": "p", "hypothesis": "h", "label": 2}
    write(tmp_path, "mnli", train=[row] * 20, validation=[row] * 9)
    assert len(draw(tmp_path, get("mnli"))[0]["test"]) == 8


def test_unlabelled_rows_are_left_out(tmp_path):
    row = {"premise": "p", "hypothesis": "h"}
    labelled = [row | {"label": i % 3} for i in range(20)]
    write(tmp_path, "snli", train=[row | {"label": -1}, *labelled], validation=labelled)
    splits, _ = draw(tmp_path, get("snli"), train=15)
    assert {r["label"] for _, r in splits["train"] + splits["dev"]} == {0, 1, 2}
    with pytest.raises(UserError, match=r"row 1: 'label' is -1"):
        write(tmp_path, "mnli", train=[row | {"label": -1}, *labelled], validation=labelled)
        draw(tmp_path, get("mnli"))


def test_unlabelled_rows_of_a_generation_task_are_those_without_its_answer(tmp_path):
    answered = [{"text": f"text {i}", "answer": {"text": None if i % 4 == 0 else "x"}} for i in range(60)]
    write(tmp_path, train=answered, validation=answered)
    task = Task(name="toy", kind="generation", prompt="{text}", answer="answer.text", unlabelled=(None,))
    for source in (task, task.model_copy(update={"hub": str(tmp_path / "toy")})):
        found = draw(None if source.hub else tmp_path, source, train=30)[0]
        assert len(found["train"]) == 30 and all(row["answer"]["text"] for each in found.values() for _, row in each)
    with pytest.raises(UserError, match="train: task 'toy' needs the column 'label'; columns found: 'text', 'answer'"):
        draw(None, TASK.model_copy(update={"hub": str(tmp_path / "toy"), "unlabelled": (-1,)}))


def test_unlabelled_chats_are_those_whose_last_turn_is():
    chats = [
        {"turns": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "" if i % 4 == 0 else "x"}]}
        for i in range(60)
    ]
    task = Task(name="toy", kind="generation", messages="turns", unlabelled=("", None))
    drawn = data.draw(*in_memory(task, {"train": chats}), train=30, dev=5, test=5, seed=0)
    assert all(row["turns"][-1]["content"] for each in drawn.rows.values() for _, row in each)


def test_arrays_within_a_column_are_lists():
    squad = [{"text": f"text {i}", "answers": {"text": np.array(["a", "b"], dtype=object)}} for i in range(12)]
    task = Task(name="toy", kind="generation", prompt="{text}", answer="answers.text")
    drawn = data.draw(*in_memory(task, squad), train=4, dev=2, test=2, seed=0)
    assert drawn.rows["train"][0][1]["answers"] == {"text": ["a", "b"]}


def test_hub_rows_come_through_datasets(tmp_path):
    """The same call that asks the Hub reads a local folder: the real library, no network."""
    write(tmp_path, train=rows(60), validation=rows(20, 100))
    task = TASK.model_copy(update={"hub": str(tmp_path / "toy"), "unlabelled": (1,)})
    splits, _ = draw(None, task)
    assert [len(splits[s]) for s in ("train", "dev", "test")] == [10, 5, 8]
    assert {row["label"] for _, row in splits["train"]} == {0}


def test_the_hub_out_of_reach_is_a_user_error():
    with pytest.raises(
        UserError, match=r"'aps/super_glue/rte', split 'train', cannot be loaded .* `data=DIR`, in DIR/rte/"
    ):
        draw(None, get("rte"))


@pytest.mark.parametrize("task", ["pico_sentiment", "pico_topic", "pico_entail", "pico_cause", "pico_span"])
def test_generated_rows_need_no_folder(task, tmp_path):
    splits, notes = draw(tmp_path, get(task))
    assert [len(splits[s]) for s in ("train", "dev", "test")] == [10, 5, 8] and notes == []
    assert get(task).required() <= splits["train"][0][1].keys()
    assert splits == draw(None, get(task))[0] != draw(None, get(task), seed=1)[0]


def test_a_folder_that_a_generated_task_does_not_read_is_said_or_refused(tmp_path, monkeypatch):
    """One folder may be for several tasks, some of which generate their rows."""
    loaded, task, sizes = load_model("pico"), get("pico_sentiment"), {"train": 4, "dev": 2, "test": 2}
    found = prepare(task, loaded, data=tmp_path, **sizes)
    assert found.notes == [f"pico_sentiment: its rows are generated, and none are read from {tmp_path}"]
    assert found.train == prepare(task, loaded, **sizes).train
    with pytest.raises(
        UserError, match="none does not exist; task 'pico_sentiment' generates its rows: leave `data` out"
    ):
        prepare(task, loaded, data=tmp_path / "none", **sizes)
    write(tmp_path, "pico_sentiment", train=rows(4))
    with pytest.raises(
        UserError, match="generates its rows and does not read .*pico_sentiment; describe these rows as a task"
    ):
        prepare(task, loaded, data=tmp_path, **sizes)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "dir").mkdir()
    assert prepare(task, loaded, data="~/dir", **sizes).notes == [
        f"pico_sentiment: its rows are generated, and none are read from {tmp_path}/dir"
    ]
    write(tmp_path / "dir", train=rows(20), validation=rows(5, 20))
    assert texts(draw("~/dir")[0]) == texts(draw(tmp_path / "dir")[0])


@pytest.mark.parametrize("given", [[{"text": "a"}], {"train": [{"text": "a"}]}, Dataset.from_dict({"text": ["a"]}), 3])
def test_data_that_would_not_be_read_is_refused(given):
    """A task that generates its rows reads those in memory as finetune does: with the task that `in_memory` makes."""
    loaded, sizes = load_model("pico"), {"train": 4, "dev": 0, "test": 0}
    asked = [get("pico_sentiment")] if isinstance(given, dict) else [get("pico_sentiment"), TASK]
    for task in asked:
        with pytest.raises(
            UserError, match=rf"`data` is of the type {type(given).__name__}, and task '{task.name}' .*in_memory\(TASK"
        ):
            prepare(task, loaded, data=given, **sizes)
    held = in_memory(get("pico_sentiment"), get("pico_sentiment").generate("train", 4, 7))
    assert len(prepare(held[0], loaded, data=held[1], **sizes).train) == 4


GOOD = [{"text": "a", "label": 0}] * 20


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (
            [*GOOD, {"text": "a", "label": 2}],
            r"train.jsonl, row 21: 'label' is 2, which is none of the labels .*\(0, 1\)",
        ),
        ([*GOOD, {"text": None, "label": 1}], "row 21: 'text' is null"),
        ([*GOOD, {"text": "a", "label": "1"}], "row 21: 'label' is '1'"),
        (
            [*GOOD, {"sentence": "a", "label": 1}],
            r"row 21: task 'toy' needs the column 'text'; columns found: 'sentence', 'label'",
        ),
        ("", "train.jsonl is empty"),
        ("\n\n", "train.jsonl is empty"),
        ('{"text": "a", "label": 0}\n{"text": \n', r"train.jsonl, line 2: not a JSON object \(Expecting value"),
        ("[1, 2]\n", "line 1: one JSON object with named columns was expected"),
        (GOOD[:1], "too few for 10 train and 5 dev"),
        (
            '{"text": "a", "text": "b", "label": 0}\n',
            "line 1 is beyond what can be read: the key 'text' is given twice",
        ),
        ('{"text": NaN, "label": 0}\n', "row 1: 'text' is nan"),
    ],
)
def test_bad_files_are_one_clear_sentence(tmp_path, train, words):
    write(tmp_path, train=train, validation=GOOD)
    with pytest.raises(UserError, match=words) as raised:
        draw(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_table_with_a_column_twice(tmp_path):
    write(tmp_path, train=GOOD, validation=GOOD)
    (tmp_path / "toy" / "train.jsonl").unlink()
    (tmp_path / "toy" / "train.csv").write_text("text,text,label\n" + "a,b,0\n" * 20)
    with pytest.raises(UserError, match="train.csv has the column 'text' twice"):
        draw(tmp_path)


def test_blank_texts_are_counted():
    mixed = [{"text": " " if i % 5 == 0 else f"good {i}", "label": i % 2} for i in range(40)]
    task, found = in_memory(TASK, {"train": mixed, "validation": mixed[1:5]})
    notes = prepare(task, load_model("pico"), data=found, train=40, dev=2, test=2).notes
    assert "toy: 'text' is blank in 8 of 39 train rows" in notes
    assert not any("blank" in note and "train" not in note for note in notes)


def test_a_label_word_that_begins_another_is_named():
    """The likelihood of the longer one is that of the shorter times that of its rest, so it is never predicted."""
    mixed = [{"text": f"good {i}", "label": i % 2} for i in range(40)]
    for words, expected in ((("good", "good fun"), True), (("good", "bad"), False)):
        task, found = in_memory(TASK.model_copy(update={"labels": dict(enumerate(words))}), mixed)
        notes = prepare(task, load_model("pico"), data=found, train=20, dev=2, test=2).notes
        assert any("'good' begins 'good fun' for pico" in note for note in notes) == expected


def test_a_line_that_is_not_text(tmp_path):
    write(tmp_path, train=GOOD, validation=GOOD)
    (tmp_path / "toy" / "train.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match="is not UTF-8 text"):
        draw(tmp_path)


def test_missing_places_are_one_clear_sentence(tmp_path):
    write(tmp_path, "other", train=GOOD)
    with pytest.raises(UserError, match="has no folder 'toy'; tasks found there: other"):
        draw(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        draw(tmp_path / "absent")
    with pytest.raises(UserError, match="is a file; `data` names a folder"):
        draw(tmp_path / "other" / "train.jsonl")
    write(tmp_path, train=GOOD)
    with pytest.raises(UserError, match=r"needs validation\.jsonl in"):
        draw(tmp_path)
    with pytest.raises(UserError, match="names neither files nor a Hub data set"):
        draw(None)
    with pytest.raises(UserError, match="must not be negative"):
        draw(tmp_path, dev=-1)


def test_a_column_of_the_wrong_type_is_a_user_error(tmp_path):
    row = {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "label": 0}
    bad = {"passage": "p", "query": "q", "entities": 3, "answers": ["a"]}
    write(tmp_path, "record", train=[bad] * 20, validation=[bad] * 20)
    with pytest.raises(UserError, match="row 1: a column of task 'record' has the wrong type"):
        draw(tmp_path, get("record"))
    del row["choice2"]
    write(tmp_path, "copa", train=[row] * 20, validation=[row])
    with pytest.raises(UserError, match="needs the column 'choice2'"):
        draw(tmp_path, get("copa"))


# -- version 2 of the split ---------------------------------------------------------------------------------------------

SIZES = st.integers(min_value=1, max_value=60)


@settings(max_examples=60, deadline=None)
@given(train=SIZES, dev=SIZES, test=SIZES, other_dev=SIZES, other_test=SIZES, shared=st.booleans())
def test_an_evaluation_of_other_sizes_scores_no_row_that_was_trained_on(
    train, dev, test, other_dev, other_test, shared
):
    """The training rows of a run are recorded, and an evaluation with other sizes leaves them out."""
    task = TASK.model_copy(update={"test_split": "train" if shared else "validation"})
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), train=rows(200), validation=rows(60, 1000))
        run = data.draw(task, Path(folder), train=train, dev=dev, test=test, seed=3)
        record = {"task": "toy", **json.loads(json.dumps(run.record))}
        sizes = {"train": data.DEFAULTS["train"], "dev": other_dev, "test": other_test, "seed": 0, "record": record}
        later = data.draw(task, Path(folder), **sizes)
    trained, scored = texts(run.rows)["train"], texts(later.rows)
    assert not {*trained} & {*scored["dev"], *scored["test"]}
    assert not {*scored["dev"]} & {*scored["test"]}
    assert scored["train"] == trained


def test_dev_and_test_rows_do_not_depend_on_how_many_train_rows_are_asked_for(tmp_path):
    write(tmp_path, train=rows(300), validation=rows(50, 1000))
    task = TASK.model_copy(update={"test_split": "train"})
    for chosen in (TASK, task):
        some, more = (texts(draw(tmp_path, chosen, train=size, dev=30, test=40)[0]) for size in (20, 200))
        assert some["dev"] == more["dev"] and some["test"] == more["test"]
        assert more["train"][:20] == some["train"]


def test_the_runs_own_rows_are_evaluated_by_default(tmp_path):
    """600 rows, 500 trained on: evaluated at the default sizes, the model is scored on the run's own 50 and 50."""
    task = TASK.model_copy(update={"test_split": "train"})
    write(tmp_path, train=rows(600))
    run = data.draw(task, tmp_path, train=500, dev=50, test=50, seed=3)
    later = data.draw(task, tmp_path, **data.DEFAULTS, seed=0, record={"task": "toy", **run.record})
    assert texts(later.rows) == texts(run.rows)
    other = data.draw(task, tmp_path, **data.DEFAULTS, seed=0, record={"task": "toy", **run.record, "rows": 601})
    assert len(other.rows["train"]) == 240  # another file, to which the record does not apply


def test_all_rows_used_they_are_those_of_version_1(tmp_path):
    """If train and dev use every row, the splits are those of earlier versions, published for WSC, CB and COPA."""
    write(tmp_path, train=rows(60), validation=rows(50, 100))
    found = texts(draw(tmp_path, train=40, dev=20, seed=5)[0])
    order = np.random.default_rng([5, *b"train"]).permutation(60).tolist()
    assert found["train"] + found["dev"] == [f"text {i}" for i in order]


TRAIN, DEV = data.DEFAULTS["train"], data.DEFAULTS["dev"]


@pytest.mark.parametrize(
    ("train", "dev", "found"),
    [(TRAIN, 10, (70, 10)), (50, DEV, (50, 30)), (TRAIN, DEV, (54, 26)), (TRAIN, 50, (30, 50)), (1000, DEV, (54, 26))],
)
def test_a_size_that_is_asked_for_is_kept(tmp_path, train, dev, found):
    write(tmp_path, train=rows(80), validation=rows(9, 100))
    splits, notes = draw(tmp_path, train=train, dev=dev, test=9)
    assert (len(splits["train"]), len(splits["dev"])) == found
    assert notes[0] == f"toy: 80 rows give {found[0]} train and {found[1]} dev rows instead of {train} and {dev}"


@pytest.mark.parametrize(
    ("train", "dev", "found"), [(180, 20, [179, 20, 1]), (150, 50, [149, 50, 1]), (150, 49, [150, 49, 1])]
)
def test_sizes_that_take_every_row_leave_one_for_the_others(train, dev, found):
    drawn = data.draw(*in_memory(TASK, rows(200)), train=train, dev=dev, test=data.DEFAULTS["test"], seed=0)
    assert [len(drawn.rows[split]) for split in data.SPLITS] == found
    assert f"toy: 200 rows give {found[0]} train and {dev} dev and 1 test rows instead of" in drawn.notes[0]


def test_the_papers_dev_size_gives_way_to_one_that_is_asked_for(tmp_path):
    write(tmp_path, train=rows(100), validation=rows(9, 100))
    task = TASK.model_copy(update={"dev_rows": 10})
    assert [len(draw(tmp_path, task, dev=size)[0]["dev"]) for size in (DEV, 40)] == [10, 40]


def test_few_shot_rows_are_so_many_of_each_class(tmp_path):
    write(
        tmp_path, train=[{"text": f"text {i}", "label": int(i % 10 == 0)} for i in range(100)], validation=rows(9, 200)
    )
    found = data.draw(TASK, tmp_path, train=TRAIN, dev=DEV, test=9, seed=1, k_per_class=4)
    labels = [row["label"] for _, row in found.rows["train"]]
    assert (labels.count(0), labels.count(1), len(found.rows["dev"])) == (4, 4, 8)
    again, other = (
        data.draw(TASK, tmp_path, train=TRAIN, dev=DEV, test=9, seed=seed, k_per_class=4) for seed in (1, 2)
    )
    assert texts(again.rows) == texts(found.rows) and texts(other.rows)["train"] != texts(found.rows)["train"]
    assert not {*texts(found.rows)["train"]} & {*texts(found.rows)["dev"]}
    few = [data.draw(TASK, tmp_path, train=TRAIN, dev=dev, test=9, seed=1, k_per_class=4) for dev in (499, 500)]
    assert [len(each.rows["dev"]) for each in few] == [92, 92]
    with pytest.raises(UserError, match=r"`k_per_class` is 11, and .* has 10 rows of the class 1"):
        data.draw(TASK, tmp_path, train=TRAIN, dev=DEV, test=9, seed=1, k_per_class=11)


def test_few_shot_rows_are_looked_for_until_every_class_is_full(tmp_path, monkeypatch):
    write(tmp_path, train=rows(1000), validation=rows(9, 2000))
    read, real = [], data.checked
    monkeypatch.setattr(data, "checked", lambda *given: read.append(given) or real(*given))
    source = load(TASK, TASK.train_split, tmp_path)
    chosen = data._few(TASK, source, list(range(1000)), 3)
    assert len(chosen) == 6 and len(read) == max(chosen) + 1 < 20


def test_a_class_without_train_rows_and_rows_in_two_splits_are_said(tmp_path):
    write(tmp_path, train=[{"text": f"t{i % 20}", "label": 0} for i in range(40)], validation=rows(9, 100))
    _, notes = draw(tmp_path, train=30, dev=10)
    assert "toy: no train row has the class 1" in notes
    assert any(note.startswith("toy: ") and "of 10 dev rows are train rows as well" in note for note in notes)


def test_rows_in_two_splits_are_known_by_what_the_prompt_reads():
    numbered = [{"id": i, "text": f"text {i % 5}", "label": 0} for i in range(20)]
    drawn = data.draw(*in_memory(TASK, {"train": numbered, "validation": numbered}), train=10, dev=5, test=8, seed=0)
    assert any("of 5 dev rows are train rows as well" in note for note in drawn.notes)
    assert "toy: 6 of 8 test rows are train rows as well, word for word" in drawn.notes
    same = [{"text": f"text {i}", "label": 0} for i in range(20)]
    train = [{"text": f"other {i}", "label": 0} for i in range(20)]
    drawn = data.draw(
        *in_memory(TASK, {"train": train, "validation": same, "test": same}), train=9, dev=20, test=8, seed=0
    )
    assert "toy: 8 of 8 test rows are dev rows as well, word for word" in drawn.notes


def test_own_train_validation_and_test_files(tmp_path):
    for name, start in (("train", 0), ("validation", 100), ("test", 200)):
        write(tmp_path, **{name: rows(30, start)})
    files = {name: str(tmp_path / "toy" / f"{name}.jsonl") for name in ("train", "validation", "test")}
    for task in (
        TASK.model_copy(update={"files": files}),
        TASK.model_copy(update={"test_split": "test", "dev_split": "validation"}),
    ):
        found = texts(draw(tmp_path, task)[0])
        assert [{int(text.split()[1]) // 100 for text in found[s]} for s in ("train", "dev", "test")] == [{0}, {1}, {2}]
    same = TASK.model_copy(update={"dev_split": "validation"})  # dev and test from one split are disjoint
    found = texts(draw(tmp_path, same)[0])
    assert not {*found["dev"]} & {*found["test"]} and len(found["dev"]) == 5 and len(found["test"]) == 8


# -- forms of files ----------------------------------------------------------------------------------------------------


def _write_as(path, content):
    if path.suffix == ".jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + "\n".join(map(json.dumps, content)).encode())  # a byte-order mark
    elif path.suffix == ".json":
        path.write_text(json.dumps(content, indent=1))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(content)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_the_form_of_a_file_changes_no_row(tmp_path, ending):
    content = [{"text": f'a "{i}", b\nc', "label": i % 2} for i in range(30)]
    (tmp_path / "toy").mkdir()
    for split in ("train", "validation"):
        _write_as(tmp_path / "toy" / f"{split}{ending}", content)
    expected = [content[i] for i in np.random.default_rng([0, *b"train"]).permutation(30)[:10]]
    assert [row for _, row in draw(tmp_path)[0]["train"]] == expected


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("train.jsonl", '[{"text": "a", "label": 0}]\n', r"found a list; name a file with one JSON list \*.json"),
        ("train.json", '[{"text": "a", "label": 0}, 3]', "row 2: one JSON object with named columns was expected"),
        ("train.json", '[{"text": "a"', "not a JSON list"),
        ("train.csv", "text,label\na,0,more\n", "row 1 has another number of cells than the header has columns"),
        ("train.csv", "text,label\na,2\n", "row 1: 'label' is '2', which is none of the labels"),
        (
            "train.csv",
            "text,label\n",
            "train.csv has no rows; task 'toy' needs one line per row after that of the columns",
        ),
        ("train.json", "[]", "train.json has no rows; task 'toy' needs a list of JSON objects"),
        ("train.parquet", "no", "cannot be read as Parquet"),
        (
            "train.jsonl",
            '{"text": ["a"], "label": 0}\n',
            "row 1: 'text' holds a list, and a prompt takes text or numbers",
        ),
        ("train.jsonl", '{"text": "a", "label": null}\n', "row 1: 'label' is null, .*list null under `unlabelled`"),
        ("train.jsonl", '{"text": "a", "label": -1}\n', "'label' is -1, .*list it under `unlabelled`"),
        ("train.jsonl", json.dumps({"text": "a" * 2**20, "label": 0}), "is longer than 1,048,576 characters"),
        (
            "train.csv",
            "text,label\n" + "a" * (2**20 + 1) + ",0\n",
            "row 1 has a cell of more than 1,048,576 characters",
        ),
    ],
)
def test_bad_files_of_every_form_are_one_sentence(tmp_path, name, text, words):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / name).write_text(text)
    with pytest.raises(UserError, match=words):
        draw(tmp_path)


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_a_cell_may_be_a_long_document(tmp_path, ending):
    before = csv.field_size_limit(2**17)  # Python's own, which was raised if a table was read in this process
    try:
        (tmp_path / "toy").mkdir()
        mark = "\t" if ending == ".tsv" else ","
        lines = [f"{'a' * 200_000}{index}{mark}{index % 2}" for index in range(20)]
        for split in ("train", "validation"):
            (tmp_path / "toy" / f"{split}{ending}").write_text("\n".join([f"text{mark}label", *lines]) + "\n")
        assert all(len(row["text"]) > 200_000 for _, row in draw(tmp_path)[0]["train"])
    finally:
        csv.field_size_limit(before)


def test_a_file_of_the_task_that_does_not_exist(tmp_path):
    task = TASK.model_copy(update={"files": {"train": tmp_path / "none.csv"}})
    with pytest.raises(
        UserError, match="none.csv does not exist; task 'toy' needs it: correct the path, or add the file$"
    ):
        draw(None, task)
    task = TASK.model_copy(update={"files": {"train": tmp_path}})
    with pytest.raises(UserError, match="is not a file; task 'toy' needs it"):
        draw(None, task)


def test_null_and_empty_labels_can_be_left_out(tmp_path):
    task = TASK.model_copy(update={"unlabelled": (None, "")})
    write(tmp_path, train=[{"text": "x", "label": None}, {"text": "y", "label": ""}, *rows(20)], validation=rows(9, 50))
    assert {row["label"] for _, row in draw(tmp_path, task)[0]["train"]} == {0, 1}


def test_too_many_choices_and_labels_are_refused(tmp_path):
    task = Task(name="toy", kind="choice", prompt="{text}", choices=("options",))
    write(tmp_path, train=[{"text": "a", "options": ["b"] * 3000, "label": 0}])
    with pytest.raises(UserError, match="holds 3,000 choices; at most 256 are compared"):
        draw(tmp_path, task)
    with pytest.raises(UserError, match="3,000 labels were given; at most 1,000"):
        Task(name="toy", kind="classification", prompt="{text}", labels=[f"w{i}" for i in range(3000)])  # type: ignore[arg-type]


def _table_task(folder: Path, name: str, text: str) -> list[dict]:
    (folder / name).write_text(text)
    task = Task(name="q", kind="classification", prompt="{text} It was", labels=["bad", "good"])
    return list(load(task.model_copy(update={"files": {"train": folder / name}}), "train", None).rows)


def test_quotation_marks_in_unquoted_tables(tmp_path):
    lines = [(f'"hello {i}' if i in (3, 9) else f'the "film" {i}', i % 2) for i in range(20)]
    plain = [{"text": text, "label": label} for text, label in lines]
    tsv = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in lines)
    assert _table_task(tmp_path, "a.tsv", tsv) == plain
    one = tsv.replace('"hello 9', "hello 9")  # a single mark, to the end of the file
    assert [row["text"] for row in _table_task(tmp_path, "c.tsv", one)][3] == '"hello 3'
    closed = tsv.replace('"hello 9', 'hello 9"')  # two marks that look like the ends of one cell
    assert len(_table_task(tmp_path, "d.tsv", closed)) == 20
    quoted = [{"text": 'a "b"\n\tc', "label": 0}, {"text": "d, e", "label": 1}] * 4
    for name in ("e.tsv", "e.csv"):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter="\t" if name.endswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(quoted)
        assert _table_task(tmp_path, name, (tmp_path / name).read_text()) == quoted
    for bad in (tsv, one):
        with pytest.raises(UserError, match="line 5: a quotation mark opens a cell"):
            _table_task(tmp_path, "f.csv", bad.replace("\t", ","))


def test_rows_in_memory_with_values_that_are_not_json():
    when = datetime.datetime(2026, 1, 1)
    rows = [{"text": np.str_(f"film {i}"), "label": np.int64(i % 2), "when": when, "x": np.ones(2)} for i in range(20)]
    task = Task(name="q", kind="classification", prompt="{text} It was", labels=["bad", "good"])
    own, splits = in_memory(task, rows)
    found = load(own, "train", splits)
    assert [row["label"] for row in found.rows] == [i % 2 for i in range(20)] and len(found.usable) == 20
    dated = Task(name="q", kind="classification", prompt="{when} It was", labels=["bad", "good"])
    with pytest.raises(UserError, match="'when' holds a datetime, and a prompt takes text or numbers"):
        load(in_memory(dated, rows)[0], "train", splits)
    stream = Dataset.from_list([{"text": "a", "label": 0}]).to_iterable_dataset()
    with pytest.raises(UserError, match="`data` has train rows of the type IterableDataset"):
        in_memory(task, stream)
    with pytest.raises(UserError, match=r'of the type DataFrame.*Dataset: give `.to_dict\("records"\)` of it'):
        in_memory(task, Dataset.from_list([{"text": "a", "label": 0}]).to_pandas())
    with pytest.raises(UserError, match="`task` is missing: with rows as `data`, name a task"):
        metazo.finetune("pico", data=rows)


def test_answers_that_are_cut_by_the_longest_input_are_noted():
    task = Task(name="g", kind="generation", prompt="{text}", max_new_tokens=50)
    resolved, given = in_memory(task, [{"text": f"the cat {i}", "answer": "home"} for i in range(9)])
    said = "g: answers have at most 32 tokens instead of 50 (max_new_tokens), because inputs and answers together"
    assert any(said in note for note in prepare(resolved, load_model("pico"), data=given, max_length=64).notes)
    assert not any("answers" in note for note in prepare(resolved, load_model("pico"), data=given).notes)


def test_rows_of_every_training_are_left_out():
    """A model that is trained twice, by other sizes, another task or another seed, is not tested on rows of the first time."""
    task, given = in_memory(TASK, rows(100))
    first = data.draw(task, given, train=60, dev=10, test=10, seed=3)
    trained = {place for place, _ in first.rows["train"]}
    for later in ({"task": "other", "rows": 7}, {"task": "toy", "version": 2, "seed": 3, "rows": 100, "k_per_class": None,
                  "train": 10, "dev": 10, "test": 10}):  # fmt: skip
        record = {**later, "earlier": [{"task": "toy", **first.record}]}
        drawn = data.draw(task, given, train=10, dev=10, test=90, seed=0, record=record)
        held = {place for split in ("dev", "test") for place, _ in drawn.rows[split]}
        assert len(held) in range(20, 41) and not held & trained
    before = {key: value for key, value in record["earlier"][0].items() if key not in ("columns", "contents")}
    fewer = data.draw(
        task, in_memory(TASK, rows(99))[1], train=10, dev=10, test=10, seed=0, record=record | {"earlier": [before]}
    )
    assert sum("trained on some of 100 rows and there are 99 now" in note for note in fewer.notes) == 1  # said once
    for odd in (None, "x", [None, 3], [{"task": "toy", "rows": [1]}]):
        data.draw(task, given, train=10, dev=10, test=10, seed=0, record=later | {"earlier": odd})


def _changed(given):
    """Rows of a task that a model was trained on, as they are found later."""
    mixed = random.Random(5).sample(given, len(given))
    named = TASK.model_copy(update={"name": "other", "prompt": "I read {text} and felt", "label": "mood"})
    return {
        "in another order": (TASK, mixed),
        "among more rows": (TASK, mixed + rows(80, 1000)),
        "less some of them": (TASK, [row for row in given if int(row["text"].split()[1]) % 3]),
        "of another name and label": (named, [row | {"mood": row["label"]} for row in given]),
        "of another name in another order": (named, [{"mood": row["label"], "text": row["text"]} for row in mixed]),
        "with other labels": (TASK, [row | {"label": (i // 7) % 2} for i, row in enumerate(given)]),
    }


@pytest.mark.parametrize("how", _changed(rows(150)))
@pytest.mark.parametrize("sizes", [{}, {"k_per_class": 12}, {"train": 70}])
@pytest.mark.parametrize("most", [5000, 20])
def test_training_rows_are_known_by_their_content(how, sizes, most, monkeypatch):
    """Whatever the task's name, the order and the labels are; a note says so if they are too many for a hash each."""
    monkeypatch.setattr(trainings, "MOST", most)
    (task, given), (other, changed) = (TASK, rows(150)), _changed(rows(150))[how]
    task, other = (one.model_copy(update={"test_split": "train"}) for one in (task, other))
    run = data.draw(*in_memory(task, given), **{**data.DEFAULTS, "seed": 3, **sizes})
    record = json.loads(json.dumps({"task": "toy", **run.record}))
    assert data.draw(*in_memory(task, given), **data.DEFAULTS, seed=8, record=record).rows == run.rows
    later = data.draw(*in_memory(other, changed), **data.DEFAULTS, seed=8, record=record)
    doubts = [note for note in later.notes if "may be training rows" in note]
    found = texts(later.rows)
    leaked = {*texts(run.rows)["train"]} & {*found["dev"], *found["test"]}
    if most == 20:
        same = how == "with other labels" or (how == "of another name and label" and "k_per_class" not in sizes)
        assert bool(doubts) == (not same or "k_per_class" in sizes) and (doubts or not leaked)
        return
    assert not leaked and len(doubts) == (how == "less some of them")
    if how not in ("among more rows", "less some of them"):  # as many as then, but for few-shot rows of other labels
        assert all(len(found[split]) >= run.record[split] - 2 for split in data.SPLITS)


def test_training_rows_in_a_test_file_are_counted():
    run = data.draw(*in_memory(TASK, rows(50)), train=20, dev=5, test=5, seed=3)
    record = {"task": "toy", **run.record}
    later = {"train": rows(30, 100), "validation": rows(60)}
    drawn = data.draw(*in_memory(TASK, later), **data.DEFAULTS, seed=0, record=record)
    assert "toy: the model was trained on 20 of 60 test rows" in drawn.notes
    again = {"train": rows(50), "validation": rows(60)}  # a note about the train rows says it
    notes = data.draw(*in_memory(TASK, again), **data.DEFAULTS, seed=0, record=record).notes
    assert any("are train rows as well" in note for note in notes) and not any("was trained on 2" in n for n in notes)


def test_a_test_file_keeps_its_rows_if_the_train_file_is_in_another_order():
    others = {"validation": rows(20, 200), "test": rows(90, 100)}
    run = data.draw(*in_memory(TASK, {"train": rows(50), **others}), train=20, dev=5, test=30, seed=3)
    later = {"train": rows(50)[::-1], **others}
    drawn = data.draw(*in_memory(TASK, later), train=20, dev=5, test=30, seed=0, record={"task": "toy", **run.record})
    assert drawn.rows["test"] == run.rows["test"]


@pytest.mark.parametrize("name", ["a\u00a0b", "na\u200cme", "d"])
def test_a_record_is_plain_text_whatever_the_columns_are_called(name):
    """Or the model could not be saved at the end of its run."""
    task = Task(name="pick", kind="choice", prompt="{q} {}", choices=[name, "other"], label="label")
    given = [{"q": f"which {i}", name: f"this {i}", "other": f"that {i}", "label": i % 2} for i in range(40)]
    run = data.draw(*in_memory(task, given), train=20, dev=5, test=5, seed=3)
    assert is_plain(run.record)
    again = data.draw(
        *in_memory(task, given[::-1]), train=20, dev=5, test=5, seed=8, record={"task": "pick", **run.record}
    )
    assert not {*map(str, again.rows["test"])} & {*map(str, run.rows["train"])}


def test_hub_rows_are_found_in_another_order(tmp_path):
    """Rows of the Hub are read column by column."""
    task = TASK.model_copy(update={"hub": str(tmp_path / "toy"), "test_split": "train", "unlabelled": (7,)})
    content = [row if i % 3 else row | {"label": 7} for i, row in enumerate(rows(100))]
    write(tmp_path, train=content)
    run = data.draw(task, None, **data.DEFAULTS, seed=3)
    write(tmp_path, train=content[::-1])
    later = data.draw(task, None, **data.DEFAULTS, seed=8, record={"task": "toy", **run.record})
    trained, found = {*texts(run.rows)["train"]}, texts(later.rows)
    assert {*found["train"]} == trained and not trained & {*found["dev"], *found["test"]} and not later.notes


def test_records_of_earlier_versions_identify_rows_by_name_and_number():
    """A copy of a training row is no training row, so that a run is scored on its own rows."""
    own = TASK.model_copy(update={"test_split": "train"})
    task, given = in_memory(own, rows(50) + rows(50))
    for sizes in ({"train": 40}, {"k_per_class": 12}):
        run = data.draw(task, given, **{**data.DEFAULTS, "seed": 3, **sizes})
        record = {"task": "toy", **run.record}
        before = {key: value for key, value in record.items() if key not in ("columns", "contents")}
        for one in (record, before, record | {"contents": "x"}, record | {"columns": [3]}):
            assert data.draw(task, given, **data.DEFAULTS, seed=8, record=one).rows == run.rows
        other = in_memory(own.model_copy(update={"name": "other"}), rows(50) + rows(50))
        assert data.draw(*other, **data.DEFAULTS, seed=8, record=before).record["seed"] == 8


def test_a_given_size_wins_over_the_few_shot_of_the_record():
    task, given = in_memory(TASK, rows(100))
    few = data.draw(task, given, train=data.DEFAULTS["train"], dev=10, test=10, seed=3, k_per_class=4)
    record = {"task": "toy", **few.record}
    assert len(few.rows["train"]) == 8 and not few.notes
    assert len(data.draw(task, given, train=64, dev=10, test=10, seed=3, record=record).rows["train"]) == 64
    assert (
        len(data.draw(task, given, train=data.DEFAULTS["train"], dev=10, test=10, seed=3, record=record).rows["train"])
        == 8
    )
    both = data.draw(task, given, train=64, dev=10, test=10, seed=3, k_per_class=4)
    assert both.notes == ["toy: `k_per_class` 4 gives 8 train rows, not 64"]
