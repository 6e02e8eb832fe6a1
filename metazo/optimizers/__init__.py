"""The methods. A new one is one file and one line in the table; the contract suite in tests/ takes it from there."""

from __future__ import annotations

from metazo.optimizers.base import Step, Update, ZOOptimizer
from metazo.optimizers.mezo import MeZO, MeZOAdam, MeZOMomentum
from metazo.optimizers.zo_finetuner import ZOFinetuner, tuner_scale

OPTIMIZERS: dict[str, type[ZOOptimizer]] = {
    "mezo": MeZO,
    "mezo-momentum": MeZOMomentum,
    "mezo-adam": MeZOAdam,
    "zo-finetuner": ZOFinetuner,
}

__all__ = [
    "OPTIMIZERS",
    "MeZO",
    "MeZOAdam",
    "MeZOMomentum",
    "Step",
    "Update",
    "ZOFinetuner",
    "ZOOptimizer",
    "tuner_scale",
]
