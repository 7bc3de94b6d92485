"""The loss is that of soft targets, and everything else in the step sees the labels of the batch."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_losses import CLASSES, DERIVED, PARTNERS, REDUCTIONS, TARGET, gradient, labels, level, logits
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torchmetrics.classification import MulticlassAccuracy

from lightning_noise.losses import (
    MixedLabelLoss,
    NoisyLabelLoss,
    SmoothedLabelLoss,
    modes,
    smoothed_binary_cross_entropy_with_logits,
    smoothed_cross_entropy,
    smoothed_nll_loss,
)

SHAPES = {"(N, K)": (16, 7), "(N, K, d)": (16, 7, 5), "(N, K, h, w)": (6, 7, 5, 4), "(K)": (7,)}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# smoothing
@pytest.mark.cpu  # a GPU adds the classes up in another order
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


@pytest.mark.cpu  # a GPU adds the classes up in another order
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
    with SmoothedLabelLoss(target, level()):
        loss = hard(x, target)
    assert torch.equal(loss, smoothed(x, target))


def test_a_binary_criterion_is_smoothed_and_mixed():
    x, target, lam = logits(6, 5), torch.randint(0, 2, (6, 5)).float(), torch.rand(6)
    criterion = nn.BCEWithLogitsLoss(pos_weight=torch.rand(5))
    smooth = 0.9 * target + 0.05
    with SmoothedLabelLoss(target, level()):
        loss = criterion(x, target)
    torch.testing.assert_close(loss, criterion(x, smooth))  # rounded once more: torch's tolerance for float32
    with SmoothedLabelLoss(target, level()), MixedLabelLoss(target, PARTNERS, lam):
        loss = criterion(x, target)
    expected = criterion(x, lam[:, None] * smooth + (1 - lam[:, None]) * smooth[PARTNERS])
    torch.testing.assert_close(loss, expected)


@pytest.mark.cpu  # a GPU adds the classes up in another order
@pytest.mark.parametrize("lam", [torch.tensor(0.3), torch.rand(6)], ids=["one", "each"])
def test_mixing_is_of_smoothed_losses_in_either_order(lam):
    x, target, weight = logits(6, 7, 4), labels(6, 4, ignored=True), torch.rand(CLASSES)
    with SmoothedLabelLoss(target, level()) as smoothing, MixedLabelLoss(target, PARTNERS, lam) as mixing:
        inside = F.cross_entropy(x, target, weight)
    assert smoothing.applied
    assert mixing.applied
    with MixedLabelLoss(target, PARTNERS, lam) as mixing, SmoothedLabelLoss(target, level()) as smoothing:
        outside = F.cross_entropy(x, target, weight)
    assert smoothing.applied
    assert mixing.applied
    assert torch.equal(inside, outside)
    with MixedLabelLoss(target, PARTNERS, lam):
        expected = F.cross_entropy(x, target, weight, label_smoothing=0.1)
    torch.testing.assert_close(inside, expected)  # the weights of ignored positions: torch's tolerance for float32


@pytest.mark.parametrize("missing", [torch.nan, -1.0])
@pytest.mark.parametrize(
    "fill", [lambda y: y.nan_to_num(0.0).clamp(min=0), lambda y: y.masked_fill(~(y >= 0), 0.0)], ids=["clamp", "masked_fill"]
)
def test_a_missing_label_of_the_partner_gives_its_place_to_the_own_one_if_the_module_fills_it(fill, missing):
    z, y = logits(8, 3), (torch.rand(8, 3, generator=torch.Generator(torch.get_default_device()).manual_seed(0)) < 0.5).float()
    y = torch.where(torch.rand(8, 3, generator=torch.Generator(torch.get_default_device()).manual_seed(1)) < 0.3, missing, y)
    known, partners = y >= 0, torch.arange(8).roll(1)

    def loss(target):
        return (F.binary_cross_entropy_with_logits(z, fill(target), reduction="none") * known).sum()

    with MixedLabelLoss(y, partners, torch.tensor(0.25)):
        mixed = loss(y)
    partner = torch.where(y[partners] >= 0, y[partners], y)
    torch.testing.assert_close(mixed, 0.25 * loss(y) + 0.75 * loss(partner))
    with MixedLabelLoss(2 * y.nan_to_num(0).clamp(min=0) - 1, partners, torch.tensor(0.25)) as mode:
        labels_of_partners = mode.tracked(mode.target).labels
    assert torch.equal(labels_of_partners, mode.target[partners])  # -1 is a class, if there is no 0


def test_a_loss_on_another_target_is_left_alone():
    x, target, other = logits(6, 7), labels(6), labels(6)
    binary = torch.rand(6, 7)
    with SmoothedLabelLoss(target, level()) as smoothing, MixedLabelLoss(target, PARTNERS, level(0.3)) as mixing:
        found = [
            F.cross_entropy(x, other),
            F.cross_entropy(x, (target + other) % CLASSES),
            F.cross_entropy(x, torch.zeros_like(target)),
            F.cross_entropy(x, target.new_zeros(6)),
            F.binary_cross_entropy_with_logits(x, binary),
            F.binary_cross_entropy_with_logits(x[:, 0], (x.argmax(1) == target).float()),
            F.mse_loss(x[:, 0], target.float()),
        ]
        assert not smoothing.applied
        assert not mixing.applied
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
    with SmoothedLabelLoss(target, level()):
        loss = F.cross_entropy(x, target.clone())
    assert torch.equal(gradient(loss, target), gradient(F.cross_entropy(x, target, label_smoothing=0.1), target))


def test_two_targets_have_a_mode_each():
    x, first, second = logits(6, 7), labels(6), labels(6)
    with SmoothedLabelLoss(first, level(0.1)), SmoothedLabelLoss(second, level(0.2)):
        found = F.cross_entropy(x, first), F.cross_entropy(x, second)
    expected = F.cross_entropy(x, first, label_smoothing=0.1), F.cross_entropy(x, second, label_smoothing=0.2)
    assert all(map(torch.equal, found, expected))


def test_two_threads_change_the_loss_on_one_target_each_in_its_own_way():
    x, target, barrier = logits(6, 7).detach(), labels(6), Barrier(2, timeout=600)

    def step(value: float) -> tuple[torch.Tensor, torch.Tensor]:
        own = x.clone().requires_grad_()
        barrier.wait()
        with SmoothedLabelLoss(target, level(value)):
            barrier.wait()  # both modes are active
            loss = F.cross_entropy(own, target.clone())
            barrier.wait()
            return loss.detach(), gradient(loss, own)

    values = (0.1, 0.6)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(step, values))
    for value, (loss, grad) in zip(values, found, strict=True):
        own = x.clone().requires_grad_()
        expected = F.cross_entropy(own, target, label_smoothing=value)
        assert torch.equal(loss, expected)
        assert torch.equal(grad, gradient(expected, own))


def test_the_labels_and_what_a_step_makes_of_them_are_plain_tensors():
    target = labels(6)
    with SmoothedLabelLoss(target, level()):
        made = [target, target.clone(), target[target > 1], F.one_hot(target, CLASSES), F.cross_entropy(logits(6, 7), target)]
        assert [type(item) for item in made] == [torch.Tensor] * len(made)


def test_metrics_of_the_step_see_the_labels():
    x, target = logits(64, 7), labels(64)
    clean, noisy = MulticlassAccuracy(CLASSES, average="micro"), MulticlassAccuracy(CLASSES, average="micro")
    expected = clean(x, target)
    with SmoothedLabelLoss(target, level(0.5)), MixedLabelLoss(target, torch.randperm(64), torch.rand(64)):
        F.cross_entropy(x, target)
        assert noisy(x, target) == expected
    assert noisy.compute() == expected


def test_statistics_of_the_labels_may_have_a_size_of_their_own():
    x, target = logits(6, 7), torch.tensor([0, 0, 1, 2, 3, 3])
    with MixedLabelLoss(target, torch.tensor([2, 3, 4, 2, 2, 2]), level(0.3)) as mode:
        assert target.unique().view(2, 2).shape == (2, 2)
        assert target.nonzero().view(2, 2).shape == (2, 2)
        assert target[target > 2].tolist() == [3, 3]
        assert target.max(0).values == 3
        assert [label.item() for label in target] == target.tolist()
        F.cross_entropy(x, target)
    assert mode.applied


def test_no_random_number_is_drawn():
    x, target = logits(6, 7), labels(6)
    state = torch.get_rng_state()
    with (
        SmoothedLabelLoss(target, level()),
        MixedLabelLoss(target, PARTNERS, torch.rand(6, generator=torch.Generator(torch.get_default_device()))),
    ):
        F.cross_entropy(x, target)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_a_criterion_that_smooths_already_is_refused(smoothing):
    x, target = logits(6, 7), labels(6)
    with (
        SmoothedLabelLoss(target, level()),
        pytest.raises(ValueError, match=rf"in one place only, but the criterion has label_smoothing={smoothing}"),
    ):
        nn.CrossEntropyLoss(label_smoothing=smoothing)(x, target)


def test_two_changes_of_the_labels_of_one_target_are_refused():
    x, target = logits(6, 7), labels(6)
    with (
        NoisyLabelLoss(target, labels(6)),
        NoisyLabelLoss(target, labels(6)),
        pytest.raises(ValueError, match="another mode has changed them at the loss"),
    ):
        F.cross_entropy(x, target)


def test_two_smoothings_of_one_target_are_refused():
    x, target = logits(6, 7), labels(6)
    with (
        SmoothedLabelLoss(target, level()),
        SmoothedLabelLoss(target, level()),
        pytest.raises(ValueError, match="another mode smooths"),
    ):
        F.cross_entropy(x, target)


@pytest.mark.parametrize("value", [0.1, torch.rand(6)])
def test_a_level_that_is_no_scalar_tensor_is_refused(value):
    with pytest.raises(TypeError, match=r"level must be a tensor of shape \(\)"):
        SmoothedLabelLoss(labels(6), value)


def test_an_exception_leaves_no_mode_behind():
    x, target = logits(6, 7), labels(6)

    def step() -> None:
        with SmoothedLabelLoss(target, level()), MixedLabelLoss(target, PARTNERS, level(0.3)):
            F.cross_entropy(x, target[:3])

    expected = F.cross_entropy(x, target)
    with pytest.raises(ValueError, match="batch_size"):
        step()
    assert torch.equal(F.cross_entropy(x, target), expected)
    assert modes._active.get() == ()


def test_a_focal_loss_is_that_function_of_the_softened_loss():
    x, target = logits(16, 7), labels(16)

    def focal(loss: torch.Tensor) -> torch.Tensor:
        return ((1 - (-loss).exp()) ** 2 * loss).mean()

    with SmoothedLabelLoss(target, level()):
        loss = focal(F.cross_entropy(x, target, reduction="none"))
    assert torch.equal(loss, focal(F.cross_entropy(x, target, reduction="none", label_smoothing=0.1)))


# mixed precision
@pytest.mark.cpu  # a GPU adds the classes up in another order
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ignored", [False, True])
def test_autocast_is_as_for_the_loss_of_torch(dtype, ignored):
    net, x, target = nn.Linear(5, 7), torch.randn(16, 5), labels(16, ignored=ignored)
    with torch.autocast(torch.get_default_device().type, dtype):
        expected = F.cross_entropy(net(x), target, label_smoothing=0.1)
        with SmoothedLabelLoss(target, level()):
            loss = F.cross_entropy(net(x), target)
            log = F.nll_loss(F.log_softmax(net(x), 1), target)
            binary = F.binary_cross_entropy_with_logits(net(x)[:, 0], target.clamp(0, 1).float())
        with MixedLabelLoss(target, torch.randperm(16), torch.rand(16)):
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
    with SmoothedLabelLoss(target, level()):
        assert torch.equal(F.cross_entropy(x, target), expected)
    with (
        SmoothedLabelLoss(target, level()),
        MixedLabelLoss(target, torch.tensor([0, 1]), torch.tensor([0.3, 0.5], dtype=dtype)),
    ):
        torch.testing.assert_close(F.cross_entropy(x, target), expected)  # the resolution of the dtype


# compilation
def losses_of(step, backend: Any) -> tuple[list[float], list[float]]:
    """The losses of a compiled and of a plain step with a level and a share that change, each with new modes."""
    compiled, found = torch.compile(step, backend=backend, fullgraph=True), ([], [])
    for i in range(4):
        x, target, lam, level_ = torch.randn(6, 5), labels(6, 1), torch.rand(6), level(0.1 * (i + 1))
        for run, out in zip((compiled, step), found, strict=True):
            with (
                SmoothedLabelLoss(target, level_) as smoothing,
                MixedLabelLoss(target, torch.randperm(6, generator=torch.Generator(torch.get_default_device())), lam) as mixing,
            ):
                out.append(run(x, target).item())
            assert smoothing.applied
            assert mixing.applied
    return found


def make_step():
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7))
    return lambda x, target: F.cross_entropy(net(x), target.long().view(-1))


@pytest.mark.cpu
def test_a_compiled_step_is_compiled_once_for_all_levels_and_softened_once():
    counter = CompileCounter()  # with backend="eager" the graph runs under the modes, too
    compiled, plain = losses_of(make_step(), counter)
    assert counter.frame_count == 1
    assert compiled == plain
    assert len(set(plain)) == 4


@pytest.mark.slow
@pytest.mark.cpu
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
@pytest.mark.cpu
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
        with SmoothedLabelLoss(target, level()) as smoothing, MixedLabelLoss(target, PARTNERS, lam) as mixing:
            found.append(run(target))
        assert smoothing.applied
        assert mixing.applied
    assert torch.equal(*found)


@pytest.mark.cpu
def test_a_compiled_module_within_the_step_is_compiled_once_and_its_loss_softened():
    counter, net = CompileCounter(), nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7))
    compiled, x = torch.compile(net, backend=counter), torch.randn(6, 5)
    for i in range(4):
        target, epsilon = labels(6), 0.1 * (i + 1)
        with SmoothedLabelLoss(target, level(epsilon)) as mode:
            loss = F.cross_entropy(compiled(x), target)
        assert mode.applied
        assert torch.equal(loss, F.cross_entropy(net(x), target, label_smoothing=epsilon))
    assert counter.frame_count == 1


@pytest.mark.cpu
def test_a_target_that_is_made_in_a_compiled_part_is_followed_out_of_it():
    x, target = logits(6, 7), labels(6, 1)
    prepare = torch.compile(lambda y: y.long().view(-1), backend="eager")
    with SmoothedLabelLoss(target, level()) as mode:
        loss = F.cross_entropy(x, prepare(target))
    assert mode.applied
    assert torch.equal(loss, F.cross_entropy(x, target.view(-1), label_smoothing=0.1))
