"""LOZO's probes as activations: the losses of the weight form, one forward pass, and closures that cannot be vectorised."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from metazo.errors import UserError
from metazo.noise import RIGHT, TorchOrderNoise
from metazo.optimizers import LOZO, LOZOM, probing
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.replay import replay
from metazo.step import batched as branches
from metazo.step.directions import Isotropic, Scaled
from metazo.step.lowrank import LowRank
from tests.optimizers.contract import IDS, llama
from tests.step.test_substitute import bert, gpt2, two_heads


def models():
    torch.manual_seed(0)
    return {"llama": llama(), "llama tied": llama(tied=True), "gpt2": gpt2(), "bert": bert(), "plain": Bilinear()}


class Bilinear(nn.Module):
    """Uses that have no short form: both sides of a product, a transpose, a row, a concatenation."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(24, 6)), nn.Parameter(torch.randn(6, 6))
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, input_ids):
        x = self.w[input_ids] @ self.v * self.scale
        logits = torch.cat([x @ self.v.t(), x], dim=-1) @ torch.cat([self.w, self.w], dim=1).t()
        return type("Output", (), {"logits": logits})


def cross_entropy(model: nn.Module) -> torch.Tensor:
    """In the model's own precision, because transformers would take float32."""
    return nn.functional.cross_entropy(model(input_ids=IDS).logits.flatten(0, 1), IDS.flatten())


def run(model: nn.Module, form: str, steps: int = 4, cls=LOZO, **options):
    optimizer = cls(model.named_parameters(), lr=1e-3, eps=1e-2, interval=2, form=form, **options)
    records = []
    for _ in range(steps):
        optimizer.step(lambda: cross_entropy(model))
        records.append(optimizer.last_step)
    return optimizer, records


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("scale", [None, "rms"])
@pytest.mark.parametrize("cls", [LOZO, LOZOM])
def test_losses_are_those_of_the_weight_form(name, scale, cls):
    runs = []
    for form in ("weights", "activations"):
        model = models()[name].double()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer, records = run(model, form, scale=scale, cls=cls)
        runs.append((records, [p.detach() for p in model.parameters()], optimizer.forwards))
    (records, weights, forwards), (others, moved, count) = runs
    rtol = 1e-6 if "llama" in name else 1e-10  # its norms compute in float32 for all types of weights
    for a, b in zip(records, others):
        assert a.seeds == b.seeds and a.step == b.step and a.lr == b.lr
        torch.testing.assert_close(a.losses, b.losses, rtol=rtol, atol=0)
    torch.testing.assert_close(weights, moved, rtol=100 * rtol, atol=rtol)
    assert forwards == count == 8


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("cls", [LOZO, LOZOM])
def test_queries_in_one_pass_are_those_of_the_weight_form(name, cls):
    runs = []
    for form in ("weights", "activations"):
        model = models()[name].double()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer, records = run(model, form, cls=cls, queries=3)
        runs.append((records, [p.detach() for p in model.parameters()], optimizer.forwards))
    (records, weights, forwards), (others, moved, count) = runs
    rtol = 1e-6 if "llama" in name else 1e-10
    for a, b in zip(records, others):
        assert a.seeds == b.seeds and len(set(a.seeds)) == 3 and len(set(a.losses)) == 6
        torch.testing.assert_close(a.losses, b.losses, rtol=rtol, atol=0)
    torch.testing.assert_close(weights, moved, rtol=100 * rtol, atol=rtol)
    assert forwards == count == 24


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_products_are_added_in_place_or_apart(name, queries, monkeypatch):
    found, in_place, done = [], branches._add_in_place, []

    def spied(*tensors):
        done.append(in_place(*tensors))
        return done[-1]

    for way in (spied, lambda *tensors: False):
        monkeypatch.setattr(branches, "_add_in_place", way)
        _, records = run(models()[name].double(), "activations", 2, queries=queries)
        found.append([loss for record in records for loss in record.losses])
    assert sum(done) >= len(done) - 2  # but for a layer whose input is the same for all branches
    assert found[0] == pytest.approx(found[1], rel=1e-7 if name == "llama" else 1e-12)


