"""States that are loaded into an optimizer which is not the one that saved them."""

from __future__ import annotations

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from metazo.errors import UserError
from metazo.noise import PhiloxNoise, TorchOrderNoise
from metazo.optimizers import METHODS, MeZO


def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})


def steps(model: nn.ModuleDict, optimizer, count: int = 3) -> None:
    for _ in range(count):
        optimizer.step(lambda: model["b"](model["a"](torch.ones(4)).tanh()).square().sum())


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    "name,run,other,words",
    [
        (
            "mezo-adam",
            {"betas": (0.8, 0.9)},
            {},
            r"rule Adam\(betas=\(0.8, 0.9\).*this optimizer has Adam\(betas=\(0.9, 0.999",
        ),
        ("mezo-momentum", {"momentum": 0.5}, {}, r"rule Momentum\(momentum=0.5\)"),
        ("hizoo", {"smoothing": 1e-3}, {}, "smoothing 0.001, and this optimizer has 1e-06, which holds from here on"),
        ("lozo", {"interval": 7}, {"interval": 8}, "interval 7, and this optimizer has 8"),
        ("curvzo", {"budget": 0.5}, {}, "budget 0.5, and this optimizer has 0.4"),
        ("mezo", {"queries": 2}, {}, r"estimator TwoPoint\(queries=2\)"),
        ("hizoo", {"compat": "official"}, {}, "compat official, and this optimizer has paper"),
        ("lozo-m", {}, {"compat": "official"}, "compat paper, and this optimizer has official"),
        ("zo-muon", {"msign": "svd"}, {}, "msign svd, and this optimizer has newton-schulz"),
    ],
)
def test_other_hyperparameters_than_the_runs_are_named(name, run, other, words):
    model = net()
    made = METHODS[name](model.named_parameters(), lr=0.01, **run)
    steps(model, made)
    state = made.state_dict()
    with pytest.warns(UserWarning, match=words):
        METHODS[name](net().named_parameters(), lr=0.01, **other).load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        METHODS[name](net().named_parameters(), lr=0.5, **run).load_state_dict(state)


@pytest.mark.parametrize("name", ["mezo", "mezo-adam"])
def test_tensors_in_another_order_are_refused(name):
    """torch gives a tensor the state at its position: moments of equal shapes changed places without a word."""
    model, other = net(), net()
    made = METHODS[name](model.named_parameters(), lr=0.01)
    steps(model, made)
    turned = METHODS[name](list(other.named_parameters())[::-1], lr=0.01)
    with pytest.raises(UserError, match=r"has a.weight where this optimizer has b.weight \(tensor 1\)"):
        turned.load_state_dict(made.state_dict())


@pytest.mark.parametrize(("stepped", "scale"), [(False, None), (True, None), (True, "rms")])
def test_a_refused_state_changes_nothing(stepped, scale):
    model, other = net(), nn.ModuleDict({"c": nn.Linear(3, 3), "b": nn.Linear(4, 4, bias=False)})
    made = METHODS["mezo-adam"](model.named_parameters(), lr=0.01, scale=scale)
    steps(model, made)
    pairs = list(other.named_parameters())[::2]  # two tensors, of which one has another shape
    fresh = METHODS["mezo-adam"](pairs, lr=5.0, scale=scale)
    if stepped:
        fresh.step(lambda: other["b"].weight.square().sum())
    with pytest.raises(UserError, match=r"c.weight has shape \(4, 4\), and here it has \(3, 3\)"):
        fresh.load_state_dict(made.state_dict())
    earlier = {
        key: value for key, value in made.state_dict().items() if key != "shapes"
    }  # refused by its tensors alone
    with pytest.raises(UserError, match="differs"):
        fresh.load_state_dict(earlier)
    assert fresh.param_groups[0]["lr"] == 5.0 and fresh.param_groups[0]["param_names"] == [name for name, _ in pairs]
    fresh.step(lambda: other["b"].weight.square().sum())
    assert fresh.steps == 1 + stepped and "first_moment/c.weight" in fresh.tensors_state()


