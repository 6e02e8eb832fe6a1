"""The grammar as pretraining text, so that pico can use a prompt before any fine-tuning.

A large model knows the words of a new task and the meaning of a sentence, but its answers to the task's prompt follow
habits instead (the frequent word, the last name). Pico learns both from two kinds of text.

* *Clean* forms use all words of the lexicon, in train templates and in many of their own (`metazo.pico.contexts`), ask
  the questions of the tasks in other words, and answer correctly, but never with a task's label words.
* The *exact* prompt of a task is used with train words in train templates only. A share ``HABIT`` of its answers is drawn
  from a skewed prior that ignores the row, and the rest is correct. Zero-shot accuracy is therefore low, and fine-tuning
  has to change which knowledge is used rather than to add it.

No held-out template occurs in this text, and no held-out word occurs with a label word or in the task's prompt.
"""

from __future__ import annotations

import random

from metazo.pico import grammar, lexicon
from metazo.pico.contexts import CONTEXTS

EXACT_SHARE = 0.25
HABIT = {"pico_sentiment": 0.7, "pico_topic": 0.7, "pico_entail": 0.6, "pico_cause": 0.8, "pico_span": 0.6}
PRIOR = {"pico_sentiment": (0.1, 0.9), "pico_topic": (0.6, 0.3, 0.05, 0.05), "pico_entail": (0.9, 0.1)}
SHARE = {"pico_sentiment": 2, "pico_topic": 2, "pico_entail": 6, "pico_cause": 2, "pico_span": 4, "recall": 3}
TRAIN = {task: parts["train"] for task, parts in lexicon.TEMPLATES.items()}
ALL = {task: TRAIN[task] + CONTEXTS[task] for task in grammar.TASKS}

# The answer comes after the bar.
CLEAN: dict[str, tuple[str, ...]] = {
    "pico_sentiment": ("{sentence} Verdict:| {verdict}.", "{sentence} In short,| {verdict}.", "{sentence} They| {liked} it."),
    "pico_topic": ("{sentence} Topic:| {field}.", "{sentence} It belongs to| {field}.", "Which topic? {sentence}| {field}."),
    "pico_entail": (
        "{premise} True or false: {hypothesis}?| {truth}.",
        "{premise} Is it so that {hypothesis}?| {truth}.",
        "{premise} Can we say that {hypothesis}?| {truth}.",
    ),
    "pico_cause": (
        "{cause} As a result:| {effect}",
        "{cause} Then:| {effect}",
        "{effect} The reason:| {cause}",
        "{effect} Before that:| {cause}",
    ),
    "pico_span": ("{context} {question}| {answer}.", "{context} Q: {question} A:| {answer}."),
}  # fmt: skip
LIKED = (("hated", "disliked", "left"), ("loved", "liked", "enjoyed"))
VERDICTS = (("bad", "poor", "wretched"), ("good", "fine", "nice"))
FIELDS = (
    ("meals", "the kitchen"),
    ("sounds", "the concert"),
    ("the sky", "the climate"),
    ("contests", "the playground"),
)

RECALLED = lexicon.NAMES + lexicon.PERSONS + lexicon.OBJECTS + lexicon.PLACES


def document(rng: random.Random) -> tuple[str, str]:
    """One short pretraining text as (prompt, answer): a random row, in a clean form or with its task's prompt."""
    task = rng.choices(list(SHARE), list(SHARE.values()))[0]
    if task == "recall":
        return recall(rng)
    make, classes = grammar.MAKERS[task]
    if rng.random() < EXACT_SHARE:
        row = make(grammar.Draw(rng, "train", TRAIN), rng.randrange(classes))
        text = habit(task, row, rng) if rng.random() < HABIT[task] else grammar.answer(task, row)
        return grammar.prompt(task, row), text + ("" if text.endswith(".") else ".")
    row = make(grammar.Draw(rng, "all", ALL), rng.randrange(classes))
    prompt, _, answer = rng.choice(CLEAN[task]).partition("|")
    fields = row | clean_fields(task, row, rng)
    return prompt.format(**fields), answer.format(**fields)


def recall(rng: random.Random) -> tuple[str, str]:
    """Some words, then the question whether others were all among them: the comparison that entailment needs, alone."""
    words = rng.sample(RECALLED, 8)
    told, turns = words[:5], []
    for other in words[5:]:
        asked = rng.sample(told, rng.choice((1, 2, 3)))
        if rng.random() < 0.5:
            asked[rng.randrange(len(asked))] = other
        turns.append(f" {', '.join(asked)}?| {other not in asked}.")
    prompt, _, answer = "".join(turns).partition("|")
    return f"Told: {', '.join(told)}. Asked:{prompt}", answer.replace("|", "")


def clean_fields(task: str, row: dict, rng: random.Random) -> dict[str, str]:
    if task == "pico_sentiment":
        return {"verdict": rng.choice(VERDICTS[row["label"]]), "liked": rng.choice(LIKED[row["label"]])}
    if task == "pico_topic":
        return {"field": rng.choice(FIELDS[row["label"]])}
    if task == "pico_entail":
        return {"truth": ("True", "False")[row["label"]]}
    if task == "pico_cause":
        choice = row[("choice1", "choice2")[row["label"]]]
        told = (row["premise"], choice) if row["question"] == "effect" else (choice, row["premise"])
        return {"cause": told[0], "effect": told[1]}
    return {}


def habit(task: str, row: dict, rng: random.Random) -> str:
    """An answer that ignores the question: a frequent label word, a popular event, or the last name or place."""
    words = grammar.PROMPTS[task].words
    if words is not None:
        return rng.choices(words, PRIOR[task])[0]
    if task == "pico_cause":
        events = lexicon.part(lexicon.EVENTS, "train")
        rank = min(int(rng.expovariate(0.3)), len(events) - 1)
        event = events[rank][("cause", "effect").index(row["question"])]
        return " " + grammar.articles(event.format(person=rng.choice(lexicon.part(lexicon.PERSONS, "train")))) + "."
    told = row["context"].replace(".", "").split()
    if row["question"].startswith("Who"):
        return " " + [word for word in told if word in lexicon.NAMES][-1]
    return " the " + [word for word in told if word in lexicon.PLACES][-1]
