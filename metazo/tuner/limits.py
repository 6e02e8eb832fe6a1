"""Name and limits of a tuner's file, which may come from a stranger."""

from __future__ import annotations

TUNER = "tuner.safetensors"
"""Name of the file in a folder or repository."""
MAX_BYTES = 64 * 2**20
"""Most bytes of a tuner: 35,000 blocks of the published form."""
MAX_HEADER_BYTES = 4 * 2**20
