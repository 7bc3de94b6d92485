"""Noise in the weights is that which was asked for, and leaves the weights clean."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import N_CLASSES, N_FEATURES, Rows, as_one, assert_same, fit, loader, make_trainer, weights
from helpers_weights import NOISE, Conv, Hand, Manual, Network, TwoUpdates, batches, callbacks, loss_of, weights_of
from pytorch_lightning import callbacks as callbacks_of_lightning
from pytorch_lightning.callbacks import StochasticWeightAveraging
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.utils.prune import random_unstructured
from torch.utils.checkpoint import checkpoint

from lightning_noise import Key, RobustnessMonitor, WeightNoise, noise
from lightning_noise.noise import as_noise
from lightning_noise.perturb import groups
from lightning_noise.perturb.weights import PerturbedParameters, find_parameters, select, weight_noise

# --- weights are clean whenever anybody but the forward and the backward pass can look


class Watch(pl.Callback):
    """Takes note of where the weights are noisy, in a run that does not change them."""

    HOOKS: ClassVar = [name for name in dir(pl.Callback) if name.startswith("on_") and "checkpoint" not in name]

    def __init__(self):
        self.noisy: set[str] = set()
        self.clean: list[Tensor] | None = None
        for hook in self.HOOKS:
            setattr(self, hook, self._watching(hook))

    def _watching(self, hook: str) -> Callable[..., None]:
        def watch(trainer, pl_module, *args, **kwargs):
            self.clean = weights(pl_module) if self.clean is None else self.clean
            if not all(torch.equal(one, two) for one, two in zip(weights_of(pl_module), self.clean, strict=True)):
                self.noisy.add(hook)

        return watch


def still(kind: type[Network]) -> Callable[[], Network]:
    return lambda: kind(lr=0.0)


def test_weights_are_noisy_only_until_the_backward_pass_is_over():
    for n, accumulate in ((1, 1), (2, 1), (1, 2)):
        watch = Watch()
        fit([*callbacks(n), watch], module=still(Network), val_check_interval=1, accumulate_grad_batches=accumulate)
        assert watch.noisy == {"on_before_zero_grad", "on_before_backward"}


def test_manual_updates_are_those_of_clean_weights():
    after, before = Watch(), Watch()
    fit([before, *callbacks(2), after], module=still(TwoUpdates), val_check_interval=1)
    assert after.noisy == {"on_before_backward", "on_after_backward"}
    assert before.noisy == after.noisy | {"on_before_optimizer_step"}


class Breaking(Network):
    def __init__(self, where: str, error: type[BaseException]):
        super().__init__(lr=0.0)
        self.where, self.error = where, error

    def forward(self, x):
        if self.where == "forward" and self.training:
            raise self.error("stop")
        return super().forward(x)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.where == "backward":
            loss.register_hook(self._break)
        return None if self.where == "returns None" else loss

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.where == "returns -1" else None

    def on_before_backward(self, loss):
        if self.where == "before the backward pass":
            raise self.error("stop")

    def _break(self, gradient):
        raise self.error("stop")


@pytest.mark.filterwarnings("ignore:.*training_step.* returned `None`")  # Lightning's word on it
@pytest.mark.parametrize("n", [1, 2], ids=["one noise", "two noises"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "before the backward pass", "backward", "returns None", "returns -1"])
def test_weights_are_restored_whatever_ends_the_step(where, error, n):
    module = Breaking(where, error)
    before = weights_of(module)
    clean = [w.clone() for w in before]
    trainer = make_trainer(callbacks(n), num_sanity_val_steps=0)
    if where.startswith("returns"):
        trainer.fit(module, loader(), loader())
    else:
        with pytest.raises((error, SystemExit)):
            trainer.fit(module, loader(), loader())
    assert_same(weights_of(module), clean)
    assert all(w.data_ptr() == p.data_ptr() for w, p in zip(before, module.parameters(), strict=True))
    assert not module._state_dict_hooks


class Finding(pl.Callback):
    """Keeps what it finds after an exception."""

    def on_exception(self, trainer, pl_module, exception):
        self.found = [weights(pl_module), weights(pl_module.get_submodule("net")), [w.clone() for w in weights_of(pl_module)]]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "before the backward pass", "backward"])
def test_any_callback_finds_clean_weights_after_an_exception(where, error):
    module, first, last = Breaking(where, error), Finding(), Finding()
    clean = [weights(module), weights(module.get_submodule("net")), [w.clone() for w in weights_of(module)]]
    with pytest.raises((error, SystemExit)):
        make_trainer([first, *callbacks(2), last]).fit(module, loader(), loader())
    for found in (first.found, last.found):
        for one, two in zip(found, clean, strict=True):
            assert_same(one, two)


class Saving(pl.Callback):
    """Saves in the middle of a step."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == 1:
            for weights_only in (False, True):
                trainer.save_checkpoint(self.folder / f"{weights_only}.ckpt", weights_only=weights_only)
            torch.save(pl_module.state_dict(), self.folder / "state.pt")
            self.noisy = [w.clone() for w in weights_of(pl_module)]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1:
            self.clean = weights(pl_module)


