"""SuperGLUE: RTE, CB, BoolQ (with and without its passage), WSC, WiC, MultiRC, COPA, ReCoRD.

Prompts follow the meaning of those published with MeZO (arXiv 2305.17333, appendix) for OPT.
"""

from __future__ import annotations

from metazo.tasks.task import Row, Task

_SUPERGLUE = "aps/super_glue"
_NO_YES = {0: "No", 1: "Yes"}


def _copa(row: Row) -> Row:
    """Join the premise without its full stop, "because" or "so", and the choice in lower case into one sentence."""
    premise, choices = str(row["premise"]).strip().rstrip("."), (row["choice1"], row["choice2"])
    return row | {
        "start": f"{premise} {'because' if row['question'] == 'cause' else 'so'}",
        "choices": [choice[:1].lower() + choice[1:] for choice in map(str, choices)],
    }


def _record(row: Row) -> Row:
    """Each entity in place of @placeholder gives a choice; those of entities that are answers are correct."""
    entities = list(dict.fromkeys(row["entities"]))
    return row | {
        "passage": str(row["passage"]).replace("@highlight\n", "- "),
        "choices": [str(row["query"]).replace("@placeholder", entity) for entity in entities],
        "right": [i for i, entity in enumerate(entities) if entity in row["answers"]],
    }


TASKS = (
    Task(
        name="rte",
        kind="classification",
        prompt='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n{}',
        masked="{premise} ? {}, {hypothesis}",
        context="premise",
        labels={0: "Yes", 1: "No"},
        hub=_SUPERGLUE,
        config="rte",
    ),
    Task(
        name="cb",
        kind="classification",
        prompt='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n{}',
        masked="{premise} ? {}, {hypothesis}",
        context="premise",
        labels={0: "Yes", 1: "No", 2: "Maybe"},
        metric=("accuracy", "macro_f1"),
        dev_rows=100,
        hub=_SUPERGLUE,
        config="cb",
    ),
    Task(
        name="boolq",
        kind="classification",
        prompt="{passage} {question}?\n{}",
        classifier=("{question}", "{passage}"),
        context="passage",
        labels=_NO_YES,
        hub=_SUPERGLUE,
        config="boolq",
    ),
    Task(
        name="boolq_closed",
        kind="classification",
        prompt="{question}?\n{}",
        labels=_NO_YES,
        hub=_SUPERGLUE,
        config="boolq",
    ),
    Task(
        name="wsc",
        kind="classification",
        prompt='{text}\nIn the text above, does the pronoun "{span2_text}" stand for {span1_text}? Yes or No?\n{}',
        classifier=("{text}", "{span2_text}: {span1_text}"),
        context="text",
        labels=_NO_YES,
        hub=_SUPERGLUE,
        config="wsc.fixed",
    ),
    Task(
        name="wic",
        kind="classification",
        prompt='Does the word "{word}" mean the same in these two sentences? Yes or No?\n{sentence1}\n{sentence2}\n{}',
        classifier=("{word}: {sentence1}", "{sentence2}"),
        context="sentence1",
        labels=_NO_YES,
        hub=_SUPERGLUE,
        config="wic",
    ),
    Task(
        name="multirc",
        kind="classification",
        prompt='{paragraph}\nQuestion: {question}\nI found this answer: "{answer}". Is it correct? Yes or No?\n{}',
        classifier=("{question} {answer}", "{paragraph}"),
        context="paragraph",
        labels=_NO_YES,
        hub=_SUPERGLUE,
        config="multirc",
    ),
    Task(
        name="copa",
        kind="choice",
        prompt="{start}",
        choices=("choices",),
        dev_rows=100,
        hub=_SUPERGLUE,
        config="copa",
        adapt=_copa,
    ),
    Task(
        name="record",
        kind="choice",
        prompt="{passage}\n- {}",
        choices=("choices",),
        label="right",
        hub=_SUPERGLUE,
        config="record",
        adapt=_record,
    ),
)
