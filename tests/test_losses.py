"""The loss is that of soft targets, and everything else in the step sees the labels of the batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torchmetrics.classification import MulticlassAccuracy

from lightning_noise import losses
from lightning_noise.losses import (
    Mixing,
    Relabelling,
    Smoothing,
    SoftTargets,
    smoothed_binary_cross_entropy_with_logits,
    smoothed_cross_entropy,
    smoothed_nll_loss,
)

CLASSES = 7
SHAPES = {"(N, K)": (16, 7), "(N, K, d)": (16, 7, 5), "(N, K, h, w)": (6, 7, 5, 4), "(K)": (7,)}
REDUCTIONS = ("none", "sum", "mean")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def level(value: float = 0.1) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def labels(*shape: int, ignored: bool = False) -> torch.Tensor:
    target = torch.randint(0, CLASSES, shape)
    return target.masked_fill(torch.rand(shape) < 0.3, -100) if ignored else target


def gradient(loss: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), x)[0]


def by_hand(x, a, b, lam, weight=None, ignore_index=-100):
    """The mixed loss with a mean, for a lam of the shape of the target."""
    total = torch.zeros(())
    for target, share in ((a, lam), (b, 1 - lam)):
        terms = F.cross_entropy(x, target, weight, ignore_index=ignore_index, reduction="none")
        valid = target != ignore_index
        denominator = valid.sum() if weight is None else weight[target[valid]].sum()
        total = total + (share * terms).sum() / denominator
    return total


# smoothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("weighted", "ignored"), list(itertools.product((False, True), repeat=2)))
def test_smoothing_is_that_of_torch_bit_for_bit(shape, weighted, ignored, reduction, dtype):
    for epsilon in (0.0123, 0.1, 1.0):
        x, target = logits(*shape, dtype=dtype), labels(*shape[:1], *shape[2:]) if len(shape) > 1 else labels()
        if ignored and target.ndim:
            target[::3] = -100
        weight = (torch.rand(CLASSES) + 0.1).to(dtype) if weighted else None
        expected = F.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=epsilon)
        loss = smoothed_cross_entropy(x, target, weight, level=level(epsilon), reduction=reduction)
        found, wanted = (loss, gradient(loss, x)), (expected, gradient(expected, x))
        if weighted and ignored and reduction == "mean":
            # the weights are summed with zeros among them, so in another order: torch's tolerance for the dtype
            torch.testing.assert_close(found, wanted)
        else:
            assert loss.dtype == expected.dtype
            assert all(map(torch.equal, found, wanted))


def test_a_level_in_single_precision_is_the_number_that_it_is():
    x, target = logits(16, 7), labels(16)
    loss = smoothed_cross_entropy(x, target, level=torch.tensor(0.1))
    assert torch.equal(loss, F.cross_entropy(x, target, label_smoothing=torch.tensor(0.1).item()))
    x = x.double()
    loss = smoothed_cross_entropy(x, target, level=torch.tensor(0.1))
    assert torch.equal(loss, F.cross_entropy(x, target, label_smoothing=torch.tensor(0.1).item()))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities_are_smoothed_as_by_torch(weighted, reduction):
    x, target = logits(6, 7, 5), torch.rand(6, 7, 5).softmax(1)
    weight = torch.rand(CLASSES) if weighted else None
    expected = F.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=0.1)
    loss = smoothed_cross_entropy(x, target, weight, level=level(), reduction=reduction)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient(loss, x), gradient(expected, x))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_log_probabilities_are_smoothed_as_logits_are(reduction):
    x, target, weight = logits(6, 7, 5), labels(6, 5, ignored=True), torch.rand(CLASSES)
    expected = smoothed_cross_entropy(x, target, weight, level=level(), reduction=reduction)
    assert torch.equal(smoothed_nll_loss(F.log_softmax(x, 1), target, weight, level=level(), reduction=reduction), expected)


@pytest.mark.parametrize("shape", [(), (8,), (8, 4)])
def test_binary_labels_are_drawn_towards_a_half(shape):
    x, target, positive = logits(*shape), torch.randint(0, 2, shape).float(), torch.rand(shape[1:])
    loss = smoothed_binary_cross_entropy_with_logits(x, target, level=level(0.2), pos_weight=positive)
    # 0.1 and 0.9 are rounded once more on the way: torch's tolerance for float32
    expected = F.binary_cross_entropy_with_logits(x, torch.where(target > 0, 0.9, 0.1), pos_weight=positive)
    torch.testing.assert_close(loss, expected)


def test_the_smoothed_loss_is_the_divergence_from_the_uniform_distribution():
    """(1 - e) CE + e (KL(U || p) + log K)."""
    x, target, e = logits(32, 7, dtype=torch.float64), labels(32), 0.3
    uniform = torch.full((32, 7), 1 / 7, dtype=torch.float64)
    divergence = F.kl_div(F.log_softmax(x, 1), uniform, reduction="batchmean")
    expected = (1 - e) * F.cross_entropy(x, target) + e * (divergence + math.log(7))
    # float64
    torch.testing.assert_close(smoothed_cross_entropy(x, target, level=level(e)), expected, rtol=1e-14, atol=0)


def test_the_loss_is_least_at_the_logit_gap_of_the_smoothed_label_and_is_its_entropy_there():
    e, k = 0.1, 7
    high, low = 1 - e + e / k, e / k
    x = torch.zeros(1, k, dtype=torch.float64)
    x[0, 2] = math.log(high / low)
    x.requires_grad_()
    loss = smoothed_cross_entropy(x, torch.tensor([2]), level=level(e))
    entropy = -high * math.log(high) - (k - 1) * low * math.log(low)
    assert loss.item() == pytest.approx(entropy, rel=1e-14)  # float64
    assert gradient(loss, x).abs().max() < 1e-15


# derived targets: from a batch of (6, 1, 4) positions to the target of the loss, and the same of the logits (6, 1, 4, 7)

IGNORED = 5
MASK = torch.tensor([[[True, False, True, True]]]).expand(6, 1, 4)
DERIVED = {
    "itself, classes second": (lambda y: y, lambda x: x.movedim(-1, 1)),
    "cast and flattened": (lambda y: y.to(torch.int32).long().view(-1), lambda x: x.reshape(-1, 7)),
    "squeezed": (lambda y: torch.squeeze(y, 1), lambda x: x.squeeze(1).movedim(-1, 1)),
    "shifted tokens": (lambda y: y.squeeze(1)[:, 1:].reshape(-1), lambda x: x[:, 0, 1:].reshape(-1, 7)),
    "transposed": (lambda y: y.squeeze(1).T.reshape(-1), lambda x: x[:, 0].transpose(0, 1).reshape(-1, 7)),
    "positions first": (lambda y: y.squeeze(1).t().contiguous().view(-1), lambda x: x[:, 0].transpose(0, 1).reshape(-1, 7)),
    "masked": (lambda y: y[MASK], lambda x: x[MASK]),
    "masked by its own values": (lambda y: y[y != IGNORED], lambda x: x[TARGET != IGNORED]),
    "rows by index": (lambda y: y.index_select(0, torch.tensor([4, 1])), lambda x: x[[4, 1]].movedim(-1, 1)),
    "flattened by keyword": (lambda y: torch.flatten(input=y), lambda x: x.reshape(-1, 7)),
    "unbound": (lambda y: y.unbind(2)[3].squeeze(1), lambda x: x[:, 0, 3]),
    "concatenated": (lambda y: torch.cat([y.view(-1), y.view(-1)]), lambda x: torch.cat([x.reshape(-1, 7)] * 2)),
    "filled": (lambda y: y.masked_fill(~MASK, -100).view(-1), lambda x: x.reshape(-1, 7)),
    "filled by its own values": (lambda y: torch.where(y == IGNORED, -100, y).view(-1), lambda x: x.reshape(-1, 7)),
    "chosen": (lambda y: torch.where(MASK, y, -100).view(-1), lambda x: x.reshape(-1, 7)),
    "written into": (lambda y: _write(y.clone()).view(-1), lambda x: x.reshape(-1, 7)),
    "to its device and back": (lambda y: y.to(torch.zeros(1)).to(y).detach().cpu().flatten(), lambda x: x.reshape(-1, 7)),
}
TARGET = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 5, 2, 3, 4, 6, 5, 1, 0, 2, 2, 5, 1, 4, 3, 6, 6]).view(6, 1, 4)


def _write(target: torch.Tensor) -> torch.Tensor:
    target[target == IGNORED] = -100
    return target


@pytest.mark.parametrize("name", DERIVED)
def test_what_is_made_of_the_target_is_smoothed(name):
    derive, arrange = DERIVED[name]
    x = arrange(logits(6, 1, 4, 7))
    expected = F.cross_entropy(x, derive(TARGET), label_smoothing=0.1)
    with Smoothing(TARGET, level()) as mode:
        loss = F.cross_entropy(x, derive(TARGET))
    assert mode.hit
    assert torch.equal(loss, expected)


PARTNERS = torch.tensor([3, 0, 1, 5, 2, 4])


def derived_pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The target of the loss and that of the partners; where a mask leaves out the partner's label, it is the own one."""
    derive, partner = DERIVED[name][0], TARGET[PARTNERS]
    if name == "masked by its own values":
        return derive(TARGET), torch.where(partner == IGNORED, TARGET, partner)[TARGET != IGNORED]
    return derive(TARGET), derive(partner)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", DERIVED)
