"""Resuming from a folder after a kill, a full disk or damage by a stranger: the result is bit-identical."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from metazo import zoo
from metazo.blocks import named_tensors, partition
from metazo.errors import UserError
from metazo.feedback.surrogates import MeanJacobian
from metazo.feedback.tuner import FeedbackTuner, describe
from metazo.io.tensorfile import read_tensors, write_tensors
from metazo.io.terminal import Console
from metazo.models.load import load_model
from metazo.runs.batches import ORDER
from metazo.runs.config import FinetuneConfig
from metazo.runs.evaluations import Scores
from metazo.runs.finetune import run_settings, tune
from metazo.runs.interrupt import Interrupted
from metazo.runs.measure import evaluate
from metazo.runs.replay import replay
from metazo.settings import build
from metazo.steplog.format import line, scan
from metazo.steplog.inspect import repair
from metazo.steplog.writer import StepLog
from metazo.tuner.file import BlockSpec, Tuner, TunerInfo
from metazo.tuner.limits import TUNER
from metazo.tuner.networks import PertNN

SETTINGS: dict[str, Any] = {
    "task": "pico_sentiment", "lr": 1e-3, "seed": 3, "steps": 14, "batch_size": 2, "train_examples": 8,
    "dev_examples": 4, "test_examples": 4, "eval_every": 4, "snapshot_every": 3, "schedule": "linear", "scale": "rms",
    "optimizer": "hizoo",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def base(tiny: Callable[[str], Path]) -> Path:
    """The base model of these runs, of two layers."""
    SETTINGS["model"] = str(tiny("llama"))
    return tiny("llama")


def tuned(out: Path, **settings) -> str:
    """Runs to the end. Returns: the messages."""
    console = Console(file=io.StringIO(), width=400)
    run_settings(build(FinetuneConfig, SETTINGS, {"out": out, **settings}), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def results(out: Path) -> tuple[bytes, bytes, list, dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    for row in [*rows, summary]:
        row.pop("seconds"), row.pop("peak_memory_bytes", None)
    return (out / "model" / "model.safetensors").read_bytes(), (out / "steps.jsonl").read_bytes(), rows, summary


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple:
    out = tmp_path_factory.mktemp("whole") / "run"
    tuned(out)
    assert json.loads((out / "summary.json").read_text())["kept_step"] == 8  # neither the base model nor the last step
    return results(out)


@pytest.mark.parametrize("last", [4, 13])
def test_a_run_whose_folder_is_removed_ends_and_writes_nothing_into_the_run_that_took_its_place(tmp_path, last):
    out, files = tmp_path / "run", {}

    def replaced(step):
        if step.step == last:
            shutil.rmtree(out)
            tuned(out, steps=4, lr=3e-3)
            files.update({path: path.read_bytes() for path in out.rglob("*") if path.is_file()})

    with pytest.raises(UserError, match="run was removed, moved or replaced while this process wrote into it"):
        tune(build(FinetuneConfig, SETTINGS, {"out": out}), console=Console(quiet=True), on_step=replaced)
    assert files and files == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_shown_commands_can_be_pasted_into_a_shell(tmp_path):
    out = tmp_path / "it's my run"
    with pytest.raises(Interrupted) as stopped:
        tune(
            build(FinetuneConfig, SETTINGS, {"out": out}),
            console=Console(quiet=True),
            on_step=lambda step: os.kill(os.getpid(), signal.SIGTERM),
        )
    assert shlex.split(str(stopped.value))[-4:] == ["metazo", "finetune", "--resume", str(out)]
    with pytest.raises(UserError) as told:
        evaluate(out)
    assert f"--resume {shlex.quote(str(out))} continues it" in str(told.value)
    with pytest.raises(UserError) as diverged:
        tuned(tmp_path / "it's wild", lr=1e9, keep="last", max_bad_steps=14, steps=4)
    shown = re.search("metazo replay .* --to STEP", str(diverged.value))
    assert shown and str(tmp_path / "it's wild" / "steps.jsonl") in shlex.split(shown[0])


class Death(BaseException):
    """Ends a run immediately, as a kill does: nothing is caught, saved or flushed."""


@pytest.fixture(scope="module")
def died(tmp_path_factory) -> Path:
    """A run that was killed before the record of step 12: the snapshot of step 12, evaluations of 0, 4, 8, 12."""
    out, append = tmp_path_factory.mktemp("died") / "run", StepLog.append

    def dies(log: StepLog, step) -> None:
        if step.step == 12:
            raise Death
        append(log, step)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StepLog, "append", dies)
        with pytest.raises(Death):
            tuned(out)
    assert [path.name for path in out.glob("snapshot*")] == ["snapshot-00000012.safetensors"]
    return out


@pytest.fixture
def dead(died, tmp_path) -> Path:
    """A copy of that run, to be damaged."""
    return shutil.copytree(died, tmp_path / "run")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1  # behind a header
    path.write_bytes(data)


def cut(path: Path, count: int = 7) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def flipped_step(path: Path) -> None:
    """The same weights, said to be of another step."""
    tensors, metadata = read_tensors(path)
    write_tensors(path, tensors, metadata | {"step": str(int(metadata["step"]) + 1)})


def weights_of(folder: Path) -> dict[str, list]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).float().flatten()[:5].tolist() for name in file.keys()}  # noqa: SIM118


def no_line(path: Path, number: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))


def changed(path: Path, pattern: bytes, by: bytes) -> None:
    data, count = re.subn(pattern, by, path.read_bytes())
    assert count
    path.write_bytes(data)


LEFT: dict[str, tuple[Callable[[Path], object], str]] = {
    "as it died": (lambda out: None, "snapshot of step 12, 0 steps replayed"),
    "snapshot damaged": (lambda out: flip(out / "snapshot-00000012.safetensors"), "step 0, 12 steps replayed"),
    "snapshot empty": (
        lambda out: (out / "snapshot-00000012.safetensors").write_bytes(b""),
        "step 0, 12 steps replayed",
    ),
    "snapshot lost": (lambda out: (out / "snapshot-00000012.safetensors").unlink(), "step 0, 12 steps replayed"),
    "log torn": (lambda out: cut(out / "steps.jsonl"), "which are dropped; 11 steps are intact"),
    "metrics torn": (lambda out: cut(out / "metrics.jsonl"), "snapshot of step 0, 12 steps replayed"),
    "an evaluation lost": (lambda out: no_line(out / "metrics.jsonl", 2), "snapshot of step 0, 12 steps replayed"),
    "metrics lost": (lambda out: (out / "metrics.jsonl").unlink(), "snapshot of step 0, 12 steps replayed"),
    "a digit of the metrics changed": (
        lambda out: changed(out / "metrics.jsonl", rb'(?<=\n\{"step": 4, )(.*?"accuracy": )0\.', rb"\g<1>0.9"),
        "metrics.jsonl is damaged at line 2 (its checksum does not follow",
    ),
    "metrics of an earlier version": (
        lambda out: changed(out / "metrics.jsonl", rb', "crc": \d+', b""),
        "snapshot of step 12, 0 steps replayed",
    ),
    "half a file left behind": (lambda out: (out / ".model.123.tmp").mkdir(), "snapshot of step 12, 0 steps replayed"),
    "best weights lost": (lambda out: (out / "best.safetensors").unlink(), "steps replayed"),
    "best weights lost with the metrics": (
        lambda out: [path.unlink() for path in (out / "best.safetensors", out / "metrics.jsonl")],
        "snapshot of step 0, 12 steps replayed",
    ),
    "best weights of another step": (lambda out: flipped_step(out / "best.safetensors"), "steps replayed"),
}


@pytest.mark.parametrize("what", LEFT)
def test_whatever_is_left_the_run_ends_the_same(dead, whole, what):
    change, told = LEFT[what]
    change(dead)
    said = tuned(dead, resume=True)
    assert told in said and results(dead) == whole
    assert not list(dead.glob("snapshot*")) and not list(dead.glob(".*"))
    if "damaged" in what:
        assert "snapshot-00000012.safetensors is damaged and is not used" in said


def test_damaged_metrics_of_steps_that_cannot_be_replayed_are_said_with_what_is_computed_again(tmp_path, monkeypatch):
    settings, append = {"optimizer": "first-order-adamw", "scale": "none", "steps": 6, "eval_every": 2}, StepLog.append
    tuned(tmp_path / "whole", **settings)

    def dies(log: StepLog, step) -> None:
        if step.step == 5:
            raise Death
        append(log, step)

    with monkeypatch.context() as patched, pytest.raises(Death):
        patched.setattr(StepLog, "append", dies)
        tuned(tmp_path / "dead", **settings)
    changed(tmp_path / "dead/metrics.jsonl", b"^.", b"\0")
    said = tuned(tmp_path / "dead", **settings, resume=True)
    assert "metrics.jsonl is damaged at line 1" in said and "0 steps replayed, 5 computed again." in said
    assert results(tmp_path / "dead") == results(tmp_path / "whole")


def test_a_damaged_log_is_refused_repaired_and_gone_on_with(dead, whole):
    log = dead / "steps.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    lines[6] = lines[6].replace(b'"step":5', b'"step":6')
    log.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match="is damaged: line .* metazo log repair"):
        tuned(dead, resume=True)
    steps, _, aside = repair(dead / "steps.jsonl")
    assert 0 < steps < 12 and aside is not None
    tuned(dead, resume=True)
    assert results(dead) == whole


def test_feedback_with_another_trust_is_another_tuner(tmp_path, monkeypatch):
    info = describe(load_model(SETTINGS["model"]).model, "base")
    below, width = range(len(info.blocks) - 1), load_model(SETTINGS["model"]).model.config.hidden_size
    ones = [{k: torch.ones(*shape) for k in below} for shape in ((width, 1), (1, width))]
    tuners = [FeedbackTuner(MeanJacobian(*ones, {k: trust for k in below}), info) for trust in (0.5, 0.25)]
    settings = {"optimizer": "feedback", "scale": "none", "tuner": str(tmp_path / "t.safetensors"), "steps": 3}
    out = tmp_path / "feedback"

    def dies(log: StepLog, step) -> None:
        raise Death

    tuners[0].save(tmp_path / "t.safetensors")
    monkeypatch.setattr(StepLog, "append", dies)
    with pytest.raises(Death):
        tuned(out, **settings)
    monkeypatch.undo()
    tuners[1].save(tmp_path / "t.safetensors")
    with pytest.raises(UserError, match="belongs to another run: its trust is"):
        tuned(out, **settings, resume=True)
    begun = scan(out / "steps.jsonl").header
    begun.pop("trust")  # as an earlier version wrote it
    (out / "steps.jsonl").write_bytes(line(begun, 0)[0])
    tuned(out, **settings, resume=True)
    assert len(scan(out / "steps.jsonl").steps) == 3


@pytest.mark.parametrize("tuner", ["auto", "base"])
@pytest.mark.parametrize("kind", ["scale", "feedback"])
def test_a_run_goes_on_with_its_tuner_after_another_is_published(kind, tuner, tmp_path, monkeypatch):
    """Both `auto` and the name of a base model take the last version when a run begins."""
    model, kept = load_model(SETTINGS["model"]).model, tmp_path / "zoo"

    def publish(seed: int) -> None:
        if kind == "feedback":
            info = describe(model, "base")
            below, width = range(len(info.blocks) - 1), model.config.hidden_size
            ones = [{k: torch.ones(*shape) for k in below} for shape in ((width, 1), (1, width))]
            zoo.push(FeedbackTuner(MeanJacobian(*ones, {k: 1 / seed for k in below}), info), kept)
        else:
            blocks = [BlockSpec.of(block) for block in partition(named_tensors(model))]
            use = {"features": "log", "parametrisation": "rms_exp"}
            zoo.push(Tuner(PertNN(len(blocks), hidden=2, seed=seed), TunerInfo("base", blocks, **use)), kept)

    def dies(log: StepLog, step) -> None:
        if step.step == 2:
            raise Death
        append(log, step)

    append, method = StepLog.append, "feedback" if kind == "feedback" else "mezo"
    settings = {"optimizer": method, "scale": "none", "tuner": tuner, "zoo": kept, "steps": 3, "eval_every": 2}
    publish(2)
    tuned(tmp_path / "whole", **settings)
    with monkeypatch.context() as patch, pytest.raises(Death):
        patch.setattr(StepLog, "append", dies)
        tuned(tmp_path / "dead", **settings)
    assert len(scan(tmp_path / "dead/steps.jsonl").steps) == 2
    publish(3)
    if tuner == "auto":
        shutil.copytree(kept, tmp_path / "later")
        index = json.loads((tmp_path / "later/index.json").read_text())
        index["tuners"].pop(0)  # the tuner of the run
        (tmp_path / "later/index.json").write_text(json.dumps(index))
        begun = scan(tmp_path / "dead/steps.jsonl").header["tuner"]
        with pytest.raises(UserError, match=f"with the hash {begun}, was not found in the zoo folders"):
            tuned(tmp_path / "dead", **settings | {"zoo": tmp_path / "later"}, resume=True)
        file, elsewhere = kept / "base" / ("v1" if kind == "scale" else "feedback-v1") / TUNER, tmp_path / "elsewhere"
        file.rename(elsewhere)
        file.symlink_to(elsewhere)
        with pytest.raises(
            UserError, match="not found .* .one there was refused: .* leads out of the zoo through a link"
        ):
            tuned(tmp_path / "dead", **settings, resume=True)
        elsewhere.replace(file)
    said = tuned(tmp_path / "dead", **settings, resume=True)
    assert tuner != "auto" or "v1 in " in said.partition("tuner:")[2]
    assert results(tmp_path / "dead") == results(tmp_path / "whole")


def test_a_run_goes_on_with_a_tuner_that_was_pulled_under_a_name_of_the_hub(tmp_path, monkeypatch):
    """A name org/base is asked of the Hub, never of the cache, when a run begins; the hash in a log is enough to go on."""
    blocks = [BlockSpec.of(block) for block in partition(named_tensors(load_model(SETTINGS["model"]).model))]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    zoo.push(Tuner(PertNN(len(blocks), hidden=2, seed=3), TunerInfo("org/base", blocks)), tmp_path / "zoo")
    zoo.pull("org/base", tmp_path / "zoo", report=lambda text: None)
    settings = {"optimizer": "mezo", "scale": "none", "tuner": "org/base", "steps": 3}

    def dies(log: StepLog, step) -> None:
        raise Death

    with monkeypatch.context() as patch, pytest.raises(Death):
        patch.setattr(StepLog, "append", dies)
        tuned(tmp_path / "run", **settings, zoo=tmp_path / "zoo")
    tuned(tmp_path / "run", **settings, resume=True)
    assert len(scan(tmp_path / "run/steps.jsonl").steps) == 3


def test_networks_that_are_used_in_another_way_are_another_tuner(tmp_path, monkeypatch):
    blocks = [BlockSpec.of(block) for block in partition(named_tensors(load_model(SETTINGS["model"]).model))]
    networks, log = PertNN(len(blocks), hidden=2, seed=3), {"features": "log", "parametrisation": "rms_exp"}
    settings = {"optimizer": "mezo", "scale": "none", "tuner": str(tmp_path / "t.safetensors"), "steps": 3}
    out = tmp_path / "run"

    def given(bound: float, blocks: list[BlockSpec]) -> None:
        Tuner(networks, TunerInfo("base", blocks, bound=bound, **log)).save(tmp_path / "t.safetensors")

    def dies(log: StepLog, step) -> None:
        raise Death

    given(1.0, blocks)
    monkeypatch.setattr(StepLog, "append", dies)
    with pytest.raises(Death):
        tuned(out, **settings)
    monkeypatch.undo()
    given(3.0, blocks)
    with pytest.raises(UserError, match="belongs to another run: its tuner's bound is 1.0, now 3.0"):
        tuned(out, **settings, resume=True)
    given(1.0, blocks[::-1])  # each block has another's network
    with pytest.raises(UserError, match="belongs to another run: its tuner's list of blocks is "):
        tuned(out, **settings, resume=True)
    begun = scan(out / "steps.jsonl").header
    begun.pop("networks")  # as an earlier version wrote it
    (out / "steps.jsonl").write_bytes(line(begun, 0)[0])
    given(3.0, blocks)
    tuned(out, **settings, resume=True)
    assert len(scan(out / "steps.jsonl").steps) == 3


def test_a_death_after_the_summary_leaves_nothing_behind(dead, whole):
    """The last moments of a run: its result is written, but the lock's file and the files of a resumed run still exist."""
    tuned(dead, resume=True)
    for name in ("snapshot-00000012.safetensors", "best.safetensors", ".lock", ".model.1.tmp"):
        (dead / name).write_bytes(b"{}")
    tuned(dead, resume=True)
    assert results(dead) == whole and not list(dead.glob("snapshot*")) and not list(dead.glob(".*"))
    assert not (dead / "best.safetensors").exists()


