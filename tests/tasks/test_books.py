"""The task that is part of the package: its rows are those of its command, balanced, and each in one split."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from metazo.tasks import books, resolve


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


def test_the_file_is_what_the_command_makes(shared: Path) -> None:
    import json

    rows = books.make(shared / "data" / "corpus")
    assert rows == [json.loads(line) for line in books.FILE.read_text(encoding="utf-8").splitlines()]
