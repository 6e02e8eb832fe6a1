"""Fine-tune language models, and any other torch module, with forward passes only.

Zeroth-order methods estimate a gradient from losses at perturbed weights: no backpropagation, no stored activations.

    import metazo

    tuned = metazo.finetune("pico", "pico_sentiment", optimizer="lozo", lr=1e-4, steps=500)
    tuned.summary["test"]                       # loss and accuracy on the test rows
    tuned.model                                 # the tuned torch module

    optimizer = metazo.MeZO(model.named_parameters(), lr=1e-6)     # or the optimizer alone, in a loop of your own
    loss = optimizer.step(lambda: loss_of(model, batch))

finetune      fine-tune a model on a task, or on a loss of your own
evaluate      loss and metrics of a model, or of a run's kept model
replay        rebuild a tuned model from its base model and its step log
meta_train    train a tuner, which chooses the perturbation scale of each block of weights, or fit feedback
compare       run several methods with searched learning rates and several seeds
load_model    a transformers model with its tokenizer, or a run's kept model
load_tuner    a tuner by file, zoo name, Hub id or address; load_feedback, the same for a feedback tuner
prepare       a task's rows, encoded for a model
UserError     raised for input that metazo cannot work with
MeZO, LOZO, HiZOO, ...    the methods: every class of metazo.optimizers

Names are imported when they are first used: `import metazo` by itself loads neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers take `X as X` for exported, and other names in the place of X for private
    from metazo import zoo
    from metazo.comparisons.compare import compare as compare
    from metazo.comparisons.grid import Grid as Grid
    from metazo.errors import UserError as UserError
    from metazo.meta.config import MetaConfig as MetaConfig
    from metazo.meta.feedback_config import FeedbackConfig as FeedbackConfig
    from metazo.meta.horizon_config import HorizonConfig as HorizonConfig
    from metazo.meta.train import meta_train as meta_train
    from metazo.models import assemble
    from metazo.optimizers.answer_column import AnswerColumn as AnswerColumn
    from metazo.optimizers.curvzo import CurvZO as CurvZO
    from metazo.optimizers.dominant_layer import DominantLayer as DominantLayer
    from metazo.optimizers.eggroll import EGGROLL as EGGROLL
    from metazo.optimizers.es import ES as ES
    from metazo.optimizers.feedback import Feedback as Feedback
    from metazo.optimizers.first_order import FirstOrderAdamW as FirstOrderAdamW
    from metazo.optimizers.first_order import FirstOrderSGD as FirstOrderSGD
    from metazo.optimizers.first_order_fused import FirstOrderFused as FirstOrderFused
    from metazo.optimizers.fzoo import FZOO as FZOO
    from metazo.optimizers.hizoo import HiZOO as HiZOO
    from metazo.optimizers.hizoo_l import HiZOOL as HiZOOL
    from metazo.optimizers.loren import LOREN as LOREN
    from metazo.optimizers.lozo import LOZO as LOZO
    from metazo.optimizers.lozo import LOZOM as LOZOM
    from metazo.optimizers.meazo import MEAZO as MEAZO
    from metazo.optimizers.mezo import MeZO as MeZO
    from metazo.optimizers.mezo import MeZOAdam as MeZOAdam
    from metazo.optimizers.mezo import MeZOMomentum as MeZOMomentum
    from metazo.optimizers.skip_feedback import SkipFeedback as SkipFeedback
    from metazo.optimizers.svrg import MeZOSVRG as MeZOSVRG
    from metazo.optimizers.zo_finetuner import ZOFinetuner as ZOFinetuner
    from metazo.optimizers.zo_muon import ZOMuon as ZOMuon
    from metazo.runs.call import finetune as finetune
    from metazo.runs.measure import evaluate as evaluate
    from metazo.runs.replay import replay as replay
    from metazo.tasks import Task as Task
    from metazo.tasks import prepare as prepare
    from metazo.zoo import load_feedback as load_feedback

    load_model, load_tuner = assemble.load, zoo.load

__version__ = "0.1.0"

_HOMES = {
    "Grid": "metazo.comparisons.grid",
    "FeedbackConfig": "metazo.meta.feedback_config",
    "HorizonConfig": "metazo.meta.horizon_config",
    "MetaConfig": "metazo.meta.config",
    "Task": "metazo.tasks",
    "UserError": "metazo.errors",
    "compare": "metazo.comparisons.compare",
    "evaluate": "metazo.runs.measure",
    "finetune": "metazo.runs.call",
    "load_feedback": "metazo.zoo",
    "load_model": "metazo.models.assemble",
    "load_tuner": "metazo.zoo",
    "meta_train": "metazo.meta.train",
    "prepare": "metazo.tasks",
    "replay": "metazo.runs.replay",
}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return [*_HOMES, "__version__", *_methods()]
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), "load" if name in ("load_model", "load_tuner") else name)
    if name[:1].isupper() and name in _methods():
        return getattr(import_module("metazo.optimizers"), name)
    if not name.startswith("_") and find_spec(f"metazo.{name}"):
        return import_module(f"metazo.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _methods() -> list[str]:
    """The names of the classes of the methods."""
    return sorted(cls.__name__ for cls in import_module("metazo.optimizers").METHODS.values())


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
