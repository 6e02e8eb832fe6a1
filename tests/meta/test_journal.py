"""The picture of a meta-training says what it shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metazo.meta.journal import plot, short_types
from metazo.runs.folder import METRICS

BERT = [
    "bert.embeddings.word_embeddings.weight",
    "bert.embeddings.LayerNorm.weight",
    "bert.encoder.layer.attention.self.query.weight",
    "bert.encoder.layer.attention.output.dense.weight",
    "bert.encoder.layer.attention.output.LayerNorm.weight",
    "bert.encoder.layer.intermediate.dense.weight",
    "bert.encoder.layer.output.dense.weight",
    "bert.encoder.layer.output.LayerNorm.weight",
]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["model.layers.self_attn.q_proj.weight", "model.norm.weight"], ["q_proj.weight", "norm.weight"]),
        (
            BERT,
            [
                "word_embeddings.weight",
                "embeddings.LayerNorm.weight",
                "query.weight",
                "attention.output.dense.weight",
                "attention.output.LayerNorm.weight",
                "intermediate.dense.weight",
                "layer.output.dense.weight",
                "layer.output.LayerNorm.weight",
            ],
        ),
        (["norm.weight", "decoder.norm.weight"], ["norm.weight", "decoder.norm.weight"]),
        (["layers", "bias"], ["layers", "bias"]),
    ],
)
def test_types_are_as_short_as_they_can_be_and_distinct(names: list[str], short: list[str]) -> None:
    assert short_types(names) == short


def drawn(folder: Path, normalised: bool, monkeypatch):
    """The axes of the picture for two steps of BERT's types."""
    figures: list = []
    monkeypatch.setattr("metazo.plots.style.png", lambda figure, file, dpi: figures.append(figure))
    rows = [{"step": step, "sigma": dict.fromkeys(BERT, 0.02)} for step in range(2)]
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot(folder, normalised)
    return figures[0].axes[0]


def test_each_curve_has_a_name_of_its_own(tmp_path: Path, monkeypatch) -> None:
    labels = [text.get_text() for text in drawn(tmp_path, True, monkeypatch).get_legend().get_texts()]
    assert len(labels) == len(set(labels)) == len(BERT)


@pytest.mark.parametrize(("normalised", "said"), [(True, "normalised sigma ("), (False, "sigma, not normalised (")])
def test_the_axis_and_the_line_at_1_follow_the_normalisation(
    tmp_path: Path, monkeypatch, normalised: bool, said: str
) -> None:
    axes = drawn(tmp_path, normalised, monkeypatch)
    assert axes.get_ylabel().startswith(said)
    assert any(list(line.get_ydata()) == [1, 1] for line in axes.lines) == normalised
