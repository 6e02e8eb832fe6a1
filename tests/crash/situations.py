"""Situations that a run must handle, each tried many times: two processes in one folder,
a lock of a killed process, a learning rate far too high, inputs that changed between two calls.

    python -m tests.crash.situations --tries 10 --seed 1 --results tests/crash/situations.json --render docs/guarantees.md

The parent imports everything; each process of a situation is a child that it forks, so that a start costs a second and
not ten. A try is right if exactly the promised outcome happened: see the functions' docstrings.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from metazo.comparisons.compare import compare
from metazo.comparisons.grid import Grid
from metazo.comparisons.packed import read_search
from metazo.errors import UserError
from metazo.io.lock import NAME as LOCK
from metazo.meta.config import MetaConfig
from metazo.meta.train import meta_train
from metazo.models.load import load_model
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.replay import replay
from metazo.settings import build
from metazo.steplog.format import encode, line, scan
from tests.comparisons.finished import read_results
from tests.crash import harness
from tests.crash.harness import COMMON, META, evidence

TASK = """
name: own
kind: generation
prompt: "{question} It is {}"
answer: answer
metric: exact_match
max_new_tokens: 4
files: {train: rows.jsonl}
"""
BEGIN, END = "<!-- situations: made by tests/crash/situations.py -->", "<!-- end of situations -->"


# -- processes -----------------------------------------------------------------------------------------------------------


def fork(work: Callable[[], Any], told: Path) -> int:
    """Start a child that does the work. It ends with 0, or with 2 and the message in `told` if the work is refused."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        try:
            work()
            code = 0
        except UserError as error:
            told.write_text(str(error))
            code = 2
        except BaseException as error:
            told.write_text(f"traceback: {error!r}")
    finally:
        os._exit(code)


def outcome(child: int, told: Path) -> tuple[int, str]:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, told.read_text() if told.exists() else ""


def refused(work: Callable[[], Any]) -> str:
    """The message with which the work is refused; empty if it is not refused."""
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def tune(out: Path, resume: bool = False, **settings: Any) -> dict[str, Any]:
    return run_settings(build(FinetuneConfig, COMMON, settings, {"out": out, "resume": resume}))


def meta(out: Path, resume: bool = False, **settings: Any) -> Any:
    return meta_train(build(MetaConfig, META, settings, {"out": out, "resume": resume}))


# -- two processes -------------------------------------------------------------------------------------------------------


def _pair(works: list[Callable[[], Any]], folder: Path, dice: random.Random) -> list[tuple[int, str]]:
    """Start two processes within half a second of each other."""
    children = []
    for number, work in enumerate(works):
        children.append((fork(work, folder / f"told{number}"), folder / f"told{number}"))
        if not number:
            time.sleep(dice.uniform(0, 0.5))
    return [outcome(*child) for child in children]


def _one_of_two(done: list[tuple[int, str]], words: tuple[str, ...]) -> bool:
    codes = sorted(code for code, _ in done)
    message = next((text for code, text in done if code == 2), "")
    return codes == [0, 2] and any(word in message for word in words)


def two_new_runs(folder: Path, dice: random.Random) -> bool:
    """`finetune --out` twice, with two seeds: one runs, the other is refused, and all files belong to the one that ran."""
    works = [lambda seed=seed: tune(folder / "run", seed=seed) for seed in (1, 2)]
    done = _pair(works, folder, dice)
    seed = json.loads((folder / "run/config.json").read_text())["seed"]
    tune(folder / "alone", seed=seed)
    words = (f"on {socket.gethostname()}", "already holds a run", "has a run that another process")
    return _one_of_two(done, words) and evidence(folder / "run") == evidence(folder / "alone")


def two_resumed_runs(folder: Path, dice: random.Random) -> bool:
    """`finetune --resume` twice: one continues, and the other is refused or finds the run complete; the files are right."""
    _die(lambda: tune(folder / "run"), folder / "run" / "steps.jsonl", 4)
    done = _pair([lambda: tune(folder / "run", resume=True)] * 2, folder, dice)
    tune(folder / "alone")
    right = _one_of_two(done, (f"on {socket.gethostname()}",)) or [code for code, _ in done] == [0, 0]
    return right and evidence(folder / "run") == evidence(folder / "alone")


