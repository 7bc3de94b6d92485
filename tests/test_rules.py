"""Rules move a level only by what validations show."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from members import RULES

from lightning_noise import AdaptiveLevel, tasks, testing
from lightning_noise.metrics import BrierScore
from lightning_noise.rules import Governor, Observation, Rule, SignedGap

PROMPT = Governor(chance=0.1, warmup=0)
SKILLS = st.floats(0.31, 1.0)
SHARES = st.floats(0.0, 1.2)


@pytest.mark.parametrize("law", testing.RULE_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_laws_of_a_rule(rule, law):
    law(rule)


def seen(retention: float = 1.0, clean: float = 0.9, *, governor: Governor = PROMPT, error: float = 0.0) -> Observation:
    """A validation in which so much of the clean skill is left at the boundary."""
    chance = governor.chance or 0.0
    boundary = chance + retention * (clean - chance)
    return Observation(clean, boundary, error, signed_gap=0.0, n=500)


def run(rule: Rule, observations, start: float = 0.3) -> tuple[list[float], list[str]]:
    state, levels, reasons = rule.init(start), [], []
    for observation in observations:
        state, reason = rule.update(state, observation)
        levels.append(state["level"])
        reasons.append(reason)
    return levels, reasons


# --- the governor


def harmed(governor: Governor, harm: float, start: float, validations: int) -> list[float]:
    """The levels of a model that loses the share ``harm`` of its skill at level 1, and four times as much at level 2."""
    state, levels = governor.init(start), [start]
    for _ in range(validations):
        retention = max(0.0, 1 - harm * levels[-1] ** 2)
        state, _ = governor.update(state, seen(retention, governor=governor))
        levels.append(state["level"])
    return levels


@pytest.mark.parametrize("start", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("harm", [0.02, 0.1, 0.7])
def test_the_level_goes_to_where_the_share_is_retained(harm, start):
    levels = harmed(PROMPT, harm, start, validations=30)
    assert levels[-1] == pytest.approx(math.sqrt(0.1 / harm), rel=1e-3)
    assert harmed(dataclasses.replace(PROMPT, retain=0.8), harm, start, 30)[-1] == pytest.approx(
        math.sqrt(0.2 / harm), rel=1e-3
    )


@given(st.lists(st.tuples(SKILLS, SHARES), max_size=20), st.floats(0.0, 5.0))
def test_a_level_rises_by_one_to_ten_steps_and_falls_by_half_at_most(validations, start):
    levels, _ = run(PROMPT, [seen(share, clean=0.1 + 0.9 * skill) for skill, share in validations], start)
    for before, after in pairwise([start, *levels]):
        assert before / 2 <= after <= min(max(before + PROMPT.step, 2 * before), before + 10 * PROMPT.step)


def test_the_first_level_is_a_step():
    levels, reasons = run(PROMPT, [seen(1.0)], start=0.0)
    assert (levels, reasons) == ([PROMPT.step], ["raised"])


def test_the_averages_are_over_several_validations():
    steady, bad = [seen(0.9)] * 100, [seen(0.8)]
    moved = [run(dataclasses.replace(PROMPT, average=average), [*steady, *bad])[0][-1] for average in (0.0, 0.6, 0.9)]
    # a validation in which twice as much is lost
    assert moved == pytest.approx([0.3 / math.sqrt(2), 0.3 / math.sqrt(1.4), 0.3 / math.sqrt(1.1)], rel=1e-3)


@pytest.mark.parametrize("boundary", [-30.0, -1e38, -1e308])
def test_a_validation_with_a_huge_error_is_soon_forgotten(boundary):
    steady = [seen(0.9)] * 20
    levels, _ = run(PROMPT, [*steady, seen()._replace(boundary=boundary), *[seen(1.0)] * 20])
    assert levels[20] == levels[19] / 2
    assert levels[-1] > levels[19]


BAD = {  # each reason to come down, of the highest priority first; what is true of one is true of all that come after
    "non_finite": seen(0.5, clean=math.nan),
    "below_min_skill": seen(0.5, clean=0.2),
    "lowered": seen(0.5, clean=0.9),
}


@pytest.mark.parametrize("reason", BAD)
def test_the_first_reason_that_holds_is_the_one(reason):
    well = [seen(0.92, clean=0.9)] * 20
    governor = dataclasses.replace(PROMPT, average=0.0)
    _, reasons = run(governor, [*well, BAD[reason]])
    assert reasons[-1] == reason
    panic, boundary = seen()._replace(clean=0.2, boundary=math.inf), seen()._replace(boundary=math.nan)
    assert [run(governor, [*well, bad])[1][-1] for bad in (panic, boundary)] == ["non_finite"] * 2


def test_a_level_that_is_no_number_of_the_model_is_halved_at_once():
    for reason in ("non_finite", "below_min_skill"):
        levels, _ = run(PROMPT, [BAD[reason]])
        assert levels == [0.3 / 2]


@given(st.lists(st.tuples(st.floats(0.0, 0.36), st.floats(0.0, 1.0)), max_size=30), st.floats(0.0, 5.0))
def test_at_chance_the_level_is_never_raised(validations, start):
    # a skill of 0.29 is an accuracy of 0.361 where a guess is right in one of ten
    observations = [Observation(clean, boundary, 0.0, 0.0, 500) for clean, boundary in validations]
    levels, reasons = run(Governor(chance=0.1, warmup=1), observations, start)
    assert all(after <= before for before, after in zip([start, *levels], levels, strict=False))
    assert "raised" not in reasons


@given(st.lists(st.tuples(SKILLS, SHARES), max_size=12), SKILLS, SHARES, SHARES)
def test_a_lower_retention_never_gives_a_higher_level(before, clean, one, two):
    state = PROMPT.init(0.3)
    for skill, share in before:
        state, _ = PROMPT.update(state, seen(share, clean=0.1 + 0.9 * skill))
    low, high = sorted([one, two])
    after = [PROMPT.update(state, seen(share, clean=0.1 + 0.9 * clean))[0]["level"] for share in (low, high)]
    assert after[0] <= after[1]


@given(st.lists(st.tuples(st.floats(-1, 2), st.floats(-1, 2)), max_size=60), st.floats(0.1, 0.7))
def test_the_level_never_leaves_its_bounds(validations, start):
    governor = Governor(chance=0.1, warmup=0, lo=0.1, hi=0.7)
    observations = [Observation(clean, boundary, 0.01, 0.0, 500) for clean, boundary in validations]
    assert all(0.1 <= level <= 0.7 for level in run(governor, observations, start)[0])


def test_at_its_highest_level_it_holds_and_does_not_say_that_it_was_raised():
    levels, reasons = run(dataclasses.replace(PROMPT, hi=0.4), [seen(1.0)] * 3)
    assert (levels, reasons) == ([0.4] * 3, ["raised", "held", "held"])


def test_an_error_that_is_to_be_small_is_governed_as_the_accuracy_that_mirrors_it():
    mirrored = Governor(chance=0.9, best=0.0)  # the error of a guess among ten classes
    chances = random.Random(1)
    observations = [seen(chances.uniform(0.8, 1.0), clean=chances.uniform(0.7, 0.9), error=0.01) for _ in range(60)]
    errors = [each._replace(clean=1 - each.clean, boundary=1 - each.boundary) for each in observations]
    levels, reasons = run(Governor(chance=0.1), observations)
    assert run(mirrored, errors)[1] == reasons
    assert run(mirrored, errors)[0] == pytest.approx(levels, rel=1e-12)  # 1 - x rounds
    assert set(reasons) >= {"raised", "lowered"}  # or this test would show little


def test_it_waits_at_the_start():
    assert run(Governor(chance=0.1), [seen(1.0)] * 4)[1] == ["warmup", "warmup", "warmup", "raised"]


def test_a_drop_of_the_clean_skill_counts_five_times():
    dropped, noisier = [seen(0.9)] * 5 + [seen(0.9, clean=0.86)] * 5, [seen(0.9)] * 5 + [seen(0.9 - 5 * 0.04 / 0.76)] * 5
    assert run(PROMPT, dropped, start=3.0)[0] == pytest.approx(run(PROMPT, noisier, start=3.0)[0])
    assert run(PROMPT, dropped, start=3.0)[0][-1] < 3.0 / 2


def test_a_clean_skill_is_compared_with_the_best_and_not_with_the_last():
    slowly = [0.9 - 0.001 * i for i in range(60)]  # a reference that follows would never see it
    levels, _ = run(PROMPT, [seen(0.9, clean=clean) for clean in slowly], start=3000.0)
    assert all(after < before for before, after in pairwise(levels))


def test_a_skill_that_stays_lost_without_noise_was_not_lost_by_it():
    _, reasons = run(PROMPT, [seen(1.0, clean=0.9)] * 10 + [seen(1.0, clean=0.8)] * 60, start=0.0)
    assert "lowered" in reasons
    assert reasons[-20:] == ["raised"] * 20


@pytest.mark.parametrize(("error", "reason"), [(0.01, "lowered"), (0.03, "raised"), (math.inf, "raised")])
def test_chance_explains_a_drop_of_two_standard_errors(error, reason):
    drop = [seen(0.92, clean=0.9)] * 20 + [seen(0.92, clean=0.85, error=error)]
    assert run(dataclasses.replace(PROMPT, average=0.0), drop)[1][-1] == reason


@given(st.lists(st.tuples(SKILLS, SHARES), max_size=12), SHARES, st.floats(0.0, 0.5), st.floats(0.0, 0.5))
def test_a_larger_error_of_what_is_lost_never_gives_a_higher_level(before, share, one, two):
    state = PROMPT.init(0.3)
    for skill, retained in before:
        state, _ = PROMPT.update(state, seen(retained, clean=0.1 + 0.9 * skill))
    after = [PROMPT.update(state, seen(share)._replace(boundary_error=error))[0]["level"] for error in sorted([one, two])]
    assert after[0] >= after[1]


def test_an_error_adds_to_what_is_lost_as_a_root_of_squares():
    lost, error = 0.06, 0.08  # shares of the clean skill of 0.8 above chance
    levels, _ = run(PROMPT, [seen(1 - lost)._replace(boundary_error=error * 0.8)] * 60, start=2.0)
    assert levels[-1] == pytest.approx(2.0, rel=1e-12)  # 0.06 and 0.08 make 0.1, which may be lost
    unknown, none = ([seen(1 - lost)._replace(boundary_error=each)] * 9 for each in (math.inf, 0.0))
    assert run(PROMPT, unknown) == run(PROMPT, none)


def clean_accuracies(chances: random.Random, n_samples: int, kappa: float, validations: int) -> tuple[list[float], list[float]]:
    """The accuracy of a model that learns, as validations of the same samples see it, and the error of a difference.

    The share ``kappa`` of the binomial standard deviation is new in each validation, and the rest is that of the samples.
    """
    accuracies, errors = [], []
    offset = chances.gauss(0, math.sqrt(0.96 * 0.04 / n_samples))
    for epoch in range(validations):
        true = 0.96 - 0.46 * math.exp(-(epoch + 1) / 4)
        deviation = kappa * math.sqrt(true * (1 - true) / n_samples)
        accuracies.append(min(1.0, true + offset + chances.gauss(0, deviation)))
        errors.append(math.sqrt(2) * deviation)
    return accuracies, errors


def guarded_levels(n_samples: int, kappa: float, seed: int, *, noise_costs: float = 0.0, tells: bool = True) -> list[float]:
    """The levels of a model whose noise costs a tenth of the skill at level 1, and ``noise_costs`` of the clean skill.

    The level is below 0.5 until the model has learned, so that its best clean skill is known.
    """
    state, levels = Governor().init(0.0), []
    for i, (clean, error) in enumerate(zip(*clean_accuracies(random.Random(seed), n_samples, kappa, 90), strict=True)):
        governor = Governor(chance=0.0, hi=0.5 if i < 30 else math.inf)
        squared = state["level"] ** 2
        observation = seen(
            1 - 0.1 * squared, clean - noise_costs * squared, governor=governor, error=error if tells else math.inf
        )
        state, _ = governor.update(state, observation)
        levels.append(state["level"])
    return levels


@pytest.mark.parametrize("kappa", [0.4, 1.0])
@pytest.mark.parametrize("n_samples", [42, 114, 500])
def test_a_drop_by_chance_hardly_lowers_the_level_however_few_the_samples_are(n_samples, kappa):
    levels = [level for seed in range(100) for level in guarded_levels(n_samples, kappa, seed)[50:]]
    assert 0.93 < sum(levels) / len(levels) <= 1.001, "without drops it would be 1"


@pytest.mark.parametrize("seed", range(10))
def test_a_clean_skill_that_the_noise_costs_lowers_the_level(seed):
    assert guarded_levels(5000, 0.4, seed, noise_costs=0.04)[-1] < 0.85
    assert guarded_levels(5000, 0.4, seed, noise_costs=0.04, tells=False)[-1] == pytest.approx(1.0, abs=0.01)


def test_the_task_says_the_metric_of_a_guess_if_the_governor_does_not():
    chances = random.Random(1)
    observations = [seen(chances.uniform(0.8, 1.0), clean=chances.uniform(0.5, 0.9)) for _ in range(60)]
    told, asked = Governor(chance=0.1, warmup=0), Governor(warmup=0)
    assert run(asked, [each._replace(chance=0.1) for each in observations]) == run(told, observations)
    assert run(told, [each._replace(chance=0.5) for each in observations]) == run(told, observations)
    with pytest.raises(ValueError, match=r"give Governor\(chance=…\)"):
        asked.update(asked.init(0.3), observations[0])


def test_a_governor_follows_the_retention():
    observation = seen(0.9, clean=0.8)
    assert (PROMPT.follows, PROMPT.measure(observation)) == ("retention", pytest.approx(0.9))
    assert PROMPT.describe(observation) == "90 % of the clean skill is retained"
    no_skill = observation._replace(clean=0.1)
    assert math.isnan(PROMPT.measure(no_skill))
    assert PROMPT.describe(no_skill) == "the clean metric of 0.1 is no better than 0.1, that of a constant guess"
    assert PROMPT.describe(observation._replace(boundary=math.nan)) == "a metric is not finite"


@pytest.mark.parametrize("rule", [Governor(chance=0.1, hi=0.7), SignedGap(hi=0.25)], ids=["governor", "gap"])
def test_a_limit_lowers_the_highest_level_and_never_raises_it(rule):
    assert rule.limit(0.2) == dataclasses.replace(rule, hi=0.2)
    assert rule.limit(1.0) == rule
    assert rule.limit(1.0, usual=0.1) == rule


def test_a_usual_limit_is_that_of_a_governor_without_one():
    assert PROMPT.limit(math.inf, usual=1.0) == PROMPT.limit(1.0, usual=2.0) == dataclasses.replace(PROMPT, hi=1.0)


# --- the signed gap


def gap(value: float, error: float = 0.0) -> Observation:
    return Observation(0.9, math.nan, 0.0, value, 500, error)


def test_the_level_follows_the_sign_of_the_gap():
    assert run(SignedGap(), [gap(0.05)], start=0.1) == ([0.11], ["raised"])
    assert run(SignedGap(), [gap(-0.05)], start=0.1) == ([0.1 - 0.01], ["lowered"])


def test_a_level_rises_only_above_the_error_of_the_gap_and_falls_below_0():
    assert run(SignedGap(), [gap(0.019, error=0.01)] * 5, start=0.1) == ([0.1] * 5, ["held"] * 5)
    assert run(SignedGap(), [gap(0.021, error=0.01)], start=0.1)[1] == ["raised"]
    assert run(SignedGap(), [gap(-0.001, error=0.01)], start=0.1)[1] == ["lowered"]
    assert run(SignedGap(), [gap(0.2, error=math.inf)], start=0.1)[1] == ["held"]


@pytest.mark.parametrize("n_samples", [50, 300])
def test_a_calibrated_model_is_hardly_smoothed_however_few_the_samples_are(n_samples):
    error, levels = math.sqrt(0.95 * 0.05 / n_samples), []
    for seed in range(200):
        chances = random.Random(seed)
        of_samples = chances.gauss(0, error)  # the samples are the same in each validation
        levels += run(SignedGap(), [gap(of_samples + chances.gauss(0, 0.3 * error), error) for _ in range(40)], start=0.0)[0][
            -1:
        ]
    assert sum(level > 0 for level in levels) <= 0.08 * len(levels)


def test_at_an_end_it_holds():
    assert run(SignedGap(), [gap(-0.05)], start=0.0) == ([0.0], ["held"])
    assert run(SignedGap(hi=0.1), [gap(0.05)], start=0.1) == ([0.1], ["held"])


def test_a_gap_that_is_no_number_is_left_out():
    rule = SignedGap()
    state, reason = rule.update(rule.init(0.1), gap(math.nan))
    assert (state, reason) == (rule.init(0.1), "held")


def test_the_smoothing_settles_where_the_gap_is_0():
    rule = SignedGap()
    state, levels = rule.init(0.0), []
    for _ in range(60):
        state, _ = rule.update(state, gap(0.06 - state["level"]))  # smoothing takes from the confidence what it is
        levels.append(state["level"])
    # the average runs behind by a step or two
    assert max(abs(level - 0.06) for level in levels[20:]) <= 0.03


# --- values, and what is refused


def test_a_level_and_its_rule_are_values():
    one, two = (AdaptiveLevel(Governor(chance=0.1), 0.2, task=tasks.Binary(), target="y") for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)


def test_a_state_is_made_of_what_json_can_hold():
    for rule in RULES.values():
        state, _ = rule.update(rule.init(0.2), seen()._replace(chance=0.1))
        assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chance": 1.0}, "two different finite numbers as chance and best"),
        ({"chance": math.nan}, "two different finite numbers as chance and best"),
        ({"chance": 0.1, "retain": 1.0}, "0 <= retain < 1"),
        ({"chance": 0.1, "step": 0.0}, "0 < step < inf"),
        ({"chance": 0.1, "step": math.inf}, "0 < step < inf"),
        ({"chance": 0.1, "lo": 0.5, "hi": 0.4}, "0 <= lo <= hi"),
        ({"chance": 0.1, "average": 1.0}, "0 <= average < 1"),
        ({"chance": 0.1, "min_skill": 0.0}, "0 < min_skill < 1"),
        ({"chance": 0.1, "warmup": -1}, "no negative warmup or z"),
        ({"chance": 0.1, "z": math.nan}, "no negative warmup or z"),
    ],
)
def test_a_governor_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Governor(**arguments)


@pytest.mark.parametrize("arguments", [{"step": 0.0}, {"hi": 0.0}, {"average": 1.0}, {"z": -1.0}])
def test_a_signed_gap_out_of_range_is_refused(arguments):
    with pytest.raises(ValueError, match="needs 0 < step, 0 < hi, 0 <= average < 1 and 0 <= z"):
        SignedGap(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Governor(step=True), TypeError, "step must be a number, got True"),
        (lambda: SignedGap(hi="0.3"), TypeError, "hi must be a number, got '0.3'"),  # type: ignore[arg-type]
        (lambda: AdaptiveLevel(0.3), TypeError, "rule must be a rule"),  # type: ignore[arg-type]
        (lambda: AdaptiveLevel(PROMPT, -0.1), ValueError, "finite and not negative"),
        (lambda: AdaptiveLevel(Governor(chance=0.1, hi=0.5), 0.6), ValueError, r"must start in \[0, 0.5\]"),
        (lambda: AdaptiveLevel(SignedGap(), 0.6), ValueError, r"must start in \[0, 0.3\]"),
        (lambda: AdaptiveLevel(PROMPT, task="accuracy"), TypeError, "task must be a task such as"),  # type: ignore[arg-type]
        (lambda: AdaptiveLevel(SignedGap(), task=tasks.Regression()), ValueError, "follows the confidence"),
        (lambda: AdaptiveLevel(Governor(chance=3)), ValueError, "an accuracy needs 0 <= chance < best <= 1"),
        (
            lambda: AdaptiveLevel(Governor(chance=3.0, best=0.0), task=tasks.Regression()),
            ValueError,
            "the R2 of a regression needs chance < best <= 1",
        ),
        (
            lambda: AdaptiveLevel(task=tasks.Custom(BrierScore())),
            ValueError,
            "'BrierScore' of a constant guess is not known: give Gov",
        ),
        (lambda: AdaptiveLevel(PROMPT, max_batches=0), ValueError, "max_batches must be at least 1"),
    ],
)
def test_an_adaptive_level_out_of_range_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
