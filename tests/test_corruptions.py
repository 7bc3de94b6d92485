"""The corruptions of a benchmark are noises of the monitors, and their mCE is the published one."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from helpers import Classifier, Rows, fit, loader, make_trainer

from lightning_noise import InputNoise, RobustnessMonitor, corruptions, report
from lightning_noise.corruptions import ALEXNET_ERRORS, imagenet_c, imagenet_c_mce
from lightning_noise.evaluation.conditions import Condition
from lightning_noise.testing import global_streams


def corrupt(pixels: np.ndarray, severity: int, corruption_name: str) -> np.ndarray:
    """Stands in for imagecorruptions: draws from NumPy, and returns a color image."""
    drawn = np.random.uniform(size=pixels.shape[:2])[..., None]
    return (pixels * (1 - severity * drawn / 10)).astype(np.uint8).repeat(3 // pixels.shape[-1], -1)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = SimpleNamespace(gaussian=None, np=np)
    monkeypatch.setitem(sys.modules, "imagecorruptions", SimpleNamespace(corrupt=corrupt))
    monkeypatch.setitem(sys.modules, "imagecorruptions.corruptions", functions)


class Images(Rows):
    def __init__(self, n: int = 24):
        super().__init__(n, (1, 4, 2))
        self.x = self.x.sigmoid()


@pytest.mark.slow
@pytest.mark.usefixtures("package")
def test_a_monitor_logs_all_families_and_the_mce_of_a_baseline(tmp_path):
    first = RobustnessMonitor(imagenet_c())
    pl.seed_everything(0, verbose=False)
    module = Classifier()
    make_trainer([first]).validate(module, loader(Images(4)), verbose=False)
    assert first.report is not None
    assert first.report.levels == dict.fromkeys(ALEXNET_ERRORS, (1, 2, 3, 4, 5))
    values = first.report.values
    errors = {
        family: np.mean([1 - values[Condition(family, severity), "accuracy"] for severity in range(1, 6)])
        for family in ALEXNET_ERRORS
    }
    expected = np.mean([errors[family] / error for family, error in ALEXNET_ERRORS.items()])
    assert imagenet_c_mce(first.report) == pytest.approx(expected)
    report.write(tmp_path, first.report)
    trainer = make_trainer([RobustnessMonitor(imagenet_c(), baseline=tmp_path)])
    trainer.validate(module, loader(Images(4)), verbose=False)
    assert trainer.callback_metrics["robustness/mce"] == 1, "the same model"


@pytest.mark.usefixtures("package")
def test_a_family_trains_a_model_at_a_severity():
    fit([InputNoise(imagenet_c()["fog"], 3)], train=loader(Images()), max_epochs=1)
    with pytest.raises(ValueError, match=r"the severity of fog must be 1, 2, 3, 4 or 5, got 2\.5"):
        fit([InputNoise(imagenet_c()["fog"], 2.5)], train=loader(Images()), max_epochs=1)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(("severity", "share"), [(1, 0.03), (5, 0.27)])
def test_salt_and_pepper_has_the_share_of_the_benchmark(severity, share, generator):
    y = imagenet_c()["impulse_noise"](torch.full((1, 3, 200, 200), 0.5), severity, generator=generator)
    for value in (0.0, 1.0):
        # five standard errors
        assert (y == value).double().mean().item() == pytest.approx(share / 2, abs=5 * (share / 2 / y.numel()) ** 0.5)


@pytest.mark.usefixtures("package")
def test_a_report_without_a_family_has_no_mce():
    monitor = RobustnessMonitor({"fog": imagenet_c()["fog"]})
    fit([monitor], train=loader(Images()), validation=loader(Images(13)), max_epochs=1)
    with pytest.raises(ValueError, match=r"no accuracy at the severities 1 to 5 of \['gaussian_noise', "):
        imagenet_c_mce(monitor.report)  # type: ignore[arg-type]


def test_without_the_package_the_error_says_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ImportError, match='type pip install imagecorruptions "setuptools<81"'):
        corruptions.imagenet_c()


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_the_families_of_the_package_are_keyed(channels):
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    x = torch.rand(2, channels, 40, 48, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    before = global_streams()
    for family, value in imagenet_c().items():
        for severity in (1, 5):
            one, two = (value(x, severity, generator=torch.Generator("cpu").manual_seed(1)) for _ in range(2))
            assert torch.equal(one, two), family
            assert not torch.equal(one, x), family
            assert one.shape == x.shape
    assert global_streams() == before
