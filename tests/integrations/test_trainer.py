"""ZOTrainer: the Trainer's loop around steps of forward passes, held to the same steps in a plain loop."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from metazo.blocks import named_tensors, partition
from metazo.errors import UserError
from metazo.integrations import ZOMixin, ZOTrainer
from metazo.integrations.taken_steps import TakenSteps
from metazo.integrations.trainer_method import build, rates_by_name
from metazo.noise import PhiloxNoise
from metazo.optimizers import LOZO, MeZO
from metazo.tuner.file import Tuner, TunerInfo
from metazo.tuner.match import BlockSpec
from metazo.tuner.networks import PertNN
from tests import warm

MODEL = [""]
ROWS = 12


@pytest.fixture(scope="module", autouse=True)
def small(tiny: Callable[[str], Path]) -> None:
    """The language model of these loops is one of two layers."""
    MODEL[0] = str(tiny("llama"))


def model() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(MODEL[0], dtype=torch.float32)


def rows() -> list[dict[str, Any]]:
    tokens = torch.randint(5, 60, (ROWS, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(out: Path, net: nn.Module, cls: type = ZOTrainer, **options: Any):
    given = {
        key: options.pop(key)
        for key in ("optimizer_cls_and_kwargs", "callbacks", "optimizers", "compute_loss_func")
        if key in options
    }
    settings = {
        "output_dir": str(out),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return cls(model=net, args=TrainingArguments(**(settings | options)), train_dataset=rows(), **given)


class Batches(TrainerCallback):
    """What the model was given, to take the same steps by hand."""

    def __init__(self, net: nn.Module):
        self.seen: list[torch.Tensor] = []
        net.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, module, args, kwargs) -> None:
        assert not module.training and torch.is_inference_mode_enabled()
        self.seen.append(kwargs["input_ids"].clone())


@pytest.fixture(autouse=True)
def no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("a backward pass was run")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)


def test_a_run_is_the_plain_loop_over_the_trainers_batches(tmp_path: Path) -> None:
    """Two micro-batches are one step whose loss is theirs over all tokens; rates are the Trainer's schedule."""
    net, plain = model(), model().eval()
    batches = Batches(net)
    run = trainer(tmp_path, net, optimizer_cls_and_kwargs=("mezo", {"eps": 1e-3, "check_loss": False}))
    run.train()
    assert torch.equal(batches.seen.pop(0), batches.seen.pop(0)), "whether the model divides by the number of tokens"
    assert len(batches.seen) == 6 * 2 * 2, "two probes of two micro-batches per step"
    optimizer = MeZO(plain.named_parameters(), lr=1e-4, eps=1e-3, seed=3, check_loss=False)
    losses = []
    for step in range(6):
        pair = batches.seen[4 * step : 4 * step + 2]
        assert torch.equal(pair[0], batches.seen[4 * step + 2])
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * (6 - step) / 6
        items = torch.tensor(sum(part[:, 1:].numel() for part in pair))

        def total(pair=pair, items=items):
            return torch.stack([plain(part, labels=part, num_items_in_batch=items).loss for part in pair]).sum()

        losses.append(optimizer.step(total))
    for (name, ours), theirs in zip(plain.named_parameters(), net.parameters()):
        assert torch.equal(ours, theirs), name
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-3)
    assert all("grad_norm" not in entry for entry in run.state.log_history)


def classified(out: Path, folder: Path, micro_batches: int, **options: Any) -> list[float]:
    """Logged losses of two steps over all rows by BERT's classifier, which takes the number of items and returns a mean."""
    net = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    with torch.no_grad():
        net.classifier.weight.fill_(0.1)  # a new one is random
    run = trainer(out, net, gradient_accumulation_steps=micro_batches, max_steps=2, learning_rate=0.0, **options)
    run.train_dataset = [{"input_ids": row["input_ids"], "labels": k % 2} for k, row in enumerate(rows())]
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def mean_of_all(folder: Path) -> float:
    """The loss of that classifier over all rows, which each of two equal steps has in the mean."""
    net = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    with torch.inference_mode():
        net.classifier.weight.fill_(0.1)
        ids = torch.stack([row["input_ids"] for row in rows()])
        return float(net(input_ids=ids, labels=torch.arange(ROWS) % 2).loss)


