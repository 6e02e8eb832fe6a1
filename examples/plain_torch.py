"""Train any `nn.Module` with forward passes only; nothing but metazo's core is needed.

python examples/plain_torch.py
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from metazo.optimizers import MeZO

torch.manual_seed(0)
x = torch.randn(256, 8)
y = (x[:, 0] * x[:, 1] > 0).long()
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
optimizer = MeZO(model.named_parameters(), lr=2e-1, eps=1e-3, scale="rms", seed=0)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=1500)


def loss() -> torch.Tensor:
    """The loss that a step evaluates at perturbed weights. It needs no gradient, so it may be any number."""
    return cross_entropy(model(x), y)


for _ in range(1500):
    optimizer.step(loss)  # two forward passes, then the update
    schedule.step()
accuracy = (model(x).argmax(1) == y).float().mean()
print(f"loss {loss():.3f}, accuracy {accuracy:.2f}")
