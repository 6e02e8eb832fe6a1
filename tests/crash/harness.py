"""Kill real runs with SIGKILL, resume them, and compare their files with those of uninterrupted runs.

    python -m tests.crash.harness --kills 50 --seed 1 --results tests/crash/kills.json     # adds to the results
    (after an interruption, the same command leaves out the cases of that seed that are in the results)
    python -m tests.crash.harness --render docs/guarantees.md --results tests/crash/kills.json

The parent imports everything and runs one warm-up; each run is a child that it forks, so that a start costs a second
and not ten. A child dies in one of three ways:

    moment  the parent kills it at a random time from its start to past its end
    line    it kills itself at a random line of Python in metazo: within a step, an update, a replay, a save
    write   it kills itself in a random write, of which a random part reaches the file: a torn line, a torn snapshot

A run is killed one to three times, each time resumed, then left to end. Then its weights, step log, metrics (without
the clock) and summary must have the bytes of a run that was never killed, no step that was complete may be missing from
the log at any death, and each resume must start from all complete lines of the log.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

import metazo
from metazo.feedback.surrogates import MeanJacobian
from metazo.feedback.tuner import FeedbackTuner, describe
from metazo.io.terminal import Console
from metazo.meta.config import MetaConfig
from metazo.meta.train import meta_train
from metazo.models.load import load_model
from metazo.optimizers import METHODS, ZOOptimizer
from metazo.optimizers.first_order import FirstOrder
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.settings import build
from metazo.steplog.format import scan
from tests.crash.deaths import at_line, at_write
from tests.crash.table import MODES, lost, method_of, render, table

STEPS = 12
COMMON: dict[str, Any] = {
    "model": "pico", "task": "pico_sentiment", "steps": STEPS, "batch_size": 2, "train_examples": 12, "dev_examples": 4,
    "test_examples": 4, "eval_every": 4, "lr": 1e-4, "schedule": "cosine",
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "zo-finetuner": {"tuner": "random:1"},
    "lozo": {"scale": "rms", "method": {"interval": 4}},
    "lozo-m": {"method": {"interval": 4}},
    "mezo": {"dtype": "bfloat16"},
    "curvzo": {"keep": "last"},
    "mezo-svrg": {"method": {"interval": 3}},
    "mezo, compensated-8": {"dtype": "bfloat16", "precision": "compensated-8"},
    "mezo-adam, compensated-16": {"dtype": "float16", "precision": "compensated-16"},
}
SNAPSHOTS = ("mezo-adam", "lozo-m", "hizoo", "es")
"""Replayable methods whose runs have snapshots; by default their logs are replayed from the base model."""
PICTURED = ("fzoo",)
"""Cases whose runs draw curve.png at their end, which takes as long as a run of a tiny model."""
META: dict[str, Any] = {
    "model": "pico", "task": ["pico_topic"], "steps": 6, "batch_size": 2, "train_examples": 8, "save_every": 2,
}  # fmt: skip
CASES = [*METHODS, *(case for case in OWN if "," in case), "meta-train", "meta-train, recorded"]


def run(case: str, out: Path, resume: bool, console: Console) -> None:
    """The run of a case, in this process."""
    if case.startswith("meta-train"):
        recorded = {"record": out.with_name(out.name + "-path"), "record_every": 2} if "recorded" in case else {}
        meta_train(build(MetaConfig, META, recorded, {"out": out, "resume": resume}), console=console)
        return
    method = method_of(case)
    every = 5 if method in SNAPSHOTS or not METHODS[method].replayable else None
    settings = {**COMMON, "optimizer": method, "snapshot_every": every, **OWN.get(case, {})}
    if METHODS[method].needs_tuner and "tuner" not in settings:
        settings["tuner"] = str(random_maps(out.with_name("maps.safetensors")))
    run_settings(build(FinetuneConfig, settings, {"out": out, "resume": resume}), console, plot=case in PICTURED)


def use(model: str) -> None:
    """Let the runs have another model than pico: a smaller one is killed and resumed in the same places in less time."""
    COMMON["model"] = META["model"] = model


def random_maps(path: Path) -> Path:
    """A feedback tuner for the model, whose maps are random; all runs of a case share its file."""
    if not path.exists():
        model = load_model(COMMON["model"]).model
        info, width = describe(model, COMMON["model"]), model.config.hidden_size
        drawn, below = torch.Generator().manual_seed(0), range(len(info.blocks) - 1)
        down = {block: torch.randn(width, 2, generator=drawn) / width for block in below}
        up = {block: torch.randn(2, width, generator=drawn) / width for block in below}
        FeedbackTuner(MeanJacobian(down, up, dict.fromkeys(below, 0.5)), info).save(path)
    return path


def evidence(out: Path) -> dict[str, bytes]:
    """The files that must be equal, without times, memory, and figures of the environment."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name, data = path.relative_to(out).as_posix(), path.read_bytes()
        if name in ("metrics.jsonl", "summary.json"):
            rows = [json.loads(line) for line in ([data] if name == "summary.json" else data.splitlines())]
            for row in rows:
                for clock in ("seconds", "peak_memory_bytes"):
                    row.pop(clock, None)
            data = json.dumps(rows).encode()
        if name != "config.json" and not name.endswith(".png"):
            found[name] = data
    return found


