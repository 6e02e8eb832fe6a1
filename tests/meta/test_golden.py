"""The published meta-training loop, replayed from its recording to a relative 1e-9."""

from __future__ import annotations

from pathlib import Path

import torch

from metazo.blocks import named_tensors
from metazo.meta.config import MetaConfig
from metazo.meta.loop import MetaRun
from metazo.meta.order import Order
from tests.optimizers.test_golden import pertnns, published_noise, recording
from tests.problem import ORDER, Problem, Recording


class Rows:
    """The recorded batches as a task: example t is batch t."""

    name = "golden"

    def __init__(self, golden: Recording):
        self.golden = golden

    def __len__(self) -> int:
        return len(self.golden.tensors["problem/idx"])

    def loss(self, model, indices):
        return model(*self.golden.batch(indices[0]))


class InTurn(Order):
    """Row t % T at step t."""

    def batch(self, step: int):
        return 0, [step % self.sizes[0]]


def test_zo_finetuner_metatrain():
    golden = recording("zo_finetuner_metatrain_official")
    h = golden.hyperparameters
    problem = Problem(golden.folder("init"))
    tensors = named_tensors(problem.named())
    order = InTurn([len(golden.tensors["problem/idx"])], 1, 0)
    order.steps_per_epoch = h["steps_per_epoch"]
    config = MetaConfig(
        model="golden",
        task=["golden"],
        out=Path("nowhere"),
        batch_size=h["batch_size"],
        objective="published",
        features="published",
        parametrisation="abs",
        embedding_count="published",
        detach_kappa=True,
        eps=h["eps"],
        lr_update=h["lr_update"],
        meta_optimizer="sgd",
        lr_meta=h["lr_mlp"],
        teacher="sgd",
        teacher_lr=h["lr_llm"],
        clip=h["max_grad_norm"],
        restart_every=h["epochs_per_restart"],
    )
    networks = pertnns(golden.folder("pertnn_init"))
    run = MetaRun(problem, tensors, [Rows(golden)], config, order=order, noise=published_noise(golden), pertnn=networks)
    snapshots = golden.snapshots()
    meta_losses, plus = [], []
    for step in range(int(golden.metadata["steps"])):
        meta_losses.append(run.step().meta_loss)
        plus.append(float(run.states[0]["scale/losses"][0]))
        expected = snapshots.get(step + 1, {})
        for tensor in tensors:
            if expected:
                same(tensor.param.detach(), expected[tensor.name], f"{tensor.name} at {step}")
        if expected:
            sigma = torch.stack([expected[f"sigma/{name}"].flatten()[0] for name in ORDER])
            same(run.states[0]["scale/sigma"], sigma, f"sigma at {step}")
    assert snapshots
    same(torch.tensor(meta_losses), torch.tensor(golden.metadata["meta_loss"]), "meta loss")
    same(torch.tensor(plus), torch.tensor(golden.metadata["loss_plus"]), "L+")
    final = pertnns(golden.folder("pertnn_final"))
    for name, value in networks.named_parameters():
        same(value.detach(), getattr(final, name).detach(), name)
    moved = pertnns(golden.folder("pertnn_init")).w1 - final.w1
    assert float(moved.detach().abs().max()) > 1e-6, "a recording whose networks rest proves nothing"


def same(value: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    expected = expected.to(value.dtype)
    atol = 1e-9 * float(expected.abs().max())
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=atol, msg=lambda text: f"{what}: {text}")
