"""Files of feedback: exact round trips, the blocks they belong to, and refusals of everything broken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metazo import zoo
from metazo.bench.architectures import build
from metazo.errors import UserError
from metazo.feedback.surrogates import MeanJacobian
from metazo.feedback.tuner import FeedbackTuner, describe, is_feedback
from metazo.integrations.trainer_method import build as from_settings
from metazo.optimizers.feedback import Feedback
from metazo.tuner.file import Tuner
from tests.tuner.changed import changed

WIDTH, RANK = 16, 2


def make(name: str = "Llama", **facts) -> FeedbackTuner:
    """Random maps for the tiny model of an architecture."""
    info = describe(build(name).model, "base", **facts)
    drawn = torch.Generator().manual_seed(0)
    below = range(len(info.blocks) - 1)
    return FeedbackTuner(
        MeanJacobian(
            {k: torch.randn(WIDTH, RANK, generator=drawn) for k in below},
            {k: torch.randn(RANK, WIDTH, generator=drawn) for k in below},
            {k: 0.5 + 0.25 * k for k in below},
        ),
        info,
    )


def test_a_round_trip_is_exact_and_trains(tmp_path: Path) -> None:
    tuner = make(recipe={"texts": 3}, scores={"cosine": [0.5]}, licence="MIT")
    tuner.save(tmp_path / "tuner.safetensors")
    again = FeedbackTuner.load(tmp_path)
    assert again.info == tuner.info and again.to_bytes() == tuner.to_bytes()
    assert again.maps.trust == tuner.maps.trust
    for kind in ("down", "up"):
        one, two = getattr(again.maps, kind), getattr(tuner.maps, kind)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    tiny = build("Llama")
    optimizer = Feedback(tiny.model.named_parameters(), 1e-2, model=tiny.model, tuner=str(tmp_path))
    before = tiny.answer().item()
    losses = [optimizer.step(tiny.answer) for _ in range(8)]
    assert losses[0] == pytest.approx(before) and losses[-1] < before


def test_head_and_embeddings_of_a_model_may_differ_but_not_its_blocks() -> None:
    make("BERT").check_fit(build("BERT, classifier").model)  # bert.encoder.layer in both, with another head
    with pytest.raises(
        UserError, match=r"feedback for base does not fit this model's blocks \(.* differ.*skip-feedback"
    ):
        make("BERT").check_fit(build("Llama").model)
    tiny = build("Qwen2")  # Llama's blocks, with biases
    with pytest.raises(UserError, match="q_proj.bias .* is not in the tuner"):
        Feedback(tiny.model.named_parameters(), 1e-3, model=tiny.model, tuner=make("Llama"))


@pytest.mark.parametrize("kind", ["LoraConfig", "DoRA", "IA3Config"])
def test_adapters_do_not_count(kind: str) -> None:
    peft, targets = pytest.importorskip("peft"), ["q_proj", "v_proj", "down_proj"]
    config = {
        "LoraConfig": lambda: peft.LoraConfig(r=2, target_modules="all-linear"),
        "DoRA": lambda: peft.LoraConfig(r=2, target_modules=targets, use_dora=True),
        "IA3Config": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"]),
    }[kind]()
    adapted = peft.get_peft_model(build("Llama").model, config)
    assert any(".base_layer." in name for name, _ in adapted.named_parameters())
    make("Llama").check_fit(adapted)
    assert describe(adapted, "x").fingerprint == describe(build("Llama").model, "x").fingerprint


def edited(edit, where: str = "metadata") -> bytes:
    return changed(make().to_bytes(), edit, where)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty or cut short"),
        (make().to_bytes()[:-4], "cut short or damaged"),
        (edited(lambda c: c.update(kind="other")), "its metadata names another kind"),
        (edited(lambda c: c.update(format_version=2)), "format_version is 2"),
        (edited(lambda c: c.update(fingerprint="0" * 64)), "its fingerprint is not that of"),
        (edited(lambda c: c["blocks"].pop()), "has maps for 2 blocks and names 2"),
        (edited(lambda c: c.update(more=1)), "lacks or adds 'more'"),
        (edited(lambda c: c.update(scores={"a": "\x1b[2J"})), "scores is not a plain table"),
        (edited(lambda h: h["up"].update(shape=[2, 16, 2]), "header"), "shapes of down, up and trust contradict"),
        (edited(lambda h: h.pop("trust"), "header"), "not exactly down, trust, up"),
    ],
)
def test_a_broken_file_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(UserError, match=f"x is not a feedback tuner that can be used: .*{why}"):
        FeedbackTuner.from_bytes(data, "x")


def test_numbers_that_have_changed_are_refused() -> None:
    data = bytearray(make().to_bytes())
    data[-4] ^= 1
    with pytest.raises(UserError, match="x is not a feedback tuner .* has changed since it was written"):
        FeedbackTuner.from_bytes(bytes(data), "x")


def test_values_that_are_not_finite_are_refused() -> None:
    tuner = make()
    tuner.maps.down[0][0, 0] = float("nan")
    with pytest.raises(UserError, match="tensor down holds NaN"):
        FeedbackTuner.from_bytes(tuner.to_bytes(), "x")


def test_the_two_kinds_of_tuner_are_told_apart() -> None:
    from tests.tuner.test_file import make as make_scales

    feedback, scales = make().to_bytes(), make_scales().to_bytes()
    assert is_feedback(feedback) and not is_feedback(scales) and not is_feedback(b"nonsense")
    with pytest.raises(UserError, match="it is a tuner of block scales"):
        FeedbackTuner.from_bytes(scales, "x")
    with pytest.raises(UserError, match="not a tuner that can be used"):
        Tuner.from_bytes(feedback, "x")


def test_a_method_without_its_tuner() -> None:
    tiny = build("Llama")
    with pytest.raises(UserError, match="feedback needs `tuner`: fit one with metazo meta-train --learn feedback"):
        Feedback(tiny.model.named_parameters(), 1e-3, model=tiny.model)


@pytest.mark.parametrize("given", ["a folder", "an object", "a name of the zoo"])
def test_a_trainer_takes_feedback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """By all ways in which a tuner is named; `tuner` is no block scale for this method."""
    tiny, tuner = build("Llama"), make()
    tuner.save(tmp_path / "tuner.safetensors")
    name = {"a folder": str(tmp_path), "an object": tuner, "a name of the zoo": "base"}[given]
    if given == "a name of the zoo":
        zoo.push(tuner, tmp_path / "zoo")
        monkeypatch.setenv("METAZO_ZOO", str(tmp_path / "zoo"))
    options = {"lr": 1e-2, "weight_decay": 0.0, "seed": 0, "tuner": name}
    optimizer = from_settings(Feedback, tiny.model, {}, options, set(), 4)
    losses = [optimizer.step(tiny.answer) for _ in range(8)]
    assert losses[-1] < losses[0]
