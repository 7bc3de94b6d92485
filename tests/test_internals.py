"""The private names of Lightning, torch and torchmetrics do what the package needs, in the installed releases."""

from __future__ import annotations

import importlib.util
import inspect
import math
import random
import re
from collections.abc import Callable
from contextlib import nullcontext
from operator import is_
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import Classifier, Rows, Stochastic, TwoOptimizers, fit, loader, make_trainer
from lightning_fabric.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import LambdaCallback, StochasticWeightAveraging, Timer
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.masked import masked_tensor
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric, MetricCollection

from lightning_noise.loop import internals


def test_each_function_of_the_gate_has_a_test():
    functions = {
        name
        for name, value in vars(internals).items()
        if inspect.isfunction(value) and value.__module__ == internals.__name__ and not name.startswith("_")
    }
    assert functions
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_internals*.py"))
    assert functions <= set(re.findall(r"internals\.(\w+)", tests))


# --- the two namespaces of Lightning


def test_the_callback_class_belongs_to_each_lightning_that_is_installed():
    installed = [name for name in ("pytorch_lightning", "lightning") if importlib.util.find_spec(name)]
    assert [namespace.__name__.split(".")[0] for namespace in internals.LIGHTNING] == installed
    for namespace in internals.LIGHTNING:
        assert issubclass(internals.Callback, namespace.Callback)


def test_a_module_or_a_data_module_tells_its_namespace():
    for namespace in internals.LIGHTNING:
        assert internals.namespace_of(None, type("Data", (namespace.LightningDataModule,), {})) is namespace
        assert internals.namespace_of(type("Module", (namespace.LightningModule,), {})) is namespace
    assert internals.namespace_of(None, Rows) is internals.LIGHTNING[0]


# --- the trainer


def test_callbacks_of_a_class_keep_the_order_of_the_trainer():
    one, two = LambdaCallback(), LambdaCallback()
    trainer = make_trainer([two, Timer(), one])
    assert internals.class_of_callbacks(trainer, LambdaCallback) == [two, one]
    assert internals.class_of_callbacks(trainer, StochasticWeightAveraging) == []


@pytest.mark.parametrize("fast_dev_run", [False, True, 3])
def test_a_fast_dev_run_is_known(fast_dev_run):
    assert internals.is_fast_dev_run(make_trainer(fast_dev_run=fast_dev_run)) is bool(fast_dev_run)


