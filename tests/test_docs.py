"""Every code block of the documents runs or, if it takes hours, parses; the site builds without a warning."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
RUN = ("index", "one-gpu", "provider", "researcher")
"""Pages for newcomers: their commands run, one after the other in one folder."""
SHORTER = {
    "--forwards 1000": "--forwards 8", "--forwards 200": "--forwards 8", "--steps 1000": "--steps 4",
    "--steps 200": "--steps 4", "--texts 200": "--texts 64", "--steps 20 ": "--steps 2 ", "--batch-size 64": "--batch-size 8",
    "--optimizers mezo,mezo-rms --budget 200 --seeds 2": "--optimizers mezo --budget 4 --seeds 1 --lrs 3e-4 --extensions 0",
    "compare --model pico --tasks pico_sentiment": "compare --dry-run --model pico --tasks pico_sentiment",
    "report runs/compare": "report runs/rates",
}  # fmt: skip
"""What makes the commands of a page last seconds; nothing else in them is changed."""
SMALL = "--train-examples 32 --dev-examples 8 --test-examples 8"


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(page.read_text()) if found == language]


def commands(page: Path) -> list[str]:
    """The metazo commands of a page, without comments; a line that ends in a backslash goes on."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines if line.startswith("metazo") for part in line.split(" #")[0].split("&&")]
    return [part for part in parts if part.startswith("metazo ")]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL = [(page.stem, command) for page in PAGES for command in commands(page)]


def test_there_are_commands_to_check():
    assert len(ALL) > 40 and {*RUN} <= {page for page, _ in ALL}


@pytest.mark.parametrize(("page", "command"), ALL, ids=lambda text: text[:60])
def test_every_command_parses(page, command, tmp_path, monkeypatch):
    """Its flags exist and its values are of their types; names in capitals and `...` stand for the reader's own."""
    from metazo_cli import main

    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.replace(" ...", "").replace("$MINILM", "pico"))[1:]
    found, name = main.command_line(words), "metazo"
    while hasattr(found, "commands"):
        found, name, words = found.commands[words[0]], words[0], words[1:]
    found.make_context(name, words)


def test_the_commands_for_newcomers_run(tmp_path, monkeypatch, capsys):
    from metazo_cli import main
    from tests import warm

    warm.serve()
    monkeypatch.chdir(tmp_path)
    for page in RUN:
        for command in commands(ROOT / "docs" / f"{page}.md"):
            for long, short in SHORTER.items():
                command = command.replace(long, short)
            if command.startswith(("metazo finetune", "metazo meta-train --model")) and "--resume" not in command:
                command += f" {SMALL}" if "finetune" in command else " --train-examples 32"
                command += " --batch-size 4" * ("--batch-size" not in command)
            monkeypatch.setattr(sys, "argv", shlex.split(command))
            with pytest.raises(SystemExit) as ended:
                main.main()
            assert not ended.value.code, (command, capsys.readouterr().err)
    assert json.loads((tmp_path / "runs/first/summary.json").read_text())["steps"] == 4
    assert (tmp_path / "my_zoo/index.json").is_file() and list(tmp_path.glob("runs/rates/report/*.html"))


@pytest.fixture
def one_process():
    """A group of torch.distributed that has this process alone."""
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("page", [page.stem for page in PAGES[1:] if blocks(page, "python")])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, request):
    """With a model and rows of the reader's own beside it, where a page says so."""
    import torch
    from transformers import TrainingArguments

    import metazo
    from metazo.models.embedded import EMBEDDED

    monkeypatch.chdir(tmp_path)
    loaded = metazo.load_model("pico")
    ready = metazo.prepare(metazo.tasks.get("pico_sentiment"), loaded, train=16, dev=4, test=4)
    rows = [{"input_ids": torch.tensor(row.ids), "labels": torch.tensor(row.ids)} for row in ready.train[:8]]
    ids = torch.tensor([ready.train[0].ids])
    batch = {"input_ids": ids, "labels": ids}
    own = {
        "model": loaded.model, "MODEL": str(EMBEDDED["pico"]), "rows": rows, "batch": batch, "loader": [batch] * 8,
        "args": TrainingArguments(str(tmp_path), per_device_train_batch_size=1, max_steps=2, report_to=[], learning_rate=1e-4),
    }  # fmt: skip
    if page == "scale":
        request.getfixturevalue("one_process")
    for code in blocks(ROOT / "docs" / f"{page}.md", "python"):
        if "push_to_hub" in code:  # tests/zoo/test_on_hub.py runs it against a server
            continue
        for long, short in (("steps=100", "steps=4"), ("range(100)", "range(3)"), ("tp_size=4", "tp_size=1")):
            code = code.replace(long, short)
        exec(compile(code, f"{page}.md", "exec"), own)
    assert torch.isfinite(torch.as_tensor(float(own["loss"])))


def test_the_site_builds_without_a_warning(tmp_path):
    """Strictly: every link, file and documented name is there."""
    built = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(built, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} <= pages
    assert "mezo" in (tmp_path / "site/methods/index.html").read_text()
