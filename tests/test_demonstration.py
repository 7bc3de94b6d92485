"""`python -m lightning_noise` trains, compares, logs and says what to do next; what is wrong is said in one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_noise.__main__ import LEVELS, _conclusion


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lightning_noise", *arguments], capture_output=True, text=True, timeout=200)


def test_it_prints_a_table_a_conclusion_and_the_way_to_the_logs(tmp_path: Path):
    folder = tmp_path / "logs"
    result = run("--epochs", "2", "--level", "0.4", "--seed", "1", "--root-dir", str(folder))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    rows = re.findall(
        r"^(clean|\w+ +[\d.]+)(?: \*)? +([\d.]+) +([\d.]+) +([+-][\d.]+) +([\d.]+) +([\d.]+)$", result.stdout, re.M
    )
    names = [" ".join(row[0].split()) for row in rows]
    assert names == ["clean", *(f"{tag} {level:g}" for tag, levels in LEVELS.items() for level in levels)]
    for _, *numbers in rows:
        without, with_, gain, *ece = map(float, numbers)
        assert all(0 <= number <= 100 for number in (without, with_, *ece))
        assert gain == pytest.approx(with_ - without, abs=0.1001)  # of numbers that are each rounded to a tenth
    assert "Training with noise" in result.stdout
    assert f"tensorboard --logdir {folder}" in result.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["with_noise", "without_noise"]
    for part in folder.iterdir():
        tags = EventAccumulator(str(part / "version_0")).Reload().Tags()
        assert {"robustness/score", "test/robustness/gaussian/0.4/accuracy", "train_loss"} <= set(tags["scalars"])
        assert ("noise/input/level" in tags["scalars"]) == (part.name == "with_noise")
        assert {"robustness/curve", "robustness/impulse/samples"} <= set(tags["images"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be a whole number, at least 1, got '0'"),
        (["--epochs", "two"], "argument --epochs: must be a whole number, at least 1, got 'two'"),
        (["--level", "-1"], "argument --level: must be a number in [0, 10], got '-1'"),
        (["--level", "nan"], "argument --level: must be a number in [0, 10], got 'nan'"),
        (["--seed", "1.5"], "argument --seed: must be a whole number in [0, 2^32), got '1.5'"),
        (["--root-dir", __file__], f"argument --root-dir: must be a folder that can be written to, got '{__file__}'"),
        (["--root-dir", "/proc/a"], "argument --root-dir: must be a folder that can be written to, got '/proc/a'"),
        (["--epoch"], "argument --epochs: expected one argument"),
        (["--noise", "uniform"], "unrecognized arguments: --noise uniform"),
    ],
    ids=" ".join,
)
def test_a_bad_value_gives_one_clear_line_and_exit_code_2(arguments, message, capsys):
    from lightning_noise.__main__ import main

    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"lightning_noise: {message}\n"


def test_help_names_the_options(capsys):
    from lightning_noise.__main__ import main

    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--epochs", "--level", "--root-dir", "--seed"))


def results(with_noise: float) -> dict[str, dict[str, float]]:
    keys = ["clean/accuracy", *(f"{tag}/{level:g}/accuracy" for tag, levels in LEVELS.items() for level in levels)]
    return {"without": dict.fromkeys(keys, 0.7), "with": dict.fromkeys(keys, with_noise)}


@pytest.mark.parametrize(
    ("with_noise", "said"),
    [
        (
            0.9,
            r"^Training with noise raised the accuracy on clean images \(70.0 to 90.0 %\), .* and under impulse 0.2 \(.*\)\.$",
        ),
        # 400 test images: two standard errors of the difference are 6.4 points
        (0.76, r"^Training with noise did not measurably change the accuracy on clean .*\. Nothing was gained\.$"),
        (0.6, r"^Training with noise lowered the accuracy on clean .*\. Nothing was gained\.$"),
    ],
)
def test_the_conclusion_follows_from_the_numbers(with_noise, said):
    assert re.search(said, _conclusion(results(with_noise)))


def test_a_gain_and_a_cost_are_both_said():
    mixed = results(0.9)
    mixed["with"]["clean/accuracy"] = 0.5
    assert re.search(r"raised the accuracy under gaussian .*; it lowered the accuracy on clean images", _conclusion(mixed))
