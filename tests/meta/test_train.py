"""Meta-training from the command line: folder, interrupt and resume, recorded paths, bad input."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from metazo.blocks import NamedTensor, named_tensors
from metazo.errors import UserError
from metazo.io.terminal import Console
from metazo.meta import train
from metazo.meta.config import MetaConfig
from metazo.meta.explosion import TeacherWatch
from metazo.meta.horizon_config import HorizonConfig
from metazo.meta.journal import row_of, warning
from metazo.meta.loop import MetaRun
from metazo.meta.order import Order
from metazo.meta.path import Online
from metazo.meta.path_setup import build, judge, load, notes
from metazo.meta.reset import restart_steps
from metazo.meta.train import dry
from metazo.meta.trajectory import Trajectory
from metazo.recipes import locate
from metazo.runs.interrupt import Interrupted
from metazo.runs.monitor import Diverged
from metazo.settings import build as build_config
from metazo.settings import read_recipe
from metazo.tuner.file import Tuner
from metazo_cli.meta_train import _settings as of_flags

meta_train = partial(train.meta_train, plot=False)


def weights(tuner: Tuner) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in tuner.pertnn.parameters()]


def test_a_tuner_is_complete_without_a_picture_that_cannot_be_drawn(settings, monkeypatch):
    def no_room(folder, normalised):
        raise ImportError("ft2font.so: failed to map segment")

    monkeypatch.setattr("metazo.meta.train.plot", no_room)
    console = Console(file=io.StringIO(), width=400)
    config = settings()
    tuner = meta_train(config, console=console, plot=True)
    assert torch.equal(weights(tuner)[0], weights(Tuner.load(config.out))[0])
    assert "and no picture of sigma (ft2font.so: failed to map segment)." in console.file.getvalue()


@pytest.mark.parametrize("how", ["published", "ratio", "unrolled"])
def test_the_folder_holds_the_tuner_and_what_happened(settings, how: str):
    changes = {
        "ratio": {
            "objective": "ratio",
            "features": "log",
            "parametrisation": "rms_exp",
            "meta_optimizer": "adam",
            "lr_meta": 3e-3,
        },
        "published": {
            "task": ["pico_topic", "pico_sentiment"],
            "queries": 2,
            "blocks": "layer",
            "separate_batch": True,
        },
        "unrolled": {"unroll": 2, "detach_kappa": False, "task": ["pico_span"], "teacher": "adamw"},
    }[how]
    config = settings(**changes)
    tuner = meta_train(config, plot=True)
    out = config.out
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "sigma.png",
        "tuner.safetensors",
    ]
    loaded, _ = load(config)
    kept = Tuner.load(out)
    assert kept.fits((name, tuple(p.shape)) for name, p in loaded.model.named_parameters()).ok
    for a, b in zip(weights(tuner), weights(kept)):
        assert torch.equal(a, b)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))
    assert {row["task"] for row in rows} == set(config.task)
    assert kept.info.recipe["objective"] == config.objective and "out" not in kept.info.recipe
    assert rows[0]["sigma"] != rows[-1]["sigma"], "the networks never moved"
    assert (out / "sigma.png").read_bytes().startswith(b"\x89PNG")


class StopsAt:
    """Presses Ctrl-C after a number of meta-steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: int):
        step = MetaRun.step

        def counted(run: MetaRun):
            result = step(run)
            if run.steps == steps:
                os.kill(os.getpid(), signal.SIGINT)
            return result

        monkeypatch.setattr(MetaRun, "step", counted)


@pytest.mark.parametrize(
    "changes",
    [{}, {"objective": "ratio", "meta_optimizer": "adam", "lr_meta": 3e-3, "teacher": "adamw"}, {"record": True}],
)
def test_interrupted_and_resumed_is_bit_identical(settings, monkeypatch, tmp_path: Path, changes: dict):
    def with_record(name: str) -> dict:
        return changes | ({"record": tmp_path / f"path-{name}", "record_every": 2} if "record" in changes else {})

    whole = meta_train(settings("whole", **with_record("a")))
    with monkeypatch.context() as patched:
        StopsAt(patched, 3)
        with pytest.raises(Interrupted, match="`resume=True`"):
            meta_train(settings("parts", **with_record("b")))
    assert not (tmp_path / "parts" / "tuner.safetensors").exists()
    resumed = meta_train(settings("parts", resume=True, **with_record("b")))
    for a, b in zip(weights(whole), weights(resumed)):
        assert torch.equal(a, b)
    first, second = (tmp_path / name / "metrics.jsonl" for name in ("whole", "parts"))
    assert first.read_text() == second.read_text()


