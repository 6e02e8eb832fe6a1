"""The optimizers over metazo/feedback: the step, normalised or not, under every precision; memory; resuming."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from metazo.bench.architectures import build
from metazo.blocks import named_tensors
from metazo.errors import UserError
from metazo.feedback.factors import Gradient
from metazo.feedback.momentum import FactoredMomentum
from metazo.models.load import load_model
from metazo.optimizers import METHODS, FirstOrderFused
from metazo.optimizers.answer_column import AnswerColumn
from metazo.optimizers.recomputed import FLOOR
from metazo.optimizers.skip_feedback import SkipFeedback
from metazo.step.record import Step
from tests.kernels.test_operations import Cut


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_plain_step_is_sgd_on_the_gradient() -> None:
    """positions="all" is exact: equal to torch's SGD with decoupled decay in blocks and head."""
    tiny = build("BERT")
    for name, p in tiny.model.named_parameters():
        p.requires_grad_("embeddings" not in name)
    before = weights(tiny.model)
    tiny.every().backward()
    true = {name: p.grad.clone() for name, p in tiny.model.named_parameters() if p.grad is not None}
    optimizer = AnswerColumn(
        tiny.model.named_parameters(), 0.1, model=tiny.model, positions="all", normalise=False, weight_decay=0.5
    )
    loss = optimizer.step(tiny.every)
    assert loss == pytest.approx(optimizer.last_step.losses[0]) and optimizer.untouched == []
    for name, gradient in true.items():
        decay = 1 - 0.1 * 0.5 * ("bias" not in name and "layernorm" not in name)
        assert torch.allclose(tiny.model.get_parameter(name), decay * before[name] - 0.1 * gradient, atol=1e-12), name


def test_a_complex_loss_is_refused_in_a_sentence() -> None:
    tiny = build("Llama")
    optimizer = SkipFeedback(tiny.model.named_parameters(), 0.1, model=tiny.model)
    with pytest.raises(UserError, match="The closure returned a complex loss: return one real number"):
        optimizer.step(lambda: torch.complex(loss := tiny.every(), loss))


def test_a_normalised_step_has_the_length_of_the_tensor_times_lr() -> None:
    tiny = build("Llama")
    zero = "model.layers.1.self_attn.q_proj.weight"
    tiny.model.get_parameter(zero).data.zero_()
    tiny.model.get_parameter("model.layers.1.self_attn.k_proj.weight").data.mul_(2)
    before = weights(tiny.model)
    tiny.every().backward()
    optimizer = AnswerColumn(tiny.model.named_parameters(), 0.01, model=tiny.model, positions="all")
    optimizer.step(tiny.every)
    assert optimizer.untouched == ["model.embed_tokens.weight"]
    (note,) = optimizer.notes
    assert (
        "no estimate for 1 trained tensors (12 % of the trained weights), which do not change, such as model.emb"
        in note
    )
    for name, p in tiny.model.named_parameters():
        step, gradient = p.detach() - before[name], p.grad
        if name == "model.embed_tokens.weight" or not gradient.norm():
            assert not step.any()
            continue
        size = max(float(before[name].norm()), FLOOR * math.sqrt(p.numel()))
        # transformers computes norms in float32, so even its own gradients are only reproducible to 1e-7
        assert torch.allclose(step, -0.01 * size * gradient / gradient.norm(), rtol=1e-5, atol=1e-8), name
    assert float((tiny.model.get_parameter(zero).detach()).norm()) == pytest.approx(0.01 * FLOOR * 16, rel=1e-6)


