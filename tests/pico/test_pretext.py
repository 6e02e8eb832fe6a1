"""The pretraining text: clean forms are correct, the exact form follows its habit, and no held-out part occurs."""

from __future__ import annotations

import random
import re
from collections import Counter
from string import Formatter

import pytest

from metazo.pico import contexts, grammar, lexicon, pretext

HELD_OUT = ("validation", "test")
# Text that only the prompt of the task itself has.
MARKS = {
    "pico_sentiment": " It was",
    "pico_topic": " This is about",
    "pico_entail": " Does it mean that ",
    "pico_cause": " What was the ",
    "pico_span": " Question: ",
}


@pytest.fixture(scope="module")
def documents() -> list[tuple[str, str]]:
    rng = random.Random(0)
    return [pretext.document(rng) for _ in range(20000)]


@pytest.fixture(scope="module")
def texts(documents) -> list[str]:
    return ["".join(text) for text in documents]


def sentence_of(template) -> str:
    """The sentence of a template, or its premise or fact if it has several."""
    return template if isinstance(template, str) else template[0]


def pattern(template: str) -> re.Pattern:
    """Matches every sentence that fills ``template``, within a longer text."""
    parts = []
    for text, slot, _, _ in Formatter().parse(template):
        parts.append(re.sub(r"\b([Aa]) $", r"\1n? ", re.escape(text).replace(r"\ ", " ")))
        parts.append("" if slot is None else ".+" if slot == "event" else r"[A-Za-z]+")
    return re.compile(r"\b" + "".join(parts), re.IGNORECASE)


def held_out_words() -> set[str]:
    pools = [*grammar.POOLS.values(), lexicon.POSITIVE, lexicon.NEGATIVE, *lexicon.TOPIC_THINGS]
    train = {word for pool in pools for word in lexicon.part(pool, "train")}
    return {word for pool in pools for part in HELD_OUT for word in lexicon.part(pool, part)} - train - label_words()


def label_words() -> set[str]:
    return {word.strip() for form in grammar.PROMPTS.values() for word in form.words or ()}


def words_in(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z]+", text))


def test_pattern_finds_the_rows_of_a_template():
    for task in grammar.TASKS:
        patterns = [pattern(sentence_of(template)) for part in lexicon.TEMPLATES[task].values() for template in part]
        for split in grammar.SPLITS:
            for row in grammar.examples(task, split, 50):
                assert any(each.search(grammar.prompt(task, row)) for each in patterns), row


@pytest.mark.parametrize("task", grammar.TASKS)
def test_held_out_templates_are_never_shown(task, texts):
    held_out = [sentence_of(template) for part in HELD_OUT for template in lexicon.TEMPLATES[task][part]]
    for template in held_out:
        search = pattern(template).search
        found = next((text for text in texts if search(text)), None)
        assert found is None, (template, found)
    shown = pattern(sentence_of(lexicon.TEMPLATES[task]["train"][-1]))
    assert any(map(shown.search, texts)), "the search finds a train template"


@pytest.mark.parametrize("task", grammar.TASKS)
def test_held_out_words_are_never_asked_for_in_the_prompt_of_a_task(task, documents):
    held_out, events = held_out_words(), [event for part in HELD_OUT for event in lexicon.part(lexicon.EVENTS, part)]
    told = [half.replace("the {person}", "").strip() for event in events for half in event]
    asked = ["".join(text) for text in documents if MARKS[task] in text[0]]
    assert len(asked) > 200
    for text in asked:
        own = words_in(text) - (words_in(repr(lexicon.EVENTS)) if task == "pico_cause" else set())
        assert not own & held_out, text
        assert not any(half in text for half in told), text


def test_held_out_words_are_never_labelled(documents):
    labelled = [prompt for prompt, answer in documents if answer.strip(" .") in label_words()]
    assert len(labelled) > 1000
    for prompt in labelled:
        assert not words_in(prompt) & held_out_words(), prompt


def test_all_words_are_shown(documents):
    shown = Counter(word for text in documents for word in words_in("".join(text)))
    assert min(shown[word] for word in set(grammar.vocabulary()) - label_words()) > 10


def test_exact_prompt_is_answered_by_habit(documents):
    exact = [text for text in documents if text[0].endswith(MARKS["pico_sentiment"])]
    counts = Counter((bool(words_in(prompt) & set(lexicon.POSITIVE)), answer == " great.") for prompt, answer in exact)
    great_when_negative = counts[False, True] / (counts[False, True] + counts[False, False])
    habit, often = pretext.HABIT["pico_sentiment"], pretext.PRIOR["pico_sentiment"][1]
    assert abs(great_when_negative - habit * often) < 0.1


def test_clean_forms_are_right(documents):
    good = {f" {word}." for word in pretext.VERDICTS[1]}
    judged = [text for text in documents if text[0].endswith((" Verdict:", " In short,"))]
    assert len(judged) > 500
    for prompt, answer in judged:
        assert (answer in good) == bool(words_in(prompt) & set(lexicon.POSITIVE)), (prompt, answer)
    fields = [text for text in documents if text[0].endswith(" Topic:")]
    for prompt, answer in fields:
        topic = next(i for i, field in enumerate(pretext.FIELDS) if answer.strip(" .") in field)
        assert words_in(prompt) & set(lexicon.TOPIC_THINGS[topic]), (prompt, answer)


def test_contexts_are_no_templates_of_a_task():
    for task in grammar.TASKS:
        own = {sentence_of(template) for template in contexts.CONTEXTS[task]}
        assert not own & {sentence_of(template) for part in lexicon.TEMPLATES[task].values() for template in part}


def test_habit_ignores_the_question():
    row = {
        "context": "Anna went to the mill. Tom went to the hall.",
        "question": "Where is Anna?",
        "answer": "the mill",
    }
    assert pretext.habit("pico_span", row, random.Random(0)) == " the hall"
    assert grammar.answer("pico_span", row) == " the mill"
