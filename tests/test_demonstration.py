"""The command ``python -m lightning_noise``: its output, its logs, its options and what it concludes."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import refusal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_noise.__main__ import main as command
from lightning_noise.demo.main import main
from lightning_noise.demo.recipes import RECIPES
from lightning_noise.demo.table import Comparison
from lightning_noise.demo.training import IMAGE_LEVELS, WEIGHT_LEVELS, Score, Scores
from lightning_noise.evaluation.conditions import CLEAN, Condition

# a change is tested by the default alone
EVERY_RECIPE = ["input", *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in RECIPES if recipe != "input")]
CONDITIONS = [Condition(noise, level) for noise, levels in (IMAGE_LEVELS | WEIGHT_LEVELS).items() for level in levels]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lightning_noise", *arguments], capture_output=True, text=True, timeout=900)


class Demonstration(NamedTuple):
    result: subprocess.CompletedProcess[str]
    folder: Path

    @property
    def text(self) -> str:
        """The output with each paragraph in a single line."""
        return re.sub(r"(?<!\n) ?\n(?=[^\n ])", " ", self.result.stdout)

    def rows(self) -> dict[str, list[float]]:
        number = r" +([+-]?[\d.]+)"
        rows = re.findall(rf"^(clean|\w+ +[\d.]+(?: \*)?){5 * number}$", self.result.stdout, re.M)
        return {" ".join(name.split()): [float(text) for text in numbers] for name, *numbers in rows}

    def events(self, part: str) -> EventAccumulator:
        return EventAccumulator(str(self.folder / part / "version_0")).Reload()


@pytest.fixture(scope="module")
def demonstrate(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Demonstration]:
    """Runs a recipe for an epoch of 18 batches; what has been run is not run again."""

    @cache
    def demonstrate(recipe: str) -> Demonstration:
        folder = tmp_path_factory.mktemp(recipe) / "logs"
        options = [] if recipe == "input" else ["--recipe", recipe]  # input is the default
        settings = ("--epochs", "1", "--level", "0.4", "--seed", "1", "--root-dir", str(folder))
        return Demonstration(run(*options, *settings), folder)

    return demonstrate


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Demonstration:
    """Four epochs of the default recipe: its level waits for three, and grows after the last."""
    folder = tmp_path_factory.mktemp("tuned") / "logs"
    return Demonstration(run("--epochs", "4", "--seed", "1", "--root-dir", str(folder)), folder)


@pytest.mark.parametrize("recipe", EVERY_RECIPE)
def test_it_prints_a_table_a_conclusion_and_the_way_to_the_logs(recipe, demonstrate):
    demonstration = demonstrate(recipe)
    result, folder = demonstration
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    rows, text = demonstration.rows(), demonstration.text
    star = {RECIPES[recipe].trained_noise: " *"}
    noisy = [f"{noise} {level:g}{star.get(noise, '')}" for noise, level, _ in CONDITIONS]
    assert list(rows) == ["clean", *noisy]
    for without, with_, gain, *ece in rows.values():
        assert all(0 <= number <= 100 for number in (without, with_, *ece))
        assert gain == pytest.approx(with_ - without, abs=0.1001)  # of numbers that are each rounded to a tenth
    assert ("* the noise of the training; " in text) == (recipe in ("input", "weights"))
    assert ("o noise was in the inputs of either training." in text) == (recipe not in ("input", "all"))
    assert f"\nTraining with {RECIPES[recipe].title} " in text
    assert f"tensorboard --logdir {folder}" in result.stdout
    assert "tuned itself" not in text  # the level is given


@pytest.mark.parametrize(
    ("recipe", "title", "name", "level"),
    [
        ("input", "noise", "input", lambda fraction: 0.4 * min(2 * fraction, 1)),
        pytest.param("targets", "label_smoothing", "smoothing", lambda fraction: 0.4 * (1 - fraction), marks=pytest.mark.slow),
        pytest.param("mixup", "mixup", "mixup", lambda fraction: 0.4 * (fraction < 0.8), marks=pytest.mark.slow),
        pytest.param(
            "weights", "noise_in_the_weights", "weight", lambda fraction: 0.4 * min(2 * fraction, 1), marks=pytest.mark.slow
        ),
    ],
)
def test_only_the_second_training_has_what_the_recipe_says(recipe, title, name, level, demonstrate):
    demonstration = demonstrate(recipe)
    assert sorted(path.name for path in demonstration.folder.iterdir()) == [f"with_{title}", f"without_{title}"]
    with_, without = (demonstration.events(f"{which}_{title}") for which in ("with", "without"))
    for tags in (with_.Tags(), without.Tags()):
        keys = {"robustness/score", "robustness_levels/gaussian/0.4/accuracy", "test/robustness/score", "train_loss"}
        assert keys <= set(tags["scalars"])
        assert {"robustness_figures/curve", "robustness_figures/impulse/samples"} <= set(tags["images"])
    levels = [event.value for event in with_.Scalars(f"train_noise/{name}/level")]
    assert levels == pytest.approx([level(batch / 18) for batch in (4, 9, 14, 17)])  # each fifth batch, and the last
    assert not [tag for tag in without.Tags()["scalars"] if tag.startswith("train_noise/")]
    assert not [tag for tag in with_.Tags()["scalars"] if tag.startswith("train_noise/") and f"/{name}/" not in tag]


@pytest.mark.slow
def test_without_a_level_that_of_the_inputs_tunes_itself_and_says_so_before_the_conclusion(tuned):
    assert (tuned.result.returncode, tuned.result.stderr) == (0, "")
    summary = r"input: warmup 3 times, raised 1 time; level 0 to 0\.15; 100 % of the clean skill is retained at level 0\."
    assert re.search(rf"calibration error\.\n\nThe level tuned itself\. {summary}\n\nTraining with noise ", tuned.text)
    with_, without = (tuned.events(f"{which}_noise") for which in ("with", "without"))
    levels = [event.value for event in with_.Scalars("train_noise/input/level")]
    assert levels[-1] == pytest.approx(0.15)
    assert not any(levels[:-1])
    retained = [event.value for event in with_.Scalars("train_noise/input/retention")]
    assert retained == pytest.approx([math.nan, 1, 1, 1], nan_ok=True)  # after one epoch there is no skill above chance
    assert "train_noise/input/moves" in with_.Tags()["images"]
    assert not [tag for tag in without.Tags()["scalars"] if tag.startswith("adaptive/")]


@pytest.mark.slow
def test_a_level_that_has_not_yet_grown_gains_and_costs_nothing(tuned):
    for name, (without, with_, gain, *ece) in tuned.rows().items():
        assert (with_, gain, ece[1]) == (without, 0, ece[0]), name


@pytest.mark.slow
def test_all_of_it_is_noise_in_every_place(demonstrate):
    scalars = demonstrate("all").events("with_noise_everywhere").Tags()["scalars"]
    places = {"input", "smoothing", "weight", "activation", "gradient"}
    assert {tag.split("/")[1] for tag in scalars if tag.startswith("train_noise/")} == places


@pytest.mark.slow
def test_the_first_training_is_the_same_in_all_recipes(demonstrate):
    tables = [demonstrate(recipe).rows().values() for recipe in RECIPES]
    columns = [[(without, ece) for without, _, _, ece, _ in table] for table in tables]
    assert all(column == columns[0] for column in columns)
    seconds = [[with_ for _, with_, *_ in table] for table in tables]
    assert len({tuple(second) for second in seconds}) == len(RECIPES)


@pytest.mark.parametrize("level", ["given", pytest.param("tuned", marks=pytest.mark.slow)])
def test_the_output_of_a_pipe_is_ascii_of_at_most_80_columns(level, demonstrate, request):
    demonstration = demonstrate("input") if level == "given" else request.getfixturevalue("tuned")
    *lines, _ = demonstration.result.stdout.partition("  tensorboard")[0].splitlines()
    assert "".join(lines).isascii()
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], 'Parser key "epochs": Not of type PositiveInt: 0 does not conform to restriction v>0'),
        (["--epochs", "two"], "Parser key \"epochs\": Not of type PositiveInt: invalid literal for int() with base 10: 'two'"),
        (["--level", "-1"], 'Parser key "level": Not of type NonNegativeFloat: -1 does not conform to restriction v>=0'),
        (["--level", "nan"], 'Parser key "level": Not of type NonNegativeFloat: nan does not conform to restriction v>=0'),
        (["--level", "11"], "argument --level: expected a number in [0, 10] with --recipe input, got 11"),
        (
            ["--recipe", "targets", "--level", "1.5"],
            "argument --level: expected a number in [0, 1] with --recipe targets, got 1.5",
        ),
        (
            ["--level", "adaptive"],
            "Parser key \"level\": Not of type NonNegativeFloat: could not convert string to float: 'adaptive'",
        ),
        (
            ["--recipe", "labels"],
            "argument --recipe: invalid choice: 'labels' (choose from 'input', 'targets', 'mixup', 'weights', 'all')",
        ),
        (["--seed", "1.5"], "Parser key \"seed\": Not of type Seed: invalid literal for int() with base 10: '1.5'"),
        (["--seed", "-1"], 'Parser key "seed": Not of type Seed: -1 does not conform to restriction v>=0 and v<4294967296'),
        (
            ["--root-dir", __file__],
            'Parser key "root_dir": Not of type Path_dcc: Directory is not creatable since path already exists: '
            f"'{__file__}'",
        ),
        (["--root-dir", "/proc/a"], "argument --root-dir: expected a folder that can be written to, got '/proc/a': "),
        (["--epochs"], "argument --epochs: expected one argument"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--noise", "uniform"], "unrecognized arguments: --noise uniform"),
    ],
    ids=" ".join,
)
def test_a_bad_value_gives_one_clear_line_and_exit_code_2(arguments, message, capsys):
    assert refusal(main, arguments, capsys).startswith(f"lightning_noise: {message}")


@pytest.mark.slow
def test_a_package_that_is_not_installed_gives_one_line_with_the_extra_to_install():
    program = "import runpy, sys; sys.modules['sklearn'] = None; runpy.run_module('lightning_noise', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=900)
    assert result.returncode == 1
    message = "lightning_noise: the demonstration needs sklearn"
    assert re.fullmatch(rf'{message}[\w.]*: pip install "lightning_noise\[demo\]"\n', result.stderr)


def test_help_names_the_options_and_the_level_of_each_recipe(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--epochs", "--recipe", "--level", "--root-dir", "--seed"))
    words = " ".join(printed.split())
    assert "input: the standard deviation that the noise rises to, with pixels in [0, 1] (default: it tunes itself)" in words
    assert "targets: the smoothing at the start, which decays to 0 (default: 0.2)" in words


def scores(accuracy: float) -> Scores:
    return dict.fromkeys([CLEAN, *CONDITIONS], Score(accuracy, ece=0.1))


@pytest.mark.parametrize(
    ("with_noise", "said"),
    [
        (
            0.9,
            r"^Training with noise raised the accuracy on clean images \(70.0 to 90.0 %\), .* under weight noise 0.6 \(.*\)\.$",
        ),
        # 400 test images: two standard errors of the difference are 6.4 points
        (0.76, r"^Training with noise did not measurably change the accuracy on clean .*\. No accuracy was gained\.$"),
        (0.6, r"^Training with noise lowered the accuracy on clean .*\. No accuracy was gained\.$"),
    ],
)
def test_the_conclusion_follows_from_the_numbers(with_noise, said):
    assert re.search(said, Comparison(RECIPES["input"], scores(0.7), scores(with_noise)).conclusion())


def test_the_conclusion_names_the_recipe():
    comparison = Comparison(RECIPES["targets"], scores(0.7), scores(0.9))
    assert comparison.conclusion().startswith("Training with label smoothing raised the accuracy on clean")


def test_a_gain_and_a_cost_are_both_said():
    mixed = scores(0.9) | {CLEAN: Score(0.5, ece=0.1)}
    assert re.search(
        r"raised the accuracy under gaussian .*; it lowered the accuracy on clean images",
        Comparison(RECIPES["input"], scores(0.7), mixed).conclusion(),
    )


def test_an_unknown_subcommand_gives_one_line_with_those_that_exist(capsys):
    error = "lightning_noise: expected compare or evaluate, or an option of the demonstration, got 'compair'\n"
    assert refusal(command, ["compair"], capsys) == error
