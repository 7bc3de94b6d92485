"""Noise in the outputs of modules is where it should be, the same when it is computed again, and gone afterwards."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from conftest import N_CLASSES, Classifier, Rows, assert_same, fit, loader, make_trainer, weights
from test_noise import NOISES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from lightning_noise import InputNoise, Key, LabelSmoothing, RobustnessMonitor, noise, schedules
from lightning_noise.batch import dotted, leaves
from lightning_noise.callbacks.activations import ActivationNoise, EmbeddingNoise, OutputCallback
from lightning_noise.perturb import perturbed_output

KEY = Key((0, "activation", 0, 0), rank=0)


class Deterministic(Classifier):
    """The classifier without dropout."""

    def __init__(self, lr: float = 0.1):
        super().__init__(lr)
        self.net[3] = nn.Identity()


class Layers(Deterministic):
    """Keeps what its second layer gets, and does not call its dropout; at a rate of 0 its weights stay."""

    def __init__(self, lr: float = 0.0):
        super().__init__(lr)
        self.hidden: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net[1](x)
        self.hidden.append(hidden)
        return self.net[4](self.net[2](hidden))


def within(
    callback: OutputCallback, module: Any, call: Callable[[], Any], key: Key = KEY, batch: Any = None, level: float = 0.5
):
    """What a call returns while the callback perturbs, outside a fit."""
    with callback.perturbation(make_trainer(), module, batch, level, key):
        return call()


def hooks(module: nn.Module) -> list[Any]:
    return [hook for part in module.modules() for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())]


# --- where the noise is, and which


def test_the_noise_is_the_draw_of_its_key():
    module, _ = fit(
        [ActivationNoise(noise.Gaussian(), 0.5, "net.1", seed=7)], module=Layers, train=loader(), limit_val_batches=0
    )
    data = Rows()
    assert len(module.hidden) == 6
    for i, hidden in enumerate(module.hidden):
        epoch, batch_idx = divmod(i, 3)
        key = Key((7, "activation", epoch, batch_idx), rank=0) / "module" / "net.1" / 0 / "leaf" / ""
        clean = module.net[1](data.x[8 * batch_idx : 8 * batch_idx + 8])
        assert torch.equal(hidden, noise.Gaussian()(clean, 0.5, generator=key.generator("cpu")))


def test_the_level_follows_its_schedule():
    def shift(x, level, *, generator):
        return x + level

    ramp = schedules.Linear(0.0, 6.0, until=6, unit="step")
    module, _ = fit([ActivationNoise(shift, ramp, "net.1")], module=Layers, train=loader(), limit_val_batches=0)
    for i, hidden in enumerate(module.hidden):
        assert torch.equal(hidden, module.net[1](Rows().x[i % 3 * 8 : i % 3 * 8 + 8]) + float(i))


def test_modules_and_their_calls_and_processes_have_draws_of_their_own():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Identity(), nn.Identity()

        def forward(self, x):
            return self.a(x), self.a(x), self.b(x)

    x, module = torch.zeros(4, 3), Twice()
    callback = ActivationNoise(noise.Gaussian(), 0.5, ["a", "b"])
    draws = [*within(callback, module, lambda: module(x)), within(callback, module, lambda: module.a(x), KEY.everywhere)]
    draws += [within(callback, module, lambda: module.a(x), Key(KEY.coordinates, rank=1))]
    for i, one in enumerate(draws):
        assert not any(torch.equal(one, other) for other in draws[:i])
    assert_same(within(callback, module, lambda: module(x)), draws[:3])


def test_every_closure_of_a_step_gets_the_same_noise():
    class LBFGS(Layers):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.0, max_iter=4, tolerance_change=-1.0)

    module, _ = fit([ActivationNoise(noise.Gaussian(), 0.5, "net.1")], module=LBFGS, train=loader(), max_epochs=1)
    hidden = [h for h in module.hidden if h.requires_grad]  # and not of the validation
    assert len(hidden) > 3
    assert len({tuple(h.flatten().tolist()) for h in hidden}) == 3


@dataclass(frozen=True)
class Answer:
    logits: Tensor
    parts: tuple[Tensor, Tensor]
    note: str = "a"


class Returns(nn.Module):
    def __init__(self, value: Any):
        super().__init__()
        self.inner = nn.Identity()
        self.value = value

    def forward(self) -> Any:
        return self.inner(self.value)


def test_every_floating_point_leaf_of_an_output_gets_a_draw_of_its_own_and_the_rest_is_the_same():
    zeros, ids = torch.zeros(4, 3), torch.arange(4)
    outputs = [
        (zeros, (zeros.clone(), ids)),
        {"h": zeros, "n": [zeros.clone(), None], "ids": ids},
        Answer(zeros, (zeros.clone(), ids)),
    ]
    for output in outputs:
        module = Returns(output)
        noisy = within(ActivationNoise(noise.Gaussian(), 0.5, "inner"), module, module)
        assert type(noisy) is type(output)
        first, second, rest = {
            tuple: lambda out: (out[0], out[1][0], out[1][1]),
            dict: lambda out: (out["h"], out["n"][0], out["ids"]),
            Answer: lambda out: (out.logits, out.parts[0], out.parts[1]),
        }[type(output)](noisy)
        assert first.all()
        assert second.all()
        assert not torch.equal(first, second)
        assert rest is ids
        assert not zeros.any(), "the tensors of the module stay as they are"


def test_all_outputs_of_an_lstm_and_of_attention_get_noise():
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    for inner in (nn.LSTM(6, 3, batch_first=True), nn.MultiheadAttention(6, 2, batch_first=True)):
        module = nn.ModuleDict({"inner": inner})
        arguments = (x,) if isinstance(inner, nn.LSTM) else (x, x, x)
        noisy = within(ActivationNoise(noise.Gaussian(), 0.5, "inner"), module, lambda f=inner, a=arguments: f(*a))
        found, clean = dict(leaves(noisy)), dict(leaves(inner(*arguments)))
        assert list(found) == list(clean) == ([(0,), (1, 0), (1, 1)] if isinstance(inner, nn.LSTM) else [(0,), (1,)])
        for path, leaf in found.items():
            key = KEY / "module" / "inner" / 0 / "leaf" / dotted(path)
            assert torch.equal(leaf, key.apply(noise.Gaussian(), clean[path], 0.5))


class Cache:
    def __init__(self, value: Tensor):
        self.value = value


def test_what_is_inside_another_object_gets_no_noise():
    zeros = torch.zeros(4, 3)
    distribution, cache = torch.distributions.Normal(zeros, zeros + 1), Cache(zeros.clone())
    module = Returns((zeros, {"distribution": distribution, "caches": [cache]}))
    callback = ActivationNoise(noise.Gaussian(), 0.5, "inner")
    noisy, rest = within(callback, module, module)
    assert noisy.all()
    assert rest["distribution"] is distribution
    assert rest["caches"][0] is cache
    for value in (zeros, distribution.loc, cache.value):
        assert not value.any()
    alone = Returns(distribution)
    with pytest.raises(TypeError, match="with an axis, but 'inner' returned Normal; select other modules"):
        within(callback, alone, alone)


def test_a_tensor_that_occurs_twice_in_an_output_has_one_draw():
    h, other = torch.zeros(4, 3), torch.zeros(4, 3)
    module = Returns({"last": h, "hidden": (other, h)})
    noisy = within(ActivationNoise(noise.Gaussian(), 0.5, "inner"), module, module)
    assert noisy["last"] is noisy["hidden"][1]
    assert noisy["last"].all()
    assert not torch.equal(noisy["hidden"][0], noisy["last"])


def test_a_finished_loss_gets_no_noise():
    loss, logits = torch.tensor(2.0), torch.zeros(4, 3)
    module = Returns({"loss": loss, "logits": logits})
    callback = ActivationNoise(noise.Gaussian(), 0.5, "inner")
    noisy = within(callback, module, module)
    assert noisy["loss"] is loss
    assert noisy["logits"].all()
    alone = Returns(loss)
    with pytest.raises(TypeError, match=r"with an axis, but 'inner' returned float32 \(\); select other modules"):
        within(callback, alone, alone)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.eye(3).to_sparse(), "a tensor of torch.sparse_coo"),
        (torch.nested.nested_tensor([torch.rand(2), torch.rand(3)], layout=torch.jagged), "a nested tensor"),
    ],
    ids=["sparse", "nested"],
)
def test_an_output_that_is_not_dense_is_refused(value, kind):
    module = Returns({"h": value})
    with pytest.raises(TypeError, match=f"needs a dense tensor, but 'inner' returned in 'h' {kind}; select other modules"):
        within(ActivationNoise(noise.Gaussian(), 0.5, "inner"), module, module)


def test_a_relative_level_is_in_units_of_each_samples_standard_deviation():
    def ones(x, level, *, generator):
        return x + level[:, None]

    module, x = nn.Sequential(nn.Identity()), torch.tensor([[1.0, 3.0], [10.0, 30.0]])
    noisy = within(ActivationNoise(ones, 0.5, "0", relative=True), module, lambda: module(x))
    assert torch.equal(noisy, x + torch.tensor([[0.5], [5.0]]))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1), (0, 1)], ids=str)
def test_a_relative_level_of_samples_of_one_number_is_refused(shape):
    module = Returns(torch.zeros(shape))
    with pytest.raises(ValueError, match="samples of more than one number, got a tensor of shape"):
        within(ActivationNoise(noise.Gaussian(), 0.5, "inner", relative=True), module, module)


def test_a_copy_of_a_module_made_in_the_fit_and_a_saved_one_have_no_noise(tmp_path):
    class Copying(Layers):
        def training_step(self, batch, batch_idx):
            self.teacher = [copy.deepcopy(self.net)]
            file = io.BytesIO()
            torch.save(self.net, file)
            file.seek(0)
            self.loaded = [torch.load(file, weights_only=False)]
            self.clean = [part(batch[0]) for part in (*self.teacher, *self.loaded)]
            return super().training_step(batch, batch_idx)

    # a schedule that cannot be pickled must not be part of what is saved
    callback = ActivationNoise(noise.Gaussian(), lambda progress: 0.5, "net.1")
    module, _ = fit([callback], module=Copying, train=loader(), max_epochs=1, limit_val_batches=0)
    for clean in module.clean:
        assert torch.equal(clean, module.net(Rows().x[16:]))


# --- gradients


@pytest.mark.parametrize("level", [0.3, torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("member", [member for member in NOISES if not isinstance(member, noise.Shot)], ids=repr)
def test_a_noise_has_the_gradient_of_what_it_returns(member, level):
    x = torch.rand(3, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).add(0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: member(x, level, generator=torch.Generator().manual_seed(0)), (x,))


@pytest.mark.parametrize("key", [KEY, Key(("probe",), positions=range(3))], ids=["all rows", "row by row"])
def test_a_relative_level_has_the_gradient_of_the_standard_deviation(key):
    x = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: perturbed_output(x, noise.Gaussian(), 0.5, key, relative=True), (x,))


def test_the_gradient_of_multiplicative_noise_has_its_factor():
    module, x = nn.Sequential(nn.Identity()), torch.ones(4, 3, requires_grad=True)
    noisy = within(ActivationNoise(noise.Speckle(), 0.5, "0"), module, lambda: module(x))
    noisy.sum().backward()
    assert torch.equal(x.grad, noisy)  # type: ignore[arg-type]


def test_a_noise_that_cuts_the_gradient_is_refused():
    def cut(x, level, *, generator):
        return x.detach() + level

    module, x = nn.Sequential(nn.Identity()), torch.ones(4, 3, requires_grad=True)
    with pytest.raises(ValueError, match="cut cuts the gradient"):
        within(ActivationNoise(cut, 0.5, "0"), module, lambda: module(x))
    with torch.no_grad():  # where there is none
        assert torch.equal(within(ActivationNoise(cut, 0.5, "0"), module, lambda: module(x)), x + 0.5)


# --- activation checkpointing


class Checkpointed(Layers):
    """Computes its layers again in the backward pass."""

    def __init__(self, use_reentrant: bool | None, twice: bool = False):
        super().__init__(lr=0.1)
        self.use_reentrant, self.twice = use_reentrant, twice

    def block(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[1](self.net[0](x)))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()  # without, the reentrant kind has no gradient
        calls = [x, 2 * x] if self.twice else [x]
        if self.use_reentrant is None or not self.training:
            return self.net[4](sum(self.block(x) for x in calls))
        return self.net[4](sum(checkpoint(self.block, x, use_reentrant=self.use_reentrant) for x in calls))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_what_is_computed_again_in_the_backward_pass_gets_the_noise_of_the_forward_pass(use_reentrant):
    def trained(use_reentrant):
        # Speckle, whose draw the gradient depends on
        return fit([ActivationNoise(noise.Speckle(), 0.5, ["net.1", "net.2"])], module=lambda: Checkpointed(use_reentrant))[0]

    assert_same(weights(trained(use_reentrant)), weights(trained(None)))


def test_what_is_computed_again_twice_gets_the_noise_of_the_forward_pass():
    class Manual(Checkpointed):
        def __init__(self, use_reentrant):
            super().__init__(use_reentrant)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss, retain_graph=True)
            self.manual_backward(loss)
            optimizer.step()

    def trained(use_reentrant):
        return fit([ActivationNoise(noise.Speckle(), 0.5, "net.1")], module=lambda: Manual(use_reentrant))[0]

    assert_same(weights(trained(False)), weights(trained(None)))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_module_that_is_called_twice_is_refused_when_it_is_computed_again(use_reentrant):
    def trained(use_reentrant):
        callback = ActivationNoise(noise.Speckle(), 0.5, "net.1")
        return fit([callback], module=lambda: Checkpointed(use_reentrant, twice=True))[0]

    trained(None)
    with pytest.raises(ValueError, match=r"computes 'net.1' again.*which of the 2 calls.*called once"):
        trained(use_reentrant)


def test_a_module_that_is_called_for_each_of_two_batches_of_a_step_is_refused_when_it_is_computed_again():
    module, x = nn.Sequential(nn.Identity()), torch.ones(4, 3, requires_grad=True)
    callback = ActivationNoise(noise.Speckle(), 0.5, "0")
    with callback.perturbation(make_trainer(), module, None, 0.5, KEY):  # type: ignore[arg-type]
        first = checkpoint(module, x, use_reentrant=True)
        with callback.perturbation(make_trainer(), module, None, 0.5, KEY / "second"):  # type: ignore[arg-type]
            second: Any = checkpoint(module, x, use_reentrant=True)
            with pytest.raises(ValueError, match=r"computes '0' again.*which of the 2 calls"):
                (first + second).sum().backward()


# --- compiled models


def compiled(part: str, backend: Any) -> tuple[Any, Any]:
    """A module and what is given to the trainer."""
    module = Deterministic(lr=0.1)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # logging from a compiled step crashes in this Lightning
    if part == "layer":
        module.net[1] = torch.compile(module.net[1], backend=backend)  # type: ignore[assignment]
    if part == "submodule":
        module.net = torch.compile(module.net, backend=backend)  # type: ignore[assignment]
    if part == "in place":
        module.net.compile(backend=backend)
    return module, torch.compile(module, backend=backend) if part == "module" else module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch hides its own warning, but not from an error
@pytest.mark.parametrize("part", ["layer", "submodule", "in place", "module"])
def test_a_compiled_model_gets_the_same_noise_in_every_fit_and_is_not_compiled_at_every_step(part):
    from torch._dynamo.testing import CompileCounter

    def fits(part, callback=None):
        torch._dynamo.reset()
        pl.seed_everything(0, verbose=False)
        counter, after, graphs = CompileCounter(), [], []  # the counter runs the graph as it is
        module, given = compiled(part, counter)
        for callbacks in ([], [callback], [], [callback]) if callback else ([], [], [], []):
            make_trainer(callbacks, max_epochs=2).fit(given, loader(), loader())
            after.append(weights(module))
            graphs.append(counter.frame_count)
            assert not hooks(module)
        return after, graphs

    def callback(level):
        return ActivationNoise(noise.Gaussian(), level, ["net.1", "net.2"])

    ramp = callback(schedules.Linear(0.1, 0.5))
    (noisy, graphs), (expected, _), (without, _) = fits(part, ramp), fits("none", ramp), fits("none")
    for i, (one, two) in enumerate(zip(noisy, expected, strict=True)):
        assert_same(one, two)
        assert all(map(torch.equal, one, without[i])) is (i == 0)
    assert graphs[-1] > 0
    assert graphs == fits(part, callback(0.3))[1], "a level that changes compiles nothing"


# --- modules


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("net.1", ["net.1"]),
        ("net.?", ["net.0", "net.1", "net.2", "net.3", "net.4"]),
        (["net.[12]", "net.4"], ["net.1", "net.2", "net.4"]),
        ("*", ["net", "net.0", "net.1", "net.2", "net.3", "net.4"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("part", ["none", "submodule"])
def test_patterns_select_by_the_name_that_a_module_has_without_a_compiler(patterns, expected, part):
    module, _ = compiled(part, "eager")
    selected = ActivationNoise(noise.Gaussian(), 0.5, patterns).selected(module)
    assert list(selected) == expected
    assert selected.get("net", module.net) is module.net, "and not what it wraps"


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("encoder.*", r"no module matches 'encoder\.\*'; modules are: 'net', 'net\.0', 'net\.1'"),
        (["net.1", "net.9"], r"no module matches 'net\.9'; modules are: 'net'"),
        ([], "no module matches an empty list; modules are: 'net'"),
        ("", "no module matches ''; modules are: 'net'"),
    ],
    ids=str,
)
def test_a_pattern_that_matches_no_module_is_refused_before_the_first_step(patterns, message):
    module = Classifier()
    with pytest.raises(ValueError, match=message):
        fit([ActivationNoise(noise.Gaussian(), 0.0, patterns)], module=module)
    assert not module.seen
    assert not module.validated


def test_patterns_do_not_select_what_computes_the_weights():
    class Normalised(Layers):
        def __init__(self):
            super().__init__()
            self.net[1] = nn.utils.parametrizations.weight_norm(self.net[1])  # type: ignore[assignment]
            self.used: list[Tensor] = []

        def forward(self, x):
            self.used.append(self.net[1].weight.detach().clone())  # type: ignore[operator]
            return super().forward(x)

    callback = ActivationNoise(noise.Gaussian(), 0.5, "net.*")
    assert list(callback.selected(Normalised())) == [f"net.{i}" for i in range(5)]
    module, _ = fit([callback], module=Normalised, max_epochs=1)
    for used in module.used:
        assert torch.equal(used, module.net[1].weight)
    with pytest.raises(ValueError, match=r"no module matches 'net\.1\.parametrizations\.weight'"):
        ActivationNoise(noise.Gaussian(), 0.5, "net.1.parametrizations.weight").selected(module)


@pytest.mark.filterwarnings("ignore:.*training_step.* returned `None`")  # Lightning's word on it
def test_modules_that_are_not_called_are_an_error_at_the_end_of_the_first_epoch_with_noise():
    class Skipping(Layers):
        def training_step(self, batch, batch_idx):
            if self.current_epoch == 1 and batch_idx == 0:
                self.net[3](batch[0])  # what is called in a step that is skipped does not count
                return None
            return super().training_step(batch, batch_idx)

    late = schedules.Window(0.5, begin=1, unit="epoch")
    module = Skipping()
    with pytest.raises(ValueError, match="the training epoch called none of the modules that 'activation'"):
        fit([ActivationNoise(noise.Gaussian(), late, "net.3")], module=module, train=loader(), max_epochs=3)
    assert len(module.seen) == 3 + 2
    assert not hooks(module)
    fit([ActivationNoise(noise.Gaussian(), late, ["net.3", "net.1"])], module=Skipping)


@pytest.mark.filterwarnings("ignore:.*training_step.* returned `None`")  # Lightning's word on it
def test_an_epoch_of_skipped_steps_is_not_held_against_the_modules():
    class Skipping(Layers):
        def training_step(self, batch, batch_idx):
            return None if self.current_epoch == 0 else super().training_step(batch, batch_idx)

    fit([ActivationNoise(noise.Gaussian(), 0.5, "net.1")], module=Skipping)


def test_a_network_that_is_not_called_in_every_step_gets_noise():
    class Adversarial(Deterministic):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.noisy = nn.Linear(8, 8), []

        def training_step(self, batch, batch_idx):
            optimizer: Any = self.optimizers()
            x = batch[0]
            fake = self.generator(x) if batch_idx == 2 else x
            self.noisy.append(not torch.equal(fake, x if batch_idx < 2 else F.linear(x, *self.generator.parameters())))
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(fake), batch[1]))
            optimizer.step()

    module, _ = fit([ActivationNoise(noise.Gaussian(), 0.5, "generator")], module=Adversarial, train=loader())
    assert module.noisy == 2 * [False, False, True]


@pytest.mark.filterwarnings("ignore:.*training_step.* returned `None`")  # Lightning's word on it
@pytest.mark.parametrize(
    "build", [lambda level: ActivationNoise(noise.Gaussian(), level, "net.1"), LabelSmoothing], ids=["activations", "loss"]
)
def test_a_skipped_step_is_not_held_against_a_later_one_without_noise(build):
    class Skipping(Layers):
        def training_step(self, batch, batch_idx):
            return None if self.trainer.global_step == 0 else super().training_step(batch, batch_idx)

    fit([build(schedules.Every(0.5, every=2, unit="step"))], module=Skipping)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ActivationNoise(noise.Gaussian, 0.1, "net"), TypeError, r"a value such as noise.Gaussian\(\)"),  # type: ignore[arg-type]
        (lambda: ActivationNoise(noise.Impulse(), 0.1, "net", relative=True), ValueError, "the level of Impulse has no unit"),
        (lambda: ActivationNoise(noise.Impulse(), 1.5, "net"), ValueError, r"in \[0, 1\], got 1.5"),
        (lambda: ActivationNoise(noise.Shot(), 0.1, "net"), ValueError, "the counts of Shot have no gradient"),
        (lambda: EmbeddingNoise(-1.0), ValueError, "finite and not negative, got -1.0"),
    ],
)
def test_a_wrong_argument_is_refused_when_the_callback_is_made(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_an_output_without_floating_point_numbers_is_refused():
    module = Returns((torch.arange(3), "a"))
    with pytest.raises(TypeError, match="with an axis, but 'inner' returned tuple; select other modules"):
        within(ActivationNoise(noise.Gaussian(), 0.5, "inner"), module, module)
    assert not hooks(module)


# --- probes


@pytest.mark.parametrize("part", ["none", "submodule", "in place", "module"])
def test_a_monitor_perturbs_activations_without_a_callback_in_the_trainer(part):
    def held_out(part):
        pl.seed_everything(0, verbose=False)
        module, given = compiled(part, "eager")
        del module.log  # the monitor needs it
        module.validation_step = lambda batch, batch_idx: None
        return module, given

    def measured(module, batch_size=5):
        monitor = RobustnessMonitor(ActivationNoise(noise.Gaussian(), 0.0, "net.1"), [2.0, 5.0])
        trainer = make_trainer([monitor])
        trainer.validate(module, loader(Rows(13, seed=1), batch_size=batch_size), verbose=False)
        return {key: float(value) for key, value in trainer.callback_metrics.items()}

    module, given = held_out(part)
    metrics = measured(given)
    assert metrics["robustness/clean/loss"] < metrics["robustness/activation/2/loss"] < metrics["robustness/activation/5/loss"]
    assert not hooks(module)
    if part == "none":
        # a draw for each sample, whatever batch it is in; the losses are means of float32 in another order
        assert measured(given, batch_size=13) == pytest.approx(metrics, rel=1e-5)
    else:
        assert measured(held_out("none")[0]) == metrics


def test_a_callback_is_a_probe_of_the_fit_that_it_perturbs():
    def run(*probes):
        callback = ActivationNoise(noise.Gaussian(), 0.5, "net.1")
        monitors = [RobustnessMonitor(probe or callback, [2.0], name=f"monitor{i}") for i, probe in enumerate(probes)]
        module, trainer = fit([callback, *monitors], module=lambda: Layers(lr=0.1))
        assert not hooks(module)
        return weights(module), [float(trainer.callback_metrics[f"monitor{i}/activation/2/loss"]) for i in range(len(probes))]

    monitored, (own, other) = run(None, ActivationNoise(noise.Gaussian(), 0.0, "net.1"))
    assert own == other
    assert_same(monitored, run()[0])


def test_a_probe_of_modules_that_the_prediction_does_not_call_is_an_error():
    monitor = RobustnessMonitor(ActivationNoise(noise.Gaussian(), 0.5, "net.3"), [0.5])
    module = Layers()
    with pytest.raises(ValueError, match="the prediction called none of the modules that 'activation'"):
        make_trainer([monitor]).validate(module, loader(), verbose=False)
    assert not hooks(module)


class Padded(pl.LightningModule):
    """A transformer that is told of the padding, which takes another path in evaluation."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.arange(x.shape[1]) >= torch.arange(len(x))[:, None] % x.shape[1] + 1
        return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of the clean prediction
