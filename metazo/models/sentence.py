"""A classifier on a sentence encoder: pooled hidden states and a head, linear and trained, or fixed: of prototypes or of
label phrases.

Sentence-transformers checkpoints (all-MiniLM-L6-v2 and its kin) carry their knowledge in the *pooled* hidden states. The
pooler of transformers' own BERT classifier, a dense layer over the first token, was never trained there, and
zeroth-order steps do not train it either: on SST-2 its output hardly changes, while first-order training does train it.

The heads of prototypes and of label phrases are in metazo/models/heads.py.
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

from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.models.complete import absent, check_body, unused
from metazo.models.frozen import Split, split
from metazo.models.heads import HEADS, Phrases, Prototypes, new_head

with needs("llm"):
    from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.modeling_outputs import SequenceClassifierOutput
    from transformers.utils import logging
    from transformers.utils.hub import cached_file

HEAD_FILE = "head.safetensors"
POOLING_FILE = "1_Pooling/config.json"
MODULES_FILE = "modules.json"
BESIDE = (MODULES_FILE, "sentence_bert_config.json", "config_sentence_transformers.json")
"""Files of a checkpoint that sentence-transformers reads and metazo does not need: they are saved with the encoder again."""
_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_MODULES = ("Transformer", "Pooling", "Normalize")
"""Parts of sentence-transformers: a head of prototypes or phrases scales its embeddings to length 1 itself, and a linear one
is trained on the pooled states as they are."""


class SentenceClassifier(nn.Module):
    """Encoder, pooling ("mean" over the tokens, or "cls": the first), and a head on the pooled vector.

    Called as a transformers classifier: tensors (B, L) in, ``.logits`` (B, C) out. `save_pretrained` writes the encoder as
    `AutoModel` reads it, and the head beside it. Where not to use it: for checkpoints with a trained classification head.
    """

    def __init__(self, encoder: PreTrainedModel, head: nn.Module, pooling: str):
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder._modules["pooler"] = None  # nothing reads its output, so training it would only add noise
        self.encoder, self.head, self.pooling = encoder, head, pooling
        self._split: Split | None = None
        self.beside: dict[str, bytes] = {}
        """Contents of the files BESIDE, by name."""
        self.notes: list[str] = []
        """Sentences for the user about the files that were read."""
        self.phrases: list[str] = []
        """Texts of a head of label phrases that was made here; [] for any other head, and for one from a file."""

    @property
    def config(self) -> PreTrainedConfig:
        return self.encoder.config

    @property
    def classes(self) -> int:
        return len(next(iter(self.head.state_dict().values())))

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def embed(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Pooled hidden states (B, d)."""
        run = self.encoder if self._split is None else self._split
        others = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = run(input_ids=input_ids, attention_mask=attention_mask, **others).last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.head(self.embed(input_ids, attention_mask, token_type_ids)))  # type: ignore[arg-type]

    def with_new_head(self, classes: int) -> SentenceClassifier:
        """A classifier of another number of classes on the same weights, with a new head of the same kind, prototypes or
        label phrases, that is still to be made: one encoder for several tasks. It is in this one's mode."""
        encoder = copy.copy(self.encoder)  # its parameters are shared, its configuration is its own
        encoder.config = copy.deepcopy(encoder.config)
        encoder.config.num_labels = classes
        encoder.config.id2label = {index: f"LABEL_{index}" for index in range(classes)}
        made = SentenceClassifier(encoder, type(self.head)(classes, encoder.config.hidden_size), self.pooling)
        made.beside = self.beside
        return made.train(self.training)

    def cache_frozen(self) -> int:
        """Cache the output of the frozen lower layers for each input. Returns the number of these layers.

        Call it after requires_grad is set. With no frozen layer, or an encoder that is not embeddings and a stack of
        layers and nothing else, nothing changes: two small inputs are compared with and without the cache. Memory: one
        hidden state per token of every example seen.
        """
        self._split, count = split(self.encoder)
        return count

    def learn_frozen(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Fill the cache of `cache_frozen` from batches as `fit_prototypes` takes them (see `Split.learn`)."""
        if self._split is not None:
            inputs = ({n: v.to(self.device) for n, v in batch.items() if n != "targets"} for batch in batches)
            self._split.learn(inputs)

    def fit_prototypes(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Set a new prototype head from training batches (tensors (B, L) by name, and "targets", (B,)).

        In a new head of label phrases (`set_phrases`) only the offset is set. Any other head stays as it is.
        """
        known = self.head.offset if isinstance(self.head, Phrases) else getattr(self.head, "prototypes", None)
        if not isinstance(self.head, Prototypes) or known is None or bool(known.any()):
            return
        embeddings, labels = [], []
        for batch in batches:
            inputs = {name: value.to(self.device) for name, value in batch.items()}
            labels.append(inputs.pop("targets"))
            with torch.no_grad():
                embeddings.append(self.embed(**inputs))
        if embeddings:
            self.head.fit(torch.cat(embeddings), torch.cat(labels))

    def set_phrases(
        self, tokenizer: PreTrainedTokenizerBase, phrases: list[str], offset: list[float] | None = None
    ) -> None:
        """Make a head of label phrases from the phrases, one per class; ``offset`` (C floats) in place of a later
        calibration on training texts. Call it while the encoder has its base weights.

        Raises UserError for another number of phrases or offsets than there are classes.
        """
        assert isinstance(self.head, Phrases)
        if len(phrases) != self.classes or (offset is not None and len(offset) != self.classes):
            raise UserError(f"the head has {self.classes} classes, and {len(phrases)} label phrases were given")
        batch = tokenizer(phrases, padding=True, truncation=True, return_tensors="pt").to(self.device)
        self.learn_frozen([batch])
        with torch.no_grad():
            self.head.set(self.embed(**batch))
        self.phrases = phrases
        if offset is not None:
            self.head.offset.copy_(torch.tensor(offset))

    def phrase_record(self) -> dict[str, Any] | None:
        """The phrases and offset from which `set_phrases` rebuilds this head, as JSON values; None for any other head."""
        if not isinstance(self.head, Phrases) or not self.phrases:
            return None
        return {"phrases": self.phrases, "offset": self.head.offset.tolist()}

    # -- files ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.encoder.save_pretrained(folder)
        kind = next(name for name, head in HEADS.items() if type(self.head) is head)
        head = {name: value.contiguous() for name, value in self.head.state_dict().items()}
        save_file(head, folder / HEAD_FILE, {"head": kind})
        (folder / POOLING_FILE).parent.mkdir(exist_ok=True)
        mode = next(key for key, pooling in _POOLINGS.items() if pooling == self.pooling)
        (folder / POOLING_FILE).write_text(
            json.dumps({"word_embedding_dimension": self.config.hidden_size, mode: True}), encoding="utf-8"
        )
        for name, content in self.beside.items():
            (folder / name).write_bytes(content)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, revision: str = "main"
    ) -> SentenceClassifier:
        """Read what `save_pretrained` wrote: a folder, or a repository of the Hub at a branch, tag or commit."""
        path, pooling = find(str(folder), HEAD_FILE, revision), pooling_of(str(folder), revision)
        if path is None or pooling is None:
            raise UserError(
                f"{str(folder)!r} needs {HEAD_FILE} and {POOLING_FILE} beside the encoder; name a folder that has them."
            )
        with safe_open(path, "pt") as file:
            kind = (file.metadata() or {}).get("head", "linear")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        matrix = tensors.get("weight", tensors.get("prototypes"))
        if matrix is None or matrix.ndim != 2 or not matrix.is_floating_point() or kind not in HEADS:
            raise UserError(
                f"{HEAD_FILE} of {str(folder)!r} was not written by metazo: it has no matrix of weights or prototypes."
            )
        encoder, notes = _encoder(str(folder), dtype, revision)
        model = cls(encoder, new_head(kind, len(matrix), matrix.shape[1], dtype), pooling)
        model.head.load_state_dict(tensors)
        model.notes = notes
        model.beside = _beside(str(folder), revision)
        return model

    @classmethod
    def new(
        cls, source: str, *, head: str, classes: int, dtype: torch.dtype, revision: str = "main"
    ) -> SentenceClassifier:
        """The encoder of a checkpoint with a new head; torch's global generator draws a linear one."""
        encoder, notes = _encoder(source, dtype, revision)
        encoder.config.num_labels = classes
        top = new_head(head, classes, encoder.config.hidden_size, dtype)
        pooling = pooling_of(source, revision)
        model = cls(encoder, top, pooling or "mean")
        model.notes = notes
        if pooling is not None:  # else its parts are others than those here
            model.beside = _beside(source, revision)
        return model


