"""Evaluate a model on a prepared split: the loss, the task's metrics, and the score of always giving one class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.io.processes import gathered, of_all, rank, world
from metazo.models import parts
from metazo.models.describe import plain_generation
from metazo.models.heads import Prototypes
from metazo.models.virtual import generate_after_virtual_tokens, virtual_tokens
from metazo.tasks.encode import Encoded
from metazo.tasks.metrics import METRICS
from metazo.tasks.prepared import Prepared

with needs("llm"):
    from transformers import StoppingCriteria, StoppingCriteriaList

NO_CLASS = -1
"""Prediction of a row whose scores are not finite: it is no class, so it is never correct."""


def evaluate(
    model: nn.Module,
    prepared: Prepared,
    split: Literal["train", "dev", "test"] = "dev",
    *,
    batch_size: int = 32,
    metrics: Sequence[str] = (),
    divided: bool = False,
    loss_only: bool = False,
) -> dict[str, float]:
    """Loss and metrics of ``model`` on a split.

    Returns "loss", the task's metrics (0 to 1; mcc -1 to 1), "examples", and for classification and choice "majority":
    the accuracy of always giving the commonest answer of these examples. Generated answers are greedy. Batches hold
    inputs of similar length and at most ``batch_size`` rows (unless one example has more). Their order does not
    matter. Nor does their padding: models whose scores depend on it are refused, as far as `metazo.models.checks` knows them.
    ``metrics`` names others of the task's kind that are computed as well. ``divided``: the processes of torch.distributed,
    all of which must call this, divide the batches, and all return the result of a single process. A model that is itself
    divided is evaluated by all of them on all batches. ``loss_only``: return "loss" and "examples" alone, and generate nothing.
    Runs in eval and inference mode; the mode of every module is restored. A loss that is not finite is returned as it is, and
    such an example counts as answered wrongly. Raises UserError for an empty split, for a head of prototypes or label
    phrases that is not made yet (`metazo.tasks.classes.fit_head`), and if processes divide the examples in different ways.
    """
    examples = getattr(prepared, split)
    if not examples:
        raise UserError(f"the {split} split of task {prepared.task.name!r} holds no examples to evaluate on")
    head = getattr(model, "head", None)
    if isinstance(head, Prototypes) and not head.fitted:
        raise UserError("the head has no prototypes yet; make them with fit_head, or fine-tune the model first")
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    divided = divided and not parts.divided(model)
    first, ranks = (rank(), world()) if divided else (0, 1)
    losses = [0.0] * len(examples)
    predictions: list[Any] = [None] * len(examples)
    model.eval()
    try:
        with parts.forward_only(model):
            own: list[tuple[int, float, Any]] = []
            for places in islice(batches(examples, batch_size, prepared), first, None, ranks):
                chosen = [examples[place] for place in places]
                loss, predicted = _batch(model, prepared, chosen, device, loss_only)
                own += zip(places, loss.tolist(), predicted, strict=True)
        evaluated = [one for found in (gathered(own) if divided else [own]) for one in found]
        if sorted(place for place, *_ in evaluated) != list(range(len(examples))):
            how = "The processes divided the examples in different ways: give all of them the same `batch_size`."
            raise of_all(UserError(how))
        for place, value, prediction in evaluated:
            losses[place], predictions[place] = value, prediction
    finally:
        for module, training in modes:  # which may differ: a frozen part is often in evaluation mode
            module.training = training
    result = {"loss": sum(losses) / len(losses)}
    if loss_only:
        return result | {"examples": float(len(examples))}
    generation = prepared.task.kind == "generation"
    accepted = [example.references if generation else example.targets for example in examples]
    for metric in dict.fromkeys((*prepared.task.metric, *metrics)):
        result[metric] = METRICS[metric](predictions, accepted)
    if not generation:
        common = Counter(target for example in examples for target in example.targets)
        result["majority"] = common.most_common(1)[0][1] / len(examples)
    return result | {"examples": float(len(examples))}


def batches(examples: list[Encoded], batch_size: int, prepared: Prepared) -> Iterator[list[int]]:
    """Indices of examples by batches of at most ``batch_size`` rows; longest first: memory runs out at once or never."""
    places: list[int] = []
    rows = 0
    for place in sorted(range(len(examples)), key=lambda place: -len(examples[place])):
        own = _rows(examples[place], prepared)
        if places and rows + own > batch_size:
            yield places
            places, rows = [], 0
        places.append(place)
        rows += own
    yield places


def _rows(example: Encoded, prepared: Prepared) -> int:
    """The rows as which an example counts: one for each option of several tokens, or for each node of its tree
    (metazo/tasks/options.py), if these are more.
    """
    if prepared.at_position or prepared.task.kind == "generation":
        return 1
    nodes = sum(max(len(option) - 1, 0) for option in example.options)
    return max(nodes, len(example.options)) if nodes or prepared.kind == "seq2seq" else 1


def _batch(
    model: nn.Module, prepared: Prepared, examples: list[Encoded], device: torch.device, loss_only: bool
) -> tuple[Tensor, list[Any]]:
    """Loss (B,) and prediction of each example: a class, a choice, or a text, which is None if only the loss is needed."""
    batch = prepared.collate(examples, every_option=True).to(device)
    scores = prepared.scores(model, batch)
    if prepared.task.kind == "generation":
        if loss_only:
            return -scores[:, 0], [None] * len(examples)
        texts: list[Any] = generate(model, prepared, examples, device)
        return -scores[:, 0], [t if s else None for t, s in zip(texts, scores[:, 0].isfinite().tolist(), strict=True)]
    if prepared.task.kind == "choice":
        losses = -scores.gather(1, batch["targets"][:, None])[:, 0]
    else:
        losses = cross_entropy(scores, batch["targets"], reduction="none")
    return losses, highest(scores)


def highest(scores: Tensor) -> list[int]:
    """The class or choice with the highest of scores (B, C) in each row; NO_CLASS for a row that has none."""
    sound = ~scores.isnan().any(-1) & scores.amax(-1).isfinite()  # argmax would return the index of a NaN
    return scores.argmax(-1).masked_fill(~sound, NO_CLASS).tolist()


def generate(
    model: nn.Module, prepared: Prepared, examples: list[Encoded], device: torch.device | str = "cpu"
) -> list[str]:
    """Greedy answers to the examples' prompts, up to the task's stop text, the end of text or the length limit.

    Only the end of text is taken from the checkpoint's generation config (`plain_generation`). With virtual tokens only
    prompts of equal length are continued together, because a sliding window would count the padding between the two.
    """
    count = virtual_tokens(model)
    if count and len({len(example.ids) for example in examples}) > 1:
        answers = {}
        for length in {len(example.ids) for example in examples}:
            places = [place for place, example in enumerate(examples) if len(example.ids) == length]
            answers |= zip(
                places, generate(model, prepared, [examples[place] for place in places], device), strict=True
            )
        return [answers[place] for place in range(len(examples))]
    task, tokenizer = prepared.task, prepared.tokenizer
    batch = prepared.prompts(examples).to(device)
    start = len(prepared.start) or count + batch["input_ids"].shape[1]
    stopping = StoppingCriteriaList([_StopText(tokenizer, task.stop, start)] if task.stop else [])
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    own = inner.generation_config
    # generate() merges the model's config into any other
    inner.generation_config = plain_generation(
        inner, tokenizer, prepared.room, prepared.start[0] if prepared.start else None
    )
    try:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if count:
            tokens = generate_after_virtual_tokens(model, ids, mask, stopping_criteria=stopping)
        else:
            tokens = model.generate(input_ids=ids, attention_mask=mask, stopping_criteria=stopping)  # type: ignore[operator]
    finally:
        inner.generation_config = own
    texts = tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)
    return [(text.partition(task.stop)[0] if task.stop else text).strip() for text in texts]


class _StopText(StoppingCriteria):
    """Ends a row as soon as its newest tokens hold the stop text. start: the position of the first token of an answer."""

    def __init__(self, tokenizer: Any, stop: str, start: int):
        self.tokenizer, self.stop, self.start = tokenizer, stop, start
        self.most = len(stop.encode())  # tokens of the stop text, each of which has a byte of it

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        newest = self.tokenizer.batch_decode(input_ids[:, -1:])
        ended = [self.stop in text for text in newest]
        if self.most > 1:
            answers = input_ids[:, self.start :]
            last = self.tokenizer.batch_decode(
                answers[:, -self.most - 1 :]
            )  # with one before, whose space may be left out
            ended = [done or self._holds(row, text) for done, row, text in zip(ended, answers, last, strict=True)]
        return torch.tensor(ended, device=input_ids.device)

    def _holds(self, answer: Tensor, last: str) -> bool:
        """Whether the text that `generate` will cut at the stop text holds it. last: the end of the text, read first."""
        return self.stop in last and self.stop in self.tokenizer.decode(answer, skip_special_tokens=True)
