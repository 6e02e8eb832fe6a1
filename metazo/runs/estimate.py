"""Memory, operations and time of a step before it is run: on torch's meta device, where tensors have shapes but no numbers.

    inference   weights + buffers + most bytes of activations in a forward pass over the batch
    peak        weights + buffers + state of the method and of its precision policy
                + the same activations + a copy of the largest tensor, if weights are compensated
    seconds     batches * forwards * max(operations / rate, bytes of weights / bandwidth) + weights * passes / rate of noise

Activations are counted by following each tensor that an operation makes until it is freed, and those of probes that are
evaluated together in their one pass. Steps of methods that are not replayed (first-order, feedback) are run whole in this
way, with their gradients, and twice, because moments that the first step makes at its end lie beside the activations of the
second. The rates are measured on the device in a fraction of a second: a product of matrices of the model's width, and noise
added to weights. Left out: element-wise operations in the time, and in the memory kernels' own workspace, fragmentation of
the allocator, chunks of noise (a few MB), and what python and the libraries take (about 0.5 GB on a CPU).
tests/runs/test_estimate.py compares memory with what a step takes.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx

from metazo.blocks import NamedTensor, tensor_id
from metazo.kernels.operations import Operations
from metazo.models.quantize import bytes_of
from metazo.noise import Move, PhiloxNoise
from metazo.optimizers.probing import first_pass
from metazo.optimizers.structured import Structured
from metazo.step.batched import TooLarge
from metazo.step.precision import policy

SAMPLE = 2**21
"""Weights to which noise is added for a measurement."""
PATIENCE = 0.1
"""Seconds that a measured product may take, about."""


class Followed(Operations):
    """Counts the bytes of the tensors that operations make, until each is freed, and the operations of products.

    A number that is read from a tensor on the meta device is 0: transformers asks whether a mask is all ones, and the answer
    no gives the mask of a padded batch. Tensors that are compared are close. Attention by sdpa keeps no matrix of scores, as
    torch's fused kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype).item()
        if func is torch.ops.aten.allclose.default and args[0].is_meta:
            return True
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            query, key, value = args[:3]
            self.count += (
                2 * query.numel() * key.shape[-2] + 2 * query[..., 0].numel() * key.shape[-2] * value.shape[-1]
            )
            out = query.new_empty((*query.shape[:-1], value.shape[-1]))
            self.ran((args, kwargs), out)
            return out
        return super().__torch_dispatch__(func, types, args, kwargs)

    def ran(self, given: Any, out: Any) -> None:
        """Follow the results that have memory of their own; the others are views, or made in place."""
        there = {tensor.untyped_storage()._cdata for tensor in _tensors(given)}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in there and key not in self.known:
                self.held += size
                self.most = max(self.most, self.held)
                self.known[key] = weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.held -= size
        self.known.pop(key, None)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return _tensors(list(value.values()))
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


@dataclass(frozen=True)
class Estimate:
    """weights, state, inference, peak: bytes (peak includes the weights). forward_operations: of a forward pass over the
    batch. step_operations: of a step. notes: what could not be estimated, one sentence each.
    """

    weights: int
    state: int
    inference: int
    peak: int
    forward_operations: int
    step_operations: int
    notes: tuple[str, ...] = ()


def weight_bytes(model: nn.Module) -> int:
    return sum(map(bytes_of, [*model.parameters(), *model.buffers()]))


def state_bytes(optimizer: Any) -> int:
    """Bytes of the state of a method and its precision policy, moments that are made at the first step included."""
    held = sum(map(_bytes, optimizer.tensors_state().values()))
    return held + optimizer.moments * sum(map(_bytes, _trained(optimizer)))


def scratch_bytes(optimizer: Any) -> int:
    """Bytes of the largest copy that a probe makes: one compensated tensor."""
    precision = getattr(optimizer, "precision", "in-place")
    copied = [p for p in _trained(optimizer) if policy(precision, p.dtype).startswith("compensated")]
    return max(map(_bytes, copied), default=0)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def look_ahead(optimizer: Any, loss: Callable[[], Any], at_last: bool) -> None:
    """Measure what a run measures before its first step. at_last: whether the loss reads the last position of its inputs
    alone, which the numbers would tell.
    """
    if isinstance(optimizer, Structured):
        optimizer.tensors_state()
        optimizer.local.narrow &= at_last
    with suppress(Exception), _numberless():  # what cannot be followed is in the notes of `estimate`
        optimizer.measure_cost(loss)


@contextmanager
def _numberless() -> Iterator[Followed]:
    """Operations that depend on numbers take a mask to be true everywhere."""
    with Followed() as followed, fx.patch(meta_nonzero_assume_all_nonzero=True):  # type: ignore[attr-defined]
        yield followed


