"""Score several answers to a prompt with one computation of the prompt.

    prompt p | a tree of the answers' beginnings       log p(a_1 ... a_n | p) for every answer, from one row of logits

The tree has a node for every beginning that is shorter than its answer; the last token of an answer is only predicted and has
none, so that answers of one token, such as letters, need no tree. A node sees the prompt, the nodes that lead to it, and itself
(tree attention: one mask instead of rows), and its position is that behind the prompt. So R answers of A tokens to B
prompts of P cost B (P + nodes) tokens, not R (P + A). Results differ from those of a row for each answer (`apart`) by rounding.

Where not to use: with models whose attention is not a function of the mask and the positions that are given, such as
sliding windows, ALiBi, recurrent layers and virtual tokens, or with many long answers. They have a row each there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from metazo.models.virtual import virtual_tokens

# Types of models whose attention is a function of the mask and the positions (tests/tasks/test_options.py has each of them)
TREES = {
    "falcon", "gemma", "gemma2", "gpt2", "gpt_neox", "gptj", "llama", "mistral", "olmo2", "opt", "phi", "phi3", "qwen2",
    "qwen3", "smollm3", "stablelm",
}  # fmt: skip
SHORT = 1024  # tokens of a prompt with its tree that are always one row
_MASKS = ("sdpa", "eager")  # implementations of attention that take any mask


class Arranged(NamedTuple):
    """A batch of prompts and answers as a model reads it.

    inputs: its arguments; keep: the number of last positions of which logits are needed; rows, read_at: the row and the place
    among these positions at which each token of an answer is predicted, broadcast to (R, A).
    """

    inputs: dict[str, Tensor]
    keep: int
    rows: Tensor
    read_at: Tensor


def trees(options: Sequence[Sequence[Sequence[int]]], pad: int) -> dict[str, Tensor]:
    """The trees of B prompts' answers; options: for each prompt its answers, each a list of tokens, R answers in all.

    Returns prompt (R,): the prompt of each answer; answer (R, A): its tokens, padded with -100 on the right; read_at (R, A):
    where a token is predicted, 0 at the end of the prompt and 1 + n at node n; and, for B trees of at most N nodes,
    node_ids (B, N), node_depths (B, N): positions behind the prompt's last token, and node_sees (B, N, N), bool. Padding of
    a tree sees itself alone. N is 0 if no answer has more than one token.
    """
    ids: list[list[int]] = []
    depths: list[list[int]] = []
    lines: list[list[list[int]]] = []  # of each node: the nodes that it sees
    read_at: list[list[int]] = []
    for answers in options:
        nodes: dict[tuple[int, ...], int] = {}
        for answer in answers:
            for length in range(1, len(answer)):
                nodes.setdefault(tuple(answer[:length]), len(nodes))
        ids.append([beginning[-1] for beginning in nodes])
        depths.append([len(beginning) for beginning in nodes])
        lines.append([[nodes[beginning[:length]] for length in range(1, len(beginning) + 1)] for beginning in nodes])
        for answer in answers:
            read_at.append([1 + nodes[tuple(answer[:length])] if length else 0 for length in range(len(answer))])
    most = max(map(len, ids))
    sees = torch.eye(most, dtype=torch.bool).repeat(len(ids), 1, 1)
    for row, line in enumerate(lines):
        for node, seen in enumerate(line):
            sees[row, node, seen] = True
    return {
        "prompt": torch.arange(len(options)).repeat_interleave(torch.tensor([len(answers) for answers in options])),
        "answer": _padded([answer for answers in options for answer in answers], -100),
        "read_at": _padded(read_at, 0),
        "node_ids": _padded(ids, pad),
        "node_depths": _padded(depths, 1),
        "node_sees": sees,
    }


def arranged(model: Any, batch: dict[str, Tensor]) -> Arranged:
    """The inputs of a model for what `trees` returns, with the prompts' input_ids, attention_mask and position_ids (B, P),
    padded on the left: one row for each prompt if the model takes its tree and it is not too large, else one for each answer.
    """
    (count, length), nodes = batch["input_ids"].shape, batch["node_ids"].shape[1]
    answers, longest = batch["answer"].shape
    # the work and the mask of attention grow with the square of a row, so long answers are better apart
    short = length + nodes <= SHORT or count * (length + nodes) ** 2 <= answers * (length + longest) ** 2
    if not nodes or (short and takes_trees(model, length + longest)):
        inputs = joined(batch, additive=model.config._attn_implementation == "eager") if nodes else prompts(batch)
        return Arranged(inputs, 1 + nodes, batch["prompt"][:, None], batch["read_at"])
    device = batch["answer"].device
    rows, places = torch.arange(answers, device=device), torch.arange(longest, device=device)
    inputs, own = apart(batch), (batch["answer"] != -100).sum(1, keepdim=True)
    keep = min(longest, inputs["input_ids"].shape[1])
    return Arranged(inputs, keep, rows[:, None], (places + keep - own.clamp(min=1)).clamp(max=keep - 1))


def takes_trees(model: nn.Module, length: int) -> bool:
    """Whether the model's attention follows any mask and any positions, in every layer, for prompts with their answers of at
    most `length` tokens.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in TREES or getattr(config, "_attn_implementation", None) not in _MASKS:
        return False
    if virtual_tokens(model) or getattr(config, "alibi", False) or getattr(config, "use_bidirectional_attention", None):
        return False
    window = getattr(config, "sliding_window", None)  # some models follow it whatever `use_sliding_window` says
    return window is None or length <= window


