"""Figures, texts and layouts arrive in TensorBoard, in a logger of images, or in a file."""

from __future__ import annotations

import csv
import io
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
import pytest
import pytorch_lightning as pl
from helpers import Album, Classifier, fit, layouts, make_trainer, red
from matplotlib.figure import Figure
from matplotlib.image import imread
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_noise import AdaptiveLevel, InputNoise, ReplayMonitor, RobustnessMonitor, noise
from lightning_noise.loop import loggers


class Charted(pl.Callback):
    """A callback with charts. If it is late, it learns its tags in the second validation."""

    evaluates_in_fit = True

    def __init__(self, name: str, late: bool = False):
        self.name = name
        self.validations_to_wait = 2 if late else 1
        self.answers: list[bool] = []

    def charts(self) -> dict[str, loggers.Chart]:
        known = len(self.answers) + 1 >= self.validations_to_wait
        return {self.name: ("Multiline", [f"{self.name}/.*"]), f"{self.name} band": loggers.band("x", "y")} if known else {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if True not in self.answers:
            self.answers.append(loggers.log_layout(trainer, self))


CALLS = {
    "figure": lambda trainer: loggers.log_figure(trainer, "a", red, step=0),
    "text": lambda trainer: loggers.log_text(trainer, "a", "text"),
}


# --- figures


def test_every_logger_that_takes_figures_receives_the_figure(tmp_path):
    tensorboard, album = TensorBoardLogger(tmp_path / "one"), Album(tmp_path / "two")
    loggers.log_figure(make_trainer(logger=[tensorboard, album]), "a/b", red, step=7)
    tensorboard.finalize("success")
    event = EventAccumulator(tensorboard.log_dir).Reload().Images("a/b")[0]
    assert (event.step, event.width, event.height) == (7, 30, 20)
    (page,) = album.pages
    assert (page[0], page[2]) == ("a/b", 7)
    assert page[1][0].dtype == np.uint8
    assert page[1][0].shape == (20, 30, 3)
    assert (page[1][0] == [255, 0, 0]).all()
    assert not list(tmp_path.rglob("*.png"))


def test_a_figure_that_no_logger_takes_is_written_to_a_file(tmp_path):
    logger = CSVLogger(tmp_path)
    loggers.log_figure(make_trainer(logger=logger), "robustness_figures/curve", red, step=7)
    image = imread(Path(logger.log_dir) / "robustness_figures" / "curve-7.png")
    assert image.shape[:2] == (20, 30)
    assert (image[..., :3] == [1, 0, 0]).all()


@pytest.mark.parametrize("logger", [False, DummyLogger()], ids=["none", "dummy"])
def test_without_a_logger_nothing_is_written(logger, tmp_path):
    trainer = make_trainer([charted := Charted("c")], logger=logger, default_root_dir=tmp_path)
    for log in CALLS.values():
        log(trainer)
    assert loggers.log_layout(trainer, charted)
    assert loggers.takes_figures(trainer) is bool(logger)
    assert not list(tmp_path.iterdir())


def test_other_ranks_log_nothing_and_wait_for_nobody(tmp_path, monkeypatch):
    trainer = make_trainer(logger=[CSVLogger(tmp_path), album := Album(tmp_path)])
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    assert not loggers.takes_figures(trainer)
    for log in CALLS.values():
        log(trainer)
    assert album.pages == []
    assert not list(tmp_path.iterdir())


def test_the_rank_that_logs_waits_for_nobody_either(tmp_path, monkeypatch):
    trainer = make_trainer(logger=CSVLogger(tmp_path))
    monkeypatch.setattr(trainer.strategy, "broadcast", pytest.fail)
    loggers.log_figure(trainer, "a", red, step=0)
    assert list(tmp_path.rglob("a-0.png"))


class Broken(TensorBoardLogger):
    """A logger that has lost its connection."""

    @property
    def experiment(self) -> Any:
        raise ConnectionError("no route to host")


@pytest.mark.parametrize("what", CALLS)
def test_a_logger_that_fails_warns_and_the_next_one_logs(what, tmp_path):
    working = TensorBoardLogger(tmp_path / "working")
    trainer = make_trainer(logger=[Broken(tmp_path / "broken"), working])
    with pytest.warns(UserWarning, match=f"could not log the {what} 'a': ConnectionError: no route to host"):
        CALLS[what](trainer)
    working.finalize("success")
    tags = EventAccumulator(working.log_dir).Reload().Tags()
    assert sum(map(bool, (tags["images"], tags["tensors"]))) == 1


def test_a_folder_that_cannot_be_written_warns(tmp_path):
    logger = CSVLogger(tmp_path)
    tmp_path.joinpath("lightning_logs").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="could not log the figure 'a': "):
        loggers.log_figure(make_trainer(logger=logger), "a", red, step=0)


