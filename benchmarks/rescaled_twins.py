"""The positive control: a model whose blocks are badly scaled against each other, on which a learned scale must win.

    python benchmarks/rescaled_twins.py --out benchmarks/rescaled_twins.json

The twin of pico has every query projection times FACTOR and every key projection over FACTOR. It computes the same function,
so nothing but the scale of the perturbation differs. Plain MeZO perturbs the small keys as strongly as all other weights.
The horizon objective starts there as well (start "flat") and has to find the scales from runs on other tasks, in as many
pairs of runs as the column says. Other columns are MeZO on pico itself, and on the twin MeZO, the RMS rule, and random
networks. Each takes its rate per task on seed 0 from the same grid, extended by factors of 3 if the best is at its end.
Losses are those of the seeds 1 to 3. About 6 minutes of one core; columns that --out has are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch

import metazo
from metazo.meta.horizon import HorizonTask
from metazo.meta.horizon_config import HorizonConfig
from metazo.models.load import load_model
from metazo.optimizers import MeZO
from metazo.runs.schedule import share
from metazo.tasks import prepare, resolve
from metazo.tasks.evaluate import evaluate
from metazo.tuner.file import Tuner
from metazo.tuner.networks import PertNN
from metazo.tuner.scale import TunerScale, tuner_scale

FACTOR, BATCH, STEPS, LENGTH = 20.0, 4, 80, 96
RATES, EXTENSIONS, TUNING, SEEDS = (1e-5, 3e-5, 1e-4, 3e-4), 2, 0, (1, 2, 3)
META, TASKS = ["pico_topic", "pico_span"], ["pico_sentiment"]
SEARCH: dict[str, Any] = {"pairs": 4, "horizon": 24, "spread": 0.5, "lr_sigma": 0.5, "bound": 8.0}
SEARCHES = {f"horizon, {pairs} pairs": SEARCH | {"steps": pairs} for pairs in (40, 100)}
COLUMNS = ("mezo on pico", "mezo", "rms", "random", *SEARCHES)


def twin(folder: Path) -> float:
    """Save the twin. Returns: the largest difference of its logits from pico's, over their largest value."""
    loaded = load_model("pico")
    ids = torch.arange(40).view(2, 20) + 10
    with torch.no_grad():
        before = loaded.model(input_ids=ids).logits
        for name, parameter in loaded.model.named_parameters():
            if "q_proj" in name:
                parameter *= FACTOR
            elif "k_proj" in name:
                parameter /= FACTOR
        after = loaded.model(input_ids=ids).logits
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return float((after - before).abs().max() / before.abs().max())


def searched(
    model: Path | str, tasks: list[str], start: Literal["rms", "flat"], search: dict[str, Any]
) -> tuple[Tuner, dict[str, Any]]:
    """Scales from runs on these tasks, and how they were found."""
    data: dict[str, Any] = {"task": tasks, "train_examples": 400, "batch_size": BATCH, "max_length": LENGTH}
    began = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        config = HorizonConfig(
            model=str(model), out=Path(name) / "out", start=start, rates=list(RATES), **data, **search
        )
        tuner: Any = metazo.meta_train(config)
    spent = round(time.process_time() - began, 1)
    print(f"{spent:.0f} CPU seconds of meta-training", flush=True)
    facts = {"search": search | {"tasks": tasks}, "cpu seconds": spent, "log sigma over RMS": over_rms(tuner)}
    return tuner, facts


def over_rms(tuner: Tuner) -> dict[str, float]:
    """The logarithm of each block's scale over that of the RMS rule, of scales without networks; frozen blocks are left out."""
    bound = tuner.info.bound
    raw = zip(tuner.info.blocks, tuner.pertnn.b2.tolist(), strict=True)
    return {block.name: round(bound * math.tanh(b / bound), 3) for block, b in raw if b}


def keys(folder: Path, over: dict[str, float]) -> float:
    """The mean logarithm of the scales of the keys, less that of the matrices that the twin shares with pico."""
    logs: dict[bool, list[float]] = {True: [], False: []}
    for name, parameter in load_model(str(folder)).model.named_parameters():
        if parameter.dim() == 2 and "q_proj" not in name:
            rms = parameter.detach().square().mean().sqrt().log()
            logs["k_proj" in name].append(float(rms) + over.get(name, 0.0))
    return round(fmean(logs[True]) - fmean(logs[False]), 2)


def output(script: str, doc: str | None) -> Path:
    """The file of --out, from the command line; one thread from now on."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(script).with_suffix(".json"))
    torch.set_num_threads(1)
    return parser.parse_args().out


def main() -> None:
    out = output(__file__, __doc__)
    content: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"results": {}, "searches": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "twin"
        content |= {"factor": FACTOR, "difference of logits": twin(folder)}
        content["keys over other matrices, RMS rule"] = keys(folder, {})
        for column in COLUMNS:
            missing = [task for task in TASKS if column not in content["results"].get(task, {})]
            tuner = None
            if missing and column in SEARCHES:
                tuner, facts = searched(folder, META, "flat", SEARCHES[column])
                content["searches"][column] = facts
            if column in SEARCHES:
                facts = content["searches"][column]
                facts["keys over other matrices"] = keys(folder, facts["log sigma over RMS"])
            for task in missing:
                model = "pico" if column == "mezo on pico" else folder
                content["results"].setdefault(task, {})[column] = measured(model, task, column, tuner)
                print(task, column, content["results"][task][column], flush=True)
            out.write_text(json.dumps(content, indent=1) + "\n")


def measured(model: Path | str, task: str, column: str, tuner: Tuner | None) -> dict[str, Any]:
    """Rate, losses by rate on the tuning seed, losses of the seeds and their mean. tuner: of a column that has one."""
    loaded = load_model(str(model))
    prepared = prepare(resolve(task), loaded, train=400, dev=128, test=1, max_length=LENGTH)

    def run(lr: float, seed: int) -> float:
        own = copy.deepcopy(loaded.model)
        case = HorizonTask(own, prepared)
        scale: Any = "rms" if column == "rms" else None
        if column == "random":
            scale = TunerScale(pertnn=PertNN(sum(1 for _ in own.parameters()), seed=seed))
        elif tuner is not None:
            scale = tuner_scale(tuner, own.named_parameters())
        optimizer = MeZO(own.named_parameters(), lr, seed=seed, scale=scale, check_loss=False)
        for step in range(STEPS):
            case.step(optimizer, step, BATCH, seed, lr * share("linear", step, STEPS))
        value = case.held_out()
        return value if value == value else float("inf")

    grid = {lr: run(lr, TUNING) for lr in RATES}
    while (best := min(grid, key=grid.__getitem__)) in (max(grid), min(grid)) and len(grid) < len(RATES) + EXTENSIONS:
        further = best * 3 if best == max(grid) else best / 3
        grid[further] = run(further, TUNING)
    losses = [round(run(best, seed), 4) for seed in SEEDS]
    before = evaluate(loaded.model, prepared, "dev")["loss"]
    return {
        "before": round(before, 4),
        "lr": best,
        "loss": round(fmean(losses), 4),
        "losses": losses,
        "grid": {f"{lr:g}": round(loss, 4) for lr, loss in sorted(grid.items())},
    }


if __name__ == "__main__":
    main()
