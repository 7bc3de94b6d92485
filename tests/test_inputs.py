"""InputNoise on data as people have it: masked, missing, normalized, packed, of several loaders, and with doubtful values."""

from __future__ import annotations

import re
import warnings
from collections import UserDict, UserList
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import keys_of, make_trainer
from pandas import Series
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from lightning_noise import InputNoise, Key, RandomizedSmoothing, ReplayMonitor, RobustnessMonitor, noise, schedules
from lightning_noise.batch import find_inputs
from lightning_noise.loop.snapshot import copy_batch
from lightning_noise.perturb.doubts import find_doubts, missing_doubt, numbers_doubt, silence_doubt
from lightning_noise.perturb.inputs import perturb_batch, snr_db
from lightning_noise.perturb.normalization import Normalization

KEY = Key((0, "input", 0, 0), rank=0)
SERIES = [
    noise.Gaussian(),
    noise.SNR(),
    noise.ColoredNoise(),
    noise.Drift(),
    noise.Masking(dim=(-1,), value=-9.0),
    noise.Impulse(),
]
N, T = 64, 50
LENGTHS = torch.arange(N) % 40 + 10
VALID = torch.arange(T) < LENGTHS[:, None]


def padded() -> dict[str, Tensor]:
    x = torch.where(VALID, torch.randn(N, T, generator=torch.Generator().manual_seed(0)) + 3, 0.0)
    return {"x": x, "mask": VALID.long(), "y": torch.zeros(N, dtype=torch.long)}


@pytest.mark.parametrize("member", SERIES, ids=repr)
@pytest.mark.parametrize("options", [{}, {"relative": "std"}, {"per_sample": True, "clip": (1.0, 5.0)}], ids=str)
@pytest.mark.parametrize("mask", ["mask", lambda batch: batch["mask"] > 0], ids=["a leaf", "a function"])
def test_padding_stays_as_it_is_and_means_nothing_for_the_rest(member, options, mask):
    if options.get("relative") and not member.additive:
        pytest.skip("no unit")
    batch = padded()
    assert perturb_batch(batch, [("x",)], member, 0.0, KEY, mask=mask, **options) is batch
    y = perturb_batch(batch, [("x",)], member, 0.5, KEY, mask=mask, **options)["x"]
    assert torch.equal(y[~VALID], batch["x"][~VALID])
    assert (y != batch["x"])[VALID].any()
    other = {**batch, "x": torch.where(VALID, batch["x"], 1e6)}
    z = perturb_batch(other, [("x",)], member, 0.5, KEY, mask=mask, **options)["x"]
    torch.testing.assert_close(z[VALID], y[VALID])


def test_a_relative_level_is_in_units_of_the_deviation_of_the_valid_part():
    batch = padded()
    y = perturb_batch(batch, [("x",)], noise.Uniform(), 0.5, KEY, mask="mask", relative="std")["x"]
    for row, noisy, n in zip(batch["x"], y, LENGTHS, strict=True):
        assert 0.25 < (noisy - row).abs().max() / row[:n].std(correction=0) <= 0.5 + 1e-5


@pytest.mark.parametrize("member", SERIES, ids=repr)
def test_masked_noise_of_held_out_rows_depends_on_the_position_alone(member):
    batch = padded()
    whole = perturb_batch(batch, [("x",)], member, 0.5, Key((1,), positions=range(N)), mask="mask")["x"]
    for start in range(0, N, 24):
        part = {name: leaf[start : start + 24] for name, leaf in batch.items()}
        key = Key((1,), positions=range(N)[start : start + 24])
        y = perturb_batch(part, [("x",)], member, 0.5, key, mask="mask")["x"]
        torch.testing.assert_close(y, whole[start : start + 24], rtol=0, atol=0)


