"""What noise on a shard costs beside noise on a whole tensor of as many entries.

    python benchmarks/shards.py        # half a minute of one core

A shard has 2^22 entries: rows, or columns that begin at a multiple of 256 or anywhere. Interleaved rounds; writes the ratios,
with their quartiles, to benchmarks/shards.json, and prints them as a table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from metazo.bench.measurements import environment
from metazo.bench.timing import interleaved, ratios, spread
from metazo.blocks import LocalShard, NamedTensor
from metazo.noise import PhiloxNoise

ENTRIES = 1 << 22
SHARDS = {"rows": (0, 4096, 4096), "2048 columns": (2048, 2048, 4096), "512 columns": (512, 512, 2048),
          "1000 columns, unaligned": (1000, 1000, 3000), "128 columns": (128, 128, 512), "64 columns": (64, 64, 256),
          "16 columns": (16, 16, 64)}  # fmt: skip
"""First column, columns of the shard, and columns of the whole tensor, by name."""
KINDS, DTYPES = ("gaussian", "rademacher"), ("float32", "bfloat16")


def case(kind: str, dtype: torch.dtype, first: int, columns: int, width: int) -> dict[str, Callable[[], None]]:
    """A pass of w += a z over the shard, and over a whole tensor of as many entries."""
    stream, rows = PhiloxNoise(0, kind).stream(1), ENTRIES // columns
    places = np.arange(rows), np.arange(first, first + columns)
    shard = LocalShard(torch.zeros(rows, columns, dtype=dtype), True, places, torch.Size((2 * rows, width)))  # type: ignore[call-arg]
    whole = torch.nn.Parameter(torch.zeros(rows, columns, dtype=dtype))
    found = {"shard": NamedTensor("w", shard, 1), "whole": NamedTensor("w", whole, 1)}
    return {name: lambda t=tensor: stream.add_(t, t.param.data, 1e-9) for name, tensor in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/shards.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"| shard | {' | '.join(f'{kind}, {dtype}' for kind in KINDS for dtype in DTYPES)} |\n|---|---|---|---|---|")
    for name, sizes in SHARDS.items():
        cells = []
        for kind in KINDS:
            for dtype in DTYPES:
                samples = interleaved(case(kind, getattr(torch, dtype), *sizes), given.rounds, seconds=0.5)
                ratio = spread(ratios(samples, "shard", "whole"))
                rows.append({"shard": name, "noise": kind, "dtype": dtype, "ratio": ratio})
                cells.append(f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    text = json.dumps({"environment": environment("cpu", "float32 and bfloat16", False), "rows": rows})
    given.out.write_text(text.replace('{"shard"', '\n{"shard"') + "\n")


if __name__ == "__main__":
    main()
