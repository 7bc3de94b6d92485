"""Samples are mixed with the shares of the formula, and their targets with them."""

from __future__ import annotations

import math
import re
from collections import UserList
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import N_CLASSES, Classifier, Rows, fit, loader
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_noise import CutMix, Key, Mixup
from lightning_noise.loop.perturbation import Context

KEY = Key((0, "mixup", 0, 0), rank=0)


class Linear(Classifier):
    """Takes inputs of any shape, and neither learns nor drops anything."""

    def __init__(self, shape: tuple[int, ...] = (8,), loss: Any = F.cross_entropy):
        super().__init__(lr=0.0)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), N_CLASSES))
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        loss = self.loss(self(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss


def data(n: int = 12, shape: tuple[int, ...] = (8,)) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, *shape, generator=generator), torch.randint(0, N_CLASSES, (n,), generator=generator))


def one_step(callback: Mixup | CutMix, dataset: Any = None, **kwargs: Any) -> tuple[Any, Tensor]:
    """The batch that the module gets, and its loss."""
    dataset = data() if dataset is None else dataset
    train = DataLoader(dataset, batch_size=len(dataset))
    module, _ = fit([callback], train=train, max_epochs=1, limit_val_batches=0, module=lambda: Linear(**kwargs))
    return module.seen[0], module.losses[0]


def mixed_of(callback: Mixup | CutMix, x: Tensor, level: float = 1.0, name: str = "mixup") -> Any:
    return callback._mix(x, level, Key((0, name, 0, 0), rank=0))


# --- mixup


@pytest.mark.filterwarnings("ignore:.*has one row in the first batch")
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 12])
def test_mixup_is_the_loss_of_two_terms_of_the_mixed_input(n, per_sample):
    dataset = data(n)
    x, y = dataset.tensors
    (seen, labels), loss = one_step(Mixup(1.0, per_sample=per_sample, seed=0), dataset)
    mix = mixed_of(Mixup(1.0, per_sample=per_sample), x)
    lam, partners = mix.lam, mix.partners_of(torch.arange(n))
    assert lam.shape == (n if per_sample else 1,)
    torch.testing.assert_close(seen, lam[:, None] * x + (1 - lam[:, None]) * x[partners], rtol=0, atol=1e-6)  # float32 near 1
    assert torch.equal(labels, y)
    logits = Linear()(seen)
    terms = [F.cross_entropy(logits, labels, reduction="none") for labels in (y, y[partners])]
    torch.testing.assert_close(loss, (lam * terms[0] + (1 - lam) * terms[1]).mean(), rtol=1e-5, atol=0)  # sums of float32


def test_each_other_sample_is_equally_likely_as_a_partner():
    n, draws, x = 5, 4000, torch.arange(5.0)
    partners = torch.stack([Mixup()._mix(x, 1.0, Key((draw,))).partners_of(x) for draw in range(draws)]).long()
    rates = F.one_hot(partners, n).double().mean(0)
    assert (rates.diagonal() == 0).all()
    others = rates[~torch.eye(n, dtype=torch.bool)]
    assert ((others - 1 / (n - 1)).abs() <= 5 * math.sqrt((n - 2) / (n - 1) ** 2 / draws)).all()  # five standard errors


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_the_shares_have_the_moments_of_the_beta_distribution(alpha):
    n = 100_000
    lam = mixed_of(Mixup(per_sample=True), torch.zeros(n, 1), alpha).lam.double()
    variance = 1 / (4 * (2 * alpha + 1))
    # five standard errors each
    assert abs(lam.mean().item() - 0.5) <= 5 * math.sqrt(variance / n)
    squares = (lam - 0.5).square()
    assert abs(squares.mean().item() - variance) <= 5 * squares.std().item() / math.sqrt(n)
    products = lam * (1 - lam)
    assert abs(products.mean().item() - alpha / (2 * (2 * alpha + 1))) <= 5 * products.std().item() / math.sqrt(n)


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 4.0])
def test_the_shares_have_the_beta_distribution(alpha):
    n = 100_000
    lam = mixed_of(Mixup(per_sample=True), torch.zeros(n, 1), alpha).lam.numpy()
    values, counts = np.unique(lam, return_counts=True)
    # a float32 stands for all numbers that round to it; at alpha 0.01 two fifths round to 1
    first, last = ((values.astype(float) + np.nextafter(values, np.float32(end))) / 2 for end in (-1, 2))
    expected, found = stats.beta(alpha, alpha).cdf, counts.cumsum() / n
    distance = max(abs(found - expected(last)).max(), abs(found - counts / n - expected(first)).max())
    # Kolmogorov and Smirnov: n draws exceed this distance with a probability of 2 exp(-2 * 2.5^2) = 7e-6
    assert distance <= 2.5 / math.sqrt(n)