@pytest.mark.parametrize("enabled", [True, False], ids=["fast path", "none"])
@pytest.mark.parametrize("part", ["encoder.layers.0.linear1", "encoder.layers.1", "encoder"])
def test_a_transformer_with_padding_can_be_probed(part, enabled):
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        monitor = RobustnessMonitor(ActivationNoise(noise.Gaussian(), 0.0, part), [0.0, 3.0])
        trainer = make_trainer([monitor])
        pl.seed_everything(0, verbose=False)
        trainer.validate(Padded(), loader(Rows(8, features=(4, 8))), verbose=False)
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    clean, at_0, at_3 = (
        float(trainer.callback_metrics[f"robustness/{key}/loss"]) for key in ("clean", "activation/0", "activation/3")
    )
    assert at_0 == pytest.approx(clean, rel=1e-5)  # the two paths differ in their roundings, of float32
    assert at_3 != at_0


@pytest.mark.parametrize(
    ("batch_first", "message"),
    [
        (True, r"each of the 8 samples .* but 'lstm' returned in '1\.0' float32 \(1, 8, 8\); select a module whose first axis"),
        (False, r"each of the 8 samples .* but 'lstm' returned in '0' float32 \(4, 8, 8\); select a module whose first axis"),
    ],
    ids=["batch first", "time first"],
)
def test_a_probe_of_what_does_not_have_the_samples_first_is_refused(batch_first, message):
    class Recurrent(Padded):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(8, 8, batch_first=batch_first)

        def forward(self, x):
            h, _ = self.lstm(x if batch_first else x.transpose(0, 1))
            return self.head(h.sum(1 if batch_first else 0))

    module = Recurrent()
    monitor = RobustnessMonitor(ActivationNoise(noise.Gaussian(), 0.0, "lstm"), [0.5])
    with pytest.raises(ValueError, match=message):
        make_trainer([monitor]).validate(module, loader(Rows(8, features=(4, 8))), verbose=False)
    assert not hooks(module)


