"""What a forward pass changes in modules, such as the statistics of BatchNorm, through evaluations beside a step's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

LARGE = 4096  # entries; a larger buffer of whole numbers is a table or packed weights, which no pass changes
Changed = list[tuple[nn.Module, str]]
"""Buffers by module and name."""


class _Copy:
    """A buffer of a module and the numbers in it."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.numbers, self.version = buffer, buffer.detach().clone(), _version(buffer)

    @torch.no_grad()
    def put_back(self, part: nn.Module, name: str) -> bool:
        """Returns: whether it was exchanged or written to, also with the numbers that it had."""
        exchanged, differs = part._buffers.get(name) is not self.buffer, not torch.equal(self.buffer, self.numbers)
        written = _version(self.buffer) != self.version
        if exchanged:
            part._buffers[name] = self.buffer
        if differs:
            self.buffer.data.copy_(
                self.numbers
            )  # which is no change for a graph that holds it: it has these numbers again
        return exchanged or differs or written


@contextmanager
def buffers_kept(modules: Iterable[nn.Module] | None = None, only: Changed | None = None) -> Iterator[Changed]:
    """Put back the buffers of these modules as they were before; of a module with one that changed, its other attributes too.

    Args: modules: without them, those that run meanwhile, with their parts; only: the buffers that can change, as an earlier
        call found them. Yields a list of them, which is filled at the end: all of a module one of whose buffers was exchanged
        or written to.
    What is changed within an attribute that is no buffer is not seen. Memory: a copy of the buffers that can change, but for
    those of more than LARGE whole numbers.
    Do not give `only` for modules that write to buffers in some passes alone, such as every tenth: what the earlier call did
    not see changes is not put back.
    """
    seen = set[int]()
    kept: list[tuple[nn.Module, dict[str, Any], dict[str, _Copy]]] = []
    changed: Changed = []
    wanted = None if only is None else {(id(part), name) for part, name in only}

    def keep(parts: Iterable[nn.Module]) -> None:
        for part in parts:
            if id(part) in seen:
                continue
            seen.add(id(part))
            copies = {
                name: _Copy(it)
                for name, it in part._buffers.items()
                if it is not None and _can_change(it) and (wanted is None or (id(part), name) in wanted)
            }
            if copies:
                kept.append((part, dict(vars(part)), copies))

    hook = None
    if modules is None:
        hook = register_module_forward_pre_hook(lambda module, _: keep(() if id(module) in seen else module.modules()))
    elif only != []:
        keep(modules)
    try:
        yield changed
    finally:
        if hook is not None:
            hook.remove()
        for part, attributes, copies in kept:
            if not any([copy.put_back(part, name) for name, copy in copies.items()]):
                continue
            changed += [(part, name) for name in copies]
            now = vars(part)  # such as the length for which a table was made
            for name in now.keys() - attributes.keys():
                del now[name]
            now.update((name, value) for name, value in attributes.items() if now.get(name) is not value)


def _version(buffer: Tensor) -> int:
    """Returns: how often it was written to, which torch does not count if it was made in inference mode."""
    return 0 if buffer.is_inference() else buffer._version


def _can_change(buffer: Tensor) -> bool:
    if is_lazy(buffer) or buffer.is_meta or buffer.is_quantized or buffer.is_nested or buffer.layout != torch.strided:
        return False
    return buffer.is_floating_point() or buffer.is_complex() or buffer.numel() <= LARGE
