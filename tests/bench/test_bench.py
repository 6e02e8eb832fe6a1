"""metazo bench: what it times is what it says, bad flags end with a sentence, an interrupted run keeps what it has."""

from __future__ import annotations

import contextlib
import io
import json
import platform
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from metazo.bench import measurements, render, suites
from metazo.bench.models import SIZES, build, lm_loss
from metazo.bench.published import PublishedLoop
from metazo.bench.steps import CORE, FORWARDS, METHODS, PUBLISHED
from metazo.bench.timing import interleaved, ratios, spread
from metazo.errors import UserError
from metazo.noise import TorchOrderNoise
from metazo.optimizers import MeZO
from metazo_cli.main import main

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


def test_rounds_are_interleaved_and_the_first_is_not_counted():
    calls: list[str] = []
    samples = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=5)
    assert len(calls) == 18 and all(len(values) == 5 for values in samples.values())
    turns = ["".join(calls[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns) and len(set(turns)) > 1
    assert len(interleaved({"a": lambda: None}, rounds=5, seconds=1e9)["a"]) == 100


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
    result = measurements.read(quick / "speed.json")
    assert set(result["suites"]) == set(suites.SUITES)
    (steps,) = result["suites"]["steps"].values()
    rows = {row["case"]: row for row in steps["rows"]}
    assert {*METHODS, FORWARDS} <= set(rows) and set(CORE) <= set(METHODS)
    assert all(row["ratio"]["rounds"] >= 5 for row in rows.values())
    assert rows[FORWARDS]["ratio"]["median"] == 1 and rows[PUBLISHED]["ratio"]["median"] > 1
    assert (quick / "speed.png").stat().st_size > 10_000
    assert "| MeZO, Rademacher |" in (quick / "speed.md").read_text()


def test_memory_sees_the_moments_of_adam(quick: Path):
    """Gradients and two moments: 3 W. MeZO in place: next to nothing, here within the grain of the system's pages."""
    (part,) = measurements.read(quick / "speed.json")["suites"]["memory"].values()
    zeroth, first = part["rows"]
    assert first["weights"] == zeroth["weights"] > 3e7
    assert first["above"] > 2.5 * first["weights"]
    assert zeroth["above"] < 0.2 * zeroth["weights"]


def test_figures_name_the_machine_by_kind_alone(quick: Path):
    text = (quick / "speed.json").read_text()
    assert measurements.environment("cpu", "float32", True)["cpu"] in text and torch.__version__ in text
    assert platform.node() not in text or len(platform.node()) < 4
    assert str(Path.home()) not in text and str(ROOT) not in text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--suite", "speed"), "--suite 'speed' is not measured here: choose steps, kernels, memory, precision, meta"),
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
    assert list(measurements.read(tmp_path / "speed.json")["suites"]["steps"]) == ["one"]
    both = suites.run([suites.Part("steps", "two", row(2))], tmp_path, settings)["suites"]["steps"]
    assert [both[name]["rows"][0]["ratio"]["median"] for name in both] == [1, 2]


def test_figures_of_another_machine_or_of_no_bench_are_not_mixed_in(tmp_path: Path):
    settings = suites.Settings(quick=True)
    suites.run([], tmp_path, settings)
    measurements.write(tmp_path / "speed.json", {"format": 1, "environment": {"cpu": "another"}, "suites": {}})
    with pytest.raises(UserError, match="choose another `out`"):
        suites.run([], tmp_path, settings)
    for text in ("{", "[]", '{"format": 2, "environment": {}, "suites": {}}'):
        (tmp_path / "speed.json").write_text(text)
        with pytest.raises(UserError, match=r"speed\.json"):
            suites.run([], tmp_path, settings)


def test_the_loss_needs_no_gradient_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    loss = lm_loss(build("1M"), (1, 32))
    assert torch.equal(state, torch.get_rng_state())
    with torch.inference_mode():
        assert 7 < float(loss()) < 10  # ln 4096 is 8.3


def test_the_page_of_figures_is_rendered_from_the_committed_json():
    """By `python -m metazo.bench.render benchmarks/speed.json docs/speed.md`; every suite is there."""
    page, result = (ROOT / "docs" / "speed.md").read_text(), measurements.read(ROOT / "benchmarks" / "speed.json")
    assert render.placed(page, "speed", render.markdown(result)) == page
    assert render.placed(page, "speed", "") != page
    readme = (ROOT / "README.md").read_text()
    assert render.placed(readme, "steps", render.short(result)) == readme
    assert set(result["suites"]) <= set(suites.SUITES) and not result["environment"]["quick"]


def test_targets_are_judged_by_the_median():
    part = {"date": "", "load": [0.0, 0.0], "rows": [{"case": "MeZO", "ratio": spread([1.0, 2.1, 2.2]), "seconds": {}}]}
    result = {"environment": {"device": "cpu"}, "suites": {"steps": {"134M-1x32": part}}}
    (table,) = render.tables(result)
    assert table.rows == [["MeZO", "2.10 (1.55–2.15); ≤ 2 not met"]]
    part["rows"] = [{"case": f"{PUBLISHED} / MeZO", "ratio": spread([9.0])}]
    assert render.tables(result)[0].rows[0][1] == "9.00 (9.00–9.00); ≥ 8 met"
    result["environment"]["device"] = "cuda"  # the targets are of the CPU
    assert render.tables(result)[0].rows[0][1] == "9.00 (9.00–9.00)"
