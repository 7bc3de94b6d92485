"""Noise in the gradients, against loops that are written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import DEVICE, N_CLASSES, N_FEATURES, Classifier, Rows, as_one, assert_same, fit, loader, make_trainer, weights
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.utils.prune import random_unstructured

from lightning_noise import GradientNoise, InputNoise, Key, RobustnessMonitor, WeightNoise, noise, schedules
from lightning_noise.callbacks.gradients import _check_draws_agree
from lightning_noise.noise import as_noise
from lightning_noise.schedules import Progress


class Plain(Classifier):
    """Without dropout, so that a loop by hand draws nothing from the global streams either."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.net[3] = nn.Identity()


class Adam(Plain):
    fused = False

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01, fused=self.fused)


class Fused(Adam):
    fused = True


class LBFGS(Plain):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


class Frozen(Plain):
    def __init__(self):
        super().__init__()
        self.net[1].requires_grad_(False)


class Tied(Plain):
    """The second layer has the weight of the first."""

    def __init__(self):
        super().__init__()
        self.net[4] = nn.Linear(8, 8)
        self.net[4].weight = self.net[1].weight


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class Gradients(pl.Callback):
    """Keeps the gradients that it finds before each update."""

    def __init__(self):
        self.kept: list[dict[str, Tensor | None]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        found = ((name, parameter.grad) for name, parameter in pl_module.named_parameters())
        self.kept.append({name: None if gradient is None else gradient.clone() for name, gradient in found})


def before_and_after(callback: GradientNoise, **kwargs: Any) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """The gradients of each update, clean and noisy; both are None, or neither."""
    before, after = Gradients(), Gradients()
    fit([before, callback, after], **{"train": loader(), "module": Plain, **kwargs})
    pairs = [
        {name: (one[name], two[name]) for name in one if (one[name] is None) == (two[name] is None)}
        for one, two in zip(before.kept, after.kept, strict=True)
    ]
    assert all(len(pair) == len(one) for pair, one in zip(pairs, before.kept, strict=True))
    return [{name: pair for name, pair in step.items() if pair[0] is not None} for step in pairs]  # type: ignore[misc]


def drawn(gradients: dict[str, Tensor], step: int, level: float = 0.5) -> dict[str, Tensor]:
    """What the key of an update makes of its gradients."""
    key = Key((0, "gradient", step)) / "gradient"
    return as_one(gradients, lambda first, g: noise.Gaussian()(g, level, generator=(key / first).generator("cpu")))


def add_noise(module: nn.Module, step: int, level: float = 0.5) -> None:
    parameters = dict(module.named_parameters())
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    for name, noisy in drawn(gradients, step, level).items():
        parameters[name].grad = noisy


def by_hand(
    make: Callable[[], Any], *, level: float = 0.5, accumulate: int = 1, clip: float = 0.0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The weights after two epochs of a loop in plain torch."""
    pl.seed_everything(0, verbose=False)
    module = make().to(dtype)
    optimizer: torch.optim.Optimizer = module.configure_optimizers()
    batches = list(loader())
    step = 0

    def closure() -> Any:
        x, y = batches[i]
        if i % accumulate == 0:
            optimizer.zero_grad()
        loss = F.cross_entropy(module(x.to(dtype)), y) / accumulate
        loss.backward()
        if updates:
            add_noise(module, step, level)
            if clip:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
        return loss

    for _ in range(2):
        for i in range(len(batches)):
            updates = (i + 1) % accumulate == 0 or i + 1 == len(batches)
            if updates:
                optimizer.step(closure)
                step += 1
            else:
                closure()
    return weights(module)


# --- the loops


RUNS: dict[str, tuple[type[Classifier], dict[str, Any], dict[str, Any]]] = {
    "SGD": (Plain, {}, {}),
    "Adam, clipped by norm after the noise": (Adam, {"gradient_clip_val": 0.1}, {"clip": 0.1}),
    "accumulation with a ragged tail": (Plain, {"accumulate_grad_batches": 2}, {"accumulate": 2}),
    "LBFGS": (LBFGS, {}, {}),
    "bf16-true": (Plain, {"precision": "bf16-true"}, {"dtype": torch.bfloat16}),
    "64-true": (Plain, {"precision": "64-true"}, {"dtype": torch.float64}),
    "frozen parameters": (Frozen, {}, {}),
    "tied parameters": (Tied, {}, {}),
}


@pytest.mark.parametrize(("module", "settings", "own"), RUNS.values(), ids=RUNS)
def test_a_run_is_bitwise_the_loop_by_hand(module, settings, own):
    noisy, _ = fit([GradientNoise(noise.Gaussian(), 0.5)], module=module, train=loader(), **settings)
    assert_same(weights(noisy), by_hand(module, **own))


def test_manual_optimization_is_bitwise_the_automatic_one():
    noisy, _ = fit([GradientNoise(noise.Gaussian(), 0.5)], module=Manual, train=loader())
    assert_same(weights(noisy), by_hand(Plain))


class TwoOptimizers(Plain):
    """Both update once in each step, the second twice."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):  # type: ignore[override]
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (1, 4)]

    def training_step(self, batch, batch_idx):
        self.train_on(batch, self.optimizers())

    def train_on(self, batch: Any, optimizers: Any, before_step: Callable[[nn.Module], None] = lambda layer: None) -> None:
        for optimizer, layer in [(optimizers[0], 1), (optimizers[1], 4), (optimizers[1], 4)]:
            self.zero_grad()
            F.cross_entropy(self(batch[0]), batch[1]).backward()
            before_step(self.net[layer])
            optimizer.step()


def test_each_of_several_optimizers_gets_noise_of_its_own_in_its_own_parameters():
    noisy, trainer = fit([GradientNoise(noise.Gaussian(), 0.5)], module=TwoOptimizers, train=loader())
    assert trainer.global_step == 2 * 3 * 3
    pl.seed_everything(0, verbose=False)
    module, step = TwoOptimizers(), 0
    names = {parameter: name for name, parameter in module.named_parameters()}

    def add(layer: nn.Module) -> None:
        nonlocal step
        gradients: Any = {names[parameter]: parameter.grad for parameter in layer.parameters()}
        noisy = drawn(gradients, step)
        for parameter in layer.parameters():
            parameter.grad = noisy[names[parameter]]
        step += 1

    optimizers = module.configure_optimizers()
    for _ in range(2):
        for batch in loader():
            module.train_on(batch, optimizers, add)
    assert_same(weights(noisy), weights(module))


def test_a_lazy_module_gets_noise():
    class Lazy(Plain):
        def __init__(self):
            super().__init__()
            self.net[4] = nn.LazyLinear(3)

    fit([GradientNoise(noise.Gaussian(), 0.5)], module=Lazy, num_sanity_val_steps=0)


def test_a_noise_that_cannot_work_on_every_gradient_is_found_in_the_first_batch_though_the_level_is_0():
    with pytest.raises(ValueError, match=r"SNR needs samples of at least 1 axis, got a batch of shape \(8,\)"):
        fit([GradientNoise(noise.SNR(), 0.0)], module=Plain)


def test_every_closure_of_an_update_gets_the_same_noise():
    steps = before_and_after(GradientNoise(noise.Gaussian(), 0.5), module=LBFGS, max_epochs=1)
    assert len(steps) > 3
    name = "net.1.weight"
    added = [step[name][1] - step[name][0] for step in steps]
    # of three updates, up to the rounding of numbers of the order of one
    assert len({tuple(part.flatten().mul(1e4).round().tolist()) for part in added}) == 3


@pytest.mark.filterwarnings("ignore:.*training_step.* returned `None`")  # Lightning's word on it
def test_a_step_that_returns_nothing_gets_none():
    class Skipping(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 0 else loss

    steps = before_and_after(GradientNoise(noise.Gaussian(), 0.5), module=Skipping)
    assert [len(step) for step in steps] == 2 * [0, 4, 4]


# --- what is added


def test_the_gradients_are_the_draws_of_their_keys_and_those_of_no_update_are_as_they_were():
    gate = schedules.Every(0.5, every=3, unit="step")
    for i, step in enumerate(before_and_after(GradientNoise(noise.Gaussian(), gate))):
        assert len(step) == 4
        clean, noisy = ({name: pair[j] for name, pair in step.items()} for j in (0, 1))
        expected = drawn(clean, i) if i % 3 == 0 else clean
        assert_same([*noisy.values()], [expected[name] for name in noisy])


def test_the_default_is_the_variance_of_the_source():
    level: Any = GradientNoise(noise.Gaussian()).level
    for step in (0, 1, 10, 100_000):
        # two roundings of a power
        assert level(Progress(step, 0, None)) ** 2 == pytest.approx(0.01 / (1 + step) ** 0.55, rel=1e-14)


class Flat(pl.LightningModule):
    """Its gradient is zero, and its weight stays what it is."""

    def __init__(self, n: int = 100_000):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n))

    def training_step(self, batch, batch_idx):
        return (0 * self.weight).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_mean_and_variance_of_what_is_added_are_those_of_the_source():
    added = [step["weight"][1] for step in before_and_after(GradientNoise(noise.Gaussian()), module=Flat)]
    n = len(added[0])
    for step, x in enumerate(added):
        variance = 0.01 / (1 + step) ** 0.55
        assert abs(x.mean().item()) <= 5 * math.sqrt(variance / n)  # five standard errors
        assert abs(x.var().item() - variance) <= 5 * variance * math.sqrt(2 / n)
    correlation = torch.corrcoef(torch.stack(added)) - torch.eye(len(added))
    assert correlation.abs().max() <= 5 / math.sqrt(n)


