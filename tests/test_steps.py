"""A training step neither waits for the device nor keeps memory because of a callback, and makes few calls.

On the CPU, the fits are of tensors of the meta device, which have no values: whatever asks for one is found. With `--device
cuda`, CUDA itself raises an error.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import DEVICE, N_CLASSES, Classifier, Rows, fit, loader
from members import CALLBACKS, NOISES, VARIANTS
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import lightning_noise
from lightning_noise import ActivationNoise, EmbeddingNoise, InputNoise, TargetNoise, WeightNoise, labels, noise, schedules

SHAPE = (3, 8, 8)
N_STEPS = 2
aten = torch.ops.aten
ANSWERS: dict[Any, Callable[[Tensor], Any]] = {
    aten._local_scalar_dense.default: lambda x: torch.zeros((), dtype=x.dtype).item(),
    aten.equal.default: lambda x, *_: True,
    aten.nonzero.default: lambda x: x.new_zeros(0, x.ndim, dtype=torch.long),
    aten.masked_select.default: lambda x, *_: x.new_zeros(0),
}
COPIES = (aten._to_copy.default, aten.copy_.default)


class Waits(TorchDispatchMode):
    """Notes the lines that ask for a value, which it answers with zero, and those that copy to another device."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.is_watching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ANSWERS:
            self.note(func)
            return ANSWERS[func](*args)
        if func is aten.index.Tensor and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.note(func)
            return args[0].new_zeros(0)
        kwargs = kwargs or {}
        if func is aten._to_copy.default and args[0].is_meta and kwargs.get("device", args[0].device).type == "cpu":
            self.note(func)
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
        result = func(*args, **kwargs)
        moves = func in COPIES and any(x.device != result.device for x in args if isinstance(x, Tensor))
        if moves and not kwargs.get("non_blocking"):
            self.note(func)
        return result

    def note(self, func: Any) -> None:
        if self.is_watching:
            self.found.append(f"{func}: {''.join(traceback.format_stack(limit=12))}")


class Constants(TorchFunctionMode):
    """Notes the lines that copy numbers of Python to the device, which the dispatcher does not see."""

    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and result.is_meta and not isinstance(args[0], Tensor):
            self.waits.note(func)
        return result


class Watch(pl.Callback):
    """Watches every step but the first, in which callbacks look at the values of the batch."""

    def __init__(self, waits: Waits):
        self.waits = waits

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx > 0:
            self._watch(True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._watch(False)

    def _watch(self, on: bool) -> None:
        self.waits.is_watching = on
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if on else "default")


class Anywhere(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


class InPlace(SingleDeviceStrategy):
    """Trains where the module is."""

    def model_to_device(self) -> None:
        pass

    def teardown(self) -> None:
        pass


class Tokens(Classifier):
    """Embeds the ids that it makes of its inputs."""

    def __init__(self, features: int):
        super().__init__(features=features)
        self.embedding = nn.Embedding(N_CLASSES, features, padding_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.embedding((x[:, 0, :, 0] > 0).long()).mean(1))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """A function that returns where the steps of a fit wait."""
    generator = torch.Generator
    if DEVICE.type == "cpu":  # neither generators nor autocast know the device without values
        monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": False)
    device = torch.device("meta") if DEVICE.type == "cpu" else DEVICE

    def find(callback: pl.Callback | None, module: Callable[..., pl.LightningModule] = Classifier) -> list[str]:
        waits = Waits()
        callbacks: list[pl.Callback] = [Watch(waits)]
        if callback is not None:
            monkeypatch.setattr(callback, "check", lambda *args: None)  # it looks at the values of the first batch
            callbacks.append(callback)
        with device:
            net = module(features=torch.Size(SHAPE).numel())
            rows: Any = [(torch.randn(8, *SHAPE), torch.randint(N_CLASSES, (8,))) for _ in range(N_STEPS)]
        settings: dict[str, Any] = {"train": DataLoader(rows, batch_size=None), "max_epochs": 1, "limit_val_batches": 0}
        if DEVICE.type == "cuda":
            fit(callbacks, module=net, **settings)
        else:
            with waits, Constants(waits):
                fit(callbacks, module=net, accelerator="auto", strategy=InPlace(device, Anywhere()), **settings)
        return waits.found

    yield find
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")


def mask_of(batch: Any) -> Tensor:
    return batch[0] > -1


# Shot and Rician look for negative data, and Transform works sample by sample, as documented
QUIET = [each for each in NOISES if not isinstance(each, noise.Shot | noise.Rician | noise.Transform)]
ELEMENTWISE = [each for each in QUIET if each.elementwise]
CASES: dict[str, Callable[[], pl.Callback]] = {
    **{name: (lambda make=make: make(0.3)) for name, make in (CALLBACKS | VARIANTS).items()},
    **{f"input {each}": (lambda each=each: InputNoise(each, 0.3)) for each in QUIET},
    **{f"activation {each}": (lambda each=each: ActivationNoise(each, 0.3, "net.1")) for each in ELEMENTWISE},
    **{f"weight {each}": (lambda each=each: WeightNoise(each, 0.3)) for each in ELEMENTWISE},
    "flips in the batch": lambda: TargetNoise(labels.FlipLabels(N_CLASSES), 0.3, via="batch"),
    "confusion": lambda: TargetNoise(labels.ConfusionFlips([[0.8, 0.1, 0.1]] * N_CLASSES), 0.3),
    "input in raw units": lambda: InputNoise(noise.Gaussian(), 0.3, mean=[0.1, 0.2, 0.3], std=0.5, clip=([0.0] * 3, 1.0)),
    **{
        f"weight, relative to {unit}": (lambda unit=unit: WeightNoise(noise.Gaussian(), 0.3, relative=unit))
        for unit in ("std", "max", "filter")
    },
}


MASKED = {str(each): (lambda each=each: InputNoise(each, 0.3, mask=mask_of, clip=(-2, 2))) for each in QUIET}


def test_a_step_without_callbacks_does_not_wait(waits):
    assert waits(None) == []


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_no_step_waits_for_the_device(make, waits):
    assert waits(make()) == []


@pytest.mark.slow
@pytest.mark.parametrize("make", MASKED.values(), ids=MASKED)
def test_no_step_waits_for_the_device_for_noise_beside_padding(make, waits):
    assert waits(make()) == []


def test_no_step_waits_for_the_device_for_noise_in_embeddings(waits):
    assert waits(EmbeddingNoise(5.0), Tokens) == []


WAITING: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda x: x.sum().item(),
    "a condition": lambda x: bool((x > 0).any()),
    "an index of booleans": lambda x: x[x > 0].sum(),
    "where": lambda x: torch.where(x > 0)[0].sum(),
    "equality": lambda x: torch.equal(x, x),
    "a copy to the CPU": lambda x: x.cpu(),
    "a copy from the CPU": lambda x: torch.ones(8, device="cpu").to(x.device),
    "numbers for the device": lambda x: torch.tensor([1.0, 2.0], device=x.device),
}


