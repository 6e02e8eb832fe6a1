"""Probes through scratch copies work for every kind of model, write no weight, and report tensors that they cannot replace."""

from __future__ import annotations

import copy
import mmap
import pickle
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metazo.blocks import named_tensors
from metazo.errors import UserError
from metazo.optimizers import LOZO, HiZOO, MeZO
from metazo.optimizers.probing import Unseen
from metazo.step.substitute import AHEAD, HUGE, Room, Scratch, no_fast_path
from tests.optimizers.contract import IDS, llama

B16 = torch.bfloat16


def twos(group, rows):
    return [torch.full_like(tensor.param.data, 2.0) for tensor in group]


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=12, n_layer=2, n_head=2, n_positions=16)).eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=24, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    return BertForMaskedLM(config).eval()


class Encoder(nn.Module):
    """nn.TransformerEncoder takes a fast path in C++ if it can."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True, dropout=0.0)
        self.embed = nn.Embedding(24, 12)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.embed(ids))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm = nn.Embedding(24, 12), nn.LSTM(12, 12, batch_first=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lstm(self.embed(ids))[0]


class Plain(nn.Module):
    """Parameters in views, nested lists, keyword arguments and on both sides of operators."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
        self.c, self.d = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(3, 6))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = F.one_hot(ids % 6, 6).to(self.a.dtype) @ self.a.t()
        x = 2.0 * self.b * x + self.b.data
        return torch.einsum("bli,ji->blj", x, torch.cat([self.c, self.d], dim=0)) + F.linear(
            x, weight=self.a, bias=self.b
        )


def models() -> dict[str, tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]]:
    torch.manual_seed(0)
    language = lambda model: model(input_ids=IDS, labels=IDS).loss  # noqa: E731
    plain = lambda model: model(IDS).float().square().mean()  # noqa: E731
    return {
        "llama": (llama(), language),
        "llama tied": (llama(tied=True), language),
        "gpt2": (gpt2(), language),
        "bert": (bert(), language),
        "encoder": (Encoder().eval(), plain),
        "lstm": (Recurrent().eval(), plain),
        "plain": (Plain(), plain),
    }


@pytest.mark.parametrize("name", models())
def test_every_model_sees_the_probe(name):
    """The losses of compensated weights are those of weights that were moved, and the weights themselves do not change."""
    losses = {}
    for precision in ("master", "compensated-16"):
        model, loss = models()[name]
        model = model.to(B16)
        start = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer = MeZO(model.named_parameters(), lr=0.0, eps=0.05, precision=precision)
        losses[precision] = []
        for _ in range(3):
            optimizer.step(lambda: loss(model))
            losses[precision] += optimizer.last_step.losses
        assert all(torch.equal(value, start[key]) for key, value in model.state_dict().items())
    rtol = 1e-2 if name == "encoder" else 0  # its fast path rounds differently, and is off while weights are replaced
    torch.testing.assert_close(losses["master"], losses["compensated-16"], rtol=rtol, atol=0)
    assert len(set(losses["master"])) > 1


def test_one_copy_a_call_and_none_for_what_tells():
    weight = nn.Parameter(torch.ones(4, 4))
    calls: list[str] = []
    (tensor,) = named_tensors([("w", weight)])
    with Scratch(
        [tensor], lambda group, rows: [calls.append(group[0].name), [torch.full((4, 4), 2.0)]][1], []
    ) as scratch:
        assert weight.shape == (4, 4) and weight.dim() == 2 and weight.dtype == torch.float32 and weight.requires_grad
        assert weight.is_contiguous() and len(weight) == 4 and not calls and scratch.unmet() == [tensor]
        assert float(torch.stack([weight, weight]).sum()) == 64.0
        assert len(calls) == 1 and not scratch.unmet()
        assert float(weight.data.sum()) == float(weight.T.sum()) == 32.0
    assert float(weight.detach().sum()) == 16.0


