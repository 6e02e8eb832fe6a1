"""The residual stream is found by structure, and one sentence says why if there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metazo.bench.architectures import NAMES, build
from metazo.errors import UserError
from metazo.feedback.passes import Recorder
from metazo.feedback.residual import find_residual

MLP = ("mlp", "fc1", "fc2", "ffn", "intermediate", "output.dense", "dense_h_to_4h", "dense_4h_to_h", "c_fc")


@pytest.mark.parametrize("name", NAMES)
def test_blocks_and_their_linear_maps(name: str) -> None:
    tiny = build(name)
    residual = find_residual(tiny.model)
    assert len(residual.blocks) == tiny.model.config.num_hidden_layers
    names = [entry.name for entry in residual.maps(1)]
    assert any("att" in name for name in names) and any(part in name for part in MLP for name in names)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="Sequential has no residual stream .* such as mezo"):
        find_residual(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def test_two_stacks_are_refused() -> None:
    import transformers

    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=31)
    model = transformers.T5ForConditionalGeneration(config)
    pair = nn.ModuleDict({"encoder": model.encoder, "decoder": model.decoder})
    with pytest.raises(UserError, match="two stacks of blocks, decoder.block and encoder.block"):
        find_residual(pair)


@pytest.mark.parametrize("layers", [(2, 2), (12, 1), (1, 12)])
def test_an_encoder_decoder_is_refused_whatever_its_two_stacks(layers: tuple[int, int]) -> None:
    import transformers

    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=layers[0], num_decoder_layers=layers[1], num_heads=4, vocab_size=31
    )
    with pytest.raises(
        UserError, match="T5ForConditionalGeneration is a t5 model, an encoder-decoder, and .* such as mezo"
    ):
        find_residual(transformers.T5ForConditionalGeneration(config))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden_states):
        return hidden_states + self.b(self.a(hidden_states).tanh())


class Crossed(nn.Module):
    """The input of the second block is not only the first block's output."""

    def __init__(self, extra: float):
        super().__init__()
        self.extra, self.layers, self.head = extra, nn.ModuleList([Block(), Block()]), nn.Linear(4, 2)

    def forward(self, x):
        hidden = self.layers[0](x)
        return self.head(self.layers[1](hidden + self.extra))


def test_a_stream_that_is_no_chain_is_refused() -> None:
    x = torch.randn(2, 3, 4)
    for extra, fine in ((0.0, True), (1.0, False)):
        model = Crossed(extra)
        recorder = Recorder(find_residual(model), {id(p): n for n, p in model.named_parameters()}, 0)
        if fine:
            assert recorder.capture([lambda m=model: m(x).sum()]).passes[0].delta.shape == x.shape
        else:
            with pytest.raises(UserError, match="The input of block 1 of layers is not the output of block 0"):
                recorder.capture([lambda m=model: m(x).sum()])


def test_closures_that_cannot_serve_are_refused() -> None:
    model, x = Crossed(0.0), torch.randn(2, 3, 4)
    recorder = Recorder(find_residual(model), {id(p): n for n, p in model.named_parameters()}, 0)
    with pytest.raises(UserError, match="returned float without a graph"):
        recorder.capture([lambda: model(x).sum().item()])
    with pytest.raises(UserError, match="never ran the blocks at layers"):
        recorder.capture([lambda: torch.ones(())])
    with pytest.raises(UserError, match="returned Tensor without a graph"):
        recorder.capture([lambda: torch.no_grad()(lambda: model(x).sum())().detach()])
    assert torch.is_grad_enabled() and not any(block._forward_hooks for block in model.layers)
