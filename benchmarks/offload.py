"""A model that is larger than the memory of its process: MeZO on weights that accelerate keeps on disk.

    python benchmarks/offload.py            # about three minutes and 4.2 GB of disk

A Llama of 1 billion random float32 weights (4.2 GB) takes three steps in a process whose memory is limited to 2 GB by the
system (RLIMIT_DATA: everything but mapped files, program code and shared memory). The peak is the most memory in use that
is not a mapped file (RssAnon), read every 10 ms; freed memory goes back to the system (MALLOC_MMAP_THRESHOLD_). As a
control, the same process without disk offload must fail. Two steps of a smaller model show that the weights are those of a
model in memory, bit for bit. Writes benchmarks/offload.json. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.utils import offload_weight, save_offload_index
from transformers import LlamaConfig, LlamaForCausalLM

from metazo.bench.measurements import now
from metazo.bench.models import SIZES, build
from metazo.integrations import local_parameters
from metazo.optimizers import MeZO
from metazo.runs.machine import cores, processor, versions

LIMIT, SHAPE, STEPS = 2 * 10**9, (1, 32), 3


def on_disk(size: str, folder: Path) -> LlamaForCausalLM:
    """A Llama of random weights that accelerate loads from the folder, made without ever being in memory."""
    with accelerate.init_empty_weights():
        model = LlamaForCausalLM(LlamaConfig(**SIZES[size]))
    index: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = (
            torch.ones(parameter.shape) if parameter.ndim == 1 else torch.randn(parameter.shape, generator=generator)
        )
        offload_weight(values if parameter.ndim == 1 else values.mul_(0.02), name, folder, index)
    save_offload_index(index, folder)
    accelerate.disk_offload(model.eval(), folder, execution_device=torch.device("cpu"))
    return model


def loss_of(model: LlamaForCausalLM) -> Callable[[], torch.Tensor]:
    ids = torch.randint(0, model.config.vocab_size, SHAPE, generator=torch.Generator().manual_seed(1))
    return lambda: model(input_ids=ids, labels=ids).loss


class Peak:
    """The most anonymous memory of this process while it is open, in bytes."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            line = next(
                line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")
            )
            self.bytes = max(self.bytes, int(line.split()[1]) * 1024)


def child(kind: str, size: str) -> dict[str, Any]:
    """Steps of MeZO in this process, limited to LIMIT bytes; kind: disk or memory."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    with Peak() as peak, tempfile.TemporaryDirectory() as folder:
        model = on_disk(size, Path(folder)) if kind == "disk" else build(size)
        weights = sum(parameter.numel() for parameter in model.parameters())
        parameters = local_parameters(model) if kind == "disk" else model.named_parameters()
        optimizer, loss = MeZO(parameters, lr=1e-6, seed=1), loss_of(model)
        losses, seconds = [], []
        for _ in range(STEPS):
            began = time.perf_counter()
            losses.append(optimizer.step(loss))
            seconds.append(round(time.perf_counter() - began, 2))
    return {"weights": weights, "bytes": 4 * weights, "peak": peak.bytes, "losses": losses, "seconds": seconds}


def agrees(size: str) -> bool:
    """Whether two steps on disk leave the bits of two steps in memory."""
    with tempfile.TemporaryDirectory() as folder:
        model = on_disk(size, Path(folder))
        plain = LlamaForCausalLM(LlamaConfig(**SIZES[size])).eval()
        plain.load_state_dict({name: value.detach().clone() for name, value in local_parameters(model)}, strict=False)
        for each, parameters in ((model, local_parameters(model)), (plain, plain.named_parameters())):
            optimizer = MeZO(parameters, lr=1e-6, seed=1)
            for _ in range(2):
                optimizer.step(loss_of(each))
        return all(value.equal(plain.get_parameter(name)) for name, value in local_parameters(model))


def measured(kind: str, size: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, "--child", kind, "--size", size]
    # glibc keeps freed memory below the threshold, which grows to 32 MB by itself: layers that were loaded and freed
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1B", choices=SIZES, help="size of the model (metazo/bench/models.py)")
    parser.add_argument("--child", choices=("disk", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child, given.size)))
        return
    on_disk_run, control = (measured(kind, given.size) for kind in ("disk", "memory"))
    if on_disk_run.returncode:
        sys.exit(f"The run on disk failed: {on_disk_run.stderr[-1000:]}")
    fails = control.returncode != 0 and ("memory" in control.stderr.lower())
    row = json.loads(on_disk_run.stdout.splitlines()[-1])
    machine = {"processor": processor(), "cores": cores(), **versions(("torch", "transformers", "accelerate"))}
    facts = {"date": now(), "limit": LIMIT, "shape": SHAPE, "size": given.size, "environment": machine}
    found = facts | row | {"without offload it fails": fails, "bits of a model in memory": agrees("1M")}
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
