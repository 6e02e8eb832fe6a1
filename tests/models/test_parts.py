"""What is read of a model whose weights may be divided: of a plain one, its own parameters."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from metazo.io.tensorfile import weights_hash
from metazo.models.parts import divided, hash_of, held_bytes, whole


def test_a_plain_model_is_read_as_it_is():
    model = nn.Linear(3, 2)
    assert not divided(model) and held_bytes(model) == 4 * 8
    assert all(values is model.get_parameter(name) for name, values in whole(model))
    assert hash_of(model) == weights_hash(model.named_parameters())


def test_the_hash_of_a_quantised_parameter_is_that_of_its_form_on_disk():
    """Which the loader keeps beside it, because the form in memory has no fixed bytes (metazo/models/quantize.py)."""
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    models[1].load_state_dict(models[0].state_dict())
    assert hash_of(models[0]) == hash_of(models[1])
    models[1].weight.quant_state = SimpleNamespace(stored_sha256="of the file")
    assert hash_of(models[0]) != (kept := hash_of(models[1]))
    with torch.no_grad():
        models[1].weight.mul_(2)
    assert hash_of(models[1]) == kept
