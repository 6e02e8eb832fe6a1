"""Load a transformers model and its tokenizer, from a folder or the Hub, with the dtype always given.

The dtype is never left to the checkpoint: since transformers 5 OPT would load as float16, in which perturbed weights
lose the perturbation (huggingface/peft#3053, princeton-nlp/MeZO#42).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from metazo.errors import UserError, first_sentence
from metazo.io.allocator import give_back
from metazo.io.extras import needs
from metazo.models.checks import (
    check_config,
    check_file,
    check_float64,
    check_padding,
    check_places,
    kind_of,
    not_finite,
)
from metazo.models.complete import absent, check_body, unused
from metazo.models.compressed import decompress
from metazo.models.dtypes import give_dtype
from metazo.models.embedded import EMBEDDED, check_folder
from metazo.models.parts import divided, loading
from metazo.models.quantize import (
    check_package,
    check_shapes,
    heads_of,
    keep_unpacked,
    kept_whole,
    left_over,
    quantised,
    quantization,
    remember_stored,
)
from metazo.models.sentence import HEAD_FILE, SentenceClassifier, find, pooling_of, quiet
from metazo.models.shards import check_stored, weight_files
from metazo.models.tokenizer import context_length, read_tokenizer, set_pad

with needs("llm"):
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

Kind = Literal["causal", "masked", "classifier", "seq2seq"]
KINDS = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "classifier": AutoModelForSequenceClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
}
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
HEADS = ("auto", "checkpoint", "linear", "prototype", "phrases")
MADE = ("prototype", "phrases")
"""Heads that `metazo.tasks.classes.fit_head` makes from a task."""
NEW_HEAD = "gets a new head of"
NOT_POOLED = (
    "`quantize`, `device_map`, `attn_implementation`, `tensor_parallel` and `fsdp` cannot be used with a head on pooled hidden "
    "states; leave them out, or add `head='checkpoint'`."
)


@dataclass
class LoadedModel:
    """A model in eval mode with the tokenizer that fits it."""

    model: PreTrainedModel | SentenceClassifier
    tokenizer: PreTrainedTokenizerBase
    kind: Kind
    name: str
    """Path, Hub id or alias as given."""
    dtype: torch.dtype
    context_length: int
    """Most tokens of one input, special tokens included."""
    new_head: bool = False
    """Whether a classifier's head is not from the checkpoint: drawn from the seed, or still to be made from a task."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the user: a new head, weights that are not finite."""
    quantize: str | None = None
    """How the weights of a full-precision checkpoint were quantised when it was loaded."""
    unsaved: list[str] = field(default_factory=list)
    """Names of the parameters that the checkpoint does not have: drawn from the seed, a new head's and a new pooler's."""
    adapted: tuple[str, str | None] | None = None
    """Name and revision of the base model, if the model is saved adapters on it: what they name when they are saved again."""
    base_weights: dict[str, str] | None = None
    """What identifies the weights under the adapters, or the base of a tuner (metazo/models/identity.py)."""
    cast: str | None = None
    """The dtype in which a bitsandbytes checkpoint was saved, if `dtype` is another: earlier versions of metazo left it."""