@pytest.mark.parametrize("changed", [True, False, None])
def test_another_environment_is_said(settings, monkeypatch, changed: bool | None):
    config, console = settings(), Console(file=io.StringIO(), width=400)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        StopsAt(patched, 3)
        meta_train(config)
    kept = json.loads((config.out / "config.json").read_text())
    threads = kept["environment"]["threads"]
    kept["environment"]["threads"] += bool(changed)
    if changed is None:  # as an earlier version wrote it
        del kept["environment"]
    (config.out / "config.json").write_text(json.dumps(kept))
    meta_train(settings(resume=True), console=console)
    said = (
        f"The run began in another environment (threads {threads + 1} then and {threads} now): later steps may differ"
    )
    assert ("began in" in console.file.getvalue()) == (said in console.file.getvalue()) == bool(changed)
    meta_train(settings(resume=True))  # complete


def test_killed_between_snapshots_is_bit_identical_too(settings, tmp_path: Path, monkeypatch):
    whole = meta_train(settings("whole"))
    step = MetaRun.step

    def dies(run: MetaRun):
        if run.steps == 5:  # the last snapshot holds 4
            raise MemoryError
        return step(run)

    with monkeypatch.context() as patched:
        patched.setattr(MetaRun, "step", dies)
        with pytest.raises(MemoryError):
            meta_train(settings("parts"))
    resumed = meta_train(settings("parts", resume=True))
    for a, b in zip(weights(whole), weights(resumed)):
        assert torch.equal(a, b)
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "parts" / "metrics.jsonl").read_text()


def test_a_restart_without_the_model_starts_the_teachers_rate_anew(settings):
    config = settings(restart_model=False)
    loaded, tasks = load(config)
    run = MetaRun(loaded.model, named_tensors(loaded.model), tasks, config)
    assert isinstance(run.path, Online) and run.path.every == 3
    rates = []
    for _ in range(8):
        run.step()
        rates.append(run.path.teacher.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01 * (1 - step % 3 / 3) for step in range(8)])
    run.load(run.state())
    old = run.state() | {"teacher/taken": torch.tensor(8)}  # of a metazo that did not start it anew
    with pytest.raises(UserError, match="taken 8 steps since its rate last started anew, which it does every 3 steps"):
        run.load(old)


def test_a_recorded_path_with_every_step_equals_the_teacher_beside(settings, tmp_path: Path):
    """With weights recorded at every step, training along the recording is training online."""
    common = {"restart_every": 0, "dtype": "float64"}
    online = meta_train(settings("online", **common))
    path = tmp_path / "path"
    recorded = meta_train(settings("recorded", record=path, record_every=1, **common))
    again = settings("again", trajectory=path, dtype="float64")
    again = meta_train(replace(again, model=f"{again.model}/"))  # the same weights under another spelling
    trajectory = Trajectory.open(path)
    assert trajectory.manifest["snapshots"] == list(range(6)) and len(trajectory.log) == 6
    for a, b, c in zip(weights(online), weights(recorded), weights(again)):
        assert torch.equal(b, c)
        # online, theta was perturbed and moved back: equal up to rounding
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_recording_that_was_cut_is_gone_on_with(settings, tmp_path: Path, monkeypatch):
    whole = settings("a", record=tmp_path / "whole", record_every=2)
    meta_train(whole)
    cut = settings("b", record=tmp_path / "cut", record_every=2)
    loaded, tasks = load(cut)
    caught: list[str] = []
    loss = type(tasks[0]).loss

    def counted(self, model, indices):
        counted.calls += 1
        if counted.calls == 2:
            caught.append("SIGTERM")
        return loss(self, model, indices)

    counted.calls = 0
    with monkeypatch.context() as patched:
        patched.setattr(type(tasks[0]), "loss", counted)
        with pytest.raises(Interrupted):
            build(cut, loaded, tasks, caught)
    with pytest.raises(UserError, match="not complete"):
        Trajectory.open(tmp_path / "cut")
    meta_train(cut)
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name
    with pytest.raises(UserError, match="seed is 0 there and 1 here"):
        meta_train(settings("c", trajectory=tmp_path / "whole", seed=1))
    assert not (tmp_path / "c").exists()


