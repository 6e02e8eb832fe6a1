"""Facts about the machine: processor, cores, versions. No names of people or hosts, no paths, no addresses."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from llvmlite import binding


@cache
def processor() -> str:
    """The processor's model name if the system reports one, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def instructions() -> dict[str, str]:
    """What the last bits of a result depend on beside the processor's name, which on ARM is its architecture, and in many
    virtual machines the same for all: the vector instructions that torch uses, and LLVM's name of the core.
    """
    return {"vectors": torch.backends.cpu.get_cpu_capability(), "core": binding.get_host_cpu_name()}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def system() -> str:
    return f"{platform.system()} {platform.machine()}"


def gpu() -> str | None:
    """The name of the GPU, or None if there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each package; None for one that is not installed."""
    return {package: _version(package) for package in packages}


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)  # parses the package's whole METADATA
    except PackageNotFoundError:
        return None
