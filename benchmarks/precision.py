"""Measures the exactness and cost of each precision policy. Writes benchmarks/precision.json.

    python benchmarks/precision.py               # everything: about 10 minutes on two cores
    python benchmarks/precision.py exactness     # only one part anew (exactness, cost or resident); the others are kept
    python benchmarks/precision.py table         # the table again from the JSON

Exactness, on a layer of 262,144 weights of standard deviation 0.02 at eps 1e-3, 1,000 steps each: *drift* at learning rate
0, the rms of the change over the rms of the weights; and the *cosine* between the applied and the exact update at
lr c = 1e-6, of theta as the policy keeps it, and of the weights that the model sees. Cost, on a Llama of 134 M random
weights at batch 1, length 32: bytes per weight in addition to the weights, kept and at the peak of a step, and the time of
a step over that of two forward passes of the same closure in the same type. The published loop is measured as well.
Resident, on a Llama of 369 M random weights at batch 1, length 32: most resident memory of a process during steps, weights
included, per weight of the model, above its memory after all imports and steps of a tiny model. Of adapters, the base model
is bfloat16 and LoRA of rank 8 on the attention's q and v is float32. One process per row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metazo.bench.models import build, lm_loss
from metazo.bench.published import PublishedLoop
from metazo.bench.timing import interleaved, ratios, spread
from metazo.models.adapters import add_adapters
from metazo.models.load import LoadedModel
from metazo.models.wanted import Adapter
from metazo.noise import PhiloxNoise
from metazo.optimizers import MeZO
from metazo.runs.cost import most_bytes
from metazo.runs.resources import PeakMemory

RESULT = Path(__file__).with_suffix(".json")
PUBLISHED = "published loop"
ARMS = [
    ("float32", PUBLISHED), ("float32", "in-place"), ("float32", "autocast"),
    *((dtype, precision) for dtype in ("bfloat16", "float16")
      for precision in (PUBLISHED, "master", "compensated-16", "compensated-8")),
]  # fmt: skip
SIDE, DEVIATION, EPS, MOVE = 512, 0.02, 1e-3, 1e-6  # MOVE: lr * c
SIZE, SHAPE, ROUNDS = "134M", (1, 32), 5
LORA = "LoRA"
RESIDENT = [("float32", "in-place"), *(("bfloat16", p) for p in ("master", "compensated-16", "compensated-8", LORA))]
RESIDENT_SIZE = "369M"


def layer(dtype: str) -> nn.Linear:
    weights = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * DEVIATION
    model = nn.Linear(SIDE, SIDE, bias=False, dtype=getattr(torch, dtype))
    model.weight.data.copy_(weights)
    return model


def losses(model: nn.Linear) -> Callable[[], Tensor]:
    """A closure that uses the weights, and returns losses that make c = 1."""
    values: Iterator[float] = itertools.cycle((EPS, -EPS))
    x = torch.ones(1, SIDE, dtype=model.weight.dtype)
    return lambda: next(values) + 0 * model(x).sum().float()


def make(precision: str, named: Any, lr: float) -> MeZO | PublishedLoop:
    if precision == PUBLISHED:
        return PublishedLoop(named, lr, EPS)
    return MeZO(named, lr, EPS, precision=precision, check_loss=False)


def theta(optimizer: MeZO | PublishedLoop, model: nn.Linear) -> Tensor:
    """As the policy keeps it, float64."""
    if isinstance(optimizer, PublishedLoop):
        return model.weight.data.double().flatten()
    optimizer._prepare()
    chunks = [chunk.double().flatten() for _, chunk in optimizer.weights.read(optimizer.tensors[0])]
    return torch.cat(chunks)


def wanted(precision: str, optimizer: MeZO | PublishedLoop, model: nn.Linear, steps: int) -> Tensor:
    """- MOVE * sum of the steps' noise, float64."""
    total = torch.zeros(SIDE * SIDE, dtype=torch.float64)
    seeds = PublishedLoop([], 0.0).seeds
    for step in range(steps):
        if isinstance(optimizer, PublishedLoop):
            torch.manual_seed(int(seeds.randint(1_000_000_000)))
            z = torch.normal(0.0, 1.0, size=model.weight.shape, dtype=model.weight.dtype)
        else:
            noise: Any = PhiloxNoise(0)
            z = noise.stream(noise.seed(step)).draw(optimizer.tensors[0])
        total -= MOVE * z.double().flatten()
    return total


def exactness(dtype: str, precision: str, steps: int = 1000) -> dict[str, float]:
    """drift, cosine and weights_cosine: see above."""
    still, moving = layer(dtype), layer(dtype)
    before = still.weight.data.double()
    optimizer, closure = make(precision, still.named_parameters(), 0.0), losses(still)
    for _ in range(steps):
        optimizer.step(closure)
    change = still.weight.data.double() - before
    optimizer, closure = make(precision, moving.named_parameters(), MOVE), losses(moving)
    start, seen = theta(optimizer, moving), moving.weight.data.double().flatten()
    for _ in range(steps):
        optimizer.step(closure)
    target = wanted(precision, optimizer, moving, steps)
    applied, visible = theta(optimizer, moving) - start, moving.weight.data.double().flatten() - seen
    return {
        "drift": float(f"{float(change.norm() / before.norm()):.3g}"),
        "cosine": round(_cosine(applied, target), 5),
        "weights_cosine": round(_cosine(visible, target), 5),
    }


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


