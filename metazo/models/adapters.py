"""Adapters through peft, for any method: their tensors are trained, and the base model's are not.

    lora      two factors of low rank beside a weight           Hu et al. 2021, arXiv 2106.09685
    dora      the same, with a trained length per output        Liu et al. 2024, arXiv 2402.09353
    ia3       factors of keys, values and activations           Liu et al. 2022, arXiv 2205.05638
    prefix    trained keys and values before every layer        Li and Liang 2021, arXiv 2101.00190
    prompt    trained embeddings before the input               Lester et al. 2021, arXiv 2104.08691

prefix and prompt are virtual tokens. peft numbers the positions of a padded row from the padding on; here they follow the
attention mask, so that padding changes no result (metazo/models/virtual.py).

Where not to use: prefix and prompt on models other than causal ones, or if the adapters are to be merged into the weights.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from metazo.errors import UserError, first_sentence
from metazo.io.extras import needs
from metazo.models.adapter_settings import check_adapter_settings
from metazo.models.load import LoadedModel
from metazo.models.quantize import heads_of, quantised
from metazo.models.sentence import SentenceClassifier
from metazo.models.shards import whole_numbers
from metazo.models.wanted import VIRTUAL, Adapter

TASK_TYPES = {"causal": "CAUSAL_LM", "classifier": "SEQ_CLS", "masked": None, "seq2seq": "SEQ_2_SEQ_LM"}
PEFT_TYPES = {"LORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING"}
WEIGHTS = "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"
"""As peft wrote it in 2023; torch reads it without running code."""
AGAIN = "copy the adapters again, or save them again with save_pretrained"
_OF_DEVELOPERS = (
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
    "Model with `tie_word_embeddings=True` and the ",
    "Found missing adapter keys",  # an error of ours
)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warnings of peft that tell a user nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a deprecated name
        for message in _OF_DEVELOPERS:
            warnings.filterwarnings("ignore", re.escape(message))
        yield


def _peft() -> Any:
    with needs("peft"):
        import peft
    return peft


@contextmanager
def _float32() -> Iterator[None]:
    """New tensors in float32, whatever torch.set_default_dtype says: a replay, perhaps elsewhere, draws the same numbers."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(kept)


def add_adapters(loaded: LoadedModel, adapter: Adapter, seed: int) -> list[str]:
    """Put adapters on a model, without targets on the layers that peft names for this architecture (lora and dora: on all
    linear layers if it names none).

    `loaded.model` becomes the wrapped model, except that a sentence encoder with its head gets the adapters in place. A
    classifier's trained head is trained as well. Returns the names of the tensors to train. The adapters' initial values
    are drawn from `seed`; lora, dora and ia3 leave the model's function unchanged, prefix and prompt do not.
    Raises UserError for a kind that the model cannot have, and for targets that it has not.
    """
    peft, encoder = _peft(), isinstance(loaded.model, SentenceClassifier)
    if hasattr(loaded.model, "get_base_model"):
        raise UserError(
            f"`adapter` {adapter.kind}: {loaded.name} has adapters in memory; train them by `adapter='continue'`, or load it "
            "with `merge=True` first."
        )
    if adapter.kind in VIRTUAL and (encoder or loaded.kind != "causal"):
        raise UserError(
            f"`adapter` {adapter.kind} is made of virtual tokens, which need a causal model, and {loaded.name} is a "
            f"{loaded.kind} model; take lora, dora or ia3."
        )
    heads = heads_of(loaded.model) if loaded.kind == "classifier" and not encoder else []
    if name := next((name for name in quantised(loaded.model) if name.split(".")[0] in heads), None):
        raise UserError(
            f"the head of {loaded.name} is quantised ({name}) and would be trained beside the adapters; take the checkpoint in "
            "full precision, of which `quantize` leaves the head as it is."
        )
    if adapter.kind == "ia3" and loaded.dtype != torch.float32 and _in_four_bits(loaded.model):
        raise UserError(  # peft's layer multiplies in float32 and leaves its result there
            f"`adapter` ia3 computes in float32 on 4-bit weights, and {loaded.name} in {str(loaded.dtype)[6:]}; take "
            "`dtype='float32'`, or lora."
        )
    if adapter.kind in VIRTUAL and adapter.rank >= loaded.context_length:
        raise UserError(
            f"`adapter_rank` is {adapter.rank} tokens, which leave no room for an input: the context of {loaded.name} has "
            f"{loaded.context_length}; choose a smaller number."
        )
    _check_targets(loaded, adapter)
    config = _config(peft, loaded, adapter, None if encoder else TASK_TYPES[loaded.kind])
    if heads:  # peft itself knows those named classifier and score
        config.modules_to_save = heads
    try:
        with torch.random.fork_rng(devices=[]), quiet_peft(), _float32():
            torch.default_generator.manual_seed(seed)
            if isinstance(loaded.model, SentenceClassifier):
                peft.inject_adapter_in_model(config, loaded.model.encoder)
                loaded.model.head.requires_grad_(True)
                loaded.model.eval()
            else:
                loaded.model = peft.get_peft_model(loaded.model, config).eval()
    except (AttributeError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"`adapter` {adapter.kind} cannot be put on {loaded.name}: {first_sentence(error)}.") from error
    if adapter.kind in VIRTUAL:
        loaded.context_length -= adapter.rank
    return trained_adapters(loaded.model)


