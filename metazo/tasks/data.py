"""Splits the rows of a task into train, dev and test.

The labelled rows of the train source are put into an order that depends on the seed and on their number alone. Train rows
are taken from its front; dev rows, and test rows if they have no source of their own, from its end. None of the three
therefore depends on the sizes of the others, and an evaluation with other sizes does not score a row that a run trained
on: the rows that a tuned model was trained on are recorded in its config (`Prepared.record`), found again by their content
(`metazo.tasks.trainings`) and left out of dev and test. Version 1 took dev rows after the train rows; `VERSION` is part of a
step log's header.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metazo.errors import UserError
from metazo.settings import Unset
from metazo.tasks.origins import sources_of
from metazo.tasks.rows import Rows, Source, checked, load
from metazo.tasks.task import Row, Task
from metazo.tasks.trainings import SPLITS, VERSION, Recall, content, contents, order_of, prints, read_columns, trainings

DEFAULTS = {"train": Unset(1000), "dev": Unset(500), "test": Unset(1000)}
"""The papers' sizes. A size that the user sets is kept; sizes that are `Unset` are reduced to fit."""
MOST_DRAWN = 2**20  # rows of a generator among which those of a rare class are looked for


@dataclass
class Drawn:
    """The rows of the three splits."""

    rows: dict[str, list[tuple[str, Row]]]
    """split -> [(place, row)]"""
    record: dict[str, Any]
    """The record that identifies the train rows, as JSON values."""
    notes: list[str] = field(default_factory=list)
    """Sentences about sizes that differ from the requested ones, and about rows in two splits."""
    prints: dict[str, list[str]] = field(default_factory=dict)
    """split -> hashes of the rows' contents; none of generated rows."""


def draw(
    task: Task,
    data: Path | Rows | None,
    *,
    train: int,
    dev: int,
    test: int,
    seed: int,
    k_per_class: int | None = None,
    record: Mapping[str, Any] | None = None,
    recorded: Collection[str] = (),
) -> Drawn:
    """Draw the splits. ``record`` is the record in a tuned model's config, or None: if its last training was on the same
    rows, in any order and under any name, its seed is taken from it, and unset sizes and those of the splits ``recorded``.
    Rows of the train source that the model was ever trained on are neither dev nor test rows; a note says so if they cannot
    be known.
    """
    wanted = {"train": train, "dev": dev, "test": test}
    if min(wanted.values()) < 0:
        raise UserError(f"the split sizes must not be negative, found train {train}, dev {dev}, test {test}")
    unset = {split for split, size in wanted.items() if isinstance(size, Unset)}
    if "dev" in unset and task.dev_rows:
        wanted["dev"] = min(dev, task.dev_rows)
    if k_per_class is not None and (task.kind != "classification" or k_per_class < 1):
        raise UserError(f"`k_per_class` is {k_per_class} and task {task.name!r} a {task.kind} task; it draws one or more "
                        "rows of each class of a classification task")  # fmt: skip
    if task.generate is not None:
        return _generated(task, wanted, unset, seed, k_per_class)
    names = sources_of(task)
    sources = {name: load(task, name, data) for name in dict.fromkeys(names.values())}
    source, notes = sources[names["train"]], list[str]()
    own = [split for split in SPLITS if split != "train" and names[split] == names["train"]]
    recall = Recall(task, source, lambda order, k: _few(task, source, order, k), bool(own))
    former = [recall(one) for one in trainings(record)]
    notes += dict.fromkeys(one.note for one in former if one.note and own)
    record = former[0].record if former else None
    if record:
        seed = record["seed"]
        wanted |= {split: record[split] for split in SPLITS if split in unset or split in recorded}
        if "train" in unset or "train" in recorded:
            k_per_class = k_per_class or (record["k_per_class"] if record.get("task") == task.name else None)
    order = order_of(len(source.usable), seed, "train")
    if record and former[0].moved:
        trained = set(former[0].places)
        order.sort(key=lambda row: row not in trained)
    few = _few(task, source, order, k_per_class) if k_per_class else None
    if few is not None and "train" not in {*unset, *recorded} and wanted["train"] not in (len(few), DEFAULTS["train"]):
        notes.append(f"{task.name}: `k_per_class` {k_per_class} gives {len(few)} train rows, not {wanted['train']}")
    if few is not None:
        wanted["train"] = len(few)
        if "dev" in unset and wanted["dev"] == DEFAULTS["dev"]:
            wanted["dev"] = min(len(few), wanted["dev"])
    asked = {s for s in SPLITS if s not in unset or wanted[s] != DEFAULTS[s]} | ({"dev"} if task.dev_rows else set())
    shared = {s: wanted[s] for s in ("train", *own)}
    sizes = _fit(len(source.usable), shared, asked, task, record, few is not None, notes)
    parts = {"train": few if few is not None else order[: sizes["train"]]}
    taken = {*parts["train"], *(row for one in former for row in one.places)}
    parts |= _from_the_end([i for i in order if i not in taken], {s: sizes[s] for s in own})
    others = [split for split in ("dev", "test") if split not in own]
    there: list[int] = []
    for split in others:
        there = order_of(len(sources[names[split]].usable), seed, split)
        parts[split] = there[: wanted[split]]
    if len(others) == 2 and names["dev"] == names["test"]:
        parts |= _from_the_end(there, {split: wanted[split] for split in others})
    for split in ("dev", "test"):
        if len(parts[split]) < sizes.get(split, wanted[split]):
            rest = "that the model was not trained on" if split in own else f"that {sources[names[split]].name} holds"
            size = sizes.get(split, wanted[split])
            notes.append(f"{task.name}: {split} has {len(parts[split])} rows instead of {size}, all {rest}")
    rows = {split: _rows(task, sources[names[split]], parts[split]) for split in SPLITS}
    found = {"version": VERSION, "seed": seed, "rows": len(source.usable), "k_per_class": k_per_class}
    plain = {split: [row for _, row in rows[split]] for split in SPLITS}
    found |= {split: len(parts[split]) for split in SPLITS} | contents(task, plain["train"])
    for split in others:
        if again := recall.again(plain[split], plain["train"]):
            notes.append(f"{task.name}: the model was trained on {again} of {len(rows[split])} {split} rows")
    drawn = Drawn(rows, found, notes, {split: prints(task, plain[split]) for split in SPLITS})
    drawn.notes += _remarks(task, drawn)
    return drawn


