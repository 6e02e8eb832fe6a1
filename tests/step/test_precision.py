"""Precision policies: the accuracy of theta, the tensors that probing may change, refusals, and the committed measurement."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from metazo.errors import UserError
from metazo.kernels.splitfloat import dither, join, plain_join, plain_split, split
from metazo.noise import TorchOrderNoise
from metazo.optimizers import METHODS, MeZO
from metazo.step.precision import POLICIES, cost, drift, policy
from tests.optimizers.contract import IDS, NAMES, case, llama, make, quadratic, take

NARROW = [torch.bfloat16, torch.float16]
narrow = pytest.mark.parametrize("dtype", NARROW)
COMPENSATED = ["compensated-16", "compensated-8"]


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """Float32 numbers of all sizes that the type can represent, zeros of both signs and powers of two with their neighbours."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(20000, generator=generator) * torch.logspace(-4, 3, 20000)
    powers = torch.tensor([2.0**k for k in range(-13, 14)])
    edges = torch.cat([powers, torch.nextafter(powers, torch.tensor(0.0)), torch.tensor([0.0, -0.0])])
    return torch.cat([spread[spread.abs() > 2.0**-14] if dtype == torch.float16 else spread, edges, -edges])


@narrow
def test_sixteen_bits_lose_nothing(dtype):
    theta = numbers(dtype)
    weights, low = torch.empty_like(theta, dtype=dtype), torch.empty_like(theta, dtype=torch.int16)
    split(theta.clone(), weights, low, 0, 0)
    assert torch.equal(join(weights, low), theta)
    nearest = (weights.float() - theta).abs() <= (theta.to(dtype).float() - theta).abs()
    assert bool(nearest.all())


