"""Noise in the inputs of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightning_noise.batch import Selector, find_inputs
from lightning_noise.callbacks.adaptive import AnyLevel
from lightning_noise.callbacks.base import NoiseCallback
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.noise import Noise, NoiseFunction, as_noise
from lightning_noise.perturb.inputs import Clip, check_relative, perturb_batch, snr_db, try_noise, validate_clip
from lightning_noise.rng import Key

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

__all__ = ["AnyProbe", "InputNoise", "as_probe", "as_probes", "name_noises"]

AnyProbe = Noise | NoiseCallback | NoiseFunction


class InputNoise(NoiseCallback):
    r"""Perturbs the input of each training batch.

    The module gets a batch of the same type in which the input is :math:`y = \text{noise}(x, \text{level})`; the tensors of the
    data set and the batch that other callbacks see stay as they are. It acts from the start of the training step to the end
    of the backward pass, and never in validation, test and prediction. At level 0 the module gets the very batch. The draws
    differ from process to process. Where the input is also the target, as in an autoencoder whose batch is one tensor, the
    target is the noisy tensor, too; give such a module a batch of two. A ``training_step(dataloader_iter)`` gets its batches
    noisy where it fetches them, before it moves them to a device.

    A level that rises and then holds to the end, as ``schedules.Linear(0.0, 0.5, until=0.5)``, was the best of eleven shapes,
    by half a point of accuracy under noise at equal mean dose, so the dose matters before the shape: an
    :class:`~lightning_noise.AdaptiveLevel` finds it.

    It logs ``noise/<name>/level`` and ``noise/<name>/snr_db``, the signal-to-noise ratio of the batch.

    Args:
        noise: The noise, such as :class:`~lightning_noise.noise.Gaussian`.
        level: The amount: a number, a schedule, a callable from :class:`~lightning_noise.schedules.Progress` to a number, or an
            :class:`~lightning_noise.AdaptiveLevel`.
        inputs: Which leaf of the batch: an index, a key, a dotted path such as ``"0.image"``, where ``*`` is every element, or
            a list of these. Left out: a bare tensor, the first element of a sequence, or else the only floating-point leaf.
            Several leaves share the level and the choice of the samples, but not the draw.
        probability: The share of the samples that get noise, each sample by a draw of its own; of held-out data, all do.
        per_sample: Draw a level for each sample, uniformly from [0, level].
        relative: The level is in units of the standard deviation of each sample, for noises that are additive.
        clip: Bounds ``(low, high)`` of what comes out, either of which may be ``None``, or be given per channel (dimension 1).
        seed: The seed of the draws; left out, that of ``seed_everything``, or else 0.
        name: The name in the log, which also separates the draws of two callbacks; two of one name are an error.

    Raises:
        TypeError: The input is no dense tensor of floating-point numbers, which only
            :class:`~lightning_noise.noise.SwapNoise` does not need.
        ValueError: A level, probability or path is wrong; for paths the message lists the leaves of the batch.

    Example:
        >>> from lightning_noise import noise, schedules
        >>> callback = InputNoise(noise.Gaussian(), level=schedules.Linear(0.0, 0.5, until=0.6))
        >>> callback.name
        'input'
    """

    def __init__(
        self,
        noise: Noise | NoiseFunction,
        level: AnyLevel | None = None,
        *,
        inputs: Selector | None = None,
        probability: float = 1.0,
        per_sample: bool = False,
        relative: Literal["std"] | None = None,
        clip: Clip | None = None,
        seed: int | None = None,
        name: str = "input",
    ):
        self.noise = as_noise(noise)
        super().__init__(level, noise=self.noise, seed=seed, name=name)
        if not 0 <= probability <= 1:
            raise ValueError(f"probability must be in [0, 1], got {probability}")
        check_relative(self.noise, relative)
        self.inputs = inputs
        self.probability = probability
        self.per_sample = per_sample
        self.relative: Literal["std"] | None = relative
        self.clip = validate_clip(clip)

    def check(self, pl_module: LightningModule, batch: Any) -> None:
        try_noise(batch, find_inputs(batch, self.inputs), self.noise, relative=self.relative, clip=self.clip)

    def perturb(self, context: Context, batch: Any, level: float, key: Key, perturbation: Perturbation) -> Iterator[Any]:
        paths = find_inputs(batch, self.inputs, absent=True)
        noisy = perturb_batch(
            batch,
            paths,
            self.noise,
            level,
            key,
            probability=1.0 if context.is_probe else self.probability,  # clean ones say nothing of held-out data
            per_sample=self.per_sample,
            relative=self.relative,
            clip=self.clip,
        )
        if context.is_logged:
            perturbation.stats["snr_db"] = snr_db(batch, noisy, paths)
        yield noisy


def name_noises(
    noises: AnyProbe | Sequence[AnyProbe] | Mapping[str, AnyProbe],
) -> dict[str, AnyProbe]:
    """Returns noises by their names: the class name in lower case, or the name of a callback or function.

    Example:
        >>> from lightning_noise import noise
        >>> name_noises([noise.Gaussian(), InputNoise(noise.Uniform(), 0.1, name="even")]).keys()
        dict_keys(['gaussian', 'even'])
    """
    if isinstance(noises, Mapping):
        return dict(noises)
    probes = [noises] if callable(noises) or isinstance(noises, NoiseCallback) else list(noises)
    names = [_name(probe) for probe in probes]
    if len(set(names)) < len(names):
        raise ValueError(f"several noises have one name among {names}; give a mapping from name to noise")
    return dict(zip(names, probes, strict=True))


def as_probes(
    noises: Mapping[str, AnyProbe],
    *,
    inputs: Selector | None = None,
    relative: Literal["std"] | None = None,
    clip: Clip | None = None,
) -> dict[str, NoiseCallback]:
    """Returns a noise callback for each noise. A noise becomes an ``InputNoise``, and a noise callback stays as it is.

    Raises:
        ValueError: If held-out data cannot be evaluated under the noise, or an option is given for a noise callback.
    """
    return {name: as_probe(noise, inputs=inputs, relative=relative, clip=clip, name=name) for name, noise in noises.items()}


def as_probe(
    noise: AnyProbe,
    *,
    inputs: Selector | None = None,
    relative: Literal["std"] | None = None,
    clip: Clip | None = None,
    name: str | None = None,
) -> NoiseCallback:
    """Returns a noise callback under which held-out data can be evaluated.

    A noise becomes an ``InputNoise``. A noise callback stays the same object.

    Args:
        noise: The noise, a function or a noise callback.
        inputs: Which leaf of the batch the noise perturbs.
        relative: The unit of the level, as for ``InputNoise``.
        clip: Bounds of the noisy input.
        name: The name in messages. Default: the name of the callback, or of the noise in lower case.

    Raises:
        ValueError: Held-out data cannot be evaluated under the noise, or an option is given for a noise callback.

    Example:
        >>> from lightning_noise import noise
        >>> as_probe(noise.Gaussian()).name
        'gaussian'
    """
    if name is None:
        name = _name(noise)
    if isinstance(noise, NoiseCallback):
        probe = noise
        if relative or clip is not None:
            raise ValueError(f"relative and clip are arguments of a callback; type {type(noise).__name__}(…, clip={clip})")
    else:
        probe = InputNoise(noise, inputs=inputs, relative=relative, clip=clip, name=name)
    if not probe.can_probe:
        raise ValueError(f"{name!r} cannot be a probe: {type(noise).__name__} mixes samples, or changes labels or gradients")
    if probe.mixes_samples:
        raise ValueError(f"{name!r} cannot be a probe: it mixes rows, so the noise of a sample would depend on its batch")
    return probe


def _name(probe: AnyProbe) -> str:
    if isinstance(probe, NoiseCallback):
        return probe.name
    name = as_noise(probe).title
    if not name.isidentifier():
        raise ValueError(f"{name} is no name for a noise; give a mapping from name to noise")
    return name.lower()
