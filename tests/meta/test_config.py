"""Settings of meta-training that are made in Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metazo.errors import UserError
from metazo.meta.config import MetaConfig
from metazo.meta.feedback_config import FeedbackConfig
from metazo.meta.horizon_config import HorizonConfig
from metazo.settings import Unset


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (MetaConfig, {"objective": "horizon"}, "`objective` 'horizon' has settings of its own; make a HorizonConfig"),
        (MetaConfig, {"objective": "Ratio"}, "`objective` is 'Ratio': Input should be 'ratio' or 'published'"),
        (MetaConfig, {"dtype": "bfloat16"}, "`dtype` is 'bfloat16': Input should be 'float32' or 'float64'"),
        (MetaConfig, {"teacher": "adam"}, "`teacher` is 'adam'"),
        (MetaConfig, {"meta_optimizer": "adamw"}, "`meta_optimizer` is 'adamw'"),
        (MetaConfig, {"steps": "many"}, "`steps` is 'many'"),
        (MetaConfig, {"hidden": True}, "`hidden` must be a number, not True"),
        (HorizonConfig, {"objective": "ratio"}, "`objective` is 'ratio': Input should be 'horizon'"),
        (HorizonConfig, {"start": "RMS"}, "`start` is 'RMS': Input should be 'rms' or 'flat'"),
        (HorizonConfig, {"shaping": "ranks"}, "`shaping` is 'ranks'"),
        (HorizonConfig, {"schedule": "poly"}, "`schedule` is 'poly'"),
        (HorizonConfig, {"rates": 1e-3}, "`rates` is 0.001: Input should be a valid list"),
        (FeedbackConfig, {"positions": "any"}, "`positions` is 'any': Input should be 'answer' or 'all'"),
        (FeedbackConfig, {"out": None}, "`out` is None"),
    ],
)
def test_settings_made_in_python_are_checked_as_flags_are(kind, changes: dict, said: str):
    with pytest.raises(UserError, match=said):
        kind(**{"model": "pico", "task": ["pico_topic"], "out": Path("x")} | changes)


@pytest.mark.parametrize("kind", [MetaConfig, HorizonConfig, FeedbackConfig])
def test_paths_may_be_text_and_one_task_needs_no_list(kind):
    made = kind(model=Path("pico"), task="pico_topic", out="x", data="y", device=torch.device("cpu"))
    assert made == kind(model="pico", task=["pico_topic"], out=Path("x"), data=Path("y"))
    assert {type(getattr(made, name)) for name in ("out", "data")} == {type(Path())}


def test_a_default_that_gives_way_is_still_told_from_the_same_number_set():
    given = {"model": "pico", "task": ["pico_topic"], "out": Path("x")}
    assert isinstance(MetaConfig(**given).train_examples, Unset)
    assert not isinstance(MetaConfig(**given, train_examples=1000).train_examples, Unset)


def test_the_recording_has_a_folder_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`record` and `out` are the same folder"):
        MetaConfig(model="pico", task="pico_topic", record=tmp_path / "a", out=tmp_path / "a")
