"""Settings: flags override a recipe, and one sentence per mistake."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from metazo.comparisons.grid import Grid
from metazo.errors import UserError
from metazo.runs.config import INCIDENTAL, FinetuneConfig
from metazo.runs.method import arguments
from metazo.settings import build, help_of, read_recipe

BASE = {"model": "pico", "task": "pico_sentiment", "out": "runs/x"}


def test_a_flag_wins_over_the_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("lr: 1.0e-3\nbatch-size: 4\nmethod: {rank: 2, interval: 9}\n")
    config = build(FinetuneConfig, BASE, read_recipe(path), {"lr": 1e-5, "eps": None, "method": {"rank": 3}})
    assert (config.lr, config.batch_size, config.eps) == (1e-5, 4, 1e-3)
    assert config.method == {"rank": 3, "interval": 9}


def test_every_setting_says_what_it_touches():
    roles = {item.name: item.metadata["role"] for item in fields(FinetuneConfig)}
    assert set(roles.values()) == {
        *("model", "data", "method", "loop", "evaluation", "place", "machine", "service", "limit")
    }
    # Old step logs do not have these in their header, and must still be resumed.
    left_out = [
        "out",
        "resume",
        "snapshot_every",
        "flush_every",
        "fsync_every",
        "max_bad_steps",
        "device",
        "zoo",
        "data",
    ]
    several = ["probe_ranks", "tensor_parallel", "fsdp", "rank_timeout", "device_map"]
    assert set(INCIDENTAL) == {*left_out, *several, "merge", "track", "push"}


def test_every_setting_is_documented():
    assert set(help_of(FinetuneConfig)) == set(FinetuneConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"learning_rate": 1}, "'learning_rate' is not a setting"),
        ({"lr": "fast"}, "`lr` is 'fast'"),
        ({"schedule": "step"}, "`schedule` is 'step'"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, not 0"),
        ({"steps": 5, "forwards": 10}, "`steps` and `forwards`"),
        ({"tuner": "pico", "scale": "rms"}, "`tuner` and `scale`"),
        ({"dev_examples": 0}, "`keep='best'`"),
    ],
)
def test_bad_settings(extra, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        build(FinetuneConfig, BASE, extra)


@pytest.mark.parametrize("text", ["lora: true", "lr: yes", "steps: on", "seed: no", "batch_size: [true]"])
def test_a_flag_is_no_number(tmp_path, text):
    """Python's True is 1, and so it was to pydantic."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    key, (value,) = next((key, [value]) for key, value in read_recipe(path).items())
    with pytest.raises(UserError, match=f"`{key}` must be a number, not (True|False); YAML reads yes, on"):
        build(FinetuneConfig, BASE, read_recipe(path))
    with pytest.raises(UserError, match=f"`{key}` must be a number, not"):
        FinetuneConfig(**BASE, **{key: value})


def test_flags_remain_flags_and_their_numbers():
    config = build(
        FinetuneConfig, BASE, {"merge": True, "allow_partial": 1, "method": {"antithetic": False}, "lora": 1}
    )
    assert (config.merge, config.allow_partial, config.method, config.lora) == (True, True, {"antithetic": False}, 1)
    with pytest.raises(UserError, match="`lrs` must be a number, not True"):
        build(Grid, {"model": "pico", "tasks": ["pico_topic"], "columns": ["mezo"], "budget": 9, "lrs": [1e-3, True]})


@pytest.mark.parametrize(
    ("optimizer", "options", "sentence"),
    [
        ("lozo", {"rank": True}, "`rank` must be a number, not True"),
        ("mezo-adam", {"betas": [False, 0.9]}, "`betas` must be a number, not False"),
        ("dominant-layer", {"layer": True}, "`layer` must be a number, not True"),
    ],
)
def test_a_flag_is_no_hyperparameter(optimizer, options, sentence):
    config = build(FinetuneConfig, BASE, {"optimizer": optimizer, "method": options})
    with pytest.raises(UserError, match=sentence):
        arguments(config, torch.nn.Linear(2, 2))
    config = build(FinetuneConfig, BASE, {"optimizer": "es", "method": {"antithetic": True, "population": 4}})
    assert arguments(config, torch.nn.Linear(2, 2))["antithetic"] is True


def test_what_is_required():
    with pytest.raises(UserError, match="`task` is required"):
        build(FinetuneConfig, {"model": "pico", "out": "x"})


def test_a_setting_is_given_once(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("batch-size: 4\nlr: 1\nbatch_size: 8\n")
    with pytest.raises(UserError, match="has 'batch_size' twice, with - and with _; leave one of them out"):
        read_recipe(path)


@pytest.mark.parametrize("text", ["steps: 1:30", "lr: 1:30.5", "method: {rank: 1:30}"])
def test_base_60_is_no_number(tmp_path, text):
    """YAML 1.1 reads it as 90."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="is '1:30.*': Input should be a valid"):
        arguments(build(FinetuneConfig, BASE, {"optimizer": "lozo"}, read_recipe(path)), torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "is not valid YAML"), ("- 1", "must be a mapping"), (None, "is not a file")]
)
def test_bad_recipes(tmp_path, text, words):
    path = tmp_path / "r.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_recipe(path)
