"""Fuzz every kind of file that metazo reads, and keep the table of results.

    python -m tests.fuzz.run --cases 10000 --start 7000000 --render docs/guarantees.md     all kinds, and the page's table
    python -m tests.fuzz.run --kind pth --mode bytes --only 4711        one case again

`--cases 10000` reads 10,000 byte mutations and 2,500 documents of each kind. If a command was stopped, the same command
continues: kinds whose results are already there are not read again (unless `--again` is given). Case n of a kind is the
same bytes on every machine. Each kind runs in a process of its own, whose memory may grow by
256 MiB (1 GiB if it loads a model) after it has read its valid files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

MODES = ("hostile", "bytes", "documents")
TABLE = Path(__file__).with_name("results.json")
BEGIN, END = "<!-- fuzz: made by tests/fuzz/run.py -->", "<!-- end of fuzz -->"


def kinds() -> dict[str, Any]:
    from tests.fuzz import comparison_kinds, log_kinds, model_kinds, run_kinds, state_kinds, zoo_kinds

    runs = zoo_kinds.KINDS | run_kinds.KINDS | state_kinds.KINDS
    return runs | comparison_kinds.KINDS | log_kinds.KINDS | model_kinds.KINDS


def kind_of(name: str) -> Any:
    found = kinds()[name]
    return found() if callable(found) else found


def warm_up(kind: Any, folder: Path) -> None:
    """Read the valid files, so that imports and memory that are needed once are not attributed to a hostile file."""
    from metazo.errors import UserError

    kind.set_up(folder)
    for content in [*kind.seeds, b"", kind.seeds[0][:-3], kind.seeds[0] + b"x"]:
        read = kind.case(folder, content)
        try:
            read(folder)
        except UserError:
            assert content not in kind.seeds or b"https://" in content or b"hub" in content, "a sound file is refused"


def limit_memory(growth: int) -> None:
    """Set RLIMIT_AS to the present address space and `growth` MiB."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + growth * 2**20,) * 2)


def fuzz(kind: Any, mode: str, start: int, cases: int, folder: Path) -> dict[str, Any]:
    """Run cases of a kind. Returns counts, the slowest case, memory, and failures."""
    from tests.fuzz.mutations import mutated
    from tests.fuzz.watch import watch

    found: dict[str, Any] = {"cases": 0, "accepted": 0, "refused": 0, "slowest": 0.0, "failures": []}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def run(content: bytes, name: object) -> None:
        try:
            accepted, seconds = watch().check(kind.case(folder, content), folder)
            found["accepted" if accepted else "refused"] += 1
            if accepted and mode == "hostile":
                raise AssertionError("it was accepted")
            found["slowest"] = max(found["slowest"], round(seconds, 3))
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            found["failures"].append({"case": name, "error": text})
        found["cases"] += 1

    if mode == "bytes":
        for number in range(start, start + cases):
            run(mutated(number, kind.seeds), number)
    elif mode == "hostile":
        for name, content in kind.hostile.items():
            run(content, name)
    else:

        @seed(start)
        @settings(max_examples=max(1, cases // 4), database=None, deadline=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(kind.documents)
        def documents(content: bytes) -> None:
            run(content, [start, found["cases"]])

        documents()
    found["MiB"] = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1)
    return found


def worker(name: str, modes: list[str], start: int, cases: int) -> None:
    """Runs in a process of its own: limits its memory, prints the outcome of each mode as JSON."""
    import torch

    torch.set_num_threads(1)
    kind = kind_of(name)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        inside = Path(folder) / "inside"
        inside.mkdir()
        warm_up(kind, inside)
        _ = kind.hostile  # made before memory is limited: some take more
        limit_memory(kind.growth)
        outcomes = {mode: fuzz(kind, mode, start, cases, inside) for mode in modes}
        left = [path.name for path in Path(folder).iterdir() if path != inside]
        if left:
            outcomes[modes[-1]]["failures"].append({"case": None, "error": f"left {left} outside the folder"})
    print(json.dumps(outcomes))


def portion(name: str, modes: list[str], start: int, cases: int) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.run",
        "--worker",
        "--kind",
        name,
        "--start",
        str(start),
        "--cases",
        str(cases),
    ]
    command += [part for mode in modes for part in ("--mode", mode)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"{name}: exit {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # a kind may print what it shows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="byte mutations of each kind; of documents a quarter")
    parser.add_argument("--kind", action="append", help="only this kind (may be repeated)")
    parser.add_argument("--mode", choices=MODES, action="append")
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="run this one byte mutation and let its error show")
    parser.add_argument("--again", action="store_true", help="read also what the results have of these cases")
    parser.add_argument(
        "--render", type=Path, help="a page whose table is made anew; with --cases 0 from the results alone"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.kind[0], args.mode, args.start, args.cases)
        return
    if args.only is not None:
        show(args.kind[0], args.only)
        return
    failed = False
    for name in (args.kind or kinds()) if args.cases else ():
        started, table = time.monotonic(), json.loads(TABLE.read_text()) if TABLE.exists() else {"kinds": {}}
        asked = {"start": args.start, "of": args.cases}
        kept = {} if args.again else table["kinds"].get(name, {})
        modes = [m for m in args.mode or MODES if {key: kept.get(m, {}).get(key) for key in asked} != asked]
        outcomes = portion(name, modes, args.start, args.cases) if modes else {}
        for mode, outcome in outcomes.items():
            print(f"{name} {mode}: {outcome}", flush=True)
            failed |= bool(outcome["failures"])
            outcome |= asked
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        table["python"] = platform.python_version()
        table["kinds"].setdefault(name, {}).update(outcomes)
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    if args.render:
        head, rest = args.render.read_text().split(BEGIN)
        table = markdown(json.loads(TABLE.read_text()))
        args.render.write_text(f"{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")
    sys.exit(failed)


def markdown(table: dict[str, Any]) -> str:
    """The kept results as in docs/guarantees.md."""
    rows = [
        "| kind | by hand | byte mutations, read | documents, read | failures | slowest | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, modes in sorted(table["kinds"].items()):
        parts = [modes[mode] for mode in MODES if mode in modes]

        def read(mode: str, modes: dict[str, Any] = modes) -> str:
            return f"{modes[mode]['cases']:,}, {modes[mode]['accepted']:,}" if mode in modes else ""

        rows.append(
            f"| {name} | {modes.get('hostile', {}).get('cases', '')} | {read('bytes')} | {read('documents')} | "
            f"{sum(len(part['failures']) for part in parts)} | {max(part['slowest'] for part in parts):.2f} s | "
            f"{max((modes[mode]['MiB'] for mode in MODES[:2] if mode in modes), default=0):.0f} MiB |"
        )
    return "\n".join(rows)


def show(name: str, number: int) -> None:
    from tests.fuzz.mutations import mutated

    kind = kind_of(name)
    with tempfile.TemporaryDirectory() as folder:
        warm_up(kind, Path(folder))
        content = mutated(number, kind.seeds)
        print(content[:2000])
        kind.case(Path(folder), content)(Path(folder))


if __name__ == "__main__":
    main()
