"""Label noise has the probabilities of its formula, as soft labels and as draws."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_noise import labels

K, N = 4, 100_000
CONFUSION = [[0.7, 0.2, 0.1, 0.0], [0.0, 1.0, 0.0, 0.0], [0.5, 0.25, 0.0, 0.25], [0.1, 0.2, 0.3, 0.4]]
LABELS = [labels.SmoothLabels(K), labels.FlipLabels(K), labels.ConfusionFlips(CONFUSION)]
each_noise = pytest.mark.parametrize("member", LABELS, ids=lambda member: type(member).__name__)
each_level = pytest.mark.parametrize("level", [0.0, 0.1, 0.6, 1.0])


def transition(member: labels.LabelNoise, level: float) -> Tensor:
    """The closed form of the probability that class y becomes class k."""
    match member:
        case labels.SmoothLabels():
            return (1 - level) * torch.eye(K) + level / K
        case labels.FlipLabels():
            return (1 - level) * torch.eye(K) + level / (K - 1) * (1 - torch.eye(K))
        case labels.ConfusionFlips():
            return (1 - level) * torch.eye(K) + level * torch.tensor(CONFUSION)
    raise NotImplementedError(member)


def sample(member: labels.LabelNoise, target: Tensor, level: float, seed: int = 0) -> Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    change, partner = torch.rand(2, *target.shape, generator=generator)
    return member.sample(target, level, change=change, partner=partner)


@each_level
@each_noise
def test_the_probabilities_are_those_of_the_formula(member, level):
    expected = transition(member, level)
    # a sum and a product of float32 numbers in [0, 1] round a few times
    torch.testing.assert_close(member.probabilities(torch.arange(K), level), expected, rtol=0, atol=1e-6)
    pixels = torch.randint(0, K, (3, 5, 2), generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    soft = member.probabilities(pixels, level)
    assert soft.shape == (3, K, 5, 2)
    torch.testing.assert_close(soft, expected[pixels].movedim(-1, 1), rtol=0, atol=1e-6)


@each_level
@each_noise
def test_the_draws_have_the_probabilities_of_the_formula(member, level):
    for y, expected in enumerate(transition(member, level)):
        drawn = sample(member, torch.full((N,), y), level)
        shares = torch.bincount(drawn, minlength=K) / N
        # five standard errors
        assert ((shares - expected).abs() <= 5 * (expected * (1 - expected).clamp_min(0) / N).sqrt() + 1e-7).all()


@pytest.mark.parametrize("member", LABELS[:2], ids=lambda member: type(member).__name__)
def test_flips_are_smoothing_in_expectation(member):
    rate = 0.3
    smoothing = labels.SmoothLabels(K).probabilities(torch.arange(K), rate * K / (K - 1))
    flips = labels.FlipLabels(K).probabilities(torch.arange(K), rate)
    torch.testing.assert_close(flips, smoothing, rtol=0, atol=1e-6)


def test_the_loss_of_flipped_labels_is_that_of_smoothed_ones_on_average():
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    logits, target, rate = torch.randn(1, K, generator=generator), torch.tensor([2]), 0.3
    flipped = sample(labels.FlipLabels(K), target.expand(N), rate)
    losses = F.cross_entropy(logits.expand(N, K), flipped, reduction="none")
    smoothed = F.cross_entropy(logits, target, label_smoothing=rate * K / (K - 1))
    assert abs(losses.mean().item() - smoothed.item()) <= 5 * losses.std().item() / math.sqrt(N)  # five standard errors


def test_the_accuracy_against_flipped_labels_has_its_closed_form():
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    target = torch.randint(0, K, (N,), generator=generator)
    accuracy, rate = 0.8, 0.25
    preds = torch.where(torch.rand(N, generator=generator) < accuracy, target, (target + 1) % K)
    found = (preds == sample(labels.FlipLabels(K), target, rate, seed=1)).float().mean().item()
    expected = accuracy * (1 - rate) + (1 - accuracy) * rate / (K - 1)
    assert abs(found - expected) <= 5 * math.sqrt(expected * (1 - expected) / N)  # five standard errors


@each_noise
def test_what_changes_at_a_level_changes_to_the_same_class_at_every_higher_one(member):
    target = torch.randint(0, K, (N,), generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    low, high = (sample(member, target, level) for level in (0.2, 0.5))
    changed = low != target
    assert torch.equal(low[changed], high[changed])
    assert (high != target).sum() > changed.sum() > 0


@each_noise
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_labels_keep_their_type_and_shape_and_are_not_written_to(member, dtype):
    target = torch.randint(0, K, (6, 3), generator=torch.Generator(torch.get_default_device()).manual_seed(0)).to(dtype)
    before = target.clone()
    drawn = sample(member, target, 0.5)
    assert (drawn.dtype, drawn.shape) == (dtype, target.shape)
    assert torch.equal(target, before)


def test_class_numbers_beyond_the_precision_of_half_floats_survive():
    target = torch.tensor([2049, 4097, 49_999])
    member = labels.FlipLabels(50_000)
    assert torch.equal(sample(member, target, 0.0), target)
    flipped = sample(member, target.expand(1000, 3), 1.0)
    assert (flipped != target).all()
    assert flipped.min() >= 0
    assert flipped.max() < 50_000


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
@each_noise
def test_the_edges_of_the_draw_are_other_classes(member, u):
    target = torch.arange(K)
    drawn = member.sample(target, 1.0, change=torch.zeros(K), partner=torch.full((K,), u))
    assert ((drawn >= 0) & (drawn < K)).all()
    possible = transition(member, 1.0).fill_diagonal_(0)
    for y in range(K):
        if possible[y].sum() > 0:
            assert possible[y, drawn[y]] > 0
        else:
            assert drawn[y] == y  # a class that is never mistaken


@each_noise
def test_label_noise_is_a_value(member):
    for one in (copy.deepcopy(member), pickle.loads(pickle.dumps(member))):
        assert one == member
        assert hash(one) == hash(member)


@pytest.mark.parametrize(
    "build",
    [
        lambda: labels.FlipLabels(1),
        lambda: labels.SmoothLabels(0),
        lambda: labels.ConfusionFlips([[1.0]]),
        lambda: labels.ConfusionFlips([[0.5, 0.5], [0.5, 0.6]]),
        lambda: labels.ConfusionFlips([[1.5, -0.5], [0.0, 1.0]]),
        lambda: labels.ConfusionFlips([[0.5, 0.5], [1.0]]),
        lambda: labels.ConfusionFlips([[math.nan, math.nan], [0.0, 1.0]]),
    ],
)
def test_arguments_that_make_no_sense_are_refused(build):
    with pytest.raises(ValueError, match="must be"):
        build()


def test_an_unsigned_label_is_not_taken_for_the_ignored_one():
    target = torch.tensor([156, 156, 155], dtype=torch.uint8)
    assert (sample(labels.FlipLabels(200), target, 1.0) != target).all()
    assert labels.FlipLabels(200).probabilities(target, 0.0).argmax(1).tolist() == [156, 156, 155]


@each_noise
def test_ignored_labels_stay(member):
    target = torch.tensor([-100, 0, -100, 2])
    change, partner = torch.zeros(4), torch.full((4,), 0.5)
    drawn = member.sample(target, 1.0, change=change, partner=partner)
    assert (drawn == -100).tolist() == [True, False, True, False]
    assert (member.probabilities(target, 0.5).sum(1) == 0).tolist() == [True, False, True, False]


def test_binary_labels_as_floats_are_turned_over():
    target = torch.tensor([0.9, 0.3, 1.0, 0.0])
    drawn = labels.FlipLabels(2).sample(target, 1.0, change=torch.zeros(4), partner=torch.zeros(4))
    torch.testing.assert_close(drawn, 1 - target, rtol=0, atol=0)
    torch.testing.assert_close(labels.FlipLabels(2).probabilities(target, 1.0), 1 - target, rtol=0, atol=1e-7)  # float32
    skewed = labels.ConfusionFlips([[0.5, 0.5], [0.0, 1.0]])
    expected = 0.5 + 0.5 * target
    torch.testing.assert_close(skewed.probabilities(target, 1.0), expected, rtol=0, atol=1e-7)  # float32


def test_classes_that_are_not_known_are_asked_for():
    with pytest.raises(ValueError, match=r"SmoothLabels needs n_classes=… here"):
        labels.SmoothLabels().probabilities(torch.zeros(2, dtype=torch.long), 0.1)


@pytest.mark.parametrize("ignored", range(K))
def test_a_class_that_is_ignored_neither_changes_nor_comes_and_the_others_are_equally_likely(ignored):
    target = torch.arange(K).repeat_interleave(6 * 100)
    partner = (torch.arange(len(target)) % 600 + 0.5) / 600  # each share of [0, 1) as often for each class
    change = torch.zeros(len(target))
    drawn = labels.FlipLabels(K).sample(target, 1.0, change=change, partner=partner, ignore_index=ignored)
    counts = torch.zeros(K, K, dtype=torch.long).index_put_((target, drawn), torch.ones(1, dtype=torch.long), accumulate=True)
    expected = torch.full((K, K), 600 // (K - 2)).fill_diagonal_(0)
    expected[ignored], expected[:, ignored] = 0, 0
    expected[ignored, ignored] = 600
    assert torch.equal(counts, expected)


def test_numbers_that_are_no_class_are_left_alone():
    target = torch.tensor([-100, -1, 255, 3])
    ones = torch.zeros(4)
    for member in LABELS:
        assert member.sample(target, 1.0, change=ones, partner=ones)[:3].tolist() == [-100, -1, 255]
        assert (member.probabilities(target, 0.5)[:3] == 0).all()
        assert member.probabilities(target, 0.5)[3].sum().item() == pytest.approx(1.0)  # float32
    binary = torch.tensor([torch.nan, -1.0, 0.0, 1.0])
    flips = labels.FlipLabels(2)
    flips.check(binary[[0, 2, 3]])
    torch.testing.assert_close(
        flips.sample(binary, 1.0, change=ones, partner=ones), torch.tensor([torch.nan, -1, 1, 0]), equal_nan=True
    )


def test_a_matrix_that_flips_into_the_ignored_class_is_refused():
    noise = labels.ConfusionFlips(CONFUSION)
    with pytest.raises(ValueError, match=r"flips labels into ignore_index=0.*set column 0 of the other rows to zeros"):
        noise.check(torch.arange(K), ignore_index=0)
    labels.ConfusionFlips([[0.5, 0.5], [0.0, 1.0]]).check(torch.arange(2), ignore_index=0)


def test_a_label_out_of_range_shows_the_two_ways_out():
    for label in (255, -1):
        with pytest.raises(ValueError, match=rf"; if one label marks .*TargetNoise\(…, ignore_index={label}\).*via='loss'"):
            labels.FlipLabels(K).check(torch.tensor([0, label]))


@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
def test_one_hot_labels_are_no_class_indices(dtype):
    hot = torch.eye(3, dtype=dtype).repeat(2, 1)
    with pytest.raises(TypeError, match=r"got one-hot rows, (int64|float32) \(6, 3\); type labels\.argmax\(1\)"):
        labels.FlipLabels(3).check(hot)
    labels.FlipLabels(4).check(hot.long())  # the labels of three positions