@pytest.mark.parametrize("precision", ["master", "compensated-16", "compensated-8"])
def test_narrow_weights_move_by_less_than_their_rounding(precision: str) -> None:
    """20 bfloat16 steps, each too small to change the weights, end at the weights of float32 steps."""
    wide, narrow = build("Llama", dtype=torch.float32), build("Llama", dtype=torch.bfloat16)
    wide.model.load_state_dict(narrow.model.state_dict())
    start = weights(wide.model)
    for tiny, kind in ((wide, "auto"), (narrow, precision)):
        optimizer = SkipFeedback(tiny.model.named_parameters(), 2e-4, model=tiny.model, precision=kind)
        for _ in range(20):
            optimizer.step(tiny.answer)
    name = "model.layers.2.mlp.down_proj.weight"
    theta = torch.cat([t.flatten().clone() for _, t in optimizer.weights.read(optimizer.by_name[name])])
    moved, wanted = theta - start[name].flatten(), (wide.model.get_parameter(name).detach() - start[name]).flatten()
    assert float(torch.cosine_similarity(moved, wanted, dim=0)) > 0.97  # gradients of a bfloat16 forward pass
    assert float(moved.norm() / wanted.norm()) == pytest.approx(1, abs=0.05)


def test_autocast_updates_in_float32() -> None:
    tiny = build("Llama", dtype=torch.float32)
    optimizer = SkipFeedback(tiny.model.named_parameters(), 1e-5, model=tiny.model, precision="autocast")
    name = "model.layers.2.mlp.down_proj.weight"
    before = weights(tiny.model)[name]
    optimizer.step(tiny.answer)
    step = tiny.model.get_parameter(name).detach() - before
    assert float(step.norm() / before.norm()) == pytest.approx(1e-5, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("skip-feedback", {}),
        ("skip-feedback", {"recompute": False}),
        ("skip-feedback", {"momentum": 0.9}),
        ("answer-column", {}),
        ("first-order-fused", {}),
        ("first-order-sgd", {}),
    ],
)
def test_autocast_around_the_loop_takes_the_steps_of_autocast_in_the_closure(name: str, options: dict) -> None:
    """Narrow copies of weights that autocast keeps are not evaluated again, and blocks run twice under the same autocast."""

    def run(around: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        tiny = build("Llama", dtype=torch.float32)
        own = {"model": tiny.model} if METHODS[name].needs_model else {}
        optimizer = METHODS[name](tiny.model.named_parameters(), 1e-2, **own, **options)

        def within() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return tiny.answer()

        with torch.autocast("cpu", torch.bfloat16) if around else nullcontext():
            return [optimizer.step(tiny.answer if around else within) for _ in range(3)], weights(tiny.model)

    losses, found = run(True)
    wanted, others = run(False)
    assert losses == wanted and len(set(losses)) == 3
    assert all(torch.equal(found[key], others[key]) for key in found)


def test_momentum_takes_products_of_autocast() -> None:
    tiny = build("Llama", dtype=torch.float32)
    optimizer = SkipFeedback(tiny.model.named_parameters(), 1e-2, model=tiny.model, precision="autocast", momentum=0.9)
    assert optimizer.step(tiny.every) > optimizer.step(tiny.every)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_resumed_is_bit_identical(momentum: float) -> None:
    def run(steps: int, resume_at: int | None = None):
        tiny = build("GPT-2", dtype=torch.float32)

        def fresh():
            return SkipFeedback(
                tiny.model.named_parameters(), 3e-3, model=tiny.model, momentum=momentum, momentum_rank=4
            )

        optimizer = fresh()
        for step in range(steps):
            if step == resume_at:
                state = {key: value.clone() for key, value in optimizer.tensors_state().items()}
                optimizer = fresh()
                optimizer.load_tensors_state(state)
            optimizer.step(tiny.every if step % 2 else tiny.answer)
        return tiny.model, optimizer

    (one, first), (two, second) = run(6), run(6, resume_at=3)
    assert first.steps == second.steps == 6 and first.forwards == second.forwards
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))