def _beside(source: str, revision: str) -> dict[str, bytes]:
    paths = {name: find(source, name, revision) for name in BESIDE}
    return {name: path.read_bytes() for name, path in paths.items() if path and path.stat().st_size < 2**20}


def _encoder(source: str, dtype: torch.dtype, revision: str) -> tuple[PreTrainedModel, list[str]]:
    """The encoder of a checkpoint, and notes about its files."""
    with quiet():  # of a pooler that is missing or left out
        model, info = AutoModel.from_pretrained(
            source, dtype=dtype, revision=revision, return_dict=True, output_loading_info=True
        )
    check_body(absent(model, info["missing_keys"]), [], source)
    return model, unused(model, info["unexpected_keys"], source)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars, and the report of missing tensors if it is expected."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def find(source: str, name: str, revision: str = "main") -> Path | None:
    """The path of a file of a folder or Hub repository; None if there is no such file."""
    found = cached_file(
        source,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def pooling_of(source: str, revision: str = "main") -> str | None:
    """The pooling that a sentence-transformers checkpoint names; None if it names none.

    Raises UserError for a pooling and for a module that metazo does not have.
    """
    if find(source, POOLING_FILE, revision) is None:
        return None
    settings = _read(source, POOLING_FILE, dict, revision)
    modes = [key for key, on in settings.items() if key.startswith("pooling_mode_") and on is True]
    if named := settings.get("pooling_mode"):  # as sentence-transformers 6 writes it
        keys = {pooling: key for key, pooling in _POOLINGS.items()}
        modes = [keys.get(mode, mode) for mode in map(str, named if isinstance(named, list) else [named])]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise UserError(
            f"{POOLING_FILE} of {source!r} asks for {', '.join(modes) or 'no pooling'}; metazo knows mean and cls."
        )
    for module in _read(source, MODULES_FILE, list, revision) if find(source, MODULES_FILE, revision) else ():
        kind = str(module.get("type") if isinstance(module, dict) else module).rpartition(".")[2]
        if kind not in _MODULES:
            raise UserError(
                f"{MODULES_FILE} of {source!r} has a {kind!r} module, which metazo would leave out; it knows "
                f"{', '.join(_MODULES)}. Choose another checkpoint, or `head='checkpoint'`, which pools nothing."
            )
    return _POOLINGS[modes[0]]


def _read(source: str, name: str, form: type, revision: str) -> Any:
    """The JSON of a file of a checkpoint. Raises UserError if it is not of the form."""
    path = find(source, name, revision)
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError) as error:
        raise UserError(f"{name} of {source!r} cannot be read: {error}.") from error
    if not isinstance(found, form):
        raise UserError(f"{name} of {source!r} cannot be read: it holds no {form.__name__}.")
    return found
