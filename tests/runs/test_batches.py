"""Batches of similar length: the same examples as shuffled ones, a function of step and seed, with little padding."""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from metazo.io.terminal import Console
from metazo.runs.batches import ORDER, WINDOW, _order, batch_indices, batch_indices_by_length, padding
from metazo.runs.config import FinetuneConfig
from metazo.runs.dryrun import dry_run
from metazo.runs.finetune import run_settings
from metazo.runs.replay import replay
from metazo.steplog.format import scan

SIZE, EXAMPLES = 4, 50
LENGTHS = np.random.default_rng(0).integers(3, 40, EXAMPLES).tolist()


def window(number: int, seed: int = 1) -> list[list[int]]:
    """The first window of an epoch, of an even number: the 50 examples of two epochs are 25 batches."""
    first = number // 2 * 25
    return [batch_indices_by_length(first + k, SIZE, LENGTHS, seed) for k in range(WINDOW)]


@pytest.mark.parametrize("number", [0, 2, 6])
def test_the_steps_of_a_window_read_what_shuffled_steps_read(number: int) -> None:
    shuffled = [i for k in range(WINDOW) for i in batch_indices(number // 2 * 25 + k, SIZE, EXAMPLES, 1)]
    assert Counter(i for batch in window(number) for i in batch) == Counter(shuffled)
    assert all(len(batch) == SIZE for batch in window(number))


@pytest.mark.parametrize(("examples", "size"), [(32, 16), (50, 4), (1000, 16), (24, 16), (10, 16), (7, 7)])
def test_an_epoch_reads_every_example_once_and_no_batch_within_it_has_one_twice(examples: int, size: int) -> None:
    lengths = [5 + i % 30 for i in range(examples)]
    steps = math.lcm(examples, size) // size * 2  # whole epochs
    read = [batch_indices_by_length(step, size, lengths, 0) for step in range(steps)]
    assert set(Counter(i for batch in read for i in batch).values()) == {steps * size // examples}
    assert len({i for batch in read[: -(-examples // size)] for i in batch}) == examples
    for step, batch in enumerate(read):
        if step * size // examples == ((step + 1) * size - 1) // examples:
            assert len(set(batch)) == size
        else:
            assert batch == batch_indices(step, size, examples, 0)


def test_batches_do_not_overlap_in_length_and_their_order_is_drawn() -> None:
    batches = sorted(window(0), key=lambda batch: max(LENGTHS[i] for i in batch))
    for lower, upper in zip(batches, batches[1:]):
        assert max(LENGTHS[i] for i in lower) <= min(LENGTHS[i] for i in upper)
    orders = [[max(LENGTHS[i] for i in batch) for batch in window(number)] for number in range(0, 40, 2)]
    assert sum(order == sorted(order) for order in orders) <= 1
    # every place of the window gets short and long batches
    assert np.ptp(np.mean([[sorted(order).index(x) for x in order] for order in orders], axis=0)) < 4


def test_the_seed_decides() -> None:
    assert window(0) == window(0) and window(0) != window(0, seed=2)


def test_the_order_of_an_epoch_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """13 examples in batches of 4: the fourth batch begins in one epoch and ends in the next."""
    orders = [np.random.default_rng([5, epoch]).permutation(13).tolist() for epoch in range(3)]
    drawn, real = [], np.random.default_rng
    _order.cache_clear()
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed) or real(seed))
    batches = [batch_indices(step, 4, 13, 5) for step in range(9)]
    assert [i for batch in batches for i in batch] == [i for order in orders for i in order][:36]
    assert drawn == [[5, 0], [5, 1], [5, 2]]
    assert batch_indices(1, 4, 13, 6) != batches[1] == batch_indices(1, 4, 13, 5)


def test_less_is_padding() -> None:
    def padded(batches: list[list[int]]) -> int:
        return sum(SIZE * max(LENGTHS[i] for i in batch) for batch in batches)

    shuffled = [batch_indices(step, SIZE, EXAMPLES, 1) for step in range(WINDOW * 10)]
    sorted_ = [batch_indices_by_length(step, SIZE, LENGTHS, 1) for step in range(WINDOW * 10)]
    whole = sum(LENGTHS[i] for batch in sorted_ for i in batch)
    assert padded(sorted_) < 1.15 * whole and padded(shuffled) > 1.4 * whole


def test_a_run_records_the_choice_and_is_replayed(tmp_path: Path) -> None:
    common = {"model": "pico", "task": "pico_sentiment", "lr": 1e-4, "steps": 10, "batch_size": 4, "train_examples": 40,
              "dev_examples": 4, "test_examples": 4, "keep": "last"}  # fmt: skip
    losses = {}
    for batches in (None, "by-length"):
        out = tmp_path / str(batches)
        run_settings(FinetuneConfig(**common, out=out, batches=batches), Console(quiet=True))
        assert scan(out / "steps.jsonl").sound().header["settings"]["batches"] == batches
        assert scan(out / "steps.jsonl").sound().header.get("order") == (ORDER if batches else None)
        losses[batches] = [step.losses for step in scan(out / "steps.jsonl").sound().steps]
        replay(out / "steps.jsonl", base="pico", out=tmp_path / f"{batches} again")
        again, first = (path / "model.safetensors" for path in (tmp_path / f"{batches} again", out / "model"))
        assert again.read_bytes() == first.read_bytes()
    assert losses[None] != losses["by-length"]


@pytest.mark.parametrize("seed", [0, 3])
def test_where_an_epoch_is_a_whole_number_of_windows_batches_by_length_are_those_of_earlier_versions(seed: int) -> None:
    """results/real and results/micro-feedback were made with 640 rows and batches of 16."""
    lengths = [5 + place * 7 % 12 for place in range(640)]

    def before(step: int) -> list[int]:
        window, place = divmod(step, WINDOW)
        drawn = sorted(batch_indices(window, WINDOW * 16, 640, seed), key=lengths.__getitem__)
        batch = int(np.random.default_rng([seed, window, WINDOW]).permutation(WINDOW)[place])
        return drawn[batch * 16 : (batch + 1) * 16]

    for step in range(130):
        assert batch_indices_by_length(step, 16, lengths, seed) == before(step)


def test_padding_is_said_where_batches_by_length_would_save_a_quarter() -> None:
    """Half of the inputs have 10 tokens and half 40: a batch of 4 is 40 long if one of them is, or in 15 of 16 batches."""
    config = FinetuneConfig("pico", "pico_sentiment", batch_size=4)
    mixed, even = [[0] * (10, 40)[k % 2] for k in range(128)], [[0] * (36, 40)[k % 2] for k in range(128)]
    [said] = padding(config, mixed)
    found = [int(number) for number in re.findall(r"(\d+) %", said)]
    assert abs(found[0] - 34) <= 3 and found[1] < 12, said  # 1 - 25 / (40 - 30 / 16) is 0.34
    for settings, train in (({}, even), ({"batches": "by-length"}, mixed), ({"batch_size": 1}, mixed), ({}, mixed[:6])):
        assert padding(replace(config, **settings), train) == []


def test_a_run_and_its_plan_say_what_is_padding(tmp_path: Path) -> None:
    rows = [{"text": "good " * (1, 30)[k // 2 % 2], "label": k % 2} for k in range(40)]
    settings = {"train_examples": 24, "dev_examples": 8, "test_examples": 8, "batch_size": 4, "steps": 1, "lr": 1e-3}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.yaml").write_text(
        "kind: classification\nprompt: '{text}. It was {}.'\nlabels: [terrible, great]\nfiles: {train: rows.jsonl}\n"
    )
    config = FinetuneConfig("pico", str(tmp_path / "t.yaml"), tmp_path / "run", **settings)
    assert any("are padding; with `batches` by-length" in note for note in dry_run(config)["notes"])
    console = Console(file=io.StringIO(), width=400)
    run_settings(config, console)
    assert "are padding; with `batches` by-length" in console.file.getvalue()  # type: ignore[attr-defined]
