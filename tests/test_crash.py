"""Runs that are killed leave clean weights, and checkpoints from which the run goes on as if nothing had happened."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from crash import kill
from crash.fits import run
from helpers import Classifier, assert_same, execute, fit, loader, weights
from pytorch_lightning.callbacks import LambdaCallback

from lightning_noise import Key, RobustnessMonitor, WeightNoise, noise
from lightning_noise.perturb.weights import PerturbedParameters

N_FITS = 20


def main(folder: Path) -> None:
    """Kills fits, and then resumes from each checkpoint of the uninterrupted run."""
    counted, lost = kill.kill(folder / "killed", N_FITS)
    assert not lost
    whole = kill.Whole(folder)
    for name in whole.checkpoints:
        differs = run(folder / "resumed", folder / "whole" / name).completes(whole.outcome)
        assert not differs, f"{name}: {differs}"
    torch.save(dict(counted), folder / "counted.pt")


@pytest.mark.slow
def test_a_fit_that_is_killed_at_any_moment_leaves_checkpoints_that_resume_exactly(tmp_path):
    execute(main, tmp_path / "crash")  # a process of its own, which forks
    counted = Counter(torch.load(tmp_path / "crash" / "counted.pt"))
    assert sum(n for what, n in counted.items() if what.endswith(": killed")) >= N_FITS / 2
    assert counted["resumed"] >= N_FITS / 2


class Interrupt(BaseException):
    """What may come between any two instructions, as KeyboardInterrupt does."""


class At:
    """Raises an interrupt at the n-th call while weights are perturbed or restored, from the step of a module on."""

    def __init__(self, n: int):
        self.n, self.calls = n, 0
        self.is_perturbing = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event in ("call", "c_return") and (
            "lightning_noise" in code.co_filename or code.co_filename.endswith("contextlib.py")
        ):
            self.calls += 1
            if self.calls == self.n:
                sys.setprofile(None)
                raise Interrupt


def interrupted(n: int, probe: bool) -> tuple[bool, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Interrupts a step, or a validation, in which the weights hold the noise of two callbacks or of a probe."""
    gc.collect()  # or a generator of an earlier interrupt ends within this one, and Python cannot raise what comes then
    at = At(n)
    module = Classifier(lr=0.0)
    before, saved = weights(module), []
    begin = LambdaCallback(**{f"on_{'validation' if probe else 'train'}_batch_start": lambda *_: sys.setprofile(at)})
    end = {
        f"on_{'validation' if probe else 'train'}_batch_end": lambda *_: sys.setprofile(None),
        "on_exception": lambda *_: saved.extend(weights(module)),
    }
    if probe:
        noises: list[Any] = [RobustnessMonitor(WeightNoise(noise.Gaussian()), [0.5])]
    else:
        noises = [WeightNoise(noise.Gaussian(), 0.5), WeightNoise(noise.Speckle(), 0.5, name="second")]
    try:
        fit(
            [begin, *noises, LambdaCallback(**end)],
            module=module,
            train=loader(),
            limit_train_batches=1,
            limit_val_batches=1 if probe else 0,
            num_sanity_val_steps=0,
            max_epochs=1,
        )
    except Interrupt:
        return True, before, saved, weights(module)  # the traceback is alive, as in a notebook
    finally:
        sys.setprofile(None)
    return False, before, before, weights(module)


@pytest.mark.slow
@pytest.mark.parametrize("probe", [False, True])
def test_an_interrupt_at_any_call_leaves_clean_weights(probe):
    n, found = 1, True
    while found:
        found, before, saved, after = interrupted(n, probe)
        assert_same(saved, before)
        assert_same(after, before)
        n += 13
    assert n > 200


def test_an_interrupted_end_of_noise_can_be_repeated():
    module = Classifier()
    before = weights(module)
    outer, inner = (PerturbedParameters(module, None, noise.Gaussian(), 0.5, key) for key in (Key((0,)), Key((1,))))
    outer.enter()
    inner.enter()
    outer.exit()  # an interrupt kept the inner noise from ending
    assert_same(weights(module), before)
    inner.exit()
    assert_same(weights(module), before)
