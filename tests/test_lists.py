"""A list of samples, such as images of different sizes, has a draw, a choice and a level for each sample."""

from __future__ import annotations

import warnings
from collections import UserList
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import keys_of, make_trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_noise import InputNoise, Key, Mixup, ReplayMonitor, RobustnessMonitor, noise, suggest_level
from lightning_noise.batch import find_inputs, get, holds_samples
from lightning_noise.perturb.inputs import perturb_batch, snr_db

KEY = Key((0, "input", 0, 0), rank=0)
MEMBERS = [noise.Gaussian(), noise.Uniform(), noise.Masking(), noise.PatchGaussian(size=5), noise.Impulse(), noise.SNR()]


def images(n: int, low: int = 16) -> list[Tensor]:
    return [torch.rand(3, low + i, 20, generator=torch.Generator().manual_seed(i)) for i in range(n)]


def series(*lengths: int) -> list[Tensor]:
    return [torch.rand(n, 2) for n in lengths]


def boxes(n: int) -> list[dict[str, Tensor]]:
    return [{"boxes": torch.rand(i % 3 + 1, 4), "labels": torch.ones(i % 3 + 1, dtype=torch.long)} for i in range(n)]


B = 16
VIEWS = [torch.rand(B, 5), torch.rand(B, 5)]
LABELS = torch.zeros(B)
CROPS = [torch.rand(B, 3, 24, 24), torch.rand(B, 3, 9, 9), torch.rand(B, 3, 9, 9)]
# a batch, the path of a list, the path within its elements, and whether the elements are samples
LISTS: dict[str, tuple[Any, tuple, tuple, bool | None]] = {
    "images and targets": ((images(8), boxes(8)), (0,), (), True),
    "one image and its target": ((images(1), boxes(1)), (0,), (), True),
    "images and labels": ((images(8), torch.zeros(8)), (0,), (), True),
    "three images and three labels": ((images(3), torch.zeros(3)), (0,), (), True),
    "images by name": ({"images": images(8), "targets": boxes(8)}, ("images",), (), True),
    "images alone": (images(8), (), (), True),
    "images and names": ({"x": images(2), "file": ["a", "b"]}, ("x",), (), True),
    "series and labels": ((series(5, 9, 7), torch.zeros(3)), (0,), (), True),
    "series and labels of each step": ((series(5, 9, 7), [torch.zeros(n) for n in (5, 9, 7)]), (0,), (), True),
    "pairs of image and label": ([(image, 1) for image in images(4)], (), (0,), True),
    "dictionaries of images": ([{"image": image, "id": "a"} for image in images(4)], (), ("image",), True),
    "pairs of image and boxes": (list(zip(images(4), boxes(4), strict=True)), (), (0,), True),
    "views": ((VIEWS, LABELS), (0,), (), False),
    "views of the last two rows": (([view[:2] for view in VIEWS], LABELS[:2]), (0,), (), False),
    "views by name": ({"views": VIEWS, "y": LABELS}, ("views",), (), False),
    "views for two heads": ((VIEWS, [LABELS, LABELS]), (0,), (), False),
    "views with names": ((VIEWS, LABELS, {"file": ["a"] * B}), (0,), (), False),
    "crops of several sizes": (CROPS, (), (), False),
    "input and target": ([VIEWS[0], LABELS], (), (), False),
    "two loaders": ([(torch.rand(9, 5), torch.zeros(9)), (torch.rand(4, 5), torch.zeros(4))], (), (0,), False),
    "a loader that has ended": ([VIEWS[0], None], (), (), False),
    "one dictionary of an image": ([{"image": images(1)[0], "id": "a"}], (), ("image",), True),
    "series alone": (series(5, 9), (), (), None),
    "views alone": (VIEWS, (), (), None),
    "one dictionary": ([{"x": torch.rand(B, 5), "name": "train"}], (), ("x",), None),
    "two loaders without labels": ([[torch.rand(9, 5)], [torch.rand(4, 5)]], (), (0,), None),
}


