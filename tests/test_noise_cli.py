"""A NoiseCLI: its options, what a run saves, and errors of one line that say what to type."""

from __future__ import annotations

import subprocess
import sys
from argparse import ArgumentError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from helpers import Classifier, Rows, assert_same, loader
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_noise import InputNoise, RobustnessMonitor, noise, schedules
from lightning_noise.cli import NoiseCLI
from lightning_noise.cli.errors import shorten

ROOT = Path(__file__).parents[1]
# Lightning 2.6 calls what jsonargparse 4.53 deprecates
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["main.py"])  # a LightningCLI warns if it is given arguments twice


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader(shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return loader(Rows(13, seed=1))


class Broken(pl.Callback):
    """A callback with a bug in its constructor."""

    def __init__(self):
        super().__init__()
        {}["missing"]


class Opinionated(pl.Callback):
    def __init__(self, mood: str = "good"):
        super().__init__()
        if mood != "good":
            raise ValueError(f"mood must be good, got {mood}")


def trainer_of_two(callbacks: list[pl.Callback] | pl.Callback | None = None, max_epochs: int | None = None) -> pl.Trainer:
    """A trainer with two arguments, because to read the forty of the class takes three times as long.

    jsonargparse makes a class of the function, and refuses a second one of the same name in the process.
    """
    return pl.Trainer(callbacks=callbacks, max_epochs=max_epochs, accelerator="cpu", logger=False, enable_checkpointing=False)


def make(*flags: str, config: Any = None, kind: Any = NoiseCLI) -> Any:
    first = [] if config is None else ["--config", yaml.safe_dump(config, sort_keys=False)]
    settings = {"trainer_class": trainer_of_two, "run": False, "save_config_callback": None, "seed_everything_default": 0}
    return kind(Classifier, Data, args=[*first, *flags], **settings)


@pytest.fixture(scope="module")
def parser() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py"])
        return make().parser


def added(cli: Any) -> list[Any]:
    return [each for each in cli.trainer.callbacks if isinstance(each, InputNoise | RobustnessMonitor)]


# --- options


def test_no_option_adds_no_callback():
    assert added(make()) == []


@pytest.mark.parametrize(
    ("flags", "config"),
    [
        (["--input_noise.level=0.3"], None),
        ([], {"input_noise": {"level": 0.3}}),
        (["--input_noise.level=0.3"], {"input_noise": {"level": 0.1}}),
        (["--input_noise.noise=Gaussian", "--input_noise.level=0.3"], None),
    ],
)
def test_a_level_adds_gaussian_noise(flags, config):
    (callback,) = added(make(*flags, config=config))
    assert isinstance(callback, InputNoise)
    assert (callback.noise, callback.level) == (noise.Gaussian(), 0.3)


def test_the_noise_and_its_schedule_are_options():
    flags = ["--input_noise.noise=Impulse", "--input_noise.noise.low=0", "--input_noise.level=Linear"]
    (callback,) = added(make(*flags, "--input_noise.level.start=0", "--input_noise.level.end=0.5"))
    assert (callback.noise, callback.level) == (noise.Impulse(low=0.0), schedules.Linear(0.0, 0.5))


@dataclass(frozen=True)
class Gated(noise.Noise):
    """A noise of a module that does not import all that the annotations of its base class name."""

    part: noise.Noise

    def perturb(self, x, level, generator, mask):
        return self.part.perturb(x, level, generator, mask)


def doubled(x, level, *, generator):
    return x * (1 + level)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["Compose", "noises=[Gaussian, test_noise_cli.doubled]"], noise.Compose([noise.Gaussian(), doubled])),
        (["OneOf", "noises=[Gaussian, Uniform]", "weights=[1, 2]"], noise.OneOf([noise.Gaussian(), noise.Uniform()], [1, 2])),
        (["Scaled", "noise=Gaussian", "factor=0.5"], noise.Scaled(noise.Gaussian(), 0.5)),
        (["test_noise_cli.Gated", "part=Gaussian"], Gated(noise.Gaussian())),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, noise.Noise) else "",
)
def test_the_parts_of_a_noise_have_short_names(flags, expected):
    kind, *arguments = flags
    given = [f"--input_noise.noise={kind}", *(f"--input_noise.noise.{argument}" for argument in arguments)]
    (callback,) = added(make(*given, "--input_noise.level=0.1"))
    assert callback.noise == expected