def plain_mean(out, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(out.logits, labels)


@pytest.mark.parametrize("function", [None, plain_mean])
def test_a_model_that_ignores_the_number_of_items_has_the_mean_loss(tmp_path: Path, tiny, function) -> None:
    """The sum of the micro-batches, which the Trainer takes, would be three times the loss."""
    losses = classified(tmp_path, tiny("bert"), 3, compute_loss_func=function)
    assert sum(losses) / 2 == pytest.approx(mean_of_all(tiny("bert")), rel=2e-3)


def _process(rank: int, folder: str, out: str) -> None:
    dist.init_process_group("gloo")
    losses = classified(Path(out), Path(folder), 1, per_device_train_batch_size=3)
    if rank == 0:
        torch.save(losses, Path(out) / "losses")
    dist.destroy_process_group()


def test_it_has_the_mean_loss_over_processes(tmp_path: Path, tiny) -> None:
    """The Trainer multiplies it by their number, because it expects that the model divides by the items of all of them."""
    warm.ranks(_process, str(tiny("bert")), str(tmp_path))
    assert sum(torch.load(tmp_path / "losses", weights_only=True)) / 2 == pytest.approx(
        mean_of_all(tiny("bert")), rel=2e-3
    )


def test_a_trainer_that_sorts_its_metrics_by_the_mode_of_the_model_finds_it_training(tmp_path: Path) -> None:
    """As TRL's do; all modules within the model are in evaluation mode. They also count tokens in each evaluation."""
    modes = []

    class Sorting(ZOTrainer):
        _metrics = None
        _total_train_tokens = 7

        def compute_loss(self, model, *args, **kwargs):
            self._total_train_tokens += 18
            modes.append((model.training, any(part.training for part in model.children())))
            return super().compute_loss(model, *args, **kwargs)

        def log(self, logs, *args, **kwargs):
            modes.append((self.model.training, False))
            super().log(logs, *args, **kwargs)

    run = trainer(tmp_path, model(), Sorting, max_steps=1)
    run.train()
    assert set(modes[:-1]) == {(True, False)} and run._total_train_tokens == 7 + 2 * 18
    modes.clear()
    run.evaluate(rows())
    assert set(modes) == {(False, False)}


@pytest.mark.parametrize("precision", ["in-place", "compensated-8"])
def test_the_metrics_of_a_step_are_those_of_its_probes_alone(tmp_path: Path, precision: str) -> None:
    """The check of the loss, and the question whether the model divides by the number of items, evaluate it as well."""

    class Noting(ZOTrainer):
        _metrics = None
        evaluated = 0

        def compute_loss(self, *args, **kwargs):
            self.evaluated += 1
            loss = super().compute_loss(*args, **kwargs)
            self._metrics["train"]["loss"].append(float(loss))
            return loss

    net = model().bfloat16() if precision == "compensated-8" else model()
    run = trainer(tmp_path, net, Noting, max_steps=1, optimizer_cls_and_kwargs=("mezo", {"precision": precision}))
    run._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    run.train()
    probes = run._metrics["train"]["loss"]
    assert len(probes) == 2 * 2 and run.evaluated > 2 * 2 + 2
    (logged,) = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(probes) / 2 == pytest.approx(logged, rel=1e-2)
    run._metrics["train"]["loss"].append(0.0)  # new ones of the next steps are added
    assert len(run._metrics["train"]["loss"]) == 5


def test_a_noise_source_keeps_its_seed(tmp_path):
    """The Trainer's seed is 3 here, and 42 by default."""
    run = trainer(tmp_path, model(), max_steps=1, optimizer_cls_and_kwargs=("mezo", {"noise": PhiloxNoise(5)}))
    run.train()
    found = run.optimizer.optimizer
    assert found.steps == 1 and found.last_step.seeds == (PhiloxNoise(5).seed(0),)


@pytest.mark.parametrize("at_start", [False, True])
def test_the_components_of_a_loss_add_up_to_it(tmp_path: Path, tiny, at_start: bool) -> None:
    """sentence-transformers sorts them by the mode of the model, and changes their sums between the steps."""
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    losses = pytest.importorskip("sentence_transformers.sparse_encoder.losses")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    counts = []

    class Sparse(ZOMixin, library.SparseEncoderTrainer):
        def log(self, logs, *args, **kwargs):
            counts.append({mode: int(sums.get("steps", 0)) for mode, sums in self.accum_loss_components.items()})
            super().log(logs, *args, **kwargs)

    net = library.SparseEncoder(str(tiny("bert_mlm")), device="cpu")
    inner = losses.SparseMultipleNegativesRankingLoss(net)
    texts = {"a": ["the film", "a dog", "terrible", "a cat"] * 2, "b": ["a movie", "the hound", "bad", "kitten"] * 2}
    run = Sparse(
        model=net,
        args=library.SparseEncoderTrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, per_device_eval_batch_size=4, logging_steps=2,
            eval_steps=2, eval_strategy="steps", eval_on_start=at_start, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_dict(texts),
        eval_dataset=datasets.Dataset.from_dict(texts),
        loss=losses.SpladeLoss(net, inner, document_regularizer_weight=0.1, query_regularizer_weight=0.2),
    )  # fmt: skip
    run.train()
    logged = [(mode, e) for e in run.state.log_history for mode in ("", "eval_") if f"{mode}loss" in e]
    assert [mode for mode, _ in logged] == ["eval_"] * at_start + ["", "eval_"] * 2
    for mode, entry in logged:
        parts = [entry[f"{mode}{part}_loss"] for part in ("base", "document_regularizer", "query_regularizer")]
        assert sum(parts) == pytest.approx(entry[f"{mode}loss"], abs=3e-4)
        assert min(parts) > 0 or (at_start and entry["step"] == 0), "the weights begin at 0"
    steps = [{"train": 4, "eval": 0}, {"train": 0, "eval": 2}] * 2  # two probes of two steps, two batches
    assert counts[at_start:-1] == steps, "the check of the loss is none of the probes"


class Classes(nn.Module):
    """A loss with a layer of its own, which holds the model, and a guide that is not trained, as in sentence-transformers."""

    def __init__(self, net: nn.Module, guide: nn.Module):
        super().__init__()
        self.model, self.guide = net, guide
        self.classifier, self.fixed = nn.Linear(64, 3), nn.Linear(3, 3).requires_grad_(False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        found = self.fixed(self.classifier(self.model(input_ids).logits[:, -1, :64].float()))
        return found.square().mean() + self.guide(input_ids).logits.float().square().mean()


class WithLoss(ZOTrainer):
    loss: Any = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = self.loss.values() if isinstance(self.loss, dict) else [self.loss]
        return torch.stack([loss(inputs["input_ids"]) for loss in losses]).sum()


def with_loss(out: Path, several: bool, **options: Any):
    """A trainer whose loss has parameters, or one with a dict of such losses."""
    torch.manual_seed(0)
    net, guide = model(), model()
    run = trainer(out, net, WithLoss, max_steps=4, weight_decay=0.1, **options)
    run.loss = {"a": Classes(net, guide), "b": Classes(net, guide)} if several else Classes(net, guide)
    return run, list(run.loss.values()) if several else [run.loss]


@pytest.mark.parametrize("several", [False, True])
def test_the_parameters_of_a_loss_are_trained(tmp_path: Path, several: bool) -> None:
    run, losses = with_loss(tmp_path, several)
    before = [{name: p.detach().clone() for name, p in loss.named_parameters()} for loss in losses]
    run.train()
    for loss, old in zip(losses, before):
        moved = {name for name, p in loss.named_parameters() if not torch.equal(p, old[name])}
        assert {"classifier.weight", "classifier.bias", "model.model.norm.weight"} <= moved
        assert not any(name.startswith(("guide.", "fixed.")) for name in moved)
    decays = {name: g["weight_decay"] for g in run.optimizer.optimizer.param_groups for name in g["param_names"]}
    own = [name for name in decays if name.startswith("loss.")]
    assert own == [
        f"loss.{key}classifier.{x}" for x in ("weight", "bias") for key in (("a.", "b.") if several else ("",))
    ]
    assert all(decays[name] == (0.1 if name.endswith("weight") else 0.0) for name in own)
    assert set(decays) - set(own) == {name for name, _ in run.model.named_parameters()}


def test_a_resumed_run_has_the_parameters_of_the_loss(tmp_path: Path) -> None:
    whole, (there,) = with_loss(tmp_path / "whole", False, save_strategy="steps", save_steps=2)
    whole.train()
    rest, (here,) = with_loss(tmp_path / "whole", False)
    first = here.classifier.weight.detach().clone()
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert rest.state.global_step == 4
    assert all(map(torch.equal, there.parameters(), here.parameters())) and not torch.equal(
        here.classifier.weight, first
    )


def test_a_method_that_needs_the_model_refuses_the_parameters_of_a_loss(tmp_path: Path) -> None:
    run, _ = with_loss(tmp_path, False, optimizer_cls_and_kwargs=("skip-feedback", {}))
    with pytest.raises(
        UserError, match="the loss has parameters of its own, such as loss.classifier.weight: freeze them"
    ):
        run.create_optimizer()


def test_four_bit_layers_of_a_processor_are_kept_from_bfloat16(tmp_path: Path) -> None:
    """Those of the model and of each that `model_init` makes."""

    def made() -> nn.Module:
        net = model()
        net.lm_head.support_avx512bf16_for_cpu = True
        net.lm_head.weight.quant_state = None
        return net

    run = trainer(tmp_path, made(), max_steps=1)
    assert not run.model.lm_head.support_avx512bf16_for_cpu
    run.model = made()
    run.create_optimizer()
    assert not run.model.lm_head.support_avx512bf16_for_cpu


@pytest.mark.parametrize("method", [("lozo", {"interval": 2}), (LOZO, {"interval": 2}), ("mezo-adam", {})])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, method) -> None:
    whole, half, rest = model(), model(), model()
    trainer(tmp_path / "whole", whole, optimizer_cls_and_kwargs=method).train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    options = {"save_strategy": "steps", "save_steps": 4, "optimizer_cls_and_kwargs": method}
    trainer(tmp_path / "parts", half, callbacks=[Stop()], **options).train()
    trainer(tmp_path / "parts", rest, **options).train(resume_from_checkpoint=True)
    assert not all(torch.equal(a, b) for a, b in zip(half.parameters(), whole.parameters()))
    for (name, a), b in zip(whole.named_parameters(), rest.parameters()):
        assert torch.equal(a, b), name


def test_settings_come_from_the_arguments_and_a_finished_optimizer_is_taken(tmp_path: Path) -> None:
    run = trainer(tmp_path, model(), weight_decay=0.1)
    inner = run.create_optimizer().optimizer
    assert type(inner) is MeZO and inner.param_groups[0]["lr"] == 1e-4 and inner.noise.run_seed == 3
    decays = {name: group["weight_decay"] for group in inner.param_groups for name in group["param_names"]}
    theirs = Trainer(model(), TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[]))
    names = {id(parameter): name for name, parameter in theirs.model.named_parameters()}
    groups = theirs.create_optimizer().param_groups
    assert decays == {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert decays["model.norm.weight"] == 0.0
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))  # no parameter without decay
    (group,) = trainer(tmp_path, plain, weight_decay=0.1).create_optimizer().optimizer.param_groups
    assert group["param_names"] == ["0.weight"] and group["weight_decay"] == 0.1
    net = model()
    own = LOZO(net.named_parameters(), lr=1e-3)
    run = trainer(tmp_path, net, optimizers=(own, None), max_steps=1)
    run.train()
    assert own.steps == 1


