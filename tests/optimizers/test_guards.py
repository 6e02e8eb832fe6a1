"""Mistakes of the caller: closures that return no loss, weights without numbers, losses that are random."""

from __future__ import annotations

import math
import re
import types
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from metazo.errors import UserError
from metazo.noise import PhiloxNoise
from metazo.optimizers import FZOO, LOZO, METHODS, OPTIMIZERS, MeZO
from metazo.optimizers.guards import as_loss, check_weights
from metazo.optimizers.loss_watch import FIRST_STEPS
from metazo.step.estimators import TwoPoint
from metazo.step.rules import SGD, Adam
from metazo.step.scales import RMSScale
from metazo.tuner.networks import PertNN
from metazo.tuner.scale import TunerScale
from tests.optimizers.contract import NAMES, case, make, quadratic, take


@pytest.mark.parametrize(
    "value",
    [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), np.array([0.5]), Fraction(1, 2), torch.tensor(0.5),
     torch.tensor([[0.5]]), torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(0.5, requires_grad=True)],
    ids=str,
)  # fmt: skip
def test_numbers_are_losses(value):
    assert as_loss(value) == 0.5 and type(as_loss(value)) is float
    assert as_loss(True) == 1.0 and as_loss(np.int64(3)) == 3.0


@pytest.mark.parametrize(
    ("value", "found", "remedy"),
    [
        (None, "None", "model(**batch).loss"),
        ((torch.tensor(1.0), 2), "a tuple of 2 (Tensor, int)", "one number"),
        ([1.0], "a list of 1 (float)", "one number"),
        ({"loss": 1.0, "logits": 2}, "a dict with the keys loss, logits", "its entry `loss`"),
        ({"a": 1.0}, "a dict with the keys a", "one number"),
        (torch.ones(4, 3), "a tensor of shape (4, 3) and type float32", "mean()"),
        (torch.ones(0), "a tensor of shape (0,)", "one number"),
        (torch.tensor(1j), "a tensor of shape () and type complex64", "one number"),
        (np.ones(2), "an array of shape (2,)", "mean()"),
        ("0.5", "'0.5', a str", "one number"),
        (1j, "1j, a complex", "one number"),
        (10**400, "1000", "one number"),
        (torch.ones((), device="meta"), "a tensor on the meta device", "on another"),
    ],
)
def test_what_is_no_loss_is_said_with_what_to_return(value, found, remedy):
    with pytest.raises(UserError) as error:
        as_loss(value)
    text = str(error.value)
    assert text.startswith("The closure returned " + found) and remedy in text and "\n" not in text


@pytest.mark.parametrize("name", NAMES)
def test_every_method_refuses_a_tuple_and_leaves_the_weights(name):
    problem = quadratic()
    optimizer, before = make(name, problem.named(), case(name).quadratic), problem.copies()
    with pytest.raises(UserError, match=r"returned a tuple of 2 \(Tensor, int\)"):
        take(optimizer, lambda: (problem(), 0))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-15) for a, b in zip(before, problem.parameters()))


@pytest.mark.parametrize("name", ["first-order-sgd", "first-order-adamw"])
def test_first_order_methods_ask_for_a_tensor_with_a_gradient(name):
    problem = quadratic()
    optimizer = METHODS[name](problem.named())
    with pytest.raises(UserError, match="returned a dict"):
        optimizer.step(lambda: {"loss": problem()})
    with pytest.raises(UserError, match="with a gradient"):
        optimizer.step(lambda: problem().item())


def test_probes_together_refuse_them_as_well():
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    optimizer = LOZO(model.named_parameters(), probing="together")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # at the first step and later
            with pytest.raises(UserError, match=r"^The closure returned a tensor of shape \(4, 2\).*mean"):
                optimizer.step(lambda: model(x))
            optimizer.step(lambda: model(x).sum())
    with pytest.raises(UserError, match="^The closure returned a dict"):
        optimizer.step(lambda: {"a": model(x).sum()})
    with pytest.raises(UserError, match="needs a closure"):
        optimizer.step(None)


LATER = {
    "calling .item() on a Tensor": lambda loss: loss.item(),
    "the closure returns float, not a tensor": lambda loss: 0.5,
}


@pytest.mark.parametrize("reason", LATER)
def test_a_later_closure_that_cannot_be_vectorised_is_refused_and_its_own_errors_are_not(reason):
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    optimizer = LOZO(model.named_parameters(), lr=1e-3, probing="together")
    optimizer.step(lambda: model(x).sum())
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UserError, match=rf'cannot be vectorised \(.*{re.escape(reason)}\): .*`probing="in-turn"`'):
        optimizer.step(lambda: LATER[reason](model(x).sum()))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        optimizer.step(lambda: model(x[:, :2]).sum())
    assert all(map(torch.equal, before, model.parameters())) and optimizer.steps == 1


def test_a_group_may_be_frozen_whole():
    problem = quadratic(torch.float32)
    kept = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = MeZO([{"params": [("kept", kept)]}, {"params": list(problem.named_parameters())}], lr=0.05, seed=3)
    twin = quadratic(torch.float32)
    other = MeZO(twin.named_parameters(), lr=0.05, seed=3)
    optimizer.step(problem), other.step(twin)
    assert kept.equal(torch.ones(3)) and all(map(torch.equal, problem.parameters(), twin.parameters()))
    assert not all(map(torch.equal, problem.parameters(), quadratic(torch.float32).parameters()))