@pytest.mark.parametrize("n", [1, 2], ids=["one noise", "two noises"])
@pytest.mark.parametrize("make", [Network, Manual])
def test_what_is_saved_within_a_step_is_clean(make, n, tmp_path):
    saving = Saving(tmp_path)
    fit([*callbacks(n), saving], module=make, train=loader())
    assert not all(torch.equal(one, two) for one, two in zip(saving.noisy, saving.clean, strict=True))
    for weights_only in (False, True):
        checkpoint = torch.load(tmp_path / f"{weights_only}.ckpt", weights_only=False)
        assert_same([*checkpoint["state_dict"].values()], saving.clean)
    assert_same([*torch.load(tmp_path / "state.pt").values()], saving.clean)


class Tied(Network):
    """One weight in two layers."""

    def __init__(self):
        super().__init__()
        self.net[1] = nn.Linear(N_FEATURES, N_FEATURES)
        self.net[3] = nn.Linear(N_FEATURES, N_FEATURES)
        self.net[4] = nn.Linear(N_FEATURES, N_CLASSES)
        self.net[3].weight = self.net[1].weight
        self.used: list[Tensor] = []

    def forward(self, x):
        self.used.append(weights_of(self)[0].clone())
        return super().forward(x)


def test_a_tied_weight_gets_noise_once_and_stays_tied(tmp_path):
    saving = Saving(tmp_path)
    module, _ = fit([WeightNoise(**NOISE), saving], module=Tied, train=loader(), limit_val_batches=0)
    assert module.net[1].weight is module.net[3].weight
    pl.seed_everything(0, verbose=False)
    key, clean = Key((5, "weight", 0, 0), rank=0) / "parameter", dict(Tied().named_parameters())
    matrices = {name: clean[name].detach() for name in ("net.1.weight", "net.4.weight")}
    noisy = as_one(matrices, lambda first, w: (key / first).apply(noise.Gaussian(), w, 0.5))
    assert torch.equal(module.used[0], noisy["net.1.weight"])
    saved = torch.load(tmp_path / "state.pt")
    assert torch.equal(saved["net.1.weight"], saving.clean[0])
    assert saved["net.1.weight"].data_ptr() == saved["net.3.weight"].data_ptr()


def averaging() -> list[pl.Callback]:
    """The callbacks of this Lightning that average weights."""
    averages: list[pl.Callback] = [StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)]
    for name in ("WeightAveraging", "EMAWeightAveraging"):
        averages += [getattr(callbacks_of_lightning, name)()] if hasattr(callbacks_of_lightning, name) else []
    return averages


