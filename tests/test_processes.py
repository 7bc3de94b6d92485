"""Two processes give the replicas and the measurements of one."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import Rows, execute, fit, keys_of, make_trainer
from pytorch_lightning.callbacks import LambdaCallback
from scripts import fit_validate_test, returned_results, sharded_parameters

from lightning_noise import Key, noise
from lightning_noise.perturb.weights import RelativeTo, unit_of, weight_noise

Result = dict[str, Any]


def run(folder: Path, strategy: str, devices: int, level: float) -> list[Result]:
    """What each process wrote, the part of the fit and that of the validation in one."""
    execute(fit_validate_test.main, folder, strategy, devices, level)
    return [torch.load(folder / f"fit-{rank}.pt") | torch.load(folder / f"{rank}.pt") for rank in range(devices)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("processes") / "alone", "auto", 1, 0.5)[0]


@pytest.fixture(scope="module", params=["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def noisy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return run(tmp_path_factory.mktemp("processes") / "noisy", request.param, 2, 0.5)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return run(tmp_path_factory.mktemp("processes") / "clean", "ddp_fork", 2, 0.0)


def test_the_replicas_stay_bitwise_equal(noisy):
    one, two = noisy
    assert all(torch.equal(one["weights"][key], two["weights"][key]) for key in one["weights"])


def test_the_input_noise_differs_between_the_processes(noisy, clean):
    added = [noisy[rank]["seen"][0] - clean[rank]["seen"][0] for rank in range(2)]
    assert all(part.abs().min() > 0 for part in added)
    assert not torch.allclose(added[0], added[1])


def test_the_weight_noise_differs_between_the_processes(noisy, clean):
    one, two = noisy
    assert torch.equal(clean[0]["used"][0], clean[1]["used"][0])
    assert all(not torch.equal(a, b) for a, b in zip(one["used"], two["used"], strict=True))


def test_the_activation_noise_differs_between_the_processes(noisy, clean):
    one, two = (next(added for added in result["activation"] if added.any()) for result in noisy)
    assert one.shape == two.shape
    assert not torch.allclose(one, two)
    assert not any(added.any() for result in clean for added in result["activation"])


def test_the_gradient_noise_is_the_same_on_both_processes(noisy, clean):
    one, two = noisy
    for key in ("gradients", "noisy gradients"):
        assert len(one[key]) == 4
        assert all(torch.equal(a, b) for a, b in zip(one[key], two[key], strict=True))
    assert all((a != b).all() for a, b in zip(one["gradients"], one["noisy gradients"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(clean[0]["gradients"], clean[0]["noisy gradients"], strict=True))


def test_the_data_set_is_untouched_on_each_process(noisy):
    for result in noisy:
        assert torch.equal(result["data"], Rows().x)


def clean_and_noisy(result: Result) -> list[torch.Tensor]:
    """The inputs of the three forward passes of the monitor, a tensor each; the module's own come last."""
    n_batches = len(result["evaluated"]) // 4  # then the monitor of the next loader comes, before the module knows of it
    return [torch.cat(result["evaluated"][i : 4 * n_batches : 4]) for i in range(3)]


def test_the_probe_is_bitwise_that_of_one_process(noisy, alone):
    whole = clean_and_noisy(alone)
    assert torch.equal(whole[0], Rows(13, seed=1).x)
    for rank, result in enumerate(noisy):
        for part, all_ in zip(clean_and_noisy(result), whole, strict=True):
            mine = all_[rank::2]
            # thirteen samples on two processes: the second repeats one to have seven, too
            assert len(part) == 7
            assert torch.equal(part[: len(mine)], mine)


