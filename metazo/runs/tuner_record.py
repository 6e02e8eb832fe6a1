"""What the header of a log says of the run's tuner: the hash of its networks, and their use, or the hashes of feedback maps."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

import torch

from metazo.feedback.surrogates import MeanJacobian
from metazo.feedback.tuner import FeedbackTuner
from metazo.io.tensorfile import weights_hash
from metazo.optimizers.registry import Method
from metazo.tuner.file import Tuner

USE = ("by", "features", "parametrisation", "bound", "normalise")
"""How a tuner's networks are used: attributes of a TunerScale, and of a TunerInfo."""


def tuner_hash(optimizer: Method) -> str | None:
    """The hash of the networks that choose the block scales, or of the feedback maps, if there are any."""
    networks, maps = getattr(optimizer.scale, "pertnn", None), getattr(optimizer, "jacobian", None)
    if maps is not None:
        return _maps_hash(maps)
    return None if networks is None else weights_hash(networks.named_parameters())


def trust_hash(optimizer: Method) -> str | None:
    """The hash of the trust in each of the feedback maps, if there are any."""
    maps = getattr(optimizer, "jacobian", None)
    return None if maps is None else _trust_hash(maps)


def _maps_hash(maps: MeanJacobian) -> str:
    """The hash of feedback maps. That of their trust is apart, so that runs and comparisons of earlier versions, which do not
    have it, go on."""
    kinds = (("down", maps.down), ("up", maps.up))
    return weights_hash((f"{kind}/{index}", value) for kind, held in kinds for index, value in sorted(held.items()))


def _trust_hash(maps: MeanJacobian) -> str:
    return weights_hash((str(index), torch.tensor(float(value))) for index, value in sorted(maps.trust.items()))


def began_with(header: dict[str, Any], tuner: Tuner | FeedbackTuner) -> bool:
    """Whether a tuner is the one of the run with this header: the hash of its networks and their use, or the hashes of its
    maps and their trust, as far as the header has them."""
    if isinstance(tuner, FeedbackTuner):
        return header.get("tuner") == _maps_hash(tuner.maps) and header.get("trust") in (None, _trust_hash(tuner.maps))
    use = header.get("networks")
    same = not isinstance(use, dict) or all(use.get(name) in (None, getattr(tuner.info, name)) for name in USE)
    return same and header.get("tuner") == weights_hash(tuner.pertnn.named_parameters())


def networks_record(optimizer: Method) -> dict[str, Any] | None:
    """How the networks that choose the block scales are used, and a hash of the blocks that they belong to, if there are any.
    As the trust, it is apart from the hash of the networks."""
    scale: Any = optimizer.scale
    if getattr(scale, "pertnn", None) is None:
        return None
    names = json.dumps(None if scale.networks is None else list(scale.networks))
    blocks = f"sha256:{sha256(names.encode()).hexdigest()}"
    return {name: getattr(scale, name) for name in USE} | {
        "embedding_rows": scale.embedding_rows,
        "list of blocks": blocks,
    }
