"""What the terminal shows: lines, scores and bars, as a real process prints them."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
from helpers import Classifier, Rows, fit, loader, make_trainer
from lightning_utilities.core import rank_zero as rank_zero_module
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar

from lightning_noise import (
    AdaptiveLevel,
    InputNoise,
    RandomizedSmoothing,
    ReplayMonitor,
    RobustnessMonitor,
    noise,
    suggest_level,
)
from lightning_noise.loop import terminal

SCRIPT = Path(__file__).parent / "scripts" / "long_passes.py"


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines that this package said."""
    return [record.getMessage() for record in caplog.records if Path(record.pathname).name == "terminal.py"]


class Recorder(TQDMProgressBar):
    """Keeps what the bar shows at the end of each training epoch."""

    def __init__(self):
        super().__init__()
        self.shown: list[dict] = []

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        self.shown.append(dict(self.get_metrics(trainer, pl_module)))


@pytest.mark.parametrize(
    ("callbacks", "cost"),
    [
        (
            lambda: [RobustnessMonitor(noise.Gaussian(), [0.1, 0.2])],
            "RobustnessMonitor 'robustness': 2 conditions = 3 forward passes of each validation batch; bound the cost with "
            "max_batches=…",
        ),
        (
            lambda: [RobustnessMonitor(noise.Gaussian(), [0.1], max_batches=2, every_n_epochs=2, n_draws=3)],
            "RobustnessMonitor 'robustness': 3 conditions = 4 forward passes of each of the first 2 validation batches, every "
            "2 epochs",
        ),
        (
            lambda: [ReplayMonitor(noise.Gaussian(), [0.1])],
            "ReplayMonitor 'replay': 1 condition = 2 more validation steps of each validation batch; bound the cost with "
            "max_batches=…",
        ),
        (
            lambda: [InputNoise(noise.Gaussian(), AdaptiveLevel())],
            "AdaptiveLevel of 'input': 2 forward passes of each validation batch; bound the cost with "
            "AdaptiveLevel(max_batches=…)",
        ),
    ],
)
def test_a_fit_begins_with_what_the_monitors_cost(callbacks, cost, caplog):
    with caplog.at_level(logging.INFO):
        _, trainer = fit(callbacks())
        assert lines(caplog)[0] == cost
        caplog.clear()
        trainer.validate(Classifier(), loader(), verbose=False)
    assert cost not in lines(caplog)


def test_a_run_ends_with_the_outcome_and_the_path_of_the_report(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monitor = RobustnessMonitor(noise.Gaussian(), [0.1, 5.0])
    with caplog.at_level(logging.INFO):
        module, trainer = fit([monitor], logger=True, default_root_dir=tmp_path)
        trainer.validate(module, loader(), verbose=False)
        trainer.test(module, loader(), verbose=False)
    _, *outcomes = lines(caplog)
    for outcome, folder in zip(outcomes, ["robustness", "validate/robustness", "test/robustness"], strict=True):
        sentence, path = outcome.split("\nReport: ")
        assert re.fullmatch(
            r"robustness: Accuracy is [\d.]+ % \(.*\) without noise; .* on average under noise; .* at worst, under gaussian at "
            r"[\d.]+\.( The accuracy without noise may be chance, [\d.]+ %, so the skill retained says little\.)?",
            sentence,
        )
        assert path == str(Path("lightning_logs", "version_0", folder, "report.md"))
        assert sentence.removeprefix("robustness: ") in Path(path).read_text(encoding="utf-8").replace("**", "")


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"logger": False}])
def test_a_run_without_a_report_ends_without_an_outcome(options, caplog):
    with caplog.at_level(logging.INFO):
        fit([RobustnessMonitor(noise.Gaussian(), [0.1])], **options)
    assert not any("Report" in line for line in lines(caplog))


def test_a_trial_run_says_nothing(caplog):
    with caplog.at_level(logging.INFO):
        fit([RobustnessMonitor(noise.Gaussian(), [0.1]), InputNoise(noise.Gaussian(), AdaptiveLevel())], fast_dev_run=True)
    assert lines(caplog) == []


def test_who_silences_lightning_silences_the_lines(caplog):
    log = rank_zero_module.log
    before = log.level
    try:
        log.setLevel(logging.ERROR)
        fit([RobustnessMonitor(noise.Gaussian(), [0.1])])
    finally:
        log.setLevel(before)
    assert lines(caplog) == []


def test_the_bar_shows_each_score_once_and_the_adaptive_level():
    bar = Recorder()
    monitors = [RobustnessMonitor(noise.Gaussian(), [0.1], name=name) for name in ("robustness", "second")]
    fit([InputNoise(noise.Gaussian(), AdaptiveLevel()), *monitors, bar], enable_progress_bar=True)
    assert bar.shown[-1].keys() == {"train_noise/input/level", "robustness/score", "second/score"}


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_table_shows_the_summary_alone(stage, capsys):
    monitors = [RobustnessMonitor(noise.Gaussian(), [0.1, 0.2]), ReplayMonitor(noise.Gaussian(), [0.1, 0.2])]
    trainer = make_trainer(monitors)
    getattr(trainer, stage)(Classifier(), loader())
    table = capsys.readouterr().out
    assert "robustness/score" in table
    assert "replay/noisy/" in table
    assert "gaussian" not in table
    prefix = "test/" if stage == "test" else ""
    assert f"{prefix}replay/gaussian/0.1/{'test' if stage == 'test' else 'val'}_loss" in trainer.callback_metrics


