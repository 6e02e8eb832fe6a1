"""Three processes divide weights into unequal parts: ties, weights that are loaded, freezing, numbers of threads."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from metazo.errors import UserError
from metazo.integrations import local_parameters, resident
from metazo.optimizers import MeZO
from metazo.step.scales import RMSScale
from tests import warm

COUNT = 3
IDS = (torch.arange(20) * 53 % 131).view(2, 10)  # on all processes
ROWS = (131, 132)
"""Of the vocabulary; the processes divide the second into equal parts."""
KINDS = ("sharded", "replicated")


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


def _cut() -> tuple[str, list[float]]:
    """What is said of a model whose tie parallelize_module has cut, and its losses if the tie is made again."""
    from torch.distributed.tensor import Replicate, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    rows, columns = RowwiseParallel(input_layouts=Replicate()), ColwiseParallel(output_layouts=Replicate())
    model = _llama(ROWS[0])
    parallelize_module(model, init_device_mesh("cpu", (COUNT,)), {"model.embed_tokens": rows, "lm_head": columns})
    refused = _refused(lambda: local_parameters(model))
    model.tie_weights()
    return refused, _losses(model, local_parameters(model))


def _small(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor, init_device_mesh

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    if kind == "sharded":
        return fully_shard(model)

    def replicate(name: str, module: nn.Module, mesh: Any) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            setattr(module, key, nn.Parameter(distribute_tensor(parameter, mesh, [Replicate()])))

    return distribute_module(model, init_device_mesh("cpu", (COUNT,)), replicate)


def _whole(parameter: Any) -> torch.Tensor:
    return parameter.detach().full_tensor().clone()


def _loaded(kind: str) -> dict[str, Any]:
    """Steps with masters of bfloat16, weights that are loaded, and a step that moves nothing."""
    model = _small(kind, torch.bfloat16)
    optimizer = MeZO(local_parameters(model), lr=0.1)

    def loss() -> torch.Tensor | float:
        x = torch.ones(1, 6, dtype=torch.bfloat16)
        return model(x).float().square().mean() if kind == "sharded" else 1.0 + optimizer.forwards % 3

    wanted = {name: _whole(parameter) for name, parameter in model.named_parameters()}
    loaded = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with warnings.catch_warnings(record=True) as before:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step(loss)
    moved = not any(_whole(parameter).equal(wanted[name]) for name, parameter in model.named_parameters())
    model.load_state_dict(loaded)
    optimizer.param_groups[0]["lr"] = 0.0
    with warnings.catch_warnings(record=True) as after:
        warnings.simplefilter("always")
        optimizer.step(loss)
    kept = all(_whole(parameter).equal(wanted[name]) for name, parameter in model.named_parameters())
    count = ["changed since the last step" in "".join(str(w.message) for w in found) for found in (before, after)]
    return {"moved": moved, "kept": kept, "said": count}


def _frozen(kind: str) -> tuple[list[str], str]:
    """The tensors of an optimizer of whose weights one is frozen before the first step, and what is said of one after it."""
    model = _small(kind)
    optimizer = MeZO(local_parameters(model), check_loss=False)
    model[2].weight.requires_grad_(False)
    optimizer.step(lambda: 1.0)
    model[0].weight.requires_grad_(False)
    return [tensor.name for tensor in optimizer.tensors], _refused(lambda: optimizer.step(lambda: 1.0))


def _scaled(kind: str) -> dict[str, torch.Tensor]:
    """Statistics of block scales after steps with losses that do not depend on the weights, and the weights."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Linear(600, 500)
    parameters: Any = model.named_parameters()
    if kind == "sharded":
        parameters = local_parameters(fully_shard(model))
    optimizer = MeZO(parameters, lr=1e-3, scale=RMSScale(every=1), check_every=1, check_loss=False)
    for _ in range(3):
        optimizer.step(lambda: 1.0 + 0.1 * (optimizer.forwards * 7 % 5))
    whole = {name: _whole(p) if kind == "sharded" else p.detach() for name, p in model.named_parameters()}
    return whole | {"statistics": optimizer.zo_state["scale/statistics"]}


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    said: dict[str, Any] = {}
    for rows in ROWS:
        model = _tied(rows)
        said[f"tied {rows}"] = _losses(model, local_parameters(model))
        said[f"unknown {rows}"] = _refused(lambda model=model: resident._join_ties(model, []))
    said["cut"] = _cut()
    for kind in KINDS:
        said[f"loaded {kind}"], said[f"frozen {kind}"] = _loaded(kind), _frozen(kind)
    torch.set_num_threads(1 + 2 * (rank == 1))
    for kind in ("plain", "sharded"):
        said[f"scaled {kind}"] = _scaled(kind)
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


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_loaded_between_steps_replace_the_masters(ranks, kind):
    """Nothing is said of the optimizer's own changes."""
    assert all(said[f"loaded {kind}"] == {"moved": True, "kept": True, "said": [False, True]} for said in ranks)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_frozen_in_the_model_is_left_out_or_refused(ranks, kind):
    for said in ranks:
        names, refused = said[f"frozen {kind}"]
        assert names == ["0.weight", "0.bias", "2.bias"]
        assert refused.startswith("0.weight was frozen after the first step")


def test_a_tie_that_was_cut_is_refused_and_can_be_made_again(ranks):
    model = _llama(ROWS[0])
    wanted = _losses(model, model.named_parameters())
    for said in ranks:
        refused, losses = said["cut"]
        assert refused.startswith(
            "model.embed_tokens.weight and lm_head.weight are tied, and dividing the model has made two matrices"
        )
        assert losses == pytest.approx(wanted, rel=0, abs=2e-6)


@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_processes_with_other_numbers_of_threads_take_the_block_scales_of_the_first(ranks, kind):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    wanted = _scaled("plain")
    torch.set_num_threads(threads)
    for said in ranks:
        assert all(value.equal(said[f"scaled {kind}"][name]) for name, value in wanted.items())
