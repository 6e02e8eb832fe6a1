"""The columns of a comparison: a method with its settings, by name or as the user's own variant."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from metazo.errors import UserError
from metazo.io.files import safe_name
from metazo.io.plain import shown
from metazo.optimizers.outline import methods
from metazo.optimizers.registry import method
from metazo.runs.config import FinetuneConfig
from metazo.settings import as_rate

ZERO_SHOT = "zero-shot"
RANDOM_TUNERS = (
    3  # several, because one may be good by chance (the published tuners hardly differ from their random starts)
)
# Settings that the grid itself sets, equally for all columns.
RESERVED = ("task", "out", "lr", "steps", "forwards", "seed", "split_seed", "resume", "optimizer", "data", "keep",
            "snapshot_every")  # fmt: skip
# Settings that make no sense in a comparison, and why.
OUTSIDE = {
    "track": "keeps its files in the folder of each run, which a comparison removes, and metazo report has the curves",
    "push": "uploads the model of one run, and all runs of a comparison would go to the same repository",
}


@dataclass(frozen=True)
class Column:
    """A method with its settings; its learning rate is searched, and it is run and shown, as a unit."""

    name: str
    """Its name in folders and tables"""
    optimizer: str = "mezo"
    """Method, or zero-shot: the model without training"""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of a run (as for metazo finetune), and hyperparameters of the method"""
    lrs: list[float] | None = None
    """Learning rates at which its search starts; a single one is used without a search"""
    budget: int | None = None
    """Forward passes per run, if not the grid's"""

    @property
    def trains(self) -> bool:
        return self.optimizer != ZERO_SHOT

    @property
    def label(self) -> str:
        """The column in words: its method and its settings."""
        words = [f"{key.replace('_', ' ')} {value}" for key, value in self.options.items() if key != "method"]
        words += [f"{key} {value}" for key, value in self.options.get("method", {}).items()]
        return ", ".join([self.optimizer, *words])

    def settings(self) -> dict[str, Any]:
        """The options as settings of a run, with the hyperparameters separate. Raises UserError for unknown options."""
        cls = method(self.optimizer) if self.trains else None
        own = cls.hyperparameters() if cls else {}
        plain = {key.replace("-", "_"): value for key, value in self.options.items()}
        if cls is not None:
            plain = cls.translate(plain)
        given = plain.pop("method", None) or {}
        if not isinstance(given, dict):
            raise UserError(
                f"Column {self.name!r}: method is {shown(given)}, and must be a mapping of hyperparameters."
            )
        chosen = {**given, **{key: plain.pop(key) for key in list(plain) if key in own}}
        kinds = (
            f"neither a setting of a run nor a hyperparameter of {self.optimizer}" if own else "not a setting of a run"
        )
        check_settings(f"Column {self.name!r}", plain, kinds, own)
        return plain | ({"method": chosen} if chosen else {})


def check_settings(
    where: str, settings: Mapping[str, Any], unknown: str = "not a setting of a run", own: Iterable[str] = ()
) -> None:
    """Raises UserError for settings that the runs of a comparison cannot have. where: what holds them, for the message."""
    known = [name for name in FinetuneConfig.__dataclass_fields__ if name not in RESERVED]
    for key, value in settings.items():
        if key == "patience" and value is not None:
            raise UserError(
                f"{where}: `patience` ends runs before their budget, and a comparison gives every run the same budget; "
                "leave it out."
            )
        if key in OUTSIDE and value:
            raise UserError(f"{where}: `{key}` {OUTSIDE[key]}; leave it out.")
        if key in RESERVED:
            raise UserError(f"{where}: {key!r} is set by the grid for all columns, not in options.")
        if key not in known:
            raise UserError(f"{where}: {key!r} is {unknown}{_nearest(key, [*known, *own])}.")


MOST_COLUMNS = 1000
CONTROLS = {
    "mezo-rms": Column("mezo-rms", "mezo", {"scale": "rms"}),
    "tuner": Column("tuner", "zo-finetuner"),
    "random-tuner": Column("random-tuner", "zo-finetuner"),
    "dominant-layer": Column("dominant-layer", "dominant-layer", {"layer": "outlier"}),
    "lora-adamw": Column("lora-adamw", "first-order-adamw", {"lora": 8}),
    "lora-mezo": Column("lora-mezo", "mezo", {"lora": 8}),
    ZERO_SHOT: Column(ZERO_SHOT, ZERO_SHOT),
}


