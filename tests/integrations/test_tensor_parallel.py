"""Tensor parallelism, alone and with fully_shard: the steps are those of the model that is not sharded, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

import metazo
from metazo.blocks import LocalShard
from metazo.errors import UserError
from metazo.integrations import local_parameters
from metazo.optimizers import LOREN, MeZO
from metazo.optimizers.base import ZOOptimizer
from tests import warm
from tests.integrations.test_resident import SHARDED, entries, parts

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
    pytest.skip("models in parts need transformers 5.23", allow_module_level=True)

COUNT = 4
"""Processes; two of them for tensor parallelism if the others are for fully_shard."""
LAYOUTS = dict.fromkeys(("torch", "torch and fully_shard", "transformers", "transformers and fully_shard"), COUNT)
LAYOUTS |= {"torch by two": 2}
"""The processes of each layout."""
ALL = "torch by two"  # the layout in which every method takes its steps
IDS = torch.arange(20).view(2, 10) % 7
METHODS = SHARDED | {"rademacher": (MeZO, {"noise": "rademacher", "queries": 2})}
FEW = ("mezo", "rademacher", "lozo")  # in the other layouts


def _scripted(probe: int) -> float:
    """A loss that does not depend on the weights, so that every layout gets the same."""
    return 1.0 + 0.1 * (probe * 7 % 5)


def _whole(folder: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _sharded(layout: str, folder: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of the folder, divided over the processes."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if layout.startswith("transformers"):
        from transformers import AutoModelForCausalLM
        from transformers.distributed import DistributedConfig

        sizes = {"tp_size": 2, "fsdp_size": 2} if "fully_shard" in layout else {"tp_size": COUNT}
        config = DistributedConfig(**sizes)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=config).eval()
    both = "fully_shard" in layout
    sizes = (2, 2) if both else (1, LAYOUTS[layout])
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("fsdp", "tp"))
    model = _whole(folder, dtype)
    columns, rows = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())
    plan = {"model.embed_tokens": columns if both else rows, "lm_head": columns}
    for k in range(len(model.model.layers)):
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up"):
            plan[f"model.layers.{k}.{part}_proj"] = ColwiseParallel()
        for part in ("self_attn.o", "mlp.down"):
            plan[f"model.layers.{k}.{part}_proj"] = RowwiseParallel()
    parallelize_module(model, mesh["tp"], plan)
    if both:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["fsdp"])
        fully_shard(model, mesh=mesh["fsdp"])
    return model


def _gathered(model: nn.Module) -> dict[str, Tensor]:
    pairs = model.named_parameters()
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for name, p in pairs}  # type: ignore[operator]


def _optimizer(name: str, parameters: Any) -> ZOOptimizer:
    method, options = METHODS[name]
    optimizer = method(parameters, **{"lr": 1e-3, "check_loss": False} | options)
    optimizer.defer = "waiting" in name
    return optimizer


def _take(optimizer: ZOOptimizer, steps: int, after: Callable[[], object] = lambda: None) -> None:
    """Steps with scripted losses; `after` is called at each probe."""

    def loss() -> float:
        after()
        return _scripted(optimizer.forwards)

    optimizer.full_closure = loss
    for _ in range(steps):
        optimizer.step(loss)
    optimizer.settle()


def _steps_of(name: str, model: nn.Module, parameters: Any) -> dict[str, Any]:
    """Three steps: the weights after the last, for some methods those at the first probe, and the last record."""
    probed = [{}] if name not in FEW else []
    optimizer = _optimizer(name, parameters)
    _take(optimizer, 3, lambda: probed or probed.append(parts(model)))
    return {"probed": probed[0], "weights": parts(model), "step": optimizer.last_step.to_dict()}


def _trained(model: nn.Module, parameters: Any) -> dict[str, Any]:
    """Two steps of MeZO on the model's own loss."""
    optimizer, losses = MeZO(parameters, lr=1e-3, check_loss=False), []
    for _ in range(2):
        optimizer.step(lambda: model(input_ids=IDS, labels=IDS).loss)
        losses += optimizer.last_step.losses
    return {"losses": losses, "weights": _gathered(model)}


def _dtype(name: str) -> torch.dtype:
    return torch.bfloat16 if "bfloat16" in name else torch.float32


