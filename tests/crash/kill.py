"""Kills fits at random moments, and examines what they leave behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from crash.fits import run

WAYS = {"exception": signal.SIGUSR2, "SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}
_OF_A_FOLDER = ("ModelCheckpoint", "OnExceptionCheckpoint")  # callbacks whose state holds paths


class Whole:
    """The uninterrupted run, and its checkpoints."""

    def __init__(self, folder: Path):
        run(folder / "warm")  # imports what is imported late
        before = time.process_time()
        self.outcome = run(folder / "whole")
        self.seconds = time.process_time() - before  # of the processor
        self.checkpoints = {path.name: load(path) for path in (folder / "whole").glob("*.ckpt")}
        self.weights = {saved["global_step"]: saved["state_dict"] for saved in self.checkpoints.values()}

    def examine(self, path: Path) -> str:
        """Returns what is wrong with a checkpoint of a killed run, or an empty string."""
        try:
            saved = load(path)
        except Exception as error:
            return f"does not load: {error!r}"
        step = saved["global_step"]
        if step and not cannot_resume(saved) and not _equal(saved["state_dict"], self.weights[step]):
            return f"holds other weights than the uninterrupted run after {step} steps"
        known = self.checkpoints.get(path.name)
        if known is not None and not _equal(_without_paths(saved), _without_paths(known)):
            return "differs from the same checkpoint of the uninterrupted run"
        return ""


def cannot_resume(saved: dict[str, Any]) -> bool:
    """Returns whether Lightning cannot resume from here, with noise or without.

    In the middle of an update, some weights may be old and some new, and Lightning repeats the batch. If the run ended while an
    epoch began, Lightning 2.6 leaves out an epoch.
    """
    fit = saved["loops"]["fit_loop"]
    updates = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["ready"]
    epoch = fit["epoch_progress"]["total"]
    return updates > fit["epoch_loop.batch_progress"]["total"]["processed"] or epoch["ready"] > epoch["started"]


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def start(folder: Path) -> int:
    """Forks a process that fits, and returns its id."""
    if process := os.fork():
        return process
    _fit(folder)


def _fit(folder: Path) -> NoReturn:
    status = 1
    with suppress(BaseException):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        signal.signal(signal.SIGUSR2, _raise)
        run(folder)
        status = 0
    os._exit(status)


def _raise(*_: Any) -> NoReturn:
    raise RuntimeError("killed")


def kill_after(process: int, seconds: float, way: int) -> bool:
    """Sends a signal after these seconds of the processor, and returns whether the process was still at work."""
    while (spent := _processor_time(process)) is not None and spent < seconds:
        time.sleep(0.002)
    if spent is not None:
        os.kill(process, way)
    os.waitpid(process, 0)
    return spent is not None


def _processor_time(process: int) -> float | None:
    """Returns the seconds that a process of this one has used, or ``None`` if it has ended."""
    state, *_ = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return None if state == "Z" else int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) / 1e9


def kill_one(whole: Whole, folder: Path, way: str, share: float) -> Counter[str]:
    """Kills a fit at a share of its time, and returns what was counted. Raises an AssertionError if anything was lost."""
    killed = kill_after(start(folder), share * whole.seconds, WAYS[way])
    found = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    for path in found:
        assert not (wrong := whole.examine(path)), f"{path.name} {wrong}, after {way} at {share:.3f}"
    exact = [path for path in found if not cannot_resume(load(path))]
    resumed = [path for path in exact if path.stem == "exception"]
    resumed += [path for path in exact if path.stem != "exception"][-1:]
    for path in resumed:
        differs = run(folder / "resumed", path).completes(whole.outcome)
        said = f"resumed from {path.name} after {way} at {share:.3f}, the run has other {differs[:200]}"
        assert not differs, f"{said}; {_places(load(path))}"
    counted = {f"{way}: {'killed' if killed else 'ended first'}": 1, "checkpoints": len(found), "resumed": len(resumed)}
    counted["in an update, or as an epoch began"] = len(found) - len(exact)
    return Counter(counted)


def kill(folder: Path, n: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Kills this many fits, and returns what was counted, and what was lost."""
    draw = random.Random(seed)
    whole = Whole(folder)
    counted: Counter[str] = Counter()
    lost = []
    for i in range(n):
        try:
            counted += kill_one(whole, folder / str(i), list(WAYS)[i % len(WAYS)], draw.uniform(0.05, 1.0))
        except AssertionError as error:
            lost.append(str(error))
            print(error, flush=True)
        if (i + 1) % 10 == 0:
            print(f"{i + 1} of {n} killed, {len(lost)} lost", flush=True)
        shutil.rmtree(folder / str(i), ignore_errors=True)
    return counted, lost


def _places(saved: dict[str, Any]) -> str:
    """Returns where a run was when it was saved: ready, started, processed and completed epochs and batches."""
    fit = saved["loops"]["fit_loop"]
    names = ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress")
    counts = ([fit[name]["current"][key] for key in ("ready", "started", "processed", "completed")] for name in names)
    return ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))


def _without_paths(saved: dict[str, Any]) -> dict[str, Any]:
    callbacks = {key: state for key, state in saved["callbacks"].items() if not key.startswith(_OF_A_FOLDER)}
    return saved | {"callbacks": callbacks}


def _equal(one: Any, two: Any) -> bool:
    """Bit for bit; NaN equals NaN."""
    if isinstance(one, torch.Tensor):
        return one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(_equal, one, two))
    return repr(one) == repr(two)
