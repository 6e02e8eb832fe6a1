"""A Hugging Face language model in a training loop of your own: metazo gives the optimizer alone.

python examples/hf_loop.py          # the small model that metazo carries; needs metazo[llm]
python examples/hf_loop.py gpt2     # or any causal language model, by folder or Hub id (then choose another `lr`)
"""

from __future__ import annotations

import sys
from importlib.resources import files

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from metazo.optimizers import MeZO
from metazo.pico.grammar import examples  # replace it by rows of your own: {"sentence": text, "label": 0 or 1}

STEPS, BATCH = 100, 16
name = sys.argv[1] if len(sys.argv) > 1 else str(files("metazo.pico") / "model")
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()  # eval: no dropout between two losses
tokenizer = AutoTokenizer.from_pretrained(name)
train, test = (examples("pico_sentiment", split, n, seed=0) for split, n in (("train", 400), ("validation", 200)))
words = torch.tensor([tokenizer.encode(word, add_special_tokens=False)[0] for word in (" terrible", " great")])


@torch.inference_mode()
def scores(rows: list[dict]) -> torch.Tensor:
    """Logits (rows, 2) of the two label words behind the prompt."""
    texts = [f"{row['sentence']} It was" for row in rows]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    positions = (inputs.attention_mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(inputs.input_ids, inputs.attention_mask, position_ids=positions, logits_to_keep=1).logits
    return logits[:, -1, words]


def labels(rows: list[dict]) -> torch.Tensor:
    return torch.tensor([row["label"] for row in rows])


def accuracy(rows: list[dict]) -> float:
    return float((scores(rows).argmax(1) == labels(rows)).float().mean())


print(f"accuracy before: {accuracy(test):.2f}")
optimizer = MeZO(model.named_parameters(), lr=3e-4, eps=1e-3, scale="rms", seed=0)
draw = torch.Generator().manual_seed(0)
for step in range(STEPS):
    chosen = torch.randint(len(train), (BATCH,), generator=draw).tolist()
    batch = [train[i] for i in chosen]
    loss = optimizer.step(lambda: cross_entropy(scores(batch), labels(batch)))  # noqa: B023 (called within this step)
    if step % 50 == 0:
        print(f"step {step}: loss {loss:.3f}")
print(f"accuracy after {2 * STEPS} forward passes: {accuracy(test):.2f}")