@narrow
@pytest.mark.parametrize("low_dtype", [torch.int16, torch.int8])
@pytest.mark.parametrize("threads", [1, 3])
def test_compiled_forms_are_the_plain_ones_to_the_last_bit(dtype, low_dtype, threads):
    """On every pattern of a narrow type, infinities and NaN among them, and with a length that is divided among threads."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    generator, count = torch.Generator().manual_seed(0), 600_001
    weights = every.repeat(count // len(every) + 1)[:count].view(dtype)
    low = torch.randint(-(1 << 15), 1 << 15, (count,), generator=generator).to(low_dtype)
    bits = torch.randint(-(1 << 31), 1 << 31, (count,), generator=generator).to(torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        theta = join(weights, low)
        assert torch.equal(theta.view(torch.int32), plain_join(weights, low).view(torch.int32))
        for source in (theta, bits.view(torch.float32)):
            found, kept = torch.empty_like(weights), torch.empty_like(low)
            plain, rest = torch.empty_like(weights), torch.empty_like(low)
            split(source.clone(), found, kept, 2**31 - 1000, 2**62 + 12345)
            plain_split(source.clone(), plain, rest, 2**31 - 1000, 2**62 + 12345)
            assert torch.equal(found.view(torch.int16), plain.view(torch.int16)) and torch.equal(kept, rest)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("low_dtype", [torch.int16, torch.int8])
def test_float16_beyond_its_range_is_infinite(low_dtype):
    """Its exponent went into the sign bit, and 1e6 became -0.0002."""
    theta = torch.tensor([65519.0, 65520.0, 7e4, -1e6, 1e38, math.inf, -math.inf, math.nan])
    for form in (split, plain_split):
        weights, low = torch.empty_like(theta, dtype=torch.float16), torch.empty_like(theta, dtype=low_dtype)
        form(theta.clone(), weights, low, 0, 0)
        assert torch.equal(weights[:-1], theta[:-1].half()) and not bool(weights[-1].isfinite())
        kept = join(weights, low).half()  # as a probe gives it to the model
        assert torch.equal(kept[:-1], weights[:-1]) and not bool(kept[-1].isfinite())


def test_small_float16_keeps_37_binary_places():
    theta = torch.linspace(-6e-5, 6e-5, 10001)
    weights, low = torch.empty_like(theta, dtype=torch.float16), torch.empty_like(theta, dtype=torch.int16)
    split(theta.clone(), weights, low, 0, 0)
    assert float((join(weights, low) - theta).abs().max()) <= 2.0**-38


@pytest.mark.parametrize("precision", ["compensated-16", "compensated-8"])
def test_a_thread_that_flushes_is_refused_before_it_loses_weights(precision):
    """At learning rate 0 a step made nearly all of them 0."""
    layer = nn.Linear(16, 16).half()
    layer.weight.data.mul_(1e-4)
    optimizer = MeZO(layer.named_parameters(), lr=0.0, precision=precision)
    before = layer.weight.detach().clone()
    torch.set_flush_denormal(True)
    try:
        with pytest.raises(UserError, match=r"below 6.1e-5.*call torch.set_flush_denormal\(False\), or choose master"):
            optimizer.step(lambda: layer.weight.float().sum())
        for dtype, kind in ((torch.float16, "master"), (torch.bfloat16, precision)):
            other = nn.Linear(16, 16).to(dtype)
            MeZO(other.named_parameters(), precision=kind).step(lambda other=other: other.weight.float().sum())
    finally:
        torch.set_flush_denormal(False)
    optimizer.step(lambda: layer.weight.float().sum())
    assert torch.equal(layer.weight, before)


@narrow
def test_eight_bits_are_right_on_average(dtype):
    """Against the same split in float64 arithmetic: within one unit, exact if nothing is lost, unbiased."""
    theta = torch.full((200_000,), 0.0123456789)
    weights, low = torch.empty_like(theta, dtype=dtype), torch.empty_like(theta, dtype=torch.int8)
    split(theta.clone(), weights, low, 0, 7)
    kept = join(weights, low)
    unit = torch.finfo(dtype).eps * 2.0**-7 * 2.0**-8  # of numbers in [2^-7, 2^-6)
    assert set(((kept - theta).double() / unit).round(decimals=3).abs().le(1).tolist()) == {True}
    assert abs(float((kept.double() - theta.double()).mean())) < 4 * 0.5 * unit / 200_000**0.5
    again, lower = torch.empty_like(weights), torch.empty_like(low)
    split(kept.clone(), again, lower, 0, 8)
    assert torch.equal(again, weights) and torch.equal(lower, low)


def test_dither_is_uniform_and_of_the_element():
    whole = dither(0, 1 << 16, 5, 8)
    assert torch.equal(whole[1000:1100], dither(1000, 100, 5, 8))
    counts = torch.bincount(whole, minlength=256).double()
    assert float(((counts - 256) ** 2 / 256).sum()) < 255 + 5 * (2 * 255) ** 0.5
    other = dither(0, 1 << 16, 6, 8)
    assert abs(float(torch.corrcoef(torch.stack([whole, other]).double())[0, 1])) < 5 / 256


def test_policies():
    assert policy("auto", torch.float32) == policy("auto", torch.float64) == "in-place"
    assert policy("auto", torch.bfloat16) == policy("auto", torch.float16) == "master"
    assert policy("compensated-8", torch.float32) == "in-place"
    with pytest.raises(UserError, match="autocast"):
        policy("autocast", torch.bfloat16)
    with pytest.raises(UserError, match="compensated-8"):
        policy("half", torch.float32)
    words, more = cost("compensated-8", [torch.empty(10, dtype=torch.bfloat16), torch.empty(5)])
    assert more == 10 and "compensated-8" in words and "in-place" in words


@pytest.mark.parametrize("precision", ["master", *COMPENSATED])
@narrow
def test_the_table_of_costs_is_what_is_kept(precision, dtype):
    model = nn.Linear(64, 32, dtype=dtype)
    optimizer = MeZO(model.named_parameters(), precision=precision)
    state = optimizer.tensors_state()
    kept = sum(value.numel() * value.element_size() for name, value in state.items() if name != "counters")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert kept == POLICIES[precision].bytes * count == cost(precision, model.parameters())[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", COMPENSATED)
def test_weights_rest_while_they_are_probed(name, precision):
    problem = quadratic(torch.bfloat16)
    start, values = problem.copies(), []
    optimizer = make(name, problem.named(), 0.0, precision=precision)

    def closure():
        assert all(torch.equal(memory, s) for memory, s in zip(memories, start))
        values.append(float(problem()))
        return values[-1]

    # views of the memory are not parameters, so that functions get no substitute for them
    memories = [p.data.view(-1).as_strided(p.shape, p.stride()) for p in problem.parameters()]
    for _ in range(20):
        take(optimizer, closure)
    assert all(torch.equal(p, s) for p, s in zip(problem.parameters(), start))
    assert len(set(values)) > 10


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", COMPENSATED)
def test_compensated_runs_resume_and_replay(name, precision):
    def start():
        problem = quadratic(torch.bfloat16)
        return problem, make(name, problem.named(), case(name).quadratic, precision=precision)

    problem, optimizer = start()
    records = []
    for step in range(8):
        if step == 4:
            held = {key: value.clone() for key, value in optimizer.tensors_state().items()}
            weights = problem.state_dict()
            twin, other = start()
            twin.load_state_dict(weights)
            other.load_tensors_state(held)
        take(optimizer, problem)
        records.append(optimizer.last_step)
        if step >= 4:
            take(other, twin)
    again, replayed = start()
    for record in records:
        take(replayed, None, replay=record)
    for a, b, c in zip(problem.parameters(), twin.parameters(), again.parameters()):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert any(not torch.equal(p, s) for p, s in zip(problem.parameters(), quadratic(torch.bfloat16).parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_that_were_loaded_between_steps_are_gone_on_from(dtype):
    """By load_state_dict, after which a master was written over them; a checkpoint of the same weights keeps its bits."""

    def build() -> tuple[nn.Module, MeZO]:
        torch.manual_seed(0)
        module = nn.Linear(4, 2).to(dtype)
        return module, MeZO(module.named_parameters(), lr=1e-3, seed=1)

    x = torch.ones(3, 4, dtype=dtype)
    module, optimizer = build()

    def loss():
        return module(x).float().square().mean()

    optimizer.step(loss)
    theta = {name: place.theta.clone() for name, place in optimizer.weights.storage.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.load_state_dict({name: tensor.clone() for name, tensor in module.state_dict().items()})
        optimizer.weights.follow()
    assert all(torch.equal(theta[name], place.theta) for name, place in optimizer.weights.storage.items())
    module.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in module.state_dict().items()})
    with pytest.warns(UserWarning, match="begin anew") if dtype == torch.bfloat16 else nullcontext():
        value = optimizer.step(loss)
    assert value < 1e-4
    assert max(float(p.abs().max()) for p in module.parameters()) < 1e-3


def test_sixteen_bits_take_the_steps_of_a_master():
    ends = []
    for precision in ("master", "compensated-16"):
        model = llama(tied=True).to(torch.bfloat16)
        optimizer = MeZO(model.named_parameters(), lr=1e-3, precision=precision)
        for _ in range(5):
            optimizer.step(lambda: model(input_ids=IDS, labels=IDS).loss)
        (first, *_) = [theta.clone() for _, theta in optimizer.weights.read(optimizer.tensors[0])]
        ends.append((optimizer.last_step, first.flatten()))
    (a, theta), (b, other) = ends
    assert a.seeds == b.seeds
    torch.testing.assert_close(a.losses, b.losses, rtol=1e-2, atol=0)
    torch.testing.assert_close(theta, other, rtol=1e-2, atol=1e-4)


def test_narrow_weights_beside_wide_ones():
    model = llama().to(torch.bfloat16)
    model.model.norm.float()
    optimizer = MeZO(model.model.named_parameters(), lr=1e-3, precision="compensated-16")
    optimizer.step(lambda: model.model(input_ids=IDS).last_hidden_state.float().square().mean())
    assert sum(key.startswith("compensation/") for key in optimizer.tensors_state()) == len(optimizer.tensors) - 1


def test_a_compensation_of_wide_weights_is_refused_and_its_logs_replay():
    """Earlier versions took it and perturbed float32 weights in place, so that their logs replay."""
    first, second, plain = (nn.Linear(8, 8) for _ in range(3))
    for model in (second, plain):
        model.load_state_dict(first.state_dict())
    one, two = (
        MeZO(model.named_parameters(), lr=1e-2, precision=precision)
        for model, precision in ((second, "compensated-8"), (plain, "auto"))
    )
    with pytest.raises(UserError, match="`precision` compensated-8 keeps bits .* the trained weights are float32"):
        one.step(lambda: second(torch.ones(1, 8)).square().sum())
    assert torch.equal(second.weight, first.weight) and one.steps == 0
    two.step(lambda: plain(torch.ones(1, 8)).square().sum())
    one.step(replay=two.last_step)
    torch.testing.assert_close(second.weight, plain.weight)
    assert not torch.equal(second.weight, first.weight)


def test_autocast_is_for_the_forward_alone():
    model, seen = nn.Linear(8, 8), []
    optimizer = MeZO(model.named_parameters(), lr=1e-3, precision="autocast", check_loss=False)

    def closure():
        out = model(torch.ones(2, 8))
        seen.append(out.dtype)
        return out.float().square().mean()

    optimizer.step(closure)
    assert seen == [torch.bfloat16] * 2 and model.weight.dtype == torch.float32
    with pytest.raises(UserError, match="autocast"):
        MeZO(nn.Linear(2, 2, dtype=torch.bfloat16).named_parameters(), precision="autocast").tensors_state()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lozo-m", {"interval": 2}),
        ("loren", {}),
        ("loren", {"compat": "official"}),
        ("zo-muon", {"rank": 2, "interval": 2}),
    ],
)
def test_autocast_of_the_caller_is_for_closures_alone(name, options):
    """The steps are those of autocast within the closure, and so are their replays."""
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))

    def model_and_optimizer():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))
        return model, METHODS[name](model.named_parameters(), lr=1e-3, **options)

    def weights(around, within, replays=()):
        model, optimizer = model_and_optimizer()
        optimizer.recorder, records, seen = lambda record: records.append(record), [], set()

        def closure():
            with torch.autocast("cpu", torch.bfloat16, enabled=True) if within else nullcontext():
                out = model(x)
            seen.add((out.dtype, torch.is_inference_mode_enabled()))
            return out.float().square().mean()

        with torch.autocast("cpu", torch.bfloat16) if around else nullcontext():
            for number in range(4):
                optimizer.step(replay=replays[number]) if replays else optimizer.step(closure)
            assert torch.is_autocast_enabled("cpu") == around
        assert seen == (set() if replays else {(torch.bfloat16, True)})
        return torch.cat([p.detach().flatten() for p in model.parameters()]), records

    wanted, _ = weights(False, True)
    found, records = weights(True, False)
    assert torch.equal(found, wanted) and torch.equal(weights(True, False, records)[0], wanted)


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("mezo", torch.float32, {}),
        ("mezo", torch.bfloat16, {"precision": "master"}),
        ("mezo", torch.bfloat16, {"precision": "compensated-16"}),
        ("lozo", torch.float32, {"rank": 2, "probing": "together"}),
        ("first-order-fused", torch.float32, {}),
        ("first-order-sgd", torch.float32, {}),
    ],
)
def test_parametrized_weights_that_the_caller_keeps_are_not_evaluated_again(name, dtype, options):
    """A forward pass of the caller before a step fills the cache. within: the closure opens one of its own."""
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(0)).to(dtype)

    def run(around, within):
        torch.manual_seed(0)
        model = nn.Sequential(parametrizations.weight_norm(nn.Linear(24, 24)), nn.Tanh(), nn.Linear(24, 2)).to(dtype)
        optimizer = METHODS[name](model.named_parameters(), lr=1e-2, **options)

        def closure():
            with parametrize.cached() if within else nullcontext():
                return (model(x).float() + model(-x).float().exp()).square().mean()

        losses = []
        with parametrize.cached() if around else nullcontext():
            for _ in range(3):
                losses += [closure().item(), optimizer.step([closure, closure])]
            assert bool(parametrize._cache_enabled) == around
        return losses, torch.cat([p.detach().flatten() for p in model.parameters()])

    for within in (False, True):
        losses, wanted = run(False, within)
        found, weights = run(True, within)
        assert found == losses and torch.equal(weights, wanted) and len(set(losses[::2])) == 3


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("precision", COMPENSATED)
@pytest.mark.parametrize("name", ["lozo", "curvzo"])
def test_the_default_dtype_changes_no_bit(name, precision, kind):
    x = torch.randn(4, 24).bfloat16()

    def stepped(model):
        optimizer = METHODS[name](model.named_parameters(), lr=1e-3, precision=precision)
        for _ in range(3):
            optimizer.step(lambda: model(x).float().square().mean())
        thetas = [theta.clone().flatten() for t in optimizer.tensors for _, theta in optimizer.weights.read(t)]
        return torch.cat([*thetas, optimizer.zo_state.get("magnitude", torch.zeros(())).view(1)])

    model, before = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)).bfloat16(), torch.get_default_dtype()
    wanted = stepped(copy.deepcopy(model))
    torch.set_default_dtype(kind)
    try:
        found = stepped(model)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("precision", ["master", "compensated-16"])
def test_noise_in_order_is_probed_in_every_precision(precision):
    """The first probe is round(theta + eps z), z drawn tensor by tensor from torch's generator, last one used first."""
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), nn.Linear(8, 8, dtype=torch.bfloat16))
    optimizer = MeZO(model.named_parameters(), eps=0.1, precision=precision, noise=TorchOrderNoise(0, seeds=[7]))
    seen, start = [], [p.detach().clone() for p in model.parameters()]

    def closure():
        seen.append([p.clone() for p in reversed(list(model.parameters()))][::-1])
        return model(torch.ones(1, 8, dtype=torch.bfloat16)).float().sum()

    optimizer.step(closure)
    generator = torch.Generator().manual_seed(7)
    for probed, theta in zip(seen[0], start):
        z = torch.randn(theta.shape, generator=generator, dtype=torch.bfloat16)
        assert torch.equal(probed, (theta.float() + 0.1 * z.float()).bfloat16())


