"""Predictions under noise are what they say, and the predictions without noise stay what they are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import Classifier, Rows, Stochastic, assert_same, execute, loader, make_trainer
from pytorch_lightning.callbacks import BasePredictionWriter
from scripts import noisy_predictions
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_noise import InputNoise, Key, NoisyPredictions, WeightNoise, noise, tasks
from lightning_noise.testing import global_streams

DATA = Rows(13, seed=1)
NOISES = {"input": noise.Gaussian(), "weight": WeightNoise(noise.Gaussian(), relative="std")}
every_noise = pytest.mark.parametrize("make", NOISES.values(), ids=NOISES)


class Predicts(Classifier):
    """Writes to the batch in its step."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        x = batch[0] if isinstance(batch, list) else batch
        found = self(x)
        x.zero_()
        return found


class PredictsStochastic(Predicts, Stochastic):
    pass


def predict(
    callbacks: list[pl.Callback], module: type[pl.LightningModule] = Predicts, data: Any = None, **kwargs: Any
) -> tuple[pl.LightningModule, Any]:
    pl.seed_everything(0, verbose=False)
    own = module()
    return own, make_trainer(callbacks, **kwargs).predict(own, loader(Rows(13, seed=1)) if data is None else data)


def joined(noisy: NoisyPredictions) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*noisy.results, strict=True)]


@every_noise
@pytest.mark.parametrize("module", [Predicts, PredictsStochastic])
def test_the_predictions_and_random_streams_are_as_without(module, make):
    plain, expected = predict([], module)
    streams = global_streams()
    own, found = predict([NoisyPredictions(make, 0.5)], module)
    assert global_streams() == streams
    assert_same(found, expected)
    assert_same(list(own.state_dict().values()), list(plain.state_dict().values()))


def test_the_values_are_those_of_a_hand_written_loop():
    noisy = NoisyPredictions(noise.Gaussian(), 0.5, n_draws=7, seed=5)
    module, logits = predict([noisy])
    module.eval()
    positions, clean, mean, spread, agreement = joined(noisy)
    root = Key((5, "probe", "gaussian"), positions=range(13))
    draws = []
    for draw in range(7):
        key = (root / draw if draw else root) / "leaf" / "0"
        with torch.no_grad():
            draws.append(module(key.apply(noise.Gaussian(), DATA.x, 0.5)).softmax(1))
    torch.testing.assert_close(clean, torch.cat(logits).softmax(1))
    torch.testing.assert_close(mean, torch.stack(draws).mean(0))
    torch.testing.assert_close(spread, torch.stack(draws).std(0))
    torch.testing.assert_close(agreement, torch.stack([(p.argmax(1) == clean.argmax(1)).float() for p in draws]).mean(0))
    assert positions.tolist() == list(range(13))
    assert 0 < agreement.min() < 1, "a level that changes something"


@every_noise
def test_the_batch_size_does_not_matter(make):
    whole, parts = NoisyPredictions(make, 0.5), NoisyPredictions(make, 0.5)
    predict([whole], data=loader(Rows(13, seed=1), 13))
    predict([parts], data=loader(Rows(13, seed=1), 4))
    for one, other in zip(joined(whole), joined(parts), strict=True):
        torch.testing.assert_close(one, other)


@every_noise
def test_at_level_0_every_draw_is_the_clean_prediction(make):
    noisy = NoisyPredictions(make, 0.0, n_draws=3)
    predict([noisy])
    _, clean, mean, spread, agreement = joined(noisy)
    assert torch.equal(mean, clean)
    assert not spread.any()
    assert (agreement == 1).all()


def test_the_results_have_the_structure_of_the_predictions():
    noisy = NoisyPredictions(noise.Gaussian(), 0.5, n_draws=2)
    _, found = predict([noisy], data=[loader(Rows(13, seed=1)), loader(Rows(5))])
    assert [[len(batch) for batch in own] for own in found] == [[8, 5], [5]]
    assert [[len(each.mean) for each in own] for own in noisy.results] == [[8, 5], [5]]
    assert noisy.results[1][0].positions.tolist() == list(range(5))
    predict([noisy])  # another run begins anew
    assert [len(each.mean) for each in noisy.results] == [8, 5]


def test_the_positions_of_items_that_are_batches_tell_item_and_row():
    noisy = NoisyPredictions(noise.Gaussian(), 0.5, n_draws=2)
    predict([noisy], data=DataLoader([DATA.x[:3], DATA.x[3:5]], batch_size=None))  # type: ignore[arg-type]
    assert [divmod(position, 2**32) for position in joined(noisy)[0].tolist()] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_a_writer_of_predictions_finds_its_batch():
    noisy, written = NoisyPredictions(noise.Gaussian(), 0.5, n_draws=2), []

    class Writer(BasePredictionWriter):
        def write_on_batch_end(self, trainer, pl_module, prediction, *_: Any) -> None:  # type: ignore[override]
            written.append(noisy.results[-1].clean)
            torch.testing.assert_close(written[-1], prediction.softmax(1))

    predict([noisy, Writer("batch")])
    assert len(written) == 2


class Regressor(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.net(features)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch["features"])


class Named(Rows):
    def __getitem__(self, i: int) -> Any:
        return {"id": torch.tensor(i), "features": self.x[i], "weight": torch.tensor(1.0)}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_regression_of_named_inputs_in_any_precision(precision):
    noisy = NoisyPredictions(noise.Gaussian(), 0.5, 50, inputs="features", task=tasks.Regression())
    module: Any
    module, found = predict([noisy], Regressor, loader(Named(13, seed=1)), precision=precision)
    each = noisy.results[0]
    assert each.agreement is None
    torch.testing.assert_close(each.clean, found[0].float())
    assert each.mean.dtype == torch.float32
    # the spread of a linear model: the level times the norm of its weights
    torch.testing.assert_close(each.spread.mean(), 0.5 * module.net.weight.float().norm().detach(), rtol=0.15, atol=0.0)


