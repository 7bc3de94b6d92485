"""The one gate to private names of Lightning, torch and torchmetrics.

Each function stands for a private name and says why no public name serves. ``tests/test_internals.py`` has a test for each
function, which fails if a release changes the name or what it does. The two namespaces of Lightning are joined here, too.
"""

from __future__ import annotations

import copy
import ctypes
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from torchmetrics import Metric, MetricCollection

__all__: list[str] = []  # no name is public

Results = Any  # Lightning's collection of logged values, a private class


# --- the two namespaces of Lightning


def _import_installed(*names: str) -> list[ModuleType]:
    """Imports the modules that are installed."""
    found = []
    for name in names:
        with suppress(ImportError):
            found.append(importlib.import_module(name))
    return found


LIGHTNING = _import_installed("pytorch_lightning", "lightning.pytorch")
_LOGGER: Any = _import_installed("lightning_fabric.utilities.logger", "lightning.fabric.utilities.logger")[0]
_SEED: Any = _import_installed("lightning_fabric.utilities.seed", "lightning.fabric.utilities.seed")[0]

if not TYPE_CHECKING:

    class Callback(*(namespace.Callback for namespace in LIGHTNING)):
        """A callback for a trainer of ``pytorch_lightning`` and of ``lightning.pytorch``."""


def namespace_of(*classes: Any) -> Any:
    """Returns the Lightning that one of the classes belongs to. The default is the first that is installed."""
    for namespace in LIGHTNING:
        bases = namespace.LightningModule, namespace.LightningDataModule
        if any(isinstance(each, type) and issubclass(each, bases) for each in classes):
            return namespace
    return LIGHTNING[0]


# --- the trainer


def class_of_callbacks(trainer: Trainer, kind: type | tuple[type, ...]) -> list[Any]:
    """Returns the callbacks of a class, in the order of the trainer, which does not declare its public ``callbacks``."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Returns whether the trainer only tries the loop. The attribute is public, but the class does not declare it."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def should_log(trainer: Trainer) -> bool:
    """Returns before a training batch whether ``self.log`` would log in it, by ``log_every_n_steps``."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0


def batches_that_stepped(trainer: Trainer) -> int:
    """Returns the step that the loggers receive. ``global_step`` counts the steps of all optimizers instead."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def steps_taken(trainer: Trainer) -> int:
    """Returns the number of optimizer steps, or of batches in manual optimization, where ``global_step`` adds up optimizers."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.epoch_loop.batch_progress.total.completed


def recomputes_statistics(trainer: Trainer) -> bool:
    """Returns whether this epoch only recomputes the statistics of batch normalization, at the end of weight averaging."""
    return trainer.fit_loop._skip_backward


def epochs_before_averaging(trainer: Trainer) -> float:
    """Returns after how many epochs StochasticWeightAveraging adds one that does not train; infinity without it."""
    ends = [callback.swa_end + 1 for callback in class_of_callbacks(trainer, object) if hasattr(callback, "swa_end")]
    return min(ends, default=float("inf"))


