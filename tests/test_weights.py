"""Noise in the weights equals loops that are written by hand, in every mode of optimization, and leaves the weights clean."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from conftest import N_CLASSES, N_FEATURES, Classifier, Rows, assert_same, fit, loader, make_trainer, weights
from pytorch_lightning import callbacks as callbacks_of_lightning
from pytorch_lightning.callbacks import StochasticWeightAveraging
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lightning_noise import Key, RobustnessMonitor, WeightNoise, noise
from lightning_noise.parameters import PerturbedParameters, find_parameters, weight_noise

EPS = 1e-4  # of Adam, whose own is 0 in float16
LEVELS = {"weight": 0.3, "second": 0.2}


def callbacks(n: int, **kwargs: Any) -> list[WeightNoise]:
    """One or two noises, the second in units of what the first has made of the weights."""
    first = WeightNoise(noise.Gaussian(), LEVELS["weight"], seed=5, **kwargs)
    return [first, WeightNoise(noise.Uniform(), LEVELS["second"], relative="std", name="second", seed=5, **kwargs)][:n]


# --- loops written by hand


class Hand:
    """Adds and removes noise as a loop that is written by hand would."""

    def __init__(self, module: nn.Module, n: int):
        self.module, self.n = module, n

    @contextmanager
    def noise(
        self,
        epoch: int,
        batch_idx: int,
        updates: int = 0,
        part: nn.Module | None = None,
        levels: dict[str, float] = LEVELS,
    ) -> Iterator[None]:
        chosen = {
            name: p
            for name, p in self.module.named_parameters()
            if p.ndim > 1 and (part is None or _is_in(p, part.parameters()))
        }
        clean = {name: p.detach().clone() for name, p in chosen.items()}
        with torch.no_grad():
            for callback, level in [*levels.items()][: self.n]:
                for name, p in chosen.items():
                    p.copy_(self._noisy(callback, level, name, p, (epoch, batch_idx), updates))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in chosen.items():
                    p.copy_(clean[name])

    def _noisy(self, callback: str, level: float, name: str, p: Tensor, place: tuple[int, int], updates: int) -> Tensor:
        key = Key((5, callback, *place), rank=0) / "parameter" / name
        generator = (key / updates if updates else key).generator("cpu")
        w = p.float()
        if callback == "weight":
            drawn = level * torch.empty(p.shape).normal_(generator=generator)
        else:
            drawn = (level * w.std(correction=0)) * torch.empty(p.shape).uniform_(-1, 1, generator=generator)
        return (w + drawn).to(p.dtype)


def _is_in(p: Tensor, parameters: Iterator[nn.Parameter]) -> bool:
    return any(p is q for q in parameters)


def batches(epochs: int = 2) -> Iterator[tuple[int, int, list[Tensor]]]:
    for epoch in range(epochs):
        for batch_idx, batch in enumerate(loader()):
            yield epoch, batch_idx, batch


def loss_of(module: nn.Module, batch: list[Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(module(x.to(next(module.parameters()).dtype)), y)


class Network(Classifier):
    """Without dropout, and with the optimizer that is asked for."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **kwargs: Any):
        super().__init__()
        self.net[3] = nn.Identity()
        self.optimizer, self.kwargs = optimizer, {"lr": 0.1, **kwargs}

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), **self.kwargs)


def by_sgd(module, hand):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for epoch, i, batch in batches():
        optimizer.zero_grad()
        with hand.noise(epoch, i):
            loss_of(module, batch).backward()
        optimizer.step()


def by_adam_with_clipping(module, hand):
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1, eps=EPS)
    for epoch, i, batch in batches():
        optimizer.zero_grad()
        with hand.noise(epoch, i):
            loss_of(module, batch).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        optimizer.step()


def by_accumulation_with_a_ragged_tail(module, hand):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for epoch, i, batch in batches():
        with hand.noise(epoch, i):
            (loss_of(module, batch) / 2).backward()
        if i != 0:  # of three batches an epoch, the last is alone
            optimizer.step()
            optimizer.zero_grad()


def by_lbfgs(module, hand):
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=4)
    for epoch, i, batch in batches():

        def closure(epoch=epoch, i=i, batch=batch):
            optimizer.zero_grad()
            with hand.noise(epoch, i):
                loss = loss_of(module, batch)
                loss.backward()
            return loss

        optimizer.step(closure)


