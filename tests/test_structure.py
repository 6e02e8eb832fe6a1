"""The structure of the library, read from its imports: packages import downwards only, and nothing imports in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the bottom up. A package imports only from packages to the left of it, or from itself.
LAYERS = (
    "errors",
    "io",
    "settings",
    "kernels blocks",
    "noise",
    "step",
    "steplog tuner",
    "feedback",
    "optimizers",
    "zoo",
    "pico recipes models",
    "tasks integrations",
    "micro",
    "plots",
    "runs",
    "meta comparisons",
    "report bench",
    "demo",
    "metazo_cli",
)
FACE = {"metazo", "metazo.__main__"}
LOOSE = 4  # modules at the package root beside __init__


def modules() -> dict[str, Path]:
    """Files by dotted name."""
    found = {}
    paths = [(path, ROOT) for path in (ROOT / "metazo").rglob("*.py")]
    for path, folder in [*paths, *((path, ROOT / "cli") for path in (ROOT / "cli").rglob("*.py"))]:
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: Iterable[str]) -> set[str]:
    """Names of the library's modules that a file imports anywhere, within functions too."""
    known, found = set(known), set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {full if (full := f"{base}.{alias.name}") in known else base for alias in node.names}
    return (found & known) - {name}


def room(name: str) -> str:
    """The package, or module at the root, to which a module belongs."""
    parts = name.split(".")
    return parts[1] if parts[0] == "metazo" and len(parts) > 1 else parts[0]


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Nodes on a circle, found by repeatedly removing those that import no remaining node."""
    left = {node: set(targets) for node, targets in graph.items()}
    while free := [node for node, targets in left.items() if not targets & set(left)]:
        for node in free:
            del left[node]
    return [sorted(left)] if left else []


def graph() -> dict[str, set[str]]:
    """Modules and what they import. The public face is left out: it names modules of all layers, which read its version."""
    files = modules()
    return {name: imports(name, path, files) - FACE for name, path in files.items() if name not in FACE}


def test_nothing_is_imported_in_a_circle() -> None:
    assert circles(graph()) == []


def test_imports_lead_down() -> None:
    height = {name: floor for floor, names in enumerate(LAYERS) for name in names.split()}
    upward = [
        f"{name} imports {target}"
        for name, targets in graph().items()
        for target in targets
        if room(name) != room(target) and height[room(target)] >= height[room(name)]
    ]
    assert upward == []


def test_the_check_finds_a_circle_and_an_upward_import(tmp_path: Path) -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["a", "b", "c"]]
    inside = tmp_path / "x.py"
    inside.write_text("def f():\n    from metazo.runs import finetune\n    from . import y\n")
    assert imports("metazo.step.x", inside, ["metazo.runs.finetune", "metazo.step.y"]) == {
        "metazo.runs.finetune",
        "metazo.step.y",
    }


def test_few_modules_are_loose_and_every_package_has_tests() -> None:
    loose = [path.stem for path in (ROOT / "metazo").glob("*.py") if path.stem not in ("__init__", "__main__")]
    assert len(loose) <= LOOSE, loose
    packages = {path.parent.name for path in (ROOT / "metazo").glob("*/__init__.py")}
    assert packages - {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} <= {"recipes"}


def test_a_file_name_has_one_meaning() -> None:
    """File names that may occur in several packages, because they mean the same in each."""
    meant = {"__init__", "config", "dryrun"}
    # a file of optimizers/official is the published code of the method of its name
    stems = [path.stem for path in (ROOT / "metazo").rglob("*.py") if path.parent.name != "official"]
    assert {stem for stem in stems if stems.count(stem) > 1} <= meant


def test_the_name_of_a_file_is_defined_once():
    """A second definition would have to be changed with the first."""
    found: dict[str, set[str]] = {}
    for name, path in modules().items():
        values = [node.value for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
        constants = [item.value for value in values for item in ast.walk(value) if isinstance(item, ast.Constant)]
        for constant in constants:
            if isinstance(constant, str) and re.fullmatch(r"[\w-]+\.(safetensors|jsonl?|png)", constant):
                found.setdefault(constant, set()).add(name)
    assert len(found) > 5 and {file: names for file, names in found.items() if len(names) > 1} == {}


TEXT_CALLS = ("read_text", "write_text", "open", "fdopen", "NamedTemporaryFile")


def in_the_systems_encoding(source: str) -> list[int]:
    """Lines that read or write text without naming an encoding. Python then takes that of the locale."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        callee = ast.unparse(node.func)
        values = [*node.args, *(word.value for word in node.keywords if word.arg == "mode")]
        modes = [str(value.value) for value in values if isinstance(value, ast.Constant)]
        binary = any(re.fullmatch("[rwxa+]*b[rwxa+]*", mode) for mode in modes)
        of_a_class = re.fullmatch(r"[A-Z]\w*\.\w+", callee)  # a constructor of that name
        if callee.rpartition(".")[2] in TEXT_CALLS and not (binary or of_a_class or callee == "os.open"):
            found.append(node.lineno)
    return found


def test_text_is_utf_8_whatever_the_locale():
    """A name or label in another script cannot be written in the encoding of some locales, or is read as other letters."""
    paths = [path for folder in ("metazo", "cli", "pertnn_zoo") for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in paths if in_the_systems_encoding(path.read_text(encoding="utf-8"))}
    assert found == set()


def test_the_check_of_encodings_finds_each_kind():
    bad = ["p.read_text()", "p.write_text(t)", "open(p)", "p.open('a')", "p.open(mode='w')", "os.fdopen(n)"]
    good = ["p.read_bytes()", "p.open('rb')", "open(p, 'xb')", "os.open(p, os.O_RDONLY)", "Trajectory.open(folder)"]
    good += ["p.read_text(encoding='utf-8')"]
    assert [in_the_systems_encoding(line) for line in (*bad, *good)] == [[1]] * len(bad) + [[]] * len(good)
