"""books: which kind of book is a passage from? A real task that metazo carries, so that it needs no download.

1,600 train, 300 validation and 300 test passages of 14 to 32 words, from the public-domain books of the NLTK Gutenberg
selection: poems (Blake, Milton, Whitman), stage plays (Shakespeare, without the speakers' names), novels (Austen,
Melville, Chesterton) and children's stories (Bryant, Burgess, Carroll, Edgeworth), the four kinds in equal numbers. A
passage is in one split only, but passages of one book are in all of them. The file is made again by

    python -m metazo.tasks.books --corpus DIR_WITH_gutenberg

Where not to use it: with pico, whose pretraining text has these books, although not their kinds as labels.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from functools import cache
from pathlib import Path

import numpy as np

from metazo.io.files import require_files
from metazo.io.terminal import run_script
from metazo.tasks.task import Row, Task

FILE = Path(__file__).with_suffix(".jsonl")
BOOKS = {
    "a poem": ("blake-poems", "milton-paradise", "whitman-leaves"),
    "a stage play": ("shakespeare-caesar", "shakespeare-hamlet", "shakespeare-macbeth"),
    "a novel": (
        "austen-emma",
        "austen-persuasion",
        "austen-sense",
        "chesterton-ball",
        "chesterton-brown",
        "chesterton-thursday",
        "melville-moby_dick",
    ),
    "a children's story": ("bryant-stories", "burgess-busterbrown", "carroll-alice", "edgeworth-parents"),
}
ROWS = {"train": 400, "validation": 75, "test": 75}  # per kind
WORDS = (14, 32)
_SPEAKER = re.compile(r"^\s{1,4}[A-Z][A-Za-z]{1,8}\.(?: [A-Z][a-z]+\.)? ", re.MULTILINE)


def passages(text: str, play: bool) -> list[str]:
    """Runs of whole sentences with a number of words within WORDS."""
    text = _SPEAKER.sub("", text.replace("\r", "")) if play else text
    found, passage = [], ""
    for sentence in re.split(r"(?<=[.!?;])\s+", " ".join(re.sub(r"[_*]", "", text).split())):
        passage = f"{passage} {sentence}".strip()
        if len(passage.split()) >= WORDS[0]:
            if len(passage.split()) <= WORDS[1] and len(passage) <= 180 and passage.isascii():
                found.append(passage)
            passage = ""
    return found


def make(corpus: Path) -> list[Row]:
    """All rows, from the folder that holds gutenberg/*.txt; the same rows each time."""
    require_files(corpus, *(f"gutenberg/{book}.txt" for books in BOOKS.values() for book in books))
    rng, rows = random.Random(0), []
    for label, (kind, books) in enumerate(BOOKS.items()):
        pool: list[str] = []
        for book in books:
            text = (corpus / "gutenberg" / f"{book}.txt").read_text(encoding="utf-8", errors="replace")
            pool += rng.sample(own := passages(text, kind == "a stage play"), min(len(own), 900))
        pool = rng.sample(unique := list(dict.fromkeys(pool)), len(unique))
        for split, count in ROWS.items():
            rows += [{"split": split, "text": passage, "label": label} for passage in pool[:count]]
            pool = pool[count:]
    return rng.sample(rows, len(rows))


@cache
def _stored() -> dict[str, list[Row]]:
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    return {split: [row for row in rows if row["split"] == split] for split in ROWS}


def draw(split: str, number: int, seed: int) -> list[Row]:
    """`number` rows of a split in the order of a seed; all of them if it has fewer."""
    rows = _stored()[split]
    return [rows[place] for place in np.random.default_rng([seed, 0xB00C]).permutation(len(rows))[:number]]


TASK = Task(
    name="books",
    kind="classification",
    family="books",
    prompt="{text}\nThis passage is from {}",
    phrase="this passage is from {}",
    labels=list(BOOKS),  # type: ignore[arg-type]
    metric=("accuracy", "macro_f1"),
    generate=draw,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    rows = make(parser.parse_args().corpus)
    FILE.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rows in {FILE.name}")


if __name__ == "__main__":
    run_script(main)