def two_resumed_meta_runs(folder: Path, dice: random.Random) -> bool:
    """The same with `meta-train --resume`."""
    _die(lambda: meta(folder / "run"), folder / "run" / "metrics.jsonl", 2)
    done = _pair([lambda: meta(folder / "run", resume=True)] * 2, folder, dice)
    meta(folder / "alone")
    right = _one_of_two(done, (f"on {socket.gethostname()}",)) or [code for code, _ in done] == [0, 0]
    return right and evidence(folder / "run") == evidence(folder / "alone")


def two_recordings(folder: Path, dice: random.Random) -> bool:
    """Two runs with one `--record` folder: one records, the other is refused or takes the complete recording."""
    works = [lambda n=n: meta(folder / f"run{n}", record=folder / "path", record_every=2) for n in (1, 2)]
    done = _pair(works, folder, dice)
    meta(folder / "alone", record=folder / "whole", record_every=2)
    right = _one_of_two(done, (f"on {socket.gethostname()}",)) or [code for code, _ in done] == [0, 0]
    return right and evidence(folder / "path") == evidence(folder / "whole")


def _die(work: Callable[[], Any], file: Path, lines: int) -> None:
    """Start a child, and kill it when the file has that many lines."""
    child = fork(work, file.parent.with_name("died"))
    while not file.exists() or file.read_bytes().count(b"\n") < lines:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def a_lock_that_is_left(folder: Path, dice: random.Random) -> bool:
    """kill -9 leaves the lock's file, which does not stop the next process."""
    _die(lambda: tune(folder / "run"), folder / "run" / "steps.jsonl", dice.randint(1, 10))
    left = (folder / "run" / LOCK).exists()
    tune(folder / "run", resume=True)
    tune(folder / "alone")
    return left and not (folder / "run" / LOCK).exists() and evidence(folder / "run") == evidence(folder / "alone")


GRID: dict[str, Any] = {
    "model": "pico", "tasks": ["pico_topic"], "budget": 8, "seeds": 1, "extensions": 0,
    "columns": [{"name": "sgd", "optimizer": "first-order-sgd", "lrs": [1e-3, 1e-2]}],
    "config": {"train_examples": 16, "dev_examples": 8, "test_examples": 8, "max_length": 48, "batch_size": 4},
}  # fmt: skip


def a_comparison_that_is_asked_to_stop(folder: Path, dice: random.Random) -> bool:
    """SIGTERM to the whole process group while workers start or run: no cell counts as failed, no search has used
    fewer than its runs, and the same command does the rest.
    """
    grid = build(Grid, GRID, {"out": folder / "results"})

    def work() -> None:
        os.setsid()
        compare(grid)

    child = fork(work, folder / "told")
    while not any("spawn_main" in " ".join(worker.cmdline()) for worker in psutil.Process(child).children()):
        time.sleep(0.01)
    time.sleep(dice.uniform(0, 20))
    os.killpg(child, signal.SIGTERM)
    code, _ = outcome(child, folder / "told")
    before = list(read_results(grid.out)) if list(grid.out.glob("cells/*/*/*.json")) else []
    whole = all(result.finished for result in before)
    decided = all(len(search.losses) == 2 for columns in read_search(grid.out).values() for search in columns.values())
    again = outcome(fork(lambda: compare(grid), folder / "again"), folder / "again")
    after = list(read_results(grid.out))
    return code != 2 and whole and decided and again[0] == 0 and len(after) == 3 and all(r.finished for r in after)


# -- rates far too high --------------------------------------------------------------------------------------------------


