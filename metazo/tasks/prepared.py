"""A task's rows made ready for one model: encoded, padded into batches, scored and turned into a loss.

Only the logits that are needed are computed: the base model runs, and the (large) output layer is applied to the label
position alone, or to the answer's positions. Batches of causal models are padded on the left, so that these are the
last positions and ``logits_to_keep`` (transformers) selects them; position ids follow the attention mask, so padding
changes no result: models whose scores it changes are refused (metazo/models/checks.py). The decoder of a
sequence-to-sequence model has a batch of its own (metazo/tasks/seq2seq.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from metazo.io.extras import needs
from metazo.models.virtual import virtual_tokens, with_virtual_tokens
from metazo.tasks.encode import Encoded
from metazo.tasks.options import arranged, trees
from metazo.tasks.seq2seq import decoder_inputs, decoder_logits
from metazo.tasks.task import Task

if TYPE_CHECKING:  # tasks can be listed and checked without transformers
    from transformers import PreTrainedTokenizerBase


_MASKED_HEADS = ("lm_head", "cls")  # names in RoBERTa-like and BERT-like models


class Batch(dict[str, Tensor]):
    """Named tensors of one batch."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        return Batch({name: tensor.to(device) for name, tensor in self.items()})


@dataclass
class Prepared:
    """Encoded splits of a task for one model, and how to score them."""

    task: Task
    kind: str
    """The model's kind: causal, masked, classifier or seq2seq."""
    tokenizer: PreTrainedTokenizerBase
    room: int
    """Most tokens of a generated answer; with its prompt it fits into the context."""
    words: list[list[int]]
    """Tokens of each label word, by class (classification with a prompt)."""
    at_position: bool
    """Whether classes are scored at one position; otherwise by the likelihood of every option's tokens."""
    train: list[Encoded] = field(default_factory=list)
    dev: list[Encoded] = field(default_factory=list)
    test: list[Encoded] = field(default_factory=list)
    shortened: dict[str, int] = field(default_factory=dict)
    """Number of examples whose context was shortened to fit, by split."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of rows left out because question and answer alone do not fit, by split."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the user: smaller splits, shortened or dropped examples."""
    order: list[int] | None = None
    """Column of the classifier's head for each class; None if they are in class order."""
    start: list[int] = field(default_factory=list)
    """Tokens that the decoder of a sequence-to-sequence model reads before an answer."""
    record: dict[str, Any] = field(default_factory=dict)
    """The record in the config of a model trained on this (`metazo.models.describe.describe`), as JSON values."""
    prints: dict[str, list[str]] = field(default_factory=dict)
    """Hashes of the contents of the drawn rows, by split; none of generated rows."""

    def batches(self, examples: Sequence[Encoded], size: int) -> Iterator[Batch]:
        """The examples in order, in batches of `size`."""
        for start in range(0, len(examples), size):
            yield self.collate(examples[start : start + size])

    def collate(self, examples: Sequence[Encoded], *, every_option: bool = False) -> Batch:
        """Pad ``examples`` to the longest. Tensors, for B examples in R rows of L tokens:

        input_ids, attention_mask (R, L); targets (B,); and token_type_ids (R, L), position_ids (R, L), mask_at (B,),
        answer (R, A): tokens to score at the row's end, padded with -100 on the left; rows (B,): options per example.
        R is B, unless options are scored by likelihood: every option for a classification or with ``every_option``, else only
        the correct one. A causal model has then the prompts (B, L) and the tensors of `options.trees`. A
        sequence-to-sequence model has the rows in decoder_input_ids (`decoder_inputs`), input_ids and attention_mask (B, L),
        and, unless R is B, prompt (R,): the example of each row.
        """
        if not examples:
            raise ValueError("an empty batch")
        targets = torch.tensor([example.targets[0] for example in examples])
        if self.kind not in ("causal", "seq2seq"):
            return self._right_padded(examples, targets)
        if self.task.kind == "classification" and self.at_position:
            return Batch(targets=targets, **self.prompts(examples), **self._decoder([[]] * len(examples)))
        every = every_option or self.task.kind == "classification"
        chosen = [e.options if every else [e.options[e.targets[0]]] for e in examples]
        rows = torch.tensor([len(options) for options in chosen])
        flat = [option for options in chosen for option in options]
        if self.kind == "seq2seq":
            batch = Batch(targets=targets, rows=rows, **self.prompts(examples), **self._decoder(flat))
            if bool((rows != 1).any()):
                batch["prompt"] = torch.arange(len(examples)).repeat_interleave(rows)
            return batch
        if bool((rows != 1).any()):
            answers = trees([e.options for e in examples], self.tokenizer.pad_token_id)  # type: ignore[arg-type]
            return Batch(targets=targets, rows=rows, **self.prompts(examples), **answers)
        answers = [torch.tensor(option, dtype=torch.long) for option in flat]
        return Batch(
            targets=targets,
            rows=rows,
            answer=pad_sequence(answers, batch_first=True, padding_value=-100, padding_side="left"),
            **self._left_padded([e.ids + option for e, option in zip(examples, flat, strict=True)]),
        )

    def prompts(self, examples: Sequence[Encoded]) -> Batch:
        """The prompts alone, to be continued: input_ids and attention_mask (B, L), padded on the left and with position_ids for
        a causal model, padded on the right for the encoder of a sequence-to-sequence model.
        """
        if self.kind == "seq2seq":
            ids, mask = self._pad([torch.tensor(example.ids, dtype=torch.long) for example in examples], "right")
            return Batch(input_ids=ids, attention_mask=mask)
        return Batch(**self._left_padded([example.ids for example in examples]))

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scores (B, C) of classes or choices, in float32 (float64 of such a model): logits, or log-likelihoods, -inf if there
        is no such choice.

        The log-likelihood of a label word is summed over its tokens; that of a choice is the mean, as in MeZO, and -inf
        for a blank one.
        """
        if self.kind == "classifier":
            logits = wide(_forward(model, _inputs(batch)).logits)
            return logits if self.order is None else logits[:, self.order]
        if self.at_position:
            words = torch.tensor([word[0] for word in self.words], device=batch["input_ids"].device)
            logits = _mask_logits(model, batch) if self.kind == "masked" else last_logits(model, batch, 1)[:, -1]
            return wide(logits[:, words])
        likelihoods, rows = self._likelihoods(model, batch), batch["rows"].tolist()
        if len(set(rows)) == 1:  # vmap has no rule for padding
            return likelihoods.unflatten(0, (-1, rows[0]))
        return pad_sequence(list(likelihoods.split(rows)), batch_first=True, padding_value=-torch.inf)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss over the batch's examples, a scalar in float32 (float64 of such a model), differentiable while grad is on.

        Classification: cross entropy over the label words (or the head's classes). Choice and generation: minus the
        log-likelihood per token of the right choice or the answer. Differences from MeZO's code: there the mean is over
        all tokens of a batch, so a long answer weighs more; here every example weighs the same, whatever its batch.
        """
        if self.task.kind == "classification":
            return cross_entropy(self.scores(model, batch), batch["targets"])
        return -self._likelihoods(model, batch).mean()

    def sampled_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """As `loss`, for labels that were sampled from the model: B times the squared norm of its gradient is in the mean
        the trace of the Fisher information of `loss`.

        The n tokens of an answer are sampled one by one, so that the gradient of their mean has 1 / n of the mean of their
        traces; the answer's likelihood is therefore multiplied by sqrt(n).
        """
        if self.task.kind == "classification":
            return self.loss(model, batch)
        tokens = (batch["answer"] != -100).sum(-1)
        return -(self._likelihoods(model, batch) * tokens.sqrt()).mean()

    def _likelihoods(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-likelihood (R,) of each row's answer tokens: summed for label words, the mean for everything else."""
        answer = batch["answer"]
        if "node_ids" in batch:
            each = option_likelihoods(model, batch)
        else:
            logits = self.answer_logits(model, batch).transpose(1, 2)
            each = -cross_entropy(logits, answer, reduction="none", ignore_index=-100)
        total, count = each.sum(-1), (answer != -100).sum(-1)
        if self.task.kind == "classification":
            return total
        return (total / count.clamp(min=1)).masked_fill(count == 0, -torch.inf)

    def answer_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (R, A, V) of each token of a batch's answers, given those before it, in float32 (float64 of such a model)."""
        length = batch["answer"].shape[1]
        if self.kind == "seq2seq":  # the decoder reads its start and the answer without the last token
            return wide(last_logits(model, batch, length))
        return wide(last_logits(model, batch, length + 1)[:, :-1])

    def _decoder(self, options: list[list[int]]) -> dict[str, Tensor]:
        """What the decoder reads; {} for a causal model."""
        return decoder_inputs(self.start, options, self.tokenizer.pad_token_id) if self.kind == "seq2seq" else {}  # type: ignore[arg-type]

    def _left_padded(self, rows: list[list[int]]) -> dict[str, Tensor]:
        ids, mask = self._pad([torch.tensor(row, dtype=torch.long) for row in rows], "left")
        return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}

    def _right_padded(self, examples: Sequence[Encoded], targets: Tensor) -> Batch:
        ids, mask = self._pad([torch.tensor(example.ids, dtype=torch.long) for example in examples], "right")
        batch = Batch(input_ids=ids, attention_mask=mask, targets=targets)
        if examples[0].types is not None:
            types = [torch.tensor(example.types) for example in examples]
            batch["token_type_ids"] = pad_sequence(types, batch_first=True)
        if self.kind == "masked":
            batch["mask_at"] = torch.tensor([example.mask_at for example in examples])
        return batch

    def _pad(self, rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id, padding_side=side)  # type: ignore[arg-type]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
        return ids, mask


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {n: batch[n] for n in ("input_ids", "attention_mask", "token_type_ids", "position_ids") if n in batch}


