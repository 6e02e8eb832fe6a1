"""Tuner files: exact round trips, the fit to a model in words, and refusals of broken files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metazo.errors import UserError
from metazo.tuner.file import BlockSpec, Tuner, TunerInfo, fingerprint
from metazo.tuner.networks import PertNN
from metazo.tuner.scale import tuner_scale
from tests.tuner.changed import changed

SHAPES = [("embed.weight", (10, 4)), ("layers.0.w", (4, 4)), ("layers.0.b", (4,)), ("norm", (4,))]


def make(shapes: list[tuple[str, Any]] = SHAPES, **info: Any) -> Tuner:
    blocks = [BlockSpec(name, [(name, shape)]) for name, shape in shapes]
    return Tuner(PertNN(len(blocks), seed=1), TunerInfo("base", blocks, **info))


def edited(edit: Callable[[dict[str, Any]], Any], where: str = "metadata") -> bytes:
    return changed(make().to_bytes(), edit, where)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    tuner = make(recipe={"task": "cb", "steps": 3}, scores={"sst2": {"loss": 0.5}}, licence="Apache-2.0", by="tensor")
    tuner.save(tmp_path / "t.safetensors")
    again = Tuner.load(tmp_path / "t.safetensors")
    assert again.info == tuner.info
    assert again.to_bytes() == tuner.to_bytes() == (tmp_path / "t.safetensors").read_bytes()
    for name, tensor in tuner.pertnn.state_dict().items():
        assert torch.equal(again.pertnn.state_dict()[name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]


def test_type_is_kept_and_a_folder_is_enough(tmp_path: Path) -> None:
    tuner = make()
    tuner.pertnn.to(torch.float16)
    tuner.save(tmp_path / "tuner.safetensors")
    assert Tuner.load(tmp_path).pertnn.w1.dtype == torch.float16


def test_figures_that_are_not_numbers_do_not_cost_the_tuner() -> None:
    tuner = Tuner.from_bytes(make(scores={"loss": math.nan, "by step": [1.0, math.inf]}).to_bytes(), "t")
    assert tuner.info.scores == {"loss": None, "by step": [1.0, None]}


def test_fingerprint_is_pinned() -> None:
    """Published tuners are found by this hash, so it may never change: printf '[["a",[2,3]],["b",[3]]]' | sha256sum."""
    pinned = "71db505eec0d01482da669044460bfd3a23e766539b4c19cd43492cf00276a64"
    assert fingerprint([("b", (3,)), ("a", (2, 3))]) == pinned
    assert fingerprint([("a", torch.Size([2, 3])), ("b", [3])]) == pinned
    assert fingerprint([("a", (3, 2)), ("b", (3,))]) != pinned
    assert fingerprint([("a", None), ("b", (3,))]) is None


def test_fits_a_derivative_in_any_order() -> None:
    match = make().check_fit(reversed(SHAPES))  # type: ignore[arg-type]
    assert match.ok and match.matched == [0, 1, 2, 3] and not match.names_only


def test_names_the_first_three_differences() -> None:
    other = [("embed.weight", (12, 4)), ("layers.0.w", (4, 4)), ("head", (2, 4))]
    with pytest.raises(UserError) as error:
        make().check_fit(other)
    message = str(error.value)
    assert "embed.weight is (12, 4) in the model and (10, 4) in the tuner" in message
    assert "layers.0.b is not in the model" in message and "norm is not in the model" in message
    assert "head" not in message and "4 differ" in message and "`allow_partial=True`" in message


def test_allow_partial_needs_something_to_match() -> None:
    match = make().check_fit([("norm", (4,)), ("head", (2, 4))], allow_partial=True)
    assert match.matched == [3]
    with pytest.raises(UserError, match="does not fit"):
        make().check_fit([("head", (2, 4))], allow_partial=True)


def test_matches_among_frozen_tensors_are_no_reason_to_allow_a_partial_fit() -> None:
    """Of an adapter's tensors no tuner knows one."""
    named = [(name, torch.nn.Parameter(torch.zeros(shape), requires_grad=False)) for name, shape in SHAPES]
    named.append(("layers.0.lora_A.weight", torch.nn.Parameter(torch.zeros(2, 4))))
    for partial in (False, True):
        with pytest.raises(UserError, match="no network for any tensor that is trained here, such as layers.0.lora_A"):
            tuner_scale(make(), named, allow_partial=partial)
    named[1][1].requires_grad_()
    with pytest.raises(UserError, match="allow_partial=True"):
        tuner_scale(make(), named)
    assert tuner_scale(make(), named, allow_partial=True).partial


def test_blocks_by_layer_match_whole() -> None:
    blocks = [BlockSpec("layers.0", SHAPES[1:3]), BlockSpec("norm", [("norm", (4,))])]
    tuner = Tuner(PertNN(2), TunerInfo("base", blocks, by="layer"))
    tuner = Tuner.from_bytes(tuner.to_bytes(), "t")
    assert tuner.fits(SHAPES[1:]).ok
    match = tuner.fits([("layers.0.w", (4, 4)), ("layers.0.b", (5,)), ("norm", (4,))])
    assert match.matched == [1]


def test_unknown_shapes_match_by_name() -> None:
    tuner = Tuner.from_bytes(make([("a", None), ("b", None)]).to_bytes(), "t")
    assert tuner.info.fingerprint is None
    match = tuner.check_fit([("a", (1,)), ("b", (2, 2))])
    assert match.ok and match.names_only and "by names" in match.sentence()


