"""The table of kills in Markdown, with one row per case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metazo.optimizers import METHODS

MODES = ("moment", "line", "write")


def method_of(case: str) -> str:
    """The method of a case, which may have another precision: "mezo, compensated-8"."""
    return case.partition(",")[0]


def lost(row: dict[str, Any]) -> int:
    """Steps that were complete and not in the log when the process died, or complete in the log and not used by the resume.

    In first-order runs and meta-training the steps since the last snapshot are computed again.
    """
    if row["case"].startswith("meta-train") or not METHODS[method_of(row["case"])].replayable:
        return 0
    missing = max(0, row["steps completed"] - row["steps in the log"])
    return missing + row["steps in the log"] - row.get("resumed after step", row["steps in the log"])


def table(rows: list[dict[str, Any]], cases: Sequence[str]) -> str:
    heads = ["method", "kills", *MODES, "torn lines", "torn files", "steps lost", "bit-identical"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]

    def line(name: str, mine: list[dict[str, Any]]) -> str:
        cells = [name, len(mine), *(sum(row["mode"] == mode for row in mine) for mode in MODES)]
        cells += [sum(row["torn bytes"] > 0 for row in mine), sum(row["left behind"] > 0 for row in mine)]
        cells += [sum(map(lost, mine)), f"{sum(row['identical'] for row in mine)} of {len(mine)}"]
        return "| " + " | ".join(map(str, cells)) + " |"

    for case in cases:
        mine = [row for row in rows if row["case"] == case]
        if mine:
            method = method_of(case)
            lines.append(line(case if case.startswith("meta") else case.replace(method, f"`{method}`", 1), mine))
    return "\n".join([*lines, line("all", rows)])


def render(rows: list[dict[str, Any]], cases: Sequence[str], page: Path) -> None:
    text, begin, end = page.read_text(), "<!-- kills: made by tests/crash/harness.py -->", "<!-- end of kills -->"
    head, rest = text.split(begin)
    page.write_text(f"{head}{begin}\n{table(rows, cases)}\n{end}{rest.split(end)[1]}")