@pytest.mark.parametrize("member", [*SERIES, noise.Uniform(), noise.Speckle()], ids=repr)
@pytest.mark.parametrize("relative", [None, "std"])
def test_missing_values_stay_missing_and_none_is_added(member, relative):
    if relative and not member.additive:
        pytest.skip("no unit")
    x = torch.randn(N, T, generator=torch.Generator().manual_seed(0))
    x[torch.rand(N, T, generator=torch.Generator().manual_seed(1)) < 0.1] = torch.nan
    y = perturb_batch([x], [(0,)], member, 0.2, KEY, relative=relative)[0]
    assert torch.equal(y.isnan(), x.isnan())
    assert snr_db([x], [y], [(0,)]).isfinite()


def test_the_deviation_of_a_row_with_missing_values_is_that_of_the_others():
    x = torch.tensor([[1.0, torch.nan, 3.0], [1.0, 2.0, 3.0]])
    y = perturb_batch(x, [()], noise.as_noise(lambda x, level, *, generator: x + level[:, None]), 1.0, KEY, relative="std")
    torch.testing.assert_close((y - x)[:, 0], torch.tensor([1.0, (2 / 3) ** 0.5]))


def test_the_ratio_is_that_of_the_valid_part():
    batch = padded()
    noisy = perturb_batch(batch, [("x",)], noise.SNR(), 0.1, KEY, mask="mask")
    assert snr_db(batch, noisy, [("x",)], "mask").item() == pytest.approx(20, abs=1e-4)
    dirty = {**noisy, "x": torch.where(VALID, noisy["x"], 1e6)}
    assert snr_db(batch, dirty, [("x",)], "mask").item() == pytest.approx(20, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*clip=.* cuts off")
def test_a_replay_takes_a_mask_and_a_normalization():
    class Masked(pl.LightningModule):
        def validation_step(self, batch, batch_idx):
            self.log("padding", batch["x"][batch["mask"] == 0].abs().max())
            self.log("x", batch["x"].max())

    data = DataLoader(list(dict(zip(padded(), row, strict=True)) for row in zip(*padded().values(), strict=True)), N)  # type: ignore[arg-type]
    monitor = ReplayMonitor(noise.Gaussian(), [0.5], inputs="x", mask="mask", mean=1.0, std=2.0, clip=(4.0, 5.0))
    trainer = make_trainer([monitor])
    trainer.validate(Masked(), data, verbose=False)
    found = keys_of(trainer)
    assert found["replay/gaussian/0.5/padding"] == 0
    assert found["replay/gaussian/0.5/x"] == (5.0 - 1.0) / 2.0


# --- normalized data

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def normalized(n: int = 8) -> tuple[Tensor, Tensor]:
    raw = torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    raw[:, :, :4] = 0.0  # black pixels
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    return raw, (raw - mean) / std


@pytest.mark.parametrize(
    "member",
    [noise.Gaussian(), noise.Impulse(low=0.0, high=1.0), noise.Shot(), noise.Masking(value=0.5), noise.Speckle()],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_levels_and_bounds_are_in_raw_units(member, dtype):
    raw, x = normalized()
    y = perturb_batch([x.to(dtype)], [(0,)], member, 0.2, KEY, clip=(0.0, 1.0), normalization=Normalization(MEAN, STD))[0]
    expected = perturb_batch([raw.to(dtype)], [(0,)], member, 0.2, KEY, clip=(0.0, 1.0))[0]
    assert y.dtype == dtype
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 2e-2}[dtype]
    if not isinstance(member, noise.Shot) or dtype == torch.float32:  # a count may differ for another rounding of its mean
        close = torch.isclose(y.float() * std + mean, expected.float(), atol=tolerance)
        assert close.float().mean() > 0.99


def test_what_the_noise_does_not_change_keeps_its_bits():
    _, x = normalized()
    options: dict[str, Any] = {"normalization": Normalization(MEAN, STD)}
    y = perturb_batch([x], [(0,)], noise.Masking(value=0.5), 0.2, KEY, **options)[0]
    assert 0.7 < (y == x).float().mean() < 0.9
    chosen = perturb_batch([x], [(0,)], noise.Gaussian(), 0.2, KEY, probability=0.5, clip=(0, 1), **options)[0]
    same = (chosen == x).flatten(1).all(1)
    assert 0 < same.sum() < len(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": 0.0}, "std must be a positive number, or a list with one for each channel, got 0.0"),
        ({"std": [0.2, -1.0]}, "std must be a positive number"),
        ({"mean": "a"}, "mean must be a number, or a list with a number for each channel, got 'a'"),
        ({"mean": float("nan")}, "mean must be a number"),
    ],
)
def test_what_is_no_normalization_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        InputNoise(noise.Gaussian(), 0.1, **options)


