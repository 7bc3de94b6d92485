"""The evidence on real data: its claims, its statistics and its measures; the trainings themselves take hours."""

from __future__ import annotations

import json

import pytest
import torch
from scipy.stats import ttest_rel

from benchmarks.evidence.cards import SUBJECTS, under
from benchmarks.evidence.claims import ARTICLE, OURS, Claim, best_constant, difference, families, outcome
from benchmarks.evidence.networks import Module, network
from benchmarks.evidence.recipes import RECIPES, SHAPES, callbacks
from benchmarks.evidence.report import report
from benchmarks.evidence.runs import Run, calibration_error, measured, score, under_weight_noise
from benchmarks.evidence.tasks import noisy, split
from benchmarks.tables import RESULTS
from lightning_noise import metrics, noise
from lightning_noise.callbacks.base import NoiseCallback

CLAIMS = [*ARTICLE, *OURS]
PLACE = ("mnist", "plain")


@pytest.mark.parametrize("place", RECIPES, ids=str)
def test_every_recipe_makes_noise_callbacks(place):
    for recipe in RECIPES[place]:
        made = callbacks(place[0], place[1], recipe)
        assert all(isinstance(each, NoiseCallback) for each in made)
        assert bool(made) == (recipe != "none")


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.says} {claim.task}")
def test_every_claim_compares_recipes_of_its_task(claim):
    assert claim.recipe in RECIPES[claim.task]
    assert claim.versus in RECIPES[claim.task] or claim.versus in ("best input", "best weights")
    assert (claim.at_least is None) != (claim.at_most is None)


@pytest.mark.parametrize("site", ["input", "weights", "smoothing"])
def test_the_schedules_of_a_site_have_one_mean_level(site):
    doses = {}
    for recipe in (each for each in SHAPES if each.startswith(f"{site} ")):
        (callback,) = callbacks(*PLACE, recipe)
        level = callback.level
        doses[recipe] = level if isinstance(level, float) else level.mean_dose(steps=25 * 47, epochs=25)
    assert doses == pytest.approx(dict.fromkeys(doses, doses[f"{site} constant"]), rel=0.05)  # every 2nd of 25 epochs: 13


def test_a_difference_is_that_of_a_paired_t_test():
    one, two = {0: 3.0, 1: 4.5, 2: 5.0, 3: 9.0}, {3: 7.5, 2: 4.0, 1: 4.25, 0: 1.0, 4: 8.0}
    found, expected = difference(one, two), ttest_rel([3.0, 4.5, 5.0, 9.0], [1.0, 4.25, 4.0, 7.5])
    assert found is not None
    assert (found.mean, found.t, found.n) == pytest.approx((1.1875, expected.statistic, 4))
    assert difference({0: 1.0}, {0: 2.0}) is None
    same = difference(one, one)
    assert same is not None
    assert same.t == 0


def record(recipe: str, seed: int, noisy: float) -> tuple[Run, dict]:
    part = {"clean": 0.9, "weights": 0.5, **dict.fromkeys(("gaussian", "shot", "impulse", "speckle"), noisy), "ece": 0.1}
    run = Run(*PLACE, recipe, seed)
    return run, {**run._asdict(), "validation": part, "test": part}