class Recorder(CSVLogger):
    """Keeps the step of each call."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.steps: list[int | None] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.steps.append(step)


@pytest.mark.parametrize(
    ("module", "accumulate"), [(Classifier, 1), (Classifier, 2), (TwoOptimizers, 1)], ids=["plain", "accumulated", "manual"]
)
def test_the_step_of_the_logs_and_whether_it_is_logged_are_known_before_the_batch(tmp_path, module, accumulate):
    found: list[tuple[int, int]] = []

    def record(trainer: pl.Trainer, *_: Any) -> None:
        if internals.should_log(trainer):
            found.append((internals.batches_that_stepped(trainer), trainer.global_step))

    logger = Recorder(tmp_path)
    fit(
        [LambdaCallback(on_train_batch_start=record)],
        module=module,
        logger=logger,
        log_every_n_steps=2,
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
    )
    assert [step for step, _ in found] == logger.steps
    assert logger.steps
    if module is TwoOptimizers:  # which is why global_step does not serve
        assert any(step != global_step for step, global_step in found)


@pytest.mark.parametrize(("module", "accumulate"), [(Classifier, 1), (Classifier, 2), (TwoOptimizers, 1)])
def test_steps_are_those_of_the_optimizer_or_batches_if_there_are_several(module, accumulate):
    steps: list[int] = []
    record = LambdaCallback(on_train_batch_start=lambda trainer, *_: steps.append(internals.steps_taken(trainer)))
    _, trainer = fit([record], module=module, accumulate_grad_batches=accumulate)
    assert steps == ([0, 0, 1, 2, 2, 3] if accumulate == 2 else list(range(6)))
    assert trainer.global_step == {TwoOptimizers: 12, Classifier: 6 // accumulate + accumulate // 2}[module]


@pytest.mark.parametrize("interval", [{}, {"val_check_interval": 2}, {"check_val_every_n_epoch": 2}, {"limit_val_batches": 0}])
def test_whether_a_validation_follows_is_known_at_the_end_of_a_batch(interval):
    events: list[Any] = []
    watch = LambdaCallback(
        on_train_batch_end=lambda trainer, *_: events.append(internals.validates_after(trainer)),
        on_validation_start=lambda trainer, *_: events.append("validation"),
    )
    fit([watch], **interval, max_epochs=2, num_sanity_val_steps=0)
    batches = [i for i, event in enumerate(events) if event != "validation"]
    assert len(batches) == 6
    assert [events[i] for i in batches] == [events[i + 1 : i + 2] == ["validation"] for i in batches]
    assert any(events) == ("limit_val_batches" not in interval)


def test_the_end_of_a_batch_is_known():
    known: dict[str, set[bool]] = {}

    def note(hook: str) -> Callable[..., None]:
        return lambda trainer, *_: known.setdefault(hook, set()).add(internals.ends_batch(trainer))

    hooks = ["on_train_start", "on_train_batch_start", "on_after_backward", "on_train_batch_end"]
    hooks += ["on_validation_start", "on_validation_end", "on_train_epoch_end"]
    fit([LambdaCallback(**{hook: note(hook) for hook in hooks})], val_check_interval=2)
    assert known == {hook: {hook == "on_train_batch_end"} for hook in hooks}


def test_a_validation_at_the_start_of_the_training_is_that_of_the_epoch():
    events: list[tuple[int, int, bool]] = []

    def validate(trainer: pl.Trainer, *_: Any) -> None:
        internals.validate_within_fit(trainer, epoch=7)
        assert trainer.training
        assert trainer.current_epoch == 0

    watch = LambdaCallback(
        on_train_start=validate,
        on_validation_start=lambda trainer, module: events.append((trainer.current_epoch, len(module.seen), module.training)),
    )
    module, trainer = fit([watch], max_epochs=1, num_sanity_val_steps=0)
    assert events == [(7, 0, False), (0, 3, False)]
    assert len(module.validated) == 4
    assert trainer.current_epoch == 1


def test_the_epoch_of_weight_averaging_that_does_not_train_is_known():
    epochs, recomputes, trains = [], [], []

    def start(trainer: pl.Trainer, *_: Any) -> None:
        epochs.append((trainer.current_epoch, internals.epochs_before_averaging(trainer)))
        recomputes.append(internals.recomputes_statistics(trainer))
        trains.append(False)

    def backward(*_: Any) -> None:
        trains[-1] = True

    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)
    watch = LambdaCallback(on_train_batch_start=start, on_after_backward=backward)
    fit([averaging, watch], module=Stochastic, max_epochs=3, limit_val_batches=0)
    assert {epoch for epoch, _ in epochs} == {0, 1, 2, 3}
    assert trains == [epoch < last for epoch, last in epochs]
    assert recomputes == [not trained for trained in trains]


def test_without_weight_averaging_all_epochs_train():
    assert internals.epochs_before_averaging(make_trainer(max_epochs=4)) == math.inf


@pytest.mark.parametrize(
    ("strategy", "devices", "copies"), [("auto", 1, False), ("ddp", 2, False), ("ddp_spawn", 2, True), ("ddp_fork", 2, True)]
)
def test_strategies_that_spawn_or_fork_are_known(strategy, devices, copies):
    assert internals.launches_copies(make_trainer(strategy=strategy, devices=devices)) is copies


def test_the_trainer_of_a_module_is_asked_for_without_an_error():
    module = Classifier()
    assert internals.trainer_of(module) is None
    with pytest.raises(RuntimeError, match="not attached"):
        _ = module.trainer  # which is why the property does not serve
    _, trainer = fit(module=module, fast_dev_run=True)
    assert internals.trainer_of(module) is trainer


class WithLoaders(Classifier):
    """Brings the loaders itself."""

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()


class Data(pl.LightningDataModule):
    """Brings the loaders."""

    train_dataloader = WithLoaders.train_dataloader
    val_dataloader = WithLoaders.val_dataloader


@pytest.mark.parametrize("run", ["fit", "validate"])
def test_the_source_of_the_data_of_the_last_run_is_known(run):
    module, data, loaders = WithLoaders(), Data(), loader()
    trainer = make_trainer(max_epochs=1, limit_train_batches=1)
    sources: list[tuple[dict[str, Any], Any]] = [
        ({"datamodule": data}, data),
        ({("dataloaders" if run == "validate" else "val_dataloaders"): loaders}, loaders),
        ({}, module),
    ]
    for arguments, source in sources:
        getattr(trainer, run)(module, **arguments, **({"verbose": False} if run == "validate" else {}))
        assert internals.data_source(trainer) is source


def test_the_launchers_have_the_methods_that_return_metrics():
    for launcher in internals.launcher_classes():
        assert list(inspect.signature(launcher.get_extra_results).parameters)[1:] == ["trainer"]
        assert list(inspect.signature(launcher.update_main_process_results).parameters)[1:] == ["trainer", "extra"]
    assert type(make_trainer(strategy="ddp_spawn").strategy.launcher) is internals.launcher_classes()[0]


# --- the evaluation loop and what it logs


def validate(module: pl.LightningModule | None = None, dataloaders: Any = None, **hooks: Callable[..., Any]) -> pl.Trainer:
    """Validates a module with a callback of the hooks."""
    trainer = make_trainer([LambdaCallback(**hooks)])
    trainer.validate(module or Classifier(), dataloaders or loader(), verbose=False)
    return trainer


def test_the_module_logs_as_in_another_hook_within_the_context_alone():
    def log(trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        with pytest.raises(MisconfigurationException, match="on_fit_start"), internals.current_hook(pl_module, "on_fit_start"):
            pl_module.log("within", 1.0)
        pl_module.log("after", 1.0)

    assert validate(on_validation_batch_end=log).callback_metrics.keys() == {"val_loss", "after"}


def test_the_loaders_of_a_validation_that_comes_late_can_be_set_up_and_a_batch_be_moved():
    found = []

    class Moves(Classifier):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 1, batch[1]]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [2 * batch[0], batch[1]]

        def on_train_start(self):
            assert self.trainer.val_dataloaders is None
            stage, self.trainer.sanity_checking = self.trainer.state.stage, True
            internals.set_up_validation(self.trainer)
            self.trainer.state.stage = stage
            (own,) = internals.evaluation_loaders(self.trainer) or []
            found.append(internals.to_device(self.trainer, internals.first_batch(own), 0))

    fit(module=Moves, num_sanity_val_steps=0, check_val_every_n_epoch=2)
    assert torch.equal(found[0][0], 2 * (Rows(13, seed=1).x[:8] + 1))


@pytest.mark.parametrize("kwargs", [{}, {"num_workers": 2, "persistent_workers": True}], ids=str)
def test_the_first_batch_comes_from_an_iterator_of_its_own(kwargs):
    own = loader(Rows(), **kwargs)
    kept = iter(own)
    before = next(kept)
    assert torch.equal(internals.first_batch(own)[0], before[0])
    assert torch.equal(next(kept)[0], Rows().x[8:16])
    assert own._iterator is (kept if kwargs else None)
    assert own.num_workers == kwargs.get("num_workers", 0)


@pytest.mark.parametrize("run", ["validate", "test"])
def test_the_loaders_of_the_running_evaluation_are_known_after_a_fit_with_another(run):
    one, two = loader(), loader(Rows(13))
    found: list[Any] = []

    def record(trainer: pl.Trainer, *_: Any) -> None:
        found.append((internals.evaluation_loaders(trainer), internals.n_evaluation_loaders(trainer)))

    class Silent(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
            pass

        test_step = validation_step

    watch = LambdaCallback(on_validation_epoch_start=record, on_test_epoch_start=record)
    module, trainer = fit([watch], module=Silent, validation=two, max_epochs=1, num_sanity_val_steps=0)
    for loaders in (one, {"one": one, "two": [two]}, CombinedLoader([one, two], "max_size")):
        getattr(trainer, run)(module, loaders, verbose=False)
    # the public name has them as they were given
    assert found == [([two], 1), ([one], 1), ([one, two], 2), (None, 2)]


def test_the_loop_of_a_prediction_has_loaders_and_logs_nothing():
    found: list[Any] = []

    def record(trainer: pl.Trainer, *_: Any) -> None:
        found.append((internals.evaluation_loaders(trainer), internals.n_evaluation_loaders(trainer)))
        found.append((internals.empty_results(trainer), internals.state_of_run(trainer)[1] is trainer.predict_loop))
        found.append(internals.exchange_evaluation_results(trainer, None, {})[0])

    loaders = [loader(), loader(Rows(13))]
    module: Any = Classifier()
    module.predict_step = lambda batch, batch_idx, dataloader_idx=0: batch_idx
    make_trainer([LambdaCallback(on_predict_epoch_start=record)]).predict(module, loaders, return_predictions=False)
    loaders_seen, *others = found
    assert ([own.dataset for own in loaders_seen[0]], loaders_seen[1]) == ([own.dataset for own in loaders], 2)
    assert others == [(None, True), None]


class Loggers(Classifier):
    """Logs to each loader, with other reductions, and in two ways at once."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
        self.log("mean", batch[0].mean())
        self.log("largest", batch[0].max(), reduce_fx="max")
        self.log("both", batch[0].mean(), on_step=True, on_epoch=True)


