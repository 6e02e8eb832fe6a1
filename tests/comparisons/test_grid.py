"""Columns, grids and results as files: names, variants, and one sentence per mistake."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from metazo import recipes
from metazo.comparisons import columns
from metazo.comparisons.columns import resolve
from metazo.comparisons.examine import examine, of_decay, of_masters, of_method, of_order, of_tuner
from metazo.comparisons.grid import Grid, Run, search_run
from metazo.comparisons.key import key
from metazo.comparisons.results import Result, cell_path
from metazo.comparisons.store import Store, same
from metazo.errors import UserError
from metazo.feedback.surrogates import MeanJacobian
from metazo.models.load import load_model
from metazo.optimizers import OPTIMIZERS, MeZO, registry
from metazo.optimizers.first_order import FirstOrderAdamW
from metazo.runs.batches import ORDER
from metazo.runs.config import FinetuneConfig
from metazo.runs.examples import prepared_task
from metazo.settings import build, read_recipe
from metazo.tasks import resolve as task_of
from metazo.tuner.networks import PertNN
from metazo.tuner.scale import TunerScale
from tests.comparisons.finished import read_results

SMALL = {"train_examples": 8, "dev_examples": 8, "test_examples": 8, "batch_size": 4}


def grid(tmp_path, **extra) -> Grid:
    base = {"model": "pico", "tasks": ["pico_sentiment"], "columns": ["mezo"], "budget": 40, "out": tmp_path}
    return build(Grid, base, extra)


def test_all_has_every_method_and_control_once():
    names = [column.name for column in resolve(["all"])]
    assert len(names) == len(set(names)) and {"zero-shot", "tuner", "lora-mezo", "random-tuner-2"} <= set(names)
    assert set(OPTIMIZERS) - {"zo-finetuner"} <= set(names)  # which is called "tuner" there


def test_folders_may_be_text():
    grid = Grid("pico", ["pico_sentiment"], ["mezo"], 8, out="results", data="rows")
    assert (grid.out, grid.data) == (Path("results"), Path("rows"))


def test_columns_that_need_a_tuner_get_the_grids():
    found = {column.name: column.options.get("tuner") for column in resolve(["tuner", "random-tuner", "mezo"], "mine")}
    assert found == {"tuner": "mine", "random-tuner-0": "random:0", "random-tuner-1": "random:1",
                     "random-tuner-2": "random:2", "mezo": None}  # fmt: skip


def test_a_variant_takes_settings_and_hyperparameters(tmp_path):
    (column,) = resolve(
        [
            {"name": "narrow", "optimizer": "lozo", "options": {"rank": 3, "scale": "rms"}, "lrs": ["1e-3"]}
        ]  # a text to YAML
    )
    config = Run("pico_sentiment", column, "seed", 2, 1e-3, 40).config(grid(tmp_path), tmp_path)
    assert (config.optimizer, config.method, config.scale, config.seed) == ("lozo", {"rank": 3}, "rms", 2)
    (changed,) = resolve([{"name": "mezo-rms", "options": {"noise": "rademacher"}}])
    assert changed.options == {"scale": "rms", "noise": "rademacher"}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("lozzo", "did you mean lozo"),
        ({"optimizer": "mezo"}, "a mapping with a name"),
        ({"name": "a", "optimiser": "mezo"}, "'optimiser' is not one of"),
        ({"name": "a", "optimizer": "adamw"}, "optimizer 'adamw' is unknown"),
        ({"name": "a", "options": {"rnk": 2}}, "'rnk' is neither a setting of a run nor a hyperparameter of mezo"),
        ({"name": "a", "options": {"lr": 1e-3}}, "'lr' is set by the grid"),
        ({"name": "a", "options": {"patience": 3}}, "`patience` ends runs before their budget"),
        ({"name": "a", "lrs": ["fast"]}, "lrs is a list of finite numbers above 0"),
        ({"name": "a", "lrs": [10**400]}, "lrs is a list of finite numbers above 0"),
        ({"name": "a", "lrs": [1e-3, 3e-3, 1e-3]}, "Column 'a': lrs has the rate 0.001 2 times"),
        ({"name": "../a"}, "'../a' is refused"),
        ({"name": "a/b"}, "has a slash"),
        ({"name": "a", "options": [1]}, "options is a mapping"),
        ({"name": "a", "options": {1: 2}}, "Column 'a': options has the key 1; give names of settings"),
    ],
)
def test_columns_that_are_wrong(entry, words):
    with pytest.raises(UserError, match=".*".join(words.split("..."))):
        resolve([entry])


def test_a_name_stands_once():
    with pytest.raises(UserError, match="is given twice"):
        resolve(["mezo", {"name": "mezo", "options": {"scale": "rms"}}])


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"budgets": 3}, "'budgets' is not a setting"),
        ({"seeds": 0}, "`seeds` must be at least 1"),
        ({"search_budget": 2}, "`search_budget` is a fraction"),
        ({"time_budget": "soon"}, "`time_budget` is a number of seconds above 0, or the word reference"),
        ({"lrs": []}, "`lrs` is a list"),
        ({"lrs": [1e-3, math.nan]}, "`lrs` is a list of finite numbers above 0, not [0.001, nan]"),
        ({"lrs": [math.inf]}, "`lrs` is a list of finite numbers above 0, not [inf]"),
        ({"lrs": [1e-3, 1e-3, 3e-3]}, "`lrs` has the rate 0.001 2 times"),
        ({"lrs": [1e-3, 1.0000001e-3]}, "`lrs` has the rate 0.001 2 times"),
        ({"tasks": [3]}, "`tasks`: 3 is neither a name or a file nor a mapping with name and file"),
        ({"tasks": [{"name": "a"}]}, "`tasks`: {'name': 'a'} is neither a name"),
        ({"reference": "mezoo"}, "`reference` is 'mezoo', which is no column; name one of mezo."),
        (
            {"columns": ["mezo", "zero-shot"], "reference": "zero-shot"},
            "`reference` is 'zero-shot', which does not train, so that no task would count; name one of mezo.",
        ),
        (
            {"columns": ["lozo", "fzoo"], "time_budget": "reference"},
            "`reference` is 'mezo', which is no column, and `time_budget` takes its time; name one of lozo, fzoo.",
        ),
        ({"config": {"batchsize": 4}}, "did you mean batch_size"),
        ({"config": {"seed": 4}}, "'seed' is set by the grid"),
        ({"config": {"track": ["tensorboard"]}}, "config: `track` keeps its files in the folder of each run"),
        ({"search_config": {"push": "me/model"}}, "search_config: `push` uploads the model of one run"),
        ({"config": {"patience": 3}}, "`patience` ends runs before their budget"),
    ],
)
def test_grids_that_are_wrong(tmp_path, extra, words):
    with pytest.raises(UserError) as error:
        grid(tmp_path, **extra)
    assert words in str(error.value)


def test_what_is_left_out_may_be_written(tmp_path):
    assert grid(tmp_path, config={"track": None, "push": None}).config["push"] is None


def test_settings_of_runs_may_have_hyphens(tmp_path):
    settings = grid(tmp_path, config={"batch-size": 4}, search_config={"eval-every": 5})
    reported, searched = (Run("pico_sentiment", settings.resolved[0], kind, 0, 1e-3, 40) for kind in ("seed", "search"))
    assert reported.config(settings, tmp_path).batch_size == 4
    assert searched.config(settings, tmp_path).eval_every == 5


def test_a_grid_is_written_out_so_that_it_runs_again(tmp_path):
    own = {"name": "lozo", "lrs": [1e-3]}
    first = grid(tmp_path, columns=["random-tuner", own], time_budget="reference", reference="lozo")
    first.write()
    again = build(Grid, yaml.safe_load((tmp_path / "grid.yaml").read_text()))
    assert again.resolved == first.resolved and again.time_budget == "reference"


def test_a_time_budget_may_be_a_number_in_text(tmp_path):
    assert grid(tmp_path, time_budget="8").time_budget == 8.0


def test_a_grid_names_the_tasks_of_files(tmp_path, monkeypatch):
    """The report finds the runs of a task by its name, wherever the file is by then."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        "name: films\nkind: classification\nprompt: '{text} {}'\nlabels: [bad, good]\nfiles: {train: rows.jsonl}\n"
    )
    first = grid(tmp_path / "a", tasks=["mine.yaml", "pico_topic"])
    first.write()
    again = yaml.safe_load((tmp_path / "a" / "grid.yaml").read_text())
    assert again["tasks"] == [{"name": "films", "file": "mine.yaml"}, "pico_topic"]
    assert build(Grid, again).tasks == first.tasks


