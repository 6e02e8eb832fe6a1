"""Names, docstrings and constructors of the methods, read from their sources without importing torch.

A command's help has a flag for each hyperparameter. Importing the methods for it would import torch and take a hundred times
as long as reading them. `outlines` runs the class statements of this folder's files without the bodies of functions, so that
Python itself finds bases, signatures and defaults; tests/optimizers/test_outline.py compares them with the classes.

Where not to use: for anything that calls a method. A hyperparameter whose default is not a literal is not read.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from metazo.optimizers import registry
from metazo.optimizers.registry import Method

PREFIX = "metazo.optimizers."


class _Anything(type):
    def __getattr__(cls, name: str) -> type:
        return cls


class Elsewhere(metaclass=_Anything):
    """Replaces imports from outside this folder and the standard library, and their attributes."""


def methods() -> dict[str, type[Method]]:
    """Every method by name: the classes if they are imported or METAZO_METHODS names others, and else their outlines.

    If the source of a method cannot be read as an outline, the classes are imported: slower, and right.
    """
    if not registry.METHODS and not os.environ.get(registry.VARIABLE):
        with suppress(Exception):
            found = outlines()
            for cls in found.values():
                [cls.hint(key) for key in cls.hyperparameters()]  # a signature is read only now
            return found
    registry.load()
    return registry.METHODS


@cache
def outlines() -> dict[str, type[Method]]:
    """The outline of every method of this folder by name, in the order of the registry."""
    found: dict[str, type[Method]] = {}
    files: dict[str, dict[str, Any]] = {"registry": {"Method": Method}}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        _read(path.stem, files, found)
    return dict(sorted(found.items(), key=lambda entry: entry[1].__module__))


def _read(stem: str, files: dict[str, dict[str, Any]], found: dict[str, type[Method]]) -> dict[str, Any]:
    """The names that the class statements of a file of this folder can use; its methods are added to `found`."""
    if stem in files:
        return files[stem]
    names: dict[str, Any] = {"__name__": PREFIX + stem}
    files[stem] = names
    for node in ast.parse((Path(__file__).parent / f"{stem}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name
            here = _read(module.removeprefix(PREFIX), files, found) if module.startswith(PREFIX) else {}
            if module.partition(".")[0] in sys.stdlib_module_names:
                _run(node, names)
            else:
                names |= {alias.asname or alias.name: here.get(alias.name, Elsewhere) for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            registered = any(isinstance(each, ast.Name) and each.id == "register" for each in node.decorator_list)
            node.decorator_list, node.keywords, node.body = [], [], [*_outline(node)]
            node.bases = [base for base in node.bases if issubclass(names.get(ast.unparse(base), object), Method)]
            _run(node, names)
            if registered:
                found[names[node.name].name] = names[node.name]
    return names


def _outline(node: ast.ClassDef) -> Iterator[ast.stmt]:
    """The statements of a class that are kept in its outline; from Python 3.13 on its compiler removes a docstring's margin."""
    yield ast.Expr(ast.Constant(ast.get_docstring(node, clean=False)))
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            statement.body = [ast.Expr(ast.Constant(...))]
            yield statement
        elif isinstance(statement, ast.Assign) and _literal(statement.value):
            yield statement


def _literal(value: ast.expr) -> bool:
    inner = value.args[0] if isinstance(value, ast.Call) and ast.unparse(value.func) == "frozenset" else value
    try:
        ast.literal_eval(inner)
    except ValueError:
        return False
    return True


def _run(statement: ast.stmt, names: dict[str, Any]) -> None:
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    exec(compile(ast.fix_missing_locations(ast.Module([future, statement], [])), names["__name__"], "exec"), names)