def load_model(
    name_or_path: str | Path,
    *,
    kind: str = "auto",
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    num_labels: int | None = None,
    head: str = "auto",
    seed: int = 0,
    trained_head: bool = False,
    quantize: str | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    device_map: str | None = None,
    tensor_parallel: int = 1,
    fsdp: int = 1,
) -> LoadedModel:
    """Load a model for fine-tuning.

    kind: "causal", "masked", "classifier", "seq2seq", or "auto": what the checkpoint was saved as. Without a head, an
    encoder-decoder is seq2seq and any other checkpoint a classifier. A classifier whose checkpoint has no head of
    ``num_labels`` classes gets a new one, drawn from ``seed`` without touching torch's global generator. head: a
    classifier's; "checkpoint" is transformers' own class, "linear", "prototype" and "phrases" read pooled hidden states
    (`SentenceClassifier`; the last two are made by `metazo.tasks.classes.fit_head`), and "auto" takes linear for a
    sentence-transformers checkpoint, whose pooler was never trained, and checkpoint for every other. trained_head: refuse a
    classifier whose head would be new, because its predictions are random. quantize: int8, int4 or nf4
    (metazo/models/quantize.py); a quantised checkpoint stays as it is, apart from its other weights, which get ``dtype``.
    revision: branch, tag or commit of a model on the Hub. attn_implementation, device_map: as of `from_pretrained` of
    transformers; with a device map `device` is not used.
    tensor_parallel, fsdp: number of processes that divide the model (metazo/models/parts.py), all of which load it.
    ``pico`` and ``micro`` are small models that metazo carries.
    Code from the Hub is never run. Raises UserError for a model, kind, dtype or device that is not there, and for a model
    type that is no causal, masked, classification or sequence-to-sequence model of text.
    """
    name = str(name_or_path)
    torch_dtype = _dtype(dtype)
    source = str(EMBEDDED.get(name, name))
    if kind not in (*KINDS, "auto"):
        raise UserError(f"unknown model kind {kind!r}; choose auto, {', '.join(KINDS)}")
    if head not in HEADS:
        raise UserError(f"unknown head {head!r}; choose {', '.join(HEADS)}")
    check_folder(source, name)
    notes: list[str] = []
    with explained(name):
        more: dict[str, Any] = {"revision": revision or "main", "attn_implementation": attn_implementation}
        config, chosen = configuration(source, name, kind, head, quantize, revision)
        check_package(config)
        if getattr(config, "quantization_config", None):
            more["device_map"] = {"": device}  # a quantised model cannot be moved later
        if quantize is not None:
            kept = _kept_whole(config) if chosen == "classifier" else None
            how = quantization(quantize, torch_dtype, device, kept)
            more |= {"quantization_config": how, "device_map": {"": device}}
        if device_map is not None:
            with needs("trainer"):
                import accelerate  # noqa: F401
            more["device_map"] = device_map
        more |= loading(tensor_parallel, fsdp, config, name)
        tokenizer = read_tokenizer(source, name, more["revision"])
        files = weight_files(source, name, config, more["revision"])
        with quiet(), torch.random.fork_rng(devices=[]):  # a new head follows the seed, not the global generator
            torch.default_generator.manual_seed(seed)
            unsaved: list[str] = []
            if chosen == "classifier":
                model, new = _classifier(source, config, torch_dtype, num_labels, head, name, notes, unsaved, more)
            else:
                model, new = _language_model(source, config, torch_dtype, chosen, name, notes, more), False
        check_stored(files, model.encoder if isinstance(model, SentenceClassifier) else model, name)
        if count := decompress(model):
            notes.append(
                f"{count} layers of {name}, which compressed-tensors saved, are decompressed: they take the memory of whole "
                "weights, with which that package computes"
            )
        cast = give_dtype(model, torch_dtype, name)
    if new and trained_head:
        raise UserError(
            f"there is no trained head of {model.config.num_labels} classes in {name!r}, so its answers would be random; "
            "fine-tune it first, or use the model as a language model with `kind` causal or masked"
        )
    check_places(model, name)
    check_shapes(model)
    notes += left_over(model, quantize, name) if quantize else []
    remember_stored(model)
    keep_unpacked(model)
    try:
        if "device_map" not in more and not divided(model) and not quantised(model):
            model.to(device=torch.device(device))  # type: ignore[call-arg]
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {str(device)!r} cannot be used: {first_sentence(error)}") from error
    context = context_length(model, tokenizer)
    set_pad(tokenizer, model)
    broken = not_finite(model)
    notes += broken
    if not broken and not divided(model):
        check_float64(model.eval(), chosen, name)
        check_padding(model, tokenizer, chosen, name, context)
    if quantize:
        give_back()
    loaded = LoadedModel(model.eval(), tokenizer, chosen, name, torch_dtype, context, new, notes, quantize, unsaved)  # type: ignore[arg-type]
    loaded.cast = cast
    return loaded


