"""What happens before the server of `tests.warm` forks, in it or in the process that it is a fork of: what a run imports is
imported, and two steps are taken.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

import torch

import metazo.plots.curves  # noqa: F401
import metazo_cli.main  # noqa: F401
from metazo.io.terminal import Console
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings

threads = torch.get_num_threads()
torch.set_num_threads(1)  # threads do not survive a fork: neither torch's nor those that load weights
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
folder = Path(tempfile.mkdtemp())
settings = {"steps": 2, "batch_size": 2, "train_examples": 8, "dev_examples": 4, "test_examples": 4}
run_settings(FinetuneConfig("pico", "pico_sentiment", folder / "run", **settings), Console(quiet=True))
shutil.rmtree(folder)
del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
torch.set_num_threads(threads)
gc.collect()
gc.freeze()  # a collection in a forked process would touch, and so copy, every object of the server
atexit.register(gc.unfreeze)  # some libraries print a warning if their objects are not collected at the end
