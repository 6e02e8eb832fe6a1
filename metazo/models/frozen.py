"""Frozen lower layers of an encoder, computed once per input."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metazo.io.tensorfile import weights_hash

MOST_SHARED = 500_000  # tokens per model whose outputs are kept from one run to the next
GROUP = 1024  # tokens of the inputs that are computed together
MOST_LEARNED = 1 << 16  # tokens that are computed ahead of a run
LENGTHS = 9, 5  # tokens of the rows by which a split is checked; odd, so that no window of attention divides them
Row = dict[str, Tensor]  # of one input, (L,) each, without padding


class _Outputs(dict[bytes, Tensor]):
    """Outputs (G, L, d) by the inputs of a group."""

    tokens = 0


_shared: dict[str, _Outputs] | None = None


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
    """The number of leading layers without trained weights; 0 if a weight outside the layers is trained.

    Such a weight may feed every layer, as the embeddings do, and the bias of relative positions that MPNet's layers share.
    """
    found = _stack(encoder)
    if found is None or getattr(encoder, "embeddings", None) is None:
        return 0
    within = {id(parameter) for parameter in found[1].parameters()}
    if any(p.requires_grad and id(p) not in within for p in encoder.parameters()):
        return 0
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in found[1]]
    return trained.index(True) if True in trained else len(trained)


def split(encoder: nn.Module) -> tuple[Split | None, int]:
    """A `Split` at the frozen layers, and their number; None and 0 if no layer is frozen, or if the split would compute
    another function, as for an encoder that has a norm or a convolution behind its list of layers."""
    count = frozen_layers(encoder)
    made = Split(encoder, count) if count and _agrees(encoder, count) else None
    return made, count if made is not None else 0


def _agrees(encoder: nn.Module, count: int) -> bool:
    """Whether the encoder split after ``count`` layers gives its own hidden states for two small inputs.

    A row alone goes through the same kernels both times, so that it differs by rounding at most. A padded batch, which the
    lower layers see row by row, may differ by more. Dropout, which would be another one in each pass, is off meanwhile.
    """
    config: Any = encoder.config
    embeddings: Tensor = encoder.get_input_embeddings().weight  # type: ignore[operator]
    if getattr(config, "attention_type", None) == "block_sparse":  # BigBird's depends on the longest row of a batch
        return False
    if embeddings.is_meta:  # a dry run: there are no numbers to compare
        return True
    words = range(max(0, len(embeddings) - LENGTHS[0] - 1), len(embeddings))
    ids = [number for number in words if number != config.pad_token_id][-LENGTHS[0] :]
    row = torch.tensor([ids], device=embeddings.device)
    batch = row.repeat(2, 1)
    batch[1, LENGTHS[1] :] = config.pad_token_id or 0
    padded = torch.ones_like(batch)
    padded[1, LENGTHS[1] :] = 0
    modes = [(module, module.training) for module in encoder.modules()]
    try:
        made = Split(encoder.eval(), count, shared=False)
        with torch.no_grad():
            for inputs, mask, power in ((row, padded[:1], 1.0), (batch, padded, 0.5)):
                own = encoder(input_ids=inputs, attention_mask=mask).last_hidden_state[mask.bool()].double()
                other = made(input_ids=inputs, attention_mask=mask).last_hidden_state[mask.bool()].double()
                most = torch.finfo(embeddings.dtype).eps ** power * own.norm()
                if not (own - other).norm() <= most:  # NaN does not agree either
                    return False
    except Exception:  # whatever the code of a model raises that is made for its own layers and embeddings alone
        return False
    finally:
        for module, training in modes:
            module.training = training
    return True


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
    """An encoder whose first layers are computed once for each input, without padding: alone, or in a group of inputs of the
    same length (`learn`). The result depends on the group in its last bits, and not on the batch in which an input comes."""

    def __init__(self, encoder: nn.Module, count: int, shared: bool = True):
        found = _stack(encoder)
        assert found is not None
        path, layers = found
        self.lower = _with_layers(encoder, path, layers[:count])
        self.upper = _with_layers(encoder, path, layers[count:])
        self.upper._modules["embeddings"] = _Given()
        self.known: dict[bytes, Tensor] = {}
        store = _shared if shared else None
        self.outputs = _Outputs() if store is None else store.setdefault(self._mark(count), _Outputs())
        self.last: tuple[Tensor, Tensor] | None = None  # a batch, and the output of the lower layers for it

    def _mark(self, count: int) -> str:
        """Everything that the output of the lower layers depends on, besides the input."""
        named = [*self.lower.named_parameters(), *self.lower.named_buffers()]
        device = next(self.lower.parameters()).device
        config: Any = self.lower.config
        return f"{weights_hash(named)} {count} {device} {config.to_json_string(use_diff=False)}"

    def learn(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Compute the inputs of these batches in groups, which takes about a third of the time of one after the other; stop
        at MOST_LEARNED tokens.

        The groups depend on the inputs alone. Call it before the first step, with the same inputs whenever a run is
        resumed: then every input has the same bits again.
        """
        rows: dict[bytes, Row] = {}
        tokens = 0
        for batch in batches:
            for row in _rows(**batch):
                tokens += len(row["input_ids"])
                rows.setdefault(_key(row), row)
            if tokens >= MOST_LEARNED:
                break
        groups: list[list[bytes]] = []
        length = 0
        for key in sorted(rows, key=lambda key: (len(rows[key]["input_ids"]), key)):
            previous, length = length, len(rows[key]["input_ids"])
            if length != previous or (len(groups[-1]) + 1) * length > GROUP:
                groups.append([])
            groups[-1].append(key)
        for keys in groups:
            for key, output in zip(keys, self._output(keys, [rows[key] for key in keys])):
                self.known.setdefault(key, output)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> Any:
        if self.last is None or self.last[0] is not input_ids:  # both probes of a step see the same tensors
            self.last = input_ids, self._hidden(input_ids, attention_mask, others)
        return self.upper(inputs_embeds=self.last[1], attention_mask=attention_mask)

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor, others: dict[str, Tensor]) -> Tensor:
        outputs = []
        for row in _rows(input_ids, attention_mask, **others):
            key = _key(row)
            if key not in self.known:
                self.known[key] = self._output([key], [row])[0]
            outputs.append(self.known[key])
        with torch.inference_mode(False):
            hidden = outputs[0].new_zeros((*input_ids.shape, outputs[0].shape[-1]))
            hidden[attention_mask.bool()] = torch.cat(outputs)
        return hidden

    def _output(self, keys: list[bytes], rows: list[Row]) -> Tensor:
        """Output (G, L, d) of the lower layers for a group of rows of the same length."""
        mark = b"||".join(keys)
        if mark not in self.outputs:
            if self.outputs.tokens >= MOST_SHARED and _shared is not None:
                self.outputs.clear()
                self.outputs.tokens = 0
            with torch.inference_mode(False), torch.no_grad():  # not an inference tensor: a gradient may pass by it
                batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
                mask = torch.ones_like(batch["input_ids"])
                self.outputs[mark] = self.lower(**batch, attention_mask=mask).last_hidden_state
            self.outputs.tokens += mask.numel()
        return self.outputs[mark]


def _rows(input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> list[Row]:
    """The rows of a padded batch, without padding."""
    columns = {"input_ids": input_ids, **others}
    return [
        {name: column[index][real] for name, column in columns.items()}
        for index, real in enumerate(attention_mask.bool())
    ]


def _key(row: Row) -> bytes:
    return b"|".join(value.cpu().numpy().tobytes() for value in row.values())
