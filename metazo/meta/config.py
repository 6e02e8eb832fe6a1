"""Settings of a meta-training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from metazo.errors import UserError
from metazo.settings import check_number, check_values

_COUNT, _POSITIVE, _RATE = {"least": 1}, {"above": 0}, {"above": 0, "most": 1e30}
BOUNDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("batch_size", "train_examples", "queries", "record_every", "save_every"), _COUNT),
    **dict.fromkeys(("steps", "statistics_every", "max_length"), _COUNT),
    **dict.fromkeys(("eps", "clip"), _POSITIVE),
    **dict.fromkeys(("lr_update", "lr_meta", "teacher_lr"), _RATE),  # larger ones overflow in torch's own optimizers
    "epochs": {"above": 0, "most": 1e6},
    "restart_every": {"least": 0, "most": 1e6},
    "hidden": {"least": 1, "most": 65536},
    "unroll": {
        "least": 1,
        "most": 32,
    },  # the graph of every inner step is kept, and a deep graph overflows Python's stack
    "bound": {"above": 0, "most": 20},  # a factor of e^20 between block and RMS; a tuner file allows less than 100
    "seed": {"least": 0, "most": 2**63 - 1},
    "momentum": {"least": 0},
    "average": {"least": 0},
    "entropy": {"least": 0, "most": 1e6},
    "floor": {"least": 0, "most": 1},
}


@dataclass
class MetaConfig:
    """Everything that decides a meta-training run. The paper's own settings: recipe meta-published-copa.

    The defaults were chosen over the published objective, which put most of the perturbation into one block and diverged on
    an earlier pico. They do not beat the hand rule: on pico_sentiment, 300 forward passes, 3 seeds, each at a learning rate of
    its own (benchmarks/meta_objectives.json), a tuner from pico_topic ends at 0.056 (0.013), the RMS rule alone at 0.021
    (0.006).
    """

    model: str
    """Folder or Hub id of the base model; pico is the small one that metazo carries"""
    task: list[str]
    """Task to train on, by name or a YAML file; several are shuffled"""
    out: Path
    """Folder for the tuner, settings, metrics and plot"""
    data: Path | None = None
    """Folder with <task>/<split>.jsonl; by default the Hub"""
    steps: int | None = None
    """Meta-steps; by default `epochs`"""
    epochs: float = 3
    """Passes over the training examples, if `steps` is not given"""
    batch_size: int = 16
    """Examples per batch"""
    train_examples: int = 1000
    """Training examples of each task"""
    max_length: int | None = None
    """Longest input in tokens; by default the model's context"""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of the weights; narrower ones cannot hold the teacher's steps"""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    seed: int = 0
    """Seed of networks, noise, data order and split"""

    objective: Literal["ratio", "published"] = "ratio"
    """ratio: agreeing gradient over curvature; published: the loss behind one zeroth-order step"""
    features: Literal["log", "published"] = "log"
    """Inputs of the networks"""
    parametrisation: Literal["rms_exp", "abs"] = "rms_exp"
    """Form of sigma: the block's RMS times a bounded exponential of the output, which starts at the RMS rule, or |output|"""
    bound: float = math.log(3)
    """Bound on that exponent, natural logarithm"""
    blocks: Literal["tensor", "layer"] = "tensor"
    """Tensors that share one scale"""
    normalise: bool = True
    """Keep the mean square of sigma over all entries at 1"""
    embedding_count: Literal["numel", "published"] = "numel"
    """Number of entries that an embedding counts for in this mean: all of them, or 15 * batch size * width"""
    hidden: int = 64
    """Width of the networks"""
    statistics_every: int | None = None
    """Meta-steps between readings of block mean and variance; by default 1 for published features, else 10"""

    eps: float = 1e-3
    """Length of the probe (published objective)"""
    lr_update: float = 1e-6
    """Step size of the inner step (published objective); the meta-gradient is proportional to it"""
    queries: int = 1
    """Directions averaged per meta-step (published objective)"""
    unroll: int = 1
    """Inner steps; more than 1 unrolls them on `higher`, for small models (published objective)"""
    detach_kappa: bool = True
    """Treat the normalisation as constant in the meta-gradient, as published"""
    separate_batch: bool = False
    """Measure the meta-loss on another batch than the inner step's (published objective)"""
    entropy: float = 0.1
    """Weight of the entropy of curvature shares (ratio objective)"""
    floor: float = 0.1
    """Least curvature of a block, as a fraction of its type's mean per entry (ratio objective)"""
    average: float = 0.9
    """Factor of the running averages of agreement and curvature (ratio objective)"""
    meta_optimizer: Literal["adam", "sgd"] = "adam"
    """Optimizer of the networks"""
    lr_meta: float = 3e-3
    """Learning rate of the networks' optimizer (published, with sgd: 0.1)"""

    teacher: Literal["sgd", "adamw"] = "sgd"
    """First-order optimizer whose path the networks are trained along"""
    teacher_lr: float = 0.01
    """First learning rate of the teacher, linear to 0 between restarts"""
    momentum: float = 0.8
    """Momentum of the sgd teacher"""
    clip: float = 1.0
    """Largest gradient norm of the teacher"""
    restart_every: float = 0.5
    """Epochs between restarts; 0: never. Few, because the networks learn nothing once the teacher's loss is 0"""
    restart_model: bool = True
    """Whether a restart resets weights and teacher"""
    restart_sigma: bool = False
    """Whether a restart resets the networks' input sigma to 1"""
    restart_losses: bool = False
    """Whether a restart resets the losses that the networks take as inputs"""

    record: Path | None = None
    """Record the teacher's path in this folder first, then train along it"""
    record_every: int = 10
    """Teacher steps between recorded weights"""
    trajectory: Path | None = None
    """Train along a path recorded before"""
    save_every: int = 100
    """Meta-steps between snapshots for `resume`"""
    resume: bool = False
    """Continue the run in `out`"""

    def __post_init__(self) -> None:
        check_values(self)
        for name, bounds in BOUNDS.items():
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), **bounds)
        if self.momentum >= 1 or self.average >= 1:
            name = "momentum" if self.momentum >= 1 else "average"
            raise UserError(f"`{name}` must be below 1, not {getattr(self, name)}.")
        if not self.task:
            raise UserError("`task` is missing: name at least one task to train on (metazo tasks lists them).")
        if self.record is not None and self.trajectory is not None:
            raise UserError("`record` and `trajectory` both name the teacher's path; give one of them.")
        if self.unroll > 1 and self.objective != "published":
            raise UserError("`unroll` goes with `objective='published'`; the ratio objective takes no inner step.")

    @property
    def reading(self) -> int:
        """Meta-steps between readings of the block statistics."""
        return self.statistics_every or (1 if self.features == "published" else 10)

    def recipe(self) -> dict[str, Any]:
        """The settings that made the tuner, without local paths, as a plain table."""
        hidden = {"out", "data", "record", "trajectory", "resume", "save_every", "device", "model", "task"}
        return {key: value for key, value in asdict(self).items() if key not in hidden and value is not None}
