"""Every example runs as its first lines say, in a process of its own, and learns what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(*command: str | Path, **environment: str) -> str:
    """Standard output of python with these words, run at the root of the repository."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_hugging_face_loop():
    """tests/io/test_extras.py runs plain_torch.py, with the core alone."""
    text = run(EXAMPLES / "hf_loop.py")
    before, after = (float(value) for value in re.findall(r"accuracy .*: (0\.\d+|1\.00)$", text, re.M))
    assert before <= 0.6 and after >= 0.8, text


def test_meta_training_and_publishing(tmp_path):
    text = run(EXAMPLES / "meta_train_and_publish.py", tmp_path)
    before, after = map(float, re.findall(r"(\d\.\d+) (?:before|after)", text))
    assert after < 0.75 * before, text
    assert (tmp_path / "zoo" / "pico" / "v1" / "tuner.safetensors").is_file()


def test_a_task_of_your_own(tmp_path):
    sizes = ["--train-examples", "100", "--dev-examples", "20", "--test-examples", "20", "--eval-every", "25"]
    settings = ["--scale", "rms", "--lr", "3e-4", "--steps", "25", *sizes, "--out", tmp_path / "run", "--json"]
    run("-m", "metazo_cli.main", "finetune", "--model", "pico", "--task", EXAMPLES / "own_task.yaml", *settings)
    summary = (tmp_path / "run" / "summary.json").read_text()
    before, after = (float(value) for value in re.findall(r'"loss": ([\d.]+)', summary)[:2])
    assert after < 0.8 * before, summary
