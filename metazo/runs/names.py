"""Names in the settings of a run, checked without torch, so that a mistyped one is reported at once."""

from __future__ import annotations

import os

from metazo.io.files import expanded
from metazo.models.embedded import ADAPTERS, EMBEDDED, check_folder
from metazo.optimizers.outline import methods
from metazo.optimizers.registry import require, require_own
from metazo.runs.config import AUTO, FinetuneConfig
from metazo.tasks import resolve
from metazo.tasks.rows import find


def check_names(config: FinetuneConfig, data: bool = True) -> None:
    """Raises UserError for a method, hyperparameter or task that is not known, and for a model's folder or data that are not
    there.

    data: whether the task's rows must be there, which a dry run does without. Nothing is checked here of a run that is resumed,
    whose folders may have moved (metazo/runs/locate.py), or that torchrun started: its processes agree on errors later.
    """
    if config.resume or "RANK" in os.environ:
        return
    if config.optimizer != AUTO:
        known = methods()
        require(config.optimizer, known)
        # a name that no method has may be an earlier one, which the method itself translates
        names = {key for cls in known.values() for key in cls.hyperparameters()}
        require_own(config.optimizer, [key for key in config.method if key in names], known)
    task = resolve(config.task)
    if data and config.data is not None and not task.files and task.generate is None:
        find(task, "train", config.data)
    if not (expanded(config.model) / ADAPTERS).is_file():
        check_folder(str(EMBEDDED.get(config.model, config.model)), config.model)