@pytest.mark.parametrize(("batch", "path", "rest", "expected"), LISTS.values(), ids=LISTS)
def test_samples_are_told_from_inputs_by_the_rest_of_the_batch(batch, path, rest, expected):
    if None not in get(batch, path):
        assert holds_samples(batch, path, rest) is expected
    selector = ".".join(map(str, (*path, "*", *rest)))
    if expected is None:
        with pytest.raises(ValueError, match=r"may be a list of samples or several inputs; type inputs='"):
            find_inputs(batch, selector)
    else:
        paths = find_inputs(batch, selector, absent=True)
        assert (paths == [(*path, "*", *rest)]) is expected
        assert all(isinstance(get(batch, found), list if expected else Tensor) for found in paths)


def test_what_cannot_be_known_can_be_said():
    batch = series(5, 9)
    assert find_inputs(batch, "") == [("*",)]
    assert find_inputs(batch, ["0", "1"]) == [(0,), (1,)]
    assert find_inputs({"x": batch}, "x") == [("x", "*")]
    with pytest.raises(ValueError, match=r"inputs=0 is a list of inputs with a row for each sample; type inputs='0\.\*'"):
        find_inputs((VIEWS, LABELS), 0)


@pytest.mark.parametrize(
    ("batch", "path"),
    [
        ((images(4), boxes(4)), (0, "*")),
        ({"images": images(4), "targets": boxes(4)}, ("images", "*")),
        ([{"image": image, "id": "a"} for image in images(4)], ("*", "image")),
        ({"images": UserList(images(4)), "y": torch.zeros(4, dtype=torch.long)}, ("images", "*")),
    ],
)
def test_the_images_are_the_input_if_none_is_said(batch, path):
    assert find_inputs(batch) == [path]


@pytest.mark.parametrize("member", MEMBERS, ids=repr)
@pytest.mark.parametrize("options", [{}, {"per_sample": True, "probability": 0.5}, {"clip": ([0.2] * 3, 0.8)}], ids=str)
def test_each_image_is_perturbed_as_one_sample(member, options):
    batch = (images(6), boxes(6))
    out = perturb_batch(batch, [(0, "*")], member, 0.5, KEY, **options)
    assert out[1] is batch[1]
    assert [y.shape for y in out[0]] == [x.shape for x in batch[0]]
    assert perturb_batch(batch, [(0, "*")], member, 0.0, KEY, **options) is batch
    for x, image in zip(batch[0], images(6), strict=True):
        assert torch.equal(x, image), "the batch itself does not change"


def test_the_channels_of_an_image_share_box_choice_and_level():
    ones = ([torch.ones_like(x) for x in images(64)], boxes(64))
    masked = perturb_batch(ones, [(0, "*")], noise.Masking(), 0.25, KEY)[0]
    assert all((y[:1] == y).all() for y in masked)
    assert abs(sum((y == 0).float().mean().item() for y in masked) / 64 - 0.25) < 1e-2
    chosen = perturb_batch(ones, [(0, "*")], noise.Gaussian(), 0.5, KEY, probability=0.5)[0]
    assert 16 < sum((y != 1).any().item() for y in chosen) < 48
    assert all((y != 1).flatten(1).any(1).all() or (y == 1).all() for y in chosen)
    levels = torch.stack(
        [y.flatten(1).std(1) for y in perturb_batch(ones, [(0, "*")], noise.Gaussian(), 1.0, KEY, per_sample=True)[0]]
    )
    assert (levels.amax(1) / levels.amin(1)).max() < 1.5
    assert levels.mean(1).max() > 3 * levels.mean(1).min()


