"""The workers of these comparisons are forked from the warm server of the tests."""

from __future__ import annotations

import pytest

from tests import warm


@pytest.fixture(scope="session", autouse=True)
def server() -> None:
    warm.serve()
