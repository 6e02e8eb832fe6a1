"""Sharded and offloaded models: the steps are those of a plain model, bit for bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from metazo.blocks import LocalShard
from metazo.errors import UserError
from metazo.integrations import local_parameters
from metazo.noise import PhiloxNoise, TorchOrderNoise
from metazo.optimizers import (
    EGGROLL,
    ES,
    FZOO,
    LOREN,
    LOZO,
    LOZOM,
    MEAZO,
    CurvZO,
    DominantLayer,
    HiZOO,
    HiZOOL,
    MeZO,
    MeZOAdam,
    MeZOSVRG,
    ZOFinetuner,
    ZOMuon,
)
from metazo.optimizers.base import ZOOptimizer
from metazo.optimizers.registry import METHODS, load
from metazo.step.scales import RMSScale
from metazo.tuner.networks import PertNN
from metazo.tuner.scale import TunerScale
from tests import warm

SHARDED: dict[str, tuple[Any, dict[str, Any]]] = {
    "mezo": (MeZO, {"weight_decay": 0.1}),
    "waiting": (MeZO, {"queries": 1}),
    "adam": (MeZOAdam, {}),
    "meazo": (MEAZO, {}),
    "es": (ES, {"population": 4}),
    "fzoo": (FZOO, {"queries": 3, "lr": 1e-5}),
    "hizoo": (HiZOO, {"smoothing": 1e-2}),
    "svrg": (MeZOSVRG, {}),
    "bfloat16": (MeZO, {"queries": 2}),
    "lozo": (LOZO, {"interval": 2, "weight_decay": 0.1}),
    "lozo waiting": (LOZO, {"interval": 2}),
    "lozo rademacher": (LOZO, {"queries": 2, "noise": "rademacher"}),
    "lozo-m": (LOZOM, {"interval": 2}),
    "eggroll": (EGGROLL, {"population": 4, "rank": 2, "probing": "in-turn"}),
    "fzoo of rank 2": (FZOO, {"queries": 3, "lr": 1e-5, "rank": 2, "probing": "in-turn"}),
    "lozo bfloat16": (LOZO, {"interval": 2}),
    "zo-muon": (ZOMuon, {"lr": 1e-2, "rank": 4, "interval": 2}),
    "hizoo-l": (HiZOOL, {"smoothing": 1e-2}),
    "hizoo-l bfloat16": (HiZOOL, {"smoothing": 1e-2}),
    "curvzo": (CurvZO, {"adapt_every": 2}),
    "curvzo by plain noise": (CurvZO, {"noise": PhiloxNoise(backend="torch")}),
    "loren": (LOREN, {"lr_cov": 0.1, "eps": 1e-2}),
    "loren bfloat16": (LOREN, {"lr_cov": 0.1, "eps": 1e-2, "momentum": 0}),
    **{f"{method.name} official": (method, {"compat": "official"}) for method in (CurvZO, FZOO, HiZOO, LOZO)},
    "dominant layer": (DominantLayer, {"layer": 1}),
    "tuner": (ZOFinetuner, {"scale": TunerScale(pertnn=PertNN(21, seed=1), every=1)}),
    "rms": (MeZO, {"scale": "rms"}),
    "rms of layers": (LOZO, {"scale": RMSScale(by="layer", every=2, embedding_rows=30)}),
    "rms bfloat16": (MeZO, {"scale": RMSScale(every=1)}),
}
EVALUATED = ("mezo", "waiting", "svrg", "lozo", "rms")  # with the losses of the model in parts
IDS = torch.arange(20).view(2, 10) % 7


def _llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Llama whose rows are cut at places that are no multiple of a tile of noise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 131, "hidden_size": 36, "intermediate_size": 75, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=False)).to(dtype).eval()


def _steps(name: str, model: nn.Module, parameters: Iterable[tuple[str, Tensor]]) -> ZOOptimizer:
    """Three steps. Probes in place leave their rounding in the weights, so that a wrong one shows without the model's loss."""
    method, options = SHARDED[name]
    optimizer = method(parameters, **{"lr": 1e-3, "check_every": 1, "check_loss": False} | options)
    optimizer.defer = "waiting" in name

    def loss() -> Tensor | float:
        if name in EVALUATED or "bfloat16" in name:
            return model(input_ids=IDS, labels=IDS).loss.float()
        return 1.0 + 0.1 * (optimizer.forwards * 7 % 5)

    optimizer.full_closure = loss
    for _ in range(3):
        optimizer.step(loss)
    optimizer.settle()
    return optimizer