def test_a_noise_without_a_level_is_not_ignored():
    (callback,) = added(make("--input_noise.noise=Uniform"))
    assert (callback.noise, callback.level) == (noise.Uniform(), None)  # an error at the start of the fit


@pytest.mark.parametrize(
    ("flags", "config", "levels"),
    [
        (["--robustness_monitor=RobustnessMonitor"], None, RobustnessMonitor().levels),
        (["--robustness_monitor.levels.gaussian=[0.1, 0.2]"], None, RobustnessMonitor(levels={"gaussian": [0.1, 0.2]}).levels),
        ([], {"robustness_monitor": {"noises": "Uniform", "levels": [0.1]}}, {"uniform": (0.1,)}),
        (
            ["--robustness_monitor.noises=[Uniform, Speckle]"],
            None,
            RobustnessMonitor([noise.Uniform(), noise.Speckle()]).levels,
        ),
    ],
)
def test_an_argument_or_the_class_adds_a_monitor(flags, config, levels):
    (monitor,) = added(make(*flags, config=config))
    assert isinstance(monitor, RobustnessMonitor)
    assert monitor.levels == levels


def test_null_takes_an_option_of_a_file_back():
    config = {"input_noise": {"level": 0.3}, "robustness_monitor": "RobustnessMonitor"}
    assert len(added(make(config=config))) == 2
    assert added(make("--input_noise=null", "--robustness_monitor=null", config=config)) == []


@pytest.mark.parametrize("callbacks", [None, [], {"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss"}}])
def test_options_join_the_callbacks_of_the_trainer(callbacks):
    cli = make("--input_noise.level=0.3", config={"trainer": {"callbacks": callbacks}})
    assert len(added(cli)) == 1
    assert sum(isinstance(each, EarlyStopping) for each in cli.trainer.callbacks) == bool(callbacks)


def test_a_plain_cli_reads_what_is_saved():
    cli = make("--input_noise.level=0.3", "--robustness_monitor.noises=Uniform")
    saved = yaml.safe_load(cli.parser.dump(cli.config))
    for kind in (LightningCLI, NoiseCLI):
        callback, monitor = added(make(config=saved, kind=kind))
        assert (callback.level, [*monitor.levels]) == (0.3, ["uniform"])


def test_a_cli_of_ones_own_keeps_its_options():
    class Own(NoiseCLI, LightningCLI):
        def add_arguments_to_parser(self, parser):
            super().add_arguments_to_parser(parser)
            parser.add_argument("--notes", default="none")

    cli = make("--notes=mine", "--input_noise.level=0.3", kind=Own)
    assert cli.config.notes == "mine"
    assert len(added(cli)) == 1


# --- errors

GAUSSIAN = "lightning_noise.noise.Gaussian"


def input_noise(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "lightning_noise.InputNoise", "init_args": {"noise": GAUSSIAN, "level": 0.1, **arguments}}


def linear(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "lightning_noise.schedules.Linear", "init_args": arguments}


def monitor(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "lightning_noise.RobustnessMonitor", "init_args": arguments}