def test_nan_at_the_first_step_leaves_nothing(settings, monkeypatch):
    from metazo.meta.order import PreparedTask

    monkeypatch.setattr(
        PreparedTask, "loss", lambda self, model, indices: next(model.parameters()).sum() * float("nan")
    )
    config = settings()
    with pytest.raises(UserError, match="not finite at the first step"):
        meta_train(config)
    assert not config.out.exists()


@pytest.mark.parametrize("changes, batches", [({}, 0), ({"separate_batch": True, "queries": 2}, 1)])
def test_a_second_batch_is_drawn_if_it_is_read(settings, monkeypatch, changes, batches):
    drawn, other = [], Order.other
    monkeypatch.setattr(Order, "other", lambda *given: drawn.append(given) or other(*given))
    config = settings(**changes)
    config.out.mkdir()
    build(config, *load(config)).step()
    assert len(drawn) == batches


@pytest.mark.parametrize("changes", [{"objective": "ratio"}, {"separate_batch": True}, {}])
def test_batches_that_must_overlap_are_said(settings, changes):
    said = "Task 'pico_topic' has 7 training rows, fewer than two batches of 4: the second batch of a step shares rows"
    for rows, expected in ((7, bool(changes)), (8, False)):
        console = Console(file=io.StringIO(), width=400)
        meta_train(settings(f"of {rows}", **changes, train_examples=rows, steps=1), console=console)
        assert (said in console.file.getvalue()) == expected


def test_nan_later_is_skipped_and_counted(settings, monkeypatch):
    from metazo.meta.order import PreparedTask

    loss, calls = PreparedTask.loss, []

    def sometimes(self, model, indices):
        calls.append(1)
        return loss(self, model, indices) * (float("nan") if len(calls) == 6 else 1.0)  # L- or so of the second step

    monkeypatch.setattr(PreparedTask, "loss", sometimes)
    config = settings()
    tuner = meta_train(config)
    assert tuner.info.recipe["skipped"] == 1
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows].count(True) == 1
    assert all(torch.isfinite(value).all() for value in weights(tuner))


RATIO = {"objective": "ratio", "features": "log", "parametrisation": "rms_exp"}


@pytest.mark.parametrize("how", [RATIO, {}])
def test_a_teacher_that_explodes_is_no_result(settings, tmp_path: Path, how):
    """Its losses are finite, so that no step is skipped."""
    config = settings(**how, teacher_lr=3000.0)
    with pytest.raises(
        Diverged, match=r"not finite in 0 of 6 .* had exploded in 4 .*; lower `teacher_lr` \(now 3000\)"
    ):
        meta_train(config)
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert not (config.out / "tuner.safetensors").exists() and not any(row["skipped"] for row in rows)
    with pytest.raises(Diverged, match="The teacher in .* diverged: in 2 of 3 steps its loss was"):
        meta_train(settings("recorded", **how, teacher_lr=3000.0, record=tmp_path / "path"))
    assert not settings("recorded").out.exists()


def test_weights_that_no_meta_step_is_at_are_no_explosion(settings):
    """Every epoch of a teacher is one step long, so that all meta-steps are at the start weights, whatever its rate is."""
    slow, fast = (settings(str(lr), **RATIO, teacher_lr=lr, restart_every=0.25, steps=2) for lr in (0.01, 1e6))
    for a, b in zip(weights(meta_train(slow)), weights(meta_train(fast))):
        assert torch.equal(a, b)


