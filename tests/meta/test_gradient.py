"""The streamed meta-gradient against the unrolled reference and autograd, tied and untied, and its memory."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

from metazo.blocks import named_tensors, partition
from metazo.meta.config import MetaConfig
from metazo.meta.dryrun import make_plan
from metazo.meta.gradient import Redraw, one_step, stream_gradients
from metazo.meta.path_setup import build, load
from metazo.meta.unrolled import unrolled_steps
from metazo.noise import PhiloxNoise, TorchOrderNoise
from metazo.step.scales import normalisation
from metazo.step.weights import Weights
from tests import warm
from tests.feedback.test_memory import most

EPS, LR_UPDATE = 1e-3, 2e-3
IDS = torch.arange(24).view(3, 8) % 11


def llama(tied: bool) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 12}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        config = LlamaConfig(
            num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.3, **sizes
        )
        return LlamaForCausalLM(config).double().eval()


def lm_loss(model) -> torch.Tensor:
    return next_token_loss(model(input_ids=IDS, use_cache=False).logits)


def next_token_loss(logits: torch.Tensor) -> torch.Tensor:
    """In float64; the loss that transformers computes is float32."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def sigmas(blocks) -> torch.Tensor:
    return torch.linspace(0.2, 2.0, len(blocks), dtype=torch.float64)


@pytest.mark.parametrize("by", ["tensor", "layer"])
@pytest.mark.parametrize("tied", [True, False])
def test_streamed_equals_higher_and_functional_autograd(tied: bool, by: str):
    model = llama(tied)
    tensors = named_tensors(model)
    assert any("lm_head" in tensor.name for tensor in tensors) is not tied
    blocks, noise = partition(tensors, by), PhiloxNoise(3)
    scales, seed = sigmas(blocks), noise.seed(0)
    before = {tensor.name: tensor.param.detach().clone() for tensor in tensors}
    step = one_step(Weights(tensors, noise), blocks, scales, seed, lambda: lm_loss(model), eps=EPS, lr_update=LR_UPDATE)
    for tensor in tensors:
        torch.testing.assert_close(tensor.param.detach(), before[tensor.name], rtol=0, atol=1e-14)
        assert tensor.param.grad is None

    reference = unrolled_steps(model, blocks, scales, noise, [seed], [lm_loss], lm_loss, eps=EPS, lr_update=LR_UPDATE)
    assert step.gradient.abs().min() > 0
    torch.testing.assert_close(step.gradient, reference.gradient, rtol=1e-6, atol=1e-12)
    assert abs(step.loss - reference.loss) < 1e-12

    s = scales.clone().requires_grad_()
    c = (step.plus - step.minus) / (2 * EPS)
    redraw = Redraw(noise, seed, tensors)
    moved = {
        tensor.name: before[tensor.name] - LR_UPDATE * c * s[index] * redraw(tensor)
        for index, block in enumerate(blocks)
        for tensor in block.tensors
    }
    value = next_token_loss(functional_call(model, moved, kwargs={"input_ids": IDS, "use_cache": False}).logits)
    (expected,) = torch.autograd.grad(value, s)
    torch.testing.assert_close(step.gradient, expected, rtol=1e-10, atol=1e-14)


def test_two_unrolled_steps_equal_functional_autograd():
    model = llama(True)
    tensors = named_tensors(model)
    blocks, noise = partition(tensors, "layer"), PhiloxNoise(3)
    scales, seeds = sigmas(blocks), [noise.seed(0), noise.seed(1)]
    settings = {"eps": EPS, "lr_update": LR_UPDATE}
    reference = unrolled_steps(model, blocks, scales, noise, seeds, [lm_loss] * 2, lm_loss, **settings)
    first = unrolled_steps(model, blocks, scales, noise, seeds[:1], [lm_loss], lm_loss, **settings)
    c0 = (first.plus - first.minus) / (2 * EPS)
    c1 = 2 * (reference.plus - reference.minus) / (2 * EPS) - c0  # the mean over the two steps was reported
    s = scales.clone().requires_grad_()
    moved = {tensor.name: tensor.param.detach().clone() for tensor in tensors}
    for seed, c in zip(seeds, (c0, c1)):
        redraw = Redraw(noise, seed, tensors)
        for index, block in enumerate(blocks):
            for tensor in block.tensors:
                moved[tensor.name] = moved[tensor.name] - LR_UPDATE * c * s[index] * redraw(tensor)
    value = next_token_loss(functional_call(model, moved, kwargs={"input_ids": IDS, "use_cache": False}).logits)
    (expected,) = torch.autograd.grad(value, s)
    assert abs(c1) > 1e-3
    torch.testing.assert_close(reference.gradient, expected, rtol=1e-6, atol=1e-12)


