"""metazo without its optional packages: the rest works, and a missing package gives one sentence."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from metazo.io.extras import PURPOSES

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {"compressed-tensors": "compressed_tensors", "py-minisign": "minisign", "pyyaml": "yaml"}
BROUGHT_ALONG = {"llm": {"tokenizers"}}  # by transformers
COME_ALONG = {"triton", "llvmlite"}  # with torch and numba
OWN = {"metazo", "metazo_cli", "pertnn_zoo"}
COMMANDS = ("demo", "finetune", "replay", "log", "meta-train", "evaluate", "zoo", "tasks", "recipes", "blocks", "bench",
            "compare", "report", "env")  # fmt: skip

# Runs the command lines given as JSON, metazo or a script, in one process.
RUNNER = """
import contextlib, io, json, runpy, sys

found = []
for line in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = line
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if line[0] == "metazo":
                from metazo_cli.main import main
                main()
            else:
                runpy.run_path(line[0])
        except SystemExit as end:
            code = end.code or 0
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


def packages(requirements: list[str]) -> set[str]:
    """Names to import of a list of requirements; those of other extras of metazo are left out."""
    names = {re.split(r"[\[<>=;~! ]", text)[0] for text in requirements}
    return {IMPORTED_AS.get(name, name) for name in names} - OWN


CORE = packages(PROJECT["dependencies"])
EXTRAS = {
    extra: packages(PROJECT["optional-dependencies"][extra]) | BROUGHT_ALONG.get(extra, set()) for extra in PURPOSES
}
EXTRAS["trainer"] |= EXTRAS["llm"]  # its packages are installed with it