@pytest.mark.parametrize("precision", ["in-place", "master", "compensated-16"])
def test_what_is_frozen_or_not_after_a_state_was_saved_but_before_the_first_step_is_taken_up(precision):
    """accelerate saves and loads the state in `prepare`; the layers that were trained then were trained for good."""
    dtype = torch.float32 if precision == "in-place" else torch.bfloat16
    models = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)).to(dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for saved, model in zip((True, False), models):
        model[1].requires_grad_(False)
        optimizer = MeZO(model.named_parameters(), lr=0.05, seed=3, precision=precision, scale="rms")
        if saved:
            optimizer.load_state_dict(optimizer.state_dict())
        model[0].requires_grad_(False)
        model[1].requires_grad_(True)
        start = [p.detach().clone() for p in model.parameters()]
        for _ in range(3):
            optimizer.step(lambda model=model: model(torch.ones(1, 4, dtype=dtype)).float().square().sum())
        moved = [not torch.equal(a, b) for a, b in zip(start, model.parameters())]
        assert moved == [False, False, True, True, True, True]
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_nothing_to_train_is_refused():
    for weight in (nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.empty(0, 4))):
        with pytest.raises(UserError, match="No tensor is trainable: every parameter is frozen or empty"):
            MeZO([("w", weight)]).step(lambda: 1.0)


def test_meta_weights_are_refused_by_name_and_a_frozen_one_is_not():
    for model in (nn.Linear(4, 4, device="meta"), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))):
        count = len(list(model.parameters()))
        name = "weight" if count == 2 else "1.weight"
        with pytest.raises(UserError, match=rf"^2 of {count} trained tensors are offloaded.*the first is {name}: "):
            MeZO(model.named_parameters()).step(lambda: 1.0)
    model[1].requires_grad_(False)
    MeZO(model.named_parameters()).step(lambda: model[0](torch.ones(1, 4)).sum())


def test_offloaded_weights_are_refused():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(UserError, match="4 of 4 trained tensors are offloaded.*0.weight.*local_parameters"):
        MeZO(model.named_parameters()).step(lambda: model(torch.ones(1, 4)).sum())


def test_sharded_weights_are_refused(tmp_path):
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/m", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Linear(4, 4)
        model.weight = nn.Parameter(DTensor.from_local(model.weight.detach(), mesh, [Replicate()]))
        with pytest.raises(UserError, match="1 of 2 trained tensors are sharded.*first is weight"):
            MeZO(model.named_parameters()).step(lambda: 1.0)
        from torch.distributed.fsdp import fully_shard

        with pytest.raises(UserError, match="2 of 2 trained tensors are sharded"):
            MeZO(fully_shard(nn.Linear(4, 4), mesh=mesh).named_parameters()).step(lambda: 1.0)
    finally:
        torch.distributed.destroy_process_group()


def test_other_weights_that_a_step_cannot_change():
    from torch.testing._internal.two_tensor import TwoTensor

    def tensors(param):
        return [types.SimpleNamespace(name="w", param=param)]

    check_weights(tensors(nn.Parameter(torch.ones(2))))
    for param, found in (
        (nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2))), "tensor subclass TwoTensor"),
        (nn.UninitializedParameter(), "no shape yet"),
        (nn.Parameter(torch.ones(2, dtype=torch.complex64)), "complex64"),
        (nn.Parameter(torch.eye(2).to_sparse()), "sparse_coo"),
    ):
        with pytest.raises(UserError, match=f"1 of 1 trained tensors .*{found}.*first is w: "):
            check_weights(tensors(param))


def dropped(p: float = 0.5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(p), nn.Linear(8, 1))
    x = torch.randn(16, 8)
    return model, lambda: model(x).square().mean()


def test_a_random_loss_is_warned_about_with_the_figures_and_the_module():
    model, closure = dropped()
    with pytest.warns(UserWarning) as found:
        optimizer = MeZO(model.named_parameters())
        optimizer.step(closure)
        optimizer.step(closure)
    assert len(found) == 1
    text = str(found[0].message)
    assert "evaluated twice at the same weights" in text and "1 (Dropout): call model.eval()" in text
    first, second = optimizer.last_step.losses
    assert abs(first - second) > 0 and found[0].filename == __file__


@pytest.mark.parametrize("method", [MeZO, FZOO, LOZO])
def test_the_check_changes_nothing_else(method):
    """Losses, counters, generators and weights are those of a run without the check, for a loss that uses the generators."""
    runs = []
    for check in (True, False):
        model, closure = dropped()
        state = np.random.get_state()
        np.random.seed(0)
        optimizer = method(model.named_parameters(), check_loss=check)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            records = [(optimizer.step(lambda: closure() + np.random.rand()), optimizer.last_step)[1] for _ in range(3)]
        runs.append((records, optimizer.forwards, torch.rand(()).item(), np.random.rand()))
        np.random.set_state(state)
    assert runs[0] == runs[1]


def test_a_loss_that_is_the_same_twice_is_not_warned_about_and_costs_one_evaluation():
    model, closure = dropped()
    model.eval()
    calls = []
    for check in (True, False):
        optimizer = MeZO(model.named_parameters(), check_loss=check)
        calls.append(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")

            def counted():
                calls[-1] += 1
                return closure()

            for _ in range(3):
                optimizer.step(counted)
        assert optimizer.forwards == 6
    assert calls == [7, 6]


def test_batch_norm_in_train_mode_is_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    x = torch.randn(16, 8)
    with pytest.warns(UserWarning, match=r"1 \(BatchNorm1d\) is in train mode: every probe changes"):
        MeZO(model.named_parameters()).step(lambda: model(x).square().mean() + model[0](x).mean())


class Holder:
    """Keeps a model where the variables of a closure do not show it."""

    def __init__(self, model: nn.Module, x: Tensor):
        self.held, self.x = {"model": model}, x

    def loss(self) -> Tensor:
        return self.held["model"](self.x).square().mean()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("how", ["a bound method", "a helper", "a part of it before", "compiled"])
def test_batch_norm_is_named_if_the_closure_reaches_the_model_by_others(how, train):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).train(train)
    holder = Holder(model, torch.randn(16, 8))
    closures = {
        "a bound method": holder.loss,
        "a helper": lambda: holder.loss(),
        "a part of it before": lambda: holder.held["model"][1](holder.x).mean() + holder.loss(),
        "compiled": holder.loss,
    }
    if how == "compiled":  # torch warns of hooks at a compiled model, which are ours here
        holder.held["model"] = torch.compile(model, backend="eager")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        MeZO(model.named_parameters()).step(closures[how])
    name = "_orig_mod.1" if how == "compiled" else "1"
    said = [f"{name} (BatchNorm1d) is in train mode: every probe changes its statistics. Call model.eval()."]
    assert [str(one.message) for one in found] == (said if train else [])
    assert not torch.nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize(
    "spectral_norm, name",
    [
        (nn.utils.parametrizations.spectral_norm, r"1.parametrizations.weight.0 \(_SpectralNorm\)"),
        (nn.utils.spectral_norm, r"spectral_norm of 1 \(Linear\)"),
    ],
)
def test_spectral_norm_in_train_mode_is_named(spectral_norm, name):
    model = nn.Sequential(nn.Linear(8, 8), spectral_norm(nn.Linear(8, 8)))
    x = torch.randn(16, 8)
    with pytest.warns(UserWarning, match=rf"{name} is in train mode"):
        MeZO(model.named_parameters()).step(lambda: model(x).square().mean())
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MeZO(model.named_parameters()).step(lambda: model(x).square().mean())


