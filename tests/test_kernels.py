"""The kernel of a GPU draws Philox's numbers and does what torch does: in Triton's interpreter, or on the GPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_noise import noise, testing
from lightning_noise.noise import draws

DEVICE = torch.get_default_device()
if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a CPU needs Triton's interpreter; type make kernels", allow_module_level=True)
kernels = pytest.importorskip("lightning_noise.noise.kernels", reason="torch for CUDA installs Triton", exc_type=ImportError)

FUSED = [
    noise.Gaussian(),
    noise.Uniform(),
    noise.Speckle(),
    noise.Impulse(),
    noise.Impulse(low=-1.0, high=2.0),
    noise.FeatureDropout(),
    noise.FeatureDropout(rescale=False),
    noise.DropConnect(),
]
N = 100_001


def philox(counters: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 as in its paper, by products of 64 bits: four words for each counter of four words."""
    c0, c1, c2, c3 = counters.astype(np.uint64).T
    k0, k1 = (np.uint64(k) for k in key)
    low, shift = np.uint64(2**32 - 1), np.uint64(32)
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> shift) ^ c1 ^ k0, b & low, (a >> shift) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack([c0, c1, c2, c3], 1)


def words(n: int, seed: int, offset: int) -> np.ndarray:
    """The words of n elements, in the order of the elements."""
    programs = -(-n // (4 * kernels.BLOCK))
    c = np.arange(programs * kernels.BLOCK)
    counters = np.stack([c, c >> 32, np.full_like(c, offset), np.full_like(c, kernels.TAG)], 1)
    found = philox(counters, (seed & 0xFFFFFFFF, seed >> 32))
    return found.reshape(programs, kernels.BLOCK, 4).transpose(0, 2, 1).reshape(-1)[:n]


@pytest.fixture
def fused(monkeypatch):
    """Every draw is that of the kernel, however small; on the CPU, the interpreter runs the kernel."""
    monkeypatch.setattr(draws, "_SMALLEST", 1)
    monkeypatch.setattr(draws, "_DEVICE", DEVICE.type)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(draws, "_kernels", lambda device: kernels)
        monkeypatch.setattr(
            draws, "_reserve", lambda generator: (generator.initial_seed(), int(torch.randint(2**31, (), generator=generator)))
        )


def draw(kind: draws.Draw, n: int, seed: int, offset: int) -> np.ndarray:
    y = torch.empty(n, dtype=torch.int32 if kind == "bits" else torch.float32)
    return draws._launch(kernels, kind, "draw", y, seed, offset).cpu().numpy()


# of counter and key: the file kat_vectors of Random123, by the authors of Philox
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_reference_has_the_answers_of_its_authors(counter, key, expected):
    assert philox(np.array([counter]), key).tolist() == [expected]


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (1, 7), (2**31, 0), (2**63 - 1, 2**31 - 1), (123456789012345, 3)])
@pytest.mark.parametrize("n", [1, 511, 2048, 2049, 10_000])
def test_each_element_has_its_word(n, seed, offset):
    expected = words(n, seed, offset)
    assert (draw("bits", n, seed, offset) == expected >> 1).all()
    assert (draw("uniform", n, seed, offset) == (2.0 * (expected >> 8) - (2**24 - 1)) * 2.0**-24).all()


@pytest.mark.parametrize("member", FUSED, ids=repr)
def test_indices_of_64_bits_change_nothing(member, fused, monkeypatch):
    x, levels = torch.rand(6, 1000, generator=torch.Generator(DEVICE).manual_seed(1)), torch.linspace(0, 0.3, 6)
    narrow = member(x, levels, generator=torch.Generator(DEVICE).manual_seed(0), mask=x < 0.9)
    monkeypatch.setattr(draws, "_NARROW", 0)
    assert torch.equal(member(x, levels, generator=torch.Generator(DEVICE).manual_seed(0), mask=x < 0.9), narrow)


