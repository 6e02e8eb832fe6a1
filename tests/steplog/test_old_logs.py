"""Step logs of earlier versions replay to the same bits: old/ has runs on pico by earlier versions.

The last line of each log is the hash of the weights that the run ended with. CurvZO's settings of that time say
score="release", and LOZO's say how its probes were evaluated under the name `form`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from metazo.optimizers import OPTIMIZERS
from metazo.runs.replay import replay
from metazo.steplog.format import scan

LOGS = sorted((Path(__file__).parent / "old").glob("*.jsonl"))


@pytest.mark.parametrize("log", LOGS, ids=lambda path: path.stem)
def test_an_old_log_replays_to_the_bit(log):
    done = replay(log, "pico")
    assert done.identical and done.steps == 7
    assert done.weights == scan(log).end["weights"]


def test_the_logs_are_of_every_kind():
    found = {scan(log).header["method"] for log in LOGS}
    assert found >= {"mezo", "mezo-adam", "mezo-svrg", "lozo", "lozo-m", "loren", "fzoo", "curvzo", "hizoo"}
    assert found <= set(OPTIMIZERS) and len({scan(log).end["weights"] for log in LOGS}) == len(LOGS) == 22