def test_what_is_made_of_the_target_is_mixed(name, reduction):
    (derive, arrange), (a, b), target, lam = DERIVED[name], derived_pair(name), TARGET.clone(), 0.3
    x = arrange(logits(6, 1, 4, 7))
    expected = lam * F.cross_entropy(x, a, reduction=reduction) + (1 - lam) * F.cross_entropy(x, b, reduction=reduction)
    with Mixing(target, PARTNERS, level(lam)) as mode:
        loss = F.cross_entropy(x, derive(target), reduction=reduction)
    assert mode.hit
    assert torch.equal(loss, expected)
    assert torch.equal(target, TARGET)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", DERIVED)
def test_the_share_of_each_sample_goes_where_its_elements_go(name, weighted):
    (derive, arrange), (a, b), lam = DERIVED[name], derived_pair(name), torch.rand(6)
    x, weight = arrange(logits(6, 1, 4, 7)), torch.rand(CLASSES) + 0.1 if weighted else None
    share = arrange(lam.view(6, 1, 1, 1).expand(6, 1, 4, 7)).select(1, 0)
    with Mixing(TARGET, PARTNERS, lam) as mode:
        loss = F.cross_entropy(x, derive(TARGET), weight)
    assert mode.hit
    # a sum in another order: torch's tolerance for float32
    torch.testing.assert_close(loss, by_hand(x, a, b, share, weight))


