"""The note about other ways than the residual stream: which models and losses get it, and what looking for it costs."""

from __future__ import annotations

import pytest
import torch
import transformers

from metazo.bench.architectures import NAMES, build
from metazo.optimizers.answer_column import AnswerColumn
from metazo.optimizers.skip_feedback import SkipFeedback
from tests.optimizers.test_structured import stack

NOTE = "The loss depends on lower blocks by another way than the last block's input"


def noted(model, loss) -> bool:
    optimizer = SkipFeedback(model.named_parameters(), 1e-3, model=model)
    optimizer.step(loss)
    return any(note.startswith(NOTE) for note in optimizer.notes)


@pytest.mark.parametrize("name", NAMES)
def test_no_architecture_of_the_table_has_another_way(name: str) -> None:
    tiny = build(name)
    assert not noted(tiny.model, tiny.every) and not noted(tiny.model, tiny.answer)


def test_hidden_states_of_lower_blocks_in_the_loss() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.arange(12).view(2, 6)

    def loss(*layers: int) -> torch.Tensor:
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        features = torch.arange(16.0)  # of different weights, so that the loss is another one if they are rolled
        return (sum(hidden[layer] for layer in layers) * features).square().mean()

    assert not noted(model, lambda: loss(4))
    assert all(noted(model, lambda layer=layer: loss(layer, 4)) for layer in (0, 1, 2, 3))


def test_keys_and_values_and_biases_of_lower_blocks() -> None:
    ids = torch.arange(14).view(2, 7) + 3
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    more = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    own = {"vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 8, "global_head_dim": 8}
    for shared in (0, 2):
        types = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": shared}
        config = transformers.Gemma4TextConfig(**sizes, **more, **own, **types)
        gemma = transformers.Gemma4ForCausalLM(config).eval()
        loss = lambda gemma=gemma: gemma(input_ids=ids, labels=ids, use_cache=False).loss  # noqa: E731
        assert noted(gemma, loss) == bool(shared)
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
    encoder = transformers.T5EncoderModel(config).eval()
    assert noted(encoder, lambda: encoder(input_ids=ids).last_hidden_state.pow(3).mean())


@pytest.mark.parametrize("recompute", [True, False])
def test_looking_runs_the_closures_once_more_and_draws_nothing_of_its_own(recompute: bool) -> None:
    model, hidden = stack()
    calls, losses = [], []

    def loss() -> torch.Tensor:
        calls.append(float(torch.rand(())))
        noise = torch.randn_like(hidden)
        losses.append((model(hidden + noise) * torch.rand_like(hidden) - model(hidden)).square().mean())
        return losses[-1]

    optimizer = AnswerColumn(model.named_parameters(), 1e-3, model=model, recompute=recompute)
    torch.manual_seed(7)
    expected = [float(loss()), float(loss()), float(torch.rand(()))]
    torch.manual_seed(7)
    calls.clear()
    found = optimizer.step([loss, loss])
    assert [found, float(torch.rand(()))] == [pytest.approx(sum(expected[:2]) / 2, rel=1e-12), expected[2]]
    assert len(calls) == 4 and calls[:2] == calls[2:] and optimizer.bypassed is False
    optimizer.step([loss, loss])
    assert len(calls) == 6