def names() -> list[str]:
    """Every name that `columns` accepts."""
    return list(dict.fromkeys([*methods(), *CONTROLS, "all"]))


def resolve(entries: Sequence[str | dict[str, Any]], tuner: str | None = None) -> list[Column]:
    """Columns from names and mappings (name, optimizer, options, lrs, budget).

    random-tuner gives RANDOM_TUNERS columns; all gives every column. tuner: for the columns that need one and name none;
    by default one that fits is searched in the zoo. Raises UserError for an unknown or repeated column.
    """
    found: list[Column] = []
    if len(entries) > MOST_COLUMNS:
        raise UserError(f"`columns` has {len(entries):,} entries; a comparison takes at most {MOST_COLUMNS:,}.")
    for entry in entries:
        for column in _named(entry) if isinstance(entry, str) else [_variant(entry)]:
            if column.trains and methods()[column.optimizer].needs_tuner and "tuner" not in column.options:
                options = {"tuner": tuner or "auto", **column.options}
                column = replace(column, options=options)
            found.append(column)
    for column in found:
        safe_name(column.name, "column")
        if "/" in column.name or sum(other.name == column.name for other in found) > 1:
            raise UserError(
                f"Column {column.name!r} is given twice, or has a slash in its name; give each its own name."
            )
        column.settings()
    if not found:
        raise UserError(f"`columns` is empty, and a comparison needs at least one; there are {', '.join(names())}.")
    return found


def _named(name: str) -> list[Column]:
    if name == "all":
        left_out = {"all", *(key for key, cls in methods().items() if cls.needs_tuner)}
        own = [each for each in names() if each not in left_out]
        return [column for each in own for column in _named(each)]
    if name == "random-tuner":
        return [Column(f"{name}-{n}", "zo-finetuner", {"tuner": f"random:{n}"}) for n in range(RANDOM_TUNERS)]
    if name in CONTROLS:
        return [CONTROLS[name]]
    if name in methods():
        return [Column(name, name)]
    raise UserError(f"`columns`: {name!r} is unknown{_nearest(name, names())}; there are {', '.join(names())}.")


def _variant(entry: Any) -> Column:
    known = tuple(Column.__dataclass_fields__)
    if not isinstance(entry, dict) or "name" not in entry:
        raise UserError(f"A column is a name or a mapping with a name ({', '.join(known)}), not {entry!r}.")
    for key in entry:
        if key not in known:
            raise UserError(f"Column {entry['name']!r}: {key!r} is not one of {', '.join(known)}.")
    base = (
        _named(entry["name"])[0]
        if entry["name"] in (*methods(), *CONTROLS) and "optimizer" not in entry
        else Column("")
    )
    optimizer = entry.get("optimizer", base.optimizer)
    if optimizer not in (*methods(), ZERO_SHOT):
        raise UserError(
            f"Column {entry['name']!r}: optimizer {optimizer!r} is unknown{_nearest(optimizer, methods())}."
        )
    options = entry.get("options") or {}
    if not isinstance(options, dict):
        raise UserError(f"Column {entry['name']!r}: options is a mapping of settings, not {options!r}.")
    for key in options:
        if not isinstance(key, str):
            raise UserError(f"Column {entry['name']!r}: options has the key {shown(key)}; give names of settings.")
    lrs = entry.get("lrs")
    rates = None if lrs is None else sorted(read_rates(f"Column {entry['name']!r}: lrs", lrs))
    budget = entry.get("budget")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise UserError(f"Column {entry['name']!r}: budget is a whole number of at least 1, not {shown(budget)}.")
    return Column(str(entry["name"]), optimizer, {**base.options, **options}, rates, budget)


def read_rates(where: str, lrs: Any) -> list[float]:
    """Learning rates, in the order given; a text that is a number, which YAML makes of 1e-3, is taken as the number.

    Raises UserError for what is no list of learning rates, and for a rate that is there twice: rates are compared as they are
    written in the names of files, with six digits. where: what holds them, for the message.
    """
    rates = [as_rate(lr) for lr in lrs] if isinstance(lrs, list) else []
    if not rates or None in rates:
        raise UserError(f"{where} is a list of finite numbers above 0, not {shown(lrs)}.")
    name, count = Counter(f"{rate:g}" for rate in rates).most_common(1)[0]
    if count > 1:
        raise UserError(f"{where} has the rate {name} {count} times (six digits count); give each rate once.")
    return [rate for rate in rates if rate is not None]


def _nearest(name: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