def a_rate_far_too_high(folder: Path, dice: random.Random) -> bool:
    """The run ends with an error that names the rate and no model, or with weights that have neither grown a hundredfold
    nor a loss on dev far above the first.
    """
    optimizer = dice.choice(
        ["mezo", "lozo", "mezo-momentum", "mezo-adam", "fzoo", "first-order-sgd", "first-order-adamw"]
    )
    lr, keep = 10 ** dice.uniform(0, 29), dice.choice(["best", "last"])
    settings = {"optimizer": optimizer, "lr": lr, "keep": keep, "seed": dice.randrange(10**6), "schedule": "constant"}
    try:
        summary = tune(folder / "run", **settings)
    except UserError as error:
        named = "lower `lr`" in str(error) or "diverged" in str(error) or "lower `eps`" in str(error)
        return named and not (folder / "run/model").exists() and not scan(folder / "run/steps.jsonl").damage
    weights = torch.cat([p.detach().flatten() for p in load_model(str(folder / "run/model")).model.parameters()])
    first = torch.cat([p.detach().flatten() for p in load_model(COMMON["model"]).model.parameters()])
    return summary["dev"]["loss"] <= max(6, 10 * summary["before"]["loss"]) and weights.norm() <= 101 * first.norm()


def a_meta_rate_far_too_high(folder: Path, dice: random.Random) -> bool:
    """Meta-training ends with an error that names the rate and no tuner, or with a tuner whose networks are finite."""
    name, rate = dice.choice(["lr_meta", "teacher_lr"]), 10 ** dice.uniform(2, 29)
    settings = {name: rate, "seed": dice.randrange(10**6), "restart_every": 0, "clip": 1e9}
    try:
        tuner = meta(folder / "run", **settings)
    except UserError as error:
        return f"lower `{name}`" in str(error) and not (folder / "run/tuner.safetensors").exists()
    return all(bool(weight.isfinite().all()) for weight in tuner.pertnn.parameters())


# -- inputs that changed -------------------------------------------------------------------------------------------------


def _base(folder: Path) -> Path:
    found = load_model(COMMON["model"])
    found.model.save_pretrained(folder)
    found.tokenizer.save_pretrained(folder)
    return folder


def _edit(path: Path, key: str, value: Any) -> None:
    content = json.loads(path.read_text())
    content[key] = value
    path.write_text(json.dumps(content))


CONFIGURATION = {
    "hidden_act": "gelu",
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
}


def another_configuration(folder: Path, dice: random.Random) -> bool:
    """config.json of the base model changes: resume, replay, meta-train --resume and --trajectory name the field."""
    base, (key, value) = _base(folder / "base"), dice.choice(sorted(CONFIGURATION.items(), key=str))
    tune(folder / "done", model=str(base))
    _die(lambda: tune(folder / "run", model=str(base)), folder / "run" / "steps.jsonl", 4)
    recorded = {"model": str(base), "record": folder / "path"}
    _die(lambda: meta(folder / "meta", **recorded), folder / "meta" / "metrics.jsonl", 1)
    _edit(base / "config.json", key, value)
    messages = [
        refused(lambda: tune(folder / "run", resume=True, model=str(base))),
        refused(lambda: replay(folder / "done/steps.jsonl", str(base), folder / "again")),
        refused(lambda: meta(folder / "meta", resume=True, **recorded)),
        refused(lambda: meta(folder / "other", model=str(base), trajectory=folder / "path")),
    ]
    return all(key in message for message in messages) and not (folder / "again").exists()


def another_task(folder: Path, dice: random.Random) -> bool:
    """The file of the user's own task changes: the run is not resumed, and the message names the field or the data."""
    rows = [json.dumps({"question": f"What is {n} and {n}?", "answer": str(2 * n)}) for n in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "own.yaml").write_text(TASK)
    settings = {"task": str(folder / "own.yaml"), "eval_batch_size": 4}
    _die(lambda: tune(folder / "run", **settings), folder / "run" / "steps.jsonl", 3)
    changes = {
        "metric": ("metric: exact_match", "metric: f1"),
        "max_new_tokens": ("max_new_tokens: 4", "max_new_tokens: 5"),
        "prompt": ("It is {}", "It was {}"),
        "stop": ("answer: answer", "answer: answer\nstop: '.'"),
    }
    key = dice.choice([*sorted(changes), "data"])
    if key == "data":
        (folder / "rows.jsonl").write_text("\n".join(rows).replace("What", "Which"))
    else:
        (folder / "own.yaml").write_text(TASK.replace(*changes[key]))
    return key in refused(lambda: tune(folder / "run", resume=True, **settings))


