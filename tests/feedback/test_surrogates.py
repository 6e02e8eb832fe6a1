"""The error of each surrogate, against independent derivations in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from metazo.bench.architectures import build
from metazo.feedback.factors import Gradient, product_square_norm
from metazo.feedback.residual import find_residual, hidden_of, with_hidden
from metazo.feedback.surrogates import Column, Exact, MeanJacobian, Skip
from tests.feedback.test_architectures import estimate, relative


def cut_at_block_inputs(tiny, keep):
    """Hooks that detach each block's input at the positions outside `keep` (B, T): autograd restricted to these positions."""

    def detach(module, args, output):
        hidden = hidden_of(output)
        return with_hidden(output, torch.where(keep[..., None], hidden, hidden.detach()))

    return [block.register_forward_hook(detach) for block in find_residual(tiny.model).blocks[:-1]]


@pytest.mark.parametrize("name", ["Llama", "OPT", "GPT-2", "GPT-NeoX", "BERT", "DeBERTa-v2", "ModernBERT"])
def test_column_is_autograd_with_other_positions_detached(name: str) -> None:
    tiny = build(name)
    found, captured, local = estimate(tiny, tiny.answer, Column(), recompute=False)  # whole blocks; see test_column.py
    keep = captured.passes[0].delta.ne(0).any(-1)
    assert (keep.sum(1) == 1).all()  # one position per row contributes to the loss
    handles = cut_at_block_inputs(tiny, keep)
    tiny.answer().backward()
    for handle in handles:
        handle.remove()
    inside = [key for key in found if key.startswith(local.residual.path)]
    for key in inside:
        true = tiny.model.get_parameter(key).grad  # softmax cancels a key's bias: zero up to rounding
        assert relative(found[key], true) < 1e-10 or true.norm() < 1e-12, key
    exact, *_ = estimate(tiny, tiny.answer, Exact())
    assert any(relative(found[key], exact[key]) > 1e-3 for key in inside)  # and it is not the gradient itself


@pytest.mark.parametrize("name", ["Llama", "GPT-J", "BERT"])
def test_skip_is_autograd_with_the_stream_above_taken_as_the_identity(name: str) -> None:
    """Each block alone: its output times delta, with its input a constant."""
    tiny = build(name)
    found, captured, local = estimate(tiny, tiny.every, Skip())
    delta = captured.passes[0].delta
    products = []

    def alone(module, args, output):
        hidden = hidden_of(output)
        products.append((hidden * delta).sum())
        return with_hidden(output, hidden.detach())

    handles = [block.register_forward_hook(alone) for block in local.residual.blocks]
    tiny.every()
    for handle in handles:
        handle.remove()
    sum(products).backward()
    inside = [key for key in found if key.startswith(local.residual.path)]
    for key in inside:
        if not (key.endswith("k_proj.bias") or "key.bias" in key):  # softmax cancels these: zero up to rounding
            assert relative(found[key], tiny.model.get_parameter(key).grad) < 1e-10, key


def matrix(surrogate: MeanJacobian, index: int) -> torch.Tensor:
    """B_l (d, d) of a block, which multiplies rows from the right: e_l = delta B_l."""
    down, up = surrogate.down[index], surrogate.up[index]
    return surrogate.trust[index] * (torch.eye(len(down), dtype=down.dtype) + down @ up)


def test_feedback_multiplies_delta_by_its_matrix() -> None:
    """In a network whose blocks after block 0 are linear, B_0 of the true Jacobian gives the exact gradient."""
    generator = torch.Generator().manual_seed(0)

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(6, 6, bias=False, dtype=torch.float64)
            self.b = torch.nn.Linear(6, 6, bias=False, dtype=torch.float64)

        def forward(self, hidden_states):
            return hidden_states + self.b(self.a(hidden_states))

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([Linear(), Linear(), Linear()])
    x = torch.randn(5, 4, 6, dtype=torch.float64, generator=generator)

    def loss():
        hidden = x
        for layer in model.layers:
            hidden = layer(hidden)
        return hidden.square().mean()

    jacobian = torch.eye(6, dtype=torch.float64)
    for layer in (model.layers[2], model.layers[1]):  # a row error times (I + W_b W_a)
        jacobian = jacobian @ (torch.eye(6, dtype=torch.float64) + layer.b.weight @ layer.a.weight)
    trust = 0.8
    low = (jacobian / trust - torch.eye(6, dtype=torch.float64)).detach()
    surrogate = MeanJacobian({0: low}, {0: torch.eye(6, dtype=torch.float64)}, {0: trust})
    assert torch.allclose(matrix(surrogate, 0), jacobian)

    class Tiny:
        pass

    tiny = Tiny()
    tiny.model = model
    found, *_ = estimate(tiny, loss, surrogate)
    loss().backward()
    for key in ("layers.0.a.weight", "layers.0.b.weight", "layers.2.a.weight"):
        assert relative(found[key], model.get_parameter(key).grad) < 1e-10
    assert relative(found["layers.1.a.weight"], model.get_parameter("layers.1.a.weight").grad) > 1e-2  # delta itself


