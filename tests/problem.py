"""The small problem of the golden trajectories (tests/golden/README.md), and how to read a recording."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

ORDER = (
    "embed_tokens.weight",
    "layers.0.fc1.weight",
    "layers.0.fc1.bias",
    "layers.0.norm.weight",
    "layers.1.fc2.weight",
    "layers.1.fc2.bias",
    "head.weight",
)


class Problem(nn.Module):
    """x = embed[idx]; a = tanh(x fc1^T + b1) * norm; b = tanh(a fc2^T + b2); mean cross entropy of b head^T."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        for name in ORDER:
            self.register_parameter(name.replace(".", "/"), nn.Parameter(tensors[name].clone()))

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return [(name.replace("/", "."), parameter) for name, parameter in self.named_parameters()]

    def forward(self, idx: Tensor, y: Tensor) -> Tensor:
        embed, fc1, b1, norm, fc2, b2, head = self.parameters()
        a = torch.tanh(embed[idx] @ fc1.t() + b1) * norm
        return F.cross_entropy(torch.tanh(a @ fc2.t() + b2) @ head.t(), y)


@dataclass
class Recording:
    tensors: dict[str, Tensor]
    metadata: dict

    @property
    def hyperparameters(self) -> dict:
        return self.metadata["hyperparameters"]

    def folder(self, name: str) -> dict[str, Tensor]:
        return {key[len(name) + 1 :]: value for key, value in self.tensors.items() if key.startswith(name + "/")}

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        idx, y = self.tensors["problem/idx"], self.tensors["problem/y"]
        return idx[step % len(idx)], y[step % len(y)]

    def snapshots(self) -> dict[int, dict[str, Tensor]]:
        folders = sorted({key.split("/")[0] for key in self.tensors if key.startswith("step")})
        return {int(folder[4:]): self.folder(folder) for folder in folders}


def read(path: Path) -> Recording:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
        metadata = {}
        for key, value in (file.metadata() or {}).items():
            try:
                metadata[key] = json.loads(value)
            except json.JSONDecodeError:
                metadata[key] = value
    return Recording(tensors, metadata)