def without(missing: set[str], folder: Path, *lines: list[str]) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each command line if the packages `missing` are not installed.

    The process has a site folder with links to all installed packages except these.
    """
    site = folder / "site"
    site.mkdir()
    missing = missing | ({"scikit_learn", "sklearn"} if "scipy" in missing else set())  # which cannot do without it
    names = missing | {name.replace("-", "_") for name, package in IMPORTED_AS.items() if package in missing}
    for path in [Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]:
        for item in path.iterdir():
            if item.name.partition("-")[0].partition(".")[0].lower() not in names and not (site / item.name).exists():
                (site / item.name).symlink_to(item)
    done = subprocess.run(
        [sys.executable, "-S", "-c", RUNNER, json.dumps(lines)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "cli", site)))},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return [(code, out, err) for code, out, err in json.loads(done.stdout)]


def sentence(extra: str, package: str) -> str:
    return f"error: {PURPOSES[extra]} need {package}, which is not installed: pip install 'metazo[{extra}]'\n"


def test_the_core_alone(tmp_path):
    """Optimizers, help and listings work; commands that need a language model refuse before they write anything."""
    out, plain = tmp_path / "run", [str(ROOT / "examples" / "plain_torch.py")]
    model = ["--model", "pico", "--task", "pico_sentiment", "--out", str(out)]
    works = [
        *([command, "--help"] for command in COMMANDS),
        ["tasks"],
        ["recipes"],
        ["env"],
        ["zoo", "list"],
        ["--version"],
    ]
    fails = [["finetune", *model], ["meta-train", *model], ["evaluate", *model[:4]], ["demo", "--out", str(out)],
             ["compare", *model[:2], "--tasks", "pico_sentiment", "--optimizers", "mezo", *model[4:]],
             ["bench", "--quick", "--out", str(out)], ["blocks", "pico"]]  # fmt: skip
    lines = [plain, *(["metazo", *line] for line in [*works, *fails])]
    (code, shown, error), *rest = without(set().union(*EXTRAS.values()), tmp_path, *lines)
    assert code == 0 and float(shown.split()[-1]) >= 0.95, error
    for line, (code, shown, error) in zip(works, rest):
        assert code == 0 and shown and not error, (line, error)
    for line, (code, _, error) in zip(fails, rest[len(works) :], strict=True):
        assert code == 2 and error == sentence("llm", "transformers"), (line, error)
    assert not out.exists()


@pytest.fixture(scope="module")
def no_extras(tmp_path_factory) -> tuple[Path, dict[str, tuple[int, str, str]]]:
    """A folder, and by command what it did there without every extra but [llm]; one process saves two starts."""
    folder = tmp_path_factory.mktemp("extras")
    key, run = folder / "key.pub", folder / "run"
    key.write_text("untrusted comment: a key\nRWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3\n")
    task = "--model pico --task pico_sentiment"
    lines = {
        "finetune": f"finetune {task} --dev-examples 4 --test-examples 4 --steps 2 --out {run}",
        "show": f"log show {run} --plot {folder / 'curve.png'}",
        "report": f"report {ROOT / 'results' / 'minilm'} --out {folder / 'report'}",
        "peft": f"finetune {task} --lora 4 --out {folder / 'lora'}",
        "quant": f"finetune {task} --lora 4 --quantize int8 --out {folder / 'lora'}",
        "trainer": f"finetune {task} --device-map auto --out {folder / 'lora'}",
        "track": f"finetune {task} --track tensorboard --steps 2 --out {folder / 'lora'}",
        "sign": f"zoo verify --zoo {ROOT / 'pertnn_zoo'} --key {key}",
        "meta": f"meta-train --model pico --task pico_topic --objective published --unroll 2 --out {folder / 'meta'}",
    }
    missing = set().union(*(EXTRAS[extra] for extra in EXTRAS)) - EXTRAS["llm"]
    return folder, dict(
        zip(lines, without(missing, folder, *(["metazo", *line.split()] for line in lines.values())), strict=True)
    )


def test_a_run_without_plots_is_whole(no_extras):
    """Without [report] a run has everything except its picture, and reports that; a report is refused."""
    folder, done = no_extras
    run, fine, draw, report = folder / "run", done["finetune"], done["show"], done["report"]
    assert fine[0] == 0 and sentence("report", "matplotlib")[7:] in fine[1], fine
    assert "config, step log, metrics, model: in" in " ".join(fine[1].split()), fine
    assert (run / "model").is_dir() and (run / "summary.json").is_file() and not (run / "curve.png").exists()
    assert (draw[0], draw[2]) == (2, sentence("report", "matplotlib"))
    assert report[0] == 2 and report[2].startswith("error: plots and reports need ") and "metazo[report]" in report[2]


PACKAGES = {"peft": "peft", "quant": "accelerate", "trainer": "accelerate", "sign": "py-minisign", "meta": "higher"}


@pytest.mark.parametrize(("extra", "package"), PACKAGES.items())
def test_other_extras_missing(no_extras, extra, package):
    """Adapters, quantised bases, device maps, signatures and the unrolled objective each name their extra."""
    folder, done = no_extras
    code, _, error = done[extra]
    assert code == 2 and error == sentence(extra, package), error
    assert not (folder / "lora").exists()


def test_a_tracker_that_is_missing_is_named(no_extras):
    code, _, error = no_extras[1]["track"]
    said = "--track tensorboard needs the package tensorboard, which is not installed: pip install tensorboard."
    assert (code, error) == (2, f"error: {said}\n")


def imports(tree: ast.AST, inside: str | None = None) -> Iterator[tuple[str, str | None]]:
    """(package, the extra whose `with needs(...)` the import is in), except for imports that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0], inside
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        elif isinstance(node, ast.With) and (extra := needed(node.items[0].context_expr)) is not None:
            yield from imports(node, extra)
        elif not isinstance(node, ast.expr):
            yield from imports(node, inside)


def needed(manager: ast.expr) -> str | None:
    """The extra of `needs(EXTRA)`; None for any other expression."""
    if not (isinstance(manager, ast.Call) and isinstance(manager.func, ast.Name) and manager.func.id == "needs"):
        return None
    return ast.literal_eval(manager.args[0])


def test_every_import_of_an_optional_package_names_its_extra():
    wrong = []
    for path in [*(ROOT / "metazo").rglob("*.py"), *(ROOT / "cli").rglob("*.py"), *(ROOT / "pertnn_zoo").rglob("*.py")]:
        for package, extra in imports(ast.parse(path.read_text())):
            if package in sys.stdlib_module_names or package in OWN | CORE | COME_ALONG:
                continue
            if package not in EXTRAS.get(extra or "", ()):
                wrong.append(f"{path.relative_to(ROOT)}: {package} in {extra}")
    assert wrong == []
