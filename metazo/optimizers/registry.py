"""The registry of methods, and the attributes that describe a method; all of them are in the method's class.

    @register
    class MyMethod(ZOOptimizer):
        name, paper = "my-method", "arXiv 2601.00001"

Every module of this folder is imported at the first use of the registry. Your own methods are found through the
environment variable METAZO_METHODS, which names modules or files, separated by commas. Every process of metazo (the command
line, the workers of a comparison) imports them:

    METAZO_METHODS=my_package.my_method,./toy.py metazo finetune --optimizer my-method ...
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from metazo.errors import UserError
from metazo.io.modules import import_from, place
from metazo.step.record import Step

if TYPE_CHECKING:  # the command line shows its flags without torch
    from torch import Tensor, nn

VARIABLE = "METAZO_METHODS"
# MeZO's best rate is near 500 / D for D trained weights: 3e-4 on a model of 1.6 million (measured here), 1e-6 on
# RoBERTa-large and 1e-7 to 1e-8 on 13 billion (published). Other methods have a factor relative to that.
MEZO_RATE = 500.0


@dataclass(frozen=True)
class Case:
    """How the contract suite (tests/optimizers) constructs a method.

    quadratic, stiff, llama, saddle: learning rates on the problems of those names. along: the direction of a first update:
    in the span of the probed displacements of each tensor ("span"), equal to them up to a positive factor per entry ("sign",
    one query only), or neither ("free", for a method with its own test of this). scaled: accepts a block scale.
    """

    quadratic: float = 0.05
    stiff: float = 1e-3
    llama: float = 2e-3
    saddle: float = 0.05
    options: dict[str, Any] = field(default_factory=dict)
    along: str = "span"
    scaled: bool = True


class Method:
    """Attributes that describe a method to the loop, the comparison, the command line and the tests."""

    name: str = ""
    paper: str = "ours"
    """The method's source, such as arXiv 2305.17333."""
    own_rule: str | None = None
    """The reason why `rule` cannot be set, as the end of a sentence; None if every rule can be used."""
    precisions: tuple[str, ...] = ()
    """The values of `precision` that can be chosen; empty for all of them."""
    common: frozenset[str] = frozenset()
    """Settings of a run that the constructor takes in addition to lr and weight_decay: eps, seed, noise, scale, ..."""
    search_rate: float | None = None
    """Learning rate around which a search starts; None: MeZO's for the size of the model, times `search_factor`."""
    search_factor: float = 1.0
    energy: float = 1.0
    """Mean square of a direction's entries; multiplied by lr it gives a learning rate that is comparable between methods."""
    replayable: bool = True
    """Whether a step follows from its record; the steps of other methods are computed again when a run is resumed."""
    wants_full_closure: bool = False
    """Whether the loss over all training examples is to be set as `full_closure` before the first step."""
    needs_model: bool = False
    """Whether the constructor takes the model, as `model`."""
    needs_tuner: bool = False
    """Whether the constructor must be given a tuner's scale."""
    needs_gradient: bool = False
    """Whether a step needs a loss with a gradient, so that `objective` cannot be set."""
    moments: int = 0
    """Copies of the weights that are allocated at the first step, and that `tensors_state` does not contain before it."""
    contract_case: Case = Case()
    compat: str = "paper"
    """"official" for a class of metazo/optimizers/official, whose constructor does not keep the argument of this name."""

    steps: int
    forwards: int
    last_step: Step | None
    recorder: Callable[[Step], None] | None
    max_loss: float
    defer: bool = False
    """If true, a step's update may wait for the next step; `settle` is called before the weights are read or changed, and
    before the optimizer is copied."""
    noise: Any = None
    scale: Any = None
    measured_cost: float | None = None
    """Forward passes of a step with one closure as `measure_cost` found them; a resumed run keeps those of its log."""

    def measure_cost(self, closure: Callable[[], Any]) -> None:
        """Measure the cost of a step and set `measured_cost`, if `forwards_per_step` depends on the model and the loss.

        Called once before the first step of a run. closure: the loss of one batch. The weights must not change.
        """

    def forwards_in(self, steps: int, closures: int = 1) -> float:
        """Forward passes of the first steps of a run, if each probe evaluates `closures`."""
        return steps * self.forwards_per_step(closures)  # type: ignore[attr-defined]

    def settle(self) -> None:
        """Apply the update that waits for the next step, if there is one."""

    def trained(self) -> list[Tensor]:
        """The weights that are trained, also before the first step."""
        groups: list[dict[str, Any]] = self.param_groups  # type: ignore[attr-defined]
        return [param for group in groups for param in group["params"] if param.requires_grad]

    @property
    def notes(self) -> Sequence[str]:
        """Notes for the user after a run, one sentence each."""
        return ()

    @classmethod
    def resolve(cls, options: Mapping[str, Any], model: nn.Module, closure: Callable[[], Any]) -> dict[str, Any]:
        """The constructor's keyword arguments, with the values that depend on model and data, so that a replay needs neither.

        Called once before the first step of a run. closure: the loss of one batch. The weights must not change.
        """
        return dict(options)

    @classmethod
    def translate(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Hyperparameters under their present names; old logs and recipes may have earlier names."""
        return dict(options)

    @classmethod
    def expected_rate(cls, trained: int, energy: float = 1.0) -> float:
        """The learning rate around which a search starts, chosen by hand, for this number of trained weights.

        energy: mean square of the method's direction, by which rates are compared.
        """
        return cls.search_rate or cls.search_factor * MEZO_RATE / trained / energy

    @classmethod
    def hyperparameters(cls) -> dict[str, inspect.Parameter]:
        """The method's own hyperparameters: the parameters of its constructor that not every method has.

        They are those of its class and its bases, up to the first constructor that passes no further arguments on.
        """
        found: dict[str, inspect.Parameter] = {}
        for owner in cls.__mro__:
            if issubclass(owner, Method) and "__init__" in vars(owner):
                parameters = inspect.signature(owner.__init__).parameters
                found = {**parameters, **found}
                if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
                    break
        shared = {"self", "params", "lr", "weight_decay", "model", *cls.common}
        return {key: p for key, p in found.items() if key not in shared and p.kind is not p.VAR_KEYWORD}

    @classmethod
    def hint(cls, key: str) -> Any:
        """The type of a hyperparameter in the constructor's signature."""
        for owner in cls.__mro__:
            hints = get_type_hints(owner.__init__) if "__init__" in vars(owner) else {}
            if key in hints:
                return hints[key]
        return str

    def __new__(cls, *args: Any, **options: Any):
        """compat="official" gives the subclass with the faults of the published code (metazo/optimizers/official)."""
        options = cls.translate(options)
        compat = options.get("compat", "paper")
        if compat not in ("paper", "official"):
            raise UserError(f"`compat` {compat!r} is unknown: choose paper or official.")
        odd = [k for k, value in options.items() if isinstance(value, str | bool) or not hasattr(value, "__float__")]
        for key in odd:
            own = cls.hyperparameters().get(key)
            if own is not None and own.annotation in (float, int, "float", "int"):  # texts under postponed annotations
                raise UserError(f"`{key}` must be a number, not {options[key]!r}.")
        if compat == "official" != cls.compat and "compat" in cls.hyperparameters():
            if cls.__module__.startswith(f"{__package__}."):
                importlib.import_module(f"{__package__}.official.{cls.__module__.rpartition('.')[2]}")
            if cls not in OFFICIAL:
                raise UserError(
                    f"`compat` is official, and {cls.__name__} has no form with the faults of published code; leave it out."
                )
            return super().__new__(OFFICIAL[cls])  # type: ignore[arg-type]
        return super().__new__(cls)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy.deepcopy: everything except callbacks and hooks, which belong to this process and this model.

        Raises UserError if an update waits, because it would change the weights of the original and not those of the copy.
        """
        if getattr(vars(self).get("weights"), "waits", False):
            raise UserError(
                "The update of the last step waits (`defer`) and a copy would lose it: call optimizer.settle() before you copy "
                "or pickle the model and the optimizer."
            )
        state = {key: value for key, value in vars(self).items() if not key.startswith("_optimizer_")}
        state.pop("step", None)  # the wrapper of a learning rate scheduler
        return state | {key: None for key in ("recorder", "full_closure") if key in state}


METHODS: dict[str, type[Method]] = {}
"""Every method by name."""
OPTIMIZERS: dict[str, type[Method]] = {}
"""Methods that evaluate the loss along directions: subclasses of ZOOptimizer."""
OFFICIAL: dict[type[Method], type[Method]] = {}
"""The class of a method's published code with its faults, by the method's class."""
_ENTRIES: set[str] = set()
"""Modules and files of METAZO_METHODS that were imported, or are being imported."""

M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: make the method available by its name. Raises UserError for a name that is missing or taken, and for a
    constructor that does not take the settings of every run.
    """
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise UserError(
            "`register` stands alone above the class of a method, whose name is the class's attribute `name`."
        )
    other = METHODS.get(cls.name)
    if cls.name in ("", "base"):
        raise UserError(f"{cls.__name__} has no name; give the class an attribute `name`.")
    takes = inspect.signature(cls.__init__).parameters.values()
    missing = sorted(cls.common - {parameter.name for parameter in takes})
    if missing and all(parameter.kind is not parameter.VAR_KEYWORD for parameter in takes):
        raise UserError(
            f"The constructor of {cls.__name__} does not take {', '.join(missing)}: let it take **common, and pass it on to "
            "the constructor of its base."
        )
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise UserError(f"The method name {cls.name!r} is taken by {other.__module__}; give {cls.__name__} another.")
    METHODS[cls.name] = cls
    if "eps" in cls.common:
        OPTIMIZERS[cls.name] = cls
    return cls


def official(method: type[Method]) -> Callable[[M], M]:
    """Class decorator: compat="official" of the method gives this subclass."""

    def add(cls: M) -> M:
        OFFICIAL[method], cls.compat = cls, "official"
        return cls

    return add


def load() -> None:
    """Import every method: the modules of this folder, then those that METAZO_METHODS names."""
    _load_folder()
    _load_entries(os.environ.get(VARIABLE, ""))


@cache
def _load_folder() -> None:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"metazo.optimizers.{module.name}")
    for table in (METHODS, OPTIMIZERS):  # the same order whichever of them was imported first
        ordered = sorted(table.items(), key=lambda entry: entry[1].__module__)
        table.clear()
        table.update(ordered)


