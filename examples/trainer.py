"""A script of transformers' Trainer, switched over to forward passes: the three lines that differ are marked.

python examples/trainer.py          # the small model that metazo carries; needs metazo[trainer]
python examples/trainer.py gpt2     # or any causal language model, by folder or Hub id (then choose another learning rate)
"""

from __future__ import annotations

import sys
from importlib.resources import files
from tempfile import TemporaryDirectory

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from metazo.integrations import ZOTrainer  # 1: was `from transformers import Trainer`
from metazo.pico.grammar import examples  # replace it by rows of your own

name = sys.argv[1] if len(sys.argv) > 1 else str(files("metazo.pico") / "model")
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def tokenized(split: str, count: int) -> Dataset:
    """Prompts with their answer; the loss is that of the answer alone."""
    rows = []
    for row in examples("pico_sentiment", split, count, seed=0):
        tokens = tokenizer(f"{row['sentence']} It was {('terrible', 'great')[row['label']]}").input_ids
        rows.append({"input_ids": tokens, "labels": [-100] * (len(tokens) - 1) + tokens[-1:]})
    return Dataset.from_list(rows)


with TemporaryDirectory() as folder:
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=40,
        learning_rate=3e-4,
        logging_steps=20,
        report_to=[],
        seed=0,
    )
    trainer = ZOTrainer(  # 2: was `Trainer(`
        model=model,
        args=args,
        train_dataset=tokenized("train", 400),
        eval_dataset=tokenized("validation", 100),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        optimizer_cls_and_kwargs=("mezo", {"eps": 1e-3, "scale": "rms"}),  # 3: new
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"evaluation loss {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")
