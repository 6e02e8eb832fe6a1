"""Five small generated tasks for pico: sentiment, topic, entailment, causal choice, span extraction.

Rows have the form of a Hugging Face data set (text fields and an int ``label``). Every pool of words and every set of
templates is divided into a train, a validation and a test part (`lexicon.part`), and the last two are held out. A train
row uses train words in train templates only. A validation (test) row uses validation (test) words in a train template,
or train words in a validation (test) template, or both; each is a third of the rows. So no sentence is in two splits,
and the accuracy on test measures generalisation to new words and new wording. In ``pico_cause`` the pairs of cause and
effect are divided like words. Pico's pretraining text contains all words, because a large model also knows the words of
a new task, but no held-out template, and uses a task's own prompt with train words only (see `metazo.pico.pretext`).
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from string import Formatter

from metazo.errors import UserError
from metazo.pico import lexicon

SPLITS = ("train", "validation", "test")
SLOW = 200_000  # draws, which take about ten seconds


@dataclass(frozen=True)
class Prompt:
    """The text of a row: ``template`` with {field} placeholders, then an answer that starts with a space.

    kind "classification": one of ``words`` follows (a single token each, in label order); kind "choice":
    field choice1 or choice2 follows, by ``label``; kind "generation": field ``answer`` follows.
    """

    template: str
    words: tuple[str, ...] | None
    kind: str


PROMPTS: dict[str, Prompt] = {
    "pico_sentiment": Prompt("{sentence} It was", (" terrible", " great"), "classification"),
    "pico_topic": Prompt("{sentence} This is about", tuple(f" {topic}" for topic in lexicon.TOPICS), "classification"),
    "pico_entail": Prompt("{premise} Does it mean that {hypothesis}?", (" Yes", " No"), "classification"),
    "pico_cause": Prompt("{premise} What was the {question}?", None, "choice"),
    "pico_span": Prompt("{context} Question: {question} Answer:", None, "generation"),
}
TASKS: tuple[str, ...] = tuple(PROMPTS)


class Draw:
    """Draws words of one part of the lexicon, and templates of a task."""

    def __init__(self, rng: random.Random, part: str, templates: dict[str, tuple]):
        self.rng = rng
        self.part = part
        self.templates = templates

    def template(self, task: str):
        return self.rng.choice(self.templates[task])

    def word(self, pool: tuple[str, ...], *avoid: str) -> str:
        return self.rng.choice([word for word in lexicon.part(pool, self.part) if word not in avoid])

    def fill(self, template: str, **given: str) -> str:
        """Fills the slots of ``template``; slots without a given word are drawn from the pool of their name."""
        for slot in sorted({name for _, name, _, _ in Formatter().parse(template) if name}):
            if slot not in given:
                given[slot] = self.word(POOLS[slot])
        return articles(template.format(**given))


POOLS = {
    "name": lexicon.NAMES,
    "person": lexicon.PERSONS,
    "place": lexicon.PLACES,
    "object": lexicon.OBJECTS,
    "colour": lexicon.COLOURS,
    "action": lexicon.ACTIONS,
    "judged": lexicon.JUDGED,
    "adverb": lexicon.ADVERBS,
}


def articles(text: str) -> str:
    """Turns "a apple" into "an apple" and starts the sentence with a capital."""
    out = text.split(" ")
    for i, word in enumerate(out[:-1]):
        if word in ("a", "A") and out[i + 1][0] in "aeiou":
            out[i] = word + "n"
    text = " ".join(out)
    return text[0].upper() + text[1:]


def draw_of(rng: random.Random, split: str) -> Draw:
    """The source of a row of ``split``: held-out words, held-out templates or both, each for a third of the rows."""
    mode = rng.choice(("words", "template", "both"))
    template_part = "train" if mode == "words" else split
    templates = {task: parts[template_part] for task, parts in lexicon.TEMPLATES.items()}
    return Draw(rng, "train" if mode == "template" else split, templates)


def sentiment(draw: Draw, label: int) -> dict:
    pool = (lexicon.NEGATIVE, lexicon.POSITIVE)[label]
    first = draw.word(pool)
    return {
        "sentence": draw.fill(draw.template("pico_sentiment"), opinion=first, opinion2=draw.word(pool, first)),
        "label": label,
    }


def topic(draw: Draw, label: int) -> dict:
    pool = lexicon.TOPIC_THINGS[label]
    first = draw.word(pool)
    return {
        "sentence": draw.fill(draw.template("pico_topic"), thing=first, thing2=draw.word(pool, first)),
        "label": label,
    }


def entail(draw: Draw, label: int) -> dict:
    premise, changeable, hypothesis = draw.template("pico_entail")
    slots = {name: draw.word(pool) for name, pool in POOLS.items()}
    slots["object2"] = draw.word(POOLS["object"], slots["object"])
    told = dict(slots)
    if label == 1:
        changed = draw.rng.choice(changeable)
        told[changed] = draw.word(POOLS[changed], slots[changed], slots["object2"])
    said = articles("x " + hypothesis.format(**told))[2:]
    return {"premise": articles(premise.format(**slots)), "hypothesis": said, "label": label}


def cause(draw: Draw, label: int) -> dict:
    events = lexicon.part(lexicon.EVENTS, draw.part)
    right, wrong = draw.rng.sample(range(len(events)), 2)
    asked = draw.rng.choice((0, 1))  # 0: the question is about the cause; 1: about the effect
    person = draw.word(POOLS["person"])
    premise = draw.fill(draw.template("pico_cause"), event=events[right][1 - asked].format(person=person))
    choices = [events[i][asked].format(person=person) + "." for i in (right, wrong)]
    return {
        "premise": premise,
        "question": ("cause", "effect")[asked],
        "choice1": articles(choices[label]),
        "choice2": articles(choices[1 - label]),
        "label": label,
    }


def span(draw: Draw, label: int) -> dict:
    """Two facts in one order or the other; ``label`` is the index of the one in question (0 or 1)."""
    fact, question, answer = draw.template("pico_span")
    slots = {name: draw.word(POOLS[name]) for name in ("name", "object", "place")}
    other = {name: draw.word(POOLS[name], slots[name]) for name in slots}
    facts = [fact.format(**slots), draw.template("pico_span")[0].format(**other)]
    context = " ".join(articles(sentence) for sentence in (facts if label == 0 else facts[::-1]))
    return {"context": context, "question": question.format(**slots), "answer": answer.format(**slots)}


MAKERS: dict[str, tuple[Callable[[Draw, int], dict], int]] = {
    "pico_sentiment": (sentiment, 2),
    "pico_topic": (topic, 4),
    "pico_entail": (entail, 2),
    "pico_cause": (cause, 2),
    "pico_span": (span, 2),
}


def examples(task: str, split: str, n: int, seed: int = 0) -> list[dict]:
    """``n`` different rows of ``split`` ("train", "validation" or "test") of a generated task, classes balanced.

    The same arguments give the same rows on every machine. A warning tells how far it is after SLOW draws, and whenever there
    are four times as many. Raises UserError for an unknown task or split, or when the grammar cannot make ``n`` different rows.
    """
    if task not in MAKERS:
        raise UserError(f"unknown generated task {task!r}; the generated tasks are {', '.join(TASKS)}")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of {task}; the splits are {', '.join(SPLITS)}")
    make, classes = MAKERS[task]
    rng = random.Random(f"{task}/{split}/{seed}")
    rows: dict[str, dict] = {}
    began, told, tries, last = time.monotonic(), SLOW, 0, 0
    while (found := len(rows)) < n:
        row = make(draw_of(rng, split), found % classes)
        rows.setdefault(repr(row), row)
        tries += 1
        if len(rows) > found:
            last = tries
        elif tries - last > 10 * found + 1000:  # the last rows of sentiment, topic and cause took a third of that
            raise UserError(f"{task} has no {n} different {split} rows: {found} were found; ask for fewer")
        if tries == told:
            told *= 4
            warnings.warn(
                f"{task}: {len(rows):,} of {n:,} {split} rows are made after {time.monotonic() - began:.0f} s; stop this and "
                "ask for fewer examples if that is too slow.",
                stacklevel=1,
            )
    out = list(rows.values())
    rng.shuffle(out)
    return out


def vocabulary() -> list[str]:
    """The label words and every word that a slot can hold, once each."""
    pools = [*POOLS.values(), lexicon.POSITIVE, lexicon.NEGATIVE, *lexicon.TOPIC_THINGS]
    labels = [word.strip() for form in PROMPTS.values() for word in form.words or ()]
    return list(dict.fromkeys([*labels, *(word for pool in pools for word in pool)]))


def prompt(task: str, row: dict) -> str:
    """The row's prompt, up to where the label word, the choice or the answer follows."""
    return PROMPTS[task].template.format(**row)


def answer(task: str, row: dict) -> str:
    """The correct answer to the prompt, with its leading space."""
    form = PROMPTS[task]
    if form.kind == "classification":
        assert form.words is not None
        return form.words[row["label"]]
    return " " + (row["answer"] if form.kind == "generation" else row[("choice1", "choice2")[row["label"]]])
