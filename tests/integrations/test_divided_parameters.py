"""Three processes divide weights into unequal parts: ties, weights that are loaded, freezing, numbers of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from metazo.errors import UserError
from metazo.integrations import local_parameters, resident
from metazo.optimizers import MeZO
from tests import warm

COUNT = 3
IDS = (torch.arange(20) * 53 % 131).view(2, 10)  # on all processes
ROWS = (131, 132)
"""Of the vocabulary; the processes divide the second into equal parts."""


def _llama(rows: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": rows, "hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=3, tie_word_embeddings=True)).eval()


def _losses(model: nn.Module, parameters: Any) -> list[float]:
    optimizer, losses = MeZO(parameters, lr=1e-2), []
    for _ in range(3):
        optimizer.step(lambda: model(input_ids=IDS, labels=IDS).loss)
        losses += optimizer.last_step.losses
    return losses


def _tied(rows: int) -> nn.Module:
    """As transformers loads it: divided first, with a head of its own, and then tied."""
    from torch.distributed.fsdp import fully_shard

    model = _llama(rows)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    for module in (model.model.embed_tokens, model.lm_head, model):
        fully_shard(module)
    model.tie_weights()
    return model


def _refused(call: Any) -> str:
    try:
        call()
        return "accepted"
    except UserError as error:
        return str(error)


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    said: dict[str, Any] = {}
    for rows in ROWS:
        model = _tied(rows)
        said[f"tied {rows}"] = _losses(model, local_parameters(model))
        said[f"unknown {rows}"] = _refused(lambda model=model: resident._join_ties(model, []))
    torch.save(said, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("divided-parameters")
    warm.ranks(_process, str(folder), count=COUNT)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(COUNT)]


@pytest.mark.parametrize("rows", ROWS)
def test_a_tied_weight_has_the_losses_of_the_whole_model(ranks, rows):
    model = _llama(rows)
    wanted = _losses(model, model.named_parameters())
    assert all(said[f"tied {rows}"] == wanted for said in ranks)


def test_a_tied_weight_is_refused_if_torch_does_not_show_where_it_gathers_unequal_parts(ranks):
    for said in ranks:
        assert said["unknown 131"].startswith(
            "model.embed_tokens.weight is tied, its 131 rows are divided into unequal parts"
        )
        assert said["unknown 132"] == "accepted"
