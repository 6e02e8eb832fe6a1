"""U V^T added to a matrix: the compiled loop against addmm, every shape, type and number of threads."""

from __future__ import annotations

import pytest
import torch

from metazo.kernels import outer
from metazo.kernels.outer import add_product_, add_product_pairs_, add_products_, plain_

SHAPES = [(1, 1), (3, 5000), (1000, 7), (5, 1024), (600, 1025), (64, 3, 3, 5)]
EXACT = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 0.05}


def operands(shape: tuple[int, ...], rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    out = torch.randn(shape, generator=generator, dtype=torch.float64)
    left = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    right = torch.randn(out[0].numel(), rank, generator=generator, dtype=torch.float64)
    return out.to(dtype), left.to(dtype), right.to(dtype)


def by_definition(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float, beta: float):
    product = (left.double()[:, None, :] * right.double()[None, :, :]).sum(-1)
    return (beta * out.double() + alpha * product.view(out.shape)).to(out.dtype)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_addmm_and_with_the_sum_written_out(shape, rank, dtype):
    out, left, right = operands(shape, rank, dtype)
    for alpha, beta in ((0.3, 1.0), (-2.0, 0.0), (1.0, 0.9)):
        wanted = by_definition(out, left, right, alpha, beta)
        for form in (add_product_, plain_):
            moved = out.clone()
            form(moved, left, right, alpha, beta)
            torch.testing.assert_close(moved, wanted, rtol=EXACT[dtype], atol=10 * EXACT[dtype])


def test_the_compiled_form_is_in_use(monkeypatch):
    monkeypatch.setattr(outer, "plain_", None)  # to call it would be an error
    out, left, right = operands((40, 30), 2, torch.float32)
    add_product_(out, left, right, 1.0, 1.0)
    with pytest.raises(TypeError):
        add_product_(out.bfloat16(), left, right, 1.0, 1.0)


def test_does_not_depend_on_threads_nor_on_company():
    operand = [operands((900, 1025), rank, torch.float32) for rank in (2, 3)]
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            alone, together = ([(out.clone(), left, right) for out, left, right in operand] for _ in range(2))
            for product in alone:
                add_product_(*product, 0.1, 0.9)
            add_products_([(*product, 0.1, 0.9) for product in together])
            found += [alone, together]
    finally:
        torch.set_num_threads(before)
    for one in found:
        assert all(torch.equal(a[0], b[0]) for a, b in zip(one, found[0]))


@pytest.mark.parametrize("shapes", [((6, 2), (7, 2)), ((5, 2), (8, 2)), ((6, 2), (8, 3)), ((4, 2), (12, 2))], ids=str)
def test_factors_that_do_not_fit_are_refused(shapes):
    """The loop would read memory beyond them."""
    out, good = torch.zeros(6, 8), (torch.ones(6, 2), torch.ones(8, 2))
    left, right = map(torch.ones, shapes)
    if left.shape != (4, 2):  # 4 times 12 entries are as many as those of the matrix
        with pytest.raises(ValueError, match="do not fit"):
            add_product_(out, left, right, 1.0, 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        add_product_pairs_([(out, *good, 1.0, 1.0)], [(out, left, right, 1.0, 1.0)])
    assert not out.any()


def test_a_matrix_that_is_not_contiguous():
    out, left, right = operands((60, 50), 2, torch.float32)
    turned = out.t().contiguous().t()
    add_product_(turned, left, right, 0.5, 1.0)
    torch.testing.assert_close(turned, by_definition(out, left, right, 0.5, 1.0))


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("ranks", [(1, 1), (2, 2), (1, 2), (3, 1), (2, 5), (3, 3)], ids=str)
def test_two_products_in_one_pass_are_as_one_after_the_other(ranks, dtype):
    for shape in SHAPES:
        operand = [operands(shape, rank, dtype) for rank in ranks]
        turn, once = operand[0][0].clone(), operand[0][0].clone()
        (_, left, right), (_, other_left, other_right) = operand
        add_product_(turn, left, right, 0.3, 0.9)
        add_product_(turn, other_left, other_right, -0.7, 1.0)
        add_product_pairs_([(once, left, right, 0.3, 0.9)], [(once, other_left, other_right, -0.7, 1.0)])
        assert torch.equal(once, turn)
        assert not torch.equal(once, operand[0][0])


def test_the_second_of_a_pair_is_added_to_the_same_matrix():
    out, left, right = operands((4, 3), 2, torch.float32)
    for second in ((out, left, right, 1.0, 0.5), (out.clone(), left, right, 1.0, 1.0)):
        with pytest.raises(ValueError, match="one matrix"):
            add_product_pairs_([(out, left, right, 1.0, 1.0)], [second])
