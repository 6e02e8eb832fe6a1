"""Counts the floating-point operations of matrix products and attention, by torch's formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def _attention(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(above: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return sdpa_backward_flop_count(above.shape, query.shape, key.shape, value.shape)


_FORMULAS = {  # torch has none for its kernel on the CPU
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    **flop_registry,
}


class Operations(TorchDispatchMode):
    """Counts while it is active. torch's own FlopCounterMode follows modules with hooks, which torch.autograd.grad refuses."""

    count = 0

    def ran(self, given: Any, out: Any) -> None:
        """Called after each operation with its arguments and its result; subclasses look at the tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None and func._can_decompose():
            with self:  # under inference mode a product comes as a composite operation
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if formula and not (args and args[0] is None):  # a backward pass that no gradient enters
            self.count += formula(*args, **kwargs, out_val=out)
        self.ran((args, kwargs), out)
        return out


def count_operations(call: Callable[[], Any]) -> int:
    """Operations (multiplications and additions) of the products and the attention that a call computes.

    Element-wise operations, norms and noise are not counted; neither are kernels that are not torch's.
    """
    with Operations() as operations:
        call()
    return operations.count
