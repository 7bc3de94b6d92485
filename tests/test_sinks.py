"""Each kind of logger receives figures and texts by its own methods."""

from __future__ import annotations

import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from helpers import fit, make_trainer, red
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import Logger

from lightning_noise import AdaptiveLevel, InputNoise, RobustnessMonitor, noise
from lightning_noise.loop import loggers
from lightning_noise.loop.sinks import find_sink

# --- loggers and clients with the signatures of the real ones, which keep what they receive


class Fake(Logger):
    """A logger of numbers that writes no files, with what Lightning requires of a logger and no more."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self.figures: list[tuple[Any, ...]] = []
        self.texts: list[tuple[Any, ...]] = []

    @property
    def name(self) -> str:
        return "fake"

    @property
    def version(self) -> str:
        return "1"

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        for key, value in metrics.items():
            assert isinstance(value, float | int), "clients do not take tensors"
            self.metrics[key].append((-1 if step is None else step, value))


class Wandb(Fake):
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.figures.append((key, images, step))

    def log_table(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        raise NotImplementedError

    def log_text(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[str]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        assert dataframe is None
        self.texts.append((key, columns, data, step))


class MlflowClient:
    def __init__(self, logger: Fake):
        self.logger = logger

    def log_figure(self, run_id: str, figure: Any, artifact_file: str, *, save_kwargs: dict[str, Any] | None = None) -> None:
        self.logger.figures.append((run_id, figure, artifact_file))

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        self.logger.texts.append((run_id, text, artifact_file))


class MLFlow(Fake):
    run_id = "abc"

    @property
    def experiment(self) -> MlflowClient:
        return MlflowClient(self)


class CometExperiment:
    def __init__(self, logger: Fake):
        self.logger = logger

    def log_figure(
        self,
        figure_name: str | None = None,
        figure: Any = None,
        overwrite: bool = False,
        step: int | None = None,
        metadata: dict[str, Any] | None = None,
        format: str = "auto",
    ) -> None:
        self.logger.figures.append((figure_name, figure, step))

    def log_text(self, text: str, step: int | None = None, metadata: dict[str, Any] | None = None) -> None:
        self.logger.texts.append((text, step, metadata))


class Comet(Fake):
    @property
    def experiment(self) -> CometExperiment:
        return CometExperiment(self)


class File:
    """A file of Neptune."""

    @staticmethod
    def as_image(image: Any, autoscale: bool = True) -> Any:
        return image

    @staticmethod
    def from_content(content: str | bytes, *, extension: str | None = None) -> Any:
        return extension, content


class Handler:
    def __init__(self, logger: Fake, path: str):
        self.logger = logger
        self.path = path

    def upload(self, value: Any, *, wait: bool = False, **kwargs: Any) -> None:
        (self.logger.figures if isinstance(value, Figure) else self.logger.texts).append((self.path, value))


class NeptuneLogger(Fake):
    """Known by its name."""

    @property
    def experiment(self) -> Any:
        return self

    def __getitem__(self, path: str) -> Handler:
        return Handler(self, path)


FAKES = [Wandb, MLFlow, Comet, NeptuneLogger]


@pytest.fixture(autouse=True)
def neptune(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs a client of Neptune."""
    types: Any = ModuleType("neptune.types")
    types.File = File
    monkeypatch.setitem(sys.modules, "neptune", ModuleType("neptune"))
    monkeypatch.setitem(sys.modules, "neptune.types", types)


def signature(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("method", ["log_image", "log_table", "log_text"])
def test_the_fake_logger_of_images_has_the_methods_of_lightnings(method):
    assert signature(getattr(Wandb, method)) == signature(getattr(WandbLogger, method))


@pytest.mark.parametrize("real", [CometLogger, MLFlowLogger, WandbLogger])
def test_lightnings_loggers_have_what_their_kind_is_told_by(real):
    has = {name: hasattr(real, name) for name in ("log_image", "log_table", "run_id", "experiment")}
    is_wandb, is_mlflow = real is WandbLogger, real is MLFlowLogger
    assert has == {"log_image": is_wandb, "log_table": is_wandb, "run_id": is_mlflow, "experiment": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "real", "fake"),
    [
        ("mlflow.tracking", "MlflowClient", MlflowClient),
        ("comet_ml", "CometExperiment", CometExperiment),
        ("neptune.handler", "Handler", Handler),
        ("neptune.types", "File", File),
    ],
    ids=lambda value: value if isinstance(value, str) else "fake",
)
def test_the_fake_clients_have_the_methods_of_the_real_ones(module, real, fake, monkeypatch):
    for name in ("neptune", "neptune.types"):
        monkeypatch.delitem(sys.modules, name)
    client = getattr(pytest.importorskip(module), real)
    for name, method in inspect.getmembers(fake, inspect.isfunction):
        if not name.startswith("_"):
            assert signature(method) == signature(getattr(client, name)), name


