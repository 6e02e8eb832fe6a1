"""Curves of one run, and the numbers in the pictures of a tuner."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from metazo.blocks import OUTSIDE, place_of, places_of
from metazo.plots.curves import plot_curves, plot_run
from metazo.plots.style import log_axis, look, short, svg
from metazo.report.sigma import picture, read
from tests.report.synthetic import BLOCKS


def test_a_runs_curve_has_units_and_its_majority_class(tmp_path: Path):
    records = [
        {
            "forwards": n,
            "train_loss": 1 / n if n else None,
            "dev": {"loss": 1 / (n + 1), "accuracy": 0.5, "majority": 0.5},
        }
        for n in range(4)
    ]
    plot_run(records, tmp_path / "curve.svg", "a $run$ <b>", ("accuracy",))
    text = (tmp_path / "curve.svg").read_text()
    for wanted in ("nats", "0 to 1", "forward passes over a batch", "majority class", "a $run$ &lt;b&gt;"):
        assert wanted in text
    plot_run(records, tmp_path / "again.svg", "a $run$ <b>", ("accuracy",))
    assert (tmp_path / "again.svg").read_text() == text
    plot_curves({"panel": {"line": [(0, 1), (1, 2)]}}, tmp_path / "x.png", x="x", y="y")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_train_loss_of_0_is_a_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = {}
    monkeypatch.setattr("metazo.plots.curves.plot_curves", lambda panels, path, **how: drawn.update(panels))
    losses = [None, 0.5, 0.0, 0.0]
    plot_run([{"forwards": n, "train_loss": loss, "dev": {}} for n, loss in enumerate(losses)], tmp_path / "x.svg", "")
    assert drawn["loss"]["train (mean since the point before)"] == [(1, 0.5), (2, 0.0), (3, 0.0)]


def test_an_objective_has_a_panel_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its values on train are no losses in nats."""
    drawn: dict = {}
    monkeypatch.setattr("metazo.plots.curves.plot_curves", lambda panels, path, **how: drawn.update(panels))
    dev = [{"objective": 0.5 - n / 10, "loss": 2.0 - n, "accuracy": 0.5 + n / 10} for n in range(2)]
    records = [{"forwards": n, "train_loss": 0.7 if n else None, "dev": dev[n]} for n in range(2)]
    plot_run(records, tmp_path / "x.svg", "", ("accuracy",), "objective")
    assert drawn == {
        "objective": {"train (mean since the point before)": [(1, 0.7)], "dev": [(0, 0.5), (1, 0.4)]},
        "loss": {"dev": [(0, 2.0), (1, 1.0)]},
        "accuracy": {"dev": [(0, 0.5), (1, 0.6)]},
    }


def test_a_run_without_a_finite_number_has_an_empty_picture(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as matplotlib's for a legend of nothing
        plot_run([], tmp_path / "x.png", "")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_no_two_lines_look_alike():
    assert len({tuple(map(str, look(index).values())) for index in range(35)}) == 35


@pytest.mark.parametrize(
    ("block", "place"),
    [
        ("model.layers.3.mlp.up_proj.weight", (3, "mlp.up_proj")),
        ("transformer.h.11.attn.c_attn.bias", (11, "attn.c_attn.bias")),
        ("model.embed_tokens.weight", (OUTSIDE, "model.embed_tokens")),
        ("layers.0", (0, "layer")),
    ],
)
def test_depth_and_kind_of_a_block(block: str, place: tuple[int, str]):
    assert place_of(block) == place


def test_layers_of_an_encoder_and_a_decoder_are_told_apart():
    blocks = ["model.shared.weight", "model.encoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1.weight"]
    assert places_of(blocks) == [(OUTSIDE, "model.shared"), (0, "encoder fc1"), (0, "decoder fc1")]
    assert places_of(blocks[:2]) == [place_of(block) for block in blocks[:2]]
    assert places_of(["encoder.block.1", "decoder.block.1"]) == [(1, "encoder layer"), (1, "decoder layer")]
    scales = read({"blocks": blocks, "steps": [0], "values": [[1.0, 2.0, 4.0]]})
    assert np.count_nonzero(np.isfinite(scales.values)) == 3


def test_sigma_by_kind_and_depth():
    values = [[2.0**place for place in range(len(BLOCKS))]]
    scales = read({"blocks": BLOCKS, "steps": [7], "values": values})
    assert (scales.depths, scales.steps, scales.kinds[-1]) == ([OUTSIDE, 0, 1, 2, 3], [7], "embed_tokens")
    assert scales.values.shape == (1, 6, 5)
    here = scales.values[0, scales.kinds.index("attn.q"), scales.depths.index(2)]
    assert here == pytest.approx(2.0 ** (BLOCKS.index("layers.2.attn.q.weight") - (len(BLOCKS) - 1) / 2))
    assert np.isnan(scales.values[0, 0, 0])  # no attention outside the layers
    assert "σ / mean σ" in svg(picture(scales))
    for damaged in (
        {},
        {"blocks": ["a"], "steps": [0], "values": [[1, 2]]},
        {"blocks": ["a"], "steps": [0], "values": [[0.0]]},
    ):
        with pytest.raises(ValueError, match="sigma"):
            read(damaged)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (850, "850"),
        (999.6, "1k"),
        (1234, "1.23k"),
        (999_600, "1M"),
        (-3e6, "-3M"),
        (9.999e11, "1000G"),
        (2e-5, "2e-05"),
    ],
)
def test_numbers_of_an_axis_are_short(value, text):
    assert short(value) == text


@pytest.mark.parametrize(("low", "high"), [(7.5, 10.7), (8.2, 14.3), (60, 90), (12, 130), (1e-5, 1e-1)])
def test_a_logarithmic_axis_has_more_than_one_number(low: float, high: float):
    """Of 1, 2 and 5 times a power of ten, only 10 is between 7.5 and 10.7."""
    axes = Figure().subplots()
    axes.set_xlim(low, high)
    log_axis(axes, "x")
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 2
    axes.set_xlim(low, high)
    assert axes.get_xlim() == (low, high)
