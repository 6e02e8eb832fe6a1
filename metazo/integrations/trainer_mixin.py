"""What a subclass of transformers.Trainer needs to train with forward passes only."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from metazo.errors import UserError
from metazo.integrations.taken_steps import TakenSteps
from metazo.integrations.trainer_method import build, chosen, is_given, moments, rates_by_name
from metazo.io.extras import needs
from metazo.io.files import is_file
from metazo.models.quantize import keep_unpacked
from metazo.optimizers.base import ZOOptimizer

with needs("trainer"):
    from transformers import PreTrainedModel, Trainer

SURROGATES = {  # losses of TRL with a factor or a part that their gradient takes for a constant, which it is not at the probes
    "dft": "whose gradient is meant and not its value, which can fall if right tokens become less likely: take 'nll'",
    "kto": "whose reference point moves with the probes and is not meant to be followed: take 'apo_zero_unpaired'",
}
REPLACED = {  # methods of the Trainer, and what a subclass's own may do
    "training_step": "what it does beside computing the loss of its inputs (generating answers, counting) is left out. Do not "
    "use it if the loss needs this.",
    "create_optimizer": "learning rates or weight decays that it gives to some parameters alone are left out. Give an "
    "optimizer with these groups as `optimizers=(optimizer, None)`.",
}
METRICS = ("_metrics", "accum_loss_components")  # what TRL's trainers and those of sentence-transformers add up


class ZOMixin:
    """Makes a Trainer take zeroth-order steps: `class ZOSFTTrainer(ZOMixin, SFTTrainer)`.

    Args:
        optimizer_cls_and_kwargs: (method, settings), as Trainer's own argument; the method is a name (`"lozo"`) or a class of
            metazo.optimizers. Without it the method is MeZO. The learning rate, the weight decay, the seed, and for
            mezo-adam the betas and epsilon, are those of TrainingArguments unless the settings have them; a noise source among
            them has its own seed. `"tuner"` among the settings is a tuner by file, zoo name or Hub id; None means no settings.
            A finished optimizer is given as `optimizers=(optimizer, scheduler)`.
        All other arguments are the Trainer's.

    What differs from the Trainer:

    * A step evaluates the losses of its micro-batches at each probe, in evaluation mode and under inference mode. No backward
      pass is run, and no gradient exists: `max_grad_norm` is set to 0, and no gradient norm is logged. A warning names it, and
      `optim` with its arguments, if they were given. (first-order-fused, skip-feedback, feedback and answer-column are taken
      too, and compute gradients, one tensor or block at a time.)
    * `gradient_accumulation_steps` = k makes one step of k micro-batches under one perturbation, not k. Its loss is the mean
      over all their tokens if the model divides by `num_items_in_batch`, as causal language models do, and else the mean of
      the k losses, in which the examples of a smaller last micro-batch weigh more. (The Trainer adds up the k losses of a
      model that takes `num_items_in_batch` and ignores it, as BERT's classifiers do; here that would be k times the rate.)
    * The logged loss is the mean over the step's probes, and so are the metrics of TRL's trainers and the components of a
      loss of sentence-transformers (SpladeLoss, CSRLoss).
    * Micro-batches that are left at the end of a pass over an IterableDataset, fewer than a step's, are in no step.
    * The parameters of a loss that the trainer has (`loss`, a module or a dict, as in sentence-transformers) are trained
      as well, under names that begin with `loss.`; those of a second model in it, such as a guide, are not.

    Checkpoints hold the whole state of the method and the parameters of the loss, so that `resume_from_checkpoint` goes on bit
    for bit. One that is asked for between `training_step` and the end of its step is saved at this end.

    Raises UserError for a checkpoint without it (`save_only_model`), whose steps would repeat the noise of the first ones; for
    float16 with a gradient scaler (`fp16`), DeepSpeed, FSDP and NEFTune's noise, which this class does not support; for
    settings that the method does not have; for TRL's `loss_type="dft"` and `use_weighting` (WPO), whose value can fall if
    right answers become less likely; and for KTO's `loss_type="kto"`, whose reference point moves with the probes.

    Do not use it with a loss that is random, such as a sampled one: the probes of a step must differ by the perturbation alone.
    Nor with a surrogate whose gradient is meant and whose value is not. If it is the same at every probe, as GRPO's can be,
    nothing moves, and a warning says so after 20 steps. If a part that the loss takes for a constant (`detach`) differs between
    the probes, the steps follow that part too, and nothing says so. Nor with a trainer whose own `training_step` generates or
    counts, such as those of GRPO, RLOO, GKD and online DPO, because this class replaces it; a warning names such a trainer.
    """

    def __init__(self, *args: Any, optimizer_cls_and_kwargs: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)  # without the method, which not every subclass of Trainer takes
        if optimizer_cls_and_kwargs is not None:
            if getattr(self, "optimizer", None) is not None:
                raise UserError("`optimizers` and `optimizer_cls_and_kwargs` both give an optimizer: leave one out.")
            chosen(optimizer_cls_and_kwargs)  # refused at once, not at the first step
            self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        settings: Any = self.args  # type: ignore[attr-defined]
        for name in ("fp16", "deepspeed", "fsdp", "neftune_noise_alpha", "use_weighting"):
            if getattr(settings, name, None):
                raise UserError(
                    f"TrainingArguments has `{name}`, which {type(self).__name__} does not support: remove it."
                )
        loss = getattr(settings, "loss_type", None)
        if isinstance(loss, str) and loss in SURROGATES:
            raise UserError(f"TrainingArguments has `loss_type` {loss!r}, {SURROGATES[loss]}.")
        _say_unused(settings)
        _say_replaced(type(self))
        settings.max_grad_norm = 0.0
        keep_unpacked(self.model)  # type: ignore[attr-defined]
        self._micro_batches: list[dict[str, Any]] = []
        self._began: Any = None  # the Trainer's state that the micro-batches belong to; every call of train makes one
        self._divides: bool | None = None  # whether the loss is divided by num_items_in_batch: see _divided
        given: Any = getattr(self, "optimizer", None)
        if given is not None and not isinstance(given, TakenSteps):
            if not isinstance(given, ZOOptimizer):
                raise UserError(
                    f"`optimizers` holds a {type(given).__name__}, which needs gradients: give an optimizer of "
                    "metazo.optimizers, or use transformers.Trainer."
                )
            self.optimizer: Any = TakenSteps(given)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            cls, options = chosen(getattr(self, "optimizer_cls_and_kwargs", None) or ("mezo", None))
            module = self.model if model is None else model  # type: ignore[attr-defined]
            keep_unpacked(module)  # `model_init` makes one for each run
            args: Any = self.args  # type: ignore[attr-defined]
            common = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "seed": args.seed}
            if not isinstance(options.get("noise", ""), str):
                del common["seed"]  # a noise source has a seed of its own
            common |= moments(cls, args)
            decayed = set(self.get_decay_parameter_names(module))  # type: ignore[attr-defined]
            own: dict[str, nn.Parameter] = {}
            for prefix, loss in _losses(getattr(self, "loss", None)):
                own |= {prefix + name: parameter for name, parameter in _own_parameters(loss, module)}
                decayed |= {prefix + name for name in self.get_decay_parameter_names(loss)}  # type: ignore[attr-defined]
            examples = self.get_total_train_batch_size(args)  # type: ignore[attr-defined]
            rates: dict[str, float] = {}
            if patterns := getattr(args, "learning_rate_mapping", None):
                rates = rates_by_name(patterns, _names(getattr(self, "loss", None), module, own))
            self.optimizer = TakenSteps(build(cls, module, own, common | options, decayed, examples, rates), own)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Keep a micro-batch; with the last one of a step, take the step. Returns: its loss, and 0 for the others."""
        trainer: Any = self
        if self._began is not trainer.state:  # a loop that was stopped within a step has left micro-batches
            self._micro_batches, self._began = [], trainer.state
        self._micro_batches.append(trainer._prepare_inputs(inputs))
        device = trainer.args.device
        if not trainer.accelerator.sync_gradients:
            return torch.zeros((), device=device)
        # The Trainer counts micro-batches anew in every pass over an IterableDataset, and those left at its end are in no step.
        batches, self._micro_batches = self._micro_batches[-trainer.current_gradient_accumulation_steps :], []
        module = model if trainer.args.n_gpu > 1 else trainer.accelerator.unwrap_model(model)
        module.eval()
        # TRL's trainers and those of sentence-transformers ask this flag of the whole model, and sort their metrics by it
        module.training = any(hasattr(self, name) for name in METRICS)
        count = num_items_in_batch
        tokens = getattr(self, "_total_train_tokens", None)  # of TRL's trainers, which add a batch's at each evaluation
        if count is not None and (len(batches) > 1 or trainer.accelerator.num_processes > 1):
            if self._divides is None:
                self._divides = self._divided(module, batches[0], count)
            if self._divides is False:
                count = None

        def total() -> Tensor:
            if tokens is not None:
                trainer._total_train_tokens = tokens
            losses = [self._loss(module, batch, count) for batch in batches]
            return torch.stack(losses).sum()

        def again() -> Tensor:
            with self._metrics_kept():
                return total()

        total.again = again  # type: ignore[attr-defined]
        inner = _unwrapped(self.optimizer, ZOOptimizer)
        return torch.tensor(inner.step(total), device=device)

    def _divided(self, module: nn.Module, batch: dict[str, Any], count: Any) -> bool | None:
        """Whether the loss is divided by the count of items, which a model may take and ignore; asked until a batch whose
        loss is neither 0 nor NaN tells. Two forward passes that `forwards` does not count."""
        with torch.inference_mode(), self._metrics_kept():
            once, twice = (float(self._loss(module, batch, number)) for number in (count, 2 * count))
        return once != twice if math.isfinite(once) and once else None

    @contextmanager
    def _metrics_kept(self) -> Iterator[None]:
        """Leave the metrics of such trainers as they are: what is evaluated meanwhile is not one of the step's probes."""
        with torch.inference_mode(False):  # tensors that are made under it can't be changed outside of it
            kept = {name: copy.deepcopy(getattr(self, name, None)) for name in METRICS}
        try:
            yield
        finally:
            for name, value in kept.items():
                if value is not None:
                    setattr(self, name, value)

    def track_loss_components(self, loss: dict[str, Tensor]) -> None:
        """Called by the trainers of sentence-transformers, which change the sums that they begin here after the step."""
        with torch.inference_mode(False):
            super().track_loss_components({name: value.clone() for name, value in loss.items()})  # type: ignore[misc]

    def _loss(self, module: nn.Module, batch: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """A micro-batch's share of the loss of a step, scaled as the Trainer scales it before its backward pass."""
        trainer: Any = self
        with trainer.compute_loss_context_manager():
            # A copy: compute_loss may take the labels out of it, and it is called once per probe.
            loss = trainer.compute_loss(module, dict(batch), num_items_in_batch=num_items_in_batch)
        if trainer.args.n_gpu > 1:
            loss = loss.mean()
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            takes = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
            scaled = takes and num_items_in_batch is not None
        return (loss if scaled else loss / trainer.current_gradient_accumulation_steps).float()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not is_file(Path(checkpoint) / "optimizer.pt"):
            raise UserError(
                f"{checkpoint} has no state of the optimizer (`save_only_model`): the steps would repeat the noise of the "
                "first ones. Load the model from it and start a new run with another `seed`."
            )
        if checkpoint is not None and not is_file(Path(checkpoint) / "scheduler.pt"):
            raise UserError(
                f"{checkpoint} has no scheduler.pt, without which the Trainer does not load the optimizer's state either: the "
                "steps would repeat the noise of the first ones. Put it back, or start a new run with another `seed`."
            )
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """If a step is taken that the Trainer has not counted yet (`enable_jit_checkpoint` saves there), save when it has."""
        if _unwrapped(self.optimizer, TakenSteps).uncounted:
            self.control.should_save = True  # type: ignore[attr-defined]
        else:
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """There is no gradient, so none is measured."""


def _say_unused(settings: Any) -> None:
    for name in ("optim", "optim_args", "optim_target_modules", "max_grad_norm"):
        if name in type(settings).__dataclass_fields__ and is_given(settings, name):
            warnings.warn(
                f"TrainingArguments has `{name}`, which changes nothing here: there is no gradient, and the method is that of "
                "`optimizer_cls_and_kwargs`.",
                stacklevel=3,
            )


def _say_replaced(cls: type) -> None:
    """Name a trainer whose own training_step or create_optimizer is replaced; one that takes any arguments passes them on."""
    after = cls.__mro__[cls.__mro__.index(ZOMixin) + 1 :]
    for method, what in REPLACED.items():
        owner: Any = next((base for base in after if method in vars(base)), Trainer)
        given = inspect.signature(getattr(owner, method)).parameters.values()
        takes_any = any(each.kind is each.VAR_POSITIONAL for each in given)
        if owner is not Trainer and not takes_any:
            warnings.warn(f"{owner.__name__} has a {method} of its own, which ZOMixin replaces: {what}", stacklevel=3)


def _unwrapped(optimizer: Any, kind: type) -> Any:
    """The optimizer of this kind within accelerate's wrapper and ours. Raises UserError if there is none."""
    while not isinstance(optimizer, kind):
        if not hasattr(optimizer, "optimizer"):
            raise UserError(
                f"The trainer has made the optimizer {type(optimizer).__name__}, which needs gradients: leave "
                "`create_optimizer` and `create_optimizer_and_scheduler` as they are, or use transformers.Trainer."
            )
        optimizer = optimizer.optimizer
    return optimizer


def _losses(loss: Any) -> Iterator[tuple[str, nn.Module]]:
    """The losses of a trainer, a module or a dict of them, with the beginning of their parameters' names."""
    for key, module in loss.items() if isinstance(loss, Mapping) else [("", loss)]:
        if isinstance(module, nn.Module):
            yield f"loss.{key}." if key else "loss.", module


def _own_parameters(loss: nn.Module, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a loss that are trained: neither the model's nor of another model of its kind, such as a guide."""
    kind = tuple(
        cls for cls in type(model).__mro__ if issubclass(cls, nn.Module) and cls.__module__.split(".")[0] != "torch"
    )
    models = [
        model,
        *(part for part in loss.modules() if isinstance(part, (*kind, PreTrainedModel)) and part is not loss),
    ]
    apart = {id(parameter) for each in models for parameter in each.parameters()}
    return [(name, p) for name, p in loss.named_parameters() if p.requires_grad and id(p) not in apart]


def _names(loss: Any, model: nn.Module, own: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Of each trained parameter by the method's name, the name it has in the loss, which sentence-transformers asks for."""
    whole = nn.ModuleDict(loss) if isinstance(loss, Mapping) else loss
    inside = {id(p): name for name, p in whole.named_parameters()} if isinstance(whole, nn.Module) else {}
    trained = {name: p for name, p in (*model.named_parameters(), *own.items()) if p.requires_grad}
    return {name: inside.get(id(p), name) for name, p in trained.items()}
