"""Tables and plot from speed.json, for the terminal and for documents.

Of one processor a table has a column for each part of a suite; of several there is a table for each part, with a column for
each processor.

    python -m metazo.bench.render benchmarks/speed.json docs/speed.md

writes the tables between `<!-- speed -->` and `<!-- end of speed -->` of each document, and the picture of the document's
name beside it (docs/speed.png).
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metazo.bench import measurements, picture
from metazo.bench.meta import META
from metazo.bench.processors import TITLES, Column, columns, short_name, shown_part
from metazo.bench.steps import FORWARDS, NARROW, PUBLISHED

# Upper bounds of step / (2 x forward), and lower bounds of published loop / our step. 134M Llama, float32, 2 cores.
TARGETS = {
    "MeZO": {"1x32": 1.5, "8x64": 1.15, "16x128": 1.05},
    "MeZO, Rademacher": {"1x32": 1.25, "8x64": 1.10, "16x128": 1.03},
    "LOZO, weights": {"1x32": 1.0, "8x64": 1.10, "16x128": 1.03},  # of either form
    "LOZO, activations": {"1x32": 1.0, "8x64": 1.10, "16x128": 1.03},
    "compensated-16": {"1x32": 3.0, "8x64": 1.25},
    "compensated-8": {"1x32": 3.0, "8x64": 1.25},
    f"{PUBLISHED} / MeZO": {"1x32": 8, "8x64": 2.7, "16x128": 1.5},
}
META_TARGET, MEMORY_TARGET = 1.05, 5.0
MEMORY_BOUND = ("MeZO", "MeZO, Rademacher", "LOZO, weights", "CurvZO", "ZO Fine-tuner")


@dataclass
class Table:
    title: str
    heads: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.heads, *self.rows)]
        lines.insert(1, "|---" + "|---:" * (len(self.heads) - 1) + "|")
        return f"**{self.title}**\n\n" + "\n".join(lines)


def figure(value: dict[str, float], digits: int = 2) -> str:
    """Median and quartiles."""
    return f"{value['median']:.{digits}f} ({value['low']:.{digits}f}–{value['high']:.{digits}f})"


def judged(text: str, value: float, target: float | None, least: bool = False) -> str:
    if target is None:
        return text
    met = value >= target if least else value <= target
    return f"{text}; {'≥' if least else '≤'} {target:g} {'met' if met else 'not met'}"


def tables(result: dict[str, Any]) -> list[Table]:
    """One table per measured suite, and one for its parts in bfloat16; of several processors one for each part."""
    several, made = len(result["processors"]) > 1, []
    for suite, maker in _MAKERS.items():
        groups: dict[tuple[bool, str], list[Column]] = {}  # the parts in float32 first
        for column in sorted(columns(result, suite), key=lambda column: column.part.endswith("bfloat16")):
            key = column.part.endswith("bfloat16"), column.part if several else ""
            groups.setdefault(key, []).append(column)
        for (_, part), found in groups.items():
            table = maker(suite, found)
            made.append(replace(table, title=f"{table.title}: {shown_part(part)}") if part else table)
    return made


def _table(title: str, columns: list[Column], cell: Any, key: Any = lambda row: row["case"]) -> Table:
    """A table with one row per case and one column per part or processor."""
    names = list(dict.fromkeys(key(row) for column in columns for row in column.rows))
    body = []
    for name in names:
        cells = []
        for column in columns:
            row = next((row for row in column.rows if key(row) == name), None)
            cells.append("" if row is None else cell(column, row))
        body.append([name, *cells])
    return Table(title, ["", *(column.head for column in columns)], body)


def _steps(suite: str, columns: list[Column]) -> Table:
    def cell(column: Column, row: dict[str, Any]) -> str:
        if row["case"] == FORWARDS:
            return f"{row['seconds']['median']:.3g} s"
        size, shape = column.part.split("-")[:2]
        bound = suite in ("steps", "precision") and size == "134M" and column.environment["device"] == "cpu"
        target = TARGETS.get(row["case"], {}).get(shape) if bound else None
        ratio = row["ratio"]
        return judged(figure(ratio), ratio["median"], target, least=row["case"].startswith(f"{PUBLISHED} /"))

    return _table(TITLES[suite], columns, cell)


def _kernels(suite: str, columns: list[Column]) -> Table:
    def cell(column: Column, row: dict[str, Any]) -> str:
        return figure(row["rate"], 0)

    title = "Kernels: million parameters per second"
    return _table(title, columns, cell, lambda row: f"{row['case']}, {row['dtype']}")


def _memory(suite: str, columns: list[Column]) -> Table:
    def cell(column: Column, row: dict[str, Any]) -> str:
        share = 100 * row["above"] / row["weights"]
        bound = MEMORY_TARGET if row["case"] in MEMORY_BOUND and column.part.startswith("134M") else None
        return judged(f"{share:.1f} %", share, bound)

    of = " of MeZO in bfloat16, by precision policy" if any(c.part.endswith("bfloat16") for c in columns) else ""
    fixed = max(row["fixed"] for column in columns for row in column.rows if row["case"] in ("MeZO", *NARROW))
    title = f"Peak memory above inference{of}, % of the weights; the compiled kernels take another {fixed / 1e6:.0f} MB once"
    return _table(title, columns, cell)


def _meta(suite: str, columns: list[Column]) -> Table:
    def cell(column: Column, row: dict[str, Any]) -> str:
        if row["case"] != META:
            return f"{row['seconds']['median']:.3g} s"
        target = META_TARGET if column.part.endswith("8x64") and column.part.startswith("134M") else None
        return judged(figure(row["ratio"]), row["ratio"]["median"], target)

    return _table("Meta-step / its bare passes", columns, cell)


_MAKERS = {
    "steps": _steps,
    "scaling": _steps,
    "threads": _steps,
    "kernels": _kernels,
    "memory": _memory,
    "queries": _steps,
    "precision": _steps,
    "meta": _meta,
}


def sentence(result: dict[str, Any]) -> str:
    """Machines, versions, dates and load, for the notes below the tables."""
    found = [there for there in result["processors"] if there["suites"]]
    rows = [
        row for there in found for suite in there["suites"].values() for part in suite.values() for row in part["rows"]
    ]
    rounds = [row[key]["rounds"] for row in rows for key in ("ratio", "rate") if key in row]
    medians = [f"Medians with quartiles in brackets, of at least {min(rounds)} interleaved rounds."] if rounds else []
    return ". ".join([*map(_measured, found), *medians]).removesuffix(".") + "."


def _measured(there: dict[str, Any]) -> str:
    """The notes of one processor."""
    e = there["environment"]
    every = [part for suite in there["suites"].values() for part in suite.values()]
    dates = sorted(part["date"] for part in every)
    loads = [load for part in every for load in part["load"] if load is not None]
    kind = f" ({e['microarchitecture']})" if e.get("microarchitecture") and not e.get("gpu") else ""
    return (
        f"{e.get('gpu', short_name(e['cpu']))}{kind}, {e['cores']} cores{_threads(there)}, {e['dtype']}; torch {e['torch']}, "
        f"numba {e['numba']}, transformers {e['transformers']}, Python {e['python']}; {dates[0]} to {dates[-1]}; load average "
        f"{min(loads, default=0)} to {max(loads, default=0)}"
    )


def _threads(there: dict[str, Any]) -> str:
    """The threads of the parts that were not measured with one per core: " (1 thread in steps, meta/134M-1x32)"."""
    cores, found = there["environment"]["cores"], {}
    for suite, parts in there["suites"].items():
        if suite in ("kernels", "threads"):  # their parts are named by their threads
            continue
        counts = {name: part.get("threads", cores) for name, part in parts.items()}
        alike = len({*counts.values()}) == 1
        for name, count in counts.items():
            if count != cores:
                found.setdefault(count, {})[suite if alike else f"{suite}/{name}"] = None
    shown = [f"{count} thread{'s' * (count != 1)} in {', '.join(names)}" for count, names in found.items()]
    return f" ({'; '.join(shown)})" if shown else ""


PICTURE = """![Step over two forwards by shape and by model size]({picture})

*Step / (2 × forward), medians with quartiles. 1 is the cost of the forward passes alone; the dashed line adds three plain
passes over the weights, as many as a step in place makes whose update does not wait for the next probe.*"""


def markdown(result: dict[str, Any], picture: str = "speed.png") -> str:
    """The tables below the picture of that name."""
    shown = (
        [PICTURE.format(picture=picture)] if any("steps" in there["suites"] for there in result["processors"]) else []
    )
    return "\n\n".join([*shown, *(table.markdown() for table in tables(result)), sentence(result)])


def placed(document: str, name: str, text: str) -> str:
    """The document with the text between `<!-- name -->` and `<!-- end of name -->`."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", document, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, help="speed.json")
    parser.add_argument("documents", type=Path, nargs="+", help="Markdown files with the markers")
    given = parser.parse_args()
    result = measurements.read(given.figures)
    for document in given.documents:
        drawn = document.with_suffix(".png")
        document.write_text(
            placed(document.read_text(encoding="utf-8"), "speed", markdown(result, drawn.name)), encoding="utf-8"
        )
        picture.plot(result, drawn)


if __name__ == "__main__":
    main()
