"""The outlines of the methods agree with the classes, and are read without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from metazo.optimizers import METHODS, OPTIMIZERS, ZOOptimizer
from metazo.optimizers.outline import Elsewhere, methods, outlines
from metazo.optimizers.registry import register


def own() -> list[str]:
    """The methods of the library: the outlines do not contain those that a test may have registered."""
    return [name for name, cls in METHODS.items() if cls.__module__.startswith("metazo.")]


def test_every_method_has_an_outline() -> None:
    assert list(outlines()) == own()


@pytest.mark.parametrize("name", own())
def test_an_outline_says_what_the_class_says(name: str) -> None:
    cls, outline = METHODS[name], outlines()[name]
    assert cls is not outline and cls.__doc__ == outline.__doc__ and cls.__qualname__ == outline.__qualname__
    found = outline.hyperparameters()
    assert list(found) == list(cls.hyperparameters())
    for key, parameter in cls.hyperparameters().items():
        assert (found[key].default, found[key].kind) == (parameter.default, parameter.kind), key
        if "MeanJacobian" not in str(parameter.annotation):  # a class of another package
            assert outline.hint(key) == cls.hint(key), key
    documented = [each.__doc__ for each in cls.__mro__ if issubclass(each, ZOOptimizer)]
    assert set(documented) <= {each.__doc__ for each in outline.__mro__}


def test_what_a_constructor_takes_from_elsewhere_is_no_type() -> None:
    assert outlines()["feedback"].hint("tuner") == str | Path | Elsewhere | None


def test_methods_of_a_process_that_has_imported_them_are_the_classes() -> None:
    """A class that was registered at run time is found as well."""

    @register
    class Late(METHODS["mezo"]):
        """MeZO under another name."""

        name = "late"

    try:
        assert methods()["late"] is Late and methods()["mezo"] is METHODS["mezo"]
    finally:
        del METHODS["late"], OPTIMIZERS["late"]


def test_outlines_are_read_without_torch() -> None:
    code = "import sys; from metazo.optimizers.outline import methods; print(len(methods()), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(len(own())), "False"], done.stderr


SPOILT = """
import os
import torch  # once for all
from metazo.optimizers import outline, registry

for spoilt in (
    "pass",
    "outline._read = None",
    "outline._literal = lambda value: value.missing",
    "outline.outlines()['lozo'].hint = classmethod(lambda cls, key: missing)",
):
    if not os.fork():
        exec(spoilt)
        print(outline.methods() is registry.METHODS, flush=True)
        os._exit(0)
    os.wait()
"""


def test_classes_are_imported_if_a_source_or_a_signature_cannot_be_read() -> None:
    done = subprocess.run([sys.executable, "-c", SPOILT], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "True", "True", "True"], done.stderr
