"""Rows of CSV and TSV files."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from metazo.errors import UserError
from metazo.io.plain import shown
from metazo.tasks.task import Row, Task

MAX_ROW = 2**20
"""Characters of one row, and of one cell."""


def _dialect(file: TextIO, path: Path) -> dict[str, Any]:
    """How a table is written. The cells of a TSV file are often not quoted, so that a mark at the start of one means nothing;
    read as quoted, it takes the rows up to the next mark into its cell. They are read unquoted if each line then has as many
    cells as the first, and quoted rows are fewer or not well formed. Raises UserError for a CSV file that is not well formed.
    """
    delimiter = "\t" if path.suffix == ".tsv" else ","
    lines = [line for line in file if line.strip("\r\n")]
    file.seek(0)
    try:
        count = sum(bool(row) for row in csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        if "expected after" not in str(error) and "unexpected end" not in str(error):  # not about marks
            return {"delimiter": delimiter}
        count = -1
    if delimiter == "," and count < 0:
        marks = {number: line.count('"') for number, line in enumerate(lines, 1) if '"' in line}
        number = next((number for number, found in marks.items() if found % 2), min(marks, default=1))
        raise UserError(
            f"data file {path}, line {number}: a quotation mark opens a cell that does not end at a comma of its line; write a "
            'mark within a cell twice, and the cell in marks: "say ""hello"""'
        )
    unquoted = {len(row) for row in csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)}
    if delimiter == "," or count == len(lines) or len(unquoted) != 1 or max(unquoted) < 2:
        return {"delimiter": delimiter}
    return {"delimiter": delimiter, "quoting": csv.QUOTE_NONE}


def table(task: Task, path: Path, file: TextIO) -> Iterator[Row]:
    """Rows of a CSV or TSV file, opened with newline="". Every value is text, so class and choice numbers are converted.

    Raises UserError for a file that is not CSV.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW))  # 131,072 by default: less than a long document
    reader = csv.DictReader(file, strict=True, **_dialect(file, path))
    try:
        twice = next((name for name, count in Counter(reader.fieldnames or ()).items() if count > 1), None)
        if twice is not None:
            raise UserError(f"data file {path} has the column {shown(twice)} twice; rename one")
        for number, row in enumerate(reader, 1):
            where = f"{path}, row {number}"
            if None in row or None in row.values():
                raise UserError(f"{where} has another number of cells than the header has columns")
            yield _with_label(task, dict(row))
    except csv.Error as error:
        if "field limit" in str(error):
            raise UserError(
                f"data file {path}, row {reader.line_num} has a cell of more than {MAX_ROW:,} characters; shorten it, or "
                "divide it into rows (or close its quotation mark)"
            ) from error
        raise UserError(f"data file {path}, row {reader.line_num}: not CSV ({error})") from error


def _with_label(task: Task, row: Row) -> Row:
    text = row.get(task.label)
    if task.kind == "choice" and isinstance(text, str) and text.strip().lstrip("-").isdigit():
        return row | {task.label: int(text)}
    for value in (*task.labels, *task.unlabelled):
        if not isinstance(value, str) and text == ("" if value is None else str(value)):
            return row | {task.label: value}
    return row
