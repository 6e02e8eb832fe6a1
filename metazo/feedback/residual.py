"""The residual stream of a network: the list of blocks whose outputs add to it, found by structure, not by a model's name.

A transformer is a stack of blocks of one class in an `nn.ModuleList`. Each takes the hidden state (B, T, d) of the previous
block and returns that of the next: its input plus the outputs of its attention and MLP. The part after the last block
(final norm, pooling, head, loss) is the *tail*.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from metazo.errors import UserError


@dataclass(frozen=True)
class LinearMap:
    """A module that computes x W^T + b, or x W + b (transformers' Conv1D of GPT-2: `transposed`)."""

    name: str
    module: nn.Module
    transposed: bool

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]

    def factors(self, error: Tensor, entered: Tensor) -> tuple[Tensor, Tensor]:
        """(left, right) with dL/dW = left right^T, from the error at the output (R, out) and the input (R, in)."""
        return (entered.t(), error.t()) if self.transposed else (error.t(), entered.t())


def linear_maps(module: nn.Module, prefix: str = "") -> list[LinearMap]:
    """The linear maps within a module, in the order of its submodules. A Linear with a forward of its own (DeepSeek's grouped
    ones, routers) may compute something else: its weight is none of them.
    """
    found = []
    for name, inner in module.named_modules(prefix=prefix):
        own = getattr(inner.forward, "__func__", None) is not nn.Linear.forward
        if not own or type(inner).__name__ == "FalconLinear":  # Falcon's writes out the same product
            found.append(LinearMap(name, inner, False))
        elif _is_conv1d(inner):
            found.append(LinearMap(name, inner, True))
    return found


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # transformers.pytorch_utils


@dataclass(frozen=True)
class Residual:
    """The residual stream of a model.

    path: of the list of blocks in the model; blocks: in the order of the forward pass; ancestors: the modules that
    contain the list, from the model inwards.
    """

    path: str
    blocks: tuple[nn.Module, ...]
    ancestors: tuple[nn.Module, ...]

    def maps(self, index: int) -> list[LinearMap]:
        """The linear maps of a block, named as in the model."""
        return linear_maps(self.blocks[index], f"{self.path}.{index}")

    def block_of(self) -> dict[int, int]:
        """Index of the block by id of the parameter, for all parameters within blocks."""
        return {id(p): index for index, block in enumerate(self.blocks) for p in block.parameters()}


def find_residual(model: nn.Module) -> Residual:
    """The residual stream of a model.

    The candidates are the outermost `nn.ModuleList`s whose members are all of one class and have at least two linear layers
    each. Exactly one must have most of the parameters of all candidates.

    Raises UserError if there is no candidate, if there are two stacks of comparable size, and for an encoder-decoder, whatever
    the sizes of its stacks: the decoder reads the encoder's output in every block, which is no residual stream.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{type(model).__name__} is a {config.model_type} model, an encoder-decoder, and feedback methods follow one "  # type: ignore[union-attr]
            "residual stream; choose a method that perturbs weights, such as mezo, or first-order-fused."
        )
    candidates: list[tuple[int, str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{path}.") for _, path, _ in candidates)
        if inside or not isinstance(module, nn.ModuleList) or len({type(member) for member in module}) != 1:
            continue
        if all(sum(isinstance(m, nn.Linear) or _is_conv1d(m) for m in member.modules()) >= 2 for member in module):
            candidates.append((sum(p.numel() for p in module.parameters()), name, module))
    if not candidates:
        raise UserError(
            f"{type(model).__name__} has no residual stream that feedback methods could use: no list of blocks of one "
            "class with linear layers was found; choose a method that perturbs weights, such as mezo."
        )
    candidates.sort(key=lambda candidate: -candidate[0])
    if len(candidates) > 1 and candidates[1][0] * 4 > candidates[0][0]:
        raise UserError(
            f"{type(model).__name__} has two stacks of blocks, {candidates[0][1]} and {candidates[1][1]}, and feedback "
            "methods follow one residual stream; choose a method that perturbs weights, such as mezo."
        )
    _, path, blocks = candidates[0]
    ancestors, module = [model], model
    for part in path.split(".")[:-1]:
        module = getattr(module, part)
        ancestors.append(module)
    return Residual(path, tuple(blocks), tuple(ancestors))


def check_dropout(path: str, block: nn.Module) -> None:
    """Raises UserError for dropout in train mode within a block that is to run again."""
    for name, module in block.named_modules(prefix=path):
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise UserError(
                f"{name} ({type(module).__name__}) is in train mode, and its block gives a different output when it runs "
                "again: switch dropout off (model.eval())."
            )


def hidden_name(block: nn.Module, kwargs: Mapping[str, Any]) -> str:
    """The keyword of the hidden state in a call of a block without positional arguments.

    Raises UserError if the block's first argument is not among them.
    """
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(inspect.signature(block.forward).parameters), "")
    if name not in kwargs:
        raise UserError(
            f"{type(block).__name__} is called with {', '.join(kwargs) or 'no arguments'}, and feedback cannot tell which is "
            "the hidden state: make it the first argument."
        )
    return name


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a block's output: the output itself or the first member of a tuple."""
    return output[0] if isinstance(output, tuple | list) else output


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """The output of a block with another hidden state."""
    if hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: hidden})
    return type(output)((hidden, *output[1:])) if isinstance(output, tuple | list) else hidden
