"""The metazo command line. Bad input ends with one sentence and exit code 2, a requested stop with 130 or 143."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

import typer

from metazo import __version__
from metazo.errors import UserError
from metazo.io.system import refuse_windows
from metazo.io.terminal import UNREAD, print_line
from metazo.runs.interrupt import Interrupted

from . import messages
from .streams import encode_all, flushed, open_files, says_rich, unread


def _version(wanted: bool) -> None:
    if wanted:
        print_line(f"metazo {__version__}")
        raise typer.Exit()


def _main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    pass


COMMANDS = {
    "demo": "demo.demo",
    "finetune": "finetune.command",
    "replay": "replay.replay",
    "log": "log.app",
    "meta-train": "meta_train.command",
    "evaluate": "evaluate.evaluate",
    "zoo": "zoo.app",
    "tasks": "tasks.tasks",
    "recipes": "recipes.recipes",
    "blocks": "blocks.command",
    "bench": "bench.bench",
    "compare": "compare.command",
    "report": "report.report",
    "env": "env.env",
}
"""The module and function of each command, in this package."""


@cache
def _built(names: Sequence[str]) -> Any:
    app = typer.Typer(
        name="metazo",
        help="Fine-tune language models with forward passes only: learned and hand-made zeroth-order optimizers.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        callback=_main,
    )
    for name in names:
        module, _, attribute = COMMANDS[name].partition(".")
        found = getattr(import_module(f"metazo_cli.{module}"), attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name)(found)
    return typer.main.get_command(app)


def command_line(words: Sequence[str] = ()) -> Any:
    """The command line for these words: with the one command that they call, and with all commands for help or for a name that
    is none. The modules of all take seconds to import.
    """
    if list(words) == ["--version"]:
        return _built(())
    return _built(tuple(words[:1] if words and words[0] in COMMANDS else COMMANDS))


def _yield_to_others() -> None:
    """Have torch's threads wait for each other without using the cores for long (read when torch is loaded).

    OpenMP's threads wait actively by default, and so take time from the threads that they wait for if other processes run.
    GNU's OpenMP, which torch has on Linux, is told to sleep after a short while, which takes no longer if nothing else runs.
    Any other is told not to wait actively if the machine is busy (benchmarks/waiting.py). What the user set is kept.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    os.environ["GOMP_SPINCOUNT"] = "2000"
    if 2 * os.getloadavg()[0] > (os.cpu_count() or 1):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


_RESUMES = "Continue with --resume."
_CONTINUES = {
    "finetune": _RESUMES,
    "meta-train": _RESUMES,
    "compare": "The same command continues.",
    "demo": "The same command continues.",
}


def main() -> None:
    gc.set_threshold(50_000)  # collections while torch and transformers are imported take a second and find nothing
    encode_all()
    errors = messages.Terminal(stderr=True)
    try:  # from here on, because the imports of a command take most of the time before it runs
        refuse_windows()
        _yield_to_others()
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's profiler warns of memory from before it began
        command = command_line(sys.argv[1:])
        messages.know(command, sys.argv[1:])
        messages.plain_warnings()
        code = command(prog_name="metazo", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # once, if torchrun started several
            errors.say("error:", error, "bold red")
        elif error.of_rank is not None:
            errors.say(f"error of rank {error.of_rank}:", error, "bold red")
        sys.exit(2)
    except Interrupted as error:
        if os.environ.get("RANK", "0") == "0":
            errors.say("stopped:", error, "bold yellow")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        errors.print("stopped.")
        sys.exit(130)
    except SystemExit as end:
        broken = end.__context__
        if not isinstance(broken, BrokenPipeError):
            raise
        if end.code != UNREAD and not says_rich(end):
            # click ends so after any broken pipe, and has replaced both streams
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            if not unread():
                raise broken from None
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if (
            not {"--help", "-h"} & set(sys.argv)
            and (again := _CONTINUES.get("".join(sys.argv[1:2])))
            and os.environ.get("RANK", "0") == "0"
        ):
            errors.say("stopped:", f"Nobody reads the output any more. {again}", "bold yellow")
        sys.exit(UNREAD)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            errors.say("error:", f"{str(error.filename)[:80]!r}... is longer than a file's name may be.", "bold red")
            sys.exit(2)
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG):
            raise
        remedy = "raise the limit (ulimit -f)" if error.errno == errno.EFBIG else "make room"
        again = "start the command again"
        if _CONTINUES.get("".join(sys.argv[1:2])) == _RESUMES:  # it may not have come to its folder
            again += ", with --resume if its folder (--out) is there"
        errors.say("error:", f"{error.filename or 'the output'}: {error.strerror}; {remedy} and {again}.", "bold red")
        sys.exit(2)
    except Exception as error:
        message = getattr(error, "format_message", None)
        if message is None:  # an error of the command line, in whichever click typer brings
            raise
        if type(error).__name__ != "NoArgsIsHelpError":  # which has printed the help
            called = getattr(getattr(error, "ctx", None), "command_path", "metazo")
            errors.say("error:", f"{message().rstrip('.')}; see {called} --help.", "bold red")
        sys.exit(2)


def entry_point() -> None:
    """`main` in a process of its own, which ends when its work has: taking torch and transformers apart, object by object,
    takes another second. Threads, what others registered for the end (atexit), and files that are still open come first.
    Where not to use it: where something waits for the interpreter to end, as profilers do, for which there is `main`.
    """
    watched = sys.gettrace() or sys.getprofile()
    if tools := getattr(sys, "monitoring", None):
        watched = watched or any(map(tools.get_tool, range(6)))
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, int) and not watched:
            with suppress(KeyboardInterrupt):
                threading._shutdown()  # type: ignore[attr-defined]
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done, and Ctrl-C would show where the end is
            atexit._run_exitfuncs()
            if flushed(*filter(None, (sys.stdout, sys.stderr)), *open_files()):
                os._exit(end.code)
        raise


if __name__ == "__main__":
    main()