def test_a_fit_with_noise_in_inputs_and_activations_has_both():
    module, _ = fit(
        [InputNoise(noise.Gaussian(), 0.5), ActivationNoise(noise.Gaussian(), 0.5, "net.1")],
        module=Layers,
        train=loader(),
        limit_val_batches=0,
    )
    assert not torch.equal(module.seen[0][0], Rows().x[:8])
    assert not torch.equal(module.hidden[0], module.net[1](module.seen[0][0]))


# --- embeddings


N_WORDS, LENGTH, WIDTH = 20, 7, 6


class Sentences(Dataset):
    """Rows of ids of different lengths, filled up with zeros; the last has none."""

    def __init__(self, n: int = 16):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, N_WORDS, (n, LENGTH), generator=generator)
        lengths = torch.arange(n - 1, -1, -1) % (LENGTH + 1)
        self.mask = (torch.arange(LENGTH) < lengths[:, None]).long()
        self.ids *= self.mask
        self.labels = self.ids.sum(1) % N_CLASSES

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"ids": self.ids[i], "attention_mask": self.mask[i], "labels": self.labels[i]}


class Tokens(pl.LightningModule):
    """Classifies the mean embedding, and keeps the embeddings."""

    def __init__(self, padding_idx: int | None = None):
        super().__init__()
        self.words = nn.Embedding(N_WORDS, WIDTH, padding_idx=padding_idx)
        self.head = nn.Linear(WIDTH, N_CLASSES)
        self.embedded: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        e = self.words(input=ids)
        self.embedded.append(e.detach())
        return self.head(e.mean(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["ids"]), batch["labels"])

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def added(callback: EmbeddingNoise, padding_idx: int | None = None, **kwargs: Any) -> Tensor:
    """The noise of the first batch of all sentences."""
    module, _ = fit(
        [callback],
        module=lambda: Tokens(padding_idx),
        train=DataLoader(Sentences(), batch_size=16),
        max_epochs=1,
        limit_val_batches=0,
        **kwargs,
    )
    return module.embedded[0] - module.words.weight.detach()[Sentences().ids]