def test_the_measurement():
    """The committed figures are as promised, and the drift is measured again over a few steps."""
    path = Path(__file__).parents[2] / "benchmarks" / "precision.py"
    spec = importlib.util.spec_from_file_location("precision_benchmark", path)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    result = json.loads(benchmark.RESULT.read_text())
    assert [(row["dtype"], row["precision"]) for row in result["rows"]] == benchmark.ARMS
    for row in result["rows"]:
        if row["precision"] == benchmark.PUBLISHED:
            assert row["dtype"] == "float32" or (row["drift"] > 0.005 and row["cosine"] < 0.1)
            continue
        assert row["drift"] < 1e-5 if row["dtype"] == "float32" else row["drift"] == 0
        assert row["cosine"] > (0.9 if row["precision"] == "compensated-8" else 0.99)
    assert benchmark.table(result).count("\n") == len(benchmark.ARMS) + 1
    found = benchmark.exactness("bfloat16", "compensated-16", steps=10)
    assert found["drift"] == 0 and found["cosine"] > 0.999 and found["weights_cosine"] < 0.9


@pytest.mark.parametrize("first", ["mezo", "first-order-fused"])
@pytest.mark.parametrize("precision", ["master", *COMPENSATED])
def test_the_steps_of_another_optimizer_are_noticed(precision, first):
    """A step at learning rate 0 then leaves the weights as the other optimizer left them."""
    model, x = nn.Linear(24, 24).bfloat16(), torch.randn(4, 24).bfloat16()
    one, other = (METHODS[name](model.named_parameters(), lr=0.1, precision=precision) for name in ("mezo", first))

    def loss():
        return model(x).float().square().mean()

    one.step(loss), other.step(loss)
    left = [weights.detach().clone() for weights in model.parameters()]
    one.param_groups[0]["lr"] = 0.0
    with pytest.warns(UserWarning, match="2 trained tensors were changed since the last step"):
        one.step(loss)
    assert all(map(torch.equal, model.parameters(), left))


