"""Measures how block-diagonal the Hessians of small models are. Writes benchmarks/hessian_blocks.json and docs/hessian-*.png.

    python benchmarks/hessian_blocks.py          # 10 minutes on one core; no single measurement takes two
    python benchmarks/hessian_blocks.py table    # the table again from the JSON

pico as it is, and three models of its tokenizer and about its depth, in the shapes of Llama, Mixtral (4 experts, 2 per token)
and Mamba. Their weights are random, and each is measured twice: as drawn, and after STEPS steps of AdamW on the next token of
generated texts (metazo/pico/pretext.py), a short pretraining. All measurements are `metazo blocks --hessian` on the same batch
of pico_sentiment. The embedding is also left out, because most of its rows are of words that the batch does not have.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, MixtralConfig, MixtralForCausalLM

from metazo.models.load import load_model
from metazo.pico.pretrain import documents

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).with_suffix(".json")
TASK, BATCH, DRAWS = "pico_sentiment", 8, 32
STEPS, ROWS, RATE = 300, 32, 3e-3
INSIDE = ["--freeze", "*embed*"]
MEASURED = {
    "by tensor": [],
    "by tensor, no embedding": INSIDE,
    "by layer, no embedding": [*INSIDE, "--by", "layer"],
}
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ATTENTION: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
SHAPES: dict[str, Any] = {
    "Llama": (LlamaForCausalLM, LlamaConfig, ATTENTION | {"intermediate_size": 192}),
    "Mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        ATTENTION | {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "Mamba": (MambaForCausalLM, MambaConfig, {"state_size": 8}),
}


def random_model(name: str, folder: Path) -> None:
    model, config, settings = SHAPES[name]
    tokenizer = load_model("pico").tokenizer
    torch.manual_seed(0)
    made = model(config(vocab_size=len(tokenizer), tie_word_embeddings=True, **SMALL, **settings))
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pretrain(folder: Path, out: Path) -> float:
    """Train the model in a folder on generated texts, and save it. Returns its loss over the last tenth, nats per token."""
    loaded = load_model(folder)
    model, tokenizer = loaded.model, loaded.tokenizer
    texts = ["".join(each) for each in documents(seed=0, count=STEPS * ROWS)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    losses = []
    for step in range(STEPS):
        batch = tokenizer(texts[step * ROWS : (step + 1) * ROWS], padding=True, return_tensors="pt")
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return sum(losses[-STEPS // 10 :]) / (STEPS // 10)


def metazo(*words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "metazo", *words, "--json"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def measure(model: str, picture: Path | None) -> dict[str, Any]:
    """The shares of each measurement; the matrices of norms are left out."""
    found: dict[str, Any] = {}
    for name, words in MEASURED.items():
        drawn = ["--plot", str(picture)] if picture and words == INSIDE else []
        common = ["--hessian", "--task", TASK, "--batch-size", str(BATCH), "--draws", str(DRAWS)]
        seen = metazo("blocks", model, *common, *words, *drawn)
        kept = {key: seen["hessian"][key] for key in ("share", "error", "even", "exact")}
        found[name] = kept | {"blocks": len(seen["blocks"]), "entries": seen["entries"]}
    return found


def run(folder: Path) -> list[dict[str, Any]]:
    rows = [{"model": "pico", "state": "pretrained"} | measure("pico", ROOT / "docs" / "hessian-pico.png")]
    for name in SHAPES:
        base, tuned = folder / name, folder / f"{name}-tuned"
        random_model(name, base)
        rows.append({"model": name, "state": "random"} | measure(str(base), None))
        loss = pretrain(base, tuned)
        picture = ROOT / "docs" / f"hessian-{name.lower()}.png" if name != "Llama" else None
        told = {"model": name, "state": "shortly pretrained", "nats per token": round(loss, 3)}
        rows.append(told | measure(str(tuned), picture))
        print(rows[-2], rows[-1], sep="\n", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    heads = ["model", "weights", "state", *(cell for name in MEASURED for cell in (name, "even"))]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row["model"], f"{row['by tensor']['entries']:,}", row["state"]]
        for one in (row[name] for name in MEASURED):
            cells += [f"{100 * one['share']:.1f} ± {100 * one['error']:.1f} %", f"{100 * one['even']:.1f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:] != ["table"]:
        with tempfile.TemporaryDirectory() as folder:
            RESULT.write_text(json.dumps(run(Path(folder)), indent=1) + "\n")
    print(table(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
