"""Apply a probe to the weights, evaluate, remove the probe.

Theta is stored under one of the policies of metazo/step/precision.py. Weights that are theta themselves are moved in
place, and the removal of the probe is folded into the update: three passes per step, or two if updates wait for the
next probe (metazo/step/pending.py). Weights with a master are round(master + a d) during a probe and round(master)
after it, bit for bit as before. Compensated weights do not change while they are probed: within `evaluating`, the torch
functions that use them get perturbed copies.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from metazo.blocks import LocalShard, NamedTensor, chunk_of, chunks
from metazo.errors import UserError
from metazo.kernels.parallel import together
from metazo.noise import Move, Noise, PhiloxStream, Place, Stream
from metazo.step.autocast import OFF, as_called, under
from metazo.step.directions import in_chunks
from metazo.step.pending import Pending
from metazo.step.precision import (
    Compensated,
    InPlace,
    Master,
    Storage,
    check_contiguous,
    check_dtype,
    check_flushing,
    count_change,
    storage,
    version_of,
)
from metazo.step.substitute import Room, Scratch, no_fast_path, of_compiler
from metazo.step.terms import Estimate, Term, add_sum_


class Weights:
    """The weights of an optimizer, and the probe that is applied to them at present.

    Args: tensors: the trained tensors, in order. noise: the noise source. precision: see metazo.step.precision;
    "auto" takes the default of each tensor's dtype.
    """

    def __init__(self, tensors: Sequence[NamedTensor], noise: Noise, precision: str = "auto"):
        self.tensors, self.noise = tensors, noise
        self.storage: dict[str, Storage] = {tensor.name: storage(tensor, precision) for tensor in tensors}
        self.dtypes = {tensor.name: tensor.param.dtype for tensor in tensors}
        self.autocast = precision == "autocast"
        self.in_place, self.masters, self.compensated = (
            [tensor for tensor in tensors if isinstance(self.storage[tensor.name], kind)]
            for kind in (InPlace, Master, Compensated)
        )
        longest = max((stop - start for tensor in self.compensated for start, stop in chunks(tensor.param)), default=0)
        # for one chunk of theta at a time, on the CPU, if that saves time
        self.room = torch.empty(longest, dtype=torch.float32)
        self.probe: tuple[Term, ...] = ()
        self.snapshot: dict[str, Tensor] = {}  # other weights by name, set by a method that evaluates the loss there
        self.at_snapshot = False  # theta and the snapshot have changed places
        self.defer = False  # whether an update may wait for the next probe; see metazo/step/pending.py
        self.pending: Pending | None = None
        self.behind: set[str] = set()  # weights to be rounded from their masters, unless the next probe does so
        self.large = Room()
        self.uses: list[int] = []  # of compensated weights, in the last evaluation of a probe

    def follow(self) -> None:
        """Before a step: what is kept of weights that were changed since the last one, as by load_state_dict, begins anew.

        Raises UserError if a weight has another dtype or layout now, for which its theta would be stored in another way, and if
        its theta cannot be calculated in this thread.
        """
        check_flushing(tensor.param for tensor in self.compensated)
        for tensor in self.compensated:
            check_contiguous(tensor)
        for tensor in self.tensors:
            when = "the optimizer took up its tensors (at the first step, or when a state was saved or loaded)"
            check_dtype(tensor.name, self.dtypes[tensor.name], tensor.param.dtype, when)
        kept = ((name, place) for name, place in self.storage.items() if isinstance(place, Master | Compensated))
        changed = [name for name, place in kept if place.follow()]
        if changed:
            warnings.warn(
                f"{len(changed)} trained tensors were changed since the last step, the first is {changed[0]}: their float32 "
                "masters, or the bits that are kept below them, begin anew from them.",
                stacklevel=5,
            )

    def changed(self, tensors: Sequence[NamedTensor] | None = None) -> None:
        """After a step, or the update of these tensors: others that keep something of their weights notice it, and what is kept
        here belongs to them, unless somebody else changed them during the step.
        """
        tensors = self.tensors if tensors is None else tensors
        kept = [p for t in tensors if isinstance(p := self.storage.get(t.name), Master | Compensated)]
        before = [version_of(place.param) for place in kept]
        count_change(tensor.param for tensor in tensors)
        for place, found in zip(kept, before):
            if place.version == found:
                place.version = version_of(place.param)

    def take_up(self) -> None:
        """After a state was loaded: weights that are loaded next belong to it."""
        for place in self.storage.values():
            if isinstance(place, Compensated):
                place.loaded = True

    # -- probing --------------------------------------------------------------------------------------------------

    def visit(self, terms: Sequence[Term], snapshot: bool = False) -> None:
        """Move the weights to theta (or the snapshot) + the sum of terms, from wherever they are."""
        if snapshot != self.at_snapshot:
            self._move(())
            self._exchange()
        self._move(tuple(terms))

    def leave(self) -> None:
        """Back to theta."""
        self.visit(())

    def _move(self, wanted: tuple[Term, ...]) -> None:
        """Apply these terms to the weights instead of the present ones, with one pass per term that changes."""
        present = {term.key: term for term in self.probe}
        kept = {term.key for term in wanted}
        changes = [replace(term, amount=-term.amount) for key, term in present.items() if key not in kept]
        changes += [
            replace(term, amount=term.amount - present[term.key].amount) if term.key in present else term
            for term in wanted
        ]
        self._shift([change for change in changes if change.amount != 0])
        behind = {tensor.name for tensor in self.masters} if self.probe or wanted else self.behind
        self.probe, self.behind = wanted, set()
        try:
            self._place(wanted, behind)
        except BaseException:  # Ctrl-C, after a pass that has changed the weights
            self.behind = behind
            raise

    def _place(self, wanted: Sequence[Term], behind: set[str]) -> None:
        """Weights = round(master + sum of terms) where a term touches them; of the others, those behind are rounded."""
        streams = [self.noise.stream(term.seed) for term in wanted]
        placed: list[list[Place]] = [[] for _ in wanted]
        for tensor in self.masters:
            touching = [k for k, term in enumerate(wanted) if term.touches(tensor)]
            if len(touching) == 1:
                (k,) = touching
                placed[k].append(Place(tensor, tensor.param.data, self._theta(tensor), wanted[k].amount))
            elif touching:
                self._place_sum(tensor, [(wanted[k], streams[k]) for k in touching])
            elif tensor.name in behind:
                self.storage[tensor.name].settle()
        for term, stream, places in zip(wanted, streams, placed):
            term.along.place_all_(stream, places)

    def _shift(self, changes: Sequence[Term]) -> None:
        """Add these terms to the weights that hold theta themselves; the first together with the update that waits."""
        for change in changes if self.in_place else ():
            stream = self.noise.stream(change.seed)
            moves = [
                Move(tensor, self._theta(tensor), change.amount) for tensor in self.in_place if change.touches(tensor)
            ]
            following = self.pending and Pending.of(change.along, stream, moves)
            if self.pending and following:
                waiting, self.pending = self.pending, None
                waiting.apply_with(following)
            else:
                self._catch_up()
                change.along.add_all_(stream, moves)
        self._catch_up()

    def settle(self) -> None:
        """Apply the update that waits, if one does."""
        self._catch_up()
        for name in self.behind:
            self.storage[name].settle()
        self.behind.clear()

    @property
    def waits(self) -> bool:
        """Whether the weights are without the last update."""
        return self.pending is not None or bool(self.behind)

    def _catch_up(self) -> None:
        if self.pending is not None:
            waiting, self.pending = self.pending, None
            waiting.apply()

    def _theta(self, tensor: NamedTensor) -> Tensor:
        """Theta of a tensor that is stored as one: in place, or as a master."""
        theta = self.storage[tensor.name].theta
        assert theta is not None
        return theta

    def _place_sum(self, tensor: NamedTensor, terms: Sequence[tuple[Term, Stream]]) -> None:
        """Weights = round(master + sum of terms)."""
        master = self._theta(tensor)
        for start, chunk in in_chunks(tensor, master):
            moved = chunk.clone()
            for term, stream in terms:
                term.add_(stream, tensor, moved, 1.0, start)
            chunk_of(tensor.param.data, start, moved).copy_(moved)

    def _exchange(self) -> None:
        """Theta and the snapshot change places, bit for bit: masters by reference, weights by value, chunk by chunk.

        Compensated weights do not move; `_moved` looks at the snapshot instead.
        """
        for tensor in self.masters:
            buffers = self.storage[tensor.name].buffers
            buffers["master"], self.snapshot[tensor.name] = self.snapshot[tensor.name], buffers["master"]
            self.storage[tensor.name].settle()
        for tensor in self.in_place:
            for start, theta in self.edit(tensor):
                other = chunk_of(self.snapshot[tensor.name], start, theta)
                kept = theta.clone()
                theta.copy_(other)
                other.copy_(kept)
        self.at_snapshot = not self.at_snapshot

    @contextmanager
    def evaluating(self) -> Iterator[Scratch | None]:
        """The context of every evaluation: autocast, if chosen or else the caller's, and perturbed copies in place of
        compensated weights.

        Probes that are evaluated together do not move the weights, so an update that waits is applied here.
        """
        self.settle()
        with as_called(), no_fast_path() if self.compensated else nullcontext(), self.substituting() as scratch:
            yield scratch

    @contextmanager
    def substituting(self) -> Iterator[Scratch | None]:
        """The part of `evaluating` that is of the precision."""
        if self.autocast:
            kind = self.tensors[0].param.device.type
            with torch.autocast(kind, torch.bfloat16, cache_enabled=False):  # the cache would be a copy of the weights
                yield None
        elif self.compensated and (self.probe or self.at_snapshot):
            try:
                with Scratch(self.compensated, self._moved, self.uses) as scratch:
                    yield scratch
            except Exception as error:
                if not of_compiler(error):
                    raise
                raise UserError(
                    "`precision` compensated replaces weights within the forward pass, which torch.compile cannot trace "
                    f"({str(error).splitlines()[0]:.80}): choose master, or use the model without torch.compile."
                ) from error
        else:
            yield None

    def _moved(self, tensors: Sequence[NamedTensor], rows: Tensor | None = None) -> list[Tensor]:
        """round(theta + probe) of compensated tensors, in new memory; if `rows` are given, perhaps of these rows alone."""
        outs = [self.large.fresh(t.param.data) if rows is None else torch.empty_like(t.param.data) for t in tensors]
        passes = []
        for tensor, out in zip(tensors, outs):
            terms = [(term, self.noise.stream(term.seed)) for term in self.probe if term.touches(tensor)]
            fits = len(terms) == 1 and not self.at_snapshot
            passes.append((self._placing(tensor, *terms[0], out, rows) if fits else None, terms))
        with together():  # kernels alone: nothing that reads numbers
            done = [run is not None and run() for run, _ in passes]
        for index, (tensor, (_, terms), written) in enumerate(zip(tensors, passes, done)):
            if written:
                continue
            if rows is not None:  # all rows are written here
                outs[index] = self.large.fresh(tensor.param.data)
            out, place = outs[index], self.storage[tensor.name]
            for start, stop in chunks(tensor.param):
                theta = place.read(start, stop, self.room)
                if self.at_snapshot:
                    theta.copy_(self.snapshot[tensor.name].view(-1)[start:stop])
                with under(OFF):  # this is within the forward pass
                    for term, stream in terms:
                        term.add_(stream, tensor, theta, 1.0, start)
                out.view(-1)[start:stop].copy_(theta)
        return outs

    def _placing(
        self, tensor: NamedTensor, term: Term, stream: Stream, out: Tensor, rows: Tensor | None
    ) -> Callable[[], bool] | None:
        """A call that does as `_moved` in one pass over the weights, and returns False, with nothing done, if there is no
        kernel for these tensors; None if there is none for this term.
        """
        if not isinstance(stream, PhiloxStream) or (amount := term.along.dense(tensor, term.amount)) is None:
            return None
        low = self.storage[tensor.name].buffers["compensation"]
        return partial(stream.place_split_, tensor, out, tensor.param.data, low, amount, rows)

    def _adding(
        self,
        place: Compensated,
        tensor: NamedTensor,
        term: Term,
        stream: Stream,
        amount: float,
        factor: float,
        seed: int,
    ) -> Callable[[], bool] | None:
        """A call for theta = factor * theta + amount * d of a compensated tensor in one pass; as `_placing`."""
        if not isinstance(stream, PhiloxStream) or (multiple := term.along.dense(tensor, amount)) is None:
            return None
        low = place.buffers["compensation"]
        return partial(stream.add_split_, tensor, tensor.param.data, low, multiple, factor, seed ^ place.salt)

    # -- reading and changing theta -------------------------------------------------------------------------------

    def read(self, tensor: NamedTensor) -> Iterator[tuple[int, Tensor]]:
        """(start, theta) of a tensor, chunk by chunk; read each chunk before the next is requested.

        A tensor that is not contiguous is given whole.
        """
        self.settle()
        place = self.storage[tensor.name]
        ranges = list(chunks(tensor.param))
        whole = len(ranges) == 1 or not (
            tensor.param.is_contiguous() and (place.theta is None or place.theta.is_contiguous())
        )
        if place.theta is not None and whole:
            yield 0, place.theta
            return
        if tensor.param.is_meta:  # a dry run: one chunk takes the memory that all take in turn
            ranges = ranges[:1]
        for start, stop in ranges:
            yield start, place.read(start, stop, self.room)

    def whole(self, tensor: NamedTensor) -> Iterator[tuple[int, Tensor]]:
        """As `read`, but all of a tensor of which this process has a shard; every process must then call it."""
        theta = self.storage[tensor.name].theta
        if not isinstance(tensor.param, LocalShard) or theta is None:
            yield from self.read(tensor)
            return
        self.settle()
        gathered = tensor.param.gathered(theta.detach())
        yield from ((start, gathered.view(-1)[start:stop]) for start, stop in chunks(gathered))

    def edit(self, tensor: NamedTensor, seed: int = 0) -> Iterator[tuple[int, Tensor]]:
        """As `read`, for changes in place; a change is stored when the next chunk is requested.

        seed: seed of stochastic rounding.
        """
        place = self.storage[tensor.name]
        for start, theta in self.read(tensor):
            yield start, theta
            if theta is place.theta:
                place.settle()
            else:
                place.write(start, theta, seed)

    def edit_whole(self, tensor: NamedTensor, seed: int = 0) -> Iterator[tuple[int, Tensor]]:
        """As `edit`, but whole if theta is one tensor: for changes that make no temporary."""
        self.settle()
        place = self.storage[tensor.name]
        if place.theta is None:
            yield from self.edit(tensor, seed)
        else:
            yield 0, place.theta
            place.settle()

    def dtype(self, tensor: NamedTensor) -> torch.dtype:
        """The dtype of theta."""
        return tensor.param.dtype if isinstance(self.storage[tensor.name], InPlace) else torch.float32

    def ordered(self, terms: Sequence[Term]) -> list[Term]:
        """The terms as `apply` takes them: those into which the present probe is folded come first."""
        applied = {} if self.at_snapshot else {term.key for term in self.probe}
        return sorted(terms, key=lambda term: term.key not in applied)

    def apply(self, terms: Sequence[Term], rate: Callable[[NamedTensor], float], decay: Mapping[str, float]) -> None:
        """theta = decay * theta - rate * sum of terms, one pass over the weights per term.

        A probe that is still applied is removed in the same passes if the update has terms along all of its vectors.
        decay: factor by tensor name, 1 for names that are absent.
        """
        self.settle()
        applied = {} if self.at_snapshot else {term.key: term.amount for term in self.probe}
        terms = self.ordered(terms)
        folded = [applied.pop(term.key, 0.0) for term in terms]
        if applied or self.at_snapshot:
            self.leave()
            folded = [0.0] * len(terms)
        self.probe = ()
        streams = [self.noise.stream(term.seed) for term in terms]
        moves: list[list[Move]] = [[] for _ in terms]  # for theta that is one tensor, all at once
        changed, others, rounding = [], [], terms[0].seed if terms else 0
        for tensor in self.tensors:
            factor, place = decay.get(tensor.name, 1.0), self.storage[tensor.name]
            amounts = [-rate(tensor) * term.amount for term in terms]
            touching = [k for k, term in enumerate(terms) if term.touches(tensor)]
            if place.theta is not None and touching:
                removed = folded if isinstance(place, InPlace) else [0.0] * len(terms)
                for k in touching:
                    amount = amounts[k] - factor * removed[k]
                    moves[k].append(Move(tensor, place.theta, amount, factor if k == touching[0] else 1.0))
                changed.append((tensor, place))
            elif factor != 1.0 or touching:
                run = None
                if len(touching) == 1 and isinstance(place, Compensated):
                    (k,) = touching
                    run = self._adding(place, tensor, terms[k], streams[k], amounts[k], factor, rounding)
                others.append((run, tensor, amounts, factor))
        with together():  # kernels alone, as in _moved
            done = [run is not None and run() for run, *_ in others]
        for (_, tensor, amounts, factor), written in zip(others, done):
            for start, theta in () if written else self.edit_whole(tensor, rounding):
                add_sum_(tensor, theta, terms, streams, amounts, factor, start)
        if self.defer and len(terms) == 1 and moves[0] and not self.masters:
            self.pending = Pending.of(terms[0].along, streams[0], moves[0])
            if self.pending:
                return
        for term, stream, moved in zip(terms, streams, moves):
            term.along.add_all_(stream, moved)
        masters = {tensor.name for tensor, place in changed if isinstance(place, Master)}
        if self.defer:
            self.behind = masters
        else:
            for name in masters:
                self.storage[name].settle()

    def gradient(self, terms: Sequence[Term]) -> Estimate:
        """The estimate, a sum of terms, to be added to a buffer for every tensor, in order."""
        streams = [self.noise.stream(term.seed) for term in terms]
        for term, stream in zip(terms, streams):
            stream.prepare(draw for tensor in self.tensors for draw in term.along.draws(tensor))
        return Estimate(terms, streams)