def test_a_graph_that_is_kept_across_a_step_is_refused_by_torch():
    model, x = nn.Linear(24, 24), torch.randn(4, 24)

    def loss():
        return (x + model(x)).square().matmul(model.weight).mean()

    kept = loss()
    MeZO(model.named_parameters(), lr=0.1).step(loss)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@pytest.mark.parametrize("precision", COMPENSATED)
def test_changes_during_a_step_are_noticed(precision):
    model, x = nn.Linear(24, 24).bfloat16(), torch.randn(4, 24).bfloat16()
    optimizer = MeZO(model.named_parameters(), lr=0.1, precision=precision)

    def filled(step):
        with torch.no_grad():
            model.bias.fill_(1.0)

    def loss():
        return model(x).float().square().mean()

    optimizer.recorder = filled
    optimizer.step(loss)
    optimizer.recorder = None
    with pytest.warns(UserWarning, match="1 trained tensors were changed since the last step, the first is bias"):
        optimizer.step(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(loss)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("precision", COMPENSATED)
def test_compensation_of_weights_that_were_changed_begins_anew(precision, dtype):
    """A remainder below 0 that was kept for another weight made a NaN of a 0."""
    weight = nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(0)).to(dtype))
    optimizer = MeZO([("w", weight)], lr=1e-3, precision=precision)

    def loss():
        return weight.float().square().mean()

    for _ in range(3):
        optimizer.step(loss)
    low = optimizer.tensors_state()["compensation/w"]
    assert bool((low < 0).any())
    with torch.no_grad():
        weight.mul_(torch.arange(64) % 2)
    with pytest.warns(UserWarning, match="the bits that are kept below them, begin anew"):
        value = optimizer.step(loss)
    assert value == pytest.approx(float(loss()), rel=0.1) and bool(weight.isfinite().all())