@pytest.mark.parametrize("lines", [1, 4])
def test_a_complete_run_whose_log_lost_its_end_computes_it_again(dead, whole, lines):
    """A log that is damaged and repaired is one, too; without an end it does not say which weights were kept."""
    tuned(dead, resume=True)
    log, base = dead / "steps.jsonl", scan(dead / "steps.jsonl").header["model"]
    kept = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(kept[:-lines]))
    for path in (log, dead):
        with pytest.raises(UserError, match="has lost its end, which names the step whose weights the run kept"):
            replay(path if path == log else path / "steps.jsonl", base)
    assert replay(log, base, to=2).notes == [
        "The log has no last line, because its run is not finished or its end was cut off."
    ]
    assert "ends after step" in tuned(dead, resume=True) and results(dead) == whole
    flip(log)
    with pytest.raises(UserError, match="is damaged: line .* metazo log repair"):
        tuned(dead, resume=True)


def test_the_log_of_an_unfinished_run_says_so(dead):
    shutil.copy(dead / "steps.jsonl", dead.parent / "steps.jsonl")
    cut(dead.parent / "steps.jsonl")
    done = replay(dead.parent / "steps.jsonl", scan(dead / "steps.jsonl").header["model"])
    assert done.identical is None and "bytes of a torn line at its end were left out." in done.notes[0]
    assert done.notes[1].endswith("these are the weights of its last step, 11.")