def test_deviation_bounds_and_ratio_are_those_of_each_image():
    batch = [torch.stack([torch.rand(8, 9 + i), 100 * torch.rand(8, 9 + i)]) for i in range(5)]
    paths = [("*",)]
    noisy = perturb_batch(batch, paths, noise.Uniform(), 0.1, KEY, relative="std")
    for x, y in zip(batch, noisy, strict=True):
        assert 0.09 < (y - x).abs().max() / x.std(correction=0) <= 0.1
    clipped = perturb_batch(batch, paths, noise.Gaussian(), 9.0, KEY, clip=([0.0, 0.0], [1.0, 100.0]))
    assert all(y.min() >= 0 and y[0].max() <= 1 < y[1].max() <= 100 for y in clipped)
    power, error = (
        torch.stack([part.square().sum() for part in parts]).sum()
        for parts in (batch, [y - x for x, y in zip(batch, noisy, strict=True)])
    )
    torch.testing.assert_close(snr_db(batch, noisy, paths), 10 * torch.log10(power / error))


@pytest.mark.parametrize("member", MEMBERS, ids=repr)
def test_the_noise_of_a_held_out_image_depends_on_its_position_alone(member):
    data = images(12)
    whole = perturb_batch([data], [(0, "*")], member, 0.3, Key(("probe",), positions=range(12)), probability=0.7)
    for size, ranks in ((4, 1), (1, 1), (3, 2)):
        for rank in range(ranks):
            mine = range(rank, 12, ranks)
            for start in range(0, len(mine), size):
                positions = mine[start : start + size]
                key = Key(("probe",), positions=positions)
                part = perturb_batch([[data[i] for i in positions]], [(0, "*")], member, 0.3, key, probability=0.7)
                for i, y in zip(positions, part[0], strict=True):
                    assert torch.equal(y, whole[0][i])


def collate(rows: list[Any]) -> Any:
    return tuple(zip(*rows, strict=True))


DATA: Any = list(zip(images(12), boxes(12), strict=True))


