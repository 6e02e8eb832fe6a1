"""The gradient estimate, block by block from the last: an error at each block's output, propagated through that block alone.

Within a block everything is exact: the block runs once more from its recorded input with a graph, and the given error is
propagated back through MLP, norms and attention. Gradients of matrices are factors (metazo/feedback/factors.py) over the
positions with an error. The graph is then freed: memory is that of inference, the blocks' inputs, and one block's graph.

Cost per trained block, in units of its own forward pass: 1 to run it again (0 if graphs are kept), 1 to propagate the error,
and the share of positions with an error for the gradients of its matrices; about 0.4 in total if only the last position
has an error (metazo/feedback/column.py). First-order training costs 2 for the backward pass (errors and gradients), or 3
with a checkpoint per block: if every position has an error, the cost is the same and only the memory differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from metazo.errors import UserError
from metazo.feedback.column import last_position
from metazo.feedback.factors import Gradient
from metazo.feedback.passes import Call, Captured, Closure, Recorder
from metazo.feedback.residual import Residual
from metazo.feedback.surrogates import Surrogate
from metazo.feedback.watched import Names, Watched
from metazo.step.buffers import Changed, buffers_kept


class LocalGradient:
    """Estimates the gradient of a loss from the residual stream.

    Args:
        residual: the stream of the model.
        names: of the trained tensors by the id of the parameter.
        surrogate: gives the error at each block's output.
        recompute: run a block again when its gradient is computed (memory of one block's graph), or keep the graphs of all
            blocks from the lowest trained one (one forward pass less).

    Raises UserError if no trained tensor is in a block, or one is in two.
    """

    def __init__(self, residual: Residual, names: Names, surrogate: Surrogate, recompute: bool = True):
        self.residual, self.names, self.surrogate, self.recompute = residual, names, surrogate, recompute
        block_of = residual.block_of()
        _check_apart(residual, names)
        self.trained = {
            index: [p for p in block.parameters() if id(p) in names] for index, block in enumerate(residual.blocks)
        }
        inside = [block_of[key] for key in names if key in block_of]
        if not inside:
            raise UserError(
                f"No trained tensor is within the blocks at {residual.path}: feedback has nothing to do; train some of them, "
                "or use a first-order method for the head."
            )
        self.recorder = Recorder(residual, names, min(inside), recompute)
        self.narrow = recompute  # run blocks at the last position alone if error is only there
        self.at_last = False  # whether the block that ran last did so
        # buffers that a run changes, by block and the modes of its modules
        self.changing: dict[tuple[int, ...], Changed] = {}

    def capture(self, closures: Sequence[Closure]) -> Captured:
        """Loss, delta and recorded blocks: one forward pass per closure and a backward pass through the tail."""
        return self.recorder.capture(closures)

    def gradients(self, captured: Captured) -> Iterator[tuple[int | None, Gradient]]:
        """(block index, its gradient): (None, the tail's) first, then from the last block to the first.

        A block's weights may be changed after its gradient was yielded, because no later gradient depends on them. Drop it
        before you ask for the next: then one block's gradient or graph exists at a time.
        """
        tail, captured.tail = captured.tail, Gradient()
        yield None, tail
        del tail
        pulled = [one.delta for one in captured.passes]
        for index in range(len(self.residual.blocks) - 1, self.recorder.lowest - 1, -1):
            errors = [
                self.surrogate.error(index, one.delta, above)  # type: ignore[arg-type]
                for one, above in zip(captured.passes, pulled)
            ]
            if self.trained[index] or self.surrogate.chained:
                pulled, gradient = self._pull(index, captured, errors)
                if self.trained[index]:
                    yield index, gradient
                del gradient  # before the next block's graph

    def _pull(self, index: int, captured: Captured, errors: Sequence[Tensor]) -> tuple[list[Tensor], Gradient]:
        """The error at a block's input, and the block's gradient."""
        below, total = [], Gradient()
        block = self.residual.blocks[index]
        modes = index, *(module.training for module in block.modules())
        for one, error in zip(captured.passes, errors):
            # The statistics of BatchNorm are those of the first run. Which buffers change is known after the first time.
            with buffers_kept(block.modules(), self.changing.get(modes)) as changed:
                leaf, output, watched = self._graph(index, one.calls.pop(index), error)
                error = error[:, -output.shape[1] :].to(output.dtype)
                (pulled,), gradient = watched.pull([output], [error], [leaf], self.trained[index])
            self.changing.setdefault(modes, changed)
            below.append(pulled)
            total.add(gradient)
            del leaf, output, gradient
        total.settle()
        return below, total

    def _graph(self, index: int, call: Call, error: Tensor) -> tuple[Tensor, Tensor, Watched]:
        """Leaf, output and watched maps of a block; the output at the last position alone if error is only there."""
        if call.output is not None:
            assert call.watched is not None
            return call.hidden, call.output, call.watched
        block, watched = self.residual.blocks[index], Watched(self.residual.maps(index), self.names)
        leaf, output = call.hidden.requires_grad_(), None
        try:
            with torch.enable_grad():
                if self.narrow and error.shape[1] > 1 and not bool(error[:, :-1].any()):
                    output = last_position(block, call, leaf)
                    self._compare(index, call, output)
                    if not self.narrow:
                        watched.calls.clear()
                if output is None or not self.narrow:
                    output = call.run(block, leaf)
                    self._compare(index, call, output)
        finally:
            watched.close()
        self.at_last = output.shape[1] < leaf.shape[1]
        return leaf, output, watched

    def _compare(self, index: int, call: Call, output: Tensor | None) -> None:
        """Compare a block's second run with its first, once.

        Raises UserError if it differs; if it differs or stops at the last position alone, it is run whole from then on.
        """
        if output is None:
            self.narrow = False
        if output is None or call.seen is None:
            return
        whole = output.shape == call.seen.shape
        seen = call.seen[:, -output.shape[1] :]
        close = torch.allclose(output.detach(), seen, rtol=1e-2, atol=1e-3 * float(seen.abs().max()), equal_nan=True)
        if not close and not whole:
            self.narrow = False
        elif not close:
            raise UserError(
                f"Block {index} of {self.residual.path} gives a different output when it runs again: switch dropout off "
                "(model.eval())."
            )


def _check_apart(residual: Residual, names: Names) -> None:
    """Raises UserError for a trained tensor of two blocks, which would be changed before its second gradient is computed."""
    seen: dict[int, int] = {}
    for index, block in enumerate(residual.blocks):
        for parameter in block.parameters():
            if seen.setdefault(id(parameter), index) != index and id(parameter) in names:
                raise UserError(
                    f"{names[id(parameter)]} belongs to blocks {seen[id(parameter)]} and {index} of {residual.path}, and "
                    "feedback updates block by block: freeze it, or choose a first-order method, or one that perturbs weights, "
                    "such as mezo."
                )