def test_embeddings_that_shorten_their_rows_are_named():
    """At lr 0 the weights changed by 2.6 % in 50 steps: the forward pass of a probe shortens the probed rows."""
    model = nn.Sequential(nn.Embedding(8, 4, max_norm=1.0), nn.Flatten())
    with pytest.warns(UserWarning, match=r"0 \(Embedding\) has max_norm.*set max_norm to None"):
        MeZO(model.named_parameters()).step(lambda: model(torch.arange(8)).square().mean())


@pytest.mark.parametrize(("name", "options"), [("mezo", {}), ("lozo", {"rank": 2, "probing": "together"})])
def test_a_trained_row_for_padding_is_named(name, options):
    """torch's optimizers leave it as it is; masked as the warning says, it changes no loss."""
    ids = torch.tensor([[5, 2, 0, 0], [7, 1, 4, 0]])

    def found(train, masked=False):
        torch.manual_seed(0)
        table, head = nn.Embedding(8, 6, padding_idx=0), nn.Linear(6, 2)
        table.requires_grad_(train)
        model = nn.ModuleDict({"table": table, "head": head})

        def loss(ids=ids):
            mask = (ids != 0)[..., None] if masked else 1.0
            return model["head"]((model["table"](ids) * mask).sum(1)).square().mean()

        optimizer = METHODS[name](model.named_parameters(), lr=1e-3, **options)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                optimizer.step(loss)
        more = loss(nn.functional.pad(ids, (0, 3))) - loss()
        assert (abs(more) < 1e-7) == (masked or not train) and bool(table.weight[0].any()) == train
        return [str(one.message) for one in said]

    assert found(train=False) == []
    for masked in (False, True):
        (sentence,) = found(train=True, masked=masked)
        assert "For padding (padding_idx) is row 0 of table.weight" in sentence and "mask padding" in sentence


def test_a_row_for_padding_of_transformers_is_not_named():
    """Its models mask padding, also as a part of another module, such as that of adapters."""
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    bert = transformers.BertModel(config).eval()
    assert bert.embeddings.word_embeddings.padding_idx == 0
    model, ids = nn.ModuleDict({"inner": bert}), torch.tensor([[5, 6, 0]])
    for closure in (
        lambda: model["inner"](ids).pooler_output.square().mean(),
        lambda: bert(ids).pooler_output.square().mean(),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            MeZO(model.named_parameters()).step(closure)


@pytest.mark.parametrize("name", ["first-order-fused", "skip-feedback", "answer-column"])
def test_methods_with_gradients_leave_the_row_for_padding(name):
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    torch.manual_seed(0)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.tensor([[0, 5, 6], [0, 0, 7]])
    table = model.model.embed_tokens.weight
    before = table.detach().clone()
    own = {"model": model} if METHODS[name].needs_model else {}
    optimizer = METHODS[name](model.named_parameters(), 1e-2, **own)
    optimizer.step(lambda: nn.functional.cross_entropy(model(ids).logits[:, -1], torch.tensor([3, 4])))
    moved = (table != before).any(1)
    assert not moved[0] and bool(moved.any()) == (name == "first-order-fused")  # the others train blocks and head


def test_weights_that_no_longer_reach_the_loss_are_named_later_as_well():
    model, x = nn.Linear(4, 1), torch.ones(4)
    optimizer = MeZO(model.named_parameters(), lr=1e-3)
    for _ in range(FIRST_STEPS + 5):
        optimizer.step(lambda: model(x).square().mean())
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(FIRST_STEPS - 1):
            optimizer.step(lambda: model(x).square().mean())
    with pytest.warns(UserWarning, match="exactly equal, so that the weights do not move: .*assign=True"):
        optimizer.step(lambda: model(x).square().mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2 * FIRST_STEPS):  # said once
            optimizer.step(lambda: model(x).square().mean())


def test_a_loss_that_has_come_to_0_is_no_fault():
    weight = nn.Parameter(torch.tensor([0.3]))
    optimizer = MeZO([("weight", weight)], lr=0.05, eps=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20 * FIRST_STEPS):
            optimizer.step(lambda: torch.relu(1.0 - weight).sum())
    assert optimizer.last_step.losses == (0.0, 0.0)


def test_narrow_losses_that_are_equal_are_counted():
    problem = quadratic(torch.float32)
    for dtype, expected in ((torch.bfloat16, 1), (torch.float32, 0)):
        optimizer = MeZO(problem.named(), lr=0.0, eps=1e-6)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            equal = 0
            for _ in range(FIRST_STEPS + 5):
                optimizer.step(lambda: problem().to(dtype))
                equal += optimizer.steps <= FIRST_STEPS and len(set(optimizer.last_step.losses)) == 1
        texts = [str(one.message) for one in found]
        assert len(texts) == expected
        assert not expected or (f"In {equal} of the first 20 steps" in texts[0] and "bfloat16" in texts[0])


@pytest.mark.parametrize("cls", [MeZO, FZOO])
def test_a_surrogate_whose_value_says_nothing_is_found(cls):
    """exp(log p - log p without its gradient) is 1 at every weight; a loss that is equal in half of the steps is not named."""
    problem = quadratic(torch.float32)
    optimizer = cls(problem.named(), lr=1e-3)
    with pytest.warns(UserWarning, match=r"In 20 of the first 20 steps .* its gradient is meant and not its value"):
        for _ in range(FIRST_STEPS + 5):
            optimizer.step(lambda: (problem() - problem().detach()).exp())
    optimizer = cls(problem.named(), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(FIRST_STEPS + 5):
            optimizer.step(problem if step % 2 else lambda: torch.tensor(1.0))


def test_a_tensor_frozen_after_the_first_step_is_refused() -> None:
    """Its probes would go on; nothing has moved when it is refused."""
    model = torch.nn.Linear(3, 2)
    optimizer = MeZO(model.named_parameters(), lr=0.1)
    optimizer.step(lambda: model.weight.sum() + model.bias.sum())
    model.weight.requires_grad_(False)
    before = model.weight.clone()
    with pytest.raises(UserError, match="weight was frozen after the first step"):
        optimizer.step(lambda: model.weight.sum())
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("key", ["eps", "weigth_decay", "betas"])
def test_a_group_has_no_settings_that_would_change_nothing(key):
    layer = nn.Linear(2, 2)
    groups = [{"params": [("weight", layer.weight)], key: 0.5}, {"params": [("bias", layer.bias)]}]
    with pytest.raises(UserError, match=f"group has '{key}'; of their own, groups have params, lr, weight_decay"):
        MeZO(groups)


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 1e39), (torch.float16, 1e4)])
def test_a_probe_beyond_the_range_of_the_weights_is_refused(dtype, eps):
    """It left weights that are NaN."""
    layer = nn.Linear(2, 2).to(dtype)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=rf"`eps` is 1.*beyond the range of weight \({kind}\): choose a smaller one"):
        MeZO(layer.named_parameters(), eps=eps)
    MeZO(layer.double().named_parameters(), eps=eps)


