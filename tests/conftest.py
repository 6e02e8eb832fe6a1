"""Fixtures for the whole suite: no network, and the folder of shared data and models where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with data/, models/, golden/ ...: METAZO_SHARED, or ../shared beside the checkout."""
    folder = Path(os.environ.get("METAZO_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared material in {folder.name!r} beside the checkout (set METAZO_SHARED)")
    return folder