@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_the_range_test_keeps_the_bar_of_the_trainer_and_nothing_else(kind):
    seen: list[bool] = []

    class Bar(kind):
        def on_validation_batch_end(self, *args, **kwargs):
            seen.append(True)
            super().on_validation_batch_end(*args, **kwargs)

    bar = Bar()
    trainer = make_trainer([bar], enable_progress_bar=True)
    before = list(trainer.callbacks)  # type: ignore[attr-defined]
    suggest_level(trainer, Classifier(), noise.Gaussian(), dataloaders=loader(Rows(64)), levels=[0.1, 5.0], flip_rate=0.1)
    assert len(seen) == 8
    assert trainer.callbacks == before  # type: ignore[attr-defined]


def run(*arguments: str, columns: int = 120) -> str:
    """What a process shows in a terminal of its own."""
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import termios

    main, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "PYTHONWARNINGS": "ignore"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments], stdin=child, stdout=child, stderr=child, env=environment, close_fds=True
    )
    os.close(child)
    parts = []
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the process has ended
            break
        if not part:
            break
        parts.append(part)
    os.close(main)
    assert process.wait(timeout=600) == 0, b"".join(parts).decode()
    return b"".join(parts).decode()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.slow
@pytest.mark.parametrize(("bar", "columns"), [("tqdm", 80), ("rich", 120), ("tqdm first", 120), ("rich first", 80)])
def test_a_bar_moves_within_long_batches_and_lines_stand_alone(bar, columns, tmp_path):
    shown = plain(run(*bar.split(), str(tmp_path), columns=columns))
    ended = [line.split("\r")[-1] for line in shown.split("\r\n")]
    said = [line for line in ended if re.match(r"SlowReport '|robustness: |Report: .*\.md$", line)]
    assert [line.split(" ")[0] for line in said] == ["SlowReport", *2 * ["robustness:", "Report:"]]
    if "tqdm" in bar:
        assert re.search(r" 0\.\d+/2 ", shown), "within the first batch"
    assert re.search(r"Report[: ].* [1-4]/4 ", shown), "while the report is made"


@pytest.mark.slow
def test_a_pipe_receives_no_moves_within_a_batch_and_no_control_codes(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "tqdm", str(tmp_path)], capture_output=True, text=True, check=True)
    assert not re.search(r" 0\.\d+/2 ", done.stdout)
    assert "\x1b" not in done.stderr
    assert sum("robustness: Accuracy" in line for line in done.stderr.splitlines()) == 2


def test_the_passes_of_two_monitors_share_a_batch(monkeypatch):
    moved: list[float] = []
    monkeypatch.setattr(terminal, "_find_bar", lambda trainer: moved.append)
    monkeypatch.setattr(terminal, "_MOVES_EVERY", -1.0)
    monitors = [ReplayMonitor(noise.Gaussian(), [0.1]), RobustnessMonitor(noise.Gaussian(), [0.1, 0.2])]
    trainer = make_trainer(monitors)
    trainer.test(Classifier(), loader(Rows(16)), verbose=False)
    assert [round(6 * n) for n in moved] == [*range(5), *range(6, 11)]
    moved.clear()
    in_tests = RandomizedSmoothing(0.1, n0=5, n=10)  # in a fit it takes no share
    fit([monitors[1], in_tests], validation=loader(Rows(16)), max_epochs=1)
    assert [round(4 * n) for n in moved] == [0, 1, 2, 4, 5, 6]


def test_a_bar_that_fails_warns_and_ends_no_run(monkeypatch):
    def fail(trainer: pl.Trainer):
        raise OSError("no terminal")

    monkeypatch.setattr(terminal, "_find_bar", fail)
    monkeypatch.setattr(terminal, "_MOVES_EVERY", -1.0)
    with pytest.warns(UserWarning, match="no terminal"):
        fit([RobustnessMonitor(noise.Gaussian(), [0.1])])


@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_the_bar_of_a_report_is_closed_also_after_an_exception(kind):
    class Fails(pl.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            with terminal.progress(trainer, "Report", total=2) as advance:
                advance()
                raise KeyError("found")

    bar = kind()
    trainer = make_trainer([bar, Fails()], enable_progress_bar=True)
    with pytest.raises(KeyError, match="found"):
        trainer.validate(Classifier(), loader())
    if kind is RichProgressBar:
        assert not any(task.visible for task in bar.progress.tasks if task.description == "Report")
    else:
        assert all(each.desc != "Report" for each in type(bar.val_progress_bar)._instances)


def test_without_a_bar_a_report_shows_nothing(capsys):
    trainer = make_trainer()
    with terminal.progress(trainer, "Report", total=1) as advance:
        advance()
    assert capsys.readouterr().out == ""