@pytest.mark.parametrize("setting", ["lr", "eps", "weight_decay"])
@pytest.mark.parametrize("value", ["1e-3", None, math.nan, -1.0, True])
def test_numbers_are_finite_and_at_least_0(setting, value):
    layer = nn.Linear(2, 2)
    with pytest.raises(UserError, match=f"`{setting}` must be a finite number"):
        MeZO(layer.named_parameters(), **{setting: value})
    if setting != "eps":
        with pytest.raises(UserError, match=f"`{setting}` must be a finite number"):
            MeZO([{"params": [("weight", layer.weight)], setting: value}])


@pytest.mark.parametrize(
    ("name", "option"),
    [("mezo-momentum", "momentum"), ("hizoo", "smoothing"), ("mezo-svrg", "mini_lr"), ("zo-muon", "vector_rate"),
     ("meazo", "beta"), ("es", "population"), ("lozo", "rank"), ("fzoo", "queries")],
)  # fmt: skip
@pytest.mark.parametrize("value", [None, "0.9", True])
def test_hyperparameters_that_are_no_numbers_are_named(name, option, value):
    with pytest.raises(UserError, match=f"^`{option}` must be a number, not {value!r}"):
        METHODS[name](nn.Linear(2, 2).named_parameters(), **{option: value})


def test_losses_that_stay_infinite_are_named_once():
    optimizer = MeZO(quadratic(torch.float32).named(), lr=1e-3)
    with pytest.warns(
        UserWarning, match="not finite in 20 steps in a row .now nan.; such a step changes nothing"
    ) as found:
        for _ in range(2 * FIRST_STEPS):
            optimizer.step(lambda: math.nan)
    assert len(found) == 1


def test_parameters_that_share_memory_are_refused():
    memory = torch.zeros(6)
    one, other = nn.Parameter(memory[:4]), nn.Parameter(memory[2:])
    with pytest.raises(UserError, match="one and other are two parameters in the same memory"):
        MeZO([("one", one), ("other", other)]).step(lambda: one.sum() + other.sum())
    wide = nn.Parameter(torch.zeros(1, 3).expand(2, 3))
    with pytest.raises(UserError, match="share memory .expanded tensors., the first is wide"):
        MeZO([("wide", wide)]).step(wide.sum)
    MeZO([("one", nn.Parameter(memory[:3])), ("other", nn.Parameter(memory[3:]))]).step(lambda: memory.sum())
    tied = nn.Parameter(torch.randn(4, 6))
    square = torch.randn(8, 10)
    for pair in ((tied, nn.Parameter(tied.data.t())), (nn.Parameter(square[:, :6]), nn.Parameter(square[:, 4:]))):
        with pytest.raises(UserError, match="are two parameters in the same memory"):
            MeZO([("one", pair[0]), ("other", pair[1])]).step(lambda: square.sum())
    for view in (torch.randn(80).as_strided((10, 20), (5, 1)), torch.randn(9).as_strided((3, 3), (2, 2))):
        with pytest.raises(UserError, match="own has entries that share memory"):
            MeZO([("own", nn.Parameter(view))]).step(view.sum)
    apart = [
        ("left", nn.Parameter(square[:, :4])),
        ("right", nn.Parameter(square[:, 4:])),
        ("turned", nn.Parameter(tied.data.t())),
    ]
    MeZO(apart).step(lambda: square.sum())


def test_a_module_is_asked_for_its_parameters_and_added_ones_are_named_by_position():
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match="pass `model.named_parameters\\(\\)`"):
        MeZO(model)
    optimizer = MeZO(model.parameters())
    optimizer.add_param_group({"params": nn.Parameter(torch.ones(2))})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["param.0", "param.1"],
        ["param.2"],
        ["param.3"],
    ]


