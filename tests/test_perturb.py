"""A perturbed batch has its noise where it should be, within its bounds, and the user's tensors are as they were."""

from __future__ import annotations

import math

import pytest
import torch
from torch.masked import masked_tensor

from lightning_noise import Key, noise
from lightning_noise.perturb.inputs import perturb_batch, snr_db
from lightning_noise.perturb.outputs import perturb_output

KEY = Key((0, "input", 0, 0), rank=0)


def inputs(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator(torch.get_default_device()).manual_seed(0))


def test_level_0_hands_on_the_batch_itself():
    batch = [inputs(4, 3)]
    assert perturb_batch(batch, [(0,)], noise.Gaussian(), 0.0, KEY, clip=(0.4, 0.5)) is batch


def test_leaves_differ_in_their_draw_and_share_the_choice_of_samples():
    batch = {"a": torch.zeros(200, 5), "b": torch.zeros(200, 5)}
    out = perturb_batch(batch, [("a",), ("b",)], noise.Gaussian(), 1.0, KEY, probability=0.5)
    chosen = {key: value.abs().sum(1) > 0 for key, value in out.items()}
    assert torch.equal(chosen["a"], chosen["b"])
    assert not torch.equal(out["a"], out["b"])


def test_leaves_with_shared_memory_are_separate():
    x = inputs(4, 3)
    batch = [x, x]
    out = perturb_batch(batch, [(0,)], noise.Gaussian(), 1.0, KEY)
    assert out[1] is x
    assert not torch.equal(out[0], x)


def test_the_share_of_noisy_samples_is_the_probability():
    n, p = 4000, 0.3
    out = perturb_batch(torch.zeros(n, 2), [()], noise.Gaussian(), 1.0, KEY, probability=p)
    share = (out.abs().sum(1) > 0).float().mean().item()
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)  # five standard errors


def test_a_sample_that_is_left_out_is_bitwise_what_it_was_also_with_a_clip():
    x = 3 * inputs(100, 4)
    out = perturb_batch(x, [()], noise.Gaussian(), 0.5, KEY, probability=0.5, clip=(0.0, 1.0))
    same = (out == x).all(1)
    assert 20 < same.sum() < 80
    assert out[~same].max() <= 1
    assert x[same].max() > 1


def test_levels_of_samples_are_uniform_up_to_the_level():
    n, d, level = 3000, 200, 0.8
    out = perturb_batch(torch.zeros(n, d), [()], noise.Gaussian(), level, KEY, per_sample=True)
    # the variance over all samples is E[u^2] level^2 = level^2 / 3; its standard error is that of u^2, sqrt(4/45 / n)
    assert abs(out.var().item() / level**2 - 1 / 3) < 5 * math.sqrt((4 / 45 + 2 / d) / n)
    assert out.std(1).max() < level * (1 + 5 / math.sqrt(2 * d))


def test_a_relative_level_is_in_units_of_each_samples_standard_deviation():
    x = torch.stack([torch.linspace(-1, 1, 50_000), 100 + 30 * torch.linspace(-1, 1, 50_000)])
    out = perturb_batch(x, [()], noise.Gaussian(), 0.1, KEY, relative="std")
    ratio = (out - x).std(1) / x.std(1)
    torch.testing.assert_close(ratio, torch.full((2,), 0.1), rtol=5 / math.sqrt(2 * 50_000), atol=0)  # five standard errors


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_a_relative_level_is_that_of_data_of_any_scale(scale, masked):
    x, mask = inputs(5, 40), torch.ones(5, 40, dtype=torch.bool)
    mask[:, 30:] = not masked
    batch = {"x": scale * x, "mask": mask}
    one = perturb_batch(batch, [("x",)], noise.Gaussian(), 0.1, KEY, relative="std", mask="mask")["x"]
    two = perturb_batch({**batch, "x": x}, [("x",)], noise.Gaussian(), 0.1, KEY, relative="std", mask="mask")["x"]
    torch.testing.assert_close(one / scale, two)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_the_ratio_of_data_of_any_scale_is_a_number(scale):
    x = inputs(5, 40)
    assert snr_db([scale * x], [scale * 1.1 * x], [(0,)]).item() == pytest.approx(20, abs=1e-4)


def test_a_relative_level_is_computed_in_the_precision_of_the_input():
    def shift(x, level, *, generator):
        return x + level[:, None]

    x = 1e9 + torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    out = perturb_batch(x, [()], noise.as_noise(shift), 1.0, KEY, relative="std")
    # float64 resolves 1e-7 at 1e9
    torch.testing.assert_close(out - x, x.std(1, correction=0)[:, None].expand(3, 4), rtol=0, atol=1e-6)


def test_a_leaf_of_any_name_has_a_draw_of_its_own():
    out = perturb_batch({"probability": torch.zeros(500, 1)}, [("probability",)], noise.Uniform(), 1.0, KEY, probability=0.5)
    drawn = out["probability"]
    assert (drawn > 0).any()
    assert (drawn < 0).any()


@pytest.mark.parametrize("shape", [(4,), (4, 1), (0, 1), (4, 1, 1)], ids=str)
def test_a_relative_level_needs_samples_of_more_than_one_number(shape):
    with pytest.raises(ValueError, match="samples of more than one number"):
        perturb_batch(inputs(*shape), [()], noise.Gaussian(), 0.1, KEY, relative="std")


