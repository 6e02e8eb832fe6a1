"""`metazo bench`: the cost of a step beyond its forward passes, in time and memory, on this machine.

timing.py   interleaved measurement          steps.py     a step against two forward passes
models.py   Llamas of random weights         kernels.py   parameters per second, kernel by kernel
published.py  the published loop, restated   memory.py    peak memory above inference, a process each
suites.py   the measurements and their order  meta.py      a meta-step against its passes
measurements.py  speed.json, for each processor       processors.py, render.py, picture.py    tables and plot from it
"""
