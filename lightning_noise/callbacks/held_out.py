"""Held-out data under noise: the noises to look through, and the place of each row, so that it has a draw of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from lightning_noise.batch import Path
from lightning_noise.callbacks.base import NoiseCallback
from lightning_noise.callbacks.boards import as_text
from lightning_noise.metrics.measurement import CLEAN, Probed
from lightning_noise.noise import Noise, check_level
from lightning_noise.perturb import Clip, NoiseFunction, check_floating, check_options, checked_clip, perturbed_batch, try_noise
from lightning_noise.rng import Key

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = [
    "N_GROUPS",
    "Places",
    "Probe",
    "Probes",
    "check_counts",
    "check_name",
    "check_pipe",
    "check_validation",
    "groups_of",
    "is_due",
]

Probe = Noise | NoiseCallback | NoiseFunction
_GROUPS = Key(("groups of samples",))
_BATCH = 2**32  # more rows than a batch has
_KEYS_IN_PIPE = 170
N_GROUPS = 20  # of which intervals are computed


class Probes:
    """Noises, each at several levels, through which held-out data are shown.

    Args:
        noises: A noise or noise callback, a list of them, whose tags are their names, or a mapping from tag.
        levels: The levels of all, or a mapping from tag to levels; left out, the ``severities`` of each noise.
        clip: Bounds of the noisy input.
        relative: Levels are in units of the standard deviation of each sample.
        seed: The seed of the draws.
        n_draws: The number of draws at each level.

    Attributes:
        noises: The noise or callback of each tag.
        levels: The levels of each tag.
    """

    def __init__(
        self,
        noises: Probe | Sequence[Probe] | Mapping[str, Probe],
        levels: Sequence[float] | Mapping[str, Sequence[float]] | None,
        *,
        clip: Clip | None,
        relative: bool,
        seed: int,
        n_draws: int = 1,
    ):
        self.noises = _tagged(noises)
        for tag, probe in self.noises.items():
            _check_probe(tag, probe, relative, clip)
        self.levels = {tag: _levels_of(tag, probe, levels) for tag, probe in self.noises.items()}
        if isinstance(levels, Mapping) and (unknown := levels.keys() - self.noises.keys()):
            raise ValueError(f"levels for {sorted(unknown)}, but the noises are {list(self.noises)}")
        self.clip = checked_clip(clip)
        self.relative = relative
        self.seed = seed
        self.n_draws = n_draws

    def described(self) -> dict[str, str]:
        """Returns the noise of each tag in words, which are the same for probes that do the same."""
        options = "".join(f", {key}={value}" for key, value in {"relative": self.relative, "clip": self.clip}.items() if value)
        # what has a meaning in training alone is left out
        trained = ("level", "seed", "name", "probability", "per_sample")
        return {tag: as_text(probe, without=trained) + options for tag, probe in self.noises.items()}

    def check(self, batch: Any, paths: list[Path]) -> None:
        """Raises an error where the leaves at the paths cannot take the noises."""
        for probe in self.noises.values():
            if not isinstance(probe, NoiseCallback):
                check_floating(batch, paths, probe)

    def perturbations(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, paths: list[Path], positions: range
    ) -> Iterator[tuple[Probed, AbstractContextManager[Any]]]:
        """Yields, for each noise, draw and level, the perturbation that yields the noisy batch; levels share a draw."""
        for (tag, probe), draw in product(self.noises.items(), range(self.n_draws)):
            key = Key((self.seed, "probe", tag), positions=positions)
            key = key / draw if draw else key  # the first is that of a monitor with one draw
            for level in self.levels[tag]:
                if isinstance(probe, NoiseCallback):
                    yield Probed(tag, level, draw), probe.perturbation(trainer, pl_module, batch, level, key)
                else:
                    noisy = perturbed_batch(batch, paths, probe, level, key, relative=self.relative, clip=self.clip)
                    yield Probed(tag, level, draw), nullcontext(noisy)

    def trials(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, paths: list[Path], positions: range
    ) -> Iterator[AbstractContextManager[Any]]:
        """Tries the noises on the batch, and yields a perturbation of each callback, in which the module is to be tried."""
        for tag, probe in self.noises.items():
            if isinstance(probe, NoiseCallback):
                # at the largest level, because at 0 nothing is done that could go wrong
                key, level = Key(("trial",), positions=positions), max(self.levels[tag])
                yield probe.perturbation(trainer, pl_module, batch, level, key)
            else:
                try_noise(batch, paths, probe, relative=self.relative, clip=self.clip)


class Places:
    """Counts the rows of a loader and gives each its place.

    Samplers deal the samples out to the processes in turn, and a distributed sampler repeats some so that all processes get
    equally many. The repetitions come last and are no samples to be counted.
    """

    def __init__(self):
        self.seen = 0  # rows of this process

    def take(self, trainer: Trainer, dataloader_idx: int, batch_idx: int, rows: int) -> tuple[range, int]:
        """Returns the places of the rows of the next batch, and how many of these rows, from the first, count."""
        # not `trainer.val_dataloaders`, which in `trainer.validate` still names the loaders of an earlier fit
        combined: Any = trainer._evaluation_loop._combined_loader
        loader = combined.flattened[dataloader_idx] if combined._mode == "sequential" else None
        sampler = _distributed_sampler(loader)
        rank, replicas = _share(trainer, loader, sampler)
        if isinstance(loader, DataLoader) and loader.batch_sampler is None:  # the data set is one of batches
            place = batch_idx * replicas + rank
            padding = sampler is not None and place >= len(sampler.dataset)  # type: ignore[arg-type]
            return range(place * _BATCH, place * _BATCH + rows), 0 if padding else rows
        first = self.seen * replicas + rank
        positions = range(first, first + rows * replicas, replicas)
        counted = rows
        if sampler is not None and rows == _samples_of_batch(loader, sampler, self.seen):  # a row is a sample
            counted = len(range(first, min(positions.stop, len(sampler.dataset)), replicas))  # type: ignore[arg-type]
        self.seen += rows
        return positions, counted


def check_counts(**counts: int | None) -> None:
    """Raises a ValueError where a number of something is below 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def check_name(trainer: Trainer, monitor: Any) -> None:
    """Raises a ValueError where another monitor of its kind has the name."""
    names = [callback.name for callback in trainer.callbacks if isinstance(callback, type(monitor))]  # type: ignore[attr-defined]
    if names.count(monitor.name) > 1:
        raise ValueError(f"two monitors are named {monitor.name!r}, and their keys would mix; give one of them another name=…")