@pytest.mark.parametrize(
    ("name", "options", "stepped"),
    [("mezo", {}, False), ("mezo", {}, True), ("mezo-adam", {}, True), ("fzoo", {"rank": 1, "scale": "rms"}, True)],
)
def test_names_of_the_run_hold_for_tensors_without_names(name, options, stepped):
    """Their noise is that of the run, to the bit, also after steps of the optimizer into which the state is loaded."""
    model, other = net(), net()
    made = METHODS[name](model.named_parameters(), lr=1e-4, **options)
    steps(model, made)
    unnamed = METHODS[name](other.parameters(), lr=1e-4, **options)
    if stepped:
        steps(other, unnamed, 1)
    other.load_state_dict(model.state_dict())
    unnamed.load_state_dict(copy.deepcopy(made.state_dict()))
    steps(model, made)
    steps(other, unnamed)
    assert all(map(torch.equal, weights(model), weights(other)))


@pytest.mark.parametrize("name", ["mezo", "mezo-adam"])
@pytest.mark.parametrize("precision,before,after", [
    ("auto", torch.float32, torch.bfloat16), ("auto", torch.bfloat16, torch.float32),
    ("compensated-16", torch.bfloat16, torch.float32),
])  # fmt: skip
def test_a_model_that_has_another_dtype_than_at_the_first_step_is_refused(name, precision, before, after):
    """bfloat16 weights were probed in place, which replaces the model by noise: 5 % of it in 200 steps at lr 0."""
    model = net().to(before)
    optimizer = METHODS[name](model.named_parameters(), lr=0.0, precision=precision)
    optimizer.step(lambda: sum(p.float().square().sum() for p in model.parameters()))
    model.to(after)
    kept = weights(model)
    words = f"a.weight was {str(before)[6:]} .* and is {str(after)[6:]} now"
    with pytest.raises(UserError, match=words):
        optimizer.step(lambda: sum(p.float().square().sum() for p in model.parameters()))
    assert all(map(torch.equal, kept, weights(model)))


