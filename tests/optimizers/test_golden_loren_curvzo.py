"""LOREN and CurvZO as published, replayed: see test_golden.py."""

from __future__ import annotations

import torch

from metazo.optimizers.loren import LOREN
from tests.optimizers.test_golden import common, follow, recording
from tests.problem import Problem


def test_loren_official():
    golden = recording("loren_official")
    problem, h = Problem(golden.folder("init")), golden.hyperparameters
    optimizer = LOREN(
        problem.named(),
        queries=h["num_queries"],
        damping=h["damping"],
        lr_cov=h["lr_cov"],
        momentum=h["beta1"],
        compat="official",
        **common(golden),
    )
    start = golden.folder("a0")
    optimizer.load_tensors_state(optimizer.tensors_state() | {f"a/{name}": a for name, a in start.items()})
    follow(golden, optimizer, problem)
    for name, expected in golden.folder("a_final").items():
        found = optimizer.zo_state[f"a/{name}"]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
        # weight decay apart, a moves by 1e-10 of itself: its change is compared, not only its value
        torch.testing.assert_close(found - start[name], expected - start[name], rtol=1e-6, atol=1e-14)
