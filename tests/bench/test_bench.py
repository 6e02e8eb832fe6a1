"""metazo bench: each case is timed under its own name, bad flags end with a sentence, an interrupted run keeps its results."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from metazo.bench import measurements, memory, picture, render, steps, suites
from metazo.bench.models import SIZES, build, lm_loss
from metazo.bench.processors import labels
from metazo.bench.published import PublishedLoop
from metazo.bench.steps import CORE, FORWARDS, METHODS, NARROW, PASSES, PUBLISHED
from metazo.bench.timing import interleaved, ratios, spread
from metazo.errors import UserError
from metazo.io.lock import FolderLock
from metazo.noise import TorchOrderNoise
from metazo.optimizers import MeZO
from metazo.step import pending
from metazo.step.pending import Pending
from metazo.step.precision import Compensated, Master
from metazo_cli.main import main
from tests.io.test_lock import named

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    code: int
    out: str
    error: str


def metazo(*arguments: str) -> Ended:
    """The command line, in this process."""
    out, error = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["metazo", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            main()
    except SystemExit as end:
        return Ended(int(end.code or 0), out.getvalue(), error.getvalue())
    finally:
        sys.argv = before
    return Ended(0, out.getvalue(), error.getvalue())


def test_the_restated_loop_is_mezo_in_the_published_order():
    def problem() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(0, 3, (8,))
    plain, ours = problem(), problem()
    loop = PublishedLoop(plain.named_parameters(), lr=1e-2, seed=11)
    mezo = MeZO(ours.named_parameters(), lr=1e-2, noise=TorchOrderNoise(11))
    start = plain[0].weight.detach().clone()
    for _ in range(5):
        loop.step(lambda: nn.functional.cross_entropy(plain(x), y))
        mezo.step(lambda: nn.functional.cross_entropy(ours(x), y))
    for a, b in zip(plain.parameters(), ours.parameters()):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-13)
    assert not torch.allclose(plain[0].weight, start, atol=1e-4)


def test_rounds_are_interleaved_and_the_first_two_are_not_counted():
    calls: list[str] = []
    samples = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=5)
    assert len(calls) == 21 and all(len(values) == 5 for values in samples.values())
    turns = ["".join(calls[i : i + 3]) for i in range(0, 21, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns) and len(set(turns)) > 1
    assert len(interleaved({"a": lambda: None}, rounds=5, seconds=1e9)["a"]) == 100
    slow = iter(
        [0.02, 0.02, 0.0, 0.0]
    )  # the second call of a step compiles the kernel that also makes the update that waited
    assert max(interleaved({"a": lambda: time.sleep(next(slow))}, rounds=2)["a"]) < 0.02


def test_of_a_case_that_runs_twice_in_a_row_the_second_is_counted():
    calls: list[str] = []
    cases = {name: lambda name=name: [calls.append(name), time.sleep(0.02 * (calls.count(name) % 2))] for name in "ab"}
    samples = interleaved(cases, rounds=3, twice=True)
    assert calls[::2] == calls[1::2] and len(calls) == 20
    assert max(min(values) for values in samples.values()) < 0.02 and len(samples["a"]) == 3


def test_what_is_kept_of_narrow_weights_is_not_begun_anew(monkeypatch: pytest.MonkeyPatch):
    """The steps of one policy changed the weights of the others, whose masters were made again within the time measured."""
    changed = []
    for kind in (Master, Compensated):
        follow = kind.follow
        monkeypatch.setattr(
            kind, "follow", lambda place, follow=follow: [changed.append(follow(place)), changed[-1]][1]
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights in place
        steps.measure("1M", (1, 4), list(NARROW), rounds=2, seconds=0, dtype="bfloat16")
    assert changed and not any(changed)


def test_spread_and_ratios():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0, "rounds": 5}
    assert ratios({"a": [2.0, 9.0], "b": [1.0, 3.0]}, "a", "b") == [2.0, 3.0]


def test_sizes_are_what_they_are_called():
    with torch.device("meta"):
        for size in SIZES:
            count = sum(parameter.numel() for parameter in build(size, device="meta").parameters())
            wanted = float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]
            assert abs(count / wanted - 1) < 0.06, (size, count)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench")
    done = metazo("bench", "--quick", "--out", str(out), "--json")
    assert done.code == 0, done.error
    assert json.loads(done.out) == json.loads((out / "speed.json").read_text())
    return out


def test_a_quick_run_has_every_suite(quick: Path):
    (result,) = measurements.read(quick / "speed.json")["processors"]
    assert set(result["suites"]) == set(suites.SUITES)
    (part,) = result["suites"]["steps"].values()
    rows = {row["case"]: row for row in part["rows"]}
    assert {*METHODS, FORWARDS} <= set(rows) and set(CORE) <= set(METHODS)
    assert all(row["ratio"]["rounds"] >= 2 for row in rows.values())
    assert rows[FORWARDS]["ratio"]["median"] == 1 and rows[PUBLISHED]["ratio"]["median"] > 1
    assert (quick / "speed.png").stat().st_size > 10_000
    shown = (quick / "speed.md").read_text()
    assert "| MeZO, Rademacher |" in shown and "of at least 2 interleaved rounds." in shown


def test_steps_join_their_updates_with_the_next_probes_as_in_a_run(monkeypatch: pytest.MonkeyPatch):
    """The methods are measured by turns on the same weights; a published loop that replaced them parted the two."""
    alone, joined = [], []
    apply, two = Pending.apply, pending.add_two_all_
    monkeypatch.setattr(Pending, "apply", lambda waiting: [alone.extend(waiting.moves), apply(waiting)])
    monkeypatch.setattr(pending, "add_two_all_", lambda *given: [joined.append(len(given[2])), two(*given)])
    steps.measure("1M", (1, 4), [PUBLISHED, "MeZO"], rounds=2, seconds=0)
    assert not alone and joined == [len(list(build("1M").parameters()))] * 3


def test_memory_sees_the_moments_of_adam(quick: Path):
    """Gradients and two moments: 3 W. MeZO in place: nothing, here up to the size of the system's pages."""
    (result,) = measurements.read(quick / "speed.json")["processors"]
    (part,) = result["suites"]["memory"].values()
    zeroth, first = part["rows"]
    assert first["weights"] == zeroth["weights"] > 3e7
    assert first["above"] > 2.5 * first["weights"]
    assert zeroth["above"] < 0.2 * zeroth["weights"]


