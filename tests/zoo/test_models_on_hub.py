"""Tuned models on the Hub's own methods, against a real local server that speaks its endpoints."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from metazo.errors import UserError
from metazo.models.embedded import PICO
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.tuner.hub import push_folder
from metazo_cli.main import command_line
from tests.zoo.conftest import make_tuner

SMALL = {
    "model": "pico", "task": "pico_sentiment", "lr": 1e-2, "lora": 2, "steps": 2, "batch_size": 4, "train_examples": 16,
    "dev_examples": 4, "test_examples": 4, "eval_every": 2, "snapshot_every": 0, "keep": "last",
}  # fmt: skip


def test_a_tuned_model_is_pushed_with_its_card(hub, tmp_path: Path) -> None:
    run_settings(FinetuneConfig(**SMALL, out=tmp_path / "run", push="org/model"))
    files = hub.files["org/model"]
    saved = {path.name: path.read_bytes() for path in (tmp_path / "run" / "model").iterdir()}
    assert {name: files[name] for name in saved} == saved and "adapter_model.safetensors" in files
    card = files["README.md"].decode()
    assert "| task | pico_sentiment" in card and "| method | mezo |" in card and str(tmp_path) not in card


def test_a_pushed_model_leaves_no_file_of_the_one_before(hub, tmp_path: Path) -> None:
    """Old adapters beside a full model, or an old whole model beside shards, would be loaded; a user's own files stay."""
    own = {
        "notes.txt",
        "data/config.json",
        "model_notes.json",
        ".gitattributes",
        "images/model.safetensors",
        "train.json",
    }
    old = {
        "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "metazo.json", "config.json", "vocab.txt",
        "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
        "generation_config.json", "head.safetensors", "modules.json", "1_Pooling/config.json", "chat_template.jinja",
        "sentence_bert_config.json", "tokenizer_config.json", "spiece.model",
    }  # fmt: skip
    hub.files["org/model"] = dict.fromkeys(own | old, b"old") | {"README.md": b"---\ntags:\n- metazo\n---\nof mine"}
    (folder := tmp_path / "model").mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("new")
    push_folder("org/model", folder)
    assert hub.files["org/model"] == dict.fromkeys(own, b"old") | {"config.json": b"{}", "README.md": b"new"}


@pytest.mark.parametrize("card", [b"# A base model", b"---\ntags: [text]\n---\nmetazo", b"---\n: [\n---\n", b"\xff"])
def test_a_card_of_others_is_kept(hub, tmp_path: Path, card: bytes, capsys) -> None:
    hub.files["org/base"] = {"README.md": card, "config.json": b"base"}
    (folder := tmp_path / "model").mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("new")
    with pytest.raises(
        UserError, match="^org/base cannot be pushed to: it has a README.md that metazo did not write; name"
    ):
        push_folder("org/base", folder)
    tuner = make_tuner("org/base")
    for _ in range(2):
        tuner.push_to_hub("org/base")
        assert "The README.md of org/base is kept; the tuner's card is tuner.md." in capsys.readouterr().err
    files = hub.files["org/base"]
    assert set(files) == {"README.md", "config.json", "tuner.safetensors", "tuner.md"} and files["README.md"] == card
    assert b"## Scores" in files["tuner.md"]


def test_a_new_repository_with_a_licence_keeps_it(hub, tmp_path: Path) -> None:
    """The Hub's site makes a README.md of front matter alone."""
    new = {"README.md": b"---\nlicense: mit\n---\n", ".gitattributes": b""}
    hub.files |= {name: dict(new) for name in ("org/model", "org/tuner", "org/full")}
    hub.files["org/full"]["config.json"] = b"{}"
    (folder := tmp_path / "model").mkdir()
    (folder / "README.md").write_text("---\ntags: [metazo]\n---\n# Tuned\n")
    for _ in range(2):
        push_folder("org/model", folder)
        assert hub.files["org/model"]["README.md"] == b'---\nlicense: "mit"\ntags: [metazo]\n---\n# Tuned\n'
        make_tuner("org/base").push_to_hub("org/tuner")
        card = hub.files["org/tuner"]["README.md"]
        assert b'license: "mit"' in card and b"## Scores" in card and "tuner.md" not in hub.files["org/tuner"]
    make_tuner("org/base", licence="Apache-2.0").push_to_hub("org/tuner")
    assert hub.files["org/tuner"]["README.md"].count(b"\nlicense: 'apache-2.0'\n") == 1
    with pytest.raises(UserError, match="org/full cannot be pushed to: it has a README.md that metazo did not write"):
        push_folder("org/full", folder)


def test_a_card_of_others_is_seen_before_the_run(hub, tmp_path: Path, monkeypatch) -> None:
    hub.files["org/base"] = {"README.md": b"# A base model"}
    settings = FinetuneConfig(**SMALL, out=tmp_path / "run", push="org/base")
    with pytest.raises(UserError, match="^org/base cannot be pushed to: it has a README.md that metazo did not write"):
        run_settings(settings)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set .* The run is complete"):
        run_settings(settings)