# mixing


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", [F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits])
def test_one_share_for_each_sample_is_the_samples_one_by_one(loss, reduction):
    x, lam = logits(6, 7, 3), torch.rand(6)
    target = torch.rand(6, 7, 3) if loss is F.binary_cross_entropy_with_logits else labels(6, 3)
    with Mixing(target, PARTNERS, lam):
        together = loss(x, target, reduction=reduction)
    partner = target[PARTNERS]
    singles = [
        lam[i] * loss(x[i : i + 1], target[i : i + 1], reduction=reduction)
        + (1 - lam[i]) * loss(x[i : i + 1], partner[i : i + 1], reduction=reduction)
        for i in range(6)
    ]
    expected = torch.cat(singles) if reduction == "none" else torch.stack(singles)
    if reduction != "none":
        expected = expected.mean() if reduction == "mean" else expected.sum()
    # a sum in another order: torch's tolerance for float32
    torch.testing.assert_close(together, expected)


@pytest.mark.parametrize("lam", [torch.tensor(0.3), torch.tensor([0.1, 0.9, 0.4, 0.0, 1.0, 0.5])], ids=["one", "each"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities_mix_linearly(lam, reduction, weighted):
    x, target, weight = logits(6, 7, 5), torch.rand(6, 7, 5).softmax(1), torch.rand(CLASSES) if weighted else None
    share = lam.view(-1, 1, 1)
    expected = F.cross_entropy(x, share * target + (1 - share) * target[PARTNERS], weight, reduction=reduction)
    with Mixing(target, PARTNERS, lam):
        loss = F.cross_entropy(x, target, weight, reduction=reduction)
    torch.testing.assert_close(loss, expected)  # the same sum in another order: torch's tolerance for float32


@pytest.mark.parametrize("lam", [torch.tensor(0.3), torch.rand(6)], ids=["one", "each"])
def test_one_hot_labels_mix_as_classes_do(lam):
    x, target = logits(6, 7, 4), labels(6, 4)
    with Mixing(target, PARTNERS, lam):
        classes = F.cross_entropy(x, target)
        one_hot = F.cross_entropy(x, F.one_hot(target, CLASSES).float().movedim(-1, 1))
    torch.testing.assert_close(classes, one_hot)  # the same sum in another order: torch's tolerance for float32


@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("lam", [torch.tensor(0.3), torch.rand(6)], ids=["one", "each"])
def test_each_term_is_divided_by_what_counts_in_it(lam, weighted, ignore_index):
    x, target, weight = logits(6, 7, 9), labels(6, 9), torch.rand(CLASSES) if weighted else None
    target[0] = ignore_index  # so that the two terms differ in what they leave out
    with Mixing(target, PARTNERS, lam):
        loss = F.cross_entropy(x, target, weight, ignore_index=ignore_index)
    expected = by_hand(x, target, target[PARTNERS], lam.view(-1, 1).expand(6, 9), weight, ignore_index)
    torch.testing.assert_close(loss, expected)  # a sum in another order: torch's tolerance for float32
    torch.testing.assert_close(gradient(loss, x), gradient(expected, x))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_sample_that_is_its_own_partner_keeps_its_loss(size):
    x, target = logits(size, 7), labels(size)
    expected = F.cross_entropy(x, target)
    for lam in (torch.tensor(0.25), torch.full((size,), 0.25)):
        with Mixing(target, torch.arange(size), lam):
            # a quarter and three quarters of a number may differ from it in the last bit
            torch.testing.assert_close(F.cross_entropy(x, target), expected)


# what is computed anew in the backward pass

SOFTENED: dict[str, Callable[[torch.Tensor], list[SoftTargets]]] = {
    "smoothing": lambda y: [Smoothing(y, level())],
    "mixing": lambda y: [Mixing(y, PARTNERS, torch.linspace(0, 1, 6))],
    "other labels": lambda y: [Relabelling(y, (y + 1) % CLASSES)],
    "smoothing and mixing": lambda y: [Smoothing(y, level()), Mixing(y, PARTNERS, torch.tensor(0.3))],
    "other labels, smoothed": lambda y: [Relabelling(y, (y + 1) % CLASSES), Smoothing(y, level())],
}


@pytest.mark.parametrize("backward", [torch.Tensor.backward, torch.autograd.backward], ids=["method", "function"])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("build", SOFTENED.values(), ids=SOFTENED)
def test_a_loss_that_is_checkpointed_is_softened_again_in_the_backward_pass(build, use_reentrant, backward):
    x, y = torch.randn(6, 4, requires_grad=True), labels(6)
    w = torch.randn(4, CLASSES, requires_grad=True)

    def body(x, y):
        return F.cross_entropy(x @ w, y.long().view(-1))

    gradients = []
    for run in (body, partial(checkpoint, body, use_reentrant=use_reentrant)):
        x.grad = w.grad = None
        with ExitStack() as stack:
            for mode in build(y):
                stack.enter_context(mode)
            loss = run(x, y)
            backward(loss)
            assert torch.equal(run(x, y), loss), "the modes are not as they were"
        assert x.grad is not None
        assert w.grad is not None
        gradients.append((x.grad, w.grad))
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)


def test_a_backward_pass_takes_its_arguments_within_a_mode():
    x, y = torch.randn(6, CLASSES, requires_grad=True), labels(6)
    scale = torch.tensor(3.0)
    with Smoothing(y, level()):
        loss = F.cross_entropy(x, y)
        loss.backward(scale, retain_graph=True)
        loss.backward(gradient=scale, inputs=[x], retain_graph=True)
        torch.autograd.backward([loss], [scale])
    expected = torch.autograd.grad(F.cross_entropy(x, y, label_smoothing=0.1), x)[0]
    torch.testing.assert_close(x.grad, 9 * expected)  # the same products in another order: torch's tolerance for float32


# labels that do not count


@pytest.mark.parametrize("lam", [torch.tensor(0.5), torch.tensor([0.5, 0.2, 0.7, 0.9])], ids=["one", "each"])
def test_a_partner_without_a_label_that_counts_gives_its_place_to_the_own_one(lam):
    x = torch.randn(4, CLASSES, requires_grad=True)
    y = torch.tensor([0, -100, -100, -100])
    with Mixing(y, torch.tensor([1, 2, 3, 0]), lam):
        losses = [F.cross_entropy(x[y >= 0], y[y >= 0]), F.cross_entropy(x[:1], y[:1])]
    for loss in losses:
        torch.testing.assert_close(loss, F.cross_entropy(x[:1], y[:1]))  # a sum of two shares: torch's tolerance for float32
    torch.stack(losses).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_labels_that_are_missing_by_a_number_of_ones_own_never_reach_the_loss():
    x, y = torch.randn(4, CLASSES), torch.tensor([0, -1, 2, 3])
    with Mixing(y, torch.tensor([1, 2, 3, 0]), torch.tensor(0.5)):
        loss = F.cross_entropy(x[y != -1], y[y != -1])
    first, second = F.cross_entropy(x[[0, 2, 3]], y[[0, 2, 3]]), F.cross_entropy(x[[0, 2, 3]], torch.tensor([0, 3, 0]))
    torch.testing.assert_close(loss, 0.5 * first + 0.5 * second)


def test_pseudo_labels_that_are_merged_with_the_target_are_not_followed():
    x, y, known = torch.randn(4, CLASSES), labels(4), torch.tensor([True, False, True, False])
    for merged in (lambda: torch.where(known, y, labels(4)), lambda: torch.where(~known, labels(4), y)):
        with Smoothing(y, level()) as mode:
            F.cross_entropy(x, merged())
        assert not mode.hit


@pytest.mark.parametrize("move", [lambda y: y.sort().values, torch.msort])
def test_a_share_that_is_lost_on_the_way_is_refused(move):
    x, y = torch.randn(6, CLASSES), labels(6)
    with Mixing(y, PARTNERS, torch.rand(6)), pytest.raises(ValueError, match="lam of each sample does not follow"):
        F.cross_entropy(x, move(y))


def test_labels_that_are_changed_at_the_loss_cannot_be_mixed_there():
    x, y, noisy = torch.randn(6, CLASSES), labels(6), labels(6)
    refused = pytest.raises(ValueError, match="change them before, in the batch")
    with Mixing(y, PARTNERS, torch.tensor(0.3)), Relabelling(y, noisy), refused:
        F.cross_entropy(x, y)
    with Relabelling(y, noisy), Mixing(y, PARTNERS, torch.tensor(0.3)):
        loss = F.cross_entropy(x, y)
    assert torch.equal(loss, 0.3 * F.cross_entropy(x, noisy) + 0.7 * F.cross_entropy(x, noisy[PARTNERS]))


def test_unsigned_labels_are_not_taken_for_the_ignored_one():
    x, y = torch.randn(4, 200), torch.tensor([156, 156, 3, 4], dtype=torch.uint8)
    with Mixing(y, torch.tensor([1, 2, 3, 0]), torch.full((4,), 0.5)):
        loss = F.cross_entropy(x, y.long())
    expected = 0.5 * F.cross_entropy(x, y.long()) + 0.5 * F.cross_entropy(x, y.long()[[1, 2, 3, 0]])
    torch.testing.assert_close(loss, expected)  # a sum in another order: torch's tolerance for float32


def test_a_loss_that_is_only_logged_is_no_hit():
    with Smoothing(y := labels(6), level()) as mode, torch.no_grad():
        F.cross_entropy(torch.randn(6, CLASSES), y)
    assert not mode.hit


def test_a_criterion_that_smooths_may_be_mixed():
    x, target, criterion = logits(6, 7), labels(6), nn.CrossEntropyLoss(label_smoothing=0.1)
    expected = 0.3 * criterion(x, target) + 0.7 * criterion(x, target[PARTNERS])
    with Mixing(target, PARTNERS, level(0.3)):
        assert torch.equal(criterion(x, target), expected)


def test_mixing_twice_mixes_four_labels():
    x, target = logits(6, 7), labels(6)
    first, second = torch.rand(6), torch.rand(6)
    shift = torch.tensor([1, 2, 3, 4, 5, 0])
    one_hot = F.one_hot(target, CLASSES).float()
    once = first[:, None] * one_hot + (1 - first[:, None]) * one_hot[PARTNERS]
    twice = second[:, None] * once + (1 - second[:, None]) * once[shift]
    with Mixing(target, PARTNERS, first), Mixing(target, shift, second):
        loss = F.cross_entropy(x, target)
    torch.testing.assert_close(loss, F.cross_entropy(x, twice))  # a sum in another order: torch's tolerance for float32


@pytest.mark.parametrize(
    ("target", "partners", "lam"),
    [
        (torch.zeros(4), torch.arange(3), torch.tensor(0.5)),
        (torch.zeros(4), torch.arange(4), torch.rand(3)),
        (torch.zeros(4, 2), torch.arange(4), torch.rand(4, 2)),
        (torch.zeros(4), torch.arange(4), 0.5),
    ],
)
def test_shapes_that_do_not_fit_are_refused(target, partners, lam):
    with pytest.raises(ValueError, match=r"for a target of 4 samples, partners must be of shape \(4,\) and lam"):
        Mixing(target, partners, lam)


def test_a_share_that_is_lost_on_the_way_is_refused_and_one_for_the_batch_is_not_lost():
    x, target = logits(6, 7), F.one_hot(labels(6), CLASSES)
    with Mixing(target, PARTNERS, torch.rand(6)), pytest.raises(ValueError, match="lam of each sample does not follow"):
        F.cross_entropy(x, target.argmax(1))
    expected = 0.3 * F.cross_entropy(x, target.argmax(1)) + 0.7 * F.cross_entropy(x, target[PARTNERS].argmax(1))
    with Mixing(target, PARTNERS, level(0.3)):
        assert torch.equal(F.cross_entropy(x, target.argmax(1)), expected)


# the modes

WEIGHT = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.1, 1.0, 0.7])


