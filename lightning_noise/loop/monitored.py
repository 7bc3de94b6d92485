"""Keys that other callbacks and schedulers follow, such as the ``monitor`` of a ModelCheckpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lightning_noise.loop.internals import class_of_callbacks

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["LogsKeys", "check_followed_keys", "noise_key"]


@runtime_checkable
class LogsKeys(Protocol):
    """A callback that knows the keys that it will log."""

    def logged_keys(self) -> Mapping[str, Sequence[str]]:
        """Returns the keys that callbacks can follow, by their common beginning; a key that ends in a slash may go on."""
        ...


def noise_key(name: str, what: str) -> str:
    """Returns the key of a value of a noise callback.

    The group comes after that of the results, because TensorBoard sorts the groups and opens the first two.

    Example:
        >>> noise_key("input", "level")
        'train_noise/input/level'
    """
    return f"train_noise/{name}/{what}"


def check_followed_keys(trainer: Trainer) -> None:
    """Raises a ValueError if a key begins as those of our callbacks do, but will not be logged."""
    known: dict[str, list[str]] = {}
    for callback in class_of_callbacks(trainer, LogsKeys):
        for beginning, keys in callback.logged_keys().items():
            known.setdefault(beginning, []).extend(keys)
    every = [key for keys in known.values() for key in keys]
    for follower, followed in _followed(trainer):
        beginnings = [beginning for beginning in known if followed.startswith(beginning)]
        is_logged = any(followed.startswith(key) if key.endswith("/") else followed == key for key in every)
        if beginnings and not is_logged and followed not in trainer.callback_metrics:
            own = "if the module logs this key itself, give our callback another name=…"
            keys = [key for beginning in beginnings for key in known[beginning]]
            if not keys:
                raise ValueError(
                    f"{follower} follows {followed!r}, which a fit does not log; to log it, type max_batches=…; {own}"
                )
            last = followed.rpartition("/")[2]
            nearest, *others = (
                f"{key}{last}" if key.endswith("/") else key
                for key in dict.fromkeys([*get_close_matches(followed, every, n=3, cutoff=0.0), *keys])
            )
            raise ValueError(
                f"{follower} follows {followed!r}, which is not logged; type monitor={nearest!r}, or one of {others[:20]}; "
                f"{own}"
            )


def _followed(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Yields who follows a key, and the key."""
    for callback in class_of_callbacks(trainer, object):
        if isinstance(key := getattr(callback, "monitor", None), str):
            yield f"{type(callback).__name__}(monitor={key!r})", key
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.monitor is not None:
            yield f"the {type(config.scheduler).__name__} of configure_optimizers", config.monitor
