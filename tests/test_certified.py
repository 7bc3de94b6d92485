"""Randomized smoothing: the bounds, the smoothed module, and the monitor of the certified accuracy."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers import (
    N_CLASSES,
    Classifier,
    Dictionary,
    Rows,
    Stochastic,
    assert_same,
    execute,
    fit,
    keys_of,
    loader,
    make_trainer,
)
from helpers import weights as weights_of
from helpers_measurements import classifier
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from scipy.stats import beta, binom, binomtest, norm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from lightning_noise import InputNoise, Key, RandomizedSmoothing, RobustnessMonitor, noise, plots, smooth, tasks
from lightning_noise.evaluation.certified import Certified
from lightning_noise.evaluation.smoothing import certify_counts, lower_bound, predict_counts

FEW = {"n0": 8, "n": 60, "alpha": 0.05}
SIGMA = 0.5


def certify_as_in_the_paper(selected: Any, counted: Any, n: int, alpha: float, sigma: float) -> tuple[int, float]:
    """CERTIFY of Cohen et al. (2019), from the votes of one sample."""
    guess = int(np.argmax(selected))
    p = float(beta.ppf(alpha, counted[guess], n - counted[guess] + 1)) if counted[guess] else 0.0
    return (guess, sigma * float(norm.ppf(p))) if p > 0.5 else (-1, 0.0)


def predict_as_in_the_paper(counts: Any, alpha: float) -> int:
    """PREDICT of Cohen et al. (2019), from the votes of one sample."""
    second, first = sorted(counts.tolist())[-2:]
    return int(np.argmax(counts)) if binomtest(first, first + second, 0.5).pvalue <= alpha else -1


def votes(n: int, n_samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The probabilities of four classes, from sure to undecided, and how often each was drawn."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(4), n_samples) ** rng.uniform(0.5, 4, (n_samples, 1))
    p /= p.sum(1, keepdims=True)
    return p, rng.multinomial(n, p)


class Half(nn.Module):
    """Two classes on the sides of a hyperplane."""

    def __init__(self, weight: list[float]):
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight))
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        z = x @ self.weight  # pyright: ignore[reportOperatorIssue]
        return torch.stack([-z, z], 1)


class Scripted(nn.Module):
    """Predicts the classes of a script in turn, whatever it sees."""

    def __init__(self, script: Tensor):
        super().__init__()
        self.script, self.calls = script, []

    def forward(self, x: Tensor) -> Tensor:
        begin = sum(self.calls)
        self.calls.append(len(x))
        return nn.functional.one_hot(self.script[begin : begin + len(x)], 3).float()


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x}


# --- the bounds


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_the_decisions_are_those_of_the_algorithms_of_the_paper(alpha):
    _, selected = votes(50, 60, seed=1)
    _, counted = votes(200, 60, seed=1)
    found = certify_counts(selected, counted, n=200, alpha=alpha, sigma=0.7)
    expected = [certify_as_in_the_paper(*pair, 200, alpha, 0.7) for pair in zip(selected, counted, strict=True)]
    assert 10 < (found[0] >= 0).sum() < 50
    np.testing.assert_array_equal(found[0], [guess for guess, _ in expected])
    np.testing.assert_allclose(found[1], [radius for _, radius in expected], atol=1e-12)
    predicted = predict_counts(counted, alpha)
    assert 10 < (predicted >= 0).sum() < 60
    np.testing.assert_array_equal(predicted, [predict_as_in_the_paper(each, alpha) for each in counted])


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize(("kind", "radius"), [("l2", lambda p: 0.7 * norm.ppf(p)), ("l1", lambda p: 1.4 * (p - 0.5))])
def test_in_10_000_cases_a_radius_is_too_large_no_more_often_than_alpha(alpha, kind, radius):
    n_cases = 10_000
    p, selected = votes(100, n_cases, seed=2)
    counted = np.random.default_rng(3).multinomial(1000, p)
    classes, radii = certify_counts(selected, counted, n=1000, alpha=alpha, sigma=0.7, norm=kind)
    truth = radius(np.take_along_axis(p, np.maximum(classes, 0)[:, None], 1)[:, 0])
    n_wrong = int(((classes >= 0) & (radii > truth)).sum())
    assert (classes >= 0).mean() > 0.5
    assert n_wrong <= binom.ppf(0.9999, n_cases, alpha)
    assert n_wrong >= 0.3 * alpha * (classes >= 0).sum()  # the bound gives nothing away


def test_a_class_is_predicted_wrongly_no_more_often_than_alpha_in_10_000_cases():
    p, counts = votes(100, 10_000, seed=4)
    predicted = predict_counts(counts, 0.05)
    wrong = (predicted >= 0) & (predicted != p.argmax(1))
    assert 0 < wrong.sum() <= binom.ppf(0.9999, 10_000, 0.05)


def test_the_bound_is_that_of_clopper_and_pearson():
    counts = np.array([0, 1, 20, 39, 40])
    limits = [binomtest(int(k), 40).proportion_ci(confidence_level=0.98, method="exact").low for k in counts]
    np.testing.assert_allclose(lower_bound(counts, 40, 0.01), limits, atol=1e-12)


# --- the smoothed module


@pytest.mark.parametrize(
    ("kind", "weight", "probability"),
    [
        ("l2", [3.0, 4.0], lambda distance: norm.cdf(distance / SIGMA)),
        ("l1", [1.0, 0.0], lambda distance: np.clip(0.5 + distance / (2 * SIGMA), 0, 1)),
    ],
)
def test_the_radius_of_a_linear_classifier_is_its_margin_over_the_norm_of_its_weights(kind, weight, probability):
    distance = torch.linspace(0.02, 0.6, 30)
    direction = torch.tensor(weight) / torch.tensor(weight).norm()
    signs = torch.ones(30)
    signs[::3] = -1
    x = signs[:, None] * distance[:, None] * direction
    alpha = 0.001
    classes, radii = smooth(Half(weight), SIGMA, kind).certify(x, n=1000, alpha=alpha)
    certified = classes >= 0
    assert certified.float().mean() > 0.7
    assert_same([classes[certified]], [(signs > 0).long()[certified]])
    # the radii that votes in all but one of a million cases give
    p = probability(distance.numpy())
    for quantile, is_limit in ((1e-6, np.greater_equal), (1 - 1e-6, np.less_equal)):
        counts = binom.ppf(quantile, 1000, p)
        bound = certify_counts(np.ones((30, 1)), counts[:, None], n=1000, alpha=alpha, sigma=SIGMA, norm=kind)[1]
        assert is_limit(radii.numpy(), bound.astype(np.float32) - 1e-6 * np.sign(quantile - 0.5) * -1).all()
    assert (radii > distance).sum() <= binom.ppf(0.9999, 30, alpha)


def test_a_result_depends_on_the_position_and_the_seed_alone():
    x, smoothed = Rows(7).x, smooth(classifier(), SIGMA)
    whole = smoothed.certify(x, **FEW)
    parts = [smoothed.certify(x[i : i + 3], **FEW, positions=range(i, min(i + 3, 7))) for i in (0, 3, 6)]
    assert_same(whole, [torch.cat(each) for each in zip(*parts, strict=True)])
    assert_same(whole, smoothed.certify(x, **FEW, seed=0))
    assert (whole[1] != smoothed.certify(x, **FEW, seed=1)[1]).any()
    assert_same([smoothed(x)], [smoothed.predict(x, n=100, alpha=0.001, seed=0)])
    for positions in (np.arange(7), torch.arange(7)):
        assert_same(whole, smoothed.certify(x, **FEW, seed=np.int64(0), positions=positions))  # type: ignore[arg-type]
    assert [len(each) for each in (*smoothed.certify(x[:0], **FEW), smoothed(x[:0]))] == [0, 0, 0]


def test_the_module_and_the_global_streams_are_put_back():
    class Counting(Stochastic):
        def forward(self, x):
            self.calls = [*self.calls, len(x)]
            assert not self.training
            assert not torch.is_grad_enabled()
            return super().forward(x)

    module = Counting()
    module.calls, module.net[1].training = [], False
    before, streams = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    smooth(module, SIGMA).certify(Rows(2).x, **FEW)
    assert_same(list(before.values()), weights_of(module))
    assert_same([streams], [torch.get_rng_state()])
    assert module.calls == []
    assert [part.training for part in module.modules()].count(False) == 1


def test_nan_votes_for_no_class():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 3), torch.nan)

    classes, radii = smooth(Broken(), SIGMA).certify(torch.zeros(2, 4), **FEW)
    assert classes.tolist() == [-1, -1]
    assert radii.tolist() == [0.0, 0.0]
    assert smooth(Broken(), SIGMA).predict(torch.zeros(2, 4)).tolist() == [-1, -1]


def test_a_certificate_costs_at_most_one_tenth_more_than_its_draws():
    module = Half([1.0, 0.0])
    smooth(module, SIGMA).certify(torch.tensor([[5.0, 0.0]] * 20 + [[0.0, 0.0]] * 20))
    assert module.rows <= 1.1 * 1000 * 40


def test_the_selection_stops_once_its_outcome_is_certain():
    generator = torch.Generator().manual_seed(0)
    n0, calls = 100, []
    for i in range(30):
        weights = torch.tensor([1.0, 1.0 + i, 1.0])
        script = torch.multinomial(weights, n0 + 1000, replacement=True, generator=generator)
        module = Scripted(script)
        selected = smooth(module, SIGMA)._count_row(torch.zeros(3000), n0, Key((i,)), only_first=True)
        counts = script[:n0].bincount(minlength=3)
        if counts.topk(2).values.diff() != 0:  # the first is unique
            assert selected.argmax() == counts.argmax()
        calls.append(sum(module.calls))
    assert min(calls) < 80
    assert max(calls) == n0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: smooth(nn.Identity(), 0.0), ValueError, "sigma must be above 0"),
        (lambda: smooth(nn.Identity(), -1.0), ValueError, "sigma must be above 0.* got -1.0; type sigma=0.25"),
        (lambda: smooth(nn.Identity(), np.nan), ValueError, "sigma must be finite"),
        (lambda: RandomizedSmoothing(cast(Any, [0.25])), TypeError, r"sigma must be a number, got \[0.25\]"),
        (lambda: smooth(cast(Any, torch.relu), 0.5), TypeError, r"got builtin_function_or_method; type smooth\(module, 0.5\)"),
        (lambda: smooth(nn.Identity(), 0.5, cast(Any, "L2")), ValueError, "got 'L2'; type norm='l2'"),
        (lambda: smooth(nn.Linear(4, 3), 0.5).certify(torch.ones(2, 4), n=9), ValueError, "n=9 draws .* type n=10"),
        (lambda: smooth(nn.Linear(4, 3), 0.5).predict(torch.ones(2, 4), n=10), ValueError, "type n=11"),
        (lambda: smooth(nn.Linear(4, 3), 0.5).certify(torch.ones(2, 4), alpha=1.0), ValueError, "type alpha=0.001"),
        (lambda: smooth(nn.Linear(4, 3), 0.5).certify(torch.ones(2, 4).long()), TypeError, "floating-point tensor"),
        (lambda: smooth(nn.Linear(4, 3), 0.5).certify(cast(Any, [torch.ones(4)])), TypeError, r"\(B, \*\), got list"),
        (lambda: smooth(Named(), 0.5).certify(torch.ones(2, 4)), ValueError, "got dict for .* return the logits alone"),
        (lambda: smooth(nn.Linear(4, 1), 0.5).certify(torch.ones(2, 4)), ValueError, "K >= 2 classes, got float32"),
        (lambda: smooth(nn.Linear(4, 3), 0.5).predict(torch.ones(2, 4), positions=[0]), ValueError, "got 1 for float32"),
        (lambda: RandomizedSmoothing(0.5, n=5), ValueError, "type n=10"),
        (
            lambda: RandomizedSmoothing(0.5, task=tasks.Regression()),
            ValueError,
            r"type RobustnessMonitor\(task=tasks.Regression",
        ),
        (lambda: RandomizedSmoothing(), TypeError, r"type RandomizedSmoothing\(0.25\)"),  # type: ignore[call-arg]
        (lambda: RandomizedSmoothing(0.5, radii=[-1.0]), ValueError, "a radius must not be negative, got -1.0"),
        (lambda: RandomizedSmoothing(0.5, radii=cast(Any, 0.5)), TypeError, r"type radii=\[0.5\]"),
        (lambda: RandomizedSmoothing(0.5, radii=[0.1, 0.10000001]), ValueError, "radii must differ"),
    ],
)
def test_errors_say_what_to_type(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_fewest_draws_that_a_message_names_suffice():
    sure = torch.tensor([[1e6, 0.0]])
    assert smooth(Half([1.0, 0.0]), SIGMA).certify(sure, n=10)[0].tolist() == [1]
    assert smooth(Half([1.0, 0.0]), SIGMA).predict(sure, n=11).tolist() == [1]


# --- the monitor


def monitor(**kwargs: Any) -> RandomizedSmoothing:
    return RandomizedSmoothing(SIGMA, **{**FEW, "radii": [0.25, 0.5], **kwargs})


def certified(callback: RandomizedSmoothing, module: Any = None, data: Any = None, batch_size: int = 8, **kwargs: Any):
    trainer = make_trainer([callback], **kwargs)
    trainer.test(module or classifier(), data or loader(Rows(13, seed=1), batch_size=batch_size), verbose=False)
    return {key.removeprefix("test/"): value for key, value in keys_of(trainer).items() if key.startswith("test/")}


@torch.no_grad()
def by_hand(module: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """What the monitor should log, sample by sample."""
    counts = np.zeros((2, len(x), N_CLASSES), int)
    for draw in range(FEW["n0"] + FEW["n"]):
        key = Key((0, "probe", "gaussian", *([draw] if draw else [])), positions=range(len(x)))
        noisy = (key / "leaf" / "0").apply(noise.Gaussian(), x, SIGMA)
        counts[int(draw >= FEW["n0"]), range(len(x)), module(noisy).argmax(1).numpy()] += 1
    rows = zip(*counts, strict=True)
    found = [certify_as_in_the_paper(chosen, counted, FEW["n"], FEW["alpha"], SIGMA) for chosen, counted in rows]
    right = [guess == label for (guess, _), label in zip(found, y.tolist(), strict=True)]
    radii = [radius if is_right else -1 for (_, radius), is_right in zip(found, right, strict=True)]
    return {
        "certified/radius": float(np.mean(np.maximum(radii, 0))),
        "certified/accuracy": float(np.mean(right)),
        "certified/accuracy_clean": float((module(x).argmax(1) == y).float().mean()),
        "certified/abstentions": float(np.mean([guess < 0 for guess, _ in found])),
        "certified_radii/0.25/accuracy": float(np.mean(np.array(radii) >= 0.25)),
        "certified_radii/0.5/accuracy": float(np.mean(np.array(radii) >= 0.5)),
    }


def test_the_monitor_logs_what_is_certified_by_hand():
    data, module = Rows(13, seed=1), classifier()
    expected = by_hand(module, data.x, data.y)
    assert 0 < expected["certified_radii/0.25/accuracy"] < expected["certified/accuracy"]
    for batch_size in (8, 5):
        assert certified(monitor(), module, batch_size=batch_size) == pytest.approx(expected, abs=1e-6)
    callback = monitor()
    certified(callback, module)
    assert callback.result is not None
    assert callback.result.accuracy(0.25) == pytest.approx(expected["certified_radii/0.25/accuracy"])
    assert callback.result.accuracy(100.0) == 0.0
    assert re.fullmatch(
        r"[\d.]+ % of 13 targets are right and certified, with a radius of [\d.]+ on average", str(callback.result)
    )


def test_batches_are_read_as_by_the_other_monitors():
    data = Rows(13, seed=1)
    expected = certified(monitor())

    class Nested(Dictionary):
        def forward(self, x) -> Any:
            return {"logits": super().forward(x)}

        def test_step(self, batch, batch_idx):
            pass

    class Probable(Classifier):
        def forward(self, x):
            return super().forward(x).softmax(1)

        def test_step(self, batch, batch_idx):
            pass

    samples = [{"data": {"x": x}, "y": y} for x, y in zip(data.x, data.y, strict=True)]
    # inputs have other draws at other paths, so only what does not depend on the draws is equal
    found = certified(monitor(inputs="data.x"), _like(Nested()), loader(samples))  # type: ignore[arg-type]
    assert found["certified/accuracy_clean"] == expected["certified/accuracy_clean"]
    assert found == pytest.approx(expected, abs=0.4)
    probable = _like(Probable())
    assert certified(monitor(task=tasks.Multiclass(probabilities=True)), probable) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"type task=tasks\.Multiclass\(probabilities=True\)"):
        certified(monitor(), probable)


def _like(module: Classifier) -> Classifier:
    module.load_state_dict(classifier().state_dict())
    return module.eval()


def test_ignored_labels_and_nan_count_for_nothing():
    class Broken(Classifier):
        def forward(self, x):
            return super().forward(x) * torch.nan

    data = Rows(13, seed=1)
    data.y[8:] = -100
    kept = Rows(13, seed=1)
    kept.x, kept.y = kept.x[:8], kept.y[:8]
    task = tasks.Multiclass(ignore_index=-100)
    assert certified(monitor(task=task), data=loader(data)) == certified(monitor(), data=loader(kept))
    found = certified(monitor(), Broken())
    assert (found["certified/accuracy"], found["certified/abstentions"], found["certified/radius"]) == (0.0, 1.0, 0.0)


def test_a_segmentation_is_certified_at_each_position():
    class Segmentation(Classifier):
        def forward(self, x):
            return torch.stack([x, -x], 1)

        def test_step(self, batch, batch_idx):
            pass

    x = torch.tensor([[2.0, -2.0, 0.0], [0.0, 2.0, 2.0]])
    y = torch.tensor([[0, 1, 0], [1, 1, 0]])
    found = certified(monitor(), Segmentation(), loader(list(zip(x, y, strict=True))))  # type: ignore[arg-type]
    assert found["certified/accuracy"] == pytest.approx(3 / 6)
    assert found["certified/accuracy_clean"] == pytest.approx(4 / 6)


def test_the_targets_of_a_sample_are_not_independent():
    class Segmentation(Classifier):
        def forward(self, x):
            return torch.stack([x, -x], 1)

        def test_step(self, batch, batch_idx):
            pass

    labels = torch.rand(60, generator=torch.Generator().manual_seed(0)) < 0.7
    x, y = torch.linspace(8.0, 9.0, 50).expand(60, 50), (~labels).long()
    limits = []
    for targets in (y, y[:, None].expand(60, 50)):  # one target of a sample, or 50 copies of it
        callback = monitor(predict=None if targets.ndim > 1 else lambda module, batch: module(batch[0])[:, :, 0])
        certified(callback, Segmentation(), loader(list(zip(x, targets, strict=True))))  # type: ignore[arg-type]
        assert callback.result is not None
        assert callback.result.n == targets.numel()
        limits.append(callback.result.interval(0.5))
    assert limits[0] == pytest.approx(limits[1])
    low, high = binomtest(int(labels.sum()), 60).proportion_ci(method="wilson")
    # from 20 groups, half the width of 0.12 is known to a sixth, and Student's quantile adds 7 %: two such errors
    assert limits[0] == pytest.approx((low, high), abs=0.05)


def test_a_module_that_draws_itself_draws_anew_each_time():
    class Drawing(Classifier):
        def forward(self, x):
            z = 9 * nn.functional.dropout(torch.ones(len(x), 1), training=True) - 9  # of either sign, whatever the input
            return torch.cat([-z, z], 1)

        def test_step(self, batch, batch_idx):
            pass

    data: Any = loader(list(zip(Rows(13).x, Rows(13).y % 2, strict=True)))  # type: ignore[arg-type]
    module, streams = Drawing(), []
    for callbacks in ([], [monitor()]):
        torch.manual_seed(0)
        trainer = make_trainer(callbacks)
        trainer.test(module, data, verbose=False)
        streams.append(torch.get_rng_state())
    assert keys_of(trainer)["test/certified/abstentions"] >= 10 / 13
    assert (smooth(module, SIGMA).certify(Rows(13).x, **FEW)[0] < 0).sum() >= 10
    assert torch.equal(*streams)


def test_sigma_and_radii_are_in_units_before_the_normalization():
    data = Rows(13, seed=1)
    scaled = Rows(13, seed=1)
    scaled.x = 4 * data.x + 1

    class Restoring(Classifier):
        def forward(self, x):
            return super().forward((x - 1) / 4)

    raw = certified(monitor(mean=-0.25, std=0.25), _like(Restoring()), loader(scaled))
    assert raw == pytest.approx(certified(monitor()), abs=1e-6)


def test_a_fit_is_certified_only_if_max_batches_bounds_it(tmp_path):
    module, trainer = fit([monitor()])
    assert not any("certified" in key for key in keys_of(trainer))
    expected = weights_of(module)
    saver = ModelCheckpoint(tmp_path, monitor="certified/radius", mode="max", every_n_epochs=2)
    callback = monitor(max_batches=1, every_n_epochs=2)
    module, trainer = fit([callback, saver], max_epochs=4, enable_checkpointing=True)
    assert_same(weights_of(fit(max_epochs=4)[0]), weights_of(module))  # bit for bit as without the monitor
    assert_same(weights_of(fit()[0]), expected)
    assert keys_of(trainer).keys() >= {"certified/radius", "certified_radii/0.5/accuracy"}
    assert callback.result is not None
    assert callback.result.n == 8  # one batch
    assert saver.best_model_score is not None


def test_a_fit_without_validation_needs_no_bound():
    fit([monitor()], limit_val_batches=0)
    with pytest.raises(ValueError, match="RandomizedSmoothing needs a validation"):
        fit([monitor(max_batches=1)], limit_val_batches=0)


@pytest.mark.parametrize("sanity", [0, 2])
def test_outputs_that_are_no_classes_are_refused_before_the_first_step(sanity):
    class Number(Classifier):
        def forward(self, x):
            return super().forward(x)[:, 0]

        def training_step(self, batch, batch_idx):
            raise AssertionError

        def validation_step(self, batch, batch_idx):
            pass

    with pytest.raises(ValueError, match=r"Multiclass\(\) expects"):
        fit([monitor(max_batches=1)], module=Number, num_sanity_val_steps=sanity)


def test_a_misspelled_key_is_refused():
    with pytest.raises(ValueError, match="type monitor='certified/radius'"):
        fit([monitor(max_batches=1), ModelCheckpoint(monitor="certified/radios")], enable_checkpointing=True)
    with pytest.raises(ValueError, match="'certified/radius', which a fit does not log; to log it, type max_batches=…"):
        fit([monitor(), ModelCheckpoint(monitor="certified/radius")], enable_checkpointing=True)


def test_the_curve_and_the_table_are_written(tmp_path):
    logger = TensorBoardLogger(tmp_path, "", "")
    callback = monitor(max_batches=1)
    _, trainer = fit([RobustnessMonitor(noise.Gaussian(), [0.1]), callback], logger=logger, max_epochs=1)
    trainer.test(trainer.lightning_module, loader(), verbose=False)
    found = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload().Tags()
    assert {"certified_figures/curve", "test/certified_figures/curve"} <= set(found["images"])
    assert {"certified/radius", "certified_radii/0.25/accuracy", "test/certified/abstentions"} <= set(found["scalars"])
    table = (tmp_path / "test" / "certified" / "certified.md").read_text()
    assert re.search(r"\| 0\.25 +\| [\d.]+ \([\d.]+ to [\d.]+\) +\|", table)
    assert (tmp_path / "certified" / "certified.md").exists()
    assert Certified.read(tmp_path / "test" / "certified" / "certified.json") == callback.result
    assert (tmp_path / "robustness" / "report.json").exists()


def test_what_is_not_known_is_null_in_the_file(tmp_path):
    callback, file = monitor(), tmp_path / "certified.json"
    certified(callback, data=loader(Rows(1)))  # one sample has no interval
    assert callback.result is not None
    callback.result.write(file)
    assert json.loads(file.read_text(), parse_constant=pytest.fail)["low"][0] is None
    np.testing.assert_equal(asdict(Certified.read(file)), asdict(callback.result))


@pytest.mark.parametrize("text", ["{", "[]", "null", "{}", '{"radii": [0.0]}', '{"radii": 1}'])
def test_a_file_that_holds_no_result_is_refused_in_words(tmp_path, text):
    file = tmp_path / "certified.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"is not a result that can be read .* give a certified.json that a Randomized"):
        Certified.read(file)


def test_results_are_drawn_side_by_side():
    callback = monitor()
    certified(callback)
    assert callback.result is not None
    figure = plots.certified_accuracy(callback.result, callback.result, names=["with", "without"])
    assert len(figure.axes[0].lines) == 2
    assert figure.axes[0].get_xlabel() == "L2 radius"
    last = np.asarray(figure.axes[0].lines[0].get_xydata())[-1]
    assert last.tolist() == [callback.result.radii[-1], 0.0]  # beyond, nothing is certified


def _test_on_two_ranks(folder: Any, expected: dict[str, float]) -> None:
    class Sampled(Classifier):
        def test_dataloader(self):
            data = Rows(13, seed=1)  # one row is repeated
            return loader(data, batch_size=4, sampler=DistributedSampler(data, shuffle=False))

    trainer = make_trainer([monitor()], accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=False)
    trainer.test(_like(Sampled()), verbose=False)
    found = {key.removeprefix("test/"): value for key, value in keys_of(trainer).items()}
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_two_ranks_certify_what_one_does(tmp_path):
    expected = {key: value for key, value in certified(monitor()).items() if key.startswith("certified")}
    execute(_test_on_two_ranks, tmp_path / "run", expected, ranks=2)


@pytest.mark.slow
def test_training_with_the_noise_certifies_more():
    radii = []
    for callbacks in ([], [InputNoise(noise.Gaussian(), 1.0)]):
        module, _ = fit(callbacks, max_epochs=20, train=loader(Rows(200), batch_size=20, shuffle=True))
        found = RandomizedSmoothing(1.0, n0=20, n=100)
        certified(found, module, loader(Rows(100, seed=2), batch_size=100))
        assert found.result is not None
        radii.append(found.result.radius)
    assert radii[1] > radii[0]
