"""Publish a tuner into a zoo folder or to the Hub."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from metazo.errors import UserError
from metazo.files import safe_name
from metazo.tuner import Tuner, TunerInfo
from metazo.zoo.card import card
from metazo.zoo.hub import hub_push
from metazo.zoo.index import add, own_folder
from metazo.zoo.sources import zoo_base


def push(
    tuner: Tuner | str | Path,
    to: str | Path | None = None,
    *,
    base: str | None = None,
    version: str | None = None,
    licence: str | None = None,
) -> str:
    """Publish a tuner, a tuner file or a folder that holds one; returns the name or address it is published under.

    to: a zoo folder, made if missing, by default the user's own (`METAZO_ZOO`); or `hub:org/name`.
    base: what the base model is called in the zoo; by default the name in the tuner, or its last part if that is a
    path, which others do not have. version: by default the next of v1, v2, ... licence: states or replaces it.
    Raises UserError if the tuner is unfit, the name is taken by another tuner, or the zoo cannot be written.
    """
    tuner = tuner if isinstance(tuner, Tuner) else Tuner.load(tuner)
    base = safe_name(base, "--name") if base else zoo_base(tuner.info.base_model)
    info = replace(tuner.info, base_model=base, licence=licence or tuner.info.licence)
    data = Tuner(tuner.pertnn, info).to_bytes()
    tuner = Tuner.from_bytes(data, "the tuner to be published")
    if not str(to or "").startswith("hub:"):
        found = add(data, tuner, Path(to) if to else own_folder(), base, version)
        return found.entry.name
    if version:
        raise UserError("--version does not go with a Hub repository, which keeps its own revisions")
    repository = str(to).removeprefix("hub:")
    return hub_push(repository, data, front_matter(info) + card(info, repository, sha256(data).hexdigest()))


def front_matter(info: TunerInfo) -> str:
    """What the Hub reads at the head of a card, in YAML."""
    licence = f"license: {_yaml(info.licence.lower())}\n" if info.licence else ""
    return f"---\nlibrary_name: metazo\nbase_model: {_yaml(info.base_model)}\n{licence}tags: [metazo, tuner]\n---\n"


def _yaml(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
