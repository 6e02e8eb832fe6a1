"""How the state of an optimizer is stored: as tensors by name, and in torch's form."""

from __future__ import annotations

import copy
import hashlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from metazo.blocks import NamedTensor, shape_of, uncompiled
from metazo.errors import UserError
from metazo.kernels.splitfloat import LAYOUTS, with_bits
from metazo.noise import Noise, TorchOrderNoise
from metazo.optimizers.returned import check_form, check_whole
from metazo.optimizers.verbs import State
from metazo.step.estimators import Estimator
from metazo.step.precision import policy
from metazo.step.rules import Rule
from metazo.step.weights import Weights

NEUTRAL = {"self", "args", "kwargs", "params", "defaults", "lr", "weight_decay", "model", "common"}
"""Parameters of a constructor that are no hyperparameters of the method's own."""

OWN = {"zo", "run", "own", "shapes", "trained"}
"""Keys of a `state_dict` that are not torch's."""


def checksum_of_shards(tensors: Sequence[NamedTensor]) -> int:
    """63 bits of a hash of the entries that this process has of each sharded tensor."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        if tensor.spans is not None:
            found.update(tensor.name.encode() + tensor.spans.here.tobytes() + tensor.spans.there.tobytes())
    return int.from_bytes(found.digest(), "little") >> 1


def _plain(value: Any) -> Any:
    """The same with Python's own numbers in place of numpy's, so that torch loads it with weights_only."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