@pytest.mark.parametrize(
    ("hard", "smoothed"),
    [
        (nn.CrossEntropyLoss(WEIGHT), nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)),
        (nn.CrossEntropyLoss(None, None, 3, None, "sum"), nn.CrossEntropyLoss(None, None, 3, None, "sum", 0.1)),
        (lambda x, y: nn.NLLLoss()(x.log_softmax(1), y), nn.CrossEntropyLoss(label_smoothing=0.1)),
        (lambda x, y: F.cross_entropy(input=x, target=y), nn.CrossEntropyLoss(label_smoothing=0.1)),
        (lambda x, y: F.cross_entropy(x, y, None, None, 3), nn.CrossEntropyLoss(ignore_index=3, label_smoothing=0.1)),
        (lambda x, y: F.cross_entropy(x, y, size_average=False), nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1)),
        (lambda x, y: F.cross_entropy(x, y, reduce=False), nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)),
        (lambda x, y: F.nll_loss(x.log_softmax(1), y, reduce=True), nn.CrossEntropyLoss(label_smoothing=0.1)),
    ],
)  # fmt: skip
def test_the_criterion_of_the_user_is_smoothed_with_its_own_arguments(hard, smoothed):
    x, target = logits(16, 7), labels(16)
    with Smoothing(target, level()):
        loss = hard(x, target)
    assert torch.equal(loss, smoothed(x, target))