# --- figures and texts


def test_weights_and_biases_receives_pixels_and_a_table_of_one_text():
    loggers.log_figure(make_trainer(logger=(logger := Wandb())), "a/b", red, step=7)
    loggers.log_text(make_trainer(logger=logger), "a/c", "**text**", step=8)
    ((key, (pixels,), step),) = logger.figures
    assert (key, step, pixels.dtype, pixels.shape) == ("a/b", 7, np.uint8, (20, 30, 3))
    assert (pixels == [255, 0, 0]).all()
    assert logger.texts == [("a/c", ["text"], [["**text**"]], 8)]


def test_mlflow_receives_files_whose_names_have_the_step():
    loggers.log_figure(make_trainer(logger=(logger := MLFlow())), "a/b", red, step=7)
    loggers.log_text(make_trainer(logger=logger), "a/c", "**text**", step=8)
    ((run_id, figure, file),) = logger.figures
    assert (run_id, file) == ("abc", "a/b-7.png")
    assert isinstance(figure, Figure)
    assert logger.texts == [("abc", "**text**", "a/c-8.md")]


def test_comet_receives_figures_and_texts_at_a_step():
    loggers.log_figure(make_trainer(logger=(logger := Comet())), "a/b", red, step=7)
    loggers.log_text(make_trainer(logger=logger), "a/c", "**text**", step=8)
    ((name, figure, step),) = logger.figures
    assert (name, step) == ("a/b", 7)
    assert isinstance(figure, Figure)
    assert logger.texts == [("**text**", 8, {"key": "a/c"})]


def test_neptune_receives_files_whose_paths_have_the_step():
    loggers.log_figure(make_trainer(logger=(logger := NeptuneLogger())), "a/b", red, step=7)
    loggers.log_text(make_trainer(logger=logger), "a/c", "**text**", step=8)
    ((path, figure),) = logger.figures
    assert path == "a/b-7"
    assert isinstance(figure, Figure)
    assert logger.texts == [("a/c-8", ("md", "**text**"))]


def test_each_of_several_loggers_receives_the_figure_in_its_own_way(tmp_path):
    all_of_them = [TensorBoardLogger(tmp_path / "events"), CSVLogger(tmp_path / "files"), *(fake() for fake in FAKES), Fake()]
    trainer = make_trainer(logger=all_of_them)
    loggers.log_figure(trainer, "a/b", red, step=7)
    loggers.log_text(trainer, "a/b", "text", step=7)
    for logger in all_of_them[2:-1]:
        assert len(logger.figures) == len(logger.texts) == 1
    assert [path.relative_to(all_of_them[1].log_dir) for path in tmp_path.rglob("*.png")] == [Path("a", "b-7.png")]
    assert find_sink(all_of_them[-1]) is find_sink(all_of_them[1]) is None


def test_a_logger_without_a_folder_has_files_if_it_is_the_first(tmp_path):
    trainer = make_trainer(logger=[Fake(), Fake()], default_root_dir=tmp_path)
    loggers.log_figure(trainer, "a", red, step=7)
    loggers.log_text(trainer, "a", "text", step=7)
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.png")] == [Path("fake", "1", "a-7.png")]


def test_a_run_logs_all_its_figures_and_texts_and_levels_to_each_logger(tmp_path):
    monitor = RobustnessMonitor(noise.Gaussian(), [0.1, 0.5])
    callbacks = [InputNoise(noise.Gaussian(), AdaptiveLevel(), inputs=0), monitor]
    fakes, files = {fake: fake() for fake in FAKES}, CSVLogger(tmp_path)
    fit(callbacks, logger=[files, *fakes.values()], max_epochs=2, log_every_n_steps=1)
    pictures = {path.relative_to(files.log_dir).with_suffix("").as_posix() for path in Path(files.log_dir).rglob("*.png")}
    assert {picture.rpartition("-")[0] for picture in pictures} >= {
        "robustness_figures/curve",
        "robustness_figures/reliability",
    }
    mlflow = fakes[MLFlow]
    assert {file.removesuffix(".png") for _, _, file in mlflow.figures} == pictures
    assert len({file for _, _, file in mlflow.texts}) == len(mlflow.texts), "no text replaces another"
    for logger in fakes.values():
        assert len(logger.figures) == len(mlflow.figures)
        assert len(logger.texts) == len(mlflow.texts)
        summary = [step for step, _ in logger.metrics["robustness/score"]]
        assert len(summary) == 2
        for level in (0.1, 0.5):
            assert [step for step, _ in logger.metrics[f"robustness_levels/gaussian/{level}/accuracy"]] == summary
        for key in logger.metrics:
            assert re.fullmatch(r"[a-zA-Z0-9_/. -]+", key), f"MLflow refuses {key}"
