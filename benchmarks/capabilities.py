"""Makes the README's table of methods by probing each method.

    python benchmarks/capabilities.py            # probe, write docs/capabilities.json and the table in README.md
    python benchmarks/capabilities.py --render   # the table again from the JSON, without probing

Each cell is measured on a Llama of 0.4 M random weights (float32): closure calls are counted, combinations are tried, and a
run is saved in the middle and resumed. Memory is from torch's own allocation records of steps on a Llama of 134 M weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from metazo.bench.models import SIZES
from metazo.blocks import named_tensors, partition
from metazo.errors import UserError
from metazo.optimizers import OPTIMIZERS, ZOOptimizer
from metazo.runs.cost import most_bytes
from metazo.step.rules import RULES
from metazo.tuner.networks import PertNN
from metazo.tuner.scale import TunerScale

ROOT = Path(__file__).parents[1]
RESULT, README = ROOT / "docs" / "capabilities.json", ROOT / "README.md"
BEGIN, END = "<!-- capabilities: made by benchmarks/capabilities.py -->", "<!-- end of capabilities -->"
STEPS = 12
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def tiny(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=512,
        tie_word_embeddings=True,
    )
    return nn.Module.to(LlamaForCausalLM(config).eval(), dtype)


def sized() -> nn.Module:
    """A model of 134 M weights; their values do not affect memory."""
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES["134M"]))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.02)
    return model


def loss_of(model: nn.Module) -> Callable[[], torch.Tensor]:
    tokens = torch.randint(0, 512, (4, 16), generator=torch.Generator().manual_seed(1))
    return lambda: model(input_ids=tokens, labels=tokens).loss.float()


def tuner_scale(model: nn.Module) -> TunerScale:
    names = [block.name for block in partition(named_tensors(model))]
    return TunerScale(pertnn=PertNN(len(names)), networks=names)


def make(name: str, model: nn.Module, **extra: Any) -> ZOOptimizer:
    if OPTIMIZERS[name].needs_tuner:
        extra.setdefault("scale", tuner_scale(model))
    optimizer = OPTIMIZERS[name](model.named_parameters(), check_loss=False, **extra)
    if optimizer.wants_full_closure:
        optimizer.full_closure = loss_of(model)  # type: ignore[attr-defined]
    return optimizer


def runs(name: str, model: nn.Module, **extra: Any) -> bool:
    """Whether three steps can be taken with finite weights at the end."""
    try:
        optimizer = make(name, model, **extra)
        for _ in range(3):
            optimizer.step(loss_of(model))
    except UserError:
        return False
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def forwards_per_step(name: str) -> float:
    model = tiny()
    optimizer, loss, calls = make(name, model), loss_of(model), itertools.count()
    for _ in range(STEPS):
        optimizer.step(lambda: (next(calls), loss())[1])
    if (
        optimizer.wants_full_closure or optimizer.probing != "in-turn"
    ):  # another closure was called, or one for all probes
        return optimizer.forwards / STEPS
    return next(calls) / STEPS


def extra_memory(name: str) -> tuple[float, float]:
    """State, and peak allocation during a step, in multiples of the weights' bytes."""
    model = sized()
    optimizer = make(name, model)
    losses = itertools.cycle((1.0, 0.5, 0.75))
    if optimizer.wants_full_closure:
        optimizer.full_closure = lambda: next(losses)  # type: ignore[attr-defined]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    state = sum(tensor.numel() * tensor.element_size() for tensor in optimizer.tensors_state().values())
    peak = 0
    for _ in range(2):  # with some methods the second step is of another kind
        peak = max(peak, most_bytes(lambda: optimizer.step(lambda: next(losses))))
    return state / weights, peak / weights


def resumes_exactly(name: str) -> bool:
    """Whether a run that is saved after 5 of 12 steps and resumed by a new optimizer ends with the same bits."""
    whole, cut = tiny(), tiny()
    one, first = make(name, whole), make(name, cut)
    for _ in range(STEPS):
        one.step(loss_of(whole))
    for _ in range(5):
        first.step(loss_of(cut))
    saved = {key: value.clone() for key, value in first.tensors_state().items()}
    second = make(name, cut)
    second.load_tensors_state(saved)
    for _ in range(STEPS - 5):
        second.step(loss_of(cut))
    return all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters()))


def probe(name: str) -> dict[str, Any]:
    model = tiny()
    state, temporary = extra_memory(name)
    return {
        "forwards": forwards_per_step(name),
        "state": round(state, 4),
        "temporary": round(temporary, 4),
        "rms": runs(name, tiny(), scale="rms") if not OPTIMIZERS[name].needs_tuner else False,
        "tuner": runs(name, model, scale=tuner_scale(model)),
        "rademacher": runs(name, tiny(), noise="rademacher"),
        "rules": [rule for rule in RULES if not OPTIMIZERS[name].own_rule and runs(name, tiny(), rule=RULES[rule]())],
        "dtypes": [dtype for dtype in DTYPES if runs(name, tiny(DTYPES[dtype]))],
        "resume": resumes_exactly(name),
        "source": OPTIMIZERS[name].paper,
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    heads = (
        "method",
        "forwards per step",
        "state",
        "temporary",
        "combines with",
        "rules",
        "dtypes",
        "exact resume",
        "source",
    )
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, cells in found.items():
        combines = [what for what in ("rms", "tuner", "rademacher") if cells[what]]
        rules = ", ".join(cells["rules"]) or "its own"
        dtypes = ", ".join(cells["dtypes"]) if len(cells["dtypes"]) < len(DTYPES) else "all four"
        row = (
            f"`{name}`", f"{cells['forwards']:g}", f"{cells['state']:.3g} W", f"{cells['temporary']:.3g} W",
            ", ".join(combines), rules, dtypes, "yes" if cells["resume"] else "no", cells["source"],
        )  # fmt: skip
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def rendered(readme: str, found: dict[str, dict[str, Any]]) -> str:
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{table(found)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true")
    if not parser.parse_args().render:
        found = {}
        for name in OPTIMIZERS:
            found[name] = probe(name)
            print(name, found[name], flush=True)
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
    README.write_text(rendered(README.read_text(), json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