def test_a_claim_is_judged_by_the_interval_of_its_difference():
    runs = dict(
        record(recipe, seed, noisy + 0.01 * seed * wobble)
        for recipe, noisy, wobble in [
            ("none", 0.5, 0),
            ("input 0.5", 0.7, 1),
            ("input 2", 0.6, 1),
            ("input governed from 0", 0.702, 1),
        ]
        for seed in range(3)
    )
    records = {}
    for run, found in runs.items():
        records.setdefault(run[:3], {})[run.seed] = found
    assert best_constant(records, PLACE, "input") == "input 0.5"
    verdicts = {}
    for least in (10.0, 21.0, 30.0):
        claim = Claim("", PLACE, "input 0.5", "none", "noisy", at_least=least)
        found = outcome(claim, records)
        assert found is not None
        verdicts[least] = claim.verdict(found[1])
    assert verdicts == {10.0: "holds", 21.0: "open", 30.0: "**fails**"}
    found = outcome(Claim("", PLACE, "input governed from 0", "best input", "noisy", at_least=-1), records)
    assert found is not None
    assert found[0] == "input 0.5"
    assert found[1].mean == pytest.approx(0.2)
    assert "| Gaussian noise in the inputs helps under noise |" not in report(runs), "input 0.7 was not trained"
    assert "| input governed from 0 | 3 | 90.0 ± 0.0 | 71.2 ± 0.6 |" in report(runs)


def test_the_noise_of_the_training_is_the_seen_noise():
    first = {recipe: families({"task": "mnist", "recipe": recipe})[0] for recipe in ("none", "impulse 0.2", "weights 0.6")}
    assert first == {"none": "gaussian", "impulse 0.2": "impulse", "weights 0.6": "weights"}


def test_what_each_noise_does_was_measured():
    subjects = {value.title: (task, value) for task, _, values in SUBJECTS for value in values}
    public = {name for name in noise.__all__ if isinstance(getattr(noise, name), type)} - {"Noise", "Transform"}  # any function
    assert subjects.keys() == public == json.loads((RESULTS / "noises.json").read_text()).keys()
    for task, value in subjects.values():
        x, y = split(task, 0)["test"] if task != "power" else (torch.randn(20, 1, 24), torch.arange(20) % 2)
        module = Module(network(x, 10, "plain")).eval()
        before = {name: each.clone() for name, each in module.state_dict().items()}
        assert 0 <= under(module, value, x, y) <= 1
        torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)


def test_columns_are_standardized_by_the_training_part():
    parts = split("wine", 0)
    torch.testing.assert_close(parts["train"][0].mean(0), torch.zeros(13), atol=1e-5, rtol=0)
    torch.testing.assert_close(parts["train"][0].std(0), torch.ones(13))
    assert parts["test"][0].mean(0).abs().max() > 0.01


def test_flips_are_those_of_the_middle_level_of_the_first_noise():
    run = Run("wine", "plain", "none", 0)
    x = split("wine", 0)["test"][0]
    module = Module(network(x, 3, "plain"))
    flips = module(x).argmax(1) != module(noisy("wine", 0)["test"]["gaussian"][2]).argmax(1)
    assert measured(module, run, "test")["flips"] == pytest.approx(flips.float().mean().item(), abs=1e-5)


def test_measures_are_those_of_the_package():
    output, y = torch.randn(500, 7, generator=torch.Generator().manual_seed(0)) * 3, torch.arange(500) % 7
    ece = metrics.ExpectedCalibrationError()
    ece.update(output, y)
    # the package sums confidences in fixed point
    assert calibration_error(output, y) == pytest.approx(ece.compute().item(), abs=1e-5)
    numbers = torch.randn(50)
    assert score(numbers[:, None], numbers) == 1
    assert score(numbers.mean().expand(50, 1), numbers) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("x", "net"),
    [
        (torch.randn(5, 1, 28, 28), "batchnorm"),
        (torch.randn(5, 12, 29), "plain"),
        (torch.randn(5, 13), "plain"),
        (torch.arange(1, 61).view(5, 12), "transformer"),
    ],
    ids=["images", "series", "table", "text"],
)
def test_networks_fit_their_data_and_noise_in_the_weights_is_undone(x, net):
    module = Module(network(x, 3, net))
    before = [parameter.clone() for parameter in module.parameters()]
    with torch.no_grad():
        assert 0 <= under_weight_noise(module, x, torch.arange(5) % 3) <= 1
        assert module(x).shape == (5, 3)
    torch.testing.assert_close(list(module.parameters()), before, rtol=0, atol=0)