def test_adapters_do_not_replace_their_base(hub, tmp_path: Path) -> None:
    hub.files["org/base"] = {"config.json": b"base"}
    (folder := tmp_path / "model").mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(UserError, match="org/base cannot be pushed to: it holds the base model of these adapters"):
        push_folder("org/base", folder)
    assert hub.files == {"org/base": {"config.json": b"base"}}


def test_a_refused_push_keeps_the_run_and_is_tried_again(hub, tmp_path: Path) -> None:
    hub.refuse = 403
    settings = FinetuneConfig(**SMALL, out=tmp_path / "run", push="org/model")
    with pytest.raises(
        UserError, match=r"org/model cannot be pushed to: .*403.* The run is complete \(.*\); continue with `resume=Tr"
    ):
        run_settings(settings)
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()
    assert "pushed" not in json.loads((tmp_path / "run" / "summary.json").read_text())
    hub.refuse = 0
    run_settings(FinetuneConfig(**SMALL, out=tmp_path / "run", push="org/model", resume=True))
    assert "adapter_model.safetensors" in hub.files["org/model"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["pushed"] == ["org/model"]


def test_a_complete_run_is_pushed_whenever_a_repository_is_named(hub, tmp_path: Path) -> None:
    run_settings(FinetuneConfig(**SMALL, out=tmp_path / "run"))
    assert not hub.files
    for name in ("org/late", "org/second"):
        again = FinetuneConfig(**SMALL, out=tmp_path / "run", push=name, resume=True)
        assert run_settings(again)["pushed"][-1] == name and "README.md" in hub.files.pop(name)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["pushed"] == ["org/late", "org/second"]
    shutil.rmtree(tmp_path / "run" / "model")
    run_settings(FinetuneConfig(**SMALL, out=tmp_path / "run", resume=True))
    with pytest.raises(UserError, match="has kept no model"):
        run_settings(FinetuneConfig(**SMALL, out=tmp_path / "run", push="org/third", resume=True))


def test_a_script_that_runs_again_leaves_what_it_has_pushed(hub, tmp_path: Path) -> None:
    settings = {**SMALL, "out": tmp_path / "run", "push": "org/model"}
    first = run_settings(FinetuneConfig(**settings))
    hub.files["org/model"]["README.md"] += b"\na chapter of mine"
    there, hub.refuse = dict(hub.files["org/model"]), 500
    shutil.rmtree(tmp_path / "run" / "model")
    assert run_settings(FinetuneConfig(**settings, resume=True)) == first and hub.files["org/model"] == there


def test_a_command_uploads_again_only_if_it_names_the_repository(hub, tmp_path: Path) -> None:
    run_settings(FinetuneConfig(**SMALL, out=tmp_path / "run", push="org/model"))
    for arguments, uploaded in (([], False), (["--push", "org/model"], True)):
        hub.files.clear()
        command_line()(["finetune", "--resume", str(tmp_path / "run"), *arguments], standalone_mode=False)
        assert ("org/model" in hub.files) == uploaded


def test_a_model_of_a_revision(hub, tmp_path: Path) -> None:
    """The files of another revision are asked for by that name; one that is not there is one sentence."""
    from metazo.models.load import load_model

    hub.files["org/pico"] = {path.name: path.read_bytes() for path in PICO.iterdir() if path.is_file()}
    assert load_model("org/pico", revision="v2").model.config.model_type == "llama"
    with pytest.raises(UserError, match="model 'org/pico' cannot be loaded"):
        load_model("org/pico", revision="gone")


def test_pushed_adapters_are_a_model_for_all_that_takes_one(hub, tmp_path: Path, monkeypatch) -> None:
    from metazo.models.assemble import base_of, has_adapters, load

    run_settings(FinetuneConfig(**SMALL, out=tmp_path / "run", push="org/model"))
    hub.files["org/pico"] = {path.name: path.read_bytes() for path in PICO.iterdir() if path.is_file()}
    hub.files["org/half"] = {"adapter_config.json": hub.files["org/model"]["adapter_config.json"]}
    ids = torch.arange(12)[None]
    for merge in (True, False):
        loaded, here = (load(name, merge=merge) for name in ("org/model", tmp_path / "run" / "model"))
        assert torch.equal(loaded.model(ids).logits, here.model(ids).logits) and loaded.name == "org/model"
    assert loaded.model.config.metazo == here.model.config.metazo
    assert has_adapters("org/model", "v2") and base_of("org/model") == ("pico", None)
    assert not has_adapters("org/pico") and base_of("org/pico", "v2") == ("org/pico", "v2")
    with pytest.raises(UserError, match="org/half has adapters, and their adapter_model.safetensors cannot be had"):
        load("org/half")
    command = ["finetune", "--model", "org/model", "--task", "pico_sentiment", "--steps", "1", "--train-examples", "8",
               "--dev-examples", "0", "--test-examples", "4", "--batch-size", "4", "--lr", "1e-3",
               "--keep", "none"]  # fmt: skip
    command_line()([*command, "--adapter", "continue", "--out", str(tmp_path / "more")], standalone_mode=False)
    with pytest.raises(UserError, match="`model` org/model has adapters, and new ones on it could not name their base"):
        run_settings(FinetuneConfig(**SMALL | {"model": "org/model"}, out=tmp_path / "new"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.files.clear()
    assert torch.equal(load("org/model").model(ids).logits, here.model(ids).logits)


def test_old_adapters_are_read(hub, tmp_path: Path) -> None:
    from metazo.models.assemble import load

    run_settings(FinetuneConfig(**SMALL, out=tmp_path / "run", push="org/model"))
    kept, files, ids = tmp_path / "run" / "model", hub.files["org/model"], torch.arange(12)[None]
    expected = load(kept).model(ids).logits
    torch.save(load_file(kept / "adapter_model.safetensors"), kept / "adapter_model.bin")
    (kept / "adapter_model.safetensors").unlink()
    files.pop("adapter_model.safetensors")
    files["adapter_model.bin"] = (kept / "adapter_model.bin").read_bytes()
    for name in ("org/model", kept):
        assert torch.equal(load(name).model(ids).logits, expected)
    for data in (b"", b"x", pickle.dumps(print)):
        (kept / "adapter_model.bin").write_bytes(data)
        with pytest.raises(UserError, match="^the adapters in .* do not fit"):
            load(kept)


@pytest.mark.parametrize("status", [403, 429, 500])
def test_a_record_that_the_hub_does_not_give_is_not_left_out(hub, tmp_path: Path, monkeypatch, status) -> None:
    from metazo.models.assemble import load

    def get(self) -> None:
        if self.path.endswith("metazo.json"):
            return self.answer(status, {"error": "busy"})
        return usual(self)

    run_settings(FinetuneConfig(**SMALL, out=tmp_path / "run", push="org/model"))
    usual = hub.do_GET
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        patch.setattr(hub, "do_GET", get)
        patch.setattr(hub, "do_HEAD", get)
        with pytest.raises(
            UserError, match=f"^metazo.json of org/model cannot be had from the Hub .it answers {status}"
        ):
            load("org/model")
    assert load("org/model").model.config.metazo
    hub.files["org/plain"] = {name: data for name, data in hub.files["org/model"].items() if name != "metazo.json"}
    assert not hasattr(load("org/plain").model.config, "metazo")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert not hasattr(load("org/plain").model.config, "metazo")


def test_adapters_that_are_their_own_base_are_refused(hub, tmp_path: Path) -> None:
    from metazo.models.assemble import base_of, load

    run_settings(FinetuneConfig(**SMALL, out=tmp_path / "run", push="org/a"))
    kept = tmp_path / "run" / "model"
    hub.files["org/b"] = dict(hub.files["org/a"])

    def name(base: str) -> bytes:
        settings = json.loads((kept / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
        (kept / "adapter_config.json").write_text(json.dumps(settings))
        return json.dumps(settings).encode()

    hub.files["org/a"]["adapter_config.json"], hub.files["org/b"]["adapter_config.json"] = name("org/b"), name("org/a")
    hub.files["org/self"] = hub.files["org/a"] | {"adapter_config.json": name("org/self")}
    name(str(kept))
    for read in (load, base_of):
        for ring in ("org/a", "org/self", kept):
            with pytest.raises(
                UserError, match="names a base model that is these adapters again; name the plain model"
            ) as error:
                read(ring)
            assert len(str(error.value)) < 1000


def test_nothing_is_asked_for_models_that_are_here(hub, tmp_path: Path, monkeypatch) -> None:
    from metazo.models import assemble

    monkeypatch.setattr(assemble, "find", lambda *asked: pytest.fail(f"the Hub was asked for {asked}"))
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("pico", PICO, "org/name", "a/b/c", "./a", "~/a", "/a/b", "memory:Own", "runs\\a"):
        assert not assemble.has_adapters(name)


def test_what_is_no_repository_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`push` 'model' is not the name of a repository of the Hub: give OWNER/NAME"):
        run_settings(FinetuneConfig(**SMALL, out=tmp_path / "run", push="model"))
    assert not (tmp_path / "run").exists()
    for name in ("", "model", "a/b/c"):
        with pytest.raises(
            UserError, match=f"^`repository` '{name}' is not the name of a repository of the Hub: give OWNER/N"
        ):
            make_tuner("base").push_to_hub(name)
    with pytest.raises(UserError, match="`push` uploads the saved model"):
        FinetuneConfig(**{**SMALL, "keep": "none"}, out=tmp_path / "run", push="a/b")
