"""Settings in backticks become flags of the command that runs, not of other commands."""

from __future__ import annotations

import errno
import sys
import warnings

import pytest

from metazo.runs import setup
from metazo_cli import main, messages


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
    assert said.startswith("error: the output folder: File too large") and "raise the limit (ulimit -f)" in said