def _forward(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """Call the model with those of ``inputs`` that it takes (BLOOM has no position_ids, MPT no logits_to_keep)."""
    inner: Any = getattr(model, "get_base_model", lambda: model)()  # the model inside a peft wrapper
    forward = getattr(inner, "forward", inner)
    accepted = _of_class(forward.__func__) if hasattr(forward, "__func__") else _accepted(forward)
    if accepted is not None:
        inputs = {name: value for name, value in inputs.items() if name in accepted}
    return with_virtual_tokens(model, inputs) if virtual_tokens(model) else model(**inputs)


def _accepted(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names of the arguments that a function takes; None if it takes any, as a wrapper does."""
    parameters = inspect.signature(function).parameters
    wrapper = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values())
    return None if wrapper else frozenset(parameters)


_of_class = lru_cache(64)(_accepted)  # a method of a class outlives its models; reading its signature takes 0.1 ms


def last_logits(model: nn.Module, batch: Batch, keep: int) -> Tensor:
    """Logits (R, keep, V) of the last positions; a model that cannot skip the others computes them all."""
    if "decoder_input_ids" in batch:
        return decoder_logits(model, batch, keep)
    return _forward(model, _inputs(batch) | {"logits_to_keep": keep, "use_cache": False}).logits[:, -keep:]


def wide(logits: Tensor) -> Tensor:
    """In float32, or in float64 if the model is."""
    return logits if logits.dtype == torch.float64 else logits.float()


def option_likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """Log-likelihood (R, A) of each token of the options in a batch with trees; 0 where an option has none."""
    answer = batch["answer"]
    inputs, keep, rows, read_at = arranged(model, batch)
    logits = wide(last_logits(model, Batch(inputs), keep))
    return logits.log_softmax(-1)[rows, read_at, answer.clamp(min=0)].masked_fill(answer == -100, 0.0)


def _mask_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (B, V) at each row's mask; the head is applied there only, if the model's head has a usual name."""
    with needs("llm"):
        from transformers import PreTrainedModel

    rows = torch.arange(len(batch["mask_at"]), device=batch["mask_at"].device)
    head = next((getattr(model, name) for name in _MASKED_HEADS if hasattr(model, name)), None)
    if isinstance(model, PreTrainedModel) and head is not None and model.base_model is not model:
        hidden = _forward(model.base_model, _inputs(batch)).last_hidden_state
        return head(hidden[rows, batch["mask_at"]][:, None])[:, 0]
    return _forward(model, _inputs(batch)).logits[rows, batch["mask_at"]]
