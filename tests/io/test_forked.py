"""Processes that are forked from a server with imports: what they and their parent have afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from metazo.io import forked

IMPORTED = """
import os, signal

pid, kept = os.getpid(), os.environ["KEPT"]
blocked = sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ())))

def tell(connection):
    connection.send([pid, os.getppid(), kept, blocked, sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ())))])
"""
PARENT = """
import json, os, signal
from metazo.io import forked

if __name__ == "__main__":
    before = dict(os.environ), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    found = []
    for _ in range(2):
        context = forked.context("imported", environment={"KEPT": "server's", "NEW": "1"})
        assert (dict(os.environ), signal.pthread_sigmask(signal.SIG_BLOCK, ())) == before
        import imported_late
        ours, theirs = context.Pipe(duplex=False)
        context.Process(target=imported_late.tell, args=(theirs,)).start()
        found.append(ours.recv())
    print(json.dumps(found))
"""
LATE = """
def tell(connection):
    import imported

    imported.tell(connection)
"""


def test_the_server_imports_once_with_signals_blocked_and_its_parent_is_as_before(tmp_path: Path):
    """In a parent without a server: the suite's own has one."""
    for name, text in (("imported", IMPORTED), ("imported_late", LATE), ("parent", PARENT)):
        (tmp_path / f"{name}.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "parent.py"],
        cwd=tmp_path,
        env={"KEPT": "parent's"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    stopping = {int(number) for number in forked.STOPPING}
    for server, parent, kept, at_import, in_process in (first, second):
        assert server == parent == first[0] and kept == "server's"
        assert stopping <= set(at_import) and stopping <= set(in_process)


SCRIPT = """
import sys
from metazo.io import forked
import imported

print("begins", __name__, flush=True)
if __name__ == "__main__":
    context = forked.context("imported")
    ours, theirs = context.Pipe(duplex=False)
    forked.start(context.Process(target=imported.tell, args=(theirs,)), script=sys.argv[1] == "True")
    theirs.close()
    ours.recv()
    print(__file__, __spec__)
"""


@pytest.mark.parametrize("script", [False, True])
def test_a_process_runs_the_script_of_its_parent_only_if_it_is_told_to(tmp_path: Path, script: bool):
    for name, text in (("imported", IMPORTED), ("script", SCRIPT)):
        (tmp_path / f"{name}.py").write_text(text)
    command = [sys.executable, "script.py", str(script)]
    done = subprocess.run(command, cwd=tmp_path, env={"KEPT": ""}, capture_output=True, text=True, timeout=60)
    again = ["begins __mp_main__"] * script
    assert done.stdout.splitlines() == ["begins __main__", *again, f"{tmp_path / 'script.py'} None"], done.stderr


def test_a_folder_of_temporary_files_that_is_too_long_for_a_socket_is_named(tmp_path: Path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    program = "from metazo.io import forked; forked.context()"
    environment = {"TMPDIR": str(long), "PYTHONPATH": str(Path(forked.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    last = done.stderr.strip().splitlines()[-1]
    assert f"{long}, has a path of {len(str(long))} characters" in last and "set TMPDIR to a shorter one" in last
