"""Meta-train a tuner, publish it in a zoo, and fine-tune with it by its name there.

python examples/meta_train_and_publish.py FOLDER          # needs metazo[llm] and metazo[report]

Ten meta-steps show how the parts fit together. The published tuner pico/v2 took 200; docs/meta-learning.md
says what tuners were worth.
"""

from __future__ import annotations

import sys
from pathlib import Path

import metazo
from metazo import zoo

out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example")

# 1. Train the tuner on one task, along the path that first-order training of the model takes.
settings = metazo.MetaConfig("pico", ["pico_topic"], out / "meta", steps=10, train_examples=100, bound=0.5)
metazo.meta_train(settings)

# 2. Publish it: a folder here; `hub:org/name` is the Hub. `zoo.signer` makes signatures.
name = zoo.push(out / "meta" / "tuner.safetensors", out / "zoo", base="pico")
print(f"published {name} in {out / 'zoo'}")

# 3. Fine-tune the same model on another task. The tuner is found by its name, and its hash is checked.
tuned = metazo.finetune(
    "pico", "pico_sentiment", "zo-finetuner", tuner=name, zoo=out / "zoo", lr=1.5e-4, steps=50,
    train_examples=100, dev_examples=50, test_examples=50, eval_every=50,
)  # fmt: skip
before, after = tuned.summary["before"]["loss"], tuned.summary["dev"]["loss"]
print(f"loss on dev: {before:.3f} before, {after:.3f} after {tuned.summary['forwards']} forward passes")
