"""A report says how sure its figures are, and that is true; it reads back as it was written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from lightning_noise import report
from lightning_noise.metrics import jackknife_error
from lightning_noise.report.model import Figure, Report

N_GROUPS = 20
LEVELS = {"gaussian": (0.1, 0.2)}
NOISES = {"gaussian": "Gaussian()"}
Array = NDArray[Any]


def stream(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def means(samples: Mapping[str, Array], groups: Array, **about: Any) -> Report:
    """The report of means over samples, each of which is in a group."""
    sizes = np.bincount(groups, minlength=N_GROUPS)
    sums = {key: np.bincount(groups, x, N_GROUPS) for key, x in samples.items()}
    values = {key: float(x.mean()) for key, x in samples.items()}
    with np.errstate(invalid="ignore"):
        left_out = {key: (sums[key].sum() - sums[key]) / (sizes.sum() - sizes) for key in sums}
    without = [{key: float(x[group]) for key, x in left_out.items()} for group in range(N_GROUPS)]
    return report.make(values, without, sizes.tolist(), **{"noises": NOISES, "levels": LEVELS, **about})


# --- the jackknife


def test_the_error_is_that_of_busing_et_al():
    generator = stream()
    sizes, without, total = generator.integers(1, 9, N_GROUPS), generator.random(N_GROUPS), 0.4
    h = sizes.sum() / sizes
    estimate = N_GROUPS * total - ((1 - sizes / sizes.sum()) * without).sum()
    pseudo = h * total - (h - 1) * without
    expected = math.sqrt(((pseudo - estimate) ** 2 / (h - 1)).mean())
    assert jackknife_error(total, without.tolist(), sizes.tolist()) == pytest.approx(expected, rel=1e-12)


def test_the_error_of_a_mean_over_groups_of_one_sample_is_that_of_the_textbook():
    x = stream().exponential(size=50)
    without = ((x.sum() - x) / 49).tolist()
    assert jackknife_error(float(x.mean()), without, [1] * 50) == pytest.approx(x.std(ddof=1) / math.sqrt(50), rel=1e-12)


def test_the_squared_error_of_a_mean_is_unbiased_for_groups_of_any_size():
    generator, squares = stream(), []
    for _ in range(2000):
        groups = np.minimum(generator.integers(0, 60, 200), N_GROUPS - 1)  # two thirds of the samples are in the last
        squares.append(means({"loss": generator.normal(size=200)}, groups)["figures"]["loss"]["standard_error"] ** 2)
    assert np.mean(squares) == pytest.approx(1 / 200, abs=5 * np.std(squares) / math.sqrt(2000))


def test_empty_groups_do_not_count_and_one_group_has_no_error():
    assert jackknife_error(3.0, [4.5, 3.0, 3.0, 1.5], [1, 1, 0, 1]) == jackknife_error(3.0, [4.5, 3.0, 1.5], [1, 1, 1])
    assert math.isnan(jackknife_error(3.0, [3.0, math.nan], [0, 4]))
    assert math.isnan(jackknife_error(3.0, [], []))


def test_what_does_not_scatter_has_no_error_at_all():
    assert jackknife_error(0.1, [0.1] * 7, [3, 1, 4, 1, 5, 9, 2]) == 0  # and not one of rounding


# --- intervals


def test_the_interval_has_the_degrees_of_freedom_of_its_errors():
    samples, groups = {"clean/loss": stream().normal(size=300)}, stream(1).integers(0, N_GROUPS, 300)
    alone = means(samples, groups)["figures"]["clean/loss"]
    error = alone["standard_error"]
    assert alone["high"] - alone["value"] == pytest.approx(stats.t.ppf(0.975, N_GROUPS - 1) * error, rel=1e-6)
    both = means(samples, groups, draws=5, spread={"clean/loss": 2 * error})["figures"]["clean/loss"]
    degrees = (1 + 4) ** 2 / (1 / (N_GROUPS - 1) + 4**2 / (5 - 1))
    assert both["standard_error"] == pytest.approx(math.sqrt(5) * error, rel=1e-12)
    assert both["value"] - both["low"] == pytest.approx(stats.t.ppf(0.975, degrees) * math.sqrt(5) * error, rel=1e-6)


def accuracy(share: float) -> Callable[[np.random.Generator, int], dict[str, Array]]:
    return lambda generator, n: {"clean/accuracy": generator.random(n) < share}


def drop(generator: np.random.Generator, n: int) -> dict[str, Array]:
    hardness = generator.random(n)
    return {"gaussian/accuracy_drop": (hardness < 0.95) * 1.0 - (hardness < 0.8)}


def loss(generator: np.random.Generator, n: int) -> dict[str, Array]:
    return {"clean/loss": generator.exponential(size=n)}


@pytest.mark.parametrize("n", [100, 400, 5000])
@pytest.mark.parametrize(
    ("draw", "truth"),
    [(accuracy(0.7), 0.7), (accuracy(0.97), 0.97), (drop, 0.15), (loss, 1.0)],
    ids=["70", "97", "drop", "loss"],
)
def test_95_percent_of_the_intervals_hold_the_truth(draw, truth, n):
    generator, held, runs = stream(n), 0, 500
    for _ in range(runs):
        (figure,) = means(draw(generator, n), generator.integers(0, N_GROUPS, n))["figures"].values()
        held += figure["low"] <= truth <= figure["high"]
    # five standard errors of the count, and 2 % for the skewness of 100 losses or 15 samples that make the drop
    assert held / runs == pytest.approx(0.95, abs=5 * math.sqrt(0.95 * 0.05 / runs) + (0.02 if n == 100 else 0))


def calibration_error(confidence: Array, correct: Array, bins: Array) -> float:
    return float(np.abs(np.bincount(bins, correct - confidence, 15)).sum() / len(bins))


@pytest.mark.parametrize(("n", "too_sure"), [(100, 0.1), (400, 0.1), (400, 0.0), (5000, 0.1)])
def test_the_intervals_of_a_calibration_error_hold_its_mean(n, too_sure):
    generator, figures, runs = stream(n), [], 200
    for _ in range(runs):
        confidence, groups = 1 - generator.random(n) / 2, generator.integers(0, N_GROUPS, n)
        correct, bins = (generator.random(n) < confidence - too_sure) * 1.0, np.minimum((15 * confidence).astype(int), 14)
        parts = [calibration_error(*(x[groups != group] for x in (confidence, correct, bins))) for group in range(N_GROUPS)]
        sizes = np.bincount(groups, minlength=N_GROUPS).tolist()
        values, without = {"clean/ece": calibration_error(confidence, correct, bins)}, [{"clean/ece": part} for part in parts]
        figures.append(report.make(values, without, sizes, noises={}, levels={})["figures"]["clean/ece"])
    mean = np.mean([figure["value"] for figure in figures])
    # too many rather than too few: the absolute value of what is about 0 scatters less than the jackknife takes it to
    assert np.mean([figure["low"] <= mean <= figure["high"] for figure in figures]) > 0.95 - 5 * math.sqrt(0.95 * 0.05 / runs)


def test_the_scatter_of_draws_that_all_samples_share_widens_the_interval():
    generator, held, runs, n, draws = stream(), {True: 0, False: 0}, 500, 400, 3
    for _ in range(runs):
        weights = generator.normal(size=draws) / 10
        samples = {"weight/1/loss": 1 + weights.mean() + generator.normal(size=n)}
        spread = {"weight/1/loss": float(weights.std(ddof=1)) / math.sqrt(draws)}
        groups = generator.integers(0, N_GROUPS, n)
        for known in held:
            made = means(samples, groups, draws=draws, spread=spread if known else {})["figures"]["weight/1/loss"]
            held[known] += made["low"] <= 1 <= made["high"]
    # the degrees of freedom are estimated, which is known to hold too much rather than too little
    assert 0.95 - 5 * math.sqrt(0.95 * 0.05 / runs) < held[True] / runs
    assert held[False] / runs < 0.9


@pytest.mark.parametrize(("right", "low", "high"), [(1.0, 50 / (50 + 1.96**2), 1.0), (0.0, 0.0, 1.96**2 / (50 + 1.96**2))])
def test_without_a_mistake_an_accuracy_is_not_certain(right, low, high):
    figure = means({"clean/accuracy": np.full(50, right)}, stream().integers(0, N_GROUPS, 50))["figures"]["clean/accuracy"]
    assert figure["standard_error"] == 0
    assert (figure["low"], figure["high"]) == pytest.approx((low, high), abs=1e-12)


def test_correlated_places_of_a_sample_count_as_the_sample():
    correct, groups = stream().random(400) < 0.9, stream(1).integers(0, N_GROUPS, 400)
    once = means({"clean/accuracy": correct}, groups)["figures"]["clean/accuracy"]
    places = means({"clean/accuracy": correct.repeat(50)}, groups.repeat(50))["figures"]["clean/accuracy"]
    assert (places["low"], places["high"]) == pytest.approx((once["low"], once["high"]), rel=1e-9)


# --- against a baseline


def pair(n: int = 2000, **about: Any) -> tuple[Report, Report, Array, Array]:
    """Two models that fail on much the same samples."""
    generator = stream()
    hardness, groups = generator.normal(size=n), generator.integers(0, N_GROUPS, n)
    new, old = (hardness + 0.1 * generator.normal(size=n) < limit for limit in (1.3, 1.2))
    key, about = "gaussian/0.1/accuracy", {"levels": {"gaussian": (0.1,)}, **about}
    return means({key: new}, groups, **about), means({key: old}, groups, **about), new * 1.0 - old, groups


def test_a_paired_difference_is_the_mean_of_the_differences():
    new, old, change, groups = pair()
    found, expected = report.differences(new, old)["gaussian/0.1/accuracy"], means({"x": change}, groups)["figures"]["x"]
    for part in ("value", "standard_error", "low", "high"):
        assert found[part] == pytest.approx(expected[part], rel=1e-9)
    assert found["paired"]
    # that of McNemar, but for the scatter of an error with 19 degrees of freedom
    assert found["standard_error"] == pytest.approx(change.std() / math.sqrt(2000), rel=5 / math.sqrt(2 * 19))
    errors = [each["figures"]["gaussian/0.1/accuracy"]["standard_error"] for each in (new, old)]
    assert found["standard_error"] < math.hypot(*errors) / 1.5


def test_reports_of_other_samples_are_not_paired():
    new, _, _, _ = pair()
    _, old, _, _ = pair(1000)
    found = report.differences(new, old)["gaussian/0.1/accuracy"]
    errors = [each["figures"]["gaussian/0.1/accuracy"]["standard_error"] for each in (new, old)]
    assert found["standard_error"] == pytest.approx(math.hypot(*errors), rel=1e-12)
    assert not found["paired"]


def test_a_model_does_not_differ_from_itself():
    new, _, _, _ = pair()
    found = report.differences(new, new)["gaussian/0.1/accuracy"]
    assert [found[part] for part in ("value", "standard_error", "low", "high")] == [0, 0, 0, 0]
    ratio = report.corruption(new, new)["mce"]
    assert [ratio[part] for part in ("value", "standard_error", "low", "high")] == [1, 0, 1, 1]


def full(noises: Mapping[str, str], levels: Mapping[str, tuple[float, ...]]) -> Report:
    keys = [f"{tag}/{level:g}/accuracy" for tag in noises for level in levels[tag]]
    keys += ["clean/accuracy", *(f"{tag}/accuracy_drop" for tag in noises), "score"]
    generator = stream()
    samples = {key: generator.random(200) < 0.8 for key in keys}
    return means(samples, generator.integers(0, N_GROUPS, 200), noises=noises, levels=levels)


def test_only_what_was_measured_through_the_same_noise_is_compared():
    both = full({"a": "Gaussian()", "b": "Impulse()"}, {"a": (0.1, 0.2), "b": (0.5,)})
    assert report.differences(both, both).keys() == both["figures"].keys()
    fewer_levels = full({"a": "Gaussian()", "b": "Impulse()"}, {"a": (0.1,), "b": (0.5,)})
    kept = {"clean/accuracy", "a/0.1/accuracy", "b/0.5/accuracy", "b/accuracy_drop"}
    assert report.differences(both, fewer_levels).keys() == kept
    other_noise = full({"a": "Uniform()", "b": "Impulse()"}, {"a": (0.1, 0.2), "b": (0.5,)})
    assert report.differences(both, other_noise).keys() == {"clean/accuracy", "b/0.5/accuracy", "b/accuracy_drop"}
    assert report.corruption(both, other_noise).keys() == {"b/corruption_error", "mce"}
    assert report.corruption(full({"a": "Uniform()"}, {"a": (0.1,)}), both) == {}


def test_corruption_errors_are_ratios_of_sums_over_the_levels():
    generator = stream()
    groups = generator.integers(0, N_GROUPS, 500)
    keys = ["gaussian/0.1/accuracy", "gaussian/0.2/accuracy"]
    new, old = ({key: generator.random(500) < share for key in keys} for share in (0.8, 0.6))
    found = report.corruption(means(new, groups), means(old, groups))
    wrong_new, wrong_old = (sum(1.0 - x[key] for key in keys) for x in (new, old))
    ratio = wrong_new.sum() / wrong_old.sum()  # type: ignore[union-attr]
    left_out = [float(wrong_new[groups != g].sum() / wrong_old[groups != g].sum()) for g in range(N_GROUPS)]  # type: ignore[index]
    expected = jackknife_error(float(ratio), left_out, np.bincount(groups, minlength=N_GROUPS).tolist())
    assert found["mce"] == found["gaussian/corruption_error"]
    assert found["mce"]["value"] == pytest.approx(ratio, rel=1e-12)
    assert found["mce"]["standard_error"] == pytest.approx(expected, rel=1e-9)


def test_a_baseline_without_errors_has_no_corruption_error():
    right = means({f"gaussian/{level}/accuracy": np.ones(50) for level in (0.1, 0.2)}, stream().integers(0, N_GROUPS, 50))
    assert math.isnan(report.corruption(right, right)["mce"]["value"])


# --- written and read


def test_a_report_reads_back(tmp_path):
    new, old, _, _ = pair(weights=["gaussian"], draws=2, spread={"gaussian/0.1/accuracy": 0.01})
    report.write(tmp_path / "new", new, old)
    assert report.read(tmp_path / "new") == new
    assert report.read(tmp_path / "new" / "report.json") == new
    assert (tmp_path / "new" / "report.md").read_text() == report.markdown(new, old)


def test_what_is_no_number_is_null(tmp_path):
    values = {"clean/accuracy": 0.5, "clean/ece_z": math.inf, "clean/failure_auroc": math.nan}
    made = report.make(values, [values], [1], noises={}, levels={})
    report.write(tmp_path, made, made)
    held = json.loads((tmp_path / "report.json").read_text())["figures"]
    assert [held[key]["value"] for key in values] == [0.5, None, None]
    assert held["clean/accuracy"]["low"] is None, "of one sample nothing is known"
    read = report.read(tmp_path)["figures"]
    assert math.isnan(read["clean/ece_z"]["value"])
    assert math.isnan(read["clean/failure_auroc"]["without"][0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no report at .*give a report.json"),
        ("{", "is no JSON"),
        ("[]", "it lacks"),
        ('{"n": 3}', r"it lacks \['version'"),
    ],
)
def test_a_file_that_is_no_report_is_an_error(tmp_path, text, message):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        report.read(tmp_path)


# --- for people


def cells(markdown: str, heading: str) -> list[list[str]]:
    section = re.split(r"^## ", markdown, flags=re.MULTILINE)
    (chosen,) = (part for part in section if part.startswith(heading))
    rows = [line.strip("| ").split(" | ") for line in chosen.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in (rows[0], *rows[2:])]


def figure(value: float, half: float = 0.0) -> Figure:
    return {"value": value, "standard_error": half / 2, "low": value - half, "high": value + half, "spread": 0.0, "without": []}


def test_a_row_for_each_noise_and_level_with_as_many_digits_as_are_known():
    made = full(NOISES, LEVELS)
    made["figures"] = {
        "clean/accuracy": figure(0.98765, 0.0123),
        "clean/ece": figure(0.031, 0.002),
        "clean/ece_floor": figure(0.01),
        "clean/ece_p": figure(0.0001),
        "gaussian/0.1/accuracy": figure(0.9, 0.00123),
        "gaussian/0.1/own": figure(12.3456),
        "gaussian/0.2/accuracy": figure(math.nan),
        "accuracy_mean": figure(0.5, 0.1),
    }
    assert cells(report.markdown(made), "Figures") == [
        ["noise", "level", "accuracy, %", "ECE, %", "own"],
        ["clean", "", "98.8 (97.5 to 100.0)", "**3.10** / 1", "-"],
        ["gaussian", "0.1", "90.00 (89.88 to 90.12)", "-", "12.35"],
        ["gaussian", "0.2", "-", "-", "-"],
        ["mean", "", "50 (40 to 60)", "-", "-"],
    ]


def test_a_change_is_bold_where_its_interval_leaves_out_0():
    generator, n = stream(), 400
    groups, hardness = generator.integers(0, N_GROUPS, n), np.sort(generator.random(n))

    def of_model(*right: int) -> Report:
        places = ("clean", "gaussian/0.1", "gaussian/0.2")
        return means({f"{place}/accuracy": hardness < hardness[k] for place, k in zip(places, right, strict=True)}, groups)

    new, old = of_model(380, 320, 302), of_model(380, 240, 300)
    markdown, changes, ratio = report.markdown(new, old), report.differences(new, old), report.corruption(new, old)["mce"]
    lots, few = (changes[f"gaussian/{level}/accuracy"] for level in LEVELS["gaussian"])
    assert [row[2] for row in cells(markdown, "Against")[1:4]] == [
        "0",
        f"**+20.0 ± {50 * (lots['high'] - lots['low']):.1f}**",
        f"+0.50 ± {50 * (few['high'] - few['low']):.2f}",
    ]
    assert f"this model makes **{ratio['value']:.3f}** ({ratio['low']:.3f} to" in markdown
    assert "not paired" not in markdown
    assert "not paired" in report.markdown(new, means({"clean/accuracy": hardness[:300] < 0.9}, groups[:300]))


def test_summaries_are_in_units_that_grow_with_the_damage():
    made = full(NOISES, LEVELS)
    made["figures"] |= {"gaussian/accuracy_drop": figure(0.1, 0.02), "gaussian/loss_drop": figure(-0.3, 0.1)}
    assert cells(report.markdown(made), "Averaged") == [
        ["noise", "accuracy lost, points", "loss gained"],
        ["gaussian", "10.0 (8.0 to 12.0)", "0.30 (0.20 to 0.40)"],
    ]


def test_a_summary_that_some_noises_have_is_shown():
    made = full({"gaussian": "Gaussian()", "weight": "WeightNoise(Gaussian())"}, {"gaussian": (0.1,), "weight": (0.5,)})
    made["figures"]["weight/sensitivity"] = figure(0.2)
    heading, gaussian, weight = cells(report.markdown(made), "Averaged")
    assert (heading[-1], gaussian[-1], weight[-1]) == ("sensitivity", "-", "0.2")


def test_the_outcome_names_the_worst():
    made = full({"a": "Gaussian()", "b": "Impulse()"}, {"a": (0.1, 0.2), "b": (0.5,)})
    made["figures"]["a/0.2/accuracy"] = figure(0.3, 0.02)
    outcome = report.markdown(made).splitlines()[2]
    assert outcome.startswith("Accuracy is **")
    assert outcome.endswith("**30.0 %** (28.0 to 32.0) at worst, under a at 0.2.")
    made["figures"] = {key.replace("accuracy", "loss"): each for key, each in made["figures"].items()}  # where more is worse
    made["figures"]["b/0.5/loss"] = figure(3.0, 0.2)
    assert report.markdown(made).splitlines()[2].endswith("**3.00** (2.80 to 3.20) at worst, under b at 0.5.")


@pytest.mark.parametrize(
    "samples", [{"clean/loss": np.ones(1)}, {"clean/own": np.full(30, math.nan)}, {"clean/accuracy": np.ones(30)}]
)
def test_a_report_of_little_is_still_written(samples):
    n = len(next(iter(samples.values())))
    made = means(samples, np.arange(n) % N_GROUPS, noises={}, levels={})
    assert report.markdown(made, made).startswith("# Robustness report")


def test_one_draw_of_what_all_samples_share_is_said():
    levels, noises = {"weight": (0.1,)}, {"weight": "WeightNoise(Gaussian())"}
    samples, groups = {"clean/loss": np.ones(9), "weight/0.1/loss": np.ones(9)}, np.arange(9)
    said = "All samples share the draw of weight"
    assert said in report.markdown(means(samples, groups, noises=noises, levels=levels, weights=["weight"]))
    assert said not in report.markdown(means(samples, groups, noises=noises, levels=levels, weights=["weight"], draws=3))
    assert said not in report.markdown(means(samples, groups, noises=noises, levels=levels))