def ends_batch(trainer: Trainer) -> bool:
    """Returns whether ``on_train_batch_end`` is running, in whichever callback."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return trainer.training and progress.processed > progress.completed


def validates_after(trainer: Trainer) -> bool:
    """Returns in ``on_train_batch_end`` whether a validation follows the batch. No hook comes in between."""
    loop: Any = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def validate_within_fit(trainer: Trainer, epoch: int) -> None:
    """Runs in ``on_train_start`` the validation of an epoch that Lightning leaves out if it resumes right before it."""
    val_loop, progress = trainer.fit_loop.epoch_loop.val_loop, cast(Any, trainer.fit_loop.epoch_progress.current)
    before, has_run = vars(progress).copy(), val_loop._has_run
    progress.processed = progress.completed = epoch  # at the end of an epoch, Lightning resumes in the next one
    val_loop.restarting = False  # otherwise the loop would count the batches of the validation before
    trainer.validating = True
    try:
        val_loop.run()
    finally:
        trainer.training = True
        vars(progress).update(before)
        val_loop._has_run = has_run  # otherwise an epoch without further batches would not end its restart, and skip the next


def automatic_hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """Returns the hyperparameters that Lightning logs by itself, after ``on_fit_start``.

    Private attributes say whether the module and the data module log theirs, and ``_class_path`` is of LightningCLI.
    """
    if not getattr(trainer, "enable_autolog_hparams", True):  # since Lightning 2.6
        return {}
    owners: list[Any] = [trainer.lightning_module, trainer.datamodule]  # type: ignore[attr-defined]
    saved = [owner.hparams_initial for owner in owners if getattr(owner, "_log_hyperparams", False)]
    return {key: value for each in saved for key, value in each.items() if key != "_class_path"}


def tensorboard_loggers(trainer: Trainer) -> list[Any]:
    """Returns the loggers of TensorBoard, of both namespaces."""
    kinds = tuple(namespace.loggers.TensorBoardLogger for namespace in LIGHTNING)
    return [logger for logger in trainer.loggers if isinstance(logger, kinds)]


def writes_default_metric(logger: Any) -> bool:
    """Returns whether a TensorBoardLogger logs ``hp_metric`` with hyperparameters: its ``default_hp_metric``."""
    return logger._default_hp_metric


def write_hyperparameters(logger: Any, values: Mapping[str, Any], metrics: Sequence[str] | None) -> None:
    """Writes the hyperparameters of a run for TensorBoard, and the columns of its table unless ``metrics`` is ``None``.

    ``TensorBoardLogger.log_hyperparams`` would log a value of each metric, and none is known at the start of a run.
    """
    writer = logger.experiment
    summary = importlib.import_module(f"{type(writer).__module__.rpartition('.')[0]}.summary")  # of torch or tensorboardX
    flat = logger._sanitize_params(_LOGGER._flatten_dict(_LOGGER._convert_params(values)))
    columns, start, end = summary.hparams(flat, dict.fromkeys(metrics or [], 0.0))
    for each in (start, end) if metrics is None else (columns, start, end):
        writer._get_file_writer().add_summary(each)


def launches_copies(trainer: Trainer) -> bool:
    """Returns whether the strategy spawns or forks its processes, which return their metrics through a pipe."""
    return type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher"


def launcher_classes() -> list[Any]:
    """Returns the classes that spawn or fork processes. No hook comes between making a launcher and launching."""
    module = "strategies.launchers.multiprocessing"
    return [
        importlib.import_module(f"{namespace.__name__}.{module}")._MultiProcessingLauncher  # each namespace has its own
        for namespace in LIGHTNING
    ]


def trainer_of(module: LightningModule) -> Trainer | None:
    """Returns the trainer of the module, or ``None``. The public property raises an error instead."""
    return module._trainer


def data_source(trainer: Trainer) -> Any:
    """Returns the loaders, data module or module that the last fit or validation read."""
    return trainer.validate_loop._data_source.instance


@contextmanager
def current_hook(module: LightningModule, name: str) -> Iterator[None]:
    """Lets the module log as if Lightning had called the hook of this name."""
    before, module._current_fx_name = module._current_fx_name, name
    try:
        yield
    finally:
        module._current_fx_name = before


# --- the evaluation loop and what it logs


def evaluation_loaders(trainer: Trainer) -> list[Any] | None:
    """Returns the loaders of the running validation, test or prediction, or ``None`` if their batches are combined.

    ``trainer.val_dataloaders`` may nest the loaders, and does not say whether their batches are combined.
    """
    combined: Any = _held_out_loop(trainer)._combined_loader
    return combined.flattened if combined._mode == "sequential" else None


def set_up_validation(trainer: Trainer) -> None:
    """Sets up the loaders of the validation within a fit. No public method does, and the first validation may come late."""
    trainer._evaluation_loop.setup_data()


def to_device(trainer: Trainer, batch: Any, dataloader_idx: int) -> Any:
    """Returns the batch on the device, with the transfer hooks of module and data module, as the loops do."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


def first_batch(loader: DataLoader) -> Any:
    """Returns the first batch of a loader, from one worker that ends at once. A persistent iterator stays untouched."""
    own = copy.copy(loader)
    own._iterator, own.num_workers = None, min(loader.num_workers, 1)
    iterator = iter(own)
    try:
        return next(iterator)
    finally:
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def n_evaluation_loaders(trainer: Trainer) -> int:
    """Returns the number of loaders of the running validation, test or prediction."""
    return _held_out_loop(trainer).num_dataloaders


def _held_out_loop(trainer: Trainer) -> Any:
    """Returns the running loop of held-out data. Lightning's name for it raises an error in a prediction."""
    return trainer.predict_loop if trainer.predicting else trainer._evaluation_loop


