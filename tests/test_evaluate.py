"""The command ``evaluate``: what it evaluates, what it writes, and errors that say what to type."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from helpers import Classifier, Rows, fit, loader
from torch.utils.data import DataLoader

from lightning_noise import RobustnessMonitor, noise, report
from lightning_noise.cli.evaluate import main

ROOT = Path(__file__).parents[1]
# Lightning 2.6 calls what jsonargparse 4.53 deprecates
pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Trainer will use only 1 of"),
]


class Net(Classifier):
    """Has a test."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.width = width


class NoTest(Classifier):
    test_step: Any = pl.LightningModule.test_step


class Data(pl.LightningDataModule):
    def __init__(self, seed: int = 1):
        super().__init__()
        self.seed = seed

    def val_dataloader(self) -> DataLoader:
        return loader(Rows(13, seed=self.seed))

    def test_dataloader(self) -> DataLoader:
        return loader(Rows(17, seed=self.seed))


class Loaded(Net):
    """Brings its data."""

    def val_dataloader(self) -> DataLoader:
        return loader(Rows(5))


NOISES = {"noises": "lightning_noise.noise.Uniform", "levels": {"uniform": [0.5, 1.0]}}
MONITOR = {"class_path": "lightning_noise.RobustnessMonitor", "init_args": {**NOISES, "every_n_epochs": 3, "name": "mine"}}


