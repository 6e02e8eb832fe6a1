"""card.md: what a published tuner is, in words."""

from __future__ import annotations

from typing import Any

from metazo.tuner import TunerInfo


def card(info: TunerInfo, name: str, sha256: str) -> str:
    """The card of a tuner published under `name`, in Markdown."""
    scale = "abs(PertNN)" if info.parametrisation == "abs" else f"RMS * exp(PertNN), exponent within {info.bound:.3g}"
    licence = _text(info.licence) if info.licence else "none stated: it may not be republished"
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
| licence | {licence} |
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


def _text(value: Any) -> str:
    """Text that stays in its cell and is not markup."""
    text = " ".join(str(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("`", "&#96;")
