"""A block at its last position alone gives the gradients of the whole block."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from metazo.bench.architectures import CAUSAL, build
from metazo.feedback import column, local
from metazo.feedback.local import LocalGradient
from metazo.feedback.residual import find_residual
from metazo.feedback.surrogates import Column
from tests.feedback.test_architectures import relative

# Their norms are computed in float32 for all types of weights, so that one position alone rounds differently.
ROUNDED = {"Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma 2", "Phi-3", "SmolLM3", "OLMo 2"}


def gradient(tiny, narrow: bool):
    names = {id(p): name for name, p in tiny.model.named_parameters()}
    estimate = LocalGradient(find_residual(tiny.model), names, Column())
    estimate.narrow = narrow
    positions = set()
    hook = estimate.residual.maps(1)[-1].module.register_forward_hook(
        lambda m, args, out: positions.add(args[0].numel() // args[0].shape[-1]) if torch.is_grad_enabled() else None
    )
    found = {}
    for _, part in estimate.gradients(estimate.capture([tiny.answer])):
        found |= {name: part.dense(name) for name in part.names}
    hook.remove()
    return found, positions, estimate.narrow


@pytest.mark.parametrize("name", CAUSAL)
def test_the_last_position_alone_gives_the_same_gradient(name: str) -> None:
    tiny = build(name)
    whole, every, _ = gradient(tiny, False)
    narrow, last, still = gradient(tiny, True)
    assert set(whole) == set(narrow)
    for key, value in whole.items():
        assert relative(narrow[key], value) < (1e-6 if name in ROUNDED else 1e-10) or value.norm() < 1e-12, key
    assert (every, last, still) == ({21}, {3}, True)


@pytest.mark.parametrize("name, takes_cache", [("BERT", True), ("DistilBERT", False)])
def test_bidirectional_blocks_and_blocks_without_a_cache(name: str, takes_cache: bool) -> None:
    tiny = build(name)

    def loss():
        return tiny.model(input_ids=torch.arange(3, 15).view(2, 6)).logits[:, -1, 5:7].square().sum()

    tiny = replace(tiny, answer=loss)
    whole, every, _ = gradient(tiny, False)
    again, last, still = gradient(tiny, True)
    assert every == {12} and (last, still) == (({2}, True) if takes_cache else ({12}, False))
    assert all(relative(again[key], value) < 1e-10 or value.norm() < 1e-12 for key, value in whole.items())


SIZE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip
STATES = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8}
OTHERS = {
    "lfm2": {"full_attn_idxs": [1]},
    "falcon_h1": STATES | {"mamba_d_ssm": 32},  # attention and a recurrent state in one block
    "bamba": STATES | {"attn_layer_indices": [1]},
    "phimoe": {"num_local_experts": 3, "num_experts_per_tok": 2},  # its router is a Linear that returns several tensors
}


@pytest.mark.parametrize("kind", OTHERS)
def test_blocks_with_states_and_routers_of_several_outputs(kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZE | OTHERS[kind])).eval()
    model, bound = (
        (model, 1e-3) if kind == "phimoe" else (model.double(), 1e-5)
    )  # torch's products of experts are not in float64
    ids = torch.randint(3, 40, (2, 7))

    def loss() -> torch.Tensor:
        return cross_entropy(model(input_ids=ids, use_cache=False).logits[:, -1], torch.tensor([5, 7]))

    tiny = replace(build("Llama"), model=model, answer=loss)
    whole, _, _ = gradient(tiny, False)
    narrow, _, _ = gradient(tiny, True)
    assert set(whole) == set(narrow) and len(whole) > 10
    for key, value in whole.items():
        assert relative(narrow[key], value) < bound or value.norm() < 1e-7, key
    loss().backward()
    for key in (key for key in whole if ".layers.1." in key):  # of the last block, whose error is the true one
        true = model.get_parameter(key).grad
        assert true is not None and (relative(whole[key], true) < bound or true.norm() < 1e-7), key


class Named(torch.nn.Module):
    """A block as those of transformers 5.24, which renamed `past_key_values`."""

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor, cache: object = None) -> torch.Tensor:
        return hidden


def test_the_cache_is_found_by_its_newer_name_too() -> None:
    assert column.cache_argument(Named()) == "cache"


def test_a_cut_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the last position alone gives a different output, the block runs on all positions, and the gradient is right."""
    tiny = build("OPT")
    whole, _, _ = gradient(tiny, False)
    monkeypatch.setattr(local, "last_position", lambda *args: column.last_position(*args) + 1)
    again, positions, still = gradient(tiny, True)
    assert positions == {21} and not still  # it is noticed at the last block, the first to run again
    assert all(relative(again[key], value) < 1e-10 or value.norm() < 1e-12 for key, value in whole.items())
