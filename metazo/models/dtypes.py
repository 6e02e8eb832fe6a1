"""The dtype of a loaded model: the one that was asked for, whatever the loader of a quantised checkpoint does.

transformers leaves the weights of a bitsandbytes checkpoint that are not quantised in the dtype in which they were saved
(biases apart), and its 4-bit layers compute in the dtype that the configuration names.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from metazo.errors import UserError
from metazo.models.quantize import is_quantised
from metazo.models.sentence import SentenceClassifier, quiet


def give_dtype(model: nn.Module, dtype: torch.dtype, name: str) -> str | None:
    """Give the weights of a loaded model that are not quantised, and the computation of 4-bit layers, the dtype asked for,
    except for weights that transformers keeps in float32 on purpose.

    Returns: the dtype that weights of a bitsandbytes checkpoint had before, if it was another. Raises UserError for float64
    beside quantised weights, and for any other model that has another dtype than was asked for.
    """
    base: Any = model.encoder if isinstance(model, SentenceClassifier) else model
    quantizer = getattr(base, "hf_quantizer", None)
    how: Any = getattr(quantizer, "quantization_config", None)
    method = str(getattr(getattr(how, "quant_method", None), "value", ""))
    if method in ("bitsandbytes", "torchao") and dtype == torch.float64:
        raise UserError(
            f"{name!r} is quantised by {method}, which computes in float32, bfloat16 or float16, and `dtype` is float64; "
            "choose one of these."
        )
    before: set[torch.dtype] = set()
    if method == "bitsandbytes":
        for module in base.modules():
            if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
                before |= {module.compute_dtype, state.dtype}
                module.compute_dtype = state.dtype = how.bnb_4bit_compute_dtype = dtype
                module.compute_type_is_set = True  # or the first input would set it
    other = _other(base, dtype)
    if other and method != "bitsandbytes":
        first, (parameter, _) = next(iter(other.items()))
        found = str(parameter.dtype).removeprefix("torch.")
        raise UserError(
            f"`dtype` is {str(dtype).removeprefix('torch.')}, and transformers loads {len(other)} weights of {name!r}, such as "
            f"{first}, in {found}; take `dtype` {found}."
        )
    for parameter, wanted in other.values():
        before.add(parameter.dtype)
        parameter.data = parameter.data.to(wanted)
    return next((str(kind).removeprefix("torch.") for kind in before if kind != dtype), None)


def _other(model: Any, dtype: torch.dtype) -> dict[str, tuple[Tensor, torch.dtype]]:
    """The weights of another dtype than they should have, by name, each with the one that it should have."""
    wide = kept_wide(model, dtype)
    odd = {
        name: (parameter, torch.float32 if name in wide else dtype)
        for name, parameter in model.named_parameters()
        if not is_quantised(parameter)
        and parameter.dtype.itemsize > 1  # 8-bit floats are quantised weights
        and parameter.dtype != (torch.float32 if name in wide else dtype)
    }
    if odd:  # the code of a few models gives single weights a dtype of their own
        with quiet(), torch.device("meta"):
            plain = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
        own = {name: parameter.dtype for name, parameter in plain.named_parameters() if parameter.dtype != dtype}
        odd = {name: (parameter, own.get(name, wanted)) for name, (parameter, wanted) in odd.items()}
    return {name: pair for name, pair in odd.items() if pair[0].dtype != pair[1]}


def kept_wide(model: Any, dtype: torch.dtype) -> set[str]:
    """Names of the weights that transformers keeps in float32 beside narrower ones (`wo` of T5 beside float16)."""
    wide = [re.compile(part.replace("*", ".*")) for part in model._get_dtype_plan(dtype)]  # as transformers finds them
    return {name for name, _ in model.named_parameters() if any(part.search(name) for part in wide)}