class Rows(nn.Module):
    """Linear layers of single rows, and within a vmap of the model's own."""

    def __init__(self, own_vmap: bool):
        super().__init__()
        self.first, self.second, self.own_vmap = nn.Linear(6, 5), nn.Linear(5, 4, bias=False), own_vmap

    def forward(self, x):
        def rows(row):
            return self.second(torch.tanh(self.first(row))).square().sum()

        return torch.func.vmap(rows)(x).sum() if self.own_vmap else rows(x[0]) + rows(x[1])


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("own_vmap", [False, True])
def test_single_rows_and_a_vmap_of_the_model(own_vmap, queries):
    found, x = [], torch.randn(2, 6, dtype=torch.float64)
    for form in ("weights", "activations"):
        torch.manual_seed(0)
        model = Rows(own_vmap).double()
        optimizer = LOZO(model.named_parameters(), eps=1e-2, form=form, queries=queries)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step(lambda model=model: model(x))
        found.append(optimizer.last_step.losses)
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_float32_and_bfloat16():
    for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        found = [run(models()["llama"].to(dtype), form, 1)[1][0].losses for form in ("weights", "activations")]
        torch.testing.assert_close(*found, rtol=rtol, atol=0)


def test_the_closure_runs_once_and_the_weights_rest():
    model, calls = llama(), []
    memory = [p.data.view(-1).numpy() for p in model.parameters()]
    start = [values.copy() for values in memory]

    def closure():
        calls.append(all((values == before).all() for values, before in zip(memory, start)))
        return model(input_ids=IDS, labels=IDS).loss

    optimizer = LOZO(model.named_parameters(), lr=1e-3, form="activations")
    optimizer.step(closure)
    assert calls == [True] and optimizer.forwards == 2
    assert not all((values == before).all() for values, before in zip(memory, start))
    optimizer.step([closure, closure])
    assert len(calls) == 3 and optimizer.forwards == 6


def test_probing_none_is_that_of_the_form():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = LOZO(llama().named_parameters(), form="activations", probing=None)
    assert optimizer.probing == "together"
    model, options = llama(), {"form": "auto", "probing": None}
    settled = LOZO.resolve(options, model, lambda: model(input_ids=IDS, labels=IDS).loss)
    assert settled["form"] == "activations" and LOZO(model.named_parameters(), **settled).probing == "together"


