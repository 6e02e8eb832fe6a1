"""A fine-tuned model published as its step log: a few bytes per step, from which `metazo replay` rebuilds the model."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metazo.errors import UserError
from metazo.io.plain import is_plain
from metazo.io.redact import shortened, shown_address
from metazo.step.record import Step
from metazo.steplog.format import encode, line, scan

_PATHS, _NAMES = ("data", "objective", "zoo"), ("task", "tuner")
"""Settings that are paths, also relative ones, and those that may be: texts in others, such as label phrases, may only look
like them."""
_TEXTS = "head", "definition", "trained"
"""Parts of a header with label phrases, prompts and names of classes, which may look like paths; published as they are."""


@dataclass(frozen=True)
class Log:
    """A complete step log; see metazo/steplog/format.py."""

    data: bytes
    header: dict[str, Any]
    """The origin of the steps: base model and the hash of its weights, method, settings, noise, precision, versions."""
    steps: list[Step]
    end: dict[str, Any] | None
    """The kept step and the hash of the model's weights there; None for a run that is not finished."""

    @property
    def base_model(self) -> str:
        return self.header["model"]

    @classmethod
    def from_bytes(cls, data: bytes, origin: str) -> Log:
        """Read and check a log; `origin` names it in the message of the UserError. A torn last record is an error."""
        found = scan(Path(origin), data).sound()
        if found.torn or not found.steps:
            what = f"ends in {found.torn} bytes of a torn record" if found.torn else "holds no steps"
            raise UserError(f"{origin} cannot be published or pulled as a model: it {what}; finish the run first")
        if not is_plain(found.header):
            raise UserError(f"{origin} is a step log whose header is no plain table of text and numbers")
        for name, form in (("model", "[^\\x00]{1,512}"), ("weights", "[0-9a-f]{64}"), ("method", "[a-z0-9-]{1,40}")):
            value = found.header.get(name)
            if not isinstance(value, str) or not value.isprintable() or not re.fullmatch(form, value):
                raise UserError(f"{origin} is a step log whose header has no {name} that can be used")
        return cls(data, found.header, found.steps, found.end)

    def published(self, base_model: str, start: Path | None = None) -> Log:
        """The same log for publication: with this name of the base model, and without local paths. start: the directory in
        which the run was started, if it is known; a relative path there is told from a Hub id."""
        texts = {name: self.header[name] for name in _TEXTS if name in self.header}
        header: dict[str, Any] = _portable(self.header, start) | texts | {"model": base_model}
        if isinstance(header.get("settings"), dict):
            header["settings"] |= {"model": base_model}
        records = [header, *map(encode, self.steps), *([self.end] if self.end else [])]
        parts, chain = [], 0
        for record in records:
            part, chain = line(record, chain)
            parts.append(part)
        return Log(b"".join(parts), json.loads(json.dumps(header)), self.steps, self.end)


def _portable(value: Any, start: Path | None, key: str = "") -> Any:
    """The last name of a path, an address without secrets, or any other value as it is. key: the value's name in the header."""
    if isinstance(value, dict):
        return {key: _portable(part, start, key) for key, part in value.items()}
    if isinstance(value, list):
        return [_portable(part, start) for part in value]
    if isinstance(value, str) and "://" in value:
        return shown_address(value)
    if isinstance(value, str) and (
        key in _PATHS or re.match(r"[/~\\]|\.\.?[/\\]|[A-Za-z]:[/\\]|.*[/\\].*\.ya?ml$", value)
    ):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return shortened(value, start) if isinstance(value, str) and key in _NAMES else value