def test_the_key_follows_what_is_computed_and_nothing_else(tmp_path):
    settings, hashes = grid(tmp_path), {"model": "a", "data": "b", "tuner": None}

    def of(**extra) -> str:
        column = columns.Column("mezo", "mezo", extra)
        return key(Run("pico_sentiment", column, "seed", 0, 1e-3, 40).config(settings, tmp_path / str(extra)), hashes)

    assert of() == of(eval_batch_size=8) == of(max_length=None)
    assert of() == of(max_bad_steps=10) != of(max_bad_steps=1)  # which decides whether a run ends as diverged
    assert of() != of(batch_size=8) and of() != of(scale="rms")
    plain = Run("pico_sentiment", settings.resolved[0], "seed", 0, 1e-3, 40).config(settings, tmp_path)
    assert key(plain, hashes) != key(plain, {**hashes, "data": "c"})


def test_results_hold_three_objects_and_no_nan(tmp_path):
    path = cell_path(tmp_path, "t", "c", "search", 1000, 3e-4)
    assert path == tmp_path / "cells" / "t" / "c" / "search-0.0003-1000.json"
    Result({"status": "failed"}, {"curve": [float("nan")]}, {"dev": None}).save(path)
    content = json.loads(path.read_text())
    assert list(content) == ["run_info", "train_info", "metrics"] and content["train_info"]["curve"] == [None]
    assert [r.finished for r in read_results(tmp_path, "search")] == [False] and not list(
        read_results(tmp_path, "seed")
    )
    path.write_text('{"run_info": {}}')
    with pytest.raises(UserError, match="exactly run_info, train_info, metrics"):
        Result.load(path)
    with pytest.raises(UserError, match="holds no results"):
        list(read_results(tmp_path / "cells"))


