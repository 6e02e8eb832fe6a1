"""transformers.Trainer with forward passes only."""

from __future__ import annotations

from metazo.integrations.trainer_mixin import ZOMixin
from metazo.io.extras import needs

with needs("trainer"):
    import accelerate  # noqa: F401  (before Trainer, which cannot be imported without it and does not name it)
with needs("trainer"):
    from transformers import Trainer


class ZOTrainer(ZOMixin, Trainer):
    """`transformers.Trainer` that trains with a zeroth-order method: see ZOMixin for what differs.

    Three lines of a script change: the import, the name of the class, and the method with its settings.

        trainer = ZOTrainer(
            model, args, train_dataset=rows, optimizer_cls_and_kwargs=("mezo", {"eps": 1e-3, "scale": "rms"})
        )
    """