def test_parameters_of_one_shape_get_different_draws():
    steps = before_and_after(GradientNoise(lambda x, level, *, generator: torch.rand(x.shape, generator=generator), 0.5))
    assert all(len({gradient[1].flatten()[0].item() for gradient in step.values()}) == 4 for step in steps)


def test_a_shared_parameter_that_the_optimizer_has_twice_gets_noise_once():
    class Twice(Tied):
        def configure_optimizers(self):
            with pytest.warns(UserWarning, match="duplicate parameters"):
                return torch.optim.SGD([*self.net[1].parameters(), *self.net[4].parameters()], lr=0.1)

    (first, *_) = before_and_after(GradientNoise(noise.Gaussian(), 0.5), module=Twice)
    assert len(first) == 3
    expected = drawn({name: clean for name, (clean, _) in first.items()}, 0)
    assert_same([noisy for _, noisy in first.values()], [expected[name] for name in first])


def test_the_noise_of_a_gradient_does_not_depend_on_whether_the_others_exist():
    """Ranks may use other parameters."""

    class Skipping(Plain):
        def __init__(self, skips: bool):
            super().__init__()
            self.net.insert(0, nn.Linear(N_FEATURES, N_FEATURES))
            self.skips = skips

        def training_step(self, batch, batch_idx):
            x = batch[0].flatten(1)
            return self.net[-1](self.net[2](x)).sum() + (0 if self.skips else self.net[0](x).sum())

    used, skipped = (
        before_and_after(GradientNoise(noise.Gaussian(), 0.5), module=lambda skips=skips: Skipping(skips))[0]
        for skips in (False, True)
    )
    assert len(used) - 2 == len(skipped) == 4
    for name, (clean, noisy) in skipped.items():
        assert torch.equal(clean, used[name][0])
        assert torch.equal(noisy, used[name][1])
        assert not torch.equal(noisy, clean)


