"""A table with a caption, as Markdown, CSV and (in page.html) HTML; numbers and lists as text."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

NONE = "–"
_NUMBER = r"[-+]?(\d[\d.,]*(e[-+]?\d+)?|inf|nan)"
_FORMULA = re.compile(r"[=@+\-\t\r]")  # how a text begins that a spreadsheet computes
_FIGURES = re.compile(rf"{_NUMBER}(( ± | to ){_NUMBER})?( \((\d+ of \d+|dev)\))*")


@dataclass(frozen=True)
class Cell:
    """The text of a cell, and whether it is the best of its column."""

    text: str
    best: bool = False


@dataclass
class Table:
    """name: of the CSV and of blocks to fill; note: an explanation for the reader; heads: number of leading text columns."""

    name: str
    title: str
    note: str
    headings: Sequence[str]
    rows: list[list[Cell]] = field(default_factory=list)
    heads: int = 1

    def add(self, *cells: Cell | str) -> None:
        self.rows.append([cell if isinstance(cell, Cell) else Cell(cell) for cell in cells])

    def markdown(self) -> str:
        lines = ["| " + " | ".join(map(escape_markdown, self.headings)) + " |"]
        lines.append("|" + "---|" * self.heads + "---:|" * (len(self.headings) - self.heads))
        for row in self.rows:
            texts = [f"**{escape_markdown(c.text)}**" if c.best else escape_markdown(c.text) for c in row]
            lines.append("| " + " | ".join(texts) + " |")
        return "\n".join(lines)

    def csv(self) -> str:
        return write_csv([list(self.headings), *([cell.text for cell in row] for row in self.rows)])


def write_csv(rows: Sequence[Sequence[object]]) -> str:
    """Rows as CSV; text that a spreadsheet would read as a formula is marked as text."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([["" if cell is None else _harmless(cell) for cell in row] for row in rows])
    return buffer.getvalue()


def _harmless(value: object) -> object:
    formula = isinstance(value, str) and _FORMULA.match(value) and not _FIGURES.fullmatch(value)
    return f"'{value}" if formula else value


def escape_markdown(text: str) -> str:
    """Escape text for Markdown: no markup, no HTML, one line, and no end of a table's cell."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", text)


def loss(value: float, beside: float | None = None) -> str:
    """A loss in nats: three decimals, or two significant digits below a hundredth.

    beside: a number that decides between the two in place of the value.
    """
    size = abs(value if beside is None else beside)
    return f"{value:.3f}" if size >= 0.01 or size == 0 else f"{value:.2g}"


def share(value: float) -> str:
    """A fraction or another score of at most 1, in hundredths."""
    return f"{100 * value:.1f}"


def score(value: float, measure: str, spread: float | None = None) -> str:
    """A mean and its standard deviation; both have two significant digits if the mean is a loss below a hundredth."""
    if measure == "loss":
        return loss(value) + (f" ± {loss(spread, value)}" if spread is not None else "")
    return share(value) + (f" ± {share(spread)}" if spread is not None else "")


def p_value(value: float | None) -> str:
    return NONE if value is None else "< 0.0001" if value < 1e-4 else f"{value:.3g}"


def count(value: float) -> str:
    return f"{value:,.0f}"


def seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else count(value)


def megabytes(value: float) -> str:
    return f"{value / 1e6:.3g}" if value < 1e9 else count(value / 1e6)


def over_seeds(values: Sequence[float], measure: str, seeds: int) -> str:
    """Mean ± standard deviation, and the number of values if there are fewer than the requested seeds."""
    if not values:
        return NONE
    text = score(fmean(values), measure, stdev(values) if len(values) > 1 else None)
    return text if len(values) == seeds else f"{text} ({len(values)} of {seeds})"


def listed(names: Sequence[str], most: int = 6) -> str:
    """a, b and c."""
    names = [*names[: most - 1], f"{len(names) - most + 1} more"] if len(names) > most else list(names)
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def some(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