@pytest.fixture(autouse=True)
def _loud_again():
    levels = {name: logging.getLogger(name).level for name in ("pytorch_lightning", "lightning_fabric")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "epoch=1-loss=0.5.ckpt"
    _, trainer = fit(max_epochs=1)
    trainer.save_checkpoint(path)
    return path


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """What a LightningCLI saves, as far as it matters; no training callback may act."""
    stopping = {"class_path": "pytorch_lightning.callbacks.EarlyStopping", "init_args": {"monitor": "nothing"}}
    training = {
        "class_path": "lightning_noise.InputNoise",
        "init_args": {"noise": "lightning_noise.noise.Gaussian", "level": 0.5},
    }
    return {
        "seed_everything": 1,
        "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 20, "callbacks": [stopping, training, MONITOR]},
        "model": {"class_path": "test_evaluate.Net", "init_args": {"width": 4}},
        "data": {"class_path": "test_evaluate.Data", "init_args": {"seed": 2}},
        "optimizer": None,
        "ckpt_path": None,
    }


def evaluate(config: Any, checkpoint: Path, folder: Path, *flags: str) -> report.Report:
    """The report of the command."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    main(["--config", str(folder / "config.yaml"), "--ckpt", str(checkpoint), "--output", str(folder / "new"), *flags])
    return report.read(next((folder / "new").rglob("report.json")))


def expected(module: pl.LightningModule, split: str, checkpoint: Path, monitor: RobustnessMonitor, **data: Any) -> Any:
    silent: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", devices=1, callbacks=[monitor], **silent)
    getattr(trainer, split)(module, **data, ckpt_path=str(checkpoint), verbose=False)
    return monitor.report


def test_the_report_is_that_of_a_test_with_the_monitor_alone(config, checkpoint, tmp_path, capsys):
    found = evaluate(config, checkpoint, tmp_path)
    monitor = RobustnessMonitor(noise.Uniform(), [0.5, 1.0])
    assert repr(found) == repr(expected(Net(), "test", checkpoint, monitor, datamodule=Data(seed=2)))
    assert found.n == 17
    printed = capsys.readouterr().out
    assert "Evaluated 17 samples of the test data.\n" in printed
    assert report.headline(found) in printed


@pytest.mark.slow
def test_the_default_is_the_default_monitor(config, checkpoint, tmp_path):
    config["trainer"]["callbacks"] = None
    assert evaluate(config, checkpoint, tmp_path) == expected(
        Net(), "test", checkpoint, RobustnessMonitor(), datamodule=Data(seed=2)
    )


@pytest.mark.slow
def test_options_change_the_monitor_the_module_and_the_trainer(config, checkpoint, tmp_path):
    flags = ["--noises=Gaussian", "--n_draws=2", "--data.seed=5", "--trainer.limit_test_batches=1", "--seed=3"]
    monitor = RobustnessMonitor(noise.Gaussian(), n_draws=2, seed=3, max_batches=1)
    found = evaluate(config, checkpoint, tmp_path, *flags)
    assert repr(found) == repr(expected(Net(), "test", checkpoint, monitor, datamodule=Data(seed=5)))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["NoTest", "Loaded"])
def test_without_a_test_the_validation_data_are_evaluated(model, config, checkpoint, tmp_path, capsys):
    config["model"] = {"class_path": f"test_evaluate.{model}"}
    data: dict[str, Any] = {"datamodule": Data(seed=2)}
    if model == "Loaded":
        config["data"], data = None, {}
    found = evaluate(config, checkpoint, tmp_path)
    monitor = RobustnessMonitor(noise.Uniform(), [0.5, 1.0])
    assert repr(found) == repr(expected(globals()[model](), "validate", checkpoint, monitor, **data))
    assert f"Evaluated {found.n} samples of the validation data, because" in capsys.readouterr().out


@pytest.mark.slow
def test_a_class_of_a_script_is_named_on_the_command_line(config, checkpoint, tmp_path):
    found = evaluate(config, checkpoint, tmp_path)
    config["model"]["class_path"] = "__main__.Net"
    config["data"] = config["data"]["init_args"]  # a CLI for fixed classes saves no classes
    (tmp_path / "again").mkdir()
    classes = ["--model=test_evaluate.Net", "--data=test_evaluate.Data"]
    assert repr(evaluate(config, checkpoint, tmp_path / "again", *classes)) == repr(found)


@pytest.mark.slow
def test_reports_lie_beside_the_checkpoint_and_are_never_overwritten(config, checkpoint, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for _ in range(2):
        main(["--config", str(tmp_path / "config.yaml"), "--ckpt", str(checkpoint)])
    folders = [checkpoint.with_name(f"epoch=1-loss=0.5-evaluation{suffix}") for suffix in ("", "-2")]
    first, second = (report.read(next(folder.rglob("report.json"))) for folder in folders)
    assert repr(first) == repr(second)
    assert all(list(folder.rglob("*.png")) for folder in folders)
    assert not list(checkpoint.parent.rglob("*.ckpt"))[1:]


@pytest.mark.parametrize(
    ("change", "flags", "said"),
    [
        ({"model": {"width": 4}}, [], "names no class to import for model; type --model my_project.my_module.MyModel\n"),
        (
            {"model": {"width": 4}, "data": {"seed": 2}},
            [],
            "for model and data; type --model my_project.my_module.MyModel --data my_project.my_module.MyData\n",
        ),
        ({"model": {"class_path": "__main__.Net"}}, [], "names no class to import for model"),
        (
            {"model": {"class_path": "nowhere.Net"}},
            [],
            "cannot import nowhere.Net: No module named 'nowhere'; run the command in",
        ),
        ({"model": {"class_path": "test_evaluate.Nut"}}, [], "cannot import test_evaluate.Nut: module 'test_evaluate' has no"),
        ({"model": {"class_path": "test_evaluate.Net", "init_args": {"wide": 1}}}, [], "Net: Option 'wide' is not accepted"),
        ({}, ["--levels=0.1"], "error: levels: expected Sequence[float], Mapping[str, Sequence[float]] or null; got 0.1"),
        ({}, ["--noises=gaussian"], "did you mean 'Gaussian'?"),
        ({}, ["--n_draws=0"], "error: n_draws must be at least 1, got 0"),
        ({}, ["--target=7"], "error: no leaf 7 in the batch; leaves are: "),
        ({}, ["--nosies=Gaussian"], "unrecognized arguments: --nosies=Gaussian; did you mean 'noises'?"),
        ({}, ["--ckpt=nothing.ckpt"], "error: no checkpoint at nothing.ckpt; type --ckpt "),
        (
            {"model": {"class_path": "test_evaluate.Loaded"}, "data": None},
            ["--model=test_evaluate.Other"],
            "test_evaluate.Other",
        ),
    ],
)
def test_errors_are_short_and_say_what_to_type(change, flags, said, config, checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate(config | change, checkpoint, tmp_path, *flags)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.startswith("error: ")
    assert len(printed.splitlines()) <= 3
    assert not list((tmp_path / "new").rglob("*"))  # so the same command can be given again


def test_a_checkpoint_of_another_module_is_an_error_of_a_few_lines(config, checkpoint, tmp_path, capsys):
    config["model"] = {"class_path": "helpers.Classifier", "init_args": {"features": 9}}
    with pytest.raises(SystemExit):
        evaluate(config, checkpoint, tmp_path)
    printed = capsys.readouterr().err
    assert "loading state_dict for Classifier" in printed
    assert "size mismatch for net.1.weight" in printed
    assert len(printed.splitlines()) < 6


class Foreign:
    """What a file from somebody else may hold."""

    def __reduce__(self) -> Any:
        return print, ("its code runs",)


def test_a_checkpoint_that_torch_does_not_trust_is_an_error_that_says_what_to_type(config, checkpoint, tmp_path, capsys):
    untrusted = tmp_path / "untrusted.ckpt"
    torch.save(torch.load(checkpoint) | {"more": Foreign()}, untrusted)
    with pytest.raises(SystemExit):
        evaluate(config, untrusted, tmp_path)
    captured = capsys.readouterr()
    assert "its code runs" not in captured.out
    assert "error: torch refuses the checkpoint" in captured.err
    assert "type TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 before the command" in captured.err


def test_a_folder_with_files_is_refused(config, checkpoint, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").touch()
    with pytest.raises(SystemExit):
        evaluate(config, checkpoint, tmp_path)
    assert "--output must be a new or an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--config=nothing.yaml", "--ckpt=x"], ["--help"]])
def test_the_command_explains_itself(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    printed = capsys.readouterr()
    if arguments == ["--help"]:
        assert stop.value.code == 0
        assert "--noises" in printed.out
    else:
        assert "type --config" in printed.err or "nothing.yaml" in printed.err


# --- real programs


def run(*command: object, folder: Path) -> str:
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    program = [sys.executable, "-W", "ignore", *map(str, command)]
    done = subprocess.run(program, cwd=folder, env=paths, capture_output=True, text=True, timeout=600, check=False)
    return done.stdout if done.returncode == 0 else f"{done.returncode}: {done.stderr}"


@pytest.mark.slow
def test_the_last_checkpoint_of_a_real_run_has_the_report_of_the_run(tmp_path: Path):
    (tmp_path / "digits.py").write_text((ROOT / "notebooks" / "configs" / "digits.py").read_text())
    noisy = ROOT / "notebooks" / "configs" / "noise.yaml"
    run("digits.py", "fit", "--config", noisy, "--trainer.max_epochs=1", folder=tmp_path)
    log = tmp_path / "lightning_logs" / "version_0"
    command = ["-m", "lightning_noise", "evaluate", "--config", log / "config.yaml", "--ckpt", next(log.rglob("*.ckpt"))]
    assert run(*command, folder=tmp_path).startswith("2: error: the configuration names no class to import for model and data")
    classes = ["--model=digits.DigitClassifier", "--data=digits.Digits"]
    for output in ("one", "two"):
        printed = run(*command, *classes, f"--output={output}", folder=tmp_path)
        assert "Evaluated 400 samples of the validation data" in printed
    one, two, of_run = (report.read(next(each.rglob("report.json"))) for each in (tmp_path / "one", tmp_path / "two", log))
    assert one == two == of_run