@pytest.mark.parametrize("alpha", [1e-8, 1e-3, 1e3, 1e8])
def test_shares_of_extreme_levels_are_shares(alpha):
    lam = mixed_of(Mixup(per_sample=True), torch.zeros(1000, 1), alpha).lam
    assert ((lam >= 0) & (lam <= 1)).all()
    inner = ((lam > 0.1) & (lam < 0.9)).sum().item()
    # of a small level, 2.2 alpha of the shares: the integral of alpha / 2 / (x (1 - x)); five standard errors of their number
    expected = 1000 * 2.2 * alpha
    assert inner == 1000 if alpha > 1 else inner <= expected + 5 * math.sqrt(expected)
    assert alpha > 1 or abs(lam.mean().item() - 0.5) <= 5 * 0.5 / math.sqrt(1000)  # as often 0 as 1, to five standard errors


def test_mixing_contracts_the_variance():
    alpha, n = 1.0, 50_000
    x = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mixed = mixed_of(Mixup(per_sample=True), x, alpha).of_input(x)
    ratio = mixed.var(0) / x.var(0)
    # five standard errors: the fourth moment of the mixture is below that of the Gaussian, whose variance has 2 / n
    assert ((ratio - (1 - alpha / (2 * alpha + 1))).abs() <= 5 * 2 * math.sqrt(2 / n)).all()


def test_mixing_leaves_the_least_squares_solution_of_centred_data_alone():
    generator = torch.Generator().manual_seed(0)
    n, d, draws = 40, 3, 2000
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64) + 0.5 * torch.randn(
        n, 1, dtype=torch.float64, generator=generator
    )
    x, y = x - x.mean(0), y - y.mean(0)
    w = torch.linalg.lstsq(x, y).solution
    gradients = []
    for draw in range(draws):
        mix = Mixup(per_sample=True)._mix(x, 1.0, Key((draw,)))
        mixed_x, mixed_y = mix.blend(x), mix.blend(y)
        gradients.append(mixed_x.T @ (mixed_x @ w - mixed_y))
    gradients = torch.stack(gradients)
    # at the solution without mixing the expected gradient with it is 0: five standard errors
    assert (gradients.mean(0).abs() <= 5 * gradients.std(0) / math.sqrt(draws)).all()


def test_targets_of_a_regression_are_mixed_in_the_batch():
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(12.0)[:, None].expand(12, N_CLASSES).contiguous()
    (seen_x, seen_y), _ = one_step(Mixup(1.0, seed=0), TensorDataset(x, y), loss=F.mse_loss)
    mix = mixed_of(Mixup(), x)
    torch.testing.assert_close(seen_x, mix.blend(x), rtol=0, atol=0)
    torch.testing.assert_close(seen_y, mix.lam * y + (1 - mix.lam) * mix.partners_of(y), rtol=1e-6, atol=1e-6)  # float32


def zeros_and_ones(n: int = 12) -> Tensor:
    return (torch.rand(n, N_CLASSES, generator=torch.Generator().manual_seed(2)) < 0.5).float()