def by_scaled_gradients(module, hand, clip: bool):
    optimizer, scaler = torch.optim.Adam(module.parameters(), lr=0.1, eps=EPS), torch.amp.GradScaler("cpu")
    for epoch, i, batch in batches():
        optimizer.zero_grad()
        with hand.noise(epoch, i):
            with torch.autocast("cpu", dtype=torch.half):
                loss = loss_of(module, batch)
            scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()


class Manual(Network):
    """One forward pass, one backward pass and one update."""

    wrapped = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer: Any = self.optimizers(use_pl_optimizer=self.wrapped)
        self.update(optimizer, batch, batch_idx)

    def update(self, optimizer, batch, batch_idx):
        optimizer.zero_grad()
        self.manual_backward(loss_of(self, batch))
        optimizer.step()


class Unwrapped(Manual):
    wrapped = False

    def update(self, optimizer, batch, batch_idx):
        optimizer.zero_grad()
        loss_of(self, batch).backward()
        optimizer.step()


class WithClosure(Manual):
    def update(self, optimizer, batch, batch_idx):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(self, batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class UnwrappedWithClosure(WithClosure):
    wrapped = False


class UnwrappedWithPositionalClosure(Manual):
    wrapped = False

    def update(self, optimizer, batch, batch_idx):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(self, batch)
            loss.backward()
            return loss

        optimizer.step(closure)


class TwoBackwards(Manual):
    def update(self, optimizer, batch, batch_idx):
        optimizer.zero_grad()
        loss = loss_of(self, batch)
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss)
        optimizer.step()


def by_two_backwards(module, hand):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for epoch, i, batch in batches():
        optimizer.zero_grad()
        with hand.noise(epoch, i):
            loss = loss_of(module, batch)
            loss.backward(retain_graph=True)
            loss.backward()
        optimizer.step()


class TwoUpdates(Manual):
    def update(self, optimizer, batch, batch_idx):
        super().update(optimizer, batch, batch_idx)
        super().update(optimizer, batch, batch_idx)


def by_two_updates(module, hand):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for epoch, i, batch in batches():
        for updates in range(2):
            optimizer.zero_grad()
            with hand.noise(epoch, i, updates):
                loss_of(module, batch).backward()
            optimizer.step()


class Accumulating(Manual):
    def update(self, optimizer, batch, batch_idx):
        self.manual_backward(loss_of(self, batch) / 2)
        if batch_idx != 0:
            optimizer.step()
            optimizer.zero_grad()


