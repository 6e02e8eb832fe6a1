"""metazo meta-train"""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from metazo.errors import UserError
from metazo.io.terminal import print_json, print_line
from metazo.meta.config import MetaConfig
from metazo.meta.feedback_config import FeedbackConfig
from metazo.meta.horizon_config import HorizonConfig
from metazo.recipes import locate
from metazo.settings import read_recipe

from . import options
from .messages import Terminal

CONFIGS: dict[str, type] = {"scale": MetaConfig, "horizon": HorizonConfig, "feedback": FeedbackConfig}
FLAGS = {"scale": "--learn scale", "horizon": "--objective horizon", "feedback": "--learn feedback"}


def meta_train(
    learn: Annotated[
        str | None,
        typer.Option(
            "--learn",
            help="What is learned: scale, the perturbation scale of each block (default), or feedback, the mean Jacobians of "
            "the blocks, from text without labels.",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML recipe; flags override it.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan with memory and disk use, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **values: Any,
) -> None:
    """Train a tuner for a base model: block scales for zeroth-order fine-tuning, or feedback. Publish it with metazo zoo push.

    metazo meta-train --model pico --task pico_topic --out runs/tuner

    metazo meta-train --objective horizon --model pico --task pico_topic --task pico_span --out runs/horizon

    metazo meta-train --learn feedback --model pico --out runs/feedback
    """
    from metazo.meta.train import dry, meta_train
    from metazo.tuner.limits import TUNER

    settings = _settings(learn, config, values)
    if dry_run:
        if isinstance(settings, FeedbackConfig):
            raise UserError("--dry-run goes with --learn scale; a fit of feedback takes a minute or two.")
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
    if "result" not in tuner.info.recipe:  # else it has learned nothing, as a note has said
        console.print(f"Publish it: metazo zoo push {quote(path)}", soft_wrap=True)


def _settings(
    learn: str | None, config: Path | None, values: dict[str, Any]
) -> MetaConfig | HorizonConfig | FeedbackConfig:
    """The settings of what is learned. Raises UserError for a setting that belongs to the other kinds alone."""
    path = locate(str(config)) if config else None
    recipe = read_recipe(path) if path else {}
    learn = learn or str(recipe.pop("learn", "scale"))
    recipe.pop("learn", None)
    if learn not in ("scale", "feedback"):
        raise UserError(f"`learn` {learn!r} is unknown: choose scale or feedback.")
    given = {key: value for key, value in values.items() if value is not None and value != []}
    if learn == "scale" and given.get("objective", recipe.get("objective")) == "horizon":
        learn = "horizon"
    recipe = options.without_length(recipe, given)
    known = {item.name for item in options.fields(CONFIGS[learn])}
    for key in (*recipe, *given):
        if key not in known and any(key in other.__dataclass_fields__ for other in CONFIGS.values()):
            raise UserError(f"`{key}` does not go with {FLAGS[learn]}; leave it out.")
    return options.build_from(CONFIGS[learn], path, recipe, given)  # type: ignore[return-value]


_scale = [item.name for item in options.fields(MetaConfig)]
_every = [*_scale, *(item.name for item in options.fields(HorizonConfig))]
_more = {
    "objective": "; horizon: the loss at the end of whole runs, by evolution strategies",
    "max_length": "; with --learn feedback 64",
    "task": "; --learn feedback needs none",
    "steps": "; with --objective horizon the pairs of runs, by default 120",
}
command = options.with_flags(
    meta_train,
    [
        *options.flags(MetaConfig, extra=_more),
        *options.flags(HorizonConfig, skip=tuple(_scale), panel="With --objective horizon"),
        *options.flags(FeedbackConfig, skip=tuple(_every), panel="With --learn feedback"),
    ],
)
