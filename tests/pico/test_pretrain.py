"""The script that makes pico: texts in a row do not attend to each other, and one seed gives one result."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from metazo.errors import UserError
from metazo.io.lock import NAME, FolderLock
from metazo.io.terminal import run_script
from metazo.pico import pretrain
from tests.pico.test_model import MODEL

TEXTS = [
    ("The mill was very dull. Verdict:", " bad."),
    ("Anna is here.", ""),
    ("The rain and the snow. Topic:", " the sky."),
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_every_word_of_the_grammar_is_one_token(tokenizer):
    words = [f" {word}" for word in pretrain.grammar.vocabulary()]
    assert all(len(ids) == 1 for ids in tokenizer(words, add_special_tokens=False)["input_ids"])


def test_rows_hold_the_texts_in_order_with_positions_and_weights(tokenizer):
    ids, positions, weights = pretrain.rows_of(TEXTS * 40, tokenizer)
    assert ids.shape == (len(ids), pretrain.CONTEXT) and len(ids) > 2
    whole = "".join(f"<s>{prompt}{answer}</s>" for prompt, answer in TEXTS * 40)
    assert whole.startswith(tokenizer.decode(ids.flatten()))
    assert (positions[:, 0] == 0).all(), "a text cut in two starts again"
    begins = ids == tokenizer.bos_token_id
    assert (positions[begins] == 0).all()
    inner = ~begins[:, 1:]
    assert (positions[:, 1:][inner] == positions[:, :-1][inner] + 1).all()
    told = tokenizer.decode(ids[weights == pretrain.ANSWER_WEIGHT])
    assert told.startswith(" bad. the sky. bad. the sky.") and set(weights.unique().tolist()) == {1, 5}


@torch.no_grad()
def test_a_text_does_not_see_the_text_before_it(tokenizer):
    torch.manual_seed(0)
    model = pretrain.new_model().eval()
    ids, positions, _ = pretrain.rows_of(TEXTS * 40, tokenizer)
    second = int((ids[0] == tokenizer.bos_token_id).nonzero()[1])
    end = second + len(tokenizer("".join(TEXTS[1]))["input_ids"])
    together = model(input_ids=ids[:1], position_ids=positions[:1], use_cache=False).logits[0, second:end]
    alone = model(input_ids=ids[:1, second:end]).logits[0]
    assert torch.allclose(together, alone, atol=1e-5)


def test_one_seed_one_result(tokenizer):
    """Short rows and one layer, because bfloat16 is slow on a processor without 16-bit arithmetic."""
    rows = pretrain.rows_of(TEXTS * 200, tokenizer)[:, :, :32]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = pretrain.new_model()
        del model.model.layers[1:]
        pretrain.train(model, [(rows, 1), (rows, 2)], 1)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_a_model_is_written_into_a_new_folder_and_what_is_in_a_folder_stays(tokenizer, tmp_path, monkeypatch):
    rows = pretrain.rows_of(TEXTS * 40, tokenizer)
    monkeypatch.setattr(pretrain, "train", lambda model, parts, steps: None)

    def make(out):
        pretrain.make(pretrain.new_model(), tokenizer, [(rows, 1), (rows, 1)], 1, out)

    make(tmp_path / "new")
    assert {"model.safetensors", "tokenizer.json"} <= {path.name for path in (tmp_path / "new").iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match="mine is not an empty folder; choose another"):
        make(tmp_path / "mine")
    with FolderLock(tmp_path / "used"), pytest.raises(UserError, match="used is in use by"):
        make(tmp_path / "used")
    files = {path.name for path in tmp_path.rglob("*")}
    assert "notes.txt" in files and not [name for name in files if name.endswith((".tmp", NAME))]


@pytest.mark.parametrize("missing", ["corpus", "out"])
def test_bad_arguments_are_one_sentence_and_exit_code_2(missing, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    out = tmp_path / ("new" if missing == "corpus" else "full")
    monkeypatch.setattr("sys.argv", ["pretrain", "--corpus", "/nonexistent", "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        run_script(pretrain.main)
    said = {"corpus": "carroll-alice.txt is not a file; give a folder", "out": "full is not an empty folder; choose"}
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and said[missing] in error and error.count("\n") == 1