class Adversarial(pl.LightningModule):
    """A generator and a discriminator; the graph of the generator is kept over the update of the discriminator."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(N_FEATURES, N_FEATURES)
        self.discriminator = nn.Sequential(nn.Linear(N_FEATURES, 8), nn.Tanh(), nn.Linear(8, 1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.generator.parameters(), lr=0.1), torch.optim.Adam(
            self.discriminator.parameters(), lr=0.1, eps=EPS
        )

    def validation_step(self, batch, batch_idx):
        pass

    def fake(self, x: Tensor) -> Tensor:
        return self.generator(x).tanh() @ self.generator.weight  # which the graph keeps, too

    def training_step(self, batch, batch_idx):
        generates, discriminates = self.optimizers()  # type: ignore[misc]
        x = batch[0]
        fake = self.fake(x)
        discriminates.zero_grad()
        self.manual_backward(self.discriminator(fake.detach()).mean() - self.discriminator(x).mean())
        discriminates.step()
        generates.zero_grad()
        self.manual_backward(-self.discriminator(fake).mean())
        generates.step()


def by_adversaries(module, hand):
    generates, discriminates = Adversarial.configure_optimizers(module)
    generator, discriminator = module.generator, module.discriminator
    for epoch, i, (x, _) in batches():
        x = x.to(generator.weight.dtype)
        with hand.noise(epoch, i, part=generator):
            fake = Adversarial.fake(module, x)
            discriminates.zero_grad()
            with hand.noise(epoch, i, part=discriminator):
                (discriminator(fake.detach()).mean() - discriminator(x).mean()).backward()
            discriminates.step()
            generates.zero_grad()
            with hand.noise(epoch, i, 1, part=discriminator):
                (-discriminator(fake).mean()).backward()
        generates.step()


class Toggling(Adversarial):
    def training_step(self, batch, batch_idx):
        generates, discriminates = self.optimizers()  # type: ignore[misc]
        x = batch[0]
        self.toggle_optimizer(generates)
        generates.zero_grad()
        self.manual_backward(-self.discriminator(self.fake(x)).mean())
        generates.step()
        self.untoggle_optimizer(generates)
        self.toggle_optimizer(discriminates)
        discriminates.zero_grad()
        self.manual_backward(self.discriminator(self.fake(x).detach()).mean() - self.discriminator(x).mean())
        discriminates.step()
        self.untoggle_optimizer(discriminates)


def by_toggling(module, hand):
    generates, discriminates = Adversarial.configure_optimizers(module)
    generator, discriminator = module.generator, module.discriminator
    for epoch, i, (x, _) in batches():
        x = x.to(generator.weight.dtype)
        with hand.noise(epoch, i, part=discriminator):
            module.zero_grad()
            with hand.noise(epoch, i, part=generator):
                (-discriminator(Adversarial.fake(module, x)).mean()).backward()
            generates.step()
            module.zero_grad()
            with hand.noise(epoch, i, 1, part=generator):
                fake = Adversarial.fake(module, x).detach()
            (discriminator(fake).mean() - discriminator(x).mean()).backward()
        discriminates.step()


ADAM = {"optimizer": torch.optim.Adam, "eps": EPS}
LBFGS = {"optimizer": torch.optim.LBFGS, "max_iter": 4}
MODES: dict[str, tuple[Callable[[], pl.LightningModule], Callable[..., None], dict[str, Any]]] = {
    "SGD": (Network, by_sgd, {}),
    "Adam with clipping": (lambda: Network(**ADAM), by_adam_with_clipping, {"gradient_clip_val": 0.1}),
    "accumulation": (Network, by_accumulation_with_a_ragged_tail, {"accumulate_grad_batches": 2}),
    "LBFGS": (lambda: Network(**LBFGS), by_lbfgs, {}),
    "manual": (Manual, by_sgd, {}),
    "manual, unwrapped": (Unwrapped, by_sgd, {}),
    "manual, closure": (WithClosure, by_sgd, {}),
    "manual, unwrapped, closure": (UnwrappedWithClosure, by_sgd, {}),
    "manual, unwrapped, positional closure": (UnwrappedWithPositionalClosure, by_sgd, {}),
    "manual, LBFGS": (lambda: WithClosure(**LBFGS), by_lbfgs, {}),
    "manual, unwrapped LBFGS": (lambda: UnwrappedWithPositionalClosure(**LBFGS), by_lbfgs, {}),
    "manual, two backward passes": (TwoBackwards, by_two_backwards, {}),
    "manual, two updates": (TwoUpdates, by_two_updates, {}),
    "manual, accumulation": (Accumulating, by_accumulation_with_a_ragged_tail, {}),
    "adversarial": (Adversarial, by_adversaries, {}),
    "adversarial, toggling": (Toggling, by_toggling, {}),
}
PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


def fitted(make: Callable[[], pl.LightningModule], n: int, **kwargs: Any) -> pl.LightningModule:
    return fit(callbacks(n), module=make, train=loader(), limit_val_batches=0, **kwargs)[0]


def by_hand(make: Callable[[], pl.LightningModule], loop: Callable[..., None], n: int, dtype=torch.float32) -> nn.Module:
    pl.seed_everything(0, verbose=False)
    module = make().to(dtype)
    loop(module, Hand(module, n))
    return module


@pytest.mark.parametrize("n", [1, 2], ids=["one noise", "two noises"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("make", "loop", "settings"), MODES.values(), ids=MODES)
def test_a_run_equals_a_loop_written_by_hand(make, loop, settings, precision, n):
    expected, without = (by_hand(make, loop, noises, PRECISIONS[precision]) for noises in (n, n - 1))
    assert_same(weights(fitted(make, n, precision=precision, **settings)), weights(expected))
    assert any(not torch.equal(one, two) for one, two in zip(weights(expected), weights(without), strict=True))


@pytest.mark.parametrize("n", [1, 2], ids=["one noise", "two noises"])
@pytest.mark.parametrize(
    ("make", "clip"), [(lambda: Network(**ADAM), True), (lambda: Manual(**ADAM), False)], ids=["automatic", "manual"]
)
def test_a_run_with_scaled_gradients_equals_a_loop_written_by_hand(make, clip, n):
    settings = {"gradient_clip_val": 0.1} if clip else {}
    # of itself, a CPU would have bfloat16 and no scaler
    found = fitted(make, n, plugins=[MixedPrecision("16-mixed", "cpu")], **settings)
    assert_same(weights(found), weights(by_hand(make, partial(by_scaled_gradients, clip=clip), n)))


# --- optimizers that the trainer does not know, and updates that do not come


class Private(Manual):
    """Its optimizer is its own affair."""

    def __init__(self):
        super().__init__()
        self.own = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self) -> Any:
        return None

    def training_step(self, batch, batch_idx):
        self.own.zero_grad()
        self.manual_backward(loss_of(self, batch))
        self.own.step()


class Outer(torch.optim.Optimizer):
    """An optimizer around another, with an argument of its own."""

    def __init__(self, parameters: Any, lr: float):
        self.inner = torch.optim.SGD(parameters, lr=lr / 2)
        super().__init__(self.inner.param_groups, {})
        self.param_groups = self.inner.param_groups

    def step(self, closure: Any = None, times: int = 1) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for _ in range(times):
            self.inner.step()
        return loss


class Nested(Unwrapped):
    def update(self, optimizer, batch, batch_idx):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(self, batch)
            loss.backward()
            return loss

        optimizer.step(closure, 2)


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize("n", [1, 2], ids=["one noise", "two noises"])
@pytest.mark.parametrize("make", [Private, lambda: Nested(Outer)], ids=["private", "nested"])
def test_an_optimizer_that_the_trainer_does_not_know_updates_clean_weights(make, n):
    # two steps of half the length are one, but for a rounding
    torch.testing.assert_close(weights(fitted(make, n)), weights(by_hand(Network, by_sgd, n)), rtol=0, atol=1e-6)


class SharpnessAware(Manual):
    """Moves the weights up and down again before it updates them, with the gradient from above."""

    def update(self, optimizer, batch, batch_idx):
        optimizer.zero_grad()
        self.manual_backward(loss_of(self, batch))
        up = [0.05 * p.grad for p in self.parameters()]  # type: ignore[operator]
        with torch.no_grad():
            for p, e in zip(self.parameters(), up, strict=True):
                p.add_(e)
        optimizer.zero_grad()
        self.manual_backward(loss_of(self, batch))
        with torch.no_grad():
            for p, e in zip(self.parameters(), up, strict=True):
                p.sub_(e)
        optimizer.step()


def by_sharpness_aware_minimization(module, hand):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for epoch, i, batch in batches():
        with hand.noise(epoch, i):
            up = [0.05 * g for g in torch.autograd.grad(loss_of(module, batch), [*module.parameters()])]
            with torch.no_grad():
                for p, e in zip(module.parameters(), up, strict=True):
                    p.add_(e)
            optimizer.zero_grad()
            loss_of(module, batch).backward()
            with torch.no_grad():
                for p, e in zip(module.parameters(), up, strict=True):
                    p.sub_(e)
        optimizer.step()


def test_weights_that_a_step_moves_and_moves_back_are_restored():
    expected = by_hand(SharpnessAware, by_sharpness_aware_minimization, 1)
    # biases have no noise, and keep what is lost to rounding; so do the weights of the loop
    torch.testing.assert_close(weights(fitted(SharpnessAware, 1)), weights(expected), rtol=0, atol=1e-6)


class Moving(torch.optim.Optimizer):
    """Moves the weights before it evaluates its closure, and back after it."""

    def __init__(self, parameters: Any, lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters]
        for p in parameters:
            p.mul_(1.5)
        with torch.enable_grad():
            loss = closure()
        for p, w in zip(parameters, before, strict=True):
            p.copy_(w).sub_(p.grad, alpha=self.param_groups[0]["lr"])
        return loss


@pytest.mark.parametrize("n", [1, 2], ids=["one noise", "two noises"])
def test_what_an_optimizer_saves_and_moves_before_its_closure_is_clean(n):
    def make() -> Network:
        return UnwrappedWithPositionalClosure(Moving, lr=0.0)

    module = fitted(make, n)
    pl.seed_everything(0, verbose=False)
    assert_same(weights(module), weights(make()))


class Nesting(Adversarial):
    """Updates one part within the closure of the other, and looks where the noise is."""

    def __init__(self, fails: bool = False):
        super().__init__()
        self.fails = fails
        self.clean = [w.clone() for w in weights_of(self)]
        self.noisy: list[list[bool]] = []

    def configure_optimizers(self) -> Any:
        return (torch.optim.SGD(self.generator.parameters(), lr=0.0), torch.optim.SGD(self.discriminator.parameters(), lr=0.0))

    def look(self) -> None:
        pairs = zip(weights_of(self), self.clean, strict=True)
        self.noisy.append([not torch.equal(w, clean) for w, clean in pairs if w.ndim > 1])

    def training_step(self, batch, batch_idx):
        optimizers: Any = self.optimizers(use_pl_optimizer=False)
        outer, inner = optimizers

        def closure():
            inner.step()
            self.look()
            if self.fails:
                raise RuntimeError("caught")

        self.look()
        with suppress(RuntimeError):
            outer.step(closure)
        inner.step()
        self.look()


def test_the_noise_comes_back_after_an_update_within_a_closure():
    module, _ = fit(callbacks(2), module=Nesting, train=loader(), limit_val_batches=0)
    assert module.noisy == 18 * [[True, True, True]]


def test_the_noise_of_other_parameters_comes_back_after_an_update_that_failed():
    module, _ = fit(callbacks(2), module=lambda: Nesting(fails=True), train=loader(), limit_val_batches=0)
    assert all(look[1:] == [True, True] for look in module.noisy)
    assert_same(weights_of(module), module.clean)


class Writing(Network):
    """Changes its weights within the training step."""

    def __init__(self, write: Callable[[Tensor], Any], automatic: bool):
        super().__init__()
        self.write, self.automatic_optimization = write, automatic

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            self.manual_backward(loss)
        loss = loss.detach().requires_grad_()  # or torch would refuse the backward pass by itself
        with torch.no_grad():
            self.write(self.net[4].weight)  # type: ignore[arg-type]
        return loss


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
@pytest.mark.parametrize("write", [lambda w: w.clamp_(-0.01, 0.01), lambda w: w.lerp_(torch.zeros(()), 0.005)])
def test_what_a_step_writes_to_noisy_weights_is_refused_and_not_lost_in_silence(write, automatic):
    module = Writing(write, automatic)
    before = [w.clone() for w in weights_of(module)]
    with pytest.raises(ValueError, match=r"the training step has written to 'net\.4\.weight' while there was noise in it"):
        fit([WeightNoise(**NOISE)], module=module, num_sanity_val_steps=0)
    assert_same(weights_of(module), before)
    fit([WeightNoise(**NOISE, params="net.1.weight")], module=Writing(write, automatic))


def test_the_error_of_a_step_is_not_hidden_by_what_it_wrote():
    class Refused(Network):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            with torch.no_grad():
                self.net[4].weight.clamp_(-0.01, 0.01)  # type: ignore[operator]
            return loss  # of which torch refuses the backward pass

    class Later(pl.Callback):
        def on_exception(self, trainer, pl_module, exception):
            seen.append(exception)

    seen: list[BaseException] = []
    module = Refused()
    before = [w.clone() for w in weights_of(module)]
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        fit([*callbacks(2), Later()], module=module, num_sanity_val_steps=0)
    assert len(seen) == 1
    assert_same(weights_of(module), before)


def test_an_embedding_that_normalises_itself_is_refused_in_training_and_probed_in_evaluation():
    class Normalising(Network):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(4, N_FEATURES, max_norm=0.5)

        def forward(self, x):
            return super().forward(x + self.words((x[:, 0] > 0).long()))

    fit([RobustnessMonitor(WeightNoise(**NOISE), [0.5])], module=Normalising)
    with pytest.raises(ValueError, match=r"has written to 'words\.weight'"):
        fit([WeightNoise(**NOISE)], module=Normalising)


def test_functions_are_not_called_again_to_see_whether_weights_were_written_to():
    calls: list[None] = []

    def counted(w, level, *, generator):
        calls.append(None)
        return w + level * torch.randn(w.shape)

    fit([WeightNoise(counted, 0.1, name="own"), *callbacks(2)], train=loader(), limit_val_batches=0)
    assert len(calls) == 2 * 6


def test_weights_that_are_not_numbers_are_no_reason_to_complain():
    class Diverging(Network):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * torch.nan

    module, _ = fit(callbacks(2), module=Diverging)
    assert all(w.isnan().any() for w in weights_of(module))


def test_a_model_that_was_made_for_inference_can_be_probed():
    with torch.inference_mode():
        module = Network()
    trainer = make_trainer([RobustnessMonitor(WeightNoise(**NOISE), [0.5])])
    trainer.test(module, loader(Rows(13, seed=1)), verbose=False)
    assert "test/robustness/weight/0.5/accuracy" in trainer.callback_metrics


def test_an_update_that_the_scaler_skips_does_not_end_the_noise():
    class Overflowing(Manual):
        def update(self, optimizer, batch, batch_idx):
            for factor in (torch.inf, 1.0):
                used.append(weights_of(self)[0].clone())
                optimizer.zero_grad()
                self.manual_backward(loss_of(self, batch) * factor)
                optimizer.step()

    used: list[Tensor] = []
    pl.seed_everything(0, verbose=False)
    module = Overflowing(lr=0.0)
    clean = weights_of(module)[0].clone()
    fit([WeightNoise(**NOISE)], module=module, plugins=[MixedPrecision("16-mixed", "cpu")], limit_val_batches=0)
    assert len(used) == 12
    assert not any(torch.equal(w, clean) for w in used)
    assert torch.equal(weights_of(module)[0], clean)


# --- weights are clean whenever anybody but the forward and the backward pass can look

NOISE = {"noise": noise.Gaussian(), "level": 0.5, "seed": 5}


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


def weights_of(module: nn.Module) -> list[Tensor]:
    """The parameters themselves; the state dict of a module is clean."""
    return [parameter.detach() for parameter in module.parameters()]


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
    key = Key((5, "weight", 0, 0), rank=0) / "parameter" / "net.1.weight"
    assert torch.equal(module.used[0], noise.Gaussian()(weights(Tied())[0], 0.5, generator=key.generator("cpu")))
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


# --- the gradient


class Conv(Network):
    """A kernel of three axes, and a matrix."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, N_FEATURES)), nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, N_CLASSES)
        )


