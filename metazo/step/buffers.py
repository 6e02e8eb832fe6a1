"""Buffers of modules, such as the statistics of BatchNorm, through evaluations that are no part of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def buffers_kept() -> Iterator[None]:
    """Put back the buffers of the modules that run meanwhile, and of their parts, as they were before.

    Tensors that are plain attributes of a module are not seen. Memory: a copy of these buffers.
    """
    seen = set[int]()
    kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def keep(module: nn.Module, _: object) -> None:
        for part in module.modules() if id(module) not in seen else ():
            if id(part) not in seen:
                seen.add(id(part))
                held = [(name, buffer) for name, buffer in part._buffers.items() if buffer is not None]
                dense = [(name, it) for name, it in held if it.layout == torch.strided and not it.is_meta]
                kept.extend((part, name, it, it.detach().clone()) for name, it in dense)

    hook = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        hook.remove()
        with torch.no_grad():
            for module, name, buffer, before in kept:
                if module._buffers[name] is not buffer:
                    module._buffers[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.data.copy_(
                        before
                    )  # which is no change for a graph that holds it: it has these numbers again
