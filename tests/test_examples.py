"""Every example runs as its first lines say, in a separate process, and learns as it claims."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(*command: str | Path, **environment: str) -> str:
    """Standard output of python with these words, run at the root of the repository."""
    done = warm.run(*command, environment=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_hugging_face_loop():
    """tests/io/test_extras.py runs plain_torch.py, with the core alone."""
    text = run(EXAMPLES / "hf_loop.py")
    before, after = (float(value) for value in re.findall(r"accuracy .*: (0\.\d+|1\.00)$", text, re.M))
    assert before <= 0.6 and after >= 0.8, text


def test_a_trainer_script():
    before, after = map(float, re.findall(r"(\d\.\d+) (?:before|after)", run(EXAMPLES / "trainer.py")))
    assert after < 0.75 * before


def test_meta_training_and_publishing(tmp_path):
    text = run(EXAMPLES / "meta_train_and_publish.py", tmp_path)
    before, after = map(float, re.findall(r"(\d\.\d+) (?:before|after)", text))
    assert after < 0.75 * before, text
    assert (tmp_path / "zoo" / "pico" / "v1" / "tuner.safetensors").is_file()


def test_a_task_of_your_own_in_memory():
    text = run(EXAMPLES / "own_task.py")
    losses = [float(value) for value in re.findall(r"loss on dev (\d\.\d+)", text)]
    assert losses[-1] < 0.8 * losses[0] and "a row of no split: good" in text, text


def test_a_task_of_your_own_on_the_command_line(tmp_path):
    sizes = ["--train-examples", "100", "--dev-examples", "20", "--test-examples", "20", "--eval-every", "25"]
    settings = ["--scale", "rms", "--lr", "3e-4", "--steps", "25", *sizes, "--out", tmp_path / "run", "--json"]
    run("-m", "metazo_cli.main", "finetune", "--model", "pico", "--task", EXAMPLES / "own_task.yaml", *settings)
    summary = (tmp_path / "run" / "summary.json").read_text()
    before, after = (float(value) for value in re.findall(r'"loss": ([\d.]+)', summary)[:2])
    assert after < 0.8 * before, summary


def test_a_reward_on_generated_text():
    before, after = map(float, re.findall(r"(\d\.\d+) (?:before|test)", run(EXAMPLES / "reward.py")))
    assert after > before + 0.2


def test_a_lightning_module():
    pytest.importorskip("lightning", reason="lightning is not installed")
    before, after = map(float, re.findall(r"accuracy (\d\.\d+) (?:before|after)", run(EXAMPLES / "lightning_loop.py")))
    assert before < 0.8 and after > 0.9


def test_a_method_of_your_own(tmp_path):
    """Its flag, its log, and a replay that is bit-identical; tests/optimizers/test_own_method.py does the rest."""
    sizes = ["--train-examples", "16", "--dev-examples", "4", "--test-examples", "4", "--batch-size", "4"]
    settings = ["--optimizer", "own-meazo", "--beta", "0.9", "--lr", "1e-4", "--steps", "6", *sizes]
    command = ["-m", "metazo_cli.main", "finetune", "--model", "pico", "--task", "pico_sentiment", *settings]
    method = {"METAZO_METHODS": str(EXAMPLES / "own_method.py")}
    run(*command, "--out", tmp_path / "run", **method)
    log, again = tmp_path / "run" / "steps.jsonl", tmp_path / "again"
    text = run("-m", "metazo_cli.main", "replay", log, "--base", "pico", "--out", again, **method)
    assert "bit-identical" in text


def test_the_step_of_the_own_method():
    """Two steps by hand: theta - lr c z / (sqrt(v / (1 - beta^t)) + stability), with v the running mean of c^2."""
    code = f"""
import runpy, torch
OwnMEAZO = runpy.run_path({str(EXAMPLES / "own_method.py")!r})["OwnMEAZO"]
theta = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
optimizer = OwnMEAZO([("theta", theta)], lr=0.1, eps=1e-3, beta=0.9, stability=0.01, seed=3)
v = 0.0
for step in (1, 2):
    before = theta.detach().clone()
    optimizer.step(lambda: (theta**2).sum())
    moved = theta.detach() - before
    record = optimizer.last_step
    (c,) = record.coefficients
    v = 0.9 * v + 0.1 * c**2
    rate = 0.1 / ((v / (1 - 0.9**step)) ** 0.5 + 0.01)
    z = -moved / (rate * c)
    # c is the slope along z, so the direction that was recovered must give it again (a quadratic: exactly)
    print(abs(float(2 * before @ z) / c - 1) < 1e-6)
"""
    assert run("-c", code).split() == ["True", "True"]