def test_explosions_of_a_teacher_are_counted_by_task():
    weight = torch.nn.Parameter(torch.ones(4))
    watch = TeacherWatch([NamedTensor("w", weight, 0)], 3)

    def count(*seen: tuple[int, float | None]) -> list[int]:
        watch.begin()
        return [(watch.see(*each), watch.count)[1] for each in seen]

    assert count((0, 0.5), (1, 8.0), (0, 5.4), (1, 79.0), (0, None), (1, math.nan)) == [0] * 6  # of a sound teacher
    assert count((0, 5.6), (2, 900.0), (0, 7.0), (1, 79.0), (2, 0.1), (2, 5.2)) == [1, 1, 2, 2, 2, 3]
    resumed = TeacherWatch(watch.tensors, 3)
    resumed.state.copy_(watch.state)
    with torch.no_grad():
        weight.fill_(101)  # a normalisation layer may hide it
    resumed.begin(), resumed.see(0, 0.5), resumed.see(1, None)
    assert (resumed.count, resumed.in_a_row) == (5, 3)
    resumed.see(2, math.nan, skipped=True)
    assert (resumed.count, resumed.in_a_row) == (5, 4)


def test_an_odd_batch_tells_nothing_of_the_tasks_after_it():
    weight = torch.nn.Parameter(torch.ones(4))
    watch = TeacherWatch([NamedTensor("w", weight, 0)], 100)
    watch.begin()
    watch.see(0, 0.5), watch.see(0, 6.0)
    for task in range(1, 100):
        watch.see(task, 900.0)  # it may be such a task
    assert (watch.count, watch.in_a_row) == (1, 1)
    watch.see(0, 0.5), watch.see(1, 1.0), watch.see(1, 10.1)  # a first loss is that of sound weights
    assert (watch.count, watch.in_a_row) == (2, 1)
    with torch.no_grad():
        weight.fill_(101)
    watch.begin(), watch.see(2, 0.5)
    assert (watch.count, watch.in_a_row) == (3, 2)


@pytest.mark.parametrize("how", [RATIO, {}])
def test_a_step_without_a_loss_at_exploded_weights_is_one_bad_step(settings, how):
    config = settings(**how, restart_every=100)
    config.out.mkdir()
    run = build(config, *load(config))
    for _ in range(4):
        run.step()
    sound = [tensor.param.detach().clone() for tensor in run.tensors]
    with torch.no_grad():
        for tensor in run.tensors:
            tensor.param.mul_(1e30)
    for _ in range(3):
        run.step()
    with torch.no_grad():
        for tensor, value in zip(run.tensors, sound):
            tensor.param.copy_(value)
    assert (run.steps, run.skipped, run.watch.count, run.watch.in_a_row) == (7, 3, 0, 3)
    judge(run)
    assert notes(run) == ["3 meta-steps had a loss that was not finite."]
    run.skipped = 4
    with pytest.raises(Diverged, match="not finite in 4 of 7 meta-steps, and .* had exploded in 0 others"):
        judge(run)


def test_a_stopped_run_goes_on_without_a_folder_that_it_does_not_read(settings, tmp_path: Path):
    config = settings(data=tmp_path / "data")
    config.data.mkdir()

    class Stop(Exception):
        pass

    def stops(run: MetaRun):
        if run.steps == 3:
            raise Stop
        return step(run)

    step = MetaRun.step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(MetaRun, "step", stops)
        meta_train(config)
    config.data.rmdir()
    whole = meta_train(settings("whole"))
    assert all(map(torch.equal, weights(meta_train(replace(config, resume=True))), weights(whole)))


