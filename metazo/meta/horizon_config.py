"""Settings of meta-training over whole runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from metazo.errors import UserError
from metazo.meta.config import MOST_RATE, ScaleConfig
from metazo.settings import check_number, setting


@dataclass
class HorizonConfig(ScaleConfig):
    """Everything that decides block scales learned by evolution strategies over whole runs (metazo/meta/horizon.py)."""

    objective: Literal["horizon"] = setting(default="horizon", role="tuner")
    """The loss at the end of a run"""
    steps: int = setting(default=120, least=1, role="tuner")
    """Meta-steps, each of which is a pair of runs, or of their truncations"""
    horizon: int = setting(default=100, least=1, role="tuner")
    """Steps of a run"""
    truncation: int | None = setting(default=None, least=1, role="tuner")
    """Steps of a run after which its loss is used, and the run continued (persistent evolution strategies); by default all"""
    pairs: int = setting(default=4, least=1, most=4096, role="tuner")
    """Antithetic pairs of runs per update of the scales"""
    spread: float = setting(default=0.3, above=0, most=10, role="tuner")
    """Standard deviation of the perturbation of log sigma"""
    shaping: Literal["rank", "none"] = setting(default="rank", role="tuner")
    """Weight of a pair: the rank of its loss difference within the update, or the difference itself"""
    lr_sigma: float = setting(default=0.1, above=0, most=MOST_RATE, role="tuner")
    """Learning rate of Adam on log sigma, linear to 0"""
    start: Literal["rms", "flat"] = setting(default="rms", role="tuner")
    """Scale at the start: the RMS rule, or one scale for all blocks as in plain MeZO"""
    networks: int = setting(default=0, least=0, most=65536, role="tuner")
    """Width of a network per block that is learned beside its free scale; 0: the free scales alone"""
    rates: list[float] = setting(default_factory=lambda: [1e-4, 3e-4, 1e-3], role="tuner")
    """Learning rate of the runs; if there are several, each task takes the best of them under the scale at the start"""
    schedule: Literal["constant", "linear", "cosine"] = setting(default="linear", role="tuner")
    """Schedule of the learning rate over a run"""
    eval_examples: int = setting(default=64, least=1, role="tuner")
    """Held-out examples of each task whose loss a run is judged by"""
    head: Literal["auto", "checkpoint", "linear", "prototype", "phrases"] = setting(default="auto", role="tuner")
    """Head of a classifier, as for metazo finetune"""
    train: list[str] = setting(default_factory=list, role="tuner")
    """Patterns of names of tensors to train (all others are frozen, and keep the RMS scale)"""
    freeze: list[str] = setting(default_factory=list, role="tuner")
    """Patterns of names of tensors to freeze"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rates:
            raise UserError("`rates` is empty; name at least one learning rate for the runs.")
        for rate in self.rates:
            check_number("rates", rate, above=0, most=MOST_RATE)
        if self.truncation is not None and self.horizon % self.truncation:
            raise UserError(
                f"`truncation` {self.truncation} does not divide `horizon` {self.horizon}; choose one that does."
            )

        if self.steps % self.pairs:
            raise UserError(
                f"`steps` {self.steps} is not a multiple of `pairs` {self.pairs}, the meta-steps of an update."
            )

    @property
    def window(self) -> int:
        """Steps of a run per meta-step."""
        return self.truncation or self.horizon

    @property
    def updates(self) -> int:
        """Updates of the scales."""
        return self.steps // self.pairs
