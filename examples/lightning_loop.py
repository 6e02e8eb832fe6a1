"""A LightningModule in manual optimization, trained by forward passes: Lightning's loop, loaders and logs, no backward pass.

python examples/lightning_loop.py          # needs lightning (pip install lightning)
"""

from __future__ import annotations

import warnings
from typing import Any

import lightning  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import metazo


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False  # Lightning would call backward()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return metazo.MeZO(self.net.named_parameters(), lr=0.1, eps=1e-3, scale="rms", seed=0)

    def training_step(self, batch: list[Tensor], index: int) -> None:
        x, y = batch
        # Lightning's wrapper of the optimizer counts the step, for max_steps and checkpoints, and saves its state with them
        loss: Any = self.optimizers().step(lambda: cross_entropy(self.net(x), y))  # type: ignore[union-attr]
        self.log("loss", loss, prog_bar=True)


def accuracy(model: Classifier) -> float:
    with torch.no_grad():
        return float((model.net(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # about workers of the loader
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    y = (x[:, 0] + x[:, 1] > 0).long()
    model = Classifier()
    print(f"accuracy {accuracy(model):.2f} before")
    trainer = lightning.Trainer(
        max_epochs=60, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=64))
    print(f"accuracy {accuracy(model):.2f} after {trainer.global_step} steps")