def test_yes_or_no_is_seen_as_two_classes():
    noisy = NoisyPredictions(noise.Gaussian(), 0.5, 2, inputs="features", task=tasks.Binary())
    _, found = predict([noisy], Regressor, loader(Named(5)))
    torch.testing.assert_close(noisy.results[0].clean[:, 1], found[0].sigmoid())


@pytest.mark.parametrize("is_broken", [lambda x: x[:, 0] > 0, lambda x: x[:, 0] != DATA.x[: len(x), 0]], ids=["both", "noisy"])
def test_a_prediction_that_is_nan_agrees_with_nothing(is_broken):
    class Breaks(Predicts):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(is_broken(x)[:, None], math.nan)

    noisy = NoisyPredictions(noise.Gaussian(), 0.01, n_draws=3)
    predict([noisy], Breaks, loader(DATA, 13))
    (found,) = noisy.results
    broken = found.mean.isnan().any(1)
    assert broken.any()
    assert torch.equal(found.agreement.isnan(), broken)


def test_options_come_from_a_callback_of_the_noise():
    plain = NoisyPredictions(noise.Gaussian(), 0.5, n_draws=3)
    raw = NoisyPredictions(InputNoise(noise.Gaussian(), mean=0.0, std=2.0, name="gaussian"), 1.0, n_draws=3)
    predict([plain, raw])
    for one, other in zip(joined(plain), joined(raw), strict=True):
        torch.testing.assert_close(one, other)


def test_weights_are_restored_after_an_exception():
    seen: list[Tensor] = []

    class Fails(Predicts):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(next(self.parameters()).clone())
            if len(seen) == 3:
                raise RuntimeError("stop")
            return super().forward(x)

    module = Fails()
    expected = [weight.detach().clone() for weight in module.parameters()]
    with pytest.raises(RuntimeError, match="stop"):
        make_trainer([NoisyPredictions(NOISES["weight"], 0.5)]).predict(module, loader(Rows(13, seed=1)))
    assert not torch.equal(seen[-1], seen[0]), "it failed under noise"
    assert_same(list(module.parameters()), expected)


class Labelled(Rows):
    def __getitem__(self, i: int) -> Any:
        return {"x": self.x[i], "y": self.y[i]}


def test_the_predictions_know_no_label():
    class Forces(Classifier):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return super().forward(x) if y is None else nn.functional.one_hot(y, 3).float()

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch["x"])

    noisy = NoisyPredictions(noise.Gaussian(), 0.5, n_draws=2)
    _, found = predict([noisy], Forces, loader(Labelled(13, seed=1)))
    torch.testing.assert_close(joined(noisy)[1], torch.cat(found).softmax(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z.argmax(1), r"the module returned int64 \(8,\) for 8 samples.*; type predict=…, or another task"),
        (lambda z: z[:, :1], r"float32 \(8, 1\) for 8 samples.* tasks.Binary\(\) for one logit of yes or no"),
        (lambda z: (z.sum(), {"z": z}), r"; type predict=lambda module, batch: module\(batch\[0\]\)\[1\]\['z'\], or"),
    ],
    ids=["classes", "one logit", "container"],
)
def test_outputs_that_cannot_be_read_show_what_to_type(change, message):
    class Returns(Classifier):
        def forward(self, x: Tensor) -> Any:
            return change(super().forward(x))

    with pytest.raises(ValueError, match=message) as error:
        predict([NoisyPredictions(noise.Gaussian(), 0.5)], Returns)
    assert "target of" not in str(error.value), "there is none"
    assert "ReplayMonitor" not in str(error.value), "there is no validation"


class Fetches(Predicts):
    def predict_step(self, dataloader_iter: Any) -> None:  # type: ignore[override]
        next(dataloader_iter)


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_step_that_fetches_its_batches_is_refused():
    with pytest.raises(ValueError, match=r"needs a predict_step\(batch, batch_idx\)"):
        predict([NoisyPredictions(noise.Gaussian(), 0.5)], Fetches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_draws": 1}, "n_draws must be at least 2, because one draw has no spread, got 1; type n_draws=20"),
        ({"level": -0.1}, "a level must be finite and not negative, got -0.1"),
        ({"noise": noise.SwapNoise()}, "mixes samples"),
        ({"clip": (0.0, 1.0)}, r"type NoisyPredictions\(InputNoise\(noise\.Gaussian\(\), clip=\(0\.0, 1\.0\)\), 0\.5\)"),
        ({"noise": [noise.Shot()]}, r"type NoisyPredictions\(noise\.Shot\(\), 0\.1\)"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        NoisyPredictions(**{"noise": noise.Gaussian(), "level": 0.5, **arguments})


@pytest.mark.slow
def test_two_processes_predict_what_one_predicts(tmp_path):
    execute(noisy_predictions.main, tmp_path / "one", 1)
    execute(noisy_predictions.main, tmp_path / "two", 2)
    (whole,) = torch.load(tmp_path / "one" / "0.pt")
    batches = [batch for rank in range(2) for batch in torch.load(tmp_path / "two" / f"{rank}.pt")]
    positions, *found = map(torch.cat, zip(*batches, strict=True))
    assert sorted(positions.tolist()) == list(range(13)), "none is repeated"
    for one, other in zip(whole[1:], found, strict=True):
        torch.testing.assert_close(other[positions.argsort()], one)
