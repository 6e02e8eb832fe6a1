"""Block scales learned over whole runs: what the pairs share, resume, the tuner's file, bad input."""

from __future__ import annotations

import inspect
import io
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import metazo
from metazo.blocks import named_tensors
from metazo.errors import UserError
from metazo.io.terminal import Console
from metazo.meta import horizon as module
from metazo.meta import train
from metazo.meta.config import MetaConfig
from metazo.meta.evolution import Pairs
from metazo.meta.horizon import HorizonRun
from metazo.meta.horizon_config import HorizonConfig
from metazo.meta.horizon_setup import load, make_tuner
from metazo.meta.train import dry
from metazo.models.select import select_trainable
from metazo.optimizers.mezo import MeZO
from metazo.runs.batches import batch_indices_by_length
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.folder import RunFolder
from metazo.runs.interrupt import Interrupted
from metazo.step.scales import RMSScale, normalisation
from metazo.tuner.file import Tuner
from metazo.tuner.scale import TunerScale, tuner_scale
from metazo_cli.meta_train import _settings

meta_train = partial(train.meta_train, plot=False)


@pytest.fixture
def settings(tiny, tmp_path: Path):
    def make(out: str = "out", kind: str = "llama", **changes) -> HorizonConfig:
        values = {"task": ["pico_topic", "pico_sentiment"], "steps": 4, "pairs": 2, "horizon": 4, "batch_size": 4}
        values |= {"train_examples": 16, "eval_examples": 8, "max_length": 96, "rates": [1e-4], "save_every": 2}
        return HorizonConfig(model=str(tiny(kind)), out=tmp_path / out, **(values | changes))

    return make


def bytes_of(config: HorizonConfig) -> tuple[bytes, str]:
    return (config.out / "tuner.safetensors").read_bytes(), (config.out / "metrics.jsonl").read_text()


def test_the_result_is_an_ordinary_tuner_that_runs_use(settings, tmp_path: Path) -> None:
    config = settings(rates=[1e-4, 1e-3])
    tuner = meta_train(config, plot=True)
    assert isinstance(tuner, Tuner) and sorted(path.name for path in config.out.iterdir()) == [
        *("config.json", "metrics.jsonl", "sigma.png", "tuner.safetensors")
    ]
    kept = Tuner.load(config.out)
    assert kept.info.fingerprint and kept.info.recipe["objective"] == "horizon"
    assert set(kept.info.recipe["rates of the tasks"]) == set(config.task) and "out" not in kept.info.recipe
    assert bool(kept.pertnn.b2.any()), "the scales never moved"
    common = dict(model=config.model, task="pico_cause", optimizer="mezo", lr=1e-4, steps=2, batch_size=4)
    common |= dict(train_examples=16, dev_examples=0, test_examples=8, keep="none", max_length=96)
    losses = {}
    for name, how in {"tuner": {"tuner": str(config.out)}, "rms": {"scale": "rms"}}.items():
        made = FinetuneConfig(**common, **how, out=tmp_path / name)
        losses[name] = run_settings(made, metazo.io.terminal.Console(quiet=True))["test"]["loss"]
    assert losses["tuner"] != losses["rms"]
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(4)) and {row["task"] for row in rows[:2]} == set(config.task)


@pytest.mark.parametrize("last", [2, 4])
def test_a_folder_that_is_removed_in_between_ends_the_training(settings, monkeypatch, last: int) -> None:
    config, record = settings(), RunFolder.record

    def removed(folder, **values):
        record(folder, **values)
        if values["step"] + 1 == last:
            shutil.rmtree(config.out)

    monkeypatch.setattr(RunFolder, "record", removed)
    with pytest.raises(UserError, match="out was removed, moved or replaced while"):
        meta_train(config)
    assert not config.out.exists()