def another_header(folder: Path, dice: random.Random) -> bool:
    """The header of a log is changed, with new checksums: no model is written."""
    tune(folder / "run", weight_decay=0.1)
    found = scan(folder / "run/steps.jsonl")
    changes = [
        ("rule", "momentum"),
        ("scale", "rms"),
        ("weight_decay", 0.5),
        ("noise", "rademacher"),
        ("lr", "nan"),
        ("c", 0),
    ]
    key, value = dice.choice(changes)
    header, steps = json.loads(json.dumps(found.header)), [encode(step) for step in found.steps]
    if key == "c":
        steps[3]["c"] = ["nan"]
    elif key == "lr":
        steps[3]["lr"] = [dice.choice(["nan", "inf"])]
    else:
        header["settings"][key] = value
    data, chain = b"", 0
    for record in [header, *steps, found.end]:
        text, chain = line(record, chain)
        data += text
    (folder / "forged.jsonl").write_bytes(data)
    return (
        bool(refused(lambda: replay(folder / "forged.jsonl", COMMON["model"], folder / "again")))
        and not (folder / "again").exists()
    )


SITUATIONS: dict[str, Callable[[Path, random.Random], bool]] = {
    "two `finetune --out` at once": two_new_runs,
    "two `finetune --resume` at once": two_resumed_runs,
    "two `meta-train --resume` at once": two_resumed_meta_runs,
    "two `--record` into one folder": two_recordings,
    "a lock that `kill -9` left": a_lock_that_is_left,
    "SIGTERM to `compare` and its workers at their start": a_comparison_that_is_asked_to_stop,
    "`finetune` at 1 to 1e29 as learning rate": a_rate_far_too_high,
    "`meta-train` at 100 to 1e29": a_meta_rate_far_too_high,
    "another config.json (resume, replay, meta-train, `--trajectory`)": another_configuration,
    "another task file or data (resume)": another_task,
    "another header, nan or inf in a log (replay)": another_header,
}


def tries(number: int, seed: int, names: list[str], tell: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Try each situation that many times. Returns: one row per try."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        torch.set_num_threads(1)  # threads do not survive a fork
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
        tune(Path(name) / "warm")
        for situation in names:
            for count in range(number):
                folder = Path(name) / "try"
                folder.mkdir()
                right = SITUATIONS[situation](folder, random.Random(f"{seed} {situation} {count}"))
                rows.append({"situation": situation, "seed": seed, "try": count, "right": right})
                shutil.rmtree(folder)
            mine = [row["right"] for row in rows if row["situation"] == situation]
            tell(f"{situation}: {sum(mine)} of {len(mine)}")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| situation | tries | as promised |", "|---|---|---|"]
    for situation in [*SITUATIONS, "all"]:
        mine = [row["right"] for row in rows if situation in ("all", row["situation"])]
        lines.append(f"| {situation} | {len(mine)} | {sum(mine)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=list(SITUATIONS), help="may be repeated; by default all")
    parser.add_argument("--model", default="pico", help="folder of another model")
    parser.add_argument("--results", type=Path, required=True, help="JSON; tries are added to it")
    parser.add_argument("--render", type=Path, help="a page whose table is made anew")
    options = parser.parse_args()
    harness.use(options.model)
    rows = json.loads(options.results.read_text()) if options.results.exists() else []
    if options.tries:
        rows += tries(
            options.tries, options.seed, options.only or list(SITUATIONS), lambda text: print(text, flush=True)
        )
        options.results.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    print(table(rows))
    if options.render:
        head, rest = options.render.read_text().split(BEGIN)
        options.render.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