@pytest.mark.parametrize("i", range(len(averaging())), ids=[type(average).__name__ for average in averaging()])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_averages_are_those_of_clean_weights(i, first):
    """With a learning rate of 0 every average is what the weights are."""
    average = averaging()[i]
    if isinstance(average, StochasticWeightAveraging):
        average._swa_lrs = 0.0
    noisy: list[pl.Callback] = [*callbacks(2)]
    module, _ = fit([average, *noisy] if first else [*noisy, average], module=still(Network), max_epochs=3)
    pl.seed_everything(0, verbose=False)
    # a mean of equal numbers is off by its rounding
    torch.testing.assert_close(weights(module), weights(still(Network)()), rtol=1e-6, atol=0)


class Normalised(Network):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(N_FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, N_CLASSES))


def test_statistics_of_batch_normalisation_are_those_of_the_noisy_passes():
    """Restored after each pass, they would be those of the initialisation for ever."""
    module, _ = fit([WeightNoise(**NOISE)], module=Normalised, train=loader())
    pl.seed_everything(0, verbose=False)
    expected = Normalised()
    loop = Hand(expected, 1)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    expected.train()
    for epoch, i, batch in batches():
        optimizer.zero_grad()
        with loop.noise(epoch, i, levels={"weight": 0.5}):
            loss_of(expected, batch).backward()
        optimizer.step()
    assert_same(weights(module), weights(expected))
    x = Rows(13, seed=1).x
    assert torch.equal(module.eval()(x), expected.eval()(x))
    assert not torch.equal(module.net[2].running_var, torch.ones(8))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints_are_recomputed_with_the_noisy_weights(reentrant):
    class Checkpointed(Network):
        def forward(self, x):
            return checkpoint(self.net, x.requires_grad_(), use_reentrant=reentrant)

    for gradient in ("straight_through", "reparametrized"):
        callback = {"noise": noise.Speckle(), "level": 0.5, "gradient": gradient}
        with_, _ = fit([WeightNoise(**callback)], module=Checkpointed)
        without, _ = fit([WeightNoise(**callback)], module=Network)
        assert_same(weights(with_), weights(without))


# --- which parameters, in which units


def unfreeze(module):
    module[1].weight.requires_grad_()


def freeze(module):
    module[0].weight.requires_grad_(False)


def replace(module):
    module[0].weight = nn.Parameter(torch.ones(4, 4))


def add(module):
    module.append(nn.Linear(4, 4))


def rename(module):
    last = module.pop(2)
    module.add_module("last", last)


def tie(module):
    module[1].weight = module[0].weight


def widen(module):
    module[0].weight.data = torch.ones(5, 4)


def transpose(module):
    module[0].weight.data = torch.ones(4, 4).t().contiguous().t()


def prune(module):
    random_unstructured(module[0], "weight", 0.5)


@pytest.mark.parametrize(
    "change",
    [freeze, unfreeze, replace, add, rename, tie, widen, transpose, prune, nn.Module.double],
    ids=lambda change: change.__name__,
)
def test_a_selection_is_used_again_until_the_parameters_change(change):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight.requires_grad_(False)
    last = select(module, None, noise.Gaussian())
    assert select(module, None, noise.Gaussian(), last) is last
    change(module)
    now = select(module, None, noise.Gaussian(), last)
    assert now is not last
    assert now.names == {parameter: name for name, parameter in find_parameters(module).items()}
    assert select(module, None, noise.Gaussian(), now) is now


def test_the_units_of_the_level_are_what_they_are_called():
    w = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    key = Key(("a",))
    drawn = weight_noise(w, noise.Gaussian(), 1.0, key) - w
    added = {unit: weight_noise(w, noise.Gaussian(), 0.3, key, unit) - w for unit in ("std", "max", "filter")}
    # one rounding of the sum, and one of the difference
    torch.testing.assert_close(added["std"], 0.3 * w.std(correction=0) * drawn, rtol=0, atol=1e-14)
    torch.testing.assert_close(added["max"], 0.3 * w.abs().max() * drawn, rtol=0, atol=1e-14)
    torch.testing.assert_close(added["filter"].flatten(1).norm(dim=1), 0.3 * w.flatten(1).norm(dim=1), rtol=1e-12, atol=0)
    torch.testing.assert_close(F.normalize(added["filter"].flatten(1)), F.normalize(drawn.flatten(1)), rtol=0, atol=1e-12)