@pytest.mark.parametrize("make", [GradientNoise, InputNoise, WeightNoise])
def test_all_ranks_draw_with_the_seed_of_the_first(make, monkeypatch):
    """They share gradients, sharded weights and the weights of a probe."""

    class SecondRank(SingleDeviceStrategy):
        def broadcast(self, obj, src=0):
            return 0 if obj == 1 else obj

    def run(seed: str, strategy: Any) -> list[Tensor]:
        module, trainer = Plain(), make_trainer([make(noise.Gaussian(), 0.5)], strategy=strategy)
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)  # as seed_everything(rank) sets it
        trainer.fit(module, loader(), loader(Rows(13, seed=1)))
        return weights(module)

    torch.manual_seed(0)
    first = run("0", SingleDeviceStrategy(DEVICE))
    torch.manual_seed(0)
    assert_same(run("1", SecondRank(DEVICE)), first)


class Changing(Plain):
    """Changes its parameters between the epochs."""

    def __init__(self, change: Callable[[Any], object]):
        super().__init__()
        self.net[1].requires_grad_(False)
        self.change = change

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.change(self)


def unfreeze(module: Changing) -> None:
    module.net[1].requires_grad_(True)
    module.optimizers().add_param_group({"params": [*module.net[1].parameters()]})  # type: ignore[union-attr]


