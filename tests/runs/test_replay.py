"""Replay: base model and step log alone give the tuned model, bit for bit, for every method."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from pathlib import Path

import pytest
import tokenizers
import torch

import metazo
from metazo import zoo
from metazo.blocks import named_tensors, partition
from metazo.errors import UserError
from metazo.models.load import load_model
from metazo.optimizers import OPTIMIZERS
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.inputs import _TEXT
from metazo.runs.replay import replay
from metazo.settings import build
from metazo.steplog.format import line, scan
from metazo.tuner.file import BlockSpec, Tuner, TunerInfo
from metazo.tuner.networks import PertNN

SMALL = {
    "task": "pico_sentiment", "lr": 1e-4, "steps": 5, "batch_size": 2, "train_examples": 8,
    "dev_examples": 4, "test_examples": 0, "snapshot_every": 0, "eval_every": 2,
}  # fmt: skip
OWN = {
    "mezo": {"dtype": "bfloat16", "train": ["*mlp*"], "keep": "best"},
    "mezo-momentum": {"scale": "rms", "weight_decay": 0.1},
    "mezo-svrg": {"method": {"interval": 2}},
    "lozo": {"rule": "adam", "method": {"interval": 2}},
    "hizoo": {"dtype": "float16"},
    "curvzo": {"accumulate": 2, "schedule": "linear"},
    "zo-finetuner": {"tuner": "random:1"},
}


@pytest.fixture(scope="module", autouse=True)
def base(tiny: Callable[[str], Path]) -> None:
    """The runs are of a model of two layers."""
    SMALL["model"] = str(tiny("llama"))


def tuned(out: Path, **settings) -> Path:
    run_settings(build(FinetuneConfig, SMALL, {"out": out, **settings}))
    return out


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tuned(tmp_path_factory.mktemp("run") / "mezo", optimizer="mezo", keep="last", steps=8)


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_every_method_is_rebuilt_to_the_bit(tiny, tmp_path, method):
    model = str(tiny("llama"))
    out = tuned(tmp_path / "run", **{"model": model, "optimizer": method, "keep": "last"} | OWN.get(method, {}))
    done = replay(out / "steps.jsonl", model, tmp_path / "again")
    assert done.identical and weights(tmp_path / "again") == weights(out / "model")
    assert done.steps == (4 if method == "mezo" else 5)  # its best weights are those of an evaluation before the end


def test_no_forward_pass_but_those_of_loading(run, tmp_path, monkeypatch):
    kind, passes = type(load_model(SMALL["model"]).model), []
    forward = kind.forward

    @wraps(forward)
    def counted(*args, **kwargs):
        passes.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(kind, "forward", counted)
    load_model(SMALL["model"])
    loading = len(passes)
    assert replay(run / "steps.jsonl", SMALL["model"], None).identical
    assert len(passes) == 2 * loading


def test_paths_are_text_too_and_a_folder_of_a_run_is_its_log(run, tmp_path):
    done = metazo.replay(str(run), SMALL["model"], out=str(tmp_path / "again"))
    assert done.identical and weights(tmp_path / "again") == weights(run / "model")


def test_a_link_leads_to_its_folder_and_the_working_directory_is_refused_at_once(run, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert replay(run, SMALL["model"], tmp_path / "link", to=1).steps == 1
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "model.safetensors").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ticks = []
    for out in (".", tmp_path / "here", "../here"):
        with pytest.raises(UserError, match="here is the working directory or a mount point, which the model's folder"):
            replay(run, SMALL["model"], out, tick=lambda *step: ticks.append(step))
    assert not ticks and not list((tmp_path / "here").iterdir())
    (tmp_path / "here").rmdir()
    with pytest.raises(
        UserError, match="`out` again cannot be used .No such file or directory.; give a path from the root"
    ):
        replay(run, SMALL["model"], "again")


@pytest.mark.parametrize(
    "named, said",
    [
        ({"log": 5}, "`log` is a file's name or path, not 5"),
        ({"base": 5}, "`base` is a folder, a Hub id, pico, or the model in memory, not 5"),
        ({"out": 5}, "`out` is a folder's name or path, not 5"),
        ({"to": "3"}, "`to` is '3' and the log has 8 steps; give 0 to 8"),
    ],
)
def test_arguments_of_other_types_are_one_sentence(run, named, said):
    with pytest.raises(UserError, match=said):
        metazo.replay(**{"log": run, "base": SMALL["model"]} | named)


def test_any_earlier_point(run, tmp_path):
    early = tuned(tmp_path / "early", optimizer="mezo", keep="last", steps=3)
    done = replay(run / "steps.jsonl", SMALL["model"], tmp_path / "again", to=3)
    assert done.steps == 3 and done.identical is None
    assert weights(tmp_path / "again") == weights(early / "model")
    base = replay(run / "steps.jsonl", SMALL["model"], to=0).loaded.model
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), load_model(SMALL["model"]).model.parameters()))
    with pytest.raises(UserError, match="the log has 8 steps"):
        replay(run / "steps.jsonl", SMALL["model"], to=9)


def test_skipped_steps_are_skipped_again(tmp_path):
    out = tuned(tmp_path / "run", optimizer="mezo", steps=12, max_loss=0.5, max_bad_steps=12)
    steps = scan(out / "steps.jsonl").steps
    skipped = [step for step in steps if not step.coefficients]
    assert skipped and len(skipped) < len(steps) and all(max(step.losses) > 0.5 for step in skipped)
    assert replay(out / "steps.jsonl", SMALL["model"]).identical


def test_another_base_model_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="is not the base model of this log"):
        replay(run / "steps.jsonl", "pico", tmp_path / "again")
    loaded = load_model(SMALL["model"])
    with torch.no_grad():
        next(loaded.model.parameters())[0, 0] += 1e-3
    loaded.model.save_pretrained(tmp_path / "near")
    loaded.tokenizer.save_pretrained(tmp_path / "near")
    with pytest.raises(UserError, match="is not the base model of this log"):
        replay(run / "steps.jsonl", str(tmp_path / "near"), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_base_whose_configuration_gives_the_same_weights_another_meaning_is_refused(run, tmp_path):
    shutil.copytree(SMALL["model"], tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(path.read_text().replace('"silu"', '"gelu"'))
    with pytest.raises(
        UserError, match="is not the base model of this log: in its configuration hidden_act was 'silu'"
    ):
        replay(run / "steps.jsonl", tmp_path / "base")


def test_a_base_with_other_buffers_is_refused(tmp_path):
    """Such as the correction by which a mixture chooses its experts; they are saved with the weights, and not among these."""

    def base(shift: float):
        loaded = load_model(SMALL["model"])
        loaded.model.model.layers[0].mlp.register_buffer("shift", torch.full((2,), shift))
        loaded.model.model.layers[0].mlp.register_buffer("made", torch.full((2,), shift), persistent=False)
        loaded.model.model.layers[0].mlp.register_buffer("turned", torch.full((2,), 1j).conj())
        return loaded

    settings = {name: value for name, value in SMALL.items() if name not in ("model", "task", "out")}
    metazo.finetune(base(0.0), SMALL["task"], out=tmp_path / "run", **settings)
    assert replay(tmp_path / "run/steps.jsonl", base(0.0)).identical
    with pytest.raises(UserError, match=r"base model of this log: the buffer model\.layers\.0\.mlp\.shift changed"):
        replay(tmp_path / "run/steps.jsonl", base(1.0))


def test_a_sparse_buffer_is_not_looked_at_and_not_saved(tmp_path):
    loaded = load_model(SMALL["model"])
    loaded.model.model.register_buffer("graph", torch.eye(2).to_sparse())
    settings = {name: value for name, value in SMALL.items() if name not in ("model", "task", "out", "keep")}
    with pytest.raises(
        UserError, match="model.graph is a sparse tensor, which no .* file can hold: leave out `out`, or add"
    ):
        metazo.finetune(loaded, SMALL["task"], out=tmp_path / "run", **settings)
    metazo.finetune(loaded, SMALL["task"], out=tmp_path / "run", keep="none", **settings)
    assert "buffer" not in (tmp_path / "run/steps.jsonl").read_text()


@pytest.mark.parametrize("what", ["splitting of words", "chat template"])
def test_a_base_whose_tokenizer_splits_other_words_or_writes_another_chat_is_refused(run, tmp_path, what):
    """With the same vocabulary, and the same tokens of the one text that is compared."""
    loaded = load_model(SMALL["model"])
    if what == "chat template":
        loaded.tokenizer.chat_template = "{{ messages }}"
    else:
        settings = json.loads(loaded.tokenizer.backend_tokenizer.to_str())
        used, merges = set(loaded.tokenizer.tokenize(_TEXT)), settings["model"]["merges"]
        made = ["".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in merges]
        dropped = [place for place in range(len(merges)) if made[place] not in used][-9:]
        assert dropped
        settings["model"]["merges"] = [merge for place, merge in enumerate(merges) if place not in dropped]
        loaded.tokenizer._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(settings))
    with pytest.raises(UserError, match=f"base model of this log: of its tokenizer the {what} changed"):
        replay(run / "steps.jsonl", loaded)


def test_a_base_with_another_tokenizer_is_refused(run, tmp_path):
    loaded, base = load_model(SMALL["model"]), tmp_path / "base"
    loaded.model.save_pretrained(base)
    loaded.tokenizer.save_pretrained(base)
    assert replay(run / "steps.jsonl", str(base)).identical, "the same in another folder"
    file = base / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="its tokenizer has other tokens or splits text in another way"):
        replay(run / "steps.jsonl", str(base), tmp_path / "again")


def test_the_tuner_is_found_by_its_hash_and_another_refused(tmp_path):
    out = tuned(tmp_path / "run", model="pico", optimizer="mezo", tuner="pico")
    assert replay(out / "steps.jsonl", "pico").identical
    with pytest.raises(UserError, match="random:2 is not the tuner of this log"):
        replay(out / "steps.jsonl", "pico", tuner="random:2")


def test_the_tuner_is_found_by_the_use_of_its_networks_too(tiny, tmp_path):
    blocks = [BlockSpec.of(block) for block in partition(named_tensors(load_model(tiny("llama")).model))]
    networks, kept = PertNN(len(blocks), hidden=2, seed=3), tmp_path / "zoo"
    uses = [{"bound": bound, "features": "log", "parametrisation": "rms_exp"} for bound in (3.0, 1.0)]
    for use in uses:
        zoo.push(Tuner(networks, TunerInfo("base", blocks, **use)), kept)
    zoo.push(Tuner(PertNN(1), TunerInfo("other/model", [BlockSpec("a", [("a", None)])])), kept)
    damaged = kept / "other/model/v1/tuner.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    index = json.loads((kept / "index.json").read_text())
    index["tuners"].insert(0, index["tuners"].pop())
    (kept / "index.json").write_text(json.dumps(index))
    out = tuned(tmp_path / "run", optimizer="mezo", tuner=str(kept / "base/v2"), model=str(tiny("llama")))
    assert replay(out / "steps.jsonl", str(tiny("llama")), zoo_folder=kept).identical
    with pytest.raises(UserError, match="although its networks are the same: bound was 1.0 and is 3.0 now"):
        replay(out / "steps.jsonl", str(tiny("llama")), tuner=str(kept / "base/v1"))
    file = kept / "base/v2/tuner.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    refused = (
        "is not in the zoo folders .one there was refused: .*/base/v2/.* leads out of the zoo through a link; remove"
    )
    with pytest.raises(UserError, match=refused):
        replay(out / "steps.jsonl", str(tiny("llama")), zoo_folder=kept)


def test_first_order_is_refused(tmp_path):
    out = tuned(tmp_path / "run", optimizer="first-order-sgd", steps=2, eval_every=1)
    with pytest.raises(UserError, match="the methods whose steps follow from their record"):
        replay(out / "steps.jsonl", SMALL["model"])


def rewritten(run: Path, path: Path, change) -> Path:
    """The log with its header and records changed by `change`, and correct checksums."""
    chain, data = 0, b""
    for text in (run / "steps.jsonl").read_text().splitlines():
        record = change({key: value for key, value in json.loads(text).items() if key != "crc"})
        row, chain = line(record, chain)
        data += row
    path.write_bytes(data)
    return path


def with_header(run: Path, path: Path, entries: dict, **settings) -> Path:
    """The log with other entries of its header, and other settings in it."""

    def change(record):
        return record | {"settings": record["settings"] | settings} | entries if "settings" in record else record

    return rewritten(run, path, change)


def test_a_log_whose_settings_were_changed_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="cannot be reproduced"):
        replay(with_header(run, tmp_path / "log", {}, eps=2e-3), SMALL["model"])
    with pytest.raises(UserError, match="shell.* is not a setting"):
        replay(with_header(run, tmp_path / "log", {}, shell="rm"), SMALL["model"])

    def bare(record):
        return {"metazo_steps": 1} if "settings" in record else record

    with pytest.raises(UserError, match="its header has no"):
        replay(rewritten(run, tmp_path / "log", bare), SMALL["model"])


def test_a_difference_of_the_vector_instructions_is_named(run, tmp_path, monkeypatch):
    """Processors of the same name, as in many virtual machines, may give other last bits."""

    def other_end(record):
        return record | {"weights": "0" * 64} if "kept" in record else record

    log = rewritten(run, tmp_path / "log", other_end)
    with pytest.raises(UserError, match="in the same environment: the header does not say"):
        replay(log, SMALL["model"])
    then = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "OTHER")
    again = replay(log, SMALL["model"])
    assert not again.identical and again.differences == [f"vectors {then} then and OTHER now"]


def test_a_log_that_does_not_record_the_vector_instructions_is_of_the_same_environment(run, tmp_path):
    found = scan(run / "steps.jsonl").header["environment"]
    older = {name: value for name, value in found.items() if name not in ("vectors", "core")}
    assert len(older) == len(found) - 2
    again = replay(with_header(run, tmp_path / "log", {"environment": older}), SMALL["model"])
    assert again.identical and again.differences == []


@pytest.mark.parametrize("rate", [-1e-4, "inf"])
def test_a_step_with_an_impossible_rate_is_not_replayed(run, tmp_path, rate):
    log = rewritten(run, tmp_path / "log.jsonl", lambda row: row | {"lr": [rate]} if row.get("step") == 3 else row)
    with pytest.raises(UserError, match="cannot be replayed: the learning rate of step 3 is"):
        replay(log, SMALL["model"], tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_another_version_of_the_noise_is_refused(run, tmp_path):
    now = scan(run / "steps.jsonl").sound().header["noise"]
    log = with_header(run, tmp_path / "log", {"noise": now + "0"})
    with pytest.raises(UserError) as refusal:
        replay(log, SMALL["model"], tmp_path / "again")
    assert str(refusal.value) == f"The log's noise is '{now}0', and this version of metazo makes '{now}'."
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("factor, same", [(1.00005, True), (1 / 1.00005, True), (1.0002, False), (1 / 1.0002, False)])
def test_coefficients_are_those_of_the_log_to_a_relative_1e_4(run, tmp_path, factor, same):
    def scaled(record):
        return record | {"c": [factor * record["c"][0]]} if record.get("step") == 3 else record

    log = rewritten(run, tmp_path / "log", scaled)
    if same:
        assert replay(log, SMALL["model"]).identical
    else:
        with pytest.raises(UserError, match="Step 3 of .* cannot be reproduced: its coefficients are"):
            replay(log, SMALL["model"])


class Watch:
    """What the interpreter reports (PEP 578) of a name, such as that it was opened, and of connections."""

    def __init__(self):
        self.name, self.seen = "", []
        sys.addaudithook(self.note)  # stays until the process ends

    def note(self, event, arguments):
        if not self.name:
            return
        names = [str(each) for each in arguments if isinstance(each, str | Path)]
        if event in ("socket.connect", "socket.getaddrinfo") or any(self.name in name for name in names):
            self.seen.append(event)

    def __call__(self, name, *arguments, **options):
        self.name, self.seen = str(name), []
        try:
            return replay(*arguments, **options)
        finally:
            self.name = ""


TEXTS = ("model", "task", "objective", "optimizer", "tuner", "revision", "data", "zoo", "push", "out", "device")
"""Settings of any text; `attn_implementation` has a test of its own."""


def test_paths_and_addresses_in_a_log_are_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    run = tuned(tmp_path / "run", model="pico", optimizer="mezo", tuner="pico", steps=2, keep="last")
    known, watch, path = scan(run / "steps.jsonl").sound().header, Watch(), tmp_path / "kept" / "tuner.safetensors"
    path.parent.mkdir()
    shutil.copyfile(next(each.path for each in zoo.tuners() if each.entry.base_model == "pico"), path)
    assert watch(path, run, "pico", tuner=str(path)).identical and "open" in watch.seen, "its opening is noticed"
    needed = ("weights", "tokenizer", "method", "noise", "tuner")
    for name in (str(path), "http://127.0.0.1:9/tuner.safetensors", "somebody/model"):
        entries = {key: name for key in known if key not in ("metazo_steps", "settings", *needed)}
        log = with_header(run, tmp_path / "log", entries, **dict.fromkeys(TEXTS, name))
        assert watch(name, log, "pico").identical and not watch.seen
        for key in needed:
            with pytest.raises(UserError):
                watch(name, with_header(run, tmp_path / "log", {key: name}), "pico")
            assert not watch.seen, key


def test_every_setting_of_any_text_is_tried_with_a_path():
    def takes(name: str) -> bool:
        try:
            build(FinetuneConfig, SMALL | {"out": "x", name: "somebody/model"})
        except UserError as refusal:
            return f"`{name}` is 'somebody/model'" not in str(refusal)
        return True

    assert {item.name for item in fields(FinetuneConfig) if takes(item.name)} - {*TEXTS} == {"attn_implementation"}


def test_code_of_the_hub_that_a_log_names_as_attention_is_not_loaded(run, tmp_path):
    log = with_header(run, tmp_path / "log", {}, attn_implementation="somebody/kernel")
    with pytest.raises(UserError, match="`attn_implementation` 'somebody/kernel' names code of the Hub, which"):
        replay(log, SMALL["model"])
    assert replay(log, load_model(SMALL["model"])).identical, "the caller has made this model"


def test_a_torn_log_is_replayed_and_a_damaged_one_is_not(run, tmp_path):
    data = (run / "steps.jsonl").read_bytes()
    (tmp_path / "torn").write_bytes(data[: data.rindex(b'{"kept"') + 9])
    assert replay(tmp_path / "torn", SMALL["model"]).steps == 8
    (tmp_path / "damaged").write_bytes(data.replace(b'{"step":3', b'{"step":4'))
    with pytest.raises(UserError, match="line 5 is bad"):
        replay(tmp_path / "damaged", SMALL["model"])


def test_the_header_names_what_the_steps_belong_to(run):
    found = scan(run / "steps.jsonl").sound().header
    assert found["method"] == "mezo" and found["noise"].startswith("philox4x32-10/") and len(found["weights"]) == 64
    assert found["settings"]["lr"] == 1e-4 and "data" not in found["settings"] and found["environment"]["torch"]