def test_bad_input_is_refused_in_one_sentence(settings, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a run"):
        meta_train(settings())
    with pytest.raises(UserError, match="`batch_size` 99 is more than"):
        meta_train(settings("fresh", batch_size=99))
    with pytest.raises(UserError, match="nowhere"):
        meta_train(settings("fresh", trajectory=tmp_path / "nowhere"))
    with pytest.raises(UserError, match="`lr_meta`"):
        settings(lr_meta=-1.0)
    with pytest.raises(UserError, match="give one of them"):
        settings(record=tmp_path, trajectory=tmp_path)
    assert not (tmp_path / "fresh").exists()


def test_a_file_that_no_reader_takes_is_refused_before_the_first_step(settings, tmp_path: Path, monkeypatch):
    for module in ("meta.trial", "tuner.envelope"):
        monkeypatch.setattr(f"metazo.{module}.MAX_BYTES", 90_000)
    with pytest.raises(
        UserError, match="`hidden` is 999, which makes a file of up to .* bytes, and a tuner may have 90,000"
    ) as said:
        meta_train(settings(hidden=999))
    most = int(re.search("at most ([0-9]+)", str(said.value))[1])
    assert 0 < most < 999 and not (tmp_path / "out").exists()
    meta_train(settings(hidden=most, steps=1))
    horizon = HorizonConfig(settings().model, ["pico_topic"], tmp_path / "h", networks=most + 1, batch_size=4)
    with pytest.raises(UserError, match=f"`networks` is {most + 1}, which makes a file"):
        dry(horizon)


@pytest.mark.parametrize("name", ["a\u00a0b", "x/" * 256 + "y"])
def test_a_model_whose_name_no_tuner_holds_is_refused_before_the_first_step(settings, tmp_path: Path, name: str):
    odd = tmp_path / name
    odd.parent.mkdir(parents=True, exist_ok=True)
    odd.symlink_to(settings().model)
    for config in (
        replace(settings(), model=str(odd)),
        HorizonConfig(str(odd), ["pico_topic"], tmp_path / "out", batch_size=4),
    ):
        with pytest.raises(UserError, match="`model` .* a tuner names its base model in at most 512 that can be shown"):
            meta_train(config)
        assert not config.out.exists()


def test_resume_with_other_settings_is_refused(settings, monkeypatch):
    with monkeypatch.context() as patched:
        StopsAt(patched, 2)
        with pytest.raises(Interrupted):
            meta_train(settings())
    with pytest.raises(UserError, match="`lr_meta` was"):
        meta_train(settings(resume=True, lr_meta=0.3))
    tuner = meta_train(settings(resume=True))
    again = meta_train(settings(resume=True))
    assert all(torch.equal(a, b) for a, b in zip(weights(tuner), weights(again))), "a complete run is not run again"
    with pytest.raises(UserError, match="`lr_meta` was .* when the run in"):
        meta_train(settings(resume=True, lr_meta=0.3))


def test_collapse_is_said(settings, monkeypatch):
    """If sigma of one block is a hundred times the others', it has more than half of the perturbation."""
    config = settings(blocks="layer")
    loaded, tasks = load(config)
    run = build(config, loaded, tasks)
    with torch.no_grad():
        run.pertnn.b2[0] += 100
    row = row_of(run.step(), run.scale.blocks)
    assert row["largest_share"] > 0.9 and row["largest_block"] == run.scale.blocks[0].name
    assert row["largest_block"] in warning(row, config)


@pytest.mark.parametrize(
    ("kind", "values", "remedies"),
    [
        (MetaConfig, {}, {"lr_meta": 1e-3, "entropy": 1.0, "bound": 0.5}),
        (MetaConfig, {"parametrisation": "abs"}, {"lr_meta": 1e-3, "entropy": 1.0, "parametrisation": "rms_exp"}),
        (MetaConfig, {"objective": "published"}, {"lr_meta": 1e-3, "queries": 2, "bound": 0.5}),
        (MetaConfig, {"objective": "published", "parametrisation": "abs"},
         {"lr_meta": 1e-3, "queries": 2, "parametrisation": "rms_exp"}),
        (HorizonConfig, {}, {"spread": 0.1, "lr_sigma": 0.01, "bound": 0.5}),
    ],
)  # fmt: skip
def test_the_remedies_of_a_collapse_are_settings_of_the_run(kind, values: dict, remedies: dict):
    given = {"model": "pico", "task": ["pico_topic"], "out": Path("x")} | values
    said = warning({"largest_block": "b", "largest_share": 0.9, "step": 0}, kind(**given))
    assert set(re.findall(r"`(\w+)", said)) == set(remedies)
    for name, value in remedies.items():
        assert getattr(kind(**given), name) != value
        kind(**given | {name: value})  # and each of them is accepted


def test_a_run_whose_networks_never_moved_says_so(settings, tmp_path: Path):
    """Such an eps changes no number of float32, so that the losses of the probes are equal and every meta-gradient is 0."""
    console = Console(file=io.StringIO(), width=400)
    tuner = meta_train(settings(eps=1e-300), console=console)
    assert "None of the 6 meta-steps moved the networks: the meta-gradient was exactly 0" in console.file.getvalue()
    assert "raise `eps` (now 1e-300), `lr_update` (now 0.001) or `lr_meta` (now 0.1)" in console.file.getvalue()
    assert tuner.info.recipe["result"] == "that of the start, which no meta-step moved"
    console = Console(file=io.StringIO(), width=400)
    tuner = meta_train(settings("other"), console=console)
    assert "moved" not in console.file.getvalue() and "result" not in tuner.info.recipe
    assert "and no picture of sigma (`plot` is false)." in console.file.getvalue()
    assert not (tmp_path / "other" / "sigma.png").exists()


@pytest.mark.parametrize("path", [[], ["record"]])
def test_the_plan_counts_forward_passes(settings, monkeypatch, tmp_path: Path, path):
    from metazo.meta.order import PreparedTask

    config = settings(queries=3, **{name: tmp_path / name for name in path}, restart_every=0 if not path else 0.75)
    plan = dry(config)
    assert not config.out.exists()
    calls = []
    loss = PreparedTask.loss
    monkeypatch.setattr(PreparedTask, "loss", lambda *args: calls.append(1) or loss(*args))
    meta_train(config, console=Console(quiet=True))
    assert plan.forwards == len(calls)
    assert plan.steps == 6 and plan.steps_per_epoch == 4
    assert plan.recorded == ((3, 12, 16) if path else None)
    assert ("along a recording of 3 that repeats, with 12 of 16 examples" in plan.sentence()) == bool(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"restart_every": 2.0, "trajectory": "x"}, "`restart_every` 2.0 changes nothing with `trajectory`"),
        ({"record_every": 5, "trajectory": "x"}, "`record_every` 5 changes nothing with `trajectory`"),
        ({"record_every": 7}, "`record_every` 7 changes nothing with no `record`"),
        ({"restart_model": False, "record": "x"}, "`restart_model` False changes nothing with a recording"),
        ({"objective": "ratio", "lr_update": 1e-3}, "`lr_update` 0.001 changes nothing with `objective` ratio"),
        ({"objective": "ratio", "queries": 2}, "`queries` 2 changes nothing"),
        ({"entropy": 0.0}, "`entropy` 0.0 changes nothing with `objective` published"),
        ({"teacher": "adamw", "momentum": 0.5}, "`momentum` 0.5 changes nothing with `teacher` adamw"),
        ({"epochs": 7}, "`epochs` 7.* changes nothing with `steps`"),
        ({"parametrisation": "abs", "bound": 5.0}, "`bound` 5.0 changes nothing with `parametrisation` abs"),
        ({"normalise": False, "detach_kappa": False}, "`detach_kappa` False changes nothing with `normalise` False"),
        ({"restart_every": 0, "restart_losses": True}, "`restart_losses` True changes nothing with `restart_every` 0"),
        ({"restart_every": 0, "restart_sigma": True}, "`restart_sigma` True changes nothing with `restart_every` 0"),
        ({"restart_every": 0, "restart_model": False}, "`restart_model` False changes nothing with `restart_every` 0"),
    ],
)
def test_a_setting_without_effect_is_refused_and_is_not_in_the_recipe(settings, changes, said):
    with pytest.raises(UserError, match=said):
        settings(**changes)
    name = said.split("`")[1]
    assert name not in settings(**{key: value for key, value in changes.items() if key != name}).recipe()


