"""Checkpoints whose weights are not those of the model that their config.json describes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from metazo.errors import UserError
from metazo.models.assemble import load
from metazo.models.load import load_model
from metazo.models.sentence import POOLING_FILE


def rewritten(source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a model whose tensors `change` has changed."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def without(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


@pytest.mark.parametrize("head", ["linear", "prototype", "phrases"])
def test_an_encoder_without_some_of_its_weights_is_refused(tiny, tmp_path: Path, head: str) -> None:
    folder = rewritten(tiny("bert"), tmp_path / "m", without("layer.1."))
    with pytest.raises(
        UserError, match=r"has no weights for 'encoder\.layer\.1\.attention\S+' and 15 more, so that these"
    ):
        load_model(folder, kind="classifier", head=head, num_labels=2)


def test_a_saved_sentence_classifier_without_some_of_its_weights_is_refused(tiny, tmp_path: Path) -> None:
    loaded = load_model(tiny("bert"), kind="classifier", head="linear", num_labels=2)
    loaded.model.save_pretrained(tmp_path / "run" / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "run" / "model")
    assert (tmp_path / "run" / "model" / POOLING_FILE).exists()
    assert not load(tmp_path / "run", num_labels=2, trained_head=True).notes  # it has no pooler, which nothing reads
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "model")
    rewritten(tmp_path / "run" / "model", tmp_path / "cut" / "model", without("layer.0.output.dense.bias"))
    with pytest.raises(UserError, match=r"has no weights for 'encoder\.layer\.0\.output\.dense\.bias', so that"):
        load(tmp_path / "cut", num_labels=2)


@pytest.mark.parametrize(
    ("name", "body", "layer"), [("bert", "bert", "encoder.layer.1"), ("gpt2", "transformer", "h.1")]
)
def test_a_classifier_without_some_of_its_weights_is_not_said_to_have_a_new_head(
    tiny, tmp_path: Path, name: str, body: str, layer: str
) -> None:
    loaded = load_model(tiny(name), kind="classifier", num_labels=2)
    loaded.model.save_pretrained(tmp_path / "whole")
    loaded.tokenizer.save_pretrained(tmp_path / "whole")
    cut = rewritten(tmp_path / "whole", tmp_path / "cut", without(f"{layer}."))
    for trained in (True, False):
        with pytest.raises(UserError, match=rf"has no weights for '{body}\.{layer}\.\S+' and \d+ more, so that these"):
            load_model(cut, num_labels=2, trained_head=trained)


def test_a_classifier_whose_weights_have_another_shape_is_refused(tiny, tmp_path: Path) -> None:
    loaded = load_model(tiny("bert"), kind="classifier", num_labels=2)
    loaded.model.save_pretrained(tmp_path / "whole")
    loaded.tokenizer.save_pretrained(tmp_path / "whole")
    wrong = "bert.encoder.layer.0.intermediate.dense.bias"
    cut = rewritten(tmp_path / "whole", tmp_path / "cut", lambda tensors: tensors.update({wrong: torch.zeros(3)}))
    with pytest.raises(UserError, match=f"has no weights of the shape that its config.json gives for '{wrong}', so"):
        load_model(cut, num_labels=2)


def test_a_missing_pooler_or_head_is_new(tiny, tmp_path: Path) -> None:
    loaded = load_model(tiny("bert"), kind="classifier", num_labels=2)
    loaded.model.save_pretrained(tmp_path / "whole")
    loaded.tokenizer.save_pretrained(tmp_path / "whole")
    for part in ("pooler", "classifier"):
        cut = rewritten(tmp_path / "whole", tmp_path / part, without(f"{part}."))
        found = load_model(cut, num_labels=2)
        assert found.new_head and all(part in name for name in found.unsaved) and "a new head" in found.notes[0]
