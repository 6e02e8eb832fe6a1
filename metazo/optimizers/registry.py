"""The registry of methods, and what a method says of itself: one class per method, and nothing elsewhere.

    @register
    class MyMethod(ZOOptimizer):
        name, paper = "my-method", "arXiv 2601.00001"

Every module of this folder is imported when the registry is first asked for. Methods of your own are found through the
environment: METAZO_METHODS names modules or files, separated by commas, and every process of metazo (the command line,
the workers of a comparison) imports them:

    METAZO_METHODS=my_package.my_method,./toy.py metazo finetune --optimizer my-method ...
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from metazo.errors import UserError
from metazo.step.record import Step

VARIABLE = "METAZO_METHODS"


@dataclass(frozen=True)
class Case:
    """How the contract suite (tests/optimizers) constructs a method.

    quadratic, stiff, llama, saddle: learning rates on the problems of those names. along: what a first update lies along,
    the probed displacements of each tensor ("span"), these but for a positive factor per entry ("sign", one query only), or
    neither ("free", a method with a test of its own for this). scaled: takes a block scale of the caller's.
    """

    quadratic: float = 0.05
    stiff: float = 1e-3
    llama: float = 2e-3
    saddle: float = 0.05
    options: dict[str, Any] = field(default_factory=dict)
    along: str = "span"
    scaled: bool = True


class Method:
    """What every method says of itself; the loop, the comparison, the command line and the tests read it here."""

    name: str = ""
    paper: str = "ours"
    """Its source, such as arXiv 2305.17333."""
    own_rule: str | None = None
    """Why another rule on top makes no sense, as the end of a sentence; None if any rule will do."""
    common: frozenset[str] = frozenset()
    """Those settings of a run beyond lr and weight_decay that the constructor takes: eps, seed, noise, scale, ..."""
    search_rate: float | None = None
    """Learning rate that a search starts around; None: MeZO's for the size of the model, times `search_factor`."""
    search_factor: float = 1.0
    energy: float = 1.0
    """Mean square of a direction's entries: times lr, the learning rate that methods compare by."""
    replayable: bool = True
    """Whether a step follows from its record; the steps of other methods are computed again when a run is resumed."""
    wants_full_closure: bool = False
    """Whether the loss over all training examples is to be set as `full_closure` before the first step."""
    needs_model: bool = False
    """Whether the constructor takes the model, as `model`."""
    needs_tuner: bool = False
    """Whether the constructor must be given a tuner's scale."""
    needs: tuple[str, ...] = ()
    """Hyperparameters that must be given: a comparison of all methods leaves the method out."""
    moments: int = 0
    """Copies of the weights that come with the first step and that `tensors_state` does not show before it."""
    contract_case: Case = Case()

    steps: int
    forwards: int
    last_step: Step | None
    recorder: Callable[[Step], None] | None
    max_loss: float
    defer: bool = False
    """If true, a step's update may wait for the next step; `settle` is called before the weights are read."""
    noise: Any = None
    scale: Any = None

    def settle(self) -> None:
        """Apply the update that waits for the next step, if one does."""

    @property
    def notes(self) -> Sequence[str]:
        """What a user should be told after a run, a sentence each."""
        return ()

    @classmethod
    def resolve(cls, options: Mapping[str, Any], model: nn.Module, closure: Callable[[], Any]) -> dict[str, Any]:
        """The constructor's keyword arguments with what model and data have to say, so that a replay needs neither.

        Called once before the first step of a run. closure: the loss of one batch. The weights must be left as they are.
        """
        return dict(options)

    @classmethod
    def translate(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Hyperparameters under the names that they have today: logs and recipes keep those of their time."""
        return dict(options)

    @classmethod
    def hyperparameters(cls) -> dict[str, inspect.Parameter]:
        """The method's own: the parameters of its constructors beyond those that every method shares."""
        found: dict[str, inspect.Parameter] = {}
        for owner in reversed(cls.__mro__):
            if issubclass(owner, Method) and "__init__" in vars(owner):
                found |= inspect.signature(owner.__init__).parameters
        shared = {"self", "params", "lr", "weight_decay", "model", *cls.common}
        return {key: p for key, p in found.items() if key not in shared and p.kind is not p.VAR_KEYWORD}

    def __new__(cls, *args: Any, **options: Any):
        """compat="official" gives the subclass with the faults of the published code (metazo/optimizers/official)."""
        options = cls.translate(options)
        compat = options.get("compat", "paper")
        if compat not in ("paper", "official"):
            raise UserError(f"compat {compat!r} is unknown: choose paper or official.")
        if compat == "official" and "compat" in cls.hyperparameters():
            importlib.import_module(f"metazo.optimizers.official.{cls.__module__.rpartition('.')[2]}")
            return super().__new__(OFFICIAL.get(cls, cls))  # type: ignore[arg-type]
        return super().__new__(cls)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy.deepcopy: all but callbacks and hooks, which belong to the process or to another model."""
        state = {key: value for key, value in vars(self).items() if not key.startswith("_optimizer_")}
        state.pop("step", None)  # a learning rate scheduler's wrapper
        return state | {key: None for key in ("recorder", "full_closure") if key in state}


class Optimizing(Protocol):
    """What the loop needs of an optimizer, beside `Method`."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    def step(self, closure: Any, *, replay: Step | None = None) -> float: ...
    def forwards_per_step(self, closures: int = 1) -> float: ...
    def tensors_state(self) -> dict[str, Tensor]: ...
    def load_tensors_state(self, state: dict[str, Tensor]) -> None: ...


METHODS: dict[str, type[Method]] = {}
"""Every method by name."""
OPTIMIZERS: dict[str, type[Method]] = {}
"""Those that evaluate the loss along directions: subclasses of ZOOptimizer."""
OFFICIAL: dict[type[Method], type[Method]] = {}
"""The published code of a method with its faults, by the method."""

M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: the method can be chosen by its name from now on. Raises UserError for a name that is taken."""
    other = METHODS.get(cls.name)
    if not cls.name:
        raise UserError(f"{cls.__name__} has no name to be chosen by; give the class an attribute `name`.")
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise UserError(f"The method name {cls.name!r} is taken by {other.__module__}; give {cls.__name__} another.")
    METHODS[cls.name] = cls
    if "eps" in cls.common:
        OPTIMIZERS[cls.name] = cls
    return cls


def official(method: type[Method]) -> Callable[[M], M]:
    """Class decorator: this subclass is what compat="official" gives for the method."""

    def add(cls: M) -> M:
        OFFICIAL[method] = cls
        return cls

    return add


@cache
def load() -> None:
    """Import every method: the modules of this folder, then those that METAZO_METHODS names."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"metazo.optimizers.{module.name}")
    for entry in filter(None, os.environ.get(VARIABLE, "").split(",")):
        load_entry(entry.strip())


def load_entry(entry: str) -> None:
    """Import a module by name, or a file. Raises UserError if there is none, or it fails."""
    path = Path(entry)
    try:
        if path.suffix != ".py":
            importlib.import_module(entry)
            return
        name = path.stem
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    except (ImportError, OSError) as error:
        raise UserError(f"{VARIABLE} names {entry!r}, which cannot be imported: {error}.") from error


def method(name: str) -> type[Method]:
    """The class of a method. Raises UserError for a name that is not there."""
    load()
    if name not in METHODS:
        raise UserError(f"`optimizer` {name!r} is unknown; choose one of {', '.join(METHODS)}.")
    return METHODS[name]
