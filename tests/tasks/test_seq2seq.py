"""Encoder-decoders: tokens of both sides, losses and scores against one unpadded example at a time in float64, generation."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy, log_softmax
from torch.nn.utils.rnn import pad_sequence

from metazo.errors import UserError
from metazo.models.assemble import as_loaded
from metazo.models.checks import check_config
from metazo.models.load import load_model
from metazo.tasks.encode import Encoder
from metazo.tasks.evaluate import evaluate, generate
from metazo.tasks.prepared import Prepared
from metazo.tasks.seq2seq import decoder_inputs, decoder_logits, decoder_start
from metazo.tasks.task import Task
from tests.conftest import TEXT

NAMES = ("t5", "bart")
KINDS = ("classification", "choice", "generation")
ROWS = [
    {"text": "the film", "a": "great", "b": "the cat sat on the mat", "answer": "the cat", "label": 0},
    {"text": "a warm and funny story . the dog ran to the park", "a": "no", "b": "maybe", "answer": "x", "label": 1},
    {"text": "who sat on the mat ? " * 4, "a": "the grass was cut", "b": "it", "answer": "the dog ran", "label": 1},
]


def task(kind: str, **more) -> Task:
    own = {"classification": {"labels": ["terrible", "great"]}, "choice": {"choices": ("a", "b")}}.get(kind, {})
    return Task(**{"name": "t", "kind": kind, "prompt": "{text} It was"} | own | more)


def prepared(loaded, description: Task) -> Prepared:
    encoder = Encoder(description, loaded)
    examples = [encoder(row, f"row {i}") for i, row in enumerate(ROWS)]
    out = Prepared(
        description,
        loaded.kind,
        loaded.tokenizer,
        encoder.room,
        encoder.words,
        encoder.at_position,
        start=encoder.start,
    )
    out.train = out.dev = examples  # type: ignore[assignment]
    return out


@pytest.fixture(scope="module", params=NAMES)
def exact(request, tiny):
    """A model in float64, which leaves rounding out of every comparison. Its weights are drawn here: the versions of
    transformers draw them with other spreads, of which some make all answers the same.
    """
    loaded, generator = load_model(tiny(request.param), dtype="float64"), torch.Generator().manual_seed(0)
    for parameter in loaded.model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 0.15, generator=generator)
    return loaded


def likelihoods(loaded, text: str, answer: str, before: list[int]) -> torch.Tensor:
    """Log-probabilities of the answer's own tokens, by the definition: P(a_i | prompt, start, before, a_1 ... a_(i-1))."""
    tokens = loaded.tokenizer(answer, add_special_tokens=False)["input_ids"]
    start = loaded.model.config.decoder_start_token_id
    read = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    found = []
    for at, token in enumerate(tokens):
        decoder = torch.tensor([[start, *before, *tokens[:at]]])
        logits = loaded.model(input_ids=read, decoder_input_ids=decoder).logits
        found.append(log_softmax(logits[0, -1], -1)[token])
    return torch.stack(found)


def before_of(loaded) -> list[int]:
    """BART's decoder reads `<s>` before an answer, after its own first token."""
    return [loaded.tokenizer.bos_token_id] if loaded.model.config.model_type == "bart" else []


def test_a_model_whose_signature_does_not_name_the_cache_is_taken(tiny, tmp_path):
    """A cache would have as many layers as the field `decoder_layers` says, which Switch Transformers do not have."""
    tokenizer = load_model(tiny("t5")).tokenizer
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_heads": 4, "num_layers": 2, "decoder_layers": 1}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "decoder_start_token_id": 0}
    config = transformers.SwitchTransformersConfig(vocab_size=len(tokenizer), num_experts=2, **sizes, **ids)
    transformers.SwitchTransformersForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(tmp_path).kind == "seq2seq"


def test_the_kind_follows_the_checkpoint(tiny):
    assert [load_model(tiny(name)).kind for name in NAMES] == ["seq2seq", "seq2seq"]
    classifier = load_model(tiny("bart"), kind="classifier", num_labels=3)
    assert type(classifier.model).__name__ == "BartForSequenceClassification" and classifier.new_head


