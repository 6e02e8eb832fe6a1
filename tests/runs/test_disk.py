"""The size of a run's folder at its largest, and runs that die while their best weights or their model are replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from metazo import finetune
from metazo.runs import folder
from metazo.runs.config import FinetuneConfig
from metazo.runs.setup import set_up
from metazo.steplog.format import scan

RUN = {
    "batch_size": 4, "steps": 8, "train_examples": 32, "dev_examples": 8, "test_examples": 4, "eval_every": 1, "lr": 3e-5,
    "max_length": 40,
}  # fmt: skip
TRAINED = 4 * 1_568_160


class Death(BaseException):
    pass


@pytest.fixture
def largest(monkeypatch):
    """The largest size of each run's folder: it is measured whenever tensors or a model were written, under any name."""
    sizes: list[int] = []

    def measured(write):
        def then(path, *args, **kwargs):
            write(path, *args, **kwargs)
            run = next(parent for parent in path.parents if parent.name == "run")
            sizes.append(sum(file.stat().st_size for file in run.rglob("*") if file.is_file()))

        return then

    monkeypatch.setattr(folder, "write_tensors", measured(folder.write_tensors))
    monkeypatch.setattr(folder, "save_parts", measured(folder.save_parts))
    return sizes


def test_a_run_takes_no_more_disk_than_its_weights_and_its_plan(tmp_path: Path, largest) -> None:
    finetune("pico", "pico_sentiment", out=tmp_path / "run", **RUN)
    assert len(largest) > 3  # several best weights, and the model
    assert max(largest) <= 1.2 * TRAINED
    plan = set_up(FinetuneConfig("pico", "pico_sentiment", **RUN)).plan(FinetuneConfig("pico", "pico_sentiment", **RUN))
    assert plan["bytes on disk"] <= 1.2 * TRAINED


def test_a_snapshot_is_one_and_first_order_keeps_what_it_needs(tmp_path: Path, largest) -> None:
    finetune("pico", "pico_sentiment", out=tmp_path / "run", snapshot_every=2, **RUN)
    assert 1.9 * TRAINED < max(largest) < 2.2 * TRAINED  # the best weights and a snapshot


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "run"
    finetune("pico", "pico_sentiment", out=out, **RUN)
    return kept(out)


def kept(out: Path) -> dict[str, bytes]:
    end = scan(out / "steps.jsonl").end
    assert end is not None
    model = (out / "model" / "model.safetensors").read_bytes()
    return {"model": model, "end": repr((end["kept"], end["weights"])).encode()}


@pytest.mark.parametrize("where", ["after the best weights were removed", "after all was removed", "in the model"])
def test_a_death_while_files_are_replaced_costs_time_alone(tmp_path: Path, whole, monkeypatch, where: str) -> None:
    def dies(*args, **kwargs):
        raise Death

    with monkeypatch.context() as patched:
        if where == "after the best weights were removed":
            count, save = [0], folder.RunFolder.save_tensors

            def second(self, name, *args):
                count[0] += name == folder.BEST
                if count[0] == 3:
                    raise Death
                save(self, name, *args)

            patched.setattr(folder.RunFolder, "save_tensors", second)
        elif where == "after all was removed":
            patched.setattr(folder.RunFolder, "save_model", dies)
        else:
            patched.setattr(folder, "save_parts", dies)
        with pytest.raises(Death):
            finetune("pico", "pico_sentiment", out=tmp_path / "run", **RUN)
    assert not (tmp_path / "run" / folder.BEST).exists()
    finetune("pico", "pico_sentiment", out=tmp_path / "run", resume=True, **RUN)
    assert kept(tmp_path / "run") == whole
