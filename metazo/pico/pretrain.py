"""Makes pico: trains its tokenizer and pretrains the model on English and on text of the grammar.

python -m metazo.pico.pretrain --corpus DIR --out NEW_DIR

DIR has gutenberg/*.txt (public-domain books) and wikitext2/{valid,test}.txt. One book and
WikiText-2 test are held out for perplexity. Needs the package `tokenizers` (comes with transformers). The same
seed, number of threads, kind of processor and library versions give the same weights, bit for bit.
Nothing is saved before the end, so a run that is stopped starts again; metazo/pico/model/card.md says how long one took.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from metazo.io.extras import needs
from metazo.io.files import replaceable, require_files
from metazo.io.lock import NAME as LOCK
from metazo.io.lock import FolderLock
from metazo.io.terminal import run_script
from metazo.pico import grammar, lexicon, pretext
from metazo.pico.score import perplexity, score

with needs("llm"):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
    )

CONTEXT = 256
VOCABULARY = 2048
ANSWER_WEIGHT = 5
ENGLISH_ROWS, GRAMMAR_ROWS = 4, 5  # of a batch
DOCUMENTS = 64  # texts of the grammar per step: slightly more than its rows can hold
MUON_LR, ADAMW_LR, WARM_UP = 0.02, 3e-3, 30
HELD_OUT_BOOK = "carroll-alice.txt"
SPECIAL = ("<pad>", "<s>", "</s>")


def clean(text: str) -> str:
    """Joins wrapped lines into paragraphs and undoes WikiText's spacing of punctuation."""
    text = re.sub(r"\r", "", text)
    text = re.sub(r" @(\W)@ ", r"\1", text)
    text = re.sub(r" ([.,;:!?)]|'s\b|n't\b)", r"\1", text).replace("( ", "(")
    return re.sub(r"[ \t]+", " ", re.sub(r"(?<!\n)\n(?!\s*\n)", " ", text)).strip()