def probability_loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy(logits.sigmoid(), y)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(
    ("target", "loss"),
    [
        (zeros_and_ones(), F.binary_cross_entropy_with_logits),
        (zeros_and_ones(), probability_loss),
        (zeros_and_ones(), lambda logits, y: F.binary_cross_entropy_with_logits(logits[y >= 0], y[y >= 0])),
        (F.one_hot(torch.arange(12) % N_CLASSES).float(), F.cross_entropy),
        (torch.rand(12, N_CLASSES).softmax(1), F.cross_entropy),
    ],
    ids=["labels", "labels of probabilities", "picked labels", "one-hot rows", "rows of probabilities"],
)
def test_floating_point_labels_are_mixed_at_the_loss_and_metrics_see_them(target, loss, per_sample):
    x, _ = data().tensors
    (seen, labels), found = one_step(Mixup(1.0, seed=0, per_sample=per_sample), TensorDataset(x, target), loss=loss)
    assert torch.equal(labels, target)
    mix = mixed_of(Mixup(per_sample=per_sample), x)
    torch.testing.assert_close(found, loss(Linear()(seen), mix.blend(target)))  # linear in the target, rounded in float32


@pytest.mark.parametrize("mark", [math.nan, -1.0, -100.0])
def test_labels_that_are_missing_are_still_labels(mark):
    x, _ = data().tensors
    y = zeros_and_ones()
    y[::3, 0] = mark

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        known = y >= 0
        return F.binary_cross_entropy_with_logits(logits[known], y[known])

    (_, labels), found = one_step(Mixup(1.0, seed=0), TensorDataset(x, y), loss=loss)
    assert torch.equal(labels.nan_to_num(7), y.nan_to_num(7))
    assert found.isfinite()


@pytest.mark.parametrize(
    "y", [torch.arange(12.0) / 3, torch.rand(12, 3), torch.tensor([-1.0, 1.0] * 6), torch.tensor([0.0, 1.0, 2.0] * 4)]
)
def test_other_numbers_are_mixed_in_the_batch(y):
    x, _ = data().tensors
    (_, seen), _ = one_step(Mixup(1.0, seed=0), TensorDataset(x, y), loss=lambda logits, y: logits.sum() * y.sum())
    assert torch.equal(seen, mixed_of(Mixup(), x).blend(y))


def test_targets_that_look_like_labels_need_a_loss_of_labels_or_a_word():
    x, _ = data().tensors
    y = zeros_and_ones()
    with pytest.raises(ValueError, match=r"computed no cross_entropy.*type Mixup\(…, via='batch'\) to change the target"):
        one_step(Mixup(1.0), TensorDataset(x, y), loss=F.mse_loss)
    (_, seen), _ = one_step(Mixup(1.0, seed=0, via="batch"), TensorDataset(x, y), loss=F.mse_loss)
    assert torch.equal(seen, mixed_of(Mixup(), x).blend(y))


def test_a_target_that_is_missing_for_either_sample_is_missing():
    x, _ = data().tensors
    y = torch.arange(12.0)
    y[[2, 7]] = math.nan
    (_, seen), _ = one_step(Mixup(1.0, seed=0), TensorDataset(x, y), loss=lambda logits, y: logits.sum() * y.nansum())
    assert torch.equal(seen.isnan(), y.isnan() | mixed_of(Mixup(), x).partners_of(y).isnan())


@pytest.mark.parametrize("per_sample", [False, True])
def test_probabilities_in_the_batch_have_the_loss_of_two_terms(per_sample):
    (_, y), loss = one_step(Mixup(1.0, seed=0, via="batch", n_classes=N_CLASSES, per_sample=per_sample))
    assert y.shape == (12, N_CLASSES)
    torch.testing.assert_close(y.sum(1), torch.ones(12), rtol=0, atol=1e-6)  # float32
    _, at_the_loss = one_step(Mixup(1.0, seed=0, per_sample=per_sample))
    torch.testing.assert_close(loss, at_the_loss, rtol=1e-5, atol=0)  # sums of float32


