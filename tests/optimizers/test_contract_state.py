"""The contract: state, saving, replay, determinism, and processes that agree. See test_contract.py."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load, save

from metazo.errors import UserError
from metazo.step.record import Step
from tests import warm
from tests.optimizers.contract import NAMES, Toy, case, make, quadratic, take

every_method = pytest.mark.parametrize("name", NAMES)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
STEPS, MIDDLE = 9, 4


def start(name: str, dtype: torch.dtype, seed: int = 3):
    problem = quadratic(dtype)
    return problem, make(name, problem.named(), case(name).quadratic, seed=seed)


def same(a: Toy, b: Toy) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def run(name: str, dtype: torch.dtype, seed: int = 3) -> tuple[Toy, list[Step]]:
    problem, optimizer = start(name, dtype, seed)
    records = []
    for _ in range(STEPS):
        take(optimizer, problem)
        records.append(optimizer.last_step)
    return problem, records


@every_method
@both_dtypes
def test_a_record_that_could_not_be_written_is_written_by_the_next_call(name, dtype):
    """The state is that of one step, and the closure is not called again."""
    expected, records = run(name, dtype)
    problem, optimizer = start(name, dtype)
    written: list[Step] = []
    full = False

    def recorder(step: Step) -> None:
        if full:
            raise OSError("no space left on device")
        written.append(step)

    optimizer.recorder = recorder
    for _ in range(MIDDLE):
        take(optimizer, problem)
    before, full = problem.copies(), True
    with pytest.raises(OSError, match="no space left"):
        take(optimizer, problem)
    full = False
    assert (
        all(torch.allclose(a, b, atol=1e-5) for a, b in zip(problem.parameters(), before)) and optimizer.steps == MIDDLE
    )
    for save_state in (optimizer.state_dict, optimizer.tensors_state):  # which would count the step twice
        with pytest.raises(UserError, match="The last step is not recorded yet"):
            save_state()
    if optimizer.replayable:
        with pytest.raises(UserError, match="The last step is not recorded yet.*without `replay`"):
            optimizer.step(lambda: 1.0, replay=records[MIDDLE])
    evaluated = optimizer.forwards
    take(optimizer, problem)
    assert optimizer.forwards == evaluated and written[-1] == records[MIDDLE] and optimizer.steps == MIDDLE + 1
    for _ in range(MIDDLE + 1, STEPS):
        take(optimizer, problem)
    if dtype == torch.bfloat16:  # float32 weights in place keep the rounding of a probe that was removed by itself
        assert same(problem, expected) and written == records
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(problem.parameters(), expected.parameters()))


@every_method
def test_two_runs_are_equal_and_seeds_differ(name):
    first, records = run(name, torch.float32)
    second, others = run(name, torch.float32)
    assert same(first, second) and records == others
    assert not same(first, run(name, torch.float32, seed=4)[0])


@every_method
@both_dtypes
def test_save_and_load_in_mid_run(name, dtype):
    """After torch.save of state_dict, the rest of the run is bit-identical."""
    expected, records = run(name, dtype)
    problem, optimizer = start(name, dtype)
    for _ in range(MIDDLE):
        take(optimizer, problem)
    saved = io.BytesIO()
    torch.save({"model": problem.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    fresh, other = start(name, dtype)
    fresh.load_state_dict(loaded["model"])
    other.load_state_dict(loaded["optimizer"])
    assert (other.steps, other.forwards) == (optimizer.steps, optimizer.forwards)
    for step in range(MIDDLE, STEPS):
        take(other, fresh)
        assert other.last_step == records[step]
    assert same(fresh, expected)


@every_method
@both_dtypes
def test_state_as_safetensors(name, dtype):
    """`tensors_state` is the whole state, without pickles, and saving it does not change the run."""
    expected, records = run(name, dtype)
    problem, optimizer = start(name, dtype)
    for _ in range(MIDDLE):
        take(optimizer, problem)
    held = save({key: value.contiguous() for key, value in optimizer.tensors_state().items()})
    fresh, other = start(name, dtype)
    fresh.load_state_dict(problem.state_dict())
    other.load_tensors_state(load(held))
    for step in range(MIDDLE, STEPS):
        take(other, fresh)
        assert other.last_step == records[step]
    assert same(fresh, expected)


@every_method
@both_dtypes
def test_an_update_that_waits_changes_no_bit(name, dtype):
    """With `defer`, an update may be applied with the next step's probe; losses, weights and state are the same."""
    expected, records = run(name, dtype)
    problem, optimizer = start(name, dtype)
    optimizer.defer = True
    for step in range(STEPS):
        take(optimizer, problem)
        assert optimizer.last_step == records[step]
    assert (optimizer.weights.pending is not None) <= optimizer.deferrable
    optimizer.settle()
    assert optimizer.weights.pending is None and same(problem, expected)


@every_method
@both_dtypes
def test_replay_without_a_closure(name, dtype):
    expected, records = run(name, dtype)
    problem, optimizer = start(name, dtype)
    for group in optimizer.param_groups:
        group["lr"] *= 0.5  # the record's counts
    for record in records:
        take(optimizer, None, replay=record)
        assert optimizer.last_step == record
    assert same(problem, expected)


@every_method
def test_a_skipped_step_is_replayed_as_one(name):
    problem, optimizer = start(name, torch.bfloat16)
    records = []
    for step in range(6):
        take(optimizer, (lambda: float("nan")) if step == 2 else problem)
        records.append(optimizer.last_step)
    again, other = start(name, torch.bfloat16)
    for record in records:
        take(other, None, replay=record)
    assert same(problem, again)


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ends = {}
    for name in NAMES:
        problem, optimizer = start(name, torch.float64)
        share = 1.5 if rank == 0 else 0.5  # the part that differs between processes; the mean is the problem itself
        for _ in range(STEPS):
            take(optimizer, lambda: share * problem())
        ends[name] = problem.state_dict()
    torch.save(ends, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    warm.ranks(_process, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@every_method
def test_two_processes_agree(name, ends):
    """Each process has half of the data: both have bit-identical weights, those of one process with all of it."""
    one, two = (half[name] for half in ends)
    alone, _ = run(name, torch.float64)
    for key, value in alone.state_dict().items():
        assert torch.equal(one[key], two[key])
        torch.testing.assert_close(one[key], value, rtol=1e-6, atol=1e-8)


@every_method
@both_dtypes
def test_the_default_device_changes_nothing(name, dtype):
    """A caller's torch.set_default_device is not where a method keeps its state."""
    expected, there = start(name, dtype)
    for _ in range(STEPS):
        take(there, expected)
    problem = quadratic(dtype)
    with torch.device("meta"):
        optimizer = make(name, problem.named(), case(name).quadratic, seed=3)
        for _ in range(MIDDLE):
            take(optimizer, problem)
        saved, optimizer = optimizer.state_dict(), make(name, problem.named(), case(name).quadratic, seed=3)
        optimizer.load_state_dict(saved)
        for _ in range(MIDDLE, STEPS):
            take(optimizer, problem)
    assert same(problem, expected)
    places = [{key: value.device for key, value in each.zo_state.items()} for each in (optimizer, there)]
    assert places[0] == places[1]


def test_modules_that_are_imported_under_another_default_device_work():
    found = importlib.util.find_spec("metazo.noise.cpu")
    with torch.device("meta"):
        found.loader.exec_module(importlib.util.module_from_spec(found))