@pytest.mark.parametrize(("precision", "optimizer"), [("compensated-8", "mezo"), ("compensated-16", "skip-feedback")])
def test_a_snapshot_holds_the_bits_below_bfloat16(tmp_path, precision, optimizer):
    settings = {"model": "pico", "task": "pico_sentiment", "lr": 1e-4, "steps": 6, "batch_size": 4, "snapshot_every": 2}
    settings |= {"train_examples": 16, "dev_examples": 4, "test_examples": 4, "eval_every": 3, "keep": "last"}
    settings |= {"dtype": "bfloat16", "precision": precision, "optimizer": optimizer}
    run_settings(build(FinetuneConfig, settings, {"out": tmp_path / "whole"}))
    with pytest.raises(Interrupted):
        tune(
            build(FinetuneConfig, settings, {"out": tmp_path / "cut"}),
            on_step=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step.step == 2 else None,
        )
    run_settings(build(FinetuneConfig, settings, {"out": tmp_path / "cut", "resume": True}))
    a, b = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert a == b


def test_damaged_best_weights_are_said_with_the_way_out(dead, base):
    tensors, metadata = read_tensors(dead / "best.safetensors")
    write_tensors(dead / "best.safetensors", tensors, metadata | {"step": "0"})
    flip(dead / "best.safetensors")  # in its data, so that its header still says step 0
    with pytest.MonkeyPatch.context() as patched:  # no later evaluation is better, so the damaged file is needed
        patched.setattr(Scores, "_merit", lambda self, record: (-record["step"],))
        with pytest.raises(UserError, match=r"best.safetensors is damaged.*`resume=True`.*\(step 0\)"):
            tuned(dead, resume=True)
        said = tuned(dead, resume=True)
    assert "12 steps replayed" in said or "14 steps replayed" in said
    assert json.loads((dead / "summary.json").read_text())["kept_step"] == 0
    assert weights_of(dead / "model") == weights_of(base)


