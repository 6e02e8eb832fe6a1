"""Tables and plot from speed.json, for the terminal and for documents.

    python -m metazo.bench.render benchmarks/speed.json docs/speed.md README.md

puts the tables between `<!-- speed -->` and `<!-- end of speed -->` of each document, the table of steps alone between
`<!-- steps -->` and `<!-- end of steps -->`, and draws speed.png beside the first.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metazo.bench import measurements
from metazo.bench.meta import META
from metazo.bench.steps import CORE, FORWARDS, NARROW, PASSES, PUBLISHED
from metazo.io.extras import needs

# Step / (2 x forward), at most; for the published loop over our step, at least. 134M Llama, float32, 2 cores.
TARGETS = {
    "MeZO": {"1x32": 2.0, "8x64": 1.20, "16x128": 1.07},
    "MeZO, Rademacher": {"1x32": 1.35, "8x64": 1.07, "16x128": 1.03},
    "LOZO, weights": {"1x32": 1.0, "8x64": 1.15, "16x128": 1.10},  # of either form
    "LOZO, activations": {"1x32": 1.0, "8x64": 1.15, "16x128": 1.10},
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
    """One for each suite that was measured, and one for its parts in bfloat16."""
    made = []
    for suite, maker in _MAKERS.items():
        for narrow in (False, True):
            found = result["suites"].get(suite, {})
            parts = {name: part for name, part in found.items() if name.endswith("bfloat16") == narrow}
            if parts:
                made.append(maker(suite, parts, result["environment"]))
    return made


def _pivot(parts: dict[str, Any], cell: Any, key: Any = lambda row: row["case"]) -> list[list[str]]:
    """Cases down, parts across."""
    names = list(dict.fromkeys(key(row) for part in parts.values() for row in part["rows"]))
    body = []
    for name in names:
        cells = []
        for part, content in parts.items():
            row = next((row for row in content["rows"] if key(row) == name), None)
            cells.append("" if row is None else cell(part, row))
        body.append([name, *cells])
    return body


def _head(part: str) -> str:
    """134M-8x64 -> 134M (8, 64)"""
    return re.sub(r"(\d+)x(\d+)", r"(\1, \2)", part).replace("-", " ")


_TITLES = {
    "steps": "Step / (2 × forward) by model and batch × length",
    "threads": "Step / (2 × forward) by threads and batch × length",
    "scaling": "Step / (2 × forward) by model size",
    "queries": "LOZO with several queries: step / (2 × queries × forward)",
    "precision": "Step / (2 × forward) of MeZO in bfloat16 by precision policy",
}


def _steps(suite: str, parts: dict[str, Any], environment: dict[str, Any]) -> Table:
    def cell(part: str, row: dict[str, Any]) -> str:
        if row["case"] == FORWARDS:
            return f"{row['seconds']['median']:.3g} s"
        size, _, shape = part.partition("-")
        bound = suite == "steps" and size == "134M" and environment["device"] == "cpu"
        target = TARGETS.get(row["case"], {}).get(shape) if bound else None
        ratio = row["ratio"]
        return judged(figure(ratio), ratio["median"], target, least=row["case"].startswith(f"{PUBLISHED} /"))

    return Table(_TITLES[suite], ["", *map(_head, parts)], _pivot(parts, cell))


def _kernels(suite: str, parts: dict[str, Any], environment: dict[str, Any]) -> Table:
    def cell(part: str, row: dict[str, Any]) -> str:
        return figure(row["rate"], 0)

    body = _pivot(parts, cell, lambda row: f"{row['case']}, {row['dtype']}")
    return Table("Kernels: million parameters a second", ["", *map(_head, parts)], body)


def _memory(suite: str, parts: dict[str, Any], environment: dict[str, Any]) -> Table:
    def cell(part: str, row: dict[str, Any]) -> str:
        share = 100 * row["above"] / row["weights"]
        bound = MEMORY_TARGET if row["case"] in MEMORY_BOUND and part.startswith("134M") else None
        return judged(f"{share:.1f} %", share, bound)

    of = " of MeZO in bfloat16, by precision policy" if any(part.endswith("bfloat16") for part in parts) else ""
    fixed = max(row["fixed"] for part in parts.values() for row in part["rows"] if row["case"] in ("MeZO", *NARROW))
    title = f"Peak memory above inference{of}, % of the weights; the compiled kernels take {fixed / 1e6:.0f} MB once besides"
    return Table(title, ["", *map(_head, parts)], _pivot(parts, cell))


def _meta(suite: str, parts: dict[str, Any], environment: dict[str, Any]) -> Table:
    def cell(part: str, row: dict[str, Any]) -> str:
        if row["case"] != META:
            return f"{row['seconds']['median']:.3g} s"
        target = META_TARGET if part.endswith("8x64") and part.startswith("134M") else None
        return judged(figure(row["ratio"]), row["ratio"]["median"], target)

    return Table("Meta-step / its bare passes", ["", *map(_head, parts)], _pivot(parts, cell))


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
    """Machine, versions, dates and load, for the foot of the tables."""
    e = result["environment"]
    every = [part for suite in result["suites"].values() for part in suite.values()]
    dates = sorted(part["date"] for part in every)
    loads = [load for part in every for load in part["load"] if load is not None]
    return (
        f"{e.get('gpu', e['cpu'])}, {e['cores']} cores, {e['dtype']}; torch {e['torch']}, numba {e['numba']}, transformers "
        f"{e['transformers']}, Python {e['python']}; {dates[0]} to {dates[-1]}; load average {min(loads, default=0)} to "
        f"{max(loads, default=0)}. Medians with quartiles in brackets, of at least 5 interleaved rounds."
    )


PICTURE = """![Step over two forwards by shape and by model size](speed.png)