def prompts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prompts alone."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}


def joined(batch: dict[str, Tensor], additive: bool = False) -> dict[str, Tensor]:
    """Prompts and trees in one row each: input_ids, position_ids (B, P + N), attention_mask (B, 1, P + N, P + N).

    additive: the mask is float32, to be added to the scores of attention, instead of bool.
    """
    ids, mask, positions = prompts(batch).values()
    (rows, length), nodes = ids.shape, batch["node_ids"].shape[1]
    sees = torch.zeros(rows, length + nodes, length + nodes, dtype=torch.bool, device=ids.device)
    sees[:, :, :length] = mask[:, None].bool()
    sees[:, :length] &= torch.ones(length, length + nodes, dtype=torch.bool, device=ids.device).tril()
    sees[:, length:, length:] = batch["node_sees"]
    sees |= torch.eye(
        length + nodes, dtype=torch.bool, device=ids.device
    )  # attention over nothing is NaN, at padding as well
    sees = sees[:, None]
    if additive:
        sees = torch.zeros(sees.shape, device=ids.device).masked_fill(~sees, torch.finfo(torch.float32).min)
    return {
        "input_ids": torch.cat([ids, batch["node_ids"]], dim=1),
        "attention_mask": sees,
        "position_ids": torch.cat([positions, positions[:, -1:] + batch["node_depths"]], dim=1),
    }


def apart(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A row for each answer: input_ids, attention_mask, position_ids (R, L), padded on the left, L at most P + A - 1."""
    prompt, answer = batch["prompt"], batch["answer"]
    before = torch.cat([answer[:, 1:], answer.new_full((len(answer), 1), -100)], dim=1)  # -100 from the last token on
    before = answer.masked_fill(before == -100, -100)[:, :-1]
    mask = torch.cat([batch["attention_mask"][prompt], (before != -100).long()], dim=1)
    ids = torch.cat([batch["input_ids"][prompt], before.clamp(min=0)], dim=1)
    places = torch.arange(mask.shape[1], device=mask.device) - (before == -100).sum(1, keepdim=True)
    places = places % mask.shape[1]  # padding behind an answer goes to the front of its row
    ids, mask = ids.gather(1, places), mask.gather(1, places)
    if not mask.is_meta:  # no row is longer than the longest prompt with its own answer, which fits into the context
        longest = int(mask.sum(1).max())
        ids, mask = ids[:, -longest:], mask[:, -longest:]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value)
