"""README.md of a tuned model: what was trained, on what, how, and with which result; the card that the Hub shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import metazo
from metazo.io.redact import shortened
from metazo.optimizers.registry import method
from metazo.runs.config import FinetuneConfig


class ModelCard:
    """Writes the card beside a saved model.

    summary: of the run (`summary.json`). trained: number of trained weights. quantize: how the base was quantised when it
    was loaded. Paths are reduced to their last name.
    """

    def __init__(self, config: FinetuneConfig, summary: Mapping[str, Any], trained: int, quantize: str | None = None):
        self.config, self.summary, self.trained, self.quantize = config, summary, trained, quantize

    def save_pretrained(self, folder: str | Path) -> None:
        (Path(folder) / "README.md").write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        config, summary = self.config, self.summary
        base, adapter = shortened(config.model), None if config.merge else config.adapters
        forward_only = not (config.optimizer.startswith("memory:") or method(config.optimizer).needs_gradient)
        how = "with metazo by forward passes alone" if forward_only else "with metazo"
        rows = {
            "base model": base,
            "task": f"{shortened(config.task)}, {config.train_examples:,} training examples at most",
            "trained": f"{self.trained:,} weights" + (f" of {adapter.kind} adapters" if adapter else ""),
            "method": config.optimizer + (f", tuner {shortened(config.tuner)}" if config.tuner else ""),
            "minimised": _minimised(config.objective),
            "learning rate": f"{summary['lr']:g}, {config.schedule}",
            "steps": f"{summary['steps']:,}; the weights are those of step {summary['kept_step']:,}",
            "forward passes": f"{summary['forwards']:,} over {config.batch_size} examples",
            "dtype, seed": f"{config.dtype}, {config.seed}",
            **({"base quantised to": self.quantize} if self.quantize else {}),
            "written by": f"metazo {metazo.__version__}",
        }
        library = "peft" if adapter else "transformers"
        tags = "metazo, zeroth-order" if forward_only else "metazo"
        table = "| | |\n|---|---|\n" + "".join(f"| {name} | {_cell(value)} |\n" for name, value in rows.items())
        return (
            f"---\nlibrary_name: {library}\nbase_model: {json.dumps(base)}\ntags: [{tags}]\n---\n"
            f"# {_cell(base)} on {_cell(shortened(config.task))}\n\n{_cell(base)}, fine-tuned {how}.\n\n{table}\n"
            f"## Result\n\n{self._result()}\n## Use\n\n```python\n{self._use(adapter is not None)}```\n"
        )

    def _result(self) -> str:
        """The figures before, on dev and on test, as a table."""
        parts = {name: self.summary[name] for name in ("before", "dev", "test") if self.summary[name]}
        names = list(dict.fromkeys(name for part in parts.values() for name in part))
        if not names:
            return "Not evaluated.\n"
        lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        words = {"before": "dev, before", "dev": "dev, tuned", "test": "test, tuned"}
        for name, part in parts.items():
            figures = (f"{part[key]:.4g}" if key in part else "" for key in names)
            lines.append(f"| {words[name]} | " + " | ".join(figures) + " |")
        return "\n".join(lines) + "\n"

    def _use(self, adapters: bool) -> str:
        load = "import metazo\n\nloaded = metazo.load_model(FOLDER_OR_HUB_ID)  # loaded.model, loaded.tokenizer\n"
        if adapters:
            base = f", on a base that is quantised to {self.quantize}" if self.quantize else ""
            return load + f"# or with peft{base}: PeftModel.from_pretrained(base, FOLDER_OR_HUB_ID)\n"
        return load + "# or with transformers: AutoModel and its kin, .from_pretrained(FOLDER_OR_HUB_ID)\n"


def _minimised(objective: str | None) -> str:
    if objective is None:
        return "the task's loss"
    return shortened(objective) if ":" in objective else f"1 - {objective}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
