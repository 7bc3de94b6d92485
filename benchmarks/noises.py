"""Each noise of a batch of images, beside torch by hand and beside peers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.peers import LEVEL
from benchmarks.tables import Table
from benchmarks.timing import Bench, ratios, spread
from lightning_noise import Key, Mixup, noise
from lightning_noise.loop.perturbation import Context

WITH_ARGUMENTS = [
    noise.Impulse(low=0.0, high=1.0),
    noise.PatchGaussian(size=25),
    noise.Recorded(torch.arange(80_000.0).sin().view(8, 10_000)),
    noise.AnalogWeights(time=86_400.0),
    noise.Compose([noise.Gaussian(), noise.FeatureDropout()]),
    noise.OneOf([noise.Gaussian(), noise.FeatureDropout()]),
    noise.Scaled(noise.Gaussian(), 0.5),
]
NO_DEFAULT = {"Noise", "Transform", "as_noise", *(value.title for value in WITH_ARGUMENTS)} - {"AnalogWeights", "Impulse"}
DEFAULT = [name for name in noise.__all__ if name not in NO_DEFAULT]
NOISES: list[noise.Noise] = [*(getattr(noise, name)() for name in DEFAULT), *WITH_ARGUMENTS]


def impulse(x: Tensor, low: Any, high: Any) -> Tensor:
    u = torch.rand_like(x)
    return torch.where(u < LEVEL / 2, low, torch.where(u > 1 - LEVEL / 2, high, x))


def colored(x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(torch.randn_like(x.float()))
    frequency = torch.arange(spectrum.shape[-1], device=x.device).clamp(min=1)
    n = torch.fft.irfft(spectrum * frequency**-0.5, x.shape[-1])
    return x + (LEVEL * n / n.square().mean(-1, keepdim=True).sqrt()).to(x.dtype)


def swapped(x: Tensor) -> Tensor:
    return torch.where(torch.rand_like(x) < LEVEL, x.gather(0, torch.randint(len(x), x.shape, device=x.device)), x)


def snr(x: Tensor) -> Tensor:
    n = torch.randn_like(x)
    norm = [torch.linalg.vector_norm(each, dim=(1, 2, 3), keepdim=True) for each in (x, n)]
    return x + LEVEL * norm[0] / norm[1] * n


def quantized(x: Tensor) -> Tensor:
    u = torch.rand_like(x[:, :1, :1, :1])
    return LEVEL * ((x / LEVEL + u).round() - u)


BY_HAND: dict[type[noise.Noise], Callable[[Tensor], Tensor]] = {
    noise.Gaussian: lambda x: x + LEVEL * torch.randn_like(x),
    noise.Uniform: lambda x: x + LEVEL * (2 * torch.rand_like(x) - 1),
    noise.Speckle: lambda x: x * (1 + LEVEL * torch.randn_like(x)),
    noise.Impulse: lambda x: impulse(x, x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)),
    noise.FeatureDropout: lambda x: F.dropout(x, LEVEL),
    noise.DropConnect: lambda x: F.dropout(x, LEVEL),
    noise.Scaling: lambda x: x * (1 + LEVEL * torch.randn_like(x[..., :1])),
    noise.SNR: snr,
    noise.Drift: lambda x: x + LEVEL / math.sqrt(x.shape[-1]) * torch.randn_like(x).cumsum(-1),
    noise.ColoredNoise: colored,
    noise.SwapNoise: swapped,
    noise.Shot: lambda x: torch.poisson(x / LEVEL) * LEVEL,
    noise.Rician: lambda x: torch.hypot(x + LEVEL * torch.randn_like(x), LEVEL * torch.randn_like(x)),
    noise.Quantization: quantized,
}


def mix(x: Tensor, y: Tensor) -> None:
    with Mixup(1.0).perturbation(Context(None, None), [x, y], 1.0, Key((0,))):  # type: ignore[arg-type]
        pass


def mix_by_hand(x: Tensor) -> Tensor:
    lam, partners = random.betavariate(1, 1), torch.randperm(len(x)).to(x.device)
    return lam * x + (1 - lam) * x[partners]


def tables(bench: Bench) -> Iterator[Table]:
    for dtype in [torch.float32] if bench.on_cpu else [torch.float32, torch.bfloat16]:
        yield of_dtype(bench, dtype)


def of_dtype(bench: Bench, dtype: torch.dtype) -> Table:
    shape = (4, 3, 32, 32) if bench.quick else (128, 3, 64, 64) if bench.on_cpu else (256, 3, 224, 224)
    x = torch.rand(shape, device=bench.device).to(dtype)
    y = torch.randint(10, shape[:1], device=bench.device)
    z, generator = torch.empty_like(x), torch.Generator(bench.device).manual_seed(0)
    units = {"draw": partial(z.normal_, generator=generator), "copy": partial(z.copy_, x)}
    unit = units["draw" if bench.on_cpu else "copy"]
    members: dict[str, dict[str, Callable[[], object]]] = {"in-place normal draw": {"ours": units["draw"]}}
    for each in NOISES:
        hand = BY_HAND.get(type(each))
        members[f"`{each}`"] = (
            {"ours": partial(each, x, LEVEL, generator=generator)}
            | ({"by hand": partial(hand, x)} if hand else {})
            | peers.of_noise(each, x)
        )
    members["`Mixup()`"] = {"ours": partial(mix, x, y), "by hand": partial(mix_by_hand, x), **peers.of_mixing(x, y)}
    table = Table(
        f"Noises in {str(dtype)[6:]}",
        f"A batch of shape {shape}. 1 is {'an in-place normal draw' if bench.on_cpu else 'a copy'} of the batch.",
        ["noise", "lightning_noise", "torch by hand", "peers"],
    )
    for name, sides in members.items():
        found = {side: spread(values) for side, values in ratios(bench.compare({"unit": unit} | sides)).items()}
        del found["unit"]
        cells = [found.pop(side, "") for side in ("ours", "by hand")]
        table.rows.append([name, *cells, ", ".join(f"{peer} {ratio}" for peer, ratio in found.items())])
    table.text += f" Peers: {peers.describe()}."
    return table
