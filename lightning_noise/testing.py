"""Laws of noises, schedules and rules, for authors of their own.

Each law is a function that raises an AssertionError if its argument breaks the law. ``NOISE_LAWS``, ``SCHEDULE_LAWS`` and
``RULE_LAWS`` list the laws, so that a test suite can be parametrized over them. :func:`check_noise`, :func:`check_schedule`
and :func:`check_rule` run all of them. The tensors are on the default device: ``with torch.device("cuda"): check_noise(noise)``
checks a noise on a GPU.
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
_GARBAGE = (-0.0, -7.0, 3e38, math.inf, math.nan)  # what padding may hold
RUNS = ((1, 1), (12, 1), (60, 7))  # steps and epochs


def check_noise(noise: Noise) -> None:
    """Checks all laws of a noise, or raises an AssertionError that names the broken law.

    Example:
        >>> from lightning_noise.noise import Gaussian
        >>> check_noise(Gaussian())
    """
    for law in NOISE_LAWS:
        law(noise)


def check_schedule(schedule: Schedule) -> None:
    """Checks all laws of a schedule, as :func:`check_noise` does of a noise."""
    for law in SCHEDULE_LAWS:
        law(schedule)


def check_rule(rule: Rule) -> None:
    """Checks all laws of a rule, as :func:`check_noise` does of a noise."""
    for law in RULE_LAWS:
        law(rule)


def global_streams() -> tuple[object, ...]:
    """Returns the states of the global random streams of torch, NumPy and Python, to be compared with ``==``."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    return [state.numpy().tobytes() for state in states], kind, np.asarray(keys).tobytes(), *rest, random.getstate()


def _input(shape: tuple[int, ...] = (6, 3, 8, 8), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=_generator(1)).to(dtype)


def _masks() -> tuple[Tensor, Tensor]:
    """Returns a mask of padded images, one of which is all padding, and a mask with random holes."""
    x = _input()
    sizes = torch.tensor([0, 8, 1, 5, 2, 7]).view(-1, 1, 1, 1)
    position = torch.arange(8)
    return ((position < sizes) & (position[:, None] < sizes.flip(0).clamp_min(3))).expand_as(x).contiguous(), x < 0.7


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def _observations(n: int = 60) -> list[Observation]:
    """Returns validations of a model that improves, that noise costs some skill, and that is NaN now and then."""
    stream = random.Random(0)
    observations = []
    for i in range(n):
        clean = 0.95 - 0.8 / (i + 1) + stream.gauss(0, 0.02)
        boundary = clean * stream.uniform(0.7, 1.0)
        gap, error = stream.gauss(0, 0.03), stream.uniform(0.0, 0.02)
        clean = math.nan if i % 20 == 19 else clean
        observations.append(Observation(clean, boundary, error, gap, 500, error, chance=0.1))
    return observations


def _start(rule: Rule) -> float:
    """Returns a level at which the rule may start."""
    return min(max(LEVEL, getattr(rule, "lo", 0.0)), getattr(rule, "hi", math.inf))


def _run(rule: Rule, state: State, observations: list[Observation]) -> list[tuple[State, str]]:
    moves = []
    for observation in observations:
        state, reason = rule.update(state, observation)
        moves.append((state, reason))
    return moves


def _require(holds: bool, subject: object, failure: str) -> None:
    if not holds:
        raise AssertionError(f"{subject!r} {failure}")


