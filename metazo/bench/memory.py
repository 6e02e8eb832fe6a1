"""Peak memory above inference, with one process per method.

Every process is forked from a server that has imported what it needs and has used nothing of it. It loads the kernels on a tiny
model, runs forward passes on the real one, notes the peak, takes three steps and notes the peak again. On Linux the peak is the
kernel's high-water mark of resident memory, reset in between; on CUDA it is the allocator's. Elsewhere it is getrusage's, which
cannot be reset.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from metazo.bench.models import Shape, build, lm_loss, weight_bytes
from metazo.bench.steps import METHODS, make
from metazo.io import forked
from metazo.runs.resources import peak_resident, reset_resident

FIRST_ORDER = "AdamW, first-order"
MEASURED = [*METHODS, FIRST_ORDER]


def measure(
    size: str,
    shape: Shape,
    methods: Sequence[str] = MEASURED,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    tick: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Rows of {case, weights, inference, above, fixed}, in bytes; above is at the peak of three steps, fixed is what
    loading the method's kernels, with the library that compiles them, costs once for any model. Raises RuntimeError if a
    child process fails.
    """
    context, rows = forked.context(__name__), []
    for method in methods:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_tell, args=(theirs, method, size, shape, dtype, device), daemon=True)
        forked.start(process)
        theirs.close()
        found = None
        with suppress(EOFError):  # it was killed
            found = ours.recv()
        process.join()
        if not isinstance(found, dict):
            raise RuntimeError(f"the measurement of {method} ended with {process.exitcode}: {found}")
        rows.append(found)
        tick()
    return rows


def _tell(connection: Connection, *measured: Any) -> None:
    """In a process of its own: send the row, or the text of the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, forked.STOPPING)
    try:
        connection.send(child(*measured))
    except Exception:
        connection.send(traceback.format_exc()[-2000:])
        sys.exit(1)


def _make(method: str, model: Any) -> Any:
    if method != FIRST_ORDER:
        return make(method, model)
    from metazo.optimizers import FirstOrderAdamW

    return FirstOrderAdamW(model.named_parameters(), lr=1e-9)


def _reset(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_resident()


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else peak_resident()


def child(method: str, size: str, shape: Shape, dtype: str, device: str) -> dict[str, Any]:
    """The measurement of one method, in a process of its own: peaks of a process only grow."""

    def steps(of: Any, count: int) -> int:
        _reset(device)
        optimizer, loss = _make(method, of), lm_loss(of, shape)
        for _ in range(count):
            optimizer.step(loss)
        return _peak(device)

    def forwards(of: Any) -> int:
        _reset(device)
        loss = lm_loss(of, shape)
        for _ in range(2):
            with torch.inference_mode():
                loss()
        return _peak(device)

    tiny = build("1M", dtype, device)
    fixed = -forwards(tiny) + steps(tiny, 2)
    del tiny
    model = build(size, dtype, device)
    inference = forwards(model)
    above = steps(model, 3) - inference
    row = {"weights": weight_bytes(model), "inference": inference, "above": above, "fixed": fixed}
    return {"case": method, **row}
