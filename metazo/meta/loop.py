"""The loop of meta-training: at every step one update of the networks, then one step along the teacher's path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from metazo.blocks import NamedTensor, partition
from metazo.errors import UserError
from metazo.meta.config import MetaConfig
from metazo.meta.explosion import TeacherWatch
from metazo.meta.objective import Objective, OneStepLoss, Situation
from metazo.meta.order import MetaTask, Order
from metazo.meta.path import Online, Path
from metazo.meta.ratio import RatioObjective
from metazo.meta.reset import Start, restart_steps
from metazo.meta.teacher import Teacher, load_optimizer_tensors, optimizer_tensors
from metazo.noise import Noise, PhiloxNoise
from metazo.step.scales import NO_LOSSES, State, block_statistics, normalisation, published_root
from metazo.step.weights import Weights
from metazo.tuner.networks import PertNN
from metazo.tuner.scale import PUBLISHED_EMBEDDING_ROWS, TunerScale

MOST_SKIPPED = 50  # skipped steps in a row after which the run stops
_LABELS = 1 << 31  # query number of the seed for sampling labels
_TOKENS = "ratio/tokens"
"""In the state of runs that weigh sampled answers by the root of their tokens; earlier runs lack it."""
_WATCH = "watch"
"""In the state of runs that watch their teacher; earlier runs lack it."""
_WEIGHTS = ("w1", "b1", "w2", "b2")


@dataclass(frozen=True)
class MetaStep:
    """The result of one meta-step."""

    step: int
    task: str
    meta_loss: float
    loss: float
    """Mean of L+ and L- (published objective), or the loss (ratio)."""
    teacher_loss: float | None
    scales: Tensor
    """kappa sigma_b, (blocks,)."""
    shares: Tensor
    """Fraction of each block in the squared length of the perturbation, D_b p_b, (blocks,); sums to 1."""
    skipped: bool


def order_of(config: MetaConfig, tasks: Sequence[MetaTask]) -> Order:
    """The batches of a run."""
    return Order([len(task) for task in tasks], config.batch_size, config.seed)


def restarts(config: MetaConfig, order: Order) -> int:
    """Meta-steps between restarts; 0: never."""
    return restart_steps(config.restart_every, order.steps_per_epoch)


def length(config: MetaConfig, order: Order) -> int:
    """Meta-steps of the whole run."""
    return config.steps or max(1, round(config.epochs * order.steps_per_epoch))


def make_teacher(config: MetaConfig, tensors: Sequence[NamedTensor], order: Order) -> Teacher:
    """The teacher whose learning rate falls to 0 over one restart, or over the run."""
    steps = restarts(config, order) or length(config, order)
    kind, lr = config.teacher, config.teacher_lr
    return Teacher(tensors, kind, lr=lr, steps=steps, momentum=config.momentum, clip=config.clip)


class MetaRun:
    """Meta-training of one set of networks for one model.

    Args:
        model: in eval mode, float32 or float64; its weights move along the path.
        tensors: its trainable tensors.
        tasks, order: training sets and their batches; order is made from the settings if it is not given.
        noise, pertnn, path: made from the settings if they are not given.

    Attributes: steps: number of meta-steps taken; skipped: number of those without an update because a loss was not finite;
    watch: counts the others at which the teacher's weights had exploded.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Sequence[NamedTensor],
        tasks: Sequence[MetaTask],
        config: MetaConfig,
        *,
        order: Order | None = None,
        noise: Noise | None = None,
        pertnn: PertNN | None = None,
        path: Path | None = None,
    ):
        self.model, self.tensors, self.tasks, self.config = model, tensors, tasks, config
        self.order = order or order_of(config, tasks)
        self.noise = noise or PhiloxNoise(config.seed)
        self.weights = Weights(tensors, self.noise, "in-place")
        published = config.embedding_count == "published"
        self.scale = TunerScale(
            by=config.blocks,
            normalise=config.normalise,
            every=config.reading,
            embedding_rows=PUBLISHED_EMBEDDING_ROWS * config.batch_size if published else None,
            pertnn=pertnn,
            features=config.features,
            parametrisation=config.parametrisation,
            bound=config.bound,
        )
        if pertnn is None:
            zero = config.parametrisation == "rms_exp"
            blocks = len(partition(tensors, config.blocks))
            self.scale.pertnn = PertNN(blocks, hidden=config.hidden, seed=config.seed, zero_init=zero)
        self.scale.bind(tensors)
        self.root = published_root(self.scale.counts) if published else None
        self.pertnn = self.scale.pertnn
        assert self.pertnn is not None
        self.start = [weight.detach().clone() for weight in self.pertnn.parameters()]
        rule = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[config.meta_optimizer]
        self.optimizer: torch.optim.Optimizer = rule([getattr(self.pertnn, k) for k in _WEIGHTS], lr=config.lr_meta)
        self.objective = self._objective()
        self.states: list[State] = [self._fresh() for _ in tasks]
        if path is None:
            teacher = make_teacher(config, tensors, self.order)
            path = Online(Start(tensors), teacher, self.order, restarts(config, self.order), config.restart_model)
        self.path, self.watch = path, TeacherWatch(tensors, len(tasks))
        self.steps = self.skipped = self.in_a_row = 0

    def _objective(self) -> Objective:
        c = self.config
        if c.objective == "ratio":
            return RatioObjective(c.entropy, c.floor, c.average)
        inner = {"eps": c.eps, "lr_update": c.lr_update, "queries": c.queries}
        how = {"detach_kappa": c.detach_kappa, "separate": c.separate_batch}
        if c.unroll == 1:
            return OneStepLoss(**inner, **how)
        from metazo.meta.unrolled import UnrolledLoss  # needs the extra meta

        return UnrolledLoss(self.model, self._model_losses, c.unroll, **inner, **how)

    def _fresh(self) -> State:
        return self.scale.init() | self.objective.init(self.scale.blocks)

    def _model_losses(self, situation: Situation):
        task, indices, other = self._batches
        return (lambda model: task.loss(model, indices)), (lambda model: task.loss(model, other()))

    def step(self) -> MetaStep:
        """One update of the networks and one step of the teacher.

        Raises UserError if the loss is not finite at the first step, or for MOST_SKIPPED steps in a row, or if the teacher's
        weights have exploded for as many.
        """
        step, config = self.steps, self.config
        moved = self.path.begin(step)
        self.watch.begin()
        number, indices = self.path.batch(step)
        if self.path.restarts(step):
            self._restart()
        task, state = self.tasks[number], self.states[number]
        if step % config.reading == 0 or moved:
            statistics = block_statistics(self.scale.blocks, self.weights.read)
            for each in self.states:
                each["scale/statistics"].copy_(statistics)
        other = cache(lambda: self.order.other(step, number, indices))  # not every objective reads it
        self._batches = task, indices, other
        sigma = self.scale.learned(state)
        situation = Situation(
            weights=self.weights,
            blocks=self.scale.blocks,
            sigma=sigma,
            counts=self.scale.counts,
            normalise=config.normalise,
            root=self.root,
            seed=lambda query: self.noise.seed(step, query),
            loss=lambda: task.loss(self.model, indices),
            other=lambda: task.loss(self.model, other()),
            sampled=lambda: task.sampled_loss(self.model, indices, self._generator(step)),
            examples=len(indices),
            state=state,
        )
        outcome = self.objective(situation)
        self.optimizer.zero_grad()
        if outcome.surrogate is not None:
            outcome.surrogate.backward()
        skipped = outcome.surrogate is None or not self._gradient_finite()
        if skipped:
            self._skip(step, task.name)
        else:
            self.in_a_row = 0
            self.optimizer.step()
            state["scale/sigma"].copy_(sigma.detach())
            self.scale.observe(state, outcome.plus, outcome.minus)
        teacher_loss = self.path.advance(lambda: task.loss(self.model, indices))
        self.watch.see(number, teacher_loss, skipped)
        self.steps += 1
        if self.watch.in_a_row >= MOST_SKIPPED:
            raise UserError(
                f"The teacher's weights have exploded for {MOST_SKIPPED} meta-steps in a row up to step {step}: lower "
                f"`teacher_lr` (now {config.teacher_lr:g})."
            )
        fixed = sigma.detach()
        scales = fixed * normalisation(fixed, self.scale.counts, self.root) if config.normalise else fixed
        energy = self.scale.counts * fixed**2
        loss, shares = (outcome.plus + outcome.minus) / 2, energy / energy.sum()
        return MetaStep(step, task.name, outcome.loss, loss, teacher_loss, scales, shares, skipped)

    def _gradient_finite(self) -> bool:
        """Whether the networks' gradient is finite; otherwise an update would make the networks NaN."""
        weights = self.optimizer.param_groups[0]["params"]
        return all(weight.grad is None or bool(weight.grad.isfinite().all()) for weight in weights)

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.noise.seed(step, _LABELS))

    def _restart(self) -> None:
        for state in self.states:
            if self.config.restart_sigma:
                state["scale/sigma"].fill_(1)
            if self.config.restart_losses:
                state["scale/losses"].copy_(torch.tensor(NO_LOSSES))

    def _skip(self, step: int, task: str) -> None:
        if step == 0:
            raise UserError(
                f"The loss on task {task!r} is not finite at the first step: check the model with metazo evaluate, "
                "or try `dtype='float64'` or a smaller `eps` and `lr_update`."
            )
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= MOST_SKIPPED:
            raise UserError(
                f"The loss was not finite for {MOST_SKIPPED} meta-steps in a row up to step {step}: "
                "lower `teacher_lr` or `lr_update`."
            )

    @property
    def moved(self) -> bool:
        """Whether the networks are others than at the start of the run."""
        assert self.pertnn is not None
        return not all(map(torch.equal, self.start, self.pertnn.parameters()))

    def state(self) -> dict[str, Tensor]:
        """The whole state on which later steps depend, as tensors by name, not copied."""
        assert self.pertnn is not None
        out = {f"pertnn/{name}": value.detach() for name, value in self.pertnn.named_parameters()}
        out |= {f"meta/{key}": value for key, value in optimizer_tensors(self.optimizer, _WEIGHTS).items()}
        for number, state in enumerate(self.states):
            out |= {f"task{number}/{name}": value for name, value in state.items()}
        counters = torch.tensor([self.steps, self.skipped, self.in_a_row])
        if self.config.objective == "ratio":
            out[_TOKENS] = torch.tensor([getattr(task, "tokens", 1) for task in self.tasks])
        return out | self.path.state() | {"counters": counters, _WATCH: self.watch.state}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load a `state`. Raises UserError if it does not belong to this run."""
        mine = self.state()
        odd = [name for name in mine if name in tensors and mine[name].shape != tensors[name].shape]
        odd += [
            name for name in mine if name not in tensors and not name.startswith(("meta/", "teacher/", _TOKENS, _WATCH))
        ]
        if odd:
            raise UserError(f"The snapshot is not of this run: {odd[0]} differs; start in another `out`.")
        long = [task.name for task in self.tasks if getattr(task, "tokens", 1) > 1]
        if self.config.objective == "ratio" and _TOKENS not in tensors and long:
            raise UserError(
                f"The run in {self.config.out} was begun by an earlier version of metazo, which measured too little curvature "
                f"on answers of several tokens, which task {long[0]!r} has; start again in another `out`."
            )
        assert self.pertnn is not None
        self.pertnn.load_state_dict({name: tensors[f"pertnn/{name}"] for name in _WEIGHTS})
        meta = {key.removeprefix("meta/"): value for key, value in tensors.items() if key.startswith("meta/")}
        load_optimizer_tensors(self.optimizer, _WEIGHTS, meta)
        for number, state in enumerate(self.states):
            for name, value in state.items():
                value.copy_(tensors[f"task{number}/{name}"])
        self.path.load(tensors)
        self.watch.state.copy_(tensors.get(_WATCH, self.watch.state))
        self.steps, self.skipped, self.in_a_row = tensors["counters"].tolist()
