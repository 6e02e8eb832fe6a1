"""Writes card.md: the description of a published tuner, or of a model published as its step log."""

from __future__ import annotations

from typing import Any

from metazo.feedback.tuner import FeedbackTuner
from metazo.tuner.file import Tuner
from metazo.tuner.markdown import licence as stated
from metazo.tuner.markdown import table, text, word
from metazo.zoo.log import Log


def card_of(item: Tuner | FeedbackTuner | Log, name: str, sha256: str, licence: str | None) -> str:
    """The card of a tuner, feedback tuner or step log published under `name`, in Markdown."""
    return log_card(item, name, sha256, licence) if isinstance(item, Log) else item.card(name, sha256)


def log_card(log: Log, name: str, sha256: str, licence: str | None) -> str:
    """The card of a model published as its step log."""
    header, rates = log.header, [rate for step in log.steps for rate in step.lr]
    kept = log.end["kept"] if log.end else len(log.steps)
    weights = (log.end or {}).get("weights") or "not recorded: the run was not finished"
    row, option, about = _tuner(header)
    return f"""# {text(name)}

A model fine-tuned from {text(header["model"])} by {len(log.steps):,} zeroth-order steps, published as its step log:
{len(log.data):,} bytes that rebuild the model from the base model, without a forward pass.

| | |
|---|---|
| base model | {text(header["model"])} |
| sha256 of its weights | {text(header["weights"])} |
| task | {text(header.get("task", ""))} |
| method | {text(header["method"])} |
{row}| steps | {len(log.steps):,}, of which the first {kept:,} make the model |
| learning rate | {min(rates, default=0):.3g} to {max(rates, default=0):.3g} |
| precision | {text(header.get("precision", ""))} |
| sha256 of the model's weights | {text(weights)} |
| licence | {stated(licence)} |
| sha256 of the log | {sha256} |

## Use

    metazo zoo pull {word(name, "NAME")}
    metazo replay LOG --base {word(header["model"], "MODEL")}{option} --out DIR

LOG is the path that the first command prints.{about}

## Settings
{table({"": header.get("settings") or {}})}"""


def _tuner(header: dict[str, Any]) -> tuple[str, str, str]:
    """The row of the table, the option of metazo replay and the sentence about the tuner of a run, which are empty without."""
    settings = header.get("settings")
    name = settings.get("tuner") if isinstance(settings, dict) else None
    if name is None:
        return "", "", ""
    row = f"| tuner | {text(name)}, whose networks have the sha256 {text(header.get('tuner'))} |\n"
    if str(name).startswith("random:"):
        return row, f" --tuner {word(name, 'TUNER')}", ""
    return row, " --tuner TUNER", " TUNER is the tuner in the table: its name in a zoo, or its file."