def test_the_embeddings_of_a_fit_get_the_noise_of_the_paper():
    key = Key((3, "embedding", 0, 0), rank=0) / "module" / "words" / 0
    u = torch.empty(16, LENGTH, WIDTH).uniform_(-1, 1, generator=key.generator("cpu"))
    lengths = Sentences().mask.sum(1)
    expected = 5.0 * u / (lengths * WIDTH).clamp_min(1).sqrt()[:, None, None] * Sentences().mask[..., None]
    # the noise is taken from a sum in float32, of numbers of up to 5
    torch.testing.assert_close(added(EmbeddingNoise(5.0, mask="attention_mask", seed=3)), expected, rtol=0, atol=2e-6)


def test_padding_and_rows_without_tokens_get_no_noise():
    mask = Sentences().mask.bool()
    assert not mask[-1].any()
    for delta in (added(EmbeddingNoise(5.0, mask="attention_mask")), added(EmbeddingNoise(5.0), padding_idx=0)):
        assert delta.isfinite().all()
        assert not delta[~mask].any()
        assert delta[mask].all()


def test_the_mask_comes_before_the_padding_idx_and_without_both_all_positions_are_tokens():
    by_mask, by_ids = (
        added(EmbeddingNoise(5.0, mask="attention_mask"), padding_idx=3),
        added(EmbeddingNoise(5.0), padding_idx=0),
    )
    whole = added(EmbeddingNoise(5.0))
    by_mask[Sentences().ids == 3] = by_ids[Sentences().ids == 3] = (
        0  # the weights of a padding_idx are zeros, so roundings differ
    )
    torch.testing.assert_close(by_mask, by_ids, rtol=0, atol=2e-6)  # noise taken from a sum in float32, of numbers of up to 5
    assert whole.all()
    assert whole.abs().max() <= 5.0 / math.sqrt(LENGTH * WIDTH) + 2e-6


