"""The cost of several processes: efficiency on this machine, messages and bytes per step, and a model of larger numbers.

    python benchmarks/scale.py --out benchmarks/scale.json [--processes 1,2,4] [--steps 5]

N processes of torch.distributed (gloo, one thread each) take steps on a random Llama with a global batch of `BATCH` sequences:
MeZO, whose examples they divide, and FZOO, whose probes they divide. Recorded is the processor time of a step (the median over
steps, of the process that needs most), because it does not depend on how many cores are free. The exchange is measured by the
clock, alone: the fastest of many, in processes that do nothing else.

The model (`predicted`) of a step that N processes share, with P forward passes of F seconds in a single process:

    T(N) = P F / N + W + X(N),      X(N) = 2 (N - 1) h

W is the time of the passes over the weights, which every process makes, and X that of the exchange: gloo's all-reduce of a
small vector is a ring, whose 2 (N - 1) messages of h seconds follow each other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from metazo.io import processes
from metazo.optimizers import FZOO, MeZO
from metazo.runs.machine import cores, processor, versions

BATCH, LENGTH = 16, 48
SIZES: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2}
GPUS = (1, 8, 64, 256, 1024)
# Assumptions about a cluster: a forward pass of 8 billion weights over a sequence of 512 tokens (2 x 8e9 x 512 operations at
# 40 % of 990e12 per second); the passes of a step over bfloat16 weights with float32 masters, the default, which move 26 bytes
# per weight (docs/speed-gpu.md) at 3 TB/s; the time of a message.
CLUSTER = {
    "forward per sequence": 2 * 8e9 * 512 / (0.4 * 990e12),
    "passes": 26 * 8e9 / 3e12,
    "message": 50e-6,
}


def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4)).eval()


def _fastest(function: Any, calls: int) -> float:
    """The shortest time of a call, in seconds by the clock."""
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def _process(rank: int, count: int, folder: str, steps: int) -> None:
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    found: dict[str, Any] = {"processes": count}
    found["exchange alone"] = _fastest(lambda: processes.total([1.0, 2.0, 0.0]), 2000)
    ids = torch.randint(SIZES["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    for name, method, probe_ranks in (("examples", MeZO, 1), ("probes", FZOO, count)):
        model = _model()
        part = ids if probe_ranks > 1 else ids[rank::count]
        queries = {} if method is MeZO else {"queries": 7}
        optimizer = method(model.named_parameters(), lr=1e-9, check_every=0, probe_ranks=probe_ranks, **queries)
        optimizer.defer = True
        spent = {"forward": 0.0}

        def loss(model: Any = model, part: torch.Tensor = part, spent: dict[str, float] = spent) -> torch.Tensor:
            began = time.process_time()
            value = model(input_ids=part, labels=part).loss
            spent["forward"] += time.process_time() - began
            return value

        for _ in range(2):  # the second compiles the pass that joins an update that waited with the next probe
            optimizer.step(loss)
        times = []
        for _ in range(steps):
            spent["forward"], began = 0.0, time.process_time()
            optimizer.step(loss)
            times.append((time.process_time() - began, spent["forward"]))
        step, forward = (statistics.median(column) for column in zip(*times))
        found[name] = {"step": step, "forward": forward, "probes": len(optimizer.estimator.probes())}
    every = processes.gathered(found)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(every))


def measure(count: int, steps: int) -> dict[str, Any]:
    """The figures of the process that needs most processor time."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, (count, folder, steps), nprocs=count)
        every = json.loads(Path(folder, "found.json").read_text())
    found = every[0]
    for name in ("examples", "probes"):
        found[name] = max((each[name] for each in every), key=lambda figures: figures["step"])
        probes = found[name]["probes"]
        found[name]["bytes per step"] = 8 * (probes + 1) if count > 1 else 0
        found[name]["messages per step"] = 2 * (count - 1)
    return found


def predicted(count: int, probes: int, forward: float, passes: float, message: float) -> dict[str, float]:
    """Seconds of a step that N processes share, and the efficiency, T(1) / (N T(N)). forward: of the whole batch."""
    exchange = 2 * (count - 1) * message
    step = probes * forward / count + passes + exchange
    return {"step": step, "exchange": exchange, "efficiency": (probes * forward + passes) / (count * step)}


def cluster(sequences: int) -> list[dict[str, float]]:
    """The model for an 8-billion-weight model in bfloat16 at a global batch of so many sequences, under `CLUSTER`."""
    forward = sequences * CLUSTER["forward per sequence"]
    return [
        {"gpus": n, **predicted(n, 2, forward, CLUSTER["passes"], CLUSTER["message"])} for n in GPUS if n <= sequences
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    runs = [measure(int(count), options.steps) for count in options.processes.split(",")]
    alone, several = runs[0], [run for run in runs if run["processes"] > 1]
    messages = [run["exchange alone"] / (2 * (run["processes"] - 1)) for run in several]
    for run in runs:
        for name in ("examples", "probes"):
            first, own = alone[name], run[name]
            own["efficiency"] = first["step"] / (run["processes"] * own["step"])
            passes = first["step"] - first["forward"]
            n = run["processes"]
            own["predicted"] = predicted(n, 1, first["forward"], passes, statistics.median(messages))["step"]
    machine = {"cores": cores(), "processor": processor(), **versions(["torch"]), "load": os.getloadavg()[0]}
    found = {"machine": machine, "batch": BATCH, "length": LENGTH, "message seconds": messages, "runs": runs}
    found |= {"assumptions": CLUSTER, "cluster": {str(size): cluster(size) for size in (64, 1024, 8192)}}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
