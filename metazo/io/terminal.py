"""All printing of metazo. Text from files, servers and models reaches a terminal as text, never as a control sequence or
as markup of rich.

Everything in metazo prints by `Console`, `print_line` or `print_json`; a test holds every other module to it. Styles
come from the caller (`style=`, `rich.text.Text`), because a string is never read as markup here.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import rich.console
from rich.cells import cell_len
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from metazo.errors import UserError
from metazo.io.plain import finite

UNREAD = 141
"""The exit code if nobody reads the output any more: 128 + SIGPIPE, as a shell reports it."""


def escaped(text: str) -> str:
    """The text with every character escaped that a terminal could act on or that cannot be encoded.

    Printable characters, line breaks, tabs and the spaces of Unicode are kept. Control characters (C0, DEL, C1), format
    characters such as those that change the direction of text, and lone surrogates are escaped as in a Python string.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" else _code(c) for c in text)


def _code(character: str) -> str:
    return ascii(character)[1:-1]


class Console(rich.console.Console):
    """A console of rich that reads no string as markup and escapes what it is given.

    Strings are escaped before layout, so that tables keep their form; everything else, such as a `rich.text.Text` or the
    output of rich's own components, is escaped on output. Columns of a table that are too narrow break their text and cut
    nothing off: a number without its last characters would be another one.
    """

    def __init__(self, **settings: Any) -> None:
        defaults: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False}
        super().__init__(**defaults | settings)
        self._said: set[tuple[str, str]] = set()

    @classmethod
    def of(cls, console: rich.console.Console | None) -> Console:
        """The console itself; for rich's own console one with the same output; for None a silent one."""
        if console is None:
            return cls(quiet=True)
        return console if isinstance(console, cls) else cls(file=console.file, width=console.width, quiet=console.quiet)

    def worded(self, text: str) -> str:
        """A message in the words of whoever reads this console; the command line names flags in it."""
        return text

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(self.worded(item) if isinstance(item, str) else item for item in objects), **options)

    def say(self, label: str, text: object, style: str = "dim", once: bool = False) -> None:
        """`label` in a style, and the text behind it, on one line however long. once: unless it has been shown before."""
        if once and (label, str(text)) in self._said:
            return
        self._said.add((label, str(text)))
        shown = Text.assemble((escaped(label), style), " ", escaped(self.worded(str(text))))
        super().print(shown, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):
            super().on_broken_pipe()
        raise SystemExit(UNREAD)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(escaped(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, Table):
            whole = [
                max(map(cell_len, [str(cell) for cell in (c.header, *c.cells)]))
                for c in renderable.columns
                if c.no_wrap
            ]
            others = len(renderable.columns) - len(whole)
            least = sum(whole) + 2 * others + 3 * len(renderable.columns) + 1  # with the lines and spaces between
            for column in renderable.columns:
                column.overflow = "fold"
                column.no_wrap &= least <= (options or self.options).max_width  # else a column would be cropped
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():  # a segment with `control` is rich's own
                yield segment
            else:
                yield Segment(escaped(segment.text), segment.style)


def print_line(text: object = "", *, stderr: bool = False) -> None:
    """Print lines as they are, however long, without styles."""
    stream = sys.stderr if stderr else sys.stdout
    if stream is None:  # Python has none for a closed descriptor
        return
    shown = escaped(str(text))
    try:
        stream.write(shown + "\n")
    except UnicodeEncodeError:  # the terminal has fewer characters
        stream.write(shown.encode(stream.encoding or "ascii", "backslashreplace").decode(stream.encoding or "ascii"))
        stream.write("\n")
    stream.flush()


def run_script(main: Callable[[], None]) -> None:
    """Run the main function of a script. Bad input ends it with one sentence and exit code 2, as the commands do."""
    try:
        main()
    except (UserError, OSError) as error:
        print_line(f"error: {error}", stderr=True)
        sys.exit(2)


def print_json(value: object) -> None:
    """Print a value as one JSON document. Numbers that are not finite, which JSON does not have, are null."""
    text = json.dumps(finite(value), default=str, allow_nan=False)
    if sys.stdout is not None:
        sys.stdout.write(text.replace("\x7f", "\\u007f") + "\n")
        sys.stdout.flush()
