"""Lines in the terminal, and the trainer's progress bar within a batch and after the last batch.

Only the rank that logs shows anything. Without a progress bar, nothing moves. Lines are logged at level INFO by the logger of
Lightning, so whoever silences Lightning silences them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_noise.loop.internals import LIGHTNING, evaluation_results, is_fast_dev_run
from lightning_noise.loop.loggers import warn_on_failure

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["follow_passes", "progress", "say", "shorten"]

Item = TypeVar("Item")

_TQDM: tuple[type, ...] = tuple(namespace.callbacks.TQDMProgressBar for namespace in LIGHTNING)
_RICH: tuple[type, ...] = tuple(namespace.callbacks.RichProgressBar for namespace in LIGHTNING)
_MOVES_EVERY = 0.25  # seconds
_APPEARS_AFTER = 1.0  # seconds


def say(trainer: Trainer, text: str) -> None:
    """Logs a text. Call it in ``setup`` or ``teardown``: while a bar is alive, the text would end up on the line of the bar."""
    bar: Any = trainer.progress_bar_callback
    if isinstance(bar, _RICH) and bar.progress is not None and bar.progress.console.is_interactive:
        bar.progress.stop()  # the bar has nothing more to show, but it ends in its own teardown
    if not is_fast_dev_run(trainer):
        rank_zero_info(text)


def shorten(path: Path) -> str:
    """Returns the path, relative to the working directory if it lies within."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def follow_passes(trainer: Trainer, passes: Iterable[Item], *, begin: float, step: float) -> Iterator[Item]:
    """Yields the passes over a batch, and moves the trainer's bar with them if the batch takes long.

    Args:
        trainer: The trainer, in a validation or test.
        passes: The passes.
        begin: How many batches are done before the first pass. An integer plus a share of this batch.
        step: The share of the batch that a pass is.
    """
    move, moved = None, time.monotonic()
    for done, item in enumerate(passes):
        if time.monotonic() - moved > _MOVES_EVERY:
            moved = time.monotonic()
            with warn_on_failure(trainer, "the progress"):
                move = move or _find_bar(trainer)
                move(begin + done * step)
        yield item


def _find_bar(trainer: Trainer) -> Callable[[float], None]:
    """Returns a function that moves the bar of the running validation or test to a number of batches."""
    bar: Any = trainer.progress_bar_callback
    if isinstance(bar, (*_TQDM, *_RICH)) and not bar.is_disabled:
        # here the bar learns how many batches there are; its hook may come after ours, and then does nothing
        begin = bar.on_test_batch_start if trainer.testing else bar.on_validation_batch_start
        begin(trainer, trainer.lightning_module, None, 0, evaluation_results(trainer).dataloader_idx or 0)
    if isinstance(bar, _TQDM) and not bar.is_disabled:
        running = _tqdm_of(trainer, bar)

        def move_tqdm(n: float) -> None:
            running.n = round(n, 2)
            running.refresh()

        if running.gui or running.fp.isatty():  # a file would receive a line for each move
            return move_tqdm
    elif isinstance(bar, _RICH) and not bar.is_disabled:

        def move_rich(n: float) -> None:
            running = bar.test_progress_bar_id if trainer.testing else bar.val_progress_bar_id
            if running is not None:  # the bar begins after the monitor, in the first batch
                bar.progress.update(running, completed=n, visible=True)
                bar.refresh()

        return move_rich
    return lambda n: None


def _tqdm_of(trainer: Trainer, bar: Any) -> Any:
    if trainer.testing:
        return bar.test_progress_bar
    return bar.train_progress_bar if trainer.training else bar.val_progress_bar


@contextmanager
def progress(trainer: Trainer, description: str, total: int) -> Iterator[Callable[[], Any]]:
    """Shows a bar for what takes longer than a second, and removes it; the yielded function advances the bar by one."""
    bar: Any = trainer.progress_bar_callback
    if isinstance(bar, _TQDM) and not bar.is_disabled:
        options = {"leave": False, "dynamic_ncols": True, "file": sys.stdout, "bar_format": bar.BAR_FORMAT}
        with type(_tqdm_of(trainer, bar))(total=total, desc=description, delay=_APPEARS_AFTER, **options) as inner:
            yield inner.update
    elif isinstance(bar, _RICH) and not bar.is_disabled and bar.progress is not None:
        task, begin = bar.progress.add_task(description, total=total, visible=False), time.monotonic()

        def advance() -> None:
            bar.progress.update(task, advance=1, visible=time.monotonic() - begin > _APPEARS_AFTER)
            bar.refresh()

        try:
            yield advance
        finally:
            bar.progress.update(task, visible=False)
            bar.refresh()
    else:
        yield lambda: None