def estimate(model: nn.Module, optimizer: Any, loss: Callable[[], Any], accumulate: int = 1) -> Estimate:
    """The memory of a step of `accumulate` micro-batches, and the operations for one of them; model, optimizer and the batch
    of the loss are on the meta device.
    """
    weights, state = weight_bytes(model), state_bytes(optimizer)
    with torch.inference_mode(), Followed() as forward:
        loss()
    inference, notes = weights + forward.most, []
    if optimizer.replayable:
        operations = round(forward.count * optimizer.forwards_per_step())
        peak = inference + state + scratch_bytes(optimizer)
        if "probing" in getattr(optimizer, "zo_state", {}):
            peak = max(peak, weights + state + _together(optimizer, loss, notes))
    else:
        try:
            optimizer.checks_weights = False
            held = state - optimizer.moments * sum(map(_bytes, _trained(optimizer)))  # moments are made within the step
            with _numberless() as step:
                for _ in range(2):
                    optimizer.step([loss] * accumulate)
            operations, peak = step.count // (2 * accumulate), weights + held + step.most
        except Exception as error:
            notes.append(_unknown("a step", error))
            operations, peak = round(forward.count * optimizer.forwards_per_step()), inference + state
    return Estimate(weights, state, inference, max(peak, inference), forward.count, operations, tuple(notes))


def _together(optimizer: Any, loss: Callable[[], Any], notes: list[str]) -> int:
    """Most bytes of the pass in which probes are evaluated together; 0 if they are evaluated in turn."""
    try:
        with _numberless() as step:
            first_pass(optimizer, loss)
    except Exception as error:
        if optimizer.probing == "together" and not isinstance(error, TooLarge):
            notes.append(_unknown("probes that are evaluated together", error))
        return 0
    return step.most


def _unknown(what: str, error: Exception) -> str:
    reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
    return f"the memory of {what} beside inference is not known: it cannot be followed without weights ({reason})"


def _trained(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


# -- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """What a device does per second: operations of matrix products, bytes read, and weights that get noise added."""

    operations: float
    bytes: float
    noise: float


def affordable(rows: int, width: int, seconds: float) -> tuple[int, int]:
    """The sizes of a product that takes PATIENCE, in the same proportions, if one of these sizes takes `seconds`."""
    if seconds <= PATIENCE:
        return rows, width
    factor = (PATIENCE / seconds) ** (1 / 3)
    return max(64, int(rows * factor)), max(64, int(width * factor))


def measure_rates(device: torch.device, dtype: torch.dtype, width: int, rows: int) -> Rates:
    """Rates of a device, measured: products (rows, width) x (width, width), reading a vector, noise added to float32.

    The products are smaller if these would take long: a processor without instructions for a 16-bit type takes a hundred times
    longer than for float32.
    """
    rows, width = max(1, min(rows, 2048)), max(64, min(width, 4096))
    if device.type == "cpu":
        small = torch.zeros((64, 64), dtype=dtype)
        seconds = _seconds(lambda: small @ small, device) * rows * width * width / 64**3
        rows, width = affordable(rows, width, seconds)
    left, right = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((rows, width), (width, width)))
    size = 32 * SAMPLE if device.type == "cuda" else SAMPLE  # on a GPU, so that a launch is a small part of the time
    vector = torch.zeros(4 * SAMPLE if device.type == "cpu" else size, device=device)
    sample = torch.nn.Parameter(torch.zeros(size, device=device))
    moves = [Move(NamedTensor("sample", sample, tensor_id("sample")), sample.data, 1e-3)]
    stream = PhiloxNoise(0).stream(1)
    product = _seconds(lambda: left @ right, device)
    read = _seconds(lambda: vector.sum(), device)
    noise = _seconds(lambda: stream.add_all_(moves), device)
    return Rates(2 * rows * width * width / product, vector.numel() * 4 / read, size / noise)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The shortest of several calls, after one that is not counted."""
    best = float("inf")
    with torch.no_grad():
        for count in range(4):
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if count:
                best = min(best, time.perf_counter() - started)
    return best


def step_seconds(found: Estimate, optimizer: Any, rates: Rates, accumulate: int = 1) -> float:
    """The estimated time of a step of `accumulate` micro-batches. A method that is not replayed makes one pass over the weights
    for its update, without noise; the others one pass per probe, which all micro-batches share, and one for the update."""
    trained = sum(p.numel() for p in _trained(optimizer))
    forwards = optimizer.forwards_per_step()
    computing = found.step_operations / rates.operations
    reading = forwards * found.weights / rates.bytes
    passing = accumulate * max(computing, reading)
    if not optimizer.replayable:
        return passing + 3 * found.weights / rates.bytes
    return passing + (forwards + 1) * trained / rates.noise
