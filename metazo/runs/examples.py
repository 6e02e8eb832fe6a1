"""The examples of a run: the splits that its settings name, encoded for its model."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from metazo.models.load import LoadedModel
from metazo.runs.config import FinetuneConfig
from metazo.tasks import Prepared, Task, prepare
from metazo.tasks.encode import Encoded
from metazo.tasks.rows import Rows


def prepared_task(
    config: FinetuneConfig,
    task: Task,
    loaded: LoadedModel,
    rows: Rows | None = None,
    recorded: Collection[str] = (),
) -> Prepared:
    """The task's splits for a model. rows: in memory, in place of `config.data`; recorded: splits whose sizes are those of the
    model's record, if that is of the same rows. Raises UserError as `prepare` does."""
    folder = None if config.resume and task.generate else config.data  # not read, and it may be gone
    return prepare(
        task,
        loaded,
        data=folder if rows is None else rows,
        train=config.train_examples,
        dev=config.dev_examples,
        test=config.test_examples,
        seed=config.seed if config.split_seed is None else config.split_seed,
        max_length=config.max_length,
        k_per_class=config.k_per_class,
        recorded=recorded,
    )


def longest_batch(config: FinetuneConfig, train: Sequence[Encoded]) -> list[Encoded]:
    """The `batch_size` longest training examples, on which the memory of a run is estimated."""
    return sorted(train, key=len)[-config.batch_size :]


def longest_input(config: FinetuneConfig, loaded: LoadedModel) -> int:
    """Most tokens of an input; 0 for a model without a tokenizer."""
    return min(config.max_length or loaded.context_length, loaded.context_length)