def test_what_fails_after_the_probes_leaves_the_weights():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    x, before = torch.randn(5, 3).double(), [p.detach().clone() for p in model.parameters()]
    optimizer = MeZO(model.named_parameters(), lr=1e-3, eps=1e-3)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="is in train mode"):
        warnings.simplefilter("error")
        optimizer.step(lambda: model(x).square().sum())
    for now, then in zip(model.parameters(), before):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-12)
    assert optimizer.steps == 0


def test_a_closure_with_a_variable_that_has_no_value_yet():
    weight = nn.Parameter(torch.ones(3))

    def closure() -> Tensor:
        if weight.sum() > 1e9:
            print(later)
        return weight.sum()

    MeZO([("w", weight)], lr=1e-3).step(closure)
    later = 1


@pytest.mark.parametrize("name", ["mezo-momentum", "lozo", "hizoo", "loren"])
def test_narrow_slices_of_more_than_a_chunk_take_their_steps(name):
    torch.manual_seed(0)
    whole = torch.randn(1500, 1000, dtype=torch.bfloat16)
    slices = {kind: nn.Parameter(part) for kind, part in (("slice", whole[:, :800]), ("copy", whole[:, :800].clone()))}
    for param in slices.values():
        optimizer = METHODS[name]([("w", param)], lr=1e-2, check_loss=False)
        for _ in range(2):
            optimizer.step(lambda param=param: param.float().square().mean())
    assert torch.equal(slices["slice"], slices["copy"])


@pytest.mark.parametrize("setting", ["check_every", "probe_ranks"])
def test_counts_are_no_flags(setting):
    with pytest.raises(UserError, match=f"`{setting}` must be a whole number of at least ., not True"):
        MeZO(nn.Linear(2, 2).named_parameters(), **{setting: True})
    with pytest.raises(UserError, match="`queries` must be a whole number, not True"):
        TwoPoint(True)


@pytest.mark.parametrize("seed", [1.5, "x", -1, 2**64, True])
def test_seeds_are_whole_numbers(seed):
    with pytest.raises(UserError, match="`seed` must be a whole number"):
        MeZO(nn.Linear(2, 2).named_parameters(), seed=seed)
    assert MeZO(nn.Linear(2, 2).named_parameters(), seed=np.int64(3)).noise.run_seed == 3


def test_the_state_of_another_optimizer_is_refused():
    layer = nn.Linear(2, 2)
    with pytest.raises(UserError, match="not of an optimizer of metazo"):
        MeZO(layer.named_parameters()).load_state_dict(torch.optim.AdamW(layer.parameters()).state_dict())


@pytest.mark.parametrize(
    "other,words",
    [
        ({"seed": 4}, "with seed 3, and this optimizer has seed 4"),
        ({"eps": 0.1}, "with eps 0.001"),
        ({"noise": "rademacher"}, "with noise philox4x32-10/gaussian/2"),
    ],
)
def test_the_state_of_another_run_is_refused(other, words):
    layer = nn.Linear(2, 2)
    made = MeZO(layer.named_parameters(), seed=3)
    made.step(lambda: layer.weight.sum())
    state = made.state_dict()
    with pytest.raises(UserError, match=words):
        MeZO(layer.named_parameters(), **({"seed": 3} | other)).load_state_dict(state)
    with pytest.raises(UserError, match="with method mezo, and this optimizer has method fzoo"):
        FZOO(layer.named_parameters(), seed=3).load_state_dict(state)
    del state["run"]  # as of earlier versions
    again = MeZO(layer.named_parameters(), **({"seed": 3} | other))
    again.load_state_dict(state)
    assert again.steps == 1


def test_a_tensor_in_two_groups_is_refused():
    layer = nn.Linear(2, 2)
    groups = [{"params": list(layer.named_parameters())}, {"params": [("bias", layer.bias)], "lr": 1e-3}]
    with pytest.raises(UserError, match="bias is in two parameter groups: leave it out of one"):
        MeZO(groups)
    with pytest.raises(UserError, match="is in two parameter groups: leave it out of one"):
        MeZO([{"params": layer.parameters()}, {"params": [layer.bias], "lr": 1e-3}])
    other = [("head", layer.weight), ("bias", layer.bias)]
    tied = [{"params": [("weight", layer.weight)]}, {"params": other, "lr": 1e-3}]
    with pytest.warns(UserWarning, match="head is tied to weight, whose parameter group holds for both"):
        assert [group["param_names"] for group in MeZO(tied).param_groups] == [["weight"], ["bias"]]
    with pytest.warns(UserWarning), pytest.raises(UserError, match="Parameter group 2 has no tensor of its own"):
        MeZO([tied[0], {"params": other[:1]}])


@pytest.mark.parametrize(
    "name,options,words",
    [
        ("mezo", {"queries": 1.5}, "`queries` must be a whole number, not 1.5"),
        ("mezo-adam", {"betas": 0.9}, "`betas` must be two numbers of at least 0 and below 1, not 0.9"),
        ("mezo-adam", {"stability": -1.0}, "`stability` must be a finite number above 0, not -1.0"),
        ("meazo", {"stability": math.inf}, "`stability` must be a finite number above 0, not inf"),
    ],
)
def test_hyperparameters_of_another_kind_are_refused(name, options, words):
    with pytest.raises(UserError, match=words):
        METHODS[name](nn.Linear(2, 2).named_parameters(), **options)


def test_numbers_of_numpy_are_numbers():
    layer = nn.Linear(2, 2)
    optimizer = MeZO(layer.named_parameters(), queries=np.int64(2))  # type: ignore[arg-type]
    optimizer.step(lambda: layer(torch.ones(2)).sum())
    assert optimizer.forwards == 4
    METHODS["mezo-adam"](layer.named_parameters(), betas=(np.float32(0.5), np.float64(0.9)), stability=np.float64(1e-6))