def test_a_bfloat16_model_keeps_its_masters_in_checkpoints(tmp_path: Path) -> None:
    net = AutoModelForCausalLM.from_pretrained(MODEL[0], dtype=torch.bfloat16)
    run = trainer(tmp_path, net, max_steps=2, save_strategy="steps", save_steps=2)
    run.train()
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert any(name.startswith("master/") for name in saved["zo"])


def test_adapters_alone_move_in_a_peft_model(tmp_path: Path) -> None:
    net = get_peft_model(model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    trainer(tmp_path, net, max_steps=2).train()
    moved = {name for name, parameter in net.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and all("lora_" in name for name in moved)


@pytest.mark.parametrize(("each", "micro_batches"), [(2, 1), (3, 2)])
def test_a_tuner_of_the_published_count_is_told_the_examples_of_a_step(
    tmp_path: Path, each: int, micro_batches: int
) -> None:
    net = model()
    blocks = [BlockSpec.of(block) for block in partition(named_tensors(net), "tensor")]
    file = tmp_path / "tuner.safetensors"
    Tuner(PertNN(len(blocks), hidden=4), TunerInfo("llama", blocks, embedding_count="published")).save(file)
    sizes = {"per_device_train_batch_size": each, "gradient_accumulation_steps": micro_batches}
    method: Any = ("zo-finetuner", {"tuner": str(file)})
    run = trainer(tmp_path, net, optimizer_cls_and_kwargs=method, max_steps=1, **sizes)
    optimizer = run.create_optimizer().optimizer
    run.train()
    scale = optimizer.scale
    embedding = next(i for i, block in enumerate(scale.blocks) if "embed" in block.name)
    assert scale.counts[embedding] == 15 * each * micro_batches * net.config.hidden_size


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer_cls_and_kwargs": ("adamw", {})}, "adamw"),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {})}, "not a zeroth-order method"),
        ({"optimizer_cls_and_kwargs": "mezo"}, "is 'mezo': give a method and its settings"),
        ({"optimizer_cls_and_kwargs": ("mezo", [1])}, r"has the settings \[1\]: give a mapping"),
        ({"optimizer_cls_and_kwargs": ("mezo", {"rank": 3})}, "`rank` is not a setting of mezo"),
        ({"optimizer_cls_and_kwargs": ("zo-finetuner", {})}, "zo-finetuner needs a tuner: add `tuner`"),
        ({"optimizer_cls_and_kwargs": ("mezo", {"eps": 0.0})}, "eps.? must be above 0"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path: Path, options, words) -> None:
    with pytest.raises(UserError, match=words):
        trainer(tmp_path, model(), **options).train()


class Narrow(Trainer):
    """Takes no `optimizer_cls_and_kwargs`, as TRL's DPOTrainer and GRPOTrainer."""

    def __init__(self, model=None, args=None, train_dataset=None, optimizers=(None, None)):
        super().__init__(model=model, args=args, train_dataset=train_dataset, optimizers=optimizers)


class ZONarrow(ZOMixin, Narrow):
    pass


def test_a_trainer_without_the_argument_takes_a_method(tmp_path: Path) -> None:
    method: Any = ("lozo", {"rank": 2})
    nets = model(), model()
    trainer(tmp_path / "a", nets[0], ZONarrow, max_steps=2, optimizer_cls_and_kwargs=method).train()
    trainer(tmp_path / "b", nets[1], max_steps=2, optimizer_cls_and_kwargs=method).train()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(nets[0].parameters(), nets[1].parameters()))
    net = model()
    with pytest.raises(UserError, match="both give an optimizer"):
        finished = MeZO(net.named_parameters())
        trainer(tmp_path, net, ZONarrow, optimizer_cls_and_kwargs=method, optimizers=(finished, None))


def test_first_order_optimizers_and_scalers_are_refused(tmp_path: Path) -> None:
    net = model()
    with pytest.raises(UserError, match="a SGD, which needs gradients"):
        trainer(tmp_path, net, optimizers=(torch.optim.SGD(net.parameters(), 0.1), None))
    for name, value in (("fp16", True), ("neftune_noise_alpha", 5.0)):
        with pytest.raises(UserError, match=f"`{name}`"):
            trainer(tmp_path, net, **{name: value})


@dataclass
class Detached(TrainingArguments):
    """The settings of TRL's configurations that take a factor of the loss for a constant."""

    loss_type: Any = "nll"
    use_weighting: bool = False


@pytest.mark.parametrize("with_trl", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "config"),
    [("loss_type", "dft", "SFT"), ("use_weighting", True, "DPO"), ("loss_type", "kto", "KTO")],
)
def test_losses_with_a_part_that_is_taken_for_a_constant_are_refused(
    tmp_path: Path, with_trl: bool, name: str, value: Any, config: str
) -> None:
    kind: Any = Detached
    if with_trl:
        kind = getattr(pytest.importorskip("trl", reason="trl is not installed"), f"{config}Config")

    def made(**settings: Any) -> ZOTrainer:
        args = kind(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, **settings)
        return ZOTrainer(model=model(), args=args, train_dataset=rows())

    made(**({"loss_type": "apo_zero_unpaired"} if config == "KTO" else {}))
    with pytest.raises(UserError, match=f"`{name}`.*(take '(nll|apo_zero_unpaired)'|remove it)"):
        made(**{name: value})


