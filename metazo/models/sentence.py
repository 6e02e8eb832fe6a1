"""A classifier on a sentence encoder: pooled hidden states and a head, linear and trained or of fixed prototypes.

Sentence-transformers checkpoints (all-MiniLM-L6-v2 and its kin) carry their knowledge in the *pooled* hidden states. The
pooler of transformers' own BERT classifier, a dense layer over the first token, was never trained there, and
zeroth-order steps do not train it either: on SST-2 its output stays where it is while first-order training gets through.

The prototype head is Snell et al., "Prototypical networks for few-shot learning" (2017, arXiv 1703.05175), with cosine
in place of the distance: a class is the mean direction of its training examples, and

    logit_k = 20 cos(embedding, prototype_k) - mean over the training examples of the same

It has no parameters, so all that is trained lies below it, and the loss at step 0 is already below chance.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from metazo.errors import UserError
from metazo.io.extras import needs

with needs("llm"):
    from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import SequenceClassifierOutput
    from transformers.utils import logging
    from transformers.utils.hub import cached_file

HEAD_FILE = "head.safetensors"
POOLING_FILE = "1_Pooling/config.json"
SHARPNESS = 20.0
_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


class Prototypes(nn.Module):
    """Fixed label prototypes: buffers ``prototypes`` (C, d), of unit length, and ``offset`` (C,), float32."""

    prototypes: Tensor
    offset: Tensor

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.register_buffer("prototypes", torch.zeros(classes, width))
        self.register_buffer("offset", torch.zeros(classes))

    @property
    def fitted(self) -> bool:
        return bool(self.prototypes.any())

    def fit(self, embeddings: Tensor, labels: Tensor) -> None:
        """From embeddings (N, d) and their classes (N,). Raises UserError for a class without an example."""
        directions = normalize(embeddings.float(), dim=1)
        for label in range(len(self.prototypes)):
            if not (labels == label).any():
                raise UserError(
                    f"`head='prototype'`: no training example has class {label}; take more with `train_examples`."
                )
            self.prototypes[label] = normalize(directions[labels == label].mean(0), dim=0)
        self.offset.copy_(SHARPNESS * (directions @ self.prototypes.T).mean(0))

    def forward(self, embeddings: Tensor) -> Tensor:
        return SHARPNESS * normalize(embeddings.float(), dim=1) @ self.prototypes.T - self.offset


class SentenceClassifier(nn.Module):
    """Encoder, pooling ("mean" over the tokens, or "cls": the first), and a head on the pooled vector.

    Called as a transformers classifier: tensors (B, L) in, ``.logits`` (B, C) out. `save_pretrained` writes the encoder as
    `AutoModel` reads it, and the head beside it. Where not to use it: for checkpoints with a trained classification head.
    """

    def __init__(self, encoder: PreTrainedModel, head: nn.Module, pooling: str):
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder._modules["pooler"] = None  # nothing reads it: trained, it would only take noise
        self.encoder, self.head, self.pooling = encoder, head, pooling
        self._split: _Split | None = None

    @property
    def config(self) -> PreTrainedConfig:
        return self.encoder.config

    @property
    def classes(self) -> int:
        return len(next(iter(self.head.state_dict().values())))

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def embed(self, input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> Tensor:
        """Pooled hidden states (B, d)."""
        run = self.encoder if self._split is None else self._split
        hidden = run(input_ids=input_ids, attention_mask=attention_mask, **others).last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.head(self.embed(input_ids, attention_mask, **others)))  # type: ignore[arg-type]

    def cache_frozen(self) -> int:
        """Keep what the frozen lower layers give for an input, once it was computed. Returns how many layers that is.

        Call it after requires_grad is set. With no frozen layer, or an encoder that is not embeddings and a stack of
        layers, nothing changes. Memory: a hidden state a token of every example seen.
        """
        count = _frozen_layers(self.encoder)
        self._split = _Split(self.encoder, count) if count else None
        return count

    def fit_prototypes(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Set a new prototype head from training batches (tensors (B, L) by name, and "targets", (B,)).

        Any other head stays as it is.
        """
        if not isinstance(self.head, Prototypes) or self.head.fitted:
            return
        embeddings, labels = [], []
        for batch in batches:
            inputs = {name: value.to(self.device) for name, value in batch.items()}
            labels.append(inputs.pop("targets"))
            with torch.no_grad():
                embeddings.append(self.embed(**inputs))
        self.head.fit(torch.cat(embeddings), torch.cat(labels))

    # -- files ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.encoder.save_pretrained(folder)
        kind = "prototype" if isinstance(self.head, Prototypes) else "linear"
        head = {name: value.contiguous() for name, value in self.head.state_dict().items()}
        save_file(head, folder / HEAD_FILE, {"head": kind})
        (folder / POOLING_FILE).parent.mkdir(exist_ok=True)
        mode = next(key for key, pooling in _POOLINGS.items() if pooling == self.pooling)
        (folder / POOLING_FILE).write_text(json.dumps({mode: True}))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> SentenceClassifier:
        """Read what `save_pretrained` wrote: a folder, or a repository of the Hub."""
        path, pooling = find(str(folder), HEAD_FILE), pooling_of(str(folder))
        if path is None or pooling is None:
            raise UserError(
                f"{str(folder)!r} needs {HEAD_FILE} and {POOLING_FILE} beside the encoder; name a folder that has them."
            )
        with safe_open(path, "pt") as file:
            kind = (file.metadata() or {}).get("head", "linear")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        matrix = tensors.get("weight", tensors.get("prototypes"))
        if matrix is None or matrix.ndim != 2:
            raise UserError(
                f"{HEAD_FILE} of {str(folder)!r} is no head that metazo wrote: it has no matrix of weights or prototypes."
            )
        model = cls(_encoder(str(folder), dtype), _head(kind, len(matrix), matrix.shape[1], dtype), pooling)
        model.head.load_state_dict(tensors)
        return model

    @classmethod
    def new(cls, source: str, *, head: str, classes: int, dtype: torch.dtype) -> SentenceClassifier:
        """The encoder of a checkpoint with a new head; torch's global generator draws a linear one."""
        encoder = _encoder(source, dtype)
        encoder.config.num_labels = classes
        return cls(encoder, _head(head, classes, encoder.config.hidden_size, dtype), pooling_of(source) or "mean")