# --- packed rows


def test_each_document_of_a_packed_row_is_a_series_of_its_own():
    lengths = torch.tensor([[10, 30, 5], [20, 20, 0]]).repeat(500, 1)
    batch = {"x": torch.zeros(1000, 50), "lengths": lengths}
    y = perturb_batch(batch, [("x",)], noise.Drift(), 0.5, KEY, documents="lengths")["x"]
    for rows, ends in ((slice(0, None, 2), [10, 40, 45]), (slice(1, None, 2), [20, 40])):
        for end in ends:
            assert abs(y[rows, end - 1].std().item() - 0.5) < 5 * 0.5 / (2 * 500) ** 0.5  # five standard errors
    assert not y[1::2, 40:].any(), "beyond the documents"


# --- loaders of several sizes and containers


class Pair(pl.LightningModule):
    """Takes the batches of two loaders."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch["a"][0]).square().mean()

    def validation_step(self, batch, batch_idx):
        for name in ("a", "b"):
            if batch[name] is not None:
                self.log(name, self.net(batch[name][0]).mean(), batch_size=len(batch[name][0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def replayed(sizes: tuple[int, int], mode: Any) -> dict[str, float]:
    pl.seed_everything(0, verbose=False)
    data = {
        name: DataLoader(TensorDataset(torch.rand(12, 3, generator=torch.Generator().manual_seed(i))), size)
        for i, (name, size) in enumerate(zip(("a", "b"), sizes, strict=True))
    }
    monitor = ReplayMonitor(noise.Gaussian(), [0.5], inputs=["a.0", "b.0"])
    trainer = make_trainer([monitor])
    trainer.validate(Pair(), CombinedLoader(data, mode), verbose=False)
    return keys_of(trainer)


def test_loaders_of_different_batch_sizes_are_replayed_with_positions_of_their_own():
    one, two = replayed((4, 6), "max_size"), replayed((12, 3), "max_size")
    for name in ("a", "b"):
        assert one[f"replay/gaussian/0.5/{name}"] != one[name]
        assert one[f"replay/gaussian/0.5/{name}"] == pytest.approx(two[f"replay/gaussian/0.5/{name}"], abs=1e-6)


def test_containers_of_a_configuration_are_lists_and_dicts():
    inputs: Any = UserList(["x"])
    bounds: Any = UserList([UserList([0.0, 0.0]), None])
    callback = InputNoise(noise.Gaussian(), 0.1, inputs=inputs, clip=bounds, std=UserList([1.0, 2.0]))  # type: ignore[arg-type]
    assert (callback.inputs, callback.clip, callback.std) == (["x"], ((0.0, 0.0), None), [1.0, 2.0])
    noises: Any = UserDict({"g": noise.Gaussian()})
    monitor = RobustnessMonitor(noises, UserDict({"g": UserList([0.1, 0.2])}), inputs=inputs)  # type: ignore[arg-type]
    assert (monitor.levels, monitor.inputs) == ({"g": (0.1, 0.2)}, ["x"])


@pytest.mark.parametrize("array", [np.array, torch.tensor, Series], ids=["numpy", "torch", "pandas"])
def test_arguments_may_be_arrays(array):
    levels = array([0.25, 0.5])
    for monitor in (RobustnessMonitor([noise.Gaussian(), noise.Uniform()], levels), ReplayMonitor(noise.Gaussian(), levels)):
        assert monitor.levels["gaussian"] == (0.25, 0.5)
    assert RobustnessMonitor({"g": noise.Gaussian()}, {"g": levels}).levels == {"g": (0.25, 0.5)}
    schedule = schedules.Piecewise(levels, array([0.5]))
    assert schedule == schedules.Piecewise([0.25, 0.5], [0.5])
    assert InputNoise(noise.Gaussian(), 0.1, mean=levels).mean == [0.25, 0.5]


def test_a_batch_may_be_any_sequence_and_mapping():
    x = torch.ones(4, 3)
    batch: Any = UserList([UserDict({"x": x}), torch.zeros(4)])
    out = perturb_batch(batch, find_inputs(batch, "0.x"), noise.Gaussian(), 0.5, KEY)
    assert (type(out), type(out[0])) == (UserList, UserDict)
    assert torch.equal(batch[0]["x"], torch.ones(4, 3))
    assert not torch.equal(out[0]["x"], x)


PACKED = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])


@pytest.mark.parametrize(
    ("batch", "selector"),
    [
        (PACKED, None),
        (PACKED, "data"),
        ({"x": PACKED, "y": torch.zeros(2, dtype=torch.long)}, None),
        ((PACKED, torch.zeros(2, dtype=torch.long)), None),
        ((PACKED, torch.zeros(2)), "0.data"),
        ((PACKED, torch.zeros(2)), "*.data"),
        ({"x": PACKED, "y": torch.zeros(2)}, "x"),
    ],
)
def test_a_packed_sequence_is_refused_with_the_way_out(batch, selector):
    with pytest.raises(TypeError, match=r"part of a PackedSequence, in which rows are not samples; .* pack them in the module"):
        find_inputs(batch, selector)


def test_a_packed_sequence_is_copied():
    copy = copy_batch((PACKED, 1))[0]
    assert type(copy) is type(PACKED)
    assert torch.equal(copy.data, PACKED.data)
    assert copy.data is not PACKED.data


# --- values that contradict the arguments


class Mean(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 2)

    def forward(self, x):
        return self.net(x.flatten(1).nan_to_num(0.0).mean(1, keepdim=True) / 255)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("v", self(batch[0]).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def warned(callback: pl.Callback, x: Tensor) -> list[str]:
    data = DataLoader(TensorDataset(x, torch.arange(len(x)) % 2), 16)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        make_trainer([callback], max_epochs=2).fit(Mean(), data, data)
    return [str(warning.message) for warning in found if "the input" in str(warning.message)]


UNIT = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(32, 100, 3, generator=torch.Generator().manual_seed(0))
COUNTS = torch.poisson(torch.full((32, 6), 2.0), generator=torch.Generator().manual_seed(0))
DOUBTS: dict[str, tuple[Any, Tensor, str | None]] = {
    "images in [0, 1]": (lambda: InputNoise(noise.Gaussian(), 0.1), UNIT, None),
    "a level that rises from 0": (lambda: InputNoise(noise.Gaussian(), schedules.Linear(0.0, 0.5)), UNIT, None),
    "pixels": (lambda: InputNoise(noise.Gaussian(), 0.1), UNIT * 255, r"level 0\.1 is 6\d dB below .* in \[0.*, 25.*std=1/255"),
    "pixels, scheduled": (
        lambda: InputNoise(noise.Uniform(), schedules.Linear(0.0, 0.5)),
        UNIT * 255,
        r"level 0\.\d+ is 5\d dB",
    ),
    "pixels, certified": (
        lambda: RandomizedSmoothing(0.1, n0=2, n=10, alpha=0.05, max_batches=1),
        UNIT * 255,
        r"type std=1/255, .*; else type a larger sigma$",
    ),
    "pixels of a known scale": (lambda: InputNoise(noise.Gaussian(), 0.1, std=1 / 255), UNIT * 255, None),
    "a relative level": (lambda: InputNoise(noise.Gaussian(), 0.001, relative="std"), UNIT, None),
    "normalized images": (
        lambda: RobustnessMonitor(noise.Gaussian()),
        UNIT * 4 - 2,
        r"made for data in \[0, 1\].*mean=… and std=…",
    ),
    "normalized images, replayed": (lambda: ReplayMonitor(noise.Gaussian()), UNIT * 4 - 2, r"made for data in \[0, 1\]"),
    "pixels under severities": (
        lambda: RobustnessMonitor(noise.Gaussian()),
        UNIT * 255,
        r"made for data in \[0, 1\].*std=1/255",
    ),
    "normalized images, levels given": (lambda: RobustnessMonitor(noise.Gaussian(), [0.1, 1.0]), UNIT * 4 - 2, None),
    "images under severities": (lambda: RobustnessMonitor(noise.Gaussian()), UNIT, None),
    "low levels beside high ones": (lambda: RobustnessMonitor(noise.Gaussian(), [1e-4, 0.1]), UNIT, None),
    "series (B, T, C)": (
        lambda: InputNoise(noise.Drift(), 0.5),
        ROWS,
        r"last axis of length 3; for \(B, T, C\) type noise\.Drift\(dim=-2\)",
    ),
    "a span of (B, T, C)": (lambda: InputNoise(noise.Masking(dim=(-1,)), 0.2), ROWS, r"type noise\.Masking\(dim=\(-2,\)"),
    "series (B, T, C), monitored": (
        lambda: ReplayMonitor(noise.ColoredNoise(), [0.5]),
        ROWS,
        r"type noise\.ColoredNoise\(dim=-2\)",
    ),
    "series (B, C, T)": (lambda: InputNoise(noise.Drift(), 0.5), ROWS.transpose(1, 2), None),
    "series (B, T, C), said": (lambda: InputNoise(noise.Drift(dim=-2), 0.5), ROWS, None),
    "images (B, H, W, C)": (
        lambda: InputNoise(noise.Masking(), 0.2),
        UNIT.permute(0, 2, 3, 1),
        r"for \(B, H, W, C\) type noise\.Masking\(dim=\(-3, -2\)",
    ),
    "zeros": (
        lambda: InputNoise(noise.Gaussian(), 0.1),
        torch.zeros(32, 4),
        "is 0 everywhere in the first batch; .* type inputs=…",
    ),
    "NaN": (lambda: InputNoise(noise.Gaussian(), 0.1), torch.full((32, 4), torch.nan), "has no valid element"),
    "a number for missing values": (
        lambda: InputNoise(noise.Gaussian(), 0.1, relative="std"),
        ROWS[:, :, 0].where(ROWS[:, :, 0] < 1, -999.0),
        r"-999 at \d+ of 1600 elements .* type mask=lambda batch: batch\[0\] != -999",
    ),
    "a floor of the data": (lambda: InputNoise(noise.Gaussian(), 0.1), ROWS.clamp(min=-1), None),
    "counts": (lambda: InputNoise(noise.Gaussian(), 1.0), COUNTS, r"holds counts, .* type clip=\(0.0, None\)"),
    "counts, certified": (
        lambda: RandomizedSmoothing(1.0, n0=2, n=10, alpha=0.05, max_batches=1),
        COUNTS,
        r"needs at least 0, clamp the input in its forward, as by x\.clamp_min\(0\)$",
    ),
    "sigma above the data": (
        lambda: RandomizedSmoothing(25.0, n0=2, n=10, alpha=0.05, max_batches=1),
        UNIT * 4 - 2,
        "type a lower sigma$",
    ),
    "counts with a bound": (lambda: InputNoise(noise.Gaussian(), 1.0, clip=(0.0, None)), COUNTS, None),
    "counts under noise that keeps their sign": (lambda: InputNoise(noise.Shot(), 1.0), COUNTS, None),
    "a channel that is a mask": (
        lambda: InputNoise(noise.Gaussian(), 0.1),
        torch.stack([ROWS[..., 0], (ROWS[..., 1] > 0).float()], 1),
        r"channel 1 of the input '0', on axis -2, holds 0 and 1 alone.*index_fill\(-2, torch\.tensor\(\[1\]",
    ),
    "flags alone": (lambda: InputNoise(noise.Gaussian(), 0.1), (ROWS > 0).float(), None),
    "bounds that cut off data": (
        lambda: InputNoise(noise.Gaussian(), 0.1, clip=(0.0, 1.0)),
        UNIT * 2 - 1,
        r"clip=\(0\.0, 1\.0\) cuts off 50 % of the input '0', whose values are in \[-0\.99",
    ),
}


@pytest.mark.parametrize(("made", "x", "message"), DOUBTS.values(), ids=DOUBTS)
def test_values_that_contradict_the_arguments_are_noticed_once(made, x, message):
    found = warned(made(), x)
    assert len(found) == (message is not None), found
    if message is not None:
        assert re.search(message, found[0]), found[0]


def test_one_number_for_each_sample_beside_larger_leaves_is_noticed_if_it_is_the_input_by_default():
    steps, x, ids = torch.rand(8), torch.rand(8, 4), torch.ones(8, 4).long()
    assert "type inputs=1" in str(numbers_doubt((steps, x), (0,)))
    assert "type EmbeddingNoise() for token ids" in str(numbers_doubt({"weight": steps, "ids": ids}, ("weight",)))
    assert numbers_doubt((steps, steps), (0,)) is None
    assert numbers_doubt((x, steps), (0,)) is None


class Autoencoder(pl.LightningModule):
    def __init__(self, loss, target):
        super().__init__()
        self.net, self.loss, self.target = torch.nn.Linear(4, 4), loss, target

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch[0]).flatten(), batch[self.target].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("loss", [F.mse_loss, F.huber_loss, F.binary_cross_entropy_with_logits])
@pytest.mark.parametrize("target", [0, 1])
def test_an_input_that_is_its_own_target_is_noticed_once(loss, target):
    x = torch.rand(8, 4)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        make_trainer([InputNoise(noise.Gaussian(), 0.1)]).fit(Autoencoder(loss, target), DataLoader(TensorDataset(x, x), 4))
    told = [each for each in found if "the input is also the target of the loss" in str(each.message)]
    assert len(told) == (target == 0)


def test_a_mask_or_lengths_that_are_not_given_are_noticed():
    batch = padded()
    other = {**batch, "x": torch.where(VALID, batch["x"], -1.0)}
    wide = {**batch, "x": batch["x"][:, None].repeat(1, 3, 1)}

    def doubts(batch, leaf, mask=None):
        return list(find_doubts({**batch, "mask": leaf}, None, [("x",)], noise.SNR(), 0.1, mask=mask))

    for given in (batch, other, wide):
        assert [message[-11:] for message in doubts(given, VALID.float())] == ["mask='mask'"]
        assert doubts(given, ~VALID)[0].endswith("type mask=lambda batch: batch['mask'] == 0")
        assert doubts(given, VALID, "mask") == []
    (observed,) = find_doubts({"x": batch["x"], "observed": VALID.float()}, None, [("x",)], noise.SNR(), 0.1)
    assert observed.endswith("type mask='observed'")
    lengths = list(find_doubts({"x": wide["x"], "n": {"lengths": LENGTHS}}, None, [("x",)], noise.SNR(), 0.1))
    mask = eval(lengths[0].partition("type mask=")[2])
    shorter = {"x": wide["x"][..., :40], "n": {"lengths": LENGTHS}}  # as a batch of padded series may be
    assert torch.equal(mask(shorter), VALID[:, :40])
    segmentation = {"x": torch.rand(N, T), "mask": VALID}
    assert list(find_doubts(segmentation, None, [("x",)], noise.SNR(), 0.1)) == []


@pytest.mark.parametrize("mask", [~VALID, torch.where(VALID, 0.0, -torch.inf)], ids=["of padding", "additive"])
def test_a_mask_that_is_the_opposite_is_noticed(mask):
    found = list(find_doubts({**padded(), "mask": mask}, None, [("x",)], noise.SNR(), 0.1, mask="mask"))
    assert len(found) == 1
    assert found[0].endswith("for the opposite type mask=lambda batch: batch[…] == 0")


@pytest.mark.parametrize(
    ("member", "options"),
    [(noise.SNR(), {}), (noise.Impulse(), {}), (noise.Gaussian(), {"relative": "std"})],
    ids=["SNR", "Impulse", "relative"],
)
def test_infinite_values_that_noise_would_spread_are_noticed(member, options):
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    x[0, 0] = -torch.inf
    noisy = perturb_batch({"x": x}, [("x",)], member, 0.9, KEY, **options)
    (found,) = find_doubts({"x": x}, noisy, [("x",)], member, 0.9, **options)
    assert re.search("makes finite elements of the input 'x' infinite or NaN", found)
    harmless = perturb_batch({"x": x}, [("x",)], noise.Gaussian(), 0.9, KEY)
    assert list(find_doubts({"x": x}, harmless, [("x",)], noise.Gaussian(), 0.9)) == []


@pytest.mark.parametrize("options", [{"clip": (-1.0, 1.0)}, {"mean": 0.5}, {"std": 2.0}], ids=str)
def test_complex_data_have_no_bounds_and_no_normalization(options):
    batch = {"x": torch.ones(8, 4, dtype=torch.complex64)}
    with pytest.raises(TypeError, match="clip, mean and std need real numbers, but the input 'x' is complex64"):
        InputNoise(noise.Gaussian(), 0.1, **options).check(pl.LightningModule(), batch)


def test_an_input_has_a_row_for_each_sample():
    with pytest.raises(TypeError, match=r"'x' must have a row for each sample, got float32 \(\); type inputs=…"):
        perturb_batch({"x": torch.tensor(1.0)}, [("x",)], noise.Gaussian(), 0.5, KEY)


def test_the_deviation_of_a_row_does_not_depend_on_missing_values_in_other_rows():
    x = torch.randn(64, 101, generator=torch.Generator().manual_seed(0)) + 3
    holed = x.clone()
    holed[0, 0] = torch.nan
    one, other = (
        perturb_batch(rows, [()], noise.Gaussian(), 0.5, replace(KEY, positions=range(64)), relative="std")
        for rows in (x, holed)
    )
    assert torch.equal(one[1:], other[1:])


@pytest.mark.parametrize(("shape", "std"), [((9, 3, 2), (1.0, 10.0)), ((9, 2, 2), ((1.0, 10.0),)), ((9, 5, 3, 2), (1.0, 10.0))])
def test_the_channels_of_a_normalization_may_be_the_last_axis(shape, std):
    x = torch.randn(shape)
    raw = Normalization(0.0, std).restore(x)
    assert torch.equal(raw[..., 0], x[..., 0])
    assert torch.equal(raw[..., 1], 10 * x[..., 1])


def test_channels_that_fit_two_axes_are_refused_with_both_lines_to_type():
    with pytest.raises(ValueError, match=r"type std=\[\[1.0, 10.0\]\] for channels last, or std=\[\[1.0\], \[10.0\]\]"):
        Normalization(0.0, (1.0, 10.0)).restore(torch.randn(9, 2, 2))


@pytest.mark.parametrize(
    ("x", "is_told"),
    [
        (torch.ones(2, 1, 20).masked_fill(torch.arange(20) >= torch.tensor([20, 15]).view(-1, 1, 1), 0.0), True),
        (torch.ones(2, 20, 3).masked_fill(torch.arange(20).view(-1, 1) >= torch.tensor([20, 15]).view(-1, 1, 1), 0.0), True),
        (torch.ones(2, 20), False),
        (torch.eye(20), False),  # sparse rows end in zeros, too
        (torch.ones(2, 1, 20).masked_fill(torch.arange(20) >= 15, 0.0), False),  # a common border
        (torch.ones(2, 20).index_put((torch.tensor(0), torch.tensor(19)), torch.tensor(0.0)), False),  # a table
    ],
    ids=["(B, C, T)", "(B, T, C)", "full", "sparse", "border", "last column"],
)
def test_series_that_end_in_zeros_or_begin_with_them_are_taken_for_padded(x, is_told):
    for each in (x, x.flip(list(x.shape).index(20, 1))):
        assert (silence_doubt("the input", each, "batch[0]") is not None) == is_told


def test_codes_of_categories_among_numbers_are_noticed_and_the_line_to_type_spares_them():
    x = torch.cat([torch.randn(30, 20), torch.arange(30).view(-1, 1) % 3.0, torch.arange(30).view(-1, 1) % 2.0], dim=1)
    (found,) = find_doubts({"x": x}, None, [("x",)], noise.Gaussian(), 0.2)
    mask = eval(found.partition("type mask=")[2])
    assert not list(find_doubts({"x": x}, None, [("x",)], noise.Gaussian(), 0.2, mask=mask))
    noisy = perturb_batch({"x": x}, [("x",)], noise.Gaussian(), 0.2, Key(("test",)), mask=mask)["x"]
    assert torch.equal((noisy != x).any(0), torch.arange(22) != 20)
    assert not list(find_doubts({"x": x}, None, [("x",)], noise.SwapNoise(), 0.2))


@pytest.mark.parametrize("x", [torch.rand(1, 4), torch.ones(1, 4, dtype=torch.long)], ids=["numbers", "categories"])
def test_a_batch_of_one_row_without_others_to_swap_with_is_noticed(x):
    (doubt,) = find_doubts({"x": x}, {"x": x}, [("x",)], noise.SwapNoise(), 0.2)
    assert doubt.startswith("the input 'x' has one row in the first batch")


@pytest.mark.parametrize(
    ("values", "is_told"),
    [
        (torch.cat([torch.linspace(0, 1, 50), torch.tensor([-1.0, -1.0])]), True),
        (torch.cat([torch.linspace(-3, 3, 50), torch.tensor([-999.0, -999.0])]), True),
        (torch.cat([torch.linspace(0, 1, 50), torch.tensor([-1.0])]), False),  # an outlier
        (torch.cat([torch.linspace(0, 1, 50), torch.tensor([-0.5, -0.5])]), False),
        (torch.tensor([0.0, 1.0, 2.0]).repeat(20), False),  # categories
        (torch.tensor([*torch.linspace(-0.1, 0.1, 30), 1.0, 1.0]), False),  # flags
        (torch.tensor([*torch.linspace(-40, 0, 30), -80.0, -80.0]), False),  # the floor of a spectrogram
    ],
)
def test_a_number_apart_from_all_others_is_taken_for_missing_values(values, is_told):
    assert (missing_doubt("the input", values, "batch[0]") is not None) == is_told


def test_rows_that_are_the_time_and_not_the_samples_are_noticed():
    x, y = torch.randn(20, 6, 8), torch.zeros(6)
    (doubt,) = find_doubts((x, y), None, [(0,)], noise.Gaussian(), 0.2)
    assert doubt.startswith("the input '0' has 20 rows and the target 6, as if the second axis were the samples; for (T, B, C)")
    for batch in ((x.transpose(0, 1), y), (x, torch.zeros(20)), (x, torch.zeros(5)), [x]):
        assert not list(find_doubts(batch, None, [(0,)], noise.Gaussian(), 0.2))


def test_a_square_over_the_channels_of_images_is_noticed():
    (doubt,) = find_doubts([torch.rand(8, 16, 16, 3)], None, [(0,)], noise.PatchGaussian(4), 0.2)
    assert doubt.endswith("for (B, H, W, C) type x.movedim(-1, 1) in the data set or collate_fn")
    assert not list(find_doubts([torch.rand(8, 3, 16, 16)], None, [(0,)], noise.PatchGaussian(4), 0.2))
