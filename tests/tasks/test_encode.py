"""Encoding: the tokens of a prompt, the cut of a long input, and the models that can be used for each task."""

from __future__ import annotations

import pytest
import tokenizers
import torch
import transformers
from tokenizers import models, trainers
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import Phi3Config, Phi3ForCausalLM

from metazo.errors import UserError
from metazo.io import bounded
from metazo.models.assemble import as_loaded
from metazo.models.load import load_model
from metazo.tasks import get, prepare, resolve
from metazo.tasks.encode import Encoder
from metazo.tasks.task import Task

NLI = Task(
    name="nli",
    kind="classification",
    prompt='{premise}\nDoes this mean that "{hypothesis}"? Yes or No?\n{}',
    labels={0: "Yes", 1: "No"},
    context="premise",
)
QA = Task(name="qa", kind="generation", prompt="Context: {context} Question: {question} Answer:", max_new_tokens=4)
LONG = " ".join(f"word{i}" for i in range(300))


@pytest.fixture(scope="module")
def gpt2(tiny):
    return load_model(tiny("gpt2"))


def text(loaded, ids):
    return loaded.tokenizer.decode(ids)


def test_prompt_and_label_words_are_the_ones_written(gpt2):
    encoder = Encoder(get("sst2"), gpt2)
    example = encoder({"sentence": "a warm film", "label": 1}, "row 1")
    assert text(gpt2, example.ids) == "<s>a warm film It was"
    assert [text(gpt2, word) for word in encoder.words] == [" terrible", " great"]
    assert encoder.at_position and example.targets == [1] and not example.shortened


@pytest.mark.parametrize(
    ("prompt", "said"), [("{text} So:", " great"), ("{text} So:\n", "great"), ("{text} ({})", "great")]
)
def test_the_answer_is_joined_as_the_prompt_says(gpt2, prompt, said):
    task = Task(name="t", kind="classification", prompt=prompt, labels=["terrible", "great"])  # type: ignore[arg-type]
    assert text(gpt2, Encoder(task, gpt2).words[1]) == said


def test_the_place_of_the_answer_is_the_end_if_left_out_also_after_a_space(gpt2):
    row = {"text": "the film", "label": 1}
    ends = [labelled("terrible", "great", prompt="{text} It was" + end) for end in (" {}", " ", "")]
    encoders = [Encoder(task, gpt2) for task in ends]
    assert [text(gpt2, encoder(row, "row 1").ids) for encoder in encoders] == ["<s>the film It was"] * 3
    assert [text(gpt2, encoder.words[1]) for encoder in encoders] == [" great"] * 3


def test_label_words_that_begin_with_a_space_have_one(gpt2):
    words = [labelled("terrible", "great", prompt="{text} It was {}")]
    words += [
        words[0].model_copy(update={"prompt": p, "labels": {0: " terrible", 1: " great"}})
        for p in ("{text} It was {}", "{text} It was{}")
    ]
    data = {split: [{"text": split + more, "label": 1} for more in "abc"] for split in ("train", "validation", "test")}
    ready = [prepare(task, gpt2, data=data, train=1, dev=1, test=1) for task in words]
    assert ready[0].words == ready[1].words == ready[2].words and ready[0].train == ready[1].train
    assert [any("lose the space" in note for note in each.notes) for each in ready] == [False, True, False]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stop": "."}, "6 of 9 answers hold the stop text '.', which ends what is generated"),
        ({"max_new_tokens": 2}, "6 of 9 answers have more than 2 tokens, the most that are generated"),
        ({"stop": "\n"}, "leaves out the stop text '\\n': the model does not learn to end an answer"),
        ({}, "has no end-of-text token, and the task no `stop`: the model does not learn"),
        ({"stop": "!"}, ""),
    ],
)
def test_answers_that_are_not_generated_whole_or_have_no_end_are_said(gpt2, tmp_path, changes, words):
    loaded = words_model(tmp_path) if "learn" in words else gpt2
    if not changes:
        loaded.tokenizer.eos_token = None
    task = Task(**{"name": "t", "kind": "generation", "prompt": "{text} it was {}", "max_new_tokens": 20} | changes)
    rows = [{"text": "the film", "answer": answer} for answer in ("the film", "it. the", ".it")]
    data = {"train": rows * 2, "validation": rows}
    ready = prepare(task, loaded, data=data, train=3, dev=3, test=3)
    found = [note for note in ready.notes if "answer" in note]
    assert len(found) == bool(words) and all(words in note for note in found), found


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_an_answer_that_ends_in_an_end_of_text_has_one(tiny, name):
    loaded = load_model(tiny(name))
    encoder = Encoder(Task(name="t", kind="generation", prompt="{text} it was {}"), loaded)
    rows = [{"text": "the film", "answer": answer} for answer in ("great", "great" + loaded.tokenizer.eos_token)]
    plain, ended = (encoder(row, "row 1") for row in rows)
    assert (
        plain == ended and plain.references == ["great"] and plain.options[0].count(loaded.tokenizer.eos_token_id) == 1
    )


