"""The settings on which a run's model depends. This module imports nothing large, because settings are read for `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

RANK = 8
ALPHA = 16.0  # as MeZO's published runs with LoRA (rank 8)
VIRTUAL = ("prefix", "prompt")


@dataclass(frozen=True)
class Adapter:
    """The adapters to put on a model.

    kind: lora, dora, ia3, prefix or prompt. rank: of lora and dora; for prefix and prompt the number of virtual tokens.
    alpha: lora and dora are multiplied by alpha / rank. targets: names of the layers, or ends of names; () takes those that
    peft names for the architecture.
    """

    kind: str
    rank: int = RANK
    alpha: float = ALPHA
    targets: tuple[str, ...] = ()


class Wanted(Protocol):
    """The settings on which a run's model depends; `FinetuneConfig` has them."""

    model: str
    kind: Any
    dtype: Any
    head: Any
    seed: int
    merge: bool
    train: list[str]
    freeze: list[str]
    quantize: Any
    revision: str | None
    attn_implementation: str | None
    device_map: Any
    tensor_parallel: int
    fsdp: int

    @property
    def adapters(self) -> Adapter | None: ...
