"""The gradient estimate, block by block from the top: an error at each block's output, pulled through that block alone.

Within a block everything is exact: the block runs once more from its recorded input with a graph, and the given error goes
back through MLP, norms and attention. Matrices come out as factors (metazo/feedback/factors.py) over the positions that
carry error. After that the graph is freed: memory is that of inference, the blocks' inputs, and one block's graph.

Cost per trained block, in units of its own forward pass: 1 to run it again (0 if graphs are kept), 1 to pull the error, and the
share of the positions that carry error for the gradients of its matrices; about 0.4 for all if error is at the last
position alone (metazo/feedback/column.py). First-order training pays 2 for the backward pass (errors and gradients), 3
with a checkpoint per block: if every position carries error, the cost is the same and only the memory differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from metazo.errors import UserError
from metazo.feedback.column import last_position
from metazo.feedback.factors import Gradient
from metazo.feedback.passes import Call, Captured, Closure, Names, Recorder, Watched
from metazo.feedback.residual import Residual
from metazo.feedback.surrogates import Surrogate


class LocalGradient:
    """Estimates the gradient of a loss from the residual stream.

    Args:
        residual: the stream of the model.
        names: of the trained tensors by the id of the parameter.
        surrogate: which error each block's output is given.
        recompute: run a block again when its turn comes (memory of one block's graph), or keep the graphs of all blocks
            from the lowest trained one (one forward pass less).

    Attributes: untouched: names of the trained tensors that no estimate reached at the last capture: those below the first
        block, such as embeddings.
    Raises UserError if no trained tensor is in a block.
    """

    def __init__(self, residual: Residual, names: Names, surrogate: Surrogate, recompute: bool = True):
        self.residual, self.names, self.surrogate, self.recompute = residual, names, surrogate, recompute
        block_of = residual.block_of()
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
        self.inside = {names[key] for key in names if key in block_of}
        self.untouched: list[str] = []

    def capture(self, closures: Sequence[Closure]) -> Captured:
        """Loss, delta and recorded blocks: one forward pass per closure and a backward pass through the tail."""
        captured = self.recorder.capture(closures)
        reached = self.inside | set(captured.tail.names)
        self.untouched = [name for name in self.names.values() if name not in reached]
        return captured

    def gradients(self, captured: Captured) -> Iterator[tuple[int | None, Gradient]]:
        """(block index, its gradient), from the last block down; first (None, the tail's). Each is to be used and dropped.

        The weights of a block may be changed once it was yielded: nothing below depends on them.
        """
        yield None, captured.tail
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

    def _pull(self, index: int, captured: Captured, errors: Sequence[Tensor]) -> tuple[list[Tensor], Gradient]:
        """The error below a block, and the block's gradient."""
        below, total = [], Gradient()
        for one, error in zip(captured.passes, errors):
            leaf, output, watched = self._graph(index, one.calls.pop(index), error)
            error = error[:, -output.shape[1] :].to(output.dtype)
            (pulled,), gradient = watched.pull([output], [error], [leaf], self.trained[index])
            below.append(pulled)
            total.add(gradient)
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
        return leaf, output, watched

    def _compare(self, index: int, call: Call, output: Tensor | None) -> None:
        """Once, the block that runs again beside its first run.

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
                f"Block {index} of {self.residual.path} gives another output when it runs again: switch dropout off "
                "(model.eval())."
            )