def _resumed(rank: int, model: nn.Module) -> dict[str, Any]:
    """Two steps, saved, and two more by a new optimizer; and what is said of the state of another process."""
    optimizer = _optimizer("adam", local_parameters(model))
    _take(optimizer, 2)
    states: list[Any] = [None] * COUNT
    dist.all_gather_object(states, optimizer.state_dict())
    again = _optimizer("adam", local_parameters(model))
    with pytest.raises(UserError) as raised:
        again.load_state_dict(states[(rank + 1) % COUNT])
    again.load_state_dict(states[rank])
    _take(again, 2)
    return {"weights": _gathered(model), "refused": str(raised.value)}


def _refused(folder: str) -> dict[str, str]:
    from torch.distributed.tensor import DTensor, Partial, Shard, init_device_mesh

    model, said = _sharded("torch", folder), {}
    mesh = init_device_mesh("cpu", (COUNT,))
    partial, odd, plain = nn.Linear(4, 8), nn.Linear(4, 8), _whole(folder)
    partial.weight = nn.Parameter(DTensor.from_local(torch.ones(8, 4), mesh, [Partial()]))
    odd.weight = nn.Parameter(DTensor.from_local(torch.ones(4, 2).t(), mesh, [Shard(0)]))
    plain._tp_size = COUNT  # as transformers 5.0 leaves it
    plain._tp_plan = {"model.layers.*.self_attn.o_proj": "rowwise"}
    cases: dict[str, Callable[[], object]] = {
        "DTensor": lambda: MeZO(model.named_parameters()).step(lambda: 1.0),
        "loren": lambda: LOREN(local_parameters(model), compat="official").step(lambda: 1.0),
        "partial": lambda: local_parameters(partial),
        "odd": lambda: local_parameters(odd),
        "plain": lambda: local_parameters(plain),
    }
    rows = [{"input_ids": IDS, "labels": IDS}]
    cases["run"] = lambda: metazo.finetune(model, loss=lambda net, batch: net(**batch).loss, data=rows, steps=1)
    moved = MeZO(local_parameters(model))
    cases["moved"] = lambda: (model.double(), moved.step(lambda: 1.0))
    cases["frozen"] = lambda: local_parameters(partial.requires_grad_(False))
    local = nn.Linear(4, 2, bias=False)  # a part that nothing tells from a whole
    local.weight.data.fill_(dist.get_rank())
    cases["unknown"] = lambda: MeZO(local.named_parameters()).step(lambda: 1.0)
    for name, call in cases.items():
        try:
            call()
            said[name] = "accepted"
        except UserError as error:
            said[name] = str(error)
    return said


