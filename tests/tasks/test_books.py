"""The task that is part of the package: its rows are those of its command, balanced, and each in one split."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from metazo.errors import UserError
from metazo.tasks import books, data, resolve


def test_every_passage_is_in_one_split_and_kinds_are_balanced() -> None:
    seen: set[str] = set()
    for split, count in books.ROWS.items():
        rows = books.draw(split, 10_000, seed=0)
        assert Counter(row["label"] for row in rows) == dict.fromkeys(range(4), count)
        texts = {row["text"] for row in rows}
        assert len(texts) == len(rows) and not texts & seen
        seen |= texts
        words = [len(text.split()) for text in texts]
        assert min(words) >= books.WORDS[0] and max(words) <= books.WORDS[1]


def test_a_draw_follows_its_seed() -> None:
    assert books.draw("train", 5, 1) == books.draw("train", 9, 1)[:5] != books.draw("train", 5, 2)
    assert resolve("books").labels == dict(enumerate(books.BOOKS))


def test_rows_that_are_not_there_are_said_and_the_record_has_the_sizes() -> None:
    drawn = data.draw(books.TASK, None, train=5000, dev=500, test=20, seed=0)
    assert [len(drawn.rows[split]) for split in data.SPLITS] == [1600, 300, 20]
    assert {split: drawn.record[split] for split in data.SPLITS} == {"train": 1600, "dev": 300, "test": 20}
    assert drawn.notes == [
        "books: train has 1600 rows instead of 5000, all there are",
        "books: dev has 300 rows instead of 500, all there are",
    ]
    alone = data.draw(books.TASK, None, train=1, dev=1, test=1, seed=0)
    assert len(alone.notes) == 1 and alone.notes[0].startswith("books: no train row has the class ")


@pytest.mark.parametrize("k", [1, 8, 400])
def test_few_shot_rows_are_so_many_of_each_kind(k: int) -> None:
    drawn = data.draw(books.TASK, None, **data.DEFAULTS | {"test": 9}, seed=0, k_per_class=k)
    assert Counter(row["label"] for _, row in drawn.rows["train"]) == dict.fromkeys(range(4), k)
    assert len(drawn.rows["dev"]) == min(4 * k, 300) and drawn.record["train"] == 4 * k
    assert bool(drawn.notes) == (k == 400)


def test_more_few_shot_rows_than_there_are_of_a_kind() -> None:
    with pytest.raises(UserError, match="`k_per_class` is 401, and the train split of books has 400 rows of the class"):
        data.draw(books.TASK, None, **data.DEFAULTS, seed=0, k_per_class=401)


def test_the_file_is_what_the_command_makes(shared: Path) -> None:
    import json

    rows = books.make(shared / "data" / "corpus")
    assert rows == [json.loads(line) for line in books.FILE.read_text(encoding="utf-8").splitlines()]