def test_the_published_recipe_is_a_config():
    config = build_config(MetaConfig, read_recipe(locate("meta-published-copa")), {"out": "somewhere"})
    assert (config.objective, config.embedding_count, config.restart_every) == ("published", "published", 5)
    shorter = of_flags(None, Path("meta-published-copa"), {"out": Path("somewhere"), "steps": 10})
    assert isinstance(shorter, MetaConfig) and shorter.steps == 10 and "epochs" not in shorter.recipe()


@pytest.mark.parametrize("epochs", [2, 3])  # 3 is the default
def test_epochs_as_a_flag_win_over_the_steps_of_a_recipe(tmp_path: Path, epochs: int):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: pico\ntask: [pico_topic]\nsteps: 40\n")
    found = of_flags(None, recipe, {"out": tmp_path / "x", "epochs": epochs})
    assert isinstance(found, MetaConfig) and (found.steps, found.epochs) == (None, epochs)


def test_two_tasks_of_one_name_are_refused(settings, tmp_path: Path):
    """A recording and the hashes of the data name their tasks."""
    files = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        rows = [{"text": f"{folder} number {n}", "label": n % 2} for n in range(20)]
        (tmp_path / folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(str(tmp_path / folder / "task.yaml"))
        Path(files[-1]).write_text(
            "name: reviews\nkind: classification\nprompt: '{text} It was {}.'\nlabel: label\n"
            "labels: {0: terrible, 1: great}\nfiles: {train: train.jsonl}\n"
        )
    horizon = HorizonConfig(model="pico", task=files, out=tmp_path / "out")
    for config in (settings(task=files, record=tmp_path / "path"), horizon):
        with pytest.raises(UserError, match="`task` has two tasks of the name 'reviews'; rename one of them"):
            meta_train(config)
    assert not (tmp_path / "out").exists() and not (tmp_path / "path").exists()


def test_tasks_of_different_numbers_of_classes_are_refused_by_their_cause(settings, tiny):
    """A classifier has one head."""
    config = replace(settings(task=["pico_topic", "pico_sentiment"]), model=str(tiny("bert")))
    with pytest.raises(UserError, match="different numbers of classes .'pico_topic' has 4 and 'pico_sentiment' has 2"):
        meta_train(config)


@pytest.mark.parametrize("task", ["pico_topic", "pico_span"])
def test_a_run_with_too_little_curvature_of_long_answers_does_not_go_on(settings, monkeypatch, task: str):
    """A snapshot of earlier versions, which differ in nothing if every answer is a class."""
    changes = {"objective": "ratio", "task": [task]}
    state = MetaRun.state
    with monkeypatch.context() as patched:
        StopsAt(patched, 3)
        patched.setattr(MetaRun, "state", lambda run: {k: v for k, v in state(run).items() if k != "ratio/tokens"})
        with pytest.raises(Interrupted):
            meta_train(settings("old", **changes))
    if task == "pico_topic":
        resumed, whole = meta_train(settings("old", resume=True, **changes)), meta_train(settings("whole", **changes))
        assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(whole), strict=True))
        return
    with pytest.raises(
        UserError, match="measured too little curvature .* which task 'pico_span' has; start again in another"
    ):
        meta_train(settings("old", resume=True, **changes))


