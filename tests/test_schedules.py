"""Every schedule keeps the laws of its family and has the values of its formula."""

from __future__ import annotations

import math
from collections import UserList
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from members import SCHEDULES

from lightning_noise import schedules
from lightning_noise.schedules import Progress, moments
from lightning_noise.testing import SCHEDULE_LAWS


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


@pytest.mark.parametrize("kind", [schedules.Linear, schedules.Cosine, schedules.Exponential])
@pytest.mark.parametrize("unit", ["fraction", "epoch", "step"])
@given(start=st.floats(0.001, 1), end=st.floats(0.001, 1), begin=st.integers(0, 5), length=st.integers(1, 5))
def test_a_transition_is_constant_outside_its_window_and_monotone_within(kind, unit, start, end, begin, length):
    scale = 0.1 if unit == "fraction" else 1
    transition = kind(start, end, begin=begin * scale, until=(begin + length) * scale, unit=unit)
    levels = [transition(Progress(t, t, t / 10)) for t in range(11)]
    assert all(level == start for level in levels[: begin + 1])
    assert all(level == end for level in levels[begin + length + 1 :])
    sign = 1 if end >= start else -1
    # a monotone curve, up to its rounding
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


def test_exponential_equals_the_scheduler_of_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    decay = schedules.Exponential(0.5, 0.5 * 0.9**20, until=20, unit="step")
    for step in range(21):
        # torch's recursion rounds in each step
        assert math.isclose(decay(Progress(step, 0, None)), scheduler.get_last_lr()[0], rel_tol=1e-13)
        optimizer.step()
        scheduler.step()


def test_cyclic_equals_the_scheduler_of_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 0.7, step_size_up=5, cycle_momentum=False)
    wave = schedules.Cyclic(0.1, 0.7, every=10, unit="step")
    for step in range(35):
        assert math.isclose(wave(Progress(step, 0, None)), scheduler.get_last_lr()[0], rel_tol=1e-13)
        optimizer.step()
        scheduler.step()


def test_piecewise_equals_the_scheduler_of_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.2, end_factor=1.0, total_iters=8)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[8])
    plan = schedules.Piecewise(
        [schedules.Linear(0.2, 1.0, until=8, unit="step"), schedules.Cosine(1.0, 0.0, until=12, unit="step")], [8], unit="step"
    )
    for step in range(20):
        # torch's recursions round in each step
        assert math.isclose(plan(Progress(step, 0, None)), scheduler.get_last_lr()[0], rel_tol=1e-12)
        optimizer.step()
        scheduler.step()


def test_inverse_time_is_the_standard_deviation_of_annealed_gradient_noise():
    annealed = schedules.InverseTime(math.sqrt(0.3))
    for step in (0, 1, 10, 1000):
        assert math.isclose(annealed(Progress(step, 0, None)) ** 2, 0.3 / (1 + step) ** 0.55, rel_tol=1e-14)
    late = schedules.InverseTime(0.5, exponent=1.0, timescale=2.0, begin=3, unit="epoch")
    assert [late(Progress(0, epoch, None)) for epoch in (0, 3, 5, 9)] == [0.5, 0.5, 0.25, 0.125]


def test_the_mean_dose_of_inverse_time_is_its_integral():
    # a falling function: the sum over steps lies between the integral and the integral plus the first value
    steps, power = 10_000, 1 - 0.275
    integral = ((1 + steps) ** power - 1) / power
    dose = schedules.InverseTime(1.0).mean_dose(steps=steps)
    assert integral / steps < dose < (integral + 1) / steps


def test_a_window_is_on_from_its_begin_and_off_from_its_end():
    for unit in ("epoch", "step"):
        window = schedules.Window(0.3, begin=2, until=4, unit=unit)
        assert [window(Progress(t, t, None)) for t in range(6)] == [0, 0, 0.3, 0.3, 0, 0]
        assert schedules.Window(0.3, begin=2, unit=unit)(Progress(10**9, 10**9, None)) == 0.3
    share = schedules.Window(schedules.Linear(0.0, 1.0), begin=0.25, until=0.5)
    assert [share(Progress(0, 0, t)) for t in (0.0, 0.25, 0.375, 0.5, 1.0)] == [0, 0.25, 0.375, 0, 0]
    assert schedules.Window(0.3, until=0.5)(Progress(0, 0, 0.0)) == 0.3
    assert schedules.Window(0.3)(Progress(0, 0, 1.0)) == 0.3