def llama_column(model, ids, targets, words):
    """The gradient of a Llama through the answer column, by hand: formulas, no autograd. Returns dense by name."""
    config, answer = model.config, ids.shape[1] - 1
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    width = config.hidden_size // heads
    grads: dict[str, torch.Tensor] = {}

    def add(name, value):
        grads[name] = grads.get(name, 0) + value

    def normed(x):
        rms = (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        return x / rms, rms

    def norm_back(t, xh, rms):
        return (t - xh * (t * xh).mean(-1, keepdim=True)) / rms

    with torch.no_grad():
        streams = model.model(ids, output_hidden_states=True)
        hidden = list(streams.hidden_states)
        cos, sin = model.model.rotary_emb(hidden[0], torch.arange(answer + 1)[None])
        cos, sin = cos[0], sin[0]

        def turn(v, t):  # rotary rotation at position t of (..., width)
            half = torch.cat([-v[..., width // 2 :], v[..., : width // 2]], -1)
            return v * cos[t] + half * sin[t]

        def turn_back(v, t):
            w = v * sin[t]
            half = torch.cat([w[..., width // 2 :], -w[..., : width // 2]], -1)
            return v * cos[t] + half

        captured = {}
        handle = model.model.layers[-1].register_forward_hook(lambda m, a, o: captured.update(x=hidden_of(o)))
        model(ids)
        handle.remove()
        tops = captured["x"]
        for row in range(len(ids)):
            xh, rms = normed(tops[row, answer])
            nf = model.model.norm.weight
            y = nf * xh
            logits = model.lm_head.weight[words] @ y
            dl = (logits.softmax(0) - torch.eye(len(words), dtype=y.dtype)[targets[row]]) / len(ids)
            dy = dl @ model.lm_head.weight[words]
            error = norm_back(nf * dy, xh, rms)
            for index in reversed(range(len(model.model.layers))):
                layer, prefix = model.model.layers[index], f"model.layers.{index}."
                x = hidden[index][row]
                n1h, r1 = normed(x)
                n1 = layer.input_layernorm.weight * n1h
                attention = layer.self_attn
                q = turn((attention.q_proj.weight @ n1[answer]).view(heads, width), answer)
                k = torch.stack([turn((attention.k_proj.weight @ n).view(-1, width), t) for t, n in enumerate(n1)])
                v = torch.stack([(attention.v_proj.weight @ n).view(-1, width) for n in n1])
                mixed = torch.zeros(heads, width, dtype=x.dtype)
                p = []
                for h in range(heads):
                    p.append(((k[:, h // groups] @ q[h]) / math.sqrt(width)).softmax(0))
                    mixed[h] = p[h] @ v[:, h // groups]
                mid = x[answer] + attention.o_proj.weight @ mixed.flatten()
                n2h, r2 = normed(mid)
                n2 = layer.post_attention_layernorm.weight * n2h
                g, u = layer.mlp.gate_proj.weight @ n2, layer.mlp.up_proj.weight @ n2
                s = g.sigmoid()
                active = g * s * u
                add(prefix + "mlp.down_proj.weight", torch.outer(error, active))
                eh = layer.mlp.down_proj.weight.t() @ error
                eu, eg = eh * g * s, eh * u * s * (1 + g * (1 - s))
                add(prefix + "mlp.gate_proj.weight", torch.outer(eg, n2))
                add(prefix + "mlp.up_proj.weight", torch.outer(eu, n2))
                en = layer.mlp.gate_proj.weight.t() @ eg + layer.mlp.up_proj.weight.t() @ eu
                add(prefix + "post_attention_layernorm.weight", en * n2h)
                emid = error + norm_back(layer.post_attention_layernorm.weight * en, n2h, r2)
                add(prefix + "self_attn.o_proj.weight", torch.outer(emid, mixed.flatten()))
                ea = (attention.o_proj.weight.t() @ emid).view(heads, width)
                eq, ek = torch.zeros_like(q), torch.zeros_like(k)
                ev = torch.zeros_like(v)
                for h in range(heads):
                    kv = h // groups
                    ev[:, kv] += torch.outer(p[h], ea[h])
                    score = v[:, kv] @ ea[h]
                    ds = p[h] * (score - p[h] @ score) / math.sqrt(width)
                    eq[h] = turn_back(ds @ k[:, kv], answer)
                    for t in range(answer + 1):
                        ek[t, kv] += turn_back(ds[t] * q[h], t)
                add(prefix + "self_attn.q_proj.weight", torch.outer(eq.flatten(), n1[answer]))
                add(prefix + "self_attn.k_proj.weight", ek.flatten(1).t() @ n1)
                add(prefix + "self_attn.v_proj.weight", ev.flatten(1).t() @ n1)
                en1 = ek.flatten(1) @ attention.k_proj.weight + ev.flatten(1) @ attention.v_proj.weight
                en1[answer] += attention.q_proj.weight.t() @ eq.flatten()
                add(prefix + "input_layernorm.weight", (en1 * n1h).sum(0))
                error = emid + norm_back(layer.input_layernorm.weight * en1, n1h, r1)[answer]
    return grads


def test_column_of_a_llama_is_the_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped queries, rotary positions, RMS norms and the gated MLP, written out position by position."""
    tiny = build("Llama")

    def norm(self, x):  # transformers computes it in float32 for all types of weights
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(type(tiny.model.model.norm), "forward", norm)
    ids = torch.tensor([[5, 9, 30, 22, 7, 41], [8, 3, 17, 50, 29, 12]])
    targets, words = torch.tensor([1, 0]), [5, 6]
    found, *_ = estimate(tiny, lambda: cross_entropy(tiny.model(ids).logits[:, -1, words], targets), Column())
    by_hand = llama_column(tiny.model, ids, targets, words)
    assert set(by_hand) == {key for key in found if key.startswith("model.layers")}
    for key, value in by_hand.items():
        assert relative(found[key], value) < 1e-10, key


def test_norms_by_products_of_factors() -> None:
    left, right = torch.randn(30, 4, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    assert product_square_norm(left, right) == pytest.approx(float((left @ right.t()).square().sum()), rel=1e-12)


def test_factors_larger_than_their_product_are_settled() -> None:
    gradient = Gradient()
    gradient.add_product("small", torch.randn(30, 4), torch.randn(20, 4))
    gradient.add_product("large", torch.randn(8, 50), torch.randn(6, 50))
    product = gradient.dense("large")
    gradient.settle()
    assert set(gradient.left) == {"small"} and torch.equal(gradient.whole["large"], product)


def test_gradients_add() -> None:
    one, two = Gradient(), Gradient()
    a, b = torch.randn(4, 2), torch.randn(3, 2)
    for gradient in (one, two):
        gradient.add_product("w", a, b)
        gradient.add_whole("n", torch.ones(3))
    one.add(two)
    assert torch.allclose(one.dense("w"), 2 * a @ b.t()) and one.dense("n").tolist() == [2, 2, 2]
    assert one.square_norm("w") == pytest.approx(float(one.dense("w").square().sum()), rel=1e-5)
    assert one.square_norm("n") == 12


def test_the_norm_of_parts_that_cancel_is_that_of_their_sum():
    """Two positions with nearly opposite parts; float32 Gram matrices gave squares below 0."""
    generator = torch.Generator().manual_seed(0)
    for distance in (1e-1, 1e-2, 1e-3, 1e-4):
        for _ in range(50):
            left, right = (torch.randn(64, 1, generator=generator) for _ in range(2))
            change = distance * torch.randn(64, 1, generator=generator)
            left, right = torch.cat([left, -left - change], 1), torch.cat([right, right], 1)
            exact = float((left.double() @ right.double().t()).square().sum())
            assert product_square_norm(left, right) == pytest.approx(exact, rel=2e-3)
    left[:, 1] = -left[:, 0]
    assert product_square_norm(left, right) == 0.0
    left[:, 1] *= 1 + 1e-6  # the difference is less than the rounding of a step's products
    assert product_square_norm(left, right) == 0.0
