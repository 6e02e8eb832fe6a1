"""The machine's resources that a run needs: peak memory and disk space."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import torch

from metazo.errors import UserError
from metazo.io.allocator import give_back
from metazo.io.processes import launched


def refuse_ranks(what: str) -> None:
    """Raises UserError if torchrun started several processes: each would write the whole run into the same folder."""
    if launched() > 1:
        raise UserError(
            f"metazo {what} runs in one process, and torchrun started {launched()}; start it without torchrun, or with "
            "--nproc-per-node 1 (metazo finetune and the optimizers themselves run on several)."
        )


class NoSpace(UserError):
    """Less space on a disk than what is to be written needs."""


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raises NoSpace if the disk of `folder` has less than `needed` bytes free."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise NoSpace(
            f"{what} needs {size(needed)} on the disk of {folder} and {size(free)} are free; choose another place."
        )


def used(*folders: Path) -> int:
    """Size of the files in these folders, in bytes; one folder may be in another, or missing."""
    files = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    return sum(path.stat().st_size for path in files)


_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Control groups, version 2 and 1: folder, files of the limit and of what is used, and the line of memory.stat that counts
pages of files among it, which the kernel gives back when memory is needed."""


def free_memory(device: torch.device) -> int:
    """Free bytes of the GPU, or of the machine within the limit of its control group, if there is one; all of the machine's
    memory if the system does not say what is free (macOS).
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES")
    except (OSError, ValueError):  # macOS has no such name
        pages = os.sysconf("SC_PHYS_PAGES")
    free = [pages * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = [next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))]
    for folder, most, taken, cache in _GROUPS:
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            limit, used = (int(Path(folder, name).read_text(encoding="utf-8")) for name in (most, taken))
            free.append(max(0, limit - used + _cached(Path(folder, "memory.stat"), cache)))
    return min(free)


def _cached(stat: Path, name: str) -> int:
    """Bytes of the line of this name in memory.stat; 0 if there is none."""
    with suppress(OSError, ValueError):
        for line in stat.read_text(encoding="utf-8").splitlines():
            if line.split()[:1] == [name]:
                return int(line.split()[1])
    return 0


def size(count: float) -> str:
    """A number of bytes as text, such as "1.5 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def peak_memory() -> int:
    """Peak memory in bytes: the process's largest resident set, or the GPU allocator's peak if a GPU is in use."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return peak_resident()


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_resident() -> int:
    """The process's largest resident set in bytes, since the last `reset_resident` that returned true."""
    with suppress(OSError, StopIteration):  # not all systems with such a file have the line
        return _read("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_resident() -> bool:
    """Reset the recorded peak of resident memory (proc(5), clear_refs), and return whether the system can: only Linux does.

    glibc returns freed memory to the system, because later allocations from it would not be counted.
    """
    give_back()
    with suppress(OSError, StopIteration):
        return bool(_read("VmHWM") and _CLEAR.write_text("5", encoding="utf-8"))
    return False


def _read(name: str) -> int:
    line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


class PeakMemory:
    """Peak memory of this process above its memory when this object was made; on a GPU the peak of torch's allocator.

    On Linux the recorded peak is reset; on other systems only a new maximum is counted.
    """

    def __init__(self):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.before = _read("VmRSS") if reset_resident() else peak_resident()

    def bytes(self) -> int:
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            return torch.cuda.max_memory_allocated()
        return max(0, peak_resident() - self.before)