def _process(rank: int, folder: str, count: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    said: dict[Any, Any] = {}
    for layout in (layout for layout, processes in LAYOUTS.items() if processes == count):
        model = _sharded(layout, folder)
        parameters = dict(local_parameters(model))
        start = {name: parameter.detach().clone() for name, parameter in parameters.items()}

        def again() -> dict[str, nn.Parameter]:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(start[name])
            return parameters

        said["shards of", layout] = [name for name, p in parameters.items() if isinstance(p, LocalShard)]
        said["entries of", layout] = entries(model)
        said["trained", layout] = _trained(model, parameters.items())
        for name in FEW if layout != ALL else [name for name in METHODS if "bfloat16" not in name]:
            said[layout, name] = _steps_of(name, model, again().items())
        if layout == "transformers":
            model.save_pretrained(f"{folder}/saved")
        if layout == ALL:
            for name in (name for name in METHODS if "bfloat16" in name):
                narrow = _sharded(layout, folder, torch.bfloat16)
                said[layout, name] = _steps_of(name, narrow, local_parameters(narrow))
        if layout == "torch and fully_shard":
            again()
            said["resumed"] = _resumed(rank, model)
        if layout == "torch":
            said["refused"] = _refused(folder)
    torch.save(said, f"{folder}/{rank}-of-{count}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama whose vocabulary no number of processes divides, with rows of no tile's length."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 131, "hidden_size": 36, "intermediate_size": 76, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, head_dim=8, tie_word_embeddings=False)
    path = tmp_path_factory.mktemp("tensor-parallel")
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def ranks(folder: str) -> dict[str, list[dict[Any, Any]]]:
    """What each process has said, by layout."""
    said = {}
    for count in set(LAYOUTS.values()):
        warm.ranks(_process, folder, count, count=count)
        said[count] = [torch.load(f"{folder}/{rank}-of-{count}.pt", weights_only=True) for rank in range(count)]
    return {layout: said[count] for layout, count in LAYOUTS.items()}


@pytest.fixture(scope="module")
def unsharded(folder: str) -> dict[str, dict[str, Any]]:
    found = {}
    for name in METHODS:
        model = _whole(folder, _dtype(name))
        found[name] = _steps_of(name, model, model.named_parameters())
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_probes_and_steps_are_those_of_the_whole_model_bit_for_bit(ranks, unsharded, layout):
    names = [name for name in METHODS if (layout, name) in ranks[layout][0]]
    assert set(names) == set(METHODS if layout == ALL else FEW)
    for said in ranks[layout]:
        assert {"model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"} <= set(said["shards of", layout])
        for name in names:
            found, wanted = said[layout, name], unsharded[name]
            assert found["step"] == wanted["step"], name
            for kind in ("probed", "weights"):
                for key, value in wanted[kind].items():
                    assert value.flatten()[said["entries of", layout][key]].equal(found[kind][key]), (name, kind, key)
    for key, value in unsharded[names[0]]["weights"].items():
        places = [said["entries of", layout][key].flatten() for said in ranks[layout]]
        assert torch.cat(places).unique().numel() == value.numel()


def test_transformers_saves_whole_tensors(ranks, unsharded, folder):
    saved = dict(_whole(f"{folder}/saved").named_parameters())
    assert all(value.equal(saved[key]) for key, value in unsharded[FEW[-1]]["weights"].items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_of_a_model_in_parts_are_those_of_the_whole_model(ranks, folder, layout):
    """They differ in the order of the sums within matrix products alone, and all processes have the same ones."""
    model = _whole(folder)
    wanted = _trained(model, model.named_parameters())
    for said in ranks[layout]:
        found = said["trained", layout]
        assert found["losses"] == ranks[layout][0]["trained", layout]["losses"]
        assert found["losses"] == pytest.approx(wanted["losses"], rel=0, abs=2e-6)
        for key, value in wanted["weights"].items():
            torch.testing.assert_close(found["weights"][key], value, rtol=0, atol=1e-5)


def test_a_saved_state_goes_on_bit_for_bit_and_is_of_one_process(ranks, folder):
    model = _whole(folder)
    optimizer = _optimizer("adam", model.named_parameters())
    _take(optimizer, 2)
    _take(optimizer, 2)
    for said in ranks["torch and fully_shard"]:
        for key, value in _gathered(model).items():
            assert said["resumed"]["weights"][key].equal(value)
        assert said["resumed"]["refused"].startswith("The saved state is of other shards of the weights")


def test_places_are_those_of_torch():
    """In one process, at each place of a mesh of six that do not communicate: a tensor of its own indices is divided."""
    from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    layouts = [[Replicate(), Shard(1)], [Shard(-1), Replicate()]]
    layouts += [[Shard(a), Shard(b)] for a in range(3) for b in range(3)]
    layouts += [[_StridedShard(a, split_factor=3), Shard(b)] for a in range(3) for b in range(3)]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=6)
    try:
        meshes = [DeviceMesh("cpu", torch.arange(6).roll(place).view(2, 3)) for place in range(6)]
        for mesh, shape, layout in product(meshes, ((7, 5, 11), (12, 18, 6), (1, 2, 3)), layouts):
            module = nn.Module()
            whole = torch.arange(float(math.prod(shape))).view(shape)
            module.weight = nn.Parameter(distribute_tensor(whole, mesh, layout, src_data_rank=None))
            ((_, local),) = local_parameters(module)
            assert isinstance(local, LocalShard)
            lengths = zip(local.spans.there.tolist(), np.diff(local.spans.here).tolist())
            assert [n for first, length in lengths for n in range(first, first + length)] == local.flatten().tolist()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "DTensor": "or tensor parallelism pass metazo.integrations.local_parameters(model)",
        "loren": "loren computes with whole tensors",
        "partial": "only shards and replicas on the processes of the mesh can be trained",
        "odd": "in another order than",
        "plain": "use transformers 5.23 or later, whose parts are DTensors, or freeze it",
        "run": "`model` is sharded over processes (model.embed_tokens.weight is a DTensor)",
        "frozen": "accepted",
        "moved": "model.embed_tokens.weight has moved to other memory since local_parameters(model) was called",
        "unknown": "1 of 1 trained tensors have other values, the first is weight",
    }.items(),
)
def test_what_is_not_known_or_needs_whole_tensors_is_refused(ranks, name, words):
    assert all(words in said["refused"][name] for said in ranks["torch"])
