"""Runs of two real processes, as torchrun starts them: the command line is called with its environment."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from metazo.errors import UserError
from metazo.io.processes import LostRank, joined, total
from metazo.models.load import load_model
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings, tune
from metazo.runs.interrupt import Interrupted
from metazo.settings import build
from metazo.steplog.format import scan
from metazo.tasks import prepare
from metazo.tasks.evaluate import evaluate
from metazo_cli.main import main
from tests import warm

SETTINGS: dict[str, Any] = {
    "task": "pico_sentiment", "steps": 6, "batch_size": 5, "train_examples": 8, "dev_examples": 8,
    "test_examples": 4, "eval_batch_size": 2, "eval_every": 3, "snapshot_every": 2, "lr": 1e-4, "rank_timeout": 250.0,
}  # fmt: skip
PROBES: dict[str, Any] = {"optimizer": "es", "method": {"population": 4}, "probe_ranks": 2}
ATOL = 1e-5  # of weights and losses after 6 steps, for another number of processes at the same batch


@pytest.fixture(scope="module", autouse=True)
def base(tiny: Callable[[str], Path]) -> None:
    """The runs are of a model of two layers."""
    SETTINGS["model"] = str(tiny("llama"))


def _config(out: Path, **settings: Any) -> FinetuneConfig:
    return build(FinetuneConfig, {**SETTINGS, **settings, "out": out})


def _stopped_at(step: int, by: int) -> Any:
    return lambda record: os.kill(os.getpid(), by) if record.step + 1 == step else None


def _main(arguments: list[str]) -> tuple[int, str]:
    sys.argv = ["metazo", *arguments]
    told = io.StringIO()
    with redirect_stdout(told), redirect_stderr(told), pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), told.getvalue()


def _process(rank: int, folder: Path, model: str, ports: list[int]) -> None:
    SETTINGS["model"] = model
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    said: dict[str, Any] = {}

    def meet() -> None:
        os.environ["MASTER_PORT"] = str(ports.pop())

    meet()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    said["examples"] = _main(["finetune", *flags, "--out", str(folder / "examples")])
    meet()
    found = tune(_config(folder / "probes", **PROBES, flush_every=1 + rank), plot=False)
    said["probes"] = {key: value.clone() for key, value in found.model.state_dict().items()}
    meet()
    try:
        tune(_config(folder / "stopped"), on_step=_stopped_at(3, signal.SIGTERM) if rank else None)
    except Interrupted as stopped:
        said["stopped"] = str(stopped)
    meet()
    said["resumed"] = _main(["finetune", "--resume", str(folder / "resumed")])
    for name, settings in {
        "small": {"batch_size": 1},
        "one process": {"optimizer": "first-order-sgd"},
        "in use": {},
        "other rows": {"task": str(_task(folder, rank))},
        "other settings": {"eval_batch_size": 2 + rank},
        "objective": {"objective": "accuracy"},
        "other objective": {"objective": ("accuracy", None)[rank], "probe_ranks": 2},
        "other file": {"objective": f"{_file(folder, rank)}:loss", "probe_ranks": 2},
        "other metric": {"task": str(_task(folder, rank, 0, f"metric: [{('accuracy', 'mcc')[rank]}]\n"))},
        "other base": {"model": str(_base(folder, rank)), "train": ["*norm*"]},
        "one folder": {"out": None} if rank else {},
    }.items():
        meet()
        out = {"out": folder / ("examples" if name == "in use" else name)}
        try:
            tune(build(FinetuneConfig, SETTINGS | out | settings), plot=False)
        except UserError as error:
            said[name] = str(error), error.shared
    meet()
    prepared = prepare("pico_sentiment", found.loaded, train=8, dev=8, test=4)
    with joined(250), pytest.raises(UserError) as otherwise:
        evaluate(found.model, prepared, "dev", batch_size=2 + rank, divided=True)
    said["other batches"] = str(otherwise.value), otherwise.value.shared
    meet()
    began = time.monotonic()
    try:
        tune(_config(folder / "killed"), on_step=_stopped_at(3, signal.SIGKILL) if rank else _kept(said))
    except LostRank as lost:
        said["killed"] = str(lost), time.monotonic() - began
    torch.save(said, folder / f"{rank}.pt")


def _task(folder: Path, rank: int, whose: int | None = None, more: str = "") -> Path:
    """A task of 40 rows, which are others on each rank, unless they are those of `whose`."""
    whose = rank if whose is None else whose
    folder = folder / f"task{rank}{more[:6]}"
    folder.mkdir()
    rows = [{"text": f"note {number} of {whose}", "label": number % 2} for number in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = folder / "notes.yaml"
    task.write_text(
        "name: notes\nkind: classification\nprompt: '{text}. It was {}.'\nlabels: [terrible, great]\n"
        f"files: {{train: rows.jsonl}}\n{more}"
    )
    return task


def _file(folder: Path, rank: int) -> Path:
    """An objective that is another on each rank."""
    file = folder / f"objective{rank}.py"
    file.write_text(f"def loss(model, batch):\n    return {1 + rank} * batch.loss(model)\n")
    return file


def _base(folder: Path, rank: int) -> Path:
    """A model whose frozen weights are others on each rank."""
    loaded = load_model(SETTINGS["model"])
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight.mul_(1 + rank)
    for part in (loaded.model, loaded.tokenizer):
        part.save_pretrained(folder / f"base{rank}")
    return folder / f"base{rank}"


def _kept(said: dict[str, Any]) -> Any:
    return lambda record: said.update(last=record.step)


def _free_port() -> int:
    """A port below those that Linux gives to connections, which would take one before it is used."""
    return next(port for port in random.SystemRandom().sample(range(15_000, 32_000), 100) if _free(port))


def _free(port: int) -> bool:
    with socket.socket() as one, suppress(OSError):
        one.bind(("127.0.0.1", port))
        return True
    return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    with pytest.raises(Interrupted):
        tune(_config(folder / "resumed"), on_step=_stopped_at(3, signal.SIGTERM))
    with warm.meetings(19) as ports:
        warm.ranks(_process, folder, SETTINGS["model"], ports, killed=1)
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "0.pt", weights_only=True)


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serial") / "run"
    run_settings(_config(out))
    return out


def _same(first: Path, second: Path) -> None:
    """The runs agree to ATOL in losses, evaluations and weights."""
    steps = [scan(out / "steps.jsonl").steps for out in (first, second)]
    for one, other in zip(*steps, strict=True):
        assert one.seeds == other.seeds and one.losses == pytest.approx(other.losses, abs=ATOL)
    dev = [
        [json.loads(line)["dev"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (first, second)
    ]
    for one, other in zip(*dev, strict=True):
        assert one == pytest.approx(other, abs=ATOL)
    weights = [load_file(out / "model" / "model.safetensors") for out in (first, second)]
    assert all(weights[0][name].allclose(weights[1][name], rtol=0, atol=ATOL) for name in weights[0])


def test_two_processes_divide_the_examples_of_a_batch(folder, said, serial):
    """Five examples are three and two; the losses are those of one process, and rank 0 alone says so."""
    code, told = said["examples"]
    assert code == 0 and told.count("step 6/6") == 1 and "config, step log" in told
    _same(folder / "examples", serial)
    summaries = [json.loads((out / "summary.json").read_text()) for out in (folder / "examples", serial)]
    assert summaries[0]["forwards"] == summaries[1]["forwards"]


def test_two_processes_divide_the_probes_bit_for_bit(folder, said, tmp_path):
    run_settings(_config(tmp_path / "run", **PROBES))
    first, second = (scan(out / "steps.jsonl") for out in (folder / "probes", tmp_path / "run"))
    assert first.steps == second.steps and first.end == second.end
    assert load_file(tmp_path / "run" / "model" / "model.safetensors").keys() <= said["probes"].keys()
    for name, value in load_file(tmp_path / "run" / "model" / "model.safetensors").items():
        assert value.equal(said["probes"][name]), name


def test_a_signal_to_one_process_stops_both_after_the_same_step_and_one_process_continues(folder, said, serial):
    assert said["stopped"].startswith("SIGTERM after step 4 of 6, which is saved")
    steps = scan(folder / "stopped" / "steps.jsonl").steps
    assert len(steps) == 4
    run_settings(_config(folder / "stopped", resume=True))
    assert scan(folder / "stopped" / "steps.jsonl").steps[:4] == steps
    _same(folder / "stopped", serial)


def test_two_processes_continue_the_run_of_one(folder, said, serial):
    code, told = said["resumed"]
    assert code == 0 and "processes 1 then and 2 now" in told and "Resuming after step 3" in told
    _same(folder / "resumed", serial)


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "small": "`batch_size` is 1 and 2 processes divide its examples: choose 2 or more",
        "one process": "`optimizer` first-order-sgd runs in one process",
        "in use": "already holds a run",
        "other rows": "The rows of the task differ between the processes",
        "other settings": "`eval_batch_size` is 2 on rank 0 and 3 on rank 1: give all processes of this run the same",
        "objective": "choose a `probe_ranks` of 2",
        "other objective": "`objective` is 'accuracy' on rank 0 and None on rank 1: give all processes of this run the same.",
        "other file": "`objective` is 'loss of a file with sha256 ",
        "other metric": """The task's `metric` is '["accuracy"]' on rank 0 and '["mcc"]' on rank 1""",
        "other base": "The frozen weights of the model differ between the processes",
        "other batches": "The processes divided the examples in different ways: give all of them the same `batch_size`.",
        "one folder": "Some processes of this run have an `out` and others have none: give it to all or none.",
    }.items(),
)
def test_a_run_that_processes_cannot_share_is_refused_on_all_of_them(folder, said, name, words):
    message, shared = said[name]
    assert words in message and shared
    assert name == "in use" or not (folder / name / "config.json").exists()


