"""Gradient estimates from the structure of a residual network: one forward pass, and errors propagated through single blocks.

residual.py     finds the residual stream, the list of blocks
passes.py       one forward pass: loss, delta = dL/d(last block's output), the tail's exact gradients, blocks' inputs
surrogates.py   the error at each block's output: skip, feedback, column, exact
local.py        the gradient of a block from that error, as factors
factors.py      gradients whose matrices are never formed, and their norms
"""