def set_to(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update({name: value})


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cut short"),
    "text": (b"hello, this is no tuner at all", "header claims"),
    "truncated": (make().to_bytes()[:-1], "cut short or damaged"),
    "header cut": (make().to_bytes()[:200], "cut short"),
    "extra bytes": (make().to_bytes() + b"x", "cut short or damaged"),
    "header bomb": ((2**60).to_bytes(8, "little") + b"{" * 100, "header claims"),
    "deep json": ((90_000).to_bytes(8, "little") + b"[" * 90_000, "not valid JSON"),
    "other safetensors": (edited(lambda header: header.pop("__metadata__"), "header"), "some other safetensors"),
    "huge shape": (edited(lambda h: h["w1"].update(shape=[4, 2**39, 5]), "header"), "contradict"),
    "consistent huge shape": (
        edited(
            lambda h: [
                h[n].update(shape=s) for n, s in (("w1", [4, 2**39, 5]), ("b1", [4, 2**39]), ("w2", [4, 2**39]))
            ],
            "header",
        ),
        "contradicts the shapes",
    ),
    "negative shape": (edited(lambda h: h["b2"].update(shape=[-4]), "header"), "no valid shape"),
    "integer weights": (
        edited(lambda h: [h[n].update(dtype="I32") for n in ("w1", "b1", "w2", "b2")], "header"),
        "type",
    ),
    "extra tensor": (edited(lambda h: h.update(w3=h["w1"]), "header"), "not exactly"),
    "offsets": (edited(lambda h: h["w1"].update(data_offsets=[0, 2**50]), "header"), "cannot|can be used"),
    "version": (edited(set_to("format_version", 2)), "format_version is 2"),
    "no field": (edited(lambda content: content.pop("bound")), "lacks or adds 'bound'"),
    "features": (edited(set_to("features", "magic")), "features is 'magic'"),
    "bound": (edited(set_to("bound", math.nan)), "bound is nan"),
    "fingerprint": (edited(set_to("fingerprint", "00")), "fingerprint"),
    "block count": (
        edited(lambda content: [content["blocks"].pop(), set_to("fingerprint", None)(content)]),
        "fingerprint",
    ),
    "repeated block": (edited(lambda content: content["blocks"].append(content["blocks"][0])), "name of its own"),
    "terminal codes": (edited(set_to("base_model", "\x1b[2Jgone")), "base_model"),
    "codes in recipe": (edited(set_to("recipe", {"a": ["\x1b]0;x\x07"]})), "recipe"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_refused(name: str, tmp_path: Path) -> None:
    data, words = BROKEN[name]
    path = tmp_path / "tuner.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=words) as error:
        Tuner.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("place", [-1, -9, -40])
def test_numbers_that_have_changed_are_refused(place: int) -> None:
    data = bytearray(make().to_bytes())
    data[place] ^= 1  # the lowest bit of a number, or one of its exponent: still finite
    with pytest.raises(
        UserError, match="x is not a tuner that can be used: its content has changed since it was written"
    ):
        Tuner.from_bytes(bytes(data), "x")


def test_facts_that_have_changed_are_refused_and_a_file_without_a_seal_is_read() -> None:
    data = edited(set_to("base_model", "another"))
    with pytest.raises(UserError, match="has changed"):
        Tuner.from_bytes(data, "x")
    unsealed = changed(data, lambda header: header["__metadata__"].pop("sha256"), "header")
    assert Tuner.from_bytes(unsealed, "x").info.base_model == "another"


def test_infinite_weights_are_refused(tmp_path: Path) -> None:
    tuner = make()
    torch.nn.init.constant_(tuner.pertnn.w2, math.inf)
    with pytest.raises(UserError, match="tensor w2 holds NaN or infinite"):
        tuner.save(tmp_path / "t.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_tuner_that_no_reader_takes_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(make().to_bytes())
    monkeypatch.setattr("metazo.tuner.envelope.MAX_BYTES", size)
    make().save(tmp_path / "t.safetensors")
    monkeypatch.setattr("metazo.tuner.envelope.MAX_BYTES", size - 1)
    with pytest.raises(
        UserError, match=f"has {size:,} bytes, and one may have {size - 1:,}; make one of smaller networks"
    ):
        make().save(tmp_path / "u.safetensors")
    assert not (tmp_path / "u.safetensors").exists()


def test_missing_file_and_unwritable_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file"):
        Tuner.load(tmp_path / "none.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        make().save(tmp_path / "file" / "t.safetensors")


def test_texts_in_a_card_are_not_markup() -> None:
    odd = "[click](javascript:1) ![x](http://evil) <b>&amp; `c` | *d* ~e _f_ a_b #"
    tuner = make(recipe={odd: odd})
    tuner.info.base_model = "a b;c"
    card = tuner.card("x y", "0" * 64)
    shown = (
        r"\[click\]\(javascript:1\) \!\[x\]\(http://evil\) &lt;b&gt;&amp;amp; &#96;c&#96; &#124; \*d\* \~e \_f\_ a_b \#"
    )
    assert f"| {shown} | {shown} |\n" in card
    assert "    metazo finetune --model MODEL --task TASK --tuner NAME\n" in card  # nothing can be escaped there