def test_small_substitutes_are_made_together_in_the_order_of_the_last_evaluation():
    layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(4))
    big = nn.Linear(4, AHEAD // 16, bias=False)
    tensors = named_tensors([*((f"{k}", layer.weight) for k, layer in enumerate(layers)), ("big", big.weight)])
    names, groups = [tensor.name for tensor in tensors], []
    order: list[int] = []

    def make(group, rows):
        groups.append(" ".join(tensor.name for tensor in group))
        return [torch.full_like(tensor.param.data, 1.0 + names.index(tensor.name)) for tensor in group]

    def evaluated(*way: int) -> list[str]:
        groups.clear()
        with Scratch(tensors, make, order):
            for k in way:
                assert (([*layers, big][k])(torch.eye(4)) == 1 + k).all()
        return groups.copy()

    assert evaluated(0, 1, 2, 4, 3) == ["0", "1", "2", "big", "3"]
    assert evaluated(0, 1, 2, 4, 3) == ["0 1 2", "big", "3"]
    assert evaluated(0, 2, 1, 1, 4) == ["0 1 2", "1", "big"]  # another way; what was made ahead is used once
    assert evaluated(3, 0, 2, 1, 1) == ["3", "0", "2", "1", "1"]
    assert evaluated(3) == ["3 0 2 1"] and evaluated(3, 3) == ["3", "3"] and evaluated(3, 3) == ["3", "3"]


def test_no_two_large_substitutes_have_the_same_memory_while_both_are_in_use():
    room = Room()
    like = torch.zeros(HUGE // 256, 64, dtype=B16).T.clone(memory_format=torch.preserve_format)  # not contiguous
    for shape in (torch.cat([like, like]), like, like[:3]):  # of three sizes, the last of which is small
        one, two = room.fresh(shape).fill_(1), room.fresh(shape).fill_(2)
        assert one.shape == shape.shape and one.dtype == B16 and one.is_contiguous() and two.is_contiguous()
        assert bool((one == 1).all()) and bool((two == 2).all())
        part = one[1:, 5:]  # a view keeps the memory
        del one, two
        third = room.fresh(shape).fill_(3)
        fourth = room.fresh(shape).fill_(4)
        assert bool((part == 1).all()) and bool((third == 3).all()) and bool((fourth == 4).all())
        del part, third, fourth


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages")
def test_memory_of_large_substitutes_is_kept_and_not_copied():
    room, like = Room(), torch.zeros(HUGE // 2, dtype=B16)
    places = [room.fresh(shape).data_ptr() for shape in (like, like, like.view(2, -1))]
    assert len(set(places)) == 1
    assert copy.deepcopy(room).kept is pickle.loads(pickle.dumps(room)).kept is None


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages")
@pytest.mark.parametrize(("cls", "whole"), [(MeZO, False), (LOZO, True)])
def test_an_embedding_of_which_all_rows_are_written_is_in_the_kept_memory(monkeypatch, cls, whole):
    """The memory of the largest substitute is taken again, and no second one is beside it."""
    monkeypatch.setattr("metazo.step.substitute.HUGE", 0)
    model = nn.Embedding(64, 8).to(B16)
    optimizer = cls(model.named_parameters(), precision="compensated-8", check_loss=False)
    optimizer.step(lambda: model(torch.tensor([3, 5])).float().sum())
    assert (optimizer.weights.large.kept is not None) == whole


def test_steps_with_large_tensors_are_those_with_small_ones(monkeypatch: pytest.MonkeyPatch):
    """The same weights, with every substitute in kept memory and with none there."""
    found = []
    for least in (0, 1 << 60):
        monkeypatch.setattr("metazo.step.substitute.HUGE", least)
        model = llama().to(B16)
        optimizer = MeZO(model.named_parameters(), lr=1e-2, precision="compensated-8", check_loss=False)
        losses = [optimizer.step(lambda model=model: model(input_ids=IDS, labels=IDS).loss) for _ in range(4)]
        found.append((losses, [parameter.detach().clone() for parameter in model.parameters()]))
        copy.deepcopy(optimizer)
    assert found[0][0] == found[1][0] and all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))


def test_what_cannot_be_seen_is_told():
    model = nn.Linear(6, 6).to(B16)
    alias = model.weight.data.view(-1)  # the same memory under another name: no function is given the parameter
    optimizer = MeZO(model.named_parameters(), precision="compensated-16")
    start = model.weight.detach().clone()
    with pytest.raises(UserError, match=r"weight.*choose master"):
        optimizer.step(lambda: (alias.float().sum() + model.bias.float().sum()) ** 2)
    assert torch.equal(model.weight, start)


def test_what_is_not_used_is_no_fault():
    model, calls = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]).to(B16), []
    optimizer = MeZO(model.named_parameters(), lr=1e-3, precision="compensated-8", check_loss=False)
    start = model[1].weight.detach().clone()
    for _ in range(3):
        optimizer.step(lambda: [calls.append(0), model[0](torch.ones(1, 6, dtype=B16)).float().square().sum()][1])
        assert bool(torch.isfinite(model[1].weight).all())
    assert len(calls) == 7 and optimizer.forwards == 6  # one check
    assert torch.allclose(model[1].weight.float(), start.float(), atol=0.5)


