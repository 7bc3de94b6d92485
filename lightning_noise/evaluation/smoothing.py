"""Randomized smoothing: the class that a module predicts most often under noise, and the radius in which it is certain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.special import betainc, betaincinv, ndtri
from torch import Tensor, nn

from lightning_noise._checks import check_counts, check_finite, check_numbers
from lightning_noise._tensor import at_least_float32
from lightning_noise._usage import nearest
from lightning_noise.batch import describe
from lightning_noise.loop.snapshot import copy_leaves, find_contents, put, restore_rng
from lightning_noise.noise import Gaussian, Noise, Uniform
from lightning_noise.rng import Key

__all__ = [
    "CERTIFICATES",
    "Certificate",
    "Norm",
    "Smoothed",
    "certify_counts",
    "check_smoothing",
    "lower_bound",
    "predict_counts",
    "smooth",
    "vote",
]

Norm = Literal["l2", "l1"]

# numbers in the copies of a sample that go through a module at once, which fit the cache of a CPU, and the most copies
_AT_ONCE = {"cpu": (2**16, 1024), "cuda": (2**22, 4096)}
_FEWEST = 8  # copies of a large sample


class Certificate(NamedTuple):
    """What noise of a kind certifies.

    Attributes:
        noise: The noise, whose level is sigma.
        draw: Draws the noise at level 1, from a shape.
        radius: Returns the radius from the probability of the class, above 1/2, and sigma.
    """

    noise: Noise
    draw: Callable[..., Tensor]
    radius: Callable[[Any, float], Any]


def _draw_uniform(shape: Sequence[int], **options: Any) -> Tensor:
    return torch.rand(shape, **options).mul_(2).sub_(1)


CERTIFICATES: dict[str, Certificate] = {
    "l2": Certificate(Gaussian(), torch.randn, lambda p, sigma: sigma * ndtri(p)),
    "l1": Certificate(Uniform(), _draw_uniform, lambda p, sigma: 2 * sigma * (p - 0.5)),
}


class Smoothed(nn.Module):
    """A module that predicts under noise, and certifies its predictions; made by :func:`~lightning_noise.smooth`."""

    def __init__(self, module: nn.Module, sigma: float, norm: Norm = "l2"):
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"smooth expects a module, got {describe(module)}; type smooth(module, {sigma!r})")
        self.module = module
        self.sigma = check_smoothing(sigma, norm)
        self.norm: Norm = norm

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:g}, norm={self.norm!r}"

    def forward(self, x: Tensor) -> Tensor:
        """Returns the classes that :meth:`predict` finds with its defaults."""
        return self.predict(x)

    def predict(
        self, x: Tensor, n: int = 100, alpha: float = 0.001, seed: int = 0, *, positions: Sequence[int] | None = None
    ) -> Tensor:
        """Returns the class of each sample, of shape (B,), or -1 for an abstention.

        Args:
            x: The samples, of shape (B, *).
            n: The number of draws.
            alpha: The largest probability that the class is not the most probable class under the noise.
            seed: The seed of the draws.
            positions: The position of each sample in its data set, which its draws depend on. Default: 0 to B - 1.
        """
        check_draws(alpha, n=n, share=2.0)
        counts = self._count(x, seed, positions, predict=n)["predict"]
        return torch.as_tensor(predict_counts(counts, alpha), device=x.device)

    def certify(
        self,
        x: Tensor,
        n0: int = 100,
        n: int = 1000,
        alpha: float = 0.001,
        seed: int = 0,
        *,
        positions: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the class and the certified radius of each sample, both of shape (B,): -1 and 0 for an abstention.

        Args:
            x: The samples, of shape (B, *).
            n0: The number of draws that select the class.
            n: The number of draws that bound its probability.
            alpha: The largest probability that a radius is too large.
            seed: The seed of the draws.
            positions: The position of each sample in its data set, which its draws depend on. Default: 0 to B - 1.
        """
        check_draws(alpha, n0=n0, n=n)
        votes = self._count(x, seed, positions, select=n0, bound=n)
        classes, radii = certify_counts(votes["select"], votes["bound"], n=n, alpha=alpha, sigma=self.sigma, norm=self.norm)
        return torch.as_tensor(classes, device=x.device), torch.as_tensor(radii, dtype=torch.float32, device=x.device)

    def _count(self, x: Tensor, seed: int, positions: Sequence[int] | None, **draws: int) -> dict[str, np.ndarray]:
        """Returns how often each class is predicted for each purpose, from the number of draws, of shape (B, K)."""
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.ndim):
            raise TypeError(f"smoothing adds noise to a floating-point tensor of shape (B, *), got {describe(x)}")
        positions = range(len(x)) if positions is None else positions
        if len(positions) != len(x):
            raise ValueError(f"positions must hold a number for each sample, got {len(positions)} for {describe(x)}")
        rows = [(sample, Key((seed, "smoothing", place))) for sample, place in zip(x, positions, strict=True)]
        with _evaluating(self.module):
            counts = {
                purpose: [self._count_row(sample, n, key / purpose, only_first=purpose == "select") for sample, key in rows]
                for purpose, n in draws.items()
            }
        no_rows = torch.zeros(0, 2)
        return {purpose: (torch.stack(each) if each else no_rows).cpu().numpy() for purpose, each in counts.items()}

    def _count_row(self, sample: Tensor, n: int, key: Key, *, only_first: bool) -> Tensor:
        """Returns how often each class is predicted for n noisy copies of a sample.

        If only the first class matters, the last copies are left out as soon as they cannot change which class is the first.
        """
        generator, draw = key.generator(sample.device), CERTIFICATES[self.norm].draw
        clean, counts, done = at_least_float32(sample), torch.zeros((), dtype=torch.long), 0
        at_once = min(_copies_at_once(sample), n // 2 + 1 if only_first else n)
        while done < n:
            shape = (min(at_once, n - done), *sample.shape)
            noise = draw(shape, generator=generator, dtype=clean.dtype, device=clean.device)
            logits = self._predict(torch.add(clean, noise, alpha=self.sigma, out=noise).to(sample.dtype))
            counts = torch.bincount(vote(logits) + 1, minlength=1 + logits.shape[1])[1:] + counts.to(logits.device)
            done += len(noise)
            if only_first and counts.topk(2).values.diff().item() < done - n:
                break
        return counts

    def _predict(self, x: Tensor) -> Tensor:
        logits = self.module(x)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
            advice = "of one logit z, return torch.cat([-z, z], 1)" if isinstance(logits, Tensor) else "return the logits alone"
            raise ValueError(
                f"smooth expects a module that returns logits of shape (B, K) for K >= 2 classes, got {describe(logits)} for "
                f"{describe(x)}; {advice}"
            )
        return logits


def smooth(module: nn.Module, sigma: float, norm: Norm = "l2") -> Smoothed:
    r"""Returns a module whose predictions are certified to stay the same near each input.

    The smoothed module predicts the class that ``module`` predicts most often if noise is added to the input. If that class has
    a probability of at least :math:`p > 1/2`, no change of the input within a radius changes the prediction:

    .. math:: \lVert \delta \rVert_2 < \sigma \, \Phi^{-1}(p) \quad \text{or} \quad \lVert \delta \rVert_1 < 2 \sigma (p - 1/2)

    The first radius is that of Gaussian noise (``norm="l2"``), the second that of uniform noise (``norm="l1"``).
    ``certify(x, n0=100, n=1000, alpha=0.001, seed=0)`` selects the class by ``n0`` draws and bounds :math:`p` by ``n`` others,
    with the limit of Clopper and Pearson. It returns classes and radii. Each pair is wrong with a probability of at
    most ``alpha``. ``predict(x, n=100, alpha=0.001, seed=0)`` returns the classes alone, by a binomial test. An abstention is
    the class -1, with radius 0.

    The draws of a sample depend on the seed and on its position alone, not on the other samples; give ``positions=`` for the
    later batches of a data set. The module predicts in evaluation mode and without gradients, and many copies of a sample at
    once. Afterward the module is as before. A prediction with NaN votes for no class. ``certify`` costs
    ``n0 + n`` predictions of a sample, and fewer if the last of ``n0`` cannot change the selected class.

    The guarantee assumes exact arithmetic. A module that is designed to exploit rounding errors can break it (Voráček and Hein,
    2023), most of all in half precision.

    Args:
        module: A module that returns logits of shape (B, K). Train it with the same noise, as by
            ``InputNoise(noise.Gaussian(), sigma)``, or the radii are small.
        sigma: The level of the noise in the units of the input: the standard deviation of ``noise.Gaussian()``, or the
            half-width of ``noise.Uniform()``.
        norm: The norm of the changes that are certified: ``"l2"`` or ``"l1"``.

    References:
        Certified Adversarial Robustness via Randomized Smoothing (Cohen et al., 2019), https://arxiv.org/abs/1902.02918

        Randomized Smoothing of All Shapes and Sizes (Yang et al., 2020), https://arxiv.org/abs/2002.08118

        Sound Randomized Smoothing in Floating-Point Arithmetics (Voráček and Hein, 2023), https://arxiv.org/abs/2207.07209

    Example:
        >>> linear = nn.Linear(2, 2, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        >>> classes, radii = smooth(linear, sigma=0.5).certify(torch.tensor([[0.3, 0.4], [-6.0, -8.0]]))
        >>> classes.tolist(), (radii < torch.tensor([0.5, 10.0])).tolist()  # the distances to the boundary
        ([1, 0], [True, True])
    """
    return Smoothed(module, sigma, norm)


def check_smoothing(sigma: float, norm: str) -> float:
    """Returns sigma as a float, or raises an error if sigma or the norm certify nothing."""
    if norm not in CERTIFICATES:
        raise ValueError(f"norm must be 'l2' or 'l1', got {norm!r}; type norm={nearest(norm, CERTIFICATES) or 'l2'!r}")
    check_finite(sigma=sigma)
    if sigma <= 0:
        raise ValueError(f"sigma must be above 0, because without noise nothing is certified, got {sigma}; type sigma=0.25")
    return float(sigma)


def check_draws(alpha: float, *, share: float = 1.0, **counts: int) -> None:
    """Raises an error if alpha is no probability, or even n equal votes would leave a doubt of more than alpha."""
    check_counts(**counts)
    check_numbers(alpha=alpha)
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must be in (0, 0.5), got {alpha}; type alpha=0.001")
    if share * 0.5 ** counts["n"] >= alpha:
        fewest = math.floor(math.log2(share / alpha)) + 1
        raise ValueError(
            f"n={counts['n']} draws are too few for alpha={alpha:g}, and all would be abstentions; type n={fewest}"
        )


def vote(logits: Tensor) -> Tensor:
    """Returns the class of each row of logits of shape (N, K), or -1 if there is NaN among them."""
    largest, classes = logits.max(1)  # NaN is the largest
    return classes.masked_fill(largest.isnan(), -1)


def lower_bound(counts: Any, n: int, alpha: float) -> np.ndarray:
    """Returns a bound that is above the probability of an event with probability ``alpha`` at most (Clopper and Pearson).

    Example:
        >>> lower_bound([0, 500, 1000], n=1000, alpha=0.001).round(3)
        array([0.   , 0.451, 0.993])
    """
    counts = np.asarray(counts)
    return np.where(counts > 0, betaincinv(np.maximum(counts, 1), n - counts + 1, alpha), 0.0)


def predict_counts(counts: np.ndarray, alpha: float) -> np.ndarray:
    """Returns the most frequent of the classes that were counted, of shape (N, K), or -1 if another class may be as frequent.

    Example:
        >>> predict_counts(np.array([[95, 5], [60, 40]]), alpha=0.001)
        array([ 0, -1])
    """
    second, first = np.sort(counts, -1)[..., -2:].T
    p_value = 2 * betainc(np.maximum(first, 1), second + 1, 0.5)  # that a fair coin shows one side so often
    return np.where((first > 0) & (p_value <= alpha), counts.argmax(-1), -1)


def certify_counts(
    selected: np.ndarray, counted: np.ndarray, *, n: int, alpha: float, sigma: float, norm: Norm = "l2"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the class and the certified radius, both of shape (N,): -1 and 0 for an abstention.

    Args:
        selected: How often each class was predicted in the draws that select a class, of shape (N, K).
        counted: The same in the ``n`` other draws.
        n: The number of these draws.
        alpha: The largest probability that a radius is too large.
        sigma: The level of the noise.
        norm: The norm of the radius.

    Example:
        >>> certify_counts(np.array([[9, 1]]), np.array([[990, 10]]), n=1000, alpha=0.001, sigma=0.5)
        (array([0]), array([0.989...]))
    """
    classes = selected.argmax(-1)
    p = lower_bound(np.take_along_axis(counted, classes[:, None], 1)[:, 0], n, alpha)
    is_certain = p > 0.5
    radii = CERTIFICATES[norm].radius(np.where(is_certain, p, 0.5), sigma)
    return np.where(is_certain, classes, -1), radii


def _copies_at_once(sample: Tensor) -> int:
    numbers, most = _AT_ONCE.get(sample.device.type, _AT_ONCE["cuda"])
    return max(_FEWEST, min(most, numbers // max(1, sample.numel())))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Lets the module evaluate without gradients; then puts back what it holds, its mode, and the random streams."""
    before = find_contents([module])
    with restore_rng(), torch.no_grad():
        try:
            put(copy_leaves(before))
            module.eval()
            yield
        finally:
            put(before)
