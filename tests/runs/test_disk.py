"""The size of a run's folder at its largest, and runs that die while their best weights or their model are replaced."""

from __future__ import annotations

import os
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
def sizes(monkeypatch) -> list[tuple[str, int]]:
    """The size of the run's folder whenever a file is complete under a temporary name and has not yet replaced an earlier one,
    with the name of the file.
    """
    found: list[tuple[str, int]] = []
    replace, save = os.replace, folder.save_parts

    def note(path: Path) -> None:
        run = next((parent for parent in path.parents if parent.name == "run"), None)
        if run is not None:
            found.append((path.name, sum(file.stat().st_size for file in run.rglob("*") if file.is_file())))

    def replaced(source, target, **kwargs):
        note(Path(target))
        replace(source, target, **kwargs)

    def saved(path, *parts):
        save(path, *parts)
        note(path)

    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(folder, "save_parts", saved)
    return found


def test_a_run_takes_no_more_disk_than_its_weights_and_its_plan(tmp_path: Path, sizes) -> None:
    finetune("pico", "pico_sentiment", out=tmp_path / "run", **RUN)
    assert [name for name, _ in sizes].count(folder.BEST) > 1  # best weights that replace others
    assert TRAINED < max(size for _, size in sizes) <= 1.2 * TRAINED
    plan = set_up(FinetuneConfig("pico", "pico_sentiment", **RUN)).plan(FinetuneConfig("pico", "pico_sentiment", **RUN))
    assert plan["bytes on disk"] <= 1.2 * TRAINED


def test_the_plan_of_adapters_counts_the_files_that_are_larger_than_they(tmp_path: Path) -> None:
    out, settings = tmp_path / "run", RUN | {"adapter": "lora"}
    finetune("pico", "pico_sentiment", out=out, **settings)
    taken = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    config = FinetuneConfig("pico", "pico_sentiment", **settings)
    assert taken <= set_up(config).plan(config)["bytes on disk"] <= 1.5 * taken
    weights = (out / "model" / "adapter_model.safetensors").stat().st_size
    assert taken > 2 * weights


def test_whoever_can_read_the_folder_can_read_the_weights(tmp_path: Path) -> None:
    finetune("pico", "pico_sentiment", out=tmp_path / "run", **RUN)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "run" / "model").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"] == 0o666 & tmp_path.joinpath("run").stat().st_mode


def test_a_run_with_snapshots_keeps_one_beside_the_best_weights(tmp_path: Path, sizes) -> None:
    finetune("pico", "pico_sentiment", out=tmp_path / "run", snapshot_every=2, **RUN)
    assert sum(name.startswith("snapshot") for name, _ in sizes) == 4
    assert 1.9 * TRAINED < max(size for _, size in sizes) < 2.2 * TRAINED


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
