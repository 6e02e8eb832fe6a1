"""metazo's optimizers within other training loops: transformers' Trainer, TRL's trainers, and accelerate.

    from metazo.integrations import ZOTrainer                # instead of transformers.Trainer
    trainer = ZOTrainer(model, args, train_dataset=rows, optimizer_cls_and_kwargs=("mezo", {"scale": "rms"}))
    trainer.train()

ZOTrainer     transformers.Trainer with forward passes only
ZOMixin       the same for another subclass of Trainer: class ZOSFTTrainer(ZOMixin, SFTTrainer)
Accumulated   an optimizer that drops no micro-batch under `accelerator.accumulate`
local_parameters    the parameters of a sharded or offloaded model, for any optimizer of metazo

Names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metazo.integrations.accumulate import Accumulated as Accumulated
    from metazo.integrations.resident import local_parameters as local_parameters
    from metazo.integrations.trainer import ZOTrainer as ZOTrainer
    from metazo.integrations.trainer_mixin import ZOMixin as ZOMixin

_HOMES = {"Accumulated": "accumulate", "ZOMixin": "trainer_mixin", "ZOTrainer": "trainer"}
_HOMES |= {"local_parameters": "resident"}
__all__ = ["Accumulated", "ZOMixin", "ZOTrainer", "local_parameters"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
