"""Tuners on the Hub's own methods, against a real local server that speaks its endpoints."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import huggingface_hub
import pytest

from metazo import zoo
from metazo.errors import UserError
from metazo.tuner.file import Tuner
from tests.zoo.conftest import make_tuner
from tests.zoo.server import COMMIT


def test_a_tuner_is_pushed_with_a_card_and_loaded_again(hub) -> None:
    tuner = make_tuner("org/base", seed=3, licence="Apache-2.0")
    address = tuner.push_to_hub("org/tuner")
    assert COMMIT in address
    files = hub.files["org/tuner"]
    assert files["tuner.safetensors"] == tuner.to_bytes()
    card = files["README.md"].decode()
    assert "base_model: 'org/base'" in card and "license: 'apache-2.0'" in card and "hf_secret" not in card
    assert sha256(tuner.to_bytes()).hexdigest() in card and "## Scores" in card
    with pytest.raises(UserError, match="is the path of a folder, /models/base"):
        make_tuner("/models/base").push_to_hub("org/tuner")
    for revision in (None, "v2"):
        assert Tuner.from_pretrained("org/tuner", revision=revision).to_bytes() == tuner.to_bytes()
    with pytest.raises(UserError, match="org/other@main cannot be pulled"):
        Tuner.from_pretrained("org/other")


def test_a_pulled_tuner_takes_no_other_repositorys_name(hub, tmp_path: Path) -> None:
    ours, theirs = make_tuner("org/base", seed=1), make_tuner("org/base", seed=2)
    theirs.push_to_hub("stranger/tuner")
    ours.push_to_hub("org/base")
    pulled = zoo.pull("stranger/tuner", report=lambda line: None)
    assert pulled.entry.base_model == "org/base" and zoo.named(pulled.entry.name) == replace(pulled, where="cache")
    assert (
        zoo.named("org/base") is None and zoo.load("org/base", report=lambda line: None).to_bytes() == ours.to_bytes()
    )
    zoo.push(theirs, tmp_path / "z")
    assert zoo.load("org/base", tmp_path / "z").to_bytes() == theirs.to_bytes()  # a zoo that the user names or keeps


def test_a_tuner_in_its_base_models_repository_is_fetched_anew(hub, monkeypatch) -> None:
    for seed in range(2):
        hub.commit = str(seed) * 40
        tuner = make_tuner("org/base", seed=seed)
        tuner.push_to_hub("org/base")
        assert zoo.pull("org/base", report=lambda line: None).path.read_bytes() == tuner.to_bytes()
        assert zoo.load("org/base", report=lambda line: None).to_bytes() == tuner.to_bytes()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert zoo.load("org/base").to_bytes() == tuner.to_bytes()


def test_a_tuner_from_a_folder(tmp_path: Path) -> None:
    tuner = make_tuner()
    tuner.save(tmp_path / "tuner.safetensors")
    assert Tuner.from_pretrained(tmp_path).to_bytes() == tuner.to_bytes()


def test_messages_of_the_hub_say_what_to_do(hub) -> None:
    make_tuner("org/base").push_to_hub("org/tuner")
    hub.cut = True
    with pytest.raises(UserError, match="org/tuner@main cannot be pulled: .*the connection was cut, .*; try again"):
        Tuner.from_pretrained("org/tuner")
    for hub.refuse, words in (
        (401, "; log in with `hf auth login`$"),
        (403, "; you may not write there: log in with .* as someone"),
    ):
        with pytest.raises(UserError, match=f"org/tuner cannot be pushed to: .*{hub.refuse}{words}"):
            make_tuner("org/base").push_to_hub("org/tuner")


@pytest.mark.parametrize("name", ["base/v1", "base/feedback-v2"])
def test_the_name_of_a_tuner_that_is_in_no_zoo_is_no_repository(hub, name: str) -> None:
    """A stranger may have one of this name; who wants it says so."""
    tuner = make_tuner("org/base")
    tuner.push_to_hub(name)
    with pytest.raises(UserError, match=f"{name}' is in no zoo folder .*A Hub repository of this name is hub:{name}"):
        zoo.load(name, report=lambda line: None)
    assert zoo.load(f"hub:{name}", report=lambda line: None).to_bytes() == tuner.to_bytes()
