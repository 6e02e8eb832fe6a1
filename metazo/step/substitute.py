"""Temporarily substitute other tensors for parameters, in every call of a torch function that uses one.

While a `Scratch` is active, every call of a torch function that has a trained parameter among its arguments gets a tensor
made for that call, and freed after it: one large tensor of extra memory, or several small ones, and the weights themselves
are never written. It needs no access to modules; linear, embedding, norms, tied weights and plain arithmetic are all calls of
torch functions.

A use that is not a call of a torch function is not replaced: scripted code, and extensions that read the memory. `unmet`
lists the tensors that were never replaced, and `used_unseen` finds out whether they are used. Not found is a second use out
of sight of a tensor that is seen in another, as of an embedding tied to a scripted head: the probe is in the first alone.
torch.compile cannot trace the substitution: it fails, which `of_compiler` tells from a failure of the model, or it compiles
again for each `Scratch` until it gives up.
"""

from __future__ import annotations

import math
import mmap
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from threading import Lock
from typing import Any, Self

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass
from torch.nn.functional import embedding

from metazo.blocks import NamedTensor
from metazo.errors import UserError

# Calls that do not read a tensor's numbers. Properties do not read them either, except for these views.
_TELLING = ("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_contiguous", "data_ptr")
_TELLING += ("is_floating_point", "is_complex", "is_signed", "storage_offset", "requires_grad_", "get_device")
_METADATA = frozenset(getattr(Tensor, name) for name in (*_TELLING, "__hash__", "__len__"))
_VIEWS = frozenset(getattr(Tensor, name).__get__ for name in ("data", "T", "mT", "H", "mH", "real"))

AHEAD = 8 << 20
"""Bytes of substitutes that are made before they are used, at most."""
HUGE = 32 << 20
"""Bytes from which malloc returns freed memory to the system (M_MMAP_THRESHOLD at its largest)."""

# The errors of making a tensor within a transform of torch.func, which has no public way to ask for one.
_IN_TRANSFORM = ("functorch transform", "Tensor that doesn't have storage")


def reads_numbers(func: Any) -> bool:
    """Whether a torch function reads more of its arguments than their shape, dtype and device."""
    return func not in _METADATA and (getattr(func, "__name__", "") != "__get__" or func in _VIEWS)


