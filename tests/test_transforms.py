"""Transforms of other packages are keyed, and leave the global random streams alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import Rows, fit, keys_of, loader
from members import jitter
from torch import Tensor

from lightning_noise import ActivationNoise, InputNoise, ReplayMonitor, RobustnessMonitor, noise
from lightning_noise.testing import check_noise, global_streams


def faint(pixels: np.ndarray, level: float) -> np.ndarray:
    """A function of pixels that draws from NumPy, as the corruptions of a benchmark do."""
    assert pixels.dtype == np.uint8
    return (pixels * (1 - level * np.random.uniform(size=(*pixels.shape[:2], 1)))).astype(np.uint8)


def test_a_function_of_pixels_sees_and_returns_images(generator):
    seen: list[np.ndarray] = []

    def halved(pixels: np.ndarray, level: float) -> np.ndarray:
        seen.append(pixels)
        return pixels // 2

    x = torch.rand(2, 3, 5, 7)
    y = noise.Transform(halved, pixels=True)(x, 1.0, generator=generator)
    assert [pixels.shape for pixels in seen] == [(5, 7, 3)] * 3  # the first is repeated
    bytes_ = (255 * x).round()
    assert torch.equal(torch.from_numpy(np.stack(seen[:2])).to(x).movedim(-1, 1), bytes_)
    torch.testing.assert_close(y, (bytes_ // 2) / 255)


def test_an_image_may_lose_its_only_channel_as_in_opencv(generator):
    y = noise.Transform(lambda pixels, level: pixels[..., 0], pixels=True)(torch.ones(2, 1, 5, 7), 1.0, generator=generator)
    assert torch.equal(y, torch.ones(2, 1, 5, 7))


def test_the_laws_hold_for_pixels():
    check_noise(noise.Transform(faint, pixels=True))


def test_draws_that_are_not_keyed_are_refused(generator):
    own = np.random.default_rng(0)
    unkeyed = noise.Transform(lambda sample, level: sample + level * own.normal())
    keyed = noise.Transform(lambda sample, level: sample + np.random.default_rng(int(torch.randint(2**31, ()))).normal())
    x = torch.ones(3, 4)
    before = global_streams()
    for levels in (0.5, torch.tensor([0.0, 0.0, 0.5])):
        with pytest.raises(ValueError, match=r"two calls from one seed differ; .* transform.set_random_seed\(torch.randint\("):
            unkeyed(x, levels, generator=generator)
        assert keyed(x, levels, generator=generator).shape == x.shape
    assert torch.equal(unkeyed(x, torch.zeros(3), generator=generator), x)
    assert global_streams() == before


def test_a_transform_is_repeated_once_to_find_out(generator):
    calls: list[float] = []
    counted = noise.Transform(lambda sample, level: calls.append(level) or sample)
    for _ in range(3):
        counted(torch.ones(2, 4), 0.5, generator=generator)
    assert len(calls) == 7


def test_the_streams_continue_after_an_exception(generator):
    def fails(sample: Tensor, level: float) -> Tensor:
        jitter(sample, level)
        raise RuntimeError("stop")

    before = global_streams()
    with pytest.raises(RuntimeError, match="stop"):
        noise.Transform(fails)(torch.zeros(2, 3), 0.5, generator=generator)
    assert global_streams() == before


@pytest.mark.parametrize(
    ("function", "advice"),
    [
        (lambda sample, level: sample[None], "let it return the first element"),
        (lambda sample, level: sample.numpy(), "type pixels=True"),
    ],
)
def test_a_result_of_another_shape_is_refused(function, advice, generator):
    with pytest.raises(ValueError, match=f"must return a tensor of the shape of its sample, .* {advice}"):
        noise.Transform(function)(torch.zeros(2, 3), 0.5, generator=generator)


def test_a_result_of_another_scale_is_refused(generator):
    with pytest.raises(ValueError, match=r"must return floats .*, got uint8 \(3,\); .* let it return found / 255"):
        noise.Transform(lambda sample, level: (255 * sample).byte())(torch.zeros(2, 3), 0.5, generator=generator)
    with pytest.raises(ValueError, match=r"an array of dtype uint8, got float64; .* return \(255 \* found\)\.round\(\)"):
        noise.Transform(lambda pixels, level: pixels / 255, pixels=True)(torch.zeros(2, 1, 4, 4), 0.5, generator=generator)


def test_pixels_have_no_gradient_and_no_place_in_a_module():
    unchanged = noise.Transform(lambda pixels, level: pixels, pixels=True)
    for each in (unchanged, noise.Compose([noise.Gaussian(), unchanged])):
        with pytest.raises(ValueError, match="cuts the gradient, so earlier layers would not learn"):
            ActivationNoise(each, 0.1, "net")


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"type noise.Transform\(lambda sample, level: …, levels=\[1.0\]\)"):
        noise.Transform(torch.nn.Dropout, levels=[1.0])
    with pytest.raises(TypeError, match=r"got <lambda>\(x\); type .* levels=\[1.0, 2.0\]\)"):
        noise.Transform(lambda x: x, levels=np.array([1.0, 2.0]))  # type: ignore[arg-type]
    for level, advice in ((0.5, "0.5"), (torch.tensor(0.5), "0.5"), (None, "0.1")):
        with pytest.raises(TypeError, match=rf"levels must be a list of numbers, got .*; type levels=\[{advice}\]"):
            noise.Transform(jitter, levels=level)  # type: ignore[arg-type]


class Images(Rows):
    def __init__(self, n: int = 13):
        super().__init__(n, (1, 4, 2), seed=1)
        self.x = self.x.sigmoid()


def test_a_transform_is_trained_with_and_monitored_for_any_batch_size():
    found = []
    for size in (13, 4):
        probe = {"faint": noise.Transform(faint, levels=[0.2, 0.8], pixels=True)}
        callbacks = [InputNoise(noise.Transform(jitter), 0.1), RobustnessMonitor(probe), ReplayMonitor(probe)]
        _, trainer = fit(callbacks, train=loader(Images(24)), validation=loader(Images(), size), max_epochs=1)
        found.append({key: value for key, value in keys_of(trainer).items() if key.startswith(("robustness", "replay"))})
    assert found[0]["robustness_levels/faint/0.8/loss"] != found[0]["robustness_levels/faint/0.2/loss"]
    assert found[0] == pytest.approx(found[1], abs=1e-6, nan_ok=True)
