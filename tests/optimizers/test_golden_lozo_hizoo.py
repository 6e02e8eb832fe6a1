"""LOZO, LOZO-M and HiZOO against recorded trajectories (tests/golden/README.md)."""

from __future__ import annotations

import pytest
import torch

from metazo.optimizers import LOZO, LOZOM, HiZOO
from tests.optimizers.test_golden import common, follow, recording
from tests.problem import Problem


@pytest.mark.parametrize("name", ["lozo", "lozo_m"])
@pytest.mark.parametrize(("mode", "compat"), [("corrected", "paper"), ("official", "official")])
def test_lozo(name, mode, compat):
    golden = recording(f"{name}_{mode}")
    problem, h = Problem(golden.folder("init")), golden.hyperparameters
    own = {"rank": h["rank"], "interval": h["step_interval"], "compat": compat}
    if name == "lozo":
        follow(golden, LOZO(problem.named(), **own, **common(golden)), problem)
    else:
        follow(golden, LOZOM(problem.named(), momentum=h["beta1"], **own, **common(golden)), problem)


def test_modes_of_lozo_differ():
    """Replaying a recording of a fault with the correct method must fail; otherwise the recordings prove nothing."""
    golden = recording("lozo_official")
    problem, h = Problem(golden.folder("init")), golden.hyperparameters
    optimizer = LOZO(problem.named(), rank=h["rank"], interval=h["step_interval"], **common(golden))
    with pytest.raises(AssertionError):
        follow(golden, optimizer, problem)


def test_hizoo():
    """The recorded code decays every tensor, hence official; its H is compared as well."""
    golden = recording("hizoo")
    problem = Problem(golden.folder("init"))
    smoothing = golden.hyperparameters["hessian_smooth"]
    optimizer = HiZOO(problem.named(), smoothing=smoothing, compat="official", **common(golden))
    follow(golden, optimizer, problem)
    for name, expected in golden.folder("hessian").items():
        torch.testing.assert_close(optimizer.tensors_state()[f"H/{name}"], expected, rtol=1e-9, atol=0)


def test_hizoo_modes_agree_where_nothing_decays_in_float64():
    golden = recording("hizoo")
    ends = []
    for compat in ("paper", "official"):
        problem = Problem(golden.folder("init"))
        settings = common(golden) | {"weight_decay": 0.0}
        optimizer = HiZOO(problem.named(), smoothing=1e-2, compat=compat, **settings)
        for step in range(5):
            idx, y = golden.batch(step)
            optimizer.step(lambda: problem(idx, y))
        ends.append(torch.cat([parameter.data.flatten() for parameter in problem.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-12)