def _generated(task: Task, wanted: dict[str, int], unset: set[str], seed: int, k_per_class: int | None) -> Drawn:
    """Rows of a generator, such as a grammar. Each split has its own, so the splits' rows differ at any size."""
    assert task.generate is not None
    if k_per_class:
        train = _few_generated(task, k_per_class, seed)
        wanted |= {"train": len(train)} | ({"dev": len(train)} if "dev" in unset else {})
    else:
        # the number of dev rows is in this call because it was in version 1, whose train rows must not change
        train = task.generate("train", wanted["train"] + wanted["dev"], seed)[: wanted["train"]]
    rows = {
        "train": train,
        "dev": task.generate("validation", wanted["dev"], seed),
        "test": task.generate("test", wanted["test"], seed),
    }
    placed = {s: [(f"{task.name}, {s} row {i + 1}", row) for i, row in enumerate(rows[s])] for s in SPLITS}
    record = {"version": VERSION, "seed": seed, "k_per_class": k_per_class, "rows": 0}
    drawn = Drawn(placed, record | {split: len(rows[split]) for split in SPLITS})
    for split in SPLITS:
        if len(rows[split]) < wanted[split]:
            drawn.notes.append(
                f"{task.name}: {split} has {len(rows[split])} rows instead of {wanted[split]}, all there are"
            )
    drawn.notes += _remarks(task, drawn)
    return drawn


def _few_generated(task: Task, k: int, seed: int) -> list[Row]:
    """k rows of every class; if the generator does not balance its rows, the first ones of a draw that has enough."""
    assert task.generate is not None
    number = k * len(task.labels)
    while True:
        rows = task.generate("train", number, seed)
        source = Source(f"the train split of {task.name}", rows, list(range(len(rows))))
        counts = Counter(map(_label_of(task, source), source.usable))
        if len(rows) < number or number >= MOST_DRAWN or all(counts[i] >= k for i in range(len(task.labels))):
            return [rows[i] for i in _few(task, source, source.usable, k)]
        number *= 4


def _rows(task: Task, source: Source, places: list[int]) -> list[tuple[str, Row]]:
    found = [(source.where(source.usable[i]), source.rows[source.usable[i]]) for i in places]
    return [(where, checked(task, row, where)) for where, row in found]


def _few(task: Task, source: Source, order: list[int], k: int) -> list[int]:
    """The first k rows of every class, in the given order."""
    left, chosen = dict.fromkeys(range(len(task.labels)), k), []
    label = _label_of(task, source)
    for i in order:
        if len(chosen) == k * len(left):  # the other rows are not read
            break
        if left[label(i)]:
            left[label(i)] -= 1
            chosen.append(i)
    for index, value in enumerate(task.labels):
        if left[index]:
            raise UserError(
                f"`k_per_class` is {k}, and {source.name} has {k - left[index]} rows of the class {value!r}; ask for fewer"
            )
    return chosen