def test_a_rule_may_be_given_by_its_name():
    layer = nn.Linear(2, 2)
    assert MeZO(layer.named_parameters(), rule="adam").rule == Adam()
    with pytest.raises(UserError, match="`rule` 'adamw' is unknown: choose sgd, momentum, adam, meazo"):
        MeZO(layer.named_parameters(), rule="adamw")


def test_a_rule_that_fails_leaves_no_probe_and_no_record():
    """The probe remained on the weights, and the step was recorded by the next call again."""

    class Failing(SGD):
        fails = True

        def begin(self, state, coefficients):
            if self.fails:
                raise ValueError("of the rule")
            return super().begin(state, coefficients)

    problem, plain = quadratic(torch.bfloat16), quadratic(torch.bfloat16)
    rule, records = Failing(), []
    optimizer, before = make("mezo", problem.named(), 0.05, rule=rule), problem.copies()
    optimizer.recorder = records.append
    with pytest.raises(ValueError, match="of the rule"):
        optimizer.step(problem)
    assert all(map(torch.equal, problem.parameters(), before)) and not records
    Failing.fails = False
    optimizer.step(problem)
    make("mezo", plain.named(), 0.05).step(plain)
    assert all(map(torch.equal, problem.parameters(), plain.parameters())) and [r.step for r in records] == [0]


@pytest.mark.parametrize("name,options", [("meazo", {}), ("es", {"population": 4}), ("curvzo", {})])
def test_losses_whose_squares_are_beyond_float64_are_refused(name, options):
    """By an OverflowError of Python's, and of meazo after the step was recorded and with the probe on the weights."""
    problem, records = quadratic(), []
    optimizer, before = make(name, problem.named(), 0.05, check_loss=False, **options), problem.copies()
    state = {key: value.clone() for key, value in optimizer.tensors_state().items()}
    optimizer.recorder, given = records.append, iter([1e200, -3e200, 2e200, 7e200])
    with pytest.raises(
        UserError, match=r"The losses of step 0 are -3e\+200 to \S+, too far apart .* set the optimizer's `max_loss`"
    ):
        optimizer.step(lambda: next(given))
    for now, then in zip(problem.parameters(), before):
        torch.testing.assert_close(now.data, then, rtol=1e-12, atol=1e-12)
    assert not records and optimizer.steps == 0
    optimizer.max_loss = 1e100
    optimizer.step(lambda: 1e200)
    assert optimizer.steps == 1 and not records[0].coefficients
    if name == "meazo":
        kept = optimizer.tensors_state()
        assert all(torch.equal(kept[key], value) for key, value in state.items() if key != "counters")


@pytest.mark.parametrize(
    "name,key,value",
    [
        ("zo-muon", "msign", ["svd"]),
        ("es", "shaping", ["rank"]),
        ("lozo", "form", ["weights"]),
        ("dominant-layer", "layer", 1.5),
    ],
)
def test_a_value_that_is_no_text_is_named(name, key, value):
    """It was a TypeError without the name of the setting."""
    problem = quadratic()
    with pytest.raises(UserError, match=rf"`{key}` .*{re.escape(repr(value))}"):
        METHODS[name](problem.named(), **{key: value})


@pytest.mark.parametrize("name", ["mezo-adam", "mezo-momentum"])
def test_rules_with_buffers_take_narrow_weights_in_place(name):
    layer = nn.Linear(2, 2).to(torch.bfloat16)
    optimizer = METHODS[name](layer.named_parameters(), lr=0.1, precision="in-place")
    optimizer.step(lambda: layer(torch.ones(1, 2, dtype=torch.bfloat16)).float().sum())
    assert all(bool(p.isfinite().all()) and p.dtype == torch.bfloat16 for p in layer.parameters())


def test_a_loss_that_max_loss_refuses_is_returned_as_it_is():
    """The mean over the probes, as for any step; it was their sum."""
    problem = quadratic()
    optimizer = make("mezo", problem.named(), 1e-3)
    optimizer.max_loss = 1e-9
    value = optimizer.step(problem)
    assert value == sum(optimizer.last_step.losses) / 2 and not optimizer.last_step.coefficients


@pytest.mark.parametrize(
    "name,options,words",
    [
        ("loren", {"rule": "momentum", "momentum": 0.5}, "`momentum` 0.5 changes nothing"),
        (
            "lozo",
            {"form": "activations", "probing": "in-turn"},
            "`form` activations changes nothing: `probing` in-turn",
        ),
        ("mezo-svrg", {"anneal": 50.0}, "`anneal` 50 changes nothing without `epoch_steps`"),
    ],
)
def test_hyperparameters_that_another_one_replaces_are_named(name, options, words):
    with pytest.warns(UserWarning, match=words):
        METHODS[name](nn.Linear(2, 2).named_parameters(), **options)


def test_a_rule_of_its_own_stays_and_no_other_takes_its_place():
    named = [*nn.Linear(3, 2).named_parameters()]
    adam = OPTIMIZERS["mezo-adam"](named, betas=(0.1, 0.2), rule=None)
    assert repr(adam.rule) == repr(Adam((0.1, 0.2)))
    for name in ("mezo-adam", "mezo-momentum", "meazo", "lozo-m"):
        with pytest.raises(UserError, match="`rule` cannot be set for " + name):
            OPTIMIZERS[name](named, rule="momentum")
    with pytest.raises(UserError, match="is no rule: name one"):
        MeZO(named, rule=Adam)
    with pytest.raises(UserError, match="`noise` None is unknown"):
        MeZO(named, noise=None)
    with pytest.raises(UserError, match="`params` has no tensor"):
        MeZO([])


