"""metazo meta-train"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from metazo.io.terminal import print_json, print_line
from metazo.meta.config import MetaConfig

from . import options
from .messages import Terminal


def meta_train(
    config: Annotated[Path | None, typer.Option("--config", help="YAML recipe; flags override it.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan with memory and disk use, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **values: Any,
) -> None:
    """Train a tuner for a base model: it computes block scales for zeroth-order fine-tuning. Publish it with metazo zoo push.

    metazo meta-train --model pico --task pico_topic --out runs/tuner
    """
    from metazo.meta.train import TUNER, dry, meta_train

    settings = options.settings(MetaConfig, config, values)
    if dry_run:
        plan = dry(settings)
        if as_json:
            print_json(plan.to_dict())
        else:
            print_line(plan.sentence())
        return
    console = Terminal(stderr=as_json)
    tuner = meta_train(settings, console=console)
    path = str(settings.out / TUNER)
    if as_json:
        print_json({"tuner": path, "base_model": tuner.info.base_model, "recipe": tuner.info.recipe})
        return
    console.print(f"Publish it: metazo zoo push {path}", soft_wrap=True)


command = options.with_flags(meta_train, options.flags(MetaConfig))