UNITS = [(noise.Gaussian(), unit) for unit in (None, "std", "max", "filter")]
MULTIPLICATIVE = [noise.Speckle(), noise.DropConnect(), noise.FeatureDropout(rescale=False), noise.Scaling(), noise.SNR()]


@pytest.mark.parametrize("n", [1, 2], ids=["one noise", "two noises"])
@pytest.mark.parametrize(("member", "unit"), [*UNITS, *((member, None) for member in MULTIPLICATIVE)], ids=repr)
def test_the_reparametrized_gradient_is_that_of_the_loss_as_a_function_of_the_clean_weights(member, unit, n):
    pl.seed_everything(0, verbose=False)
    module = Conv().double()
    batch = [Rows(8).x.double(), Rows(8).y]
    keys = [Key((callback, 3)) for callback in ("a", "b")][:n]
    clean = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    noisy = dict(clean)
    for key in keys:
        for name in ("net.1.weight", "net.4.weight"):
            noisy[name] = weight_noise(noisy[name], member, 0.3, key / "parameter" / name, unit)
    F.cross_entropy(functional_call(module, noisy, (batch[0],)), batch[1]).backward()
    perturbed = []
    for key in keys:  # the second is within the first
        perturbed.append(PerturbedParameters(module, None, member, 0.3, key, relative=unit, gradient="reparametrized"))
        perturbed[-1].enter()
    loss_of(module, batch).backward()
    for one in reversed(perturbed):
        one.exit()
    for name, p in module.named_parameters():
        assert p.grad is not None
        # the same derivative by two orders of the same sums, in float64
        torch.testing.assert_close(p.grad, clean[name].grad, rtol=1e-12, atol=1e-14)
        assert torch.equal(p, clean[name])
        assert not p._backward_hooks