def test_changed_data_is_refused(dead):
    with pytest.raises(UserError, match="`train_examples` was 8 .* 9 now"):
        tuned(dead, resume=True, train_examples=9)
    with pytest.MonkeyPatch.context() as patched:  # the same settings, and one changed row
        patched.setattr("metazo.runs.header.data_hash", lambda prepared: "0" * 64)
        with pytest.raises(UserError, match="its data is "):
            tuned(dead, resume=True)


def test_a_signal_during_the_replay_stops_it_without_harm(dead, whole, monkeypatch):
    import os
    import signal

    see = Scores.evaluate_if_due

    def press(scores: Scores, step: int, *callbacks) -> None:
        see(scores, step, *callbacks)
        if step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    flip(dead / "snapshot-00000012.safetensors")
    with monkeypatch.context() as patched:
        patched.setattr(Scores, "evaluate_if_due", press)
        with pytest.raises(Interrupted, match="SIGTERM after step 10 of 14") as caught:
            tuned(dead, resume=True)
    assert caught.value.exit_code == 143
    tuned(dead, resume=True)
    assert results(dead) == whole


def test_a_run_of_an_older_split_is_refused_by_its_version_and_one_of_the_same_rows_goes_on(tmp_path):
    """Version 1 wrote no version: a difference is reported with other examples, and not with the same ones (every row used)."""
    header = {"task": "t", "data": "a" * 64, "settings": {"seed": 0}}
    StepLog(tmp_path / "steps.jsonl", header).close()
    now = {**header, "split": 2, "trained": {"seed": 0}, "head": None, "settings": {"seed": 0, "k_per_class": None}}
    StepLog(tmp_path / "steps.jsonl", now).close()
    with pytest.raises(UserError, match="drawn by version 1 of the split .* this metazo has version 2"):
        StepLog(tmp_path / "steps.jsonl", {**now, "data": "b" * 64})
    of_fewer = {**now, "trained": {"seed": 0, "train": 1600}}  # than were asked for, which older logs record
    StepLog(tmp_path / "steps.jsonl", of_fewer).close()
    StepLog(tmp_path / "other.jsonl", {**now, "trained": {"seed": 0, "train": 5000}}).close()
    StepLog(tmp_path / "other.jsonl", of_fewer).close()


