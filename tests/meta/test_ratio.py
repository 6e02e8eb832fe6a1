"""The ratio objective: its optimum, its lower bound, and its curvature; sampled labels and the order of batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from metazo.blocks import named_tensors, partition
from metazo.meta.objective import Situation
from metazo.meta.order import Order, PreparedTask, with_sampled_labels
from metazo.meta.ratio import block_type, measure, pooled, ratio
from metazo.models.load import load_model
from metazo.noise import PhiloxNoise
from metazo.step.weights import Weights
from metazo.tasks import prepare, resolve


def test_it_does_not_change_with_the_length_of_sigma():
    sigma, g, t = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 2.0, 0.5], [0.3, 1.0, -0.1], [1.0, 4.0, 2.0]))
    assert float(ratio(sigma, g, t, 0.1)) == pytest.approx(float(ratio(7 * sigma, g, t, 0.1)), abs=1e-12)


def optimum(entropy: float) -> torch.Tensor:
    """Shares of cost after descent; block 0 has four times the agreement for its curvature."""
    log = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    g, t = torch.tensor([4.0, 1.0, 1.0]).double(), torch.tensor([1.0, 1.0, 100.0]).double()
    optimizer = torch.optim.Adam([log], lr=0.05)
    for _ in range(1000):
        optimizer.zero_grad()
        ratio(log.exp(), g, t, entropy).backward()
        optimizer.step()
    cost = (2 * log.detach()).exp() * t
    return cost / cost.sum()


def test_it_prefers_agreement_over_curvature_and_entropy_keeps_it_from_one_block():
    alone, shared = optimum(0.0), optimum(1.0)
    assert alone[0] > 0.98
    assert 0.4 < shared[0] < 0.9 and shared[1] > shared[2] > 0.01


def test_a_block_without_curvature_is_raised_to_its_type():
    names = ["layers.0.k.bias", "layers.1.k.bias", "layers.0.k.weight", "layers.1.k.weight"]
    types = [block_type(name) for name in names]
    assert types[0] == types[1] == "layers.k.bias"
    counts = torch.tensor([2.0, 2.0, 10.0, 10.0]).double()
    values = pooled(torch.tensor([0.0, 6.0, 4.0, 20.0]).double(), counts, types, 0.1)
    expected = [0.1 * 2 * 6 / 4, 6.0, 4.0, 20.0]  # the mean per entry of k.bias is 6 / 4, above that of all, 30 / 24
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))


class Linear:
    """Softmax regression on fixed inputs, whose Fisher information is known."""

    name = "linear"

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        self.y = torch.randint(4, (8,), generator=generator)

    def __len__(self) -> int:
        return 8

    def loss(self, model, indices):
        return cross_entropy(model(self.x[indices]), self.y[indices])

    def sampled_loss(self, model, indices, generator):
        drawn = torch.multinomial(model(self.x[indices]).softmax(-1).detach(), 1, generator=generator)[:, 0]
        return lambda: cross_entropy(model(self.x[indices]), drawn)


def test_curvature_is_the_trace_of_the_fisher_information():
    task = Linear()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        model = nn.Linear(3, 4).double()
    tensors = named_tensors(model)
    blocks = partition(tensors)
    generator = torch.Generator().manual_seed(2)
    everything = list(range(8))

    def situation() -> Situation:
        return Situation(
            weights=Weights(tensors, PhiloxNoise(0)),
            blocks=blocks,
            sigma=torch.ones(2),
            counts=torch.tensor([12.0, 4.0]),
            normalise=True,
            root=None,
            seed=lambda query: query,
            loss=lambda: task.loss(model, everything),
            other=lambda: task.loss(model, everything),
            sampled=lambda: task.sampled_loss(model, everything, generator),
            examples=8,
            state={},
        )

    draws = [measure(situation()) for _ in range(1500)]
    trace = torch.stack([curvature for _, _, curvature in draws]).mean(0)
    p = model(task.x).softmax(-1).detach()
    spread = (p * (1 - p)).sum(-1)  # trace of the covariance of the logit gradient
    exact = torch.stack([(spread * task.x.square().sum(-1)).mean(), spread.mean()])
    torch.testing.assert_close(trace, exact, rtol=0.08, atol=0)
    gradient = torch.autograd.grad(task.loss(model, everything), list(model.parameters()))
    agreement = draws[0][1]
    torch.testing.assert_close(agreement, torch.stack([g.square().sum() for g in gradient]))


SAMPLED = [
    ("pico_topic", "llama"),
    ("pico_cause", "llama"),
    ("pico_span", "llama"),
    ("pico_cause", "bart"),
    ("pico_span", "t5"),
]


@pytest.mark.parametrize("name, model", SAMPLED)
def test_labels_are_sampled_from_the_model(tiny, name: str, model: str):
    loaded = load_model(tiny(model))
    prepared = prepare(resolve(name), loaded, train=8, dev=1, test=1, max_length=128)
    batch = prepared.collate(prepared.train)
    key = "targets" if prepared.task.kind == "classification" else "answer"
    draws = [
        with_sampled_labels(prepared, loaded.model, batch, torch.Generator().manual_seed(seed)) for seed in range(3)
    ]
    again = with_sampled_labels(prepared, loaded.model, batch, torch.Generator().manual_seed(0))
    assert torch.equal(draws[0][key], again[key])
    assert not torch.equal(draws[0][key], draws[1][key]) or not torch.equal(draws[0][key], draws[2][key])
    for drawn in draws:
        if key == "answer":
            assert torch.equal(drawn[key] == -100, batch[key] == -100)
        assert torch.equal(drawn["input_ids"], batch["input_ids"])
        assert torch.isfinite(prepared.loss(loaded.model, drawn))
    loss = PreparedTask(prepared).sampled_loss(loaded.model, list(range(8)), torch.Generator().manual_seed(0))
    assert float(loss().detach()) == pytest.approx(float(prepared.sampled_loss(loaded.model, again).detach()), rel=1e-5)


@pytest.mark.parametrize("name", ["pico_cause", "pico_span"])
def test_the_trace_of_answers_of_several_tokens_is_that_of_the_loss(tiny, name: str):
    """Of the last matrix alone, whose gradient for a sampled token y is (p - e_y) h^T: its trace is (1 - |p|^2) |h|^2."""
    loaded = load_model(tiny("llama"))
    prepared = prepare(resolve(name), loaded, train=4, dev=1, test=1, max_length=128)
    task, model, head = PreparedTask(prepared), loaded.model, loaded.model.lm_head
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(),))  # the embedding may be the same tensor
    traces, lengths = [], []
    for example in prepared.train:
        answer = example.options[example.targets[0]]
        found = model(torch.tensor([example.ids + answer]), output_hidden_states=True)
        places = slice(len(example.ids) - 1, -1)
        p, h = found.logits[0, places].double().softmax(-1), found.hidden_states[-1][0, places].double()
        traces.append(float(((1 - p.square().sum(-1)) * h.square().sum(-1)).mean().detach()))
        lengths.append(len(answer))
    generator, draws = torch.Generator().manual_seed(0), []
    for _ in range(60):
        (gradient,) = torch.autograd.grad(task.sampled_loss(model, range(4), generator)(), [head.weight])
        draws.append(4 * float(gradient.double().square().sum()))
    assert task.tokens == max(lengths) > 1
    error = float(np.std(draws)) / len(draws) ** 0.5
    assert float(np.mean(draws)) == pytest.approx(float(np.mean(traces)), abs=4 * error)


@pytest.mark.parametrize("name", ["llama", "bart", "t5"])
def test_the_logits_of_an_answer_are_those_of_its_row_alone(tiny, name: str):
    loaded = load_model(tiny(name))
    prepared = prepare(resolve("pico_span"), loaded, train=4, dev=1, test=1, max_length=128)
    with torch.no_grad():
        for encoded, found, answer in zip(
            prepared.train,
            prepared.answer_logits(loaded.model, batch := prepared.collate(prepared.train)),
            batch["answer"],
            strict=True,
        ):
            ids, told = encoded.ids, answer[answer != -100].tolist()
            if name == "llama":
                expected = loaded.model(torch.tensor([ids + told])).logits[0, len(ids) - 1 : -1]
            else:
                read = torch.tensor([[*prepared.start, *told[:-1]]])
                expected = loaded.model(torch.tensor([ids]), decoder_input_ids=read).logits[0, -len(told) :]
            torch.testing.assert_close(found[answer != -100], expected, rtol=1e-4, atol=1e-5)


def test_batches_are_a_function_of_the_step():
    order, again = Order([10, 7], 3, seed=1), Order([10, 7], 3, seed=1)
    assert order.steps_per_epoch == 3 + 2
    epoch = [order.batch(step) for step in range(5)]
    assert epoch == [again.batch(step) for step in (0, 1, 2, 3, 4)]
    assert again.batch(7) == order.batch(7) and epoch != [order.batch(step) for step in range(5, 10)]
    assert [task for task, _ in epoch].count(0) == 3
    for task in (0, 1):
        seen = [index for number, batch in epoch if number == task for index in batch]
        assert len(set(seen)) == len(seen)
    task, first = order.batch(2)
    other = order.other(2, task, first)
    assert not set(first) & set(other) and len(other) == 3


@pytest.mark.parametrize("size, batch", [(10, 3), (10, 5), (7, 4), (4, 4), (20_000, 16)])
def test_a_second_batch_is_drawn_from_the_examples_that_are_not_in_the_first(size: int, batch: int):
    """As numpy draws from a list of them, which would be as long as the training set."""
    order = Order([size], batch, seed=3)
    for step in range(20):
        _, first = order.batch(step)
        rest = np.setdiff1d(np.arange(size), first)
        pool = rest if len(rest) >= batch else np.arange(size)
        drawn = np.random.default_rng([3, step, 1 << 20]).choice(pool, batch, replace=False)
        assert order.other(step, 0, first) == drawn.tolist()