def _load_entries(entries: str) -> None:
    for entry in filter(None, (part.strip() for part in entries.split(","))):
        if entry in _ENTRIES:
            continue
        _ENTRIES.add(
            entry
        )  # before it is imported, because its own code may ask for the methods, as `metazo.MeZO` does
        try:
            load_entry(entry)
        except BaseException:
            _ENTRIES.discard(entry)
            raise


def load_entry(entry: str) -> None:
    """Import a module by name, or a file. Raises UserError if there is none, or it fails."""
    try:
        import_from(entry)
    except UserError:
        raise
    except Exception as error:  # the module's own code may raise anything
        kind = "" if isinstance(error, ImportError | OSError) else f"{type(error).__name__}: "
        raise UserError(
            f"{VARIABLE} names {entry!r}, which cannot be imported: {kind}{error}{place(error)}."
        ) from error


def method(name: str) -> type[Method]:
    """The class of a method. Raises UserError for an unknown name."""
    load()
    require(name, METHODS)
    return METHODS[name]


def require(name: str, known: Mapping[str, type[Method]]) -> None:
    """Raises UserError for a name that is not one of the known methods."""
    if name not in known:
        raise UserError(f"`optimizer` {name!r} is unknown; choose one of {', '.join(known)}.")


def require_own(name: str, options: Iterable[str], known: Mapping[str, type[Method]]) -> None:
    """Raises UserError for an option that is not a hyperparameter of the method with that name."""
    own = known[name].hyperparameters()
    for key in options:
        if key not in own:
            owners = [other for other in known if key in known[other].hyperparameters()]
            where = f"it belongs to {', '.join(owners)}" if owners else f"{name} has {', '.join(own) or 'none'}"
            raise UserError(f"`{key}` is not a hyperparameter of {name}; {where}.")
