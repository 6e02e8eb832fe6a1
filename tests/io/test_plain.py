"""The limits of the reader of JSON and YAML; pipes, devices and folders are refused immediately."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

import pytest
import yaml

from metazo.errors import UserError
from metazo.io.files import read_capped
from metazo.io.plain import MAX_DEPTH, MAX_JSON_BYTES, cut, parse_json, read_json, read_yaml


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (deep(MAX_DEPTH + 2), "nested more than 64"),
        (deep(100_000), "nested more than 64"),
        ('{"a": 1, "a": 2}', "given twice"),
        ("1" + "0" * 400, "more than 256 bits"),
        ("9" * 5000, "limit"),
        ("[NaN]", "a number is nan"),
        ('{"a": [1e999]}', "a number is inf"),
        ("", "Expecting value"),
    ],
)
def test_json_beyond_the_limits(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(text, finite=True)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=words):
        read_json(tmp_path / "x.json", "result")


def test_json_within_them(tmp_path: Path) -> None:
    assert parse_json(deep(MAX_DEPTH)) and parse_json(f"[{2**256 - 1}, 1e308, NaN]")[0] == 2**256 - 1
    (tmp_path / "x.json").write_bytes(b" " * (MAX_JSON_BYTES + 1))
    with pytest.raises(UserError, match="larger than the 4,194,304 bytes"):
        read_json(tmp_path / "x.json", "result")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: " + deep(70), "nested more than 64"),
        ("a: " + deep(5_000), "line 1 is not valid YAML: it is nested more than 64"),
        ("- " * 5_000, "nested too deeply"),
        ("a: &x [1]\nb: [*x, *x]", "anchor or alias"),
        ("a: 1\nb: {c: 1}\na: 2", "line 3 is not valid YAML: the key 'a' is given twice"),
        ("a: 1" + "0" * 400, "more than 256 bits"),
        ("a: " + "x" * 200_000, "larger than the 131,072 bytes"),
        ("a: 0100", "line 1 is not valid YAML: '0100' is octal to some readers.*leave out the leading 0"),
        ("a: [1, -0_10]", "'-0_10' is octal"),
        ("a: !!int 010", "'010' is octal"),
    ],
)
def test_yaml_beyond_the_limits(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        read_yaml(tmp_path / "x.yaml", "recipe")


def test_numbers_of_yaml(tmp_path: Path) -> None:
    numbers = "0, -0, 07, 00, 100, 1_000, -12, +5, 0x1F, 0b101, 1.5, -1_0.5e-3, .5, 5., 6.8523015e+5, .inf, -.inf, 0.1"
    texts = "1:30, 1:30.5, -1:59, 08, 1e5, 0o17, 1e-3, 0100.x, '0100'"
    (tmp_path / "x.yaml").write_text(f"numbers: [{numbers}]\ntexts: [{texts}]\nday: 2001-01-01\n1:30: x\n")
    found = read_yaml(tmp_path / "x.yaml", "recipe")
    assert found.pop("numbers") == yaml.safe_load(f"[{numbers}]")
    assert found.pop("texts") == [text.strip("'") for text in texts.split(", ")]
    assert found == {"day": date(2001, 1, 1), "1:30": "x"}


def test_pipes_devices_and_folders_are_refused_without_waiting(tmp_path: Path) -> None:
    """Nothing writes into the pipe: a reader that opened it in the usual way would wait forever."""
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/zero", tmp_path / "link")
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path, Path("/dev/null"), tmp_path / "none", Path("a\0b")):
        with pytest.raises(UserError, match="is not a file|cannot be read"):
            read_capped(path, 100, "test")


def test_long_texts_of_a_table_are_cut():
    """A header's hashes of 5,000 training rows are 40,000 characters."""
    assert cut({"contents": "a" * 40000, "rows": 3, "columns": ["b" * 99]}) == {
        "contents": "a" * 75 + " [...]", "rows": 3, "columns": ["b" * 99],
    }  # fmt: skip
