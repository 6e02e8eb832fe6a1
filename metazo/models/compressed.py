"""Checkpoints of compressed-tensors: integers or 8-bit floats with scales, in several formats.

The package computes with whole weights, which it would make in the first forward pass: after adapters and hashes, and without a
gradient if that pass has none. They are made when the checkpoint is loaded, and take their memory from then on.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from metazo.io.extras import needs


def decompress(model: nn.Module) -> int:
    """Decompress the layers of a model, in its dtype, and return their number. The scales stay beside the weights, and a layer
    may round its inputs.
    """
    count = 0
    for part in model.modules():
        if "ct_decompress_hook" not in vars(part):  # a wrapper of peft shows its model's too
            continue
        with needs("quant"):
            # the compressor's own function moves all layers to parameters of another kind first, and shows bars
            from compressed_tensors.compressors import decompress_module  # pyright: ignore[reportMissingImports]
            from compressed_tensors.quantization import QuantizationStatus  # pyright: ignore[reportMissingImports]

        for layer in part.modules():
            if getattr(layer, "quantization_status", None) == QuantizationStatus.COMPRESSED:
                decompress_module(layer)
                count += 1
        compressor: Any = part.hf_quantizer.compressor  # type: ignore[union-attr]
        compressor.quantization_config.quantization_status = QuantizationStatus.DECOMPRESSED  # of the configuration too
        compressor.remove_decompression_hook(part)
    return count


def saved_quantised(model: nn.Module) -> dict[str, Any]:
    """What the configuration of a transformers model says of its quantisation; nothing if it has full precision. The skeleton
    of a model (metazo/models/skeleton.py) has it too.
    """
    found = getattr(getattr(model, "config", None), "quantization_config", None) or {}
    return found if isinstance(found, dict) else found.to_dict()


def rounds(model: nn.Module) -> bool:
    """Whether layers of compressed-tensors round inputs, outputs, keys or whole weights as they compute, which no gradient
    passes.
    """
    found = saved_quantised(model)
    if found.get("quant_method") != "compressed-tensors":
        return False
    groups = [group for group in (found.get("config_groups") or {}).values() if isinstance(group, dict)]
    rounded = any(group.get("input_activations") or group.get("output_activations") for group in groups)
    whole = found.get("quantization_status") not in ("compressed", "decompressed")
    return rounded or whole or bool(found.get("kv_cache_scheme"))
