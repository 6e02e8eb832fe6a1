"""Settings of a run as dataclasses: documented field by field, read from YAML, checked, and overridden by flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from metazo.errors import UserError
from metazo.io.redact import has_secret, shown_address
from metazo.models.wanted import ALPHA, RANK, Adapter
from metazo.settings import Unset, check_number, check_values, setting, with_role

FIRST_ORDER = ("first-order-sgd", "first-order-adamw")
MOST_FIRST_ORDER = 1e30  # a larger learning rate overflows in torch's own optimizers
AUTO = "auto"  # in the place of a method
Precision = Literal["auto", "in-place", "master", "compensated-16", "compensated-8", "autocast"]


@dataclass
class FinetuneConfig:
    """Everything that decides a fine-tuning run.

    The role of each setting says what a change of it affects: the model, the data, the method, the loop, or the numbers of
    an evaluation. Other roles affect no number: the place (paths), the machine, the service (how often files are saved).
    """

    model: str = setting(role="model", hashed=True)
    """Folder or Hub id of the model; pico is the small one that metazo carries"""
    task: str = setting(role="data", hashed=True)
    """Task by name (metazo tasks lists them), or a YAML file of your own"""
    out: Path | None = setting(default=None, role="place")
    """Folder for config, log, metrics, plot and the tuned model"""
    optimizer: str = setting(default="mezo", role="method")
    """Method; auto chooses one by objective, head, memory and model"""
    lr: float | None = setting(default=None, least=0, role="method")
    """Learning rate; by default the method's published one, which was chosen for models of billions of weights"""
    objective: str | None = setting(default=None, role="data")
    """What is minimised in place of the task's loss: 1 - a metric (accuracy, f1, exact-match, ...), or a function of your
    own as module.py:function; for methods that need no gradient"""
    eps: float = setting(default=1e-3, above=0, role="method")
    """Length of a probe: the factor of the perturbation"""
    steps: int | None = setting(default=None, least=1, role="loop")
    """Number of steps; by default 1000, or as many as `forwards` allows"""
    forwards: int | None = setting(default=None, least=1, role="loop")
    """Budget of forward passes over batches, instead of `steps`"""
    epochs: float | None = setting(default=None, above=0, most=1e6, role="loop")
    """Number of passes over the training examples, instead of `steps`"""
    patience: int | None = setting(default=None, least=1, role="loop")
    """Early stopping: number of evaluations in a row without a lower loss on dev after which the run ends; by default never"""
    batch_size: int = setting(default=16, least=1, role="data")
    """Examples per batch"""
    batches: Literal["by-length"] | None = setting(default=None, role="data")
    """Choice of a batch's examples: by-length takes inputs of similar length, which saves padding; by default at random"""
    accumulate: int = setting(default=1, least=1, role="loop")
    """Batches per step, whose losses are averaged for the same probes"""
    schedule: Literal["constant", "linear", "cosine"] = setting(default="constant", role="method")
    """Schedule of the learning rate after warmup"""
    warmup: float | None = setting(default=None, least=0, most=1e9, role="method")
    """Steps over which the learning rate rises to its value (below 1: a fraction of the run)"""
    weight_decay: float = setting(default=0.0, least=0, role="method")
    """Decoupled weight decay; biases and layer norms are exempt by name"""
    noise: Literal["method", "gaussian", "rademacher"] = setting(default="method", role="method")
    """Distribution of the noise; method takes the method's own (Gaussian, except for fzoo)"""
    probing: Literal["method", "in-turn", "together", "auto"] = setting(default="method", role="method")
    """Evaluation of a step's probes: one after the other, or, for low-rank directions, together in one batched pass; auto
    takes together for small batches"""
    scale: Literal["none", "rms"] = setting(default="none", role="method")
    """Block scale; rms perturbs each tensor in proportion to the root mean square of its weights"""
    statistics_every: int | None = setting(default=None, least=1, role="method")
    """Steps between readings of the weights' statistics for a block scale; by default 50, or 1 for a trained tuner
    of the published features"""
    rule: Literal["method", "sgd", "momentum", "adam", "meazo"] = setting(default="method", role="method")
    """Update rule for the estimate; method takes the method's own"""
    tuner: str | None = setting(default=None, role="method", hashed=True)
    """Tuner: folder, file, zoo name, Hub id, https address, auto, or random:SEED (the control)"""
    allow_partial: bool = setting(default=False, role="method")
    """Accept a tuner that fits only some blocks; the other blocks get the RMS scale"""
    zoo: Path | None = setting(default=None, role="place")
    """Folder of your own zoo, which is searched first"""
    method: dict[str, Any] = setting(default_factory=dict, role="method")
    """Hyperparameters of the method by name; on the command line each is a flag"""
    data: Path | None = setting(default=None, role="place")
    """Folder with <task>/<split>.jsonl; by default the Hub"""
    train_examples: int = setting(default=Unset(1000), least=1, role="data")
    """Number of training examples"""
    dev_examples: int = setting(default=Unset(500), least=0, role="data")
    """Number of examples for choosing the checkpoint"""
    test_examples: int = setting(default=Unset(1000), least=0, role="data")
    """Number of examples for the final test"""
    k_per_class: int | None = setting(default=None, least=1, role="data")
    """Few-shot: number of training examples per class, in place of `train_examples`; unless the number of dev examples is
    given, or the task has its own dev rows, there are as many of them, drawn without regard to the class"""
    max_length: int | None = setting(default=None, least=1, role="data")
    """Longest input in tokens; by default the model's context"""
    kind: Literal["auto", "causal", "masked", "classifier", "seq2seq"] = setting(default="auto", role="model")
    """Kind of model; auto follows its architecture"""
    head: Literal["auto", "checkpoint", "linear", "prototype", "phrases"] = setting(default="auto", role="model")
    """Head of a classifier: that of transformers' own class (checkpoint), or on pooled hidden states a linear layer, fixed
    prototypes from labelled examples, or the task's label phrases; auto takes linear for sentence-transformers checkpoints"""
    train: list[str] = setting(default_factory=list, role="model")
    """Patterns of names of tensors to train (all others are frozen), such as '*attn*'"""
    freeze: list[str] = setting(default_factory=list, role="model")
    """Patterns of names of tensors to freeze"""
    lora: int = setting(default=0, least=0, most=4096, role="model")
    """Rank of LoRA adapters that are trained instead of the weights, short for `adapter` lora and `adapter_rank`"""
    quantize: Literal["int8", "int4", "nf4"] | None = setting(default=None, role="model")
    """Quantise the linear layers of the base model when it is loaded (needs the extra quant), and train adapters in full
    precision: int8 and int4 by torchao, nf4 by bitsandbytes"""
    revision: str | None = setting(default=None, role="model")
    """Branch, tag or commit of a model on the Hub; by default main"""
    attn_implementation: str | None = setting(default=None, role="model")
    """Attention of transformers: eager, sdpa, flash_attention_2, ...; by default the model's own"""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = setting(
        default=None, role="machine"
    )
    """Distribute the model over the GPUs by accelerate, instead of `device`"""
    adapter: Literal["lora", "dora", "ia3", "prefix", "prompt", "continue"] | None = setting(default=None, role="model")
    """Adapters that are trained instead of the weights (needs the extra peft); continue trains those that the model is"""
    adapter_rank: int | None = setting(default=None, least=1, most=4096, role="model")
    """Rank of lora and dora, number of virtual tokens of prefix and prompt; by default 8"""
    adapter_alpha: float | None = setting(default=None, above=0, role="model")
    """Factor of lora and dora, which are multiplied by alpha / rank; by default 16"""
    adapter_targets: list[str] | None = setting(default=None, role="model")
    """Names of the layers that get adapters, such as q_proj; by default those that peft names for the architecture"""
    merge: bool = setting(default=False, role="service")
    """Save a plain model with the adapters added to its weights, instead of the adapters alone"""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = setting(default="float32", role="model")
    """Data type of the weights in the forward pass"""
    precision: Precision = setting(default="auto", role="method")
    """Storage of the weights during a probe: auto perturbs float32 in place, and for narrower weights takes the most exact of
    master (a float32 copy), compensated-16 and compensated-8 (16 or 8 bits beside each weight) that the free memory allows;
    autocast runs float32 weights in bfloat16"""
    device: str = setting(default="auto", role="machine")
    """Device: cpu, cuda, cuda:1, or another of torch that has float64, unlike mps; auto takes a GPU if there is one"""
    probe_ranks: int = setting(default=1, least=1, role="machine")
    """Under torchrun, the number of processes that divide the probes of a step; the others divide its examples"""
    tensor_parallel: int = setting(default=1, least=1, role="machine")
    """Under torchrun, the number of processes that divide every matrix product, so that no device holds the whole model"""
    fsdp: int = setting(default=1, least=1, role="machine")
    """Under torchrun, the number of processes, or of groups of `tensor_parallel` processes, that divide the weights
    (fully_shard); each has its own examples"""
    rank_timeout: float = setting(default=1800.0, above=0, most=1e6, role="machine")
    """Under torchrun, seconds without an answer after which another process counts as lost"""
    eval_every: int | None = setting(default=None, least=1, role="loop")
    """Steps between evaluations on dev; by default a tenth of the run"""
    eval_batch_size: int = setting(default=32, least=1, role="evaluation")
    """Examples per batch in evaluation"""
    keep: Literal["best", "last", "none"] = setting(default="best", role="loop")
    """Weights to save and test: the best on dev, as in the papers, the last, or none (the last are tested)"""
    snapshot_every: int | None = setting(default=None, least=0, role="service")
    """Steps between snapshots for `resume` (0: none; resuming replays the log from the base model); by default 500 for methods
    whose steps cannot be replayed, and none for all others"""
    flush_every: int = setting(default=1, least=1, role="service")
    """Steps between writes of the step log to the operating system; a killed run computes later steps again"""
    fsync_every: int = setting(default=100, least=0, role="service")
    """Steps between syncs of the step log to the disk, against power loss (0: only at evaluations and snapshots)"""
    track: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] | None = setting(default=None, role="service")
    """Trackers that get losses, rates and evaluations, through accelerate (needs the extra track); TensorBoard's files are in
    `out`/trackers, and W&B's as well"""
    push: str | None = setting(default=None, role="service")
    """Repository of the Hub, OWNER/NAME, to which the tuned model is uploaded with its card at the end"""
    max_loss: float = setting(default=1e4, above=0, role="loop")
    """Loss above which a step is skipped, as if it were not finite"""
    max_bad_steps: int = setting(default=10, least=1, role="limit")
    """Number of skipped steps in a row after which the run stops"""
    seed: int = setting(default=0, least=0, most=2**63 - 1, role="data")
    """Seed of noise, data order, split and a new head"""
    split_seed: int | None = setting(default=None, least=0, most=2**63 - 1, role="data")
    """Seed of the split into train, dev and test rows; by default `seed`"""
    resume: bool = setting(default=False, role="place")
    """Continue the run in `out`, whose settings are read from there"""

    def __post_init__(self):
        check_values(self)
        if self.optimizer in FIRST_ORDER and self.lr is not None:
            check_number("lr", self.lr, most=MOST_FIRST_ORDER)
        lengths = [name for name in ("steps", "forwards", "epochs") if getattr(self, name) is not None]
        if len(lengths) > 1:
            raise UserError(
                f"{' and '.join(f'`{name}`' for name in lengths)} set the length of the run; give one of them."
            )
        if self.push is not None and (self.keep == "none" or self.out is None):
            raise UserError(
                "`push` uploads the saved model: it needs `out`, and cannot be combined with `keep='none'`."
            )
        if self.track and self.out is None:
            raise UserError(
                f"`track` {', '.join(self.track)} keeps its files in `out`, which is not given; give a folder."
            )
        if self.patience is not None and self.dev_examples == 0:
            raise UserError("`patience` counts evaluations on dev and `dev_examples` is 0; leave one of them out.")
        if self.keep == "best" and self.dev_examples == 0:
            raise UserError("`keep='best'` chooses on dev examples and `dev_examples` is 0; use `keep='last'`.")
        self._check_adapters()
        self.method = {key: tuple(value) if isinstance(value, list) else value for key, value in self.method.items()}
        if self.tuner is not None and has_secret(self.tuner):
            raise UserError(
                f"`tuner` {shown_address(self.tuner)} has a user, password or query, which may be secrets and would be written "
                "into the run's folder; get it with metazo zoo pull, and name it as it is called there."
            )
        if self.tuner is not None and self.scale != "none":
            raise UserError("`tuner` and `scale` both set the block scales; give one of them.")

    @property
    def adapters(self) -> Adapter | None:
        """The adapters that are trained instead of the weights."""
        kind = "lora" if self.lora else self.adapter
        if kind is None:
            return None
        rank, alpha = self.lora or self.adapter_rank or RANK, self.adapter_alpha or ALPHA
        return Adapter(kind, rank, alpha, tuple(self.adapter_targets or ()))

    def _check_adapters(self) -> None:
        given = [name for name in ("adapter", "adapter_rank") if getattr(self, name) is not None]
        if self.lora and given:
            raise UserError(
                f"`lora` is short for `adapter='lora'` with its rank, so `{given[0]}` cannot be given as well."
            )
        kind = "lora" if self.lora else self.adapter
        unused = {
            "adapter_rank": ("lora", "dora", "prefix", "prompt"),
            "adapter_alpha": ("lora", "dora"),
            "adapter_targets": ("lora", "dora", "ia3"),
        }
        for name, kinds in unused.items():
            if getattr(self, name) is not None and kind not in kinds:
                raise UserError(f"`{name}` is of adapters {', '.join(kinds)}, and `adapter` is {kind or 'not given'}.")
        if self.merge and kind in ("prefix", "prompt"):
            raise UserError(f"`merge` adds adapters to weights, and `adapter` {kind} is virtual tokens; leave it out.")


INCIDENTAL = with_role(FinetuneConfig, "place", "machine", "service", "limit")
"""Settings of places, saving and giving up, which do not affect the steps: a run may be resumed with other values."""
