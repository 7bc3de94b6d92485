"""What the README shows runs as it stands."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import pytorch_lightning as pl
from helpers import Classifier, Rows, loader

import lightning_noise

README = (Path(__file__).parents[1] / "README.md").read_text()


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(Rows(13, seed=1))


def test_the_examples_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    scheduled, tuned = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    project = ModuleType("my_project")
    project.MyModule, project.MyData = Classifier, Data  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_project", project)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(scheduled, names)
    trainer = names["trainer"]
    assert isinstance(trainer, pl.Trainer)
    assert trainer.current_epoch == 30
    assert "robustness/score" in trainer.callback_metrics
    assert list(tmp_path.rglob("*.ckpt"))
    exec(tuned, names)
    assert re.search(r"^input: waited 3 times, .*; from 0 to ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("family", ["noise", "rules", "schedules", "plots", "metrics", "testing"])
def test_the_names_that_it_mentions_exist(family):
    members = set(re.findall(rf"(?<![\w/]){family}\.(\w+)", README))
    assert members
    for member in members:
        assert hasattr(getattr(lightning_noise, family), member), f"{family}.{member}"


def test_the_pictures_and_files_that_it_mentions_exist():
    for name in re.findall(r"\]\(([^)]+)\)|`([\w/.]+\.(?:ipynb|toml|txt|md|yaml))`", README):
        assert Path(__file__).parents[1].joinpath(next(filter(None, name))).is_file(), name
