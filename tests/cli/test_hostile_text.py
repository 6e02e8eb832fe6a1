"""Text of files, servers and paths reaches the terminal as text: every command, with control sequences in its output."""

from __future__ import annotations

import ast
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from rich.text import Text

from metazo.comparisons.live import Progress
from metazo.comparisons.results import Result, Search, cell_path, write_search
from metazo.io.terminal import Console, escaped, print_json, print_line
from metazo.step.record import Step
from metazo.steplog.format import encode, line
from metazo_cli import main
from tests.report import synthetic
from tests.zoo.conftest import make_tuner

ROOT = Path(__file__).parents[2]
# a window title, clear screen, a colour, the same with C1, DEL, text from right to left, markup of rich, half a character
BAD = "\x1b]0;title\x07\x1b[2J\x1b[31m\x9b2J\x7f\u202e\r[red]x[/red][/]\ud800:smile:"
TEXT = BAD.replace("\ud800", "")  # for text that is written as UTF-8
NAME = "\x1b[2J\x9b\x7f[red]x"  # a possible file name
PRINTABLE = "[red]x[/red][/]$\\frac"  # for formats that refuse control characters


def is_clean(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("METAZO_ZOO", raising=False)
    there = tmp_path / NAME
    there.mkdir()
    monkeypatch.chdir(there)
    return there


def log(path: Path, **header: object) -> None:
    about = {"metazo_steps": 1, "model": TEXT, "task": TEXT, "method": TEXT, "settings": {TEXT: [TEXT]}, TEXT: TEXT}
    data, chain = line(about | {"weights": "0" * 64, "noise": {}, "environment": {TEXT: TEXT}} | header, 0)
    for number in range(3):
        part, chain = line(encode(Step(number, (1,), (1.0, 2.0), (0.1,), (1e-3,))), chain)
        data += part
    path.write_bytes(data)


def task(path: Path) -> None:
    labels = {TEXT + "0": "terrible", "b" + TEXT: "great"}
    rows = [{"text": f"a row {TEXT} {i}", "label": list(labels)[i % 2]} for i in range(40)]
    (path.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {"name": "mine", "kind": "classification", "prompt": TEXT.replace("[", "") + " {text} It was {}."}
    about |= {"labels": labels, "files": {"train": "rows.jsonl", "validation": "rows.jsonl"}}
    path.write_text(yaml.safe_dump(about))


def results(folder: Path) -> None:
    column = synthetic.Column(TEXT, 0.5)
    for seed in range(2):
        info = {"label": TEXT, "metric": "accuracy", "model": TEXT, "configuration": {TEXT: TEXT}}
        result = synthetic.result(column, TEXT, seed, **info)
        result.save(cell_path(folder, "t" + NAME, "c" + NAME, "seed", seed))
    failed = synthetic.result(column, TEXT, 2, status="failed", reason=TEXT)
    failed.save(cell_path(folder, "t" + NAME, "c" + NAME, "seed", 2))
    (folder / "grid.yaml").write_text(yaml.safe_dump({"tasks": [TEXT], "columns": [{"name": TEXT}], "model": TEXT}))
    write_search(folder, {TEXT: {TEXT: Search(1e-3, {"0.001": 0.5}, True, [1], 1, 1, 1)}})
    (folder / "page.md").write_text("<!-- results:story -->\n<!-- /results -->\n")


def tuner() -> None:
    made = make_tuner("base", licence=PRINTABLE)
    made.info.recipe["note"] = PRINTABLE
    made.save(Path("t.safetensors"))


def make(folder: Path) -> None:
    """Files of every kind, each with hostile text in every field in which its format allows it."""
    log(folder / "a.jsonl")
    log(folder / "b.jsonl", model=TEXT + "2")
    log(folder / "damaged.jsonl")
    whole = (folder / "damaged.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "damaged.jsonl").write_bytes(whole[0] + TEXT.replace("\r", "").encode() + b"\n" + b"".join(whole[1:]))
    task(folder / "task.yaml")
    results(folder)
    tuner()
    (folder / "bad.yaml").write_text(json.dumps({TEXT: TEXT}))
    (folder / "grid-bad.yaml").write_text(json.dumps({"model": TEXT, "tasks": [TEXT], "columns": [TEXT], "budget": 9}))
    (folder / "columns.yaml").write_text(
        json.dumps(
            {
                "model": "pico",
                "tasks": ["task.yaml"],
                "budget": 9,
                "columns": [{"name": PRINTABLE, "optimizer": "mezo"}],
            }
        )
    )
    (folder / "bad.pth").write_bytes(pickle.dumps({TEXT: Path(TEXT.replace("/", ""))}))


RUN = [
    "--model",
    "pico",
    "--task",
    "task.yaml",
    "--train-examples",
    "10",
    "--dev-examples",
    "5",
    "--test-examples",
    "5",
]
COMMANDS: dict[str, list[list[str]]] = {
    "demo": [["--out", "."], ["--overwrite", "--out", "."]],
    "finetune": [
        [*RUN, "--out", NAME, "--steps", "2", "--lr", "1e-4"],
        ["--resume", NAME],
        [*RUN, "--out", "x", "--dry-run"],
        [*RUN, "--out", NAME],
        ["--config", "bad.yaml"],
        ["--model", NAME + "none", "--task", "task.yaml", "--out", "y"],
        [*RUN, "--out", "y", "--optimizer", NAME],
        [*RUN, "--out", "y", "--tuner", NAME],
        [*RUN, "--out", "y", "--lr", NAME],
    ],
    "replay": [["a.jsonl", "--base", NAME, "--out", "z"], ["damaged.jsonl", "--base", "pico", "--out", "z"]],
    "log show": [["a.jsonl"], ["a.jsonl", "--json"], ["damaged.jsonl"], ["a.jsonl", "--plot", f"{NAME}.png"], [NAME]],
    "log verify": [["a.jsonl"], ["damaged.jsonl"], ["damaged.jsonl", "--json"]],
    "log diff": [["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl", "--json"], ["a.jsonl", "damaged.jsonl"]],
    "log repair": [[NAME], ["damaged.jsonl"]],
    "meta-train": [
        ["--model", "pico", "--task", "task.yaml", "--out", NAME, "--dry-run"],
        ["--config", "bad.yaml"],
        ["--model", NAME, "--task", "pico_topic", "--out", "m"],
    ],
    "evaluate": [["--model", "pico", "--task", "task.yaml"], ["--model", NAME, "--task", "task.yaml"],
                 ["--model", "pico", "--task", "bad.yaml"], ["--model", "pico", "--task", NAME]],
    "zoo list": [[], ["--zoo", NAME], ["--json"]],
    "zoo push": [["t.safetensors", "--to", NAME + "zoo"], ["t.safetensors", "--to", "z", "--name", NAME],
                 ["--log", "a.jsonl", "--to", "z"]],
    "zoo show": [["t.safetensors"], ["t.safetensors", "--json"], [NAME], ["a.jsonl"]],
    "zoo pull": [["t.safetensors"], [NAME], [f"https://{NAME}/x"]],
    "zoo verify": [["--zoo", NAME + "zoo"], ["--zoo", NAME + "zoo", "--key", NAME]],
    "zoo import": [["bad.pth", "--base-model", NAME], [NAME, "--base-model", "x"]],
    "tasks": [["task.yaml"], ["task.yaml", "--json"], [NAME], ["bad.yaml"], []],
    "recipes": [[NAME], []],
    "blocks": [[NAME], ["pico", "--by", NAME], ["pico", "--train", NAME], ["pico", "--plot", NAME]],
    "bench": [["--suite", NAME, "--out", "bench"], ["--out", "a.jsonl"], ["--device", NAME]],
    "compare": [["grid-bad.yaml"], ["columns.yaml", "--dry-run"], ["columns.yaml", "--dry-run", "--json"],
                ["bad.yaml"], ["--tasks", NAME, "--model", "pico", "--optimizers", NAME, "--budget", "9"]],
    "report": [["."], [".", "--json"], [".", "--render", "page.md"], [NAME], [".", "--out", "a.jsonl"]],
    "env": [[]],
}  # fmt: skip
PRINTS = ("log show", "log diff", "tasks", "report", "zoo show", "zoo list", "compare", "finetune", "evaluate")
"""Commands that print text of their files, so that the test can check that it is printed as text."""


def commands() -> Iterator[str]:
    for name, command in main.command_line().commands.items():
        yield from (f"{name} {inner}" for inner in command.commands) if hasattr(command, "commands") else (name,)


def test_every_command_is_tried() -> None:
    assert sorted(commands()) == sorted(COMMANDS)


def run(words: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["metazo", *words])
    code = 0
    try:
        main.main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0
    out, err = capfd.readouterr()
    return code, out + err


@pytest.mark.parametrize("command", COMMANDS)
def test_no_control_character_is_printed(
    command: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(folder)
    if command.startswith("zoo"):
        run(["zoo", "push", "t.safetensors", "--to", NAME + "zoo"], capfd, monkeypatch)
    told = ""
    for words in [*COMMANDS[command], [f"--{TEXT}"], [TEXT] * 9, ["--json", f"--no-{NAME}"]]:
        code, text = run([*command.split(), *words], capfd, monkeypatch)
        assert code in (0, 1, 2), (words, text)
        assert "Traceback" not in text and is_clean(text), (words, text)
        told += text
    if command == "finetune":
        assert (folder / NAME / "model" / "config.json").exists()  # the expected text was printed, by a complete run
    if command in PRINTS:
        assert "[red]x" in told, told


@pytest.mark.parametrize("print_", [print_line, Console().print, lambda text: Console().say("note:", text)])
def test_printing_keeps_text_and_escapes_the_rest(print_: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    print_("ünï 語 😀\u00a0[red]x[/] :smile: \x1b[2J\x9b\ud800\u202e")
    told = capsys.readouterr().out
    assert told.removeprefix("note: ") == "ünï 語 😀\u00a0[red]x[/] :smile: \\x1b[2J\\x9b\\ud800\\u202e\n"


def test_text_objects_tables_and_json_are_escaped_too(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    console = Console(width=120)
    table = Table("a" + BAD, title=BAD, caption=BAD)
    table.add_row(Text(BAD))
    for thing in (table, Text(BAD), [BAD], {BAD: BAD}):
        console.print(thing)
    console.rule(BAD)
    print_json({BAD: [BAD, float("nan")]})
    told = capsys.readouterr().out
    assert is_clean(told) and told.count("[red]x") == 11
    assert json.loads(told.splitlines()[-1]) == {BAD: [BAD, None]}


def test_on_a_terminal_styles_are_the_callers_alone() -> None:
    import io

    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="standard", width=120, legacy_windows=False)
    console.print(BAD, style="red")
    told = stream.getvalue()
    assert told.startswith("\x1b[31m") and told.endswith("\x1b[0m\n") and told.count("\x1b") == 2
    assert escaped(BAD) in told


def test_the_lines_of_a_comparison_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    good = synthetic.result(synthetic.Column(TEXT, 0.5), TEXT, 0)
    bad: Result = synthetic.result(synthetic.Column(TEXT, 0.5), TEXT, 0, status="failed", reason=TEXT)
    shown = Progress(Console(), 2, 10)
    shown.add(good, True)
    shown.add(bad, True)
    told = capsys.readouterr().out
    assert is_clean(told) and told.count("[red]x") == 5


def test_one_module_prints() -> None:
    """All other modules use it: they have no `print`, no `typer.echo`, no console of rich."""
    found = []
    for path in [*(ROOT / "metazo").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]:
        if path.name == "terminal.py" or path.parent.name in ("pico", "micro"):  # programs that make the models
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name(id="print")) | ast.Call(func=ast.Attribute(attr="echo" | "secho")):
                    found.append(path.name)
                case ast.ImportFrom(module="rich.console", names=names) if any(n.name == "Console" for n in names):
                    found.append(path.name)
                case ast.ImportFrom(module="rich", names=names) if any(n.name == "print" for n in names):
                    found.append(path.name)
    assert found == ["books.py"]  # a program that makes data