def test_a_measurement_of_memory_that_fails_says_why_and_one_of_memory_alone_speaks_of_no_rounds(quick: Path):
    with pytest.raises(RuntimeError, match="(?s)measurement of nothing ended with 1: .*KeyError: 'nothing'"):
        memory.measure("1M", (1, 4), ["nothing"])
    result = measurements.read(quick / "speed.json")
    (there,) = result["processors"]
    there["suites"] = {"memory": there["suites"]["memory"]}
    assert "rounds" not in render.sentence(result) and not render.sentence(result).endswith("..")


def test_figures_name_the_machine_by_kind_alone(quick: Path):
    text = (quick / "speed.json").read_text()
    assert measurements.environment("cpu", "float32", True)["cpu"] in text and version("torch") in text
    assert platform.node() not in text or len(platform.node()) < 4
    assert str(Path.home()) not in text and str(ROOT) not in text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--suite", "speed"), "--suite 'speed' is not measured here: choose steps, kernels, memory, precision, meta"),
        (("--suite", "steps", "--suite", "feedback"), "--suite feedback is measured by itself"),
        (("--suite", "feedback", "--rounds", "9"), "leave other suites and --rounds out"),
        (("--suite", "steps/2x2"), "choose steps/134M-16x128"),
        (("--device", "tpu"), "--device 'tpu' is not measured: choose cpu or cuda."),
        (("--rounds", "2"), "5"),
    ],
)
def test_bad_flags_end_with_a_sentence(flags: tuple[str, ...], sentence: str, tmp_path: Path):
    done = metazo("bench", *flags, "--out", str(tmp_path / "out"))
    assert done.code == 2
    assert sentence in " ".join(done.error.split()), done.error
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so():
    done = metazo("bench", "--device", "cuda")
    assert done.code == 2 and "torch sees no CUDA device here" in " ".join(done.error.split())


