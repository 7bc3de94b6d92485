"""The laws of a noise, of a schedule and of a rule, for people who write one of their own.

Each law is a function that raises an AssertionError where it is broken. ``NOISE_LAWS``, ``SCHEDULE_LAWS`` and ``RULE_LAWS``
list them, to be parametrised over in a test suite, and :func:`check_noise`, :func:`check_schedule` and :func:`check_rule` run
them all.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lightning_noise.noise import Noise
from lightning_noise.rules import Observation, Rule, State
from lightning_noise.schedules import Schedule, moments

__all__ = ["NOISE_LAWS", "RULE_LAWS", "SCHEDULE_LAWS", "check_noise", "check_rule", "check_schedule", "global_streams"]

LEVEL = 0.25
RUNS = ((1, 1), (12, 1), (60, 7))  # steps and epochs


def check_noise(noise: Noise) -> None:
    """Runs all laws of a noise.

    Example:
        >>> from lightning_noise.noise import Gaussian
        >>> check_noise(Gaussian())
    """
    for law in NOISE_LAWS:
        law(noise)


def check_schedule(schedule: Schedule) -> None:
    """Runs all laws of a schedule.

    Example:
        >>> from lightning_noise.schedules import Linear
        >>> check_schedule(Linear(0.0, 0.5))
    """
    for law in SCHEDULE_LAWS:
        law(schedule)


def check_rule(rule: Rule) -> None:
    """Runs all laws of a rule.

    Example:
        >>> from lightning_noise.rules import Governor
        >>> check_rule(Governor(chance=0.1))
    """
    for law in RULE_LAWS:
        law(rule)


def global_streams() -> tuple[object, ...]:
    """Returns the states of the global streams of torch, numpy and python, to be compared with ``==``.

    Example:
        >>> before = global_streams()
        >>> _ = torch.rand(1)
        >>> global_streams() == before
        False
    """
    kind, keys, *rest = np.random.get_state(legacy=True)
    return torch.get_rng_state().numpy().tobytes(), kind, np.asarray(keys).tobytes(), *rest, random.getstate()


def _input(shape: tuple[int, ...] = (6, 3, 8, 8), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=_generator(1)).to(dtype)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _observations(n: int = 60) -> list[Observation]:
    """Validations of a model that learns, with noise that costs it something, and a few that are not finite."""
    chances = random.Random(0)
    seen = []
    for i in range(n):
        clean = 0.95 - 0.8 / (i + 1) + chances.gauss(0, 0.02)
        boundary = clean * chances.uniform(0.7, 1.0)
        gap, error = chances.gauss(0, 0.03), chances.uniform(0.0, 0.02)
        seen.append(Observation(math.nan if i % 20 == 19 else clean, boundary, error, gap, 500, error))
    return seen


def _start(rule: Rule) -> float:
    """A level at which the rule may start."""
    return min(max(LEVEL, getattr(rule, "lo", 0.0)), getattr(rule, "hi", math.inf))


def _run(rule: Rule, state: State, observations: list[Observation]) -> list[tuple[State, str]]:
    moves = []
    for observation in observations:
        state, reason = rule.update(state, observation)
        moves.append((state, reason))
    return moves


def _law(holds: bool, subject: object, law: str) -> None:
    if not holds:
        raise AssertionError(f"{subject!r} {law}")


def keeps_shape_dtype_and_device(noise: Noise) -> None:
    for shape in ((6, 3, 8, 8), (5, 4, 16), (1, 2, 2), (0, 3, 4)):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            x = _input(shape, dtype)
            y = noise(x, LEVEL, generator=_generator())
            same = (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
            _law(same, noise, f"turned {x.dtype} {tuple(x.shape)} into {y.dtype} {tuple(y.shape)}")


def is_the_identity_at_level_0(noise: Noise) -> None:
    x = _input()
    _law(noise(x, 0.0, generator=_generator()) is x, noise, "must return x itself at level 0")
    y = noise(x, torch.zeros(len(x)), generator=_generator())
    _law(torch.equal(x, y), noise, "must return the values of x at a level of 0 for each sample")


def changes_the_input_above_level_0(noise: Noise) -> None:
    x = _input()
    _law(not torch.equal(noise(x, LEVEL, generator=_generator()), x), noise, f"did nothing at level {LEVEL}")


def is_a_function_of_the_generator(noise: Noise) -> None:
    x = _input()
    one, two, other = (noise(x, LEVEL, generator=_generator(seed)) for seed in (0, 0, 2))
    _law(torch.equal(one, two), noise, "drew differently from one seed")
    _law(not torch.equal(one, other), noise, "drew the same from two seeds")


def leaves_input_and_global_streams_alone(noise: Noise) -> None:
    x, streams = _input(), global_streams()
    before = x.clone()
    noise(x, LEVEL, generator=_generator())
    _law(torch.equal(x, before), noise, "wrote to its input")
    _law(global_streams() == streams, noise, "drew from a global stream")


def takes_a_level_for_each_sample(noise: Noise) -> None:
    x = _input()
    levels = torch.linspace(0, LEVEL, len(x))
    y = noise(x, levels, generator=_generator())
    for i, level in enumerate(levels.tolist()):
        alone = noise(x, level, generator=_generator())[i]
        _law(torch.equal(y[i], alone), noise, f"treats sample {i} differently at a level of its own than at that of all")


def does_not_depend_on_the_memory_format(noise: Noise) -> None:
    x = _input()
    one = noise(x, LEVEL, generator=_generator())
    two = noise(x.to(memory_format=torch.channels_last), LEVEL, generator=_generator())
    _law(torch.equal(one, two), noise, "drew differently for another memory format")
    _law(two.is_contiguous(memory_format=torch.channels_last), noise, "did not keep the memory format")


def is_the_same_in_half_precision_up_to_rounding(noise: Noise) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = _input(dtype=dtype)
        half = noise(x, LEVEL, generator=_generator())
        full = noise(x.float(), LEVEL, generator=_generator())
        # one rounding to the nearest number of the type, of what float32 gives
        _law(torch.equal(half, full.to(dtype)), noise, f"differs in {dtype} by more than one rounding")


def is_a_value(subject: Noise | Schedule | Rule) -> None:
    copies = copy.deepcopy(subject), pickle.loads(pickle.dumps(subject))
    _law(all(one == subject and hash(one) == hash(subject) for one in copies), subject, "does not equal its copy")


def is_pure(schedule: Schedule) -> None:
    for run in RUNS:
        progress = list(moments(*run))
        forward = [schedule(moment) for moment in progress]
        backward = [schedule(moment) for moment in reversed(progress)][::-1]
        _law(forward == backward, schedule, "depends on when or how often it is asked")


def is_a_finite_number(schedule: Schedule) -> None:
    levels = [schedule(moment) for run in RUNS for moment in moments(*run)]
    _law(all(isinstance(level, float | int) and math.isfinite(level) for level in levels), schedule, "is not always a number")


def has_its_mean_as_mean_dose(schedule: Schedule) -> None:
    for steps, epochs in RUNS:
        levels = [schedule(moment) for moment in moments(steps, epochs)]
        dose = schedule.mean_dose(steps=steps, epochs=epochs)
        # both sum the same numbers, in another order
        _law(math.isclose(dose, sum(levels) / steps, rel_tol=1e-12, abs_tol=1e-15), schedule, "has a wrong mean dose")


def keeps_its_state_outside(rule: Rule) -> None:
    one, two = (_run(rule, rule.init(_start(rule)), _observations()) for _ in range(2))
    _law(one == two, rule, "moves differently when it is run again")


def leaves_the_state_that_it_is_given_alone(rule: Rule) -> None:
    state = rule.init(_start(rule))
    for observation in _observations():
        before = copy.deepcopy(state)
        after, _ = rule.update(state, observation)
        _law(state == before, rule, "wrote to the state that it was given")
        state = after


def moves_on_from_a_saved_state(rule: Rule) -> None:
    observations = _observations()
    moves = _run(rule, rule.init(_start(rule)), observations)
    for i in (0, 7, 31):
        saved = json.loads(json.dumps(moves[i][0]))
        _law(_run(rule, saved, observations[i + 1 :]) == moves[i + 1 :], rule, "moves differently from a saved state")


def starts_at_the_level_that_it_is_given(rule: Rule) -> None:
    _law(rule.init(_start(rule))["level"] == _start(rule), rule, "does not start at the level that it is given")


def gives_a_level_and_a_reason_of_its_own(rule: Rule) -> None:
    for state, reason in _run(rule, rule.init(_start(rule)), _observations()):
        level = state["level"]
        _law(isinstance(level, float | int) and 0 <= level < math.inf, rule, f"moved the level to {level!r}")
        _law(reason in rule.reasons, rule, f"gave the reason {reason!r}, but has {rule.reasons}")


NOISE_LAWS: tuple[Callable[[Noise], None], ...] = (
    keeps_shape_dtype_and_device,
    is_the_identity_at_level_0,
    changes_the_input_above_level_0,
    is_a_function_of_the_generator,
    leaves_input_and_global_streams_alone,
    takes_a_level_for_each_sample,
    does_not_depend_on_the_memory_format,
    is_the_same_in_half_precision_up_to_rounding,
    is_a_value,
)

SCHEDULE_LAWS: tuple[Callable[[Schedule], None], ...] = (
    is_pure,
    is_a_finite_number,
    has_its_mean_as_mean_dose,
    is_a_value,
)

RULE_LAWS: tuple[Callable[[Rule], None], ...] = (
    keeps_its_state_outside,
    leaves_the_state_that_it_is_given_alone,
    moves_on_from_a_saved_state,
    starts_at_the_level_that_it_is_given,
    gives_a_level_and_a_reason_of_its_own,
    is_a_value,
)
