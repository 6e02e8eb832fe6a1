"""The memory of a step: no gradient of a matrix, and the graph of one block at a time."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from metazo.feedback.factors import Gradient
from metazo.optimizers.skip_feedback import SkipFeedback


def llama(blocks: int, every: bool = False):
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
        ids = torch.randint(0, 101, (3, 19))
    if every:
        return model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss
    return model, lambda: model(input_ids=ids[:1, :9], use_cache=False).logits[:, -4:].square().mean()


class Watch(TorchDispatchMode):
    """Shapes of all tensors that operations return in new memory."""

    def __init__(self, params):
        super().__init__()
        self.params = {p.untyped_storage().data_ptr() for p in params}
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in self.params:
                self.shapes.add(tuple(value.shape))
        return out


@pytest.mark.parametrize("recompute", [True, False])
def test_no_gradient_of_a_matrix_is_formed(recompute: bool) -> None:
    """Few positions have an error, so their factors are smaller than the matrices."""
    model, loss = llama(2)
    optimizer = SkipFeedback(model.named_parameters(), 1e-3, model=model, recompute=recompute)
    with Watch(model.parameters()) as watch:
        optimizer.step(loss)
    matrices = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
    assert watch.shapes & (matrices | {shape[::-1] for shape in matrices}) == set()
    with Watch(model.parameters()) as watch:  # and backpropagation does form them
        loss().backward()
    assert matrices <= watch.shapes


def most(call) -> int:
    """Most bytes that a call holds above those before it."""
    gc.collect()  # what an earlier test left would count as freed by the call
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    found = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, highest = 0, 0
    for event in sorted(found, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def peak(blocks: int, recompute: bool) -> int:
    """Peak bytes of a step above those before it."""
    model, loss = llama(blocks, every=True)
    optimizer = SkipFeedback(model.named_parameters(), 1e-3, model=model, recompute=recompute)
    optimizer.step(loss)
    return most(lambda: optimizer.step(loss))


def test_a_further_block_costs_its_input_alone() -> None:
    hidden = 3 * 19 * 48 * 4
    one, two, six = (peak(blocks, True) for blocks in (1, 2, 6))
    kept = (peak(6, False) - peak(2, False)) / 4
    assert two - one <= 1.5 * hidden  # the gradient of the last block is gone when that of the first is computed
    assert (six - two) / 4 <= 1.5 * hidden
    assert kept >= 10 * hidden  # and a kept graph costs far more


def test_the_update_multiplies_one_tensor_at_a_time() -> None:
    """24 gradients of 16 kB: the update takes less than six of them (norms are summed in float64), and not all again."""
    net = torch.nn.Module()
    net.blocks = torch.nn.ModuleList([torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(24)))])
    net.forward = lambda hidden: net.blocks[0](hidden)  # type: ignore[method-assign]
    optimizer = SkipFeedback(net.named_parameters(), 1e-3, model=net)
    optimizer.step(lambda: net(torch.ones(2, 3, 64)).square().mean())
    gradient = Gradient(whole={name: torch.ones(64, 64) for name, _ in net.named_parameters()})
    assert most(lambda: optimizer._descend(gradient, [1e-3])) < 6 * 64 * 64 * 4
