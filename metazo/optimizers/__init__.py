"""The methods. A new one is one file and one line in the table; the contract suite in tests/ takes it from there."""

from __future__ import annotations

from metazo.optimizers.base import Step, Update, ZOOptimizer
from metazo.optimizers.curvzo import CurvZO
from metazo.optimizers.dominant_layer import DominantLayer, first_outlier_layer
from metazo.optimizers.fzoo import FZOO
from metazo.optimizers.hizoo import HiZOO
from metazo.optimizers.hizoo_l import HiZOOL
from metazo.optimizers.loren import LOREN
from metazo.optimizers.lozo import LOZO, LOZOM
from metazo.optimizers.mezo import MeZO, MeZOAdam, MeZOMomentum
from metazo.optimizers.svrg import MeZOSVRG
from metazo.optimizers.zo_finetuner import ZOFinetuner
from metazo.tuner.scale import tuner_scale

OPTIMIZERS: dict[str, type[ZOOptimizer]] = {
    "mezo": MeZO,
    "mezo-momentum": MeZOMomentum,
    "mezo-adam": MeZOAdam,
    "mezo-svrg": MeZOSVRG,
    "lozo": LOZO,
    "lozo-m": LOZOM,
    "hizoo": HiZOO,
    "hizoo-l": HiZOOL,
    "loren": LOREN,
    "curvzo": CurvZO,
    "fzoo": FZOO,
    "dominant-layer": DominantLayer,
    "zo-finetuner": ZOFinetuner,
}

__all__ = [
    "FZOO",
    "LOREN",
    "LOZO",
    "LOZOM",
    "OPTIMIZERS",
    "CurvZO",
    "DominantLayer",
    "HiZOO",
    "HiZOOL",
    "MeZO",
    "MeZOAdam",
    "MeZOMomentum",
    "MeZOSVRG",
    "Step",
    "Update",
    "ZOFinetuner",
    "ZOOptimizer",
    "first_outlier_layer",
    "tuner_scale",
]