def read_corpus(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Training texts, and held-out texts by name. Raises UserError if a file is missing."""
    require_files(folder, f"gutenberg/{HELD_OUT_BOOK}", "wikitext2/valid.txt", "wikitext2/test.txt")
    books = {path.name: clean(path.read_text(encoding="utf-8", errors="replace")) for path in
             sorted((folder / "gutenberg").glob("*.txt"))}  # fmt: skip
    wiki = {
        name: clean((folder / "wikitext2" / f"{name}.txt").read_text(encoding="utf-8")) for name in ("valid", "test")
    }
    book = books.pop(HELD_OUT_BOOK)
    held_out = {HELD_OUT_BOOK: book, f"{HELD_OUT_BOOK}, start": book[:2400], "WikiText-2 test": wiki["test"]}
    return [*books.values(), wiki["valid"]], held_out


def train_tokenizer(texts: list[str], generated: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; the words of the grammar occur so often that each becomes one token, with its leading space."""
    words = [f" {word}" for word in grammar.vocabulary()]
    often = [*words, *lexicon.NAMES]  # a name also starts a sentence
    return train_bpe([*texts, *generated, *(f"{word}\n" * 20000 for word in often)])


def train_bpe(texts: Iterable[str], like: PreTrainedTokenizerFast | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a begin token; ``like``: a tokenizer whose way to cut words is taken."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if like is not None:
        own = like.backend_tokenizer
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


def documents(seed: int, count: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [pretext.document(rng) for _ in range(count)]


def rows_of(texts: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Rows of CONTEXT tokens, cut from the texts one after the other, each with its begin and end token.

    A text is (prompt, answer). Shape (3, rows, CONTEXT): the ids; the position of each within its text (a text that is cut
    starts again at 0 in the next row, so positions are below CONTEXT); the weight of each in the loss: ANSWER_WEIGHT for
    an answer, 1 for the rest.
    """
    ids: list[int] = []
    positions: list[int] = []
    weights: list[int] = []
    prompts = tokenizer([prompt for prompt, _ in texts], verbose=False)["input_ids"]
    answers = tokenizer([answer for _, answer in texts], add_special_tokens=False)["input_ids"]
    for prompt, answer in zip(prompts, answers, strict=True):
        ids += [*prompt, *answer, tokenizer.eos_token_id]
        positions += range(len(prompt) + len(answer) + 1)
        weights += [1] * len(prompt) + [ANSWER_WEIGHT] * len(answer) + [1]
    whole = len(ids) // CONTEXT * CONTEXT
    rows = torch.tensor([ids[:whole], positions[:whole], weights[:whole]]).view(3, -1, CONTEXT)
    rows[1] -= torch.where(rows[1] >= torch.arange(CONTEXT), rows[1, :, :1], 0)  # a text cut in two starts again at 0
    return rows


def new_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=160,
            intermediate_size=432,
            num_hidden_layers=4,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def optimizers_of(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices, also for an untied head, AdamW for embedding, biases and norms."""
    matrices, embeddings, norms = [], [], []
    for name, parameter in model.named_parameters():
        (norms if parameter.ndim == 1 else embeddings if "embed" in name else matrices).append(parameter)
    groups = [{"params": embeddings, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW(groups, lr=ADAMW_LR, betas=(0.9, 0.95), fused=True),
    ]


def train(model: nn.Module, parts: list[tuple[torch.Tensor, int]], steps: int) -> None:
    """Pretrain under bfloat16 autocast; the learning rates warm up for 30 steps and fall linearly to zero.

    ``parts``: texts as from `rows_of`, and the number of their rows per batch. A text does not attend to the text before it
    in its row, because transformers treats positions that start again as a new text.
    """
    optimizers = optimizers_of(model)
    schedules = [LambdaLR(each, lambda t: min((t + 1) / WARM_UP, 1 - t / steps)) for each in optimizers]
    orders = [order(data.shape[1], rows * steps).view(steps, rows) for data, rows in parts]
    began = time.monotonic()
    for step in range(steps):
        drawn = [data[:, rows[step]] for (data, _), rows in zip(parts, orders, strict=True)]
        batch, positions, weights = torch.cat(drawn, 1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch, position_ids=positions, use_cache=False).logits
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
        (losses * weights[:, 1:].flatten()).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        model.zero_grad()
        if step % 100 == 99:
            first, second = losses.detach().split([rows * (CONTEXT - 1) for _, rows in parts])
            print(
                f"step {step + 1}: English {first.mean():.3f}, tasks {second.mean():.3f} nats per token, "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )


def order(rows: int, count: int) -> torch.Tensor:
    """Row numbers for ``count`` draws: whole shuffled passes, one after the other."""
    return torch.cat([torch.randperm(rows) for _ in range(count // rows + 1)])[:count]


def perplexities(model: nn.Module, tokenizer: PreTrainedTokenizerBase, held_out: dict[str, str]) -> list[str]:
    """The card's table of held-out texts."""
    lines = ["| held-out text | perplexity per token | bits per character |", "|---|---|---|"]
    for name, text in held_out.items():
        per_token, bits = perplexity(model, tokenizer, text)
        lines.append(f"| {name} | {per_token:.2f} | {bits:.3f} |")
    return lines


def report(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: dict[str, str]) -> str:
    """The card's tables: held-out perplexities and zero-shot accuracy of the generated tasks."""
    lines = perplexities(model, tokenizer, held_out)
    lines += ["", "| task | zero-shot loss | zero-shot accuracy (1,000 test rows) |", "|---|---|---|"]
    for task in grammar.TASKS:
        loss, accuracy = score(model, tokenizer, task, grammar.examples(task, "test", 1000))
        lines.append(f"| {task} | {loss:.3f} | {accuracy:.3f} |")
    return "\n".join(lines)


def arguments(description: str | None, folders: Sequence[str], steps: int) -> argparse.Namespace:
    """The arguments of a program that makes a model; its threads and torch's seed are set by them. Raises UserError if the
    model's folder is not empty."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in folders:
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name, default in {"steps": steps, "threads": 1, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    FolderLock(given.out).check_empty()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    return given


def make(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    parts: list[tuple[torch.Tensor, int]],
    steps: int,
    out: Path,
) -> None:
    """Train the model on rows of English and of tasks, and write it to ``out``, a new or empty folder, in float16.

    The folder is written completely or not at all. Raises UserError if it is not empty or in use.
    """
    lock = FolderLock(out := replaceable(out))
    lock.check_empty()
    new = out.with_name(f".{out.name[:60]}.{os.getpid()}.tmp")
    with lock:
        began, (english, tasks) = time.monotonic(), (rows for rows, _ in parts)
        print(f"{english[0].numel():,} English tokens, {tasks[0].numel():,} of tasks, "
              f"{model.num_parameters():,} parameters", flush=True)  # fmt: skip
        train(model, parts, steps)
        print(f"trained; {time.monotonic() - began:.0f} s", flush=True)
        try:
            model.half().save_pretrained(new)
            tokenizer.save_pretrained(new)
            (out / LOCK).unlink(missing_ok=True)
            os.replace(new, out)  # an empty folder is replaced; a folder with files is not
        finally:
            shutil.rmtree(new, ignore_errors=True)


def main() -> None:
    args = arguments(__doc__, ("corpus", "out"), steps=2000)
    texts, held_out = read_corpus(args.corpus)
    generated = documents(args.seed, DOCUMENTS * args.steps)
    tokenizer = train_tokenizer(texts, ["".join(text) for text in generated[:50_000]])
    english, grammatical = rows_of([(text, "") for text in texts], tokenizer), rows_of(generated, tokenizer)
    make(new_model(), tokenizer, [(english, ENGLISH_ROWS), (grammatical, GRAMMAR_ROWS)], args.steps, args.out)
    saved = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    print(report(saved, tokenizer, held_out))


if __name__ == "__main__":
    run_script(main)
