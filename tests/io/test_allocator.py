"""Memory that was freed goes back to the system."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from metazo.io.allocator import give_back

SIZE = 4 << 20  # bytes of a block
COUNT = 32


def held() -> int:
    """Bytes of anonymous memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_blocks_between_others_that_are_kept_go_back():
    torch.ones(2 * SIZE, dtype=torch.uint8)  # its end raises the size up to which glibc takes blocks from its heap
    blocks = [torch.ones(SIZE, dtype=torch.uint8) for _ in range(2 * COUNT)]
    kept = blocks[1::2]
    del blocks
    before = held()
    give_back()
    assert before - held() > 0.8 * SIZE * COUNT and len(kept) == COUNT