def test_a_classifier_of_a_prompt_with_three_columns_needs_templates(tiny):
    loaded = load_model(tiny("bert"), num_labels=2)
    task = labelled("no", "yes", prompt="{a} {b} {c} {}")
    with pytest.raises(UserError, match="prompt of task 't' has 3 columns, and .* name all of them in `classifier`"):
        Encoder(task, loaded)
    named = Task(**task.model_dump(exclude={"classifier"}), classifier=("{a}", "{b} {c}"))  # type: ignore[arg-type]
    row = {"a": "the", "b": "cat", "c": "sat", "label": 0}
    assert text(loaded, Encoder(named, loaded)(row, "row 1").ids) == "<s>the</s>cat sat</s>"


@pytest.mark.parametrize("length", [256, 60])
def test_too_long_a_context_loses_its_front_and_nothing_else(gpt2, length):
    encoder = Encoder(NLI, gpt2, length)
    row = {"premise": LONG, "hypothesis": "the cat sat", "label": 0}
    example = encoder(row, "row 1")
    shown = text(gpt2, example.ids)
    assert example.shortened
    assert length - 12 < len(example) <= length  # only a few words are cut
    assert shown.endswith('word299\nDoes this mean that "the cat sat"? Yes or No?\n')
    assert "word0 " not in shown


def test_a_row_that_fits_exactly_is_not_touched(gpt2):
    row = {"premise": "the cat sat on the mat", "hypothesis": "the cat sat", "label": 0}
    whole = Encoder(NLI, gpt2)(row, "row 1")
    assert Encoder(NLI, gpt2, len(whole))(row, "row 1").ids == whole.ids
    assert Encoder(NLI, gpt2, len(whole) - 1)(row, "row 1").shortened


def test_a_question_that_fills_the_context_leaves_the_row_out(gpt2):
    assert Encoder(NLI, gpt2, 60)({"premise": "short", "hypothesis": LONG, "label": 0}, "row 1") is None


def test_the_answer_is_never_cut(gpt2):
    example = Encoder(QA, gpt2, 80)({"context": LONG, "question": "who?", "answer": "the cat sat on the mat"}, "row 1")
    assert text(gpt2, example.options[0]) == " the cat sat on the mat</s>"
    assert text(gpt2, example.ids).endswith("Question: who? Answer:")
    assert len(example) <= 80 and example.shortened


def test_a_prompt_leaves_room_to_generate(gpt2):
    example = Encoder(QA.model_copy(update={"max_new_tokens": 16}), gpt2, 80)(
        {"context": LONG, "question": "who?", "answer": "me"}, "row 1"
    )
    assert len(example.ids) <= 64 and example.shortened


def test_a_classifier_keeps_the_front_and_the_pair(tiny):
    loaded = load_model(tiny("bert"), num_labels=2)
    example = Encoder(NLI, loaded, 50)({"premise": LONG, "hypothesis": "the cat sat", "label": 1}, "row 1")
    shown = text(loaded, example.ids)
    assert shown.startswith("<s>word0 word1") and shown.endswith("</s>the cat sat</s>")
    assert len(example.ids) <= 50 and example.shortened and set(example.types) == {0, 1}


def test_a_masked_model_gets_its_mask_where_the_answer_goes(tiny):
    loaded = load_model(tiny("roberta"))
    example = Encoder(get("sst2"), loaded)({"sentence": "a <mask> film", "label": 0}, "row 1")
    assert text(loaded, example.ids) == "<s>a  film It was <mask>.</s>"
    assert example.ids[example.mask_at] == loaded.tokenizer.mask_token_id