def test_statistics_survive_the_look_for_unseen_uses():
    """It runs the model with NaN in the weights that no function was seen to use."""
    model = nn.ModuleDict(
        {"trunk": nn.Linear(6, 6), "hidden": nn.Linear(6, 6, bias=False), "norm": nn.BatchNorm1d(6)}
    ).to(B16)
    alias, x = model["hidden"].weight.data.view(6, 6), torch.randn(8, 6, dtype=B16)
    optimizer = MeZO(model.named_parameters(), precision="compensated-8", check_loss=False)
    with pytest.raises(UserError, match="choose master"):
        optimizer.step(lambda: model["norm"](model["trunk"](x) @ alias).float().square().mean())
    assert (
        all(bool(buffer.isfinite().all()) for buffer in model.buffers()) and int(model["norm"].num_batches_tracked) == 1
    )


def two_heads(dtype: torch.dtype) -> tuple[nn.ModuleDict, Callable, Callable]:
    """A trunk with two heads, a loss of the first, and one of the second, which no function is seen to use."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(6, 6, bias=False) for name in ("trunk", "seen", "hidden")}).to(dtype)
    x, alias = torch.ones(1, 6, dtype=dtype), model["hidden"].weight.data.view(6, 6)
    return (
        model,
        lambda: model["seen"](model["trunk"](x)).float().square().sum(),
        lambda: (model["trunk"](x) @ alias).float().square().sum(),
    )


def test_what_a_later_loss_hides_is_told():
    model, seen, hidden = two_heads(B16)
    optimizer = MeZO(model.named_parameters(), lr=1e-3, precision="compensated-16")
    optimizer.step(seen)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):  # as often as it is tried
        with pytest.raises(UserError, match=r"uses 1 tensors .* such as hidden.weight: choose master"):
            optimizer.step(hidden)
    assert optimizer.steps == 1 and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    optimizer.step(seen)


def test_the_way_of_a_hidden_weight_may_look_as_before():
    """Both losses are seen to use the trunk alone, so that only the looks at every EVERY-th step find the hidden weight."""
    model, _, hidden = two_heads(B16)
    optimizer, calls = MeZO(model.named_parameters(), precision="compensated-16", check_loss=False), []
    for _ in range(Unseen.EVERY):
        optimizer.step(lambda: [calls.append(0), model["trunk"](torch.ones(1, 6, dtype=B16)).float().sum()][1])
    assert len(calls) == 2 * Unseen.EVERY + 1
    with pytest.raises(UserError, match="such as seen.weight, hidden.weight"):
        optimizer.step(hidden)


def test_looks_for_hidden_weights_end_and_leave_the_generators():
    """Losses that take turns over many heads, one of which nothing uses."""
    heads = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(2 * Unseen.WAYS)]).to(B16)
    optimizer, calls = MeZO(heads.named_parameters(), precision="compensated-16", check_loss=False), []
    state = torch.get_rng_state()
    for index in range(2 * Unseen.WAYS - 1):
        optimizer.step(
            lambda: [calls.append(torch.rand(())), heads[index](torch.ones(1, 2, dtype=B16)).float().sum()][1]
        )
    assert len(calls) == optimizer.forwards + Unseen.WAYS
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    for _ in range(optimizer.forwards):
        torch.rand(())
    assert torch.equal(after, torch.get_rng_state())


def test_a_random_loss_is_no_sign_of_hidden_weights():
    model, seen, _ = two_heads(B16)
    optimizer = MeZO(model.named_parameters(), precision="compensated-16", check_loss=False)
    optimizer.step(lambda: seen() + torch.rand(()))
    assert optimizer.steps == 1


def test_a_closure_that_fails_leaves_everything():
    model = nn.Linear(6, 6).to(B16)
    optimizer = MeZO(model.named_parameters(), precision="compensated-8")
    start = model.weight.detach().clone()

    def closure():
        model(torch.ones(1, 6, dtype=B16))
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    assert torch.equal(model.weight, start) and not optimizer.weights.probe and optimizer.steps == 0
    assert torch.equal(model.weight.detach(), start) and type(model.weight) is nn.Parameter  # no substitution is active


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda layer: torch.func.grad(lambda x: layer(x).sum())])
def test_a_transform_within_the_model_is_refused_with_what_to_choose(transform):
    model, x = nn.Linear(4, 3).to(B16), torch.ones(2, 4, dtype=B16)
    optimizer = MeZO(model.named_parameters(), precision="compensated-16")
    with pytest.raises(
        UserError, match=r"replaces weight within the forward pass, which torch.func .*: choose master\.$"
    ):
        optimizer.step(lambda: transform(model)(x).sum())
    MeZO(model.named_parameters(), precision="master").step(lambda: transform(model)(x).sum())


class Named(nn.Parameter):
    """A parameter with functions of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def test_other_classes_of_tensors_are_seen_and_put_back():
    model = nn.Linear(4, 4)
    model.weight = Named(model.weight.detach())
    free = torch.ones(4, requires_grad=True)
    tensors = named_tensors([("w", model.weight), ("b", model.bias), ("free", free)])
    with Scratch(tensors, twos, []) as scratch:
        assert float((model(torch.ones(4)) + free).sum()) == 4 * 8 + 8 + 8
        assert isinstance(model.weight, Named) and not scratch.unmet()
    assert [type(tensor.param) for tensor in tensors] == [Named, nn.Parameter, torch.Tensor]


