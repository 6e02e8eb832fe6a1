"""A zoo, a cache and a tuner for each test."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import transformers

from metazo.tuner.file import BlockSpec, Tuner, TunerInfo
from metazo.tuner.networks import PertNN
from metazo.zoo import address
from tests.zoo.server import Hub, Server, serving

SHAPES = [("embed.weight", (10, 4)), ("norm.weight", (4,))]


def make_tuner(base_model: str = "tiny", seed: int = 0, **info: object) -> Tuner:
    blocks = [BlockSpec(name, [(name, shape)]) for name, shape in SHAPES]
    return Tuner(PertNN(len(blocks), seed=seed), TunerInfo(base_model, blocks, **info))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """HF_HOME of the test; the user's own zoo is the default one in it."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("METAZO_ZOO", raising=False)
    return tmp_path / "hf" / "metazo"


HERE = ipaddress.ip_network("127.0.0.1/32")


@pytest.fixture
def loopback() -> Iterator[None]:
    """Downloads may go to 127.0.0.1, and to no other address of this machine."""
    address.ALLOWED.append(HERE)
    yield
    address.ALLOWED.remove(HERE)


@pytest.fixture
def hub(monkeypatch, tmp_path: Path) -> Iterator[type[Hub]]:
    """The server as the Hub of this process, with an empty cache."""
    handler = type("OwnHub", (Hub,), {"files": {}})
    server = Server(handler)
    constants = huggingface_hub.constants
    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    # transformers keeps one client, whose address is that of its first use in this process
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(server):
        yield handler