*Step / (2 × forward), medians with quartiles. 1 is the cost of the forward passes alone; the dashed line adds three plain
passes over the weights, the floor of a method that moves them in place.*"""


def markdown(result: dict[str, Any]) -> str:
    picture = [PICTURE] if "steps" in result["suites"] else []
    return "\n\n".join([*picture, *(table.markdown() for table in tables(result)), sentence(result)])


def short(result: dict[str, Any]) -> str:
    """The table of steps alone, for a README."""
    steps = [table.markdown() for table in tables(result) if table.title == _TITLES["steps"]]
    return "\n\n".join([*steps, sentence(result)])


def placed(document: str, name: str, text: str) -> str:
    """The document with the text between `<!-- name -->` and `<!-- end of name -->`."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", document, flags=re.DOTALL)


_MARKS = (("#000000", "s"), ("#0072B2", "o"), ("#56B4E9", "^"), ("#D55E00", "D"), ("#E69F00", "v"))  # Okabe, Ito (2008)


def plot(result: dict[str, Any], path: Path) -> None:
    """Steps by shape and by model size, as dots with quartiles over the floor that memory sets; written as PNG."""
    with needs("report"):
        from matplotlib import pyplot as plt

    suites = {name: result["suites"][name] for name in ("steps", "scaling") if name in result["suites"]}
    if not suites:
        return
    drawing, axes = plt.subplots(1, len(suites), figsize=(6.4 * len(suites), 4.2), squeeze=False, layout="constrained")
    for axis, (name, parts) in zip(axes[0], suites.items()):
        _dots(axis, parts)
        axis.set(title=_TITLES[name], yscale="log", ylabel="step / (2 × forward)")
        axis.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axis.minorticks_off()
        axis.set_xticks(range(len(parts)), [_head(part) for part in parts])
        axis.set_xlim(-0.5, len(parts) - 0.5)
        axis.set_ylim(bottom=0.8)
        axis.grid(axis="y", alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    drawing.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(drawing)


def _dots(axis: Any, parts: dict[str, Any]) -> None:
    for place, (case, (colour, mark)) in enumerate(zip(CORE, _MARKS)):
        found = [(i, r["ratio"]) for i, part in enumerate(parts.values()) for r in part["rows"] if r["case"] == case]
        at = [i + 0.15 * (place - 2) for i, _ in found]
        middle = [ratio["median"] for _, ratio in found]
        errors = [[r["median"] - r["low"] for _, r in found], [r["high"] - r["median"] for _, r in found]]
        axis.errorbar(
            at, middle, errors, fmt=mark, color=colour, markersize=5, capsize=2, label=case if found else None
        )
        for x, y in zip(at, middle):
            axis.annotate(f"{y:.2f}", (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=7)
    for i, part in enumerate(parts.values()):
        floor = next(1 + row["ratio"]["median"] for row in part["rows"] if row["case"] == PASSES)
        label = "two forwards + three plain passes" if i == 0 else None
        axis.hlines(floor, i - 0.45, i + 0.45, color="0.5", linewidth=1, linestyle="--", label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, help="speed.json")
    parser.add_argument("documents", type=Path, nargs="+", help="Markdown files with the markers")
    given = parser.parse_args()
    result = measurements.read(given.figures)
    for document in given.documents:
        text = placed(document.read_text(), "speed", markdown(result))
        document.write_text(placed(text, "steps", short(result)))
    plot(result, given.documents[0].with_name("speed.png"))


if __name__ == "__main__":
    main()