class _FastPath:
    """Evaluations that are open, in all threads, and whether torch's fast path was on before the first of them."""

    lock = Lock()
    users = 0
    before = True


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Evaluations as if every parameter might be replaced: torch's nn.TransformerEncoder takes another way in eval mode if none
    is, which rounds differently and sets the outputs of padding to 0, so that losses of the two would not be comparable.

    The switch is of the process: of several threads the last restores what the first found.
    """
    with _FastPath.lock:
        if not _FastPath.users:
            _FastPath.before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _FastPath.users += 1
    try:
        yield
    finally:
        with _FastPath.lock:
            _FastPath.users -= 1
            if not _FastPath.users:
                torch.backends.mha.set_fastpath_enabled(_FastPath.before)


class Shown(ABC):
    """While active, every torch function that is given one of the tensors calls `use` instead; no other function is
    slowed down. The tensors' classes are exchanged for ones that have `__torch_function__`, and put back at the end.

    Subclasses give `make`, and may refine `use`.
    """

    def __init__(self, tensors: Iterable[NamedTensor]):
        self.tensors = {id(tensor.param): tensor for tensor in tensors}
        self.met: set[int] = set()
        self.classes: list[type] = []

    @abstractmethod
    def make(self, tensor: NamedTensor) -> Tensor:
        """The substitute for this tensor."""

    def use(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        made: dict[int, Tensor] = {}  # one substitute per call, however often the tensor is an argument
        args, kwargs = self._seen(args, made), self._seen(kwargs, made)
        if made:
            return self.call(made, func, args, kwargs)
        with DisableTorchFunctionSubclass():  # a copy that the closure has made of a tensor, which has its class
            return func(*args, **kwargs)

    def call(self, made: dict[int, Tensor], func: Any, args: Any, kwargs: Any) -> Any:
        """The result of a function, whose arguments contain substitutes, by id of the parameter."""
        return func(*args, **kwargs)

    def __enter__(self) -> Self:
        watched: dict[type, type] = {}
        for tensor in self.tensors.values():
            kind = type(tensor.param)
            self.classes.append(kind)
            if kind not in watched:
                watched[kind] = self._watched(kind)
            tensor.param.__class__ = watched[kind]
        return self

    def __exit__(self, *error: object) -> None:
        watched: Any
        for watched in {type(tensor.param) for tensor in self.tensors.values()}:
            watched.shown = None  # a class lives on until Python searches for cycles, and must not keep the weights
        for tensor, kind in zip(self.tensors.values(), self.classes):
            tensor.param.__class__ = kind
        self.classes.clear()

    def _watched(self, kind: type) -> type:
        return type(kind.__name__, (kind,), {"__torch_function__": classmethod(_show), "shown": self})

    def unmet(self) -> list[NamedTensor]:
        """The tensors that no function was seen to use."""
        return [tensor for key, tensor in self.tensors.items() if key not in self.met]

    def _seen(self, value: Any, made: dict[int, Tensor]) -> Any:
        if isinstance(value, Tensor):
            tensor = self.tensors.get(id(value))
            if tensor is None:
                return value
            if id(value) not in made:
                made[id(value)] = self.make(tensor)
                self.met.add(id(value))
            return made[id(value)]
        if isinstance(value, dict):
            return {key: self._seen(item, made) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._seen(item, made) for item in value))
        if isinstance(value, list | tuple):
            return type(value)(self._seen(item, made) for item in value)
        return value


def _show(cls: Any, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
    """`__torch_function__` of the watched classes."""
    if cls.shown is not None and reads_numbers(func):
        return cls.shown.use(func, args, kwargs or {})
    with DisableTorchFunctionSubclass():
        return func(*args, **(kwargs or {}))


class Scratch(Shown):
    """Args: tensors: the tensors to replace. make: returns substitutes for several, made anew at each call; its second
    argument is the numbers of the rows that are read, or None for all of them. order: the uses of the evaluation before, by
    id of the parameter, replaced by those of this one at the end.

    Small substitutes are made several at a time, in the order of the last evaluation, because to wake the threads for each
    takes as long as to fill it. They take no more memory than the largest tensor, or AHEAD.
    """

    def __init__(
        self,
        tensors: Sequence[NamedTensor],
        make: Callable[[Sequence[NamedTensor], Tensor | None], list[Tensor]],
        order: list[int],
    ):
        super().__init__(tensors)
        self._make, self._rows, self.order = make, None, order
        self._uses: list[int] = []
        self.changed: list[str] = []
        """Names of tensors whose substitute a function has changed in place."""
        self._ahead: dict[int, Tensor] = {}
        self._room = min(max((_bytes(tensor.param) for tensor in tensors), default=0), AHEAD)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.order[:] = self._uses
        self._ahead.clear()

    def make(self, tensor: NamedTensor) -> Tensor:
        # torch.compile would trace the kernels' callers for seconds; to be left alone takes 15 microseconds per call
        return self._apart(tensor) if torch.compiler.is_compiling() else self._next(tensor)

    def _next(self, tensor: NamedTensor) -> Tensor:
        key = id(tensor.param)
        if key not in self._ahead:
            group = [tensor] if self._rows is not None else self._following(tensor)
            self._ahead = dict(zip((id(member.param) for member in group), self._made(group)))
        if self._rows is None:
            self._uses.append(key)
        return self._ahead.pop(key)

    # torch.compiler.disable would import torch's compiler here
    _apart = torch._disable_dynamo(_next)  # pyright: ignore[reportPrivateImportUsage]

    def _following(self, tensor: NamedTensor) -> list[NamedTensor]:
        """The tensor, and those that were used after it in the last evaluation, while there is room for them."""
        group, place, room = [tensor], len(self._uses), self._room - _bytes(tensor.param)
        if self.order[place : place + 1] != [id(tensor.param)]:  # the model takes another way
            return group
        for key in self.order[place + 1 :]:
            following = self.tensors.get(key)  # None in a copy of the optimizer, whose parameters have other ids
            if following is None or any(following is member for member in group):
                break
            room -= _bytes(following.param)
            if room < 0:
                break
            group.append(following)
        return group

    def _made(self, group: Sequence[NamedTensor]) -> list[Tensor]:
        # The substitute requires a gradient as the parameter does, although none is computed: for an input that is not
        # contiguous, matmul would otherwise copy a weight once for each row of the batch. Tensors that are made in
        # inference mode cannot require one.
        with DisableTorchFunctionSubclass(), torch.inference_mode(False), torch.no_grad():
            try:
                made = self._make(group, self._rows)
                return [out.requires_grad_(tensor.param.requires_grad) for tensor, out in zip(group, made)]
            except RuntimeError as error:
                if not any(words in str(error) for words in _IN_TRANSFORM):
                    raise
                raise UserError(
                    f"`precision` compensated replaces {group[0].name} within the forward pass, which torch.func (vmap, grad, "
                    "jvp) in the model does not allow: choose master."
                ) from error

    def use(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._rows = _looked_up(*args, **kwargs) if func is embedding else None
        return super().use(func, args, kwargs)

    def call(self, made: dict[int, Tensor], func: Any, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().call(made, func, args, kwargs)
        versions = {key: substitute._version for key, substitute in made.items()}
        found = super().call(made, func, args, kwargs)
        self.changed += [self.tensors[key].name for key, version in versions.items() if made[key]._version != version]
        return found


class Room:
    """Memory for large substitutes, kept from one to the next as long as no tensor is in it.

    The system clears each page when it is first written, which takes longer than to fill it with noise. Malloc keeps the pages
    of small tensors; those of large ones, which would go back to the system each time, are kept here, in huge pages if Linux
    has them. At most one is kept. Copies of an optimizer begin without it.
    """

    def __init__(self) -> None:
        self.kept: mmap.mmap | None = None
        self.idle = 0  # references to it if no tensor is in it

    def __reduce__(self) -> tuple:
        return Room, ()

    def fresh(self, like: Tensor) -> Tensor:
        """A contiguous tensor of this shape and dtype, not yet written, in memory that no other tensor has."""
        size = _bytes(like)
        if size < HUGE or like.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty_like(like, memory_format=torch.contiguous_format)
        # Each tensor in this memory, and each view of one, holds a reference to it.
        if self.kept is None or len(self.kept) < size or sys.getrefcount(self.kept) > self.idle:
            self.kept = None  # before the next one is made
            with suppress(OSError):  # a kernel without huge pages, or no memory, which torch says below
                self.kept = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                self.idle = sys.getrefcount(self.kept)
                self.kept.madvise(mmap.MADV_HUGEPAGE)
        if self.kept is None:
            return torch.empty_like(like, memory_format=torch.contiguous_format)
        return torch.frombuffer(self.kept, dtype=like.dtype, count=like.numel()).view(like.shape)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()  # torch.compile fails at nbytes if a size is symbolic


def _looked_up(
    input: Tensor, weight: Tensor, padding_idx: Any = None, max_norm: float | None = None, *others: Any, **named: Any
) -> Tensor | None:
    """The rows that torch's `embedding` reads with these arguments; None if it changes the weights as well."""
    return input if max_norm is None else None


def of_compiler(error: Exception) -> bool:
    """Whether torch.compile itself failed, rather than the model that it compiles."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    inner = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return any(name.startswith("torch._dynamo") for name in (inner, type(error).__module__))


def used_unseen(unmet: Sequence[NamedTensor], evaluate: Callable[[], float], loss: float) -> bool:
    """Whether tensors that no torch function was seen to use are used nevertheless: NaN in them changes the loss.

    A loss that differs without them as well is random, and no sign of it.
    """
    if not unmet:
        return False
    kept = [tensor.param.data.clone() for tensor in unmet]
    try:
        for tensor in unmet:
            tensor.param.data.fill_(math.nan)
        without = evaluate()
    finally:
        for tensor, value in zip(unmet, kept):
            tensor.param.data.copy_(value)
    close = partial(math.isclose, loss, rel_tol=1e-3, abs_tol=1e-6)
    return not close(without) and (math.isnan(without) or close(evaluate()))
