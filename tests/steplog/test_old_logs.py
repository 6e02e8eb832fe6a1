"""Step logs of earlier versions replay to the same bits: old/ has runs on pico by earlier versions.

The last line of each log is the hash of the weights that the run ended with. CurvZO's settings of that time say
score="release", and LOZO's say how its probes were evaluated under the name `form`.

The runs were on Intel processors with AVX-512. Methods that compute with torch's sums, products and roots have other last bits
if torch's vectors are of another width or MKL takes another path, as it does on an AMD EPYC with AVX-512; those that use
metazo's kernels alone have the same bits everywhere.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from metazo.optimizers import OPTIMIZERS
from metazo.runs.machine import processor
from metazo.runs.replay import replay
from metazo.steplog.format import scan

LOGS = sorted((Path(__file__).parent / "old").glob("*.jsonl"))


SUMS: dict[str, float] = json.loads((Path(__file__).parent / "old" / "sums.json").read_text())
"""The sum of all weights of each run, with random signs: another number or order of steps changes it by 0.1 or more."""
BY_KERNELS = {"curvzo", "curvzo_release", "dominant_layer", "fzoo", "fzoo_official", "lozo", "lozo_activations"}
BY_KERNELS |= {"lozo_official", "mezo", "mezo_svrg"}
"""Logs whose replay has the same bits on every processor: measured on AVX-512 of both makers and AVX2, and with torch's plain
code.
"""
AS_RECORDED = torch.backends.cpu.get_cpu_capability() == "AVX512" and "Intel" in processor()


@pytest.mark.parametrize("log", LOGS, ids=lambda path: path.stem)
def test_an_old_log_replays_to_the_bit(log):
    done = replay(log, "pico")
    assert done.steps == 7
    if log.stem in BY_KERNELS or AS_RECORDED:
        assert done.identical and done.weights == scan(log).end["weights"]
    weights = np.concatenate([p.detach().double().flatten() for p in done.loaded.model.parameters()])
    signs = np.random.default_rng(0).choice([-1.0, 1.0], len(weights))
    assert signs @ weights == pytest.approx(SUMS[log.stem], rel=0, abs=2e-3)


def test_the_logs_are_of_every_kind():
    found = {scan(log).header["method"] for log in LOGS}
    assert found >= {"mezo", "mezo-adam", "mezo-svrg", "lozo", "lozo-m", "loren", "fzoo", "curvzo", "hizoo"}
    assert found <= set(OPTIMIZERS) and len({scan(log).end["weights"] for log in LOGS}) == len(LOGS) == 22