@pytest.mark.skipif(sys.platform != "linux", reason="torch.compile's eager backend is tried on Linux")
def test_a_compiled_model_sees_the_probe():
    model = nn.Linear(4, 4)
    compiled = torch.compile(model, backend="eager")
    (weight,) = named_tensors([("weight", model.weight)])
    plain = compiled(torch.ones(4))
    with Scratch([weight], twos, []):
        assert torch.equal(compiled(torch.ones(4)), 8 + model.bias)
    assert torch.equal(compiled(torch.ones(4)), plain)


def test_all_losses_of_a_step_are_of_one_way_through_torchs_own_encoder():
    """In eval mode it takes a fast path if no parameter might be replaced, and sets the outputs of padding to 0 there."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(16, 3)}).to(B16).eval()
    x, padding = torch.randn(4, 6, 16).to(B16), torch.arange(6).expand(4, 6) >= 3

    def loss() -> torch.Tensor:
        return model["head"](model["encoder"](x, src_key_padding_mask=padding).mean(1)).float().square().sum()

    optimizer = HiZOO(model.named_parameters(), lr=1e-12, eps=1e-9, precision="compensated-16")
    optimizer.step(loss)
    here, *probes = optimizer.last_step.losses
    with torch.inference_mode():
        fast = float(loss())
    assert torch.backends.mha.get_fastpath_enabled() and abs(fast - here) > 1e-3, "the two ways differ"
    assert probes == [here, here]


@pytest.mark.parametrize("on", [True, False])
def test_evaluations_that_overlap_leave_the_fast_path_as_it_was(on):
    """As those of several threads do, in which the first to begin is not the last to end."""
    mha, first, second = torch.backends.mha, no_fast_path(), no_fast_path()
    try:
        mha.set_fastpath_enabled(on)
        first.__enter__(), second.__enter__(), first.__exit__(None, None, None)
        assert not mha.get_fastpath_enabled()
        second.__exit__(None, None, None)
        assert mha.get_fastpath_enabled() is on
    finally:
        mha.set_fastpath_enabled(True)


def test_a_closure_may_copy_the_model():
    nets = [nn.Linear(8, 8).to(B16) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x, copies = torch.randn(4, 8).to(B16), []
    copied, plain = (MeZO(net.named_parameters(), lr=1e-3, precision="compensated-16") for net in nets)

    def loss() -> torch.Tensor:
        copies.append(copy.deepcopy(nets[0]))
        return copies[-1](x).float().sum()

    copied.step(loss)
    plain.step(lambda: nets[1](x).float().sum())
    assert copied.last_step == plain.last_step
    assert copies[-1](x).shape == (4, 8), "a copy is a module of its own after the step too"