@pytest.mark.parametrize("name", [name for name in recipes.names() if name.startswith("grid-")])
def test_the_grids_that_come_along(name):
    made = build(Grid, read_recipe(recipes.locate(name)))
    assert made.seeds >= 3 and made.search_budget <= 1 and made.resolved
    for column in made.resolved:
        Run(made.tasks[0], column, "seed", 0, 1e-3, made.budget).config(made, made.out)
    assert f"metazo compare {name}" in recipes.text(name)
    assert "../" not in recipes.text(name)  # a path that is beside the author's checkout alone


def test_runs_with_batches_in_another_order_are_not_continued(tmp_path):
    def order(examples: int, **settings):
        config = FinetuneConfig("pico", "pico_sentiment", tmp_path, **settings)
        return of_order(SimpleNamespace(config=config, prepared=SimpleNamespace(train=[0] * examples)))

    assert order(500, batches="by-length") == {"order": str(ORDER)}
    assert order(500) == order(640, batches="by-length") == {}  # the key of results that are there


def test_runs_of_sgd_with_a_weight_decay_that_was_part_of_the_momentum_are_not_continued(tmp_path):
    def decay(optimizer: str, weight_decay: float):
        return of_decay(
            FinetuneConfig("pico", "pico_sentiment", tmp_path, optimizer=optimizer, weight_decay=weight_decay)
        )

    assert decay("first-order-sgd", 0.5) == {"decay": "decoupled"}
    assert decay("first-order-sgd", 0.0) == decay("first-order-adamw", 0.5) == {}  # the keys of results that are there


