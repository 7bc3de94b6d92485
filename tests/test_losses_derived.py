"""Labels that are made of the target are softened as the target is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers_losses import CLASSES, DERIVED, IGNORED, PARTNERS, REDUCTIONS, TARGET, gradient, labels, level, logits
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_noise.losses import CheckedLabelLoss, LabelLoss, MixedLabelLoss, NoisyLabelLoss, SmoothedLabelLoss


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def by_hand(x, a, b, lam, weight=None, ignore_index=-100):
    """The mixed loss with a mean, for a lam of the shape of the target."""
    total = torch.zeros(())
    for target, share in ((a, lam), (b, 1 - lam)):
        terms = F.cross_entropy(x, target, weight, ignore_index=ignore_index, reduction="none")
        valid = target != ignore_index
        denominator = valid.sum() if weight is None else weight[target[valid]].sum()
        total = total + (share * terms).sum() / denominator
    return total


# a GPU adds the classes up in another order
@pytest.mark.cpu
@pytest.mark.parametrize("name", DERIVED)
def test_what_is_made_of_the_target_is_smoothed(name):
    derive, arrange = DERIVED[name]
    x = arrange(logits(6, 1, 4, 7))
    expected = F.cross_entropy(x, derive(TARGET), label_smoothing=0.1)
    with SmoothedLabelLoss(TARGET, level()) as mode:
        loss = F.cross_entropy(x, derive(TARGET))
    assert mode.applied
    assert torch.equal(loss, expected)


def derived_pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The target of the loss and that of the partners; where a mask leaves out the partner's label, it is the own one."""
    derive, partner = DERIVED[name][0], TARGET[PARTNERS]
    if name == "masked by its own values":
        return derive(TARGET), torch.where(partner == IGNORED, TARGET, partner)[TARGET != IGNORED]
    return derive(TARGET), derive(partner)


@pytest.mark.cpu
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", DERIVED)
def test_what_is_made_of_the_target_is_mixed(name, reduction):
    (derive, arrange), (a, b), target, lam = DERIVED[name], derived_pair(name), TARGET.clone(), 0.3
    x = arrange(logits(6, 1, 4, 7))
    expected = lam * F.cross_entropy(x, a, reduction=reduction) + (1 - lam) * F.cross_entropy(x, b, reduction=reduction)
    with MixedLabelLoss(target, PARTNERS, level(lam)) as mode:
        loss = F.cross_entropy(x, derive(target), reduction=reduction)
    assert mode.applied
    assert torch.equal(loss, expected)
    assert torch.equal(target, TARGET)


@pytest.mark.cpu  # one of the members takes the target to the CPU
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", DERIVED)
def test_the_share_of_each_sample_goes_where_its_elements_go(name, weighted):
    (derive, arrange), (a, b), lam = DERIVED[name], derived_pair(name), torch.rand(6)
    x, weight = arrange(logits(6, 1, 4, 7)), torch.rand(CLASSES) + 0.1 if weighted else None
    share = arrange(lam.view(6, 1, 1, 1).expand(6, 1, 4, 7)).select(1, 0)
    with MixedLabelLoss(TARGET, PARTNERS, lam) as mode:
        loss = F.cross_entropy(x, derive(TARGET), weight)
    assert mode.applied
    # a sum in another order: torch's tolerance for float32
    torch.testing.assert_close(loss, by_hand(x, a, b, share, weight))


# mixing
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", [F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits])
def test_one_share_for_each_sample_is_the_samples_one_by_one(loss, reduction):
    x, lam = logits(6, 7, 3), torch.rand(6)
    target = torch.rand(6, 7, 3) if loss is F.binary_cross_entropy_with_logits else labels(6, 3)
    with MixedLabelLoss(target, PARTNERS, lam):
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
    with MixedLabelLoss(target, PARTNERS, lam):
        loss = F.cross_entropy(x, target, weight, reduction=reduction)
    torch.testing.assert_close(loss, expected)  # the same sum in another order: torch's tolerance for float32