def test_auto_goes_by_the_size_of_the_batch():
    for rows, form in ((1, 2), (40, 1)):
        model = llama()
        optimizer = LOZO(model.named_parameters(), lr=1e-3, form="auto")
        ids = IDS[:1].repeat(rows, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
        assert int(optimizer.tensors_state()["probing"]) == form


@pytest.mark.parametrize(
    "read", [float, lambda loss: loss * (1.0 if loss > 0 else 0.5), lambda loss: float(loss.detach().numpy())]
)
def test_what_cannot_be_vectorised_moves_the_weights(read):
    model, twin = llama().double(), llama().double()
    optimizer, plain = (
        LOZO(m.named_parameters(), lr=1e-3, form=f) for m, f in ((model, "activations"), (twin, "weights"))
    )
    with pytest.warns(UserWarning, match="probes in turn"):
        optimizer.step(lambda: read(model(input_ids=IDS, labels=IDS).loss))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # reported once
        optimizer.step(lambda: read(model(input_ids=IDS, labels=IDS).loss))
    for _ in range(2):
        plain.step(lambda: twin(input_ids=IDS, labels=IDS).loss)
    assert optimizer.forwards == plain.forwards == 4
    torch.testing.assert_close([*model.parameters()], [*twin.parameters()], rtol=1e-9, atol=1e-12)


def test_a_tensor_that_hides_moves_the_weights():
    model = nn.Linear(6, 6)
    alias = model.weight.data.view(-1)
    optimizer = LOZO(model.named_parameters(), form="activations")
    start = model.weight.detach().clone()
    with pytest.warns(UserWarning, match="weight is used"):
        optimizer.step(lambda: (alias.sum() + model.bias.sum()) ** 2)
    assert optimizer.last_step.losses[0] != optimizer.last_step.losses[1]
    torch.testing.assert_close(model.weight.detach(), start, rtol=0, atol=1e-3)


def test_a_tensor_that_a_later_loss_hides_is_told():
    model, seen, hidden = two_heads(torch.float32)
    optimizer = LOZO(model.named_parameters(), form="activations")
    optimizer.step(seen)
    with pytest.raises(
        UserError, match=r'\(hidden.weight is used where .*\): make the optimizer with `probing="in-turn"`'
    ):
        optimizer.step(hidden)
    assert optimizer.steps == 1
    optimizer.step(seen)


def test_a_tensor_may_be_used_by_any_of_the_closures():
    model, seen, _ = two_heads(torch.float32)
    optimizer, calls = LOZO(model.named_parameters(), form="activations", check_loss=False), []
    x = torch.ones(1, 6)
    closures = [seen, lambda: [calls.append(0), model["hidden"](model["trunk"](x)).square().sum()][1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closures)
    assert (
        optimizer.tensors_state()["probing"] == probing.TOGETHER and len(calls) == 1
    )  # all tensors are seen to be used


def test_a_tensor_that_hides_is_refused_by_compensated_weights_in_turn_too():
    model, _, hidden = two_heads(torch.bfloat16)
    optimizer = LOZO(model.named_parameters(), form="activations", precision="compensated-16")
    with pytest.warns(UserWarning, match="is used where"), pytest.raises(UserError, match="choose master"):
        optimizer.step(hidden)


def test_an_error_of_the_closure_is_the_caller_s():
    model = llama()
    optimizer = LOZO(model.named_parameters(), form="activations")
    start = model.lm_head.weight.detach().clone()

    def closure():
        raise KeyError("label")

    with pytest.warns(UserWarning), pytest.raises(KeyError):
        optimizer.step(closure)
    torch.testing.assert_close(model.lm_head.weight.detach(), start)
    assert optimizer.steps == 0


@pytest.mark.parametrize("form", ["weights", "activations"])
@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("cls", [LOZO, LOZOM])
def test_resume_and_replay(form, queries, cls):
    model = llama()
    _, records = run(model, form, 6, queries=queries, cls=cls)
    cut = llama()
    optimizer, _ = run(cut, form, 3, queries=queries, cls=cls)
    held = {key: value.clone() for key, value in optimizer.tensors_state().items()}
    common = {"lr": 1e-3, "eps": 1e-2, "interval": 2, "form": form, "queries": queries}
    later = cls(cut.named_parameters(), **common)
    later.load_tensors_state(held)
    for _ in range(3):
        later.step(lambda: cross_entropy(cut))
    again = llama()
    replayed = cls(again.named_parameters(), **common)
    for record in records:
        replayed.step(None, replay=record)
    for a, b, c in zip(model.parameters(), cut.parameters(), again.parameters()):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize(("batch_size", "form"), [(1, "activations"), (32, "weights")])
def test_a_run_settles_its_form_and_the_log_names_it(tmp_path, batch_size, form):
    """--form auto is settled before the first step, so that a replay, which has no batch, is bit-identical."""
    config = FinetuneConfig(
        "pico", "pico_topic", optimizer="lozo", method={"form": "auto"}, out=tmp_path / "run", batch_size=batch_size,
        train_examples=40, dev_examples=8, test_examples=8, keep="last", steps=3, lr=1e-4,
    )  # fmt: skip
    run_settings(config)
    log = tmp_path / "run" / "steps.jsonl"
    assert json.loads(log.read_text().splitlines()[0])["settings"]["method"]["form"] == form
    replay(log, "pico", tmp_path / "again")
    kept, again = (load_file(tmp_path / name / "model.safetensors") for name in ("run/model", "again"))
    assert kept.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in kept.items())


@pytest.mark.parametrize("queries", [1, 2])
def test_noise_in_order_is_the_same_together(queries):
    losses = []
    for form in ("weights", "activations"):
        model = llama().double()
        _, records = run(model, form, 3, noise=TorchOrderNoise(0), queries=queries)
        losses.append([loss for record in records for loss in record.losses])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_factors_of_scaled_directions():
    model = nn.Linear(5, 4).double()
    optimizer = LOZO(model.named_parameters())
    optimizer._prepare()
    weight, bias = optimizer.tensors
    stream = optimizer.noise.stream(3)
    right = {"weight": stream.draw(weight, (5, 2), RIGHT)}
    direction = Scaled(LowRank(Isotropic(), right), {"weight": 0.5, "bias": 2.0})
    u, v = direction.factors(stream, weight)  # type: ignore[misc]
    torch.testing.assert_close(u @ v.t(), direction.draw(stream, weight))
    assert direction.factors(stream, bias) is None


class Pool(nn.Module):
    """Learned queries that are the input of a linear layer, and are used without it as well."""

    def __init__(self):
        super().__init__()
        self.q = nn.Parameter(torch.randn(4, 16))
        self.first, self.second = nn.Linear(16, 16), nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        q = self.q + self.first(self.q) + torch.addmm(self.first.bias, self.q, self.second)
        return (torch.softmax(q @ x.transpose(1, 2), -1) @ x).mean((1, 2))


def test_a_trained_tensor_that_is_an_input_is_probed():
    x, found = torch.randn(8, 6, 16, dtype=torch.float64), []
    for form in ("weights", "activations"):
        torch.manual_seed(1)
        model = Pool().double()
        optimizer = LOZO(model.named_parameters(), lr=1e-3, eps=0.1, form=form, check_loss=False)
        for _ in range(3):
            optimizer.step(lambda model=model: model(x).square().mean())
        found.append((optimizer.last_step.losses, *model.parameters()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
