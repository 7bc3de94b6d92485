"""``python -m lightning_noise compare``: which runs it compares, what it prints, and what it refuses."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import fit, refusal
from pytorch_lightning.loggers import CSVLogger

from lightning_noise import InputNoise, RobustnessMonitor, noise, report
from lightning_noise.cli.compare import main
from lightning_noise.evaluation.conditions import CLEAN, NOISY, OVERALL, WORST, Condition
from lightning_noise.evaluation.results import Estimate, summarize
from lightning_noise.report import Report
from lightning_noise.report.comparison import WIDTH
from lightning_noise.report.shared import restrict
from lightning_noise.tasks import Multiclass

N_GROUPS, SIZE = 20, 10
GAUSSIAN = {"gaussian": (0.1, 0.2)}
BOTH = {"gaussian": (0.1, 0.2), "impulse": (0.1, 0.3)}
NOISES = {"gaussian": "Gaussian()", "impulse": "Impulse()"}


def make(seed: int = 0, gain: float = 0.0, levels: Mapping[str, tuple[float, ...]] = BOTH, **about) -> Report:
    """The report of a classifier, made of the results of each sample as that of an evaluation is."""
    generator, hardness = np.random.default_rng(seed), np.random.default_rng(0).random((N_GROUPS, SIZE))
    hardness = hardness + 0.05 * generator.normal(size=hardness.shape)
    places = [CLEAN, *(Condition(name, level) for name, of_noise in levels.items() for level in of_noise)]
    right = {place: hardness < 0.9 + gain - (place.level or 0) for place in places}
    found = {
        place: {"accuracy": correct.mean(1), "loss": (2 - correct).mean(1) + hardness.mean(1), "ece": hardness.mean(1) / 9}
        for place, correct in right.items()
    }

    def summary(groups: list[int]) -> dict[tuple[Condition, str], float]:
        means = {place: {name: float(x[groups].mean()) for name, x in metrics.items()} for place, metrics in found.items()}
        means[CLEAN]["chance"] = 0.1
        return dict(summarize(means, Multiclass()))

    every = list(range(N_GROUPS))
    total, parts = summary(every), [summary([*every[:g], *every[g + 1 :]]) for g in every]
    estimates = tuple(Estimate(*cell, value, without=tuple(part[cell] for part in parts)) for cell, value in total.items())
    noises = {name: NOISES.get(name, "Gaussian()") for name in levels}
    sizes = (SIZE,) * N_GROUPS
    made = Report("multiclass", sum(sizes), 1, 0, noises, dict(levels), (), sizes, estimates)
    return replace(made, **about)


def write(folder: Path, *args, place: str = "robustness", hparams: str | None = None, **kwargs) -> Path:
    report.write(folder / place, make(*args, **kwargs))
    if hparams is not None:
        (folder / "hparams.yaml").write_text(hparams)
    return folder


@pytest.fixture
def logs(tmp_path, monkeypatch) -> Path:
    """Two recipes with three trainings each."""
    monkeypatch.chdir(tmp_path)
    for name, gain in {"plain": 0.0, "noise": 0.05}.items():
        for version in range(3):
            write(
                Path("logs", name, f"version_{version}"), 10 * version + len(name), gain, hparams=f"lr: 0.1\nseed: {version}\n"
            )
    return Path("logs")


def names(*runs: str, baseline: str | None = None) -> dict[str, int]:
    """The number of trainings of each row."""
    return {name: len(reports) for name, reports in report.compare(runs, baseline).recipes.items()}


# --- which runs


def test_a_folder_of_runs_is_a_recipe_and_a_single_folder_stands_for_those_in_it(logs):
    assert names("logs/plain", "logs/noise") == {"plain": 3, "noise": 3}
    assert names("logs/*") == {"noise": 3, "plain": 3}
    assert names("logs") == names(".") == {"noise": 3, "plain": 3}
    assert names("logs/plain") == {"version_0": 1, "version_1": 1, "version_2": 1}
    assert names("logs/plain/version_[02]", "logs/noise/version_1") == {
        "plain/version_0": 1,
        "plain/version_2": 1,
        "noise/version_1": 1,
    }


def test_a_run_is_a_folder_of_a_logger_a_folder_of_a_report_or_the_file(logs):
    expected = {"plain": 1, "noise": 1}
    for inner in ("", "/robustness", "/robustness/report.json"):
        assert names(f"logs/plain/version_0{inner}", f"logs/noise/version_0{inner}") == expected


def test_trainings_can_be_named(logs):
    assert names("a=logs/plain/version_0,logs/plain/version_2", "b=logs/noise/version_*") == {"a": 2, "b": 3}
    write(Path("lr=0.1"), 5)  # a folder that exists is no name
    assert names("lr=0.1", "b=logs/noise") == {"lr=0.1": 1, "b": 3}


def test_versions_are_in_the_order_of_their_numbers(logs):
    for version in (10, 9):
        write(logs / "plain" / f"version_{version}", version)
    assert list(names("logs/plain")) == [f"version_{i}" for i in (0, 1, 2, 9, 10)]


def test_the_baseline_is_a_name_or_a_further_run_and_comes_first(logs):
    assert list(names("logs", baseline="plain")) == ["plain", "noise"]
    assert list(names("logs", baseline="logs/plain")) == ["plain", "noise"]
    write(Path("old"), 9)
    assert list(names("logs", baseline="old")) == ["old", "logs/noise", "logs/plain"]
    with pytest.raises(ValueError, match=r"baseline must be one of \['noise', 'plain'\] or a run: there is no .*'nothing'"):
        names("logs", baseline="nothing")


def test_a_run_that_is_named_twice_is_compared_once(logs):
    assert list(names("logs/plain", "logs/*")) == ["plain", "noise"]


def test_reports_of_a_test_are_preferred_if_every_run_has_one(logs):
    for version in range(3):
        write(logs / "plain" / f"version_{version}", version, place="test/robustness")
    assert report.compare(["logs/plain"]).place == "test/robustness"
    assert report.compare(["logs"]).place == "robustness"


def test_runs_without_a_report_at_the_same_place_are_refused(logs):
    write(Path("other"), place="test/weights")
    with pytest.raises(ValueError, match=r"no report at the same place: .*version_0 has robustness; .*other has test/weights"):
        names("logs/plain/version_0", "other")


def test_a_folder_without_a_report_lists_what_it_has_and_the_callback_that_writes_one(logs):
    folder = Path("empty", "checkpoints")
    folder.mkdir(parents=True)
    (folder / "last.ckpt").touch()
    with pytest.raises(ValueError, match=r"no report.json in 'empty', which has checkpoints/last.ckpt.*callbacks=\[Robust"):
        names("empty", "logs/plain")
    with pytest.raises(ValueError, match="there is no file or folder 'logs/plian'; logs has noise, plain"):
        names("logs/plian")


# --- trainings of one recipe


def test_trainings_with_other_hyperparameters_than_seeds_are_not_pooled_in_silence(logs):
    write(logs / "plain" / "version_3", 3, hparams="lr: 0.2\nseed: 3\n")
    match = r"differ in 'lr: 0.2' and 'lr: 0.1'.*type python -m lightning_noise compare .*version_3; if .* type plain=logs/"
    with pytest.raises(ValueError, match=match):
        names("logs/plain", "logs/noise")
    assert names("plain=logs/plain", "logs/noise") == {"plain": 4, "noise": 3}


def test_trainings_that_were_evaluated_in_different_ways_are_not_pooled(logs):
    write(logs / "plain" / "version_3", 3, levels=GAUSSIAN)
    with pytest.raises(
        ValueError, match=r"the trainings of 'plain' were evaluated in different ways: noises is .*runs of their"
    ):
        names("plain=logs/plain")


def test_one_training_does_not_count_twice(logs):
    write(logs / "plain" / "version_3", len("plain"))  # the seed of version_0
    with pytest.raises(
        ValueError, match=r"version_0/robustness and .*version_3/robustness have the same values to the last digit"
    ):
        names("logs/plain", "logs/noise")


# --- what is compared


def test_values_and_differences_are_those_of_the_reports():
    runs = {"plain": [make(seed) for seed in range(3)], "noise": [make(seed, 0.05) for seed in range(3, 6)]}
    found = report.compare(runs)
    assert found.pooled == {name: report.pool(reports) for name, reports in runs.items()}
    changes = {(row.condition, row.metric): row for row in report.differences(runs["noise"], runs["plain"])}
    assert found.changes["noise"].items() >= changes.items()
    assert report.compare(runs, baseline="noise").changes["plain"][NOISY, "accuracy"].value == -changes[NOISY, "accuracy"].value


def test_only_what_all_runs_have_is_compared():
    found = report.compare({"a": make(1), "b": make(2, levels={"gaussian": (0.2, 0.4)})})
    assert found.omitted == [
        "gaussian (Gaussian()) at 0.1 and impulse (Impulse()) at 0.1 and 0.3 of a",
        "gaussian (Gaussian()) at 0.4 of b",
    ]
    assert [each.levels for each in found.pooled.values()] == [{"gaussian": (0.2,)}] * 2
    assert "Not compared, because not every run has it: gaussian" in " ".join(str(found).split())


@pytest.mark.parametrize("levels", [GAUSSIAN, {"impulse": (0.3,)}, {"gaussian": (0.2,), "impulse": (0.1, 0.3)}], ids=str)
def test_a_restricted_report_is_that_of_a_monitor_with_fewer_levels(levels):
    found, expected = restrict(make(), levels), make(levels=levels)
    assert (found.levels, found.noises) == (expected.levels, expected.noises)
    for cell, row in found.rows.items():
        assert row.value == pytest.approx(expected.rows[cell].value, rel=1e-12)
        assert row.without == pytest.approx(expected.rows[cell].without, rel=1e-12)
    assert {(NOISY, "accuracy"), (WORST, "loss"), (CLEAN, "ece")} <= found.rows.keys()
    assert restrict(expected, levels) is expected


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make(1, task="binary"), "the runs are of different tasks: a is multiclass and b is binary"),
        (
            make(1, levels={"gaussian": (0.3,)}),
            r"no noise at the same level: a has gaussian \(Gaussian\(\)\) at 0.1 and 0.2 .*; b has",
        ),
        (
            make(1, noises={"gaussian": "Gaussian(0)", "impulse": "Impulse(0)"}),
            r"no noise at the same level: .* type RobustnessM",
        ),
    ],
)
def test_runs_that_have_nothing_in_common_are_refused(other, message):
    with pytest.raises(ValueError, match=message):
        report.compare({"a": make(), "b": other})


# --- what it shows


def cells(text: str, title: str) -> dict[str, list[str]]:
    """The rows of a table by their first cell, the headings by "run"."""
    (part,) = (part for part in text.split("**" + title + "**")[1:2])
    lines = [line.strip("| ").split(" | ") for line in part.split("\n**")[0].splitlines() if line.startswith("|")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


CONDITIONS = [CLEAN, Condition("gaussian"), Condition("impulse"), NOISY, WORST]


def test_the_best_is_bold_and_a_difference_beyond_its_interval_has_a_star():
    found = report.compare({"plain": make(1), "same": make(2), "better": make(3, 0.2)})
    values, changes = cells(str(found), "accuracy, %"), cells(str(found), "accuracy minus that of plain, points")
    assert values["run"] == changes["run"] == ["clean", "gaussian", "impulse", "mean", "worst"]
    assert "plain" not in changes
    assert all(cell.startswith("**") and cell.endswith("** *") for cell in values["better"])
    assert not any("*" in cell for cell in values["plain"])
    for name in ("same", "better"):
        differ = [row.low > 0 or row.high < 0 for row in (found.changes[name][place, "accuracy"] for place in CONDITIONS)]
        assert [cell.endswith(" *") for cell in changes[name]] == [cell.endswith(" *") for cell in values[name]] == differ
    *_, others = found.tables(width=lambda text: 1)
    assert others.headings == ["run", "loss, clean", "loss, mean", "ECE, %, clean", "ECE, %, mean", "mCE"]
    assert others.rows[2][1].startswith("**"), "a lower loss is better"
    assert float(others.rows[0][-1]) == 1


def test_each_row_of_a_column_has_as_many_decimals():
    text = str(report.compare({"plain": [make(1), make(2)], "noise": [make(3, 0.2), make(4, 0.2)], "more": [make(5), make(6)]}))
    rows = [row for name, row in cells(text, "accuracy, %").items() if name in ("plain", "noise", "more")]
    for column in zip(*rows, strict=True):
        numbers = [number for cell in column for number in cell.strip("* ").replace("**", "").split("±")]
        assert len(numbers) == 6
        assert len({len(number.partition(".")[2]) for number in numbers}) == 1


@pytest.mark.parametrize("count", [3, 10])
@pytest.mark.parametrize("n_noises", [2, 8])
def test_no_table_is_wider_than_a_page(count, n_noises):
    levels = {f"noise_{i}": (0.1, 0.2) for i in range(n_noises)}
    text = str(report.compare({f"version_{i}": make(i, levels=levels) for i in range(count)}))
    assert max(map(len, text.splitlines())) <= WIDTH


def test_the_legend_says_what_the_intervals_cover():
    runs = {"plain": [make(seed) for seed in range(3)], "noise": [make(seed, 0.05) for seed in range(3, 6)]}

    def first(found: report.Comparison) -> str:
        return found.legend()[0]

    assert first(report.compare(runs)).startswith("Each row is the mean of 3 trainings.")
    assert first(report.compare(runs)).endswith("which covers other samples and another training.")
    single = report.compare({name: reports[0] for name, reports in runs.items()})
    assert "It does not cover another training" in first(single)
    mixed = first(report.compare({"plain": runs["plain"], "noise": runs["noise"][0]}))
    assert mixed.startswith("plain is the mean of 3 trainings.")
    assert mixed.endswith("noise has a single training, and another is not covered.")
    two = first(report.compare({"plain": runs["plain"], "a": runs["noise"][0], "b": runs["noise"][1]}))
    assert two.endswith("a and b each have a single training, and another is not covered.")
    without = {name: [replace(each, sizes=()) for each in reports] for name, reports in runs.items()}
    assert first(report.compare(without)).endswith("which covers another training, but not other samples.")
    halves = {name: [reports[0], replace(reports[1], n=3)] for name, reports in runs.items()}
    with pytest.raises(ValueError, match="n is 200 in plain 0 and 3 in plain 1"):
        report.compare(halves)


# --- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RUN"),
        (["nothing"], "there is no file or folder 'nothing'"),
        (["logs", "--metric"], "unrecognized arguments: --metric"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(arguments, message, logs, capsys):
    assert refusal(main, arguments, capsys).startswith(f"lightning_noise: {message}")


def test_it_writes_the_tables_all_values_and_a_figure(logs, capsys):
    main(["logs", "--baseline", "plain", "--output", "out/of/this"])
    folder = Path("out/of/this")
    found = report.compare(["logs"], "plain")
    assert capsys.readouterr().out.startswith(f"{found}\n\nWritten to {folder}")
    assert (folder / "compare.md").read_text() == f"{found}\n"
    rows = list(csv.DictReader((folder / "compare.csv").read_text().splitlines()))
    assert len(rows) == sum(map(len, found.values.values()))
    (row,) = (row for row in rows if row["run"] == "noise" and row["noise"] == "overall" and row["metric"] == "score")
    change = found.changes["noise"][OVERALL, "score"]
    assert float(row["difference_low"]) == change.low
    assert (folder / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "compare.pdf").read_bytes()[:4] == b"%PDF"


def test_a_terminal_shows_the_best_in_bold_and_no_markdown(logs, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the output for a terminal
    monkeypatch.setenv("TERM", "xterm")
    main(["logs", "--baseline", "plain"])
    printed = capsys.readouterr().out
    best = max(rows[CLEAN, "accuracy"].value for rows in report.compare(["logs"], "plain").values.values())
    assert f"\x1b[1m{100 * best:.1f}±" in printed
    assert "**" not in printed
    assert "| run" not in printed


@pytest.mark.slow  # a process of its own
def test_a_reader_who_has_seen_enough_gets_no_traceback(logs):
    command = [sys.executable, "-m", "lightning_noise", "compare", "logs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()  # as `| head` does
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.slow
def test_two_recipes_with_two_seeds_are_compared_by_the_command(tmp_path):
    for name, level in {"plain": 0.0, "noise": 0.5}.items():
        for seed in range(2):
            callbacks = [InputNoise(noise.Gaussian(), level), RobustnessMonitor([noise.Gaussian()], [0.5, 1.0])]
            fit(callbacks, logger=CSVLogger(tmp_path, name), max_epochs=1, seed=seed)
    command = [sys.executable, "-m", "lightning_noise", "compare", "plain", "noise", "--output", "both"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert (result.returncode, result.stderr) == (0, "")
    rows = cells(result.stdout, "accuracy, %")
    assert rows.keys() >= {"plain", "noise"}
    assert "Each row is the mean of 2 trainings." in result.stdout
    assert {path.name for path in (tmp_path / "both").iterdir()} == {f"compare.{end}" for end in ("md", "csv", "png", "pdf")}