def test_momentum_of_full_rank_is_torchs() -> None:
    tiny, twin = build("OPT"), build("OPT")
    optimizer = AnswerColumn(
        tiny.model.named_parameters(),
        0.05,
        model=tiny.model,
        positions="all",
        normalise=False,
        momentum=0.8,
        momentum_rank=24,
    )
    for name, p in twin.model.named_parameters():
        p.requires_grad_("embed" not in name and name != "lm_head.weight")
    reference = torch.optim.SGD([p for p in twin.model.parameters() if p.requires_grad], lr=0.05, momentum=0.8)
    for name, p in tiny.model.named_parameters():
        p.requires_grad_(dict(twin.model.named_parameters())[name].requires_grad)
    for _ in range(5):
        optimizer.step(tiny.every)
        reference.zero_grad()
        twin.every().backward()
        reference.step()
    for name, p in twin.model.named_parameters():
        assert torch.allclose(tiny.model.get_parameter(name), p, atol=1e-9), name


@pytest.mark.parametrize("cls", [AnswerColumn, SkipFeedback])
def test_the_default_device_changes_nothing(cls) -> None:
    (model, hidden), (other, _) = stack(), stack()
    for net, device in ((model, "cpu"), (other, "meta")):
        with torch.device(device):
            optimizer = cls(net.named_parameters(), 1e-2, model=net, momentum=0.9, momentum_rank=2)
            for _ in range(2):
                optimizer.step(lambda net=net: net(hidden).square().mean())
        assert {value.device.type for value in optimizer.state_dict()["zo"].values()} == {"cpu"}
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in other.named_parameters())


def test_several_closures_are_averaged() -> None:
    one, two = build("Llama"), build("Llama")

    def mean():
        return (two.answer() + two.every()) / 2

    for tiny, closure in ((one, [one.answer, one.every]), (two, mean)):
        AnswerColumn(tiny.model.named_parameters(), 0.01, model=tiny.model, positions="all").step(closure)
    for (name, p), q in zip(one.model.named_parameters(), two.model.parameters()):
        assert torch.allclose(p, q, atol=1e-9), name


def test_a_step_is_recomputed_not_replayed() -> None:
    one, two = build("Llama"), build("Llama")
    records: list[Step] = []
    first = SkipFeedback(one.model.named_parameters(), 1e-3, model=one.model)
    first.recorder = records.append
    first.step(one.answer)
    second = SkipFeedback(two.model.named_parameters(), 7.0, model=two.model)
    with pytest.raises(UserError, match="skip-feedback cannot be replayed from its record: it is recomputed"):
        second.step(replay=records[0])
    second.step(two.answer, replay=records[0])
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), two.model.parameters()))
    with pytest.raises(UserError, match="Step 1 was recorded with loss"):
        second.step(two.answer, replay=records[0])


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    tiny = build("Llama")
    before = weights(tiny.model)
    optimizer = SkipFeedback(tiny.model.named_parameters(), 1e-3, model=tiny.model)
    assert optimizer.step(lambda: tiny.answer() * math.inf) == math.inf
    assert optimizer.last_step.coefficients == () and optimizer.steps == 1
    assert all(torch.equal(before[name], p) for name, p in tiny.model.named_parameters())


def test_a_full_log_changes_nothing() -> None:
    tiny = build("Llama")
    before = weights(tiny.model)
    optimizer = SkipFeedback(tiny.model.named_parameters(), 1e-3, model=tiny.model)

    def full(step):
        raise OSError("no space")

    optimizer.recorder = full
    with pytest.raises(OSError):
        optimizer.step(tiny.answer)
    assert all(torch.equal(before[name], p) for name, p in tiny.model.named_parameters())


def test_dropout_and_frozen_blocks_are_refused() -> None:
    tiny = build("BERT")
    tiny.model.train()
    with pytest.raises(
        UserError, match=r"gives a different output when it runs again: switch dropout off \(model.eval\(\)\)"
    ):
        SkipFeedback(tiny.model.named_parameters(), 1e-3, model=tiny.model).step(tiny.answer)
    tiny = build("BERT")
    for name, p in tiny.model.named_parameters():
        p.requires_grad_("cls" in name)
    with pytest.raises(UserError, match="No trained tensor is within the blocks"):
        SkipFeedback(tiny.model.named_parameters(), 1e-3, model=tiny.model).step(tiny.answer)