def test_a_classifier_needs_the_end_token_that_it_scores(tiny):
    loaded = load_model(tiny("bart"), kind="classifier", num_labels=2)
    assert Encoder(task("classification"), loaded)(ROWS[0], "row 0").ids[-1] == loaded.tokenizer.eos_token_id
    loaded.tokenizer = load_model(tiny("llama")).tokenizer
    with pytest.raises(UserError, match="scores the end token of a text, and its tokenizer adds none"):
        Encoder(task("classification"), loaded)


def test_the_encoder_reads_the_prompt_and_the_decoder_the_answer(tiny):
    t5, bart = (load_model(tiny(name)) for name in NAMES)
    for loaded, whole, start, answer in (
        (t5, "the film It was</s>", ["<pad>"], "the cat</s>"),
        (bart, "<s>the film It was</s>", ["</s>"], "<s>the cat</s>"),
    ):
        encoder = Encoder(task("generation"), loaded)
        example = encoder(ROWS[0], "row 0")
        assert loaded.tokenizer.decode(example.ids) == whole  # type: ignore[union-attr]
        assert loaded.tokenizer.convert_ids_to_tokens(encoder.start) == start
        assert loaded.tokenizer.decode(example.options[0]) == answer  # type: ignore[union-attr]
    words = Encoder(task("classification"), bart)
    assert bart.tokenizer.convert_ids_to_tokens(words.start) == ["</s>", "<s>"]
    assert [bart.tokenizer.decode(word) for word in words.words] == ["terrible", "great"]  # no end of text


def test_the_end_of_text_ends_an_answer_in_place_of_a_stop_text(tiny):
    loaded = load_model(tiny("t5"))
    example = Encoder(task("generation", stop="."), loaded)(ROWS[0], "row 0")
    assert loaded.tokenizer.decode(example.options[0]) == "the cat</s>"  # type: ignore[union-attr]


def test_a_generated_answer_has_the_loss_of_transformers(exact):
    ready = prepared(exact, task("generation"))
    for row, example in zip(ROWS, ready.train, strict=True):
        read = exact.tokenizer(f"{row['text']} It was", return_tensors="pt")
        labels = exact.tokenizer(text_target=row["answer"], return_tensors="pt")["input_ids"]
        expected = exact.model(**read, labels=labels).loss  # shifted by the model's own function
        loss = ready.loss(exact.model, ready.collate([example]))
        torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)  # the loss is float32


def single_words(loaded) -> list[str]:
    """Two words that are one token each."""
    words = [w for w in dict.fromkeys(" ".join(TEXT).split()) if len(loaded.tokenizer.tokenize(w)) == 1]
    return words[:2]


@pytest.mark.parametrize("labels", [None, ["great", "great film"], ["the cat", "the dog"]])
def test_label_words_are_compared_by_their_summed_log_probabilities(exact, labels):
    labels = labels or single_words(exact)
    ready = prepared(exact, task("classification", labels=labels))
    batch = ready.collate(ready.train)
    scores = ready.scores(exact.model, batch).double()
    if ready.at_position:  # logits: they differ from log-probabilities by a constant per row
        scores = scores - scores[:, :1]
    expected = torch.stack([
        torch.stack([likelihoods(exact, f"{row['text']} It was", word, before_of(exact)).sum() for word in labels])
        for row in ROWS
    ])  # fmt: skip
    shown = expected - expected[:, :1] if ready.at_position else expected
    torch.testing.assert_close(scores, shown, atol=1e-5, rtol=1e-5)
    loss = cross_entropy(expected, torch.tensor([row["label"] for row in ROWS]))
    torch.testing.assert_close(ready.loss(exact.model, batch).double(), loss, atol=1e-5, rtol=1e-5)
    predicted = evaluate(exact.model, ready)["accuracy"]
    assert predicted == sum(int(row.argmax()) == each["label"] for row, each in zip(expected, ROWS)) / 3


def test_label_words_of_one_token_need_one_row(exact):
    ready = prepared(exact, task("classification", labels=single_words(exact)))
    assert ready.at_position
    assert ready.collate(ready.train)["decoder_input_ids"].tolist() == [ready.start] * 3


