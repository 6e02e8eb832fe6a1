"""Scores of a small causal language model: perplexity of a text, loss and accuracy on pico's generated tasks.

Separate from `metazo.tasks`, so that the script that makes pico needs only the grammar.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from metazo.pico import grammar


@dataclass
class Encoded:
    """Rows as right-padded candidates. ids (rows * candidates, length); spans: start and end of each candidate's answer."""

    ids: Tensor
    spans: list[tuple[int, int]]
    labels: Tensor | None
    words: list[int] | None
    candidates: int


def encode(task: str, rows: list[dict], tokenizer) -> Encoded:
    """Token ids of ``rows``. Classification rows end with the prompt; in others each choice or the answer follows."""
    form = grammar.PROMPTS[task]
    texts, spans = [], []
    for row in rows:
        prompt = tokenizer(grammar.prompt(task, row))["input_ids"]
        if form.kind == "classification":
            answers = [[]]
        elif form.kind == "choice":
            answers = [tokenizer(" " + row[c], add_special_tokens=False)["input_ids"] for c in ("choice1", "choice2")]
        else:
            answers = [tokenizer(grammar.answer(task, row), add_special_tokens=False)["input_ids"]]
        for answer in answers:
            texts.append(prompt + answer)
            spans.append((len(prompt), len(prompt) + len(answer)))
    width = max(map(len, texts))
    ids = torch.full((len(texts), width), tokenizer.pad_token_id)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.tensor(text)
    labels = None if form.kind == "generation" else torch.tensor([row["label"] for row in rows])
    words = None
    if form.words is not None:
        words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in form.words]
    return Encoded(ids, spans, labels, words, len(texts) // len(rows))


def loss_and_hits(model, batch: Encoded) -> tuple[Tensor, Tensor]:
    """Mean loss (a float32 scalar, differentiable) and whether each row is answered correctly (bool, one per row).

    Classification: cross entropy over the label words. Choice: cross entropy over the mean log-likelihoods
    per token of the candidates. Generation: mean loss of the answer's tokens; correct if greedy decoding
    would give the answer.
    """
    hidden, head = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state, model.get_output_embeddings()
    if batch.words is not None and batch.labels is not None:
        last = torch.tensor([start - 1 for start, _ in batch.spans])
        scores = head(hidden[torch.arange(len(last)), last])[:, batch.words].float()
        return F.cross_entropy(scores, batch.labels), scores.argmax(1) == batch.labels
    rows = [i for i, (start, end) in enumerate(batch.spans) for _ in range(start, end)]
    places = [t for start, end in batch.spans for t in range(start, end)]
    picked, target = head(hidden[rows, [t - 1 for t in places]]).float(), batch.ids[rows, places]
    token_loss = F.cross_entropy(picked, target, reduction="none")
    owner = torch.tensor(rows)
    count = torch.zeros(len(batch.spans)).index_add(0, owner, torch.ones(len(rows)))
    mean = torch.zeros(len(batch.spans)).index_add(0, owner, token_loss) / count
    if batch.labels is None:
        right = torch.zeros(len(batch.spans)).index_add(0, owner, (picked.argmax(1) == target).float())
        return mean.mean(), right == count
    scores = -mean.view(-1, batch.candidates)
    return F.cross_entropy(scores, batch.labels), scores.argmax(1) == batch.labels


@torch.no_grad()
def score(model, tokenizer, task: str, rows: list[dict], batch_size: int = 64) -> tuple[float, float]:
    """Mean loss and accuracy over ``rows``."""
    total, hits = 0.0, 0
    for i in range(0, len(rows), batch_size):
        part = rows[i : i + batch_size]
        loss, hit = loss_and_hits(model, encode(task, part, tokenizer))
        total += float(loss) * len(part)
        hits += int(hit.sum())
    return total / len(rows), hits / len(rows)


@torch.no_grad()
def perplexity(model, tokenizer, text: str, context: int = 256, batch_size: int = 16) -> tuple[float, float]:
    """Perplexity per token and bits per character of ``text``, in windows of ``context`` that do not overlap.

    Every window starts with the begin token, so that all tokens are predicted, the first of a window without context.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = [[tokenizer.bos_token_id, *ids[i : i + context - 1]] for i in range(0, len(ids), context - 1)]
    nats = 0.0
    for i in range(0, len(windows), batch_size):
        part = windows[i : i + batch_size]
        batch = torch.full((len(part), max(map(len, part))), tokenizer.pad_token_id)
        for row, window in zip(batch, part, strict=True):
            row[: len(window)] = torch.tensor(window)
        logits = model(input_ids=batch, use_cache=False).logits.float()
        target = batch[:, 1:].masked_fill(batch[:, 1:] == tokenizer.pad_token_id, -100)
        nats += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten(), reduction="sum"))
    return math.exp(nats / len(ids)), nats / math.log(2) / len(text)