@pytest.mark.parametrize("padded", [LENGTH, 4 * LENGTH])
@pytest.mark.parametrize(("length", "width"), [(1, 4), (LENGTH, 4), (3, 64), (None, 16)])
def test_the_noise_of_a_row_has_a_mean_square_norm_of_a_third_of_the_squared_level(length, width, padded):
    rows, alpha = 4000, 5.0
    module = nn.ModuleDict({"words": nn.Embedding(N_WORDS, width)}).double()
    tokens = (rows,) if length is None else (rows, padded)  # one token for each row, where there is no axis of tokens
    batch = {"mask": (torch.arange(padded) < (length or 0)).expand(tokens) if length else torch.ones(tokens)}
    ids = torch.zeros(tokens, dtype=torch.long)
    noisy = within(EmbeddingNoise(alpha, mask="mask"), module, lambda: module["words"](ids), batch=batch, level=alpha)
    norms = (noisy - module["words"](ids)).flatten(1).square().sum(1)
    # u^2 has the mean 1/3 and the variance 4/45, and a norm is a mean of n of them; five standard errors
    n = (length or 1) * width
    assert abs(norms.mean() / alpha**2 - 1 / 3) < 5 * math.sqrt(4 / 45 / n / rows)


def test_half_precision_is_perturbed_in_float32_and_rounded_once():
    module = nn.ModuleDict({"words": nn.Embedding(N_WORDS, WIDTH)}).bfloat16()
    ids = Sentences().ids
    half = within(EmbeddingNoise(5.0), module, lambda: module["words"](ids))
    full = within(EmbeddingNoise(5.0), module.float(), lambda: module["words"](ids))
    assert torch.equal(half, full.bfloat16())


