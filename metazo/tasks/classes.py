"""The classes of a classifier's head matched by name to the labels of a task, and a head made from label phrases."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from metazo.tasks.prepared import Prepared
from metazo.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from metazo.models.load import LoadedModel


def head_order(config: PreTrainedConfig, task: Task) -> tuple[list[int] | None, str | None]:
    """The head's column for each class of the task (None: in the present order), and a sentence for the user.

    The names in the checkpoint's ``id2label`` are compared with the task's label values, then with its label words,
    without regard to case. If the names have the form LABEL_0, the order is kept; if they are other names that do not
    match, the order is kept too, and the sentence says so.
    """
    known_names: Any = config.id2label
    names = [str(known_names.get(index, "")) for index in range(task.num_labels or 0)]
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        return None, None
    for labels in (task.labels.keys(), task.labels.values()):
        known = [_plain(label) for label in labels]
        columns = {_plain(name): column for column, name in enumerate(names)}
        if len(columns) == len(names) and columns.keys() == set(known):
            order = [columns[label] for label in known]
            return (None if order == sorted(order) else order), None
    shown = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
    wanted = ", ".join(repr(label) for label in [*task.labels][:5]) + (", ..." if len(names) > 5 else "")
    return None, f"the head's classes are called {shown}, the labels of {task.name} {wanted}: they are matched by order"


def class_names(task: Task, order: list[int] | None) -> list[str]:
    """The names of a head's columns: the label values if they are text, else the label words."""
    names = [value if isinstance(value, str) else word for value, word in task.labels.items()]
    if len(set(names)) < len(names):
        names = [str(value) for value in task.labels]
    columns = order or list(range(len(names)))
    return [name for _, name in sorted(zip(columns, names, strict=True))]


def _plain(label: object) -> str:
    return str(label).strip().casefold()


def fit_head(
    loaded: LoadedModel, prepared: Prepared, batch_size: int = 32, record: dict[str, Any] | None = None
) -> None:
    """Make a head of prototypes from the training examples, or one of label phrases from the phrases and the training
    texts (their labels are not read). Any other head, and one that is already made, stays as it is.

    record: `SentenceClassifier.phrase_record` of a run that goes on. If it has the task's phrases, the head takes its
    offset, which another processor would calculate with other last bits.
    """
    from metazo.models.heads import Phrases
    from metazo.models.sentence import SentenceClassifier

    model = loaded.model
    if not isinstance(model, SentenceClassifier):
        return
    examples = prepared.train
    if isinstance(model.head, Phrases):
        if not model.head.fitted:
            phrases = [prepared.task.phrase.format(word) for word in prepared.task.labels.values()]
            kept = record if record is not None and record["phrases"] == phrases else {}
            model.set_phrases(loaded.tokenizer, phrases, kept.get("offset"))
        examples = sorted(examples, key=len, reverse=True)  # less padding; the mean does not depend on the order
    model.fit_prototypes(prepared.batches(examples, batch_size))
