"""The conditions under which held-out data are evaluated: no noise, or a noise at a level."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from lightning_noise._checks import check_level
from lightning_noise._usage import nearest
from lightning_noise.loop.dispatch import Perturbing
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.rng import Key

__all__ = ["CLEAN", "NOISY", "OVERALL", "WORST", "Condition", "Conditions", "Levels"]

Levels = Sequence[float] | Mapping[str, Sequence[float]]


class Condition(NamedTuple):
    """A noise, a level and a draw. Levels or draws that are ``None`` are averaged over.

    The noise may also be ``"clean"`` (no noise), ``"noisy"`` (the average over all noises and levels), ``"worst"`` (the worst
    noise and level) or ``"overall"`` (clean and noisy data compared).

    Attributes:
        noise: The name of the noise.
        level: The level.
        draw: The index of the draw.
    """

    noise: str
    level: float | None = None
    draw: int | None = None

    @property
    def place(self) -> str:
        """The noise and level as part of a key."""
        return self.noise if self.level is None else f"{self.noise}/{self.level:g}"


CLEAN, NOISY, WORST, OVERALL = (Condition(name) for name in ("clean", "noisy", "worst", "overall"))


class Conditions:
    """Noises, each at several levels and draws.

    Args:
        probes: The noise callback of each name; see :func:`~lightning_noise.callbacks.inputs.as_probes`.
        levels: The levels of all noises if they have one unit, or a mapping from name to levels. Default: the ``severities``
            of each noise.
        n_draws: The number of draws at each level.
        seed: The seed of the draws.
    """

    def __init__(
        self,
        probes: Mapping[str, Perturbing],
        levels: Levels | None = None,
        *,
        n_draws: int = 1,
        seed: int = 0,
    ):
        reserved = [condition.noise for condition in (CLEAN, NOISY, WORST, OVERALL)]
        if not probes or any(name in reserved or "/" in name for name in probes):
            raise ValueError(
                f"noises must hold at least one noise, and no name may have a slash or be one of {reserved}, got {list(probes)}"
            )
        if isinstance(levels, Mapping) and (unknown := levels.keys() - probes.keys()):
            close = {nearest(name, probes) or next(iter(probes)): levels[name] for name in sorted(unknown)}
            raise ValueError(f"levels are given for {sorted(unknown)}, but the noises are {list(probes)}; type levels={close}")
        self.probes = dict(probes)
        dimensions = {name: probe.dimension for name, probe in probes.items() if probe.dimension}
        if isinstance(levels, Sequence) and len(set(dimensions.values())) > 1:
            found = ", ".join(f"{name!r} ({dimension})" for name, dimension in dimensions.items())
            each = {name: list(levels) for name in probes}
            raise ValueError(f"a list of levels needs one unit, but the noises have several: {found}; type levels={each}")
        given = levels if isinstance(levels, Mapping) else dict.fromkeys(probes, levels)
        self.levels = {name: _check_levels(name, probe, given.get(name)) for name, probe in probes.items()}
        self.n_draws = n_draws
        self.seed = seed

    def __iter__(self) -> Iterator[Condition]:
        for name, draw in product(self.probes, range(self.n_draws)):
            for level in self.levels[name]:
                yield Condition(name, level, draw)

    def perturb(self, context: Context, batch: Any, positions: range) -> Iterator[tuple[Condition, Perturbation]]:
        """Yields the perturbation of the batch for each condition.

        The draw of a sample depends on its position in the data set alone, and is the same at all levels.
        """
        for condition in self:
            key = Key((self.seed, "probe", condition.noise), positions=positions)
            key = key / condition.draw if condition.draw else key  # so that the first draw is that of a single draw
            yield condition, self.probes[condition.noise].perturbation(context, batch, condition.level or 0.0, key)

    def trials(self) -> Conditions:
        """Returns each noise once, at its largest level, for the sanity check. At level 0 no error could show."""
        return Conditions(self.probes, {name: [max(levels)] for name, levels in self.levels.items()}, seed=self.seed)


def _check_levels(name: str, probe: Perturbing, levels: Sequence[float] | None) -> tuple[float, ...]:
    if levels is None:
        levels = probe.severities
    if isinstance(levels, str) or not hasattr(levels, "__iter__"):
        raise TypeError(f"levels must be a list, or a mapping from name to lists, got {levels!r}; type levels=[{levels}]")
    checked = tuple(check_level(level, probe.max_level) for level in levels)
    if not checked:
        raise ValueError(f"{name!r} needs levels: give levels=…, a list or a mapping from name")
    if len({f"{level:g}" for level in checked}) < len(checked):
        raise ValueError(f"the levels of {name!r} must differ in their first six digits, got {checked}")
    return checked