def test_choices_are_compared_per_token_and_trained_on_the_right_one(exact):
    ready = prepared(exact, task("choice"))
    expected = torch.stack([
        torch.stack([likelihoods(exact, f"{row['text']} It was", row[key], before_of(exact)).mean() for key in "ab"])
        for row in ROWS
    ])  # fmt: skip
    scores = ready.scores(exact.model, ready.collate(ready.train, every_option=True))
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=1e-5)
    right = -expected[torch.arange(3), [row["label"] for row in ROWS]].mean()
    torch.testing.assert_close(
        ready.loss(exact.model, ready.collate(ready.train)).double(), right, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_batch_change_no_loss_and_gradients_flow(exact, kind):
    ready = prepared(exact, task(kind, **({"labels": ["great", "great film"]} if kind == "classification" else {})))
    together = ready.loss(exact.model, ready.collate(ready.train))
    alone = torch.stack([ready.loss(exact.model, ready.collate([example])) for example in ready.train]).mean()
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)
    exact.model.zero_grad()
    together.backward()
    for side in ("encoder", "decoder"):
        gradients = [p.grad for name, p in exact.model.named_parameters() if f"{side}." in name and p.grad is not None]
        assert gradients and all(g.isfinite().all() for g in gradients) and any(g.abs().max() > 0 for g in gradients)


def test_the_encoder_reads_each_prompt_once(tiny):
    loaded = load_model(tiny("t5"))
    ready = prepared(loaded, task("classification", labels=["great", "great film", "the cat"]))
    rows = []
    handle = loaded.model.get_encoder().register_forward_hook(  # type: ignore[union-attr]
        lambda module, args, kwargs, out: rows.append(len(out.last_hidden_state)), with_kwargs=True
    )
    scores = ready.scores(loaded.model, ready.collate(ready.train))
    handle.remove()
    assert rows == [3] and scores.shape == (3, 3)


def test_generation_is_greedy_and_ends_at_the_end_of_text(exact):
    ready = prepared(exact, task("generation", max_new_tokens=6))
    start = exact.model.config.decoder_start_token_id
    expected = []
    for row in ROWS:
        read = exact.tokenizer(f"{row['text']} It was", return_tensors="pt")["input_ids"]
        tokens = [start]
        while len(tokens) <= ready.room and (len(tokens) == 1 or tokens[-1] != exact.tokenizer.eos_token_id):
            logits = exact.model(input_ids=read, decoder_input_ids=torch.tensor([tokens])).logits
            tokens.append(int(logits[0, -1].argmax()))
        expected.append(exact.tokenizer.decode(tokens[1:], skip_special_tokens=True).strip())
    assert generate(exact.model, ready, ready.train) == expected
    assert ready.room == 6
    alone = [generate(exact.model, ready, [example])[0] for example in ready.train]
    assert alone == expected and len(set(expected)) > 1


def test_a_long_prompt_is_cut_to_the_encoder_and_a_long_answer_leaves_its_row_out(tiny):
    loaded = load_model(tiny("bart"))
    encoder = Encoder(task("generation"), loaded, 40)
    long = encoder(ROWS[0] | {"text": "the film was great " * 30}, "row 0")
    assert long is not None and long.shortened and len(long.ids) <= 40
    assert long.ids[0] == loaded.tokenizer.bos_token_id and long.ids[-1] == loaded.tokenizer.eos_token_id
    assert encoder(ROWS[0] | {"answer": "the film was great " * 30}, "row 0") is None


def test_a_prompt_and_its_answer_may_fill_both_contexts(tiny):
    loaded = load_model(tiny("t5"))
    whole = Encoder(task("choice"), loaded)(ROWS[1], "row 1")
    assert whole is not None
    fitted = Encoder(task("choice"), loaded, len(whole.ids))(ROWS[1], "row 1")
    assert fitted is not None and fitted.ids == whole.ids and not fitted.shortened