def test_the_noise_of_a_probe_is_that_of_the_place_of_a_row():
    module, ids = nn.ModuleDict({"words": nn.Embedding(N_WORDS, WIDTH)}), Sentences().ids
    callback = EmbeddingNoise(5.0)
    whole = within(callback, module, lambda: module["words"](ids), Key(("probe",), positions=range(16)))
    part = within(callback, module, lambda: module["words"](ids[4:9]), Key(("probe",), positions=range(4, 9)))
    assert torch.equal(part, whole[4:9])


def test_a_compiled_embedding_knows_its_padding():
    module = nn.ModuleDict({"words": nn.Embedding(N_WORDS, WIDTH, padding_idx=0)})
    plain = within(EmbeddingNoise(5.0), module, lambda: module["words"](Sentences().ids))
    module["words"] = torch.compile(module["words"], backend="eager")  # type: ignore[assignment]
    assert torch.equal(within(EmbeddingNoise(5.0), module, lambda: module["words"](Sentences().ids)), plain)


@pytest.mark.parametrize(
    ("callback", "error", "message"),
    [
        (EmbeddingNoise(5.0, mask="mask"), ValueError, "no leaf 'mask' in the batch; leaves are: 'ids' int64"),
        (
            EmbeddingNoise(5.0, mask="labels"),
            ValueError,
            r"the mask 'labels' is int64 \(8,\), but 'words' embeds tokens of shape \(8, 7\); say modules=…",
        ),
        (EmbeddingNoise(5.0, modules="word"), ValueError, "no module matches 'word'; modules are: 'words', 'head'"),
        (EmbeddingNoise(5.0, modules=["words", "inner"]), TypeError, r"\(B, L, d\), but 'inner' returned int64 \(8, 7\)"),
    ],
    ids=lambda value: "" if isinstance(value, EmbeddingNoise) else None,
)
def test_what_does_not_suit_the_embeddings_is_refused(callback, error, message):
    class Wrapped(Tokens):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, ids):
            return super().forward(self.inner(ids))

    module = Wrapped()
    with pytest.raises(error, match=message):
        fit([callback], module=module, train=DataLoader(Sentences(), batch_size=8), limit_val_batches=0)
    assert not hooks(module)