def rename(module: Changing) -> None:
    head = module.net[4]
    del module.net[4]
    module.net.add_module("head", head)


def prune(module: Changing) -> None:
    random_unstructured(module.net[4], "weight", 0.5)


def replace(module: Changing) -> None:
    module.net[4] = nn.Linear(8, N_CLASSES)
    module.trainer.strategy.optimizers = [torch.optim.SGD(module.net[4].parameters(), lr=0.1)]


@pytest.mark.parametrize("change", [unfreeze, rename, prune, replace], ids=lambda change: change.__name__)
def test_the_noise_follows_parameters_that_change_in_mid_run(change):
    """Each update has the noise that a run would have if it began with the parameters as they are then."""
    kept = before_and_after(GradientNoise(noise.Gaussian(), 0.5), module=lambda: Changing(change))
    assert len(kept) == 6
    for step, gradients in enumerate(kept):
        assert len(gradients) == (4 if change is unfreeze and step >= 3 else 2)
        assert any("head" in name or "orig" in name for name in gradients) == (change in (rename, prune) and step >= 3)
        expected = drawn({name: clean for name, (clean, _) in gradients.items()}, step)
        assert_same([noisy for _, noisy in gradients.values()], [expected[name] for name in gradients])


def test_a_gradient_gets_the_same_draws_in_the_order_of_its_memory():
    class Images(Plain):
        """A gradient changes its memory format in mid-run."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 2, bias=False)

        def forward(self, x):
            return super().forward(x) + 0 * self.conv.weight.sum()

        def on_after_backward(self):
            gradient, parameter = torch.arange(24.0).view(3, 2, 2, 2), self.conv.weight
            if self.current_epoch == 1:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
                gradient = gradient.to(memory_format=torch.channels_last)
            parameter.grad = gradient

    for step, gradients in enumerate(before_and_after(GradientNoise(noise.Gaussian(), 0.5), module=Images)):
        clean, noisy = gradients["conv.weight"]
        axes = (0, 1, 2, 3) if step < 3 else (0, 2, 3, 1)
        assert noisy.permute(axes).is_contiguous()
        others = {name: clean for name, (clean, _) in gradients.items()}
        expected = drawn(others | {"conv.weight": clean.permute(axes)}, step)["conv.weight"]
        assert torch.equal(noisy.permute(axes), expected)


def test_a_noise_that_is_set_in_mid_run_sees_the_shapes_that_it_needs():
    callback = GradientNoise(noise.Gaussian(), 0.5)

    class Setting(Plain):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                callback.noise = as_noise(lambda x, level, *, generator: x + x.ndim)

    for gradients in before_and_after(callback, module=Setting)[3:]:
        for clean, noisy in gradients.values():
            assert torch.equal(noisy, clean + clean.ndim)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_gradient_with_a_graph_gets_noise():
    class Penalized(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            gradients = torch.autograd.grad(loss, [*self.parameters()], create_graph=True)
            return loss + sum(g.square().sum() for g in gradients)

        def backward(self, loss):
            loss.backward(create_graph=True)

    for step, gradients in enumerate(before_and_after(GradientNoise(noise.Gaussian(), 0.5), module=Penalized)):
        expected = drawn({name: clean.detach() for name, (clean, _) in gradients.items()}, step)
        assert_same([noisy.detach() for _, noisy in gradients.values()], [expected[name] for name in gradients])


def test_a_gradient_that_is_not_a_number_stays_so():
    class Broken(Plain):
        def on_after_backward(self):
            self.get_parameter("net.4.bias").grad[1] = math.nan  # type: ignore[index]

    for gradients in before_and_after(GradientNoise(noise.Gaussian(), 0.5), module=Broken, limit_train_batches=1, max_epochs=1):
        assert gradients["net.4.bias"][1].isnan().tolist() == [False, True, False]
        assert not any(noisy.isnan().any() for name, (_, noisy) in gradients.items() if name != "net.4.bias")


def test_a_parameter_that_no_module_has_gets_noise():
    class Outside(Plain):
        def __init__(self):
            super().__init__()
            self.outside = [nn.Parameter(torch.zeros(N_CLASSES))]

        def forward(self, x):
            return self.net(x) + self.outside[0]

        def configure_optimizers(self):
            return torch.optim.SGD([*self.parameters(), *self.outside], lr=0.1)

    module, _ = fit([GradientNoise(noise.Gaussian(), 0.5)], module=Outside, train=loader(), max_epochs=1, limit_train_batches=1)
    without, _ = fit(module=Outside, train=loader(), max_epochs=1, limit_train_batches=1)
    assert (module.outside[0] != without.outside[0]).all()


def test_a_compiled_model_gets_the_noise_of_the_model_itself():
    class Compiled(Plain):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]

    (compiled, *_) = before_and_after(GradientNoise(noise.Gaussian(), 0.5), module=Compiled, max_epochs=1)
    assert all("_orig_mod" in name for name in compiled)
    expected = drawn({name.replace("_orig_mod.", ""): clean for name, (clean, _) in compiled.items()}, 0)
    assert_same([noisy for _, noisy in compiled.values()], [expected[name.replace("_orig_mod.", "")] for name in compiled])


# --- the loss scale


def scaled(module: type[Classifier], callback: GradientNoise | None = None, **kwargs: Any) -> tuple[Any, pl.Trainer, Gradients]:
    """A fit with the loss scale of float16, and the gradients at its updates."""
    gradients = Gradients()
    callbacks = [gradients] if callback is None else [callback, gradients]
    plugins = [MixedPrecision("16-mixed", "cpu")]  # the flag precision="16-mixed" would be bf16-mixed on a CPU
    return *fit(callbacks, module=module, train=loader(), plugins=plugins, **kwargs), gradients


def test_the_noise_of_a_fused_optimizer_is_that_of_the_unfused_one_times_the_loss_scale():
    *_, fused = scaled(Fused, GradientNoise(noise.Gaussian(), 0.5))
    *_, unfused = scaled(Adam, GradientNoise(noise.Gaussian(), 0.5))
    *_, clean = scaled(Adam)
    scale, expected = 2.0**16, drawn(clean.kept[0], 0)  # type: ignore[arg-type]
    for name, gradient in unfused.kept[0].items():
        # a power of two: nothing is rounded
        assert torch.equal(fused.kept[0][name] / scale, gradient)  # type: ignore[operator]
        assert torch.equal(gradient, expected[name])  # type: ignore[arg-type]


def test_a_fused_optimizer_comes_to_the_weights_of_the_unfused_one():
    one, two = (scaled(module, GradientNoise(noise.Gaussian(), 0.5))[0] for module in (Fused, Adam))
    # six steps of 0.01, each rounded in another order
    torch.testing.assert_close(weights(one), weights(two), rtol=0, atol=1e-5)


@pytest.mark.parametrize("module", [Adam, Fused])
def test_an_update_whose_gradients_are_infinite_is_skipped_with_noise_too(module):
    class Overflowing(module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * math.inf

    def ones(x, level, *, generator):
        return torch.ones_like(x)

    noisy, trainer, _ = scaled(Overflowing, GradientNoise(ones, 1.0), max_epochs=1)
    pl.seed_everything(0, verbose=False)
    assert_same(weights(noisy), weights(Overflowing()))
    plugin: Any = trainer.precision_plugin
    assert plugin.scaler.get_scale() == 2.0**13  # halved in each of three updates


# --- the log


def logged(folder: Path, callback: GradientNoise, **kwargs: Any) -> pd.DataFrame:
    logger = CSVLogger(folder)
    fit([callback], module=Plain, train=loader(), logger=logger, **kwargs)
    return pd.read_csv(Path(logger.log_dir) / "metrics.csv").set_index("step").filter(like="train_noise/")


def test_level_and_ratio_of_the_norms_are_logged_on_the_steps_that_log(tmp_path):
    ramp = schedules.Linear(0.0, 0.6)
    written = logged(tmp_path, GradientNoise(noise.Gaussian(), ramp), log_every_n_steps=2).dropna()
    steps = before_and_after(GradientNoise(noise.Gaussian(), ramp))
    assert list(written.index) == [1, 3, 5]
    levels, ratios = (written[f"train_noise/gradient/{key}"].to_dict() for key in ("level", "ratio"))
    for i in levels:
        clean, noisy = (torch.cat([pair[j].flatten() for pair in steps[i].values()]) for j in (0, 1))
        assert levels[i] == pytest.approx(0.1 * i)
        expected = ((noisy - clean).norm() / clean.norm()).item()
        # sums in another order, in float32
        assert ratios[i] == pytest.approx(expected, rel=1e-5)


def test_no_ratio_is_logged_without_noise_and_none_where_the_gradient_is_zero(tmp_path):
    written = logged(tmp_path / "level 0", GradientNoise(noise.Gaussian(), 0.0), log_every_n_steps=1)
    assert list(written.columns) == ["train_noise/gradient/level"]
    logger = CSVLogger(tmp_path / "zero")
    fit([GradientNoise(noise.Gaussian(), 0.5)], module=Flat, logger=logger, log_every_n_steps=1)
    assert "ratio" not in (Path(logger.log_dir) / "metrics.csv").read_text()


# --- errors


def test_sparse_gradients_are_refused():
    class Sparse(Plain):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(2, N_FEATURES, sparse=True)

        def forward(self, x):
            return super().forward(x + self.embedding((x[:, 0] > 0).long()))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(TypeError, match=r"gradient of 'embedding.weight' is sparse; type nn.Embedding\(…, sparse=False\)"):
        fit([GradientNoise(noise.Gaussian(), 0.0)], module=Sparse)


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_keep_gradients_in_buffers_are_refused(name):
    strategy = type(name, (SingleDeviceStrategy,), {})("cpu")
    module = Plain()
    trainer = make_trainer([GradientNoise(noise.Gaussian())], strategy=strategy)
    with pytest.raises(ValueError, match=f"'gradient' cannot work with {name}, which has no whole parameters"):
        trainer.fit(module, loader(), loader(Rows(13, seed=1)))
    assert not module.seen


@pytest.mark.parametrize("difference", [0, 1])
def test_ranks_whose_devices_draw_different_numbers_are_refused(difference):
    strategy = SimpleNamespace(root_device=DEVICE, broadcast=lambda drawn: drawn + difference, reduce_boolean_decision=bool)
    trainer: Any = SimpleNamespace(world_size=2, lightning_module=Plain(), strategy=strategy)
    context = (
        pytest.raises(ValueError, match="'gradient' must add the same noise on all ranks") if difference else nullcontext()
    )
    with context:
        _check_draws_agree(trainer, "gradient")


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: GradientNoise(noise.Gaussian), TypeError, r"a value such as noise.Gaussian\(\)"),  # type: ignore[arg-type]
        (lambda: GradientNoise(noise.Gaussian(), -0.1), ValueError, "finite and not negative, got -0.1"),
        (lambda: GradientNoise(noise.FeatureDropout(), 1.5), ValueError, r"in \[0, 1"),
        (
            lambda: RobustnessMonitor({"g": GradientNoise(noise.Gaussian())}, [0.1]),
            ValueError,
            "'g' cannot perturb held-out data",
        ),
    ],
)
def test_a_wrong_argument_is_refused_when_the_callback_is_made(build, error, message):
    with pytest.raises(error, match=message):
        build()
