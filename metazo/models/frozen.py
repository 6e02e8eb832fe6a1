"""Frozen lower layers of an encoder, computed once per input."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from metazo.io.tensorfile import weights_hash

MOST_SHARED = 20_000  # inputs per model whose outputs are kept from one run to the next
_shared: dict[str, dict[bytes, Tensor]] | None = None


def share_between_runs() -> None:
    """Keep the outputs of frozen layers for later runs of this process, on models with the same weights and configuration.

    For a process that does one run after another, such as a worker of a comparison. Do not use it if the weights of frozen
    layers are changed after `Split` is made: a later model with the original weights would get the changed outputs.
    """
    global _shared
    _shared = {} if _shared is None else _shared


def _stack(encoder: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The module name of the encoder's list of layers, and the list; None if there is no such list."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == getattr(encoder.config, "num_hidden_layers", None):
            return name, module
    return None


def frozen_layers(encoder: nn.Module) -> int:
    """The number of leading layers without trained weights; 0 if the embeddings are trained."""
    found, embeddings = _stack(encoder), getattr(encoder, "embeddings", None)
    if found is None or embeddings is None or any(p.requires_grad for p in embeddings.parameters()):
        return 0
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in found[1]]
    return trained.index(True) if True in trained else len(trained)


class _Given(nn.Module):
    """Takes the place of the embeddings and returns its input."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **others: Any) -> Tensor:
        return inputs_embeds


def _with_layers(encoder: nn.Module, path: str, layers: nn.ModuleList) -> nn.Module:
    """The same encoder, its parameters shared, with other layers."""
    view = copy.copy(encoder)
    view._modules = dict(encoder._modules)
    head, _, rest = path.partition(".")
    view._modules[head] = _with_layers(view._modules[head], rest, layers) if rest else layers  # type: ignore[arg-type]
    return view


class Split:
    """An encoder whose first layers are computed once for each input, alone and unpadded. The result therefore does not
    depend on the batch in which an input came first, and a resumed run gets the same bits."""

    def __init__(self, encoder: nn.Module, count: int):
        found = _stack(encoder)
        assert found is not None
        path, layers = found
        self.lower = _with_layers(encoder, path, layers[:count])
        self.upper = _with_layers(encoder, path, layers[count:])
        self.upper._modules["embeddings"] = _Given()
        self.known: dict[bytes, Tensor] = {} if _shared is None else _shared.setdefault(self._mark(count), {})
        self.last: tuple[Tensor, Tensor] | None = None  # a batch, and the output of the lower layers for it

    def _mark(self, count: int) -> str:
        """Everything that the output of the lower layers depends on, besides the input."""
        named = [*self.lower.named_parameters(), *self.lower.named_buffers()]
        device = next(self.lower.parameters()).device
        config: Any = self.lower.config
        return f"{weights_hash(named)} {count} {device} {config.to_json_string(use_diff=False)}"

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> Any:
        if self.last is None or self.last[0] is not input_ids:  # both probes of a step see the same tensors
            self.last = input_ids, self._hidden(input_ids, attention_mask, others)
        return self.upper(inputs_embeds=self.last[1], attention_mask=attention_mask)

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor, others: dict[str, Tensor]) -> Tensor:
        rows = [self._row(index, input_ids, attention_mask, others) for index in range(len(input_ids))]
        with torch.inference_mode(False):
            hidden = rows[0].new_zeros((*input_ids.shape, rows[0].shape[-1]))
            for index, row in enumerate(rows):
                hidden[index][attention_mask[index].bool()] = row
        return hidden

    def _row(self, index: int, input_ids: Tensor, attention_mask: Tensor, others: dict[str, Tensor]) -> Tensor:
        real = attention_mask[index].bool()
        row = {"input_ids": input_ids[index][real], **{name: value[index][real] for name, value in others.items()}}
        key = b"|".join(value.cpu().numpy().tobytes() for value in row.values())
        if key not in self.known:
            if len(self.known) >= MOST_SHARED and _shared is not None:
                self.known.clear()
            with torch.inference_mode(False), torch.no_grad():  # not an inference tensor: a gradient may pass by it
                batch = {name: value.clone().unsqueeze(0) for name, value in row.items()}
                mask = torch.ones_like(batch["input_ids"])
                self.known[key] = self.lower(**batch, attention_mask=mask).last_hidden_state[0]
        return self.known[key]