def test_a_cache_of_keys_and_values_does_not_double_them() -> None:
    """A causal model called with its default use_cache=True."""
    one, two = build("Llama"), build("Llama")
    two.model.config.use_cache = False
    for tiny in (one, two):
        SkipFeedback(tiny.model.named_parameters(), 1e-2, model=tiny.model).step(tiny.every)
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), two.model.parameters()))


@pytest.mark.parametrize("settings, sentence", [
    ({"momentum": 1.0}, "`momentum` must be at least 0 and below 1, not 1.0"),
    ({"momentum_rank": 0}, "`momentum_rank` must be a whole number of at least 1, not 0"),
])  # fmt: skip
def test_settings_out_of_range(settings, sentence) -> None:
    tiny = build("Llama")
    with pytest.raises(UserError, match=sentence):
        SkipFeedback(tiny.model.named_parameters(), model=tiny.model, **settings)
    with pytest.raises(UserError, match="`positions` 'some' is unknown: choose carrying or all"):
        AnswerColumn(tiny.model.named_parameters(), model=tiny.model, positions="some")


def test_the_cost_of_a_step_at_the_last_position_is_measured() -> None:
    """Operations counted by hand, in units of two per multiplication of a weight and an entry."""
    import transformers

    d, f, keys, vocabulary, blocks, rows, length = 48, 80, 24, 101, 2, 3, 19
    config = transformers.LlamaConfig(
        hidden_size=d,
        intermediate_size=f,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(rows * length).view(rows, length)
    for name, p in model.named_parameters():
        p.requires_grad_("layers" in name)

    def loss(keep: int = 1) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits.square().mean()

    every, attention = rows * length, 4 * length * d
    maps = 2 * (2 * d * d + 2 * d * keys + 3 * d * f)  # q and o, k and v, MLP
    head = 2 * rows * d * vocabulary
    forward = blocks * every * (maps + attention) + head
    again = every * 2 * (d * d + 2 * d * keys) + rows * (maps + attention)  # to the keys and values, then one position
    errors = rows * 2 * (2 * d * d + 3 * d * f) + every * 2 * 2 * d * keys + 2.5 * rows * attention
    gradients = 2 * 2 * d * keys * every  # of k and v, whose factors are larger than they are
    step = forward + head + blocks * (again + errors + gradients)

    optimizer = SkipFeedback(model.named_parameters(), 1e-3, model=model)
    before = weights(model)
    optimizer.measure_cost(loss)
    assert optimizer.forwards_per_step() == round(step / forward, 2) == 1.56
    assert optimizer.forwards_per_step(3) == 3 * 1.56
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for _ in range(25):
        optimizer.step(loss)
    assert optimizer.forwards == 39  # 25 * 1.56

    every_position = SkipFeedback(model.named_parameters(), 1e-3, model=model)
    every_position.measure_cost(lambda: loss(0))
    assert every_position.forwards_per_step() == 4
    kept = SkipFeedback(model.named_parameters(), 1e-3, model=model, recompute=False)
    kept.measure_cost(loss)
    assert kept.forwards_per_step() == 3


class Block(torch.nn.Module):
    """Two linear layers; the activation changes the output of the first in place."""

    def __init__(self, inplace: bool):
        super().__init__()
        self.up, self.act = torch.nn.Linear(6, 8), torch.nn.ReLU(inplace=inplace)
        self.down = torch.nn.Linear(8, 6)

    def forward(self, hidden_states):
        return hidden_states + self.down(self.act(self.up(hidden_states)))


class Stack(torch.nn.Module):
    def __init__(self, times: int = 1, inplace: bool = False):
        super().__init__()
        self.blocks, self.times = torch.nn.ModuleList(Block(inplace) for _ in range(3)), times

    def forward(self, hidden):
        for _ in range(self.times):
            for block in self.blocks:
                hidden = block(hidden)
        return hidden


def stack(**options) -> tuple[Stack, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Stack(**options).double(), torch.randn(2, 3, 6, dtype=torch.float64)


def exact(model, loss, atol: float = 1e-12, **options) -> None:
    """A plain step of answer-column over all positions is one along the gradient of autograd."""
    before = weights(model)
    true = [gradient.to_dense() for gradient in torch.autograd.grad(loss(), list(model.parameters()))]
    optimizer = AnswerColumn(model.named_parameters(), 1.0, model=model, positions="all", normalise=False, **options)
    optimizer.step(loss)
    for (name, p), gradient in zip(model.named_parameters(), true, strict=True):
        assert torch.allclose(p.detach(), before[name] - gradient, atol=atol) and gradient.any(), name
    assert optimizer.untouched == []


@pytest.mark.parametrize("inplace", [False, True])
def test_an_output_that_is_changed_in_place_keeps_its_gradient(inplace: bool) -> None:
    model, hidden = stack(inplace=inplace)
    exact(model, lambda: model(hidden).square().mean())


class CutBlock(Block):
    """No gradient passes its layers."""

    def forward(self, hidden_states):
        return hidden_states + Cut.apply(self.up(hidden_states))[..., :6]


@pytest.mark.parametrize("cls", [AnswerColumn, SkipFeedback])
def test_blocks_without_a_backward_pass_are_refused(cls) -> None:
    model, hidden = stack()
    model.blocks = torch.nn.ModuleList(CutBlock(False) for _ in range(3)).double()
    before = weights(model)
    optimizer = cls(model.named_parameters(), 1e-2, model=model)
    with pytest.raises(UserError, match=f"No trained tensor gets a gradient .* {cls.name} would train nothing"):
        optimizer.step(lambda: model(hidden).square().mean())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_number_without_dimensions_is_trained() -> None:
    model, hidden = stack()
    model.blocks[0].register_parameter("gain", torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64)))
    model.blocks[0].register_forward_hook(lambda block, args, out: args[0] + block.gain * (out - args[0]))
    exact(model, lambda: model(hidden).square().mean())


