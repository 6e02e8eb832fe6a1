"""The user's own method is one file, named in METAZO_METHODS, and has all features of the library's methods."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import metazo
from metazo.comparisons import cell
from metazo.comparisons.cell import configuration
from metazo.comparisons.examine import examine
from metazo.comparisons.grid import Grid, Run
from metazo.errors import UserError
from metazo.optimizers import METHODS, OPTIMIZERS, registry
from metazo.optimizers.base import ZOOptimizer
from metazo.optimizers.mezo import MeZO
from metazo.optimizers.recomputed import Recomputed
from metazo.optimizers.registry import Case
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.replay import replay
from metazo.settings import build
from metazo.step.estimators import OneSided
from tests import warm
from tests.optimizers import test_contract
from tests.optimizers.killed import killed_at

ROOT = Path(__file__).parents[2]
TOY = '''
"""Clipped MeZO: the coefficient is at most `clip` times the mean of those before."""

from __future__ import annotations

import torch

from metazo.errors import UserError
from metazo.optimizers.base import Update, ZOOptimizer
from metazo.optimizers.registry import Case, register


@register
class Clipped(ZOOptimizer):
    """MeZO with a clipped coefficient.

    Args:
        headroom: largest coefficient in multiples of the mean of those before.
    """

    name, paper = "toy-clipped", "arXiv 2601.00001"
    contract_case = Case(quadratic=0.05, llama=3e-3)

    def __init__(self, params, lr: float = 1e-6, eps: float = 1e-3, *, headroom: float = 3.0, **common):
        if not headroom > 0:
            raise UserError(f"`headroom` must be above 0, not {headroom}.")
        self.headroom = headroom
        super().__init__(params, lr, eps, **common)

    def init(self, tensors):
        return {"mean": torch.zeros((), dtype=torch.float64)}

    def update(self, state, step, seeds, losses):
        (c,) = self.estimator.coefficients(losses, self.eps)
        mean = float(state["mean"])
        state["mean"].fill_(abs(c) if mean == 0 else 0.9 * mean + 0.1 * abs(c))
        return Update([max(-self.headroom * mean, min(c, self.headroom * mean)) if mean else c])
'''
RUN = {
    "model": "pico", "task": "pico_sentiment", "optimizer": "toy-clipped", "method": {"headroom": 2.0}, "lr": 1e-4, "steps": 8,
    "batch_size": 2, "train_examples": 8, "dev_examples": 4, "test_examples": 0, "snapshot_every": 3, "eval_every": 4,
    "keep": "last",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "toy_clipped.py"
    path.write_text(TOY)
    before = os.environ.get(registry.VARIABLE)
    os.environ[registry.VARIABLE] = str(path)
    registry.load_entry(str(path))
    yield path
    for table in (METHODS, OPTIMIZERS):
        table.pop("toy-clipped")
    os.environ.pop(registry.VARIABLE) if before is None else os.environ.update({registry.VARIABLE: before})


def run(out: Path, **extra) -> Path:
    run_settings(build(FinetuneConfig, RUN, {"out": out}, extra))
    return out


def test_the_contract_suite_does_as_a_class_declares(table):
    for cls in (Free, OfModules):
        registry.register(cls)
    for check in (
        test_contract.test_update_lies_along_the_probes,
        test_contract.test_a_block_scale_multiplies_probe_and_update,
    ):
        check(Free.name)
        with pytest.raises(pytest.skip.Exception, match="give the method a test of its own"):
            check(OfModules.name)


def test_its_hyperparameter_is_a_flag():
    shown = warm.run("metazo", "finetune", "--help", environment={"COLUMNS": "200"})
    text = " ".join(shown.stdout.replace("│", " ").split())
    assert "--headroom" in text and "toy-clipped: 3.0" in text and "Largest coefficient" in text


def test_the_contract_suite_takes_it():
    """In a forked process, in which everything is imported, and without the slowest tests."""
    tests = [f"tests/optimizers/test_contract{part}.py" for part in ("", "_state", "_descent")]
    with tempfile.TemporaryFile("w+") as out:
        pid = os.fork()
        if pid == 0:
            os.chdir(ROOT)
            os.environ["METAZO_CONTRACT_METHODS"] = "toy-clipped"
            for name in [name for name in sys.modules if name.startswith("tests.optimizers")]:
                del sys.modules[name]
            with contextlib.redirect_stdout(out):
                failed = pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not saddle and not processes", *tests])
            out.flush()
            os._exit(failed)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        text = out.read()
    assert code == 0 and "[toy-clipped" in text and "100%" in text, text[-2000:]


def test_a_killed_run_resumes_and_a_log_replays_to_the_bit(tmp_path):
    whole = run(tmp_path / "whole")
    killed_at(4, run, tmp_path / "cut")
    cut = run(tmp_path / "cut", resume=True)
    assert replay(whole / "steps.jsonl", "pico", tmp_path / "again").identical
    weights = [
        (folder / "model.safetensors").read_bytes() for folder in (whole / "model", cut / "model", tmp_path / "again")
    ]
    assert weights[0] == weights[1] == weights[2]
    assert (whole / "steps.jsonl").read_bytes() == (cut / "steps.jsonl").read_bytes()


def test_it_is_a_cell_of_a_comparison(tmp_path):
    """The comparison lists it before it runs, gives it its own search, and runs it in a worker."""
    config = {key: RUN[key] for key in ("batch_size", "train_examples", "dev_examples")} | {"test_examples": 4}
    settings = {"model": "pico", "tasks": ["pico_topic"], "budget": 6, "seeds": 1, "out": tmp_path}
    grid = build(Grid, settings, {"config": config, "columns": [{"name": "toy-clipped", "options": {"headroom": 2.0}}]})
    ((_, facts),) = examine(grid).items()
    assert len(facts.lrs) == 3
    assert facts.hashes["method"]  # a change of its file makes its results those of another method
    (column,) = grid.resolved
    settings = Run("pico_topic", column, "seed", 0, 1e-4, 6).config(grid, tmp_path / "run")
    info = {
        "trained_weights": facts.trained,
        "configuration": configuration(settings),
        "status": "finished",
        "reason": None,
    }
    result = cell.run(cell.Job(settings, info, trains=True))
    assert result.run_info["status"] == "finished" and result.train_info["forwards"] == 6, result.run_info["reason"]
    assert result.run_info["configuration"]["method"] == {"headroom": 2.0}


class Several(ZOOptimizer):
    """Three queries and theta, which are in the hook alone."""

    name = "toy-several"

    def estimator_for(self, state, step):
        return OneSided(3)


class Growing(ZOOptimizer):
    """A query more per step, by its state, which nobody knows before."""

    name = "toy-growing"

    def init(self, tensors):
        return {"queries": torch.ones((), dtype=torch.int64)}

    def estimator_for(self, state, step):
        return OneSided(int(state["queries"]))

    def update(self, state, step, seeds, losses):
        found = super().update(state, step, seeds, losses)
        state["queries"] += 1
        return found


class Looked(Recomputed):
    """One evaluation per step."""

    name = "toy-looked"

    def __init__(self, params, lr: float = 1e-3, **common):
        super().__init__(params, lr, **common)

    def look(self, closures):
        return sum(float(closure()) for closure in closures) / len(closures), True

    def descend(self, found, rates): ...


class Free(ZOOptimizer):
    """MeZO."""

    name = "toy-free"
    contract_case = Case(along="free")


class OfModules(ZOOptimizer):
    """MeZO that asks for the model."""

    name, needs_model = "toy-modules", True


@pytest.fixture
def table():
    yield
    for cls in (Several, Growing, Looked, Free, OfModules):
        METHODS.pop(cls.name, None), OPTIMIZERS.pop(cls.name, None)


@pytest.mark.parametrize(("cls", "forwards", "steps", "taken"), [(Several, 22, 5, 20), (Looked, 5, 5, 5)])
def test_a_budget_pays_for_the_probes_that_a_step_has(table, cls, forwards, steps, taken):
    settings = {
        key: value for key, value in RUN.items() if key not in ("model", "task", "optimizer", "method", "steps")
    }
    run = metazo.finetune("pico", "pico_sentiment", cls, forwards=forwards, **settings)
    assert (run.summary["steps"], run.summary["forwards"], run.summary["notes"]) == (steps, taken, [])


def test_a_run_over_its_budget_says_so_and_is_no_result_of_a_comparison(table, tmp_path):
    settings = {
        key: value for key, value in RUN.items() if key not in ("model", "task", "optimizer", "method", "steps")
    }
    run = metazo.finetune("pico", "pico_sentiment", Growing, forwards=8, **settings)
    assert (run.summary["steps"], run.summary["forwards"]) == (4, 2 + 3 + 4 + 5)
    assert (
        "took 14 forward passes, and `forwards` is 8: the steps of toy-growing took more than its"
        in (run.summary["notes"][-1])
    )
    own = {key: value for key, value in RUN.items() if key not in ("method", "steps")}
    config = build(FinetuneConfig, own, {"optimizer": "toy-growing", "forwards": 8})
    info = {"trained_weights": 1, "configuration": configuration(config), "status": "finished", "reason": None}
    result = cell.run(cell.Job(replace(config, out=tmp_path / "run"), info, trains=True))
    assert (
        result.run_info["status"] == "failed"
        and "took 14 forward passes, and every run has 8" in (result.run_info["reason"])
    )


def test_it_is_a_row_of_the_capability_table(monkeypatch):
    spec = importlib.util.spec_from_file_location("capabilities", ROOT / "benchmarks" / "capabilities.py")
    assert spec is not None and spec.loader is not None
    capabilities = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(capabilities)
    monkeypatch.setattr(capabilities, "sized", capabilities.tiny)  # memory on a small model: quicker
    cells = capabilities.probe("toy-clipped")
    assert cells["resume"] and cells["rms"] and cells["forwards"] == 2 and cells["source"] == "arXiv 2601.00001"
    assert "| `toy-clipped` | 2 |" in capabilities.table({"toy-clipped": cells})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ndef f(:\n    pass\n", r"SyntaxError: invalid syntax \(wrong.py, line 2\)\.$"),
        ("x = 1\n\nx = {}['key']\n", r"KeyError: 'key' in line 3 of wrong.py\.$"),
        ("import no_such_module\n", r"No module named 'no_such_module' in line 1 of wrong.py\.$"),
    ],
)
def test_a_file_that_fails_is_one_sentence(tmp_path, text, said):
    (tmp_path / "wrong.py").write_text(text)
    with pytest.raises(UserError, match=f"METAZO_METHODS names .*wrong.py', which cannot be imported: {said}"):
        registry.load_entry(str(tmp_path / "wrong.py"))


def test_a_module_that_fails_is_said_to_fail_in_its_own_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "bad_by_name.py").write_text("x = 1\n\n1 / 0\n")
    with pytest.raises(UserError, match=r"ZeroDivisionError: division by zero in line 3 of bad_by_name.py\.$"):
        registry.load_entry("bad_by_name")
    for name in ("no_such_module", "no_such_package.module"):
        with pytest.raises(UserError, match=rf"which cannot be imported: No module named '{name.split('.')[0]}'\.$"):
            registry.load_entry(name)


def test_its_base_may_be_named_as_in_a_script(tmp_path, monkeypatch):
    """`metazo.MeZO` asks for all methods while the file that METAZO_METHODS names is imported."""
    text = "import metazo\nfrom metazo.optimizers import register\n"
    text += "@register\nclass Mine(metazo.MeZO):\n    name = 'toy-mine'\n"
    (tmp_path / "toy_mine.py").write_text(text)
    monkeypatch.setenv("METAZO_METHODS", f"{tmp_path / 'toy_mine.py'} ,")
    registry.load()
    try:
        assert issubclass(METHODS["toy-mine"], MeZO) and metazo.Mine is METHODS["toy-mine"]
    finally:
        del METHODS["toy-mine"], OPTIMIZERS["toy-mine"]


def test_a_decorator_with_a_name_is_one_sentence():
    with pytest.raises(UserError, match=r"`register` stands alone above the class of a method, .* attribute `name`\.$"):
        registry.register("toy")


def test_a_hyperparameter_without_a_default_is_asked_for(tmp_path):
    text = TOY.replace("headroom: float = 3.0", "headroom: float").replace("toy-clipped", "toy-strict")
    (tmp_path / "toy_strict.py").write_text(text)
    registry.load_entry(str(tmp_path / "toy_strict.py"))
    try:
        with pytest.raises(
            UserError, match="`headroom` is missing: the constructor of toy-strict, in line 24 of toy_strict.py,"
        ):
            run_settings(
                build(FinetuneConfig, RUN | {"optimizer": "toy-strict", "method": {}, "out": tmp_path / "run"})
            )
    finally:
        for table in (METHODS, OPTIMIZERS):
            table.pop("toy-strict")


def test_names_are_taken_once_and_entries_must_import(tmp_path):
    with pytest.raises(UserError, match="'mezo' is taken"):
        registry.register(type("Other", (MeZO,), {"name": "mezo"}))
    with pytest.raises(UserError, match="no name"):
        registry.register(type("Nameless", (MeZO,), {"name": ""}))
    with pytest.raises(UserError, match="cannot be imported"):
        registry.load_entry(str(tmp_path / "none.py"))
    with pytest.raises(UserError, match="no_such_module"):
        registry.load_entry("no_such_module.at_all")
