"""metazo blocks: the partition without weights, and the Hessian's blocks with them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from metazo import load_model, prepare, tasks
from metazo.bench.hessian import block_norms
from metazo.blocks import Block, named_tensors
from metazo.tasks.closures import BatchLoss
from metazo_cli.main import main
from tests.cli.test_cli import refused


@pytest.fixture
def metazo(capsys, monkeypatch) -> Callable[..., str]:
    """What a command that ends well prints; it runs in this process to save time."""

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["metazo", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        assert not ended.value.code, shown.err
        return shown.out

    return run


def test_the_partition_of_a_model_without_weights(metazo, tmp_path: Path) -> None:
    """A folder that has a configuration alone: Llama-3.2-1B, whose published tuner has 146 blocks."""
    LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    found = json.loads(metazo("blocks", str(tmp_path), "--json", "--plot", str(tmp_path / "a.png")))
    assert len(found["blocks"]) == 146 and found["entries"] == 1_235_814_400 and "hessian" not in found
    first = found["blocks"][0]
    assert first["entries"] == 128256 * 2048 and first["share"] == first["entries"] / found["entries"]
    assert sum(block["entries"] for block in found["blocks"]) == found["entries"]
    assert (tmp_path / "a.png").stat().st_size > 5000
    layers = json.loads(metazo("blocks", str(tmp_path), "--json", "--by", "layer"))
    assert len(layers["blocks"]) == 18 and len(layers["blocks"][1]["tensors"]) == 9
    shown = metazo("blocks", str(tmp_path), "--by", "layer", "--train", "*norm*")
    assert "model.layers.15" in shown and f"{33 * 2048:,}" in shown


def test_the_hessian_of_a_task_is_that_of_its_loss(metazo, tmp_path: Path) -> None:
    """The command's exact norms, beside those of the same batch from Python."""
    names = ["model.norm.weight", "model.layers.3.input_layernorm.weight"]
    words = [word for name in names for word in ("--train", name)]
    batch = ("--hessian", "--task", "pico_sentiment", "--batch-size", "2")
    picture = tmp_path / "hessian.svg"
    found = json.loads(metazo("blocks", "pico", *batch, *words, "--plot", str(picture), "--json"))["hessian"]
    assert found["exact"] and found["draws"] is None and found["even"] == 0.5 and found["error"] == 0

    loaded = load_model("pico")
    rows = prepare(tasks.get("pico_sentiment"), loaded, train=2, dev=0, test=0)
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad = name in names
    cut = [Block(tensor.name, (tensor,)) for tensor in named_tensors(loaded.model)]
    wanted = block_norms(BatchLoss(loaded.model, rows, rows.train, torch.device("cpu")), cut)
    torch.testing.assert_close(torch.tensor(found["norms"], dtype=torch.float64), wanted.norms, rtol=1e-3, atol=0)
    assert found["share"] == pytest.approx(wanted.share, rel=1e-3)
    assert f"{100 * wanted.share:.1f} % of the Hessian" in " ".join(picture.read_text().split())


def test_an_estimate_has_its_error_and_a_table(metazo) -> None:
    words = ("--by", "layer", "--hessian", "--task", "pico_sentiment", "--batch-size", "2", "--draws", "2")
    shown = " ".join(metazo("blocks", "pico", *words).split())
    assert "±" in shown and "20.0 % if all entries were alike" in shown and "2 random vectors per block" in shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("pico", "--hessian"), "--hessian is that of a loss, so it needs --task"),
        (("pico", "--plot", "a.txt"), "--plot 'a.txt' must end in .png or .svg"),
        (
            ("pico", "--plot", "no/such/folder/a.png"),
            "--plot 'no/such/folder/a.png' is no file in a folder that exists",
        ),
        (("pico", "--plot", "/proc/a.svg"), "--plot '/proc/a.svg'"),  # a folder that takes no file
        (("pico", "--by", "head"), "by 'head' are unknown"),
        (("pico", "--train", "nosuch"), "nosuch"),
        (("pico", "--hessian", "--task", "pico_topic", "--dtype", "bfloat16"), "use --dtype float32 or float64"),
        (("/no/such/model",), "does not exist"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused("blocks", *words)


def test_a_plot_of_a_log_is_refused_in_the_same_way(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for plot in ("no/such/folder/a.png", str(tmp_path / "folder.png")):
        assert f"--plot '{plot}' is no file in a folder that exists" in refused("log", "show", "x", "--plot", plot)
    assert "--plot '/proc/a.png'" in refused("log", "show", "x", "--plot", "/proc/a.png")
    assert "--plot 'a.xyz' must end in .png or .svg" in refused("log", "show", "x", "--plot", "a.xyz")