def test_sparse_gradients_of_embeddings_are_taken() -> None:
    model, hidden = stack()
    model.blocks[1].add_module("table", torch.nn.Embedding(3, 6, sparse=True, dtype=torch.float64))
    model.blocks[1].register_forward_hook(lambda block, args, out: out + block.table(torch.tensor([0, 2, 2])))
    exact(model, lambda: model(hidden).square().mean() + model(hidden + 1).square().mean())


class Turned(torch.nn.Linear):
    """Multiplies another vector than it is given."""

    def forward(self, given):
        return super().forward(given.flip(-1))


def test_layers_that_are_more_than_a_product_have_their_gradient() -> None:
    """A subclass of Linear with a forward of its own, one replaced on the object, and a hook that gives another output."""
    for place, change in enumerate(("class", "object", "hook")):
        model, hidden = stack()
        block: Any = model.blocks[place]
        if change == "class":
            block.up.__class__ = Turned
        elif change == "object":
            block.up.forward = lambda given, layer=block.up: torch.nn.Linear.forward(layer, given.flip(-1))
        else:
            block.up.register_forward_hook(lambda layer, given, out: 2 * out)
        exact(model, lambda model=model, hidden=hidden: model(hidden).square().mean())


def test_two_forward_passes_in_one_closure_add_up() -> None:
    model, hidden = stack()
    exact(model, lambda: model(hidden).square().mean() + model(hidden + 1).abs().mean())