@pytest.mark.parametrize(
    ("clip", "low", "high"),
    [
        ((0.0, 1.0), [0.0] * 3, [1.0] * 3),
        ((0.0, None), [0.0] * 3, [math.inf] * 3),
        ((None, 1.0), [-math.inf] * 3, [1.0] * 3),
        (([0.0, -1.0, -2.0], [1.0, 1.5, 2.0]), [0.0, -1.0, -2.0], [1.0, 1.5, 2.0]),
        (([0.0, -1.0, -2.0], None), [0.0, -1.0, -2.0], [math.inf] * 3),
    ],
)
@pytest.mark.parametrize("shape", [(16, 3), (16, 3, 10), (16, 3, 4, 4)])
def test_what_comes_out_is_within_the_clip(clip, low, high, shape):
    out = perturb_batch(inputs(*shape), [()], noise.Gaussian(), 3.0, KEY, clip=clip)
    free = perturb_batch(inputs(*shape), [()], noise.Gaussian(), 3.0, KEY)
    bounds = [torch.tensor(bound).view(-1, *[1] * (len(shape) - 2)) for bound in (low, high)]
    assert torch.equal(out, free.maximum(bounds[0]).minimum(bounds[1]))


def test_bounds_for_another_number_of_channels_are_refused():
    with pytest.raises(ValueError, match=r"clip is given for 2 channels, but the input is of shape \(4, 3, 8\)"):
        perturb_batch(inputs(4, 3, 8), [()], noise.Gaussian(), 1.0, KEY, clip=([0.0, 0.0], None))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_an_input_without_fractions_is_refused_with_the_way_out(dtype):
    with pytest.raises(TypeError, match=r"Gaussian needs floats, but the input 'ids' is \w+ \(4, 3\).*token ids"):
        perturb_batch({"ids": torch.zeros(4, 3, dtype=dtype)}, [("ids",)], noise.Gaussian(), 1.0, KEY)


def test_codes_of_categories_can_be_swapped_and_say_nothing_of_the_signal():
    codes = torch.arange(100).view(50, 2)
    out = perturb_batch([codes], [(0,)], noise.SwapNoise(), 0.5, KEY, probability=0.5, per_sample=True)
    assert out[0].dtype == torch.int64
    assert torch.equal(out[0] % 2, codes % 2)
    assert 0 < (out[0] != codes).sum() < 50
    assert snr_db([codes], out, [(0,)]).isnan()


def test_a_clip_leaves_codes_of_categories_alone():
    batch = {"num": inputs(6, 2), "cat": 16_777_217 + torch.arange(12).view(6, 2)}
    out = perturb_batch(batch, [("num",), ("cat",)], noise.SwapNoise(), 1.0, KEY, clip=(0.3, 0.5))
    assert out["cat"].dtype == torch.int64
    assert set(out["cat"].flatten().tolist()) <= set(batch["cat"].flatten().tolist())
    assert out["num"].min() >= 0.3


@pytest.mark.parametrize(
    "leaf",
    [torch.eye(3).to_sparse(), torch.nested.nested_tensor([torch.rand(2), torch.rand(3)], layout=torch.jagged)],
    ids=["sparse", "jagged"],
)
@pytest.mark.parametrize("member", [noise.Gaussian(), noise.SwapNoise()], ids=repr)
def test_a_leaf_that_is_not_dense_is_refused(leaf, member):
    with pytest.raises(
        TypeError, match=r"noise needs a dense tensor, but the input 'x' is .*; type (x\.to_dense|torch\.nested)"
    ):
        perturb_batch({"x": leaf}, [("x",)], member, 0.1, KEY)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_a_tensor_that_consists_of_other_tensors_is_refused():
    masked, message = masked_tensor(torch.rand(3, 4), torch.rand(3, 4) > 0.5), "a MaskedTensor, which consists of other tensors"
    with pytest.raises(TypeError, match=f"the input 'x' is {message}; type plain tensors and mask=… in the data set"):
        perturb_batch({"x": masked}, [("x",)], noise.Gaussian(), 0.1, KEY)
    with pytest.raises(TypeError, match=f"'inner' returned {message}; type modules=… to select other modules"):
        perturb_output(masked, noise.Gaussian(), 0.1, KEY, module="inner")


class Tagged(torch.Tensor):
    pass


def test_the_subclass_its_attributes_and_requires_grad_come_back():
    x = inputs(4, 3).as_subclass(Tagged)
    x.spacing = (1, 2)  # type: ignore[attr-defined]
    x.requires_grad_()
    out = perturb_batch(x, [()], noise.Gaussian(), 1.0, KEY)
    assert type(out) is Tagged
    assert out.spacing == (1, 2)  # type: ignore[attr-defined]
    assert out.requires_grad
    assert out.is_leaf


def test_a_function_is_a_noise():
    def shift(x, level, *, generator):
        return x + level

    assert torch.equal(perturb_batch([torch.zeros(2, 2)], [(0,)], noise.as_noise(shift), 0.5, KEY)[0], torch.full((2, 2), 0.5))


def test_a_noise_that_takes_a_gradient_does_not_touch_the_batch():
    def adversarial(x, level, *, generator):
        (gradient,) = torch.autograd.grad(x.requires_grad_().square().sum(), x)
        return x.detach() + level * gradient.sign()

    x = torch.ones(4, 3)
    noisy = perturb_batch(x, [()], noise.as_noise(adversarial), 0.5, KEY)
    assert torch.equal(noisy, x + 0.5)
    assert not noisy.requires_grad
    assert not x.requires_grad


def test_the_signal_to_noise_ratio_is_that_of_the_batch():
    x = torch.full((1, 4), 2.0)
    y = x + torch.tensor([0.2, -0.2, 0.2, -0.2])
    assert snr_db([x], [y], [(0,)]).item() == pytest.approx(20, abs=1e-5)  # float32
