"""What callbacks hold after a run: nothing of the run that could not be copied."""

from __future__ import annotations

import copy
import pickle

import pytest
from helpers import Classifier, fit
from helpers_callbacks import Failing
from members import every_callback

from lightning_noise import AdaptiveLevel, InputNoise, ReplayMonitor, RobustnessMonitor, noise


class FailingInValidation(Classifier):
    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking and batch_idx == 1:
            raise RuntimeError("in the validation")
        super().validation_step(batch, batch_idx)


def copies_of(callback):
    callback.log = callback.log_dict = None  # which Lightning gives to callbacks, and which lead to the module
    return copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))


@every_callback
def test_a_callback_deep_copies_and_pickles_after_an_exception_in_a_step(make):
    callback = make(0.3)
    with pytest.raises(RuntimeError):
        fit([callback], module=Failing("step", RuntimeError))
    assert [one.name for one in copies_of(callback)] == 2 * [callback.name]


@pytest.mark.parametrize("module", [Classifier, FailingInValidation])
def test_adaptive_levels_and_monitors_deep_copy_and_pickle_after_a_run(module):
    callbacks = [
        InputNoise(noise.Gaussian(), AdaptiveLevel(start=0.1)),
        RobustnessMonitor(noise.Gaussian(), levels=[0.1]),
        ReplayMonitor(noise.Gaussian(), levels=[0.1]),
    ]
    try:
        fit(callbacks, module=module, max_epochs=1)
    except RuntimeError:
        assert module is FailingInValidation
    for callback in callbacks:
        assert [one.name for one in copies_of(callback)] == 2 * [callback.name]