def test_a_stop_text_that_is_the_end_of_text_ends_the_answer(gpt2):
    row = {"text": "the cat", "answer": "sat"}
    for stop in (None, "</s>"):
        task = Task(name="t", kind="generation", prompt="{text} So:", stop=stop)
        example = Encoder(task, gpt2)(row, "row 1")
        assert example is not None and text(gpt2, example.options[0]) == " sat</s>"
        splits = {split: [row | {"text": split + more} for more in "abc"] for split in ("train", "validation", "test")}
        ready = prepare(task, gpt2, data=splits, train=1, dev=1, test=1)
        assert ready.record["eos"] == gpt2.tokenizer.eos_token_id


def test_choices_follow_the_prompt(gpt2):
    row = get("copa").adapt(  # type: ignore[misc]
        {
            "premise": "The cat sat.",
            "choice1": "It was great.",
            "choice2": "The dog ran.",
            "question": "effect",
            "label": 1,
        }
    )
    example = Encoder(get("copa"), gpt2)(row, "row 1")
    assert text(gpt2, example.ids) == "<s>The cat sat so"
    assert [text(gpt2, option) for option in example.options] == [" it was great.", " the dog ran."]


def test_a_prompt_is_tokenised_once_for_all_choices(gpt2, monkeypatch):
    names = tuple(f"c{number}" for number in range(8))
    encoder = Encoder(Task(name="c", kind="choice", prompt="{text}: {}", choices=names), gpt2)
    row = {"text": "the cat", "label": 0} | {name: f"it was {name}" for name in names}
    asked, ids = [], encoder._ids
    monkeypatch.setattr(encoder, "_ids", lambda text: asked.append(text) or ids(text))
    example = encoder(row, "row 1")
    assert [text(gpt2, option) for option in example.options] == [f" it was {name}" for name in names]
    assert asked.count("the cat:") == 2, "before the choices, and to see whether it fits"


def test_record_accepts_every_entity_that_is_an_answer(gpt2):
    row = {
        "passage": "A cat and a dog.\n@highlight\nThe cat sat.",
        "query": "So @placeholder ran.",
        "entities": ["cat", "dog", "cat"],
        "answers": ["dog", "Dog"],
    }
    example = Encoder(get("record"), gpt2)(get("record").adapt(row), "row 1")  # type: ignore[misc]
    assert example.targets == [1]
    assert [text(gpt2, option) for option in example.options] == [" So cat ran.", " So dog ran."]
    assert text(gpt2, example.ids) == "<s>A cat and a dog.\n- The cat sat.\n-"


@pytest.mark.parametrize(
    ("model", "task", "words"),
    [
        ("roberta", get("squad"), "is a generation task and needs a causal or sequence-to-sequence language model"),
        ("bert", get("squad"), "is a generation task and needs a causal or sequence-to-sequence language model"),
        ("bert", get("copa"), "is a choice task and needs a causal or sequence-to-sequence language model"),
        ("bert", get("cb"), "has 2 classes, but task 'cb' has 3; load the model with num_labels=3"),
        ("roberta", get("trec"), "label word 'Expression' of task 'trec' is not one token"),
    ],
)
def test_a_task_that_the_model_cannot_do(tiny, model, task, words):
    with pytest.raises(UserError, match=words):
        Encoder(task, load_model(tiny(model)))


def test_a_masked_model_without_a_mask_token(tiny):
    loaded = load_model(tiny("roberta"))
    loaded.tokenizer.mask_token = None
    with pytest.raises(UserError, match="has no mask token"):
        Encoder(get("sst2"), loaded)


def test_a_longer_input_than_the_model_can_take(gpt2):
    with pytest.raises(UserError, match=r"max_length 257 is more than the context .* \(256 tokens\)"):
        Encoder(get("sst2"), gpt2, 257)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"context": "c", "question": "q", "answer": []}, "row 7: 'answer' must hold an answer"),
        ({"context": "c", "question": "q", "answer": {"text": "x"}}, "row 7: 'answer' must hold an answer"),
    ],
)
def test_a_row_without_an_answer(gpt2, row, words):
    with pytest.raises(UserError, match=words):
        Encoder(QA, gpt2)(row, "row 7")


