"""A task of your own from one YAML file, fine-tuned in memory: the tuned model is an object, and nothing is written.

python examples/own_task.py          # needs metazo[llm]
"""

from __future__ import annotations

from pathlib import Path

import torch

import metazo

task = Path(__file__).with_name("own_task.yaml")
tuned = metazo.finetune(
    "pico",  # a folder or Hub id of transformers, or a model in memory (then with `tokenizer`)
    task,
    "mezo",
    scale="rms",
    lr=3e-4,
    steps=40,
    train_examples=100,
    dev_examples=30,
    test_examples=50,
    eval_every=20,
    on_evaluation=lambda record: print(f"step {record['step']}: loss on dev {record['dev']['loss']:.3f}"),
)
print(f"test: loss {tuned.summary['test']['loss']:.3f}, accuracy {tuned.summary['test']['accuracy']:.2f}")

inputs = tuned.tokenizer("This story was so pleasant. It was", return_tensors="pt")
with torch.inference_mode():
    logits = tuned.model(**inputs).logits[0, -1]
good, bad = (tuned.tokenizer.encode(word, add_special_tokens=False)[0] for word in (" great", " terrible"))
print("a row of no split:", "good" if logits[good] > logits[bad] else "bad")
