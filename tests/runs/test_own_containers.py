"""Batches of own losses: containers of any kind are copied and moved, and the originals stay."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from metazo.runs.own import OwnBatch, _with_tensors


class Around(MutableMapping):
    """A mapping around a dict, as most are."""

    def __init__(self, entries: dict[str, Any]):
        self.entries = entries

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.entries[key] = value

    def __delitem__(self, key: str) -> None:
        del self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class Pair(tuple):
    def __new__(cls, a: Tensor, b: Tensor):
        return super().__new__(cls, (a, b))


@dataclass
class Node:
    x: Tensor
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    late: Tensor = field(init=False)


def copied(value: Any) -> Any:
    return _with_tensors(value, Tensor.clone)


def moved(value: Any) -> Any:
    return OwnBatch(value).to("meta").content


def test_a_mapping_around_a_dict_is_copied_with_its_entries() -> None:
    batch = Around({"x": torch.ones(2)})
    other, elsewhere = copied(batch), moved(batch)
    other.pop("x")
    assert isinstance(elsewhere, Around) and elsewhere["x"].is_meta
    assert torch.equal(batch["x"], torch.ones(2))


def test_a_dataclass_may_lack_fields_and_contain_itself() -> None:
    root = Node(torch.ones(1))
    root.children.append(Node(torch.zeros(1), parent=root))
    for made in (copied(root), moved(root)):
        assert made is not root and made.children[0].parent is made and not hasattr(made, "late")
    assert moved(root).children[0].x.is_meta and root.children[0].parent is root and not root.x.is_meta


def test_a_tuple_with_a_constructor_of_its_own_stays_as_it_is() -> None:
    pair = Pair(torch.ones(1), torch.zeros(1))
    assert copied({"pair": pair})["pair"] is pair


def test_the_sizes_of_a_packed_sequence_stay_on_the_cpu() -> None:
    packed = pack_padded_sequence(torch.ones(2, 3, 1), torch.tensor([3, 1]), batch_first=True)
    made = moved({"packed": packed})["packed"]
    assert isinstance(made, PackedSequence) and made.data.is_meta and made.batch_sizes.device.type == "cpu"
    again = copied(packed)
    assert torch.equal(again.data, packed.data) and again.data is not packed.data


class Fresh(Around):
    """Makes its entries anew at each look, so that an address may be used twice."""

    def __getitem__(self, key: str) -> Any:
        return {"x": self.entries[key]}


def test_entries_that_are_made_at_each_look_are_told_apart() -> None:
    batch = Fresh({str(k): torch.full((1,), float(k)) for k in range(50)})
    made = copied(batch)
    assert [int(made.entries[str(k)]["x"]) for k in range(50)] == list(range(50))
