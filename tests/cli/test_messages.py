"""Settings in backticks become flags of the command that runs, not of other commands."""

from __future__ import annotations

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