def test_sampled_labels_are_those_of_one_of_the_two_with_their_shares():
    n = 4000
    dataset = TensorDataset(torch.zeros(n, 8), torch.arange(n))
    callback = Mixup(1.0, seed=0, via="sample")
    (_, y), _ = one_step(callback, dataset, loss=lambda logits, y: logits.sum())
    mix = mixed_of(callback, torch.zeros(n, 8))
    own = y == torch.arange(n)
    assert torch.equal(y[~own], mix.partners_of(torch.arange(n))[~own])
    lam = mix.lam.item()
    assert abs(own.double().mean().item() - lam) <= 5 * math.sqrt(lam * (1 - lam) / n) + 1 / n  # and a fixed point or two


# --- cutmix


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(
    ("dim", "shape"),
    [((-2, -1), (3, 9, 7)), ((-1, -2), (8, 8)), ((-1,), (2, 30)), ((-1,), (17,)), ((-3, -2, -1), (1, 4, 5, 6))],
    ids=str,
)
def test_the_share_of_cutmix_is_exactly_that_of_the_elements_that_are_left(dim, shape, per_sample):
    n = 64
    x = torch.arange(n, dtype=torch.float64).view(-1, *[1] * len(shape)).expand(n, *shape)
    shares = set()
    for draw in range(10):
        mix = CutMix(dim=dim, per_sample=per_sample)._mix(x, 1.0, Key((draw,)))
        mixed = mix.of_input(x)
        assert ((mixed == x) | (mixed == mix.partners_of(x))).all()
        left = (mixed == x).flatten(1).double().mean(1)
        moved = mix.partners_of(torch.arange(n)) != torch.arange(n)
        # the mean of zeros and ones rounds once in float32
        torch.testing.assert_close(left[moved], mix.lam.double().expand(n)[moved], rtol=0, atol=1e-6)
        shares |= set(mix.lam.tolist())
    assert len(shares) > 2
    assert all(0 <= share <= 1 for share in shares)


def test_the_box_is_a_rectangle_that_all_channels_share():
    x = torch.arange(40.0).view(-1, 1, 1, 1).expand(40, 3, 12, 10)
    mix = CutMix(per_sample=True)._mix(x, 1.0, Key((0,)))
    pasted = mix.of_input(x) != x
    assert torch.equal(pasted[:, :1].expand_as(pasted), pasted)
    rows, columns = pasted[:, 0].any(2), pasted[:, 0].any(1)
    assert torch.equal(pasted[:, 0], rows[:, :, None] & columns[:, None, :])


def boxes(monkeypatch: pytest.MonkeyPatch, share: float, shape: tuple[int, ...], dim: tuple[int, ...], n: int) -> Tensor:
    """The boxes with a share, for all centers and roundings on a grid of n midpoints for each axis."""
    u = (torch.arange(n) + 0.5) / n
    draws = torch.stack(torch.meshgrid(*[u] * (2 * len(dim)), indexing="ij")).reshape(len(dim), 2, -1)
    callback, samples = CutMix(dim=dim, per_sample=True), draws.shape[-1]
    with monkeypatch.context() as patch:
        patch.setattr(callback, "_draw", lambda x, level, generator: (1, torch.full((samples,), 1 - share)))
        patch.setattr(torch, "rand", lambda *size, **kwargs: draws)
        box = callback._mix(torch.zeros(samples, 1, *shape), 1.0, Key((0,))).box
    assert box is not None
    return box


@pytest.mark.parametrize("share", [0.04, 0.25, 0.36, 0.5, 0.81, 1.0])
@pytest.mark.parametrize(
    ("shape", "dim"), [((4,), (-1,)), ((5,), (-1,)), ((7,), (-1,)), ((4, 4), (-2, -1)), ((5, 7), (-2, -1))], ids=str
)
def test_the_box_reaches_every_edge_alike_and_has_the_share_of_the_formula(monkeypatch, shape, dim, share):
    n = 200 if len(dim) == 1 else 14
    box = boxes(monkeypatch, share, shape, dim, n).double()
    coverage = box.mean(0)
    for axis in range(len(shape)):
        # on the grid, an edge of a box may fall on an element from one side alone
        torch.testing.assert_close(coverage, coverage.flip(axis), rtol=0, atol=2 / n)
    r = share ** (1 / len(dim))
    assert abs(box.mean().item() - (r - r**2 / 4) ** len(dim)) <= 1 / n  # the grid stands for an integral