def test_a_run_with_batches_of_an_older_order_is_refused(tmp_path):
    header = {"task": "t", "settings": {"seed": 0, "batches": "by-length"}}
    StepLog(tmp_path / "steps.jsonl", header).close()
    with pytest.raises(UserError, match="similar length are in the order of version 1, and this metazo has version 2"):
        StepLog(tmp_path / "steps.jsonl", {**header, "order": ORDER})


def test_a_run_whose_weight_decay_was_part_of_the_momentum_is_not_continued(tmp_path) -> None:
    more = {"optimizer": "first-order-sgd", "scale": "none", "steps": 2, "weight_decay": 0.1}
    tuned(tmp_path / "run", **more)
    (tmp_path / "run/summary.json").unlink()
    log = tmp_path / "run/steps.jsonl"
    header = json.loads(log.read_text().splitlines()[0])
    assert header.pop("decay") == "decoupled"
    log.write_bytes(line({key: value for key, value in header.items() if key != "crc"}, 0)[0])
    with pytest.raises(UserError, match="earlier version of metazo, whose `weight_decay` was part of the momentum"):
        tuned(tmp_path / "run", **more, resume=True)
    tuned(tmp_path / "without", **(more | {"weight_decay": 0.0}))
    assert "decay" not in scan(tmp_path / "without/steps.jsonl").header
