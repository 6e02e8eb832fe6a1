"""Choose by name the tensors of a model that are trained."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from metazo.errors import UserError


def select_trainable(model: nn.Module, train: list[str], freeze: list[str], among: Iterable[str] | None = None) -> int:
    """Set requires_grad by name patterns (`*` and `?`): a tensor is trained if a `train` pattern matches its name (or there
    is no such pattern), no `freeze` pattern does, it is in `among` if that is given, and `save_pretrained` writes it.
    Returns the number of trained weights. Raises UserError for a pattern that matches nothing.
    """
    allowed, left_out = None if among is None else set(among), unsaved(model)
    named = list(model.named_parameters())
    for flag, patterns in (("`train`", train), ("`freeze`", freeze)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name, _ in named):
                if tied := _tied(model, pattern):
                    raise UserError(
                        f"{flag} {pattern!r} names {tied[0]}, which is tied to {tied[1]}: name that instead."
                    )
                examples = ", ".join(name for name, _ in named[:3])
                raise UserError(f"{flag} {pattern!r} names no tensor of the model; its tensors are {examples}, ...")
    for name, parameter in named:
        wanted = not train or any(fnmatchcase(name, pattern) for pattern in train)
        wanted = wanted and (allowed is None or name in allowed) and name not in left_out
        parameter.requires_grad_(wanted and not any(fnmatchcase(name, pattern) for pattern in freeze))
    count = sum(parameter.numel() for _, parameter in named if parameter.requires_grad)
    if not count:
        why = f" ({', '.join(sorted(left_out))}: transformers does not save these)" if left_out else ""
        raise UserError(f"`train` and `freeze` leave no tensor to train{why}.")
    return count


def unsaved(model: nn.Module) -> set[str]:
    """Names of tensors that transformers does not save, because every model of the kind has the same, as Marian's positions. It
    loads them as ones to be trained; the tuned model would then be another when it is read again.
    """
    return {
        f"{prefix}.{key}".lstrip(".")
        for prefix, module in model.named_modules()
        for key in getattr(module, "_keys_to_ignore_on_save", None) or ()
    }


def _tied(model: nn.Module, pattern: str) -> tuple[str, str] | None:
    """A second name of a tensor that the pattern matches, and the name that the tensor goes by."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return next(((name, names[id(p)]) for name, p in every if fnmatchcase(name, pattern)), None)
