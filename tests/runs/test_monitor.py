"""Numbers that are not finite: steps are skipped and recorded, causes distinguished and reported with figures and advice."""

from __future__ import annotations

import io
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import metazo
from metazo.errors import UserError
from metazo.io.terminal import Console
from metazo.models.load import load_model
from metazo.runs.config import FinetuneConfig
from metazo.runs.diagnose import diagnose, memory_explained
from metazo.runs.finetune import run_settings
from metazo.runs.monitor import Watch
from metazo.settings import build
from metazo.step.record import Step
from metazo.steplog.format import scan

SMALL = {
    "task": "pico_sentiment", "optimizer": "mezo", "lr": 1e-4, "steps": 6, "batch_size": 2,
    "train_examples": 8, "dev_examples": 4, "test_examples": 0, "snapshot_every": 0, "eval_every": 200,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def base(tiny: Callable[[str], Path]) -> None:
    """The runs are of a model of two layers."""
    SMALL["model"] = str(tiny("llama"))


def config(**settings) -> FinetuneConfig:
    return build(FinetuneConfig, SMALL, {"out": Path("out"), **settings})


def seen(steps: list[Step], total: int = 1000, **settings) -> list[str]:
    said: list[str] = []
    watch = Watch(config(**settings), total, said.append)
    for step in steps:
        watch.see(step, lambda: "as it is.")
    return said


def step(number: int, *losses: float) -> Step:
    return Step(number, (1,), losses, (1.0,) if all(abs(loss) <= 1e4 for loss in losses) else (), (1e-4,))


def console() -> Console:
    """A monitor that stores its messages."""
    return Console(record=True, width=400, file=io.StringIO())


# -- skipped steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["mezo", "first-order-sgd"])
def test_a_step_that_is_skipped_leaves_the_weights_and_a_record(tmp_path, optimizer):
    """max_loss is so low that every step is skipped: the tuned model is the base model, up to the probe's rounding."""
    with pytest.raises(UserError, match="run stopped at step 4: the losses of 4 steps in a row"):
        run_settings(config(out=tmp_path / "run", optimizer=optimizer, max_loss=1e-3, max_bad_steps=4))
    steps = scan(tmp_path / "run" / "steps.jsonl").sound().steps
    assert [step.coefficients for step in steps] == [()] * 4 and all(max(step.losses) > 1e-3 for step in steps)
    all_of_them = {"max_loss": 1e-3, "max_bad_steps": 9, "keep": "last"}
    summary = run_settings(config(out=tmp_path / "all", optimizer=optimizer, **all_of_them))
    assert "Steps that were skipped because a loss was not finite or above `max_loss` 0.001: 6." in summary["notes"]
    kept = load_model(tmp_path / "all" / "model").model
    for a, b in zip(kept.parameters(), load_model(SMALL["model"]).model.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if optimizer == "mezo" else 0)


def test_a_gradient_that_is_not_finite_is_no_loss_above_its_limit():
    said: list[str] = []
    watch = Watch(config(max_bad_steps=3), 100, said.append)
    lost = Step(0, (), (0.5,), (), (1e-4,))
    watch.see(lost, lambda: "why.")
    assert said == ["Step 1 was skipped because the gradient was not finite: why."]
    watch.see(step(1, math.nan))
    assert watch.notes == [
        "Steps that were skipped because a loss was not finite or above `max_loss` 10000: 1.",
        "Steps that were skipped because the gradient was not finite: 1.",
    ]


def test_a_run_that_explodes_stops_with_advice_and_a_whole_log(tmp_path):
    said = console()
    with pytest.raises(UserError, match=r"10 steps in a row .* lower `lr`.* metazo replay --to"):
        run_settings(config(out=tmp_path / "run", lr=1e38, steps=60), said)
    found = scan(tmp_path / "run" / "steps.jsonl")
    assert not found.damage and not found.torn and sum(not step.coefficients for step in found.steps) == 10
    assert "was skipped" in said.export_text()


def test_bad_steps_are_counted_in_a_row_and_across_a_resume():
    bad, good = step(1, math.nan, 0.4), step(2, 0.5, 0.4)
    seen([bad] * 9 + [good] + [bad] * 9, max_bad_steps=10)
    watch = Watch(config(max_bad_steps=10), 100, lambda text: None)
    for record in [bad] * 9:
        watch.see(record)  # from the log
    with pytest.raises(UserError, match="10 steps in a row"):
        watch.see(bad, lambda: "why.")


def test_a_run_whose_weights_did_not_move_says_so_in_its_summary(tmp_path):
    """Half of the steps are not most of them; steps from the log count as others do, so a resumed run says the same."""
    watch = Watch(config(), 100, lambda text: None)
    for record in (step(0, 0.5, 0.5), step(1, 0.5, 0.4), step(2, 0.5)):
        watch.see(record)
    assert not watch.notes
    watch.see(step(3, 0.6, 0.6))
    assert watch.notes[0].startswith("In 2 of 3 steps the losses of all probes were exactly equal")
    # At eps 1e-12 a weight near 0 moves, and on some processors a loss by its last bit, which eps divides.
    summary = run_settings(config(out=tmp_path / "run", eps=1e-30))
    assert any(note.startswith("In 6 of 6 steps") for note in summary["notes"])


def test_the_losses_and_rates_shown_are_those_of_the_log(tmp_path):
    said = console()
    run_settings(config(out=tmp_path / "run", schedule="linear", lr=1e-3), said)
    steps = scan(tmp_path / "run" / "steps.jsonl").steps
    shown = [line.split() for line in said.export_text().splitlines() if line.startswith("step ")]
    assert [line[1] for line in shown] == [f"{count}/6" for count in range(1, 7)]
    assert [line[2:6] for line in shown] == [
        ["loss", f"{sum(taken.losses) / len(taken.losses):.4f}", "lr", f"{taken.lr[0]:.2g}"] for taken in steps
    ]


# -- causes --------------------------------------------------------------------------------------------------------------


def closure(model):
    ids = torch.arange(1, 13).reshape(2, 6)
    return lambda: model(input_ids=ids, labels=ids).loss.detach()


def scaled(dtype: str, factor: float, part: str = "down_proj"):
    model = load_model(SMALL["model"], dtype=dtype).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.mul_(factor)
    return model


def test_overflow_of_float16_is_told_from_divergence():
    """The same weights: beyond the range of float16 in between, finite in float32."""
    factor = next(10.0**k for k in range(1, 6) if not math.isfinite(float(closure(scaled("float16", 10.0**k))())))
    model = scaled("float16", factor)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    text = diagnose(model, [closure(model)], torch.float16)
    assert "overflow of float16" in text and "has not diverged" in text and "the largest float16 is 6.55e+04" in text
    assert math.isfinite(float(closure(scaled("float32", factor))()))


def test_divergence_is_told_from_overflow():
    model = scaled("float32", 1e38)
    assert not math.isfinite(float(closure(model)()))
    text = diagnose(model, [closure(model)], torch.float32)
    assert "the run has diverged" in text and "overflow" not in text


def test_weights_out_of_range_are_named():
    model = scaled("float16", 1e8, "layers.0.mlp.down_proj")
    assert "layers.0.mlp.down_proj" in (text := diagnose(model, [closure(model)], torch.float16))
    assert "out of the range of float16" in text


def test_a_probe_that_leads_too_far_is_told():
    model = load_model(SMALL["model"]).model
    assert "lower `eps`" in diagnose(model, [closure(model)], torch.float32)


class BetweenModules(torch.nn.Module):
    """exp overflows between two linear layers, of which the second is not the cause."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    def forward(self, x):
        return self.second(torch.exp(1e4 * torch.ones_like(self.first(x))))


def test_a_module_whose_input_is_not_finite_is_not_the_cause():
    model = torch.nn.Sequential(BetweenModules())
    text = diagnose(model, [lambda: model(torch.ones(2, 3)).sum()], torch.float32)
    assert text.startswith("0 gives values that are not finite from finite ones")


# -- warnings ------------------------------------------------------------------------------------------------------------


def test_an_eps_below_rounding_is_said_with_figures(tiny, tmp_path):
    said, model = console(), str(tiny("llama"))
    run_settings(config(model=model, out=tmp_path / "small", eps=1e-8, lr=1e-8, steps=101), said)
    assert "`eps` 1e-08 is too small for this precision" in said.export_text()
    said = console()
    run_settings(config(model=model, out=tmp_path / "usual", lr=1e-8, steps=101), said)
    assert "too small" not in said.export_text()


def test_rounding_is_that_of_the_dtype():
    watch = Watch(config(dtype="bfloat16"), 100, print)
    assert watch.rounding(1.5) == 2.0**-7 and Watch(config(), 100, print).rounding(1.5) == 2.0**-20


def test_divergence_and_plateau_are_said_once_and_progress_is_not():
    dice = random.Random(0)
    falling = [step(n, 2 - n / 1000 + dice.gauss(0, 0.1), 2 - n / 1000) for n in range(1000)]
    assert seen(falling) == []
    flat = [step(n, 0.7 + dice.gauss(0, 0.1), 0.7) for n in range(1000)]
    (text,) = seen(flat)
    assert text.startswith("Step 400: no progress beyond noise in 400 steps") and "standard error" in text
    rising = [step(n, 0.5 + n / 100, 0.5 + n / 100 + dice.gauss(0, 0.1)) for n in range(390)]
    (text,) = seen(rising)
    assert "the loss diverges" in text and "lower `lr`" in text


def test_a_step_reads_the_last_losses_alone(monkeypatch):
    """The window of a plateau may have 400,000 losses."""
    watch, said = Watch(config(), 1000, lambda text: None), []
    for number in range(150):
        watch.see(step(number, 1.0, 1.0 + number / 100))
    monkeypatch.setattr("metazo.runs.monitor.fmean", lambda losses: said.append(list(losses)) or 9.9)
    watch.first = [1.0] * 20

    class Watched(type(watch.losses)):
        def __iter__(self):
            pytest.fail("all losses were read")

    watch.losses = Watched(watch.losses, maxlen=watch.losses.maxlen)
    assert watch._divergence() is None
    assert sorted(said[1]) == sorted(1.0 + number / 200 for number in range(100, 150))


def test_warnings_of_a_resumed_run_are_those_of_the_whole(tmp_path):
    dice = random.Random(1)
    flat = [step(n, 0.7 + dice.gauss(0, 0.1), 0.7) for n in range(400)]
    said: list[str] = []
    watch = Watch(config(), 1000, said.append)
    for record in flat[:399]:
        watch.see(record)
    watch.see(flat[399], lambda: "")
    assert said == seen(flat)


# -- memory --------------------------------------------------------------------------------------------------------------


def test_an_allocation_that_fails_ends_with_what_to_change():
    with (
        pytest.raises(UserError, match=r"`batch_size` \(now 2.*`max_length`.*`dtype` bfloat16"),
        memory_explained(config()),
    ):
        torch.empty(1 << 50)
    with pytest.raises(RuntimeError, match="size"), memory_explained(config()):
        torch.zeros(2) @ torch.zeros(3)


def test_a_model_whose_code_mixes_dtypes_is_named_with_its_dtype(tiny, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny("bert_mlm"))
    tokenizer.save_pretrained(tmp_path / "deberta")
    own = transformers.DebertaConfig(
        **sizes, vocab_size=len(tokenizer), relative_attention=True, pos_att_type=["c2p", "p2c"]
    )
    transformers.DebertaForMaskedLM(own).save_pretrained(tmp_path / "deberta")
    run_settings(config(model=str(tmp_path / "deberta"), steps=1, out=None))
    with pytest.raises(UserError, match="deberta cannot compute in `dtype` bfloat16 .*; choose float32"):
        run_settings(config(model=str(tmp_path / "deberta"), steps=1, out=None, dtype="bfloat16"))


def test_a_loss_of_the_callers_that_mixes_dtypes_keeps_its_traceback():
    model = load_model(SMALL["model"], dtype="bfloat16").model

    def loss(model, batch):
        return model(inputs_embeds=torch.ones(1, 3, model.config.hidden_size), labels=batch).loss

    with pytest.raises(RuntimeError, match="dtype"):
        metazo.finetune(model, loss=loss, data=[torch.zeros(1, 3, dtype=torch.long)] * 4, lr=1e-4, steps=1)


OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from metazo.runs.config import FinetuneConfig
from metazo.settings import build
from metazo.errors import UserError
from metazo.runs.finetune import tune

def limit(record):
    if record.step == 4:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), resource.RLIM_INFINITY))

try:
    tune(build(FinetuneConfig, {settings} | {{"out": Path(sys.argv[1])}}), on_step=limit)
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_a_real_end_of_memory_in_mid_run_leaves_the_log_whole(tmp_path):
    """After five steps and an evaluation on 256 examples at once, the process may take 4 MB more: not enough for the next.

    The limit is of the address space, which one thread and one arena of malloc keep the same from run to run.
    """
    settings = SMALL | {"eval_every": 6, "dev_examples": 256, "eval_batch_size": 256, "keep": "last", "steps": 8}
    code, out = OUT_OF_MEMORY.format(settings=settings), tmp_path / "run"
    steady = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    run = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, env=steady)
    assert run.returncode == 2, run.stderr
    assert "Out of memory" in run.stdout and "Traceback" not in run.stderr
    assert "`eval_batch_size` (now 256)" in run.stdout or "`batch_size`" in run.stdout
    found = scan(out / "steps.jsonl")
    assert found.torn == 0 and len(found.steps) in (5, 6)
    assert json.loads((out / "config.json").read_text())["eval_batch_size"] == 256


def test_a_loss_above_max_loss_without_a_probe_is_not_put_on_the_probe():
    text = diagnose(torch.nn.Linear(1, 1), [lambda: 3.0], torch.float32, 2.5)
    assert "without a probe the loss is 3, above `max_loss` (2.5)" in text and "eps" not in text
    assert "lower `eps`" in diagnose(torch.nn.Linear(1, 1), [lambda: 3.0], torch.float32, 3.5)


def test_losses_that_have_no_mean_come_from_the_loss():
    text = diagnose(torch.nn.Linear(1, 1), [lambda: math.inf, lambda: -math.inf], torch.float32)
    assert "it comes from the loss, or the objective, itself" in text
