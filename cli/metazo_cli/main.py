"""metazo on the command line. Bad input ends with one sentence and exit code 2; a stop on request with 130 or 143."""

from __future__ import annotations

import errno
import os
import sys
from functools import cache

import typer
from rich.console import Console

from metazo import __version__
from metazo.errors import UserError

from . import messages

app = typer.Typer(
    name="metazo",
    help="Fine-tune language models with forward passes only: learned and hand-made zeroth-order optimizers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"metazo {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    pass


@cache
def _mount() -> None:
    """Add the commands; here and not above, so that importing this module is cheap."""
    from . import bench, compare, demo, env, evaluate, finetune, log, meta_train, recipes, replay, report, tasks, zoo

    app.command("demo")(demo.demo)
    app.command("finetune")(finetune.command)
    app.command("replay")(replay.replay)
    app.add_typer(log.app, name="log")
    app.command("meta-train")(meta_train.command)
    app.command("evaluate")(evaluate.evaluate)
    app.add_typer(zoo.app, name="zoo")
    app.command("tasks")(tasks.tasks)
    app.command("recipes")(recipes.recipes)
    app.command("bench")(bench.bench)
    app.command("compare")(compare.command)
    app.command("report")(report.report)
    app.command("env")(env.env)


def main() -> None:
    from metazo.runs.interrupt import Interrupted

    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    _mount()
    command = typer.main.get_command(app)
    messages.know(command, sys.argv[1:])
    try:
        command()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # once, if torchrun started several
            errors.print("[bold red]error:[/]", _text(error))
        sys.exit(2)
    except Interrupted as error:
        errors.print("[bold yellow]stopped:[/]", _text(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print("stopped.")
        sys.exit(130)
    except BrokenPipeError:
        os._exit(141)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            errors.print(
                "[bold red]error:[/]", _text(f"{str(error.filename)[:80]!r}... is longer than a file's name may be.")
            )
            sys.exit(2)
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT):
            raise
        errors.print("[bold red]error:[/]", _text(f"{error.filename or 'the output folder'}: {error.strerror}; nothing "
                     "that was finished is lost: make room and go on with --resume."))  # fmt: skip
        sys.exit(2)


def _text(value: object):
    from rich.text import Text

    return Text(messages.in_flags(str(value)))


if __name__ == "__main__":
    main()
