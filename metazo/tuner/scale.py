"""The block scale that a tuner's networks compute (PertNN, arXiv 2510.00419)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from metazo.blocks import NamedTensor, trained
from metazo.errors import UserError
from metazo.step.scales import STATISTICS_EVERY, BlockScale, State, floored_rms
from metazo.tuner.file import Tuner
from metazo.tuner.match import plain_name
from metazo.tuner.networks import PertNN

FEATURES = ("published", "log")
PARAMETRISATIONS = ("abs", "rms_exp")


def features(kind: str, state: State) -> Tensor:
    """Inputs of the networks, (blocks, 5), float64.

    "published": mean, variance, L+ and L- of the step before, sigma of the step before (arXiv 2510.00419).
    "log": ln standard deviation, mean / standard deviation, loss, change of loss, ln sigma; all of order one.
    """
    statistics, losses, sigma = state["scale/statistics"], state["scale/losses"], state["scale/sigma"]
    n = len(statistics)
    mean, variance = statistics[:, 0], statistics[:, 1]
    if kind == "published":
        return torch.stack([mean, variance, losses[0].expand(n), losses[1].expand(n), sigma], dim=1)
    deviation = variance.sqrt().clamp(min=1e-8)
    loss = (losses[0] + losses[1]) / 2
    change = torch.where(losses[2].isinf(), 0.0, loss - losses[2])
    ratio = (mean / deviation).clamp(-10, 10)
    return torch.stack([deviation.log(), ratio, loss.expand(n), change.expand(n), sigma.clamp(min=1e-8).log()], dim=1)


def parametrise(kind: str, raw: Tensor, rms: Tensor, bound: float) -> Tensor:
    """sigma from the networks' raw outputs, (blocks,).

    "abs": |raw| (published). "rms_exp": rms * exp(b tanh(raw / b)), b = bound: the RMS rule if raw is 0, and at most a
    factor e^b away from it.
    """
    if kind == "abs":
        return raw.abs()
    return rms * torch.exp(bound * torch.tanh(raw / bound))


@dataclass
class TunerScale(BlockScale):
    """sigma_b from one small network per block (PertNN, arXiv 2510.00419).

    Args:
        pertnn: the networks, stacked; evaluated in their own dtype, on the CPU.
        networks: name of the block of each network; None: the trained blocks, in order. Networks of blocks that are not
            trained are not used; trained blocks without a network take the RMS scale, at the average level of the others.
        tensors: names of the tensors of each network's block, if a block has several; a block of others is not its own.
        partial: whether trained blocks without a network are accepted.
        features, parametrisation, bound: as in `features` and `parametrise`.
        recipe: of the tuner, for notes on the rows that it was trained on.
    """

    pertnn: PertNN | None = None
    networks: Sequence[str] | None = None
    tensors: Sequence[frozenset[str]] | None = None
    partial: bool = True
    features: str = "published"
    parametrisation: str = "abs"
    bound: float = math.log(3)
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def bind(self, tensors: Sequence[NamedTensor]) -> None:
        super().bind(tensors)
        if self.pertnn is None:
            raise UserError("A tuner scale needs the tuner's networks (pertnn).")
        if self.features not in FEATURES or self.parametrisation not in PARAMETRISATIONS:
            raise UserError(f"features {self.features!r} with parametrisation {self.parametrisation!r} is unknown.")
        names = [plain_name(block.name) for block in self.blocks]
        networks = names if self.networks is None else self.networks
        row_of = {plain_name(name): row for row, name in enumerate(networks)}
        if len(row_of) != self.pertnn.blocks:
            raise UserError(f"The tuner has {self.pertnn.blocks} networks for {len(row_of)} blocks.")
        known = [i for i, name in enumerate(names) if name in row_of]
        if self.tensors is not None:
            own = [frozenset(plain_name(tensor.name) for tensor in block.tensors) for block in self.blocks]
            others = [i for i in known if own[i] != self.tensors[row_of[names[i]]]]
            if others and not self.partial:
                raise UserError(
                    f"The tuner's network of {names[others[0]]} is for all tensors of this block together, and others are "
                    "trained here: train just these, or accept the RMS scale for the block (`allow_partial`)."
                )
            known = [i for i in known if i not in others]
            if others and not known:
                raise UserError(
                    "The tuner's networks are for all tensors of a block together, and in every block others are trained, as "
                    f"in {names[others[0]]}: choose another tuner or `scale`."
                )
        if not known:
            raise UserError(f"The tuner has no network for any trained block, such as {names[0]!r}.")
        self.known = torch.tensor(known, device="cpu")
        self.rows = torch.tensor([row_of[names[i]] for i in known], device="cpu")

    def identity(self) -> str:
        assert self.pertnn is not None
        values = torch.cat([weight.detach().double().flatten().cpu() for weight in self.pertnn.parameters()])
        digest = hashlib.blake2b(values.numpy().tobytes(), digest_size=4).hexdigest()
        known = () if self.tensors is None else (len(self.known),)
        rest = (self.by, self.normalise, self.every, self.features, self.parametrisation, round(self.bound, 6), *known)
        return f"TunerScale{rest} of networks {digest}"

    def raw(self, state: State) -> Tensor:
        """Raw outputs for the trained blocks that have a network; differentiable in the networks' weights."""
        assert self.pertnn is not None
        inputs = features(self.features, state)[self.known].to(self.pertnn.w1.dtype)
        selected = {name: weight[self.rows] for name, weight in self.pertnn.named_parameters()}
        return functional_call(self.pertnn, selected, (inputs,))

    def learned(self, state: State) -> Tensor:
        """sigma of those blocks, float64; differentiable in the networks' weights."""
        rms = floored_rms(state["scale/statistics"][:, 2], self.counts)[self.known]
        return parametrise(self.parametrisation, self.raw(state).double(), rms, self.bound)

    def sigma(self, state: State) -> Tensor:
        rms = floored_rms(state["scale/statistics"][:, 2], self.counts)
        with torch.no_grad():
            learned = self.learned(state)
        if len(self.known) == len(self.blocks):
            return learned
        level = torch.exp((learned.clamp(min=1e-12) / rms[self.known]).log().mean())
        return (rms * level).index_copy(0, self.known, learned)


