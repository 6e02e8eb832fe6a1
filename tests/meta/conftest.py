"""Settings of short runs of meta-training."""

from __future__ import annotations

from pathlib import Path

import pytest

from metazo.meta.config import MetaConfig


@pytest.fixture
def settings(tiny, tmp_path: Path):
    """Settings of a short run on a tiny model; keyword arguments change them."""

    def make(out: str = "out", **changes) -> MetaConfig:
        values = {"task": ["pico_topic"], "steps": 6, "batch_size": 4, "train_examples": 16, "max_length": 128}
        values |= {"hidden": 8, "save_every": 2, "objective": "published", "features": "published"}
        values |= {} if "trajectory" in changes else {"restart_every": 0.75}
        values |= {} if changes.get("objective") == "ratio" else {"lr_update": 1e-3}
        values |= {"parametrisation": "abs"}
        values |= {"meta_optimizer": "sgd", "lr_meta": 0.1}
        return MetaConfig(model=str(tiny("llama")), out=tmp_path / out, **(values | changes))

    return make