def test_kappa_as_part_of_the_gradient():
    """With kappa differentiated, a change of all sigma by one factor changes nothing."""
    sigma = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([10.0, 100.0, 5.0], dtype=torch.float64)
    fixed = torch.tensor([0.1, -0.4, 0.7], dtype=torch.float64)
    (fixed * sigma * normalisation(sigma, counts)).sum().backward()
    assert sigma.grad is not None
    assert abs(float((sigma.grad * sigma.detach()).sum())) < 1e-12


def test_noise_in_published_order_is_redrawn_in_any_order():
    tensors = named_tensors(llama(True))
    noise = TorchOrderNoise(0)
    stream = noise.stream(5)
    in_order = {tensor.name: stream.draw(tensor) for tensor in tensors}
    redraw = Redraw(noise, 5, tensors)
    for tensor in reversed(tensors):
        assert torch.equal(redraw(tensor), in_order[tensor.name])


def test_gradients_are_freed_as_they_come():
    """While one tensor's gradient is used, no other tensor has one."""
    model = llama(False)
    tensors = named_tensors(model)
    seen = []

    def visit(tensor, gradient):
        assert all(other.param.grad is None for other in tensors)
        seen.append(tensor.name)

    stream_gradients(tensors, lambda: lm_loss(model), visit)
    assert sorted(seen) == sorted(tensor.name for tensor in tensors)


def test_a_loss_that_is_not_finite_leaves_the_weights():
    model = llama(True)
    tensors = named_tensors(model)
    before = [tensor.param.detach().clone() for tensor in tensors]
    blocks, noise = partition(tensors), PhiloxNoise(0)
    step = one_step(
        Weights(tensors, noise),
        blocks,
        sigmas(blocks),
        1,
        lambda: lm_loss(model) * float("nan"),
        eps=EPS,
        lr_update=1.0,
    )
    assert torch.isnan(step.gradient).all()
    for tensor, value in zip(tensors, before):
        torch.testing.assert_close(tensor.param.detach(), value, rtol=0, atol=1e-14)


MEASURE = """
import ctypes
import torch
from torch import nn
from metazo.blocks import named_tensors, partition
from metazo.meta.gradient import one_step
from metazo.meta.teacher import Teacher
from metazo.noise import PhiloxNoise
from metazo.step.weights import Weights
from tests.feedback.test_memory import most

ctypes.CDLL(None).mallopt(-3, 1_000_000)  # M_MMAP_THRESHOLD: freed memory is returned
torch.set_num_threads(1)
model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(24)))  # 96 MiB in tensors of 4 MiB
tensors = named_tensors(model)
x = torch.ones(1, 1024)
loss = lambda: model(x).square().mean()
blocks = partition(tensors)
noise = PhiloxNoise(0)
noise.stream(1).draw(tensors[0])  # numba compiles
small = nn.Linear(8, 8)
few = named_tensors(small)
small_loss = lambda: small(torch.ones(1, 8)).square().mean()
one_step(Weights(few, noise), partition(few), torch.ones(2), 1, small_loss, eps=1e-3, lr_update=1e-6)
Teacher(few, lr=1e-3, steps=2).step(small_loss)

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024

def growth(run):
    open("/proc/self/clear_refs", "w").write("5")
    base = peak()
    run()
    return peak() - base

weights = Weights(tensors, noise)
print(growth(lambda: one_step(weights, blocks, torch.ones(len(blocks)), 1, loss, eps=1e-3, lr_update=1e-6)))
print(growth(lambda: Teacher(tensors, lr=1e-3, steps=2).step(loss)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_memory_of_a_meta_step():
    """Beyond the weights (96 MiB): a few tensors of 4 MiB, while the teacher's step needs gradients and momentum."""

    done = warm.run("-c", MEASURE)
    assert done.returncode == 0, done.stderr
    meta, teacher = map(float, done.stdout.split())
    assert teacher > 150, "the teacher holds a gradient and a momentum for every weight"
    assert meta < 30, f"{meta:.0f} MiB: more than the gradient and noise of a few tensors"


def test_the_plan_knows_the_memory_of_unrolled_steps(tiny, tmp_path):
    """Tensors in memory at the peak of a meta-step: the weights, the teacher's momentum, and what the step adds to them."""
    found = []
    for steps, queries in ((2, 1), (4, 2)):
        out = tmp_path / f"{steps}-{queries}"
        out.mkdir()
        config = MetaConfig(str(tiny("llama")), "pico_topic", out, objective="published", unroll=steps, queries=queries,
                            batch_size=1, steps=1, train_examples=4)  # fmt: skip
        loaded, tasks = load(config)
        held = sum(tensor.param.numel() * 4 for tensor in named_tensors(loaded.model))
        run = build(config, loaded, tasks)
        run.step()
        found.append((most(run.step) / held + 2, make_plan(config, loaded.model, tasks).memory_bytes / held))
    (one, planned), (more, planned_more) = found
    assert planned_more - planned == pytest.approx(more - one, rel=0.05)
    assert planned == pytest.approx(one, rel=0.1)
