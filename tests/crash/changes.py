"""Kill a run at each change that it makes to its files, one after the other, resume it, and compare the bytes.

    python -m tests.crash.changes --case fzoo --case mezo-momentum --case first-order-adamw

In order, a run of 4 steps with a snapshot and an evaluation every 2 writes: the lock, config.json, the header of the log; at
an evaluation that is the best, the removal of best.safetensors and the new one; its line in metrics.jsonl; at a step its line
in the log, before the weights change; at a snapshot, after a sync of the log, the removal of the last one (if the log can be
replayed, otherwise at the end), the snapshot under another name, and its own name; at the end the removal of best weights and
snapshots (if the log can be replayed), model/ under another name, the removal of an earlier model/, its own name, the last
line of the log, curve.png, summary.json, and then the removal of what is left. Whatever is missing is made again from
what is before it in this order; what is too much after summary.json is removed when the run is looked at again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from metazo.io.terminal import Console
from tests.crash import harness
from tests.crash.deaths import at_change
from tests.crash.harness import CASES, Board, evidence, run, start, wait

SHORT = {"steps": 4, "eval_every": 2, "snapshot_every": 2}


def killed_at_changes(
    case: str, folder: Path, offset: int = 0, stride: int = 1, tell: Callable[[str], None] = print
) -> tuple[int, list[int]]:
    """Kill the run of a case at every `stride`-th change. Returns: the number of kills, and the changes whose kill made a
    difference: in the bytes of a file, or in the files that are there.
    """
    board, whole = Board(), folder / "whole"
    assert wait(start(case, whole, board, lambda: at_change(0, folder, lambda n: board.write(1, n)))) == 0
    wanted, changes, different = evidence(whole), board.read(1), []
    targets = range(1 + offset % stride, changes + 1, stride)
    for target in targets:
        out = folder / "run"
        code = wait(start(case, out, board, lambda target=target: at_change(target, folder)))
        assert code in (0, -signal.SIGKILL), (
            f"{case}: the run that dies at change {target} of {changes} ended with {code}"
        )
        assert wait(start(case, out, board, lambda: None)) == 0, f"{case}: it cannot be resumed after change {target}"
        if evidence(out) != wanted:
            different.append(target)
        print(f"{case}: change {target} of {changes}", file=sys.stderr, flush=True)
        for path in (out, out.with_name(f"{out.name}-path")):
            shutil.rmtree(path, ignore_errors=True)
    tell(
        f"{case}: {len(targets)} kills at {changes} changes, {len(targets) - len(different)} bit-identical {different}"
    )
    return len(targets), different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated; by default all")
    parser.add_argument("--offset", type=int, default=0, help="first change")
    parser.add_argument("--stride", type=int, default=1, help="every so many changes")
    parser.add_argument("--model", default="pico", help="folder of another model")
    options = parser.parse_args()
    harness.use(options.model)
    torch.set_num_threads(1)  # threads do not survive a fork
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    harness.COMMON.update(SHORT)
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        run("mezo", Path(name) / "warm", False, Console(quiet=True))
        for case in options.case or CASES:
            folder = Path(name) / case.replace(", ", "-")
            folder.mkdir()
            wrong += len(killed_at_changes(case, folder, options.offset, options.stride)[1])
            shutil.rmtree(folder)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