class Saving(Optimizer):
    """`tensors_state` and `state_dict` of ZOOptimizer, and their counterparts."""

    name: str
    steps: int
    forwards: int
    noise: Noise
    eps: float
    precision: str
    weights: Weights
    zo_state: State
    _form: State
    common: frozenset[str]
    rule: Rule
    estimator: Estimator
    _ready: bool
    _unrecorded: Any
    _torn = False
    """Whether a step has failed after it had changed the state, which then belongs to no step."""
    settle: Callable[[], None]
    _prepare: Callable[[], None]

    def tensors_state(self) -> State:
        """All state as tensors by name, masters and compensation included, ready to be stored as safetensors.

        Of a sharded model it is the state of this process's shards, with a checksum of their places. Raises UserError after an
        exception in the recorder, because the state is then that of a step which is neither recorded nor counted, and
        after a step that failed when it had changed the state.
        """
        check_whole(self)
        if self._unrecorded is not None:
            raise UserError(
                "The last step is not recorded yet, because the recorder failed: call step() again, which records it, before "
                "you save the state."
            )
        tensors = self._tensors()
        check_form(self.zo_state, self._form)
        return tensors

    def _tensors(self) -> State:
        self._prepare()
        self.settle()
        counters = torch.tensor([self.steps, self.forwards], dtype=torch.int64, device="cpu")
        storage = self.weights.storage.items()
        kept = {f"{kind}/{name}": value for name, stored in storage for kind, value in stored.buffers.items()}
        if any(tensor.spans is not None for tensor in self.weights.tensors):
            kept["shards"] = torch.tensor(checksum_of_shards(self.weights.tensors), device="cpu")
        return self.zo_state | kept | {"counters": counters}

    def load_tensors_state(self, state: State) -> None:
        """Load a `tensors_state`. Raises UserError if names, shapes or the places of shards are not those of this
        optimizer, and for steps that were taken with TorchOrderNoise or another noise that goes on from draw to draw.
        """
        present = self._tensors()
        if "shards" in present and present["shards"] != state.get("shards", present["shards"]):
            raise UserError(
                "The saved state is of other shards of the weights: load on each process the state that it saved itself, with "
                "as many processes and the model divided in the same way."
            )
        if {k: v.shape for k, v in present.items()} != {k: v.shape for k, v in state.items()}:
            odd = sorted(set(present) ^ set(state)) or ["a shape"]
            stored = odd[0].startswith(("master/", "compensation/"))
            what = "the method, model, dtype and `precision`" if stored else "the method and model"
            raise UserError(
                f"The saved state is not of this optimizer ({self.name}, precision {self.precision}): {odd[0]} differs. Load "
                f"it into {what} that saved it."
            )
        if state["counters"][0] > 0 and not self._repeats():
            raise UserError(
                f"The noise {self.noise.name} goes on from where its generator is, which no state holds: use PhiloxNoise, or "
                "take the steps of the saved run again (a run whose snapshots are deleted replays them from its log)."
            )
        for name, value in present.items():
            value.copy_(self._converted(name, state[name], value.dtype))
        self.weights.take_up()
        self.steps, self.forwards = (int(n) for n in state["counters"])
        self._unrecorded, self._torn = None, False

    def _repeats(self) -> bool:
        """Whether the noise gives a step the same numbers whenever it is asked. Of one that does not, the question moves the
        generator, and the optimizer is refused.
        """
        if isinstance(self.noise, TorchOrderNoise):
            return False
        uniform = getattr(self.noise, "uniform", lambda step, count: ())  # which few methods ask for
        first, again = ((self.noise.seed(0, 0), *uniform(0, 2)) for _ in range(2))
        return first == again

    def _converted(self, name: str, saved: Tensor, dtype: torch.dtype) -> Tensor:
        """A saved tensor for one of this dtype; bits below a weight count from its last bit on, so they have to be shifted."""
        kind, _, weight = name.partition("/")
        return with_bits(saved, self.weights.dtypes[weight], dtype) if kind == "compensation" else saved

    def state_dict(self) -> dict[str, Any]:
        """State in torch's form, with the settings that the noise follows from under "run". The method's tensors are under
        "zo", so that torch does not cast them to the weights' type.
        """
        tensors = {name: value.clone() for name, value in self.tensors_state().items()}
        own = {
            "zo": tensors,
            "run": self._run(),
            "own": self._own(),
            "shapes": self._shapes(),
            "trained": self._trains(),
        }
        return _plain(super().state_dict() | own)

    def _trains(self) -> list[bool]:
        """Which of the weights are trained, in the order of their groups: a method may keep nothing of those that are."""
        trained = {tensor.name for tensor in self.weights.tensors}
        return [name in trained for group in self.param_groups for name in group["param_names"]]

    def _shapes(self) -> list[list[int]]:
        """The shapes of the weights in the order of their groups: a method may keep nothing of a weight's shape."""
        return [list(shape_of(param)) for group in self.param_groups for param in group["params"]]

    def _own(self) -> dict[str, Any]:
        """A method's own hyperparameters, those of its rule and its estimator included, as far as they are plain values. None
        of methods and rules from elsewhere, whose attributes may be anything.
        """
        if not all(type(part).__module__.startswith("metazo.") for part in (self, self.rule, self.estimator)):
            return {}
        names = {name for cls in type(self).__mro__ for name in inspect.signature(cls.__init__).parameters}
        own = {name: getattr(self, name, None) for name in sorted(names - self.common - NEUTRAL)}
        kinds = (int, float, str)  # as Python's own, so that torch loads them with weights_only
        plain = {name: kind(value) for name, value in own.items() for kind in kinds if isinstance(value, kind)}
        scale, types = getattr(self, "scale", None), {tensor.param.dtype for tensor in self.weights.tensors}
        precision = sorted({policy(self.precision, dtype) for dtype in types})
        return plain | {
            "rule": repr(self.rule),
            "estimator": repr(self.estimator),
            "scale": "none" if scale is None else scale.identity(),
            "precision": ", ".join(precision),
        }

    def _run(self) -> dict[str, Any]:
        seed = getattr(self.noise, "run_seed", None)
        run = {"method": self.name, "noise": self.noise.name, "seed": seed, "eps": self.eps}
        if self.precision.startswith("compensated"):  # bits count from the last one of a weight on
            dtypes = {param.dtype for group in self.param_groups for param in group["params"]}
            run["bits below weights of"] = ", ".join(sorted(str(dtype) for dtype in dtypes & LAYOUTS.keys()))
        return run

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict`; lr, weight_decay and the names of tensors are the saved ones, as torch does it, and the method's
        own hyperparameters those of this optimizer, with a warning for each that the saved run had otherwise (not if method,
        rule or estimator are from elsewhere than metazo).

        Raises UserError for the state of another optimizer, of one with other settings of noise, and of one whose tensors have
        other shapes, or the same names in another order. What is refused changes nothing.
        """
        if "zo" not in state_dict:
            raise UserError(
                "The state is not of an optimizer of metazo, such as that of a run with gradients: begin anew."
            )
        saved = state_dict.get("run", {})  # which states of earlier versions have not
        for name, value in self._run().items():
            if saved.get(name, value) != value:
                raise UserError(
                    f"The saved state is of a run with {name} {saved[name]}, and this optimizer has {name} {value}: make the "
                    "optimizer with what the run had, or begin anew."
                )
        self._check_order(state_dict["param_groups"])
        self._check_shapes(state_dict.get("shapes", []))  # which states of earlier versions have not
        self.settle()
        before = {**vars(self), "scale": copy.copy(vars(self).get("scale"))}  # which is bound to the tensors
        groups = self.param_groups
        super().load_state_dict({key: value for key, value in state_dict.items() if key not in OWN})
        named = [[group["param_names"] for group in present] for present in (groups, self.param_groups)]
        self._ready = self._ready and named[0] == named[1]  # under other names, tensors and state are made anew
        try:
            self.load_tensors_state(state_dict["zo"])
        except UserError:
            vars(self).update(before)
            raise
        for earlier, group in zip(groups, self.param_groups):
            group.setdefault("own_decay", earlier["own_decay"])  # which states of earlier versions have not
        self._compare_trained(state_dict)
        for name, value in self._own().items():
            if (other := state_dict.get("own", {}).get(name, value)) != value:
                warnings.warn(
                    f"The saved state is of a run with {name} {other}, and this optimizer has {value}, which holds from here "
                    "on.",
                    stacklevel=3,
                )

    def _compare_trained(self, saved: dict[str, Any]) -> None:
        """Warns if other tensors were trained in the run whose state this is, unless it had not begun."""
        names = [name for group in self.param_groups for name in group["param_names"]]
        both = zip(names, self._trains(), saved.get("trained", ()))  # which states of earlier versions have not
        odd = [(name, now) for name, now, then in both if now != then] if self.steps else []
        if odd:
            (name, now), count = odd[0], len(odd)
            warnings.warn(
                f"The saved state is of a run in which {count} other tensors were trained or frozen: {name} is "
                f"{'trained' if now else 'frozen'} here and was not there. Freeze what the run had frozen before you load it.",
                stacklevel=3,
            )

    def _check_order(self, saved: Sequence[dict[str, Any]]) -> None:
        """Raises UserError if a tensor has another position in the saved state, by which torch would give it another's."""
        own = [uncompiled(name) for group in self.param_groups for name in group["param_names"]]
        theirs = [uncompiled(name) for group in saved for name in group.get("param_names", ())]
        for position, (name, other) in enumerate(zip(own, theirs)):
            if name != other and name in theirs:
                raise UserError(
                    f"The saved state has {other} where this optimizer has {name} (tensor {position + 1}): pass the tensors in "
                    "the order in which the run had them."
                )

    def _check_shapes(self, saved: Sequence[Sequence[int]]) -> None:
        """Raises UserError if a tensor has another shape in the saved state."""
        names = [name for group in self.param_groups for name in group["param_names"]]
        for name, shape, other in zip(names, self._shapes(), saved):
            if shape != list(other):
                raise UserError(
                    f"The saved state is of a model whose {name} has shape {tuple(other)}, and here it has {tuple(shape)}: "
                    "load it for the model that the run had, or begin anew."
                )