def test_a_piece_in_fractions_is_a_run_of_its_own():
    plan = schedules.Piecewise([schedules.Linear(0.0, 1.0), schedules.Linear(1.0, 0.0)], [0.2])
    assert [plan(Progress(0, 0, t)) for t in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([0, 0.5, 1, 0.5, 0], rel=1e-12)


def test_a_piece_sees_no_time_outside_its_run():
    seen: dict[str, list[float]] = {"first": [], "last": []}
    follow = {name: lambda progress, name=name: seen[name].append(progress.fraction) or 0.1 for name in seen}
    plan = schedules.Piecewise(list(follow.values()), [0.5])
    for fraction in (0.0, 0.25, 0.75, 1.0):
        plan(Progress(0, 0, fraction))
    assert seen == {"first": [0.0, 0.5, 1.0, 1.0], "last": [0.0, 0.0, 0.5, 1.0]}


def test_an_exponential_over_many_orders_of_magnitude_is_finite():
    for start, end in ((1e-200, 1e200), (1e200, 1e-200)):
        assert math.isclose(schedules.Exponential(start, end)(Progress(0, 0, 0.5)), 1.0, rel_tol=1e-12)


def test_a_window_around_decibels_switches_the_noise_off():
    gated = schedules.Window(schedules.Amplitude(20.0), begin=2, unit="epoch")
    assert [gated(Progress(0, epoch, None)) for epoch in range(4)] == [0, 0, 0.1, 0.1]


def test_a_piece_counts_whole_epochs_from_where_it_takes_over_and_steps_from_the_begin_of_the_run():
    seen = []
    plan = schedules.Piecewise([0.1, lambda progress: seen.append(progress) or 0.2], [2.0], unit="epoch")
    assert [plan(Progress(10 * epoch, epoch, None)) for epoch in range(4)] == [0.1, 0.1, 0.2, 0.2]
    assert seen == [Progress(0, 0, None), Progress(10, 0, None), Progress(20, 0, None), Progress(30, 1, None)]
    assert isinstance(seen[-1].epoch, int)


@pytest.mark.parametrize(
    ("schedule", "dose"),
    [
        # the mean over t = 0, 1/n ... (n-1)/n of a straight line is that of its first and last value
        (schedules.Linear(0.0, 1.0), (1000 - 1) / 2000),
        # the same points of half a cosine: pairs t and 1 - t sum to 1, and t = 0 gives 0
        (schedules.Cosine(0.0, 1.0), (1000 - 1) / 2000),
        # ramp and hold: 1 - u0 / 2, less half a step of the sum
        (schedules.Linear(0.0, 1.0, until=0.4), 1 - 0.4 / 2 - 1 / 2000),
        # a geometric series
        (schedules.Exponential(0.8, 0.2), 0.8 * (1 - 0.25) / (1 - 0.25 ** (1 / 1000)) / 1000),
        (schedules.Cyclic(0.1, 0.5, every=0.2), 0.3),
        (schedules.Cyclic(0.1, 0.5, every=100, unit="step"), 0.3),
        (schedules.Window(0.3, begin=0.25, until=0.75), 0.3 * 0.5),
        (schedules.Window(0.3, until=4, unit="epoch"), 0.3 * 0.4),
        (schedules.Piecewise([0.2, 0.6], [0.25]), 0.2 * 0.25 + 0.6 * 0.75),
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
    "schedule",
    [
        schedules.Linear(0.0, 0.5),
        schedules.Cosine(0.1, 0.5),
        schedules.Exponential(0.1, 0.5),
        schedules.InverseTime(0.1, unit="fraction"),
        schedules.Cyclic(0.1, 0.5, every=0.5),
        schedules.Window(0.1, until=0.5),
        schedules.Window(schedules.Linear(0.0, 0.5), begin=5, unit="epoch"),
        schedules.Piecewise([0.1, 0.2], [0.5]),
        schedules.Piecewise([0.1, schedules.Linear(0.0, 0.5)], [5], unit="epoch"),
        schedules.Product([schedules.Linear(0.0, 0.5), schedules.Every(1.0, every=2)]),
        schedules.Every(schedules.Linear(0.0, 0.5), every=3, begin=1),
    ],
    ids=repr,
)
def test_a_run_without_an_end_refuses_fractions(schedule):
    with pytest.raises(ValueError, match="needs a run with a known end"):
        schedule(Progress(0, 0, None))


@pytest.mark.parametrize(
    ("schedule", "line"),
    [
        (schedules.Linear(0.0, 0.5), "Linear(start=0.0, end=0.5, begin=0.0, until=1000, unit='step')"),
        (schedules.Cosine(0.1, 0.5, begin=0.1, until=0.6), "Cosine(start=0.1, end=0.5, begin=100, until=600, unit='step')"),
        (schedules.Window(0.1, until=0.5), "Window(level=0.1, begin=0.0, until=500, unit='step')"),
        (schedules.Cyclic(0.1, 0.5, every=0.2), "Cyclic(start=0.1, end=0.5, every=200, begin=0.0, unit='step')"),
        (schedules.Piecewise([0.1, 0.2], [0.25]), "Piecewise(levels=(0.1, 0.2), milestones=[250], unit='step')"),
        (
            schedules.InverseTime(0.1, timescale=0.01, unit="fraction"),
            "InverseTime(start=0.1, exponent=0.275, timescale=10, begin=0.0, unit='step')",
        ),
    ],
    ids=repr,
)
def test_a_run_without_an_end_is_refused_with_the_schedule_in_steps(schedule, line):
    with pytest.raises(ValueError, match="limit_train_batches=…; or type the times in steps") as error:
        schedule(Progress(0, 0, None))
    assert f"schedules.{line}" in str(error.value)
    eval(f"schedules.{line}")


def test_a_mean_dose_in_epochs_needs_their_number():
    ramp = schedules.Linear(0.0, 1.0, until=4, unit="epoch")
    with pytest.raises(ValueError, match="type epochs=…"):
        ramp.mean_dose(steps=100)
    assert ramp.mean_dose(steps=100, epochs=4) == 0.375
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        ramp.mean_dose(steps=0, epochs=4)


@pytest.mark.parametrize("wrong", [True, np.True_, torch.tensor(True), "0.5"], ids=repr)
@pytest.mark.parametrize(
    "build",
    [
        schedules.Constant,
        schedules.Amplitude,
        lambda wrong: schedules.Linear(wrong, 1.0),
        lambda wrong: schedules.Linear(0.0, 1.0, until=wrong),
        lambda wrong: schedules.Exponential(1.0, wrong),
        lambda wrong: schedules.InverseTime(1.0, timescale=wrong),
        lambda wrong: schedules.Cyclic(0.0, 1.0, every=wrong),
        lambda wrong: schedules.Window(wrong),
        lambda wrong: schedules.Window(0.1, until=wrong),
        lambda wrong: schedules.Every(wrong, every=2),
        lambda wrong: schedules.Every(0.1, every=wrong),
        lambda wrong: schedules.Piecewise([0.1, wrong], [0.5]),
        lambda wrong: schedules.Piecewise([0.1, 0.2], [wrong]),
        lambda wrong: schedules.Product([0.1, wrong]),
    ],
)
def test_an_argument_that_is_no_number_is_refused(build, wrong):
    with pytest.raises(TypeError, match="must be a number"):
        build(wrong)


def test_any_sequence_is_taken_for_a_list():
    listed = schedules.Piecewise([0.1, 0.2], [0.5]), schedules.Product([0.1, 0.2])
    configured = schedules.Piecewise(UserList([0.1, 0.2]), UserList([0.5])), schedules.Product(UserList([0.1, 0.2]))
    assert configured == listed
    assert hash(configured) == hash(listed)


@pytest.mark.parametrize(
    "build",
    [
        lambda: schedules.Linear(0.0, 1.0, begin=0.5, until=0.5),
        lambda: schedules.Cosine(0.0, 1.0, begin=2.0),
        lambda: schedules.Linear(0.0, 1.0, until=10),
        lambda: schedules.Linear(0.0, 1.0, begin=-1, until=3, unit="epoch"),
        lambda: schedules.Linear(0.0, 1.0, unit="epoch"),
        lambda: schedules.Linear(0.0, 1.0, unit="epochs"),  # type: ignore[arg-type]
        lambda: schedules.Exponential(0.0, 1.0),
        lambda: schedules.Exponential(1.0, 0.5, unit="step"),
        lambda: schedules.InverseTime(1.0, begin=-1),
        lambda: schedules.InverseTime(1.0, begin=2, unit="fraction"),
        lambda: schedules.InverseTime(1.0, timescale=0.0),
        lambda: schedules.InverseTime(1.0, unit="steps"),  # type: ignore[arg-type]
        lambda: schedules.Cyclic(0.0, 1.0, every=0),
        lambda: schedules.Cyclic(0.0, 1.0, every=3, unit="epochs"),  # type: ignore[arg-type]
        lambda: schedules.Window(0.1, begin=0.5, until=0.5),
        lambda: schedules.Window(0.1, until=2),
        lambda: schedules.Window(0.1, begin=1.0),
        lambda: schedules.Piecewise([0.1, 0.2], []),
        lambda: schedules.Piecewise([], []),
        lambda: schedules.Piecewise([0.1, 0.2, 0.3], [0.5, 0.5]),
        lambda: schedules.Piecewise([0.1, 0.2], [0.0]),
        lambda: schedules.Piecewise([0.1, 0.2], [5]),
        lambda: schedules.Piecewise([0.1, 0.2], [2.5], unit="epoch"),
        lambda: schedules.Product([]),
        lambda: schedules.Every(0.1, every=2, unit="fraction"),  # type: ignore[arg-type]
        lambda: schedules.Every(0.1, every=0),
        lambda: schedules.Every(0.1, every=2, begin=-1),
        lambda: schedules.Every(0.1, every=2, length=3),
        lambda: schedules.Every(0.1, every=2, length=0),
    ],
)
def test_invalid_times_are_refused(build):
    with pytest.raises(ValueError, match="must"):
        build()