@pytest.mark.parametrize("right", [2, -1, "1", []])
def test_a_choice_that_is_not_there(gpt2, right):
    task = Task(name="c", kind="choice", prompt="{text}", choices=("a", "b"))
    with pytest.raises(UserError, match="row 3: 'label' is"):
        Encoder(task, gpt2)({"text": "t", "a": "x", "b": "y", "label": right}, "row 3")


# -- faults that earlier versions did not report --------------------------------------------------------------------------


def words_model(tmp_path):
    """A GPT-2 with a lower-casing word-piece tokenizer that has [UNK] and adds no token of its own."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[END]"], show_progress=False)
    tokenizer.train_from_iterator(["the film was great", "it was terrible"] * 3, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[END]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path)
    config = transformers.GPT2Config(vocab_size=len(fast), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    return load_model(tmp_path)


def test_a_causal_model_reads_no_separator_between_prompt_and_answer(tmp_path):
    loaded = words_model(tmp_path)
    template = TemplateProcessing(single="[UNK] $A [UNK] [END]", special_tokens=[("[UNK]", 0), ("[END]", 1)])
    loaded.tokenizer._tokenizer.post_processor = template  # as BERT's [CLS] $A [SEP]
    encoder = Encoder(labelled("great", "terrible", prompt="{text} it was {}."), loaded)
    example = encoder({"text": "the film", "label": 0}, "row 1")
    assert text(loaded, example.ids) == "[UNK] the film it was"
    assert [text(loaded, word) for word in encoder.words] == ["great", "terrible"]


def test_the_end_of_a_text_that_the_prompt_names_stays_if_the_tokenizer_adds_none(tmp_path):
    """As in DialoGPT's form, question<|endoftext|>answer; it was taken for one that the tokenizer had added."""
    loaded = words_model(tmp_path)
    assert loaded.tokenizer.eos_token == "[END]" and loaded.tokenizer("film")["input_ids"][-1] != 1
    task = Task(name="t", kind="generation", prompt="{text}[END]{}", answer="label")
    example = Encoder(task, loaded)({"text": "the film", "label": "great"}, "row 1")
    assert text(loaded, example.ids) == "the film [END]" and text(loaded, example.options[0]) == "great [END]"
    own = TemplateProcessing(single="$A [END]", special_tokens=[("[END]", 1)])
    loaded.tokenizer._tokenizer.post_processor = own
    example = Encoder(task, loaded)({"text": "the film", "label": "great"}, "row 1")
    assert text(loaded, example.ids) == "the film [END]" and text(loaded, example.options[0]) == "great [END]"


def labelled(*words, prompt="{text}. It was {}."):
    return Task(name="t", kind="classification", prompt=prompt, labels=list(words))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("great", "Great"), "label words 'great' and 'Great' of task 't' are the same tokens"),
        (("好", "great"), "label word '好' of task 't' has a token that .* does not know"),
    ],
)
def test_label_words_that_coincide_or_are_unknown_are_refused(tmp_path, words, said):
    with pytest.raises(UserError, match=said):
        Encoder(labelled(*words), words_model(tmp_path))


def test_a_column_after_the_answer_is_refused_for_causal_models(gpt2, tiny):
    with pytest.raises(UserError, match=r"has \{text\} after \{\}, and a causal model reads only"):
        Encoder(labelled("terrible", "great", prompt="{} : {text}"), gpt2)
    Encoder(labelled("great", "No", prompt="{} : {text}"), load_model(tiny("roberta")))  # a mask may be anywhere


def test_an_empty_prompt_begins_with_the_end_of_text(tmp_path):
    loaded = words_model(tmp_path)
    example = Encoder(labelled("terrible", "great", prompt="{text}"), loaded)({"text": "", "label": 0}, "row 1")
    assert example.ids == [loaded.tokenizer.eos_token_id]
    loaded.tokenizer.bos_token = "the"
    assert Encoder(labelled("terrible", "great", prompt="{text}"), loaded)({"text": "", "label": 0}, "").ids == [
        loaded.tokenizer.convert_tokens_to_ids("the")
    ]


