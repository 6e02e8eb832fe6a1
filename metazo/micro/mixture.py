"""Makes micro: trains its tokenizer and pretrains the model on English and on real classification tasks as text.

    python -m metazo.micro.mixture --corpus DIR --tasks DIR --out NEW_DIR

The corpus has gutenberg/*.txt, wikitext2/{valid,test}.txt and tinystories_sample.txt; the folder of tasks has
<task>/{train.jsonl,validation.jsonl,labels.json}. A row of a task becomes `<text>\n<prompt>` with the label phrase as its
answer, which is how metazo puts these tasks to a language model. All TASKS belong to the families for meta-training
(`metazo.tasks.text.META_TRAIN`), so the model has seen no task of a held-out family. The same seed, number of threads,
kind of processor and library versions give the same weights, bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from metazo.io.extras import needs
from metazo.io.files import require_files
from metazo.io.terminal import run_script
from metazo.models.load import load_model
from metazo.pico.pretrain import (
    CONTEXT,
    VOCABULARY,
    arguments,
    clean,
    make,
    perplexities,
    read_corpus,
    rows_of,
    train_bpe,
)
from metazo.tasks import prepare, text
from metazo.tasks.evaluate import evaluate

with needs("llm"):
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

# Tasks of metazo's families for meta-training whose texts may be used and shared: CC BY 3.0 and 4.0, CC0, public domain.
TASKS = ("clinc150", "review_sentences", "sarcasm_headlines", "snips", "spooky_author")
ENGLISH_ROWS, TASK_ROWS = 4, 5  # of a batch


def instructions(folder: Path, task: str, split: str = "train") -> list[tuple[str, str]]:
    """(prompt, answer) of every row of a task, as metazo puts the task to a language model.

    Raises UserError if the file is missing.
    """
    require_files(folder, f"{task}/{split}.jsonl")
    told = next(each for each in text.TASKS if each.name == task)
    names = list(told.labels.values())
    rows = [json.loads(line) for line in (folder / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    before, _, _ = str(told.prompt).partition("{}")
    return [(before.replace("{text}", row["text"]).rstrip(), f" {names[row['label']]}") for row in rows]


def new_model() -> Qwen2ForCausalLM:
    """Qwen2: biases on q, k and v, grouped queries, an untied head; 5 layers, 5.0 M parameters."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def report(base: Path, held_out: dict[str, str], data: Path, rows: int = 300) -> str:
    """The card's tables: held-out perplexities, and accuracy on test rows of tasks in the mixture and of others."""
    loaded = load_model(base)
    lines = perplexities(loaded.model, loaded.tokenizer, held_out)
    lines += ["", "| task | side | classes | accuracy | largest class |", "|---|---|---|---|---|"]
    for task in sorted(text.TASKS, key=lambda task: task.name):
        if len(task.labels) <= 20:
            found = evaluate(loaded.model, prepare(task, loaded, data=data, train=8, dev=0, test=rows), "test")
            side = "in the mixture" if task.name in TASKS else "not seen"
            lines.append(
                f"| {task.name} | {side} | {len(task.labels)} | {found['accuracy']:.3f} | {found['majority']:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    args = arguments(__doc__, ("corpus", "tasks", "out"), steps=1500)
    texts, held_out = read_corpus(args.corpus)
    require_files(args.corpus, "tinystories_sample.txt")
    texts.append(clean((args.corpus / "tinystories_sample.txt").read_text(encoding="utf-8")))
    rows = [row for task in TASKS for row in instructions(args.tasks, task)]
    rows = [rows[place] for place in torch.randperm(len(rows)).tolist()]
    # transformers takes Qwen2's tokenizer for every model of the type, whatever was saved: words are cut as it cuts them.
    tokenizer = train_bpe([*texts, *("".join(row) for row in rows)], like=Qwen2Tokenizer())
    english, tasks = rows_of([(each, "") for each in texts], tokenizer), rows_of(rows, tokenizer)
    make(new_model(), tokenizer, [(english, ENGLISH_ROWS), (tasks, TASK_ROWS)], args.steps, args.out)
    print(report(args.out, held_out, args.tasks))


if __name__ == "__main__":
    run_script(main)
