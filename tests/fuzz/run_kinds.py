"""Files that a run reads: recipes, tasks, rows of data, and those of its own folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st

from metazo.meta.config import MetaConfig
from metazo.models.load import LoadedModel, load_model
from metazo.runs.config import FinetuneConfig
from metazo.settings import build, read_recipe
from metazo.tasks import from_yaml, prepare
from metazo.tasks.task import Task
from tests.fuzz.kind import Kind, nested, to_json
from tests.fuzz.mutations import CANARY, altered

# -- recipes -----------------------------------------------------------------------------------------------------------

RECIPE: dict[str, Any] = {
    "model": "pico", "task": "pico_sentiment", "out": "runs/a", "optimizer": "lozo", "lr": 3e-4, "steps": 10,
    "method": {"rank": 2, "interval": 50}, "train": ["*attn*"], "dtype": "bfloat16", "keep": "last",
}  # fmt: skip
META: dict[str, Any] = {"model": "pico", "task": ["pico_topic"], "out": "runs/b", "steps": 5, "bound": 1.1}
LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
YAML_BOMBS = {
    "billion laughs": (LAUGHS + "out: *a39\n").encode(),
    "laughs in a key": (LAUGHS + "? *a39\n: 1\n").encode(),
    "no name": b"model: a\n~: b\n",
    "itself": b"out: &a [*a]\n",
    "merge": b"a: &a {model: x}\nb: {<<: *a}\n",
    "deep flow": nested(b"[", b"]", 20_000),
    "deep block": b"".join(b" " * n + b"a:\n" for n in range(3_000)),
    "deep dashes": b"- " * 100_000,
    "call": f"out: !!python/object/apply:os.system ['touch {CANARY}']\n".encode(),
    "name": b"out: !!python/name:os.system\n",
    "date": b"lr: 2024-13-45\n",
    "huge integer": b"seed: " + b"9" * 100_000 + b"\n",
    "huge integer in base 60": b"seed: 1" + b":59" * 20_000 + b"\n",
    "binary": b"out: !!binary \xff\n",
    "set": b"out: !!set {a, b}\nmodel: !!omap [a: 1]\n",
    "large": b"out: " + b"x" * 5_000_000 + b"\n",
    "repeated key": b"model: a\nmodel: b\ntask: c\nout: d\n",
    "surrogate": b'model: "\\ud800"\ntask: a\nout: b\n',
}


def as_yaml(tree: Any) -> bytes:
    return yaml.safe_dump(tree, allow_unicode=len(str(tree)) % 2 == 0).encode("utf-8", "surrogatepass")


def read_recipes(folder: Path) -> None:
    found = read_recipe(folder / "recipe.yaml")
    config = build(MetaConfig if isinstance(found.get("task"), list) else FinetuneConfig, found, {})
    assert isinstance(config.model, str) and isinstance(config.out, Path | None)  # without a folder nothing is written


# -- tasks and rows ----------------------------------------------------------------------------------------------------

TASKS: list[dict[str, Any]] = [
    {"name": "mine", "kind": "classification", "prompt": "{text} It was {}.", "labels": {0: "bad", 1: "good"},
     "files": {"train": "rows.jsonl"}, "metric": ["accuracy", "mcc"], "unlabelled": [-1], "masked": "{text} {}"},
    {"kind": "choice", "prompt": "{text} so {}", "choices": ["one", "two"], "files": {"train": "rows.jsonl"}},
    {"kind": "generation", "prompt": "{text} is", "answer": "answers.text", "stop": ".", "max_new_tokens": 5, "hub": "a/b"},
]  # fmt: skip
ROWS: list[dict[str, Any]] = [
    {"text": f"the cat {n}", "label": n % 2, "one": "it sat", "two": "it ran", "answers": {"text": ["a mat", "it"]}}
    for n in range(12)
]
TASK_OF_ROWS = [Task(**task | {"name": "mine", "files": {}}) for task in TASKS]


@cache
def pico() -> LoadedModel:
    return load_model("pico")


def read_task(folder: Path) -> None:
    task = from_yaml(folder / "task.yaml")
    assert task.columns and task.metric and (task.kind != "classification" or task.num_labels)
    if task.files:
        prepare(task, pico(), train=4, dev=2, test=2)


def lines(rows: list[Any]) -> bytes:
    return b"".join(to_json(row).replace(b"\n", b" ") + b"\n" for row in rows)


def read_rows(folder: Path) -> None:
    """Read and encode the rows for each kind of task; a refusal by one kind does not stop the others."""
    refused = None
    for task in TASK_OF_ROWS:
        try:
            ready = prepare(task, pico(), data=folder, train=4, dev=2, test=2)
        except Exception as error:
            refused = refused or error
            continue
        batch = ready.collate(ready.train)
        assert batch["input_ids"].dtype == torch.int64 and batch["input_ids"].shape[1] <= 512
    if refused is not None:
        raise refused


KINDS: dict[str, Kind] = {
    "recipe": Kind(
        "recipe.yaml",
        [as_yaml(RECIPE), as_yaml(META), b"model: pico  # a comment\ntask: cb\nout: 'x'\nlr: 1.0e-4\n"],
        altered([RECIPE, META]).map(as_yaml),
        read_recipes,
        lambda: YAML_BOMBS,
    ),
    "task": Kind(
        "task.yaml",
        [as_yaml(task) for task in TASKS],
        altered(TASKS).map(as_yaml),
        read_task,
        lambda: YAML_BOMBS | {
            "a device": as_yaml(TASKS[0] | {"files": {"train": "/dev/zero"}}),
            "a folder": as_yaml(TASKS[0] | {"files": {"train": "."}}),
            "NUL": as_yaml(TASKS[0] | {"files": {"train": "a\0b"}}),
            "attribute": as_yaml(TASKS[0] | {"prompt": "{text.__class__} {}"}),
            "width": as_yaml(TASKS[0] | {"prompt": "{text:1000000000}"}),
            "many places": as_yaml(TASKS[0] | {"prompt": "{a}" * 40_000}),
        },
        {"rows.jsonl": lines(ROWS)},
    ),
    "rows": Kind(
        "mine/train.jsonl",
        [lines(ROWS), lines(ROWS[:6]) + b"\n\n" + lines(ROWS[6:])],
        st.lists(altered(ROWS), min_size=1, max_size=3).map(lambda rows: lines([*ROWS[:8], *rows])),
        read_rows,
        lambda: {
            "deep": nested(b"[", b"]", 500_000),
            "huge integer": b'{"text": "a", "label": ' + b"9" * 50_000 + b"}\n",
            "surrogate": lines([row | {"text": "\ud800"} for row in ROWS]),
            "repeated key": b'{"text": "a", "text": "b", "label": 0}\n' * 8,
            "one long line": b'{"text": "' + b"x" * 20_000_000 + b'"}',
            "NaN": b'{"text": NaN, "label": NaN}\n' * 8,
        },
        {"mine/validation.jsonl": lines(ROWS)},
    ),
}  # fmt: skip
