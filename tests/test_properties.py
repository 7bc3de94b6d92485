"""Laws over random batches, selectors, masks, schedules, rules and states."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from members import NOISES, RULES, SCHEDULES

from lightning_noise import masks, rules, schedules
from lightning_noise.batch import format_path, get, leaves, map_tensors, modify, select
from lightning_noise.noise import Noise
from lightning_noise.perturb.inputs import perturb_batch
from lightning_noise.rng import Key
from lightning_noise.schedules import Progress

quick = settings(max_examples=15, deadline=None, derandomize=True)

# --- batches

TENSORS = st.tuples(st.integers(1, 3), st.integers(0, 4)).map(lambda shape: torch.arange(math.prod(shape)).view(shape).float())
OTHERS = st.one_of(st.none(), st.integers(), st.text("ab", max_size=2))
KEYS = st.text("abxy", min_size=1, max_size=2)
BATCHES: Any = st.recursive(
    st.one_of(TENSORS, TENSORS, OTHERS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=8,
)


def same(one: Any, two: Any) -> bool:
    """Whether two batches are equal, to the types of their containers and the objects that are no tensors."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, list | tuple):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(value, two[key]) for key, value in one.items())
    return one == two


@quick
@given(BATCHES, st.data())
def test_a_change_meets_the_named_leaves_alone_and_can_be_undone(batch, data):
    found = list(leaves(batch))
    before = copy.deepcopy(batch)
    paths = [path for path, _ in found if data.draw(st.booleans())]
    changed = modify(batch, paths, lambda leaf, path: leaf + 1)
    assert same(batch, before)
    for path, leaf in found:
        assert (get(changed, path) is leaf) == (path not in paths)
    assert same(modify(changed, paths, lambda leaf, path: leaf - 1), batch)
    assert changed is batch or paths
    assert same(map_tensors(batch, torch.clone), batch)


@quick
@given(BATCHES)
def test_a_leaf_is_selected_by_its_path_as_it_is_written(batch):
    for path, leaf in leaves(batch):
        if path:
            assert any(each is leaf for each in select(batch, format_path(path)).values())


# --- noises


@st.composite
def masked(draw: Any) -> tuple[torch.Tensor, torch.Tensor]:
    n, channels, length = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(2, 9))
    stream = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    x = torch.rand(n, channels, length, length, generator=stream)
    mask = torch.rand(n, 1, length, length, generator=stream) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    garbage = draw(st.sampled_from([0.0, -7.0, math.inf, math.nan, 3e38]))
    return torch.where(mask, x, garbage), mask


@settings(max_examples=5, deadline=None, derandomize=True)
@pytest.mark.parametrize("member", NOISES, ids=repr)
@given(masked(), st.floats(0.0, 1.0), st.integers(0, 1000))
def test_what_is_not_valid_keeps_its_bits_and_what_is_valid_stays_a_number(member: Noise, data, level, seed):
    x, mask = data
    batch = {"x": x, "mask": mask, "y": torch.zeros(len(x))}
    noisy = perturb_batch(batch, [("x",)], member, level, Key((seed,)), mask="mask")
    valid = masks.align_mask(mask, x)
    assert torch.equal(noisy["x"][~valid].view(torch.int32), x[~valid].view(torch.int32))
    assert noisy["x"][valid].isfinite().all()
    assert noisy["mask"] is mask
    assert noisy["y"] is batch["y"]


@quick
@given(masked(), st.floats(0.01, 1.0), st.sampled_from([None, "std"]), st.booleans(), st.floats(0.0, 1.0))
def test_noise_with_options_keeps_bounds_and_padding(data, level, relative, per_sample, probability):
    x, mask = data
    options: Any = {"relative": relative, "per_sample": per_sample, "probability": probability, "clip": (-0.1, 1.1)}
    batch = {"x": x, "mask": mask}
    noisy = perturb_batch(batch, [("x",)], next(iter(NOISES)), level, Key((0,)), mask="mask", **options)["x"]
    valid = masks.align_mask(mask, x)
    assert torch.equal(noisy[~valid].view(torch.int32), x[~valid].view(torch.int32))
    assert ((noisy[valid] >= -0.1 - 1e-6) & (noisy[valid] <= 1.1 + 1e-6)).all()


@quick
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), min_size=1, max_size=3), st.integers(0, 3))
def test_documents_are_taken_apart_and_put_together(lengths, padding):
    width = max(map(len, lengths))
    rows = torch.tensor([each + [0] * (width - len(each)) for each in lengths])
    x = torch.rand(len(rows), max(int(rows.sum(1).max()) + padding, width + 1), 2)
    numbers = masks.number_documents(rows, x)
    assert masks.document_lengths(numbers).gt(0).sum() == rows.sum()
    packing = masks.Packing.of(numbers)
    assert torch.equal(packing.pack(packing.unpack(x), x), x)


# --- schedules

AMOUNTS = st.floats(0.0, 1.0)


@st.composite
def bounded(draw: Any) -> tuple[Any, float]:
    """A schedule, and the largest level that its parts have."""
    start, end = draw(AMOUNTS), draw(AMOUNTS)
    begin = draw(st.floats(0.0, 0.5))
    until = draw(st.floats(0.6, 1.0))
    made = draw(st.sampled_from([schedules.Linear, schedules.Cosine, schedules.Cyclic, schedules.Piecewise, schedules.Window]))
    if made is schedules.Cyclic:
        return made(start, end, every=until), max(start, end)
    if made is schedules.Window:
        return made(start, begin=begin, until=until), start
    if made is schedules.Piecewise:
        return made([start, schedules.Linear(start, end)], [until]), max(start, end)
    return made(start, end, begin=begin, until=until), max(start, end)


@quick
@given(bounded(), st.integers(0, 1000), st.floats(0.0, 1.0))
def test_a_level_is_within_the_bounds_of_its_schedule(member, step, fraction):
    schedule, largest = member
    level = schedule(Progress(step=step, epoch=step // 10, fraction=fraction))
    assert 0 <= level <= largest * (1 + 1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(0, 10**4), st.floats(0.0, 1.0))
def test_a_schedule_is_a_number_at_any_time(schedule, step, epoch, fraction):
    assert 0 <= schedule(Progress(step=step, epoch=epoch, fraction=fraction)) < math.inf


# --- rules

ODD = st.one_of(st.floats(-2.0, 2.0), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0]))
OBSERVATIONS = st.lists(
    st.builds(
        rules.Observation,
        ODD,
        ODD,
        st.one_of(st.floats(0.0, 1.0), st.just(math.nan)),
        ODD,
        st.integers(0, 10**6),
        st.floats(0.0, 1.0),
        chance=st.floats(0.0, 1.0),
    ),
    max_size=12,
)


@settings(max_examples=8, deadline=None, derandomize=True)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@given(OBSERVATIONS, st.integers(0, 12))
def test_a_level_is_a_number_within_its_bounds_and_a_saved_state_continues_exactly(rule, observations, stop):
    lo, hi = getattr(rule, "lo", 0.0), getattr(rule, "hi", math.inf)
    state = saved = rule.init(max(lo, min(0.1, hi)))
    for i, observation in enumerate(observations):
        if i == stop:
            saved = json.loads(json.dumps(state))
        state, reason = rule.update(state, observation)
        if i >= stop:
            saved, again = rule.update(saved, observation)
            assert (json.dumps(saved), again) == (json.dumps(state), reason)
        assert math.isfinite(state["level"])
        assert 0 <= state["level"] <= hi
