"""Settings of a meta-training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from metazo.errors import UserError
from metazo.settings import Unset, check_types, check_values, setting, with_role

MOST_RATE = 1e30  # a larger learning rate overflows in torch's own optimizers
MOST_UNROLLED = 32  # the graph of every inner step is kept, and a deep graph overflows Python's stack
MOST_BOUND = 20  # a factor of e^20 between block and RMS; a tuner file allows less than 100


@dataclass
class ScaleConfig:
    """What every way to train a tuner of block scales is told."""

    model: str = setting(role="base")
    """Folder or Hub id of the base model; pico is the small one that metazo carries"""
    task: list[str] = setting(role="base")
    """Task to train on, by name or a YAML file; several are shuffled"""
    out: Path = setting(role="place")
    """Folder for the tuner, settings, metrics and plot"""
    data: Path | None = setting(default=None, role="place")
    """Folder with <task>/<split>.jsonl; by default the Hub"""
    batch_size: int = setting(default=16, least=1, role="tuner")
    """Examples per batch"""
    train_examples: int = setting(default=Unset(1000), least=1, role="tuner")
    """Training examples of each task"""
    max_length: int | None = setting(default=None, least=1, role="tuner")
    """Longest input in tokens; by default the model's context"""
    dtype: Literal["float32", "float64"] = setting(default="float32", role="tuner")
    """Type of the weights; narrower ones cannot hold the teacher's steps"""
    device: str = setting(default="cpu", role="machine")
    """cpu, cuda, cuda:1, or another of torch that has float64, unlike mps"""
    seed: int = setting(default=0, least=0, most=2**63 - 1, role="tuner")
    """Seed of networks, noise, data order and split"""
    blocks: Literal["tensor", "layer"] = setting(default="tensor", role="tuner")
    """Tensors that share one scale"""
    normalise: bool = setting(default=True, role="tuner")
    """Keep the mean square of sigma over all entries at 1"""
    bound: float = setting(default=math.log(3), above=0, most=MOST_BOUND, role="tuner")
    """Bound on the exponent by which sigma differs from the block's RMS, natural logarithm"""
    eps: float = setting(default=1e-3, above=0, role="tuner")
    """Length of the probe (published objective, horizon)"""
    save_every: int = setting(default=100, least=1, role="service")
    """Meta-steps between snapshots for `resume`"""
    resume: bool = setting(default=False, role="place")
    """Continue the run in `out`: give the whole command of its start again, with this"""

    def __post_init__(self) -> None:
        named: Any = self.task
        self.task = [named] if isinstance(named, str | Path) else named  # type: ignore[list-item]
        self.device = str(self.device)
        check_types(self)
        check_values(self)
        if not self.task:
            raise UserError("`task` is missing: name at least one task to train on (metazo tasks lists them).")

    def recipe(self) -> dict[str, Any]:
        """The settings that made the tuner, without local paths, as a plain table."""
        kept = with_role(type(self), "tuner")
        return {key: value for key, value in asdict(self).items() if key in kept and value is not None}


_OF = {
    "published": ("lr_update", "queries", "eps", "detach_kappa", "separate_batch"),
    "ratio": ("entropy", "floor", "average"),
}
"""Settings that one objective alone reads."""