@pytest.mark.parametrize("n_loaders", [1, 2])
def test_logged_values_have_the_names_that_lightning_gives_them(n_loaders):
    names: list[str] = []

    def record(trainer: pl.Trainer, *_: Any) -> None:
        results = internals.evaluation_results(trainer)
        names.extend(internals.logged_name(results, value) for value in results.values())

    loaders = [loader() for _ in range(n_loaders)]
    trainer = validate(Loggers(), loaders, on_validation_epoch_end=record)
    assert len(names) == 3 * n_loaders
    # callback_metrics has a value that is logged in steps and epochs under a second name, too
    assert set(names) == {name for name in trainer.callback_metrics if not name.startswith("both_epoch")}


def test_metrics_that_only_callbacks_see_are_in_no_table(capsys):
    def show(trainer: pl.Trainer, *_: Any) -> None:
        internals.show_to_callbacks(trainer, {"hidden": 2.0})

    trainer = make_trainer([LambdaCallback(on_validation_epoch_end=show)])
    trainer.validate(Classifier(), loader())
    assert trainer.callback_metrics["hidden"].dtype == torch.get_default_dtype()
    assert trainer.callback_metrics["hidden"] == 2.0
    assert "val_loss" in (table := capsys.readouterr().out)
    assert "hidden" not in table