def test_braces_are_written_double(gpt2):
    task = labelled("terrible", "great", prompt="Reply as {{}}. {text}. It was {}.")
    example = Encoder(task, gpt2)({"text": "a {warm} film", "label": 1}, "row 1")
    assert text(gpt2, example.ids) == "<s>Reply as {}. a {warm} film. It was"


def test_a_token_beyond_the_embeddings_is_a_sentence(tiny):
    loaded = load_model(tiny("gpt2"))
    loaded.tokenizer.add_tokens(["soup"])
    encoder = Encoder(labelled("terrible", "great"), loaded)
    with pytest.raises(UserError, match=r"row 4 has the token 382, but the model has embeddings for 382 tokens"):
        encoder({"text": "a soup", "label": 0}, "row 4")


@pytest.mark.parametrize("prompt", ["{text}: {}", "{text}:\n{}"])
def test_a_blank_choice_has_no_tokens_and_is_never_the_right_one(gpt2, prompt):
    task = Task(name="c", kind="choice", prompt=prompt, choices=("a", "b", "c"))
    row = {"text": "t", "a": "great", "b": " ", "c": "the cat", "label": 2}
    example = Encoder(task, gpt2)(row, "row 1")
    assert example.options[1] == [] and example.options[0] and example.options[2]
    with pytest.raises(UserError, match="row 1: 'label' is 1, a choice that is blank"):
        Encoder(task, gpt2)(row | {"label": 1}, "row 1")
    with pytest.raises(UserError, match="row 1: two or more of the choices a, b, c must not be blank"):
        Encoder(task, gpt2)(row | {"a": "", "c": ""}, "row 1")


def test_an_empty_cell_of_a_data_frame_is_no_choice_and_no_answer(gpt2):
    nan = float("nan")
    choice = Task(name="c", kind="choice", prompt="{text}: {}", choices=("options",))
    with pytest.raises(UserError, match="row 1: 'options' has nan, which is how some programs write an empty cell"):
        Encoder(choice, gpt2)({"text": "t", "options": ["a", "b", nan], "label": 0}, "row 1")
    for answer in (nan, ["the cat", nan]):
        with pytest.raises(UserError, match="row 1: 'answer' has nan"):
            Encoder(Task(name="g", kind="generation", prompt="{text}"), gpt2)({"text": "t", "answer": answer}, "row 1")


def test_letters_answer_for_the_choices(gpt2):
    task = Task(
        name="c", kind="choice", prompt="{q}\n{choices}\nAnswer: {}", choices=("x", "y"), letters=True, label="right"
    )
    example = Encoder(task, gpt2)({"q": "who?", "x": "a cat", "y": "a dog", "right": 1}, "row 1")
    assert text(gpt2, example.ids) == "<s>who?\nA. a cat\nB. a dog\nAnswer:"
    assert [text(gpt2, option) for option in example.options] == [" A", " B"] and example.targets == [1]
    long = {
        "q": "who? " * 9,
        "x": ("a cat " * 30).strip(),
        "y": "a dog",
        "right": 1,
    }  # the question is cut, not the choices
    room = len(Encoder(task, gpt2)(long | {"q": "who?"}, "row 1").ids) + 2
    example = Encoder(task, gpt2, room)(long, "row 1")
    assert example.shortened and "\nA. " + "a cat " * 29 + "a cat" in text(gpt2, example.ids)
    assert Encoder(task, gpt2, room // 2)(long, "row 1") is None
    with pytest.raises(UserError, match=r"letters is for choice tasks whose prompt has the place \{choices\}"):
        Task(name="c", kind="choice", prompt="{q}", choices=("x", "y"), letters=True)


CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
CHAT = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "the cat"}]


def test_a_chat_is_written_by_the_template_and_its_last_turn_is_the_answer(tiny):
    loaded = load_model(tiny("gpt2"))
    task = Task(name="chat", kind="generation", messages="turns")
    with pytest.raises(UserError, match="has no chat template"):
        Encoder(task, loaded)
    loaded.tokenizer.chat_template = CHATML
    example = Encoder(task, loaded)({"turns": CHAT}, "row 1")
    assert text(loaded, example.ids) == "<user>who?\n<assistant>"
    assert text(loaded, example.options[0]) == "the cat</s>" and example.references == ["the cat"]
    for bad, said in (
        (CHAT[:1], "the last turn of 'turns' is not the assistant's"),
        ("hello", "must be a list of turns"),
        ([{"role": "user"}], "must be a list of turns"),
    ):
        with pytest.raises(UserError, match=f"row 1.*{said}"):
            Encoder(task, loaded)({"turns": bad}, "row 1")
    labels = Task(name="chat", kind="classification", messages="turns", labels=["no", "great"])  # type: ignore[arg-type]
    encoder = Encoder(labels, loaded)
    assert text(loaded, encoder({"turns": CHAT, "label": 1}, "row 1").ids) == "<user>who?\n<assistant>"
    assert [text(loaded, word) for word in encoder.words] == ["no", "great"]


