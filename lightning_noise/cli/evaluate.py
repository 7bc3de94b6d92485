"""The command ``python -m lightning_noise evaluate``, which tests a checkpoint under noise."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import count
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # pyright: ignore[reportPrivateImportUsage]

from lightning_noise import report
from lightning_noise.callbacks.robustness import RobustnessMonitor
from lightning_noise.cli.errors import ShortErrors
from lightning_noise.loop.internals import namespace_of

__all__ = ["main"]

_CLASSES = ("model", "data")
_LOGGERS = ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric")
_UNTRUSTED = (
    "torch refuses the checkpoint: it holds more than tensors and plain values, or it is not a checkpoint. If you trust the "
    "file, type TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 before the command; loading can then run code from the file"
)
# of the trainer, what says how to compute and how much data to take; of the monitor, what matters in a fit alone
_OF_TRAINER = {
    *("accelerator", "strategy", "devices", "num_nodes", "precision", "plugins", "deterministic", "benchmark"),
    *("limit_val_batches", "limit_test_batches", "use_distributed_sampler", "inference_mode"),
}
_OF_FIT: set[str | int] = {"every_n_epochs", "name"}


class _Parser(ShortErrors, ArgumentParser):
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluates a checkpoint under noise, with the module and the data of a LightningCLI configuration.

    Prints the outcome, and writes a report into a new folder.

    Args:
        arguments: The arguments of the command. Default: those of the process.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # for the modules of the configuration
    parser = _Parser(
        prog="python -m lightning_noise evaluate",
        description="Evaluates a checkpoint under noise: on the test data, or on the validation data if there is no test data.",
    )
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)  # the command has an outcome of its own
    try:
        _evaluate(_parse(parser, sys.argv[1:] if arguments is None else arguments))
    except (ValueError, TypeError, RuntimeError, UnpicklingError) as error:
        if not _is_refusal(error):
            raise
        parser.error(_UNTRUSTED if isinstance(error, UnpicklingError) else _cut(str(error)))


# --- the configuration


def _parse(parser: _Parser, arguments: Sequence[str]) -> Namespace:
    """Returns the options with the objects that they describe."""
    early = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    for name in ("config", *_CLASSES):
        early.add_argument(f"--{name}")
    given, rest = early.parse_known_args(arguments)
    config = {} if given.config is None else _read(given.config)
    asks_for_help = not {"-h", "--help"}.isdisjoint(rest)
    classes = {} if asks_for_help else _find_classes(config, {name: getattr(given, name) for name in _CLASSES})
    lightning = namespace_of(*(_import(spec["class_path"]) for spec in classes.values()))
    known = _arguments_of_monitor(config, has_noises=any(each.startswith("--noises") for each in rest)) | classes
    known["trainer"] = {key: value for key, value in (config.get("trainer") or {}).items() if key in _OF_TRAINER}
    known["seed_everything"] = config.get("seed_everything", False)
    _add_arguments(parser, lightning)
    options = parser.parse_args([f"--config={yaml.safe_dump(known)}", *rest])
    if options.seed_everything is not False:  # the module may draw its split of the data
        lightning.seed_everything(None if options.seed_everything is True else options.seed_everything, workers=True)
    return parser.instantiate_classes(options)


def _add_arguments(parser: _Parser, lightning: Any) -> None:
    parser.add_argument("--config", action=ActionConfigFile, help="the config.yaml that a LightningCLI has saved")
    parser.add_argument("--ckpt", required=True, help="the checkpoint")
    parser.add_argument("--output", help="a new folder for the report; default: beside the checkpoint")
    parser.add_argument("--seed_everything", type=bool | int, default=False, help="the seed of the data")
    parser.add_subclass_arguments(lightning.LightningModule, "model", fail_untyped=False)
    parser.add_subclass_arguments(lightning.LightningDataModule, "data", required=False, fail_untyped=False)
    parser.add_class_arguments(RobustnessMonitor, skip=_OF_FIT, fail_untyped=False)
    skipped: Any = {*inspect.signature(lightning.Trainer).parameters} - _OF_TRAINER
    parser.add_class_arguments(lightning.Trainer, "trainer", skip=skipped, instantiate=False, fail_untyped=False)


def _read(path: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"expected the config.yaml of a LightningCLI, got {path}, which is not a mapping")
    return config


def _find_classes(config: Mapping[str, Any], given: Mapping[str, str | None]) -> dict[str, dict[str, Any]]:
    """Returns the class and the arguments of the model and of the data.

    The configuration of a CLI for fixed classes has arguments alone, and a class of a script has no path to import it from.
    """
    specs = {name: config.get(name) or {} for name in _CLASSES}
    specs = {name: {"class_path": spec} if isinstance(spec, str) else spec for name, spec in specs.items()}
    known = {name: spec.get("class_path", "__main__.") for name, spec in specs.items()}
    if not config and not given["model"]:
        raise ValueError("no configuration; type --config lightning_logs/version_0/config.yaml, which the run has saved")
    missing = [name for name in _CLASSES if specs[name] and known[name].startswith("__main__.") and not given[name]]
    if missing or not (given["model"] or specs["model"]):
        options = " ".join(f"--{name} my_project.my_module.My{name.title()}" for name in missing or ["model"])
        raise ValueError(f"the configuration names no class to import for {' and '.join(missing or ['model'])}; type {options}")
    found = {}
    for name, spec in specs.items():
        path = given[name] or known[name]
        arguments = spec.get("init_args", {}) if "class_path" in spec else spec
        is_same = known[name] in (path, "__main__.", f"__main__.{path.split('.')[-1]}")
        if given[name] or spec:
            found[name] = {"class_path": path, "init_args": arguments if is_same else {}}
    return found


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"cannot import {path}: {error}; run the command in the folder that has {module.split('.')[0] or path}"
        ) from error


def _arguments_of_monitor(config: Mapping[str, Any], *, has_noises: bool) -> dict[str, Any]:
    """Returns the arguments of the first RobustnessMonitor of the configuration. Levels belong to their noises."""
    callbacks = (config.get("trainer") or {}).get("callbacks") or []
    for each in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(each, dict) and each.get("class_path", "").split(".")[-1] == RobustnessMonitor.__name__:
            dropped = _OF_FIT | ({"levels"} if has_noises else set())
            return {name: value for name, value in (each.get("init_args") or {}).items() if name not in dropped}
    return {}


# --- the evaluation


def _evaluate(options: Namespace) -> None:
    """Runs the test or the validation with a monitor and without other callbacks."""
    model, data = options.model, options.get("data")
    if not Path(options.ckpt).exists():
        raise ValueError(f"no checkpoint at {options.ckpt}; type --ckpt lightning_logs/version_0/checkpoints/….ckpt")
    output = _new_folder(options)
    lightning = namespace_of(type(model))
    names = inspect.signature(RobustnessMonitor).parameters.keys() - _OF_FIT
    monitor = RobustnessMonitor(**{name: options[name] for name in names})
    logger = lightning.loggers.CSVLogger(output.parent, name=output.name, version="")
    silent = {"enable_checkpointing": False, "enable_model_summary": False}
    trainer = lightning.Trainer(**options.trainer.as_dict(), callbacks=[monitor], logger=logger, **silent)
    split = _find_split(lightning, model, data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")  # callbacks of the training are left out
        run = trainer.test if split == "test" else trainer.validate
        run(model, datamodule=data, ckpt_path=options.ckpt, verbose=False)
    if trainer.is_global_zero and monitor.report is not None:
        why = "" if split == "test" else ", because the module or the data have no test"
        print(f"\nEvaluated {monitor.report.n} samples of the {split} data{why}.")
        print(report.headline(monitor.report))
        print(f"Report: {next(output.rglob('report.md'))}")


def _new_folder(options: Namespace) -> Path:
    checkpoint = Path(options.ckpt)
    if options.output is None:
        names = (f"{checkpoint.stem}-evaluation{f'-{i}' * (i > 1)}" for i in count(1))
        return next(path for path in map(checkpoint.with_name, names) if not path.exists())
    output = Path(options.output)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"--output must be a new or an empty folder, got {output}")
    return output


def _find_split(lightning: Any, model: Any, data: Any) -> str:
    """Returns whether to evaluate the test or the validation data."""

    def overrides(name: str) -> bool:
        bases = {model: lightning.LightningModule, data: lightning.LightningDataModule}
        return any(
            getattr(type(each), name, None) is not getattr(base, name, None) for each, base in bases.items() if each is not None
        )

    for split, step, loader in (("test", "test_step", "test_dataloader"), ("validation", "validation_step", "val_dataloader")):
        if overrides(step) and overrides(loader):
            return split
    raise ValueError(f"{type(model).__name__} has neither test_step and test_dataloader nor validation_step and val_dataloader")


# --- errors


def _is_refusal(error: Exception) -> bool:
    """Returns whether the package raised the error, or the checkpoint is of another module or not trusted."""
    last = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    ours = last.f_globals.get("__name__", "").startswith("lightning_noise.")
    return ours or any(said in str(error) for said in ("loading state_dict", "Weights only load failed"))


def _cut(message: str) -> str:
    """Returns the first lines of a message. For a checkpoint of another module, torch lists all parameters."""
    lines = [line.strip() for line in message.splitlines()]
    return "\n  ".join(line if len(line) < 400 else f"{line[:400]}…" for line in lines[:4])
