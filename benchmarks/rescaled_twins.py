"""The positive control: a model whose blocks are badly scaled against each other, on which a learned scale must win.

    python benchmarks/rescaled_twins.py --out benchmarks/rescaled_twins.json

The twin of pico has every query projection times FACTOR and every key projection over FACTOR. It computes the same function,
so nothing but the scale of the perturbation differs. Plain MeZO perturbs the small keys as strongly as all other weights.
The horizon objective starts there as well (start "flat") and has to find the scales from runs on other tasks. Columns are
MeZO on pico itself, and on the twin MeZO, the RMS rule, random networks, and the learned scales. Each takes its rate per task
on seed 0 from the same grid, extended by factors of 3 if the best is at its end. Losses are those of the seeds 1 to 3.
About 3 minutes of one core. Columns without a search are not measured
again if --out has them.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch

import metazo
from metazo.meta.horizon_config import HorizonConfig
from metazo.models.load import load_model
from metazo.optimizers import MeZO
from metazo.runs.batches import batch_indices_by_length
from metazo.runs.schedule import share
from metazo.tasks import prepare, resolve
from metazo.tasks.evaluate import evaluate
from metazo.tuner.file import Tuner
from metazo.tuner.networks import PertNN
from metazo.tuner.scale import TunerScale, tuner_scale

FACTOR, BATCH, STEPS, LENGTH = 20.0, 4, 80, 96
RATES, EXTENSIONS, TUNING, SEEDS = (1e-5, 3e-5, 1e-4, 3e-4), 2, 0, (1, 2, 3)
META, TASKS = ["pico_topic", "pico_span"], ["pico_sentiment"]
SEARCH: dict[str, Any] = {"steps": 40, "pairs": 4, "horizon": 24, "spread": 0.5, "lr_sigma": 0.5, "bound": 8.0}
COLUMNS = ("mezo on pico", "mezo", "rms", "random", "horizon from flat")


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


def learned(
    model: Path | str, tasks: list[str], start: Literal["rms", "flat"], out: Path, search: dict[str, Any]
) -> Tuner:
    """Scales from runs on these tasks."""
    data: dict[str, Any] = {"task": tasks, "train_examples": 400, "batch_size": BATCH, "max_length": LENGTH}
    config = HorizonConfig(model=str(model), out=out, start=start, rates=list(RATES), **data, **search)
    return metazo.meta_train(config)  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/rescaled_twins.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "twin"
        difference = twin(folder)
        tuners = {"horizon from flat": learned(folder, META, "flat", Path(name) / "search", SEARCH)}
        spent = time.process_time() - began
        print(f"largest difference of logits {difference:.1e}; {spent:.0f} CPU seconds of meta-training", flush=True)
        results: dict[str, Any] = {}
        known = json.loads(given.out.read_text())["results"] if given.out.exists() else {}
        for task in TASKS:
            for column in COLUMNS:
                if column in known.get(task, {}) and column not in tuners:
                    results.setdefault(task, {})[column] = known[task][column]
                    continue
                model = "pico" if column == "mezo on pico" else folder
                results.setdefault(task, {})[column] = measured(model, task, column, tuners)
                print(task, column, results[task][column], flush=True)
    scales = {
        which: {block.name: round(b, 3) for block, b in zip(tuner.info.blocks, tuner.pertnn.b2.tolist())}
        for which, tuner in tuners.items()
    }
    content = {
        "factor": FACTOR,
        "difference of logits": difference,
        "search": SEARCH | {"tasks": META},
        "cpu seconds of meta-training": round(spent, 1),
        "results": results,
        "log sigma over RMS": scales,
    }
    given.out.write_text(json.dumps(content, indent=1) + "\n")


def measured(model: Path | str, task: str, column: str, tuners: dict[str, Any]) -> dict[str, Any]:
    """Rate, losses by rate on the tuning seed, losses of the seeds and their mean."""
    loaded = load_model(str(model))
    prepared = prepare(resolve(task), loaded, train=400, dev=128, test=1, max_length=LENGTH)
    lengths = [len(example) for example in prepared.train]

    def run(lr: float, seed: int) -> float:
        own = copy.deepcopy(loaded.model)
        scale: Any = "rms" if column == "rms" else None
        if column == "random":
            scale = TunerScale(pertnn=PertNN(sum(1 for _ in own.parameters()), seed=seed))
        elif column in tuners:
            scale = tuner_scale(tuners[column], own.named_parameters())
        optimizer = MeZO(own.named_parameters(), lr, seed=seed, scale=scale, check_loss=False)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = lr * share("linear", step, STEPS)
            chosen = batch_indices_by_length(step, BATCH, lengths, seed)
            batch = prepared.collate([prepared.train[index] for index in chosen])
            optimizer.step(lambda batch=batch: prepared.loss(own, batch))
        value = evaluate(own, prepared, "dev")["loss"]
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
