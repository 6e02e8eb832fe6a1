"""Dominant-layer control (arXiv 2606.05516): MeZO on the tensors of one layer, with all others unchanged.

    theta_l <- theta_l - lr c z_l,    c = (L(theta + eps z_l) - L(theta - eps z_l)) / (2 eps),    l one layer

The paper finds that zeroth-order fine-tuning of one decoder layer does most of the work, and that this layer is the first
with activation outliers. `first_outlier_layer` looks for it in one forward pass. We did not have the paper's threshold: an
outlier here is a value of at least 100 and at least 1,000 times the median magnitude of the layer's output (the massive
activations of Sun et al. 2024, arXiv 2402.17762). If no layer has one, the layer that raises the ratio most is taken.

It is a control for methods that learn or choose which weights to move: they should be at least as good. No code is published.
Where not to use: on models without numbered layers, unless a tensor is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from metazo.blocks import named_tensors, partition
from metazo.errors import UserError
from metazo.optimizers.groups import named_groups
from metazo.optimizers.mezo import MeZO
from metazo.optimizers.registry import Case, register

OUTLIER, OUTLIER_RATIO = 100.0, 1000.0
OUTLIER_LAYER = "outlier"  # the setting `layer='outlier'`: the layer is looked for before the first step
_LAYER_NAME = re.compile(r"^(?:.*\.)?[A-Za-z_]\w*\.\d+$")


def first_outlier_layer(model: nn.Module, forward: Callable[[], object]) -> str:
    """Name of the first numbered layer with trained tensors whose output has an activation outlier.

    Args: forward: runs the model once on a batch, as a closure does. Raises UserError if there is none.
    """
    ratios: dict[str, tuple[float, float]] = {}

    def watch(name: str):
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and hidden.is_floating_point():
                size = hidden.detach().abs().float()
                ratios[name] = (float(size.max()), float(size.max() / size.median().clamp(min=1e-12)))

        return hook

    # the outermost numbered modules: model.layers.3, not the numbered modules inside it
    named = [name for name, _ in model.named_modules() if _LAYER_NAME.match(name)]
    layers = [name for name in named if not any(name.startswith(other + ".") for other in named)]
    trained = [name for name in layers if any(p.requires_grad for p in model.get_submodule(name).parameters())]
    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in trained]
    try:
        with torch.inference_mode():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    if not ratios:
        raise UserError(
            f"No numbered layer with trained tensors was run in {type(model).__name__}: give the `layer` to train by name."
        )
    for name, (largest, ratio) in ratios.items():
        if largest >= OUTLIER and ratio >= OUTLIER_RATIO:
            return name
    values = [max(1.0, ratio) for _, ratio in ratios.values()]  # an output of zeros raises nothing, as another constant
    rises = [value / before for before, value in zip([values[0], *values], values)]
    return list(ratios)[rises.index(max(rises))]


def choose_layer(names: list[str], layer: str | int) -> str:
    """One of the block names, found by its index among numbered layers, by name, or by a part of the name between dots."""
    if not isinstance(layer, Integral | str) or isinstance(layer, bool):
        raise UserError(f"`layer` must be a whole number or a name, not {layer!r}.")
    numbered = [name for name in names if _LAYER_NAME.match(name)] or names
    if isinstance(layer, Integral) or re.fullmatch(r"-?\d+", layer):
        if not -len(numbered) <= int(layer) < len(numbered):
            raise UserError(f"`layer` {layer} does not exist: the trainable layers are 0 to {len(numbered) - 1}.")
        return numbered[int(layer)]
    found = [name for name in names if name == layer] or [name for name in names if f".{layer}." in f".{name}."]
    if len(found) != 1:
        what = "no trainable layer" if not found else f"{len(found)} trainable layers"
        raise UserError(f"`layer` {layer!r} names {what}: choose one of {', '.join(names[:3])}, ... or a number.")
    return found[0]


@register
class DominantLayer(MeZO):
    """MeZO restricted to one layer. Forwards per step: 2 queries. Extra memory: none (masters, if any, for that layer alone).

    Args:
        layer: number among the trainable layers, or a name such as model.layers.3; `layer='outlier'` is the
            paper's, which `first_outlier_layer` finds. Everything outside it is left untouched.
    """

    name, paper = "dominant-layer", "arXiv 2606.05516"
    contract_case = Case(llama=4e-3)

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        layer: str | int = 0,
        queries: int = 1,
        **common,
    ):
        groups = named_groups(params)
        pairs = [pair for group in groups for pair in group["params"]]
        blocks = {block.name: block for block in partition(named_tensors(pairs), "layer")}
        self.layer = choose_layer(list(blocks), layer)
        kept = {tensor.name for tensor in blocks[self.layer].tensors}
        for group in groups:
            group["params"] = [pair for pair in group["params"] if pair[0] in kept]
        super().__init__([group for group in groups if group["params"]], lr, eps, queries=queries, **common)

    @classmethod
    def resolve(cls, options, model, closure) -> dict[str, Any]:
        options = super().resolve(options, model, closure)
        if options.get("layer") == OUTLIER_LAYER:
            options["layer"] = first_outlier_layer(model, closure)
        return options
