"""Single sentences and sentence pairs: SST-2, CoLA, MNLI, QNLI, SNLI, TREC.

Prompts and label words follow the meaning of those published with LM-BFF (arXiv 2012.15723) and MeZO (2305.17333).
"""

from __future__ import annotations

from metazo.tasks.task import Task

_GLUE = "nyu-mll/glue"
_NLI = '{premise}\nDoes this mean that "{hypothesis}"? Yes, maybe, or no?\n{}'
_NLI_MASKED = "{premise} ? {}, {hypothesis}"

TASKS = (
    Task(
        name="sst2",
        kind="classification",
        prompt="{sentence} It was {}.",
        labels={0: "terrible", 1: "great"},
        hub=_GLUE,
        config="sst2",
    ),
    Task(
        name="cola",
        kind="classification",
        prompt="{sentence} This is {}.",
        labels={0: "incorrect", 1: "correct"},
        metric=("accuracy", "mcc"),
        hub=_GLUE,
        config="cola",
    ),
    Task(
        name="mnli",
        kind="classification",
        prompt=_NLI,
        masked=_NLI_MASKED,
        context="premise",
        labels={0: "Yes", 1: "Maybe", 2: "No"},
        hub=_GLUE,
        config="mnli",
        test_split="validation_matched",
    ),
    Task(
        name="qnli",
        kind="classification",
        prompt='{sentence}\nDoes this answer the question "{question}" Yes or no?\n{}',
        masked="{question} ? {}, {sentence}",
        classifier=("{question}", "{sentence}"),
        context="sentence",
        labels={0: "Yes", 1: "No"},
        hub=_GLUE,
        config="qnli",
    ),
    Task(
        name="snli",
        kind="classification",
        prompt=_NLI,
        masked=_NLI_MASKED,
        context="premise",
        labels={0: "Yes", 1: "Maybe", 2: "No"},
        unlabelled=(-1,),
        hub="stanfordnlp/snli",
    ),
    Task(
        name="trec",
        kind="classification",
        prompt="{text} The answer is about a kind of {}",
        masked="{}: {text}",
        label="coarse_label",
        labels=dict(enumerate(("Expression", "Entity", "Description", "Human", "Location", "Number"))),
        hub="CogComp/trec",
        revision="refs/convert/parquet",
        test_split="test",
    ),
)
