"""Block scales learned over whole runs: `metazo meta-train --objective horizon`, or `meta_train(HorizonConfig(...))`.

The objective is the loss on held-out examples at the end of a run of MeZO of `horizon` steps from the base weights, in the
mean over tasks; it looks at what a scale is for, where the other objectives look at one step. sigma_b is the RMS rule times
exp(bounded r_b) with one free number r_b per block, which starts at 0, so that the search starts at the RMS rule. The r_b
are learned by evolution strategies (metazo/meta/evolution.py): each meta-step runs a pair, with r + m and r - m, on the next
task of a shuffled order. Both runs have the same batches and the same noise (common random numbers), so that their losses
differ by the scales alone.

One more number is learned: the logarithm of a factor of all learning rates. Otherwise a scale could be preferred because it
steps farther or less far at the given rate, which the search for a rate undoes afterwards. The rate of each task is the
best of `rates` under the scale at the start, found the first time that the task is drawn.

With `networks` a network per block is added to r_b; its first layer keeps its random weights, its second is learned.
The result is an ordinary tuner: r_b is the bias of the last layer of block b's network. Blocks that are frozen during
meta-training have r_b = 0, the RMS rule.

Where not to use: on tasks like your own to the exclusion of others, since scales are then fitted to these tasks; without a
comparison with the RMS rule, which costs nothing (docs/meta-learning.md has ours).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metazo.blocks import named_tensors, partition
from metazo.errors import UserError
from metazo.meta.evolution import Pairs
from metazo.meta.explosion import exploded, norm
from metazo.meta.horizon_config import HorizonConfig
from metazo.meta.loop import MOST_SKIPPED, MetaStep
from metazo.meta.order import PreparedTask
from metazo.meta.path import load_weights, weights_of
from metazo.meta.reset import Start
from metazo.meta.teacher import load_optimizer_tensors, optimizer_tensors
from metazo.optimizers.mezo import MeZO
from metazo.runs.batches import ORDER, batch_indices_by_length
from metazo.runs.monitor import risen
from metazo.runs.schedule import share
from metazo.step.scales import block_statistics, floored_rms, normalisation
from metazo.tasks.evaluate import evaluate
from metazo.tasks.prepared import Batch, Prepared
from metazo.tuner.networks import PertNN
from metazo.tuner.scale import TunerScale

EVAL_BATCH = 32  # examples per batch of the held-out loss


class HorizonTask(PreparedTask):
    """A prepared task and the model that is run on it. Models of several tasks share their weights."""

    def __init__(self, model: nn.Module, prepared: Prepared, device: torch.device | str = "cpu"):
        super().__init__(prepared, device)
        self.model, self.lengths = model, [len(example) for example in prepared.train]

    def batch_at(self, step: int, count: int, seed: int) -> Batch:
        """The batch of a step of the run with this seed."""
        return self.batch(batch_indices_by_length(step, count, self.lengths, seed))

    def step(self, optimizer: MeZO, step: int, count: int, seed: int, lr: float) -> None:
        """One step of the optimizer on the batch of that number, at this learning rate."""
        batch = self.batch_at(step, count, seed)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step(lambda: self.prepared.loss(self.model, batch))

    def held_out(self) -> float:
        """The mean loss on the held-out examples."""
        return evaluate(self.model, self.prepared, "dev", batch_size=EVAL_BATCH, loss_only=True)["loss"]


class HorizonRun:
    """Meta-training of one set of scales for one model.

    Args: tasks: their models share the trained tensors, which are at the base weights; caught: the names of signals that
    ask the run to stop.
    Attributes: steps: meta-steps taken; skipped: those with a loss that was not finite, or whose runs both exploded (or one,
    without ranks).
    """

    def __init__(self, tasks: Sequence[HorizonTask], config: HorizonConfig, caught: Sequence[str] = ()):
        self.tasks, self.config, self.caught = list(tasks), config, caught
        self.tensors = named_tensors(tasks[0].model)
        self.base, self.norm = Start(self.tensors), norm(self.tensors) or 1.0
        self.first: dict[int, float] = {}  # the held-out loss at the base weights, by task
        blocks = partition(self.tensors, config.blocks)
        self.pertnn = PertNN(len(blocks), hidden=max(config.networks, 1), seed=config.seed, zero_init=True)
        self.scale = self._scale(self.pertnn)
        self.scale.bind(self.tensors)
        self.statistics = block_statistics(self.scale.blocks, lambda tensor: [(0, tensor.param.detach())])
        self.pertnn.b2.data.copy_(self._start())
        n, inner = len(blocks), len(blocks) * config.networks
        spread = torch.full((n + inner + 1,), config.spread, dtype=torch.float64)
        spread[n : n + inner] /= math.sqrt(max(config.networks, 1))  # a network's output then spreads as a free scale
        self.centre = torch.zeros(n + inner + 1, dtype=torch.float64)
        self.centre[:n] = self.pertnn.b2.data
        self.optimizer = torch.optim.Adam([self.centre], lr=config.lr_sigma)
        self.pairs = Pairs(spread, config.pairs, config.shaping, config.seed)
        self.rates = torch.full((len(tasks),), math.nan, dtype=torch.float64)
        self.age, self.number = (torch.zeros(config.pairs, dtype=torch.int64) for _ in range(2))
        self.members: dict[str, Tensor] = {}
        self.steps = self.skipped = self.in_a_row = self.begun = 0

    # -- the scales -------------------------------------------------------------------------------------------------

    def _scale(self, pertnn: PertNN) -> TunerScale:
        c = self.config
        kind: dict[str, Any] = {"features": "log", "parametrisation": "rms_exp", "bound": c.bound}
        return TunerScale(by=c.blocks, normalise=c.normalise, pertnn=pertnn, **kind)

    def _start(self) -> Tensor:
        """r_b at the start: 0, or with start "flat" the values that give all blocks one scale. Raises UserError."""
        rms = floored_rms(self.statistics[:, 2], self.scale.counts)
        if self.config.start == "rms":
            return torch.zeros_like(rms)
        wanted = rms.log().mean() - rms.log()
        bound, most = self.config.bound, float(wanted.abs().max())
        if most > 0.95 * bound:
            raise UserError(
                f"`start='flat'` needs a `bound` of at least {most / 0.95:.3g} on this model, not {bound:.3g}: its blocks' "
                "root mean squares differ that much."
            )
        return bound * torch.atanh(wanted / bound)

    def networks(self, point: Tensor) -> PertNN:
        """The networks of a point of the search."""
        n, width = self.pertnn.blocks, self.config.networks
        made = PertNN.from_stacked(**{name: value.detach() for name, value in self.pertnn.named_parameters()})
        made.b2.data.copy_(point[:n])
        if width:
            made.w2.data.copy_(point[n : n + n * width].view(n, width))
        return made

    def sigma(self) -> Tensor:
        """The scales of the centre of the search at the base weights, normalised if the tuner's are, (blocks,)."""
        scale = self._scale(self.networks(self.centre))
        scale.bind(self.tensors)
        state = scale.init() | {"scale/statistics": self.statistics}
        sigma = scale.sigma(state)
        return sigma * normalisation(sigma, scale.counts) if self.config.normalise else sigma

    @property
    def moved(self) -> bool:
        """Whether the centre of the search is another than at the start of the run."""
        n = self.pertnn.blocks
        return not torch.equal(self.centre[:n], self.pertnn.b2.detach().double()) or bool(self.centre[n:].any())

    # -- runs ---------------------------------------------------------------------------------------------------------

    def run(
        self, task: HorizonTask, point: Tensor, rate: float, seed: int, first: int, last: int, state: dict | None = None
    ) -> tuple[float, dict[str, Tensor]] | None:
        """Steps `first` to `last` (exclusive) of a run. Returns: the held-out loss, and the optimizer's state; None if a
        signal was caught. The weights are those of the run's end.

        rate: before the factor that is part of the point; state: of the optimizer after step `first` - 1.
        """
        c = self.config
        lr = rate * math.exp(min(float(point[-1]), 50.0))
        scale, named = self._scale(self.networks(point)), task.model.named_parameters()
        optimizer = MeZO(named, lr, c.eps, seed=seed, scale=scale, check_loss=False)
        if state is not None:
            optimizer.load_tensors_state(state)
        optimizer.defer = True  # the update waits for the next probe: two passes over the weights per step
        for step in range(first, last):
            if self.caught:
                return None
            task.step(optimizer, step, c.batch_size, seed, lr * share(c.schedule, step, c.horizon))
        optimizer.settle()
        return task.held_out(), optimizer.tensors_state()

    def _seed(self, number: int) -> int:
        """The seed of noise and batches of a run; both members of a pair have it."""
        return int(np.random.default_rng([self.config.seed, number]).integers(2**62))

    def _task(self, number: int) -> int:
        """The task of a run: all tasks in a shuffled order, then again in another."""
        epoch, place = divmod(number, len(self.tasks))
        return int(
            np.random.default_rng([self.config.seed, epoch, len(self.tasks)]).permutation(len(self.tasks))[place]
        )

    def _rate(self, index: int) -> float | None:
        """The learning rate of a task, before its runs; None if a signal was caught while the rates were compared."""
        rates, start = self.config.rates, torch.zeros_like(self.centre)
        if (first := self.first.get(index)) is None:
            self.first[index] = first = self.tasks[index].held_out()
        if not math.isnan(self.rates[index]):
            return float(self.rates[index])
        start[: self.pertnn.blocks] = self.pertnn.b2.data
        losses = []
        for rate in rates if len(rates) > 1 else ():
            self.base.restore()
            found = self.run(self.tasks[index], start, rate, self._seed(2**40 + index), 0, self.config.horizon)
            if found is None:
                return None
            worse = exploded(found[0], first, self.tensors, self.norm) or risen(first, found[0])
            losses.append(math.inf if worse else found[0])
        if losses and min(losses) == math.inf:
            raise UserError(
                f"No learning rate of `rates` {', '.join(f'{rate:g}' for rate in rates)} ends with a finite loss on task "
                f"{self.tasks[index].name!r} without divergence from the {first:.4g} at the start; give lower ones."
            )
        self.rates[index] = rates[losses.index(min(losses))] if losses else rates[0]
        return float(self.rates[index])

    # -- the meta-step --------------------------------------------------------------------------------------------------

    def step(self) -> MetaStep | None:
        """Run one pair; after the last pair of an update, move the scales.

        Returns: None if a signal was caught; nothing has changed then. Raises UserError if no rate works on a task, or if
        MOST_SKIPPED pairs in a row were skipped. The weights are the base weights afterwards.
        """
        c, pair = self.config, self.steps % self.config.pairs
        age = int(self.age[pair])
        number = self.begun if age == 0 else int(self.number[pair])
        index = self._task(number)
        task, rate, move, ends, bad = self.tasks[index], self._rate(index), self.pairs.move(self.steps), [], []
        for member, sign in enumerate((1.0, -1.0)):
            state = self._put(pair, member) if age else self.base.restore()
            point, last = self.centre + sign * move, age + c.window
            found = None if rate is None else self.run(task, point, rate, self._seed(number), age, last, state)
            if found is None:
                self.base.restore()
                return None
            bad.append(exploded(found[0], self.first[index], self.tensors, self.norm))
            kept = found[1] | weights_of(self.tensors) if last < c.horizon else {}
            ends.append((found[0], {name: value.clone() for name, value in kept.items()}))
        self.base.restore()
        if age == 0:
            self.begun += 1
            self.pairs.begin(pair)
        self.number[pair] = number
        self.age[pair] = (age + c.window) % c.horizon
        of_pair = f"member{pair}."  # nothing is kept of a run that has ended
        self.members = {name: value for name, value in self.members.items() if not name.startswith(of_pair)}
        for member, (_, kept) in enumerate(ends):
            self.members |= {f"member{pair}.{member}/{name}": value for name, value in kept.items()}
        plus, minus = ends[0][0], ends[1][0]
        self.pairs.tell(self.steps, pair, *(math.inf if lost else end[0] for lost, end in zip(bad, ends)))
        self.steps += 1
        skipped = not math.isfinite(plus + minus) or (all(bad) if c.shaping == "rank" else any(bad))
        self._count(skipped)
        if pair == c.pairs - 1:
            self._update()
        sigma = self.sigma()
        energy = self.scale.counts * sigma**2
        mean = (plus + minus) / 2
        return MetaStep(self.steps - 1, task.name, mean, mean, None, sigma, energy / energy.sum(), skipped)

    def _update(self) -> None:
        """One step of Adam along the estimate of the pairs."""
        update = (self.steps - 1) // self.config.pairs
        self.optimizer.param_groups[0]["lr"] = self.config.lr_sigma * (1 - update / self.config.updates)
        self.centre.grad = self.pairs.gradient()
        self.optimizer.step()

    def _put(self, pair: int, member: int) -> dict[str, Tensor]:
        """Set the weights to those of a member's run; returns its optimizer's state."""
        prefix = f"member{pair}.{member}/"
        held = {name.removeprefix(prefix): value for name, value in self.members.items() if name.startswith(prefix)}
        load_weights(self.tensors, held)
        return {name: value for name, value in held.items() if not name.startswith("theta/")}

    def _count(self, skipped: bool) -> None:
        self.skipped += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= MOST_SKIPPED:
            raise UserError(
                f"{MOST_SKIPPED} pairs of runs in a row up to meta-step {self.steps} exploded, or had a loss that was not "
                "finite: lower `rates` or `spread`."
            )

    # -- saving -----------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """The whole state on which later steps depend, as tensors by name, not copied."""
        out = {"centre": self.centre, "sums": self.pairs.sums, "losses": self.pairs.losses, "rates": self.rates}
        out |= {"age": self.age, "number": self.number, "order": torch.tensor(ORDER)}
        out |= {f"meta/{key}": value for key, value in optimizer_tensors(self.optimizer, ["centre"]).items()}
        counters = torch.tensor([self.steps, self.skipped, self.in_a_row, self.begun])
        return {name: value.detach() for name, value in out.items()} | self.members | {"counters": counters}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load a `state`. Raises UserError if it does not belong to this run."""
        own = {name: value for name, value in self.state().items() if not name.startswith(("meta/", "member"))}
        if int(tensors.get("order", 1)) != ORDER:
            raise UserError(
                "The snapshot is of a metazo that had another order of batches of similar length: resume the run with that "
                "metazo, or start it again in another `out`."
            )
        odd = [name for name, value in own.items() if name not in tensors or tensors[name].shape != value.shape]
        if odd:
            raise UserError(f"The snapshot is not of this run: {odd[0]} differs; start in another `out`.")
        for name, value in own.items():
            value.copy_(tensors[name])
        meta = {key.removeprefix("meta/"): value for key, value in tensors.items() if key.startswith("meta/")}
        load_optimizer_tensors(self.optimizer, ["centre"], meta)
        self.members = {name: value.clone() for name, value in tensors.items() if name.startswith("member")}
        self.steps, self.skipped, self.in_a_row, self.begun = tensors["counters"].tolist()