class Generates(Trainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        return super().training_step(model, inputs, num_items_in_batch)


class PassesOn(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize(("base", "named"), [(Generates, True), (PassesOn, False), (Trainer, False)])
def test_a_training_step_that_is_replaced_is_named(tmp_path: Path, base: type[Trainer], named: bool) -> None:
    class Mixed(ZOMixin, base):
        pass

    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Mixed(model=model(), args=args, train_dataset=rows())
    assert any("Generates has a training_step" in str(w.message) for w in caught) == named


class Stop(TrainerCallback):
    """Stops the first loop after the first micro-batch of a step."""

    def __init__(self):
        self.done = False

    def on_substep_end(self, args, state, control, **kwargs):
        if not self.done and state.global_step == 2:
            self.done = control.should_training_stop = True


def test_micro_batches_of_a_loop_that_was_stopped_are_not_in_the_next(tmp_path):
    stop, net = Stop(), model()
    given = trainer(tmp_path, net, callbacks=[stop])
    given.train()
    assert stop.done and given.state.global_step == 2
    seen = Batches(net).seen
    given.train()
    assert len(seen) == 6 * 2 * 2  # steps of two probes of two batches
    assert len({tuple(batch.shape) for batch in seen}) == 1


@pytest.mark.parametrize("name,value", [("max_grad_norm", 0.5), ("optim", "sgd"), ("optim_args", "a=1")])
def test_settings_that_change_nothing_are_named(tmp_path, name, value):
    with pytest.warns(UserWarning, match=f"`{name}`, which changes nothing"):
        trainer(tmp_path, model(), **{name: value})


def test_moments_of_adam_are_those_of_the_arguments(tmp_path):
    settings = {"adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 1e-2}
    plain = {"optimizer_cls_and_kwargs": ("mezo-adam", {})}
    rule = trainer(tmp_path, model(), **plain, **settings).create_optimizer().optimizer.rule
    assert (rule.betas, rule.stability) == ((0.5, 0.6), 1e-2)
    own = {"optimizer_cls_and_kwargs": ("mezo-adam", {"betas": (0.1, 0.2)})}
    assert trainer(tmp_path, model(), **own, **settings).create_optimizer().optimizer.rule.betas == (0.1, 0.2)
    trainer(tmp_path, model(), **settings).create_optimizer()  # MeZO has none


def test_a_method_that_needs_the_loss_over_all_examples_is_refused(tmp_path):
    with pytest.raises(UserError, match="mezo-svrg needs the loss over all training examples"):
        trainer(tmp_path, model(), optimizer_cls_and_kwargs=("mezo-svrg", {})).create_optimizer()


def test_a_subclass_that_takes_no_step_is_refused(tmp_path):
    class Own(ZOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return self.compute_loss(model, inputs).detach()

    with pytest.raises(UserError, match="No step was taken: a subclass must not replace the `training_step`"):
        trainer(tmp_path, model(), Own).train()


def test_a_checkpoint_without_the_optimizer_is_refused(tmp_path: Path) -> None:
    """Its steps would repeat the noise of the first ones."""
    options = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    trainer(tmp_path, model(), **options).train()
    with pytest.raises(UserError, match="has no state of the optimizer \\(`save_only_model`\\)"):
        trainer(tmp_path, model(), **options).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_the_schedule_is_refused(tmp_path: Path) -> None:
    """Without it the Trainer does not load the optimizer's state."""
    trainer(tmp_path, model(), save_strategy="steps", save_steps=2).train()
    for path in tmp_path.rglob("scheduler.pt"):
        path.unlink()
    with pytest.raises(UserError, match="has no scheduler.pt, without which"):
        trainer(tmp_path, model(), save_strategy="steps", save_steps=2).train(resume_from_checkpoint=True)


def test_a_loaded_state_has_no_step_taken_yet() -> None:
    """As if a run goes on in the same trainer from the checkpoint of one step before."""
    net = nn.Linear(2, 1)
    seen = TakenSteps(MeZO(net.named_parameters()))
    state = seen.state_dict()
    for _ in range(2):
        seen.optimizer.step(lambda: net(torch.ones(1, 2)).sum())
        seen.step()
        seen.load_state_dict(state)


def test_weight_decay_is_for_the_names_that_the_trainer_decays() -> None:
    net = nn.ModuleDict({"layer_norm_in": nn.Linear(2, 2)})
    made = build(MeZO, net, {}, {"lr": 0.1, "weight_decay": 0.5}, {"layer_norm_in.bias", "layer_norm_in.weight"}, 1)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    made.step(lambda: 1.0)
    assert all(torch.allclose(p, 0.95 * before[name], atol=1e-6) for name, p in net.named_parameters())


def test_an_unknown_method_is_answered_with_all_that_are_taken(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="`optimizer_cls_and_kwargs` names 'foo', which is not a method: choose"
    ) as refused:
        trainer(tmp_path, model(), optimizer_cls_and_kwargs=("foo", {}))
    named = set(str(refused.value).rpartition("choose ")[2].rstrip(".").split(", "))
    assert {"mezo", "answer-column", "skip-feedback", "first-order-fused"} <= named
    assert not named & {"first-order-adamw", "first-order-sgd", "mezo-svrg"}, "they are refused"


def test_none_means_no_settings(tmp_path: Path) -> None:
    made = trainer(tmp_path, model(), optimizer_cls_and_kwargs=("lozo", None)).create_optimizer()
    assert made.optimizer.name == "lozo" and made.optimizer.rank == 2


def test_the_methods_that_are_named_need_no_gradients(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a zeroth-order method: choose curvzo") as refused:
        trainer(tmp_path, model(), optimizer_cls_and_kwargs=("first-order-sgd", {})).create_optimizer()
    assert "feedback" not in str(refused.value) and "first-order-fused" not in str(refused.value)


class AskBeforeTheStepIsCounted(TrainerCallback):
    """As JITCheckpointCallback does if the signal comes within a step."""

    run: Any = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            control.should_training_stop = True
            self.run._save_checkpoint(self.run.model, trial=None)


def test_a_checkpoint_within_a_step_is_saved_at_its_end(tmp_path: Path) -> None:
    whole, half, rest = model(), model(), model()
    trainer(tmp_path / "whole", whole).train()
    ask = AskBeforeTheStepIsCounted()
    ask.run = trainer(tmp_path / "parts", half, callbacks=[ask])
    ask.run.train()
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-3"]
    trainer(tmp_path / "parts", rest).train(resume_from_checkpoint=True)
    assert all(map(torch.equal, whole.parameters(), rest.parameters()))


class Passes(torch.utils.data.IterableDataset):
    """Five micro-batches of two rows a pass."""

    def __iter__(self):
        return iter(rows()[:10])


def test_micro_batches_left_at_the_end_of_a_pass_are_in_no_step(tmp_path: Path) -> None:
    net = model()
    run = trainer(tmp_path, net, max_steps=3)  # of two micro-batches: two in the first pass
    run.train_dataset = Passes()
    seen = Batches(net).seen
    run.train()
    used = [batch.tolist() for batch in seen]
    given = [[row["input_ids"].tolist() for row in rows()[k : k + 2]] for k in range(0, 10, 2)]
    assert used[-8:] == [*given[2:4] * 2, *given[0:2] * 2]
    assert all(batch in given[0:2] for batch in used[:-8]), (
        "what is evaluated beside the first step's probes is of its batches"
    )


def test_learning_rates_by_name_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    class ZO(ZOMixin, library.SentenceTransformerTrainer):
        pass

    words = library.SentenceTransformer(modules=[Words()], device="cpu")
    texts = datasets.Dataset.from_dict({"text": ["a", "b"] * 2, "label": [0, 1] * 2})
    found = []
    for cls in (ZO, library.SentenceTransformerTrainer):
        loss = losses.SoftmaxLoss(words, sentence_embedding_dimension=4, num_labels=2)
        args = library.SentenceTransformerTrainingArguments(
            str(tmp_path), report_to=[], use_cpu=True, weight_decay=0.1, learning_rate=1e-4,
            learning_rate_mapping={"^classifier": 1e-2, r"^model\..*second": 1e-3, r"second\.bias$": 1e-5},
        )  # fmt: skip
        run = cls(model=words, args=args, train_dataset=texts, loss=loss)
        made = run.create_optimizer()
        names = {id(p): name for name, p in loss.named_parameters()}
        groups = [g for g in made.param_groups if g["params"]]
        found.append({names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]})
    assert found[0] == found[1]
    assert {lr for lr, _ in found[0].values()} == {1e-2, 1e-3, 1e-4, 1e-5}


class Words(nn.Module):
    """An encoder of sentences that needs no files."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def tokenize(self, texts, **kwargs):
        return {"values": torch.ones(len(texts), 4)}

    preprocess = tokenize

    def forward(self, features):
        return features | {"sentence_embedding": self.second(self.first(features["values"]))}


@pytest.mark.parametrize(
    ("pattern", "words"), [("nothing", "no trained parameter's name matches"), ("(", "no regular exp")]
)
def test_bad_patterns_of_learning_rates_are_one_sentence(pattern: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        rates_by_name({pattern: 0.1}, {"loss.weight": "weight"})


class Groups(Trainer):
    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return self.optimizer


def test_a_create_optimizer_that_is_replaced_is_named(tmp_path: Path) -> None:
    class Mixed(ZOMixin, Groups):
        pass

    with pytest.warns(UserWarning, match="Groups has a create_optimizer of its own, which ZOMixin replaces"):
        trainer(tmp_path, model(), Mixed)


def test_an_optimizer_that_needs_gradients_is_refused_at_the_first_step(tmp_path: Path) -> None:
    class Mine(ZOTrainer):
        create_optimizer = Groups.create_optimizer

    with pytest.raises(UserError, match="has made the optimizer SGD, which needs gradients"):
        trainer(tmp_path, model(), Mine).train()