@pytest.mark.parametrize("lam", [torch.tensor(0.3), torch.rand(6)], ids=["one", "each"])
def test_one_hot_labels_mix_as_classes_do(lam):
    x, target = logits(6, 7, 4), labels(6, 4)
    with MixedLabelLoss(target, PARTNERS, lam):
        classes = F.cross_entropy(x, target)
        one_hot = F.cross_entropy(x, F.one_hot(target, CLASSES).float().movedim(-1, 1))
    torch.testing.assert_close(classes, one_hot)  # the same sum in another order: torch's tolerance for float32


@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("lam", [torch.tensor(0.3), torch.rand(6)], ids=["one", "each"])
def test_each_term_is_divided_by_what_counts_in_it(lam, weighted, ignore_index):
    x, target, weight = logits(6, 7, 9), labels(6, 9), torch.rand(CLASSES) if weighted else None
    target[0] = ignore_index  # so that the two terms differ in what they leave out
    with MixedLabelLoss(target, PARTNERS, lam):
        loss = F.cross_entropy(x, target, weight, ignore_index=ignore_index)
    expected = by_hand(x, target, target[PARTNERS], lam.view(-1, 1).expand(6, 9), weight, ignore_index)
    torch.testing.assert_close(loss, expected)  # a sum in another order: torch's tolerance for float32
    torch.testing.assert_close(gradient(loss, x), gradient(expected, x))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_sample_that_is_its_own_partner_keeps_its_loss(size):
    x, target = logits(size, 7), labels(size)
    expected = F.cross_entropy(x, target)
    for lam in (torch.tensor(0.25), torch.full((size,), 0.25)):
        with MixedLabelLoss(target, torch.arange(size), lam):
            # a quarter and three quarters of a number may differ from it in the last bit
            torch.testing.assert_close(F.cross_entropy(x, target), expected)


