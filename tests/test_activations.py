"""Noise in the outputs of modules is where it should be, and gone afterwards."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import N_CLASSES, Classifier, Deterministic, Rows, assert_same, fit, loader, make_trainer, weights
from helpers_activations import KEY, Layers, compiled, hooks, within
from members import NOISES
from torch import Tensor, nn

from lightning_noise import InputNoise, Key, LabelSmoothing, RobustnessMonitor, noise, schedules
from lightning_noise.batch import format_path, leaves
from lightning_noise.callbacks.activations import ActivationNoise
from lightning_noise.callbacks.embeddings import EmbeddingNoise
from lightning_noise.perturb.outputs import perturb_output

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
            key = KEY / "module" / "inner" / 0 / "leaf" / format_path(path)
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
    with pytest.raises(TypeError, match="with an axis, but 'inner' returned Normal; type modules=… to select other modules"):
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
    with pytest.raises(
        TypeError, match=r"with an axis, but 'inner' returned float32 \(\); type modules=… to select other modules"
    ):
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
    with pytest.raises(
        TypeError, match=f"needs a dense tensor, but 'inner' returned in 'h' {kind}; type modules=… to select other modules"
    ):
        within(ActivationNoise(noise.Gaussian(), 0.5, "inner"), module, module)


def test_a_relative_level_is_in_units_of_each_samples_standard_deviation():
    def ones(x, level, *, generator):
        return x + level[:, None]

    module, x = nn.Sequential(nn.Identity()), torch.tensor([[1.0, 3.0], [10.0, 30.0]])
    noisy = within(ActivationNoise(ones, 0.5, "0", relative="std"), module, lambda: module(x))
    assert torch.equal(noisy, x + torch.tensor([[0.5], [5.0]]))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1), (0, 1)], ids=str)
def test_a_relative_level_of_samples_of_one_number_is_refused(shape):
    module = Returns(torch.zeros(shape))
    with pytest.raises(ValueError, match="samples of more than one number, got a tensor of shape"):
        within(ActivationNoise(noise.Gaussian(), 0.5, "inner", relative="std"), module, module)


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

# no gradient, or that of the identity, as documented
OTHER_GRADIENTS = noise.Shot | noise.Quantization | noise.AnalogWeights


@pytest.mark.parametrize("level", [0.3, torch.tensor([0.1, 0.3, 0.5], dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("member", [member for member in NOISES if not isinstance(member, OTHER_GRADIENTS)], ids=repr)
def test_a_noise_has_the_gradient_of_what_it_returns(member, level):
    x = torch.rand(3, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).add(0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: member(x, level, generator=torch.Generator().manual_seed(0)), (x,))


@pytest.mark.parametrize("key", [KEY, Key(("probe",), positions=range(3))], ids=["all rows", "row by row"])
def test_a_relative_level_has_the_gradient_of_the_standard_deviation(key):
    x = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: perturb_output(x, noise.Gaussian(), 0.5, key, relative="std"), (x,))


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
    selected = ActivationNoise(noise.Gaussian(), 0.5, patterns).select_modules(module)
    assert list(selected) == expected
    assert selected.get("net", module.net) is module.net, "and not what it wraps"


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("encoder.*", r"no module matches 'encoder\.\*'; modules are: 'net', 'net\.0', 'net\.1'"),
        (["net.1", "net.9"], r"no module matches 'net\.9'; type 'net\.\d'; modules are: 'net'"),
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
    assert list(callback.select_modules(Normalised())) == [f"net.{i}" for i in range(5)]
    module, _ = fit([callback], module=Normalised, max_epochs=1)
    for used in module.used:
        assert torch.equal(used, module.net[1].weight)
    with pytest.raises(ValueError, match=r"no module matches 'net\.1\.parametrizations\.weight'"):
        ActivationNoise(noise.Gaussian(), 0.5, "net.1.parametrizations.weight").select_modules(module)


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
    with pytest.raises(ValueError, match="the training epoch called no module that 'activation' perturbs"):
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
        (lambda: ActivationNoise(noise.Impulse(), 0.1, "net", relative="std"), ValueError, "the level of Impulse has no unit"),
        (lambda: ActivationNoise(noise.Impulse(), 1.5, "net"), ValueError, r"in \[0, 1\], got 1.5"),
        (
            lambda: ActivationNoise(noise.Shot(), 0.1, "net"),
            ValueError,
            "Shot cuts the gradient, .*; type noise.Speckle",
        ),
        (lambda: EmbeddingNoise(-1.0), ValueError, "finite and not negative, got -1.0"),
    ],
)
def test_a_wrong_argument_is_refused_when_the_callback_is_made(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_an_output_without_floating_point_numbers_is_refused():
    module = Returns((torch.arange(3), "a"))
    with pytest.raises(TypeError, match="with an axis, but 'inner' returned tuple; type modules=… to select other modules"):
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
        # without the retention, which an untrained model has not
        return {key: value.item() for key, value in trainer.callback_metrics.items() if not value.isnan()}

    module, given = held_out(part)
    metrics = measured(given)
    weak, strong = (metrics[f"robustness_levels/activation/{level}/loss"] for level in (2, 5))
    assert metrics["robustness/loss_clean"] < weak < strong
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
        return weights(module), [
            float(trainer.callback_metrics[f"monitor{i}_levels/activation/2/loss"]) for i in range(len(probes))
        ]

    monitored, (own, other) = run(None, ActivationNoise(noise.Gaussian(), 0.0, "net.1"))
    assert own == other
    assert_same(monitored, run()[0])


def test_a_probe_of_modules_that_the_prediction_does_not_call_is_an_error():
    monitor = RobustnessMonitor(ActivationNoise(noise.Gaussian(), 0.5, "net.3"), [0.5])
    module = Layers()
    with pytest.raises(ValueError, match="the prediction called no module that 'activation' perturbs"):
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
        float(trainer.callback_metrics[f"robustness{key}"])
        for key in ("/loss_clean", "_levels/activation/0/loss", "_levels/activation/3/loss")
    )
    assert at_0 == pytest.approx(clean, rel=1e-5)  # the two paths differ in their roundings, of float32
    assert at_3 != at_0


@pytest.mark.parametrize(
    ("batch_first", "message"),
    [
        (
            True,
            r"each of the 8 samples, but 'lstm' returned in '1\.0' float32 \(1, 8, 8\); type modules=… to select a module",
        ),
        (
            False,
            r"each of the 8 samples, but 'lstm' returned in '0' float32 \(4, 8, 8\); type modules=… to select a module",
        ),
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