def test_a_binary_criterion_is_smoothed_and_mixed():
    x, target, lam = logits(6, 5), torch.randint(0, 2, (6, 5)).float(), torch.rand(6)
    criterion = nn.BCEWithLogitsLoss(pos_weight=torch.rand(5))
    smooth = 0.9 * target + 0.05
    with Smoothing(target, level()):
        loss = criterion(x, target)
    torch.testing.assert_close(loss, criterion(x, smooth))  # rounded once more: torch's tolerance for float32
    with Smoothing(target, level()), Mixing(target, PARTNERS, lam):
        loss = criterion(x, target)
    expected = criterion(x, lam[:, None] * smooth + (1 - lam[:, None]) * smooth[PARTNERS])
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("lam", [torch.tensor(0.3), torch.rand(6)], ids=["one", "each"])
def test_mixing_is_of_smoothed_losses_in_either_order(lam):
    x, target, weight = logits(6, 7, 4), labels(6, 4, ignored=True), torch.rand(CLASSES)
    with Smoothing(target, level()) as smoothing, Mixing(target, PARTNERS, lam) as mixing:
        inside = F.cross_entropy(x, target, weight)
    assert smoothing.hit
    assert mixing.hit
    with Mixing(target, PARTNERS, lam) as mixing, Smoothing(target, level()) as smoothing:
        outside = F.cross_entropy(x, target, weight)
    assert smoothing.hit
    assert mixing.hit
    assert torch.equal(inside, outside)
    with Mixing(target, PARTNERS, lam):
        expected = F.cross_entropy(x, target, weight, label_smoothing=0.1)
    torch.testing.assert_close(inside, expected)  # the weights of ignored positions: torch's tolerance for float32