def test_a_dead_process_ends_the_run_with_one_sentence_and_one_process_continues(folder, said, serial):
    message, seconds = said["killed"]
    assert message.startswith("Another process of this run has ended") and f"--resume {folder / 'killed'}" in message
    assert seconds < 40 and said["last"] >= 2
    run_settings(_config(folder / "killed", resume=True))
    _same(folder / "killed", serial)


def _refused(*, rank: str, port: str | None, timeout: float = 60.0) -> UserError:
    """What a process of two says that cannot meet the other."""
    environment = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"} | (
        {"MASTER_PORT": port} if port else {}
    )
    with mock.patch.dict(os.environ, environment), pytest.raises(UserError) as caught, joined(timeout):
        pass
    return caught.value


def _meet_often(rank: int) -> None:
    for _ in range(20):
        with joined(20.0):
            assert total([1.0]) == [2.0]


def test_processes_meet_again_for_each_run_of_a_script():
    """A process found the address that another had in the meeting before, and waited there."""
    warm.ranks(_meet_often)


def test_processes_that_cannot_meet_say_why():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = _refused(rank="0", port=str(port))
    assert str(found) == (
        f"The processes of this run cannot meet at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT): another program uses the "
        "port: give torchrun another --master-port."
    )
    found = _refused(rank="1", port=str(_free_port()), timeout=1.0)
    assert "there was no answer within 1 seconds" in str(found) and found.of_rank == 1
    for found in (_refused(rank="1", port=None), _refused(rank="x", port="x")):
        assert "start them with torchrun or accelerate launch" in str(found) and found.of_rank is not None