def is_due(trainer: Trainer, every_n_epochs: int) -> bool:
    """Returns whether this validation or test is one to measure in, as the sanity check is not."""
    skipped = trainer.state.fn == "fit" and (trainer.current_epoch + 1) % every_n_epochs != 0
    return not trainer.sanity_checking and not skipped


def check_validation(trainer: Trainer, monitor: str, every_n_epochs: int) -> None:
    """Raises a ValueError where a fit has no validation in which the monitor could measure."""
    if not trainer.enable_validation:
        raise ValueError(f"{monitor} needs a validation: a val_dataloader, a validation_step and limit_val_batches above 0")
    every = math.lcm(every_n_epochs, trainer.check_val_every_n_epoch or 1)
    if 0 < (trainer.max_epochs or 0) < every and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ValueError(
            f"every_n_epochs={every_n_epochs} never comes in a run of {trainer.max_epochs} epochs with "
            f"check_val_every_n_epoch={trainer.check_val_every_n_epoch}"
        )


def check_pipe(trainer: Trainer, n_keys: int) -> None:
    """Raises a ValueError where so many keys would block the end of a run for ever.

    Processes that the main one starts as copies of itself hand it all keys through one pipe, which it empties after they have
    ended; it holds 64 KiB, and Lightning needs up to 370 bytes for a key.
    """
    if type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher" and n_keys > _KEYS_IN_PIPE:
        raise ValueError(
            f"with strategies that spawn or fork, Lightning hands keys to the main process through a pipe that holds about "
            f"{_KEYS_IN_PIPE}, and waits for ever where there are more, but the monitors log {n_keys}; use strategy='ddp', or "
            "fewer noises and levels"
        )