def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path):
    def interrupt(tick) -> suites.Rows:
        raise KeyboardInterrupt

    def row(value: int):
        return lambda tick: [{"case": "a", "ratio": spread([float(value)])}]

    settings = suites.Settings(quick=True)
    chosen = [suites.Part("steps", "one", row(1)), suites.Part("steps", "two", interrupt)]
    with pytest.raises(KeyboardInterrupt):
        suites.run(chosen, tmp_path, settings)
    (result,) = measurements.read(tmp_path / "speed.json")["processors"]
    assert list(result["suites"]["steps"]) == ["one"]
    (result,) = suites.run([suites.Part("steps", "two", row(2))], tmp_path, settings)["processors"]
    both = result["suites"]["steps"]
    assert [both[name]["rows"][0]["ratio"]["median"] for name in both] == [1, 2]


@pytest.mark.parametrize("suite", ["kernels", "feedback"])
def test_one_bench_at_a_time_writes_into_a_folder(suite: str, tmp_path: Path):
    """The one that ended last wrote its own figures alone."""
    with FolderLock(tmp_path):
        done = metazo("bench", "--quick", "--suite", suite, "--out", str(tmp_path))
    assert done.code == 2 and f"--out {tmp_path} is in use by {named(os.getpid())}" in done.error
    assert not list(tmp_path.iterdir())


def test_figures_of_other_versions_or_of_no_bench_are_not_mixed_in(tmp_path: Path):
    settings = suites.Settings(quick=True)
    here = measurements.environment("cpu", "float32", True)
    suites.run([], tmp_path, settings)
    suites.run([], tmp_path, settings)  # a file of the same settings may be extended
    other = {"environment": here | {"torch": "1.0"}, "suites": {}}
    measurements.write(tmp_path / "speed.json", {"format": 2, "processors": [other]})
    with pytest.raises(UserError, match="torch '1.0'.*choose another `out`"):
        suites.run([], tmp_path, settings)
    for text in ("{", "[]", '{"format": 3, "processors": []}', '{"format": 2, "processors": [{"environment": 1}]}'):
        (tmp_path / "speed.json").write_text(text)
        with pytest.raises(UserError, match=r"speed\.json"):
            suites.run([], tmp_path, settings)


def processor(cpu: str, median: float, **environment: object) -> dict:
    """The figures of one processor: a step of MeZO at one shape, and the suites that a picture needs."""
    rows = [
        {"case": FORWARDS, "ratio": spread([1.0]), "seconds": spread([0.5])},
        {"case": PASSES, "ratio": spread([0.1]), "seconds": spread([0.05])},
        {"case": "MeZO", "ratio": spread([median]), "seconds": spread([median / 2])},
    ]
    found = {"cpu": cpu, "cores": 2, "device": "cpu", "dtype": "float32", "quick": False} | environment
    found |= dict.fromkeys(("torch", "numba", "transformers", "python"), "1")
    return {
        "environment": found,
        "suites": {"steps": {"134M-1x32": {"date": "2026-01-01", "load": [0.0, 0.0], "rows": rows}}},
    }


def test_another_processor_gets_a_place_of_its_own(tmp_path: Path):
    path, settings = tmp_path / "speed.json", suites.Settings(quick=True)
    theirs = processor("AMD EPYC", 1.5)
    measurements.write(path, {"format": 2, "processors": [theirs]})
    row = [{"case": "a", "ratio": spread([1.0])}]
    result = suites.run([suites.Part("steps", "one", lambda tick: row)], tmp_path, settings)
    assert measurements.read(path) == result
    assert result["processors"][0] == theirs and len(result["processors"]) == 2
    assert result["processors"][1]["suites"]["steps"]["one"]["rows"] == row


def test_a_file_of_the_first_format_is_read_and_processors_are_merged(tmp_path: Path, monkeypatch):
    amd, intel, newer = (
        processor("AMD EPYC", 1.5),
        processor("Intel(R) Xeon(R) Processor", 1.2),
        processor("AMD EPYC", 9),
    )
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps({"format": 1, **amd}))
    assert measurements.read(first) == {"format": 2, "processors": [amd]}
    measurements.write(second, {"format": 2, "processors": [intel, newer]})
    monkeypatch.setattr(sys, "argv", ["measurements", str(first), str(second)])
    measurements.main()
    assert measurements.read(first) == {"format": 2, "processors": [newer, intel]}
    assert measurements.merged({"processors": [amd]}, {"processors": [intel]})["processors"] == [amd, intel]