@dataclass
class MetaConfig(ScaleConfig):
    """Everything that decides a meta-training run. The paper's own settings: recipe meta-published-copa.

    The role of a setting says what a change of it affects: the tuner, whose file keeps these settings as its recipe, or the
    base (model and tasks, which the file names by themselves), the place (paths), the machine, the service (how often files
    are saved).

    The defaults were chosen over the published objective, which put most of the perturbation into one block and diverged on
    an earlier pico. They do not beat the hand rule: on pico_sentiment, 300 forward passes, 3 seeds, each at a learning rate of
    its own (benchmarks/meta_objectives.json), a tuner from pico_topic ends at 0.056 (0.013), the RMS rule alone at 0.021
    (0.006).
    """

    steps: int | None = setting(default=None, least=1, role="tuner")
    """Meta-steps; by default `epochs`"""
    epochs: float = setting(default=3, above=0, most=1e6, role="tuner")
    """Passes over the training examples, if `steps` is not given"""

    objective: Literal["ratio", "published"] = setting(default="ratio", role="tuner")
    """ratio: agreeing gradient over curvature; published: the loss behind one zeroth-order step"""
    features: Literal["log", "published"] = setting(default="log", role="tuner")
    """Inputs of the networks"""
    parametrisation: Literal["rms_exp", "abs"] = setting(default="rms_exp", role="tuner")
    """Form of sigma: the block's RMS times a bounded exponential of the output, which starts at the RMS rule, or |output|"""
    embedding_count: Literal["numel", "published"] = setting(default="numel", role="tuner")
    """Number of entries that an embedding counts for if `normalise`: all of them, or 15 * batch size * width"""
    hidden: int = setting(default=64, least=1, most=65536, role="tuner")
    """Width of the networks"""
    statistics_every: int | None = setting(default=None, least=1, role="tuner")
    """Meta-steps between readings of block mean and variance; by default 1 for published features, else 10"""

    lr_update: float = setting(default=1e-6, above=0, most=MOST_RATE, role="tuner")
    """Step size of the inner step (published objective); the meta-gradient is proportional to it"""
    queries: int = setting(default=1, least=1, role="tuner")
    """Directions averaged per meta-step (published objective)"""
    unroll: int = setting(default=1, least=1, most=MOST_UNROLLED, role="tuner")
    """Inner steps; more than 1 unrolls them on `higher`, for small models (published objective)"""
    detach_kappa: bool = setting(default=True, role="tuner")
    """Treat the normalisation as constant in the meta-gradient, as published (published objective with `normalise`)"""
    separate_batch: bool = setting(default=False, role="tuner")
    """Measure the meta-loss on another batch than the inner step's (published objective)"""
    entropy: float = setting(default=0.1, least=0, most=1e6, role="tuner")
    """Weight of the entropy of curvature shares (ratio objective)"""
    floor: float = setting(default=0.1, least=0, most=1, role="tuner")
    """Least curvature of a block, as a fraction of its type's mean per entry (ratio objective)"""
    average: float = setting(default=0.9, least=0, role="tuner")
    """Factor of the running averages of agreement and curvature (ratio objective)"""
    meta_optimizer: Literal["adam", "sgd"] = setting(default="adam", role="tuner")
    """Optimizer of the networks"""
    lr_meta: float = setting(default=3e-3, above=0, most=MOST_RATE, role="tuner")
    """Learning rate of the networks' optimizer (published, with sgd: 0.1)"""

    teacher: Literal["sgd", "adamw"] = setting(default="sgd", role="tuner")
    """First-order optimizer whose path the networks are trained along"""
    teacher_lr: float = setting(default=0.01, above=0, most=MOST_RATE, role="tuner")
    """First learning rate of the teacher, linear to 0 between restarts"""
    momentum: float = setting(default=0.8, least=0, role="tuner")
    """Momentum of the sgd teacher"""
    clip: float = setting(default=1.0, above=0, role="tuner")
    """Largest gradient norm of the teacher"""
    restart_every: float = setting(default=0.5, least=0, most=1e6, role="tuner")
    """Epochs between restarts; 0: never. Few, because the networks learn nothing once the teacher's loss is 0"""
    restart_model: bool = setting(default=True, role="tuner")
    """Whether a restart resets the weights and the teacher's momentum; its learning rate starts anew in either case"""
    restart_sigma: bool = setting(default=False, role="tuner")
    """Whether a restart resets the networks' input sigma to 1"""
    restart_losses: bool = setting(default=False, role="tuner")
    """Whether a restart resets the losses that the networks take as inputs"""

    record: Path | None = setting(default=None, role="place")
    """Record the teacher's path up to its first restart in this folder, then train along it, again and again"""
    record_every: int = setting(default=10, least=1, role="tuner")
    """Teacher steps between recorded weights"""
    trajectory: Path | None = setting(default=None, role="place")
    """Train along a path recorded before"""

    def __post_init__(self) -> None:
        if self.objective == "horizon":
            raise UserError(
                "`objective` 'horizon' has settings of its own; make a HorizonConfig instead of a MetaConfig."
            )
        super().__post_init__()
        if self.momentum >= 1 or self.average >= 1:
            name = "momentum" if self.momentum >= 1 else "average"
            raise UserError(f"`{name}` must be below 1, not {getattr(self, name)}.")
        if self.record is not None and self.trajectory is not None:
            raise UserError("`record` and `trajectory` both name the teacher's path; give one of them.")
        if self.record is not None and Path(self.record).absolute() == Path(self.out).absolute():
            raise UserError("`record` and `out` are the same folder: name another one for the recording.")
        if self.unroll > 1 and self.objective != "published":
            raise UserError("`unroll` goes with `objective='published'`; the ratio objective takes no inner step.")
        for name, why in self._unread().items():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UserError(f"`{name}` {getattr(self, name)} changes nothing with {why}; leave it out.")

    def _unread(self) -> dict[str, str]:
        """Settings that the others leave without effect, and which others."""
        other = "published" if self.objective == "ratio" else "ratio"
        found = dict.fromkeys(_OF[other], f"`objective` {self.objective}, which does not read it")
        if self.teacher != "sgd":
            found["momentum"] = f"`teacher` {self.teacher}, which has its own"
        if self.steps is not None:
            found["epochs"] = "`steps`, which set the length of the run"
        if self.parametrisation == "abs":
            found["bound"] = "`parametrisation` abs, which has no bound"
        if not self.normalise:
            found.setdefault("detach_kappa", "`normalise` False, without which there is no normalisation to detach")
        if not self.restart_every:
            restarts = ("restart_model", "restart_sigma", "restart_losses")
            found |= dict.fromkeys(restarts, "`restart_every` 0, without which there is no restart")
        if self.record is not None or self.trajectory is not None:
            found["restart_model"] = "a recording, which is of one path from the base model and repeats"
        if self.record is None:
            found["record_every"] = "no `record`, without which no weights are recorded"
        if self.trajectory is not None:
            found |= dict.fromkeys(("restart_every", "record_every"), "`trajectory`, which has that of the recording")
        return found

    def recipe(self) -> dict[str, Any]:
        return {name: value for name, value in super().recipe().items() if name not in self._unread()}

    @property
    def reading(self) -> int:
        """Meta-steps between readings of the block statistics."""
        return self.statistics_every or (1 if self.features == "published" else 10)
