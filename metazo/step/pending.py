"""An update that waits for the next probe: one pass over the weights applies both.

A step of the plain loop is three passes: the probe is applied, moved to the other side, and removed together with the
update. If the update waits until the next probe goes on, there are two:

    theta + eps z_t        ->  theta - eps z_t                                    between the evaluations of a step
    theta - eps z_t        ->  theta + (eps - lr c) z_t + eps z_{t+1}             between two steps

The second is rounded like the two passes that it replaces, so that a run's weights are bit-identical.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metazo.kernels.outer import Product, add_product_pairs_, add_products_
from metazo.noise import Move, PhiloxStream, Stream, add_two_all_
from metazo.step.directions import Direction


@dataclass(frozen=True)
class Pending:
    """A requested pass that has not been made yet. moves: multiples of the stream's noise; products: of factors."""

    stream: Stream
    moves: list[Move]
    products: list[Product]

    @classmethod
    def of(cls, direction: Direction, stream: Stream, moves: Sequence[Move]) -> Pending | None:
        """The pass that `direction.add_all_(stream, moves)` would make; None if it cannot wait.

        It cannot wait if the direction is neither noise nor a product of factors, or if the numbers of a seed have to be
        drawn in a fixed order.
        """
        moves = [move for move in moves if move.out.numel()]  # below, an address names a tensor
        parts = direction.parts(stream, moves) if isinstance(stream, PhiloxStream) else None
        return None if parts is None else cls(stream, *parts)

    def apply(self) -> None:
        self.stream.add_all_(self.moves)
        add_products_(self.products)

    def apply_with(self, following: Pending) -> None:
        """This pass and then the following one, joined into one pass on every tensor that both touch in the same way."""
        after = {move.out.data_ptr(): move for move in following.moves if move.beta == 1.0}
        both = [move for move in self.moves if move.out.data_ptr() in after]
        again = [after.pop(move.out.data_ptr()).alpha for move in both]
        then = {product[0].data_ptr(): product for product in following.products if product[4] == 1.0}
        firsts = [product for product in self.products if product[0].data_ptr() in then]
        seconds = [(first[0], *then.pop(first[0].data_ptr())[1:]) for first in firsts]
        joined = {move.out.data_ptr() for move in both} | {first[0].data_ptr() for first in firsts}

        def alone(pending: Pending) -> Pending:
            moves = [move for move in pending.moves if move.out.data_ptr() not in joined]
            products = [product for product in pending.products if product[0].data_ptr() not in joined]
            return Pending(pending.stream, moves, products)

        add_two_all_(self.stream, following.stream, both, again)
        add_product_pairs_(firsts, seconds)
        alone(self).apply()
        alone(following).apply()
