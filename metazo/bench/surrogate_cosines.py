"""Cosine of each surrogate's estimate with the true gradient, on a causal model's tasks and on next-token loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metazo.feedback.alignment import alignments
from metazo.feedback.jacobian import fit_jacobian
from metazo.feedback.surrogates import Column, Skip, Surrogate
from metazo.feedback.tuner import FeedbackTuner
from metazo.models.load import load_model
from metazo.tasks import get, prepare

BATCH, FIT, TEST, PASSAGE = 16, 24, 4, 48  # examples per batch; batches to fit on and to test on; tokens of a passage
RANKS = (0, 4, 16)

Closure = Callable[[], Tensor]


def measure(
    source: str,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    corpus: Path | None = None,
    tuner: Path | None = None,
    log=None,
) -> list[dict[str, Any]]:
    """Rows {task, surrogate, block, cosine, ratio}, block None for all, means over TEST batches of the pretrained model.

    Mean Jacobians are fitted on the task's own inputs, their labels unread, on batches that are not tested.
    corpus: a text file for next-token loss on all positions. tuner: a feedback tuner's file or folder, whose maps take the
        place of the fitted ones.
    """
    loaded = load_model(source)
    model = loaded.model.eval()
    maps = None if tuner is None else FeedbackTuner.load(tuner).maps
    rows: list[dict[str, Any]] = []
    for name in tasks:
        prepared = prepare(get(name), loaded, data=data, train=BATCH * FIT, dev=BATCH * TEST, test=0, max_length=128)
        fit = [_loss(prepared, model, batch) for batch in prepared.batches(prepared.train, BATCH)]
        test = [_loss(prepared, model, batch) for batch in prepared.batches(prepared.dev, BATCH)]
        rows += _rows(name, model, fit, test, maps, log)
    if corpus is not None:
        ids = loaded.tokenizer(corpus.read_text(encoding="utf-8")[:400_000], add_special_tokens=False)["input_ids"]
        count = BATCH * (FIT + TEST)
        passages = torch.tensor(ids[: count * PASSAGE]).view(count, PASSAGE).split(BATCH)
        closures = [_next_token(model, batch) for batch in passages]
        rows += _rows("next token", model, closures[:FIT], closures[FIT:], maps, log)
    return rows


def _loss(prepared, model: nn.Module, batch) -> Closure:
    return lambda: prepared.loss(model, batch)


def _next_token(model: nn.Module, ids: Tensor) -> Closure:
    def loss() -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return loss


def _rows(
    task: str, model: nn.Module, fit: list[Closure], test: list[Closure], maps: Surrogate | None, log
) -> list[dict[str, Any]]:
    surrogates: dict[str, Surrogate] = {"skip": Skip(), "column": Column()}
    if maps is not None:
        surrogates["feedback, tuner"] = maps
    for rank in RANKS if maps is None else ():
        surrogates[f"feedback, rank {rank}"] = fit_jacobian(model, fit, rank=rank)
    rows = []
    for name, surrogate in surrogates.items():
        found: dict[int | None, list[tuple[float, float]]] = {}
        for closure in test:
            for row in alignments(model, [closure], surrogate):
                if row.site == "all":
                    found.setdefault(row.block, []).append((row.cosine, row.ratio))
        for block, values in found.items():
            cosine, ratio = (sum(column) / len(values) for column in zip(*values))
            rows.append(
                {"task": task, "surrogate": name, "block": block, "cosine": round(cosine, 4), "ratio": round(ratio, 4)}
            )
        if log is not None:
            log(f"{task} {name}: {rows[-1]['cosine'] if None not in found else found[None]}")
    return rows
