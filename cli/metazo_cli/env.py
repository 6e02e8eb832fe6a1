"""metazo env"""

from __future__ import annotations

import os
import platform
from typing import Annotated

import typer
from rich.table import Table

from metazo.io.terminal import Console, print_json

PACKAGES = ("metazo", "torch", "transformers", "datasets", "numba", "numpy", "safetensors", "huggingface_hub", "higher",
            "peft", "triton")  # fmt: skip


def facts() -> dict[str, str]:
    """Facts for a bug report: machine and versions, without names, paths or tokens."""
    import torch

    from metazo.noise import backends
    from metazo.runs.machine import system, versions

    found = {"python": platform.python_version(), "system": system()}
    found["cores"], found["torch threads"] = str(os.cpu_count()), str(torch.get_num_threads())
    turns, policy = os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY", "").lower()
    found["waiting threads"] = f"actively for {turns} turns" if turns else policy or "as OpenMP does"
    found["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found |= {f"noise on {device}": how for device, how in backends().items()}
    if found["noise on cpu"] == "numba":
        from metazo.kernels.vectors import WIDTH

        found["kernels' vectors"] = f"{WIDTH} bits"
    return found | {package: number or "not installed" for package, number in versions(PACKAGES).items()}


def env(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Show machine and versions, for bug reports."""
    found = facts()
    if as_json:
        print_json(found)
        return
    table = Table("", "")
    for name, value in found.items():
        table.add_row(name, value)
    Console().print(table)
