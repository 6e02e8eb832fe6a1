"""Settings in backticks become flags of the command that runs, not of other commands."""

from __future__ import annotations

import errno
import inspect
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metazo.optimizers.outline import methods
from metazo.runs import setup
from metazo_cli import main, messages
from metazo_cli.finetune import _argument_help
from tests import warm


def shown(text: str, *words: str) -> str:
    messages.know(main.command_line(), words)
    return messages.in_flags(text)


def test_a_setting_becomes_its_flag() -> None:
    said = "`dev_examples` is 0; use `keep='last'`, `resume=True`, `allow_partial=False`, `rank=4` or `fit(x)`."
    assert shown(said, "finetune", "--out", "x") == (
        "--dev-examples is 0; use --keep last, --resume, --no-allow-partial, --rank 4 or `fit(x)`."
    )


def test_another_command_has_other_flags() -> None:
    assert shown("`columns` of `lr`", "compare") == "--optimizers of `lr`"
    assert shown("`sign` or `log`", "zoo", "push") == "--sign or --log"
    assert shown("`sign` or `log`", "zoo", "log") == "`sign` or `log`"  # a group without a command
    assert shown("`dev_examples`") == "`dev_examples`"


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*words, name))


def helps(*words: str) -> dict[str, str]:
    """The help of each flag of a command as it is shown."""
    command = main.command_line()
    messages.know(command, words)
    return {each.name: each.help or "" for each in dict(commands(command))[words].params}


def test_every_flag_that_a_help_names_exists() -> None:
    """Either for the command itself, or for the one that the line calls, as in `metazo finetune --resume`."""
    known = {
        words: {"--help", *(flag for each in command.params for flag in (*each.opts, *each.secondary_opts))}
        for words, command in commands(main.command_line())
    }
    assert len(known) > 20 and "--rank" in known["finetune",]
    for words, command in commands(main.command_line()):
        for line in "\n".join((command.help or "", *helps(*words).values())).splitlines():
            called = max((each for each in known if " ".join(("metazo", *each)) in line), key=len, default=words)
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", line):
                assert flag in known[words] | known[called], (words, line)


def test_a_name_in_backticks_that_is_no_flag_stays_in_a_help() -> None:
    assert "unrolls them on `higher`, for small models" in helps("meta-train")["unroll"]
    assert "--layer outlier is the paper's, which `first_outlier_layer` finds" in helps("finetune")["layer"]


def test_the_choices_of_a_flag_are_all_named_once() -> None:
    said = helps("meta-train")["objective"]
    assert all(said.count(f"{name}: ") == 1 for name in ("ratio", "published", "horizon")) and "ratio, pub" not in said
    assert helps("finetune")["keep"].endswith(": best, last, none (default best)")


def test_a_hyperparameter_has_the_meaning_of_each_method() -> None:
    said = helps("finetune")
    assert said["beta"] == (
        "Weight of a new score in its moving average, in (0, 1] (curvzo: 0.1). "
        "Weight of the previous second moment, at least 0 and below 1; 0.999 as in Adam (meazo: 0.999)"
    )
    assert "draws of V; 50 in the published code, 50 or 100 in its tables (lozo: 50; lozo-m: 50). " in said["interval"]
    assert "from one pass over all examples to the next; 2 as published (mezo-svrg: 2). " in said["interval"]
    assert said["interval"].endswith("Steps between draws of P; 100 in the published command (zo-muon: 100)")
    assert (
        "uses that side as its rank (eggroll: 1). " in said["rank"]
        and "smaller side (lozo: 2; lozo-m: 2)" in said["rank"]
    )
    assert said["population"].count("(eggroll: 32). ") == 1 and "30 in 2509.24372" in said["population"]
    assert said["clip"] == "Largest gradient norm (first-order-adamw: 1.0; first-order-sgd: 1.0)"


def test_a_meaning_does_not_depend_on_the_margin_of_its_docstring() -> None:
    """Which Python's compiler removes from version 3.13 on."""
    documented = {(owner, key) for cls in methods().values() for owner in cls.__mro__ for key in cls.hyperparameters()}
    for cls, key in documented:
        bare = inspect.cleandoc(cls.__doc__ or "")
        first, *rest = bare.split("\n")
        margin = "\n".join([first, *("    " + line if line else "" for line in rest)])
        one, two = (_argument_help(type("Documented", (), {"__doc__": doc}), key) for doc in (bare, margin))
        assert one == two, (cls, key)


def test_notes_are_translated_as_errors_are(capsys) -> None:
    shown("", "finetune")
    messages.Terminal(file=sys.stdout, width=80).print("lower `lr`", markup=False)
    assert capsys.readouterr().out == "lower --lr\n"


def test_what_metazo_warns_of_is_a_sentence_and_other_warnings_name_their_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards
    shown("", "finetune")
    messages.plain_warnings()
    given = Warning("`anneal` 50 changes nothing without `epoch_steps`.")
    text = "warning: --anneal 50 changes nothing without --epoch-steps.\n"
    assert warnings.formatwarning(given, UserWarning, setup.__file__, 205) == text
    assert warnings.formatwarning(given, UserWarning, "other.py", 7).startswith("other.py:7: UserWarning: `anneal` 50")


def ended(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> object:
    """The exit code of a command whose import raises this."""

    def stop(words: object) -> None:
        raise error

    monkeypatch.setattr(main, "command_line", stop)
    try:
        main.main()
    except SystemExit as end:
        return end.code
    except KeyboardInterrupt:  # which would end pytest
        pytest.fail("a traceback")


def test_an_interrupted_import_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The imports of metazo finetune take half a second, in which Ctrl-C showed where they were."""
    assert ended(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "stopped.\n"


def test_a_file_beyond_the_limit_of_the_shell_is_said(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert ended(monkeypatch, OSError(errno.EFBIG, "File too large")) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("error: the output: File too large") and "raise the limit (ulimit -f)" in said


FULL = """
import os
from metazo_cli.main import main

os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
try:
    main()
except SystemExit as end:
    os._exit(end.code)
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
@pytest.mark.parametrize(
    ("words", "again"),
    [
        ("finetune --model pico --task pico_sentiment --steps 1 --out run", ", with --resume if its folder (--out) is there"),
        ("tasks", ""),
    ],
)  # fmt: skip
def test_a_full_output_gives_advice_that_can_be_followed(words: str, again: str, tmp_path: Path) -> None:
    """A run whose first line cannot be printed has no folder yet."""
    if words == "tasks":  # the whole life of an interpreter, which imports little
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "metazo_cli.main", words]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=tmp_path, text=True)
    else:
        done = warm.run("-c", FULL, *words.split(), cwd=tmp_path)
    assert not (tmp_path / "run").exists() and done.returncode == 2
    assert " ".join(done.stderr.split()) == (
        f"error: the output: No space left on device; make room and start the command again{again}."
    )
