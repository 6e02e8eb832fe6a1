"""Processes that start warm: forked from a server that has imported what the commands use and taken a step.

Each is a process of its own, with arguments, environment, folder, signals, output and exit code as from a shell. What it
saves is the five seconds of CPU that python, torch, transformers and the kernels' cache take to start. The server is a fork
of the worker of the suite that begins with it (`begin`), and starts cold in a session without workers.

Where not to use: to test what is imported, or what happens without a package.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import constants
from torch.distributed import TCPStore
from torch.multiprocessing import start_processes

from metazo.io import forked

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")


class Process:
    """A started process: `metazo ARGUMENTS`, or `python ARGUMENTS` with a script, -m or -c."""

    def __init__(self, *arguments: object, environment: Mapping[str, str] | None = None, cwd: Path | None = None):
        self.told = Path(tempfile.mkdtemp(prefix="warm"))
        started = ([*map(str, arguments)], self.told, {**os.environ, **(environment or {})}, cwd or Path.cwd())
        serve()
        self.process = CONTEXT.Process(target=_run, args=started)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float = 280) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(str(self.process), timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def shown(self) -> str:
        """Standard output so far."""
        out = self.told / "out"
        return out.read_text() if out.exists() else ""

    def communicate(self, timeout: float = 280) -> tuple[str, str]:
        """Standard output and standard error, at the process's end."""
        self.wait(timeout)
        return self.shown(), (self.told / "err").read_text()


def run(*arguments: object, timeout: float = 280, **options) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with captured text."""
    process = Process(*arguments, **options)
    out, err = process.communicate(timeout)
    shutil.rmtree(process.told)
    return subprocess.CompletedProcess([*map(str, arguments)], process.returncode or 0, out, err)


@contextlib.contextmanager
def meetings(count: int) -> Iterator[list[int]]:
    """Ports of stores at which processes can meet, one for each time."""
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(count)]
    yield [store.port for store in stores]


def ranks(function: Callable[..., None], *arguments: Any, count: int = 2, killed: int | None = None) -> None:
    """Run `function(rank, *arguments)` in `count` processes and raise the error of one that fails, whose end ends the others.
    They have the environment that torchrun gives; as with torchrun, they meet at a store of the process that starts them, for
    which they need not wait.
    killed: the rank that must end by SIGKILL.
    """
    serve()
    with meetings(1) as (port,):
        shared = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in shared.items()}
        told = (environment | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, function, arguments)
        context = start_processes(_rank, told, nprocs=count, join=False, start_method="forkserver")
        assert context is not None
        if killed is not None:
            context.sentinels.pop(context.processes[killed].sentinel)
        while not context.join():
            pass
        if killed is not None:
            context.processes[killed].join()
            assert context.processes[killed].exitcode == -signal.SIGKILL


def _rank(rank: int, environment: dict[str, str], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _renew_pool()
    function(rank, *arguments)


def serve() -> None:
    """Start the server unless it runs; the workers of comparisons in this process are then forked from it too."""
    with contextlib.chdir(ROOT):  # which has this package
        forked.context(__name__, "tests.warm_server")


def begin() -> None:
    """At the start of a worker of the whole suite, before any test: the server as a fork of this process, which has to import
    the same.
    """
    importlib.import_module("tests.warm_server")
    kept = forkserver.util
    forkserver.util = _forking()
    try:
        serve()
    finally:
        forkserver.util = kept


def _forking() -> Any:
    """The server's module of utilities, with a fork in the place of a cold start."""
    return SimpleNamespace(**vars(forkserver.util) | {"spawnv_passfds": _fork})


def _renew_pool() -> None:
    """Torch's thread pool does not survive a fork, and if two threads are the first to ask for a new one, one may fail."""
    import torch

    torch.set_num_threads(torch.get_num_threads())


def _fork(program: str | bytes, arguments: list[str], kept: list[int]) -> int:
    """In the place of `spawnv_passfds`: start a server as a fork of this process. A cold one, which would import what is
    imported here, takes four seconds of CPU. It is a child process as the cold one would be, and has none of this process's
    files: a lock or the end of a pipe that it kept would outlive this process.
    """
    child = os.fork()
    if child:
        return child
    try:
        forkserver._forkserver.__init__()  # its lock is held where this process begins
        nothing = os.open(os.devnull, os.O_RDWR)
        for file in map(int, os.listdir("/dev/fd")):
            if file > 2 and file not in (nothing, *kept):
                with contextlib.suppress(OSError):  # the listing's own
                    os.dup2(nothing, file)  # not closed: its number must not be that of another file
        exec(arguments[-1], {})
    finally:
        os._exit(0)


def _run(arguments: list[str], told: Path, environment: dict[str, str], cwd: Path) -> None:
    forkserver.util = _forking()  # for the workers of this process
    hub = {name: value for name, value in environment.items() if name.startswith("HF_")}
    changed = any(os.environ.get(name) != value for name, value in hub.items())
    os.environ.clear()
    os.environ.update(environment)
    if changed:  # what the library of the Hub read when the server imported it
        importlib.reload(constants)
    os.chdir(cwd)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(told / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    # pytest has put others in their place
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _renew_pool()
    if arguments[0] == "metazo":
        from metazo_cli.main import main

        sys.argv = arguments
        main()
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