def test_a_value_goes_to_the_results_that_were_put_in_place():
    def log(trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        own, results = internals.evaluation_results(trainer), internals.empty_results(trainer)
        assert type(results) is type(own)
        assert results == {}
        results.batch, results.batch_size = None, 1
        before = internals.exchange_evaluation_results(trainer, results, {})
        assert before[0] is own
        pl_module.log("aside", 2.0)
        assert internals.exchange_evaluation_results(trainer, *before)[0] is results
        assert [value.meta.name for value in results.values()] == ["aside"]
        assert results.metrics(on_step=False)["callback"] == {"aside": 2.0}

    assert validate(on_validation_batch_end=log).callback_metrics.keys() == {"val_loss"}


def test_metrics_that_were_added_are_read_after_they_were_put_in_place():
    def add(trainer: pl.Trainer, *_: Any) -> None:
        before = dict(trainer.callback_metrics)
        logged = internals.logged_so_far(trainer)
        internals.add_callback_metrics(logged, {"added": torch.tensor(1.0)})
        assert trainer.callback_metrics == before, "copies"
        _, read = internals.exchange_evaluation_results(trainer, internals.empty_results(trainer), logged)
        assert trainer.callback_metrics == before | {"added": 1.0}
        assert read["_callback_metrics"] == before

    module, trainer = fit(max_epochs=1)
    assert trainer.callback_metrics
    trainer = make_trainer([LambdaCallback(on_validation_epoch_end=add)])
    trainer.validate(module, loader(), verbose=False)
    assert "added" in trainer.callback_metrics


def test_logged_values_are_reduced_with_those_of_another_process():
    def reduce(value: Tensor, reduce_op: str) -> Tensor:
        """The other process logged the double of each value."""
        if reduce_op == "sum":
            return value + (value if value.dtype == torch.int64 else 2 * value)
        assert reduce_op == "max"
        return 2 * value

    values: dict[str, Any] = {}

    def compare(trainer: pl.Trainer, *_: Any) -> None:
        for value in internals.evaluation_results(trainer).values():
            own = value.compute()
            internals.reduce_logged(value, reduce)
            values[value.meta.name] = own, value.compute()

    class WithMetric(Stochastic):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("mean", batch[0].mean())
            self.log("max", batch[0].max(), reduce_fx="max")
            self.accuracy(self(batch[0]), batch[1])
            self.log("metric", self.accuracy)

    validate(WithMetric(), loader(Rows(13)), on_validation_epoch_end=compare)
    x = Rows(13).x
    for name, own, factor in (("mean", x.mean(), 1.5), ("max", x.max(), 2), ("metric", values["metric"][0], 1)):
        torch.testing.assert_close(values[name], (own, factor * own))


def test_a_step_changes_the_run_in_the_listed_objects_alone():
    def step(trainer: Any, pl_module: pl.LightningModule, *_: Any) -> None:
        own, read = internals.evaluation_results(trainer), dict(trainer.callback_metrics)
        held = [(vars(part), dict(vars(part))) for part in internals.state_of_run(trainer)]
        logged = internals.logged_so_far(trainer)
        internals.add_callback_metrics(logged, {"replayed": torch.tensor(1.0)})
        trainer.loggers = [CSVLogger(".")]
        internals.exchange_evaluation_results(trainer, internals.empty_results(trainer), logged)
        assert "replayed" in trainer.callback_metrics
        for attributes, before in held:
            attributes.clear()
            attributes.update(before)
        assert trainer.loggers == []
        assert internals.evaluation_results(trainer) is own
        assert trainer.callback_metrics == read

    assert validate(on_validation_batch_end=step).callback_metrics.keys() == {"val_loss"}


def test_the_private_attributes_of_a_module_are_known_also_after_a_run():
    module, trainer = fit(module=Stochastic, fast_dev_run=True)
    trainer.validate(module, loader(), verbose=False)
    layers = [part for part in module.modules() if not isinstance(part, Metric)]
    private = {name for layer in layers for name in vars(layer) if name.startswith("_")}
    assert private - internals.private_attributes() == {"_buffers", "_modules", "_metric_attributes", "_hparams"}
    assert {"_parameters", "_forward_hooks", "_trainer", "_current_fx_name"} <= internals.private_attributes()
    assert "_defaults" in vars(module.accuracy).keys() & internals.private_attributes()


def test_the_dictionary_of_a_layer_holds_its_own_parameters():
    layer = nn.Sequential(nn.Linear(2, 2))
    assert internals.parameters_of_layer(layer) == {}
    own = internals.parameters_of_layer(layer[0])
    assert own == dict(layer[0].named_parameters())
    own["weight"] = nn.Parameter(torch.ones(2, 2))
    assert layer[0].weight is own["weight"]


# --- random streams


@pytest.mark.parametrize(
    "draw",
    [lambda: torch.rand(3).tolist(), lambda: np.random.rand(3).tolist(), random.random],
    ids=["torch", "numpy", "python"],
)
def test_a_random_stream_that_is_set_again_repeats_its_draws(draw):
    for set_states in (internals.set_rng_states, internals.return_to_rng_states):
        states = internals.rng_states()
        drawn = draw()
        assert draw() != drawn
        set_states(states)
        assert draw() == drawn


@pytest.mark.parametrize("n_before", [0, 1])  # numpy draws normal numbers in pairs, and keeps the second
@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_the_stream_of_numpy_returns_to_a_state_after_any_draws(n_before, n):
    np.random.seed(0)
    np.random.randn(n_before)
    states = internals.rng_states()
    expected = np.random.randn(3).tolist()
    internals.set_rng_states(states)
    np.random.randn(n)
    internals.return_to_rng_states(states)
    assert np.random.randn(3).tolist() == expected


@pytest.mark.parametrize(("n_before", "n"), [(0, 0), (1, 2), (2, 1)])
def test_the_stream_of_numpy_returns_to_a_state_also_if_a_step_seeds_it(n_before, n):
    np.random.seed(0)
    np.random.randn(n_before)
    states = internals.rng_states()
    expected = np.random.randn(3).tolist()
    np.random.seed(0)
    np.random.randn(n)
    internals.return_to_rng_states(states)
    assert internals.rng_states()["numpy"][2:] == states["numpy"][2:]
    assert np.random.randn(3).tolist() == expected


# --- torch: modules and their hooks


def test_a_compiled_module_has_the_names_and_the_module_within():
    layer = nn.Linear(2, 2)
    compiled: Any = torch.compile(layer, backend="eager")
    module = nn.Sequential(compiled)
    names = [name for name, _ in module.named_parameters()]
    assert names != ["0.weight", "0.bias"]
    assert list(map(internals.plain_name, names)) == ["0.weight", "0.bias"]
    assert internals.original_module(module[0]) is layer
    assert internals.original_module(layer) is layer


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_the_hooks_that_compute_a_weight_are_known():
    layer = nn.Linear(3, 2)
    layer.register_forward_pre_hook(lambda *_: None)
    assert internals.hooks_of_weights([layer]) == []
    prune.l1_unstructured(layer, "weight", 1)
    normed = nn.utils.weight_norm(nn.Linear(3, 2))
    for part, name in ((layer, "weight_orig"), (normed, "weight_g")):
        with torch.no_grad():
            getattr(part, name).zero_()
        ((owner, hook),) = internals.hooks_of_weights([nn.Tanh(), part])
        assert owner is part
        assert part.weight.any()
        hook(part, ())
        assert not part.weight.any()


def test_the_structure_of_a_module_is_the_same_until_the_name_of_a_parameter_changes():
    module = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2, bias=False))
    module.extend([module[0], nn.Sequential()])
    module.register_module("none", None)
    before, parameters = internals.structure_of(module)
    assert sorted(map(id, parameters)) == sorted(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    assert all(map(is_, before, internals.structure_of(module)[0]))
    part: Any = module[0]
    part.add_module("other", part.pop(0))
    assert not all(map(is_, before, internals.structure_of(module)[0]))


def test_the_losses_of_torch_are_known():
    losses = (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss, nn.CTCLoss, nn.TripletMarginLoss, nn.HuberLoss)
    assert all(internals.is_loss(make()) for make in losses)
    assert not internals.is_loss(nn.Linear(2, 2))


class Scale(nn.Module):
    """Takes a keyword argument, and has a state that may be changed."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, *, times: float = 1.0) -> Tensor:
        return self.factor * times * x


def test_a_forward_hook_gets_the_keyword_arguments_and_replaces_no_other(monkeypatch):
    module, calls = Scale(), []

    def record(module: nn.Module, arguments: Any, keywords: Any, output: Tensor) -> Tensor:
        calls.append((arguments, keywords, output))
        return output + 1

    def multiply(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return 10 * output

    first = module.register_forward_hook(multiply)
    monkeypatch.setattr(RemovableHandle, "next_id", first.id)  # a spawned process counts from 0 again
    handle = internals.register_forward_hook(module, record)
    assert module(1.0, times=3.0) == 61
    assert calls == [((1.0,), {"times": 3.0}, 60)]
    handle.remove()
    assert module(1.0) == 20


def test_a_method_may_change_the_state_dict_and_replaces_no_other_hook(monkeypatch):
    class Changes:
        def double(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            state[prefix + "factor"] = 2 * state[prefix + "factor"]

    module = nn.Sequential(Scale(), Scale())
    with pytest.raises(AttributeError):  # which is why the public function does not serve
        module[0].register_state_dict_post_hook(Changes().double)
    first = internals.register_state_dict_hook([module[1]], Changes().double)
    monkeypatch.setattr(RemovableHandle, "next_id", first.id)
    handle = internals.register_state_dict_hook(module, Changes().double)
    assert module.state_dict() == {"0.factor": 4, "1.factor": 8}
    handle.remove()
    assert module.state_dict() == {"0.factor": 2, "1.factor": 4}
    first.remove()
    assert module.state_dict() == {"0.factor": 2, "1.factor": 2}


def test_a_gradient_hook_runs_before_all_others_until_it_is_removed():
    parameter, order = nn.Parameter(torch.ones(())), []

    def hook(name: str) -> Callable[[Tensor], Tensor]:
        return lambda gradient: order.append(name) or gradient + len(order)

    def gradient() -> float:
        order.clear()
        parameter.grad = None
        (3 * parameter).backward()
        assert parameter.grad is not None
        return parameter.grad.item()

    parameter.register_hook(hook("first"))
    parameter.register_hook(hook("second"))
    handle = internals.register_gradient_hook(parameter, hook("own"))
    parameter.register_hook(hook("later"))
    assert gradient() == 3 + 1 + 2 + 3 + 4
    assert order == ["own", "first", "second", "later"]
    handle.remove()
    gradient()
    assert order == ["first", "second", "later"]


# --- torch: tensors and autograd


def test_tensors_are_copied_in_place_and_outside_of_autograd():
    targets = [nn.Parameter(torch.zeros(2)), torch.zeros(3, dtype=torch.float64)]
    places = [target.data_ptr() for target in targets]
    internals.copy_all_(targets, [torch.ones(2), torch.arange(3.0)])
    assert [target.tolist() for target in targets] == [[1, 1], [0, 1, 2]]
    assert [target.data_ptr() for target in targets] == places
    assert targets[0].is_leaf
    internals.copy_all_([], [])


def test_tensors_are_subtracted_and_measured_pair_by_pair():
    one, two = [torch.tensor([3.0, 5.0]), torch.ones(2, 2)], [torch.tensor([0.0, 1.0]), torch.zeros(2, 2)]
    differences = internals.subtract_all(one, two)
    assert [each.tolist() for each in differences] == [[3, 4], [[1, 1], [1, 1]]]
    assert [norm.item() for norm in internals.norms_of(differences)] == [5, 2]
    assert [norm.item() for norm in internals.norms_of(iter(differences), torch.inf)] == [4, 1]


def test_writes_to_a_tensor_are_counted_and_reads_are_not():
    tensor = torch.zeros(2)
    before = internals.count_writes(tensor)
    _ = tensor + 1
    assert internals.count_writes(tensor) == before
    tensor.add_(1)
    internals.copy_all_([tensor], [torch.ones(2)])
    assert internals.count_writes(tensor) == before + 2
    with torch.inference_mode():
        uncounted = torch.zeros(2).add_(1)
    assert internals.count_writes(uncounted) == 0
    assert internals.writes_of([tensor, uncounted]) == [before + 2, 0]


def test_autograd_does_not_see_writes_whose_count_is_taken_back():
    w = nn.Parameter(torch.ones(2))
    for is_kept in (True, False):
        loss, count = (w * w).sum(), internals.preserve_version(w)
        with torch.no_grad():
            w.add_(1)
            with count if is_kept else nullcontext():
                w.sub_(1)
        if is_kept:
            loss.backward()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
    assert w.grad is not None
    assert torch.equal(w.grad, 2 * w)


def test_a_tensor_whose_samples_vmap_hides_is_known():
    found = []
    torch.vmap(lambda x: found.append(internals.is_batched(x)) or x)(torch.zeros(3, 2))
    assert found == [True]
    assert not internals.is_batched(torch.zeros(3, 2))


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad, torch.func.jacfwd], ids=lambda each: each.__name__)
def test_a_transform_of_torch_func_is_known(transform):
    found = []
    transform(lambda x: found.append(internals.is_transformed()) or x.sum())(torch.zeros(3))
    assert found == [True]
    assert not internals.is_transformed()


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_tensors_that_consist_of_tensors_are_known():
    assert internals.wraps_tensors(TwoTensor(torch.ones(2), torch.zeros(2)))
    assert internals.wraps_tensors(masked_tensor(torch.ones(2), torch.ones(2) > 0))
    assert not internals.wraps_tensors(torch.nn.Parameter(torch.ones(2)))
    assert not internals.wraps_tensors(torch.ones(2).as_subclass(type("Labelled", (Tensor,), {})))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_forward_pass_of_the_backward_pass_is_known(use_reentrant):
    found = []

    def layer(x: Tensor) -> Tensor:
        found.append(internals.runs_backward())
        return x.sin()

    checkpoint(layer, torch.ones(2, requires_grad=True), use_reentrant=use_reentrant).sum().backward()
    assert found == [False, True]
    assert not internals.runs_backward()


@pytest.mark.parametrize("loss", [F.mse_loss, F.huber_loss, F.smooth_l1_loss, F.binary_cross_entropy_with_logits])
def test_the_targets_of_losses_are_found_in_the_graph(loss):
    layer, x, y = nn.Linear(3, 3), torch.rand(2, 3), torch.rand(2, 3)
    found = list(internals.saved_targets(2 * loss(layer(x), y) + layer(x).sum()))
    assert [each.data_ptr() for each in found] == [y.data_ptr()]
    assert list(internals.saved_targets(y.sum())) == []


def test_views_of_one_storage_share_memory_even_without_an_address():
    with FakeTensorMode():
        x = torch.rand(2, 3)
        assert internals.share_memory(x, x.flatten()[1:])
        assert not internals.share_memory(x, x.clone())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_an_optimizer_takes_scaled_gradients_if_it_is_fused(optimizer, fused):
    scale, parameter, found = 8.0, nn.Parameter(torch.ones(())), []
    updater = optimizer([parameter], lr=0.1, fused=fused)
    updater.register_step_pre_hook(lambda *_: found.append(parameter.grad.item()))  # type: ignore[union-attr]
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(3 * parameter).backward()
    scaler.step(updater)
    assert internals.takes_scaled_gradients(updater) is fused
    assert found == [3 * scale if fused else 3]


# --- torchmetrics


class Total(Metric):
    """Two sums."""

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, value: Tensor) -> None:
        self.total += value.sum()
        self.count += value.numel()

    def compute(self) -> Tensor:
        return self.total + self.count


def test_values_of_a_metric_are_plotted_on_axes():
    axes = Figure().subplots()
    internals.plot_values(Total(), torch.tensor(3.0), axes)
    assert np.asarray(axes.lines[0].get_ydata()).tolist() == [3.0]


@pytest.mark.parametrize("groups", [True, False, [["one", "two"]]])
def test_metrics_with_equal_states_are_separate_unless_the_user_has_grouped_them(groups):
    class Doubled(Total):
        def update(self, value: Tensor) -> None:
            super().update(2 * value)

    collection = MetricCollection({"one": Total(), "two": Doubled()}, compute_groups=groups)
    collection.update(torch.zeros(1))
    if groups is True:
        assert collection.compute_groups == {0: ["one", "two"]}, "torchmetrics has grouped them"
    internals.separate_metrics(collection)
    collection.reset()
    collection.update(torch.zeros(1))
    collection.update(torch.ones(1))
    one, two = (value.item() for value in collection.compute().values())
    assert (two == one) == (groups not in (True, False))


def test_a_state_of_zeros_is_held_once_and_is_reset_to_zeros():
    metric = Total()
    internals.add_zeros(metric, "counts", 2, 3)
    assert metric._defaults["counts"].untyped_storage().nbytes() == 8  # type: ignore[union-attr]
    for _ in range(2):
        counts: Any = metric.counts
        assert counts.is_contiguous()
        assert torch.equal(counts, torch.zeros(2, 3, dtype=torch.long))
        counts += 1
        metric.reset()
    assert metric._reductions["counts"] is metric._reductions["total"], "sums"


def test_a_state_keeps_the_dtype_that_it_was_given_after_a_reset():
    metric = Total()
    metric.update(torch.ones(2))
    internals.cast_states(metric, ["total"], torch.float64)
    assert metric.total == 2
    for _ in range(2):
        assert (metric.total.dtype, metric.count.dtype) == (torch.float64, torch.float32)
        metric.reset()


def test_hidden_states_stay_as_they_are_in_a_reset():
    metric = Total()
    metric.update(torch.ones(2))
    total = metric.total
    with internals.states_hidden(metric):
        metric.reset()
    assert metric.total is total
    assert (metric.update_count, metric.total) == (0, 2)
    metric.reset()
    assert metric.total == 0


@pytest.mark.parametrize("sync_on_compute", [False, True])
def test_states_are_synchronized_as_in_compute_and_are_the_own_again(sync_on_compute):
    def gather(value: Tensor, group: Any) -> list[Tensor]:
        return [value, value]  # the other process has the same

    metric = Total(dist_sync_fn=gather, distributed_available_fn=lambda: True, sync_on_compute=sync_on_compute)
    metric.update(torch.ones(3))
    with internals.sync_states(metric):
        assert metric.total + metric.count == (12 if sync_on_compute else 6)
    assert metric.total + metric.count == 6
    assert metric.compute() == (12 if sync_on_compute else 6)
