"""Trajectories recorded from the published code (tests/golden/README.md), replayed to a relative 1e-9 in float64."""

from __future__ import annotations

from pathlib import Path

import torch

from metazo.noise import TorchOrderNoise
from metazo.optimizers import MeZO, MeZOAdam, MeZOMomentum, ZOFinetuner, ZOOptimizer
from metazo.tuner.networks import PertNN
from metazo.tuner.scale import PUBLISHED_EMBEDDING_ROWS, TunerScale
from tests.problem import ORDER, Problem, Recording, read

FOLDER = Path(__file__).parents[1] / "golden"


def recording(name: str) -> Recording:
    return read(FOLDER / f"{name}.safetensors")


def published_noise(golden: Recording) -> TorchOrderNoise:
    """The experiment's numbers: recorded seeds, else those of the run's seed (0 if the recording names none)."""
    seed = golden.metadata.get("seed", golden.hyperparameters.get("seed", 0))
    return TorchOrderNoise(int(seed), seeds=golden.metadata.get("seeds"))


def follow(golden: Recording, optimizer: ZOOptimizer, problem: Problem, rtol: float = 1e-9) -> list:
    """Take the recorded steps and compare every snapshot; returns the step records."""
    snapshots, steps = golden.snapshots(), []
    for step in range(int(golden.metadata["steps"])):
        idx, y = golden.batch(step)
        optimizer.step(lambda: problem(idx, y))
        steps.append(optimizer.last_step)
        for name, parameter in problem.named():
            if step + 1 in snapshots:
                expected = snapshots[step + 1][name]
                scale = float(expected.abs().max())
                torch.testing.assert_close(parameter.data, expected, rtol=rtol, atol=rtol * scale, msg=f"{name} {step}")
    assert snapshots, "a recording without snapshots proves nothing"
    projected = golden.metadata.get("projected_grad")
    if projected:
        torch.testing.assert_close([s.coefficients[0] for s in steps], projected, rtol=1e-7, atol=1e-9)
    return steps


def common(golden: Recording) -> dict:
    h = golden.hyperparameters
    decay = h.get("weight_decay", 0.0)
    return {"lr": h["lr"], "eps": h["eps"], "weight_decay": decay, "noise": published_noise(golden)}


def test_mezo():
    golden = recording("mezo")
    problem = Problem(golden.folder("init"))
    follow(golden, MeZO(problem.named(), **common(golden)), problem)


def test_mezo_momentum():
    golden = recording("mezo_momentum")
    problem = Problem(golden.folder("init"))
    optimizer = MeZOMomentum(problem.named(), momentum=golden.hyperparameters["momentum"], **common(golden))
    follow(golden, optimizer, problem)


def test_mezo_adam():
    golden = recording("mezo_adam")
    problem = Problem(golden.folder("init"))
    h = golden.hyperparameters
    optimizer = MeZOAdam(problem.named(), betas=tuple(h["betas"]), stability=h["adam_eps"], **common(golden))
    follow(golden, optimizer, problem)


def pertnns(weights: dict[str, torch.Tensor]) -> PertNN:
    """Stack `<tensor>/<layer>.weight` and `.bias` as recorded."""
    return PertNN.from_sequentials(
        [tuple(weights[f"{name}/{part}"] for part in ("0.weight", "0.bias", "2.weight", "2.bias")) for name in ORDER]
    )


def test_zo_finetuner_deploy():
    golden = recording("zo_finetuner_deploy")
    problem = Problem(golden.folder("init"))
    h = golden.hyperparameters
    scale = TunerScale(
        pertnn=pertnns(golden.folder("pertnn")),
        normalise=h["normalize"],
        every=1,
        embedding_rows=PUBLISHED_EMBEDDING_ROWS * h["batch_size"],
    )
    steps = follow(golden, ZOFinetuner(problem.named(), scale=scale, **common(golden)), problem)
    for step, sigma in zip(steps, golden.metadata["sigma"]):
        torch.testing.assert_close(list(step.scales), [sigma[name] for name in ORDER], rtol=1e-7, atol=0)


def test_every_recording_is_described_and_replayed():
    """No recording is unused: each has its row in tests/golden/README.md, and a test that reads it."""
    tests = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_golden*.py"))
    described = (FOLDER / "README.md").read_text()
    for path in FOLDER.glob("*.safetensors"):
        assert f"`{path.stem}`" in described, path.stem
        family = path.stem.removesuffix("_corrected").removesuffix("_official")
        assert f'"{path.stem}"' in tests or f'"{family}"' in tests, path.stem
