"""LOREN and CurvZO as published, replayed: see test_golden.py."""

from __future__ import annotations

import torch

from metazo.optimizers.curvzo import CurvZO
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
        # without weight decay, a changes by 1e-10 of itself: its change is compared as well as its value
        torch.testing.assert_close(found - start[name], expected - start[name], rtol=1e-6, atol=1e-14)


def test_curvzo_release():
    golden = recording("curvzo_release")
    problem, h = Problem(golden.folder("init")), golden.hyperparameters
    optimizer = CurvZO(
        problem.named(),
        budget=h["ratio"],
        floor=h["ratio"] / 2,
        beta=h["beta"],
        magnitude_beta=h["gbeta"],
        adapt_every=h["every"],
        score="release",
        **common(golden),
    )
    state = optimizer.tensors_state()
    optimizer.load_tensors_state(state | {"score": torch.full_like(state["score"], h["s0"])})
    seen = []
    take = optimizer.update

    def watched(state, step, seeds, losses):
        update = take(state, step, seeds, losses)
        seen.append({name: state[name].clone() for name in ("pi", "selected", "score", "fraction")})
        return update

    optimizer.update = watched
    follow(golden, optimizer, problem)
    assert [s["selected"].nonzero().flatten().tolist() for s in seen] == golden.metadata["selected"]
    for name, recorded, rtol in (("pi", "pi", 1e-6), ("score", "scores", 1e-6), ("fraction", "fraction", 1e-9)):
        found = torch.stack([s[name] for s in seen])
        expected = torch.tensor(golden.metadata[recorded], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=rtol, atol=0)