def test_first_order_runs_of_versions_without_a_precision_are_not_continued(tmp_path):
    made = {
        dtype: FirstOrderAdamW(nn.Linear(2, 1, dtype=dtype).named_parameters())
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert of_masters(made[torch.bfloat16]) == {"masters": "float32"}
    assert of_masters(made[torch.float32]) == of_masters(MeZO(nn.Linear(2, 1).named_parameters())) == {}
    wide = [cls(nn.Linear(2, 1).named_parameters(), precision="autocast") for cls in (FirstOrderAdamW, MeZO)]
    assert [of_masters(each) for each in wide] == [{"autocast": "bfloat16"}, {}]

    def hashes(**config):
        (fact,) = examine(
            grid(tmp_path, columns=["first-order-adamw"], config=SMALL | config, reference="mezo")
        ).values()
        return fact.hashes

    assert hashes(dtype="bfloat16")["masters"] == "float32" and hashes(precision="autocast")["autocast"] == "bfloat16"
    assert set(hashes()) == {"model", "data", "tuner"}


def test_a_shared_precision_that_a_method_has_not_is_auto_for_it(tmp_path):
    named = [{"name": "own", "optimizer": "first-order-adamw", "options": {"precision": "master"}}]
    config = {"dtype": "bfloat16", "precision": "compensated-16"}
    made = grid(tmp_path, columns=["mezo", "first-order-adamw", "zero-shot", *named], config=SMALL | config)
    found = [
        Run("pico_sentiment", each, "seed", 0, 1e-3, 40).config(made, tmp_path).precision for each in made.resolved
    ]
    assert found == ["compensated-16", "auto", "compensated-16", "master"]
    examine(grid(tmp_path, columns=["first-order-adamw"], config=SMALL | config))
    with pytest.raises(UserError, match="Column 'first-order-adamw': `precision` is 'nonsense'"):
        examine(grid(tmp_path, columns=["first-order-adamw"], config=SMALL | {"precision": "nonsense"}))
    with pytest.raises(UserError, match="Column 'own' .*compensated-16' is none of first-order-adamw's"):
        named[0]["options"] = {"precision": "compensated-16"}
        examine(grid(tmp_path, columns=named, config=SMALL | {"dtype": "bfloat16"}, reference="mezo"))


def test_results_of_another_version_of_the_users_method_are_not_used_again(tmp_path, monkeypatch):
    path, text = tmp_path / "keyed_method.py", (Path(__file__).parents[2] / "examples" / "own_method.py").read_text()
    path.write_text(text.replace("own-meazo", "keyed-meazo"))
    monkeypatch.setattr(registry, "METHODS", {**registry.METHODS})
    monkeypatch.setattr(registry, "OPTIMIZERS", {**registry.OPTIMIZERS})
    monkeypatch.setitem(sys.modules, path.stem, None)
    registry.load_entry(str(path))
    own = registry.METHODS["keyed-meazo"]
    before = of_method(own)
    path.write_text(path.read_text() + "\n")
    assert before["method"] != of_method(own)["method"]
    supplied = [cls for cls in registry.METHODS.values() if cls.__module__.startswith("metazo.")]
    assert len(supplied) > 20 and not any(map(of_method, supplied))  # the keys of results that are there


def test_results_of_the_same_networks_in_another_use_are_not_used_again():
    """One hash of the networks, and other scales; of a method without a tuner, earlier results are used again."""

    def use(**settings) -> dict[str, str]:
        return of_tuner(MeZO(nn.Linear(2, 2).named_parameters(), scale=TunerScale(pertnn=PertNN(2), **settings)))

    assert (
        use() == use()
        and len({json.dumps(use(**own)) for own in ({}, {"bound": 2.0}, {"networks": ["weight", "bias"]})}) == 3
    )
    trusts = [SimpleNamespace(scale=None, jacobian=MeanJacobian({}, {}, {0: trust})) for trust in (0.5, 0.25)]
    assert of_tuner(trusts[0]) != of_tuner(trusts[1])
    assert of_tuner(MeZO(nn.Linear(2, 2).named_parameters())) == {}


def test_the_use_of_a_tuner_is_beside_the_key_of_results_that_are_there(tmp_path):
    column = {"name": "random", "optimizer": "zo-finetuner", "options": {"tuner": "random:0"}}
    (fact,) = examine(grid(tmp_path, columns=[column])).values()
    assert set(fact.hashes) == {"model", "data", "tuner"} and set(fact.use) == {"networks"}


def own_task(folder: Path, texts: range, **files: str) -> str:
    """A task of the given rows, in one file or in the same file under several names."""
    rows = [json.dumps({"text": f"note {number}", "label": number % 2}) for number in texts]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    task = {"name": "notes", "kind": "classification", "prompt": "{text}. It was {}.", "labels": ["terrible", "great"]}
    (folder / "notes.yaml").write_text(yaml.safe_dump(task | {"files": {"train": "rows.jsonl"} | files}))
    return str(folder / "notes.yaml")


@pytest.mark.parametrize("size", [4, 40])
def test_rows_on_which_a_search_chooses_are_no_test_rows(tmp_path, size):
    """If the test rows are taken from the train file, all runs have one split, in which they are reserved."""
    task = own_task(tmp_path, range(100))
    config = {"train_examples": size, "dev_examples": size, "test_examples": 20}
    settings = grid(tmp_path / "out", model="pico", tasks=[task], config=config)
    (column,) = (column for column in settings.resolved if column.name == "mezo")
    loaded = load_model("pico")

    def split(run: Run) -> list[set[str]]:
        prepared = prepared_task(run.config(settings, tmp_path), task_of(task), loaded)
        return [{str(example.ids) for example in getattr(prepared, name)} for name in ("train", "dev", "test")]

    search = split(search_run(settings, task, column, 1e-4, 1000))
    for seed in range(3):
        reported = split(Run(task, column, "seed", seed, 1e-4, 10))
        assert search == reported and not (reported[0] | reported[1]) & reported[2] and len(reported[2]) == 20
    for settings_of in ({"config": {"split_seed": 5}}, {"search_config": {"split_seed": 5}}):
        with pytest.raises(UserError, match="'split_seed' is set by the grid for all columns"):
            grid(tmp_path / "out", **settings_of)
    rows = {"validation": "rows.jsonl", "test": "rows.jsonl"}  # a test file of its own, as far as metazo knows
    settings = grid(tmp_path / "out", model="pico", tasks=[own_task(tmp_path, range(100), **rows)], config=config)
    assert search_run(settings, task, column, 1e-4, 1000).config(settings, tmp_path).test_examples == 0


def test_a_result_knows_all_rows_from_which_seeds_draw(tmp_path):
    """The hash of the encoded data is of the rows of seed 0 alone; results of earlier versions, without `rows`, are found."""

    def facts(texts: range) -> dict[str, Any]:
        config = {"train_examples": 4, "dev_examples": 2, "test_examples": 2}
        settings = grid(
            tmp_path / "out", model="pico", tasks=[own_task(tmp_path, texts)], columns=["mezo"], config=config
        )
        store = Store(settings, examine(settings), False, tmp_path)
        return store.job(Run(settings.tasks[0], settings.resolved[0], "seed", 1, 1e-4, 10)).info

    first, again, fewer = facts(range(50)), facts(range(50)), facts(range(60))
    assert same(first, again) and first["hashes"] == again["hashes"] and first["rows"] != fewer["rows"]
    assert not same(first | {"rows": fewer["rows"]}, again)
    assert same({name: value for name, value in first.items() if name != "rows"}, again)