def test_a_loss_on_another_target_is_left_alone():
    x, target, other = logits(6, 7), labels(6), labels(6)
    binary = torch.rand(6, 7)
    with Smoothing(target, level()) as smoothing, Mixing(target, PARTNERS, level(0.3)) as mixing:
        found = [
            F.cross_entropy(x, other),
            F.cross_entropy(x, (target + other) % CLASSES),
            F.cross_entropy(x, torch.zeros_like(target)),
            F.cross_entropy(x, target.new_zeros(6)),
            F.binary_cross_entropy_with_logits(x, binary),
            F.binary_cross_entropy_with_logits(x[:, 0], (x.argmax(1) == target).float()),
            F.mse_loss(x[:, 0], target.float()),
        ]
        assert not smoothing.hit
        assert not mixing.hit
    expected = [
        F.cross_entropy(x, other),
        F.cross_entropy(x, (target + other) % CLASSES),
        F.cross_entropy(x, torch.zeros(6, dtype=torch.int64)),
        F.cross_entropy(x, torch.zeros(6, dtype=torch.int64)),
        F.binary_cross_entropy_with_logits(x, binary),
        F.binary_cross_entropy_with_logits(x[:, 0], (x.argmax(1) == target).float()),
        F.mse_loss(x[:, 0], target.float()),
    ]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_labels_that_are_learned_are_followed():
    x, target = logits(6, 7), torch.rand(6, 7).softmax(1).requires_grad_()
    with Smoothing(target, level()):
        loss = F.cross_entropy(x, target.clone())
    assert torch.equal(gradient(loss, target), gradient(F.cross_entropy(x, target, label_smoothing=0.1), target))