@pytest.mark.parametrize("name", NAMES)
def test_a_classifier_on_an_encoder_decoder_does_not_depend_on_the_padding(tiny, name):
    loaded = load_model(tiny(name), kind="classifier", num_labels=2)
    ready = prepared(loaded, task("classification"))
    together = ready.scores(loaded.model, ready.collate(ready.train))
    alone = torch.cat([ready.scores(loaded.model, ready.collate([example])) for example in ready.train])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_end_of_text_in_a_classified_text_is_left_out(tiny, name):
    """These models score the text at its end, and refuse a batch of rows with other numbers of ends."""
    loaded = load_model(tiny(name), kind="classifier", num_labels=2)
    encoder = Encoder(task("classification", classifier=("{text}", "{more}")), loaded)
    rows = [{"text": f"the {end}cat", "more": f"sat{end}", "label": 0} for end in ("", "</s>")]
    examples = [encoder(row, "row 0") for row in rows]
    assert examples[0].ids == examples[1].ids


IDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = IDS | {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
BART = IDS | {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "decoder_start_token_id": 2,
}  # fmt: skip
GEMMA = IDS | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
               "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
OTHERS = {
    "MT5": T5 | {"feed_forward_proj": "gated-gelu"}, "UMT5": T5, "LongT5": T5, "SwitchTransformers": T5 | {"num_experts": 2},
    "MBart": BART, "PLBart": BART, "Pegasus": BART, "PegasusX": BART | {"block_size": 4}, "BigBirdPegasus": BART,
    "Marian": BART | {"decoder_vocab_size": 64}, "Blenderbot": BART, "BlenderbotSmall": BART, "Mvp": BART, "M2M100": BART,
    "NllbMoe": BART | {"num_experts": 2},
    "LED": BART | {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "T5Gemma": {"encoder": GEMMA, "decoder": GEMMA, "vocab_size": 64},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_have_the_losses_of_transformers_whatever_the_padding(name):
    config = getattr(transformers, f"{name}Config")(**OTHERS[name])
    check_config(config, name)
    torch.manual_seed(0)
    cls = getattr(transformers, "MarianMTModel" if name == "Marian" else f"{name}ForConditionalGeneration")
    model = cls(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.3)
    start = decoder_start(model, name)
    last = [start] if name in ("MBart", "PLBart") else []  # their shift takes the answer's last token to the front
    prompts = [torch.randint(3, 64, (length,)) for length in (9, 5, 7)]
    answers = [torch.randint(3, 64, (length,)).tolist() + last for length in (3, 1, 2)]
    batch = decoder_inputs([start], answers, 0)
    batch["input_ids"] = pad_sequence(prompts, batch_first=True)
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    logits = decoder_logits(model, batch, batch["answer"].shape[1])
    torch.testing.assert_close(decoder_logits(model, batch | {"prompt": torch.arange(3)}, logits.shape[1]), logits)
    for row, prompt, answer in zip(logits, prompts, answers, strict=True):
        expected = model(input_ids=prompt[None], labels=torch.tensor([answer]))
        own = row[: len(answer)]
        torch.testing.assert_close(own, expected.logits[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(cross_entropy(own, torch.tensor(answer)), expected.loss, atol=1e-5, rtol=1e-5)


def test_what_an_encoder_decoder_cannot_be(tiny, tmp_path):
    for kind in ("causal", "masked"):
        with pytest.raises(UserError, match=f"`kind` {kind}: .* is a t5 model, which is an encoder-decoder; leave"):
            load_model(tiny("t5"), kind=kind)
    loaded = load_model(tiny("t5"))
    with pytest.raises(UserError, match="has {a} after {}, and a seq2seq model reads only what is before its answer"):
        Encoder(task("choice", prompt="{text} {} {a}"), loaded)
    loaded.model.config.decoder_start_token_id = None
    with pytest.raises(UserError, match="has no decoder_start_token_id; set it in config.json"):
        Encoder(task("choice"), loaded)
    speech = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=64, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
            decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8, num_mel_bins=8, max_source_positions=20,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    with pytest.raises(UserError, match="is a whisper model, which is a model of images or sound"):
        as_loaded(speech, loaded.tokenizer)