def test_the_length_of_a_box_within_the_sample_is_the_next_integer_below_or_above(monkeypatch):
    for share in (0.2, 0.3, 0.5):
        box = boxes(monkeypatch, share, (20,), (-1,), 100)
        inner = ~(box[:, 0] | box[:, -1])
        assert set(box[inner].sum(1).tolist()) <= {math.floor(share * 20 + 1e-6), math.ceil(share * 20 - 1e-6)}
    # the whole length, in the middle
    assert boxes(monkeypatch, 1.0, (5,), (-1,), 3)[4].all()


def test_the_loss_of_cutmix_has_the_share_that_is_left():
    dataset = data(12, (1, 6, 6))
    x, y = dataset.tensors
    (seen, _), loss = one_step(CutMix(1.0, seed=0), dataset, shape=(1, 6, 6))
    mix = mixed_of(CutMix(), x, name="cutmix")
    assert torch.equal(seen, mix.of_input(x))
    logits = Linear((1, 6, 6))(seen)
    terms = [F.cross_entropy(logits, labels) for labels in (y, mix.partners_of(y))]
    torch.testing.assert_close(loss, mix.lam[0] * terms[0] + (1 - mix.lam[0]) * terms[1], rtol=1e-6, atol=0)  # float32


def test_a_label_for_each_pixel_is_pasted_with_its_pixel():
    n, size = 12, 6
    y = torch.arange(n)[:, None, None].expand(n, size, size).contiguous() // (n // N_CLASSES)
    x = y[:, None].float() + 0.5

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :, None, None].expand(n, N_CLASSES, size, size), y)

    (seen_x, seen_y), _ = one_step(CutMix(1.0, seed=0), TensorDataset(x, y), shape=(1, size, size), loss=loss)
    assert torch.equal(seen_x[:, 0] - 0.5, seen_y.float())
    assert not torch.equal(seen_y, y)


# --- masks and missing values


