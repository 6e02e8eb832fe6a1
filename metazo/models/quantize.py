"""Quantised base models, whose adapters are trained in full precision: torchao (int8, int4) and bitsandbytes (nf4).

    int8    8-bit weights, one scale per output                            torchao, Int8WeightOnlyConfig
    int4    4-bit weights, one scale and zero per 32 of a row; needs CUDA   torchao, Int4WeightOnlyConfig
    nf4     4-bit NormalFloat, one scale per 64 weights                    bitsandbytes; Dettmers et al. 2023, arXiv 2305.14314

Linear layers are quantised; embeddings, norms and the output layer are not. Activations have the run's dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.io.tensorfile import weights_hash

QUANTISED = ("int8", "int4", "nf4")
GROUP = 32
NF4_BLOCK = 64


def quantization(kind: str, dtype: torch.dtype, device: torch.device | str, kept: list[str] | None = None) -> Any:
    """transformers' configuration of a kind. kept: layers that are not quantised, in the place of transformers' own choice.

    Raises MissingPackage without the extra, and UserError for float64, and for int4 without CUDA or bfloat16.
    """
    if dtype == torch.float64:  # neither package has kernels for it
        raise UserError(
            f"`quantize` {kind} computes in float32, bfloat16 or float16, and `dtype` is float64; choose one of these or leave "
            "`quantize` out."
        )
    if kind == "int4" and torch.device(device).type != "cuda":
        raise UserError(
            "`quantize='int4'` needs a CUDA device: torchao has such kernels for a processor only as a prototype, whose models "
            "cannot be saved. Take nf4, which has 4 bits too, or int8."
        )
    if kind == "int4" and dtype != torch.bfloat16:
        raise UserError(f"`quantize='int4'` computes in bfloat16, and `dtype` is {str(dtype).removeprefix('torch.')}.")
    with needs("llm"):
        from transformers import BitsAndBytesConfig, TorchAoConfig
    with needs("quant"):
        import accelerate  # noqa: F401

        if kind == "nf4":
            import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]

            return BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept
            )
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Int4WeightOnlyConfig,
            Int8WeightOnlyConfig,
        )
    if kind == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=kept)
    # the default format needs mslk, another package of kernels; this one needs torch alone
    int4 = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    return TorchAoConfig(int4, modules_to_not_convert=kept)


def heads_of(model: nn.Module) -> list[str]:
    """Names of the layers of a classifier that are outside its base model, such as `classifier`, `score`, BART's
    `classification_head`, DistilBERT's `pre_classifier`: they are new if the checkpoint is of another kind. None of others.
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    layers = [name for name, layer in model.named_children() if next(layer.parameters(), None) is not None]
    prefix = getattr(model, "base_model_prefix", None)
    return [name for name in layers if name != prefix] if prefix in layers else []


def kept_whole(model: nn.Module) -> list[str] | None:
    """The layers to leave in full precision so that a classifier's head can be trained; None if transformers leaves the head
    by itself, as it does for one without a bias (it takes the last parameter for the name of a layer).
    """
    with needs("llm"):
        from transformers.quantizers.base import get_keys_to_not_convert
        from transformers.quantizers.quantizers_utils import should_convert_module

    kept = get_keys_to_not_convert(model)
    heads = [name for name in heads_of(model) if should_convert_module(name, kept)]
    return [*kept, *heads] if heads else None


def repeated(model: nn.Module, dtype: torch.dtype) -> tuple[bool, str | None]:
    """Whether a transformers model in memory was quantised when it was loaded or later, from a checkpoint that is not, and the
    kind with which `load_model` would do the same again, if there is one.
    """
    parts = (model, getattr(model, "encoder", None))  # the model of transformers, or a classifier's own
    quantizer: Any = next(filter(None, (getattr(part, "hf_quantizer", None) for part in parts)), None)
    if quantizer is None:  # by a package's own function, such as torchao's `quantize_`
        return bool(quantised(model)), None
    if quantizer.pre_quantized:
        return False, None
    found = quantizer.quantization_config.to_dict()
    kept = next((found[name] for name in ("llm_int8_skip_modules", "modules_to_not_convert") if found.get(name)), None)
    kept = kept if kept and set(kept) & set(heads_of(model)) else None
    for kind in QUANTISED:
        try:
            made = quantization(kind, dtype, next(model.parameters()).device, kept)
        except UserError:  # not on this device, or a package that is not installed
            continue
        if found == made.to_dict():
            return True, kind
    return True, None