def groups_of(positions: range, device: torch.device) -> Tensor:
    """Returns the group of each sample, which depends on its place in the data set alone."""
    places = torch.arange(positions.start, positions.stop, positions.step, device=device)
    return (_GROUPS.uniform(places, (len(places),)) * N_GROUPS).long()


def _distributed_sampler(loader: Any) -> DistributedSampler | None:
    for sampler in (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)):
        if isinstance(sampler, DistributedSampler):
            return sampler
    return None


def _share(trainer: Trainer, loader: Any, sampler: DistributedSampler | None) -> tuple[int, int]:
    """Which share of the data this process sees, and of how many."""
    if sampler is not None:
        return sampler.rank, sampler.num_replicas
    if isinstance(loader, DataLoader) and isinstance(loader.sampler, SequentialSampler | RandomSampler):
        return 0, 1  # each process sees all
    return trainer.global_rank, trainer.world_size


def _samples_of_batch(loader: Any, sampler: DistributedSampler, seen: int) -> float:
    size = getattr(loader.batch_sampler, "batch_size", None)
    return math.nan if size is None else min(size, sampler.num_samples - seen)


def _tagged(noises: Probe | Sequence[Probe] | Mapping[str, Probe]) -> dict[str, Probe]:
    if isinstance(noises, Mapping):
        tagged = dict(noises)
    else:
        probes = [noises] if callable(noises) or isinstance(noises, NoiseCallback) else list(noises)
        tagged = {_tag(probe): probe for probe in probes}
        if len(tagged) < len(probes):
            raise ValueError(f"several noises have one tag among {[_tag(probe) for probe in probes]}; give a mapping from tag")
    if not tagged or CLEAN in tagged or any("/" in tag for tag in tagged):
        raise ValueError(f"noises must be at least one, and no tag may be {CLEAN!r} or have a slash, got {list(tagged)}")
    return tagged


def _tag(probe: Probe) -> str:
    if isinstance(probe, NoiseCallback):
        return probe.name
    name = getattr(probe, "__name__", type(probe).__name__)
    if not name.isidentifier():
        raise ValueError(f"{name} is no name for a noise; give a mapping from tag to noise")
    return name.lower()


def _check_probe(tag: str, probe: Probe, relative: bool, clip: Clip | None) -> None:
    if not isinstance(probe, NoiseCallback):
        check_options(probe, relative)
    elif relative or clip is not None:
        raise ValueError("relative and clip of a noise callback are its own: give them to the callback")
    if not getattr(probe, "is_probe", True):
        raise ValueError(f"{tag!r} cannot be a probe: {type(probe).__name__} mixes samples, or changes labels or gradients")
    if getattr(getattr(probe, "noise", probe), "mixes_rows", False):
        raise ValueError(f"{tag!r} cannot be a probe: it mixes rows, so the noise of a sample would depend on its batch")


def _levels_of(tag: str, probe: Probe, levels: Sequence[float] | Mapping[str, Sequence[float]] | None) -> tuple[float, ...]:
    noise = getattr(probe, "noise", probe)
    given = levels.get(tag) if isinstance(levels, Mapping) else levels
    if given is not None and not hasattr(given, "__iter__"):
        raise TypeError(f"levels must be a list, or a mapping from tag to lists, got {levels!r}")
    max_level = getattr(noise, "max_level", math.inf)
    chosen = tuple(check_level(level, max_level) for level in (getattr(noise, "severities", ()) if given is None else given))
    if not chosen:
        raise ValueError(f"{tag!r} needs levels: give levels=…, a list or a mapping from tag")
    if len({f"{level:g}" for level in chosen}) < len(chosen):
        raise ValueError(f"the levels of {tag!r} must differ in their first six digits, got {chosen}")
    return chosen