def test_blocks_that_run_twice_and_weights_of_two_blocks_are_refused() -> None:
    model, hidden = stack(times=2)
    before = weights(model)
    for make in (SkipFeedback, AnswerColumn):
        with pytest.raises(UserError, match="Block 0 of blocks runs more than once in a forward pass"):
            make(model.named_parameters(), 0.1, model=model).step(lambda: model(hidden).square().mean())
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    model, hidden = stack()
    model.blocks[2].up.weight = model.blocks[0].up.weight
    with pytest.raises(UserError, match=r"blocks.0.up.weight belongs to blocks 0 and 2 of blocks"):
        SkipFeedback(model.named_parameters(), 0.1, model=model).step(lambda: model(hidden).square().mean())
    model.blocks[0].up.weight.requires_grad_(False)
    SkipFeedback(model.named_parameters(), 0.1, model=model).step(lambda: model(hidden).square().mean())


@pytest.mark.parametrize("groups", [1, 2])
def test_albert_is_refused(groups: int) -> None:
    import transformers

    sizes = {
        "hidden_size": 16,
        "embedding_size": 8,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    config = transformers.AlbertConfig(**sizes, num_hidden_layers=4, num_hidden_groups=groups)
    model = transformers.AlbertForSequenceClassification(config).eval()
    ids = torch.arange(12).view(2, 6) + 3
    with pytest.raises(UserError, match="runs more than once in a forward pass"):
        AnswerColumn(model.named_parameters(), 0.1, model=model).step(
            lambda: model(input_ids=ids, labels=torch.tensor([0, 1])).loss
        )


def test_every_matrix_of_deberta_has_its_gradient() -> None:
    """It divides the output of pos_q_proj in place."""
    import transformers

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 40,
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        config = transformers.DebertaConfig(**sizes, relative_attention=True, pos_att_type=["c2p", "p2c"])
        model = transformers.DebertaForSequenceClassification(config).double().eval()
    for name, p in model.named_parameters():
        p.requires_grad_("encoder.layer" in name)
    ids = torch.arange(12).view(2, 6) + 3
    loss = lambda: model(input_ids=ids, labels=torch.tensor([0, 1])).loss  # noqa: E731
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    before, true = weights(model), torch.autograd.grad(loss(), [p for _, p in named])
    optimizer = AnswerColumn(named, 1.0, model=model, positions="all", normalise=False)
    optimizer.step(loss)
    assert optimizer.untouched == [] and any("pos_q_proj" in name for name, _ in named)
    for (name, p), gradient in zip(named, true, strict=True):
        assert torch.allclose(p.detach(), before[name] - gradient, atol=1e-6 * float(gradient.abs().max()) + 1e-12), (
            name
        )


def test_the_routers_own_loss_is_left_out_with_a_note() -> None:
    import transformers

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    more = {"num_key_value_heads": 2, "num_local_experts": 4}
    for own in (False, True):
        config = transformers.MixtralConfig(**sizes, **more, output_router_logits=own)
        model = transformers.MixtralForCausalLM(config).eval()
        ids = torch.arange(12).view(2, 6) + 3
        optimizer = AnswerColumn(model.named_parameters(), 1e-3, model=model)
        optimizer.step(lambda model=model, ids=ids: model(input_ids=ids, labels=ids, use_cache=False).loss)
        assert any("leaves out the router's own loss" in note for note in optimizer.notes) == own


def test_a_cache_of_states_is_refused() -> None:
    import transformers

    config = transformers.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, vocab_size=40)
    model = transformers.MambaForCausalLM(config).eval()
    ids = torch.arange(12).view(2, 6) + 3
    optimizer = SkipFeedback(model.named_parameters(), 1e-3, model=model)
    with pytest.raises(UserError, match="call the model with `use_cache=False`"):
        optimizer.step(lambda: model(input_ids=ids, labels=ids, use_cache=True).loss)
    optimizer.step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)


