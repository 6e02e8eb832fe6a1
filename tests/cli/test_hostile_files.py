"""Pipes, devices and folders instead of a file that a command reads: one sentence and exit code 2, without a hang."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import yaml

from metazo_cli import main

COMMANDS = [
    "tasks {}", "log show {}", "log verify {}", "log diff {} {}", "log repair {}", "replay {} --base pico --out out",
    "zoo show {}", "zoo pull {}", "zoo push {} --to z", "zoo push --log {} --to z", "zoo import {} --base-model x",
    "finetune --config {}", "finetune --model pico --task {} --out out", "finetune --model pico --task rows.yaml --out out",
    "meta-train --config {}", "compare {}", "compare --model pico --tasks {} --optimizers mezo --budget 9",
    "evaluate --model pico --task {}", "report . --render {}", "report folder",
]  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS)
def test_a_pipe_and_a_device_are_one_sentence(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("COLUMNS", "500")
    os.mkfifo("pipe.yaml")
    os.symlink("/dev/zero", "zero.yaml")
    (tmp_path / "folder" / "cells" / "a" / "b").mkdir(parents=True)
    task = {"kind": "classification", "prompt": "{text} It was {}.", "labels": {0: "bad", 1: "good"}}
    for name in ("pipe.yaml", "zero.yaml"):
        files = {"train": name, "validation": name}
        (tmp_path / "rows.yaml").write_text(yaml.safe_dump(task | {"name": "rows", "files": files}))
        seed = tmp_path / "folder" / "cells" / "a" / "b" / "seed-0.json"
        seed.unlink(missing_ok=True)
        os.symlink(tmp_path / name, seed)
        monkeypatch.setattr(sys, "argv", ["metazo", *words.format(name, name).split()])
        with pytest.raises(SystemExit) as stop:
            main.main()
        told = capfd.readouterr()
        if words == "report folder":  # a report lists the files that it cannot read
            assert stop.value.code == 0 and "no method won" in told.out
            continue
        assert stop.value.code == 2, told
        assert told.err.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in told.err
