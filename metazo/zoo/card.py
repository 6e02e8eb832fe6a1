"""Writes card.md: the description of a published tuner, or of a model published as its step log."""

from __future__ import annotations

from typing import Any

from metazo.feedback.tuner import FeedbackTuner
from metazo.tuner.file import Tuner, TunerInfo
from metazo.zoo.log import Log


def card_of(item: Tuner | FeedbackTuner | Log, name: str, sha256: str, licence: str | None) -> str:
    """The card of a tuner, feedback tuner or step log published under `name`, in Markdown."""
    if isinstance(item, Log):
        return log_card(item, name, sha256, licence)
    return feedback_card(item, name, sha256) if isinstance(item, FeedbackTuner) else card(item.info, name, sha256)


def card(info: TunerInfo, name: str, sha256: str) -> str:
    """The card of a tuner published under `name`, in Markdown."""
    scale = "abs(PertNN)" if info.parametrisation == "abs" else f"RMS * exp(PertNN), exponent within {info.bound:.3g}"
    tensors = sum(len(block.tensors) for block in info.blocks)
    return f"""# {_text(name)}

A tuner for {_text(info.base_model)}: it learned how strongly to perturb each block of the model's weights when the
model is fine-tuned with forward passes only (zeroth-order).

| | |
|---|---|
| base model | {_text(info.base_model)} |
| blocks | {len(info.blocks)}, by {info.by}, {tensors} tensors |
| inputs | {info.features} |
| scale | {scale}{", normalised" if info.normalise else ""} |
| embeddings count as | {info.embedding_count} |
| licence | {_licence(info.licence)} |
| fingerprint | {info.fingerprint or "none: the shapes of the base model are not known, it is matched by names"} |
| sha256 | {sha256} |
| written by | metazo {_text(info.metazo_version) or "(version not recorded)"} |

## Use

    metazo zoo show {_text(name)}
    metazo finetune --model {_text(info.base_model)} --task TASK --tuner {_text(name)}

It fits {_text(info.base_model)} and every model with the same tensor names and shapes.

## Recipe
{_table(info.recipe)}
## Scores
{_table(info.scores)}"""


def feedback_card(tuner: FeedbackTuner, name: str, sha256: str) -> str:
    """The card of a feedback tuner published under `name`, in Markdown."""
    info, maps = tuner.info, tuner.maps
    width, rank = next(iter(maps.down.values())).shape
    return f"""# {_text(name)}

Feedback for {_text(info.base_model)}: the mean Jacobians of its blocks, fitted without labels. Method `feedback` multiplies the
error after the last block by them to estimate the error at every lower block.

| | |
|---|---|
| base model | {_text(info.base_model)} |
| maps | {len(maps.down)}, for the outputs of all blocks but the last; identity + rank {rank}, width {width} |
| trust, from the lowest block up | {", ".join(_figure(float(maps.trust[index])) for index in sorted(maps.trust))} |
| licence | {_licence(info.licence)} |
| fingerprint | {info.fingerprint} |
| sha256 | {sha256} |
| written by | metazo {_text(info.metazo_version) or "(version not recorded)"} |

## Use

    metazo finetune --model {_text(info.base_model)} --task TASK --optimizer feedback --tuner {_text(name)}

It fits {_text(info.base_model)} and every model whose blocks have the same tensor names and shapes. The control is
`--optimizer skip-feedback`, which needs no tuner.

## Recipe
{_table(info.recipe)}
## Scores
{_table(info.scores)}"""


def log_card(log: Log, name: str, sha256: str, licence: str | None) -> str:
    """The card of a model published as its step log."""
    header, rates = log.header, [rate for step in log.steps for rate in step.lr]
    kept = log.end["kept"] if log.end else len(log.steps)
    weights = (log.end or {}).get("weights") or "not recorded: the run was not finished"
    return f"""# {_text(name)}

{_text(header["model"])} fine-tuned by {len(log.steps):,} zeroth-order steps, published as its step log: {len(log.data):,}
bytes that rebuild the model from the base model, without a forward pass.

| | |
|---|---|
| base model | {_text(header["model"])} |
| sha256 of its weights | {_text(header["weights"])} |
| task | {_text(header.get("task", ""))} |
| method | {_text(header["method"])} |
| steps | {len(log.steps):,}, of which the first {kept:,} make the model |
| learning rate | {min(rates, default=0):.3g} to {max(rates, default=0):.3g} |
| precision | {_text(header.get("precision", ""))} |
| sha256 of the model's weights | {_text(weights)} |
| licence | {_licence(licence)} |
| sha256 of the log | {sha256} |

## Use

    metazo zoo pull {_text(name)}
    metazo replay LOG --base {_text(header["model"])} --out DIR

LOG is the path that the first command prints.

## Settings
{_table({"": header.get("settings") or {}})}"""


def _table(values: dict[str, Any]) -> str:
    rows = "".join(f"| {_text(key)} | {_text(value)} |\n" for key, value in _flat(values))
    return f"\n| | |\n|---|---|\n{rows}" if rows else "\nNot recorded.\n"


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested tables and lists with the path to each."""
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in _flat(part, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
        return [leaf for number, part in enumerate(value) for leaf in _flat(part, f"{path}.{number}")]
    return [(path, ", ".join(map(_figure, value)) if isinstance(value, list) else _figure(value))]


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _licence(licence: str | None) -> str:
    return _text(licence) if licence else "none stated: it may not be republished"


def _text(value: Any) -> str:
    """Escape text so that it stays in its cell and is not markup."""
    text = " ".join(str(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("`", "&#96;")