def _dtype(name: str) -> torch.dtype:
    return torch.bfloat16 if "bfloat16" in name else torch.float32


def parts(model: nn.Module) -> dict[str, Tensor]:
    """What this process has of each parameter, copied; no process waits for another."""
    return {
        key: (p.to_local() if isinstance(p, DTensor) else p).detach().clone() for key, p in model.named_parameters()
    }


def entries(model: nn.Module) -> dict[str, Tensor]:
    """The places of these parts in the whole parameters, by torch's own division of tensors."""
    found = {}
    for key, p in model.named_parameters():
        whole = torch.arange(p.numel()).view(p.shape)
        if isinstance(p, DTensor):
            whole = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local()
        found[key] = whole
    return found


def _process(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh, said = init_device_mesh("cpu", (2,)), {}

    made: dict[torch.dtype, tuple[nn.Module, dict[str, Tensor]]] = {}

    def sharded(name: str) -> nn.Module:
        """One model for each dtype, with the weights of the start."""
        dtype = _dtype(name)
        if dtype not in made:
            model = _llama(dtype)
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            made[dtype] = fully_shard(model, mesh=mesh), parts(model)
        model, start = made[dtype]
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.to_local().copy_(start[key])
        return model

    for name in SHARDED:
        model = sharded(name)
        parameters = local_parameters(model)
        assert all(isinstance(parameter, LocalShard) for _, parameter in parameters)
        optimizer = _steps(name, model, parameters)
        said[name] = {"weights": parts(model), "step": optimizer.last_step.to_dict()}
    said["entries"] = entries(model)
    refused = {}
    model = sharded("mezo")
    for name, (method, options) in {
        "loren": (LOREN, {"compat": "official"}),
        "probing": (EGGROLL, {}),
        "noise": (MeZO, {"noise": TorchOrderNoise(0)}),
        "probe_ranks": (MeZO, {"probe_ranks": 2}),
    }.items():
        with pytest.raises(UserError) as raised:
            method(local_parameters(model), **options).step(lambda: 1.0)
        refused[name] = str(raised.value)
    copies = [(name, copy.deepcopy(parameter)) for name, parameter in local_parameters(model)]
    with pytest.raises(UserError) as raised:
        MeZO(copies, scale="rms").step(lambda: 1.0)
    refused["copies"] = str(raised.value)
    with pytest.raises(UserError) as raised:
        MeZO(local_parameters(sharded("bfloat16")), precision="compensated-8").step(lambda: 1.0)
    refused["compensated"] = str(raised.value)
    torch.save({**said, "refused": refused}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    warm.ranks(_process, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", SHARDED)
def test_two_shards_take_the_steps_of_the_whole_model_bit_for_bit(ranks, name):
    model = _llama(_dtype(name))
    optimizer = _steps(name, model, model.named_parameters())
    for said in ranks:
        assert said[name]["step"] == optimizer.last_step.to_dict()
    for key, parameter in model.named_parameters():
        places = [said["entries"][key] for said in ranks]
        assert torch.cat([each.flatten() for each in places]).unique().numel() == parameter.numel()
        for said, each in zip(ranks, places):
            assert parameter.flatten()[each].equal(said[name]["weights"][key]), key


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "loren": "loren computes with whole tensors",
        "probing": "`probing` together replaces calls of torch functions",
        "copies": "`scale` gathers the shards of all processes, and these are copies",
        "noise": "has no order by entry",
        "probe_ranks": "`probe_ranks` divides the probes",
        "compensated": "`precision` compensated-8 replaces weights",
    }.items(),
)
def test_what_needs_whole_tensors_is_refused(ranks, name, words):
    assert all(words in said["refused"][name] for said in ranks)


def test_every_zeroth_order_method_is_among_them():
    load()
    zeroth_order = {name for name, method in METHODS.items() if method.replayable}
    assert zeroth_order == {method.name for method, _ in SHARDED.values()} | {"mezo-momentum"}  # a rule, as adam


def test_copies_of_a_shard_know_their_place():
    places = (np.arange(2, 4), np.arange(3))
    rows = LocalShard(torch.ones(2, 3), True, places, torch.Size([4, 3]))
    for made in (copy.deepcopy(rows), pickle.loads(pickle.dumps(rows))):
        assert (made.spans.there.tolist(), made.whole, made.requires_grad) == ([6], torch.Size([4, 3]), True)
        assert made.equal(rows)


def _offloaded(kind: str, model: nn.Module, folder: Path) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    device = torch.device("cpu")
    if kind == "main memory":
        return accelerate.cpu_offload(model, execution_device=device)
    if kind == "disk":
        return accelerate.disk_offload(model, str(folder), execution_device=device)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk"}
    places |= {"lm_head": "disk", "model.rotary_emb": "cpu"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))


