"""The noises through which held-out data are looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning_noise._checks import check_level
from lightning_noise.batch import Path
from lightning_noise.callbacks.base import NoiseCallback
from lightning_noise.loop.loggers import as_text
from lightning_noise.loop.perturbation import Context
from lightning_noise.noise import Noise, NoiseFunction, as_noise
from lightning_noise.perturb.inputs import (
    Clip,
    check_floating,
    check_relative,
    perturb_batch,
    try_noise,
    validate_clip,
)
from lightning_noise.rng import Key

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Probe", "Probes"]

Probe = Noise | NoiseCallback | NoiseFunction
CLEAN = "clean"


class Condition(NamedTuple):
    """The noise, its level and draw."""

    noise: str
    level: float = 0.0
    draw: int = 0

    @property
    def place(self) -> str:
        return self.noise if self.noise == CLEAN else f"{self.noise}/{self.level:g}"


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
        relative: Literal["std"] | None,
        seed: int,
        n_draws: int = 1,
    ):
        self.noises = _tagged(noises)
        for tag, probe in self.noises.items():
            _check_probe(tag, probe, relative, clip)
        self.levels = {tag: _levels_of(tag, probe, levels) for tag, probe in self.noises.items()}
        if isinstance(levels, Mapping) and (unknown := levels.keys() - self.noises.keys()):
            raise ValueError(f"levels for {sorted(unknown)}, but the noises are {list(self.noises)}")
        self.clip = validate_clip(clip)
        self.relative: Literal["std"] | None = relative
        self.seed = seed
        self.n_draws = n_draws

    def describe(self) -> dict[str, str]:
        """Returns the noise of each tag in words, which are the same for probes that do the same."""
        options = "".join(f", {key}={value}" for key, value in {"relative": self.relative, "clip": self.clip}.items() if value)
        trained = ("level", "seed", "name", "probability")  # what has a meaning in training alone is left out
        return {tag: as_text(probe, without=trained) + options for tag, probe in self.noises.items()}

    def check(self, batch: Any, paths: list[Path]) -> None:
        """Raises an error where the leaves at the paths cannot take the noises."""
        for probe in self.noises.values():
            if not isinstance(probe, NoiseCallback):
                check_floating(batch, paths, probe)

    def perturbations(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, paths: list[Path], positions: range
    ) -> Iterator[tuple[Condition, AbstractContextManager[Any]]]:
        """Yields, for each noise, draw and level, the perturbation that yields the noisy batch; levels share a draw."""
        for (tag, probe), draw in product(self.noises.items(), range(self.n_draws)):
            key = Key((self.seed, "probe", tag), positions=positions)
            key = key / draw if draw else key  # the first is that of a monitor with one draw
            for level in self.levels[tag]:
                if isinstance(probe, NoiseCallback):
                    yield (
                        Condition(tag, level, draw),
                        probe.perturbation(Context(trainer, pl_module, is_probe=True), batch, level, key),
                    )
                else:
                    noisy = perturb_batch(batch, paths, probe, level, key, relative=self.relative, clip=self.clip)
                    yield Condition(tag, level, draw), nullcontext(noisy)

    def trials(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, paths: list[Path], positions: range
    ) -> Iterator[AbstractContextManager[Any]]:
        """Tries the noises on the batch, and yields a perturbation of each callback, in which the module is to be tried."""
        for tag, probe in self.noises.items():
            if isinstance(probe, NoiseCallback):
                # at the largest level, because at 0 nothing is done that could go wrong
                key, level = Key(("trial",), positions=positions), max(self.levels[tag])
                yield probe.perturbation(Context(trainer, pl_module, is_probe=True), batch, level, key)
            else:
                try_noise(batch, paths, probe, relative=self.relative, clip=self.clip)


def _tagged(noises: Probe | Sequence[Probe] | Mapping[str, Probe]) -> dict[str, Noise | NoiseCallback]:
    if isinstance(noises, Mapping):
        tagged = dict(noises)
    else:
        probes = [noises] if callable(noises) or isinstance(noises, NoiseCallback) else list(noises)
        tagged = {_tag(probe): probe for probe in probes}
        if len(tagged) < len(probes):
            raise ValueError(f"several noises have one tag among {[_tag(probe) for probe in probes]}; give a mapping from tag")
    if not tagged or CLEAN in tagged or any("/" in tag for tag in tagged):
        raise ValueError(f"noises must be at least one, and no tag may be {CLEAN!r} or have a slash, got {list(tagged)}")
    return {tag: probe if isinstance(probe, NoiseCallback) else as_noise(probe) for tag, probe in tagged.items()}


def _tag(probe: Probe) -> str:
    if isinstance(probe, NoiseCallback):
        return probe.name
    name = as_noise(probe).title
    if not name.isidentifier():
        raise ValueError(f"{name} is no name for a noise; give a mapping from tag to noise")
    return name.lower()


def _check_probe(tag: str, probe: Noise | NoiseCallback, relative: Literal["std"] | None, clip: Clip | None) -> None:
    if not isinstance(probe, NoiseCallback):
        check_relative(probe, relative)
    elif relative or clip is not None:
        raise ValueError("relative and clip of a noise callback are its own: give them to the callback")
    if isinstance(probe, NoiseCallback) and not probe.can_probe:
        raise ValueError(f"{tag!r} cannot be a probe: {type(probe).__name__} mixes samples, or changes labels or gradients")
    if probe.mixes_samples:
        raise ValueError(f"{tag!r} cannot be a probe: it mixes rows, so the noise of a sample would depend on its batch")


def _levels_of(
    tag: str, probe: Noise | NoiseCallback, levels: Sequence[float] | Mapping[str, Sequence[float]] | None
) -> tuple[float, ...]:
    given = levels.get(tag) if isinstance(levels, Mapping) else levels
    if given is not None and not hasattr(given, "__iter__"):
        raise TypeError(f"levels must be a list, or a mapping from tag to lists, got {levels!r}")
    chosen = tuple(check_level(level, probe.max_level) for level in (probe.severities if given is None else given))
    if not chosen:
        raise ValueError(f"{tag!r} needs levels: give levels=…, a list or a mapping from tag")
    if len({f"{level:g}" for level in chosen}) < len(chosen):
        raise ValueError(f"the levels of {tag!r} must differ in their first six digits, got {chosen}")
    return chosen