def test_the_search_starts_at_the_rms_rule_or_flat(settings) -> None:
    _, tasks = load(settings())
    rms = HorizonRun(tasks, settings()).sigma()
    rule = RMSScale()
    rule.bind(HorizonRun(tasks, settings()).tensors)
    found = rule.scales(rule.init(), 0, lambda tensor: [(0, tensor.param.detach())])
    torch.testing.assert_close(rms, torch.tensor(list(found.values()), dtype=torch.float64))
    flat = HorizonRun(tasks, settings(start="flat", bound=8.0)).sigma()
    torch.testing.assert_close(flat, torch.ones_like(flat), rtol=1e-5, atol=0)
    with pytest.raises(UserError, match="`start='flat'` needs a `bound` of at least"):
        HorizonRun(tasks, settings(start="flat", bound=0.1))


class Watch:
    """Records, of every run: perturbations' seeds, batches, and the point of the search."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.runs: list[dict] = []
        run, batch, optimizer = HorizonRun.run, module.HorizonTask.batch_at, module.MeZO

        def watched(this, task, point, rate, seed, first, last, state=None):
            self.runs.append({"point": point.clone(), "batches": [], "noise": [], "first": first, "task": task.name})
            return run(this, task, point, rate, seed, first, last, state)

        def read(task, step, count, seed):
            found = batch(task, step, count, seed)
            self.runs[-1]["batches"].append(found["input_ids"].tolist())
            return found

        def made(*args, **kwargs):
            built = optimizer(*args, **kwargs)
            built.recorder = lambda step: self.runs[-1]["noise"].append(step.seeds)
            return built

        monkeypatch.setattr(HorizonRun, "run", watched)
        monkeypatch.setattr(module.HorizonTask, "batch_at", read)
        monkeypatch.setattr(module, "MeZO", made)


@pytest.mark.parametrize("truncation", [None, 2])
def test_both_members_of_a_pair_have_the_same_noise_and_batches(settings, monkeypatch, truncation) -> None:
    watch = Watch(monkeypatch)
    meta_train(settings(truncation=truncation))
    assert len(watch.runs) == 8
    for plus, minus in zip(watch.runs[::2], watch.runs[1::2]):
        assert plus["noise"] == minus["noise"] and plus["batches"] == minus["batches"]
        assert len(plus["noise"]) == (truncation or 4) and plus["task"] == minus["task"]
        assert not torch.equal(plus["point"], minus["point"])
    of_pairs = [tuple(run["noise"]) for run in watch.runs[::2]]
    assert len(set(of_pairs)) == 4, "another pair, or another part of the run, has other noise"
    centres = [(plus["point"] + minus["point"]) / 2 for plus, minus in zip(watch.runs[::2], watch.runs[1::2])]
    assert torch.allclose(centres[0], 0 * centres[0], atol=1e-12)
    torch.testing.assert_close(centres[0], centres[1])
    assert not torch.allclose(centres[1], centres[2]), "the update comes after the second pair"
    assert [run["first"] for run in watch.runs[::2]] == ([0, 0, 2, 2] if truncation else [0] * 4)


def test_truncated_runs_continue_as_the_whole_run_would(settings) -> None:
    """With a spread of almost 0 and no update, the parts of a truncated run are the whole run, up to that spread."""
    _, tasks = load(settings())
    common = {"spread": 1e-12, "lr_sigma": 1e-12, "steps": 2, "pairs": 1, "rates": [1e-3]}
    whole = HorizonRun(tasks, settings(**common))
    parts = HorizonRun(tasks, settings(**common, truncation=2))
    first, second, once = parts.step(), parts.step(), whole.step()
    assert first is not None and second is not None and once is not None
    assert first.task == second.task == once.task
    assert abs(second.loss - once.loss) < 1e-6 < abs(first.loss - once.loss)


def test_a_run_is_mezo_with_the_scales_and_the_rate_of_its_point(settings) -> None:
    """By hand: batches by length, a rate that falls linearly from its product with the factor, the mean loss on dev."""
    config = settings(horizon=3)
    loaded, tasks = load(config)
    run, task = HorizonRun(tasks, config), tasks[0]
    point = torch.linspace(-0.5, 0.5, len(run.centre), dtype=torch.float64)
    point[-1] = math.log(2)
    found = run.run(task, point, 1e-3, 7, 0, 3)
    after = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    run.base.restore()
    scale = TunerScale(
        pertnn=run.networks(point), normalise=True, features="log", parametrisation="rms_exp", bound=config.bound
    )
    optimizer = MeZO(loaded.model.named_parameters(), 1.0, config.eps, seed=7, scale=scale)
    for step, rate in enumerate((2e-3, 4e-3 / 3, 2e-3 / 3)):
        places = batch_indices_by_length(step, 4, [len(example) for example in task.prepared.train], 7)
        batch = task.prepared.collate([task.prepared.train[place] for place in places])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step(lambda batch=batch: task.prepared.loss(loaded.model, batch))
    for name, value in loaded.model.state_dict().items():
        torch.testing.assert_close(value, after[name], rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        expected = [float(task.prepared.loss(loaded.model, task.prepared.collate([one]))) for one in task.prepared.dev]
    assert found is not None and found[0] == pytest.approx(sum(expected) / 8, rel=1e-5)


def test_the_rate_is_the_best_and_the_updates_shrink(settings, monkeypatch) -> None:
    config = settings(rates=[1e-4, 1e-3, 1e-2, 1e-1], lr_sigma=0.1)
    _, tasks = load(config)
    run, seen = HorizonRun(tasks, config), []

    def fake(this, task, point, rate, seed, first, last, state=None):
        seen.append((seed, point.tolist(), rate))
        return {1e-4: 3.0, 1e-3: math.nan, 1e-2: 1.0, 1e-1: 2.0}[rate], {}

    monkeypatch.setattr(HorizonRun, "run", fake)
    monkeypatch.setattr(Pairs, "gradient", lambda pairs: torch.ones_like(pairs.spread))
    run.step()
    compared = seen[:4]
    assert {rate for _, _, rate in compared} == set(config.rates) and {rate for _, _, rate in seen[4:]} == {1e-2}
    assert len({seed for seed, _, _ in compared}) == 1 and not any(any(point) for _, point, _ in compared)
    while run.steps < 4:
        run.step()
    # Adam moves by its rate along a constant gradient: 0.1 in the first of two updates, half of it in the second
    torch.testing.assert_close(run.centre, torch.full_like(run.centre, -0.15), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "changes", [{}, {"truncation": 2, "steps": 6}, {"networks": 3, "rates": [1e-4, 1e-3], "shaping": "none"}]
)
def test_interrupted_in_a_pair_and_killed_it_resumes_bit_identically(settings, monkeypatch, changes) -> None:
    meta_train(settings("whole", **changes))
    run, calls = HorizonRun.run, []

    def stops(this, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:  # the second member of the third pair, or earlier if rates are compared first
            os.kill(os.getpid(), signal.SIGINT)
        if len(calls) == 9:
            raise MemoryError
        return run(this, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(HorizonRun, "run", stops)
        with pytest.raises(Interrupted, match="`resume=True`"):
            meta_train(settings("parts", **changes))
        with pytest.raises(MemoryError):
            meta_train(settings("parts", resume=True, **changes))
    assert not (settings("parts").out / "tuner.safetensors").exists()
    meta_train(settings("parts", resume=True, **changes))
    assert bytes_of(settings("whole")) == bytes_of(settings("parts"))


def test_a_snapshot_with_another_order_of_batches_is_refused(settings) -> None:
    run = HorizonRun(load(config := settings())[1], config)
    old = {name: value for name, value in run.state().items() if name != "order"}
    with pytest.raises(UserError, match="another order of batches of similar length"):
        run.load(old)


def test_the_scales_follow_the_loss(settings, monkeypatch) -> None:
    """If the held-out loss were the first scale, the search would lower it; two networks per block serve as well."""
    for networks in (0, 4):
        config = settings(steps=60, pairs=4, lr_sigma=0.2, shaping="rank", networks=networks)
        _, tasks = load(config)

        def fake(run, task, point, rate, seed, first, last, state=None):
            made = run._scale(run.networks(point))
            made.bind(run.tensors)
            sigma = made.sigma(made.init() | {"scale/statistics": run.statistics})
            return float(sigma[0] * normalisation(sigma, made.counts)), {}

        monkeypatch.setattr(HorizonRun, "run", fake)
        run = HorizonRun(tasks, config)
        before = float(run.sigma()[0])
        while run.steps < config.steps:
            run.step()
        assert float(run.sigma()[0]) < 0.6 * before


def test_several_heads_on_one_encoder_and_frozen_layers(settings) -> None:
    """Label phrases of tasks with other numbers of classes; what is frozen keeps the RMS rule in the file."""
    changes = {"kind": "bert", "head": "phrases", "train": ["*layer.1.*"], "steps": 2, "max_length": 32}
    config = settings(**changes)
    loaded, tasks = load(config)
    assert [task.model.classes for task in tasks] == [4, 2]
    assert next(tasks[0].model.parameters()) is next(tasks[1].model.parameters())
    for task in tasks:
        task.held_out()
        assert not any(part.training for part in task.model.modules()), "runs have dropout"
    tuner = meta_train(config)
    moved = {block.name for block, value in zip(tuner.info.blocks, tuner.pertnn.b2) if value != 0}
    assert moved == {name for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert tuner.fits((name, tuple(p.shape)) for name, p in loaded.model.named_parameters()).ok


def test_a_tuner_by_layer_is_used_with_the_tensors_that_it_was_trained_on(settings) -> None:
    """The frozen tensors of a layer belong to no network that runs use."""
    config = settings(blocks="layer", freeze=["*norm*"])
    loaded, tasks = load(config)
    tuner = make_tuner(HorizonRun(tasks, config), loaded)
    scale = tuner_scale(tuner, loaded.model.named_parameters())
    scale.bind(named_tensors(loaded.model))
    assert len(scale.known) == len(scale.blocks)
    select_trainable(loaded.model, [], [])
    scale = tuner_scale(tuner, loaded.model.named_parameters())
    with pytest.raises(UserError, match="is for all tensors of this block together, and others are trained here"):
        scale.bind(named_tensors(loaded.model))


def test_a_run_whose_scales_never_moved_says_so(settings) -> None:
    """Such an eps changes no number of float32: the runs of a pair end with one loss."""
    said = []
    for eps in (1e-300, 1e-3):
        console = Console(file=io.StringIO(), width=400)
        tuner = meta_train(settings(f"out{eps}", steps=2, eps=eps, task=["pico_topic"]), console=console)
        said.append("None of the 2 meta-steps moved the scales" in console.file.getvalue())
        assert ("result" in tuner.info.recipe) == said[-1]
    assert said == [True, False]


def test_losses_that_are_not_finite_are_counted(settings, monkeypatch) -> None:
    run, calls = HorizonRun.run, []

    def sometimes(this, *args, **kwargs):
        calls.append(1)
        found = run(this, *args, **kwargs)
        return (math.nan, found[1]) if len(calls) == 3 else found

    monkeypatch.setattr(HorizonRun, "run", sometimes)
    assert meta_train(settings()).info.recipe["skipped"] == 1
    monkeypatch.setattr(HorizonRun, "run", lambda *args, **kwargs: (math.nan, {}))
    with pytest.raises(metazo.runs.monitor.Diverged, match="in 4 of 4 pairs of runs; lower `rates`"):
        meta_train(settings("diverged"))
    with pytest.raises(UserError, match="No learning rate of `rates` 0.1, 1 ends with a finite loss on task 'pico_"):
        meta_train(settings("rates", rates=[0.1, 1.0]))
    assert not settings("rates").out.exists()


def test_runs_that_explode_are_no_result_though_their_loss_is_finite(settings) -> None:
    """The normalisation layers hide weights of any size: the scores are uniform, and no scale is better than another."""
    config = replace(settings(rates=[10.0], steps=2), model="pico")
    with pytest.raises(metazo.runs.monitor.Diverged, match="in 2 of 2 pairs of runs; lower `rates`"):
        meta_train(config)
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert {round(row["loss"], 4) for row in rows} <= {round(math.log(classes), 4) for classes in (2, 4)}
    with pytest.raises(UserError, match="`rates` 5, 10 ends with a finite loss on task 'pico_.* without divergence"):
        meta_train(replace(config, rates=[5.0, 10.0], out=config.out / "rates"))


@pytest.mark.parametrize("shaping", ["rank", "none"])
def test_a_run_that_explodes_is_worse_than_one_that_does_not(settings, monkeypatch, shaping) -> None:
    """By its rank; a difference without ranks would have no meaning."""
    losses = iter([1.0, 1e6, 1e6, 1e7])
    monkeypatch.setattr(HorizonRun, "run", lambda *args, **kwargs: (next(losses), {}))
    run = HorizonRun(load(config := settings(shaping=shaping))[1], config)
    assert [run.step().skipped, run.step().skipped] == [shaping == "none", True]
    assert run.pairs.losses.tolist() == [[1.0, math.inf], [math.inf, math.inf]]


@pytest.mark.parametrize("changes", [{}, {"horizon": 20}, {"task": ["pico_span"]}])
def test_the_plan_counts_forward_passes(settings, monkeypatch, changes) -> None:
    """Of a long horizon too, in which each of the pairs begins one run and tries the rates of its task. No answer is
    generated."""
    config = settings(truncation=2, rates=[1e-4, 1e-3], **changes)
    plan = dry(config)
    loaded, _ = load(config)
    calls: list[int] = []
    forward = type(loaded.model).forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    counted.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(type(loaded.model), "forward", counted)
    load(config)  # which looks at the model with short rows
    loading = len(calls)
    meta_train(config)
    assert plan.forwards == len(calls) - 2 * loading


def test_a_truncation_as_long_as_the_run_keeps_no_member(settings) -> None:
    whole, same, half = (dry(settings(truncation=steps)) for steps in (None, 4, 2))
    assert (whole.memory_bytes, whole.disk_bytes) == (same.memory_bytes, same.disk_bytes)
    assert half.memory_bytes > whole.memory_bytes and half.disk_bytes > whole.disk_bytes


def test_bad_settings_and_the_flags_of_the_command_line(settings, tmp_path: Path) -> None:
    for changes, message in (
        ({"horizon": 5, "truncation": 2}, "`truncation` 2 does not divide `horizon` 5"),
        ({"steps": 3}, "`steps` 3 is not a multiple of `pairs` 2"),
        ({"rates": []}, "`rates` is empty"),
        ({"rates": [-1.0]}, "`rates` must be above 0, not -1"),
        ({"task": []}, "`task` is missing"),
    ):
        with pytest.raises(UserError, match=message):
            settings(**changes)
    with pytest.raises(UserError, match="`batch_size` 99 is more than the 16 training examples"):
        meta_train(settings(batch_size=99))
    given = {"model": "pico", "task": ["pico_topic"], "out": tmp_path / "x"}
    found = _settings(None, None, given | {"objective": "horizon", "pairs": 3, "rates": [1e-4]})
    assert isinstance(found, HorizonConfig) and (found.pairs, found.steps) == (3, 120)
    assert isinstance(_settings("scale", None, given), MetaConfig)
    for words, extra in (
        ("--objective horizon", {"objective": "horizon", "teacher": "adamw"}),
        ("--learn scale", {"pairs": 3}),
    ):
        with pytest.raises(UserError, match=f"does not go with {words}; leave it out"):
            _settings(None, None, given | extra)