@pytest.mark.parametrize("cls", [SkipFeedback, FirstOrderFused])
def test_examples_that_are_solved_do_not_make_weights_infinite(cls) -> None:
    """Normalised steps raise the margin without end, until the gradient has no numbers in float32."""
    model = load_model("pico").model
    ids, target = torch.tensor([[5, 17, 33, 90, 12, 44, 7, 61]]), torch.tensor([0])
    more = {"model": model} if cls is SkipFeedback else {"normalise": True}
    optimizer = cls(model.named_parameters(), lr=1e-2, **more)
    losses = [
        optimizer.step(lambda: cross_entropy(model(input_ids=ids).logits[:, -1, [100, 200]].float(), target))
        for _ in range(30)
    ]
    assert losses[-1] == 0.0 and all(parameter.isfinite().all() for parameter in model.parameters())
    before = weights(model)
    optimizer.step(lambda: cross_entropy(model(input_ids=ids).logits[:, -1, [100, 200]].float(), target))
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


@pytest.mark.parametrize("shape", [(300, 400), (500, 300)])
def test_momentum_of_a_whole_matrix_is_nearly_its_best_approximation(shape: tuple[int, int]) -> None:
    """Beside the singular value decomposition, on a matrix whose singular values fall slowly."""
    generator = torch.Generator().manual_seed(1)
    kept = torch.randn(shape[0], 4, generator=generator), torch.randn(shape[1], 4, generator=generator)
    (tensor,) = named_tensors([("w", torch.nn.Parameter(torch.zeros(shape)))])
    momentum = FactoredMomentum(0.9, 4, ["w"])
    state = momentum.init([tensor])
    state["momentum/left/w"].copy_(kept[0])
    state["momentum/right/w"].copy_(kept[1])
    twin = {name: value.clone() for name, value in state.items()}
    gradient = torch.randn(shape, generator=generator)
    wanted = 0.9 * kept[0] @ kept[1].t() + gradient
    found = momentum.update(state, Gradient({}, {}, {"w": gradient}))
    lost = torch.linalg.svdvals(wanted)[4:].square().sum().sqrt()
    assert float((found.dense("w") - wanted).norm() / lost) == pytest.approx(1, abs=1e-3)
    momentum.update(twin, Gradient({}, {}, {"w": gradient}))
    assert all(torch.equal(value, twin[name]) for name, value in state.items())


class Residual(nn.Module):
    """x + b(relu(norm(a(x)))), with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.b(torch.relu(self.norm(self.a(x))))


class Stemmed(nn.Module):
    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.blocks, self.head = stem, nn.ModuleList(Residual() for _ in range(3)), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SkipFeedback, {}),
        (AnswerColumn, {"positions": "all"}),
        (AnswerColumn, {"positions": "all", "recompute": False}),
    ],
)
def test_the_statistics_of_batchnorm_are_those_of_one_forward_pass(cls, options) -> None:
    """Blocks run again for the check of other ways and for their gradients."""
    model, target = Stemmed(nn.Identity()).train(), torch.randint(3, (16,))
    x, other = 3 * torch.randn(16, 8) + 2, copy.deepcopy(model)
    optimizer = cls(model.named_parameters(), lr=1e-12, model=model, **options)
    for _ in range(2):
        optimizer.step(lambda: cross_entropy(model(x), target))
        other(x)
    for (name, one), two in zip(model.named_buffers(), other.buffers()):
        torch.testing.assert_close(one, two, msg=name)


def test_a_stem_that_is_not_trained_is_said_and_embeddings_are_not() -> None:
    target = torch.randint(3, (16,))
    for stem, x in ((nn.Linear(5, 8), torch.randn(16, 5)), (nn.Embedding(50, 8), torch.randint(50, (16,)))):
        model = Stemmed(stem).eval()
        optimizer = SkipFeedback(model.named_parameters(), lr=1e-3, model=model)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                optimizer.step(lambda model=model, x=x: cross_entropy(model(x), target))
        names = ["stem.weight", "stem.bias"] if isinstance(stem, nn.Linear) else ["stem.weight"]
        assert optimizer.untouched == names and any("no estimate for" in note for note in optimizer.notes)
        assert [str(each.message) for each in said] == (optimizer.notes if isinstance(stem, nn.Linear) else [])
        assert all(each.filename == __file__ for each in said)
