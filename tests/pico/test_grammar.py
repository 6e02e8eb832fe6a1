"""The generated tasks: the same on every machine, balanced, and held out as described in `metazo.pico.grammar`."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import pytest

from metazo.errors import UserError
from metazo.pico import grammar, lexicon

POOLS = [
    *grammar.POOLS.values(),
    lexicon.POSITIVE,
    lexicon.NEGATIVE,
    *lexicon.TOPIC_THINGS,
]


def text(row: dict) -> str:
    return " ".join(str(value) for key, value in sorted(row.items()) if key != "label")


def used(row: dict) -> set[str]:
    return set(re.findall(r"[A-Za-z]+", text(row)))


def held_out(pool: tuple, part: str) -> set[str]:
    """Words of one part of a pool that no other pool or template can put into a sentence."""
    templates = set(re.findall(r"[A-Za-z]+", repr(lexicon.TEMPLATES) + repr(lexicon.EVENTS)))
    elsewhere = {word for other in POOLS if other != pool for word in other}
    return set(lexicon.part(pool, part)) - elsewhere - templates


def test_same_rows_everywhere():
    rows = [
        grammar.examples(task, split, 20, seed) for task in grammar.TASKS for split in grammar.SPLITS for seed in (0, 1)
    ]
    assert hashlib.sha256(repr(rows).encode()).hexdigest()[:16] == "2f84298656921618"


@pytest.mark.parametrize("task", grammar.TASKS)
def test_seeds_differ_and_rows_do_not_repeat(task):
    rows = grammar.examples(task, "train", 1000, 0)
    assert len({repr(row) for row in rows}) == 1000
    assert rows != grammar.examples(task, "train", 1000, 1)


@pytest.mark.parametrize("task", [task for task in grammar.TASKS if task != "pico_span"])
@pytest.mark.parametrize("split", grammar.SPLITS)
def test_classes_are_balanced(task, split):
    counts = Counter(row["label"] for row in grammar.examples(task, split, 400))
    assert max(counts.values()) - min(counts.values()) <= 1
    words = grammar.PROMPTS[task].words
    assert sorted(counts) == list(range(len(words) if words else 2))


@pytest.mark.parametrize("task", grammar.TASKS)
def test_no_prompt_is_in_two_splits(task):
    seen = [{grammar.prompt(task, row) for row in grammar.examples(task, split, 1000)} for split in grammar.SPLITS]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


@pytest.mark.parametrize("task", grammar.TASKS)
def test_held_out_words_are_absent_from_train(task):
    train = set().union(*(used(row) for row in grammar.examples(task, "train", 1000)))
    for part in ("validation", "test"):
        rows = grammar.examples(task, part, 500)
        own = set().union(*(held_out(pool, part) for pool in POOLS))
        assert not train & own
        with_own = sum(bool(used(row) & own) for row in rows) / len(rows)
        assert 0.4 < with_own < 0.8, "about two thirds of the rows show held-out words"
        other = "test" if part == "validation" else "validation"
        assert not set().union(*(used(row) for row in rows)) & set().union(*(held_out(pool, other) for pool in POOLS))


def test_cause_pairs_are_held_out():
    for part in ("validation", "test"):
        for row in grammar.examples("pico_cause", "train", 1000):
            for event in lexicon.part(lexicon.EVENTS, part):
                assert event[1].removeprefix("the {person} ") not in text(row)


def test_parts_cover_every_pool_once():
    for pool in [*POOLS, lexicon.EVENTS]:
        parts = [word for name in ("train", "validation", "test") for word in lexicon.part(pool, name)]
        assert sorted(parts) == sorted(lexicon.part(pool, "all")) and len(set(parts)) == len(parts)


@pytest.mark.parametrize("task", grammar.TASKS)
def test_templates_are_held_out(task):
    train, validation, test = (set(lexicon.TEMPLATES[task][name]) for name in ("train", "validation", "test"))
    assert not train & validation and not train & test and not validation & test


def test_labels_are_right():
    for row in grammar.examples("pico_sentiment", "test", 300):
        opinions = used(row) & set(lexicon.NEGATIVE + lexicon.POSITIVE)
        assert opinions and opinions <= set((lexicon.NEGATIVE, lexicon.POSITIVE)[row["label"]])
    for row in grammar.examples("pico_span", "test", 300):
        assert row["answer"] in row["context"]
    for row in grammar.examples("pico_entail", "train", 300):
        told = {w for w in re.findall(r"[A-Za-z]+", row["hypothesis"]) if w not in ("an", "a")}
        known = used({"premise": row["premise"]})
        facts = told & set(lexicon.NAMES + lexicon.OBJECTS + lexicon.PLACES)
        assert (facts <= known) == (row["label"] == 0)


def test_choices_tell_of_one_person_and_one_is_right():
    pairs = {(a.replace("the {person} ", ""), b.replace("the {person} ", "")) for a, b in lexicon.EVENTS}
    for row in grammar.examples("pico_cause", "validation", 200):
        choice = row[("choice1", "choice2")[row["label"]]]
        told = (row["premise"], choice) if row["question"] == "effect" else (choice, row["premise"])
        assert any(a in told[0].replace("The ", "the ") and b in told[1].lower() for a, b in pairs), row


def test_articles():
    assert grammar.articles("we saw a old hat and a owl, not a dog.") == "We saw an old hat and an owl, not a dog."


@pytest.mark.parametrize(
    ("task", "split", "n"), [("x", "train", 1), ("pico_topic", "dev", 1), ("pico_topic", "test", 10**9)]
)
def test_bad_input_is_one_sentence(task, split, n, monkeypatch):
    monkeypatch.setattr(lexicon, "TEMPLATES", {"pico_topic": {"test": ("The {thing}.",), "train": ("The {thing}.",)}})
    with pytest.raises(UserError) as caught:
        grammar.examples(task, split, n)
    assert "\n" not in str(caught.value) and (task in str(caught.value))


def test_many_rows_are_not_made_without_a_word(monkeypatch):
    wanted = grammar.examples("pico_span", "train", 300)
    monkeypatch.setattr(grammar, "SLOW", 50)
    with pytest.warns(UserWarning) as told:
        assert grammar.examples("pico_span", "train", 300) == wanted
    assert [re.match(r"pico_span: \d+ of 300 train rows", str(one.message))[0] for one in told] == [
        "pico_span: 50 of 300 train rows",
        "pico_span: 200 of 300 train rows",
    ]