def test_a_figure_that_cannot_be_drawn_warns_and_none_is_no_figure(tmp_path):
    trainer = make_trainer(logger=CSVLogger(tmp_path))
    with pytest.warns(UserWarning, match="could not log the figure 'a': ZeroDivisionError"):
        loggers.log_figure(trainer, "a", lambda: Figure(figsize=(1 / 0, 1)), step=0)
    loggers.log_figure(trainer, "a", lambda: Figure(figsize=(1 / 0, 1)), step=1)  # and does not warn again
    loggers.log_figure(trainer, "a", lambda: None, step=0)
    assert not list(tmp_path.rglob("*.png"))


class Failing(TensorBoardLogger):
    """A logger whose writer takes numbers and nothing else."""

    @property
    def experiment(self) -> Any:
        writer = super().experiment
        for method in ("add_figure", "add_text", "add_custom_scalars"):
            setattr(writer, method, self._fail)
        return writer

    def _fail(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("quota exceeded")


class Shy:
    """A class of the user without a representation."""

    def __call__(self, module: Any, batch: Any) -> Any:
        return module(batch[0])

    def __repr__(self) -> str:
        raise AttributeError("not yet fitted")


def in_the_way(folder: Path) -> None:
    (folder / "robustness").write_text("a file where the folder should be")


def full_disk(folder: Path) -> None:
    (folder / "robustness").mkdir()
    for name in ("report.json", "report.md"):
        (folder / "robustness" / name).symlink_to("/dev/full")


def read_only(folder: Path) -> None:
    (folder / "robustness" / "report.json").mkdir(parents=True)  # a folder of that name; the superuser may write anywhere


class Last(pl.Callback):
    ended = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ended = True


@pytest.mark.filterwarnings("ignore:could not log the figure")  # whose folder is the same
@pytest.mark.parametrize("spoil", [in_the_way, full_disk, read_only], ids=lambda spoil: spoil.__name__)
def test_a_report_that_cannot_be_written_warns_and_later_hooks_are_called(spoil, tmp_path):
    logger, last = CSVLogger(tmp_path, "logs", "run"), Last()
    assert logger.experiment  # makes the folder
    spoil(Path(logger.log_dir))
    monitor = RobustnessMonitor(noise.Gaussian(), [0.1])
    with pytest.warns(UserWarning, match="could not log the report: "):
        fit([monitor, last], logger=logger, max_epochs=1)
    assert last.ended
    assert monitor.report is not None


def test_a_fit_goes_on_if_its_logger_and_every_figure_fail(tmp_path, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no figure")

    for name in ("samples", "robustness_curve", "adaptation"):
        monkeypatch.setattr(f"lightning_noise.plots.{name}", fail)
    monitor, last = RobustnessMonitor(noise.Gaussian(), [0.1], predict=Shy()), Last()
    callbacks = [InputNoise(noise.Gaussian(), AdaptiveLevel(), inputs=0), monitor, last]
    with pytest.warns(UserWarning, match="could not log") as caught:
        fit(callbacks, logger=Failing(tmp_path), max_epochs=1)
    failures = {str(each.message).partition(": ")[0] for each in caught}
    texts = {f"the text {key!r}" for key in ("lightning_noise/configuration", "train_noise/input/moves")}
    keys = ("robustness_figures/curve", "robustness_figures/reliability", "train_noise/input/moves")
    figures = {f"the figure {key!r}" for key in keys}
    assert failures >= {f"could not log {what}" for what in {*texts, *figures, "the layout of the charts"}}
    assert last.ended
    assert monitor.report is not None


# --- metrics in a table


def read_csv(logger: CSVLogger) -> list[dict[str, str]]:
    """Returns the filled cells of each row."""
    with Path(logger.log_dir, "metrics.csv").open(newline="") as file:
        return [{key: cell for key, cell in row.items() if cell} for row in csv.DictReader(file)]


def test_a_table_has_a_column_for_each_number_of_the_summary_and_none_for_each_level(tmp_path):
    logger = CSVLogger(tmp_path)
    monitor = RobustnessMonitor([noise.Gaussian(), noise.Uniform()], [0.1, 0.2])
    _, trainer = fit([InputNoise(noise.Gaussian(), 0.5), monitor], logger=logger, max_epochs=2, log_every_n_steps=2)
    rows = read_csv(logger)
    summary, levels = monitor.logged_keys().values()
    filled = [row.keys() & {*summary} for row in rows]
    assert [row["step"] for row, cells in zip(rows, filled, strict=True) if cells] == ["2", "5"]
    assert all(cells in (set(), {*summary}) for cells in filled), "a validation fills the whole summary"
    others = {key for row in rows for key in row} - {*summary}
    assert others == {"train_noise/input/level", "train_noise/input/snr_db", "train_loss", "val_loss", "epoch", "step"}
    assert [row[level] for row in rows if (level := "train_noise/input/level") in row] == ["0.5"] * (3 + 2)
    assert len(levels) == 2 * 2 * 3
    assert {*levels} <= trainer.callback_metrics.keys(), "ModelCheckpoint can follow each level"


class Picky(TensorBoardLogger):
    """A logger that refuses the keys of the levels."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(key.startswith("robustness_levels/") for key in metrics):
            raise ValueError("not a key")
        super().log_metrics(metrics, step)


def test_a_logger_that_refuses_the_levels_warns_and_the_next_one_logs_them(tmp_path):
    picky, working = Picky(tmp_path / "picky"), TensorBoardLogger(tmp_path / "working")
    with pytest.warns(UserWarning, match="could not log the metrics at each level: ValueError: not a key"):
        fit([RobustnessMonitor(noise.Gaussian(), [0.5])], logger=[picky, working], max_epochs=1)
    key = "robustness_levels/gaussian/0.5/accuracy"
    tags = [EventAccumulator(logger.log_dir).Reload().Tags()["scalars"] for logger in (picky, working)]
    assert [key in each for each in tags] == [False, True]
    assert all("robustness/score" in each for each in tags)


class Epochs(Classifier):
    """Logs a step of its own, at which Lightning puts all metrics."""

    def on_validation_epoch_end(self) -> None:
        self.log("step", float(self.current_epoch))


def test_the_levels_stand_at_the_step_of_the_summary_also_if_the_module_logs_a_step(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit([RobustnessMonitor(noise.Gaussian(), [0.5])], module=Epochs, logger=logger, max_epochs=2)
    events = EventAccumulator(logger.log_dir).Reload()
    for key in ("robustness/accuracy_clean", "robustness_levels/gaussian/0.5/accuracy"):
        assert [event.step for event in events.Scalars(key)] == [0, 1]


# --- charts


@pytest.mark.parametrize("late", [False, True], ids=["at once", "when the last is known"])
def test_the_charts_of_all_callbacks_are_laid_out_once(late, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    one, two = Charted("one"), Charted("two", late=late)
    fit([one, InputNoise(noise.Gaussian(), 0.1), two], logger=logger, max_epochs=4, num_sanity_val_steps=0)
    assert one.answers[-1]
    charts = {"one": ["one/.*"], "two": ["two/.*"], "level in training": ["train_noise/.*/level$"]}
    charts |= {"one band": ["x", "x", "y"], "two band": ["x", "x", "y"]}
    assert layouts(logger.log_dir) == [{"lightning_noise": charts}]


def test_a_training_without_noise_has_no_chart_of_levels(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit([Charted("one")], logger=logger, max_epochs=1)
    (layout,) = layouts(logger.log_dir)
    assert list(layout["lightning_noise"]) == ["one", "one band"]


def test_the_charts_of_a_replay_and_of_a_monitor_are_in_one_layout(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    monitors = [ReplayMonitor(noise.Gaussian(), [0.1, 0.5]), RobustnessMonitor(noise.Gaussian(), [0.1, 0.5])]
    fit(monitors, logger=logger, max_epochs=2)
    tags = EventAccumulator(logger.log_dir).Reload().Tags()["scalars"]
    (layout,) = layouts(logger.log_dir)
    shown = {
        title: {tag for each in chart for tag in tags if re.match(each, tag)} for title, chart in layout.popitem()[1].items()
    }
    replayed, accuracy = {f"replay/{place}/val_loss" for place in ("clean", "gaussian/0.5")}, "robustness/accuracy"
    assert shown == {
        "replay: val_loss": replayed,
        "replay: val_loss, clean to gaussian 0.5": replayed,
        "robustness: accuracy": {f"{accuracy}_{what}" for what in ("clean", "noisy", "worst")},
        "robustness: accuracy, clean to gaussian 0.5": {f"{accuracy}_clean", "robustness_levels/gaussian/0.5/accuracy"},
    }


# --- TensorBoard itself


class Showing(RobustnessMonitor):
    """Logs everything that can be logged."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        loggers.log_figure(trainer, "figure", red, step=3)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yields the address of a TensorBoard that shows a fit."""
    folder = tmp_path_factory.mktemp("served")
    callbacks = [InputNoise(noise.Gaussian(), 0.2), Showing(noise.Gaussian(), {"gaussian": [0.1, 0.5]})]
    fit(
        callbacks,
        logger=TensorBoardLogger(folder, name="", version="run"),
        max_epochs=1,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tensorboard.main",
        "--logdir",
        str(folder),
        "--port",
        str(port),
        "--host",
        "localhost",
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://localhost:{port}/data"
    try:
        _wait_for_run(address)
        yield address
    finally:
        server.terminate()
        server.wait()


def _wait_for_run(address: str) -> None:
    until = time.monotonic() + 600
    while time.monotonic() < until:
        try:
            if ask(address, "plugin/custom_scalars/layout"):
                return
        except (URLError, ConnectionError):
            pass
        time.sleep(0.2)
    pytest.fail("TensorBoard does not show the run")


def ask(address: str, path: str, **parameters: str) -> Any:
    with urlopen(f"{address}/{path}?{urlencode(parameters)}", timeout=30) as answer:
        return json.load(answer)


def test_tensorboard_puts_the_tags_into_the_charts(served):
    (category,) = ask(served, "plugin/custom_scalars/layout")["category"]
    lines = {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"] if "multiline" in chart}
    bands = {chart["title"]: chart["margin"]["series"] for chart in category["chart"] if "margin" in chart}
    shown = {
        title: {
            tag for each in tags for tag in ask(served, "plugin/custom_scalars/scalars", run="run", tag=each)["tag_to_events"]
        }
        for title, tags in lines.items()
    }
    assert shown == {
        "robustness: accuracy": {f"robustness/accuracy_{what}" for what in ("clean", "noisy", "worst")},
        "level in training": {"train_noise/input/level"},
    }
    strongest, clean = "robustness_levels/gaussian/0.5/accuracy", "robustness/accuracy_clean"
    assert bands == {"robustness: accuracy, clean to gaussian 0.5": [{"value": strongest, "lower": strongest, "upper": clean}]}


def test_tensorboard_shows_the_figure_and_the_text(served):
    (image,) = ask(served, "plugin/images/images", run="run", tag="figure", sample="0")
    assert image["step"] == 3
    with urlopen(f"{served}/plugin/images/individualImage?{image['query']}", timeout=30) as answer:
        assert imread(io.BytesIO(answer.read()), format="png").shape[:2] == (20, 30)
    (text,) = ask(served, "plugin/text/text", run="run", tag="lightning_noise/configuration/text_summary")
    assert "<td><code>levels={'gaussian': (0.1, 0.5)}</code></td>" in text["text"]