class Zeros(Network):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(N_FEATURES, N_CLASSES)
        nn.init.zeros_(self.net.weight)


@pytest.mark.parametrize(("level", "warns"), [(0.05, 0), (1.0, 1)])
def test_noise_above_weights_that_began_at_0_is_warned_of_halfway(level, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([WeightNoise(noise.Gaussian(), level)], module=Zeros, log_every_n_steps=1, max_epochs=5)
    messages = [str(warning.message) for warning in caught if "as strong as the weights" in str(warning.message)]
    assert len(messages) == warns


def test_a_filter_whose_noise_is_zero_stays():
    w = torch.full((2, 9), 100.0)
    assert torch.equal(weight_noise(w, noise.as_noise(lambda x, level, *, generator: x), 0.3, Key((0,)), "filter"), w)


@pytest.mark.parametrize("unit", ["std", "max", "filter"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(unit, dtype):
    w = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = weight_noise(w.float(), noise.Gaussian(), 0.3, Key(()), unit).to(dtype)
    assert torch.equal(weight_noise(w, noise.Gaussian(), 0.3, Key(()), unit), expected)


@pytest.mark.parametrize("unit", [None, "std", "max", "filter"])
@pytest.mark.parametrize("w", [torch.tensor(2.0), torch.ones(3), torch.zeros(2, 3)], ids=repr)
def test_tensors_without_a_second_dimension_or_size_get_finite_noise(w, unit):
    y = weight_noise(w, noise.Gaussian(), 0.3, Key(()), unit)
    assert y.shape == w.shape
    assert y.isfinite().all()
    if unit is not None and not w.any():
        assert torch.equal(y, w), "relative to nothing is nothing"


def test_parameters_are_selected_by_patterns():
    module = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.BatchNorm1d(3), "c": nn.Embedding(4, 2)})
    module["c"].weight.requires_grad_(False)
    assert list(find_parameters(module)) == ["a.weight"]
    assert list(find_parameters(module, "*")) == ["a.weight", "a.bias", "b.weight", "b.bias", "c.weight"]
    assert list(find_parameters(module, ["c.*", "a.bias"])) == ["a.bias", "c.weight"]
    module["a"] = torch.compile(module["a"])  # type: ignore[assignment]
    assert list(find_parameters(module)) == ["a.weight"]
    with pytest.raises(ValueError, match=r"no parameter matches 'd\.\*'; parameters are: 'a.weight', 'a.bias', "):
        find_parameters(module, ["a.*", "d.*"])
    with pytest.raises(ValueError, match=r"no trained parameter has two dimensions; type params=…; parameters are: 'weight'"):
        find_parameters(nn.BatchNorm1d(3))


def test_only_the_selected_parameters_get_noise():
    class Looking(Network):
        def forward(self, x):
            self.used = [w.clone() for w in weights_of(self)]
            return super().forward(x)

    callback = WeightNoise(noise.Gaussian(), 0.5, params="net.4.*")
    module, _ = fit([callback], module=lambda: Looking(lr=0.0), limit_val_batches=0)
    changed = [not torch.equal(one, two) for one, two in zip(module.used, weights_of(module), strict=True)]
    assert changed == [False, False, True, True]


def test_parameters_of_one_shape_have_draws_of_their_own():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module.load_state_dict({name: torch.zeros_like(w) for name, w in module.state_dict().items()})
    noisy = PerturbedParameters(module, "*", noise.Gaussian(), 1.0, Key(()))
    noisy.enter()
    one, two = weights_of(module)[::2]
    assert not torch.equal(one, two)


def mixed() -> nn.Module:
    """Parameters of several shapes, dtypes, sizes and orders of memory."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        nn.Conv2d(3, 8, 3),
        nn.Linear(20, 100),
        nn.Linear(100, 20, dtype=torch.bfloat16),
        nn.ParameterList([nn.Parameter(torch.randn(30, 40).t()), torch.randn(40, 30, dtype=torch.float64), torch.tensor(2.0)]),
    )


@pytest.mark.parametrize("limit", [1, 2500, 2**22], ids=["each alone", "some groups", "as few groups as possible"])
@pytest.mark.parametrize("relative", [None, "std", "max", "filter"])
def test_parameters_of_all_kinds_get_independent_noise_of_the_level_and_are_restored(relative, limit, monkeypatch):
    monkeypatch.setattr(groups, "_ELEMENTS", limit)
    module = mixed()
    clean, strides = [w.clone() for w in weights_of(module)], [w.stride() for w in weights_of(module)]
    noisy = PerturbedParameters(module, "*", noise.Gaussian(), 0.1, Key((0,)), relative=relative)
    noisy.enter()
    z = [(one.float() - two.float()) / 0.1 for one, two in zip(weights_of(module), clean, strict=True)]
    noisy.check_untouched(by_value=True)
    noisy.exit()
    assert_same(weights_of(module), clean)
    assert [w.stride() for w in weights_of(module)] == strides
    for drawn, w in zip(z, map(Tensor.float, clean), strict=True):
        if w.numel() <= 100:
            continue
        if relative == "filter":
            # what bfloat16 rounds is small beside the noise of a row
            torch.testing.assert_close(drawn.flatten(1).norm(dim=1), w.flatten(1).norm(dim=1), rtol=0.01, atol=0)
            continue
        unit = 1.0 if relative is None else (w.std(correction=0) if relative == "std" else w.abs().max())
        # five standard errors of a variance; bfloat16 rounds the noisy weights, which adds less than a thousandth to it
        assert abs((drawn / unit).var() - 1) < 5 * math.sqrt(2 / w.numel()) + 0.001
    same = [(i, j) for i in range(len(z)) for j in range(i) if z[i].shape == z[j].shape and z[i].numel() > 100]
    for i, j in same:
        correlation = torch.corrcoef(torch.stack([z[i].flatten(), z[j].flatten()]))[0, 1]
        assert correlation.abs() < 5 / math.sqrt(z[i].numel())
    assert len(same) >= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"params": "encoder.*"}, r"no parameter matches 'encoder\.\*'; parameters are: 'net\.1\.weight', 'net\.1\.bias', "),
        ({"noise": noise.Shot()}, "Shot needs data that are not negative"),
        # the convolution comes first, and is perturbed by then
        ({"noise": noise.PatchGaussian(3)}, "PatchGaussian needs samples of at least 2 axes"),
    ],
    ids=str,
)
def test_what_cannot_work_is_found_in_the_first_batch_though_the_level_is_0(arguments, message):
    pl.seed_everything(0, verbose=False)
    module = Conv()
    before = [w.clone() for w in weights_of(module)]
    with pytest.raises(ValueError, match=message):
        fit([WeightNoise(**{"noise": noise.Gaussian(), "level": 0.0} | arguments)], module=module)
    assert_same(weights_of(module), before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"level": -0.1}, ValueError, "a level must be finite and not negative"),
        ({"noise": noise.Speckle(), "relative": "std"}, ValueError, "relative='std' needs an additive noise"),
        ({"noise": noise.Gaussian}, TypeError, "a noise must be a value such as"),
        ({"relative": "mean"}, ValueError, "relative must be 'std', 'max', 'filter' or None, got 'mean'"),
        ({"gradient": "true"}, ValueError, "gradient must be 'straight_through' or 'reparametrized', got 'true'"),
        ({"noise": noise.DropConnect(), "level": 1.1}, ValueError, r"a level must be in \[0, 1\]"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        WeightNoise(**{"noise": noise.Gaussian(), "level": 0.1} | arguments)


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_a_strategy_without_whole_parameters_is_refused_where_there_is_noise(name):
    def strategy() -> Any:
        return type(name, (SingleDeviceStrategy,), {})(device="cpu")

    for callback in (WeightNoise(**NOISE), RobustnessMonitor(WeightNoise(**NOISE), [0.1])):
        with pytest.raises(ValueError, match=f"'weight' cannot work with {name}, which has no whole parameters"):
            fit([callback], strategy=strategy())
    make_trainer([WeightNoise(**NOISE)], strategy=strategy()).test(Network(), loader(), verbose=False)


# --- the log, the warning and the probe


def test_the_ratio_of_noise_to_weights_is_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    module = still(Network)()
    fit([WeightNoise(noise.SNR(), 0.25)], module=module, train=loader(), logger=logger, log_every_n_steps=1)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train_noise/weight/ratio")
    ratios = [float(value) for row in rows[1:] if (value := row.split(",")[column])]
    assert len(ratios) == 6
    # the noise of each row has exactly a quarter of its norm, up to the rounding of single sums
    assert ratios == pytest.approx([0.25] * 6, rel=1e-5)


GROWTH = pytest.mark.parametrize(
    ("arguments", "warns"),
    [({}, True), ({"relative": "std"}, False), ({"noise": noise.Speckle()}, False)],
    ids=str,
)


class Growing(Network):
    """Its weights are three times as large after an epoch."""

    def on_train_epoch_end(self):
        with torch.no_grad():
            next(self.parameters()).mul_(3)


@GROWTH
def test_weights_that_outgrow_the_noise_are_warned_of_once_without_a_logger(arguments, warns):
    callback = WeightNoise(**NOISE | {"level": 0.01} | arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([callback], module=lambda: Growing(lr=0.0), log_every_n_steps=1, max_epochs=4)
    messages = [str(warning.message) for warning in caught if "doubled" in str(warning.message)]
    assert len(messages) == warns
    assert all(
        "such as 'net.1.weight', have more than doubled since the noise 'weight' began" in message for message in messages
    )


@pytest.mark.parametrize(("level", "relative", "warns"), [(20.0, None, 1), (0.1, None, 0), (20.0, "std", 0)])
def test_noise_far_above_the_weights_is_warned_of_once(level, relative, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([WeightNoise(noise.Gaussian(), level, relative=relative)], log_every_n_steps=1, max_epochs=2)
    messages = [str(warning.message) for warning in caught if "as strong as the weights" in str(warning.message)]
    assert len(messages) == warns
    assert all("type relative='std'" in message for message in messages)


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_as_a_probe_the_noise_is_one_draw_for_all_batches_and_leaves_the_weights(verb):
    class Looking(Network):
        def forward(self, x):
            if not self.training:
                used.append(weights_of(self)[0].clone())
            return super().forward(x)

    used: list[Tensor] = []
    pl.seed_everything(0, verbose=False)
    module = Looking(lr=0.0)
    clean = weights(module)
    trainer = make_trainer([RobustnessMonitor(WeightNoise(noise.Gaussian(), 0.1, relative="std"), [0.5])], max_epochs=1)
    if verb == "fit":
        trainer.fit(module, loader(), loader(Rows(13, seed=1), batch_size=5))
    else:
        trainer.validate(module, loader(Rows(13, seed=1), batch_size=5), verbose=False)
    noisy = used[-2]
    assert not torch.equal(noisy, clean[0])
    for i, w in enumerate(used[-9:]):  # for each of three batches the clean one, the noisy one and that of the module
        assert torch.equal(w, noisy if i % 3 == 1 else clean[0])
    assert_same(weights(module), clean)


def test_a_noise_may_return_the_weights_themselves():
    layer = nn.Linear(2, 2)
    clean = [layer.weight.detach().clone()]
    noisy = PerturbedParameters(layer, None, as_noise(lambda w, level, *, generator: w), 0.1, Key((0,)))
    noisy.enter()
    with torch.no_grad():
        layer.weight.add_(0.0)  # a write, after which the weights are compared with what they were
    noisy.check_untouched([layer.weight])  # type: ignore[list-item]
    noisy.exit()
    assert_same([layer.weight.detach()], clean)