# what is computed anew in the backward pass
SOFTENED: dict[str, Callable[[torch.Tensor], list[LabelLoss]]] = {
    "smoothing": lambda y: [SmoothedLabelLoss(y, level())],
    "mixing": lambda y: [MixedLabelLoss(y, PARTNERS, torch.linspace(0, 1, 6))],
    "other labels": lambda y: [NoisyLabelLoss(y, (y + 1) % CLASSES)],
    "smoothing and mixing": lambda y: [SmoothedLabelLoss(y, level()), MixedLabelLoss(y, PARTNERS, torch.tensor(0.3))],
    "other labels, smoothed": lambda y: [NoisyLabelLoss(y, (y + 1) % CLASSES), SmoothedLabelLoss(y, level())],
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
    with SmoothedLabelLoss(y, level()):
        loss = F.cross_entropy(x, y)
        loss.backward(scale, retain_graph=True)
        loss.backward(gradient=scale, inputs=[x], retain_graph=True)
        torch.autograd.backward([loss], [scale])
    expected = torch.autograd.grad(F.cross_entropy(x, y, label_smoothing=0.1), x)[0]
    torch.testing.assert_close(x.grad, 9 * expected)  # the same products in another order: torch's tolerance for float32


@pytest.mark.parametrize("backward", [torch.Tensor.backward, torch.autograd.backward], ids=["method", "function"])
def test_inputs_of_a_backward_pass_within_a_mode_get_their_gradients(backward):
    x, w, y = torch.randn(6, CLASSES, requires_grad=True), torch.randn(CLASSES, requires_grad=True), labels(6)
    with SmoothedLabelLoss(y, level()):
        product = x * w
        backward(F.cross_entropy(product, y), inputs=[x, product])
    expected = torch.autograd.grad(F.cross_entropy(x * w, y, label_smoothing=0.1), x)[0]
    assert x.grad is not None
    assert product.grad is not None
    assert w.grad is None
    assert torch.equal(x.grad, expected)
    torch.testing.assert_close(product.grad * w, expected)  # the same product again: torch's tolerance for float32


# labels that do not count
@pytest.mark.parametrize("lam", [torch.tensor(0.5), torch.tensor([0.5, 0.2, 0.7, 0.9])], ids=["one", "each"])
def test_a_partner_without_a_label_that_counts_gives_its_place_to_the_own_one(lam):
    x = torch.randn(4, CLASSES, requires_grad=True)
    y = torch.tensor([0, -100, -100, -100])
    with MixedLabelLoss(y, torch.tensor([1, 2, 3, 0]), lam):
        losses = [F.cross_entropy(x[y >= 0], y[y >= 0]), F.cross_entropy(x[:1], y[:1])]
    for loss in losses:
        torch.testing.assert_close(loss, F.cross_entropy(x[:1], y[:1]))  # a sum of two shares: torch's tolerance for float32
    torch.stack(losses).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_labels_that_are_missing_by_a_number_of_ones_own_never_reach_the_loss():
    x, y = torch.randn(4, CLASSES), torch.tensor([0, -1, 2, 3])
    with MixedLabelLoss(y, torch.tensor([1, 2, 3, 0]), torch.tensor(0.5)):
        loss = F.cross_entropy(x[y != -1], y[y != -1])
    first, second = F.cross_entropy(x[[0, 2, 3]], y[[0, 2, 3]]), F.cross_entropy(x[[0, 2, 3]], torch.tensor([0, 3, 0]))
    torch.testing.assert_close(loss, 0.5 * first + 0.5 * second)


def test_pseudo_labels_that_are_merged_with_the_target_are_not_followed():
    x, y, known = torch.randn(4, CLASSES), labels(4), torch.tensor([True, False, True, False])
    for merged in (lambda: torch.where(known, y, labels(4)), lambda: torch.where(~known, labels(4), y)):
        with SmoothedLabelLoss(y, level()) as mode:
            F.cross_entropy(x, merged())
        assert not mode.applied


@pytest.mark.parametrize("move", [lambda y: y.sort().values, torch.msort])
def test_a_share_that_is_lost_on_the_way_is_refused(move):
    x, y = torch.randn(6, CLASSES), labels(6)
    with MixedLabelLoss(y, PARTNERS, torch.rand(6)), pytest.raises(ValueError, match="lam of each sample does not follow"):
        F.cross_entropy(x, move(y))


def test_labels_that_are_changed_at_the_loss_cannot_be_mixed_there():
    x, y, noisy = torch.randn(6, CLASSES), labels(6), labels(6)
    refused = pytest.raises(ValueError, match="change them before, in the batch")
    with MixedLabelLoss(y, PARTNERS, torch.tensor(0.3)), NoisyLabelLoss(y, noisy), refused:
        F.cross_entropy(x, y)
    with NoisyLabelLoss(y, noisy), MixedLabelLoss(y, PARTNERS, torch.tensor(0.3)):
        loss = F.cross_entropy(x, y)
    assert torch.equal(loss, 0.3 * F.cross_entropy(x, noisy) + 0.7 * F.cross_entropy(x, noisy[PARTNERS]))


def test_unsigned_labels_are_not_taken_for_the_ignored_one():
    x, y = torch.randn(4, 200), torch.tensor([156, 156, 3, 4], dtype=torch.uint8)
    with MixedLabelLoss(y, torch.tensor([1, 2, 3, 0]), torch.full((4,), 0.5)):
        loss = F.cross_entropy(x, y.long())
    expected = 0.5 * F.cross_entropy(x, y.long()) + 0.5 * F.cross_entropy(x, y.long()[[1, 2, 3, 0]])
    torch.testing.assert_close(loss, expected)  # a sum in another order: torch's tolerance for float32


def test_a_loss_that_is_only_logged_is_no_hit():
    with SmoothedLabelLoss(y := labels(6), level()) as mode, torch.no_grad():
        F.cross_entropy(torch.randn(6, CLASSES), y)
    assert not mode.applied


def test_a_criterion_that_smooths_may_be_mixed():
    x, target, criterion = logits(6, 7), labels(6), nn.CrossEntropyLoss(label_smoothing=0.1)
    expected = 0.3 * criterion(x, target) + 0.7 * criterion(x, target[PARTNERS])
    with MixedLabelLoss(target, PARTNERS, level(0.3)):
        assert torch.equal(criterion(x, target), expected)


def test_mixing_twice_mixes_four_labels():
    x, target = logits(6, 7), labels(6)
    first, second = torch.rand(6), torch.rand(6)
    shift = torch.tensor([1, 2, 3, 4, 5, 0])
    one_hot = F.one_hot(target, CLASSES).float()
    once = first[:, None] * one_hot + (1 - first[:, None]) * one_hot[PARTNERS]
    twice = second[:, None] * once + (1 - second[:, None]) * once[shift]
    with MixedLabelLoss(target, PARTNERS, first), MixedLabelLoss(target, shift, second):
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
        MixedLabelLoss(target, partners, lam)


def test_a_share_that_is_lost_on_the_way_is_refused_and_one_for_the_batch_is_not_lost():
    x, target = logits(6, 7), F.one_hot(labels(6), CLASSES)
    with MixedLabelLoss(target, PARTNERS, torch.rand(6)), pytest.raises(ValueError, match="lam of each sample does not follow"):
        F.cross_entropy(x, target.argmax(1))
    expected = 0.3 * F.cross_entropy(x, target.argmax(1)) + 0.7 * F.cross_entropy(x, target[PARTNERS].argmax(1))
    with MixedLabelLoss(target, PARTNERS, level(0.3)):
        assert torch.equal(F.cross_entropy(x, target.argmax(1)), expected)


@pytest.mark.parametrize("lam", [torch.tensor(0.3), torch.rand(6)], ids=["one", "each"])
@pytest.mark.parametrize(
    "loss", [F.binary_cross_entropy_with_logits, lambda x, y, **kw: F.binary_cross_entropy(x.sigmoid(), y, **kw)]
)
@pytest.mark.parametrize("mark", [torch.nan, -1.0, -100.0])
def test_binary_labels_that_are_missing_give_their_place_to_the_own_ones(loss, mark, lam):
    x, known = logits(6, 5), torch.rand(6, 5) < 0.7
    y = torch.where(known, (torch.rand(6, 5) < 0.5).float(), mark)
    partner = torch.where(known[PARTNERS], y[PARTNERS], y)
    share = lam.view(-1, 1).expand(6, 5)[known]
    own, other = (loss(x[known], labels[known], reduction="none") for labels in (y, partner))
    expected = (share * own + (1 - share) * other).mean()
    with MixedLabelLoss(y, PARTNERS, lam):
        picked = loss(x[y >= 0], y[y >= 0])
    torch.testing.assert_close(picked, expected)  # a sum in another order: torch's tolerance for float32


def test_binary_labels_of_probabilities_are_smoothed_and_mixed():
    x, y = logits(6, 5), (torch.rand(6, 5) < 0.5).float()
    smooth = 0.9 * y + 0.05
    with SmoothedLabelLoss(y, level()):
        torch.testing.assert_close(F.binary_cross_entropy(x.sigmoid(), y), F.binary_cross_entropy(x.sigmoid(), smooth))
    with SmoothedLabelLoss(y, level()), MixedLabelLoss(y, PARTNERS, torch.tensor(0.3)):
        loss = torch.nn.BCELoss()(x.sigmoid(), y)
    # rounded once more on the way: torch's tolerance for float32
    torch.testing.assert_close(loss, F.binary_cross_entropy(x.sigmoid(), 0.3 * smooth + 0.7 * smooth[PARTNERS]))


def test_noisy_labels_stay_where_the_loss_ignores_them():
    x, y = logits(6, CLASSES), torch.tensor([0, 5, 2, 5, 4, 1])
    noisy = torch.tensor([1, 3, 5, 2, 4, 0])  # made without knowing that 5 will be ignored
    with NoisyLabelLoss(y, noisy):
        loss = F.cross_entropy(x, y.masked_fill(y == 5, -100))
    rows = torch.tensor([0, 2, 4, 5])
    assert torch.equal(loss, F.cross_entropy(x[rows], torch.tensor([1, 2, 4, 0])))
    for mode in (NoisyLabelLoss(y, noisy), CheckedLabelLoss(y)):
        with mode, pytest.raises(ValueError, match=r"the loss ignores the label 5, .* type ignore_index=5"):
            F.cross_entropy(x, y, ignore_index=5)
    with NoisyLabelLoss(y, noisy, ignore_index=5), CheckedLabelLoss(noisy, ignore_index=5):
        assert torch.equal(F.cross_entropy(x, y, ignore_index=5), loss)
