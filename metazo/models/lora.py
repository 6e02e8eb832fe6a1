"""LoRA adapters (arXiv 2106.09685) through peft, for any method: MeZO on adapters trains their tensors and no others."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.models.load import LoadedModel
from metazo.models.sentence import SentenceClassifier

TASK_TYPES = {"causal": "CAUSAL_LM", "classifier": "SEQ_CLS", "masked": None}
ALPHA = 16  # as MeZO's published runs with LoRA (rank 8)


def _peft() -> Any:
    with needs("peft"):
        import peft
    return peft


def add_adapters(loaded: LoadedModel, rank: int, seed: int) -> list[str]:
    """Put adapters of `rank` on the layers that peft names for this architecture (on all linear layers if it names none).

    `loaded.model` becomes the wrapped model, except that a sentence encoder with its head gets the adapters in place. A
    classifier's trained head is trained as well. Returns the names of the tensors to train. The adapters' initial values
    are drawn from `seed` and leave the model's function unchanged.
    """
    peft = _peft()
    known = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    target = None if loaded.model.config.model_type in known else "all-linear"
    task_type = None if isinstance(loaded.model, SentenceClassifier) else TASK_TYPES[loaded.kind]
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=target, task_type=task_type)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a deprecated name
        torch.default_generator.manual_seed(seed)
        if isinstance(loaded.model, SentenceClassifier):
            peft.inject_adapter_in_model(config, loaded.model.encoder)
            loaded.model.head.requires_grad_(True)
            loaded.model.eval()
        else:
            loaded.model = peft.get_peft_model(loaded.model, config).eval()
    return [name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad]


def with_adapters(loaded: LoadedModel, folder: Path) -> None:
    """Put the adapters that a model's own save_pretrained wrote on the base model, which becomes the wrapped model.

    Raises UserError for adapters that do not fit.
    """
    peft = _peft()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # as above
            loaded.model = peft.PeftModel.from_pretrained(loaded.model, str(folder)).eval()
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split()).split(". ")[0][:300]
        raise UserError(f"the LoRA adapters in {folder} do not fit {loaded.name!r}: {reason}") from error


def merge_adapters(model: nn.Module) -> Any:
    """The plain model with its adapters added to the weights, rounded to their dtype; changes the given model."""
    peft = _peft()
    whole: Any = model
    if isinstance(model, peft.PeftModel):
        return whole.merge_and_unload().eval()
    layers: list[tuple[str, Any]] = [
        item for item in model.named_modules() if isinstance(item[1], peft.tuners.tuners_utils.BaseTunerLayer)
    ]
    for name, layer in layers:
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())
    return model