# -- parent and children -----------------------------------------------------------------------------------------------


class Board:
    """Numbers that a child passes to its parent: steps completed, lines run, writes made."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 24)

    def write(self, place: int, value: int) -> None:
        struct.pack_into("q", self.memory, 8 * place, value)

    def read(self, place: int) -> int:
        return struct.unpack_from("q", self.memory, 8 * place)[0]


def start(case: str, out: Path, board: Board, arm: Callable[[], None]) -> int:
    """Start a child that runs the case, or resumes it if it can be resumed. Returns: its process id."""
    sys.stdout.flush()
    board.write(0, 0)
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        told = (out.parent / f"{out.name}.txt").open("w")
        for cls in (ZOOptimizer, FirstOrder):
            _report_steps(cls, board)
        arm()
        run(case, out, (out / "config.json").exists(), Console(file=told, width=200))
        code = 0
    except BaseException as error:
        print(f"{case}: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _report_steps(cls: Any, board: Board) -> None:
    step = cls.step

    def reporting(self: Any, *args: Any, **kwargs: Any) -> float:
        loss = step(self, *args, **kwargs)
        board.write(0, self.steps)
        return loss

    cls.step = reporting


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Case:
    """One case: an uninterrupted run, and runs that are killed."""

    def __init__(self, name: str, folder: Path, dice: random.Random):
        self.name, self.folder, self.dice, self.board, self.runs = name, folder, dice, Board(), 0
        self.reference = folder / "whole"
        began = time.monotonic()

        def count() -> None:
            at_line(0, lambda n: self.board.write(1, n))
            at_write(0, 0.0, lambda n: self.board.write(2, n))

        assert wait(start(name, self.reference, self.board, count)) == 0, f"{name}: the run that is not killed fails"
        self.seconds = time.monotonic() - began
        self.lines, self.writes = self.board.read(1), self.board.read(2)

    def killed_run(self, most: int) -> list[dict[str, Any]]:
        """A run that is killed up to `most` times (at most three), resumed and completed. Returns: one row per kill."""
        self.runs += 1
        out, rows = self.folder / f"run{self.runs}", []
        for _ in range(self.dice.randint(1, min(3, most))):
            row = self._kill(out)
            self._resumed(out, rows)
            if row is None:
                break  # it ended before it was to be killed
            rows.append(row)
        assert wait(start(self.name, out, self.board, lambda: None)) == 0, f"{self.name}: {out} cannot be resumed"
        self._resumed(out, rows)
        same = evidence(out) == evidence(self.reference)
        shutil.rmtree(out)
        shutil.rmtree(out.with_name(out.name + "-path"), ignore_errors=True)
        for row in rows:
            row["identical"] = same
        return rows

    def _kill(self, out: Path) -> dict[str, Any] | None:
        mode = self.dice.choice(MODES)
        line, write = self.dice.randint(1, self.lines), self.dice.randint(1, self.writes)
        share, moment = self.dice.random(), self.dice.uniform(0.1, 1.2) * self.seconds
        arms = {"moment": lambda: None, "line": lambda: at_line(line), "write": lambda: at_write(write, share)}
        child = start(self.name, out, self.board, arms[mode])
        if mode == "moment":
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
        code = wait(child)
        assert code in (0, -signal.SIGKILL), f"{self.name}: the run ended with {code}, killed by {mode}"
        if code == 0:
            return None
        found = scan(out / "steps.jsonl") if (out / "steps.jsonl").exists() else None
        assert not (found and found.damage), f"{self.name}: {found and found.damage}"
        return {
            "case": self.name,
            "mode": mode,
            "steps completed": self.board.read(0),
            "steps in the log": len(found.steps) if found else 0,
            "torn bytes": found.torn if found else 0,
            "left behind": len(list(out.glob(".*.tmp"))) if out.is_dir() else 0,
        }

    def _resumed(self, out: Path, rows: list[dict[str, Any]]) -> None:
        """Add to the last death the step from which the next child resumed, if it reported one."""
        told = re.search(r"Resuming after step (\d+)|is complete", (out.parent / f"{out.name}.txt").read_text())
        if rows and told:
            rows[-1]["resumed after step"] = int(told[1] or rows[-1]["steps in the log"])


def kill_runs(
    kills: int,
    seed: int,
    cases: list[str],
    tell: Callable[[str], None] = print,
    done: Collection[str] = (),
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """`kills` kills in all, divided equally among the cases up to a remainder. The kills of a case depend only on its name
    and the seed. Cases in `done` are left out; `keep` gets the rows of each case when it ends. Returns: one row per kill.
    """
    rows = []
    with tempfile.TemporaryDirectory() as name:
        torch.set_num_threads(1)  # threads do not survive a fork: neither OpenMP's nor those that load weights
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
        run("mezo", Path(name) / "warm", False, Console(quiet=True))
        share = {case: kills // len(cases) for case in cases}
        for case in random.Random(seed).sample(cases, kills % len(cases)):
            share[case] += 1
        for case in cases:
            if not share[case] or case in done:
                continue
            folder = Path(name) / case.replace(", ", "-")
            folder.mkdir()
            harness, mine = Case(case, folder, random.Random(f"{seed} {case}")), []
            while len(mine) < share[case]:
                mine += harness.killed_run(share[case] - len(mine))
            mine = [row | {"seed": seed} for row in mine]
            rows += mine
            keep(mine)
            torn, same = sum(row["torn bytes"] > 0 for row in mine), all(row["identical"] for row in mine)
            tell(f"{case}: {len(mine)} kills, {torn} torn, {sum(map(lost, mine))} steps lost, identical {same}")
            shutil.rmtree(folder)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated; by default all")
    parser.add_argument("--model", default="pico", help="folder of another model")
    parser.add_argument("--results", type=Path, required=True, help="JSON; kills are added to it")
    parser.add_argument("--render", type=Path, help="a page whose table is made anew")
    options = parser.parse_args()
    use(options.model)
    rows = json.loads(options.results.read_text())["kills"] if options.results.exists() else []

    def keep(more: list[dict[str, Any]]) -> None:
        rows.extend(more)
        text = ",\n".join(map(json.dumps, rows))
        options.results.write_text(f'{{"metazo": "{metazo.__version__}", "kills": [\n{text}\n]}}\n')

    if options.kills:
        done = {row["case"] for row in rows if row["seed"] == options.seed}
        kill_runs(options.kills, options.seed, options.case or CASES, lambda text: print(text, flush=True), done, keep)
    print(table(rows, CASES))
    if options.render:
        render(rows, CASES, options.render)


if __name__ == "__main__":
    main()
