"""Makes micro: trains its tokenizer and pretrains the model on English and on real classification tasks as text.

    python -m metazo.micro.mixture --corpus DIR --tasks DIR --out metazo/micro/model

The corpus has gutenberg/*.txt, wikitext2/{valid,test}.txt and tinystories_sample.txt; the folder of tasks has
<task>/{train.jsonl,validation.jsonl,labels.json}. A row of a task becomes `<text>\n<prompt>` with the label phrase as its
answer, which is how metazo puts these tasks to a language model. All TASKS belong to the families for meta-training
(`metazo.tasks.text.META_TRAIN`), so the model has seen no task of a held-out family. The same seed, number of threads,
kind of processor and library versions give the same weights, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch

from metazo.io.extras import needs
from metazo.pico.pretrain import SPECIAL, clean, read_corpus, rows_of, train
from metazo.pico.score import perplexity
from metazo.tasks import text

with needs("llm"):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

CONTEXT = 256
VOCABULARY = 2048
# Tasks of metazo's families for meta-training whose texts may be used and shared: CC BY 3.0 and 4.0, CC0, public domain.
TASKS = ("clinc150", "review_sentences", "sarcasm_headlines", "snips", "spooky_author")
ENGLISH_ROWS, TASK_ROWS = 4, 5  # of a batch


def instructions(folder: Path, task: str, split: str = "train") -> list[tuple[str, str]]:
    """(prompt, answer) of every row of a task, as metazo puts the task to a language model."""
    told = next(each for each in text.TASKS if each.name == task)
    names = list(told.labels.values())
    rows = [json.loads(line) for line in (folder / task / f"{split}.jsonl").read_text().splitlines()]
    before, _, _ = str(told.prompt).partition("{}")
    return [(before.replace("{text}", row["text"]).rstrip(), f" {names[row['label']]}") for row in rows]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a begin token. Words are cut as Qwen2's tokenizer cuts them: transformers takes that class, whatever
    a saved tokenizer says, for every model of the type."""
    tokenizer, own = Tokenizer(models.BPE()), Qwen2Tokenizer().backend_tokenizer
    tokenizer.normalizer, tokenizer.pre_tokenizer = own.normalizer, own.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, SPECIAL.index(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


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


@torch.inference_mode()
def accuracy(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, task: str, rows: int) -> float:
    """Share of validation rows whose right label phrase has the highest mean log-likelihood per token."""
    names = json.loads((folder / task / "labels.json").read_text())["names"]
    answers = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in names]
    right = 0
    examples = instructions(folder, task, "validation")[:rows]
    for prompt, answer in examples:
        before = tokenizer(prompt)["input_ids"][-(CONTEXT - max(map(len, answers))) :]
        width = max(map(len, answers))
        ids = torch.tensor([before + option + [0] * (width - len(option)) for option in answers])
        logs = model(input_ids=ids).logits[:, len(before) - 1 : -1].float().log_softmax(-1)
        scores = [
            float(logs[row, : len(option)].gather(1, torch.tensor(option)[:, None]).mean())
            for row, option in enumerate(answers)
        ]
        right += names[max(range(len(names)), key=scores.__getitem__)] == answer.strip()
    return right / len(examples)


def report(model: Qwen2ForCausalLM, tokenizer, held_out: dict[str, str], folder: Path, rows: int = 300) -> str:
    """The card's tables: held-out perplexities, and accuracy on validation rows of trained and of held-out tasks."""
    lines = ["| held-out text | perplexity per token | bits per character |", "|---|---|---|"]
    for name, passage in held_out.items():
        per_token, bits = perplexity(model, tokenizer, passage)
        lines.append(f"| {name} | {per_token:.2f} | {bits:.3f} |")
    lines += ["", "| task | side | classes | accuracy before any fine-tuning |", "|---|---|---|---|"]
    for path in sorted(folder.glob("*/labels.json")):
        task, classes = path.parent.name, len(json.loads(path.read_text())["names"])
        side = "in the mixture" if task in TASKS else "not seen"
        if classes <= 20:
            lines.append(f"| {task} | {side} | {classes} | {accuracy(model, tokenizer, folder, task, rows):.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    began = time.monotonic()
    texts, held_out = read_corpus(args.corpus)
    texts.append(clean((args.corpus / "tinystories_sample.txt").read_text(encoding="utf-8")))
    rows = [row for task in TASKS for row in instructions(args.tasks, task)]
    rows = [rows[place] for place in torch.randperm(len(rows)).tolist()]
    tokenizer = train_tokenizer([*texts, *("".join(row) for row in rows)])
    english, tasks = rows_of([(each, "") for each in texts], tokenizer), rows_of(rows, tokenizer)
    model = new_model()
    print(f"{english[0].numel():,} English tokens, {tasks[0].numel():,} of tasks, "
          f"{model.num_parameters():,} parameters", flush=True)  # fmt: skip
    train(model, [(english, ENGLISH_ROWS), (tasks, TASK_ROWS)], args.steps)
    print(f"trained; {time.monotonic() - began:.0f} s in all", flush=True)
    new = args.out.with_name(args.out.name + ".tmp")
    shutil.rmtree(new, ignore_errors=True)
    model.half().save_pretrained(new)
    tokenizer.save_pretrained(new)
    if (args.out / "card.md").exists():
        shutil.copy(args.out / "card.md", new)
    shutil.rmtree(args.out, ignore_errors=True)
    new.rename(args.out)
    saved = Qwen2ForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    print(report(saved, AutoTokenizer.from_pretrained(args.out), held_out, args.tasks))


if __name__ == "__main__":
    main()