def test_two_words_give_two_normal_numbers():
    n = 50 * 4 * kernels.BLOCK
    pairs = words(n, 5, 2).reshape(-1, 2, 2, kernels.BLOCK).astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log((pairs[:, :, 0] + 0.5) * 2.0**-32)), 2 * math.pi * pairs[:, :, 1] * 2.0**-32
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 2).reshape(-1)
    # a radius near 0 is the root of twice the distance of a float32 from 1, which is rounded to 2^-24: 3.5e-4 of radius. The
    # others are at most 6.7, and lose at most ten times the 2^-24 of float32: 4e-6
    error = np.abs(draw("normal", n, 5, 2) - expected)
    assert error.max() < 4e-4
    assert np.quantile(error, 0.99) < 4e-6


def test_the_numbers_have_their_distribution():
    drawn = draw("normal", N, 0, 0), draw("uniform", N, 0, 0), draw("bits", N, 0, 0) * 2.0**-31
    for values, law in zip(drawn, (stats.norm(), stats.uniform(-1, 2), stats.uniform()), strict=True):
        assert stats.kstest(values, law.cdf).pvalue > 5.7e-7  # five standard errors of a normal variable


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("law", testing.NOISE_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("member", FUSED, ids=repr)
def test_a_fused_noise_keeps_the_law(member, law, fused):
    law(member)


@pytest.mark.parametrize("levels", [0.3, torch.linspace(0, 0.3, 6)], ids=["a level", "levels"])
@pytest.mark.parametrize("member", FUSED, ids=repr)
def test_a_fused_noise_is_that_of_torch_with_the_same_numbers(member, levels, fused):
    x = torch.rand(6, 3, 20, 20, generator=torch.Generator(DEVICE).manual_seed(1)) - 0.5
    x[1, 0, 0, 0] = math.nan
    holes = torch.rand(x.shape, generator=torch.Generator(DEVICE).manual_seed(2)) < 0.7
    for mask in (None, holes):
        one, two = (
            member(each, levels, generator=torch.Generator(DEVICE).manual_seed(0), mask=mask)
            for each in (x, x.clone().requires_grad_())
        )
        # the interpreter and torch.addcmul before 2.11 round the product of a sum: the last bit of a number below 2
        rounds = DEVICE.type == "cpu" or torch.__version__ < "2.11"
        atol = 2**-23 if rounds and isinstance(member, noise.Gaussian | noise.Uniform) else 0.0
        torch.testing.assert_close(one, two.detach(), rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("member", [each for each in FUSED if each != noise.Impulse()], ids=repr)
def test_a_sample_may_be_an_element(member, fused):
    x, levels = torch.rand(100, generator=torch.Generator(DEVICE).manual_seed(1)), torch.linspace(0, 0.5, 100)
    flat, column = (member(each, levels, generator=torch.Generator(DEVICE).manual_seed(0)) for each in (x, x[:, None]))
    assert torch.equal(flat, column[:, 0])
    alone = member(x, 0.5, generator=torch.Generator(DEVICE).manual_seed(0))
    assert flat[0] == x[0]
    assert flat[-1] == alone[-1]


@pytest.mark.parametrize("member", [noise.Gaussian(), noise.Uniform()], ids=repr)
def test_a_level_that_is_expanded_stays_a_number(member, fused, monkeypatch):
    taken, launch = [], draws._launch
    monkeypatch.setattr(draws, "_launch", lambda *operands: taken.append(operands[8].numel()) or launch(*operands))
    x, levels = torch.zeros(5000), torch.tensor([0.3]).expand(5000)
    one, two = (member(x, level, generator=torch.Generator(DEVICE).manual_seed(0)) for level in (0.3, levels))
    assert torch.equal(one, two)
    assert taken == [1, 1]


@pytest.mark.parametrize("member", FUSED, ids=repr)
@pytest.mark.parametrize(("n", "shape"), [(3, (1, 3, 1)), (1, (3, 1, 1)), (2, (3, 1, 1)), (4, (3, 1, 1))])
def test_levels_that_are_not_those_of_the_rows_are_refused(member, n, shape, fused):
    with pytest.raises(RuntimeError, match="expanded size"):
        member.perturb(torch.rand(n, 3, 5), torch.rand(shape), torch.Generator(DEVICE), None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("member", FUSED, ids=repr)
def test_half_precision_is_rounded_once(member, dtype, fused):
    x = torch.rand(6, 3, 20, 20, generator=torch.Generator(DEVICE).manual_seed(1)).to(dtype)
    half, full = (member.perturb(each, 0.3, torch.Generator(DEVICE).manual_seed(0), None) for each in (x, x.float()))
    assert half.dtype == dtype
    # the interpreter rounds bfloat16 toward zero
    exact = DEVICE.type != "cpu" or dtype == torch.float16
    torch.testing.assert_close(half, full.to(dtype), rtol=0 if exact else 2**-7, atol=0)


@pytest.mark.parametrize("member", FUSED, ids=repr)
def test_torch_draws_within_torch_func(member, fused, monkeypatch):
    constant, x = torch.rand(2, 6, 100, generator=torch.Generator(DEVICE).manual_seed(1))

    def loss(x):  # the constant belongs to no transform, but the memory of its noise does
        one, two = (member(each, 0.3, generator=torch.Generator(DEVICE).manual_seed(0)) for each in (constant, x))
        return (one * two).sum()

    gradient = torch.func.grad(loss)(x)
    monkeypatch.setattr(draws, "_SMALLEST", math.inf)
    assert torch.equal(gradient, torch.autograd.grad(loss(x.requires_grad_()), x)[0])


@pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")
def test_compiled_code_draws_anew_for_each_seed(fused):
    member, x = noise.Gaussian(), torch.zeros(100)

    def perturb(seed):
        return member(x, 0.3, generator=torch.Generator(DEVICE).manual_seed(seed))

    compiled = torch.compile(perturb, backend="eager")
    for seed in (0, 2**62, 2**62 + 1):
        assert torch.equal(compiled(seed), perturb(seed))


class Subclass(torch.Tensor):
    pass


def test_only_large_plain_tensors_of_a_gpu_are_fused(monkeypatch):
    monkeypatch.setattr(draws, "_kernels", lambda device: kernels)
    x = torch.zeros(2**16)
    assert draws.is_fused(x, 0.1) == (DEVICE.type != "cpu")
    monkeypatch.setattr(draws, "_DEVICE", DEVICE.type)
    assert draws.is_fused(x, 0.1)
    others = x[1:], x.double(), x.to(torch.complex64), x.int(), x.clone().requires_grad_(), x.as_subclass(Subclass)
    assert not any(draws.is_fused(other, 0.1) for other in others)
    assert not draws.is_fused(x, torch.tensor(0.1, requires_grad=True))


def test_a_generator_of_another_device_is_refused():
    with pytest.raises(ValueError, match=r"got cpu; type torch\.Generator\(x\.device\)"):
        draws._reserve(torch.Generator("cpu"))


@pytest.fixture
def capable(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_the_kernel_is_used_if_it_draws_the_known_numbers(capable):
    known = words(4 * kernels.BLOCK + 1, *draws._PROBE)[:: kernels.BLOCK] >> 1
    assert known.tolist() == draws._KNOWN
    assert draws._kernels.__wrapped__(DEVICE) is kernels


class Failing:
    def __init__(self, error):
        self.error = error

    def __getitem__(self, grid):
        raise self.error


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TAG", 1, r"got \["),
        ("perturb", Failing(RuntimeError("Failed to find C compiler")), "got RuntimeError: Failed to find C compiler; if"),
        (
            "perturb",
            Failing(PermissionError(13, "Permission denied", "/home/.triton")),
            "denied: '/home/.triton'; .* TRITON_CACHE",
        ),
    ],
)
def test_torch_draws_if_the_kernel_draws_other_numbers_or_fails(name, value, message, capable, monkeypatch):
    monkeypatch.setattr(kernels, name, value)
    with pytest.warns(UserWarning, match=f"torch draws the noise.*{message}"):
        assert draws._kernels.__wrapped__(DEVICE) is None


def test_an_old_gpu_has_no_kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert draws._kernels.__wrapped__(DEVICE) is None


@pytest.mark.slow
def test_the_kernel_compiles_for_gpus_without_spills_and_reads_vectors(tmp_path):
    script = Path(__file__).parent / "scripts/compiled_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(script), "80", "90"]
    printed = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    variants = [json.loads(line) for line in printed.splitlines()]
    assert len(variants) == 2 * 23
    for found in variants:
        assert found["spills"] == 0, found
        assert found["vector loads"] == (0 if found["variant"][2] == "draw" else 4), found
        # an H100 executes about 100 operations in the time in which it copies an element
        assert found["operations"] <= 100, found
