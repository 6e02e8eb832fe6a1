"""Memory of the machine and of the process, as Linux and macOS report them."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from metazo.runs import resources


def test_a_system_that_does_not_say_what_is_free_gives_all_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.sysconf

    def sysconf(name: str) -> int:
        if name == "SC_AVPHYS_PAGES":
            raise ValueError("unrecognized configuration name")
        return real(name)

    monkeypatch.setattr(os, "sysconf", sysconf)
    monkeypatch.setattr(
        resources, "Path", lambda *names: Path("/absent", Path(*names).relative_to("/"))
    )  # macOS has no /proc and /sys
    assert resources.free_memory(torch.device("cpu")) == real("SC_PHYS_PAGES") * real("SC_PAGE_SIZE")


V2 = {"memory.max": "16000000", "memory.current": "15900000", "memory.stat": "anon 400000\ninactive_file 15000000\n"}
V1 = {
    "memory.limit_in_bytes": "8000000",
    "memory.usage_in_bytes": "7000000",
    "memory.stat": "inactive_file 5\ntotal_inactive_file 6000000\n",
}


@pytest.mark.parametrize(
    ("folder", "files", "free"),
    [
        ("sys/fs/cgroup", V2, 15_100_000),
        ("sys/fs/cgroup", V2 | {"memory.max": "max"}, None),
        ("sys/fs/cgroup", V2 | {"memory.stat": "anon 400000\n"}, 100_000),
        ("sys/fs/cgroup", {name: text for name, text in V2.items() if name != "memory.stat"}, 100_000),
        ("sys/fs/cgroup", V2 | {"memory.stat": "\nodd line of words\ninactive_file 15000000\n"}, 15_100_000),
        ("sys/fs/cgroup/memory", V1, 7_000_000),
        ("sys/fs/cgroup/memory", V1 | {"memory.limit_in_bytes": "9223372036854771712"}, None),
    ],
)
def test_pages_of_files_are_free_within_the_limit_of_a_container(
    monkeypatch, tmp_path: Path, folder: str, files: dict[str, str], free: int | None
) -> None:
    """Reading a model fills a container's memory with pages that the kernel gives back."""
    (tmp_path / folder).mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / folder / name).write_text(text)
    monkeypatch.setattr(resources, "Path", lambda *names: tmp_path / Path(*names).relative_to("/"))
    found = resources.free_memory(torch.device("cpu"))
    assert found == free if free else found > 2**26  # the machine's


@pytest.mark.skipif(torch.cuda.is_available(), reason="the peak is the GPU allocator's")
@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("linux", 1024)])
@pytest.mark.parametrize("status", [None, "Name:\tpython\nVmRSS:\t100 kB\n"], ids=["absent", "without a peak"])
def test_the_peak_of_getrusage_is_in_the_units_of_the_system(
    monkeypatch, tmp_path: Path, status: str | None, platform: str, unit: int
) -> None:
    if status is not None:
        (tmp_path / "status").write_text(status)
    monkeypatch.setattr(resources, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=500_000))
    assert resources.peak_memory() == 500_000 * unit and not resources.reset_resident()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_peak_is_reset() -> None:
    block = torch.ones(2**24)  # 64 MB
    assert resources.reset_resident()
    high = resources.peak_resident()
    del block
    assert resources.reset_resident() and resources.peak_resident() < high - 2**25
