"""`metazo zoo`: list, show, pull, push, verify and import tuners."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from metazo.errors import UserError
from metazo.io.plain import cut
from metazo.io.terminal import Console, print_json, print_line

from .messages import in_flags

if TYPE_CHECKING:
    from metazo import zoo as library
    from metazo.feedback.tuner import FeedbackTuner
    from metazo.tuner.file import Tuner

app = typer.Typer(help="Find, check, publish and import tuners.", no_args_is_help=True)

ZooOption = Annotated[Path | None, typer.Option("--zoo", help="Zoo folder to search first.", envvar=None)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
KeyOption = Annotated[
    str | None, typer.Option("--key", help="Public key of minisign that must have signed the zoo's index.")
]
SourceArgument = Annotated[
    str, typer.Argument(help="A file, a folder, a name in a zoo, an https address, or a Hub id org/name@revision.")
]


@app.command("list")
def list_(zoo: ZooOption = None, as_json: JsonOption = False) -> None:
    """List the tuners and logs in the zoo folders: your own, the bundled one, and the cache of pulled ones."""
    from metazo import zoo as library

    found = library.entries(zoo)
    if as_json:
        print_json([{**asdict(tuner.entry), "where": tuner.where, "path": str(tuner.path)} for tuner in found])
        return
    rows = [
        (
            tuner.entry.name,
            tuner.entry.base_model,
            _holds(tuner.entry),
            f"{tuner.entry.size / 1e6:.2f} MB",
            (tuner.entry.fingerprint or ("by names" if tuner.entry.kind == "tuner" else ""))[:12],
            tuner.entry.licence or "none stated",
            tuner.where,
        )
        for tuner in found
    ]
    _print_table(("name", "base model", "blocks", "size", "fingerprint", "licence", "where"), rows)
    if not found:
        print_line("No tuners yet: make one with `metazo meta-train` and publish it with `metazo zoo push`.")


@app.command()
def show(source: SourceArgument, zoo: ZooOption = None, as_json: JsonOption = False) -> None:
    """Show a tuner's base model, training and measurements, or the header of a step log."""
    from metazo import zoo as library

    found = library.read(source, zoo, _report)
    about = _about_log(found) if isinstance(found, library.Log) else _about(found)
    if as_json:
        blocks = (
            {"blocks": [asdict(block) for block in found.info.blocks]} if not isinstance(found, library.Log) else {}
        )
        print_json({**about, **blocks})
        return
    rows = [(key, json.dumps(cut(value)) if isinstance(value, dict) else str(value)) for key, value in about.items()]
    _print_table(("", source), rows)


@app.command()
def pull(source: SourceArgument, zoo: ZooOption = None, key: KeyOption = None, as_json: JsonOption = False) -> None:
    """Get a tuner or step log, check it, and keep it in the cache ($HF_HOME/metazo/cache)."""
    from metazo import zoo as library

    found = library.pull(source, zoo, _report, key)
    if as_json:
        print_json({**asdict(found.entry), "path": str(found.path)})
    else:
        print_line(f"{found.entry.name} for {found.entry.base_model}, {_holds(found.entry)}: {found.path}")


@app.command()
def push(
    tuner: Annotated[Path | None, typer.Argument(help="A tuner file, or the folder of a meta-training run.")] = None,
    log: Annotated[
        Path | None, typer.Option(help="A run's steps.jsonl, to publish its model as a step log instead of a tuner.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="A zoo folder (default: METAZO_ZOO, or else metazo/zoo in the cache of Hugging Face), or hub:org/name."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the base model (or, with --log, of the model).")] = None,
    version: Annotated[str | None, typer.Option(help="Version (default: the next of v1, v2, ...).")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the tuner, such as Apache-2.0.")] = None,
    sign: Annotated[str | None, typer.Option(help="Sign the zoo's index with this secret key of minisign.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a tuner or a run's step log into a zoo folder, with card and index entry; a tuner can also go to the Hub."""
    from metazo import zoo as library
    from metazo.zoo.index import own_folder

    signing = library.signer(sign, _password) if sign is not None else None
    if (tuner is None) == (log is None):
        raise UserError("give either a tuner or --log RUN/steps.jsonl")
    if log is not None:
        published = library.push_log(log, to, name=name, version=version, licence=licence, sign=signing)
    else:
        published = library.push(str(tuner), to, base=name, version=version, licence=licence, sign=signing)
    target = to or str(own_folder())
    if as_json:
        print_json({"published": published, "to": target})
    else:
        print_line(f"published {published} to {target}")


@app.command()
def verify(zoo: ZooOption = None, key: KeyOption = None, as_json: JsonOption = False) -> None:
    """Hash and check all files of the zoo folders again; the exit code is 1 if something is wrong."""
    from metazo import zoo as library

    checks = library.verify(zoo, key)
    bad = [check for check in checks if check.problem]
    if as_json:
        print_json([{**asdict(check), "folder": str(check.folder)} for check in checks])
    else:
        rows = [(c.name, c.where, c.problem or c.note or "in order") for c in checks]
        _print_table(("name", "where", "state"), rows)
        unseen = sum(not check.seen for check in checks)
        more = f", {unseen} not checked" if unseen else ""
        signed = "; the index is signed by the key" if key else ""
        print_line(f"{len(checks) - len(bad) - unseen} of {len(checks)} in order{more}{signed}")
    if bad:
        raise typer.Exit(1)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="Published pickled tuner (.pth).")],
    base_model: Annotated[str, typer.Option(help="Name of the base model for which it was made.")],
    model: Annotated[
        Path | None, typer.Option(help="Folder with the base model's config.json, for the shapes.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write (default: the name with .safetensors, here).")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the tuner, if its authors state one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Convert a published pickled tuner to safetensors, without executing the pickle."""
    from metazo import zoo as library

    target = out or Path(file.with_suffix(".safetensors").name)
    if target.exists():
        raise UserError(f"--out {target} exists already; choose another name")
    tuner = library.import_pth(file, base_model, model, licence)
    tuner.save(target)
    if as_json:
        print_json({**_about(tuner), "path": str(target)})
        return
    by = "names and shapes" if tuner.info.fingerprint else "names alone (give --model for the shapes)"
    print_line(f"{target}: {len(tuner.info.blocks)} blocks for {base_model}, will be matched by {by}")
    print_line(f"layout: {tuner.info.recipe['layout']}")


def _holds(entry: library.Entry) -> str:
    what = {"tuner": f"{entry.blocks} blocks", "feedback": f"feedback, {entry.blocks} blocks", "log": "step log"}
    return what[entry.kind]


def _about(tuner: Tuner | FeedbackTuner) -> dict[str, Any]:
    """The metadata of a tuner, without the list of its blocks."""
    from metazo.feedback.tuner import FeedbackTuner

    if isinstance(tuner, FeedbackTuner):
        width, rank = next(iter(tuner.maps.down.values())).shape
        return {**asdict(tuner.info), "blocks": len(tuner.info.blocks), "width": width, "rank": rank}
    networks = {"blocks": tuner.pertnn.blocks, "hidden": tuner.pertnn.hidden, "inputs": tuner.pertnn.features}
    return {**asdict(tuner.info), **networks}


def _about_log(log: library.Log) -> dict[str, Any]:
    """The facts in the header of a step log."""
    return {**log.header, "steps": len(log.steps), "bytes": len(log.data), "end": log.end}


def _password() -> str:
    return os.environ.get("METAZO_SIGN_PASSWORD") or typer.prompt("Password of the secret key", hide_input=True)


def _report(line: str) -> None:
    print_line(in_flags(line), stderr=True)


def _print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
