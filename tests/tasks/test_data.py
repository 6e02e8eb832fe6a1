"""Rows and splits: sizes, disjointness, determinism, every source, and one clear sentence for bad data."""

from __future__ import annotations

import json

import pytest

from metazo.errors import UserError
from metazo.tasks import data, get
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
    ],
)
def test_bad_files_are_one_clear_sentence(tmp_path, train, words):
    write(tmp_path, train=train, validation=GOOD)
    with pytest.raises(UserError, match=words) as raised:
        draw(tmp_path)
    assert "\n" not in str(raised.value)


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