def test_two_targets_have_a_mode_each():
    x, first, second = logits(6, 7), labels(6), labels(6)
    with Smoothing(first, level(0.1)), Smoothing(second, level(0.2)):
        found = F.cross_entropy(x, first), F.cross_entropy(x, second)
    expected = F.cross_entropy(x, first, label_smoothing=0.1), F.cross_entropy(x, second, label_smoothing=0.2)
    assert all(map(torch.equal, found, expected))


def test_metrics_of_the_step_see_the_labels():
    x, target = logits(64, 7), labels(64)
    clean, noisy = MulticlassAccuracy(CLASSES, average="micro"), MulticlassAccuracy(CLASSES, average="micro")
    expected = clean(x, target)
    with Smoothing(target, level(0.5)), Mixing(target, torch.randperm(64), torch.rand(64)):
        F.cross_entropy(x, target)
        assert noisy(x, target) == expected
    assert noisy.compute() == expected


def test_statistics_of_the_labels_may_have_a_size_of_their_own():
    x, target = logits(6, 7), torch.tensor([0, 0, 1, 2, 3, 3])
    with Mixing(target, torch.tensor([2, 3, 4, 2, 2, 2]), level(0.3)) as mode:
        assert target.unique().view(2, 2).shape == (2, 2)
        assert target.nonzero().view(2, 2).shape == (2, 2)
        assert target[target > 2].tolist() == [3, 3]
        assert target.max(0).values == 3
        assert [label.item() for label in target] == target.tolist()
        F.cross_entropy(x, target)
    assert mode.hit


def test_no_random_number_is_drawn():
    x, target = logits(6, 7), labels(6)
    state = torch.get_rng_state()
    with Smoothing(target, level()), Mixing(target, PARTNERS, torch.rand(6, generator=torch.Generator())):
        F.cross_entropy(x, target)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_a_criterion_that_smooths_already_is_refused(smoothing):
    x, target = logits(6, 7), labels(6)
    with (
        Smoothing(target, level()),
        pytest.raises(ValueError, match=rf"one owner, but the criterion has label_smoothing={smoothing}"),
    ):
        nn.CrossEntropyLoss(label_smoothing=smoothing)(x, target)


def test_two_smoothings_of_one_target_are_refused():
    x, target = logits(6, 7), labels(6)
    with Smoothing(target, level()), Smoothing(target, level()), pytest.raises(ValueError, match="another mode smooths"):
        F.cross_entropy(x, target)


@pytest.mark.parametrize("value", [0.1, torch.rand(6)])
def test_a_level_that_is_no_scalar_tensor_is_refused(value):
    with pytest.raises(TypeError, match=r"level must be a tensor of shape \(\)"):
        Smoothing(labels(6), value)


def test_an_exception_leaves_no_mode_behind():
    x, target = logits(6, 7), labels(6)

    def step() -> None:
        with Smoothing(target, level()), Mixing(target, PARTNERS, level(0.3)):
            F.cross_entropy(x, target[:3])

    expected = F.cross_entropy(x, target)
    with pytest.raises(ValueError, match="batch_size"):
        step()
    assert torch.equal(F.cross_entropy(x, target), expected)
    assert losses._active.get() == ()


def test_a_focal_loss_is_that_function_of_the_softened_loss():
    x, target = logits(16, 7), labels(16)

    def focal(loss: torch.Tensor) -> torch.Tensor:
        return ((1 - (-loss).exp()) ** 2 * loss).mean()

    with Smoothing(target, level()):
        loss = focal(F.cross_entropy(x, target, reduction="none"))
    assert torch.equal(loss, focal(F.cross_entropy(x, target, reduction="none", label_smoothing=0.1)))


# mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ignored", [False, True])
def test_autocast_is_as_for_the_loss_of_torch(dtype, ignored):
    net, x, target = nn.Linear(5, 7), torch.randn(16, 5), labels(16, ignored=ignored)
    with torch.autocast("cpu", dtype):
        expected = F.cross_entropy(net(x), target, label_smoothing=0.1)
        with Smoothing(target, level()):
            loss = F.cross_entropy(net(x), target)
            log = F.nll_loss(F.log_softmax(net(x), 1), target)
            binary = F.binary_cross_entropy_with_logits(net(x)[:, 0], target.clamp(0, 1).float())
        with Mixing(target, torch.randperm(16), torch.rand(16)):
            mixed = F.cross_entropy(net(x), target)
    assert loss.dtype == log.dtype == mixed.dtype == expected.dtype == torch.float32
    assert binary.isfinite()
    assert torch.equal(loss, expected)
    # the log-probabilities were rounded to half precision, by 2 eps at most between 4 and 8 and less below
    torch.testing.assert_close(log, expected, rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_class_ids_survive_half_precision(dtype):
    x, target = torch.zeros(2, 3000, dtype=dtype), torch.tensor([2049, 2051])
    x[0, 2049] = x[1, 2051] = 10
    expected = F.cross_entropy(x, target, label_smoothing=0.1)
    assert F.cross_entropy(x, target - 1) > 8 * expected  # where an id would be rounded to
    with Smoothing(target, level()):
        assert torch.equal(F.cross_entropy(x, target), expected)
    with Smoothing(target, level()), Mixing(target, torch.tensor([0, 1]), torch.tensor([0.3, 0.5], dtype=dtype)):
        torch.testing.assert_close(F.cross_entropy(x, target), expected)  # the resolution of the dtype


# compilation


def losses_of(step, backend: Any) -> tuple[list[float], list[float]]:
    """The losses of a compiled and of a plain step with a level and a share that change, each with new modes."""
    compiled, found = torch.compile(step, backend=backend, fullgraph=True), ([], [])
    for i in range(4):
        x, target, lam, level_ = torch.randn(6, 5), labels(6, 1), torch.rand(6), level(0.1 * (i + 1))
        for run, out in zip((compiled, step), found, strict=True):
            with (
                Smoothing(target, level_) as smoothing,
                Mixing(target, torch.randperm(6, generator=torch.Generator()), lam) as mixing,
            ):
                out.append(run(x, target).item())
            assert smoothing.hit
            assert mixing.hit
    return found


def make_step():
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7))
    return lambda x, target: F.cross_entropy(net(x), target.long().view(-1))


def test_a_compiled_step_is_compiled_once_for_all_levels_and_softened_once():
    counter = CompileCounter()  # with backend="eager" the graph runs under the modes, too
    compiled, plain = losses_of(make_step(), counter)
    assert counter.frame_count == 1
    assert compiled == plain
    assert len(set(plain)) == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated")  # torch 2.13 warns of its own code
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_step_in_compiled_code_is_compiled_once_for_all_levels(backend):
    counter = CompileCounterWithBackend(backend)
    step = make_step()
    losses_of(step, counter)
    count = counter.frame_count
    compiled, plain = losses_of(step, counter)
    assert counter.frame_count == count
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=0)  # fused kernels sum in another order, in float32


@pytest.mark.slow
@pytest.mark.parametrize("name", DERIVED)
def test_what_is_made_of_the_target_is_followed_in_compiled_code(name):
    derive, arrange = DERIVED[name]
    x, lam = arrange(logits(6, 1, 4, 7).detach()), torch.rand(6)

    def step(target):
        return F.cross_entropy(x, derive(target))

    torch.compiler.reset()
    found = []
    for run in (torch.compile(step, backend="eager", fullgraph=True), step):
        target = TARGET.clone()
        with Smoothing(target, level()) as smoothing, Mixing(target, PARTNERS, lam) as mixing:
            found.append(run(target))
        assert smoothing.hit
        assert mixing.hit
    assert torch.equal(*found)


def test_a_compiled_module_within_the_step_is_compiled_once_and_its_loss_softened():
    counter, net = CompileCounter(), nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7))
    compiled, x = torch.compile(net, backend=counter), torch.randn(6, 5)
    for i in range(4):
        target, epsilon = labels(6), 0.1 * (i + 1)
        with Smoothing(target, level(epsilon)) as mode:
            loss = F.cross_entropy(compiled(x), target)
        assert mode.hit
        assert torch.equal(loss, F.cross_entropy(net(x), target, label_smoothing=epsilon))
    assert counter.frame_count == 1


def test_a_target_that_is_made_in_a_compiled_part_is_followed_out_of_it():
    x, target = logits(6, 7), labels(6, 1)
    prepare = torch.compile(lambda y: y.long().view(-1), backend="eager")
    with Smoothing(target, level()) as mode:
        loss = F.cross_entropy(x, prepare(target))
    assert mode.hit
    assert torch.equal(loss, F.cross_entropy(x, target.view(-1), label_smoothing=0.1))