def shifted(w, level, *, generator):
    """Additive, but it does not say so."""
    return w + level * torch.randn(w.shape, generator=generator)


@pytest.mark.parametrize("make", [Network, Manual, TwoBackwards, TwoUpdates, Accumulating])
def test_the_reparametrized_gradient_of_additive_noise_is_the_straight_through_one(make):
    """The derivative of what is added is 1."""
    one, two = (
        fit([WeightNoise(shifted, 0.3, gradient=gradient)], module=make, train=loader())[0]
        for gradient in ("reparametrized", "straight_through")
    )
    assert_same(weights(one), weights(two))


@pytest.mark.parametrize("member", [noise.Speckle(), noise.DropConnect()], ids=repr)
def test_a_gradient_of_a_reparametrized_gradient_is_exact_for_multiplicative_noise(member):
    module, key = Conv().double(), Key(("a",))
    batch = [Rows(8).x.double(), Rows(8).y]
    clean = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    noisy = {name: weight_noise(w, member, 0.3, key / "parameter" / name) if w.ndim > 1 else w for name, w in clean.items()}

    def penalty(loss: Tensor, parameters: list[Any]) -> Tensor:
        return loss + sum(g.square().sum() for g in torch.autograd.grad(loss, parameters, create_graph=True))

    loss = F.cross_entropy(functional_call(module, noisy, (batch[0],)), batch[1])
    expected = torch.autograd.grad(penalty(loss, [*clean.values()]), [*clean.values()])
    perturbed = PerturbedParameters(module, None, member, 0.3, key, gradient="reparametrized")
    perturbed.enter()
    penalty(loss_of(module, batch), [*module.parameters()]).backward()
    perturbed.exit()
    # the same derivative by two orders of the same sums, in float64
    torch.testing.assert_close([p.grad for p in module.parameters()], [*expected], rtol=1e-12, atol=1e-13)