def test_a_mask_is_for_an_embedding_of_the_same_tokens_alone():
    module = nn.ModuleDict({"words": nn.Embedding(N_WORDS, WIDTH, padding_idx=0)})
    ids, batch = Sentences().ids, {"mask": Sentences().mask}

    def twice():
        return module["words"](ids), module["words"](ids.flip(0))

    with pytest.raises(
        ValueError, match=r"'words' is called for other tokens, too, .* 'mask' is the mask of its first .* a padding_idx"
    ):
        within(EmbeddingNoise(5.0, mask="mask"), module, twice, batch=batch)
    one, two = within(
        EmbeddingNoise(5.0, mask="mask"), module, lambda: (module["words"](ids), module["words"](ids)), batch=batch
    )
    assert not torch.equal(one, two), "two encodings of one batch draw twice"
    for noisy, padding in zip(within(EmbeddingNoise(5.0), module, twice), (ids == 0, ids.flip(0) == 0), strict=True):
        assert not noisy[padding].any()
        assert noisy[~padding].any()


def test_each_of_two_batches_of_a_step_has_its_mask():
    module = nn.ModuleDict({"words": nn.Embedding(N_WORDS, WIDTH)})
    ids, mask = Sentences().ids, Sentences().mask
    callback, trainer = EmbeddingNoise(5.0, mask="mask"), make_trainer()
    with callback.perturbation(trainer, module, {"mask": mask}, 5.0, KEY):  # type: ignore[arg-type]
        module["words"](ids)
        with callback.perturbation(trainer, module, {"mask": mask.flip(0)}, 5.0, KEY / "second"):  # type: ignore[arg-type]
            noisy = module["words"](ids.flip(0))
    delta = noisy - module["words"](ids.flip(0))
    assert not delta[mask.flip(0) == 0].any()
    assert delta[mask.flip(0) == 1].all()


def test_it_must_be_said_which_of_several_embeddings_gets_noise():
    class Several(Tokens):
        def __init__(self):
            super().__init__()
            self.places = nn.Embedding(LENGTH, WIDTH)

    with pytest.raises(ValueError, match=r"Say modules=…; of nn\.Embedding there are: 'words', 'places'"):
        EmbeddingNoise(5.0).selected(Several())
    assert list(EmbeddingNoise(5.0, modules="words").selected(Several())) == ["words"]
    with pytest.raises(ValueError, match=r"of nn\.Embedding there are: none"):
        EmbeddingNoise(5.0).selected(Classifier())


def test_at_level_0_the_embeddings_are_the_clean_ones():
    assert not added(EmbeddingNoise(0.0, mask="attention_mask")).any()
