"""Gradient estimates from the structure of a residual network: one forward pass, and errors pulled through single blocks.

residual.py     the stream of blocks, by structure
passes.py       one forward pass: loss, delta = dL/d(last block's output), the tail's exact gradients, blocks' inputs
surrogates.py   which error each block's output is given: skip, feedback, column, exact
local.py        the gradient of a block from that error, as factors
factors.py      gradients whose matrices are never formed, and their norms
"""
