"""Training with gradients: which gradients a step takes, and which it refuses."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from metazo.errors import UserError
from metazo.io import processes
from metazo.optimizers.first_order import FirstOrderAdamW, FirstOrderSGD
from metazo.optimizers.first_order_fused import FirstOrderFused
from tests.kernels.test_operations import Cut

each = pytest.mark.parametrize("cls", [FirstOrderSGD, FirstOrderAdamW])


def pair(*numbers: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(numbers))


@each
def test_a_step_takes_its_own_gradient_alone(cls) -> None:
    """Not one of another backward pass, nor that of a step which could not be recorded."""
    p, twin = pair(0.01, 0.02), pair(0.01, 0.02)
    optimizer, other = cls([("p", p)], lr=0.1), cls([("p", twin)], lr=0.1)

    def fail(step) -> None:
        raise OSError

    p.grad, optimizer.recorder = torch.full((2,), 100.0), fail
    with pytest.raises(OSError):
        optimizer.step(lambda: p.square().sum())
    assert p.grad is None
    optimizer.recorder = None
    optimizer.step(lambda: p.square().sum())
    other.step(lambda: twin.square().sum())
    assert torch.equal(p, twin)


@each
def test_a_gradient_that_is_not_finite_changes_nothing(cls) -> None:
    p = pair(0.0, 0.02)  # the root's derivative at 0 is infinite
    optimizer = cls([("p", p)], lr=0.1)
    assert math.isnan(optimizer.step(lambda: p.abs().sqrt().sum()))
    assert torch.equal(p, pair(0.0, 0.02)) and optimizer.last_step.coefficients == ()


@pytest.mark.parametrize("cls", [FirstOrderSGD, FirstOrderAdamW, FirstOrderFused])
def test_sparse_gradients_of_embeddings_are_taken(cls) -> None:
    models, ids = [], torch.tensor([1, 2, 2])
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 4, sparse=sparse), nn.Linear(4, 2))
        optimizer = cls(model.named_parameters(), lr=0.1)
        for _ in range(2):
            optimizer.step([lambda rows=rows, model=model: model(rows).square().mean() for rows in (ids, ids + 1)])
        models.append(model)
    sparse, dense = models
    for one, other in zip(sparse.parameters(), dense.parameters()):
        assert torch.allclose(one, other, atol=1e-7)


@each
def test_several_processes_are_refused(cls, monkeypatch) -> None:
    monkeypatch.setattr(processes, "together", lambda: True)
    p = pair(1.0)
    with pytest.raises(UserError, match="runs in one process"):
        cls([("p", p)], lr=0.1).step(lambda: p.sum())


@each
def test_a_loss_that_gives_no_trained_tensor_a_gradient_is_refused(cls) -> None:
    p, bias = pair(1.0), pair(1.0)
    optimizer = cls([("p", p)], lr=0.1)
    with pytest.raises(UserError, match=f"No trained tensor gets a gradient .* {cls.name} would train nothing"):
        optimizer.step(lambda: (Cut.apply(p) + bias).sum())
    assert optimizer.steps == optimizer.forwards == 0 and torch.equal(p, pair(1.0))
    optimizer = cls([("p", p), ("bias", bias)], lr=0.1)  # one of two is enough
    optimizer.step(lambda: (Cut.apply(p) + bias).sum())
    assert torch.equal(p, pair(1.0)) and not torch.equal(bias, pair(1.0))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_decay_is_decoupled(cls, dtype) -> None:
    """theta <- (1 - lr decay) theta before the update, with the step's learning rate, and not for exempt names, nor for weights
    without a gradient."""
    torch.manual_seed(0)
    names, decay = ("weight", "layer_norm.weight", "idle"), 0.5
    start = [torch.randn(6, dtype=dtype) for _ in names]
    params = {name: nn.Parameter(value.clone()) for name, value in zip(names, start)}
    target = torch.randn(6, dtype=dtype)
    optimizer, theta = cls(params.items(), lr=0.1, weight_decay=decay, clip=1e9), [value.clone() for value in start]
    first, second = ([torch.zeros_like(value) for value in start] for _ in range(2))
    for step in range(1, 9):
        lr = 0.1 / step
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step(lambda: sum((params[name] - target).square().sum() for name in names[:2]))
        for place in range(2):
            weights, gradient = theta[place], 2 * (theta[place] - target)
            if place == 0:
                weights.mul_(1 - lr * decay)
            if cls is FirstOrderSGD:
                first[place].mul_(0.9).add_(gradient)
                weights.sub_(first[place], alpha=lr)
            else:
                first[place].lerp_(gradient, 0.1)
                second[place].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                root = (second[place].sqrt() / math.sqrt(1 - 0.999**step)).add_(1e-8)
                weights.addcdiv_(first[place], root, value=-lr / (1 - 0.9**step))
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, decay]  # as logs record it
    bound = 1e-6 if dtype == torch.float32 else 0.02
    for name, expected in zip(names, theta):
        torch.testing.assert_close(params[name].data, expected, rtol=bound, atol=bound)
    assert torch.equal(params["idle"], start[2])


@each
@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 512), (torch.float16, 4096)])
def test_updates_that_narrow_weights_lose_are_said(cls, dtype, share) -> None:
    """An update of the share of a weight that is named changes some weights, and a smaller one none."""
    weights = nn.Parameter(torch.linspace(1, 2, 100).to(dtype))
    assert torch.equal(weights - 0.999 * weights.double() / share, weights.double()) is False  # in float64 none is lost
    assert torch.equal((weights.double() - 0.999 * weights.double() / share).to(dtype)[1:], weights[1:])
    assert not torch.equal((weights.double() - 2.01 * weights.double() / share).to(dtype), weights)
    optimizer = cls([("weights", weights)], lr=1e-6, precision="in-place")
    with pytest.warns(
        UserWarning, match=f"{cls.name} in place has no float32 master .* below 1/{share} of a .* is lost"
    ) as found:
        optimizer.step(lambda: weights.sum())
    assert found[0].filename == __file__ and optimizer.notes == [str(found[0].message)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(lambda: weights.sum())  # said once
        wide = cls([("weights", pair(1.0)), ("frozen", nn.Parameter(weights.data, requires_grad=False))], lr=1e-6)
        wide.step(lambda: wide.named[0][1].sum())
        kept = cls([("weights", weights)], lr=1e-6)
        kept.step(lambda: weights.sum())
    assert wide.notes == kept.notes == []


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["auto", "master"])
def test_narrow_weights_are_the_rounding_of_masters_that_torchs_optimizer_moves(cls, dtype, precision) -> None:
    """Beside torch's optimizer on float32 weights, with the gradient at their rounding; a third of the way with a loaded state,
    and with weights that somebody else changed before the last steps. Float32 weights beside them have no master."""
    torch.manual_seed(0)
    weights, wide = nn.Parameter(torch.randn(50).to(dtype)), pair(1.0)
    plain, other = nn.Parameter(weights.data.float()), pair(1.0)
    named, target = [("weights", weights), ("wide", wide)], torch.randn(50)
    made = {"lr": 1e-4, "clip": 0.5}
    optimizer = cls(named, **made, precision=precision)
    kinds = {
        FirstOrderAdamW: (torch.optim.AdamW, {"weight_decay": 0.0}),
        FirstOrderSGD: (torch.optim.SGD, {"momentum": 0.9}),
    }
    kind, options = kinds[cls]
    torchs = kind([plain, other], lr=1e-4, **options)
    for step in range(30):
        if step == 10:
            state = {name: value.clone() for name, value in optimizer.tensors_state().items()}
            optimizer = cls(named, **made, precision=precision)
            optimizer.load_tensors_state(state)
        if step == 20:
            with torch.no_grad():
                weights.mul_(0.5)
                plain.copy_(weights)
        optimizer.step(lambda: (weights.float() - target).square().sum() + wide.square().sum())
        rounded = nn.Parameter(plain.data.to(dtype))
        ((rounded.float() - target).square().sum() + other.square().sum()).backward()
        plain.grad, rounded.grad = rounded.grad.float(), None
        torch.nn.utils.clip_grad_norm_([plain, other], 0.5)
        torchs.step()
        torchs.zero_grad()
        assert torch.equal(weights.data, plain.data.to(dtype)) and torch.equal(wide, other)
        assert weights.grad is wide.grad is None
    assert torch.equal(optimizer.masters["weights"].theta, plain) and optimizer.masters.keys() == {"weights"}
    assert not torch.equal(plain.data.to(dtype).float(), plain)  # there is something below the weights


@each
def test_a_state_with_other_masters_is_refused(cls) -> None:
    weights = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with_master, without = (cls([("w", weights)], lr=0.1, precision=name) for name in ("master", "in-place"))
    for one, other, missing in ((with_master, without, "master"), (without, with_master, "in-place")):
        with pytest.raises(UserError, match=f"float32 masters of .* set `precision` to {missing}"):
            other.load_tensors_state(one.tensors_state())


@each
def test_precisions(cls) -> None:
    with pytest.raises(
        UserError, match=f"compensated-16' is none of {cls.name}'s, which has no probes: choose auto, in-p"
    ):
        cls([("p", pair(1.0))], lr=0.1, precision="compensated-16")
    with pytest.raises(UserError, match="`precision` master keeps float32, which is less"):
        cls([("p", nn.Parameter(torch.ones(2, dtype=torch.float64)))], lr=0.1, precision="master")
    with pytest.raises(UserError, match="`precision` autocast is for float32 weights"):
        cls([("p", nn.Parameter(torch.ones(2, dtype=torch.bfloat16)))], lr=0.1, precision="autocast")
    net, seen = nn.Linear(2, 1), []
    cls(net.named_parameters(), lr=0.1, precision="autocast").step(
        lambda: seen.append(net(torch.ones(1, 2))) or seen[-1].float().sum()
    )
    assert seen[0].dtype == torch.bfloat16 and net.weight.dtype == torch.float32


@each
def test_groups_and_tensors_without_names_are_refused(cls) -> None:
    model = nn.Linear(2, 1)
    groups = [{"params": list(model.named_parameters()), "lr": 0.1}]
    for params, found in (
        (groups, "parameter groups"),
        (model.parameters(), "a Parameter without a name"),
        (model, "a Linear"),
    ):
        with pytest.raises(
            UserError, match=rf"`params` of {cls.name} has {found}.*; it takes pairs of a name and a tensor"
        ):
            cls(params, lr=0.1)


@each
def test_masters_that_are_made_in_inference_mode_are_changed_outside_of_it(cls) -> None:
    weights = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with torch.inference_mode():
        optimizer = cls([("w", weights)], lr=0.1)
    optimizer.step(lambda: weights.float().sum())
    assert (weights < 1).all()


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_that_are_named_twice_count_once(cls, dtype) -> None:
    """As in state_dict(keep_vars=True); narrow ones would have two masters, of which one never moves."""
    moved = []
    for twice in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(dtype)
        net[1].weight = net[0].weight
        named = net.state_dict(keep_vars=True).items() if twice else net.named_parameters()
        optimizer = cls(named, lr=1e-2)
        for _ in range(5):
            optimizer.step(lambda net=net: net(torch.ones(3, 4, dtype=dtype)).float().square().mean())
        moved.append(net[0].weight.detach())
        assert len(optimizer.named) == 3
    assert torch.equal(*moved)


@each
def test_a_state_of_another_method_or_model_is_refused(cls) -> None:
    def taken(kind, size: int, name: str = "w"):
        weights = nn.Parameter(torch.ones(size))
        optimizer = kind([(name, weights)], lr=0.1)
        optimizer.step(lambda: weights.sum())
        return optimizer

    other = FirstOrderSGD if cls is FirstOrderAdamW else FirstOrderAdamW
    target = taken(cls, 4)
    before = {name: value.clone() for name, value in target.tensors_state().items()}
    narrow = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    narrow = cls([("w", narrow)], lr=0.1, precision="in-place")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        narrow.step(lambda: narrow.trained()[0].float().sum())
    pieces = [{key: value for key, value in before.items() if key != gone} for gone in before if len(before) > 2]
    odd = [each.tensors_state() for each in (taken(other, 4), taken(cls, 8), taken(cls, 4, "v"), narrow)]
    for state in (*odd, *pieces, {}, before | {"counters": torch.ones(1)}):
        with pytest.raises(UserError, match=f"The saved state is not of this optimizer .{cls.name}.: .* differs or is"):
            target.load_tensors_state(state)
    second = nn.Parameter(torch.ones(4))
    more = cls([("w", nn.Parameter(torch.ones(4))), ("v", second)], lr=0.1)
    with pytest.raises(UserError, match="counters differs"):
        more.load_tensors_state(before)
    assert all(torch.equal(value, before[name]) for name, value in target.tensors_state().items())


@each
def test_a_loaded_state_replaces_what_was_there(cls) -> None:
    """One from before the first step too; earlier versions saved no checksum of the names. Loaded in inference mode, it can be
    stepped on outside of it."""
    weights = nn.Parameter(torch.ones(3))
    optimizer = cls([("w", weights)], lr=0.1)
    fresh = optimizer.tensors_state()
    optimizer.step(lambda: weights.square().sum())
    once = {
        name: value[:2] if name == "counters" else value.clone() for name, value in optimizer.tensors_state().items()
    }
    optimizer.step(lambda: weights.square().sum())
    optimizer.load_tensors_state(fresh)
    assert optimizer.tensors_state().keys() == {"counters"} and optimizer.steps == 0
    with torch.inference_mode():
        optimizer.load_tensors_state(once)
    optimizer.step(lambda: weights.square().sum())
    assert optimizer.steps == 2 and optimizer.tensors_state().keys() == once.keys()


@each
def test_gradients_of_several_closures_are_added_in_float32(cls) -> None:
    """As far from the sum in float64 as each gradient's own rounding, and not as a sum in bfloat16."""
    torch.manual_seed(0)
    weights, rows = nn.Parameter(torch.zeros(200, dtype=torch.bfloat16)), torch.rand(64, 200).bfloat16()
    optimizer, seen = cls([("w", weights)], lr=0.1, clip=1e9), {}
    inner = optimizer.inner.step
    optimizer.inner.step = lambda: seen.update(it=optimizer.thetas["w"].grad.clone()) or inner()
    optimizer.step([lambda row=row: (weights * row).float().sum() for row in rows])
    assert seen["it"].dtype == torch.float32
    torch.testing.assert_close(seen["it"].double(), rows.double().mean(0), rtol=1e-6, atol=0)


@each
def test_weights_of_another_dtype_than_at_the_start_are_refused(cls) -> None:
    net = nn.Linear(2, 1)
    optimizer = cls(net.named_parameters(), lr=0.1)
    net.bfloat16()
    with pytest.raises(UserError, match="weight was float32 when the optimizer was made and is bfloat16 now"):
        optimizer.step(lambda: net(torch.ones(1, 2, dtype=torch.bfloat16)).sum())