PUBLISHED_EMBEDDING_ROWS = 15  # number of embedding rows that one example is assumed to use


def tuner_scale(
    tuner: Tuner,
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    allow_partial: bool = False,
    every: int | None = None,
    batch_size: int = 16,
) -> TunerScale:
    """The block scale of a tuner on a model.

    Args: named_parameters: all of the model, including frozen ones. allow_partial: accept a model that differs; its other
    blocks take the RMS scale. every: steps between readings of the block statistics (default 50; 1 for the published
    features, as published). batch_size: number of examples of one step, over all micro-batches and processes; used only if the
    tuner has the published count of embedding entries (`tuner.info.embedding_count`, as imported tuners have), which follows
    it. An optimizer does not see the batches of a loop: give the loop's own number, because the default 16 is the published
    one and the sizes of the probes differ with it.
    Raises UserError that names the first blocks that differ.
    """
    info = tuner.info
    named = list(named_parameters)
    used = [tensor.name for tensor in trained(named)] or None
    match = tuner.check_fit([(name, tuple(p.shape)) for name, p in named], allow_partial, used)
    matched = set(match.matched)
    # a name that no block can have, so that the other rows keep their indices
    networks = [block.name if index in matched else f"/unmatched/{index}" for index, block in enumerate(info.blocks)]
    tensors = [frozenset(plain_name(name) for name, _ in block.tensors) for block in info.blocks]
    return TunerScale(
        pertnn=tuner.pertnn,
        networks=networks,
        tensors=None if info.by == "tensor" else tensors,
        partial=allow_partial,
        by=info.by,
        features=info.features,
        parametrisation=info.parametrisation,
        bound=info.bound,
        recipe=info.recipe,
        normalise=info.normalise,
        embedding_rows=PUBLISHED_EMBEDDING_ROWS * batch_size if info.embedding_count == "published" else None,
        every=every or (1 if info.features == "published" else STATISTICS_EVERY),
    )
