"""Make a run's model: load it, put adapters on it, and select the tensors to train."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from metazo.errors import UserError
from metazo.io.files import expanded, is_file
from metazo.io.plain import read_json, shown
from metazo.models.adapters import (
    OLD_WEIGHTS,
    PEFT_TYPES,
    WEIGHTS,
    add_adapters,
    check_merge,
    merge_adapters,
    trained_adapters,
    with_adapters,
)
from metazo.models.checks import ENDINGS, check_config, check_float64, check_padding
from metazo.models.compressed import decompress, saved_quantised
from metazo.models.describe import RECORD, describe
from metazo.models.embedded import ADAPTERS, EMBEDDED
from metazo.models.fetch import of_commit
from metazo.models.identity import BASE, base_weights, check_base
from metazo.models.load import DTYPES, NEW_HEAD, LoadedModel, load_model
from metazo.models.quantize import QUANTISED, keep_unpacked, quantised, remember_stored, repeated
from metazo.models.select import select_trainable
from metazo.models.sentence import find
from metazo.models.tokenizer import context_length, set_pad
from metazo.models.wanted import Wanted

MODEL = "model"


def assemble(
    wanted: Wanted, *, labels: int | None, device: torch.device | str, given: LoadedModel | None = None
) -> tuple[LoadedModel, int]:
    """The model of a run before its first step, and the number of its trained weights.

    labels: classes of a classification task. given: a model in memory, which replaces `wanted.model`.
    A model that is itself adapters is merged first; with `adapters` of the kind "continue" they are trained further instead.
    Other `adapters` are new, and are trained instead of the weights; `train` and `freeze` then select among them.
    Raises UserError as `load` and `select_trainable` do.
    """
    adapter = wanted.adapters
    if given is not None and not (adapter or wanted.train or wanted.freeze):  # the caller has chosen what is trained
        _check_merge(given, wanted)
        return given, select_trainable(
            given.model, [], [], [n for n, p in given.model.named_parameters() if p.requires_grad]
        )
    going_on = adapter is not None and adapter.kind == "continue"
    loaded = given or load(
        wanted.model,
        merge=not going_on,
        train=going_on,
        kind=wanted.kind,
        dtype=wanted.dtype,
        device=device,
        num_labels=labels,
        head=wanted.head,
        seed=wanted.seed,
        quantize=wanted.quantize,
        revision=wanted.revision,
        attn_implementation=wanted.attn_implementation,
        device_map=wanted.device_map,
        tensor_parallel=wanted.tensor_parallel,
        fsdp=wanted.fsdp,
    )
    check_trainable(loaded, wanted)
    if adapter is None:
        return loaded, select_trainable(loaded.model, wanted.train, wanted.freeze, None)
    if going_on and not hasattr(loaded.model, "get_base_model"):
        raise UserError(f"`adapter='continue'` needs a folder of adapters as the model, and {loaded.name} is none.")
    if going_on:
        names = trained_adapters(loaded.model)
    else:
        loaded.base_weights = None if wanted.merge else base_weights(loaded)
        names = add_adapters(loaded, adapter, wanted.seed)
    if not names:
        raise UserError(
            f"The adapters of {loaded.name} were loaded for use: load them with metazo.load_model(..., train=True), or give "
            "the folder's name as `model`."
        )
    if wanted.merge:
        check_merge(loaded.model)
    return loaded, select_trainable(loaded.model, wanted.train, wanted.freeze, names)


def check_trainable(loaded: LoadedModel, wanted: Wanted) -> None:
    """Raises UserError for a quantised model without adapters, or whose adapters are to be merged into it."""
    names = quantised(loaded.model)
    if wanted.adapters is None and (names or saved_quantised(loaded.model)):  # a skeleton has no quantised tensors
        what = f"{len(names)} of its tensors, such as {names[0]}," if names else "its weights"
        raise UserError(
            f"{loaded.name} is quantised, and {what} cannot be trained; train adapters in full precision with "
            "`adapter='lora'`."
        )
    _check_merge(loaded, wanted)


def _check_merge(loaded: LoadedModel, wanted: Wanted) -> None:
    if wanted.merge and (quantised(loaded.model) or saved_quantised(loaded.model)):
        raise UserError(
            f"`merge`: {loaded.name} is quantised, and the sum would be rounded as its weights are; leave it out."
        )


def load(name_or_path: str | Path, *, merge: bool = False, train: bool = False, **options: Any) -> LoadedModel:
    """Load a model with its tokenizer, as `metazo.models.load.load_model`, or the model of a run.

    name_or_path: a folder or Hub id of transformers, pico, the folder of a run (its kept model is loaded), or a folder or
    Hub id of adapters of peft (their base model, which adapter_config.json names, is loaded with the adapters on it). merge:
    add the adapters to the weights, so that the model is a plain one; the sums are rounded to its dtype. train: leave the
    adapters trainable. options: kind, dtype, device, num_labels, head, seed, trained_head, quantize, ... of `load_model`.
    Raises UserError as `load_model` does, for adapters of a kind that metazo does not load, if their base model cannot be
    loaded, has other weights than in their training, or if their head has another number of classes than `num_labels`.
    """
    return _load(name_or_path, merge, train, options, [])


def _load(name_or_path: Any, merge: bool, train: bool, options: dict[str, Any], above: list[Path]) -> LoadedModel:
    """As `load`. above: the folders of adapters whose base model this is."""
    if not isinstance(name_or_path, str | Path):
        raise UserError(f"`name_or_path` is a folder, a Hub id or pico, not {shown(name_or_path)}.")
    name_or_path = _of_run(name_or_path)
    folder = _of_adapters(name_or_path, options.get("revision"))
    if folder is None:
        return load_model(name_or_path, **options)
    base, revision = _named_in(folder, above)
    settings = read_json(folder / ADAPTERS, "settings of adapters")
    if settings.get("task_type") == "SEQ_CLS":  # they have a head
        options["kind"] = "classifier" if options.get("kind", "auto") == "auto" else options["kind"]
    if options.get("tensor_parallel", 1) * options.get("fsdp", 1) > 1:
        raise UserError(
            f"{folder} has adapters, which cannot be used together with `tensor_parallel` or `fsdp`: merge them first."
        )
    record = read_json(folder / RECORD, "record of the training") if is_file(folder / RECORD) else None
    known = record.pop(BASE, None) if isinstance(record, dict) else None
    if isinstance(record, dict) and record.get("quantize") is not None:
        if record["quantize"] not in QUANTISED:
            raise UserError(
                f"{folder / RECORD} has quantize {shown(record['quantize'])}, and this version of metazo quantises to "
                f"{', '.join(QUANTISED)}; copy the folder again, or use the version that wrote it."
            )
        if merge:
            raise UserError(
                f"{folder} has adapters of a base that was quantised ({record['quantize']}), into which they cannot be merged; "
                "continue them with `adapter='continue'`."
            )
        if options.get("quantize") not in (None, record["quantize"]):
            raise UserError(
                f"`quantize` {options['quantize']}: the adapters in {folder} belong to a base that was quantised to "
                f"{record['quantize']}; leave it out."
            )
        options |= {"quantize": record["quantize"]}
    if isinstance(record, dict) and isinstance(record.get("labels"), list) and options.get("kind") == "classifier":
        classes = len(record["labels"])
        if options.get("num_labels") not in (None, classes):
            raise UserError(
                f"{folder} has adapters with a head of {classes} classes, and {options['num_labels']} are wanted; take a "
                f"task of {classes} classes, or train new adapters on their base model, {base}."
            )
        options["num_labels"] = classes
    try:
        loaded = _load(base, True, False, options | {"trained_head": False, "revision": revision}, [*above, folder])
    except UserError as error:
        raise UserError(f"{folder} has adapters, and their base model cannot be loaded: {error}") from error
    found = base_weights(loaded) if (known or train) and not has_adapters(base, revision) else None
    check_base(known, found, folder, base, settings["base_model_name_or_path"])
    with_adapters(loaded, folder, train=train)
    if record is not None:
        describe(loaded.model, record)
    if any(".modules_to_save." in name for name, _ in loaded.model.named_parameters()):  # the head is in the file
        loaded.notes = [note for note in loaded.notes if NEW_HEAD not in note]
    loaded.name, loaded.new_head = str(name_or_path), False
    loaded.adapted, loaded.base_weights = (None, None) if merge else ((base, revision), found)
    if merge:
        loaded.model = merge_adapters(loaded.model)
    return loaded


def as_loaded(model: Any, tokenizer: Any = None) -> LoadedModel:
    """A model in memory as `load` gives one; it is put into eval mode. Without a tokenizer it may be any module, of kind "own".

    Raises UserError for a module without weights, for weights without a shape or of a type that metazo does not train, and with
    a tokenizer for a class that is not a causal, masked, classification or sequence-to-sequence model of transformers.
    """
    if tokenizer is not None and not hasattr(tokenizer, "pad_token_id"):
        raise UserError(
            f"`tokenizer` is {shown(tokenizer)}; give a tokenizer of transformers, as AutoTokenizer.from_pretrained loads it."
        )
    inner = getattr(model, "get_base_model", lambda: model)()  # the model inside a peft wrapper
    name = type(inner).__name__
    if (lazy := next((name for name, parameter in model.named_parameters() if is_lazy(parameter)), None)) is not None:
        raise UserError(f"`model` has weights without a shape ({lazy}): call it on a batch once, which gives them one.")
    dtype = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)
    if dtype is None:
        raise UserError(f"`model` is a {name} without weights, so that there is nothing to train.")
    if dtype not in DTYPES.values():
        raise UserError(f"`model` has weights of type {dtype}; metazo trains {', '.join(DTYPES)}.")
    kind = next((kind for kind, endings in ENDINGS.items() if name.endswith(endings)), None) if tokenizer else "own"
    if kind is None:
        raise UserError(
            f"`model` is a {name}, not a causal, masked, classification or sequence-to-sequence model of transformers; use one."
        )
    if kind == "seq2seq":  # models of images and speech have such names too
        check_config(inner.config, name)
    keep_unpacked(model)
    decompress(model)
    context = 0
    if tokenizer is not None:
        context = context_length(inner, tokenizer)
        set_pad(tokenizer, inner)
        check_float64(inner.eval(), str(kind), name)
        check_padding(inner, tokenizer, str(kind), name, context)
    remember_stored(model)
    _, quantize = repeated(inner, dtype)  # type: ignore[arg-type]
    return LoadedModel(model.eval(), tokenizer, kind, f"memory:{name}", dtype, context, quantize=quantize)  # type: ignore[arg-type]


def base_of(name_or_path: str | Path, revision: str | None = None) -> tuple[str, str | None]:
    """The folder or Hub id, and the revision, whose configuration and weights a model has: its own, or those of the base of
    LoRA adapters.
    """
    name, above = _of_run(name_or_path), []
    while (folder := _of_adapters(name, revision)) is not None:
        base, revision = _named_in(folder, above)
        name, above = _of_run(base), [*above, folder]
    return str(name), revision


def has_adapters(name_or_path: str | Path, revision: str | None = None) -> bool:
    """Whether this is a folder or Hub id of adapters, or the folder of a run that kept adapters."""
    return _of_adapters(_of_run(name_or_path), revision) is not None


def _of_adapters(name: str | Path, revision: str | None) -> Path | None:
    """The folder of the adapters that this names, which is in the Hub's cache for a Hub id; None for another model.

    The Hub is asked for Hub ids alone, and its cache without a network.
    """
    folder = expanded(name)
    if is_file(folder / ADAPTERS):
        return folder
    if name in EMBEDDED or folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(name)):
        return None
    try:
        settings = find(str(name), ADAPTERS, revision or "main")
    except Exception:  # no such repository or revision, no access, no network: the loading of a plain model says which
        return None
    if settings is None:
        return None
    of_commit(str(name), RECORD, commit := settings.parent.name)
    if not any(of_commit(str(name), file, commit) for file in (WEIGHTS, OLD_WEIGHTS)):
        raise UserError(
            f"{name} has adapters, and their {WEIGHTS} cannot be had from the Hub (or, offline, its cache); save them again "
            "with save_pretrained if the repository has no such file"
        )
    return settings.parent


def _of_run(name_or_path: str | Path) -> str | Path:
    """The kept model, if this is the folder of a run; else the same."""
    folder = expanded(name_or_path)
    if not is_file(folder / ADAPTERS) and any(is_file(folder / MODEL / name) for name in (ADAPTERS, "config.json")):
        return folder / MODEL
    return name_or_path


def _named_in(folder: Path, above: list[Path]) -> tuple[str, str | None]:
    """The base model that the adapters in a folder name, and its revision on the Hub. above: the folders of adapters on it,
    none of which it may be."""
    path = folder / ADAPTERS
    if any(folder.samefile(other) for other in above):
        raise UserError(
            f"{path} names a base model that is these adapters again; name the plain model as base_model_name_or_path there"
        )
    try:
        found = read_json(path, "settings of adapters")
        kind, base, revision = found["peft_type"], found["base_model_name_or_path"], found.get("revision")
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} does not name adapters and their base model ({error})") from error
    if kind not in list(PEFT_TYPES) or not isinstance(base, str):
        raise UserError(
            f"{path} has adapters of the kind {shown(kind)} on {shown(base)}; metazo loads lora, dora, ia3, prefix and prompt"
        )
    if not any(is_file(folder / file) for file in (WEIGHTS, OLD_WEIGHTS)):
        raise UserError(f"{folder} has no {WEIGHTS}; save the adapters again with save_pretrained")
    if base not in EMBEDDED and not Path(base).is_absolute():
        parents = [parent / base for parent in folder.absolute().parents]  # the project in which the run was started
        # not the run of these adapters, which "." names from its own folder
        there = [path for path in parents if is_file(path / "config.json") and _of_run(path) != folder.absolute()]
        if there and not (Path(base).exists() and there[0].samefile(base)):
            return str(there[0]), None
    return base, revision if isinstance(revision, str) else None
