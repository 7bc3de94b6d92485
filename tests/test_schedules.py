"""Every schedule keeps the laws of its family and has the values of its formula."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_noise import schedules
from lightning_noise.schedules import Progress, moments
from lightning_noise.testing import SCHEDULE_LAWS

SCHEDULES = [
    schedules.Constant(0.3),
    schedules.Linear(0.0, 0.5),
    schedules.Linear(0.5, 0.1, begin=0.2, until=0.7),
    schedules.Linear(0.0, 1.0, begin=2, until=5, unit="epoch"),
    schedules.Cosine(0.1, 0.5),
    schedules.Cosine(1.0, 0.0, begin=10, until=30, unit="step"),
    schedules.Every(0.3, every=3),
    schedules.Every(schedules.Linear(0.0, 1.0), every=5, length=2, begin=1, unit="step"),
    schedules.Product([schedules.Linear(0.0, 0.5), schedules.Every(1.0, every=2)]),
    schedules.from_snr_db(schedules.Linear(40.0, 0.0)),
]


@pytest.mark.parametrize("law", SCHEDULE_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("member", SCHEDULES, ids=repr)
def test_a_schedule_keeps_the_law(member, law):
    law(member)


def test_the_laws_find_a_schedule_with_a_history():
    class Drifting(schedules.Schedule):
        def __init__(self):
            self.calls = 0

        def __call__(self, progress):
            self.calls += 1
            return 0.1 * self.calls

    with pytest.raises(AssertionError, match="depends on when"):
        SCHEDULE_LAWS[0](Drifting())


@pytest.mark.parametrize("kind", [schedules.Linear, schedules.Cosine])
@pytest.mark.parametrize("unit", ["fraction", "epoch", "step"])
@given(start=st.floats(0, 1), end=st.floats(0, 1), begin=st.integers(0, 5), length=st.integers(1, 5))
def test_a_transition_is_constant_outside_its_window_and_monotone_within(kind, unit, start, end, begin, length):
    scale = 0.1 if unit == "fraction" else 1
    transition = kind(start, end, begin=begin * scale, until=(begin + length) * scale, unit=unit)
    levels = [transition(Progress(t, t, t / 10)) for t in range(11)]
    assert all(level == start for level in levels[: begin + 1])
    assert all(level == end for level in levels[begin + length + 1 :])
    sign = 1 if end >= start else -1
    # a monotone curve, up to the rounding of start + (end - start) * share
    assert all(sign * (later - earlier) >= -1e-15 for earlier, later in pairwise(levels))


def test_linear_equals_the_scheduler_of_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.2, end_factor=0.8, total_iters=20)
    ramp = schedules.Linear(0.2, 0.8, until=20, unit="step")
    for step in range(30):
        # torch multiplies the last value by a ratio in each step, which rounds each time
        assert math.isclose(ramp(Progress(step, 0, None)), scheduler.get_last_lr()[0], rel_tol=1e-13)
        optimizer.step()
        scheduler.step()


def test_cosine_equals_the_scheduler_of_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1)
    descent = schedules.Cosine(0.9, 0.1, until=20, unit="step")
    for step in range(21):
        # torch's recursion rounds in each step
        assert math.isclose(descent(Progress(step, 0, None)), scheduler.get_last_lr()[0], rel_tol=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("schedule", "dose"),
    [
        # the mean over t = 0, 1/n ... (n-1)/n of a straight line is that of its first and last value
        (schedules.Linear(0.0, 1.0), (1000 - 1) / 2000),
        # the same points of half a cosine: pairs t and 1 - t sum to 1, and t = 0 gives 0
        (schedules.Cosine(0.0, 1.0), (1000 - 1) / 2000),
        # ramp and hold: 1 - u0 / 2, less half a step of the sum
        (schedules.Linear(0.0, 1.0, until=0.4), 1 - 0.4 / 2 - 1 / 2000),
        (schedules.Constant(0.3), 0.3),
        (schedules.Every(0.6, every=5), 0.6 / 5),
        (schedules.Every(0.6, every=5, length=2), 0.6 * 2 / 5),
        (schedules.Product([schedules.Constant(0.5), schedules.Every(1.0, every=2)]), 0.25),
    ],
    ids=repr,
)
def test_the_mean_dose_has_its_closed_form(schedule, dose):
    assert math.isclose(schedule.mean_dose(steps=1000, epochs=10), dose, rel_tol=1e-12)


def test_moments_count_whole_epochs_and_end_before_one():
    run = list(moments(steps=6, epochs=3))
    assert [moment.epoch for moment in run] == [0, 0, 1, 1, 2, 2]
    assert [moment.step for moment in run] == list(range(6))
    assert run[0].fraction == 0
    assert run[-1].fraction == 5 / 6


def test_every_is_on_for_its_length_and_not_before_it_begins():
    often = schedules.Every(1.0, every=4, length=2, begin=3)
    assert [often(Progress(0, epoch, None)) for epoch in range(12)] == [0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1]


def test_a_product_is_that_of_its_factors_and_takes_numbers_and_callables():
    product = schedules.Product([0.5, schedules.Constant(0.5), lambda progress: float(progress.epoch)])
    assert product(Progress(0, 3, None)) == 0.75


def test_decibels_turn_into_amplitudes():
    assert schedules.from_snr_db(math.inf) == 0
    assert schedules.from_snr_db(-20.0) == 10
    falling = schedules.from_snr_db(schedules.Linear(40.0, 20.0))
    assert [falling(Progress(0, 0, t)) for t in (0.0, 0.5, 1.0)] == pytest.approx([0.01, 10**-1.5, 0.1], rel=1e-12)


@pytest.mark.parametrize(
    "schedule", [SCHEDULES[1], SCHEDULES[4], SCHEDULES[8], schedules.Every(SCHEDULES[1], every=3, begin=1)], ids=repr
)
def test_a_run_without_an_end_refuses_fractions(schedule):
    with pytest.raises(ValueError, match="needs a run with a known end"):
        schedule(Progress(0, 0, None))


@pytest.mark.parametrize(
    "build",
    [
        lambda: schedules.Linear(0.0, 1.0, begin=0.5, until=0.5),
        lambda: schedules.Cosine(0.0, 1.0, begin=2.0),
        lambda: schedules.Linear(0.0, 1.0, until=10),
        lambda: schedules.Linear(0.0, 1.0, begin=-1, until=3, unit="epoch"),
        lambda: schedules.Linear(0.0, 1.0, unit="epoch"),
        lambda: schedules.Linear(0.0, 1.0, unit="epochs"),  # type: ignore[arg-type]
        lambda: schedules.Every(0.1, every=2, unit="fraction"),  # type: ignore[arg-type]
        lambda: schedules.Every(0.1, every=0),
        lambda: schedules.Every(0.1, every=2, length=3),
        lambda: schedules.Every(0.1, every=2, length=0),
    ],
)
def test_times_that_make_no_sense_are_refused(build):
    with pytest.raises(ValueError, match="must"):
        build()
