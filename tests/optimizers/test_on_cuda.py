"""Every method on a GPU: the same run twice, saved in mid-run, and its records replayed on the CPU."""

from __future__ import annotations

import pytest
import torch

from metazo.bench.architectures import build
from metazo.optimizers import METHODS
from metazo.optimizers.registry import load
from tests.optimizers.contract import IDS, NAMES, case, llama, make, take

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
load()
PRECISIONS = {"in-place": torch.float32, "master": torch.bfloat16, "compensated-16": torch.bfloat16}
PRECISIONS |= {"compensated-8": torch.bfloat16, "autocast": torch.float32}
TO_THE_BIT = {"mezo", "mezo-momentum", "fzoo", "es", "meazo"}
"""Methods whose update is made by the noise kernels and by element-wise operations alone."""


def begin(name, precision, device):
    model = llama().to(PRECISIONS[precision]).to(device)
    optimizer = make(name, list(model.named_parameters()), case(name).llama, seed=3, precision=precision)
    ids = IDS.to(device)
    return model, optimizer, lambda: model(input_ids=ids, labels=ids).loss


def weights(model):
    return [p.detach().cpu().clone() for p in model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_run_repeats_and_its_records_replay_on_the_cpu(name, precision):
    ends, records, optimizer = [], [], None
    for _ in range(2):
        model, optimizer, loss = begin(name, precision, "cuda")
        optimizer.defer, records = True, []
        for _ in range(4):
            take(optimizer, loss)
            records.append(optimizer.last_step)
        optimizer.settle()
        ends.append(model)
    first, second = ends
    assert same(first, second)
    assert all(torch.isfinite(torch.tensor(record.losses)).all() for record in records)
    if optimizer is None or not optimizer.replayable:
        return
    start, _, _ = begin(name, precision, "cpu")
    model, other, _ = begin(name, precision, "cpu")
    for record in records:
        take(other, None, replay=record)
    if name in TO_THE_BIT:
        assert same(first, model)
    moved = sum(float((a - b).double().square().sum()) for a, b in zip(weights(model), weights(start), strict=True))
    apart = sum(float((a - b).double().square().sum()) for a, b in zip(weights(model), weights(first), strict=True))
    assert moved > 0 and (apart / moved) ** 0.5 < 1e-3, (apart / moved) ** 0.5


@pytest.mark.parametrize("precision", ["in-place", "compensated-8"])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_after_its_state_was_saved(name, precision):
    model, optimizer, loss = begin(name, precision, "cuda")
    take(optimizer, loss)
    state, kept = optimizer.state_dict(), {key: value.clone() for key, value in model.state_dict().items()}
    other_model, other, other_loss = begin(name, precision, "cuda")
    for _ in range(2):
        take(optimizer, loss)
    other_model.load_state_dict(kept)
    other.load_state_dict(state)
    for _ in range(2):
        take(other, other_loss)
    assert same(model, other_model)


@pytest.mark.parametrize("precision", ["in-place", "master", "compensated-16", "compensated-8"])
@pytest.mark.parametrize("name", sorted({name for name, cls in METHODS.items() if cls.needs_model} - {"feedback"}))
def test_a_method_that_reads_the_modules(name, precision):
    """Its steps on the GPU are those on the CPU, up to the rounding of the forward pass."""
    ends = {}
    for device in ("cpu", "cuda"):
        tiny = build("Llama")
        model = tiny.model.to(PRECISIONS[precision]).to(device)
        ids = (torch.arange(24).view(4, 6) * 5 % 23 + 1).to(device)
        before = weights(model)
        options = {} if precision == "in-place" else {"precision": precision}
        optimizer = METHODS[name](model.named_parameters(), lr=1e-2, model=model, **options)  # type: ignore[call-arg]

        def loss(model=model, ids=ids):
            return torch.nn.functional.cross_entropy(model(input_ids=ids).logits[:, -1].float(), ids[:, 0])

        for _ in range(2):
            optimizer.step(loss)
        ends[device] = [after.double() - start.double() for after, start in zip(weights(model), before)]
    one, other = (torch.cat([change.flatten() for change in ends[device]]) for device in ("cpu", "cuda"))
    assert float(torch.dot(one, other) / one.norm() / other.norm()) > (0.9999 if precision == "in-place" else 0.98)
