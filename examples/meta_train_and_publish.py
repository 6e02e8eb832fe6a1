"""Meta-train a tuner, publish it in a zoo, pull it from there and train with it.

python examples/meta_train_and_publish.py FOLDER          # needs metazo[llm] and metazo[report]

Twenty meta-steps show how the parts fit together. A useful tuner takes more: `metazo demo` takes 200 of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import metazo
from metazo import zoo
from metazo.tasks import resolve
from metazo.tasks.evaluate import evaluate
from metazo.tuner.scale import tuner_scale

out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example")

# 1. Train the tuner on one task, along the path that first-order training of the model takes.
settings = metazo.MetaConfig("pico", ["pico_topic"], out / "meta", steps=20, train_examples=200, bound=0.5)
metazo.meta_train(settings)

# 2. Publish it: a folder here; `hub:org/name` is the Hub. `zoo.signer` makes signatures.
name = zoo.push(out / "meta" / "tuner.safetensors", out / "zoo", base="pico")
print(f"published {name} in {out / 'zoo'}")

# 3. Load it by its name, which checks its hash, and train another task of the same model under its block scales.
tuner = metazo.load_tuner(name, out / "zoo")
loaded = metazo.load_model("pico")
prepared = metazo.prepare(resolve("pico_sentiment"), loaded, train=200, dev=100, test=0)
before = evaluate(loaded.model, prepared, "dev")
optimizer = metazo.ZOFinetuner(
    loaded.model.named_parameters(), lr=1.5e-4, scale=tuner_scale(tuner, loaded.model.named_parameters())
)
draw = torch.Generator().manual_seed(0)
for _ in range(60):
    rows = torch.randint(len(prepared.train), (16,), generator=draw).tolist()
    batch = prepared.collate([prepared.train[row] for row in rows])
    optimizer.step(lambda: prepared.loss(loaded.model, batch))  # noqa: B023 (called within this step)
after = evaluate(loaded.model, prepared, "dev")
print(f"loss on dev: {before['loss']:.3f} before, {after['loss']:.3f} after {optimizer.forwards:.0f} forward passes")
