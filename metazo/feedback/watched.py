"""The linear maps of a graph, whose gradients are computed as factors, and the uses of a weight that no map records."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from metazo.feedback.factors import Gradient
from metazo.feedback.residual import LinearMap

Names = Mapping[int, str]
"""Name of each trained tensor by the id of its parameter."""


class Watched:
    """Records linear maps while a graph is built, so that their gradients can be computed as factors.

    Args: maps: those with trained weights; names: of trained tensors by the id of the parameter.
    Attribute uses: how often the graph uses each parameter, by id, after `pull`.
    """

    def __init__(self, maps: Sequence[LinearMap], names: Names):
        self.names = names
        self.uses = Counter[int]()
        self.calls: list[tuple[str, LinearMap, GradientEdge, Tensor]] = []
        self.handles = [
            # before the hooks of others, which may give another output
            entry.module.register_forward_hook(
                self._hook(entry, names[id(entry.weight)]), prepend=True, with_kwargs=True
            )
            for entry in maps
            if id(entry.weight) in names
        ]

    def _hook(self, entry: LinearMap, name: str):
        def watch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Any) -> None:
            # A router of experts may be a Linear that returns several tensors: its weight gets a whole gradient.
            if torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad:
                # The edge refers to the present output, even if later code changes it in place. If the output is a view of a
                # matrix, that change makes another view of it, and only the matrix stays in the graph.
                base = output._base
                if base is None or base.numel() != output.numel() or base.shape[-1] != output.shape[-1]:
                    base = output
                (entered,) = args or kwargs.values()
                self.calls.append((name, entry, get_gradient_edge(base), entered.detach()))

        return watch

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def pull(
        self, outputs: Sequence[Tensor], errors: Sequence[Tensor | None], leaves: Sequence[Tensor], params: Sequence
    ) -> tuple[list[Tensor], Gradient]:
        """Propagate errors back through the graph.

        Args: outputs and the errors (cotangents) at them; leaves: the tensors whose errors are returned; params: trained
            parameters of this part of the graph. The weights of recorded maps get factors. All others get whole gradients, and
            so does a weight that the graph uses outside its maps, too, or whose gradient a hook changes.

        Returns: the errors at the leaves, zeros for a leaf that is not reached; the gradient.
        """
        self.close()  # the backward pass of a checkpoint runs its maps again
        self.uses, nodes = count_uses(outputs)
        recorded = Counter(id(entry.weight) for _, entry, edge, _ in self.calls if edge.node in nodes)
        del nodes
        whole = {id(p) for p in params if p._backward_hooks or self.uses[id(p)] != recorded[id(p)]}
        self.calls = [call for call in self.calls if id(call[1].weight) not in whole]
        factored = {name for name, *_ in self.calls}
        rest = [p for p in params if self.names[id(p)] not in factored]
        inputs = [*leaves, *(edge for _, _, edge, _ in self.calls), *rest]
        found = deque(torch.autograd.grad(outputs, inputs, errors, allow_unused=True))
        inputs.clear()
        below = [torch.zeros_like(leaf) if (e := found.popleft()) is None else e for leaf in leaves]
        gradient, calls = Gradient(), deque(self.calls)
        self.calls.clear()
        while calls:  # each is dropped before the next: its factors may be copies
            name, entry, _, entered = calls.popleft()
            error = found.popleft()
            if error is not None:
                gradient.add_product(name, *_factors(entry, error, entered))
        for param in rest:
            if (value := found.popleft()) is not None:
                gradient.add_whole(self.names[id(param)], value)
        return below, gradient


def count_uses(outputs: Iterable[Tensor]) -> tuple[Counter[int], set[Node]]:
    """(how often the graph uses each leaf, by id; the nodes of the graph).

    A use is an edge to the leaf, or to what is made of the leaf alone: a transposed weight or a cast one that autocast keeps
    for several maps.
    """
    counts, nodes = Counter[int](), set[Node]()
    alone: dict[Node, int | None] = {}
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if (leaf := _leaf_alone(node, alone)) is not None:
            counts[leaf] += 1
        elif node not in nodes:
            nodes.add(node)
            waiting += [below for below, _ in node.next_functions if below is not None]
    return counts, nodes


def _leaf_alone(node: Node, known: dict[Node, int | None]) -> int | None:
    """The id of the leaf if nothing else enters a node, or None."""
    path = []
    while node not in known:
        path.append(node)
        below = node.next_functions
        if len(below) == 1 and below[0][0] is not None:
            node = below[0][0]
        else:
            leaf = None if below else getattr(node, "variable", None)
            known[node] = None if leaf is None else id(leaf)
    for one in path:
        known[one] = known[node]
    return known[node]


def _factors(entry: LinearMap, error: Tensor, entered: Tensor) -> tuple[Tensor, Tensor]:
    """Factors over the positions whose error is not zero; on the meta device, which knows none of them, over all."""
    error, entered = error.reshape(-1, error.shape[-1]), entered.reshape(-1, entered.shape[-1])
    carrying = error.ne(0).any(1)
    if not error.is_meta and not bool(carrying.all()):
        error, entered = error[carrying], entered[carrying]
    return entry.factors(error, entered)
