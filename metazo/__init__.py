"""metazo: zeroth-order fine-tuning of language models, with learned and hand-made optimizers."""

from __future__ import annotations

__version__ = "0.1.0"
