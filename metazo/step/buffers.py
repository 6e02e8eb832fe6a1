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


@contextmanager
def buffers_kept(modules: Iterable[nn.Module] | None = None, only: Changed | None = None) -> Iterator[Changed]:
    """Put back the buffers of these modules as they were before; of a module with one that changed, its other attributes too.

    Args: modules: without them, those that run meanwhile, with their parts; only: the buffers that can change, if that is
        known from an earlier call. Yields a list of the buffers that did, which is filled at the end.
    What is changed within an attribute that is no buffer is not seen. Memory: a copy of the buffers that can change, but for
    those of more than LARGE whole numbers.
    """
    seen = set[int]()
    kept: list[tuple[nn.Module, dict[str, Any], dict[str, tuple[Tensor, Tensor]]]] = []
    changed: Changed = []
    wanted = None if only is None else {(id(part), name) for part, name in only}

    def keep(parts: Iterable[nn.Module]) -> None:
        for part in parts:
            if id(part) in seen:
                continue
            seen.add(id(part))
            held = {name: it for name, it in part._buffers.items() if it is not None and _can_change(it)}
            if wanted is not None:
                held = {name: it for name, it in held.items() if (id(part), name) in wanted}
            if held:
                copies = {name: (it, it.detach().clone()) for name, it in held.items()}
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
            differ = [name for name, (buffer, copy) in copies.items() if _put_back(part, name, buffer, copy)]
            changed += [(part, name) for name in differ]
            if differ:  # such as the length for which a table was made
                now = vars(part)
                for name in now.keys() - attributes.keys():
                    del now[name]
                now.update((name, value) for name, value in attributes.items() if now.get(name) is not value)


@torch.no_grad()
def _put_back(part: nn.Module, name: str, buffer: Tensor, copy: Tensor) -> bool:
    """Returns: whether the buffer was another one."""
    exchanged, differs = part._buffers.get(name) is not buffer, not torch.equal(buffer, copy)
    if exchanged:
        part._buffers[name] = buffer
    if differs:
        buffer.data.copy_(copy)  # which is no change for a graph that holds it: it has these numbers again
    return exchanged or differs


def _can_change(buffer: Tensor) -> bool:
    if is_lazy(buffer) or buffer.is_meta or buffer.is_quantized or buffer.is_nested or buffer.layout != torch.strided:
        return False
    return buffer.is_floating_point() or buffer.is_complex() or buffer.numel() <= LARGE
