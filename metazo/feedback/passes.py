"""One forward pass that records what feedback needs: delta, the tail's exact gradients, and the inputs of blocks.

The model runs with grad mode off. At the end of the last block the hidden state is replaced by a detached leaf and grad
mode is turned on, so that

    delta = dL/d(output of the last block)

follows from a backward pass through the tail alone: any final norm, pooling, head and loss. The same code therefore works
for pooled encoders, classification heads, and masked and causal language models, with a loss at one position or at all. Calls
of the model that the closure makes under `torch.no_grad()`, as for targets, are not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metazo.errors import UserError
from metazo.feedback.factors import Gradient
from metazo.feedback.residual import Residual, check_dropout, hidden_name, hidden_of, linear_maps, with_hidden
from metazo.feedback.watched import Names, Watched
from metazo.step.autocast import Autocast, present, under

Closure = Callable[[], Tensor | float]


@dataclass
class Call:
    """One call of a block: its hidden input, all arguments, the keyword of the hidden one if it has any, and the autocast; the
    output and the recorded maps if the graph is kept; `seen`, the output's value, if a second run is to be compared with it.
    """

    hidden: Tensor
    args: tuple
    kwargs: dict[str, Any]
    key: str | None
    autocast: Autocast
    output: Tensor | None = None
    watched: Watched | None = None
    seen: Tensor | None = None

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output at another hidden input, under the same autocast."""
        args, kwargs = self.placed(hidden, self.args, dict(self.kwargs))
        with under(self.autocast):
            return hidden_of(block(*args, **kwargs))

    def placed(self, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Arguments with this hidden input."""
        return ((hidden, *args[1:]), kwargs) if self.key is None else (args, kwargs | {self.key: hidden})


@dataclass
class Pass:
    """One run of the stream: calls by block index, the output of the block just run, and delta (B, T, d) at the end."""

    calls: dict[int, Call] = field(default_factory=dict)
    above: Tensor | None = None
    version: int = 0  # changes of `above` in place when the block returned it
    delta: Tensor | None = None


@dataclass
class Captured:
    """loss: the mean over the closures; passes: one per run of the stream; tail: the exact gradient of the tail."""

    loss: float
    passes: list[Pass]
    tail: Gradient


class Recorder:
    """Runs closures and records their passes.

    Args:
        residual: the stream.
        names: of the trained tensors by the id of the parameter.
        lowest: index of the lowest block whose call is recorded.
        recompute: keep the blocks' inputs only (the graph of a block is built again when it is needed: memory of one
            block), or keep the graphs of all recorded blocks (one forward pass less, memory of backpropagation).
    """

    def __init__(self, residual: Residual, names: Names, lowest: int, recompute: bool = True):
        self.residual, self.names, self.lowest, self.recompute = residual, names, lowest, recompute
        inside = residual.block_of()
        blocks = {id(m.module) for index in range(len(residual.blocks)) for m in residual.maps(index)}
        self.maps = [m for m in linear_maps(residual.ancestors[0]) if id(m.module) not in blocks]
        params = {id(p): p for p in residual.ancestors[0].parameters()}
        self.outside = [params[key] for key in names if key in params and key not in inside]
        self.inside = {key: names[key] for key in names if key in inside}
        self.passes: list[Pass] = []
        self.compared: list[bool] | None = None  # train mode of the blocks if the last was compared with its second run
        self.depth = self.begun = 0  # calls of ancestors that are going on; passes begun in the outermost of them
        self.wanted = True  # whether this call is to have a gradient; the closure may have switched it off
        self.unwanted = False  # whether one was not

    def capture(self, closures: Sequence[Closure]) -> Captured:
        """Run the closures; the loss is their mean.

        Raises UserError if the stream does not run, does not run as a chain, or runs twice in one call of the model, if the
        loss does not depend on it or uses a trained weight of a block, and for dropout in blocks that are to run again.
        """
        loss, tail, passes = 0.0, Gradient(), []
        for closure in closures:
            watched = Watched(self.maps, self.names)
            try:
                value = self.run(closure)
                self._check_whole()
                if not isinstance(value, Tensor) or value.ndim or value.grad_fn is None or not self.passes:
                    raise UserError(self._no_graph(value))
                if value.is_complex():
                    raise UserError(
                        "The closure returned a complex loss: return one real number, such as its real part."
                    )
                leaves = [one.above for one in self.passes]
                share = value.new_tensor(1 / len(closures))
                deltas, gradient = watched.pull([value], [share], leaves, self.outside)  # type: ignore[arg-type]
                self._check_tail(watched)
            finally:
                watched.close()
            for one, delta in zip(self.passes, deltas):
                one.above, one.delta = None, delta
            tail.add(gradient)
            passes += self.passes
            loss += float(value.detach()) / len(closures)
        return Captured(loss, passes, tail)

    def run(self, closure: Closure) -> Any:
        """What the closure returns, with the blocks' calls in `passes`; a tensor of one entry has no dimensions then."""
        self.passes, self.depth, self.begun, self.unwanted = [], 0, 0, False
        with torch.enable_grad(), self._hooks():
            value = closure()
            return value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value

    def _no_graph(self, value: Any) -> str:
        if not self.passes and not self.unwanted:
            return f"The closure never ran the blocks at {self.residual.path}: feedback needs the model's own forward pass."
        if isinstance(value, Tensor) and value.numel() != 1:
            return f"The closure returned a tensor of shape {tuple(value.shape)}; return one number, such as its mean."
        return (
            "Feedback needs a loss that can be differentiated after the last block, and the closure returned "
            f"{type(value).__name__} without a graph: return the loss as a tensor, without .item() and without "
            "torch.no_grad() or torch.inference_mode() inside."
        )

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = [m.register_forward_pre_hook(self._enter) for m in self.residual.ancestors]
        handles += [m.register_forward_hook(self._leave) for m in self.residual.ancestors]
        for index in range(self.lowest, len(self.residual.blocks)):
            block = self.residual.blocks[index]
            handles.append(block.register_forward_pre_hook(self._before(index), with_kwargs=True))
            handles.append(block.register_forward_hook(self._after(index)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for call in (call for one in self.passes for call in one.calls.values()):
                if call.watched is not None:
                    call.watched.close()

    def _enter(self, module: nn.Module, args: tuple) -> None:
        if not self.depth:
            self.begun, self.wanted = 0, torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        self.depth += 1

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.depth -= 1

    def begins(self, index: int) -> bool:
        """Whether this call of a block is one of a pass to be recorded, which is begun if the block is the lowest."""
        if index == self.lowest and not self.depth:  # the closure calls the blocks itself
            self.wanted = torch.is_grad_enabled()
        if not self.wanted:
            self.unwanted = True
            return False
        if index == self.lowest and not (self.depth and self.begun):
            self.passes.append(Pass())
            self.begun += 1
        elif not self.passes:
            raise self._left_out(self.lowest)
        elif index == self.lowest or index in self.passes[-1].calls:
            raise UserError(
                f"Block {index} of {self.residual.path} runs more than once in a forward pass, and feedback gives a block "
                "one error: choose a first-order method, or one that perturbs weights, such as mezo."
            )
        return True

    @staticmethod
    def without_caches(index: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        named = {name: _without_cache(value, index) for name, value in kwargs.items()}
        return tuple(_without_cache(value, index) for value in args), named

    def _before(self, index: int):
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            if not self.begins(index):
                return None
            if self.recompute:  # graphs that are kept have the masks of this forward pass
                check_dropout(f"{self.residual.path}.{index}", module)
            key = None if args else hidden_name(module, kwargs)
            hidden = args[0] if key is None else kwargs[key]
            args, kwargs = self.without_caches(index, args, kwargs)
            self.passes[-1].calls[index] = call = Call(hidden.detach(), args, kwargs, key, present())
            self._check_chain(index, call.hidden)
            torch.set_grad_enabled(not self.recompute)
            if self.recompute:
                return args, kwargs
            call.hidden = call.hidden.requires_grad_()
            call.watched = Watched(self.residual.maps(index), self.names)
            return call.placed(call.hidden, args, kwargs)

        return before

    def _after(self, index: int):
        last = index == len(self.residual.blocks) - 1

        def after(module: nn.Module, args: tuple, output: Any) -> Any:
            if not self.wanted:
                return None
            one, hidden = self.passes[-1], hidden_of(output)
            if not isinstance(hidden, Tensor):
                raise UserError(
                    f"Block {index} of {self.residual.path} returns a {type(output).__name__}; feedback needs a tensor, or a "
                    "tuple that begins with it: choose a method that perturbs weights, such as mezo."
                )
            call = one.calls[index]
            if call.watched is not None:
                call.watched.close()
                call.output = hidden
            one.above = hidden = hidden.detach().requires_grad_(last)
            one.version = _version(hidden)
            if last and self.compared != (modes := [block.training for block in self.residual.blocks]):
                self.compared, call.seen = modes, hidden.detach()
            torch.set_grad_enabled(last)
            return with_hidden(output, hidden)

        return after

    def _check_chain(self, index: int, hidden: Tensor) -> None:
        above = self.passes[-1].above
        same = above is not None and _version(above) == self.passes[-1].version and above.shape == hidden.shape
        if index != self.lowest and not (
            same and (above.data_ptr() == hidden.data_ptr() or torch.equal(above, hidden))  # type: ignore[union-attr]
        ):
            raise UserError(
                f"The input of block {index} of {self.residual.path} is not the output of block {index - 1} alone: the model "
                "is not one residual stream; choose a method that perturbs weights, such as mezo."
            )

    def _check_whole(self) -> None:
        for one in self.passes:
            for index in range(self.lowest, len(self.residual.blocks)):
                if index not in one.calls:
                    raise self._left_out(index)

    def _left_out(self, index: int) -> UserError:
        return UserError(
            f"Block {index} of {self.residual.path} did not run in a forward pass, and feedback follows the stream through all "
            "blocks: switch off what leaves blocks out, or choose a first-order method."
        )

    def _check_tail(self, tail: Watched) -> None:
        for key in self.inside.keys() & tail.uses.keys():
            raise UserError(
                f"{self.inside[key]} belongs to a block of {self.residual.path}, and the part after the last block uses it, "
                "too; feedback updates block by block: freeze it, or choose a first-order method."
            )


def _version(tensor: Tensor) -> int:
    """The number of its changes in place; tensors of inference mode have none."""
    return 0 if tensor.is_inference() else tensor._version


def _without_cache(value: Any, index: int) -> Any:
    """None for a cache of keys and values, to which a second run of a block would add twice; any other argument unchanged.

    Raises UserError if the cache holds positions of an earlier call, which would be lost.
    """
    if not (hasattr(value, "get_seq_length") and hasattr(value, "update")):
        return value
    try:
        before = value.get_seq_length(index)
    except ValueError as error:  # transformers' caches of states without positions, as Mamba's
        raise UserError("Feedback runs blocks twice: call the model with `use_cache=False`.") from error
    if before:
        raise UserError("Feedback needs the whole input in one forward pass: call the model without earlier positions.")
    return None
