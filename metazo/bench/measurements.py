"""speed.json: for each processor the machine and versions, and by suite and part the measured rows.

    python -m metazo.bench.measurements benchmarks/speed.json runs/bench/speed.json

adds the processors of the second file to the first; a processor in both is replaced. The file has no names of people or
hosts and no paths.

Format 2 is {"format": 2, "processors": [{"environment": {...}, "suites": {suite: {part: {date, threads, load, rows}}}}, ...]}.
Format 1 held one processor: {"format": 1, "environment": {...}, "suites": {...}}. It is read as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from metazo.errors import UserError
from metazo.io.files import write_whole
from metazo.runs.machine import processor, system, versions

FORMAT = 2
NAME = "speed.json"
PROCESSOR = (
    "quick",
    "device",
    "dtype",
    "cpu",
    "microarchitecture",
    "cores",
    "gpu",
)  # fields that tell two processors apart


NEEDED = ("cpu", "device", "dtype", "python", "torch", "transformers", "numba")  # fields that the tables show


def microarchitecture() -> str | None:
    """LLVM's name of this processor (emeraldrapids, znver4); None without numba. Virtual machines often hide the model."""
    try:
        from llvmlite import binding
    except ImportError:
        return None
    return binding.get_host_cpu_name()


def environment(device: str, dtype: str, quick: bool) -> dict[str, Any]:
    """The facts on which the figures depend; two runs of one processor in one file must share them."""
    found: dict[str, Any] = {
        "quick": quick,
        "device": device,
        "dtype": dtype,
        "cpu": processor(),
        "microarchitecture": microarchitecture(),
        "cores": os.cpu_count(),
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    found |= {"system": system(), "python": platform.python_version()}
    packages = versions(("torch", "transformers", "numba", "numpy", "metazo"))
    return found | {package: number or "not installed" for package, number in packages.items()}


def load_average() -> float | None:
    """The load average over one minute; None if the system does not report it."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def same_processor(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Of two environments."""
    return all(one.get(key) == other.get(key) for key in PROCESSOR)


def opened(path: Path, environment: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of the file, and its entry for the processor of this environment; both are made if missing.

    Raises UserError if the file's figures of this processor were measured with other versions.
    """
    result = read(path) if path.exists() else {"format": FORMAT, "processors": []}
    for there in result["processors"]:
        theirs = there["environment"]
        if same_processor(theirs, environment):
            for key in environment:
                if theirs.get(key) != environment[key]:
                    raise UserError(
                        f"{path} holds figures of this processor with {key} {theirs.get(key)!r}, these would be with "
                        f"{environment[key]!r}: choose another `out`."
                    )
            return result, there
    here = {"environment": environment, "suites": {}}
    result["processors"].append(here)
    return result, here


def read(path: Path) -> dict[str, Any]:
    """The file's content, in format 2. Raises UserError if it is not a file of this kind."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["format"] == 1:
            found = {"environment": result["environment"], "suites": result["suites"]}
            result = {"format": FORMAT, "processors": [found]}
        if result["format"] == FORMAT:
            for there in result["processors"]:
                _check(there)
            return result
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as figures of metazo bench: {error}.") from error
    raise UserError(f"{path} is not of format {FORMAT} of metazo bench; choose another `out`.")


def _check(there: dict[str, Any]) -> None:
    """Raises ValueError, KeyError or TypeError if the entry of a processor lacks what the tables show."""
    environment = _of(there["environment"], dict, "`environment`")
    for key in NEEDED:
        _of(environment.get(key), str, f"`{key}` of `environment`")
    if "cores" not in environment:
        raise ValueError("`environment` has no `cores`")
    for suite, parts in _of(there["suites"], dict, "`suites`").items():
        for name, part in _of(parts, dict, f"suite {suite}").items():
            where = f"{suite}/{name}"
            _of(_of(part, dict, where).get("date"), str, f"`date` of {where}")
            _of(part.get("load"), list, f"`load` of {where}")
            for row in _of(part.get("rows"), list, f"`rows` of {where}"):
                _of(_of(row, dict, f"a row of {where}").get("case"), str, f"`case` of a row of {where}")
                for key in {"seconds", "ratio", "rate"} & row.keys():
                    values = _of(row[key], dict, f"`{key}` of {row['case']} in {where}")
                    for kind in ("median", "low", "high", "rounds"):
                        _of(values.get(kind), (int, float), f"`{kind}` of `{key}` of {row['case']} in {where}")


def _of(value: Any, kind: Any, name: str) -> Any:
    """The value, if it is of this kind."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {value!r:.40}")
    return value


def merged(result: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The processors of the first, then those of the second; if both have a processor, the second entry wins."""
    found = list(result["processors"])
    for there in other["processors"]:
        for k, ours in enumerate(found):
            if same_processor(ours["environment"], there["environment"]):
                found[k] = there
                break
        else:
            found.append(there)
    return {"format": FORMAT, "processors": found}


def write(path: Path, result: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(result, indent=1) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("into", type=Path, help="speed.json to change")
    parser.add_argument("figures", type=Path, help="speed.json with the processors to add")
    given = parser.parse_args()
    write(given.into, merged(read(given.into), read(given.figures)))


if __name__ == "__main__":
    main()