def memory(optimizer: MeZO | PublishedLoop, closure: Callable[[], Tensor], weights: int) -> dict[str, float]:
    """Bytes per weight that are kept, and that a step allocates beyond those of a forward pass."""
    kept = [] if isinstance(optimizer, PublishedLoop) else optimizer.tensors_state().values()
    with torch.inference_mode():
        forward = _peak(closure)
    step = _peak(lambda: optimizer.step(closure))
    state = sum(tensor.numel() * tensor.element_size() for tensor in kept) / weights
    return {"kept": round(state, 2), "temporary": round(max(step - forward, 0) / weights, 3)}


def _peak(run: Callable[[], object]) -> int:
    run()
    return most_bytes(run)


def cost(dtype: str, precision: str, size: str = SIZE, rounds: int = ROUNDS) -> dict[str, Any]:
    """Memory, and the time of a step over that of two forwards, round by round."""
    model = build(size, dtype)
    closure, weights = lm_loss(model, SHAPE), sum(parameter.numel() for parameter in model.parameters())

    def forwards() -> None:
        with torch.inference_mode():
            closure()
            closure()

    optimizer = make(precision, model.named_parameters(), 0.0)
    cases: dict[str, Callable[[], object]] = {"two": forwards, "step": lambda: optimizer.step(closure)}
    ratio = spread(ratios(interleaved(cases, rounds), "step", "two"))
    return memory(optimizer, closure, weights) | {"ratio": ratio}


def resident(dtype: str, precision: str, size: str = RESIDENT_SIZE) -> float:
    """Bytes per weight, measured in a process of its own."""
    command = [sys.executable, __file__, "child", dtype, precision, size]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def child(dtype: str, precision: str, size: str) -> float:
    """The measurement of `resident`, in its process."""

    def steps(model: Any) -> None:
        model.train(False)
        if precision == LORA:
            loaded = LoadedModel(model, None, "causal", "random", model.dtype, 2048)  # type: ignore[arg-type]
            add_adapters(loaded, Adapter("lora"), seed=0)
        optimizer = MeZO(model.named_parameters(), 1e-6, precision="auto" if precision == LORA else precision)
        PeakMemory()  # the peak of building the model does not count
        for _ in range(2):
            optimizer.step(lm_loss(model, SHAPE))

    steps(build("1M", dtype))
    memory = PeakMemory()
    model = build(size, dtype)
    weights = sum(parameter.numel() for parameter in model.parameters())
    steps(model)
    return round(memory.bytes() / weights, 2)


def resident_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| weights | policy | resident, bytes per weight |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {row['dtype']} | {row['precision']} | {row['bytes']:.2f} |" for row in rows)])


def table(result: dict[str, Any]) -> str:
    lines = [
        "| weights | policy | drift | cosine | cosine of the weights | kept, bytes | temporary, bytes | step / 2 forwards |",
        "|---" * 8 + "|",
    ]
    for row in result["rows"]:
        spent = row.get("cost", {})
        ratio = f"{spent['ratio']['median']:.2f}" if spent else ""
        lines.append(
            f"| {row['dtype']} | {row['precision']} | {row['drift']:.2g} | {row['cosine']:.4f} | "
            f"{row['weights_cosine']:.4f} | {spent.get('kept', '')} | {spent.get('temporary', '')} | {ratio} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "part", nargs="?", choices=("all", "exactness", "cost", "resident", "table", "child"), default="all"
    )
    parser.add_argument("of_child", nargs="*", help="dtype, policy and size, for a process of resident")
    options = parser.parse_args()
    part = options.part
    if part == "child":
        print(child(*options.of_child))
        return
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    known = before.get("rows") or [{} for _ in ARMS]
    rows = []
    for (dtype, precision), row in zip(ARMS, known, strict=True):
        found: dict[str, Any] = {}
        if part in ("all", "exactness"):
            found |= exactness(dtype, precision)
        if part in ("all", "cost"):
            found["cost"] = cost(dtype, precision)
        rows.append(row | {"dtype": dtype, "precision": precision} | found)
        print(rows[-1], flush=True)
    kept = before.get("resident", [])
    if part in ("all", "resident"):
        kept = [{"dtype": d, "precision": p, "bytes": resident(d, p)} for d, p in RESIDENT]
    if part != "table":
        RESULT.write_text(json.dumps({"torch": torch.__version__, "rows": rows, "resident": kept}, indent=1) + "\n")
    print(table({"rows": rows}))
    print(resident_table(kept))


if __name__ == "__main__":
    main()
