"""What noise costs on a device: noises, rows of held-out data, weights, and steps of a small and a larger network.

All sides run in one process, in turns; every figure is a median. "draws" are in-place normal draws of the tensor, and "by hand"
is the same noise written in torch.

Run: python benchmarks/device.py --device cuda
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from statistics import median

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from steps import CALLBACKS, ResNet20
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_noise import ActivationNoise, Key, noise
from lightning_noise.noise import Noise
from lightning_noise.perturb.weights import PerturbedParameters

NOISES: list[Noise] = [
    noise.Gaussian(),
    noise.Uniform(),
    noise.Speckle(),
    noise.Impulse(),
    noise.FeatureDropout(),
    noise.Masking(),
    noise.PatchGaussian(size=25),
    noise.SNR(),
    noise.Drift(),
    noise.ColoredNoise(),
    noise.SwapNoise(),
    noise.Shot(),
]
BOTTLENECKS = [(64, 3), (128, 4), (256, 6), (512, 3)]  # of a ResNet-50: channels and blocks
WARMUP, STEPS = 10, 60


class Perceptron(pl.LightningModule):
    """A network whose step is nothing but the cost of calls."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(pl.Callback):
    """The milliseconds from one batch to the next, with the work of the device."""

    def __init__(self):
        self.times: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int) -> None:
        wait(pl_module.device)
        self.times.append(1e3 * time.perf_counter())

    @property
    def milliseconds(self) -> list[float]:
        return [after - before for before, after in pairwise(self.times[WARMUP:])]


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def compare(sides: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 15) -> dict[str, float]:
    """Returns the median milliseconds of each side; the sides take turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 2):
        for name, side in sides.items():
            wait(device)
            began = time.perf_counter()
            side()
            wait(device)
            times[name] += [1e3 * (time.perf_counter() - began)] if i >= 2 else []
    return {name: median(values) for name, values in times.items()}


def noises(device: torch.device) -> None:
    shape = (256, 3, 224, 224) if device.type != "cpu" else (128, 3, 64, 64)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.rand(shape, dtype=dtype, device=device)
        z, generator = torch.empty_like(x), torch.Generator(device).manual_seed(0)
        sides: dict[str, Callable[[], object]] = {
            "draw": partial(z.normal_, generator=generator),
            "copy": partial(z.copy_, x),
            "x + 0.3 * randn_like(x)": lambda x=x: x + 0.3 * torch.randn_like(x),
        }
        sides |= {repr(each): partial(each, x, 0.3, generator=generator) for each in NOISES}
        found = compare(sides, device)
        print(f"\n## Noise in {shape}, {str(dtype)[6:]}\n\n| | ms | draws | copies |\n|---|---|---|---|")
        for name, value in found.items():
            print(f"| `{name}` | {value:.3f} | {value / found['draw']:.2f} | {value / found['copy']:.2f} |")


def rows(device: torch.device) -> None:
    print("\n## Held-out data\n\n| rows | noise | batch at once, ms | by position | the same, one of 8 ranks | us a row |")
    print("|---|---|---|---|---|---|")
    images = (256, 3, 224, 224) if device.type != "cpu" else (256, 3, 64, 64)
    for shape in (images, (256, 3, 32, 32), (1024, 20)):
        for each in (noise.Gaussian(), noise.Impulse()):
            x, key = torch.rand(shape, device=device), Key((0, "probe"))
            n = len(x)
            strides = {f"{step}": Key(key.coordinates, positions=range(0, n * step, step)) for step in (1, 8)}
            sides = {name: partial(key.apply, each, x, 0.3) for name, key in {"whole": key, **strides}.items()}
            found = compare(sides, device)
            one, eight = (found[step] / found["whole"] for step in strides)
            print(f"| {shape} | {each} | {found['whole']:.3f} | {one:.2f} | {eight:.2f} | {1e3 * found['1'] / n:.2f} |")


def of_resnet_50() -> nn.Module:
    """All weights of a ResNet-50, in their shapes."""
    parts: list[nn.Module] = [nn.Conv2d(3, 64, 7, bias=False)]
    before = 64
    for width, blocks in BOTTLENECKS:
        for i in range(blocks):
            parts += [nn.Conv2d(before, width, 1, bias=False), nn.Conv2d(width, width, 3, bias=False)]
            parts += [nn.Conv2d(width, 4 * width, 1, bias=False)]
            parts += [] if i else [nn.Conv2d(before, 4 * width, 1, bias=False)]
            before = 4 * width
    return nn.Sequential(*parts, nn.Linear(before, 1000))


@torch.no_grad()
def perturb_by_hand(module: nn.Module) -> None:
    weights = [w for w in module.parameters() if w.ndim > 1]
    clean = [w.clone() for w in weights]
    for w in weights:
        w.add_(torch.randn_like(w), alpha=0.01)
    for w, copy in zip(weights, clean, strict=True):
        w.copy_(copy)


def perturb(module: nn.Module, relative: str | None) -> None:
    noisy = PerturbedParameters(module, None, noise.Gaussian(), 0.01, Key((0, "weight")), relative=relative)  # type: ignore[arg-type]
    noisy.enter()
    noisy.exit()


def weights(device: torch.device) -> None:
    print("\n## Weights perturbed and restored\n\n| | by hand, ms | ours | std | filter |\n|---|---|---|---|---|")
    modules = {"ResNet-50": of_resnet_50(), "300 layers of 32 x 32": nn.Sequential(*(nn.Linear(32, 32) for _ in range(300)))}
    for name, module in modules.items():
        module.to(device)
        sides = {"hand": partial(perturb_by_hand, module)}
        sides |= {str(unit): partial(perturb, module, unit) for unit in (None, "std", "filter")}
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in compare(sides, device).values()) + " |")


def fit(module: pl.LightningModule, callbacks: list[pl.Callback], device: torch.device, x: Tensor, y: Tensor) -> None:
    trainer = pl.Trainer(
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=1,
        max_steps=STEPS,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=len(x) // 4))


def steps(device: torch.device) -> None:
    networks: dict[str, tuple[Callable[[], pl.LightningModule], Tensor, str]] = {
        "a perceptron, 64 rows": (Perceptron, torch.rand(256, 32), "net.1"),
        "ResNet-20, 128 images of 3 x 32 x 32": (ResNet20, torch.rand(512, 3, 32, 32), "blocks.*.out"),
    }
    for name, (make, x, pattern) in networks.items():
        y = torch.randint(0, 10, (len(x),))
        found: dict[str, list[float]] = {}
        for _ in range(3):
            for kind, of_kind in CALLBACKS.items():
                callbacks = [ActivationNoise(noise.Gaussian(), 0.1, pattern)] if "Activation" in kind else of_kind()
                clock = Clock()
                fit(make(), [clock, *callbacks], device, x, y)
                found.setdefault(kind, []).extend(clock.milliseconds)
        none = median(found["none"])
        print(f"\n## Steps of {name}\n\n| | ms | beside none | ratio |\n|---|---|---|---|")
        for kind, values in found.items():
            print(f"| {kind} | {median(values):.3f} | {median(values) - none:+.3f} | {median(values) / none:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", default=["noises", "rows", "weights", "steps"])
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "one thread of a CPU"
    print(f"# {card}, torch {torch.__version__}")
    for name in arguments.only:
        {"noises": noises, "rows": rows, "weights": weights, "steps": steps}[name](device)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for logger in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    main()
