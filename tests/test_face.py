"""`import metazo`: every public name, and nothing heavy before one is used."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import metazo
from tests import warm

ROOT = Path(__file__).parents[1]


def python(code: str, *flags: str) -> str:
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_bare_import_is_light() -> None:
    heavy = ["torch", "numpy", "transformers", "pydantic", "numba", "rich", "typer", "yaml"]
    loaded = python(f"import sys, metazo; print([name for name in {heavy} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_every_public_name_is_there_and_listed() -> None:
    from metazo.optimizers import METHODS

    names = metazo.__all__
    assert len(names) == len(set(names)) and set(names) <= set(dir(metazo))
    assert {cls.__name__ for cls in METHODS.values()} <= set(names)
    for name in names:
        thing = getattr(metazo, name)
        assert thing is not None and (name == "__version__" or thing.__doc__), name
    wanted = "finetune meta_train replay evaluate compare load_model load_tuner prepare UserError __version__"
    assert set(wanted.split()) <= set(names)


def test_type_checkers_see_the_same_names() -> None:
    """In a package with py.typed they take `import X as X` and assignments for public, and `import X as Y` for private."""
    tree = ast.parse((ROOT / "metazo" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    aliases = [alias for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert all(alias.asname in (None, alias.name) for alias in aliases)
    listed = {alias.asname for alias in aliases if alias.asname}
    listed |= {node.id for node in ast.walk(block) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names: dict[str, object] = {}
    exec(compile(ast.Module(block.body, []), "names", "exec"), names)
    seen = {name: names[name] for name in listed}
    public = {name: getattr(metazo, name) for name in metazo.__all__ if name != "__version__"}
    methods = {cls.__name__ for cls in metazo.optimizers.METHODS.values()}  # a new one need not be listed
    assert seen.items() <= public.items() and set(public) - set(seen) <= methods


def test_functions_are_not_hidden_by_modules_of_their_name() -> None:
    """Python sets an imported submodule as an attribute of its package: no public name may be a submodule's."""
    modules = {path.stem for path in (ROOT / "metazo").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert not modules & set(metazo.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    for name in ("nothing", "Nothing"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(metazo, name)


def test_star_import_and_help() -> None:
    code = "import metazo; help(metazo); from metazo import *; print(callable(MeZO) and callable(finetune))"
    text = warm.run("-c", code).stdout
    assert (
        text.splitlines()[-1] == "True"
        and "forward passes only" in text
        and "class LOZO(" in text
        and "finetune(" in text
    )


def test_the_version_has_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "metazo.__version__"}
    line = next(x for x in (ROOT / "metazo" / "__init__.py").read_text().splitlines() if x.startswith("__version__"))
    assert line == f'__version__ = "{metazo.__version__}"'  # a literal: setuptools reads it without importing anything


def test_python_m_metazo() -> None:
    done = subprocess.run([sys.executable, "-m", "metazo", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"metazo {metazo.__version__}\n"


ENDING = """
import atexit, os, signal, sys, threading, time
from metazo_cli.main import entry_point
class Object:
    def __del__(self, write=os.write): write(1, b'taken apart')
kept = Object()
left_open = open(sys.argv.pop(1), "w")
left_open.write("written")
atexit.register(print, 'registered')
atexit.register(os.kill, os.getpid(), signal.SIGINT)
threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()
entry_point()
"""


def test_a_command_ends_when_its_work_has(tmp_path: Path) -> None:
    """Threads, what was registered for the end and open files come first, whatever Ctrl-C; no object is taken apart."""
    for words, ended, shown in (["--version"], 0, f"metazo {metazo.__version__}\n"), (["finetun"], 2, ""):
        command = [sys.executable, "-c", ENDING, str(tmp_path / "open"), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (
            ended,
            f"{shown}thread\nregistered\n",
        ) and "Traceback" not in done.stderr
        assert (tmp_path / "open").read_text() == "written"


def test_a_command_ends_as_ever_for_profilers_and_without_output(tmp_path: Path) -> None:
    profiled = f"import sys; sys.setprofile(lambda *event: None)\n{ENDING}"
    command = [sys.executable, "-c", profiled, str(tmp_path / "open"), "--version"]
    assert "taken apart" in subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    entry = "from metazo_cli.main import entry_point; entry_point()"
    command = ["sh", "-c", '"$0" -c "$1" --version >&-', sys.executable, entry]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_output_that_nobody_reads_ends_a_run_which_can_be_continued(tmp_path: Path) -> None:
    from tests import warm

    words = ["finetune", "--model", "pico", "--task", "pico_sentiment", "--steps", "2", "--dev-examples", "4"]
    unread = "import os, sys; reads, writes = os.pipe(); os.close(reads); os.dup2(writes, 1)\n"
    unread += "sys.stdout = open(1, 'w', closefd=False)\n"
    entry = "from metazo_cli.main import entry_point; entry_point()"
    for given, said in (
        (["tasks"], ""),
        (["tasks", "--json"], ""),
        (["--help"], ""),
        (["finetune", "--help"], ""),
        ([*words, "--out", str(tmp_path)], "stopped: Nobody reads the output any more. Continue with --resume.\n"),
    ):
        done = warm.run("-c", unread + entry, *given)
        assert (done.returncode, done.stderr) == (141, said)


def test_characters_that_a_terminal_has_not_are_escaped(tmp_path: Path) -> None:
    given = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "40"}
    task = tmp_path / "task.yaml"
    task.write_text("{name: t, kind: classification, prompt: '{text} … {}', labels: [no, yes]}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "metazo", "tasks", str(task)], env=given, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "\\u2026" in done.stdout, done.stderr


def test_mistyped_names_are_reported_without_torch() -> None:
    """And with exit code 2; the list of tasks needs no torch either."""
    code = (
        "import sys; from metazo_cli.main import main\n"
        "run = ['finetune', '--model', 'pico', '--task', 'sst2', '--out', 'x']\n"
        "for more in (['--task', 'sst3'], ['--optimizer', 'meso'], ['--model', '/no/such'], ['--data', '/no/such'],"
        " ['--rank', '2'], None):\n"
        "    sys.argv = ['metazo', *(['tasks'] if more is None else run + more)]\n"
        "    try: main()\n"
        "    except SystemExit as end: print(more, end.code, 'torch' in sys.modules)\n"
    )
    lines = [line for line in python(code).splitlines() if line.endswith("False")]
    assert [line.split()[-2] for line in lines] == ["2", "2", "2", "2", "2", "0"], lines


def test_beside_other_work_threads_wait_without_using_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set before torch is loaded, which reads it then; so is that warnings of torch's profiler are no business of a user's."""
    code = (
        "import os, sys; from metazo_cli.main import main\n"
        "assert 'torch' not in sys.modules\n"
        "os.getloadavg = lambda: (LOAD * os.cpu_count(), 0.0, 0.0)\n"
        "sys.argv = ['metazo', '--version']\n"
        "try: main()\n"
        "except SystemExit: print(*map(os.environ.get, ('TORCH_CPP_LOG_LEVEL', 'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')))"
    )
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    for load, given, wanted in (
        ("0.6", {}, ["PASSIVE", "2000"]),
        ("0.4", {}, ["None", "2000"]),
        ("2", {"OMP_WAIT_POLICY": "active"}, ["active", "None"]),
        ("2", {"GOMP_SPINCOUNT": "7"}, ["None", "7"]),
    ):
        with monkeypatch.context() as told:
            for name, value in given.items():
                told.setenv(name, value)
            assert python(code.replace("LOAD", load)).split()[-3:] == ["ERROR", *wanted]


def test_help_and_light_commands_do_not_load_torch() -> None:
    """Of the commands only the one that is called is imported; help imports all, and none of them loads torch."""
    code = (
        "import contextlib, sys; from metazo_cli.main import COMMANDS, main\n"
        "heavy = ('torch', 'numpy', 'transformers')\n"
        "for words in (['--version'], ['recipes', 'pico-mezo-rms'], ['--help'], *([name, '--help'] for name in COMMANDS)):\n"
        "    sys.argv = ['metazo', *words]\n"
        "    with contextlib.suppress(SystemExit): main()\n"
        "    loaded = [name for name in heavy if name in sys.modules]\n"
        "    assert not loaded, (words, loaded)\n"
        "print(len(COMMANDS))"
    )
    shown = python(code)
    assert (
        int(shown.splitlines()[-1]) >= 13
        and "--rank" in shown
        and "lozo: 2" in " ".join(shown.replace("│", "").split())
    )


def test_packages_are_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the docstring of the optimizers shows them, before anything has imported them; what does not exist is none."""
    monkeypatch.delattr(metazo, "optimizers", raising=False)
    assert metazo.optimizers.MeZO is metazo.MeZO
    assert not hasattr(metazo, "nothing") and not hasattr(metazo, "_nothing")