def configuration(
    source: str, name: str, kind: str, head: str, quantize: str | None, revision: str | None
) -> tuple[PreTrainedConfig, str]:
    """The configuration of a checkpoint and the kind of its model. Raises UserError for settings that it does not allow."""
    # without trust_remote_code a terminal is asked
    check_file(source, name, revision or "main")
    config = AutoConfig.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    check_config(config, name)
    for each in (config, *(getattr(config, key, None) or config for key in config.sub_configs)):
        each.return_dict = True  # outputs are read by their names
    if quantize is not None and getattr(config, "quantization_config", None):
        raise UserError(f"`quantize` {quantize}: {name!r} is quantised already; leave it out.")
    chosen = kind_of(config, kind, name)
    if chosen != "classifier" and head != "auto":
        raise UserError(
            f"head {head!r} is for classifiers and {name!r} is used as a {chosen} model; add kind classifier"
        )
    return config, chosen


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn any error that a damaged checkpoint raises into one sentence; a tokenizer's panic is not an Exception."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # from None: a server's answer may repeat the token that it was sent, and must not be in a traceback
        raise UserError(f"model {name!r} cannot be loaded: {first_sentence(error)}") from None


def _kept_whole(config: PreTrainedConfig) -> list[str] | None:
    with quiet(), torch.device("meta"):
        return kept_whole(KINDS["classifier"].from_config(config))


def _language_model(
    source: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    kind: str,
    name: str,
    notes: list[str],
    more: dict[str, Any],
) -> PreTrainedModel:
    model, info = KINDS[kind].from_pretrained(source, config=config, dtype=dtype, output_loading_info=True, **more)
    if missing := absent(model, info["missing_keys"]):
        raise UserError(
            f"model {name!r} has no weights for {missing[0]!r}, so it is no trained {kind} language "
            "model; load it as a classifier, or name a complete checkpoint"
        )
    notes += unused(model, info["unexpected_keys"], name)
    return model


def _classifier(
    source: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    classes: int | None,
    head: str,
    name: str,
    notes: list[str],
    unsaved: list[str],
    more: dict[str, Any],
) -> tuple[PreTrainedModel | SentenceClassifier, bool]:
    """The model, and whether its head is new."""
    trained = sum(a.endswith("ForSequenceClassification") for a in config.architectures or ()) and config.num_labels
    revision = more["revision"]
    if head == "auto":
        saved = find(source, HEAD_FILE, revision)
        if saved:
            _check_pooled(more)
            model = SentenceClassifier.from_pretrained(source, dtype=dtype, revision=revision)
            if classes in (None, model.classes):
                notes += model.notes
                return model, False
            trained = model.classes
        head = "linear" if (not trained or saved) and pooling_of(source, revision) else "checkpoint"
    wanted = classes or config.num_labels or 2
    if head == "checkpoint":
        if classes is not None and config.num_labels != classes:
            config.num_labels = classes
        model, info = KINDS["classifier"].from_pretrained(
            source, config=config, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **more
        )
        notes += unused(model, info["unexpected_keys"], name)
        lost = [str(key if isinstance(key, str) else key[0]) for key in info["mismatched_keys"]]
        missing = absent(model, info["missing_keys"])
        unsaved += [*lost, *missing]
        if heads := heads_of(model):  # every class but Perceiver's names its base model
            check_body(missing, heads, name)
            check_body(lost, heads, name, "weights of the shape that its config.json gives")
        new = bool(unsaved)
    else:
        _check_pooled(more)
        model = SentenceClassifier.new(source, head=head, classes=wanted, dtype=dtype, revision=revision)
        lost, new = [], True
        notes += model.notes
        model.config.id2label = {index: f"LABEL_{index}" for index in range(wanted)}
    if new and head not in MADE:
        old = f" in place of the trained one of {trained} classes" if trained and (lost or head == "linear") else ""
        notes.append(f"{name} {NEW_HEAD} {wanted} classes{old}: its first answers are random")
    return model, new


def _check_pooled(more: dict[str, Any]) -> None:
    """Raises UserError for options of transformers that `SentenceClassifier` does not have."""
    if set(more) - {"revision", "attn_implementation"} or more["attn_implementation"]:
        raise UserError(NOT_POOLED)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; choose {', '.join(DTYPES)}")
    return DTYPES[dtype]
