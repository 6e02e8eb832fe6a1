"""Saves a Llama of random bfloat16 weights with pico's tokenizer, for runs of the command line at a size without a checkpoint.

    python benchmarks/random_llama.py 7B MODEL          # 13.5 GB of disk; made on the GPU if there is one

docs/speed-gpu.md trains it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from metazo.bench.models import SIZES, build
from metazo.models.load import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    model = build(given.size, "bfloat16", "cuda" if torch.cuda.is_available() else "cpu")
    model.save_pretrained(given.out)
    tokenizer = load_model("pico").tokenizer
    assert tokenizer is not None and len(tokenizer) <= model.config.vocab_size
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()
