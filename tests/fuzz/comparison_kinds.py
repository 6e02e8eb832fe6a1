"""The files of a comparison, as its report reads them: results of runs, the grid, the searches, and all of them packed."""

from __future__ import annotations

import json
import lzma
import zlib
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from metazo.comparisons.grid import Grid, runs_of
from metazo.comparisons.packed import RUNS, read_runs
from metazo.comparisons.results import COMPARISON, Search
from metazo.errors import UserError
from metazo.report.build import build as build_report
from metazo.report.comparison import Comparison
from metazo.report.write import blocks, curves_csv, markdown, runs_csv
from metazo.settings import build, read_recipe
from tests.fuzz.kind import Kind, nested, to_json, zeros
from tests.fuzz.mutations import altered, numbered
from tests.fuzz.run_kinds import YAML_BOMBS
from tests.report import synthetic

MEZO, TUNER = (column for column in synthetic.COLUMNS if column.name in ("mezo", "tuner"))
DRAWN = 40  # pictures, which take a second, are drawn for one case in this many, and for the first, which is valid
drawn: set[int] = set()  # checksums of these cases


def run(column: synthetic.Column, seed: int, **info: Any) -> dict[str, Any]:
    found = json.loads(synthetic.result(column, "rte", seed, **info).to_bytes())
    found["train_info"]["curve"] = found["train_info"]["curve"][::5]
    return found


RESULTS = [run(TUNER, 0), run(TUNER, 0, status="failed", reason="No room."), run(MEZO, 0, metric=None)]
SEARCH = {
    "rte": {
        name: vars(Search(1e-3, {"0.001": 0.5, "0.01": None}, True, [1000], 2, 40, 20)) for name in ("mezo", "tuner")
    }
}
GRID: dict[str, Any] = {
    "model": "pico", "tasks": ["pico_topic"], "budget": 200, "seeds": 2, "search_seeds": 1, "search_budget": 0.5,
    "columns": [{"name": "mezo", "optimizer": "mezo", "options": {"scale": "rms", "lora": 4}, "lrs": [1e-3, 1e-4]}, "lozo"],
    "lrs": [1e-3, 1e-4], "extensions": 2, "time_budget": 60.0, "reference": "mezo", "workers": 1,
    "config": {"batch_size": 4, "lora": 0, "max_loss": 10.0, "method": {"rank": 2}},
}  # fmt: skip
AROUND = {f"cells/rte/{c.name}/seed-{seed}.json": to_json(run(c, seed)) for c in (MEZO, TUNER) for seed in (0, 1)}
AROUND |= {"cells/rte/mezo/time-0.json": to_json(run(MEZO, 0, kind="time")), "search.json": to_json(SEARCH)}
AROUND["grid.yaml"] = yaml.safe_dump({"tasks": ["rte"], "columns": ["mezo", "tuner"], "seeds": 2}).encode()


def read_results(folder: Path) -> None:
    report = build_report(Comparison(folder))
    assert markdown(report) and runs_csv(report.data) and curves_csv(report.data) and blocks(report)
    checksum = zlib.crc32(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.json"))))
    if (not drawn or checksum % DRAWN == 0) and checksum not in drawn:
        drawn.add(checksum)
        assert all(picture.svg for picture in report.pictures)


def read_result(folder: Path) -> None:
    """Read as the report does, which lists what it cannot read, then as a continued comparison, which refuses it."""
    read_results(folder)
    for _, result in read_runs(folder):
        if isinstance(result, UserError):
            raise result
        result.to_bytes()


def read_grid(folder: Path) -> None:
    """Read as the report reads the grid of a comparison, and as a new comparison does, without running it."""
    read_results(folder)
    grid = build(Grid, read_recipe(folder / "grid.yaml"))
    for column in grid.resolved:
        for wanted in runs_of(grid, "pico_topic", column, 1e-3)[:3]:
            wanted.config(grid, folder / "x")


def read_packed(folder: Path) -> None:
    """With a comparison.json that fits, so that the packed part of a forgery is read."""
    try:
        data = lzma.LZMADecompressor(memlimit=2**27).decompress((folder / RUNS).read_bytes(), 2**22)
    except lzma.LZMAError:
        data = b""
    about = {"format_version": 1, "runs": len(data.splitlines()), "sha256": sha256(data).hexdigest(), "search": SEARCH}
    (folder / COMPARISON).write_bytes(to_json(about))
    read_results(folder)


def packed(runs: list[Any]) -> bytes:
    return lzma.compress(b"".join(to_json(run) + b"\n" for run in runs), preset=0)


LINES = [{"file": f"rte/{c.name}/seed-{seed}.json"} | run(c, seed) for c in (MEZO, TUNER) for seed in (0, 1)]
HUGE = {"number": b"9" * 5_000, "power": b"1" + b"0" * 400, "NaN": b"NaN", "infinite": b"1e999"}
DEEP = {"deep": nested(b"[", b"]", 100_000), "list": b"[]", "large": b'{"a": "' + b"x" * 5_000_000 + b'"}'}


def documents(trees: list[Any]) -> st.SearchStrategy[Any]:
    return altered(trees) | numbered(trees)


def as_yaml(tree: Any) -> bytes:
    try:
        return yaml.safe_dump(tree).encode("utf-8", "surrogatepass")
    except ValueError:  # an integer of more digits than Python writes
        return b"seeds: 1" + b"0" * 4999


KINDS: dict[str, Kind] = {
    "result": Kind(
        "cells/rte/tuner/seed-0.json",
        [to_json(result) for result in RESULTS],
        documents(RESULTS).map(to_json),
        read_result,
        lambda: DEEP | {
            f"seed: {name}": to_json(RESULTS[0]).replace(b'"seed": 0', b'"seed": ' + text) for name, text in HUGE.items()
        },
        AROUND,
        share=10,
    ),
    "grid": Kind(
        "grid.yaml",
        [as_yaml(GRID)],
        documents([GRID]).map(as_yaml),
        read_grid,
        lambda: YAML_BOMBS | {
            f"{name}: {value}": as_yaml(GRID | {name: value})
            for name in ("seeds", "search_seeds", "workers", "extensions", "lrs")
            for value in (10**9, 10**70, float("nan"))
        },
        AROUND,
        share=10,
    ),
    "search": Kind(
        "search.json", [to_json(SEARCH)], documents([SEARCH]).map(to_json), read_results, dict, AROUND, share=10,
    ),
    "packed": Kind(
        RUNS,
        [packed(LINES)],
        documents([LINES]).map(packed),
        read_packed,
        lambda: {
            "zeros": zeros(256), "lines": lzma.compress(b"\n" * 2**22, preset=0), "nothing": b"",
        },
        share=10,
    ),
}  # fmt: skip