@pytest.mark.parametrize("before", [True, False])
def test_weights_that_are_loaded_beside_a_state_keep_its_compensation(before):
    """In either order, as frameworks load them; weights that cannot be those of the state begin anew."""

    def start():
        weight = nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16())
        return weight, MeZO([("w", weight)], lr=1e-3, precision="compensated-16")

    def take(weight, optimizer):
        optimizer.step(lambda: weight.float().square().mean())

    weight, optimizer = start()
    for _ in range(3):
        take(weight, optimizer)
    kept, state = weight.detach().clone(), optimizer.state_dict()
    take(weight, optimizer)
    again, other = start()
    take(again, other)
    for loading in (before, not before):
        if loading:
            with torch.no_grad():
                again.copy_(kept)
        else:
            other.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(again, other)
    assert torch.equal(weight, again)
    assert torch.equal(optimizer.tensors_state()["compensation/w"], other.tensors_state()["compensation/w"])
    other.load_state_dict(state)
    with torch.no_grad():
        again.zero_()
    with pytest.warns(UserWarning, match="begin anew"):
        take(again, other)
    assert bool(again.isfinite().all())


@narrow
@pytest.mark.parametrize("run,other", [COMPENSATED, COMPENSATED[::-1]])
def test_a_state_with_other_bits_below_the_weights_is_converted(run, other, dtype):
    """They were copied as numbers, by which theta was worse than without them."""

    def theta(optimizer):
        return torch.cat([part.clone() for tensor in optimizer.tensors for _, part in optimizer.weights.read(tensor)])

    weight = nn.Parameter(torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(dtype))
    made = MeZO([("w", weight)], lr=1e-3, precision=run)
    made.step(lambda: weight.float().square().mean())
    expected, loaded = theta(made), MeZO([("w", weight)], lr=1e-3, precision=other)
    with pytest.warns(UserWarning, match=f"precision {run}, and this optimizer has {other}"):
        loaded.load_state_dict(made.state_dict())
    if other == "compensated-16":
        assert torch.equal(theta(loaded), expected)
        return
    unit = torch.finfo(dtype).eps * 2.0 ** expected.abs().log2().floor() / 2**8
    apart = (theta(loaded) - expected).abs() / unit
    assert 0 < float(apart.max()) <= 1 and float((apart > 0.5).float().mean()) < 0.01  # a remainder of 128 becomes 127


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_in_place_are_warned_of(dtype):
    layer = nn.Linear(3, 2).to(dtype)
    with pytest.warns(UserWarning, match="`precision` in-place rounds weights narrower than float32 at every") as found:
        MeZO(layer.named_parameters(), precision="in-place", check_loss=False).step(lambda: layer.weight.float().sum())
    assert found[0].filename == __file__
    optimizer = MeZO(layer.named_parameters(), precision="in-place", check_loss=False)
    with pytest.warns(UserWarning, match="drift"):
        optimizer.step(lambda: layer.weight.float().sum())
    assert optimizer.notes == [str(found[0].message)] and not MeZO(layer.named_parameters()).notes
    rows = json.loads((Path(__file__).parents[2] / "benchmarks" / "precision.json").read_text())["rows"]
    name = str(dtype).removeprefix("torch.")
    drift = next(row["drift"] for row in rows if (row["dtype"], row["precision"]) == (name, "published loop"))
    assert f"probe: {name} weights drift by {100 * drift:.2g} % of their size in 1,000 steps" in str(found[0].message)


def test_weights_of_two_narrow_types_in_place_are_warned_of_together():
    params = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (*NARROW, torch.float32)]
    assert "bfloat16 weights drift by 12 % and float16 weights drift by 1.5 % of" in str(drift("in-place", params))
    assert drift("master", params) is None


def test_weights_whose_layout_changes_are_refused():
    model, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).bfloat16(), torch.ones(2, 3, 4, 4)
    optimizer = MeZO(model.named_parameters(), lr=1e-3, precision="compensated-16")
    optimizer.step(lambda: model(images.bfloat16()).float().square().mean())
    model.to(memory_format=torch.channels_last)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UserError, match="compensated needs contiguous weights, and 0.weight is not: choose master"):
        optimizer.step(lambda: model(images.bfloat16()).float().square().mean())
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters()))
