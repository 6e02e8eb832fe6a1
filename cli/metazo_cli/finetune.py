"""metazo finetune"""

from __future__ import annotations

import inspect
import os
import re
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from metazo.errors import UserError
from metazo.io.terminal import Console, print_json
from metazo.optimizers.outline import methods
from metazo.runs.config import FinetuneConfig

from . import options
from .messages import Terminal, in_flags


def _method_flags() -> list[inspect.Parameter]:
    """A flag for every hyperparameter of every method; its help has each meaning, with its methods and their defaults."""
    hints: dict[str, Any] = {}
    meanings: dict[str, dict[str, list[str]]] = {}
    for cls in methods().values():
        for key, parameter in cls.hyperparameters().items():
            hints.setdefault(key, cls.hint(key))
            named = meanings.setdefault(key, {}).setdefault(_argument_help(cls, key), [])
            named.append(f"{cls.name}: {_shown(parameter.default)}")
    made = []
    for key, by_meaning in meanings.items():
        text = ". ".join(f"{meaning} ({'; '.join(named)})".lstrip() for meaning, named in by_meaning.items())
        made.append(options.parameter(key, hints[key], text, panel="Hyperparameters of methods"))
    return made


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _argument_help(cls: type, key: str) -> str:
    """What a class docstring's Args say of a hyperparameter: `key: text` up to the next one, or to the section Raises."""
    for owner in cls.__mro__:
        end = r"[.;]\s+\w+:\s|\n\s*\n|\n\s*\w+:\s|\n\s*Raises\b|$"
        found = re.search(rf"\b{key}:\s+(.+?)(?={end})", owner.__doc__ or "", re.DOTALL)
        if found:
            text = " ".join(found[1].split()).rstrip(".;")
            return text[0].upper() + text[1:]
    return ""


def finetune(
    folder: Annotated[Path | None, typer.Argument(help="Folder of the run, with --resume.", show_default=False)] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML recipe; flags override it.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show the plan with memory, disk and time, and stop; no weights are loaded. With --resume, show what is left.",
        ),
    ] = False,
    race: Annotated[
        str | None,
        typer.Option(
            "--race",
            help="Learning rates, separated by commas, that race over the first steps; the best takes the rest of the run.",
        ),
    ] = None,
    race_steps: Annotated[
        int | None, typer.Option("--race-steps", min=1, help="Steps of each round of the race, by default 12.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **values: Any,
) -> None:
    """Fine-tune a model on a task with forward passes only (or first-order, to compare).

    metazo finetune --model pico --task pico_sentiment --out runs/a --optimizer mezo --scale rms --lr 3e-4

    metazo finetune --resume runs/a
    """
    began = _began(folder, values)
    names = {item.name for item in options.fields(FinetuneConfig)}
    own = {key: values.pop(key) for key in list(values) if key not in names}
    own = {
        key: tuple(value) if isinstance(value, list) else value for key, value in own.items() if value not in (None, [])
    }
    settings = options.settings(FinetuneConfig, config, {**values, "method": own or None}, began)
    first = os.environ.get("RANK", "0") == "0"  # the one process that says anything, if torchrun started several
    console = Terminal(stderr=as_json, quiet=not first)
    from metazo.runs.names import check_names  # before torch is imported

    check_names(settings, data=not dry_run)
    if race_steps is not None and race is None:
        raise UserError("--race-steps is the length of a round of --race, which is not given; leave it out.")
    if dry_run:
        from metazo.runs.dryrun import dry_run as planned

        if race is not None:
            raise UserError(
                "--race has no dry run; give one of its rates as --lr, with which memory and time are the same."
            )
        if first:
            _show_plan(planned(settings), as_json)
        return
    if settings.out is None:
        raise UserError("`out` is required: name the folder for everything that the run writes.")
    from metazo.runs.finetune import tune
    from metazo.runs.tuned import Given

    console.say("metazo finetune", f"{settings.model} on {settings.task} with {settings.optimizer}", "bold")
    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # an objective may print
        if race is None:
            given = Given(unnamed=bool(began) and values["objective"] is None)
            summary = tune(settings, given, console=console, push_again=values["push"] is not None).summary
        else:
            from metazo.runs.race import ROUND
            from metazo.runs.race import race as raced

            settings.lr = values["lr"]  # that of a recipe gives way
            summary = raced(settings, _rates(race), race_steps or ROUND, console).summary
    if as_json:
        if first:
            print_json(summary)
        return
    show_result(console, summary, settings)


def _rates(text: str) -> list[float]:
    """The numbers of --race. Raises UserError for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--race is {text!r}; give learning rates separated by commas, such as 1e-4,4e-4,1.6e-3."
        ) from None


def _began(folder: Path | None, values: dict[str, Any]) -> dict[str, Any]:
    """The settings with which a resumed run began; its folder is added to `values`."""
    from metazo.runs.locate import located, read_config

    if not values["resume"]:
        if folder is not None:
            raise UserError(
                f"{folder} has no flag: name a new run's folder with --out, or continue a run with "
                f"--resume {quote(str(folder))}."
            )
        return {}
    if folder is not None and values["out"] not in (None, folder):
        raise UserError(f"--resume {folder} and --out {values['out']} name two folders; give one of them.")
    values["out"] = folder or values["out"]
    if values["out"] is None:
        raise UserError("--resume needs the folder of the run: metazo finetune --resume FOLDER.")
    known = {item.name for item in options.fields(FinetuneConfig)} - {"out", "resume"}
    began = located(read_config(values["out"]), values["out"], ("data", "zoo"))
    return {key: value for key, value in began.items() if key in known}


def _show_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(plan)
        return
    table = Table("plan", "", title="Nothing is loaded, run or written")
    for name, value in plan.items():
        if isinstance(value, str):
            table.add_row(name, Text(in_flags(value)))
    for note in plan["notes"]:
        table.add_row("note", Text(in_flags(note)))
    Console().print(table)


def show_result(console: Console, summary: dict[str, Any], settings: FinetuneConfig) -> None:
    table = Table(title=Text(f"{summary['task']}, {summary['optimizer']}, {summary['forwards']:,} forward passes"))
    parts = {"before (dev)": summary["before"], f"step {summary['kept_step']} (dev)": summary["dev"]}
    parts["test"] = summary["test"]
    names = list(dict.fromkeys(name for part in parts.values() for name in part))
    for heading in ("", *names):
        table.add_column(heading, justify="left" if not heading else "right")
    for label, part in parts.items():
        table.add_row(label, *(f"{part[name]:.4g}" if name in part else "" for name in names))
    console.print(table)
    assert settings.out is not None
    made = {"plot": (settings.out / "curve.png").exists(), "model": settings.keep != "none"}
    files = ", ".join(["config", "step log", "metrics", *(name for name in made if made[name])])
    console.print(f"{summary['seconds']:.0f} s; {files}: in {settings.out}", soft_wrap=True)


_flags = options.flags(FinetuneConfig, skip=("method",), extra={"optimizer": ": " + ", ".join(methods())})
command = options.with_flags(finetune, _flags + _method_flags())
