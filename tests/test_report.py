"""A report says how sure its figures are, and that is true; it reads back as it was written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from lightning_noise import __version__, report
from lightning_noise.evaluation.conditions import CLEAN, NOISY, OVERALL, WORST, Condition
from lightning_noise.evaluation.results import Estimate, estimate, jackknife, shares_draws
from lightning_noise.metrics import jackknife_error, t_interval, wilson_interval
from lightning_noise.report import Report
from lightning_noise.tasks import Multiclass

N_GROUPS = 20
LEVELS = {"gaussian": (0.1, 0.2)}
NOISES = {"gaussian": "Gaussian()"}
Array = NDArray[Any]
Cell = tuple[Condition, str]
ACCURACY, LOSS, ECE = ((CLEAN, metric) for metric in ("accuracy", "loss", "ece"))
NEAR, FAR = (Condition("gaussian", level) for level in LEVELS["gaussian"])


def stream(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def make(
    values: Mapping[Cell, float],
    without: Mapping[Cell, Sequence[float]],
    sizes: Sequence[int],
    *,
    noises: Mapping[str, str] = NOISES,
    levels: Mapping[str, tuple[float, ...]] = LEVELS,
    spread: Mapping[Cell, float] | None = None,
    shared: tuple[str, ...] = (),
    n_draws: int = 1,
) -> Report:
    """The report of values with their errors, made of them as that of an evaluation is."""
    parts = {cell: np.array([value, *without[cell]]) for cell, value in values.items()}
    spreads = np.array([(spread or {}).get(cell, 0.0) for cell in values])
    drawn = [shares_draws(condition, shared) for condition, _ in values]
    errors = [jackknife(parts, sizes), (np.where(drawn, spreads, 0.0), n_draws - 1)]
    estimates = estimate(parts, errors, sum(sizes), Multiclass.proportions, spreads)
    about = {"noises": dict(noises), "levels": dict(levels), "shared": shared, "n_draws": n_draws}
    return Report("multiclass", sum(sizes), seed=0, sizes=tuple(sizes), estimates=tuple(estimates), **about)


def means(samples: Mapping[Any, Array], groups: Array, **about: Any) -> Report:
    """The report of means over samples, each of which is in a group."""
    sizes = np.bincount(groups, minlength=N_GROUPS)
    sums = {cell: np.bincount(groups, x, N_GROUPS) for cell, x in samples.items()}
    values = {cell: float(x.mean()) for cell, x in samples.items()}
    with np.errstate(invalid="ignore"):
        without = {cell: ((sums[cell].sum() - sums[cell]) / (sizes.sum() - sizes)).tolist() for cell in sums}
    return make(values, without, sizes.tolist(), **about)


def differences(new: Report, old: Report) -> dict[Cell, Estimate]:
    return {(each.condition, each.metric): each for each in report.differences(new, old)}


def corruption(new: Report, old: Report) -> dict[Cell, Estimate]:
    return {(each.condition, each.metric): each for each in report.corruption(new, old)}


# --- the jackknife


def test_the_error_is_that_of_busing_et_al():
    generator = stream()
    sizes, without, total = generator.integers(1, 9, N_GROUPS), generator.random(N_GROUPS), 0.4
    h = sizes.sum() / sizes
    estimate = N_GROUPS * total - ((1 - sizes / sizes.sum()) * without).sum()
    pseudo = h * total - (h - 1) * without
    expected = math.sqrt(((pseudo - estimate) ** 2 / (h - 1)).mean())
    assert jackknife_error(total, without.tolist(), sizes.tolist()) == pytest.approx(expected, rel=1e-12)


def test_a_sum_that_no_group_changes_has_no_error_of_rounding():
    sizes = [2, 4, 1, 1, 3, 1, 20]
    without = [1 / (sum(sizes) - size) for size in sizes]
    assert jackknife_error(1 / sum(sizes), without, sizes) == 0
    assert math.isnan(jackknife_error(math.nan, without, sizes))


def test_a_perplexity_beyond_all_squares_has_no_interval_and_is_no_warning():
    error = jackknife_error(1e200, [1e200, 3e200, 2e200], [1, 1, 1])
    interval = t_interval(1e200, [(error, 2)])
    assert error == math.inf
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_the_error_of_a_mean_over_groups_of_one_sample_is_that_of_the_textbook():
    x = stream().exponential(size=50)
    without = ((x.sum() - x) / 49).tolist()
    assert jackknife_error(float(x.mean()), without, [1] * 50) == pytest.approx(x.std(ddof=1) / math.sqrt(50), rel=1e-12)


def test_the_squared_error_of_a_mean_is_unbiased_for_groups_of_any_size():
    generator, squares = stream(), []
    for _ in range(2000):
        groups = np.minimum(generator.integers(0, 60, 200), N_GROUPS - 1)  # two thirds of the samples are in the last
        squares.append(means({LOSS: generator.normal(size=200)}, groups).rows[LOSS].standard_error ** 2)
    assert np.mean(squares) == pytest.approx(1 / 200, abs=5 * float(np.std(squares)) / math.sqrt(2000))


def test_empty_groups_do_not_count_and_one_group_has_no_error():
    assert jackknife_error(3.0, [4.5, 3.0, 3.0, 1.5], [1, 1, 0, 1]) == jackknife_error(3.0, [4.5, 3.0, 1.5], [1, 1, 1])
    assert math.isnan(jackknife_error(3.0, [3.0, math.nan], [0, 4]))
    assert math.isnan(jackknife_error(3.0, [], []))


def test_what_does_not_scatter_has_no_error_at_all():
    assert jackknife_error(0.1, [0.1] * 7, [3, 1, 4, 1, 5, 9, 2]) == 0  # and not one of rounding


# --- intervals


def test_the_interval_has_the_degrees_of_freedom_of_its_errors():
    cell = Condition("gaussian", 0.1), "loss"
    samples, groups = {cell: stream().normal(size=300)}, stream(1).integers(0, N_GROUPS, 300)
    alone = means(samples, groups).rows[cell]
    error = alone.standard_error
    assert alone.high - alone.value == pytest.approx(stats.t.ppf(0.975, N_GROUPS - 1) * error, rel=1e-6)
    both = means(samples, groups, n_draws=5, spread={cell: 2 * error}, shared=("gaussian",)).rows[cell]
    degrees = (1 + 4) ** 2 / (1 / (N_GROUPS - 1) + 4**2 / (5 - 1))
    assert both.standard_error == pytest.approx(math.sqrt(5) * error, rel=1e-12)
    assert both.value - both.low == pytest.approx(stats.t.ppf(0.975, degrees) * math.sqrt(5) * error, rel=1e-6)
    own_draws = means(samples, groups, n_draws=5, spread={cell: 2 * error}).rows[cell]
    assert own_draws.standard_error == error, "the scatter of the samples holds that of draws of their own"


def accuracy(share: float) -> Callable[[np.random.Generator, int], dict[Cell, Array]]:
    return lambda generator, n: {ACCURACY: generator.random(n) < share}


def drop(generator: np.random.Generator, n: int) -> dict[Cell, Array]:
    hardness = generator.random(n)
    return {(Condition("gaussian"), "accuracy_drop"): (hardness < 0.95) * 1.0 - (hardness < 0.8)}


def loss(generator: np.random.Generator, n: int) -> dict[Cell, Array]:
    return {LOSS: generator.exponential(size=n)}


@pytest.mark.parametrize("n", [100, 400, 5000])
@pytest.mark.parametrize(
    ("draw", "truth"),
    [(accuracy(0.7), 0.7), (accuracy(0.97), 0.97), (drop, 0.15), (loss, 1.0)],
    ids=["70", "97", "drop", "loss"],
)
def test_95_percent_of_the_intervals_hold_the_truth(draw, truth, n):
    generator, held, runs = stream(n), 0, 500
    for _ in range(runs):
        (found,) = means(draw(generator, n), generator.integers(0, N_GROUPS, n)).estimates
        held += found.low <= truth <= found.high
    # five standard errors of the count, and 2 % for the skewness of 100 losses or 15 samples that make the drop
    assert held / runs == pytest.approx(0.95, abs=5 * math.sqrt(0.95 * 0.05 / runs) + (0.02 if n == 100 else 0))


def calibration_error(confidence: Array, correct: Array, bins: Array) -> float:
    return float(np.abs(np.bincount(bins, correct - confidence, 15)).sum() / len(bins))


@pytest.mark.parametrize(("n", "too_sure"), [(100, 0.1), (400, 0.1), (400, 0.0), (5000, 0.1)])
def test_the_intervals_of_a_calibration_error_hold_its_mean(n, too_sure):
    generator, found, runs = stream(n), [], 200
    for _ in range(runs):
        confidence, groups = 1 - generator.random(n) / 2, generator.integers(0, N_GROUPS, n)
        correct, bins = (generator.random(n) < confidence - too_sure) * 1.0, np.minimum((15 * confidence).astype(int), 14)
        parts = [calibration_error(*(x[groups != group] for x in (confidence, correct, bins))) for group in range(N_GROUPS)]
        sizes = np.bincount(groups, minlength=N_GROUPS).tolist()
        found.append(make({ECE: calibration_error(confidence, correct, bins)}, {ECE: parts}, sizes).rows[ECE])
    mean = np.mean([each.value for each in found])
    # too many rather than too few: the absolute value of what is about 0 scatters less than the jackknife takes it to
    assert np.mean([each.low <= mean <= each.high for each in found]) > 0.95 - 5 * math.sqrt(0.95 * 0.05 / runs)


def test_the_limits_of_a_proportion_are_not_rounded_beyond_0_or_1_or_the_proportion():
    for n in range(1, 300):
        share = np.arange(n + 1) / n
        _, low, high = wilson_interval(share, [(np.sqrt(share * (1 - share) / n), 19)], n)
        assert ((low >= 0) & (low <= share) & (share <= high) & (high <= 1)).all(), n


def test_the_scatter_of_draws_that_all_samples_share_widens_the_interval():
    generator, held, runs, n, draws = stream(), {True: 0, False: 0}, 500, 400, 3
    cell = Condition("weight", 1.0), "loss"
    for _ in range(runs):
        weights = generator.normal(size=draws) / 10
        samples = {cell: 1 + weights.mean() + generator.normal(size=n)}
        spread = {cell: float(weights.std(ddof=1)) / math.sqrt(draws)}
        groups = generator.integers(0, N_GROUPS, n)
        for known in held:
            made = means(samples, groups, n_draws=draws, spread=spread, shared=("weight",) if known else ()).rows[cell]
            held[known] += made.low <= 1 <= made.high
    # the degrees of freedom are estimated, which is known to hold too much rather than too little
    assert 0.95 - 5 * math.sqrt(0.95 * 0.05 / runs) < held[True] / runs
    assert held[False] / runs < 0.9


@pytest.mark.parametrize(("right", "low", "high"), [(1.0, 50 / (50 + 1.96**2), 1.0), (0.0, 0.0, 1.96**2 / (50 + 1.96**2))])
def test_without_a_mistake_an_accuracy_is_not_certain(right, low, high):
    found = means({ACCURACY: np.full(50, right)}, stream().integers(0, N_GROUPS, 50)).rows[ACCURACY]
    assert found.standard_error == 0
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)


def test_correlated_places_of_a_sample_count_as_the_sample():
    correct, groups = stream().random(400) < 0.9, stream(1).integers(0, N_GROUPS, 400)
    once = means({ACCURACY: correct}, groups).rows[ACCURACY]
    places = means({ACCURACY: correct.repeat(50)}, groups.repeat(50)).rows[ACCURACY]
    assert (places.low, places.high) == pytest.approx((once.low, once.high), rel=1e-9)


# --- against a baseline


PAIRED = NEAR, "accuracy"


def pair(n: int = 2000, **about: Any) -> tuple[Report, Report, Array, Array]:
    """Two models that fail on much the same samples."""
    generator = stream()
    hardness, groups = generator.normal(size=n), generator.integers(0, N_GROUPS, n)
    new, old = (hardness + 0.1 * generator.normal(size=n) < limit for limit in (1.3, 1.2))
    about = {"levels": {"gaussian": (0.1,)}, **about}
    return means({PAIRED: new}, groups, **about), means({PAIRED: old}, groups, **about), new * 1.0 - old, groups


def test_a_paired_difference_is_the_mean_of_the_differences():
    new, old, change, groups = pair()
    found, expected = differences(new, old)[PAIRED], means({LOSS: change}, groups).rows[LOSS]
    for part in ("value", "standard_error", "low", "high"):
        assert getattr(found, part) == pytest.approx(getattr(expected, part), rel=1e-9)
    # that of McNemar, but for the scatter of an error with 19 degrees of freedom
    assert found.standard_error == pytest.approx(change.std() / math.sqrt(2000), rel=5 / math.sqrt(2 * 19))
    errors = [each.rows[PAIRED].standard_error for each in (new, old)]
    assert found.standard_error < math.hypot(*errors) / 1.5


def test_reports_of_other_samples_are_not_paired():
    new, _, _, _ = pair()
    _, old, _, _ = pair(1000)
    found = differences(new, old)[PAIRED]
    errors = [each.rows[PAIRED].standard_error for each in (new, old)]
    assert found.standard_error == pytest.approx(math.hypot(*errors), rel=1e-12)


def test_a_model_does_not_differ_from_itself():
    new, _, _, _ = pair()
    found = differences(new, new)[PAIRED]
    assert (found.value, found.standard_error, found.low, found.high) == (0, 0, 0, 0)
    ratio = corruption(new, new)[OVERALL, "mce"]
    assert (ratio.value, ratio.standard_error, ratio.low, ratio.high) == (1, 0, 1, 1)


def full(noises: Mapping[str, str], levels: Mapping[str, tuple[float, ...]]) -> Report:
    cells = [(Condition(name, level), "accuracy") for name in noises for level in levels[name]]
    cells += [ACCURACY, *((Condition(name), "accuracy_drop") for name in noises), (OVERALL, "score")]
    generator = stream()
    samples = {cell: generator.random(200) < 0.8 for cell in cells}
    return means(samples, generator.integers(0, N_GROUPS, 200), noises=noises, levels=levels)


def test_only_what_was_measured_through_the_same_noise_is_compared():
    both = full({"a": "Gaussian()", "b": "Impulse()"}, {"a": (0.1, 0.2), "b": (0.5,)})
    assert differences(both, both).keys() == both.rows.keys()
    fewer_levels = full({"a": "Gaussian()", "b": "Impulse()"}, {"a": (0.1,), "b": (0.5,)})
    of_b = {ACCURACY, (Condition("b", 0.5), "accuracy"), (Condition("b"), "accuracy_drop")}
    assert differences(both, fewer_levels).keys() == of_b | {(Condition("a", 0.1), "accuracy")}
    other_noise = full({"a": "Uniform()", "b": "Impulse()"}, {"a": (0.1, 0.2), "b": (0.5,)})
    assert differences(both, other_noise).keys() == of_b
    assert corruption(both, other_noise).keys() == {(Condition("b"), "corruption_error"), (OVERALL, "mce")}
    assert report.corruption(full({"a": "Uniform()"}, {"a": (0.1,)}), both) == []


def test_corruption_errors_are_ratios_of_sums_over_the_levels():
    generator = stream()
    groups = generator.integers(0, N_GROUPS, 500)
    cells = [(NEAR, "accuracy"), (FAR, "accuracy")]
    new, old = ({cell: generator.random(500) < share for cell in cells} for share in (0.8, 0.6))
    found = corruption(means(new, groups), means(old, groups))
    wrong_new, wrong_old = (sum(1.0 - x[cell] for cell in cells) for x in (new, old))
    ratio = wrong_new.sum() / wrong_old.sum()  # type: ignore[union-attr]
    left_out = [float(wrong_new[groups != g].sum() / wrong_old[groups != g].sum()) for g in range(N_GROUPS)]  # type: ignore[index]
    expected = jackknife_error(float(ratio), left_out, np.bincount(groups, minlength=N_GROUPS).tolist())
    mce, of_noise = found[OVERALL, "mce"], found[Condition("gaussian"), "corruption_error"]
    assert (mce.value, mce.low, mce.high) == (of_noise.value, of_noise.low, of_noise.high)
    assert mce.value == pytest.approx(ratio, rel=1e-12)
    assert mce.standard_error == pytest.approx(expected, rel=1e-9)


def test_a_baseline_without_errors_has_no_corruption_error():
    right = means({(place, "accuracy"): np.ones(50) for place in (NEAR, FAR)}, stream().integers(0, N_GROUPS, 50))
    assert math.isnan(corruption(right, right)[OVERALL, "mce"].value)


# --- written and read


def test_a_report_reads_back(tmp_path):
    new, old, _, _ = pair(shared=("gaussian",), n_draws=2, spread={PAIRED: 0.01})
    report.write(tmp_path / "new", new, old)
    assert report.read(tmp_path / "new") == new
    assert report.read(tmp_path / "new" / "report.json") == new
    assert (tmp_path / "new" / "report.md").read_text() == report.markdown(new, old)


def test_a_report_of_a_later_version_reads_back(tmp_path):
    new, *_ = pair()
    report.write(tmp_path, new)
    held = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps(held | {"hardware": "a field of a later version"}))
    assert report.read(tmp_path) == new


def test_what_is_no_number_is_null(tmp_path):
    values = {ACCURACY: 0.5, (CLEAN, "ece_z"): math.inf, (CLEAN, "failure_auroc"): math.nan}
    made = make(values, {cell: [value] for cell, value in values.items()}, [1], noises={}, levels={})
    report.write(tmp_path, made, made)
    held = json.loads((tmp_path / "report.json").read_text())["estimates"]
    assert [(row["metric"], row["value"]) for row in held] == [("accuracy", 0.5), ("ece_z", None), ("failure_auroc", None)]
    assert held[0]["low"] is None, "of one sample nothing is known"
    read = report.read(tmp_path).rows
    assert math.isnan(read[CLEAN, "ece_z"].value)
    assert math.isnan(read[CLEAN, "failure_auroc"].without[0])


def test_a_report_of_an_earlier_version_may_lack_what_has_a_default(tmp_path):
    new, *_ = pair()
    report.write(tmp_path, new)
    held = json.loads((tmp_path / "report.json").read_text())
    optional = ("n_targets", "units", "chance", "n_trainings")
    (tmp_path / "report.json").write_text(json.dumps({name: held[name] for name in held if name not in optional}))
    assert report.read(tmp_path) == new


def test_a_report_of_another_version_that_cannot_be_read_names_both_versions(tmp_path):
    new, *_ = pair()
    report.write(tmp_path, replace(new, version="9.9.9"))
    held = json.loads((tmp_path / "report.json").read_text())
    del held["estimates"][0]["spread"]
    (tmp_path / "report.json").write_text(json.dumps(held))
    with pytest.raises(ValueError, match=rf"lacks \['spread'\].* by lightning_noise 9.9.9; this is {__version__}"):
        report.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no report at .*give a report.json"),
        ("{", "is not JSON"),
        ("[]", "it lacks"),
        ("3", "it lacks"),
        (
            '{"task": "", "n": 1, "n_draws": 1, "seed": 0, "noises": {}, "levels": 3, "shared": 0, "sizes": 0, "estimates": 0}',
            "levels is 3",
        ),
        ('{"n": 3}', r"it lacks \['task'"),
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


def with_rows(made: Report, rows: Mapping[Cell, tuple[float, float]]) -> Report:
    """The report with other values and half-widths of their intervals."""
    new = {cell: Estimate(*cell, value, half / 2, value - half, value + half) for cell, (value, half) in rows.items()}
    return replace(made, estimates=tuple((made.rows | new).values()))


def test_a_row_for_each_noise_and_level_with_as_many_digits_as_are_known():
    rows = {
        ACCURACY: (0.98765, 0.0123),
        ECE: (0.031, 0.002),
        (CLEAN, "ece_floor"): (0.01, 0.0),
        (CLEAN, "ece_p"): (0.0001, 0.0),
        (NEAR, "accuracy"): (0.9, 0.00123),
        (NEAR, "own"): (12.3456, 0.0),
        (FAR, "accuracy"): (math.nan, 0.0),
        (NOISY, "accuracy"): (0.5, 0.1),
    }
    made = with_rows(replace(full(NOISES, LEVELS), estimates=()), rows)
    assert cells(report.markdown(made), "Estimates") == [
        ["noise", "level", "accuracy, %", "ECE, %", "own"],
        ["clean", "", "98.8 (97.5 to 100.0)", "**3.10** / 1.00", "-"],
        ["gaussian", "0.1", "90.00 (89.88 to 90.12)", "-", "12.35"],
        ["gaussian", "0.2", "-", "-", "-"],
        ["mean", "", "50 (40 to 60)", "-", "-"],
    ]


def test_a_value_without_an_interval_keeps_its_unit_in_the_headline():
    made = Report("custom", 4, 1, 0, noises={}, levels={}, shared=(), sizes=(), estimates=(Estimate(CLEAN, "accuracy", 0.75),))
    assert report.headline(made) == "Accuracy is 75 % without noise; - on average under noise."


def test_a_change_is_bold_where_its_interval_leaves_out_0():
    generator, n = stream(), 400
    groups, hardness = generator.integers(0, N_GROUPS, n), np.sort(generator.random(n))

    def of_model(*right: int) -> Report:
        places = (CLEAN, NEAR, FAR)
        return means({(place, "accuracy"): hardness < hardness[k] for place, k in zip(places, right, strict=True)}, groups)

    new, old = of_model(380, 320, 302), of_model(380, 240, 300)
    markdown, changes, ratio = report.markdown(new, old), differences(new, old), corruption(new, old)[OVERALL, "mce"]
    lots, few = (changes[place, "accuracy"] for place in (NEAR, FAR))
    assert [row[2] for row in cells(markdown, "Against")[1:4]] == [
        "0",
        f"**+20.0 ± {50 * (lots.high - lots.low):.1f}**",
        f"+0.50 ± {50 * (few.high - few.low):.2f}",
    ]
    assert f"this model makes **{ratio.value:.3f}** ({ratio.low:.3f} to" in markdown
    assert "not paired" not in markdown
    assert "not paired" in report.markdown(new, means({ACCURACY: hardness[:300] < 0.9}, groups[:300]))


def test_summaries_are_in_units_that_grow_with_the_damage():
    gaussian = Condition("gaussian")
    rows = {(gaussian, "accuracy_drop"): (0.1, 0.02), (gaussian, "loss_drop"): (-0.3, 0.1)}
    made = with_rows(full(NOISES, LEVELS), rows)
    assert cells(report.markdown(made), "Averaged") == [
        ["noise", "accuracy lost, points", "loss gained"],
        ["gaussian", "10.0 (8.0 to 12.0)", "0.30 (0.20 to 0.40)"],
    ]


def test_a_summary_that_some_noises_have_is_shown():
    made = full({"gaussian": "Gaussian()", "weight": "WeightNoise(Gaussian())"}, {"gaussian": (0.1,), "weight": (0.5,)})
    made = with_rows(made, {(Condition("weight"), "sensitivity"): (0.2, 0.0)})
    heading, gaussian, weight = cells(report.markdown(made), "Averaged")
    assert (heading[-1], gaussian[-1], weight[-1]) == ("sensitivity", "-", "0.2")


def test_the_outcome_names_the_worst():
    made = full({"a": "Gaussian()", "b": "Impulse()"}, {"a": (0.1, 0.2), "b": (0.5,)})
    made = with_rows(made, {(Condition("a", 0.2), "accuracy"): (0.3, 0.02), (WORST, "accuracy"): (0.3, 0.02)})
    outcome = report.markdown(made).splitlines()[2]
    assert outcome.startswith("Accuracy is **")
    assert outcome.endswith("**30.0 %** (28.0 to 32.0) at worst, under a at 0.2.")
    made = with_rows(
        replace(made, estimates=()),
        {LOSS: (0.5, 0.1), (Condition("b", 0.5), "loss"): (3.0, 0.2), (WORST, "loss"): (3.0, 0.2)},
    )
    assert report.markdown(made).splitlines()[2].endswith("**3.00** (2.80 to 3.20) at worst, under b at 0.5.")


@pytest.mark.parametrize("samples", [{LOSS: np.ones(1)}, {(CLEAN, "own"): np.full(30, math.nan)}, {ACCURACY: np.ones(30)}])
def test_a_report_of_little_is_still_written(samples):
    n = len(next(iter(samples.values())))
    made = means(samples, np.arange(n) % N_GROUPS, noises={}, levels={})
    assert report.markdown(made, made).startswith("# Robustness report")


def test_one_draw_of_what_all_samples_share_is_said():
    levels, noises = {"weight": (0.1,)}, {"weight": "WeightNoise(Gaussian())"}
    samples, groups = {LOSS: np.ones(9), (Condition("weight", 0.1), "loss"): np.ones(9)}, np.arange(9)
    said = "All samples share the draw of weight"
    assert said in report.markdown(means(samples, groups, noises=noises, levels=levels, shared=("weight",)))
    assert said not in report.markdown(means(samples, groups, noises=noises, levels=levels, shared=("weight",), n_draws=3))
    assert said not in report.markdown(means(samples, groups, noises=noises, levels=levels))