def test_without_a_context_the_longest_column_is_shortened(gpt2):
    task = QA.model_copy(update={"prompt": "Question: {question} Context: {context} Answer:", "context": None})
    encoder = Encoder(task, gpt2, 80)
    shown = text(gpt2, encoder({"context": LONG, "question": "who sat?", "answer": "me"}, "row 1").ids)
    assert "Question: who sat? Context:" in shown and encoder.cut == {"context": 1}


def test_an_end_of_text_that_the_template_wrote_stays_in_the_prompt(tiny):
    loaded = load_model(tiny("gpt2"))
    loaded.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}" + "{{ eos_token }}{% endfor %}"
    task = Task(name="c", kind="classification", messages="chat", label="label", labels=["the cat", "the dog"])
    row = {"chat": [{"role": "user", "content": "who sat on the mat ?"}], "label": 0}
    example = Encoder(task, loaded)(row, "row 1")
    end = loaded.tokenizer.eos_token_id
    assert example.ids[-1] == end and all(end not in option for option in example.options)


def test_a_model_whose_longest_row_changes_the_others_says_so(tiny):
    """Phi-3 with longrope: transformers takes the factors for long inputs for the whole batch."""
    tokenizer = load_model(tiny("llama")).tokenizer
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_type": "longrope", "rope_theta": 1e4}
    for turn in (8, 60, 255):
        config = Phi3Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            original_max_position_embeddings=turn, rope_parameters=factors,
        )  # fmt: skip
        torch.manual_seed(0)
        loaded = as_loaded(Phi3ForCausalLM(config).double(), tokenizer)
        ready = prepare(resolve("pico_span"), loaded, train=8, dev=8, test=8)
        said = [note for note in ready.notes if "scales positions otherwise (longrope)" in note]
        with torch.no_grad():
            rows = sorted(ready.train, key=len)
            alone, together = (ready.loss(loaded.model, ready.collate([rows[0], *more])) for more in ([], [rows[-1]]))
            last = ready.loss(loaded.model, ready.collate([rows[-1]]))
        apart = abs(float(together) - float(alone + last) / 2)
        assert len(said) == (turn == 60) and (apart > 1e-7) == (turn == 60), (turn, apart, said, list(map(len, rows)))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1/0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'a'*999999999999 }}", "MemoryError"),
        ("{{ 'ab'|center(9999999) }}", "more than 262,.* characters of these turns"),
        ("{{ 'ab'|center(999999999) }}", "MemoryError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than 1 s or 256 MiB"),
        ("{{ (messages|length + 8)**99999999 }}", "takes more than 1 s or 256 MiB"),
        ("{{ raise_exception('user and assistant in turn') }}", "user and assistant in turn"),
    ],
)  # fmt: skip
def test_a_template_that_fails_or_does_not_end_is_one_sentence(template: str, said: str, tiny, monkeypatch) -> None:
    """Also one that only fails at some rows."""
    monkeypatch.setattr(bounded, "SECONDS", 1)
    loaded = load_model(tiny("gpt2"))
    loaded.tokenizer.chat_template = "{% if 'x' in messages[0].content %}" + template + "{% endif %}" + CHATML
    encoder = Encoder(Task(name="chat", kind="generation", messages="turns"), loaded)
    other = [CHAT[0] | {"content": "x"}, CHAT[1]]
    assert [text(loaded, row.ids) for row in encoder.all([("row 1", {"turns": CHAT})] * 2)] == [
        "<user>who?\n<assistant>"
    ] * 2
    with pytest.raises(UserError, match=f"row 2: the chat template .*{said}"):
        encoder.all([("row 1", {"turns": CHAT}), ("row 2", {"turns": other})])
