"""Whether the loss depends on lower blocks by another way than the residual stream, whose part of the gradient is left out.

Such ways are hidden states of lower blocks in the loss (deep supervision, means of layers), keys and values or biases of a
lower block that a later one uses, and a router's own loss. The closures run once more. Every block but the last gets the
recorded input of the block after it, and what else these blocks return is rolled by one along its features. The last block gets
its own recorded input. If the stream is the only way, the loss is the same.

Where not to use: to prove that there is no other way. Two are not found: one into a block in the middle that does not reach the
last block, and one through a Python object that depends on weights alone. A loss that reads the lowest block's input (of the
trained blocks) counts as another way, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metazo.feedback.passes import Call, Captured, Closure, Recorder
from metazo.feedback.residual import hidden_of, with_hidden

_ROUNDING = 1e-5  # relative; sums on a GPU may differ by less


def bypassed(recorder: Recorder, closures: Sequence[Closure], captured: Captured) -> bool:
    """Whether the loss changes with lower blocks while the last block's input does not.

    Args: captured: what the recorder made of these closures. Cost: one forward pass, whose draws of random numbers are those of
    the first.
    """
    return not math.isclose(_Rolled(recorder, captured).loss(closures), captured.loss, rel_tol=_ROUNDING)


class _Rolled(Recorder):
    """Runs closures as a recorder does, with other inputs for the blocks."""

    def __init__(self, recorder: Recorder, captured: Captured):
        super().__init__(recorder.residual, recorder.names, recorder.lowest)
        self.recorded, self.before_now = captured.passes, 0

    def loss(self, closures: Sequence[Closure]) -> float:
        found = 0.0
        for closure in closures:
            found += float(self.run(closure).detach()) / len(closures)
            self.before_now += len(self.passes)
        return found

    def _calls(self) -> dict[int, Call]:
        """The recorded calls of the forward pass that goes on."""
        return self.recorded[self.before_now + len(self.passes) - 1].calls

    def _before(self, index: int):
        last = index == len(self.residual.blocks) - 1

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            if not self.begins(index):
                return None
            call = self.passes[-1].calls[index] = self._calls()[index]
            torch.set_grad_enabled(False)
            args, kwargs = self.without_caches(index, args, kwargs)
            return call.placed(self._calls()[index if last else index + 1].hidden.detach(), args, kwargs)

        return before

    def _after(self, index: int):
        last = index == len(self.residual.blocks) - 1

        def after(module: nn.Module, args: tuple, output: Any) -> Any:
            if not self.wanted:
                return None
            torch.set_grad_enabled(last)
            if last:
                return with_hidden(output, hidden_of(output).detach().requires_grad_())
            # what the next block gets in any case, so that the output need not be kept
            hidden = self._calls()[index + 1].hidden.detach()
            return with_hidden(_rolled(output) if isinstance(output, tuple | list) else output, hidden)

        return after


def _rolled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.roll(1, -1) if value.is_floating_point() and value.ndim else value
    return type(value)(map(_rolled, value)) if type(value) in (tuple, list) else value