@pytest.mark.parametrize("dtype", ["mezo", "bfloat16"])
@pytest.mark.parametrize("kind", ["main memory", "disk", "device_map"])
def test_an_offloaded_model_takes_the_steps_of_a_plain_one_bit_for_bit(kind, dtype, tmp_path):
    model, plain = _offloaded(kind, _llama(_dtype(dtype)), tmp_path), _llama(_dtype(dtype))
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    found = _steps(dtype, model, local_parameters(model))
    wanted = _steps(dtype, plain, plain.named_parameters())
    assert found.last_step == wanted.last_step
    trained = dict(plain.named_parameters())
    assert {name for name, _ in local_parameters(model)} == trained.keys()
    assert all(value.equal(trained[name]) for name, value in local_parameters(model))
    with torch.inference_mode():
        assert model(input_ids=IDS).logits.equal(plain(input_ids=IDS).logits)


def test_tied_weights_come_once_in_main_memory_and_are_refused_on_disk(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 31, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)
    model = _offloaded("main memory", LlamaForCausalLM(config), tmp_path)
    assert [name for name, _ in local_parameters(model) if "embed" in name or "head" in name] == [
        "model.embed_tokens.weight"
    ]
    with pytest.raises(UserError, match="are tied, and on disk they are two files"):
        local_parameters(_offloaded("disk", LlamaForCausalLM(config), tmp_path))


@pytest.mark.parametrize("name", ["first-order-fused", "first-order-sgd", "answer-column", "skip-feedback"])
def test_methods_of_gradients_are_refused_for_an_offloaded_model(name, tmp_path):
    model = _offloaded("device_map", _llama(), tmp_path)
    method = METHODS[name]
    options = {"model": model} if method.needs_model else {}
    with pytest.raises(
        UserError, match=f"{name} needs gradients of the model's own parameters, and 11 of them are offl"
    ):
        method(local_parameters(model), **options).step(lambda: model(input_ids=IDS, labels=IDS).loss)


def test_a_weight_that_is_frozen_in_an_offloaded_model_is_left_out_or_refused(tmp_path):
    model = _offloaded("main memory", nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), tmp_path)
    optimizer = MeZO(local_parameters(model), lr=0.1)
    model[1].weight.requires_grad_(False)
    for _ in range(2):
        optimizer.step(lambda: model(torch.ones(1, 3)).square().mean())
    assert [tensor.name for tensor in optimizer.tensors] == ["0.weight", "0.bias", "1.bias"]
    model[0].weight.requires_grad_(False)
    with pytest.raises(UserError, match="0.weight was frozen after the first step"):
        optimizer.step(lambda: model(torch.ones(1, 3)).square().mean())


def test_a_checkpoint_is_not_changed(tmp_path):
    from accelerate.utils import OffloadedWeightsLoader

    model = _offloaded("main memory", nn.Sequential(nn.Linear(2, 2)), tmp_path)
    hook = model[0]._hf_hook
    index = {"0.weight": {"safetensors_file": "model.safetensors"}, "0.bias": {"safetensors_file": "model.safetensors"}}
    hook.weights_map.dataset = OffloadedWeightsLoader(index=index)
    with pytest.raises(
        UserError, match=r"0.weight is offloaded to the checkpoint model.safetensors, which would be changed"
    ):
        local_parameters(model)
    model.requires_grad_(False)
    assert [parameter.device.type for _, parameter in local_parameters(model)] == ["meta", "meta"]
