"""The decoder's side of an encoder-decoder (T5, BART): its first token, the tokens of an answer, and the logits of a batch.

The encoder reads the prompt as the tokenizer writes it, with its special tokens. The decoder reads the answer one position late
(teacher forcing), after the model's own first token, and gives the logits of the answer's tokens:

    decoder reads     start   a_1   a_2   ...   a_(n-1)
    and predicts      a_1     a_2   a_3   ...   a_n

An answer that is generated is trained with the special tokens that the tokenizer puts around a target text, as transformers
trains it: `</s>` for T5, `<s>` and `</s>` for BART. Label words and choices are compared without an end of text, as in a causal
model, and special tokens before them belong to the start, so that they are read and not scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from metazo.errors import UserError
from metazo.models.tokenizer import marks
from metazo.tasks.task import Task


def decoder_start(model: Any, name: str) -> int:
    """The token that the decoder reads first: decoder_start_token_id of the model's configuration, or what its own shift puts
    before an answer. Raises UserError if there is none."""
    inner = getattr(model, "get_base_model", lambda: model)()
    start = getattr(inner.config, "decoder_start_token_id", None)
    if not isinstance(start, int):
        shift = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
        try:
            tokens = {int(shift(labels=torch.tensor([[token]]))[0, 0]) for token in (3, 4)} if shift else set()
        except (ValueError, TypeError, AttributeError):  # it asks the configuration
            tokens = set()
        start = tokens.pop() if len(tokens) == 1 else None  # two: it follows the answer
    if start is None:
        raise UserError(
            f"the decoder of {name} has no first token of its own: its configuration has no decoder_start_token_id; set it in "
            "config.json"
        )
    return start


class Decoder:
    """The tokens that the decoder reads and predicts, for one task and model.

    start: tokens that the decoder reads before the answer; they are not scored. room: most tokens of a generated answer, its
    special tokens included.
    """

    def __init__(self, task: Task, model: Any, tokenizer: Any, name: str, limit: int):
        self.tokenizer, self.generated = tokenizer, task.kind == "generation"
        self.stop = task.stop or ""
        self.before, after = marks(tokenizer, "text_target")
        self.after = after or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
        self.start = [decoder_start(model, name), *([] if self.generated else self.before)]
        self.room = min(task.max_new_tokens, limit - 1)

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text_target=text, add_special_tokens=False, verbose=False)["input_ids"])

    def tokens(self, text: str) -> list[int]:
        """Tokens of an answer to predict; none for a blank label word or choice."""
        if not self.generated:
            return self._plain(text) if text.strip() else []
        # the end of text ends an answer; a stop text does only if there is no such token
        return [*self.before, *self._plain(text if self.after else text + self.stop), *self.after]


def decoder_inputs(start: Sequence[int], options: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """decoder_input_ids (R, S + A - 1) and answer (R, A), padded on the right, for R answers of at most A tokens after S
    tokens of the start; without an answer (A = 0) the decoder reads the start alone.

    The decoder needs no mask: padding comes after every token that is scored, and a decoder reads no later token.
    """
    rows = [torch.tensor([*start, *option[:-1]]) for option in options]
    inputs = {"decoder_input_ids": pad_sequence(rows, batch_first=True, padding_value=pad)}
    if any(options):
        answers = [torch.tensor(option, dtype=torch.long) for option in options]
        inputs["answer"] = pad_sequence(answers, batch_first=True, padding_value=-100)
    return inputs


def decoder_logits(model: nn.Module, batch: dict[str, Tensor], keep: int) -> Tensor:
    """Logits (R, keep, V) of the decoder's last positions, for R answers to B prompts.

    The encoder reads every prompt once: if the batch has "prompt" (R,), the number of each answer's prompt, its output is
    repeated for the answers.
    """
    network: Any = model
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if "prompt" in batch:
        read = network.get_encoder()(**inputs)
        hidden = read.last_hidden_state  # on another device than the batch, if a device map says so
        read["last_hidden_state"] = hidden[batch["prompt"].to(hidden.device)]
        inputs = {"encoder_outputs": read, "attention_mask": inputs["attention_mask"][batch["prompt"]]}
    return network(**inputs, decoder_input_ids=batch["decoder_input_ids"], use_cache=False).logits[:, -keep:]