def test_the_weight_decay_of_a_group_acts_on_all_of_its_tensors():
    model = nn.Linear(3, 2)
    before = model.bias.detach().clone()
    groups = [{"params": [("bias", model.bias)], "weight_decay": 0.5}, {"params": [("weight", model.weight)]}]
    optimizer = MeZO(groups, lr=0.1, check_loss=False)
    for _ in range(2):
        optimizer.step(lambda: 1.0)
        optimizer.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(model.bias, before * 0.95**2)
    other = MeZO([{"params": [("bias", model.bias)]}, {"params": [("weight", model.weight)]}], lr=0.1, check_loss=False)
    other.load_state_dict(optimizer.state_dict())
    other.step(lambda: 1.0)
    torch.testing.assert_close(model.bias, before * 0.95**3)


def test_one_scale_object_serves_two_optimizers():
    def weights(shared: bool) -> list[Tensor]:
        torch.manual_seed(0)
        models = [nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 2))]
        scale = RMSScale(every=1)
        optimizers = [MeZO(m.named_parameters(), lr=1e-2, scale=scale if shared else RMSScale(every=1)) for m in models]
        for _ in range(3):
            for model, optimizer in zip(models, optimizers):
                optimizer.step(lambda model=model: model(torch.ones(4)).square().sum())
        return [p.detach() for m in models for p in m.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(True), weights(False), strict=True))
    optimizer = MeZO(nn.Linear(2, 2).named_parameters(), scale=RMSScale(every=0))
    with pytest.raises(UserError, match="`every` of a scale must be"):
        optimizer.step(lambda: 1.0)


def test_a_state_of_other_scales_or_precision_is_named():
    model = nn.Linear(4, 2)

    def make(**settings):
        return MeZO(model.named_parameters(), check_loss=False, **settings)

    def tuner(seed: int) -> TunerScale:
        return TunerScale(pertnn=PertNN(2, seed=seed))

    for own, other, name in (
        ({"scale": tuner(0)}, {"scale": tuner(1)}, "scale"),
        ({"scale": tuner(0)}, {"scale": "rms"}, "scale"),
        ({"scale": RMSScale(every=7)}, {"scale": "rms"}, "scale"),
        ({"precision": "autocast"}, {}, "precision"),
    ):
        state = make(**own).state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make(**own).load_state_dict(state)
        with pytest.warns(UserWarning, match=f"of a run with {name} "):
            make(**other).load_state_dict(state)


def test_bits_below_weights_of_another_type_are_refused():
    """They count from the last bit of a weight on, and have the same shape and type."""

    def make(dtype: torch.dtype) -> MeZO:
        return MeZO(nn.Linear(4, 2).to(dtype).named_parameters(), precision="compensated-16", check_loss=False)

    state = make(torch.float16).state_dict()
    make(torch.float16).load_state_dict(state)
    with pytest.raises(UserError, match="bits below weights of torch.float16, and this optimizer has .*torch.bfloat16"):
        make(torch.bfloat16).load_state_dict(state)


def test_masters_follow_weights_in_other_memory():
    model = nn.Linear(4, 2).bfloat16()
    optimizer = MeZO(model.named_parameters(), lr=0.0, check_loss=False)
    optimizer.step(lambda: model(torch.ones(4, dtype=torch.bfloat16)).float().sum())
    vector_to_parameters(torch.full((10,), 0.25, dtype=torch.bfloat16), model.parameters())
    with pytest.warns(UserWarning):
        optimizer.step(lambda: model(torch.ones(4, dtype=torch.bfloat16)).float().sum())
    assert (model.weight == 0.25).all()


@pytest.mark.parametrize("setting", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-2, "0.1", True])
@pytest.mark.parametrize("name", ["mezo", "first-order-sgd", "first-order-fused"])
def test_a_rate_that_a_schedule_made_no_number_is_refused(name, setting, value):
    p = nn.Parameter(torch.ones(3))
    optimizer = METHODS[name]([("p", p)], lr=1e-2)
    optimizer.param_groups[0][setting] = value
    with pytest.raises(UserError, match=re.escape(f"`{setting}` of parameter group 1 is {value!r} now")):
        optimizer.step(lambda: p.square().sum())
    assert torch.equal(p, torch.ones(3))


@pytest.mark.parametrize("value", [0.0, math.nan, -1e-3, "0.1", True])
def test_a_length_of_the_probe_that_a_script_made_no_number_is_refused(value):
    p = nn.Parameter(torch.ones(3))
    optimizer = MeZO([("p", p)], lr=1e-2)
    optimizer.eps = value
    with pytest.raises(UserError, match=re.escape(f"`eps` is {value!r} now; it must be a finite number above 0")):
        optimizer.step(lambda: p.square().sum())
    assert torch.equal(p, torch.ones(3))


def test_a_schedule_may_end_a_rounding_below_0():
    p = nn.Parameter(torch.ones(3))
    optimizer = MeZO([("p", p)], lr=1e-2)
    optimizer.param_groups[0]["lr"] = -1e-19
    optimizer.step(lambda: p.square().sum())


def test_a_seed_beside_a_noise_source_is_refused():
    named = [("p", nn.Parameter(torch.ones(3)))]
    with pytest.raises(UserError, match="`seed` 7 would change nothing beside a noise source"):
        MeZO(named, seed=7, noise=PhiloxNoise(5))
    assert (
        MeZO(named, seed=5, noise=PhiloxNoise(5)).noise.run_seed
        == MeZO(named, noise=PhiloxNoise(5)).noise.run_seed
        == 5
    )


def test_masters_of_float64_weights_are_refused():
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    with pytest.raises(
        UserError, match="`precision` master keeps float32, which is less than the float64 weights have"
    ):
        MeZO([("p", p)], precision="master").step(lambda: p.sum())


def test_a_closure_that_calls_backward_is_refused():
    p = nn.Parameter(torch.ones(3))

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    with pytest.raises(UserError, match=r"The closure computes a gradient, by backward\(\)"):
        MeZO([("p", p)], lr=1e-2).step(closure)
    assert torch.allclose(p, torch.ones(3))