def test_processors_are_shown_side_by_side(tmp_path: Path):
    every = [processor("AMD EPYC", 1.5), processor("Intel(R) Xeon(R) Processor", 2.5)]
    other = every[1]["suites"]["steps"]
    other["134M-8x64"] = other["134M-1x32"]  # which the first processor lacks
    alone, result = ({"format": 2, "processors": found} for found in (every[:1], every))
    (one,), (two, more) = render.tables(alone), render.tables(result)
    assert one.heads == ["", "134M (1, 32)"]
    assert two.heads == ["", "AMD EPYC", "Intel Xeon"] and two.title == f"{one.title}: 134M (1, 32)"
    assert more.heads == ["", "Intel Xeon"] and more.title == f"{one.title}: 134M (8, 64)"
    assert two.rows[2] == ["MeZO", "1.50 (1.50–1.50); ≤ 1.5 met", "2.50 (2.50–2.50); ≤ 1.5 not met"]
    assert [row[:2] for row in two.rows] == one.rows
    assert "AMD EPYC, 2 cores" in render.sentence(result) and "Intel Xeon, 2 cores" in render.sentence(result)
    heights = []
    for k, figures in enumerate((alone, result)):
        picture.plot(figures, tmp_path / f"{k}.png")
        heights.append(int.from_bytes((tmp_path / f"{k}.png").read_bytes()[20:24], "big"))
    assert heights[1] == 2 * heights[0]  # one row of axes per processor


def test_processors_of_one_model_are_told_apart():
    def named(*environments: dict) -> list[str]:
        return labels({"processors": [processor("Intel(R) Xeon(R) CPU @ 2.00GHz", 1, **e) for e in environments]})

    assert named({}) == ["Intel Xeon"]
    assert named({"microarchitecture": "skylake"}, {"microarchitecture": "emeraldrapids"}) == [
        "Intel Xeon, skylake",
        "Intel Xeon, emeraldrapids",
    ]
    assert named({"cores": 2}, {"cores": 8}) == ["Intel Xeon, 2 cores", "Intel Xeon, 8 cores"]


def test_the_loss_needs_no_gradient_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    loss = lm_loss(build("1M"), (1, 32))
    assert torch.equal(state, torch.get_rng_state())
    with torch.inference_mode():
        assert 7 < float(loss()) < 10  # ln 4096 is 8.3


@pytest.mark.parametrize(("figures", "document"), [("speed", "speed"), ("speed_gpu", "speed-gpu")])
def test_the_page_of_figures_is_rendered_from_the_committed_json(figures, document):
    """By `python -m metazo.bench.render benchmarks/speed.json docs/speed.md`, and so for a GPU."""
    page = (ROOT / "docs" / f"{document}.md").read_text()
    result = measurements.read(ROOT / "benchmarks" / f"{figures}.json")
    assert render.placed(page, "speed", render.markdown(result, f"{document}.png")) == page
    assert render.placed(page, "speed", "") != page
    for there in result["processors"]:
        assert set(there["suites"]) <= set(suites.SUITES) and not there["environment"]["quick"]


def test_targets_are_judged_by_the_median():
    part = {"date": "", "load": [0.0, 0.0], "rows": [{"case": "MeZO", "ratio": spread([1.0, 2.1, 2.2]), "seconds": {}}]}
    there = {"environment": {"device": "cpu", "cpu": "a"}, "suites": {"steps": {"134M-1x32": part}}}
    result = {"processors": [there]}
    (table,) = render.tables(result)
    assert table.rows == [["MeZO", "2.10 (1.55–2.15); ≤ 1.5 not met"]]
    part["rows"] = [{"case": f"{PUBLISHED} / MeZO", "ratio": spread([9.0])}]
    assert render.tables(result)[0].rows[0][1] == "9.00 (9.00–9.00); ≥ 8 met"
    there["environment"]["device"] = "cuda"  # the targets apply to the CPU
    assert render.tables(result)[0].rows[0][1] == "9.00 (9.00–9.00)"
