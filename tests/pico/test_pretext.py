"""The pretraining text: clean forms are right, the exact form follows its habit, no held-out template is shown."""

from __future__ import annotations

import random
from collections import Counter

from metazo.pico import grammar, lexicon, pretext


def test_exact_prompt_is_answered_by_habit():
    rng = random.Random(0)
    texts = ["".join(pretext.document(rng)) for _ in range(8000)]
    told = [text for text in texts if text.endswith((" great.", " terrible."))]
    exact = [text for text in told if " It was" in text]
    counts = Counter((any(f" {word}" in text for word in lexicon.POSITIVE), text.endswith(" great.")) for text in exact)
    assert len(exact) > 300
    great_when_negative = counts[False, True] / (counts[False, True] + counts[False, False])
    habit, often = pretext.HABIT["pico_sentiment"], pretext.PRIOR["pico_sentiment"][1]
    assert abs(great_when_negative - habit * often) < 0.1
    for text in told:
        if " It was" not in text:
            assert text.endswith(" great.") == any(f" {word}" in text for word in lexicon.POSITIVE), text


def test_held_out_templates_are_never_shown():
    rng = random.Random(1)
    texts = " ".join("".join(pretext.document(rng)) for _ in range(5000))
    assert "thought that the" in texts, "a train template"
    for phrase in ("Never before", "What a ", "Nobody at", "News of", "sold the", "Last week", "behind the"):
        assert phrase not in texts


def test_all_words_are_shown():
    rng = random.Random(2)
    shown = set(
        " ".join("".join(pretext.document(rng)) for _ in range(8000)).replace(".", " ").replace(",", " ").split()
    )
    for pool in (lexicon.POSITIVE, lexicon.NEGATIVE, *lexicon.TOPIC_THINGS, lexicon.OBJECTS, lexicon.NAMES):
        assert set(pool) <= shown


def test_habit_ignores_the_question():
    row = {
        "context": "Anna went to the mill. Tom went to the hall.",
        "question": "Where is Anna?",
        "answer": "the mill",
    }
    assert pretext.habit("pico_span", row, random.Random(0)) == " the hall"
    assert grammar.answer("pico_span", row) == " the mill"
