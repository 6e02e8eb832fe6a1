"""Measure again what a step of each column of a finished comparison costs, and write it into its runs.

The operations and the memory of a step are measured once before the runs of a column begin (metazo/runs/cost.py), and
do not depend on them. Nothing else of the runs is changed.

python benchmarks/measured_costs.py results/pico
python benchmarks/measured_costs.py results/real --model $MINILM --data DATA/text
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.table import Table

from metazo.comparisons.examine import examine
from metazo.comparisons.grid import GRID, Grid
from metazo.comparisons.packed import pack, read_runs, unpack
from metazo.comparisons.results import Result
from metazo.errors import UserError
from metazo.io.lock import FolderLock
from metazo.io.plain import read_yaml
from metazo.io.terminal import Console
from metazo.settings import build
from metazo.tasks import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--model", help="folder of the model, if its name in grid.yaml is not found")
    parser.add_argument("--data", help="folder of the tasks' rows")
    given = parser.parse_args()
    named = {name: value for name, value in (("model", given.model), ("data", given.data)) if value}
    grid = build(Grid, read_yaml(given.results / GRID, "grid"), named, {"out": given.results})
    facts = {(resolve(task).name, column): fact for (task, column), fact in examine(grid).items()}
    table = Table("task", "column", "memory of a step / inference", "measured again", "operations of a step")
    seen = set[tuple[str, str]]()
    runs = list(read_runs(given.results))
    for path, result in runs:
        if not isinstance(result, Result):
            raise result
        info = result.run_info
        fact = facts.get((info["task"], info["column"]))
        if fact is not None and fact.hashes["model"] != info["hashes"]["model"]:
            raise UserError(f"{path.name} of {info['column']} is of another model ({info['model']}) than {grid.model}.")
    with FolderLock(given.results, "results"):
        unpack(given.results)
    for path, result in runs:
        assert isinstance(result, Result)
        place = result.run_info["task"], result.run_info["column"]
        old, new = result.run_info["cost"], facts[place].cost if place in facts else None
        if not old or not new:
            continue
        if place not in seen:
            seen.add(place)
            ratios = (f"{cost['step_bytes'] / cost['inference_bytes']:.3f}" for cost in (old, new))
            table.add_row(*place, *ratios, f"{new['step_flops'] / old['step_flops']:.3f} of those before")
        result.run_info["cost"] = new
        result.save(path)
    pack(given.results)
    Console(width=150).print(table)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
