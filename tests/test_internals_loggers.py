"""The private names of Lightning's loggers do what the package needs, in the installed releases."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import pytorch_lightning as pl
from helpers import Classifier, loader, make_trainer
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from lightning_noise.loop import internals


class Saves(Classifier):
    def __init__(self, lr: float = 0.1):
        super().__init__(lr)
        self.save_hyperparameters()


class Data(pl.LightningDataModule):
    def __init__(self, size: int = 8, saves: bool = True):
        super().__init__()
        self.save_hyperparameters(logger=saves)

    def train_dataloader(self) -> Any:
        return loader()

    val_dataloader = train_dataloader


class Recorder(CSVLogger):
    """Keeps the hyperparameters that Lightning logs."""

    logged: dict[str, Any] | None = None

    def log_hyperparams(self, params: Any = None) -> None:
        self.logged = dict(params)


class Watch(pl.Callback):
    seen: dict[str, Any]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen = internals.automatic_hyperparameters(trainer)
        assert trainer.logger.logged is None, "Lightning logs its own later"  # type: ignore[union-attr]


HAS_SWITCH = "enable_autolog_hparams" in inspect.signature(pl.Trainer).parameters  # since Lightning 2.6


@pytest.mark.parametrize("autolog", [True, False] if HAS_SWITCH else [True])
@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("module", [Classifier, Saves])
def test_the_hyperparameters_that_lightning_will_log_are_known(module, saves, autolog, tmp_path):
    logger, watch, settings = Recorder(tmp_path), Watch(), {} if autolog else {"enable_autolog_hparams": False}
    trainer = make_trainer([watch], logger=logger, max_epochs=1, limit_val_batches=0, **settings)
    trainer.fit(module(), datamodule=Data(saves=saves))
    assert watch.seen == (logger.logged or {})
    assert bool(watch.seen) is (autolog and (saves or module is Saves))


def test_loggers_of_tensorboard_and_their_default_metric_are_known(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, str(default), default_hp_metric=default) for default in (True, False)]
    trainer = make_trainer(logger=[CSVLogger(tmp_path), *loggers])
    assert internals.tensorboard_loggers(trainer) == loggers
    for logger, tags in zip(loggers, (["loss", "hp_metric"], ["loss"]), strict=True):
        logger.log_metrics({"loss": 1.0}, step=0)
        logger.log_hyperparams({"lr": 0.1})
        logger.finalize("success")
        assert EventAccumulator(logger.log_dir).Reload().Tags()["scalars"] == tags
        assert internals.writes_default_metric(logger) is ("hp_metric" in tags)


@pytest.mark.parametrize("metrics", [["score"], [], None])
def test_hyperparameters_are_written_without_a_value_of_a_metric(metrics, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    values = {"lr": 0.1, "net": {"depth": 3}, "act": len, "none": None}
    internals.write_hyperparameters(logger, values, metrics)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    content = events.PluginTagToContent(metadata.PLUGIN_NAME)
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    assert {*start.hparams} == {"lr", "net/depth", "act", "none"}
    assert (metadata.EXPERIMENT_TAG in content) is (metrics is not None)
    assert events.Tags()["scalars"] == []
