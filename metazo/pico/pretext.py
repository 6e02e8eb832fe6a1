"""The grammar as pretraining text: what makes a prompt mean something to pico before any fine-tuning.

A large model knows what a sentence says but does not answer a prompt with it: it follows habits (the frequent
word, the last name). Pico is given both. *Clean* forms ask the same things in other words and answer rightly,
so the knowledge is in the features. The *exact* form of the task prompt is answered by habit most of the
time: a share ``HABIT`` of the answers is drawn from a skewed prior that ignores the row, the rest is right.
So zero-shot accuracy starts low, and fine-tuning has to bring out what is there rather than to learn it from
nothing.
"""

from __future__ import annotations

import random

from metazo.pico import grammar, lexicon

EXACT_SHARE = 0.35
HABIT = {"pico_sentiment": 0.6, "pico_topic": 0.67, "pico_entail": 0.6, "pico_cause": 0.85, "pico_span": 0.6}
PRIOR = {"pico_sentiment": (0.1, 0.9), "pico_topic": (0.6, 0.3, 0.05, 0.05), "pico_entail": (0.9, 0.1)}
TASK_SHARE = {"pico_sentiment": 3, "pico_topic": 3, "pico_entail": 4, "pico_cause": 2, "pico_span": 4}

# What stands after the bar is the answer.
CLEAN: dict[str, tuple[str, ...]] = {
    "pico_sentiment": (
        "{sentence} Verdict:| {word}.",
        "{sentence} In short,| {word}.",
        "{sentence} So they| {liked} it.",
    ),
    "pico_topic": (
        "{sentence} Topic:| {word}.",
        "{sentence} It belongs to| {word}.",
        "Which topic? {sentence}| {word}.",
    ),
    "pico_entail": (
        "{premise} True or false: {hypothesis}?| {truth}.",
        "{premise} Is it so that {hypothesis}?| {word}.",
        "{premise} Can we say that {hypothesis}?| {word}.",
    ),
    "pico_cause": ("{cause} As a result:| {effect}", "{effect} The reason:| {cause}", "{cause} Then:| {effect}"),
    "pico_span": ("{context} {question}| {answer}.", "{context} Q: {question} A:| {answer}."),
}
LIKED = (("hated", "disliked", "left"), ("loved", "liked", "enjoyed"))
VERDICTS = (("terrible", "bad", "poor", "wretched"), ("great", "good", "fine", "lovely"))


def document(rng: random.Random) -> tuple[str, str]:
    """One short pretraining text as (prompt, answer): a random row, in a clean form or as its task asks it."""
    task = rng.choices(list(TASK_SHARE), list(TASK_SHARE.values()))[0]
    make, classes = grammar.MAKERS[task]
    row = make(grammar.Draw(rng, "pretrain"), rng.randrange(classes))
    if rng.random() < EXACT_SHARE:
        text = habit(task, row, rng) if rng.random() < HABIT[task] else grammar.answer(task, row)
        return grammar.prompt(task, row), text + ("" if text.endswith(".") else ".")
    prompt, _, answer = rng.choice(CLEAN[task]).partition("|")
    fields = row | clean_fields(task, row, rng)
    return prompt.format(**fields), answer.format(**fields)


def clean_fields(task: str, row: dict, rng: random.Random) -> dict[str, str]:
    if task == "pico_sentiment":
        return {"word": rng.choice(VERDICTS[row["label"]]), "liked": rng.choice(LIKED[row["label"]])}
    if task == "pico_topic":
        return {"word": lexicon.TOPICS[row["label"]]}
    if task == "pico_entail":
        return {"word": ("Yes", "No")[row["label"]], "truth": ("True", "False")[row["label"]]}
    if task == "pico_cause":
        choice = row[("choice1", "choice2")[row["label"]]]
        told = (row["premise"], choice) if row["question"] == "effect" else (choice, row["premise"])
        return {"cause": told[0], "effect": told[1]}
    return {}


def habit(task: str, row: dict, rng: random.Random) -> str:
    """An answer that ignores the question: a frequent label word, a popular event, the last name or place told."""
    words = grammar.PROMPTS[task].words
    if words is not None:
        return rng.choices(words, PRIOR[task])[0]
    if task == "pico_cause":
        rank = min(int(rng.expovariate(0.2)), len(lexicon.EVENTS) - 1)
        event = lexicon.EVENTS[rank][("cause", "effect").index(row["question"])]
        return " " + grammar.articles(event.format(person=rng.choice(lexicon.PERSONS))) + "."
    told = row["context"].replace(".", "").split()
    if row["question"].startswith("Who"):
        return " " + [word for word in told if word in lexicon.NAMES][-1]
    return " the " + [word for word in told if word in lexicon.PLACES][-1]