def reparametrized_once(**arguments: Any) -> PerturbedParameters:
    layer = nn.Linear(4, 4)
    module = nn.Sequential(layer, nn.Tanh())
    perturbed = PerturbedParameters(module, None, **{"level": 0.3, "key": Key(()), "gradient": "reparametrized"} | arguments)
    perturbed.enter()
    loss = module(torch.ones(2, 4)).square().sum()
    (gradient,) = torch.autograd.grad(loss, [layer.weight], create_graph=True)
    gradient.sum().backward()
    return perturbed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": noise.Gaussian(), "relative": "std"}, "has no second derivatives of noise that is relative to the weights"),
        ({"noise": lambda w, level, *, generator: w.detach()}, "needs a noise that can be differentiated"),
    ],
    ids=["relative", "detached"],
)
def test_a_reparametrized_gradient_that_would_be_wrong_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        reparametrized_once(**arguments)


def test_a_sparse_reparametrized_gradient_is_refused():
    module = nn.Embedding(4, 3, sparse=True)
    perturbed = PerturbedParameters(module, None, noise.Speckle(), 0.3, Key(()), gradient="reparametrized")
    perturbed.enter()
    with pytest.raises(TypeError, match=r"needs dense gradients, but that of 'weight' is torch\.sparse_coo"):
        module(torch.tensor([1, 2])).sum().backward()