def _label_of(task: Task, source: Source) -> Callable[[int], int]:
    cache: dict[int, int] = {}

    def label(i: int) -> int:
        if i not in cache:
            where = source.where(source.usable[i])
            cache[i] = task.label_index(checked(task, source.rows[source.usable[i]], where)[task.label], where)
        return cache[i]

    return label


def _from_the_end(free: list[int], sizes: dict[str, int]) -> dict[str, list[int]]:
    """Dev and test rows of one source. Of every three rows from the end, two are test rows, as in the papers' sizes and at
    any size; a split that needs more rows takes those that the other one leaves.
    """
    if len(sizes) < 2:
        return {split: free[max(0, len(free) - size) :] for split, size in sizes.items()}
    back = free[::-1]
    pools = {"test": [r for n, r in enumerate(back) if n % 3 != 2], "dev": back[2::3]}
    parts = {split: pools[split][: sizes[split]] for split in sizes}
    for split, other in (("dev", "test"), ("test", "dev")):
        spare = pools[other][sizes[other] :][::-1]  # far from the rows that the other split would take next
        parts[split] = parts[split] + spare[: sizes[split] - len(parts[split])]
    return parts


def _fit(
    available: int,
    wanted: dict[str, int],
    asked: set[str],
    task: Task,
    record: dict[str, Any] | None,
    few: bool,
    notes: list[str],
) -> dict[str, int]:
    """Sizes that fit into ``available`` rows. Sizes left at their defaults are reduced, in proportion, to a row each at the
    least; those of the splits that are ``asked`` for are reduced only if they do not fit by themselves, and the largest of
    them gives way to the others' rows.
    """
    total = sum(wanted.values())
    if total <= available:
        return wanted
    fixed = {"train"} if few or record else set()
    asked = {s for s in wanted if s in asked or s in fixed}
    sizes = {s: wanted[s] for s in asked}
    others = len([s for s in wanted if s not in asked and wanted[s]])
    if (over := sum(sizes.values()) + others - available) > 0:
        largest = max(asked - fixed, key=wanted.__getitem__, default="")
        if over <= others and sizes.get(largest, 0) > over:
            sizes[largest] -= over
        else:
            asked = fixed
            sizes = {s: wanted[s] for s in asked}
    shared, room = {s: wanted[s] for s in wanted if s not in asked}, available - sum(sizes.values())
    whole = sum(shared.values())
    for split in [s for s in shared if s != "train"]:
        sizes[split] = max(1, wanted[split] * room // whole) if wanted[split] else 0
    if "train" in shared or not fixed:
        sizes["train"] = available - sum(sizes[s] for s in sizes if s != "train") if wanted["train"] else 0
    if min(sizes.values()) < 0 or sum(sizes.values()) > available or (wanted["train"] and sizes["train"] < 1):
        if not available and task.unlabelled:
            raise UserError(
                f"task {task.name!r} has no labelled train row: all are `unlabelled` or have no {task.label!r}."
            )
        raise UserError(
            f"task {task.name!r} has {available} labelled train rows, too few for {_listed(wanted)}; give more rows"
        )
    sizes = {split: min(sizes[split], wanted[split]) for split in wanted}
    why = ", of which the model was trained on some," if record else ""
    notes.append(f"{task.name}: {available} rows{why} give {_listed(sizes)} rows instead of {_numbers(wanted)}")
    return sizes


def _listed(sizes: dict[str, int]) -> str:
    return " and ".join(f"{size} {split}" for split, size in sizes.items() if size or split == "train")


def _numbers(sizes: dict[str, int]) -> str:
    return " and ".join(str(size) for split, size in sizes.items() if size or split == "train")


def _remarks(task: Task, drawn: Drawn) -> list[str]:
    """Rows that are in two splits, by the columns that the prompt reads, and classes without a train row."""
    notes = []
    columns = read_columns(task)
    keys = {s: [content(row, columns) for _, row in drawn.rows[s]] for s in SPLITS}
    for split, other in (("dev", "train"), ("test", "train"), ("test", "dev")):
        there = set(keys[other])
        again = sum(key in there for key in keys[split])
        if again:
            notes.append(
                f"{task.name}: {again} of {len(keys[split])} {split} rows are {other} rows as well, word for word"
            )
    if task.kind == "classification" and keys["train"]:
        seen = Counter(task.label_index(row[task.label], where) for where, row in drawn.rows["train"])
        without = [repr(value) for index, value in enumerate(task.labels) if not seen[index]]
        if without:
            more = f" and {len(without) - 5} more" if len(without) > 5 else ""
            notes.append(f"{task.name}: no train row has the class {', '.join(without[:5])}{more}")
    return notes