def test_only_0_epochs_mean_that_there_is_no_restart():
    assert [restart_steps(*each) for each in ((0, 1), (0.5, 1), (0.1, 4), (0.5, 4), (3, 4))] == [0, 1, 1, 2, 12]


def test_a_run_that_never_restarted_does_not_go_on_with_restarts(settings, monkeypatch):
    """Half an epoch of one batch was rounded to no restart at all."""
    StopsAt(monkeypatch, 4)
    one_batch = {"train_examples": 4, "restart_every": 0.5}
    monkeypatch.setattr("metazo.meta.loop.restart_steps", lambda *given: 0)
    with pytest.raises(Interrupted):
        meta_train(settings(**one_batch))
    monkeypatch.undo()
    with pytest.raises(UserError, match="taken 4 steps since its rate last started anew, which it does every 1 steps"):
        meta_train(settings(resume=True, **one_batch))


def test_the_recipe_is_every_setting_that_makes_the_tuner(tmp_path):
    """All of them but paths, the machine, how often files are saved, what the tuner's file names itself, and those of the
    other objective."""
    config = build_config(
        MetaConfig, {"model": "pico", "task": ["pico_topic"], "out": tmp_path, "device": "cpu", "steps": 3}
    )
    left_out = {"model", "task", "out", "data", "device", "record", "trajectory", "save_every", "resume"}
    left_out |= {"lr_update", "queries", "eps", "detach_kappa", "separate_batch", "epochs", "record_every"}
    unset = {item.name for item in fields(MetaConfig) if getattr(config, item.name) is None}
    assert config.recipe().keys() == {item.name for item in fields(MetaConfig)} - left_out - unset
    assert config.recipe()["steps"] == 3 and "statistics_every" in unset