@pytest.mark.parametrize("make", [Network, Manual], ids=["automatic", "manual"])
def test_the_reparametrized_gradient_is_exact_for_scaled_gradients(make):
    """Power-of-two scales do not round, so the scaled run in float32 equals the one that is not scaled."""

    def run(**settings):
        callback = WeightNoise(noise.Speckle(), 0.5, gradient="reparametrized")
        return weights(fit([callback], module=make, train=loader(), **settings)[0])

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    autocast = MixedPrecision("16-mixed", "cpu", scaler)
    autocast.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
    assert_same(run(plugins=[autocast]), run())


# --- which parameters, in which units


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
    with pytest.raises(ValueError, match=r"no parameter of two dimensions is trained; give params=…; parameters are: 'weight'"):
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
        ({"noise": noise.Speckle(), "relative": "std"}, ValueError, "relative=True is for additive noise"),
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
    column = rows[0].split(",").index("noise/weight/ratio")
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
def test_weights_that_outgrow_the_noise_are_warned_of_once(arguments, warns):
    callback = WeightNoise(**NOISE | {"level": 0.01} | arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([callback], module=lambda: Growing(lr=0.0), log_every_n_steps=1, max_epochs=4)
    messages = [str(warning.message) for warning in caught if "twice" in str(warning.message)]
    assert len(messages) == warns
    assert all("'net.1.weight' is more than twice what it was when the noise 'weight' began" in message for message in messages)


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