class Detector(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Conv2d(3, 2, 3)
        self.seen: list[Any] = []

    def forward(self, images):
        return torch.stack([self.net(image[None]).mean((0, 2, 3)) for image in images])

    def training_step(self, batch, batch_idx):
        self.seen += [image.detach() for image in batch[0]]
        return self(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("v", self(batch[0]).mean(), batch_size=len(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def held_out(batch_size: int, monitor: pl.Callback, collate_fn: Any = collate) -> dict[str, float]:
    pl.seed_everything(0, verbose=False)
    trainer = make_trainer([monitor])
    trainer.validate(Detector(), DataLoader(DATA, batch_size, collate_fn=collate_fn), verbose=False)
    return keys_of(trainer)


@pytest.mark.parametrize("inputs", [None, "0.*", 0])
def test_detection_trains_and_is_replayed_alike_for_any_batch_size(inputs):
    module = Detector()
    data = DataLoader(DATA, 5, collate_fn=collate)
    make_trainer([InputNoise(noise.Masking(), 0.25, inputs=inputs)], max_epochs=1).fit(module, data, data)
    masks = [image == 0 for image in module.seen]
    assert all(torch.equal(mask[0], mask[1]) for mask in masks)
    assert sum(mask.any().item() for mask in masks) == len(DATA)
    values = [held_out(size, ReplayMonitor(noise.Gaussian(), [0.5], inputs=inputs)) for size in (12, 5, 1)]
    key = "replay/gaussian/0.5/v"
    assert values[0][key] != values[0]["v"]
    assert values[1][key] == pytest.approx(values[0][key], abs=1e-6)
    assert values[2][key] == pytest.approx(values[0][key], abs=1e-6)


def test_images_of_different_sizes_are_classified_under_noise():
    def labelled(rows):
        return [image for image, _ in rows], torch.tensor([len(target["boxes"]) % 2 for _, target in rows])

    values = [held_out(size, RobustnessMonitor(noise.Gaussian(), [0.5]), labelled) for size in (12, 5)]
    assert values[0]["robustness/loss_noisy"] != values[0]["robustness/loss_clean"]
    assert values[1]["robustness/loss_noisy"] == pytest.approx(values[0]["robustness/loss_noisy"], abs=1e-6)


def test_a_list_of_images_has_a_report_and_a_suggested_level(tmp_path):
    def labelled(rows):
        return [image for image, _ in rows], torch.tensor([len(target["boxes"]) % 2 for _, target in rows])

    data = DataLoader(DATA, 5, collate_fn=labelled)
    monitor = RobustnessMonitor(noise.Gaussian(), [0.5])
    trainer = make_trainer([monitor], logger=TensorBoardLogger(tmp_path))
    trainer.validate(Detector(), data, verbose=False)
    assert monitor.report is not None
    result = suggest_level(make_trainer(), Detector(), noise.Gaussian(), flip_rate=0.4, dataloaders=data, levels=[0.01, 100.0])
    assert result.n == len(DATA)


def test_a_list_cannot_be_mixed():
    data = DataLoader(DATA, 4, collate_fn=lambda rows: ([image for image, _ in rows], torch.zeros(4)))
    with pytest.raises(TypeError, match=r"Mixup needs one tensor, but the input '0\.\*' is a list of 4 samples"):
        make_trainer([Mixup(0.4, inputs="0.*", target=1)], max_epochs=1).fit(Detector(), data, data)


def test_a_bare_list_of_images_whose_first_alone_would_be_the_input_is_noticed():
    class Images(Detector):
        def training_step(self, batch, batch_idx):
            return self(batch).square().mean()

        def validation_step(self, batch, batch_idx):
            pass

    def fit(inputs):
        data = DataLoader(images(8), 4, collate_fn=list)  # type: ignore[arg-type]
        make_trainer([InputNoise(noise.Gaussian(), 0.1, inputs=inputs)], max_epochs=1).fit(Images(), data, data)

    with pytest.warns(UserWarning, match='a sequence of 4 images, and only the first is the input; .* type inputs=""'):
        fit(None)
    fit("")


@pytest.mark.parametrize("mask", ["masks.*", "masks", lambda batch: batch["masks"]], ids=["leaves", "a list", "a function"])
def test_the_mask_of_an_image_may_be_in_a_list(mask):
    batch = {"x": images(3), "masks": [torch.zeros_like(x) for x in images(3)], "y": torch.zeros(3)}
    for each in batch["masks"]:
        each[:, 4:] = 1
    out = perturb_batch(batch, [("x", "*")], noise.Gaussian(), 0.5, KEY, mask=mask, clip=(0.9, 2.0))
    for x, y in zip(batch["x"], out["x"], strict=True):
        assert torch.equal(y[:, :4], x[:, :4])
        assert (y[:, 4:] != x[:, 4:]).all()


def test_each_image_needs_a_mask():
    batch = {"x": images(3), "masks": [torch.ones_like(x) for x in images(2)], "y": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"a mask for each of the 3 samples of 'x\.\*', got 2"):
        perturb_batch(batch, [("x", "*")], noise.Gaussian(), 0.5, KEY, mask="masks")


def test_a_list_has_no_other_rows_to_swap():
    with pytest.raises(TypeError, match=r"SwapNoise takes values of other rows .* is a list of 3 samples; stack them"):
        perturb_batch({"x": images(3)}, [("x", "*")], noise.SwapNoise(), 0.5, KEY)


def test_a_nested_tensor_may_lie_beside_a_list():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(5)])  # of this layout, without a shape
    batch = {"x": series(4, 7), "n": nested, "y": torch.zeros(2)}
    assert find_inputs(batch, "x") == [("x", "*")]
    with pytest.raises(ValueError, match="'n' float32 nested"):
        find_inputs(batch, "z")


def test_lists_of_masks_and_targets_are_no_inputs_by_default():
    images = [torch.rand(3, 8 + i, 8) for i in range(2)]
    batch = {"images": images, "masks": [image[0] for image in images], "targets": [torch.rand(4), torch.rand(4)]}
    assert find_inputs(batch) == [("images", "*")]