def keeps_shape_dtype_and_device(noise: Noise) -> None:
    images, series = ((6, 3, 8, 8), (1, 1, 2, 2), (0, 3, 4, 4)), ((5, 4, 16), (1, 2, 2))
    refused = [shape for shape in series if _refuses(noise, shape)]
    _require(len(refused) in (0, len(series)), noise, f"refuses the shapes {refused}, but takes others of as many axes")
    for shape in images if refused else images + series:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            x = _input(shape, dtype)
            y = noise(x, LEVEL, generator=_generator())
            same = (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
            _require(same, noise, f"turned {x.dtype} {tuple(x.shape)} into {y.dtype} {tuple(y.shape)}")


def _refuses(noise: Noise, shape: tuple[int, ...]) -> bool:
    try:
        noise(_input(shape, torch.float32), LEVEL, generator=_generator())
    except ValueError:
        return True
    return False


def is_the_identity_at_level_0(noise: Noise) -> None:
    x = _input()
    _require(noise(x, 0.0, generator=_generator()) is x, noise, "must return x itself at level 0")
    y = noise(x, torch.zeros(len(x)), generator=_generator())
    _require(torch.equal(x, y), noise, "must return the values of x if the level of each sample is 0")


def changes_the_input_above_level_0(noise: Noise) -> None:
    x = _input()
    _require(not torch.equal(noise(x, LEVEL, generator=_generator()), x), noise, f"changed nothing at level {LEVEL}")


def is_a_function_of_the_generator(noise: Noise) -> None:
    x = _input()
    one, two, other = (noise(x, LEVEL, generator=_generator(seed)) for seed in (0, 0, 2))
    _require(torch.equal(one, two), noise, "drew differently from the same seed")
    _require(not torch.equal(one, other), noise, "drew the same from different seeds")


def does_not_touch_input_or_global_streams(noise: Noise) -> None:
    x, streams = _input(), global_streams()
    before = x.clone()
    noise(x, LEVEL, generator=_generator())
    _require(torch.equal(x, before), noise, "wrote to its input")
    _require(global_streams() == streams, noise, "drew from a global stream")


def takes_a_level_for_each_sample(noise: Noise) -> None:
    x = _input()
    levels = torch.linspace(0, LEVEL, len(x))
    y = noise(x, levels, generator=_generator())
    for i, level in enumerate(levels.tolist()):
        same = torch.equal(y[i], noise(x, level, generator=_generator())[i])
        _require(same, noise, f"perturbs sample {i} differently with a level for each sample than with a number")


def has_independent_rows(noise: Noise) -> None:
    if not noise.independent_rows:
        return
    x = _input()
    y = noise(x, LEVEL, generator=_generator())
    for others in (1 - x, torch.zeros_like(x), torch.full_like(x, math.nan)):
        for i in range(len(x)):
            mixed = others.clone()
            mixed[i] = x[i]
            same = torch.equal(noise(mixed, LEVEL, generator=_generator())[i], y[i])
            _require(same, noise, f"has independent_rows, but the noise of row {i} depends on the other rows")


def keeps_invalid_elements(noise: Noise) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for mask in _masks():
            x = _input(dtype=dtype)
            for garbage in _GARBAGE:
                dirty = torch.where(mask, x, garbage)
                y = noise(dirty, LEVEL, generator=_generator(), mask=mask)
                bits = torch.int16 if dtype == torch.bfloat16 else torch.int32  # -0.0 equals 0.0, and NaN nothing
                same = torch.equal(y[~mask].view(bits), dirty[~mask].view(bits))
                _require(same, noise, f"changed elements of {garbage} that the mask calls invalid")


def does_not_depend_on_invalid_elements(noise: Noise) -> None:
    for mask in _masks():
        x = _input()
        y = noise(x, LEVEL, generator=_generator(), mask=mask)
        for garbage in _GARBAGE:
            dirty = noise(torch.where(mask, x, garbage), LEVEL, generator=_generator(), mask=mask)
            _require(torch.equal(dirty[mask], y[mask]), noise, f"perturbs valid elements differently beside {garbage}")


def takes_a_mask_that_is_true_everywhere_for_none(noise: Noise) -> None:
    x = _input()
    y = noise(x, LEVEL, generator=_generator(), mask=torch.ones_like(x, dtype=torch.bool))
    same = torch.equal(y, noise(x, LEVEL, generator=_generator()))
    _require(same, noise, "perturbs differently with a mask that is true everywhere than without")


def takes_nan_for_invalid(noise: Noise) -> None:
    for mask in _masks():
        x = _input().masked_fill_(~mask, math.nan)
        y = noise(x, LEVEL, generator=_generator())
        _require(torch.equal(y.isnan(), ~mask), noise, "did not keep NaN where it was")
        same = torch.equal(y[mask], noise(x, LEVEL, generator=_generator(), mask=mask)[mask])
        _require(same, noise, "perturbs differently beside NaN than with a mask that excludes NaN")


def does_not_depend_on_the_memory_format(noise: Noise) -> None:
    x = _input()
    one = noise(x, LEVEL, generator=_generator())
    two = noise(x.to(memory_format=torch.channels_last), LEVEL, generator=_generator())
    _require(torch.equal(one, two), noise, "drew differently for another memory format")
    _require(two.is_contiguous(memory_format=torch.channels_last), noise, "did not keep the memory format")


def is_the_same_in_half_precision_up_to_rounding(noise: Noise) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = _input(dtype=dtype)
        half = noise(x, LEVEL, generator=_generator())
        full = noise(x.float(), LEVEL, generator=_generator())
        _require(torch.equal(half, full.to(dtype)), noise, f"in {dtype} is not the result in float32, rounded once")


def is_a_value(subject: Noise | Schedule | Rule) -> None:
    copies = copy.deepcopy(subject), pickle.loads(pickle.dumps(subject))
    _require(all(one == subject and hash(one) == hash(subject) for one in copies), subject, "does not equal its copy")


def is_pure(schedule: Schedule) -> None:
    for run in RUNS:
        progress = list(moments(*run))
        forward = [schedule(moment) for moment in progress]
        backward = [schedule(moment) for moment in reversed(progress)][::-1]
        _require(forward == backward, schedule, "depends on when or how often it is called")


def is_a_finite_number(schedule: Schedule) -> None:
    levels = [schedule(moment) for run in RUNS for moment in moments(*run)]
    finite = all(isinstance(level, float | int) and math.isfinite(level) for level in levels)
    _require(finite, schedule, "is not always a finite number")


def has_its_mean_as_mean_dose(schedule: Schedule) -> None:
    for steps, epochs in RUNS:
        levels = [schedule(moment) for moment in moments(steps, epochs)]
        dose = schedule.mean_dose(steps=steps, epochs=epochs)
        equal = math.isclose(dose, sum(levels) / steps, rel_tol=1e-12, abs_tol=1e-15)  # both round differently
        _require(equal, schedule, "has a mean dose that is not its mean")


def has_no_hidden_state(rule: Rule) -> None:
    one, two = (_run(rule, rule.init(_start(rule)), _observations()) for _ in range(2))
    _require(one == two, rule, "moves the level differently when it is run again")


def does_not_write_to_the_state(rule: Rule) -> None:
    state = rule.init(_start(rule))
    for observation in _observations():
        before = copy.deepcopy(state)
        after, _ = rule.update(state, observation)
        _require(state == before, rule, "wrote to the state that was passed")
        state = after


def resumes_from_a_saved_state(rule: Rule) -> None:
    observations = _observations()
    moves = _run(rule, rule.init(_start(rule)), observations)
    for i in (0, 7, 31):
        saved = json.loads(json.dumps(moves[i][0]))
        same = _run(rule, saved, observations[i + 1 :]) == moves[i + 1 :]
        _require(same, rule, "moves the level differently from a saved state")


def starts_at_the_given_level(rule: Rule) -> None:
    _require(rule.init(_start(rule))["level"] == _start(rule), rule, "does not start at the given level")


def returns_a_valid_level_and_a_known_reason(rule: Rule) -> None:
    for state, reason in _run(rule, rule.init(_start(rule)), _observations()):
        level = state["level"]
        _require(isinstance(level, float | int) and 0 <= level < math.inf, rule, f"moved the level to {level!r}")
        _require(reason in rule.reasons, rule, f"returned the reason {reason!r}, which is not in {rule.reasons}")


NOISE_LAWS: tuple[Callable[[Noise], None], ...] = (
    keeps_shape_dtype_and_device,
    is_the_identity_at_level_0,
    changes_the_input_above_level_0,
    is_a_function_of_the_generator,
    does_not_touch_input_or_global_streams,
    takes_a_level_for_each_sample,
    has_independent_rows,
    keeps_invalid_elements,
    does_not_depend_on_invalid_elements,
    takes_a_mask_that_is_true_everywhere_for_none,
    takes_nan_for_invalid,
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
    has_no_hidden_state,
    does_not_write_to_the_state,
    resumes_from_a_saved_state,
    starts_at_the_given_level,
    returns_a_valid_level_and_a_known_reason,
    is_a_value,
)