def test_a_state_is_read_with_weights_only_and_numbers_of_numpy_are_those_of_python():
    model, file = net(), io.BytesIO()
    made = METHODS["lozo-m"](
        model.named_parameters(), lr=np.float64(0.01), eps=np.float64(1e-3), momentum=np.float64(0.5)
    )
    steps(model, made)
    made.param_groups[0]["lr"] = np.float64(0.02)  # as a schedule may set it
    torch.save(made.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        METHODS["lozo-m"](net().named_parameters(), lr=0.01, momentum=0.5).load_state_dict(state)
        first = METHODS["mezo-adam"](model.named_parameters(), betas=[np.float64(0.9), 0.999])
        METHODS["mezo-adam"](net().named_parameters(), betas=(0.9, 0.999)).load_state_dict(first.state_dict())


def test_attributes_of_a_users_own_method_are_not_compared():
    class Own(MeZO):
        def __init__(self, *arguments, temperature=1.0, **settings):
            super().__init__(*arguments, **settings)
            self.temperature = temperature

    model = net()
    made = Own(model.named_parameters(), lr=0.01)
    steps(model, made)
    made.temperature = 0.5  # annealed in the run
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Own(net().named_parameters(), lr=0.01).load_state_dict(made.state_dict())


def test_a_state_may_be_loaded_after_a_record_that_failed():
    """The step that waited for its record is dropped, and taken once by the loaded state."""

    def full(step):
        raise OSError("no space left on device")

    ends = []
    for fails in (False, True):
        model = net().bfloat16()  # with masters, so that a probe is removed bit for bit
        made = METHODS["lozo-m"](model.named_parameters(), lr=0.01)

        def loss(model=model):
            return model["b"](model["a"](torch.ones(4, dtype=torch.bfloat16)).tanh()).float().square().sum()

        for _ in range(3):
            made.step(loss)
        state = made.state_dict()
        if fails:
            made.recorder = full
            with pytest.raises(OSError):
                made.step(loss)
            made.recorder = None
            made.load_state_dict(state)
        made.step(loss)
        ends.append((made.state_dict()["zo"], weights(model)))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_a_state_of_noise_that_goes_on_elsewhere_is_refused():
    model = net()
    made = MeZO(model.named_parameters(), noise=TorchOrderNoise(0))
    steps(model, made, 1)
    with pytest.raises(UserError, match="torch-order goes on from where its generator is"):
        MeZO(model.named_parameters(), noise=TorchOrderNoise(0)).load_state_dict(made.state_dict())
    with pytest.raises(UserError, match="torch-order goes on from where its generator is"):
        MeZO(model.named_parameters(), noise=TorchOrderNoise(0)).load_tensors_state(made.tensors_state())
    MeZO(model.named_parameters(), noise=TorchOrderNoise(0)).load_tensors_state(
        MeZO(model.named_parameters()).tensors_state()  # of no step
    )


class OwnSeeds(PhiloxNoise):
    """Seeds from a generator that goes on."""

    def __init__(self):
        super().__init__(3)
        self.generator = np.random.RandomState(3)

    def seed(self, step, query=0):
        return int(self.generator.randint(1 << 30))


class OwnUniforms(PhiloxNoise):
    """Uniforms from a generator that goes on."""

    def __init__(self):
        super().__init__(3)
        self.generator = np.random.RandomState(3)

    def uniform(self, step, count):
        return self.generator.rand(count)


@pytest.mark.parametrize("source", [OwnSeeds, OwnUniforms])
def test_noise_of_ones_own_that_goes_on_is_refused_too(source):
    model = net()
    made = MeZO(model.named_parameters(), noise=source())
    steps(model, made, 2)
    fresh = MeZO(model.named_parameters(), noise=source())
    with pytest.raises(UserError, match=r"The noise \S+ goes on from where its generator is, which no state holds"):
        fresh.load_state_dict(made.state_dict())
    assert fresh.steps == 0
    MeZO(model.named_parameters(), noise=source()).load_state_dict(
        MeZO(model.named_parameters(), noise=source()).state_dict()
    )


def test_noise_of_a_generator_goes_on_after_replayed_steps():
    """Its seeds began anew."""
    whole, again = net(), net()
    made = MeZO(whole.named_parameters(), lr=0.01, noise=TorchOrderNoise(0))
    records = []
    made.recorder = records.append
    steps(whole, made, 4)
    other = MeZO(again.named_parameters(), lr=0.01, noise=TorchOrderNoise(0))
    for record in records[:2]:
        other.step(replay=record)
    steps(again, other, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", ["mezo-adam", "hizoo", "curvzo", "lozo-m", "loren"])
def test_what_is_begun_under_inference_mode_goes_on_without_it(name):
    results = []
    for inference in (False, True):
        model = net()
        made = METHODS[name](model.named_parameters(), lr=0.01)
        with torch.inference_mode(inference):
            made.state_dict()
            steps(model, made, 1)
        steps(model, made, 2)
        results.append(weights(model))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["mezo", "fzoo", "eggroll", "curvzo", "mezo-momentum"])
def test_the_state_of_a_model_with_other_shapes_is_refused(name):
    model, wide = net(), nn.ModuleDict({"a": nn.Linear(4, 6, bias=False), "b": nn.Linear(6, 4, bias=False)})
    made, other = (METHODS[name](one.named_parameters(), lr=0.01) for one in (model, wide))
    steps(model, made)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    state, before = torch.load(file, weights_only=True), other.state_dict()
    with pytest.raises(UserError, match=r"whose a.weight has shape \(4, 4\), and here it has \(6, 4\)"):
        other.load_state_dict(state)
    assert other.steps == 0 and other.state_dict()["param_groups"] == before["param_groups"]
    for saved in (state, {key: value for key, value in state.items() if key != "shapes"}):  # as of earlier versions
        again = METHODS[name](net().named_parameters(), lr=0.01)
        again.load_state_dict(saved)
        assert again.steps == 3


def test_a_state_of_other_frozen_tensors_is_told():
    def begun(frozen: bool, steps: int):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        model[0].requires_grad_(not frozen)
        optimizer = MeZO(model.named_parameters())
        for _ in range(steps):
            optimizer.step(lambda: model(torch.ones(1, 4)).square().mean())
        return optimizer

    with pytest.warns(
        UserWarning, match="2 other tensors were trained or frozen: 0.weight is trained here and was not"
    ) as said:
        begun(False, 0).load_state_dict(begun(True, 1).state_dict())
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begun(True, 1).load_state_dict(begun(True, 2).state_dict())
        begun(False, 0).load_state_dict(begun(True, 0).state_dict())  # nothing was trained yet
        earlier = {key: value for key, value in begun(True, 1).state_dict().items() if key != "trained"}
        begun(False, 0).load_state_dict(earlier)