class Series(Classifier):
    """Takes series of different lengths with a mask."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return F.cross_entropy(self(batch["x"].flatten(1)[:, :8]), batch["y"])


def series(*features: int, dtype: torch.dtype = torch.bool, pad: float = 0.0, n: int = 16, time: int = 20) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, time + 1, (n,), generator=generator)
    mask = torch.arange(time) < lengths[:, None]
    x = torch.randn(n, time, *features, generator=generator)
    x = torch.where(mask.view(n, time, *[1] * len(features)), x, pad)
    return {"x": x, "mask": mask.to(dtype), "y": torch.arange(n) % N_CLASSES}


def mixed_series(callback: Mixup | CutMix, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
    train = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    module, _ = fit([callback], module=Series, train=train, max_epochs=1, limit_val_batches=0)
    return module.seen[0], mixed_of(callback, batch["x"], name=callback.name)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("features", [(), (2,)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_mixup_gives_the_module_the_union_of_the_masks(dtype, features, per_sample):
    batch = series(*features, dtype=dtype, pad=-99.0)
    before = {key: value.clone() for key, value in batch.items()}
    callback = Mixup(1.0, inputs="x", target="y", mask="mask", per_sample=per_sample, seed=0)
    seen, mix = mixed_series(callback, batch)
    own, other = batch["mask"] > 0, mix.partners_of(batch["mask"]) > 0
    assert seen["mask"].dtype == dtype
    assert torch.equal(seen["mask"], (own | other).to(dtype))
    x = torch.where(own.view(16, 20, *[1] * len(features)), batch["x"], 0)
    union = (own | other).view(16, 20, *[1] * len(features)).expand_as(x)
    assert torch.equal(seen["x"], torch.where(union, mix.blend(x), -99.0))
    assert all(torch.equal(batch[key], value) for key, value in before.items())


@pytest.mark.parametrize(("features", "dim"), [((), (-1,)), ((2,), (-2,)), ((2, 3), (-3,))])
def test_cutmix_pastes_the_mask_with_the_input(features, dim):
    batch = series(*features)
    callback = CutMix(1.0, dim=dim, inputs="x", target="y", mask="mask", per_sample=True, seed=0)
    seen, mix = mixed_series(callback, batch)
    assert torch.equal(seen["x"], mix.paste(batch["x"]))
    assert torch.equal(seen["mask"], torch.where(mix.box, mix.partners_of(batch["mask"]), batch["mask"]))
    assert not torch.equal(seen["mask"], batch["mask"])


def test_a_mask_of_the_pixels_is_pasted_for_all_channels():
    x, mask = torch.randn(8, 3, 6, 5), torch.rand(8, 6, 5) < 0.5
    mix = CutMix(per_sample=True)._mix(x, 1.0, Key((0,)))
    assert mix.box is not None
    assert torch.equal(mix.of_mask(mask, x), torch.where(mix.box, mix.partners_of(mask), mask))
    full = mask[:, None].expand_as(x)
    assert torch.equal(mix.of_mask(full, x), mix.of_mask(mask, x)[:, None].expand_as(x))


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_value_that_is_missing_in_one_sample_is_that_of_the_other(per_sample):
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    x[torch.rand(12, 5, generator=torch.Generator().manual_seed(1)) < 0.3] = math.nan
    mix = Mixup(per_sample=per_sample)._mix(x, 1.0, Key((0,)))
    mixed, other = mix.of_input(x), mix.partners_of(x)
    assert torch.equal(mixed.isnan(), x.isnan() & other.isnan())
    assert torch.equal(mixed[x.isnan()].nan_to_num(9), other[x.isnan()].nan_to_num(9))
    assert torch.equal(mixed[other.isnan()].nan_to_num(9), x[other.isnan()].nan_to_num(9))
    both = ~(x.isnan() | other.isnan())
    assert torch.equal(mixed[both], mix.blend(x)[both])
    # beside padding, a value that is missing stays missing
    mask = torch.ones(12, 5, dtype=torch.bool)
    mask[:6] = False
    with_mask = mix.of_input(x, mask)
    known = mask & ~x.isnan()
    expected = (mask | mix.partners_of(mask)) & ~(known | mix.partners_of(known))
    assert torch.equal(with_mask.isnan() & (mask | mix.partners_of(mask)), expected)


def test_a_mask_that_is_not_given_is_noticed():
    batch = series()
    with pytest.warns(UserWarning, match=r"leaves 'mask' bool \(16, 20\) as it is.*type mask='mask'"):
        mixed_series(Mixup(1.0, inputs="x", target="y"), batch)
    batch["lengths"] = batch.pop("mask").sum(1)
    with pytest.warns(UserWarning, match=r"leaves 'lengths' int64 \(16,\) as it is.*put such a mask into the batch"):
        mixed_series(Mixup(1.0, inputs="x", target="y"), batch)


def test_another_leaf_that_may_be_a_target_is_noticed_if_no_target_is_named():
    x, y = torch.rand(8, 4), torch.arange(8) % 3
    message = r"'1', and leaves '2' int64 \(8,\) as it is.*type target=\[1, 2\]; .*type inputs=\[0, 2\]; else type target=1"
    with pytest.warns(UserWarning, match=message):
        Mixup(1.0).check(Linear(), [x, y, y])
    with pytest.warns(UserWarning, match=r"'label', and leaves 'group' int64 \(8,\) .*type target=\['label', 'group'\]"):
        CutMix(1.0, dim=(-1,)).check(Linear(), {"x": x, "label": y, "group": y})
    Mixup(1.0).check(Linear(), [x, y, torch.ones(3)])  # has no row for each sample
    for target in (1, [1, 2]):
        Mixup(1.0, target=target).check(Linear(), [x, y, y])


@pytest.mark.parametrize(
    ("shape", "dim", "better"), [((8, 16, 16, 3), (-2, -1), (-3, -2)), ((8, 48, 7), (-1,), (-2,))], ids=["images", "series"]
)
def test_a_box_over_the_channels_is_noticed(shape, dim, better):
    batch = [torch.rand(shape), torch.arange(8) % 3]
    with pytest.warns(UserWarning, match=re.escape(f"type CutMix(…, dim={better})")):
        CutMix(1.0, dim=dim).check(Linear(), batch)
    CutMix(1.0, dim=better).check(Linear(), batch)


def test_a_batch_of_one_sample_is_noticed():
    with pytest.warns(UserWarning, match="'mixup': the input '0' has one row in the first batch.*type a larger batch_size=…"):
        Mixup(1.0).check(Linear(), [torch.rand(1, 4), torch.zeros(1, dtype=torch.long)])


def test_a_mask_that_is_the_opposite_is_noticed():
    batch = series()
    batch["mask"] = ~batch["mask"]
    with pytest.warns(UserWarning, match=r"'mixup': the input 'x' is 0 everywhere.*put mask == 0 into the batch"):
        mixed_series(Mixup(1.0, inputs="x", target="y", mask="mask"), batch)


@pytest.mark.parametrize(
    "x", [torch.ones(16, 20).to_sparse(), torch.nested.nested_tensor(16 * [torch.ones(3)], layout=torch.jagged)]
)
def test_what_is_not_dense_is_refused(x):
    with pytest.raises(TypeError, match="noise needs a dense tensor, but the input 'x' is"):
        mixed_series(Mixup(1.0, inputs="x", target="y"), {**series(), "x": x})


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Mixup(inputs="x", mask=lambda batch: batch["mask"]), TypeError, r"put the mask into the batch.*mask='mask'"),  # type: ignore[arg-type]
        (lambda: Mixup(inputs=["x", "mask"], target="y"), TypeError, r"is bool \(16, 20\); type mask='mask'"),
        (lambda: Mixup(inputs="x", target="y", mask="m"), ValueError, "no leaf 'm' in the batch"),
        (lambda: CutMix(dim=(-1,), inputs="x", target="y", mask="mask"), ValueError, r"the mask needs the axes dim=\(-1,\)"),
        (lambda: Mixup(inputs="x", target="y", mask="y"), ValueError, "if these are lengths"),
    ],
)
def test_masks_that_cannot_be_mixed_are_refused_with_what_to_type(build, error, message):
    with pytest.raises(error, match=message):
        mixed_series(build(), series(2))


@pytest.mark.parametrize("container", [list, tuple, UserList])
def test_arguments_may_be_any_sequence(container):
    x, y = data().tensors
    batch = {"x": x, "w": -x, "y": y, "z": y.roll(1)}

    class Heads(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append(batch)
            return F.cross_entropy(self(batch["x"]), batch["y"]) + F.cross_entropy(self(batch["w"]), batch["z"])

    for callback in (
        Mixup(1.0, inputs=container(["x", "w"]), target=container(["y", "z"]), seed=0),
        CutMix(1.0, dim=container([-1]), inputs=container(["x", "w"]), target=container(["y", "z"]), seed=0),
    ):
        train = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
        module, _ = fit([callback], module=Heads, train=train, max_epochs=1, limit_val_batches=0)
        assert torch.equal(module.seen[0]["x"], -module.seen[0]["w"])
        assert not torch.equal(module.seen[0]["x"], x)


# --- batches


def test_all_inputs_are_mixed_in_one_way_and_the_batch_is_untouched():
    x, y = data().tensors
    batch = {"a": x, "b": -x, "y": y}
    before = {key: value.clone() for key, value in batch.items()}
    seen = []

    class Dicts(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
            seen.append(batch)
            return F.cross_entropy(self(batch["a"] + batch["b"].square()), batch["y"])

    train = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    fit([Mixup(1.0, inputs=["a", "b"], target="y")], module=Dicts, train=train, max_epochs=1)
    assert torch.equal(seen[0]["a"], -seen[0]["b"])
    assert not torch.equal(seen[0]["a"], x)
    assert all(torch.equal(batch[key], value) for key, value in before.items())


def test_the_targets_of_several_heads_are_mixed_with_the_same_shares():
    x, y = data().tensors
    z = y.roll(1)

    class Heads(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self(batch["x"])
            losses = [F.cross_entropy(logits, batch[key]) for key in ("y", "z")]
            self.losses += [loss.detach() for loss in losses]
            return losses[0] + losses[1]

    train = DataLoader([{"x": x, "y": y, "z": z}], batch_size=None)  # type: ignore[arg-type]
    callback = Mixup(1.0, target=["y", "z"], seed=0)
    module, _ = fit([callback], module=Heads, train=train, max_epochs=1, limit_val_batches=0)
    mix = mixed_of(callback, x)
    logits = Linear()(mix.blend(x))
    for loss, labels in zip(module.losses, (y, z), strict=True):
        expected = mix.lam[0] * F.cross_entropy(logits, labels) + (1 - mix.lam[0]) * F.cross_entropy(
            logits, mix.partners_of(labels)
        )
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_inputs_keep_their_precision_and_round_once(dtype):
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    mix = mixed_of(Mixup(per_sample=True), x)
    mixed = mix.of_input(x)
    assert mixed.dtype == dtype
    assert torch.equal(mixed, mix.of_input(x.float()).to(dtype))


@pytest.mark.parametrize(
    ("callback", "dataset", "error", "message"),
    [
        (Mixup(), TensorDataset(torch.zeros(4, 3, dtype=torch.long), torch.zeros(4)), TypeError, "Mixup needs floats"),
        (
            CutMix(),
            TensorDataset(torch.zeros(4, 3), torch.zeros(4).long()),
            ValueError,
            r"the input needs the axes dim=\(-2, -1\) of the box",
        ),
        (Mixup(target="z"), data(), ValueError, "no leaf 'z' in the batch"),
        (Mixup(via="batch"), data(), ValueError, "SmoothLabels needs n_classes=… here"),
        (Mixup(via="batch", n_classes=2), data(), ValueError, r"labels must be in \[0, 2\), got 0 to 2"),
        (
            CutMix(),
            TensorDataset(torch.rand(4, 1, 8, 8), torch.zeros(4, 2, 2).long()),
            ValueError,
            "a value for each position must have the axes",
        ),
        (
            CutMix(inputs=["0", "1"], target=1),
            TensorDataset(torch.rand(4, 6, 6), torch.rand(4, 3, 3)),
            ValueError,
            "inputs must agree on the axes",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_suit_the_batch_is_found_on_the_first_one(callback, dataset, error, message):
    with pytest.raises(error, match=message):
        one_step(callback, dataset)


def test_inputs_and_targets_of_different_lengths_are_refused():
    batch = [torch.zeros(4, 8), torch.zeros(3).long()]
    with pytest.raises(ValueError, match=r"the input '0' is float32 \(4, 8\) and the target is int64 \(3,\)"):
        fit([Mixup()], train=DataLoader([batch], batch_size=None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Mixup(-0.1), "finite and not negative"),
        (lambda: CutMix(dim=(1, 2)), "counted from the end"),
        (lambda: Mixup(via="metrics"), "via must be"),  # type: ignore[arg-type]
    ],
)
def test_arguments_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_share_is_logged():
    callback = Mixup(1.0, seed=0)
    x, y = data().tensors
    perturbation = callback.perturbation(Context(None, None, is_logged=True), [x, y], 1.0, KEY)  # type: ignore[arg-type]
    with perturbation:
        pass
    assert perturbation.stats["lam"] == mixed_of(callback, x).lam.mean()


def test_rows_of_the_loader_are_untouched():
    rows = Rows()
    before = rows.x.clone()
    fit([Mixup(1.0), CutMix(1.0, dim=(-1,))], train=loader(rows))
    assert torch.equal(rows.x, before)
