"""A finished comparison in two files instead of one file per run; both forms are read in the same way.

    RESULTS/grid.yaml          as it was; the report needs it only if an earlier version of metazo packed the results
    RESULTS/runs.jsonl.xz      one line per run: {"file": "<task>/<column>/<name>.json", "run_info", "train_info", "metrics"}
    RESULTS/comparison.json    {"format_version": 1, "runs": number, "sha256": of the lines, "search": search.json,
                                "grid": grid.yaml}

`xz -dc runs.jsonl.xz | jq` reads the runs without metazo. A comparison is unpacked before it continues.
"""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from metazo.comparisons.grid import GRID, parts_in
from metazo.comparisons.results import (
    COMPARISON,
    RUNS,
    SEARCH,
    SECTIONS,
    Result,
    is_packed,
    read_search,
    result_of,
    write_search,
)
from metazo.errors import UserError
from metazo.io.files import read_capped, write_whole
from metazo.io.lock import FolderLock
from metazo.io.plain import MAX_JSON_BYTES, parse_json, read_json, read_yaml

FORMAT_VERSION = 1
MAX_BYTES = 2**26
"""Most bytes of all lines together, before compression: 15 times the largest comparison in results/."""
_MEMORY = 2**27  # bytes that the decompressor may take; it needs 65 MiB for the highest level


def read_runs(results: Path) -> Iterator[tuple[Path, Result | UserError]]:
    """All runs of a comparison, packed or not, by task, column and file name; for a damaged run, an error.

    The path is that of the run's own file, which a packed comparison does not have. Raises UserError if there are no
    results, or if they are packed and damaged.
    """
    if is_packed(results):
        for line in _lines(results):
            content = _parsed(line, results)
            path = results / "cells" / content.pop("file")
            yield path, result_of(content, path)
        return
    files = sorted((results / "cells").glob("*/*/*.json"))
    if not files:
        raise UserError(
            f"{results} holds no results of metazo compare (no cells/<task>/<column>/*.json and no {RUNS}); check the path."
        )
    for path in files:
        try:
            yield path, Result.load(path)
        except UserError as error:
            yield path, error


def pack(results: Path) -> tuple[int, int]:
    """Pack the runs of a comparison and remove their own files; returns bytes before and after.

    Raises UserError if it is packed already, if a comparison is running in the folder, or if a file is not a result as metazo
    wrote it, or anything else is in `cells`, because it would be lost.
    """
    with FolderLock(results, "results"):
        for part in parts_in(results):
            FolderLock(part, "results").check()
        return _pack(results)


def _pack(results: Path) -> tuple[int, int]:
    if is_packed(results):
        raise UserError(f"{results} is packed already; there is nothing to do.")
    _check_that_all_are_runs(results)
    lines, before = [], 0
    for path, result in read_runs(results):
        if isinstance(result, UserError):
            raise result
        if path.read_bytes() != result.to_bytes():
            raise UserError(
                f"{path} was not written by this version of metazo; it is not packed, and nothing is changed."
            )
        before += path.stat().st_size
        file = path.relative_to(results / "cells").as_posix()
        content = {"file": file} | {part: getattr(result, part) for part in SECTIONS}
        lines.append(json.dumps(content, separators=(",", ":"), allow_nan=False).encode() + b"\n")
    data = b"".join(lines)
    if len(data) > MAX_BYTES:
        raise UserError(f"{results} holds {len(data):,} bytes of results; at most {MAX_BYTES:,} can be packed.")
    search = read_json(results / SEARCH, "search results") if (results / SEARCH).exists() else {}
    about = {"format_version": FORMAT_VERSION, "runs": len(lines), "sha256": sha256(data).hexdigest(), "search": search}
    about |= {"grid": read_yaml(results / GRID, "grid")} if (results / GRID).exists() else {}
    packed, index = lzma.compress(data, preset=9), (json.dumps(about, indent=1, default=str) + "\n").encode()
    write_whole(results / COMPARISON, index)
    write_whole(results / RUNS, packed)
    list(read_runs(results))  # all runs are read back before anything is removed
    shutil.rmtree(results / "cells")
    (results / SEARCH).unlink(missing_ok=True)
    return before, len(packed) + len(index)


def _check_that_all_are_runs(results: Path) -> None:
    """Raises UserError for what packing removes and does not pack, other than what a killed process was writing."""
    cells = results / "cells"
    runs = set(cells.glob("*/*/*.json"))
    for path in sorted(cells.rglob("*")):
        if not (path.is_dir() or path in runs or path.match(".*.tmp")):
            raise UserError(
                f"{path} is not the file of a run (cells/<task>/<column>/*.json), and packing would remove it; "
                f"move it out of {cells}. Nothing is changed."
            )


def packed_grid(results: Path) -> dict[str, Any]:
    """The grid of a packed comparison as grid.yaml had it; empty if it is not packed, or an earlier version packed it."""
    about = read_json(results / COMPARISON, "comparison") if is_packed(results) else {}
    grid = about.get("grid")
    return grid if isinstance(grid, dict) else {}


def unpack(results: Path) -> None:
    """Write each run of a packed comparison into its own file again, byte for byte; nothing if it is not packed."""
    if is_packed(results):
        for path, result in list(read_runs(results)):
            if isinstance(result, UserError):
                raise result
            result.save(path)
        write_search(results, read_search(results))
        (results / RUNS).unlink()
    (results / COMPARISON).unlink(missing_ok=True)  # also one that a killed process left alone


def _parsed(line: bytes, results: Path) -> dict[str, Any]:
    """Parse one line. Its file name is checked, because it may become a path."""
    try:
        content = parse_json(line, finite=True)
        parts = content["file"].removesuffix(".json").split("/")
        if len(parts) != 3 or any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
            raise ValueError("a run has no file name of the form task/column/name.json")
        return content
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{results / RUNS} is damaged: {error}; get it again.") from error


def _lines(results: Path) -> list[bytes]:
    """The lines, after a check that they are those that comparison.json describes."""
    about, path = read_json(results / COMPARISON, "comparison"), results / RUNS
    if not isinstance(about, dict) or about.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{results / COMPARISON} has a format that this version of metazo does not read; update metazo."
        )
    packed, decompressor = read_capped(path, MAX_BYTES, "results"), lzma.LZMADecompressor(memlimit=_MEMORY)
    try:
        data = decompressor.decompress(packed, max_length=MAX_BYTES + 1)
    except lzma.LZMAError as error:
        raise UserError(f"{path} is damaged: {error}; get it again.") from error
    lines = data.splitlines()
    if len(data) > MAX_BYTES or max(map(len, lines), default=0) > MAX_JSON_BYTES:
        raise UserError(f"{path} holds more than a comparison may; is it the right file?")
    if not decompressor.eof or (sha256(data).hexdigest(), len(lines)) != (about.get("sha256"), about.get("runs")):
        raise UserError(f"{path} is not the file that {COMPARISON} describes; get both again.")
    return lines
