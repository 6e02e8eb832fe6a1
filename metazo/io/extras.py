"""Optional packages: the extras that install them, and one message if one is missing.

The core (torch, numpy, numba and small packages) is enough for every optimizer on any `nn.Module`. pyproject.toml lists the
packages of each extra; `tests/io/test_extras.py` runs metazo without each of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from metazo.errors import UserError

PURPOSES = {
    "llm": "language models and their tasks",
    "meta": "gradients through several unrolled steps",
    "report": "plots and reports",
    "peft": "adapters",
    "quant": "quantised models",
    "track": "experiment trackers",
    "trainer": "training loops of transformers",
    "sign": "signatures",
    "ray": "comparisons on a cluster of ray",
}
"""The purpose of each extra's packages."""
_INSTALLED_AS = {"compressed_tensors": "compressed-tensors", "minisign": "py-minisign"}


class MissingPackage(UserError):
    """A package of an extra is not installed."""


NO_PICTURE = (MissingPackage, ImportError, MemoryError)
"""Why a picture may be left out of a result that is complete without it: the package for it is not installed, does not suit the
other packages, or does not fit into the memory that is left."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turn the failed import of an optional package into a MissingPackage (a UserError) that names the extra to install.

        with needs("llm"):
            from transformers import AutoModel

    Args: extra: a name of PURPOSES. Where not to use: around imports of metazo's own modules, or of packages of the core.
    """
    if extra == "llm":  # transformers imports torchao if it is installed, which warns of kernels for other processors
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    except ModuleNotFoundError as error:
        if not error.name or "." in error.name:  # the package is installed, in a version without this module
            raise
        package = _INSTALLED_AS.get(error.name, error.name)
        raise MissingPackage(
            f"{PURPOSES[extra]} need {package}, which is not installed: pip install 'metazo[{extra}]'"
        ) from error