MISTAKES: dict[str, tuple[Any, str]] = {
    "a class": (
        {"class_path": "lightning_noise.InputNoize"},
        "trainer.callbacks: module 'lightning_noise' has no attribute 'InputNoize'; did you mean 'InputNoise'?",
    ),
    "a short class": ("InputNoize", "got InputNoize; did you mean 'InputNoise'?"),
    "an argument": (
        input_noise(levle=0.1),
        "trainer.callbacks, InputNoise: Option 'levle' is not accepted; did you mean 'level'? (the arguments of InputNoise are",
    ),
    "a noise": (
        input_noise(noise="lightning_noise.noise.Gausian"),
        "InputNoise, noise: module 'lightning_noise.noise' has no ",
    ),
    "a noise in lower case": (
        input_noise(noise="gaussian"),
        "noise: expected Noise, a function; got gaussian; did you mean 'Gau",
    ),
    "a noise without its class": (
        input_noise(noise={"low": 0}),
        "InputNoise, noise: expected Noise, a function; got {'low': 0}; write class_path: … and init_args: {…}",
    ),
    "no noise": ({"class_path": "lightning_noise.InputNoise"}, "InputNoise: the following arguments are required: noise"),
    "an argument of a noise": (
        input_noise(noise={"class_path": "lightning_noise.noise.Impulse", "init_args": {"lo": 0}}),
        "noise, Impulse: Option 'lo' is not accepted; did you mean 'low'? (the arguments of Impulse are low, high)\n",
    ),
    "a word as a level": (
        input_noise(level="high"),
        "InputNoise, level: expected float, Schedule, a function, AdaptiveLevel, Rule or null; got high\n",
    ),
    "a list as a level": (input_noise(level=[0, 0.5]), "AdaptiveLevel, Rule or null; got [0, 0.5]\n"),
    "a level out of range": (input_noise(level=-0.1), "error: a level must be finite and not negative, got -0.1"),
    "a probability out of range": (input_noise(probability=2), "error: probability must be in [0, 1], got 2.0"),
    "an argument of a schedule": (
        input_noise(level=linear(start=0, stop=1)),
        "level, Linear: Option 'stop' is not accepted (the arguments of Linear are start, end, begin, until, unit)\n",
    ),
    "a missing argument of a schedule": (input_noise(level=linear(start=0)), "level, Linear: the following arguments are requ"),
    "a word in a schedule": (input_noise(level=linear(start="low", end=1)), "level, Linear, start: expected float; got low\n"),
    "a time of a schedule": (input_noise(level=linear(start=0, end=1, until=10)), "until=10"),
    "a function": (
        input_noise(level="test_noise_cli.ramp"),
        "InputNoise, level: module 'test_noise_cli' has no attribute 'ramp'",
    ),
    "clip": (input_noise(clip="unit"), "InputNoise, clip: expected tuple["),
    "a flag": (input_noise(per_sample="sure"), "InputNoise, per_sample: expected bool; got sure\n"),
    "a task": (monitor(task="multiclas"), "RobustnessMonitor, task: expected a class; got multiclas\n"),
    "noises in lower case": (monitor(noises="gaussian"), "got gaussian; did you mean 'Gaussian'?\n"),
    "one of several noises": (
        monitor(noises=[GAUSSIAN, "lightning_noise.noise.Inpulse"]),
        "RobustnessMonitor, noises: module 'lightning_noise.noise' has no attribute 'Inpulse'; did you mean 'Impulse'?\n",
    ),
    "a number as levels": (
        monitor(levels=0.1),
        "RobustnessMonitor, levels: expected Sequence[float], Mapping[str, Sequence[fl",
    ),
    "levels of no noise": (
        monitor(noises=[GAUSSIAN], levels={"impulse": [0.1]}),
        "error: levels are given for ['impulse'], but the noises are ['gaussian']; type levels={'gaussian': [0.1]}\n",
    ),
    "arguments without init_args": (
        {"class_path": "lightning_noise.InputNoise", "noise": GAUSSIAN},
        "Option 'class_path' is not accepted; write the arguments of a class under init_args\n",
    ),
    "a callback of others": (
        {"class_path": "EarlyStopping", "init_args": {"monitor": "x", "mode": "up"}},
        "can be min, max, got up",
    ),
    "a callback of the user": (
        {"class_path": "test_noise_cli.Opinionated", "init_args": {"mood": "bad"}},
        "must be good, got bad",
    ),
}


