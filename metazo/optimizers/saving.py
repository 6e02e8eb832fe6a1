"""How the state of an optimizer is stored: as tensors by name, and in torch's form."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from metazo.blocks import NamedTensor
from metazo.errors import UserError
from metazo.noise import Noise
from metazo.optimizers.verbs import State
from metazo.step.weights import Weights


def checksum_of_shards(tensors: Sequence[NamedTensor]) -> int:
    """63 bits of a hash of the entries that this process has of each sharded tensor."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        if tensor.spans is not None:
            found.update(tensor.name.encode() + tensor.spans.here.tobytes() + tensor.spans.there.tobytes())
    return int.from_bytes(found.digest(), "little") >> 1


class Saving(Optimizer):
    """`tensors_state` and `state_dict` of ZOOptimizer, and their counterparts."""

    name: str
    steps: int
    forwards: int
    noise: Noise
    eps: float
    weights: Weights
    zo_state: State
    settle: Callable[[], None]
    _prepare: Callable[[], None]

    def tensors_state(self) -> State:
        """All state as tensors by name, masters and compensation included, ready to be stored as safetensors.

        Of a sharded model it is the state of this process's shards, with a checksum of their places.
        """
        self._prepare()
        self.settle()
        counters = torch.tensor([self.steps, self.forwards], dtype=torch.int64)
        storage = self.weights.storage.items()
        kept = {f"{kind}/{name}": value for name, stored in storage for kind, value in stored.buffers.items()}
        if any(tensor.spans is not None for tensor in self.weights.tensors):
            kept["shards"] = torch.tensor(checksum_of_shards(self.weights.tensors))
        return self.zo_state | kept | {"counters": counters}

    def load_tensors_state(self, state: State) -> None:
        """Load a `tensors_state`. Raises UserError if names, shapes or the places of shards are not those of this optimizer."""
        self._prepare()
        present = self.tensors_state()
        if "shards" in present and present["shards"] != state.get("shards", present["shards"]):
            raise UserError(
                "The saved state is of other shards of the weights: load on each process the state that it saved itself, with "
                "as many processes and the model divided in the same way."
            )
        if {k: v.shape for k, v in present.items()} != {k: v.shape for k, v in state.items()}:
            odd = sorted(set(present) ^ set(state)) or ["a shape"]
            raise UserError(
                f"The saved state is not of this optimizer ({self.name}): {odd[0]} differs. Load it into the method and model "
                "that saved it."
            )
        for name, value in present.items():
            value.copy_(state[name])
        self.steps, self.forwards = (int(n) for n in state["counters"])

    def state_dict(self) -> dict[str, Any]:
        """State in torch's form, with the settings that the noise follows from under "run". The method's tensors are under
        "zo", so that torch does not cast them to the weights' type.
        """
        tensors = {name: value.clone() for name, value in self.tensors_state().items()}
        return super().state_dict() | {"zo": tensors, "run": self._run()}

    def _run(self) -> dict[str, Any]:
        seed = getattr(self.noise, "run_seed", None)
        return {"method": self.name, "noise": self.noise.name, "seed": seed, "eps": self.eps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict`. Raises UserError for the state of another optimizer, or of one with other settings of noise."""
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
        super().load_state_dict({key: value for key, value in state_dict.items() if key not in ("zo", "run")})
        self.load_tensors_state(state_dict["zo"])