@pytest.mark.parametrize("loader", ["robustness", "subset", "pairs", "batches"])
def test_the_measurements_are_those_of_one_process(loader, noisy, alone):
    measured = {key for key in alone["validated"] if key.startswith((f"{loader}/", f"{loader}_levels/"))}
    # the summary, of which the user's metrics have no retention, and the metrics under two noises
    assert len(measured) == (7 + 2 * 2 if loader in ("pairs", "batches") else 10 + 2 * 3)
    for result in noisy:
        for key in measured:
            # counts are exact; confidences and losses come from batches of another size, in float32
            torch.testing.assert_close(result["validated"][key], alone["validated"][key], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_rows_that_are_no_samples_are_all_counted(noisy, alone):
    for result in noisy:
        for metric in ("accuracy", "loss"):
            key = f"views/{metric}_clean"
            torch.testing.assert_close(result["validated"][key], alone["validated"][key], rtol=1e-5, atol=1e-6)


def test_early_stopping_ends_all_processes_at_once(noisy):
    assert [result["epochs"] for result in noisy] == [2, 2]
    assert noisy[0]["fitted"]["robustness/score"] == noisy[1]["fitted"]["robustness/score"]


def test_the_streams_are_not_touched_on_any_process(noisy):
    assert all(result["untouched"] for result in noisy)


# --- parameters that are sharded over the processes


@pytest.fixture(scope="module", params=["data", "tensor"])
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("processes") / request.param
    execute(sharded_parameters.main, folder, request.param, "std", ranks=2)
    return request.param, folder


def results(folder: Path) -> list[Result]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_perturbed_shards(folder: Path, relative: RelativeTo | None) -> None:
    """What the shards gathered is what the keys of the shards draw."""
    one, two = results(folder)
    assert len(one["used"]) == 6
    for i, (used, before) in enumerate(zip(one["used"], one["before"], strict=True)):
        for layer, noisy, w in zip((1, 4), used, before, strict=True):
            key = Key((5, "weight", *divmod(i, 3))) / "parameter" / f"net.{layer}.weight"
            level = 0.5 if relative in (None, "filter") else 0.5 * unit_of(w[None], relative).view(1)
            unit = "filter" if relative == "filter" else None
            shards = [weight_noise(part, noise.Gaussian(), level, key / rank, unit) for rank, part in enumerate(w.chunk(2))]
            assert torch.equal(noisy, torch.cat(shards)), "also in the steps that follow a validation"
    for used_by_one, used_by_two in zip(one["used"], two["used"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(used_by_one, used_by_two, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["data"], indirect=True)  # the other does not gather what it computes with
def test_noise_in_sharded_weights_is_one_draw_for_each_shard(sharded):
    assert_perturbed_shards(sharded[1], "std")


@pytest.mark.slow
@pytest.mark.parametrize("relative", ["max", "filter"])
def test_noise_in_sharded_weights_is_in_the_units_that_are_asked_for(relative, tmp_path):
    execute(sharded_parameters.main, tmp_path / "sharded", "data", relative, ranks=2)
    assert_perturbed_shards(tmp_path / "sharded", relative)


@pytest.mark.slow
def test_sharded_weights_are_restored_saved_clean_and_probed(sharded):
    for result in results(sharded[1]):
        assert len(result["restored"]) == len(result["saved"]) == 6
        assert all(result["restored"])
        assert all(result["saved"])
        keys = ("robustness/loss_clean", "robustness_levels/probe/1e-20/loss", "robustness_levels/probe/0.5/loss")
        clean, tiny, noisy = (result["measured"][key] for key in keys)
        assert clean == tiny != noisy
        assert "sharded over ranks" in result["refused"]


@pytest.mark.slow
def test_shards_of_gradients_get_draws_of_their_own_and_replicas_the_same(sharded):
    how, folder = sharded
    clean, noisy = [], []
    for rank, result in enumerate(results(folder)):
        assert len(result["gradients"]) == 6
        for name, (is_shard, gradient) in result["gradients"].items():
            key = Key((0, "gradient", 0)) / "gradient" / name
            generator = (key / rank if is_shard else key).generator("cpu")
            found = result["noisy gradients"][name][1]
            assert torch.equal(found, noise.Gaussian()(gradient, 0.5, generator=generator))
            if is_shard or rank == 0:
                clean.append(gradient.flatten())
                noisy.append(found.flatten())
        shards = [name for name, (is_shard, _) in result["gradients"].items() if is_shard]
        assert shards == ([*result["gradients"]] if how == "data" else ["net.1.weight", "net.1.bias", "net.4.weight"])
    one, two = torch.cat(clean), torch.cat(noisy)
    ratio = pd.read_csv(folder / "metrics.csv")["train_noise/gradient/ratio"].dropna().iloc[0]
    assert ratio == pytest.approx(((two - one).norm() / one.norm()).item(), rel=1e-5)  # sums in another order, in float32


def test_the_launcher_carries_the_results_of_the_callbacks_through_a_file():
    ended, fresh = returned_results.make(), returned_results.make()
    _, worker = fit(ended, max_epochs=3)
    main = make_trainer([*fresh[::-1], LambdaCallback()], strategy="ddp_spawn")  # a module may add callbacks in the worker
    launcher: Any = main.strategy.launcher
    extra = launcher.get_extra_results(worker)
    assert len(pickle.dumps(extra)) < 20_000
    launcher.update_main_process_results(main, extra)
    assert returned_results.known(*fresh) == returned_results.known(*ended)
    assert not Path(extra["lightning_noise"]).exists()
    assert {key: value.item() for key, value in main.callback_metrics.items()} == keys_of(worker)
    launcher.update_main_process_results(main, launcher.get_extra_results(make_trainer()))  # a run without these callbacks
    assert returned_results.known(*fresh) == returned_results.known(*ended)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_the_main_process_knows_what_the_callbacks_of_the_workers_know(tmp_path, strategy):
    folder = tmp_path / "returned"
    execute(returned_results.main, folder, strategy)
    worker, main, second = (torch.load(folder / f"{name}.pt", weights_only=False) for name in ("worker", "main", "second"))
    assert main == worker
    assert "no validation" not in main["summary"]
    assert second["state"]["history"][:3] == main["state"]["history"]
    assert len(second["state"]["history"]) == 5
    saved = torch.load(folder / "last.ckpt", weights_only=True)["callbacks"]
    assert [state["state"] for state in saved.values()] == [main["state"]["state"]]
