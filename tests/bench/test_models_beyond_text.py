"""The table of models beyond text is that of its JSON, and its rows are what the models do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metazo.io.modules import import_from

ROOT = Path(__file__).parents[2]
models = import_from(str(ROOT / "benchmarks" / "models_beyond_text.py"))
FOUND = json.loads((ROOT / "docs" / "models_beyond_text.json").read_text())
pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_page_has_the_table_of_the_json() -> None:
    page = (ROOT / "docs" / "integrations.md").read_text()
    assert models.rendered(page, FOUND) == page and list(FOUND["rows"]) == [kind.name for kind in models.KINDS]


def test_every_method_lowers_the_loss_of_every_model() -> None:
    for name, row in FOUND["rows"].items():
        assert all(row[method] < row["first"] - 1e-4 for method in models.METHODS), name


@pytest.mark.parametrize("kind", models.KINDS, ids=lambda kind: kind.name)
def test_a_model_begins_with_the_loss_of_the_table_and_is_refused_by_name(kind) -> None:
    model, batch = models.made(kind)
    assert float(model(**batch).loss.detach()) == pytest.approx(FOUND["rows"][kind.name]["first"], rel=1e-4)
    assert models.command_line(model) == FOUND["rows"][kind.name]["command line"]


@pytest.mark.parametrize("method", models.METHODS)
def test_a_vision_language_model_is_trained(method: str) -> None:
    (kind,) = (kind for kind in models.KINDS if kind.name == "LLaVA")
    first, last = models.trained(kind, method, steps=8)
    assert last < first