def _in_four_bits(model: nn.Module) -> bool:
    return any(hasattr(parameter, "quant_state") for parameter in model.parameters())


def _check_targets(loaded: LoadedModel, adapter: Adapter) -> None:
    """Raises UserError for a target that is the name, or the end of the name, of no layer: peft ignores it beside others."""
    layers = dict(loaded.model.named_modules())
    for target in adapter.targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            weights = {name: getattr(layer, "weight", None) for name, layer in layers.items()}
            matrices = [name for name, weight in weights.items() if isinstance(weight, Tensor) and weight.dim() == 2]
            there = list(dict.fromkeys(name.rpartition(".")[2] for name in matrices))
            raise UserError(
                f"`adapter_targets` {target}: no layer of {loaded.name} has this name; its layers are {', '.join(there[:8])}"
                f"{' and others' if len(there) > 8 else ''}."
            )


def trained_adapters(model: nn.Module) -> list[str]:
    """Names of the tensors that peft has left trainable."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _config(peft: Any, loaded: LoadedModel, adapter: Adapter, task_type: str | None) -> Any:
    model_type, targets = loaded.model.config.model_type, list(adapter.targets) or None
    if adapter.kind in VIRTUAL:
        cls = peft.PrefixTuningConfig if adapter.kind == "prefix" else peft.PromptTuningConfig
        return cls(num_virtual_tokens=adapter.rank, task_type=task_type)
    constants = peft.utils.constants
    if adapter.kind == "ia3":
        if targets is None and model_type not in constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
            raise UserError(f"peft names no layers of a {model_type} model for ia3; name them with `adapter_targets`.")
        return peft.IA3Config(target_modules=targets, feedforward_modules=[] if targets else None, task_type=task_type)
    if targets is None:  # named, because peft does not find its own for Mixtral
        targets = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, "all-linear")
    model = loaded.model.encoder if isinstance(loaded.model, SentenceClassifier) else loaded.model
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    own = [name for name, layer in layers if not quantised(layer) and type(layer).forward is not nn.Linear.forward]
    return peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=targets,
        task_type=task_type,
        use_dora=adapter.kind == "dora",
        # routers and grouped layers, which are more than a product
        exclude_modules=own if own and targets == "all-linear" else None,
    )


def with_adapters(loaded: LoadedModel, folder: Path, *, train: bool = False) -> None:
    """Put the adapters that a model's own save_pretrained wrote on the base model, which becomes the wrapped model.

    train: whether the adapters are left trainable. Raises UserError for adapters that do not fit.
    """
    peft, names = _peft(), _tensors_of(folder / WEIGHTS)
    check_adapter_settings(folder, dict(loaded.model.named_modules()))
    try:
        with quiet_peft():
            virtual = peft.PeftConfig.from_pretrained(str(folder)).is_prompt_learning
            trainable = train and not virtual  # peft refuses to load virtual tokens as trainable
            loaded.model = peft.PeftModel.from_pretrained(loaded.model, str(folder), is_trainable=trainable).eval()
            # peft only warns of missing tensors, and says nothing of unknown ones; this gives both
            found: Any = loaded.model.load_adapter(str(folder), "default", is_trainable=trainable)  # type: ignore[operator]
    except KeyError as error:  # a head, or virtual tokens
        raise UserError(f"{folder / WEIGHTS} has no tensor {error.args[0]!r}; {AGAIN}.") from error
    except Exception as error:  # a file that anybody may have written
        raise UserError(f"the adapters in {folder} do not fit {loaded.name!r}: {first_sentence(error)}") from error
    missing, unknown = (
        ([], sorted(names - {"prompt_embeddings"})) if virtual else (found.missing_keys, found.unexpected_keys)
    )
    for wrong, what in ((missing, "has no tensor"), (unknown, f"does not fit {loaded.name!r}, which has no tensor")):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise UserError(f"{folder / WEIGHTS} {what} {wrong[0].replace('.default', '')!r}{more}; {AGAIN}.")
    config: Any = loaded.model.active_peft_config
    if virtual:
        loaded.context_length -= config.num_virtual_tokens
        config.inference_mode = not train
        loaded.model.prompt_encoder.requires_grad_(train)
        # peft saves the projected tokens without the network that projected them
        if train and getattr(config, "prefix_projection", False):
            encoders: Any = loaded.model.prompt_encoder
            for holder in (config, *encoders.values()):
                holder.prefix_projection = False


def _tensors_of(path: Path) -> set[str]:
    """Names of the tensors in a file of adapters; none if there is no such file, as beside an old `adapter_model.bin`, which
    peft reads. Raises UserError for a file that is damaged, and for whole numbers, which peft would take for weights.
    """
    if not path.exists():
        return set()
    try:
        with safe_open(path, "pt") as file:
            if whole := next(whole_numbers(file), None):
                raise UserError(f"{path} holds {whole[0]} as {whole[1]}, and adapters have a fraction; {AGAIN}.")
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({first_sentence(error)}); {AGAIN}.") from error


def check_merge(model: nn.Module) -> None:
    """Raises UserError for adapters on a matrix that another layer uses as well, which would get the sum without having had
    the adapters.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, layer in model.named_modules():
        if isinstance(layer, _peft().tuners.tuners_utils.BaseTunerLayer):
            base: Any = layer
            own = getattr(base.get_base_layer(), "weight", None)
            if others := [other for other in names.get(id(own), []) if not other.startswith(f"{name}.")]:
                raise UserError(
                    f"Adapters on {name} cannot be merged, because its matrix is also {others[0]}, which is used without them: "
                    "continue them with `adapter='continue'`, or train adapters of other layers (`adapter_targets`)."
                )


def merge_adapters(model: nn.Module) -> Any:
    """The plain model with its adapters added to the weights, rounded to their dtype; changes the given model.

    Raises UserError for virtual tokens, which are in no weight, and for adapters on a tied matrix.
    """
    peft = _peft()
    check_merge(model)
    whole: Any = model
    if isinstance(model, peft.PeftModel):
        if whole.active_peft_config.is_prompt_learning:
            raise UserError(
                "prefix and prompt adapters are virtual tokens and cannot be merged into the weights; continue them with "
                "`adapter='continue'`, or name their base model."
            )
        with quiet_peft():
            return whole.merge_and_unload().eval()
    layers: list[tuple[str, Any]] = [
        item for item in model.named_modules() if isinstance(item[1], peft.tuners.tuners_utils.BaseTunerLayer)
    ]
    for name, layer in layers:
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())
    return model
