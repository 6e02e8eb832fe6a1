"""Heads of a classifier on pooled hidden states: linear and trained, or fixed, of prototypes or of label phrases.

The prototype head is Snell et al., "Prototypical networks for few-shot learning" (2017, arXiv 1703.05175), with cosine
in place of the distance: a class is the mean direction of its training examples, and

    logit_k = 20 cos(embedding, prototype_k) - mean over the training examples of the same

It has no parameters, so only the encoder is trained, and the loss at step 0 is already below chance.

The head of label phrases has the embedding of a phrase in place of each prototype ("this review is positive"), so it
reads no training label, only texts for the calibrating mean. Both are functions of the base encoder's weights: they are
made once, before the first step, and then stay fixed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from metazo.errors import UserError

SHARPNESS = 20.0


class Prototypes(nn.Module):
    """Fixed label prototypes: buffers ``prototypes`` (C, d), of unit length, and ``offset`` (C,), float32."""

    prototypes: Tensor
    offset: Tensor

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.register_buffer("prototypes", torch.zeros(classes, width))
        self.register_buffer("offset", torch.zeros(classes))

    @property
    def fitted(self) -> bool:
        """Whether the prototypes are set."""
        return bool(self.prototypes.any())

    def calibrate(self, embeddings: Tensor) -> None:
        """Set the offset to the mean logits of embeddings (N, d)."""
        self.offset.copy_(SHARPNESS * (normalize(embeddings.float(), dim=1) @ self.prototypes.T).mean(0))

    def fit(self, embeddings: Tensor, labels: Tensor) -> None:
        """Set the prototypes from embeddings (N, d) and their classes (N,). Raises UserError for a class without an example."""
        directions = normalize(embeddings.float(), dim=1)
        for label in range(len(self.prototypes)):
            if not (labels == label).any():
                raise UserError(
                    f"`head='prototype'`: no training example has class {label}; take more with `train_examples`."
                )
            self.prototypes[label] = normalize(directions[labels == label].mean(0), dim=0)
        self.calibrate(embeddings)

    def forward(self, embeddings: Tensor) -> Tensor:
        return SHARPNESS * normalize(embeddings.float(), dim=1) @ self.prototypes.T - self.offset


class Phrases(Prototypes):
    """Prototypes that are the embeddings of label phrases: ``fit`` reads the embeddings and not the labels."""

    def set(self, phrases: Tensor) -> None:
        """Set the prototypes from the phrases' embeddings (C, d), in class order; the offset is 0 until `calibrate`.

        Raises UserError for phrases that the encoder does not tell apart.
        """
        directions = normalize(phrases.float(), dim=1)
        close = torch.triu(directions @ directions.T > 1 - 1e-6, diagonal=1).nonzero()
        if len(close):
            first, second = close[0].tolist()
            raise UserError(f"`head` phrases: the phrases of classes {first} and {second} have the same embedding; "
                            "choose label words that differ")  # fmt: skip
        self.prototypes.copy_(directions)

    def fit(self, embeddings: Tensor, labels: Tensor) -> None:
        self.calibrate(embeddings)


HEADS: dict[str, Any] = {"linear": nn.Linear, "prototype": Prototypes, "phrases": Phrases}


def new_head(kind: str, classes: int, width: int, dtype: torch.dtype) -> nn.Module:
    return nn.Linear(width, classes, dtype=dtype) if kind == "linear" else HEADS[kind](classes, width)