@pytest.mark.parametrize("ask", WAITING.values(), ids=WAITING)
def test_a_noise_that_waits_is_found(ask, waits):
    def waiting(x, level, *, generator):
        ask(x)
        return x + level

    if DEVICE.type == "cuda":
        with pytest.raises(RuntimeError, match="synchroniz"):
            waits(InputNoise(waiting, 0.3))
    else:
        assert len(waits(InputNoise(waiting, 0.3))) == N_STEPS - 1


@pytest.mark.slow
def test_a_fit_with_all_callbacks_keeps_nothing_of_its_steps():
    held: list[int] = []

    class Measure(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx % 100 == 50:
                gc.collect()
                held.append(sys.getallocatedblocks())

    class Forgetful(Classifier):
        def __init__(self):
            super().__init__(lr=0.0)  # weights that grow would be a warning

        def training_step(self, batch, batch_idx):
            self.seen.clear()
            self.losses.clear()
            return super().training_step(batch, batch_idx)

    order = ("flips", "input", "mixup", "smoothing", "weight", "gradient", "activation")
    callbacks = [CALLBACKS[name](0.1) for name in order]
    fit([Measure(), *callbacks], module=Forgetful, train=loader(Rows(8 * 451)), max_epochs=1, limit_val_batches=0)
    # one object a step would be 100 each time; caches of the interpreter and of torch fill up now and then
    assert median(after - before for before, after in pairwise(held)) < 50


class Calls(pl.Callback):
    """Counts the calls of functions of the package in each step, from batch to batch. A resumed generator counts, too."""

    package = str(Path(lightning_noise.__file__).parent)

    def __init__(self):
        self.counts: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.counts.append(0)
        sys.setprofile(self._count)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sys.setprofile(None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        sys.setprofile(None)

    def _count(self, frame: FrameType, event: str, arg: Any) -> None:
        self.counts[-1] += event == "call" and frame.f_code.co_filename.startswith(self.package)


@pytest.mark.parametrize(
    ("name", "level", "most"),
    [
        ("input", 0.0, 13),
        ("input", 0.3, 60),
        ("input", schedules.Linear(0.1, 0.5), 69),
        ("activation", 0.0, 15),
        ("activation", 0.3, 66),
        ("weight", 0.0, 14),
        ("weight", 0.3, 103),
        ("gradient", 0.0, 20),
        ("gradient", 0.3, 85),
    ],
)
def test_a_step_makes_few_calls(name, level, most):
    calls = Calls()
    fit([calls, CALLBACKS[name](level)], train=loader(Rows(24)), max_epochs=1, limit_val_batches=0, logger=False)
    assert 0 < calls.counts[1] <= most  # in Python 3.11, in which a comprehension is a call