def evaluation_results(trainer: Trainer) -> Results:
    """Returns the collection to which ``self.log`` logs now. ``self.log`` itself refuses the suffixes of loaders."""
    return trainer._results


def empty_results(trainer: Trainer) -> Results:
    """Returns another collection of the same class, which reduces and weights values as Lightning does.

    A prediction logs nothing and has no collection: ``None``.
    """
    results: Any = trainer._results
    return results if results is None else type(results)(training=False)


def exchange_evaluation_results(trainer: Trainer, results: Results, read: Mapping[str, Any]) -> tuple[Results, dict[str, Any]]:
    """Makes ``self.log`` log to the results, and ``trainer.callback_metrics`` and its siblings begin with ``read``.

    Returns what was there before.
    """
    loop, connector = _held_out_loop(trainer), vars(trainer._logger_connector)
    before = loop._results, {name: connector[name] for name in read}
    loop._results = results
    connector.update(read)
    return before


def logged_so_far(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Returns copies of what ``trainer.callback_metrics`` and its siblings hold, by their private names."""
    return {name: dict(held) for name, held in vars(trainer._logger_connector).items() if isinstance(held, dict)}


def add_callback_metrics(logged: dict[str, dict[str, Any]], metrics: Mapping[str, Any]) -> None:
    """Adds metrics to the ``trainer.callback_metrics`` in the result of :func:`logged_so_far`."""
    logged["_callback_metrics"].update(metrics)


def show_to_callbacks(trainer: Trainer, metrics: Mapping[str, float | Tensor]) -> None:
    """Adds metrics to ``trainer.callback_metrics`` that no table shows: an evaluation prints whatever is logged."""
    device = trainer.strategy.root_device
    tensors = {key: torch.as_tensor(value, dtype=torch.get_default_dtype(), device=device) for key, value in metrics.items()}
    trainer._logger_connector._callback_metrics.update(tensors)


def logged_name(results: Results, metric: Any) -> str:
    """Returns the key of a logged value in ``trainer.callback_metrics``, with Lightning's suffix for the loader."""
    return results._forked_name(metric, on_step=False)[0]


def reduce_logged(metric: Any, reduce: Callable[..., Any]) -> None:
    """Reduces a logged value over all processes, with or without ``sync_dist``. Metrics do so themselves."""
    if not metric.is_tensor:
        return
    metric.value = reduce(metric.value, reduce_op="sum" if metric.meta.is_mean_reduction else metric.meta.reduce_fx.__name__)
    if metric.meta.is_mean_reduction:
        metric.cumulated_batch_size = reduce(metric.cumulated_batch_size, reduce_op="sum")
    metric._computed, metric.meta.sync.fn, metric.meta.sync.should = None, None, True


def state_of_run(trainer: Trainer) -> list[Any]:
    """Returns the objects of a running evaluation whose attributes a replayed step may change."""
    return [trainer, _held_out_loop(trainer), trainer._logger_connector]


def private_attributes() -> frozenset[str]:
    """Returns the private attributes of a module that hold no state: parameters, hooks and Lightning's bookkeeping.

    Buffers, submodules, hyperparameters and the metrics that ``self.log`` has found are state.
    """
    names = {name for name in vars(LIGHTNING[0].LightningModule()) if name.startswith("_")}
    return frozenset(names - {"_buffers", "_modules", "_metric_attributes"} | {"_defaults"})


def parameters_of_layer(module: nn.Module) -> dict[str, Any]:
    """Returns the dictionary in which the module holds its own parameters."""
    return module._parameters


# --- random streams


def rng_states() -> dict[str, Any]:
    """Returns the states of the global random streams of torch, numpy and Python."""
    return _SEED._collect_rng_states()


def set_rng_states(states: dict[str, Any]) -> None:
    """Sets the global random streams."""
    _SEED._set_rng_states(states)


def return_to_rng_states(states: dict[str, Any]) -> None:
    """Sets the global random streams to states that they had before. That of numpy takes 0.1 ms, if draws have changed it."""
    if _drop_kept_number(states["numpy"]):
        states = {name: state for name, state in states.items() if name != "numpy"}
    _SEED._set_rng_states(states)


def _drop_kept_number(state: Any) -> bool:
    """Brings numpy's global stream to a state from which it differs at most by a normal number that it keeps for the next draw.

    Returns whether the stream is then in the state. A step that seeds the stream may leave such a number, which the memory of
    the Mersenne Twister does not show.
    """
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if not (isinstance(state, tuple) and isinstance(generator, np.random.MT19937)):
        return False
    _, words, position, has_gauss, _ = state
    memory, address = words.tobytes() + position.to_bytes(4, sys.byteorder), generator.ctypes.state_address
    if has_gauss or ctypes.string_at(address, len(memory)) != memory:
        return False
    np.random.standard_normal()  # the number that is kept, or else a new one, which moves the stream and keeps another
    if ctypes.string_at(address, len(memory)) != memory:
        np.random.standard_normal()
        ctypes.memmove(address, memory, len(memory))
    return True


# --- torch: modules and their hooks


def plain_name(name: str) -> str:
    """Returns the name without the ``_orig_mod`` of ``torch.compile``."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod") if "_orig_mod" in name else name


def original_module(module: Any) -> Any:
    """Returns the module within a compiled module, or the module itself. For a module, a failed ``getattr`` is slow."""
    parts = module._modules
    return parts["_orig_mod"] if "_orig_mod" in parts else module  # noqa: SIM401 (those of a scripted module have no get)


def is_loss(module: nn.Module) -> bool:
    """Returns whether the module is a loss of torch, whose base class is private."""
    return isinstance(module, nn.modules.loss._Loss)


def register_forward_hook(module: nn.Module, hook: Any) -> RemovableHandle:
    """Registers a forward hook that also receives the keyword arguments."""
    _reserve_ids(module._forward_hooks)
    return module.register_forward_hook(hook, with_kwargs=True)


def structure_of(module: nn.Module) -> tuple[list[Any], list[nn.Parameter]]:
    """Returns the objects that decide the names of the parameters of a module, and the parameters, by each of their names.

    If the objects are the same as before, so are the names. The public generators take several times as long.
    """
    parts: list[Any] = [module]
    structure, parameters = [], []
    for part in parts:
        if part is not None:
            inner, own = part._modules, part._parameters
            structure += part, *inner, None, *own
            parts += inner.values()
            parameters += own.values()
    return structure + parameters, [parameter for parameter in parameters if parameter is not None]


def hooks_of_weights(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, Any]]:
    """Returns the hooks of pruning and of the older weight normalization, which compute a weight before each forward pass."""
    hooks = [(module, hook) for module in modules for hook in module._forward_pre_hooks.values()]
    return [each for each in hooks if isinstance(each[1], BasePruningMethod) or type(each[1]).__name__ == "WeightNorm"]


def register_state_dict_hook(modules: Iterable[nn.Module], hook: Callable[..., None]) -> RemovableHandle:
    """Registers a hook of many modules that may change what their ``state_dict`` returns."""
    hooks = [module._state_dict_hooks for module in modules]
    _reserve_ids(*hooks)
    # register_state_dict_post_hook sets an attribute on the hook, which fails for a bound method, and takes one module
    handle = RemovableHandle(hooks[0], extra_dict=hooks[1:])
    for of_module in hooks:
        of_module[handle.id] = hook
    return handle


def _reserve_ids(*hooks: Mapping[int, Any]) -> None:
    """Keeps the next hook from replacing a hook: a spawned process counts ids from 0, but its modules have hooks already."""
    RemovableHandle.next_id = max([RemovableHandle.next_id, *(key + 1 for of_module in hooks for key in of_module)])


def register_gradient_hook(parameter: nn.Parameter, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Registers a hook of the gradient that runs before all other hooks."""
    handle = parameter.register_hook(hook)
    hooks: Any = handle.hooks_dict_ref()
    hooks.update([(key, hooks.pop(key)) for key in list(hooks) if key != handle.id])
    return handle


# --- torch: tensors and autograd


def copy_all_(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copies each source into its target, in few kernels. No public function does."""
    if targets := list(targets):
        with torch.no_grad():  # as a decorator, it would take longer than the copies of a small model
            torch._foreach_copy_(targets, list(sources))  # type: ignore[attr-defined]


def subtract_all(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> list[Tensor]:
    """Returns the difference of each pair, in few kernels. No public function does."""
    return torch._foreach_sub(list(tensors), list(others))  # type: ignore[attr-defined]


def norms_of(tensors: Iterable[Tensor], order: float = 2.0) -> list[Tensor]:
    """Returns the norm of each tensor, in few kernels. The public function returns the norm of all."""
    return torch._foreach_norm(list(tensors), order)  # type: ignore[attr-defined]


def count_writes(tensor: Tensor) -> int:
    """Returns how often the tensor was written to; 0 for an inference tensor, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


def writes_of(tensors: Iterable[Tensor]) -> list[int]:
    """Returns how often each tensor was written to; see :func:`count_writes`."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def preserve_version(tensor: Tensor) -> AbstractContextManager[None]:
    """Returns a context that ends with the count of writes that the tensor has now. Autograd refuses values of other counts."""
    return torch.autograd._unsafe_preserve_version_counter(tensor)  # type: ignore[attr-defined]


def is_batched(tensor: Tensor) -> bool:
    """Returns whether ``torch.vmap`` hides an axis of the tensor."""
    return torch._C._functorch.is_batchedtensor(tensor)  # type: ignore[attr-defined]


def is_transformed() -> bool:
    """Returns whether a transform of ``torch.func`` runs, within which a new tensor has no memory of its own."""
    return torch._C._functorch.maybe_current_level() is not None  # type: ignore[attr-defined]


def wraps_tensors(tensor: Tensor) -> bool:
    """Returns whether the tensor consists of other tensors, as a DTensor or a MaskedTensor, and has no memory of its own."""
    kinds: list[Any] = [type(tensor), Tensor]
    own, default = (kind.__torch_dispatch__ for kind in kinds)
    return is_traceable_wrapper_subclass(tensor) or own is not default


def runs_backward() -> bool:
    """Returns whether a backward pass is running, in which activation checkpointing runs forward passes."""
    return torch._C._current_graph_task_id() != -1


def saved_targets(loss: Tensor) -> Iterator[Tensor]:
    """Yields the targets of the losses in the graph of a loss, which autograd keeps in private attributes of its nodes."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if isinstance(target := getattr(node, "_saved_target", None), Tensor):
                yield target
            nodes += [following for following, _ in node.next_functions]


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors are views of one storage. A fake tensor has no address to compare."""
    return torch._C._is_alias_of(one, other)  # type: ignore[attr-defined]


def takes_scaled_gradients(optimizer: Optimizer) -> bool:
    """Returns whether the optimizer removes the loss scale in its own step, as fused optimizers do."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


# --- torchmetrics


def separate_metrics(collection: MetricCollection) -> None:
    """Lets metrics share no states, unless the user has grouped them. The argument of the constructor cannot be changed later.

    By default, metrics share their states for good if these are equal after the first update. The top-1 and top-5 accuracy of
    a batch without a mistake are.
    """
    if collection._enable_compute_groups is True:
        collection.values()  # copies the states, or metrics that were updated would go on to share their lists
        collection._enable_compute_groups, collection._groups, collection._groups_checked = False, {}, False


@contextmanager
def states_hidden(metric: Metric) -> Iterator[None]:
    """Hides the states of a metric from ``Metric.reset``, which would make new ones."""
    defaults, metric._defaults = metric._defaults, {}
    try:
        yield
    finally:
        metric._defaults = defaults


def plot_values(metric: Metric, values: Any, axes: Any) -> Any:
    """Plots values of a metric by its bounds, as each metric of torchmetrics does. No public function knows the convention."""
    return metric._plot(values, axes)


def add_zeros(metric: Metric, state: str, *shape: int) -> None:
    """Adds a state of integers, which is summed over processes. ``Metric.add_state`` would keep a second tensor of zeros."""
    zeros = torch.zeros(shape, dtype=torch.long)
    metric.add_state(state, zeros, dist_reduce_fx="sum")
    metric._defaults[state] = zeros.new_zeros(()).expand(shape)


def cast_states(metric: Metric, states: Iterable[str], dtype: torch.dtype) -> None:
    """Gives some states a dtype that ``reset`` keeps. ``Metric.set_dtype`` would change all floating-point states."""
    for state in states:
        metric._defaults[state] = metric._defaults[state].to(dtype)  # type: ignore[union-attr]
        setattr(metric, state, getattr(metric, state).to(dtype))


@contextmanager
def sync_states(metric: Metric) -> Iterator[None]:
    """Synchronizes the states over all processes, as ``compute`` does."""
    if not metric.sync_on_compute:  # what follows takes time even then
        yield
        return
    with metric.sync_context(
        dist_sync_fn=metric.dist_sync_fn, should_sync=metric.sync_on_compute, should_unsync=metric._should_unsync
    ):
        yield
