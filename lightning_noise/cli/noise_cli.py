"""A LightningCLI with noise, a monitor and short errors."""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_noise.callbacks.inputs import InputNoise
from lightning_noise.callbacks.robustness import RobustnessMonitor
from lightning_noise.cli.errors import ShortErrors
from lightning_noise.loop.internals import namespace_of

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
else:
    LightningCLI = object

__all__ = ["NoiseCLI"]

_GAUSSIAN = "lightning_noise.noise.Gaussian"
_OPTIONS: dict[str, tuple[type, Any, str]] = {
    "input_noise": (
        InputNoise,
        {"class_path": "lightning_noise.InputNoise", "init_args": {"noise": {"class_path": _GAUSSIAN}}},
        "noise in the inputs of the training: --input_noise.level 0.3, --input_noise.noise Impulse, ...",
    ),
    "robustness_monitor": (
        RobustnessMonitor,
        None,
        "an evaluation under noise: --robustness_monitor RobustnessMonitor, --robustness_monitor.max_batches 10, ...",
    ),
}


class NoiseCLI(LightningCLI):
    """A ``LightningCLI`` with options for input noise and for a monitor, and with short errors.

    ``--input_noise.level 0.3`` adds an :class:`~lightning_noise.InputNoise` to the callbacks of the trainer. The noise is
    Gaussian unless ``--input_noise.noise`` names another noise. ``--robustness_monitor RobustnessMonitor`` adds a
    :class:`~lightning_noise.RobustnessMonitor`, and so does each of its arguments, such as
    ``--robustness_monitor.max_batches 10``. Without these options, neither is added. In a file, the options are keys::

        input_noise: {level: 0.3}
        robustness_monitor: {max_batches: 10}

    The configuration that a run saves lists both under ``trainer.callbacks``, where every ``LightningCLI`` can read them.

    An error in the configuration is one line: where the cause is, what is wrong and what to type. A value that the constructor
    of a callback, a noise or a schedule refuses is such an error, too. With the environment variable ``JSONARGPARSE_DEBUG``,
    the errors are those of jsonargparse.

    The arguments are those of ``LightningCLI``. The base is the ``LightningCLI`` of ``lightning.pytorch`` if the class of the
    model or of the data is from ``lightning.pytorch``, and that of ``pytorch_lightning`` otherwise. If you write a CLI of your
    own, name both bases::

        from lightning.pytorch.cli import LightningCLI
        from lightning_noise.cli import NoiseCLI

        class MyCLI(NoiseCLI, LightningCLI):
            def add_arguments_to_parser(self, parser):
                super().add_arguments_to_parser(parser)
                parser.link_arguments("data.n_classes", "model.n_classes")
    """

    def __new__(cls, model_class: Any = None, datamodule_class: Any = None, *args: Any, **kwargs: Any) -> NoiseCLI:
        if all(base.__name__ != "LightningCLI" for base in cls.__mro__):
            base = import_module(f"{namespace_of(model_class, datamodule_class).__name__}.cli").LightningCLI
            complete: Any = type(cls.__name__, (cls, base), {"__module__": cls.__module__, "__doc__": cls.__doc__})
            return super().__new__(complete)
        return super().__new__(cls)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        parser.__class__ = _with_short_errors(type(parser))  # Lightning 2.5.0 does not ask for the class of the parser
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        for name, (kind, default, text) in _OPTIONS.items():
            parser.add_argument(f"--{name}", type=kind | None, default=default, help=text)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")
        config = self.config[subcommand] if subcommand else self.config
        added = [config.pop(name, None) for name in _OPTIONS]
        callbacks = config.trainer.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        config.trainer.callbacks = callbacks + [each for each in added if each is not None and not _is_untouched(each)]


def _is_untouched(callback: Namespace) -> bool:
    """Returns whether the input noise is the default, which has no level."""
    names = inspect.signature(InputNoise).parameters
    default = {name: parameter.default for name, parameter in names.items()} | {"noise": {"class_path": _GAUSSIAN}}
    return callback.init_args.as_dict() == default


@cache
def _with_short_errors(parser_class: type) -> type:
    return type(parser_class.__name__, (ShortErrors, parser_class), {})