@pytest.mark.parametrize(("callback", "said"), MISTAKES.values(), ids=list(MISTAKES))
def test_an_error_is_one_line_that_says_what_to_type(callback, said, parser, capsys: pytest.CaptureFixture):
    config = {"trainer": {"callbacks": [monitor(name="another"), callback]}}
    with pytest.raises(SystemExit) as stop:
        parser.instantiate_classes(parser.parse_args(["--config", yaml.safe_dump(config)]))
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    error, way_out = printed.splitlines()
    assert error.startswith("error: ")
    assert said in printed
    assert way_out.startswith("For help, type: ")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--input_noise.levle=0.3", "error: input_noise, InputNoise: Option 'levle' is not accepted; did you mean 'level'?"),
        ("--input_noise.level=-1", "error: a level must be finite and not negative, got -1"),
        ("--input_noise.noise.low=0", "noise, Gaussian: Option 'low' is not accepted (Gaussian takes no arguments)\n"),
        ("--robustness_monitor.n_draws=0", "error: n_draws must be at least 1, got 0"),
        ("--trainer.max_epoch=two", "trainer.max_epochs: expected int or null; got two"),
        ("--trainer.maxepochs=2", "unrecognized arguments: --trainer.maxepochs=2; did you mean 'trainer.max_epochs'?"),
        ("--model.features=many", "error: model.features: expected int; got many"),
    ],
)
def test_an_error_of_an_option_is_one_line(flag, said, parser, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        parser.instantiate_classes(parser.parse_args([flag]))
    printed = capsys.readouterr().err
    assert said in printed
    assert len(printed.splitlines()) == 2


def test_a_bug_keeps_its_traceback(parser):
    options = parser.parse_args(["--trainer.callbacks+=test_noise_cli.Broken"])
    with pytest.raises(ValueError, match="missing") as raised:
        parser.instantiate_classes(options)
    assert isinstance(raised.value.__cause__, KeyError)


def test_the_debug_mode_shows_the_whole_report(parser, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(ArgumentError, match="Does not validate against any of the Union subtypes"):
        parser.parse_args(["--config", yaml.safe_dump({"trainer": {"callbacks": [input_noise(levle=0.1)]}})])


def test_what_is_no_report_stays_as_it_is():
    assert shorten("Problems parsing config: line 1\n  column 8") == "Problems parsing config: line 1\n  column 8"


# --- a real program


def run(*arguments: object, folder: Path) -> subprocess.CompletedProcess:
    program = folder / "main.py"
    program.write_text("from digits import DigitClassifier, Digits\nfrom lightning_noise.cli import NoiseCLI\n\n")
    with program.open("a") as file:
        file.write("if __name__ == '__main__':\n    NoiseCLI(DigitClassifier, Digits)\n")
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'notebooks' / 'configs'}", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, "-W", "ignore", str(program), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=paths, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_what_a_run_saves_repeats_the_run(tmp_path: Path):
    options = [
        "--input_noise.level=0.3",
        "--robustness_monitor.noises=Uniform",
        "--trainer.max_epochs=1",
        "--seed_everything=3",
    ]
    found = run("fit", *options, "--trainer.accelerator=cpu", "--print_config", folder=tmp_path)
    (tmp_path / "printed.yaml").write_text(found.stdout)
    configs = tmp_path / "printed.yaml", tmp_path / "lightning_logs" / "version_0" / "config.yaml"
    for config in configs:
        done = run("fit", "--config", config, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    runs = [tmp_path / "lightning_logs" / f"version_{i}" for i in range(2)]
    first, second = (torch.load(next(each.rglob("*.ckpt")), weights_only=False)["state_dict"] for each in runs)
    assert_same(list(first.values()), list(second.values()))
    reports = [(each / "robustness" / "report.json").read_text() for each in runs]
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_the_help_and_the_errors_of_a_program(tmp_path: Path):
    shown = run("fit", "--help", folder=tmp_path).stdout
    assert "--input_noise.level 0.3" in " ".join(shown.split())
    arguments = run("fit", "--input_noise.help", folder=tmp_path).stdout
    assert "--input_noise.init_args.level" in arguments or "--input_noise.level" in arguments
    wrong = run("fit", "--input_noise.levle=0.3", folder=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    error, way_out = wrong.stderr.splitlines()
    assert error.startswith("error: input_noise, InputNoise: Option 'levle' is not accepted")
    assert way_out == "For help, type: main.py fit --input_noise.help=lightning_noise.InputNoise"
