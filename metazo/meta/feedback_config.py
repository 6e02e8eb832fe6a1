"""The settings of a fit of feedback, readable without torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from metazo.errors import UserError
from metazo.settings import check_number, check_types, check_values

BOUNDS: dict[str, dict[str, Any]] = {
    "texts": {"least": 8, "most": 10**6}, "batch_size": {"least": 1, "most": 4096}, "max_length": {"least": 2},
    "rank": {"least": 0, "most": 4096}, "ridge": {"least": 0, "most": 1e6}, "draws": {"least": 1, "most": 1024},
    "seed": {"least": 0, "most": 2**63 - 1},
}  # fmt: skip


@dataclass
class FeedbackConfig:
    """Everything that decides a fit of feedback."""

    model: str
    """Folder or Hub id of the base model; pico is the small one that metazo carries"""
    out: Path
    """Folder for the tuner and settings"""
    task: list[str] = field(default_factory=list)
    """Task whose training texts are read, by name or a YAML file; several are mixed; labels and answers are not used"""
    data: Path | None = None
    """File of unlabelled prompts (.txt with one per line; .jsonl, .csv, ... with a column `text`), or a folder with
    <task>/<split>.jsonl; a folder without `task` stands for those of the text tasks for meta-training that it holds"""
    texts: int = 1600
    """Number of texts, divided evenly among the tasks"""
    batch_size: int = 16
    """Texts per batch"""
    max_length: int | None = 64
    """Longest input in tokens"""
    positions: Literal["answer", "all"] = "answer"
    """Positions that contribute to the loss: those of an answer or of the pooling, or all (next-token loss, causal models)"""
    rank: int = 16
    """Rank of the part beside the identity; 0 fits the trust alone"""
    ridge: float = 0.02
    """Ridge of the regression, in units of the variance of a cotangent; needs a rank above 0"""
    draws: int = 4
    """Random cotangents per text"""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the weights"""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    seed: int = 0
    """Seed of cotangents and of the choice of texts"""

    def __post_init__(self) -> None:
        named: Any = self.task
        self.task = [named] if isinstance(named, str | Path) else named  # type: ignore[list-item]
        self.device = str(self.device)
        check_types(self)
        check_values(self)
        for name, bounds in BOUNDS.items():
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), **bounds)
        if self.rank == 0 and self.ridge != type(self).ridge:
            raise UserError(f"`ridge` {self.ridge:g} changes nothing with `rank` 0, which fits no map; leave it out.")

    def recipe(self) -> dict[str, Any]:
        """The settings that made the tuner, without local paths, as a plain table; the fit adds the names of the tasks."""
        hidden = {"out", "data", "device", "model", "task"}
        return {key: value for key, value in asdict(self).items() if key not in hidden and value not in (None, [])}