def _head(kind: str, classes: int, width: int, dtype: torch.dtype) -> nn.Module:
    return Prototypes(classes, width) if kind == "prototype" else nn.Linear(width, classes, dtype=dtype)


def _encoder(source: str, dtype: torch.dtype) -> PreTrainedModel:
    with quiet():  # of a pooler that is missing or left out
        return AutoModel.from_pretrained(source, dtype=dtype)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar, and no report of tensors that are missing where that is expected."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def find(source: str, name: str) -> Path | None:
    """A file of a folder or Hub repository, None where it has none."""
    found = cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return Path(found) if found else None


def pooling_of(source: str) -> str | None:
    """The pooling that a sentence-transformers checkpoint names, None where it names none.

    Raises UserError for one that is not known here.
    """
    path = find(source, POOLING_FILE)
    if path is None:
        return None
    try:
        modes = [
            key for key, on in json.loads(path.read_text()).items() if key.startswith("pooling_mode_") and on is True
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{POOLING_FILE} of {source!r} cannot be read: {error}.") from error
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise UserError(
            f"{POOLING_FILE} of {source!r} asks for {', '.join(modes) or 'no pooling'}; metazo knows mean and cls."
        )
    return _POOLINGS[modes[0]]


# -- frozen layers, computed once ---------------------------------------------------------------------------------


def _stack(encoder: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The encoder's list of layers and where it is."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == getattr(encoder.config, "num_hidden_layers", None):
            return name, module
    return None


def _frozen_layers(encoder: nn.Module) -> int:
    """Leading layers of which nothing is trained; 0 where the embeddings are."""
    found, embeddings = _stack(encoder), getattr(encoder, "embeddings", None)
    if found is None or embeddings is None or any(p.requires_grad for p in embeddings.parameters()):
        return 0
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in found[1]]
    return trained.index(True) if True in trained else len(trained)


class _Given(nn.Module):
    """In the place of the embeddings: gives what it is given."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **others: Any) -> Tensor:
        return inputs_embeds


def _with_layers(encoder: nn.Module, path: str, layers: nn.ModuleList) -> nn.Module:
    """The same encoder, its parameters shared, with other layers."""
    view = copy.copy(encoder)
    view._modules = dict(encoder._modules)
    head, _, rest = path.partition(".")
    view._modules[head] = _with_layers(view._modules[head], rest, layers) if rest else layers  # type: ignore[arg-type]
    return view


class _Split:
    """An encoder whose first layers are computed once for each input, alone and unpadded: so the result does not depend
    on the batch that an input came in first, and a resumed run sees the same bits."""

    def __init__(self, encoder: nn.Module, count: int):
        found = _stack(encoder)
        assert found is not None
        path, layers = found
        self.lower = _with_layers(encoder, path, layers[:count])
        self.upper = _with_layers(encoder, path, layers[count:])
        self.upper._modules["embeddings"] = _Given()
        self.known: dict[bytes, Tensor] = {}
        self.last: tuple[Tensor, Tensor] | None = None  # a batch, and what the lower layers give for it

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
            with torch.inference_mode(False), torch.no_grad():  # not an inference tensor: a gradient may pass by it
                batch = {name: value.clone().unsqueeze(0) for name, value in row.items()}
                mask = torch.ones_like(batch["input_ids"])
                self.known[key] = self.lower(**batch, attention_mask=mask).last_hidden_state[0]
        return self.known[key]
