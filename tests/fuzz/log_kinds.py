"""Step logs as metazo log shows and compares them and as metazo replay reads them, and the summary of a finished run."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from metazo.errors import UserError
from metazo.io.terminal import Console
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.folder import RunFolder
from metazo.runs.replay import replay
from metazo.steplog.format import scan
from metazo.steplog.inspect import diff
from metazo_cli import finetune, log
from tests.fuzz.comparison_kinds import DEEP, documents
from tests.fuzz.kind import Kind, to_json
from tests.fuzz.state_kinds import RECORDS, as_log

# -- shown -------------------------------------------------------------------------------------------------------------


SOUND = as_log(RECORDS)


def read_shown(folder: Path) -> None:
    path = folder / "steps.jsonl"
    found = scan(path)
    text = io.StringIO()
    log.tell(found, 5, Console(file=text, width=100))
    other = scan(folder / "sound.jsonl")
    log.tell_differences(diff(found, other), path, other.path, Console(file=text, width=100))
    assert text.getvalue().replace("\n", "").isprintable()
    if path.read_bytes() == SOUND or zlib.crc32(path.read_bytes()) % 40 == 0:
        log.draw(folder / "x.png", found)
    found.sound()


# -- replayed ----------------------------------------------------------------------------------------------------------


@cache
def replayed() -> list[dict[str, Any]]:
    """The records of a real run of two steps, with LoRA and two queries."""
    with TemporaryDirectory() as folder:
        config = FinetuneConfig(
            model="pico", task="pico_topic", out=Path(folder) / "run", steps=2, lr=1e-3, lora=2, method={"queries": 2},
            train_examples=8, dev_examples=4, test_examples=4, batch_size=4, keep="last",
        )  # fmt: skip
        run_settings(config)
        lines = (config.out / "steps.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "crc"} for line in lines]


def with_setting(name: str, value: Any) -> bytes:
    """The log with another setting in its header, and checksums that fit."""
    first, *rest = replayed()
    settings = first["settings"]
    where = settings["method"] if name in settings["method"] else settings
    changed = settings | ({"method": settings["method"] | {name: value}} if where is not settings else {name: value})
    return as_log([first | {"settings": changed}, *rest])


def read_replayed(folder: Path) -> None:
    """The replay reproduces the log, or is refused with the reason."""
    done = replay(folder / "steps.jsonl", "pico")
    assert done.identical is not False or done.differences


# -- the summary of a run ----------------------------------------------------------------------------------------------

SUMMARY: dict[str, Any] = {
    "model": "pico", "task": "pico_topic", "optimizer": "mezo", "steps": 2, "forwards": 4, "seconds": 1.5, "kept_step": 2,
    "before": {"loss": 0.5, "accuracy": 0.5}, "dev": {"loss": 0.5}, "test": {"loss": 0.5, "accuracy": 0.7}, "notes": [],
}  # fmt: skip


def read_summary(folder: Path) -> None:
    found = RunFolder(folder / "run", {}, resume=True).summary()
    if found is None:
        raise UserError("it is no summary, and the run goes on")
    config = FinetuneConfig(model="pico", task="pico_topic", out=folder)
    finetune.show_result(Console(file=io.StringIO()), found, config)


@cache
def replayed_kind() -> Kind:
    return Kind(
        "steps.jsonl",
        [as_log(replayed())],
        documents([replayed()]).map(as_log),
        read_replayed,
        lambda: {
            f"{name}: {value}": with_setting(name, value)
            for name in ("queries", "lora", "weight_decay", "eps")
            for value in (10**9, 10**70, 1e308, -1, "²")
        },
        share=10,
        growth=1024,
    )


KINDS: dict[str, Kind | Callable[[], Kind]] = {
    "shown": Kind(
        "steps.jsonl",
        [SOUND],
        documents([RECORDS, RECORDS[:3]]).map(as_log),
        read_shown,
        dict,
        {"sound.jsonl": as_log([*RECORDS[:3], RECORDS[3] | {"losses": [1e308, 1e308, 1e308]}])},
        share=20,
    ),
    "replayed": replayed_kind,
    "summary": Kind(
        "run/summary.json",
        [to_json(SUMMARY)],
        documents([SUMMARY]).map(to_json),
        read_summary,
        lambda: DEEP,
        {"run/config.json": b"{}"},
    ),
}  # fmt: skip