def test_a_loss_may_hold_derivatives():
    """In both of the ways that the message names: d/dx (w x^2) at x = 2 is 4 w."""
    p, losses = nn.Parameter(torch.ones(1)), []

    def by_func():
        return torch.func.grad(lambda x: (p * x.square()).sum())(torch.tensor(2.0))

    def by_autograd():
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.tensor(2.0, requires_grad=True)
            return torch.autograd.grad((p * x.square()).sum(), x)[0]

    for closure in (by_func, by_autograd):
        optimizer = MeZO([("p", nn.Parameter(p.detach().clone()))], lr=0.0)
        p = optimizer.param_groups[0]["params"][0]
        optimizer.step(closure)
        losses.append(optimizer.last_step.losses)
    plain = MeZO([("p", nn.Parameter(torch.ones(1)))], lr=0.0)
    plain.step(lambda: 4 * plain.param_groups[0]["params"][0].sum())
    assert losses == [plain.last_step.losses] * 2 and losses[0][0] != losses[0][1]


@pytest.mark.parametrize("grouped", [False, True])
def test_a_set_of_parameters_is_refused(grouped):
    """Its order is that of addresses in memory, and noise goes by it."""
    held = set(nn.Linear(3, 2).parameters())
    with pytest.raises(UserError, match="are in a set, .*pass `model.named_parameters\\(\\)`, or a list"):
        MeZO([{"params": held}] if grouped else held, lr=1e-3)
    optimizer = MeZO(nn.Linear(3, 2).named_parameters(), lr=1e-3)
    with pytest.raises(UserError, match="are in a set"):
        optimizer.add_param_group({"params": held})


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "auto"), (torch.bfloat16, "master"), (torch.bfloat16, "compensated-8")]
)
def test_a_closure_that_changes_weights_is_told_once(dtype, precision):
    """As the clipping of a critic: it would act on the probed weights, or on copies, and not on the weights."""
    model = nn.Linear(4, 8, bias=False).to(dtype)
    x = torch.randn(16, 4, dtype=dtype)

    def loss(clip=True):
        if clip:
            with torch.no_grad():
                model.weight.clamp_(-0.01, 0.01)
        return model(x).float().square().mean()

    optimizer = MeZO(model.named_parameters(), lr=0.0, eps=1e-2, precision=precision)
    with pytest.warns(UserWarning, match="closure changes 1 trained tensors in place, such as weight") as found:
        for _ in range(3):
            optimizer.step(loss)
    assert len(found) == 1 and found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = MeZO(model.named_parameters(), lr=1e-4, precision=precision)
        other.defer = True  # the update of a step is applied with the next probe
        for _ in range(3):
            other.step(lambda: loss(clip=False))


def two_layers():
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))


@pytest.mark.parametrize("name", ["mezo", "first-order-fused"])
def test_groups_that_were_changed_after_the_first_step_are_refused(name):
    def begun():
        model = two_layers()
        groups = [{"params": list(model[at].named_parameters(prefix=str(at))), "lr": 0.01 * at} for at in (0, 1)]
        optimizer = METHODS[name](groups)
        loss = lambda: model(torch.ones(1, 4)).square().mean()  # noqa: E731
        optimizer.step(loss)
        return optimizer, loss

    changes = (
        lambda groups: groups.reverse(),
        lambda groups: groups.pop(),
        lambda groups: groups[0]["params"].append(nn.Parameter(torch.ones(2))),
    )
    for change in changes:
        optimizer, loss = begun()
        change(optimizer.param_groups)
        with pytest.raises(UserError, match="`param_groups` has other tensors, or another order"):
            optimizer.step(loss)
    for key in ("seed", "momentum", "maximize"):
        optimizer, loss = begun()
        optimizer.param_groups[0][key] = 1
        with pytest.raises(UserError, match=f"A parameter group has '{key}' now, which changes nothing"):
            optimizer.step(loss)
    optimizer, loss = begun()
    optimizer.param_groups[1] |= {"lr": 0.5, "swa_lr": 0.1}  # as schedules do
    optimizer.step(loss)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_eight_bits_are_not_trained(dtype):
    weight = nn.Parameter(torch.ones(4).to(dtype))
    with pytest.raises(UserError, match="1 of 1 trained tensors are float8.*probes are lost"):
        MeZO([("w", weight)]).step(lambda: weight.float().sum())


@pytest.mark.parametrize("wrong", [torch.ones(()), torch.ones(3), 1.0, [1.0], "loss"])
def test_a_loss_in_the_place_of_a_closure_is_one_sentence(wrong):
    for name in ("mezo", "first-order-fused", "first-order-adamw"):
        with pytest.raises(UserError, match="`step` takes a function that returns the loss, or a list"):
            METHODS[name](two_layers().named_parameters()).step(wrong)


def test_parameters_in_another_form_are_one_sentence():
    model = two_layers()
    for params, kind in ((dict(model.named_parameters()), "a dict"), (model[0].weight, "one tensor")):
        with pytest.raises(UserError, match=f"`params` is {kind}: pass `model.named_parameters"):
            MeZO(params)


def test_a_loss_with_a_derivative_in_it_takes_it_as_the_message_says():
    """The penalty of a physics-informed network."""
    torch.manual_seed(0)
    net, t = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), torch.linspace(0, 1, 5)[:, None]

    def by_graph():
        with torch.enable_grad():
            at = t.clone().requires_grad_()
            return (torch.autograd.grad(net(at).sum(), at)[0] - 1).square().mean()

    with pytest.raises(UserError, match=r"contains a derivative takes it by torch\.func \(grad, jvp\)"):
        MeZO(net.named_parameters()).step(by_graph)
    derivative = lambda: (torch.func.jvp(net, (t,), (torch.ones_like(t),))[1] - 1).square().mean()  # noqa: E731
    wanted = by_graph()
    assert MeZO(net.named_parameters(), lr=0.0).step(derivative) == pytest.approx(float(wanted), rel=1e-4)
