"""The record of its training in a saved model's config, and the generation settings that metazo uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.io.plain import is_name, is_plain
from metazo.models.identity import BASE
from metazo.models.load import LoadedModel

with needs("llm"):
    from safetensors.torch import load_file, save_file
    from transformers import GenerationConfig

EARLIER = "earlier"
"""In the record in a config: the records of the trainings before the last one, the latest first."""
RECORD = "metazo.json"
"""File beside LoRA adapters, whose own files have no place for the record."""


class AdapterFiles:
    """What peft does not write beside the adapters: the record, what identifies the base model, its name as it was given, and
    the weights that its checkpoint does not have and that are not trained (BERT's pooler, beside a head).

    peft names the folder of this machine that the base model was loaded from. It looks for a name on the Hub while it
    saves, so the name is put into its files afterwards. For a model in memory peft's name is all there is.
    """

    def __init__(self, loaded: LoadedModel, record: dict[str, Any], base: str, revision: str | None):
        self.loaded, self.record, self.base, self.revision = loaded, record, base, revision

    def save_pretrained(self, folder: str | Path) -> None:
        known = self.loaded.base_weights
        record = self.record | ({BASE: known} if known else {})
        (Path(folder) / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        self._save_new(Path(folder) / "adapter_model.safetensors")
        if self.base.startswith("memory:"):
            return
        path, card = Path(folder) / "adapter_config.json", Path(folder) / "README.md"
        settings = json.loads(path.read_text(encoding="utf-8"))
        there = settings["base_model_name_or_path"]
        named = {"base_model_name_or_path": self.base, "revision": self.revision}
        path.write_text(json.dumps(settings | named, indent=2) + "\n", encoding="utf-8")
        if there and card.is_file():
            card.write_text(card.read_text(encoding="utf-8").replace(there, self.base), encoding="utf-8")

    def _save_new(self, path: Path) -> None:
        """Add the weights that were drawn from the seed, by their names in peft's model, which loads them by these."""
        model: Any = self.loaded.model
        named, unsaved = model.get_base_model().named_parameters(), set(self.loaded.unsaved)
        new = {f"base_model.model.{name}": p for name, p in named if name.replace(".base_layer.", ".") in unsaved}
        if new:
            new = {name: parameter.detach().cpu().contiguous() for name, parameter in new.items()}
            save_file(load_file(path) | new, path, {"format": "pt"})


def parts_of(loaded: LoadedModel, record: dict[str, Any], revision: str | None = None) -> list[Any]:
    """What is saved of a tuned model, in order: each has a save_pretrained. revision: of the model as it was loaded."""
    model: Any = loaded.model
    there = getattr(model.config, "metazo", None)
    if isinstance(there, dict) and EARLIER in there:  # of adapters that are continued, and of their base
        record = record | {EARLIER: there[EARLIER]}
    base, revision = loaded.adapted or (loaded.name, revision)
    adapters = [AdapterFiles(loaded, record, base, revision)] if hasattr(model, "get_base_model") else []
    return [model, loaded.tokenizer, *adapters]


def describe(model: Any, record: dict[str, Any]) -> None:
    """Write a record of the training (`Prepared.record`) into the model's config, with which it is saved: the names of a
    classifier's classes (``id2label``), the end-of-text token (generation config), and the split (``metazo``), with those of
    earlier trainings.

    Raises UserError for a record that was not written by a run.
    """
    labels, eos = record.get("labels"), record.get("eos")
    if not is_plain(record) or not (labels is None or (isinstance(labels, list) and all(map(is_name, labels)))):
        raise UserError("the record of the model's training data was not written by metazo")
    config = model.config
    if labels is not None and len(labels) == config.num_labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    inner = getattr(model, "get_base_model", lambda: model)()
    if type(eos) is int and getattr(inner, "generation_config", None) is not None:
        there = inner.generation_config.eos_token_id
        ends = there if isinstance(there, list) else [] if there is None else [there]
        inner.generation_config.eos_token_id = ends if eos in ends else [*ends, eos]
        if len(inner.generation_config.eos_token_id) == 1:
            inner.generation_config.eos_token_id = inner.generation_config.eos_token_id[0]
    own = {key: value for key, value in record.items() if key not in ("labels", "eos", EARLIER)}
    before = _before(own, record.get(EARLIER), getattr(config, "metazo", None))
    config.metazo = own | ({EARLIER: before} if before else {})


def _before(own: dict[str, Any], earlier: Any, known: Any) -> list[Any]:
    """The records of other trainings than this one: those that its own record has, and those that a config has."""
    found = list(earlier) if isinstance(earlier, list) else []
    if isinstance(known, dict):
        there = known.get(EARLIER)
        found.append({key: value for key, value in known.items() if key != EARLIER})
        found += there if isinstance(there, list) else []
    return [record for place, record in enumerate(found) if record != own and record not in found[:place]]


def plain_generation(model: Any, tokenizer: Any, max_new_tokens: int, start: int | None = None) -> GenerationConfig:
    """Greedy search that ends at the tokenizer's or the model's end of text. The rest of the checkpoint's own generation
    config (a repetition penalty, suppressed tokens, a temperature) is ignored. start: first token of an encoder-decoder's
    decoder.
    """
    there = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = there if isinstance(there, list) else [there]
    ends = [end for end in dict.fromkeys([tokenizer.eos_token_id, *ends]) if end is not None]
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends or None,
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=start,
    )