def check_package(config: Any) -> None:
    """Raises MissingPackage if a quantised checkpoint needs a package that is not installed."""
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    with needs("quant"):
        if method is not None:
            import accelerate  # noqa: F401
        if method == "torchao":
            import torchao  # noqa: F401  # pyright: ignore[reportMissingImports]
        elif method in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
            import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]
        elif method == "compressed-tensors":
            import compressed_tensors  # noqa: F401  # pyright: ignore[reportMissingImports]


def is_quantised(tensor: Tensor) -> bool:
    """Whether a parameter holds whole numbers with scales instead of its values."""
    return _packed(tensor) or not tensor.is_floating_point()


def _packed(tensor: Tensor) -> bool:
    """Whether a tensor is made of others; a DTensor, which is a part of a tensor, holds its values."""
    return is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "placements")


def quantised(model: nn.Module) -> list[str]:
    """Names of the quantised parameters, and of all parameters of the layers of compressed-tensors."""
    layers = {name for name, layer in model.named_modules() if getattr(layer, "quantization_scheme", None) is not None}
    every = model.named_parameters()
    return [name for name, parameter in every if is_quantised(parameter) or name.rpartition(".")[0] in layers]


def left_over(model: nn.Module, kind: str, name: str) -> list[str]:
    """A note if less than half of the weights were quantised, or would be (expect_bytes); embeddings and output layer apart.

    Raises UserError if none was: the layers of GPT-2 and fused experts are not `torch.nn.Linear`.
    """
    base = _transformer(model)
    apart = [layer for layer in (base.get_input_embeddings(), base.get_output_embeddings()) if layer is not None]
    ends = {id(parameter) for layer in apart for parameter in layer.parameters()}
    done, whole, kept = 0, 0, {}
    for key, parameter in base.named_parameters():
        if id(parameter) in ends:
            continue
        size = entries(parameter)
        whole += size
        if is_quantised(parameter) or hasattr(parameter, "expected_bytes"):
            done += size
        else:
            kept[key] = size
    if 2 * done > whole:
        return []
    largest = max(kept, key=lambda key: kept[key])
    if not done:
        raise UserError(
            f"`quantize` {kind} finds no linear layer in {name!r} that it can quantise (its largest weight beside embeddings "
            f"and head is {largest}); " + ("leave it out." if kind == "nf4" else "leave it out, or try nf4.")
        )
    return [f"`quantize` {kind} leaves {1 - done / whole:.0%} of the weights as they are, such as {largest}."]


def _transformer(model: nn.Module) -> Any:
    """The model of transformers, without the head of a classifier that reads its hidden states."""
    with needs("llm"):
        from transformers import PreTrainedModel

    return model if isinstance(model, PreTrainedModel) else model.encoder


def check_shapes(model: nn.Module) -> None:
    """Raises UserError for nf4 layers whose inputs are no multiple of the block on a CPU, whose kernel needs that."""
    for name, module in model.named_modules():
        width = getattr(module, "in_features", 0)
        if type(module).__name__ == "Linear4bit" and width % NF4_BLOCK and module.weight.device.type == "cpu":
            raise UserError(
                f"`quantize='nf4'` on a CPU needs layers whose inputs are a multiple of {NF4_BLOCK}, and {name} has {width}; "
                "take int8."
            )


def keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from packing the 4-bit weights of a CPU, as it does on processors with AVX512-BF16 at the first forward
    pass in eval mode, for good: the kernel of packed weights computes in bfloat16, whatever the run's dtype, and no gradient
    passes it. Warns about layers that are packed already.
    """
    packed = []
    module: Any
    for name, module in model.named_modules():
        if getattr(module, "support_avx512bf16_for_cpu", None) is not None:
            module.support_avx512bf16_for_cpu = False
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                packed.append(name)
    if packed:
        warnings.warn(
            f"{len(packed)} 4-bit layers, such as {packed[0]}, have run in eval mode on this CPU: bitsandbytes computes "
            "them in bfloat16 from then on, and no gradient passes them. Load the model again, and do not run it before.",
            stacklevel=3,
        )


def remember_stored(model: nn.Module) -> None:
    """Keep the hash of every bitsandbytes parameter as it was loaded, for `metazo.io.tensorfile.weights_hash`: the kernels of
    a CPU rearrange the stored numbers at the first use, and 8-bit layers take the scales away. A hash that is kept stays.
    """
    for module in model.modules():
        taken = getattr(getattr(module, "state", None), "SCB", None)  # the scales of an 8-bit layer that has run
        for parameter in module.parameters(recurse=False):
            # on the state, which copies of the parameter share: peft replaces the weights under DoRA by copies
            holder: Any = getattr(parameter, "quant_state", None) or (parameter if hasattr(parameter, "SCB") else None)
            if holder is not None and not hasattr(holder, "stored_sha256"):
                parts = [*stored(parameter), *([taken] if taken is not None and parameter.dtype == torch.int8 else [])]
                holder.stored_sha256 = weights_hash((str(place), part) for place, part in enumerate(parts))


def expect_bytes(model: nn.Module, kind: str) -> None:
    """Note on each linear layer of a skeleton the bytes that its weights will have when they are loaded quantised.

    model: a transformers model, or a classifier with a new head over one, on the meta device. The layers are those that
    transformers would quantise: not the output layer, tied weights or the last module; GPT-2's Conv1D by bitsandbytes alone.
    """
    with needs("llm"):
        from transformers.pytorch_utils import Conv1D
        from transformers.quantizers.base import get_keys_to_not_convert

    base = _transformer(model)
    kept = kept_whole(base) or get_keys_to_not_convert(base)
    layers = (nn.Linear, Conv1D) if kind == "nf4" else nn.Linear
    for name, module in base.named_modules():
        if isinstance(module, layers) and not any(key in name for key in kept):
            module.weight.expected_bytes = _quantised_bytes(*module.weight.shape, kind)  # type: ignore[attr-defined]


def _quantised_bytes(rows: int, columns: int, kind: str) -> int:
    if kind == "int8":
        return rows * (columns + 5)  # a scale in float32 and a zero
    if kind == "nf4":
        return -(-rows * columns // 2) + 4 * -(-rows * columns // NF4_BLOCK)
    rows, columns = -(-rows // 8) * 8, -(-columns // 1024) * 1024  # int4: tiles of torch's kernel
    return rows * columns // 2 + 4 * rows * (columns // GROUP)  # a scale and a zero in bfloat16


def entries(parameter: Tensor) -> int:
    """Number of weights of a parameter, also if two of them share a byte."""
    return getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape).numel()


def bytes_of(tensor: Tensor) -> int:
    """Bytes of memory of a parameter, quantised or not, or to be quantised (expect_bytes)."""
    if (expected := getattr(tensor, "expected_bytes", None)) is not None:
        return expected
    return sum(part.numel() * part.element_size() for part in stored(tensor))


def stored(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors of which a parameter is made: itself, or whole numbers and scales."""
    if _packed(tensor):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from stored(getattr(tensor, name))
        return
    yield tensor
    if (scales := getattr(tensor, "SCB", None)) is not None:  # bitsandbytes, 8 bits
        yield scales
    state = getattr(tensor, "quant_state", None)  # bitsandbytes, 4 bits
    while state is not None:
        parts = (getattr(state, name, None) for name in ("absmax", "offset"))
        yield from (part for part in parts if part is not None)
        state = getattr(state, "state2", None)  # of scales that are quantised too
